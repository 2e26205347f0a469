#!/usr/bin/env bash
# ./run.sh                       the demo of the flow TTS: corpus, training, evaluation, nothing to download but packages
# ./run.sh test                  the test suite, on all cores
# ./run.sh demo [flow | codec | llm] [--config FILE] [--key value …]
#                                a system's demo, or that of a config: codec_demo_text.yaml, llm_demo_speakers.yaml …
# ./run.sh [flow | codec | llm] [--gpus N] [--config FILE] [--key value …]
#                                the published training run, or that of a config; a key is any key of the config
# NUM_GPUS and BATCH_SIZE stand for --gpus and --batch_size. For several machines set NNODES, NODE_RANK, MASTER_ADDR and
# MASTER_PORT on each of them. PYTHON names the interpreter for .venv.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "error: $*" >&2; exit 1; }

# The environment: .venv with the packages of requirements.txt, made again only when those change.
environment() {
    local python=${PYTHON:-python3} wanted
    command -v "$python" >/dev/null || fail "trivox needs Python 3.11 or newer, and there is no $python on the PATH"
    wanted=$(cat requirements.txt)
    if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "trivox needs Python 3.11 or newer; $("$python" --version) is too old (PYTHON=/path/to/python ./run.sh names another)"
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "$python has no module venv: install it (on Debian and Ubuntu: apt install python3-venv)"
        echo "making .venv and installing requirements.txt"
        "$python" -m venv .venv || fail "could not make .venv with $python"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
            fail "could not install requirements.txt; what pip said stands above"
        echo "$wanted" > .venv/installed
    fi
    PATH="$PWD/.venv/bin:$PATH"
}

# Run a command, and hand SIGINT and SIGTERM on as SIGTERM to the processes that train, so that they end their step and
# save. They are the command itself, or where it is torchrun its children. A stop that was asked for ends this script too.
interruptible() {
    local pid status=0 stopped=
    set -m  # in a process group of its own, so that Ctrl-C reaches this script alone
    "$@" &
    pid=$!
    set +m
    trap 'stopped=1' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        if [ -n "$stopped" ]; then
            if [ "$1" = torchrun ]; then kill -TERM $(cat "/proc/$pid"/task/*/children) || true; else kill -TERM "$pid" || true; fi
            sleep 1  # and again, in case it had not yet begun to listen
        else
            wait "$pid" && status=0 || status=$?
        fi
    done 2>/dev/null
    wait "$pid" 2>/dev/null && status=0 || status=$?
    trap - INT TERM
    [ -z "$stopped" ] && [ "$status" = 0 ] || exit "$status"
}

# torchrun itself ignores the signals: the processes that it starts take them and leave with 0, and then so does it.
torchrun() {
    trap "" INT TERM
    exec python -m torch.distributed.run --signals-to-handle SIGQUIT "$@"
}

# Train in one process, or by torchrun in one a GPU.
train() {
    local found machines=(--standalone)
    set -- "$trainer" --config "$config" --resume ${flags[@]+"${flags[@]}"}  # bash 3 has no empty arrays
    if [ "$gpus" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
        interruptible python "$@"
        return
    fi
    found=$(python -c 'import torch; print(torch.cuda.device_count())')
    if [ "$found" = 0 ]; then
        echo "no GPU here: $gpus processes share the CPU and talk over gloo"
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + gpus - 1) / gpus ))}
    elif [ "$gpus" -gt "$found" ]; then
        fail "--gpus $gpus, but torch sees $found on this machine"
    fi
    [ "${NNODES:-1}" = 1 ] || machines=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?is this machine the 0th, 1st …?}"
        --master-addr "${MASTER_ADDR:?which machine is the 0th?}" --master-port "${MASTER_PORT:-29500}")
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
    interruptible torchrun --nproc-per-node "$gpus" "${machines[@]}" "$@"
}

# What the published run of a system needs and what is not here yet, said before anything is fetched.
prepare_flow() {
    if grep -q '^data_dir: data/ljspeech$' "$config" && [ ! -f data/ljspeech/dataset_stats.json ]; then
        echo "to download: LJSpeech 1.1 (2.6 GB, public domain); then, when they are first used, ByT5-small (1.2 GB, Apache 2.0),"
        echo "BigVGAN v2 (450 MB, MIT) and Whisper base.en (145 MB, MIT)"
        python data.py ljspeech
    fi
}

# Likewise the tokens of a codec LM's config.
prepare_codec() {
    [ -n "$tokens" ] || tokens=$(sed -n 's/^data_dir: *//p' "$config")
    [ ! -f "$tokens/codec.json" ] || return 0
    case $tokens in
        data/demo_mel_rvq)
            [ -f data/demo/dataset_stats.json ] || python data.py demo
            python data.py tokenize --codec mel_rvq --root data/demo/corpus --out "$tokens" --hop_length 441 \
                --codebooks 4 --codebook_size 256 ;;
        data/demo_music)
            python data.py demo_music --out "$tokens" --codebook_size 256 ;;
        data/ljspeech_encodec|data/ljspeech_encodec_sentences)
            echo "to download: LJSpeech 1.1 (2.6 GB, public domain) and EnCodec's weights (93 MB, MIT)"
            python -c 'from trivox import common, corpora; import pathlib
common.run(lambda _: corpora.download_ljspeech(pathlib.Path("data")), [])'
            [ "$tokens" = data/ljspeech_encodec ] && chunks=(--chunk_seconds 8) || chunks=()
            python data.py tokenize --codec encodec_24khz --root data/LJSpeech-1.1 --out "$tokens" \
                ${chunks[@]+"${chunks[@]}"} ;;
        data/fma_large_dac)
            [ -d data/fma_large ] || fail "FMA-Large is not at data/fma_large: unpack fma_large.zip (93 GiB, Creative" \
                "Commons, https://github.com/mdeff/fma) there, or link to it"
            echo "to download: DAC's weights (307 MB, MIT)"
            python data.py tokenize --codec dac_44khz --root data/fma_large --out "$tokens" ;;
        *) fail "there are no tokens at $tokens: python data.py tokenize --codec … --root … --out $tokens" ;;
    esac
}

# Likewise the sentences of an LLM TTS's config.
prepare_llm() {
    local voices=en-us,en-us+f2,en-gb-x-rp+m3,en-gb-scotland+f4,en-us+m7,en-029+m1 others=en-us+f5,en-gb-x-rp+m5
    [ -n "$tokens" ] || tokens=$(sed -n 's/^data_dir: *//p' "$config")
    [ ! -f "$tokens/codec.json" ] || return 0
    case $tokens in
        data/demo_llm)
            [ -f data/demo/dataset_stats.json ] || python data.py demo
            python data.py tokenize --codec mel_rvq --root data/demo/corpus --out "$tokens" --hop_length 441 \
                --codebooks 1 --codebook_size 1024 ;;
        data/demo_voices)
            python data.py demo --out data/voices --voices "$voices" --heldout_voices "$others"
            python data.py tokenize --codec mel_rvq --root data/voices/corpus --out "$tokens" --hop_length 441 \
                --codebooks 1 --codebook_size 2048
            python data.py embed --data "$tokens" --embedder stats ;;
        data/emilia)
            echo "to download: Emilia-YODAS in NeuCodec's codes (about 25 GB, CC BY 4.0)"
            python data.py emilia --out "$tokens" ;;
        data/ljspeech_neucodec)
            echo "to download: LJSpeech 1.1 (2.6 GB, public domain) and NeuCodec's weights (2.5 GB, Apache 2.0)"
            python -c 'from trivox import common, corpora; import pathlib
common.run(lambda _: corpora.download_ljspeech(pathlib.Path("data")), [])'
            python data.py tokenize --codec neucodec --root data/LJSpeech-1.1 --out "$tokens" ;;
        *) fail "there are no tokens at $tokens: python data.py tokenize --codec neucodec --root … --out $tokens, and for" \
            "voices python data.py embed --data $tokens --embedder ecapa" ;;
    esac
}

# Evaluate a run, or show again what was found.
evaluate() {
    if [ "$run/evaluation/table.txt" -nt "$run/checkpoints/latest/config.yaml" ]; then
        echo && cat "$run/evaluation/table.txt"
    else
        python evaluate.py --ckpt "$run"
    fi
}

demo_codec() {
    prepare_codec
    train
    evaluate
    cat <<END

listen  $run/evaluation/000.wav and on, $run/samples/step_…/; recordings through the codec are 000_reference.wav and on
look    $run/evaluation/000.png and on, $run/curves.png
sample  .venv/bin/python sample.py --ckpt $run --seconds 10 --temperature 0.8 --out out.wav
END
}

demo_llm() {
    prepare_llm
    train
    evaluate
    cat <<END

listen  $run/evaluation/000.wav and on; beside each the recording through the codec, 000_reference.wav
look    $run/evaluation/000.png and on, $run/curves.png, $run/coverage.png
speak   .venv/bin/python sample.py --ckpt $run --text "The captain painted seven wooden boxes yesterday." --out out.wav
END
}

demo_flow() {
    [ -f data/demo/dataset_stats.json ] || python data.py demo
    train
    evaluate
    cat <<END

listen  $run/evaluation/000.wav and on; beside each the recording, 000_reference.wav
look    $run/evaluation/000.png and on, $run/curves.png
speak   .venv/bin/python sample.py --ckpt $run --text "The captain painted seven wooden boxes yesterday." --out out.wav
END
}

case ${1:-demo} in
    -h|--help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
    test) environment; shift; OMP_NUM_THREADS=1 exec python -m pytest -q -n auto --dist loadfile "$@" ;;
    demo) mode=demo; shift || true ;;
    *) mode=train ;;
esac
case ${1:-} in
    flow|codec|llm) system=$1; shift ;;
    --*|"") system=flow ;;
    *) fail "there is no '$1': ./run.sh [test | demo] [flow | codec | llm] [--gpus N] [--config FILE] [--key value …]" ;;
esac
case $mode-$system in
    demo-flow) config=configs/flow_demo.yaml ;;
    train-flow) config=configs/flow_ljspeech.yaml ;;
    demo-codec) config=configs/codec_demo.yaml ;;
    train-codec) config=configs/codec_ljspeech.yaml ;;
    demo-llm) config=configs/llm_demo.yaml ;;
    train-llm) config=configs/llm_177m.yaml ;;
esac
case $system in flow) trainer=train_flow_tts.py ;; codec) trainer=train_codec_lm.py ;; llm) trainer=train_llm_tts.py ;; esac
gpus=${NUM_GPUS:-1} flags=() run= tokens=
[ -z "${BATCH_SIZE:-}" ] || flags+=(--batch_size "$BATCH_SIZE")
while [ $# -gt 0 ]; do
    key=${1%%=*} value=
    case $key in --gpus|--config|--out[-_]dir|--data[-_]dir)
        if [[ $1 = *=* ]]; then value=${1#*=}; else [ $# -gt 1 ] || fail "$1 needs a value"; value=$2; shift; fi ;;
    esac
    case $key in
        --gpus) gpus=$value ;;
        --config) config=$value ;;
        --out[-_]dir) run=$value; flags+=(--out_dir "$value") ;;
        --data[-_]dir) tokens=$value; flags+=(--data_dir "$value") ;;
        *) flags+=("$1") ;;
    esac
    shift
done
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "--gpus takes a whole number from 1, not '$gpus'"
[ -f "$config" ] || fail "there is no config $config"
[ -n "$run" ] || run=$(sed -n 's/^out_dir: *//p' "$config")

environment
if [ "$mode" = demo ]; then
    "demo_$system"
else
    "prepare_$system"
    train
fi
