"""run.sh, launch.py and elastic.py: what they refuse, what they make of their arguments, how a signal ends them.

A stub stands for the python of .venv. What it says in place of launch.py was said in this process, which has imported
the trainers already.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, checkpoint, refusal, same
from helpers import free_port

from trivox import launch

STUB = """#!/bin/sh
case "$*" in
    *"$STAGE"*) ;;
    *trivox.launch*) cat "$LAUNCHED"; exit ;;
    *) echo "python $*"; exit ;;
esac
sleep 60 &
trap 'kill $! 2>/dev/null; echo saved >&2; exit' TERM
echo started >&2
wait
"""
REAL = f"""#!/bin/sh
export PYTHONPATH={ROOT}
case "$1 $2" in
    "-m trivox.launch") exec {sys.executable} "$@" ;;
    "data.py for") shift; exec {sys.executable} {ROOT}/data.py "$@" ;;
esac
printf '[%s]' "$@"
"""
TRAINS = f"""#!/bin/sh
case "$*" in
    *trivox.launch*) cat "$LAUNCHED" ;;
    "data.py for"*) ;;
    *) cd {ROOT} && exec {sys.executable} "$@" ;;
esac
"""


def not_ignored():
    """What a suite under nohup or in the background ignores, which bash could not trap if it began so."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of the house whose environment is made already, and whose python only says what it was asked."""
    monkeypatch.chdir(tmp_path)
    for name in ("run.sh", "requirements.txt", "requirements-extra.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (tmp_path / ".venv" / "installed").write_text((ROOT / "requirements.txt").read_text())
    (tmp_path / ".venv" / "extra").write_text((ROOT / "requirements-extra.txt").read_text())

    def start(*args, stub=STUB, **env):
        new = binaries / "python.new"  # what another process of this test executes cannot be written
        new.write_text(stub)
        new.chmod(0o755)
        new.replace(binaries / "python")
        launched = tmp_path / f"launched{len([*tmp_path.glob('launched*')])}"
        if stub is not REAL and args[:1] != ("test",):
            launched.write_text(launch.assignments(list(args), env))
        return subprocess.Popen(["bash", tmp_path / "run.sh", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, cwd="/",
                                env={"PATH": os.environ["PATH"], "STAGE": "none", "LAUNCHED": launched} | env,
                                start_new_session=True, preexec_fn=not_ignored)

    def call(*args, **env):
        process = start(*args, **env)
        out, said = process.communicate(timeout=60)
        return process.returncode, out.splitlines(), said

    call.folder, call.start = tmp_path, start
    return call


def test_no_python(house, tmp_path):
    """None on the PATH, one that is too old, one without venv: a sentence each."""
    (house.folder / ".venv" / "installed").unlink()
    for body, words in (("exit 1", "is too old"), ('case "$*" in *venv*) exit 1 ;; esac', "no module venv")):
        fake = tmp_path / "python-of-old"
        fake.write_text(f"#!/bin/sh\n{body}\n")
        fake.chmod(0o755)
        status, out, said = house("test", PYTHON=str(fake))
        assert status == 1 and words in said and said.startswith("error: ") and said.count("\n") == 1 and not out
    status, _, said = house("test", PYTHON="no-such-python")
    assert status == 1 and "3.11" in said and said.count("\n") == 1


@pytest.mark.parametrize("args, env, words", [
    (["fly"], {}, "'fly'"), (["demo", "fly"], {}, "'fly'"), (["-x"], {}, "'-x'"), (["flow", "codec"], {}, "'codec'"),
    (["--gpus"], {}, "--gpus needs a value"), (["--config="], {}, "--config needs a value"),
    (["--gpus", "two"], {}, "'two'"), (["--gpus", "0"], {}, "'0'"), (["--gpus=1.5"], {}, "'1.5'"),
    ([], {"NUM_GPUS": "-1"}, "'-1'"), ([], {"BATCH_SIZE": "many"}, "'many'"),
    (["--config", "nowhere.yaml"], {}, "nowhere.yaml"), (["--config", "."], {}, "cannot read"),
    (["codec", "--config", "configs/flow_demo.yaml"], {}, "'flow', not of 'codec'"),
    (["llm", "--stepps", "3"], {}, "'steps'"), (["--config=configs/codec_demo.yaml", "--patch", "2"], {}, "'patch'"),
    (["demo", "--steps", "few"], {}, "'few'"), (["--gpus", "3"], {}, "torch sees 2"),
    (["--gpus", "2"], {"NNODES": "2", "MASTER_ADDR": "first"}, "NODE_RANK"),
    (["--gpus", "2"], {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR"), (["--max-restarts", "-1"], {}, "'-1'"),
    ([], {"NNODES": "2", "NODE_RANK": "one", "MASTER_ADDR": "first"}, "'one'"),
    ([], {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "first"}, "from 0 to 1, not '2'"),
    ([], {"NNODES": "0", "NODE_RANK": "0", "MASTER_ADDR": "first"}, "'0'"),
    ([], {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "first", "MASTER_PORT": "99999"}, "to 65,535"),
    (["--gpus", "5000", "--device", "cpu"], {}, "'5000'"),
], ids=str)
def test_refusals(house, monkeypatch, args, env, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert words in refusal(launch.main, *args)


def test_the_published_run(house):
    """Its data, then itself; all keys are handed on."""
    status, out, _ = house("--batch_size", "8", "--lr=1", BATCH_SIZE="4")
    assert (status, out) == (0, [
        "python data.py for configs/flow_ljspeech.yaml --data_dir data/ljspeech --system flow",
        "python train_flow_tts.py --config configs/flow_ljspeech.yaml --resume --batch_size=4 --batch_size 8 --lr=1"])


@pytest.mark.parametrize("args, config", [
    ([], "flow_demo"), (["demo", "codec"], "codec_demo"), (["llm"], "llm_177m"), (["--steps", "3"], "flow_ljspeech"),
    (["--config", "configs/llm_lora.yaml"], "llm_lora"), (["demo", "--config=configs/codec_demo_text.yaml"],
                                                          "codec_demo_text")])
def test_configs(house, args, config):
    """The config alone decides the system."""
    text = launch.assignments(args, {})
    trainer = {"flow": "flow_tts", "codec": "codec_lm", "llm": "llm_tts"}[config.partition("_")[0]]
    assert f"train_{trainer}.py --config configs/{config}.yaml" in text
    assert f"mode={'demo' if args[:1] in ([], ['demo']) else 'train'}\n" in text


def test_hostile_values(house):
    """Every argument arrives as it was given, and a config as it was written: nothing is split or evaluated."""
    config, run, sentences = "my own $(touch hacked).yaml", "-r u'n\" $HOME\n`touch hacked`", "'a'  b;#"
    (house.folder / config).write_bytes(b"system: 'flow' # x\r\ndata_dir: \"data/a ';touch hacked #1\"  # y\r\n")
    (house.folder / "data" / "a ';touch hacked #1").mkdir(parents=True)
    (house.folder / "data" / "a ';touch hacked #1" / "dataset_stats.json").touch()
    flags = ["--config", config, f"--out_dir={run}", "--eval_prompts", sentences, "--timestep-logit-mean", "-8e-1"]
    process = house.start("demo", *flags, stub=REAL)
    out, said = process.communicate(timeout=60)
    trained = ["train_flow_tts.py", "--config", config, "--resume", *flags[2:]]
    assert process.returncode == 0 and not said
    assert "".join(f"[{word}]" for word in trained) + f"[evaluate.py][--ckpt][./{run}]" in out
    assert not (house.folder / "hacked").exists()


@pytest.mark.parametrize("stage", ["trivox.launch", "data.py", "train_flow_tts", "evaluate.py"])
def test_what_fails_ends_it(house, stage):
    """With its status, and what it says is the last that is said."""
    status, out, said = house("demo", stub=f"#!/bin/sh\ncase $* in *{stage}*) echo no >&2; exit 3 ;; esac" + STUB[9:])
    assert (status, said) == (3, "no\n") and stage not in str(out) and "listen" not in out


@pytest.mark.parametrize("gpus, flags, wanted", [(0, [], True), (1, [], False), (1, ["--device", "cpu"], True)])
def test_memory_stays_whole(house, monkeypatch, gpus, flags, wanted):
    """Without a GPU glibc's cache is off in what trains, unless the user has settings of glibc's."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    stub = "#!/bin/sh\ncase $* in train_*) echo \"tunables ${GLIBC_TUNABLES-none}\" ;; esac" + STUB[9:]
    for own in (None, "glibc.malloc.arena_max=2"):
        _, out, _ = house("demo", *flags, stub=stub, **({"GLIBC_TUNABLES": own} if own else {}))
        assert f"tunables {own or ('glibc.malloc.tcache_count=0' if wanted else 'none')}" in out


def test_processes(house, monkeypatch):
    """On the CPU, on GPUs, on several machines."""
    common, found = ["--config", "configs/flow_demo.yaml", "--gpus"], [0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found[0])
    status, out, _ = house(*common, "2")
    assert status == 0 and "gloo" in out[0]
    assert "-m trivox.elastic --nproc-per-node 2 --standalone --max-restarts 3 train_flow_tts.py" in out[2]
    found[0] = 8
    status, out, _ = house(*common, "2")
    assert status == 0 and len(out) == 2 and "--nproc-per-node 2" in out[1]
    assert "gloo" in house(*common, "9", "--device", "cpu")[1][0]
    machines = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="first")
    status, out, _ = house(*common, "8", **machines)
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint first:29500 --rdzv-conf is_host=0" in out[1]


def test_the_demo_repeats_nothing(house):
    """Data, training, evaluation; where the table is newer than the run, the table."""
    status, out, _ = house()
    assert status == 0 and [line.split()[1] for line in out[:3]] == ["data.py", "train_flow_tts.py", "evaluate.py"]
    assert out[-1].startswith("speak") and "runs/flow_demo" in out[-1]
    for path, written in (("metrics.jsonl", 1e9), ("evaluation/table.txt", 2e9)):
        (house.folder / "runs/x" / path).parent.mkdir(parents=True, exist_ok=True)
        (house.folder / "runs/x" / path).write_text("the table\n")
        os.utime(house.folder / "runs/x" / path, (written, written))
    status, out, _ = house("demo", "flow", "--out_dir", "runs/x")
    assert status == 0 and out[1].startswith("python train_flow_tts.py") and out[2:4] == ["", "the table"]


@pytest.mark.parametrize("stage, number", [
    ("trivox.launch", signal.SIGINT), ("data.py for", signal.SIGINT), ("data.py for", signal.SIGTERM),
    ("train_flow", signal.SIGINT), ("train_flow", signal.SIGHUP), ("evaluate.py", signal.SIGINT),
    ("trivox.elastic", signal.SIGINT), ("trivox.elastic", signal.SIGTERM)],
    ids=lambda value: getattr(value, "name", value))
def test_signals(house, stage, number):
    """As Ctrl-C, they reach run.sh alone. What trains saves; nothing is left, nothing follows; the status tells."""
    gpus = "2" if stage == "trivox.elastic" else "1"
    process = house.start("demo", "--gpus", gpus, "--device", "cpu", STAGE=stage)
    assert process.stderr.readline() == "started\n"
    os.killpg(process.pid, number)
    out, said = process.communicate(timeout=20)  # it returns when no process is left that could write
    before = ["data.py for", "train_flow", "evaluate.py"]
    before = before[:before.index(stage)] if stage in before else before[:stage == "trivox.elastic"]
    assert (process.returncode, out.count("python ")) == (128 + number, len(before))
    assert set(said.split()) == {"saved"}  # more than once where the signal came again meanwhile


def test_the_environment_is_made_once(house):
    """And anew where requirements.txt has changed."""
    assert "installing" not in " ".join(house("--config=configs/flow_demo.yaml")[1])
    (house.folder / "requirements.txt").write_text("other==1\n")
    fake = house.folder / "python"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    status, out, _ = house("--config=configs/flow_demo.yaml", PYTHON=str(fake))
    assert status == 0 and "installing" in out[0] and "pip install" in out[1] and "requirements-extra" in out[2]
    assert "installing" not in " ".join(house("--config=configs/flow_demo.yaml")[1])


PIP = """#!/bin/sh
case "$*" in
    *"pip install"*)
        echo "$*" >> pips
        if echo "$*" | grep -qE -e "$VANISHED"; then echo no such thing >&2; exit 1; fi
        exit ;;
esac""" + STUB[9:]


@pytest.mark.parametrize("vanished, missing", [
    ("nothing", []), ("extra.txt|hibari", ["hibari-tts"]), (".", None)], ids=["all there", "one gone", "none there"])
def test_extra_packages(house, vanished, missing):
    """They are tried once, also before the tests; one note names those that are missing and what there is instead."""
    (house.folder / ".venv" / "extra").unlink()
    lines = [line for line in (ROOT / "requirements-extra.txt").read_text().splitlines() if line[0] != "#"]
    missing = [line for line in lines if missing is None or line.split("==")[0] in missing]
    status, out, said = house("test", stub=PIP, VANISHED=vanished)
    assert (status, said) == (0, "") and out[0] == "installing requirements-extra.txt"
    assert out[-1].startswith("python -m pytest") and "no such thing" not in str(out)
    pips = (house.folder / "pips").read_text().splitlines()
    assert all("--no-deps" in pip for pip in pips) and pips[0].endswith("-r requirements-extra.txt")
    assert [pip.split()[-1] for pip in pips[1:]] == [line.split()[0] for line in lines if missing]
    if missing:
        assert out[1].startswith("note: ") and [line.strip() for line in out[2:-2]] == missing
        assert out[-2].endswith("pip install --no-deps -r requirements-extra.txt") and "without it" in out[2]
    else:
        assert len(out) == 2
    assert len(house("test", stub=PIP, VANISHED=vanished)[1]) == 1
    (house.folder / "requirements-extra.txt").write_text("other==1  # of another version\n")
    assert house("test", stub=PIP, VANISHED="nothing")[1][0] == "installing requirements-extra.txt"


def test_a_signal_to_what_installs_them(house):
    """It ends all, and they are tried again."""
    (house.folder / ".venv" / "extra").unlink()
    process, log = house.start("demo", STAGE="pip install"), house.folder / ".venv" / "extra.log"
    while not (log.exists() and "started" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out.splitlines()) == (130, ["installing requirements-extra.txt"])
    assert not (house.folder / ".venv" / "extra").exists()


# ------------------------------------------------------------------------------------------------------------
# elastic.py: several processes, of which some die

SEVERAL = dict(steps=30, save_every=4, eval_every=10, batch_size=2)


def restarts(said):
    return [int(n) for n in re.findall(r"restart (\d+) of 3", said)]


def kill_at(step, run, process, other=False):
    """SIGKILL to the process that writes the log of a run, or to another beside it, once it is at a step."""
    log = run / "metrics.jsonl"
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, "\n".join(process.communicate())
        time.sleep(0.01)
    pid = (run / ".lock").read_text().split()[1]
    if other:
        agent = re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]
        pid, = {*Path(f"/proc/{agent}/task/{agent}/children").read_text().split()} - {pid}
    os.kill(int(pid), signal.SIGKILL)


def at_once(process):
    """What a process says to its end."""
    out, said = process.communicate(timeout=200)
    return process.returncode, out + said


@pytest.fixture
def start(house, flags):
    """start(gpus, settings, **environment): processes that train by run.sh."""
    return lambda gpus, settings, **env: house.start(
        "flow", "--config", "configs/flow_demo.yaml", f"--gpus={gpus}", *flags(**SEVERAL | settings), stub=TRAINS,
        OMP_NUM_THREADS="1", **env)


@pytest.mark.long
def test_killed_processes(start, tmp_path):
    """One of two dies, then the other: run.sh goes on by itself, to the same bits. So do two machines."""
    whole, killed = [start(2, dict(out_dir=tmp_path / name)) for name in ("whole", "killed")]
    kill_at(9, tmp_path / "killed", killed)
    kill_at(21, tmp_path / "killed", killed, other=True)
    for process, times in ((whole, []), (killed, [1, 2])):
        status, said = at_once(process)
        assert status == 0 and restarts(said) == times and "Traceback" not in said and "Warning" not in said, said

    machines = dict(NNODES="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    pair = [start(1, dict(out_dir=tmp_path / "pair"), NODE_RANK=str(n), **machines) for n in (0, 1)]
    kill_at(15, tmp_path / "pair", pair[0])
    for process in pair:
        status, said = at_once(process)
        assert status == 0, said
    for out in ("killed", "pair"):
        for name in ("latest", "best"):
            assert same(checkpoint(tmp_path / out, name), checkpoint(tmp_path / "whole", name))
        assert (tmp_path / out / "metrics.jsonl").read_text().count('"loss"') == 30


def test_a_users_mistake_is_not_tried_again(start):
    status, said = at_once(start(2, dict(data_dir="nowhere")))
    assert (status, said.count("error:"), restarts(said)) == (1, 1, []) and "nowhere" in said.splitlines()[-1], said


def test_a_signal_to_one_process_ends_all(start, tmp_path):
    process, log = start(2, dict(steps=2000, log_every=2)), tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and '"step": 4,' in log.read_text()):
        time.sleep(0.01)
    os.kill(int((tmp_path / "run" / ".lock").read_text().split()[1]), signal.SIGTERM)
    status, said = at_once(process)
    step = checkpoint(tmp_path / "run")[1]["state"]["step"]
    assert (status, restarts(said)) == (143, []) and f"stopped by a signal after step {step};" in said, said


@pytest.mark.long
def test_machines_without_a_common_disk(start, tmp_path):
    machines = dict(NNODES="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    pair = [start(1, dict(out_dir=tmp_path / f"disk{n}"), NODE_RANK=str(n), **machines) for n in (0, 1)]
    for status, said in map(at_once, pair):
        assert (status, said.count("error:"), restarts(said)) == (1, 1, []) and "not the same folder" in said, said


@pytest.mark.long
def test_where_run_sh_is_killed_with_torchrun_processes_save_and_end(start, tmp_path):
    process, log = start(2, dict(steps=2000, log_every=2)), tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and '"step": 4,' in log.read_text()):
        time.sleep(0.01)
    pid = int((tmp_path / "run" / ".lock").read_text().split()[1])
    os.kill(int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]), signal.SIGKILL)
    assert at_once(process)[0] != 0  # which waits for all that write to its pipes
    assert checkpoint(tmp_path / "run")[1]["state"]["step"] < 2000
