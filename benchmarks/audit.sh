#!/usr/bin/env bash
# bash benchmarks/audit.sh [flow|codec|llm] [OUT]: of the demo's transcripts one in twenty is exchanged for another of
# these; the flow TTS, or another, is trained on them, and evaluate.py audit looks for them. Prints how many stand in the
# first 5, 6, 7 and 10 % of its list. 20 minutes of two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" WANDB_MODE=disabled
system=${1:-flow}
case $system in flow | codec | llm) ;; *) echo "error: $system is none of flow, codec, llm" >&2 && exit 1 ;; esac
out=$(realpath -m "${2:-data/audit}")
python data.py demo --out "$out/demo"
mkdir -p "$out/corpus"
ln -sfn "$out/demo/corpus/wavs" "$out/corpus/wavs"
cp "$out/demo/corpus/heldout.txt" "$out/demo/corpus/grammar.jsgf" "$out/corpus/"
python - "$out" <<'PYTHON'
import random, sys
from pathlib import Path

out = Path(sys.argv[1])
rows = [line.split("|") for line in (out / "demo/corpus/metadata.csv").read_text().splitlines()]
heldout = {*(out / "corpus/heldout.txt").read_text().split()}
exchanged = random.Random(3).sample([n for n, row in enumerate(rows) if row[0] not in heldout], len(rows) // 20)
texts = [rows[n][1] for n in exchanged]
for n, text in zip(exchanged, texts[1:] + texts[:1]):
    rows[n][1:3] = text, text
(out / "corpus/metadata.csv").write_text("".join("|".join(row) + "\n" for row in rows))
(out / "exchanged.txt").write_text("".join(rows[n][0] + "\n" for n in exchanged))
PYTHON
made=(--root "$out/corpus" --out "$out/$system")
case $system in
    flow) trainer=train_flow_tts.py config=flow_demo
        python data.py ljspeech "${made[@]}" ;;
    codec) trainer=train_codec_lm.py config=codec_demo_text
        python data.py tokenize --codec mel_rvq --hop_length 441 --codebooks 4 --codebook_size 256 "${made[@]}" ;;
    llm) trainer=train_llm_tts.py config=llm_demo
        python data.py tokenize --codec mel_rvq --hop_length 441 --codebooks 1 --codebook_size 1024 "${made[@]}" ;;
esac
python $trainer --config configs/$config.yaml --data_dir "$out/$system" --out_dir "$out/run_$system"
python evaluate.py audit --ckpt "$out/run_$system"
python - "$out" $system <<'PYTHON'
import csv, sys
from pathlib import Path

out, system = Path(sys.argv[1]), sys.argv[2]
wrong, rows = {*(out / "exchanged.txt").read_text().split()}, [*csv.DictReader((out / f"run_{system}/audit/audit.csv").open())]
for name, some in (("list", rows), ("by the gain alone", sorted(rows, key=lambda row: float(row["gain"])))):
    for share in (0.05, 0.06, 0.07, 0.1):
        found = sum(row["id"] in wrong for row in some[:round(share * len(some))])
        print(f"{name}, first {share:.0%} of {len(some):,}: {found / len(wrong):.1%} of {len(wrong)} exchanged ones")
marked = [row["id"] in wrong for row in rows if row["drop"]]
print(f"marked: {len(marked)}, of which {sum(marked)} were exchanged")
PYTHON
