#!/usr/bin/env bash
# The flow TTS on one GPU: bash benchmarks/flow_gpu.sh LJSPEECH_METADATA_CSV OUT
# Speaks LJSpeech's sentences with espeak-ng, trains configs/flow_spoken.yaml for at most six minutes, judges the 100 that
# were held out, and takes the speed and memory of configs/flow_ljspeech.yaml on the same corpus, with ByT5's shape and
# random weights, which cost the same. OUT/{table.txt,summary.json,flow_spoken.jsonl,flow_ljspeech.jsonl} is what it found.
set -euo pipefail
metadata=$(realpath "$1") out=$(realpath -m "$2")
cd "$(dirname "$0")/.."
mkdir -p "$out"
python data.py demo --transcripts "$metadata" --heldout 100 --out data/spoken
timeout --preserve-status -s TERM 360 python train_flow_tts.py --config configs/flow_spoken.yaml --wandb_mode disabled
python evaluate.py --ckpt runs/flow_spoken --recogniser sentences --out runs/flow_spoken/evaluation
cp runs/flow_spoken/evaluation/{table.txt,summary.json} "$out"
cp runs/flow_spoken/metrics.jsonl "$out/flow_spoken.jsonl"
python - <<'PY'
from transformers import T5Config, T5EncoderModel
T5EncoderModel(T5Config(vocab_size=384, d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_heads=6,
                        feed_forward_proj="gated-gelu")).save_pretrained("data/byt5-random")
PY
timeout --preserve-status -s TERM 90 python train_flow_tts.py --config configs/flow_ljspeech.yaml --data_dir data/spoken \
    --text_encoder data/byt5-random --cache_text off --speak_every 0 --eval_every 100000 --save_every 100000 \
    --out_dir runs/flow_ljspeech_speed --wandb_mode disabled
cp runs/flow_ljspeech_speed/metrics.jsonl "$out/flow_ljspeech.jsonl"
tail -n 1 "$out/flow_ljspeech.jsonl"
