"""The three trainers in float16, and with their blocks compiled, beside float32 as it is: the same losses. What they
ask of a device: no float64, and no operator that Apple's GPUs lack."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from threading import Event

import pytest
import torch
import torchgen
import yaml
from conftest import ROOT, TINY_CODEC, TINY_FLOW, TINY_LLM, refusal
from helpers import encode, prompts_of, tiny_codec_lm, tiny_flow, tiny_llm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_codec_lm
import train_flow_tts
import train_llm_tts
from trivox import common, delta_rule, metrics
from trivox.generate import generate_frames, generate_speech, solve_flow
from trivox.muon import Muon

TRAINERS = {"flow": train_flow_tts, "codec": train_codec_lm, "llm": train_llm_tts}
TINY = {"flow": TINY_FLOW | dict(layers=1),
        "codec": TINY_CODEC | dict(pattern="A", layers=1, context=256, cross_every=1),
        "llm": TINY_LLM | dict(packed=False)}
LOSSES = "loss", "val_loss"


class Losses:
    """losses(steps, key=value, …): those of each step of a tiny run, and at last that of validation."""

    def __init__(self, system, folder, runs):
        self.system, self.folder, self.runs, self.count = system, folder, runs, 0

    def flags(self, steps, **changes):
        self.count += 1
        settings = TINY[self.system] | dict(
            data_dir=self.folder, out_dir=self.runs / str(self.count), batch_size=3, steps=steps, warmup_steps=2,
            lr=1e-3, eval_every=1000, save_every=1000, log_every=1, device="cpu", dtype="float32",
            wandb_mode="disabled", **{"speak_every" if self.system == "flow" else "sample_every": 0}) | changes
        return [f"--{key}={value}" for key, value in settings.items()]

    def read(self):
        rows = (self.runs / str(self.count) / "metrics.jsonl").read_text().splitlines()
        return torch.tensor([row[key] for row in map(json.loads, rows) for key in LOSSES if key in row])

    def __call__(self, steps, **changes):
        TRAINERS[self.system].main(self.flags(steps, **changes))
        return self.read()

    def of_two_processes(self, steps, **changes):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   ROOT / f"{TRAINERS[self.system].__name__}.py", *self.flags(steps, **changes)]
        pair = subprocess.run(command, cwd=self.runs, capture_output=True, text=True, timeout=600)
        assert pair.returncode == 0, pair.stderr[-3000:]
        return self.read()


@pytest.fixture(params=TRAINERS)
def losses(request, data_dir, codec_tokens, llm_tokens, tmp_path, monkeypatch):
    trainer = TRAINERS[request.param]
    monkeypatch.setattr(trainer, "write_page", lambda *args, **more: None)
    monkeypatch.setattr(trainer.common, "catch_signals", Event)
    folder = {"flow": data_dir, "codec": codec_tokens, "llm": llm_tokens}[request.param]
    return Losses(request.param, folder, tmp_path)


def test_float16(losses):
    exact, half = losses(30), losses(30, dtype="float16")
    assert len(exact) == 31 and not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Compiled

@contextmanager
def compiling(monkeypatch, **options):
    """Around a run of a trainer: blocks that have a graph break fail, and so does what is compiled after three steps,
    each of which may have a shape of its own."""
    graphs, counters, compiles = [], torch._dynamo.utils.counters, torch.nn.Module.compile
    clip = torch.nn.utils.clip_grad_norm_
    torch._dynamo.reset()
    counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda block, **more: compiles(
            block, fullgraph=True, **options, **more))
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: graphs.append(
            counters["stats"]["unique_graphs"]) or clip(*args))
        yield
    assert graphs[0] > 0 and graphs[3] == graphs[-1] and not counters["graph_break"]


@pytest.mark.long
def test_compiled(losses, monkeypatch):
    """What stands behind the compiler's front is not inductor here, which takes minutes: the next test has that, and
    benchmarks/trainers.py on a GPU."""
    with compiling(monkeypatch, backend="aot_eager"):
        compiled = losses(20, compile="true")
    torch.testing.assert_close(compiled, losses(20), rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def inductor_cache(tmp_path_factory):
    """Of all runs, also those of other processes: what one has compiled the next one takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        yield


@pytest.mark.long
def test_inductor(losses, monkeypatch, inductor_cache):
    """The same with the compiler that users have, and in two processes. About two minutes of one core."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("inductor needs a C++ compiler, and there is none")
    few = dict(text_layers=0) if losses.system == "flow" else {}  # that block is the codec LM's too
    with compiling(monkeypatch):
        compiled = losses(20, compile="true", batch_size=4, **few)
    exact = losses(20, batch_size=4, **few)
    torch.testing.assert_close(compiled, exact, rtol=1e-4, atol=0)
    pair = losses.of_two_processes(20, compile="true", batch_size=2, **few)
    torch.testing.assert_close(pair, exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("lacks", ["g++", "Python.h"])
def test_where_nothing_can_be_compiled(losses, lacks, monkeypatch, tmp_path, capsys):
    """A note, and the run goes on without."""
    monkeypatch.delenv("CXX", raising=False)
    if lacks == "g++":
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(common.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(common.shutil, "which", lambda name: name)
        monkeypatch.setattr(common.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(torch.nn.Module, "compile", None)
    assert len(losses(1, compile="true")) == 2
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: not compiled")]
    assert len(notes) == 1 and lacks in notes[0]


def test_recurrent_blocks_are_not_compiled_on_a_cpu(capsys):
    c = train_codec_lm.Config(compile=True, pattern="GA", layers=2)
    assert not common.compiles(c, torch.device("cpu")) and "recurrent" in capsys.readouterr().out
    assert common.compiles(c, torch.device("cuda"))


# ------------------------------------------------------------------------------------------------------------
# Apple's GPUs, of which none is here: they have no float64, and not every operator

@cache
def kernels():
    """PyTorch's own table of operators: {name: what has a kernel of its own}, None for what others make up."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    table = {entry["func"].partition("(")[0]: entry for entry in yaml.safe_load(path.read_text())}
    return {name: table[entry.get("structured_delegate", name)].get("dispatch") for name, entry in table.items()}


class Watch(TorchDispatchMode):
    """Fails where a tensor is float64; collects the operators that Apple's GPUs lack."""

    def __init__(self):
        super().__init__()
        self.lacking = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        without_numbers = operator is torch.ops.aten._fused_sgd_.default and args[0][0].is_meta  # PyTorch lacks that
        result = None if without_numbers else operator(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert all(x.dtype != torch.float64 for x in tensors), f"{operator} has to do with float64"
        name = operator.name().removeprefix("aten::").removesuffix(".default")
        have = {key for keys in kernels().get(name) or ["Composite"] for key in keys.split(", ")}
        if not any(key == "MPS" or "Composite" in key for key in have):
            self.lacking.add(name)
        return result


@pytest.fixture
def no_float64(monkeypatch):
    """`widest` says what it says of Apple's GPUs: it is the one place where float64 is asked for."""
    for module in (common, delta_rule, metrics):
        monkeypatch.setattr(module, "widest", lambda device: torch.float32)


def test_training_without_float64(losses, no_float64):
    """A run with steps by either optimizer and with each mixer, and validation."""
    mixers = {"flow": {}, "codec": dict(pattern="AGDM", layers=4), "llm": dict(pattern="AG", packed=True)}
    for settings in dict(optimizer="muon"), dict(optimizer="adamw") | mixers[losses.system]:
        with Watch():
            assert losses(2, **settings).isfinite().all()


@pytest.mark.parametrize("sample", [
    lambda: solve_flow(tiny_flow(), *encode(["ab c", "d"]), encode([""])[0], [0, 1], steps=2, solver="heun"),
    lambda: generate_frames(tiny_codec_lm(pattern="AGDM", layers=4), 6, [0, 1], top_p=0.9, top_k=5),
    lambda: generate_speech(model := tiny_llm(pattern="AGA"), prompts_of(model), [0, 1, 2], 6, top_p=0.9),
], ids=TRAINERS)
def test_sampling_without_float64(sample, no_float64):
    with Watch():
        assert sample()


def made(*shape, dtype=torch.long):
    return torch.ones(shape, dtype=dtype, device="meta")


TEXT = {"text": (2, 12), "length": (2,), "frames": (2,)}


@pytest.mark.parametrize("model, loss, shapes, floats", [
    (tiny_flow, lambda model, batch: torch.cat(train_flow_tts.flow_loss(model.c, model, batch)).sum(),
     TEXT, {"mel": (2, 32, 80), "noise": (2, 32, 80), "t": (2,)}),
    (partial(tiny_codec_lm, pattern="AGDM", layers=4, cross_every=2),
     lambda model, batch: sum(x.sum() for x in train_codec_lm.codec_loss(model.c, model, batch)),
     TEXT | {"tokens": (2, 71, 3)}, {}),
    (partial(tiny_llm, pattern="AGA"), lambda model, batch: sum(train_llm_tts.llm_loss(model, batch)),
     {"tokens": (2, 70), "document": (2, 70), "targets": (140,), "audio_at": (90,), "text_at": (40,)}, {}),
], ids=TRAINERS)
def test_operators_of_apples_gpus(model, loss, shapes, floats, no_float64, monkeypatch):
    """Forward, backward and the optimizers on a device that is neither CPU nor CUDA, and has no numbers: by PyTorch's
    own table each operator has a kernel for Apple's GPUs. That table may be more than these kernels keep."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # which that device has not
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    model = model().to("meta").train()
    batch = {name: made(*shape) for name, shape in shapes.items()} | {"drop": made(2, dtype=torch.bool)}
    batch |= {name: made(*shape, dtype=torch.float32) for name, shape in floats.items()}
    with Watch() as watch:
        loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        Muon([p for p in model.parameters() if p.ndim == 2 and p.grad is not None], 1e-3).step()
        torch.optim.AdamW(model.parameters()).step()
    assert not watch.lacking


def test_apples_gpus_are_for_one_process(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "torch finds none here" in refusal(lambda argv: common.init_distributed("mps"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert common.init_distributed("mps") == (0, 1, torch.device("mps"))
    assert common.pick_dtype("auto", torch.device("mps")) == torch.float32
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several processes" in refusal(lambda argv: common.init_distributed("mps"))
