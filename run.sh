#!/usr/bin/env bash
# ./run.sh                       the demo of the flow TTS: corpus, training, evaluation, nothing to download but packages
# ./run.sh test                  the test suite, on all cores
# ./run.sh demo [flow | codec | llm] [--config FILE] [--key value …]
#                                a system's demo, or that of a config: codec_demo_text.yaml, llm_demo_speakers.yaml …
# ./run.sh [flow | codec | llm] [--gpus N] [--config FILE] [--key value …]
#                                the published training run, or that of a config; a key is any key of the config
# NUM_GPUS and BATCH_SIZE stand for --gpus and --batch_size. For several machines set NNODES, NODE_RANK, MASTER_ADDR and
# MASTER_PORT on each of them; they share the disk of out_dir. Where one of several processes dies, all start again from
# the last checkpoint, three times or --max-restarts N. PYTHON names the interpreter for .venv.
set -euo pipefail
cd "$(dirname "$0")"

fail() { echo "error: $*" >&2; exit 1; }

# The environment: .venv with the packages of requirements.txt, made again only when those change, and extra ones.
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
        interruptible .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
            fail "could not install requirements.txt; what pip said stands above"
        echo "$wanted" > .venv/installed
        rm -f .venv/extra
    fi
    extra
    PATH="$PWD/.venv/bin:$PATH"
}

# The packages of requirements-extra.txt, tried once: all together and, as one may have vanished, each by itself. Nothing
# needs them, so a note says what there is not.
extra() {
    local wanted line missing=
    wanted=$(cat requirements-extra.txt)
    [ "$(cat .venv/extra 2>/dev/null)" != "$wanted" ] || return 0
    echo "installing requirements-extra.txt"
    : > .venv/extra.log
    if ! pip_extra -r requirements-extra.txt; then
        while IFS= read -r line <&3; do
            [ -z "${line%%#*}" ] || pip_extra "${line%%[ #]*}" || missing+=$'\n'"    $line"
        done 3< requirements-extra.txt
    fi
    [ -z "$missing" ] || echo "note: these extra packages could not be installed (.venv/extra.log says why), and all goes" \
        "on without:$missing"$'\n'"They are tried again when you say so:" \
        ".venv/bin/python -m pip install --no-deps -r requirements-extra.txt"
    echo "$wanted" > .venv/extra
}

pip_extra() {
    interruptible .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --retries 1 --timeout 20 \
        "$@" >> .venv/extra.log 2>&1
}

# Signals. Each command runs in a process group of its own, so that Ctrl-C reaches this script alone. It hands a signal on
# as SIGTERM, waits for the command's end, and ends with the status of a program that the signal has ended.
stopped= pid= kind=
# Python's keeper of semaphores removes what stopped processes leave, and need not warn of it.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::UserWarning:multiprocessing.resource_tracker}
signals() {
    trap 'stopped=129; hand_on' HUP
    trap 'stopped=130; hand_on' INT
    trap 'stopped=143; hand_on' TERM
}

# To what trains, which ends its step and saves; elastic.py hands it on to its processes. What makes data or evaluates
# goes on where it stopped, so that there all processes of the group may end at once.
hand_on() {
    case $kind in
        "") ;;
        "python train_"* | "python -m trivox.elastic "*) kill -TERM "$pid" ;;
        *) kill -TERM -- "-$pid" ;;
    esac 2>/dev/null || true
}

interruptible() {
    local status=0
    [ -z "$stopped" ] || exit "$stopped"
    set -m
    "$@" &
    pid=$! kind=$*
    set +m
    [ -n "$stopped" ] || wait "$pid" || status=$?
    while [ -n "$stopped" ] && kill -0 "$pid"; do
        hand_on
        sleep 0.5 || true  # and again, in case elastic.py's processes were only about to start
    done 2>/dev/null
    kind=
    [ -z "$stopped" ] || { kill -TERM -- "-$pid" 2>/dev/null || true; exit "$stopped"; }
    return "$status"
}

signals
case ${1:-} in
    -h|--help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
    test) environment; shift; OMP_NUM_THREADS=1 exec python -m pytest -q -n auto --dist loadfile "$@" ;;
esac
environment
settings=$(signals; interruptible python -m trivox.launch "$@") || exit
eval "$settings"  # sets mode, system, config, data_dir, run, closing and command
interruptible python data.py for "$config" --data_dir "$data_dir" --system "$system" || exit
interruptible "${command[@]}" || exit
[ "$mode" = demo ] || exit 0
if [ "$run/evaluation/table.txt" -nt "$run/metrics.jsonl" ]; then
    echo && cat "$run/evaluation/table.txt"
else
    interruptible python evaluate.py --ckpt "$run" || exit
fi
echo "$closing"
