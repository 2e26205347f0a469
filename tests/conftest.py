"""What the tests share: a spoken corpus and the data sets made of it; a model that trains in seconds; processes to be
killed; precision.

    pytest --all                       also what takes long, as CI does: inductor, restarts, all kernels compiled anew …
    TRIVOX_TEST_DTYPE=bfloat16 pytest  as on a chip that multiplies bfloat16, or float32 as on one that does not
"""

import json
import os
import signal
import sys
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# No weights there, and no way to any: a test that reaches for the net fails. It is one folder for all processes.
NOWHERE = os.environ.get("TRIVOX_NOWHERE") or mkdtemp(prefix="trivox-tests-")
os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "TRIVOX_NOWHERE": NOWHERE, "TRIVOX_WEIGHTS": NOWHERE, "XDG_CACHE_HOME": NOWHERE,
               "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
               "no_proxy": "127.0.0.1,localhost"}

import numpy as np
import pytest
import torch
from helpers import FLOW as TINY_FLOW

from trivox import check, common, cut, demo_music, emilia, prepare, run_folder, synthesisers
from trivox.audio import MelConfig, log_mel
from trivox.codecs import MelRVQ
from trivox.datasets import MelDataset
from trivox.demo_speech import make_demo_corpus
from trivox.prepare import prepare_mels
from trivox.recordings import read_wav

torch.set_num_threads(1)
# Speech is judged by PocketSphinx alone, as where the extra packages are not installed: they take a second a clip. This
# holds in the processes of `launch` too. A test that is about one of them has it back by the fixture `extra`.
sys.modules.update(faster_whisper=None, speechmos=None, resemblyzer=None)
CODEC_GEOMETRY = dict(codec="mel_rvq", sample_rate=22050, frame_rate=50, codebooks=2, codebook_size=16)
TINY_CODEC = CODEC_GEOMETRY | dict(context=64, width=32, layers=2, heads=2, kv_heads=1, ffn_width=64, pattern="GA",
                                   text_width=64, text_layers=1)
TINY_LLM = dict(codec="mel_rvq", sample_rate=22050, frame_rate=50, codebook_size=32, context=400, width=64, layers=2,
                heads=2, kv_heads=1, ffn_width=128)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also what takes long")
    parser.addoption("--kills", type=int, help="how often each of the tests named sigkills kills; they then tell when")
    parser.addoption("--kill-seed", type=int, help="of the moments")


LONG = "train_flow", "runs", "train_llm", "delta_rule_kernels", "export", "train_codec", "speak"  # the longest first


def pytest_collection_modifyitems(config, items):
    """Files that take half a minute and more begin first, so that no process is left with one at the end. What is
    marked as long is left out, but with --all."""
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="it takes long: ./run.sh test --all"))
    place = {f"test_{name}.py": n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


# ------------------------------------------------------------------------------------------------------------
# Precision: "auto" is bfloat16 where the chip says that it multiplies it

def chip(dtype):
    """What torch.cpu.get_capabilities would be of a chip whose precision is `dtype`."""
    return lambda: {"avx512_bf16": dtype == "bfloat16"}


def pytest_configure():
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if forced := os.environ.get("TRIVOX_TEST_DTYPE"):
        torch.cpu.get_capabilities = chip(forced)  # in this process alone, not in those that tests start


@pytest.fixture
def float32(monkeypatch):
    """Precision "auto" is float32 whatever the chip has: for what has to be equal."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", chip("float32"))


# ------------------------------------------------------------------------------------------------------------
# Judges

@pytest.fixture
def extra(monkeypatch):
    """extra("speechmos", …): this test has these packages; it is skipped where one is not installed."""
    def bring(*names):
        for name in names:
            monkeypatch.delitem(sys.modules, name)
            pytest.importorskip(name, reason=f"no {name}: pip install --no-deps -r requirements-extra.txt")

    return bring


# ------------------------------------------------------------------------------------------------------------
# Data

class OneProcess(nullcontext):
    """Stands for a pool of processes, which takes seconds to start."""

    def __init__(self, threads=False):
        pass

    def map(self, function, jobs, chunksize=1):
        return map(function, jobs)

    def __enter__(self):
        return self


def alone(patch):
    """Let all that would be shared by processes be done in this one."""
    for module in (check, cut, demo_music, emilia, prepare, synthesisers):
        patch.setattr(module, "parallel", OneProcess)


@pytest.fixture
def one_process(monkeypatch):
    alone(monkeypatch)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The folder of 40 sentences of the demo grammar, 6 of them held out, spoken by espeak."""
    root = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        make_demo_corpus(root, 40, 6, ["en-us"])
    return root


@pytest.fixture(scope="session")
def data_dir(corpus, tmp_path_factory):
    """The data set made of that corpus."""
    out = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        prepare_mels(corpus, out, MelConfig(), 11.88)
    return out


@pytest.fixture(scope="session")
def data(data_dir):
    return MelDataset(data_dir, MelConfig())


@pytest.fixture(scope="session")
def codec_tokens(corpus, tmp_path_factory):
    """The folder of the corpus's tokens: 40 sentences, 6 held out, two books of 16 codes, 50 frames a second."""
    out, mel = tmp_path_factory.mktemp("codec_tokens"), MelConfig(hop_length=441)
    heldout = (corpus / "heldout.txt").read_text().split()
    texts = dict(line.split("|")[:2] for line in (corpus / "metadata.csv").read_text().splitlines())
    wavs = {id: read_wav(corpus / "wavs" / f"{id}.wav", 22050) for id in texts}
    codec = MelRVQ.fit(torch.cat([log_mel(wav, mel) for wav in wavs.values()]), mel, [16, 16])
    codec.save(out)
    codes, offset = codec.encode(list(wavs.values())), 0
    with (out / "tokens_00000.jsonl").open("w") as f:
        for (id, text), x in zip(texts.items(), codes):
            split = "val" if id in heldout else "train"
            f.write(json.dumps(dict(id=id, text=text, split=split, offset=offset, frames=len(x))) + "\n")
            offset += len(x)
    np.concatenate(codes).astype(np.uint16).tofile(out / "tokens_00000.u16")
    (out / "grammar.jsgf").write_text((corpus / "grammar.jsgf").read_text())
    (out / "codec.json").write_text(json.dumps(CODEC_GEOMETRY | {"mel": mel.__dict__}))
    return out


@pytest.fixture(scope="session")
def llm_tokens(tmp_path_factory):
    """The folder of 36 sentences of two voices and one held out, a book of 32 codes, with embeddings of the voices."""
    root, out = tmp_path_factory.mktemp("voices"), tmp_path_factory.mktemp("sentences")
    with pytest.MonkeyPatch.context() as patch:
        alone(patch)
        make_demo_corpus(root, 36, 4, ["en-us", "en-us+f4"], heldout_voices=["en-us+m7"], heldout_voice_clips=4)
        prepare.tokenize(root, out, "mel_rvq", mel=MelConfig(hop_length=441), sizes=[32])
        prepare.embed(out, "stats")
    return out


@pytest.fixture(scope="session")
def demo_tokens(corpus, tmp_path_factory):
    """The tokens of the demo corpus, one book of 64 codes, in three shards. Tests only read them."""
    out = tmp_path_factory.mktemp("demo_tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SHARD_SOURCES", 16)
        alone(patch)
        prepare.tokenize(corpus, out, "mel_rvq", mel=MelConfig(hop_length=512), sizes=[64])
    return out


# ------------------------------------------------------------------------------------------------------------
# Runs

@pytest.fixture
def tiny_run(data_dir, codec_tokens, llm_tokens, tmp_path):
    """tiny_run(system): the settings of a run of seconds of one of the three systems, into tmp_path/run."""
    own = {"flow": TINY_FLOW | dict(layers=1, data_dir=data_dir, speak_every=0),
           "codec": TINY_CODEC | dict(context=256, pattern="GA", data_dir=codec_tokens, sample_every=0),
           "llm": TINY_LLM | dict(packed=False, data_dir=llm_tokens, sample_every=0)}
    return lambda system: own[system] | dict(
        out_dir=tmp_path / "run", batch_size=3, warmup_steps=2, lr=1e-3, optimizer="muon", eval_every=1000,
        device="cpu", dtype="float32", wandb_mode="disabled")


@pytest.fixture
def flags(data_dir, tmp_path):
    """flags(steps=3, …) is the command line of a tiny training run into tmp_path/run."""
    def make(*bare, **settings):
        settings = TINY_FLOW | dict(
            data_dir=data_dir, out_dir=tmp_path / "run", batch_size=4, steps=6, warmup_steps=2, eval_every=100,
            speak_every=0, save_every=100, log_every=1, device="cpu", dtype="float32", wandb_mode="disabled") | settings
        return [f"--{key}={value}" for key, value in settings.items()] + list(bare)

    return make


@pytest.fixture(scope="session")
def run(data_dir, tmp_path_factory):
    """The folder of a run that has learnt to tell four clips by their texts. Tests only read it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    settings = TINY_FLOW | dict(
        data_dir=data_dir, out_dir=out, batch_size=4, steps=100, warmup_steps=5, lr=1e-2, min_lr=1e-3, ema_decay=0.9,
        overfit=4, timestep_logit_mean=-2, text_condition_dropout=0, eval_every=50, speak_every=0, eval_steps=2,
        device="cpu", dtype="float32", wandb_mode="disabled")
    code, said = finish(train([f"--{key}={value}" for key, value in settings.items()]))
    assert code == 0, said
    return out


@pytest.fixture
def sigkills(request, tmp_path):
    """sigkills(start, system, kills): sigkills.survives, as often as --kills says; once, but so often with --all."""
    def kill(start, system, kills):
        from sigkills import survives

        option = request.config.getoption
        asked = option("--kills")
        moments = survives(start, tmp_path, system, asked or (kills if option("--all") else 1), option("--kill-seed"))
        if asked:
            print(f"\n{system}: {asked} SIGKILLs while", ", ".join(f"{what} {n}" for what, n in moments.items()))

    return kill


# ------------------------------------------------------------------------------------------------------------
# Refusals and equality

def refusal(main, *argv):
    """What `main` says as it refuses these arguments: one sentence, exit status 1, no traceback."""
    with pytest.raises(SystemExit) as end:
        common.run(main, [str(arg) for arg in argv])
    said = end.value.code  # a text as the code of SystemExit goes to stderr, and the status is then 1
    assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said, said
    return said


def checkpoint(run, name="latest"):
    """Everything in a checkpoint: (step it is of, {file: tensors})."""
    folder = run_folder.find_checkpoint(run / "checkpoints" / name)
    _, *parts = run_folder.load_checkpoint(folder, "flow", "model", "ema", "state")
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
# Processes of their own, forked from a server that has imported what a training run needs: of its 3 s these were 2

processes, launched = get_context("forkserver"), []
processes.set_forkserver_preload(["train_flow_tts", "train_codec_lm", "train_llm_tts", "torch._dynamo",
                                  "matplotlib.figure", "matplotlib.backends.backend_agg", "jinja2", "conftest"])


def launch(function, *args):
    """Start function(*args) in a process, which can be killed; `finish` waits for it."""
    log = Path(mkdtemp(dir=NOWHERE)) / "log"
    process = processes.Process(target=_logged, args=(log, function, args))
    process.log = log
    process.start()
    launched.append(process)
    return process


def pytest_sessionfinish(session):
    """A test that failed may have left its process; Python would wait for it."""
    for process in launched:
        process.kill()
    if not hasattr(session.config, "workerinput"):  # it is not one of xdist's workers
        rmtree(NOWHERE, ignore_errors=True)


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
    import train_flow_tts

    return launch(common.run, train_flow_tts.main, argv)
