#!/usr/bin/env bash
# The codec LM on one GPU: bash benchmarks/codec_gpu.sh prepare|measure WORK LJSPEECH_METADATA_CSV OUT
# `prepare`, a call of its own, speaks LJSpeech's sentences with espeak-ng into WORK and encodes them by mel_rvq with
# EnCodec's geometry (75 frames/s, 8 books of 1024, chunks of 8 s). `measure` trains the whole published speech recipe on
# them, samples 8 s, and takes the speed of the music preset at its micro-batch on random codes. Results are in OUT.
set -euo pipefail
what=$1 work=$(realpath -m "$2") metadata=$(realpath "$3") out=$(realpath -m "$4")
cd "$(dirname "$0")/.."
mkdir -p "$work" "$out"
if [ "$what" = prepare ]; then
    python data.py demo --transcripts "$metadata" --heldout 100 --out "$work/spoken"
    python data.py tokenize --codec mel_rvq --root "$work/spoken/corpus" --out "$work/tokens" --sample_rate 24000 \
        --hop_length 320 --codebooks 8 --codebook_size 1024 --chunk_seconds 8
    exit
fi
start=$SECONDS
python train_codec_lm.py --config configs/codec_ljspeech.yaml --codec mel_rvq --data_dir "$work/tokens" --sample_every 0 \
    --out_dir "$work/run" --wandb_mode disabled
echo "12,000 steps: $((SECONDS - start)) s" | tee "$out/codec_speech.txt"
cp "$work/run/metrics.jsonl" "$out/codec_speech.jsonl"
for n in 1 2; do python sample.py --ckpt "$work/run" --seconds 8 --out "$out/sample$n.wav"; done | tee -a "$out/codec_speech.txt"
python bench.py decode configs/codec_ljspeech.yaml | tee -a "$out/codec_speech.txt"
python - "$work/music" <<'PY'
import json, pathlib, sys
import numpy as np
folder, rows = pathlib.Path(sys.argv[1]), []
folder.mkdir(exist_ok=True)
np.random.default_rng(0).integers(0, 1024, (64 * 2040, 9)).astype(np.uint16).tofile(folder / "tokens_00000.u16")
for i in range(64):
    rows.append({"id": str(i), "text": "", "speaker": "", "split": "val" if i < 4 else "train", "source": str(i), "start": 0,
                 "offset": i * 2040, "frames": 2040})
(folder / "tokens_00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
(folder / "codec.json").write_text(json.dumps({"codec": "dac_44khz", "sample_rate": 44100, "frame_rate": 44100 / 512,
                                               "codebooks": 9, "codebook_size": 1024}))
PY
timeout --preserve-status -s TERM 75 python train_codec_lm.py --config configs/codec_music_300m.yaml --data_dir "$work/music" \
    --sample_every 0 --eval_every 100000 --save_every 100000 --log_every 1 --out_dir "$work/run_music" --wandb_mode disabled
cp "$work/run_music/metrics.jsonl" "$out/codec_music.jsonl"
tail -n 1 "$out/codec_music.jsonl"
