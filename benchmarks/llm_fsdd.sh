#!/usr/bin/env bash
# Real voices: bash benchmarks/llm_fsdd.sh FSDD
# FSDD: the Free Spoken Digit Dataset in LJSpeech's layout, its metadata.csv with id|text|speaker. The demo with voices is
# trained with a codec that is fitted to both, then fine-tuned on the digits; take 9 of each is held out, and evaluated.
set -euo pipefail
digits=$(realpath "$1")
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
mkdir -p data/fsdd_corpus
ln -sfn "$digits/wavs" data/fsdd_corpus/wavs
cp "$digits/metadata.csv" data/fsdd_corpus
cut -d '|' -f 1 "$digits/metadata.csv" | grep '_9$' > data/fsdd_corpus/heldout.txt

python data.py for configs/llm_fsdd.yaml
python train_llm_tts.py --config configs/llm_demo_speakers.yaml --data_dir data/voices_fsdd --codebook_size 4096 \
    --out_dir runs/llm_voices_fsdd --resume
python train_llm_tts.py --config configs/llm_fsdd.yaml --resume
python evaluate.py --ckpt runs/llm_fsdd
