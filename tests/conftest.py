"""What the tests share: a spoken corpus, prepared once; a model that trains in seconds; processes to be killed."""

import os
import sys
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from tempfile import mkdtemp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
NOWHERE = mkdtemp(prefix="trivox-tests-")  # no weights here, and no way to any: a test that reaches for the net fails
os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRIVOX_WEIGHTS": NOWHERE,
               "XDG_CACHE_HOME": NOWHERE, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
               "no_proxy": "127.0.0.1,localhost"}

import pytest
import torch

import train_flow_tts
from model import FlowConfig, FlowTTS
from trivox import common, demo_music, demo_speech, emilia, prepare
from trivox.audio import MelConfig
from trivox.datasets import MelDataset
from trivox.demo_speech import make_demo_corpus
from trivox.prepare import prepare_mels

torch.set_num_threads(1)
TINY = dict(width=64, layers=2, heads=2, ffn_width=128, text_width=64, text_layers=1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The folder of 40 sentences of the demo grammar, 6 of them held out, spoken by espeak."""
    root = tmp_path_factory.mktemp("corpus")
    make_demo_corpus(root, 40, 6, ["en-us"])
    return root


@pytest.fixture(scope="session")
def data_dir(corpus, tmp_path_factory):
    """The data set made of that corpus."""
    out = tmp_path_factory.mktemp("data")
    prepare_mels(corpus, out, MelConfig(), 11.88)
    return out


@pytest.fixture(scope="session")
def data(data_dir):
    return MelDataset(data_dir, MelConfig())


@pytest.fixture
def flags(data_dir, tmp_path):
    """flags(steps=3, …) is the command line of a tiny training run into tmp_path/run."""
    def make(*bare, **settings):
        settings = TINY | dict(
            data_dir=data_dir, out_dir=tmp_path / "run", batch_size=4, steps=6, warmup_steps=2, eval_every=100,
            speak_every=0, save_every=100, log_every=1, device="cpu", dtype="float32", wandb_mode="disabled") | settings
        return [f"--{key}={value}" for key, value in settings.items()] + list(bare)

    return make


@pytest.fixture(scope="session")
def run(data_dir, tmp_path_factory):
    """The folder of a run that has learnt to tell four clips by their texts. Tests only read it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    settings = TINY | dict(
        data_dir=data_dir, out_dir=out, batch_size=4, steps=100, warmup_steps=5, lr=1e-2, min_lr=1e-3, ema_decay=0.9,
        overfit=4, timestep_logit_mean=-2, text_condition_dropout=0, eval_every=50, speak_every=0, eval_steps=2,
        device="cpu", dtype="float32", wandb_mode="disabled")
    code, said = finish(train([f"--{key}={value}" for key, value in settings.items()]))
    assert code == 0, said
    return out


class OneProcess(nullcontext):
    """Stands for a pool of processes, which takes seconds to start."""

    def __init__(self, threads=False):
        pass

    def map(self, function, jobs, chunksize=1):
        return map(function, jobs)

    def __enter__(self):
        return self


@pytest.fixture
def one_process(monkeypatch):
    for module in (demo_music, demo_speech, emilia, prepare):
        monkeypatch.setattr(module, "parallel", OneProcess)


def tiny_flow(seed=0, **changes):
    """An untrained tiny model in which no weight is zero, so that every part of it takes part."""
    torch.manual_seed(seed)
    model = FlowTTS(FlowConfig(**TINY | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.ndim == 1 else 0.3 * p.shape[-1] ** -0.5))
    return model


def refusal(main, *argv):
    """What `main` says as it refuses these arguments: one sentence, exit status 1, no traceback."""
    with pytest.raises(SystemExit) as end:
        common.run(main, [str(arg) for arg in argv])
    said = end.value.code  # a text as the code of SystemExit goes to stderr, and the status is then 1
    assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said, said
    return said


def checkpoint(run, name="latest"):
    """Everything in a checkpoint: (step it is of, {file: tensors})."""
    folder = (run / "checkpoints" / name).resolve()
    _, *parts = common.load_checkpoint(folder, "flow", "model", "ema", "state")
    return folder.name, dict(zip(("model", "ema", "state"), parts))


def same(a, b):
    """Whether two nested containers hold the same bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------------------------------
# Processes of their own, forked from a server that has imported the trainer already

processes, launched = get_context("forkserver"), []
processes.set_forkserver_preload(["train_flow_tts", "train_codec_lm", "train_llm_tts",
                                  "matplotlib.backends.backend_agg"])


def launch(function, *args):
    """Start function(*args) in a process, which can be killed; `finish` waits for it."""
    log = Path(mkdtemp(dir=NOWHERE)) / "log"
    process = processes.Process(target=_logged, args=(log, function, args))
    process.log = log
    process.start()
    launched.append(process)
    return process


def pytest_sessionfinish():
    """A test that failed may have left its process; Python would wait for it."""
    for process in launched:
        process.kill()


def _logged(log, function, args):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    function(*args)


def finish(process):
    """Wait for a process. Returns (exit status, or minus the signal that ended it; all that it printed)."""
    process.join(120)
    assert process.exitcode is not None, "still going after two minutes"
    return process.exitcode, process.log.read_text() if process.log.exists() else ""


def train(argv):
    """Start the trainer as the command line does."""
    return launch(common.run, train_flow_tts.main, argv)
