"""common.py: configs, devices, signals; how it tells the error of errors.py."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, finish, launch, refusal

from train_codec_lm import Config as CodecConfig
from train_flow_tts import Config
from train_llm_tts import Config as LLMConfig
from trivox import common
from trivox.common import load_config

SYSTEMS = {"flow": Config, "codec": CodecConfig, "llm": LLMConfig}


def config(*flags, file=None):
    return load_config(Config, [*(["--config", str(file)] if file else []), *flags])


def refused(*flags, file=None):
    return refusal(lambda argv: config(*argv, file=file), *flags)


# ------------------------------------------------------------------------------------------------------------
# Config

@pytest.mark.parametrize("flags, key, value", [
    (["--lr=1e-3"], "lr", 1e-3),
    (["--lr", "1e-3"], "lr", 1e-3),
    (["--lr", "1"], "lr", 1.0),
    (["--timestep_logit_mean", "-0.8"], "timestep_logit_mean", -0.8),
    (["--timestep_logit_mean", "-8e-1"], "timestep_logit_mean", -0.8),
    (["--timestep-logit-mean=-8e-1"], "timestep_logit_mean", -0.8),
    (["--batch-size", "3"], "batch_size", 3),
    (["--compile"], "compile", True),
    (["--compile", "--lr", "1"], "compile", True),
    (["--compile=false"], "compile", False),
    (["--out_dir", "007"], "out_dir", "007"),
    (["--cache_text", "off"], "cache_text", "off"),  # a boolean to YAML 1.1
])
def test_flags(flags, key, value):
    found = getattr(config(*flags), key)
    assert found == value and type(found) is type(value)


def test_yaml_and_then_flags(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lr: 1e-3\nmin_lr: 2.5E-4\nfmax: 8000\nsteps: 7  # few\ncache_text: on\ncompile: yes\n")
    c = config("--steps", "8", file=file)
    assert (c.lr, c.min_lr, c.fmax, c.steps, c.cache_text, c.compile) == (1e-3, 2.5e-4, 8000.0, 8, "on", True)
    assert type(c.lr) is type(c.fmax) is float


@pytest.mark.parametrize("text, words", [
    ("btch_size: 3", ["'btch_size'", "'batch_size'", "c.yaml"]),
    ("batch_size: many", ["batch_size", "integer", "'many'", "c.yaml"]),
    ("batch_size: 1e3", ["batch_size", "integer", "c.yaml"]),
    ("optimizer: sgd", ["optimizer", "'muon'", "'adamw'", "'sgd'"]),
    ("system: codec", ["system", "'flow'", "'codec'"]),
    ("- a\n- b", ["c.yaml", "list"]),
    ("only words", ["c.yaml", "str"]),
    ("lr: [1", ["cannot read", "c.yaml"]), ("lr: 2001-99-99", ["cannot read"]), ("[" * 3000, ["cannot read"]),
    ("lr: !!timestamp x", ["cannot read"]), ("&a [*a, *a]", ["list"]),
    ("!!python/object/apply:os.mkdir [hacked]: 1", ["cannot read", "c.yaml"]),
    (None, ["cannot read", "c.yaml"]),
])
def test_bad_files(tmp_path, text, words):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    said = refused(file=file)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("flags, words", [
    (["--batch_sizes", "3"], ["'batch_sizes'", "'batch_size'", "command line"]),
    (["--batch_sizes=3"], ["'batch_sizes'", "'batch_size'"]),
    (["--lr", "-1"], ["--lr", "greater than or equal to 0"]), (["--lr=.inf"], ["finite"]), (["--lr=.nan"], ["finite"]),
    (["--grad_clip=.nan"], ["greater than 0"]), (["--lr", "nan"], ["number"]), (["--ema_decay", "1"], ["less than 1"]),
    (["--text_condition_dropout", "1.1"], ["less than or equal to 1"]), (["--seed", str(2**63)], ["less than"]),
    (["--seed", "-1"], ["greater than or equal to 0"]), (["--out_dir="], ["out_dir", "at least 1 character"]),
    (["--out_dir", "--resume"], ["out_dir", "string"]), (["--data_dir", "a\0b"], ["zero byte"]),
    (["--heads", "5"], ["5 heads"]), (["--warmup_steps", "-1"], ["warmup_steps"]), (["--config"], ["name a file"]),
    (["--batch", "3"], ["'batch'"]),  # no guessing of abbreviations
    (["stray"], ["'stray'"]),
    (["--steps", "1.5"], ["steps", "--steps", "integer", "1.5"]),
    (["--lr", "true"], ["lr", "number"]),
    (["--lr"], ["lr", "number"]),
    (["--steps", "[1"], ["steps"]),
    (["--steps", "a: b: c"], ["steps"]),
    (["--system", "codec"], ["system", "codec"]),
])
def test_bad_flags(flags, words):
    said = refused(*flags)
    assert all(word in said for word in words), said


def test_help_names_every_key(capsys):
    with pytest.raises(SystemExit) as end:
        config("--help")
    said = capsys.readouterr().out
    assert not end.value.code and all(f"    {f.name}: " in said for f in fields(Config))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_configs_survive_being_written(tmp_path, path):
    """What a run saves as its effective config is read back as the same config."""
    from dataclasses import asdict

    cls = SYSTEMS[path.name.partition("_")[0]]
    c = load_config(cls, ["--config", str(path)])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(asdict(c)))
    assert load_config(cls, ["--config", str(tmp_path / "c.yaml")]) == c


@pytest.mark.parametrize("ask, words", [
    (lambda: torch.empty(10**14), "372,529.0 GiB"), (lambda: torch.empty(2**62), ""),
    (lambda: np.empty(10**14), "728 TiB"), (lambda: bytearray(2**60), ""),
    (lambda: np.empty((2**40, 2**40)), ""), (lambda: torch.empty(10**30), ""), (lambda: np.zeros(10**30), ""),
    (lambda: exec("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.5 GiB. GPU 0')"), "2.5 GiB"),
], ids=["torch", "torch, beyond numbers", "numpy", "Python", "numpy, beyond numbers",
        "torch, beyond 64 bits", "numpy, beyond 64 bits", "a GPU"])
def test_where_memory_runs_out(ask, words):
    said = refusal(lambda argv: ask())
    assert "the memory ran out" in said and words in said and "trivox" not in said
    assert common.memory_lacks(RuntimeError("shapes differ")) is None


def test_a_reader_that_leaves_does_not_end_the_work(tmp_path):
    """As `head -1` does; and what its encoding lacks is written otherwise."""
    program = ("import sys; from pathlib import Path; from trivox import common\n"
               "common.run(lambda argv: [print('ä', n, flush=True) for n in range(3000)] "
               f"and Path({str(tmp_path / 'done')!r}).touch(), [])")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.stdout.readline() == b"\\xe4 0\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0) and (tmp_path / "done").exists()


@pytest.mark.parametrize("script", ["train_flow_tts.py", "train_codec_lm.py", "train_llm_tts.py", "evaluate.py",
                                    "sample.py", "data.py", "export.py", "serve.py", "page.py", "bench.py"])
def test_an_interrupt_while_a_command_imports_is_quiet(script, tmp_path):
    """Whatever it imports first comes after trivox, whose hook this is."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    found = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (found.returncode, found.stderr) == (-signal.SIGINT, "")


def test_what_the_system_refuses_is_told_in_a_sentence():
    """A full disk, and a place that cannot be used; what names no file is a fault of ours."""
    def fail(code, *path):
        raise OSError(code, os.strerror(code), *path)

    assert "disk is full" in refusal(lambda argv: fail(errno.ENOSPC, "out.wav"))
    assert "cannot use out.wav: Permission denied" in refusal(lambda argv: fail(errno.EACCES, "out.wav"))
    with pytest.raises(PermissionError):
        common.run(lambda argv: fail(errno.EACCES), [])


def test_without_a_gpu_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "no GPU" in refusal(lambda argv: common.init_distributed("cuda"))


# ------------------------------------------------------------------------------------------------------------
# Signals

def _wait_for_a_signal(argv):
    stop = common.catch_signals()
    print("ready", flush=True)
    while True:
        if stop.wait(0.01):
            print("asked to stop", flush=True)


def test_signals():
    """The first SIGINT asks, the second interrupts, without a word."""
    process = launch(common.run, _wait_for_a_signal, [])
    for said in ("ready", "asked to stop"):
        while said not in (process.log.read_text() if process.log.exists() else ""):
            process.join(0.01)
        os.kill(process.pid, signal.SIGINT)
    code, said = finish(process)
    assert code == 130 and {*said.splitlines()} == {"ready", "asked to stop"}
