"""run.sh: what it refuses, and what it makes of its arguments. The packages are stood for by a folder of stubs."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT


@pytest.fixture
def house(tmp_path):
    """A copy of the house whose environment is made already, and whose python only says what it was asked."""
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    stub = binaries / "python"
    stub.write_text('#!/bin/sh\ncase "$*" in *device_count*) echo ${GPUS:-0} ;; *) echo "python $*" ;; esac\n')
    stub.chmod(0o755)
    (tmp_path / ".venv" / "installed").write_text((ROOT / "requirements.txt").read_text())

    def call(*args, **env):
        done = subprocess.run(["bash", tmp_path / "run.sh", *args], capture_output=True, text=True, timeout=60,
                              env={"PATH": os.environ["PATH"]} | env, cwd="/")
        return done.returncode, done.stdout.splitlines(), done.stderr

    call.folder = tmp_path
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
    (["fly"], {}, "'fly'"), (["demo", "fly"], {}, "'fly'"), (["--gpus"], {}, "--gpus needs a value"),
    (["--gpus", "two"], {}, "'two'"), (["--gpus", "0"], {}, "'0'"), (["--gpus=1.5"], {}, "'1.5'"),
    ([], {"NUM_GPUS": "-1"}, "'-1'"), (["--config", "nowhere.yaml"], {}, "nowhere.yaml"),
    (["--gpus", "3", "--data_dir", "d"], {"GPUS": "2"}, "torch sees 2"),
], ids=str)
def test_refusals(house, args, env, words):
    (house.folder / "data" / "ljspeech").mkdir(parents=True)
    (house.folder / "data" / "ljspeech" / "dataset_stats.json").touch()
    status, out, said = house(*args, **env)
    assert status == 1 and words in said and said.startswith("error: ") and said.count("\n") == 1 and not out


def test_the_published_run(house):
    """It says what it will download before it does, and hands all keys on."""
    status, out, _ = house("--batch_size", "8", "--lr=1e-4", BATCH_SIZE="4")
    assert status == 0
    assert "LJSpeech 1.1 (2.6 GB" in out[0] and "ByT5-small (1.2 GB" in out[0] and "python data.py ljspeech" in out
    assert out[-1] == ("python train_flow_tts.py --config configs/flow_ljspeech.yaml --resume --batch_size 4 "
                       "--batch_size 8 --lr=1e-4")


def test_processes(house):
    """On the CPU, on GPUs, on several machines."""
    common = ["--config", "configs/flow_demo.yaml", "--gpus"]
    status, out, _ = house(*common, "2")
    assert status == 0 and "gloo" in out[0]
    assert "torch.distributed.run" in out[1] and "--nproc-per-node 2 --standalone train_flow_tts.py" in out[1]
    status, out, _ = house(*common, "2", GPUS="2")
    assert status == 0 and len(out) == 1 and "--nproc-per-node 2" in out[0]
    machines = dict(GPUS="8", NNODES="2", NODE_RANK="1", MASTER_ADDR="first")
    status, out, _ = house(*common, "8", **machines)
    assert "--nnodes 2 --node-rank 1 --master-addr first --master-port 29500" in out[0]
    status, _, said = house(*common, "8", **machines | {"MASTER_ADDR": ""})
    assert status != 0 and "MASTER_ADDR" in said


def test_the_demo_repeats_nothing(house):
    """Corpus, training, evaluation; with the corpus there, no corpus; with the table there, the table."""
    status, out, _ = house()
    assert status == 0 and [line.split()[1] for line in out[:3]] == ["data.py", "train_flow_tts.py", "evaluate.py"]
    assert out[-1].startswith("speak") and "runs/flow_demo" in out[-1]
    for path in ("data/demo/dataset_stats.json", "runs/x/checkpoints/latest/config.yaml",
                 "runs/x/evaluation/table.txt"):
        (house.folder / path).parent.mkdir(parents=True)
        (house.folder / path).write_text("the table\n")
        os.utime(house.folder / path, (1e9 + len(path), 1e9 + len(path)))
    os.utime(house.folder / "runs/x/evaluation/table.txt")
    status, out, _ = house("demo", "flow", "--out_dir", "runs/x")
    assert status == 0 and out[0].startswith("python train_flow_tts.py") and out[1:3] == ["", "the table"]


def test_the_environment_is_made_once(house):
    """And anew where requirements.txt has changed."""
    assert "installing" not in " ".join(house("--config=configs/flow_demo.yaml")[1])
    (house.folder / "requirements.txt").write_text("other==1\n")
    fake = house.folder / "python"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    status, out, _ = house("--config=configs/flow_demo.yaml", PYTHON=str(fake))
    assert status == 0 and "installing" in out[0] and "pip install" in out[1]
    assert "installing" not in " ".join(house("--config=configs/flow_demo.yaml")[1])
