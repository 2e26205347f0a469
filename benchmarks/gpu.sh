#!/usr/bin/env bash
# The figures of a GPU, in parts of at most nine minutes each, on a machine with the packages of requirements.txt:
#
#     bash benchmarks/gpu.sh OUT [check] [kernel] [train] [decode] [codec] [flow] [scale]
#
# check   the kernels beside float64 and under compute-sanitizer; each trainer in each precision beside the CPU; resuming
# kernel  the delta rule beside fla-core, where that is installed
# train   clips or tokens a second, and memory, of the published configs on random data
# decode  FlexAttention beside dense attention, CUDA graphs beside steps one by one; tokens a second
# codec   the whole published speech recipe on LJSpeech's sentences, which espeak-ng speaks; 8 s sampled
# flow    configs/flow_open.yaml for six minutes, in batches of 64; held-out sentences judged, and in a tar to be heard
# scale   training on 1, 2, 4 and 8 GPUs, as many as there are
#
# Without parts: all. What a part prints is in OUT/<part>.txt, what it measures in benchmarks/gpu/*.json, of which there are
# copies in OUT; `python benchmarks/results.py` makes docs/results.md of them. A part that fails does not stop the next;
# what a part has made is not made again. DEVICE=cpu goes through the same with the demos, for minutes, and measures nothing.
set -uo pipefail
[ $# -gt 0 ] || { sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(realpath -m "$1") parts=""
shift
while [ $# -gt 0 ]; do
    case $1 in
        check | kernel | train | decode | codec | flow | scale) parts+=" $1"; shift ;;
        *) echo "error: $1 is not a part" >&2; exit 2 ;;
    esac
done
cd "$(dirname "$0")/.."
[ ! -d .venv ] || PATH="$PWD/.venv/bin:$PATH"
mkdir -p "$out"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
if [ "${DEVICE:-}" = cpu ]; then export CUDA_VISIBLE_DEVICES=""; fi
try() { "$@" || bad=1; }  # what does not work, and does not stop the rest of its part
on_gpu() { [ "${DEVICE:-}" != cpu ]; }

check() {
    try python benchmarks/trainers.py
    if on_gpu; then try python bench.py delta_rule check; fi
    local sanitizer
    sanitizer=$(command -v compute-sanitizer || find /usr/local /opt -name compute-sanitizer -type f 2>/dev/null | head -n 1)
    if on_gpu && [ -n "$sanitizer" ]; then
        try "$sanitizer" --error-exitcode 1 python bench.py delta_rule check
    else
        echo "no compute-sanitizer here"
    fi
}

kernel() { python bench.py delta_rule; }

train() {
    local configs="codec_ljspeech codec_music_300m flow_ljspeech llm_177m llm_550m llm_1b" config
    on_gpu || configs="codec_demo flow_demo llm_demo"
    for config in $configs; do try python bench.py train "configs/$config.yaml"; done
}

decode() {
    if on_gpu; then try python bench.py llm configs/llm_177m.yaml; else try python bench.py decode configs/llm_demo.yaml; fi
    try python bench.py decode "configs/$(on_gpu && echo codec_ljspeech || echo codec_demo).yaml"
}

spoken() {  # spoken FOLDER VOICES: LJSpeech's sentences, without a GPU the demo's
    [ -e "$1/dataset_stats.json" ] || python data.py "$(on_gpu && echo open || echo demo)" --voices "$2" --out "$1"
}

codec() {
    spoken data/gpu_spoken en-us || return
    [ -e data/gpu_tokens/codec.json ] || python data.py tokenize --codec mel_rvq --root data/gpu_spoken/corpus \
        --out data/gpu_tokens --sample_rate 24000 --hop_length 320 --codebooks 8 --codebook_size 1024 --chunk_seconds 8 ||
        return
    local start=$SECONDS few=()
    on_gpu || few=(--steps 2 --batch_size 2 --compile false --width 48 --layers 2)
    python train_codec_lm.py --config configs/codec_ljspeech.yaml --codec mel_rvq --data_dir data/gpu_tokens --resume \
        --sample_every 0 --out_dir runs/gpu_codec --wandb_mode disabled "${few[@]}" || return
    echo "trained in $((SECONDS - start)) s, or the rest of it"
    cp runs/gpu_codec/metrics.jsonl "$out/codec.jsonl"
    for n in 1 2; do try python sample.py --ckpt runs/gpu_codec --seconds 8 --out "$out/sample$n.wav"; done
}

flow() {
    spoken data/gpu_open auto || return
    local how=(--batch_size 64 --steps 3200 --eval_every 1600 --compile true)  # H100: 72 s of compiling, then 12 steps a second
    on_gpu || how=(--steps 2 --batch_size 2)
    timeout --preserve-status -s TERM 360 python train_flow_tts.py --config configs/flow_open.yaml --resume \
        --data_dir data/gpu_open --out_dir runs/gpu_flow --wandb_mode disabled --speak_every 0 "${how[@]}" || return
    cp runs/gpu_flow/metrics.jsonl "$out/flow.jsonl"
    on_gpu || { python sample.py --ckpt runs/gpu_flow --text "Seven boxes." --out "$out/flow.wav"; return; }
    python evaluate.py --ckpt runs/gpu_flow --clips 128 --out runs/gpu_flow/evaluation || return
    cp runs/gpu_flow/evaluation/{table.txt,summary.json} "$out"
    tar -cf "$out/flow.tar" --exclude '*_reference.wav' -C runs/gpu_flow/evaluation .
}

scale() {
    local gpus n codes
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    [ "$gpus" -gt 0 ] || { echo "no GPU here"; return; }
    python data.py for configs/llm_demo.yaml || return
    codes=$(python -c 'import json; print(json.load(open("data/demo_llm/codec.json"))["codebook_size"])')
    for n in 1 2 4 8; do
        [ "$n" -le "$gpus" ] || break
        rm -rf "runs/gpu_scale_$n"
        try torchrun --standalone --nproc_per_node "$n" train_llm_tts.py --config configs/llm_177m.yaml --codec mel_rvq \
            --data_dir data/demo_llm --sample_rate 22050 --codebook_size "$codes" --steps 60 --log_every 20 \
            --sample_every 0 --eval_every 60 --out_dir "runs/gpu_scale_$n" --wandb_mode disabled
        try tail -n 2 "runs/gpu_scale_$n/metrics.jsonl"
    done
}

failed=""
for part in ${parts:-check kernel train decode codec flow scale}; do
    start=$SECONDS
    (bad=0; $part && [ $bad = 0 ]) 2>&1 | tee "$out/$part.txt" || failed+=" $part"
    echo "[$part: $((SECONDS - start)) s]"
    cp -r benchmarks/gpu "$out/" 2>/dev/null
done
[ -z "$failed" ] || { echo "error: failed:$failed" >&2; exit 1; }
