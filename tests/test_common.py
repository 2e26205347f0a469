"""common.py: configs, checkpoints, logs."""

import errno
import json
import os
import resource
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, finish, launch, refusal, same

from train_codec_lm import Config as CodecConfig
from train_flow_tts import Config
from train_llm_tts import Config as LLMConfig
from trivox import common
from trivox.common import load_checkpoint, load_config, open_log, save_checkpoint

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
    ("lr: [1", ["cannot read", "c.yaml"]),
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


def test_only_a_full_disk_is_told_in_a_sentence():
    def fail(code):
        raise OSError(code, os.strerror(code), "out.wav")

    assert "disk is full" in refusal(lambda argv: fail(errno.ENOSPC))
    with pytest.raises(PermissionError):
        common.run(lambda argv: fail(errno.EACCES), [])


def test_without_a_gpu_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "no GPU" in refusal(lambda argv: common.init_distributed("cuda"))


# ------------------------------------------------------------------------------------------------------------
# Checkpoints

def save(folder, step, best=False, keep_last=2):
    """A checkpoint whose contents tell its step."""
    tensors = {"a": torch.full((300,), float(step)), "b": torch.tensor(step)}
    state = {"step": step, "moments": {0: {"m": torch.full((500,), float(step))}}, "best": float("inf")}
    save_checkpoint(folder, step, {"model": tensors, "ema": tensors}, state, {"system": "flow"}, best, keep_last)


def step_of(folder):
    """The step of a checkpoint all of whose files agree on it."""
    _, model, ema, state = load_checkpoint(folder, "flow", "model", "ema", "state")
    assert same(model, ema) and model["b"] == state["step"] and state["moments"][0]["m"][0] == state["step"]
    return state["step"]


def kept(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_latest_best_and_keep_last(tmp_path):
    for step, best in ((1, False), (2, True), (3, False), (4, False)):
        save(tmp_path, step, best)
    assert kept(tmp_path) == ["best", "latest", "step_00000002", "step_00000003", "step_00000004"]
    assert (step_of(tmp_path / "checkpoints/best"), step_of(tmp_path / "checkpoints/latest")) == (2, 4)
    assert common.find_checkpoint(tmp_path).name == "step_00000002"
    assert common.find_checkpoint(tmp_path / "checkpoints/latest/ema.safetensors").name == "step_00000004"


FILE_OPERATIONS = [(Path, "mkdir"), (Path, "write_text"), (Path, "rename"), (Path, "replace"), (Path, "symlink_to"),
                   (Path, "unlink"), (shutil, "rmtree"), (os, "fsync"), (common, "save_file"), (torch, "save")]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("left_over", [False, True], ids=["", "with a left-over of that step"])
def test_killed_between_any_two_file_operations_of_a_save(tmp_path, monkeypatch, left_over):
    """Wherever it dies, `latest` and `best` are whole, `latest` is not ahead of `best`, and the next save works."""
    left = 0

    def mortal(operation):
        def act(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return operation(*args, **kwargs)
        return act

    for dies_at in range(100):
        run = tmp_path / str(dies_at)
        if left_over:
            save(run, 3)
        save(run, 1, best=True)
        save(run, 2)
        left = dies_at
        with monkeypatch.context() as patch:
            for owner, name in FILE_OPERATIONS:
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            try:
                save(run, 3, best=True, keep_last=1)
                break
            except Killed:
                pass
        state = step_of(run / "checkpoints/latest"), step_of(run / "checkpoints/best")
        assert state in ((2, 1), (2, 3), (3, 3)), f"after {dies_at} operations"
        save(run, 4, keep_last=1)
        assert step_of(run / "checkpoints/latest") == 4 and not (run / "checkpoints/.saving").exists()
    assert dies_at > 10 and kept(run) == ["best", "latest", "step_00000003"]


def test_a_left_over_newer_checkpoint_does_not_push_out_the_one_just_saved(tmp_path):
    """A run killed after step 9 was written but before `latest` pointed to it goes on from step 5 and stops at 7."""
    save(tmp_path, 9)
    save(tmp_path, 5)
    save(tmp_path, 7, keep_last=1)
    assert step_of(tmp_path / "checkpoints/latest") == 7


@pytest.mark.parametrize("limit", [500, 3000], ids=["in the weights", "in the state"])
def test_full_disk_while_saving(tmp_path, limit):
    """A file may not grow beyond `limit` bytes: one sentence, and the last good checkpoint is all there is."""
    save(tmp_path, 1)
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        said = refusal(lambda argv: save(tmp_path, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert "could not save step 2" in said and "step_00000001" in said
    assert kept(tmp_path) == ["latest", "step_00000001"] and step_of(tmp_path / "checkpoints/latest") == 1


@pytest.mark.parametrize("keep", [0, 7, 0.5, -1], ids=["emptied", "cut in its head", "cut in half", "one byte short"])
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_damaged_files(tmp_path, file, keep):
    save(tmp_path, 1)
    path = tmp_path / "checkpoints/step_00000001" / file
    whole = path.read_bytes()
    path.write_bytes(whole[:int(keep * len(whole)) if keep == 0.5 else keep])
    said = refusal(lambda argv: load_checkpoint(path.parent, "flow", "model", "state"))
    assert "cannot read" in said and str(path) in said


def test_state_cannot_carry_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    save(tmp_path, 1)
    folder = tmp_path / "checkpoints/step_00000001"
    torch.save({"step": 1, "optimizers": Evil()}, folder / "state.pt")
    assert "state.pt" in refusal(lambda argv: load_checkpoint(folder, "flow", "state"))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("change, words", [
    (lambda w: w.pop("bias"), ["no tensor", "'bias'"]),
    (lambda w: w.update(extra=torch.zeros(1)), ["unknown tensor", "'extra'"]),
    (lambda w: w.update(bias=torch.zeros(4)), ["bias", "(4,)", "(3,)"]),
], ids=["missing", "unknown", "shape"])
def test_weights_of_another_model(change, words):
    model = torch.nn.Linear(2, 3)
    weights = dict(model.state_dict())
    change(weights)
    said = refusal(lambda argv: common.load_weights(model, weights, "x.safetensors"))
    assert all(word in said for word in ["x.safetensors", *words]), said


@pytest.mark.parametrize("path", ["nothing", "", "checkpoints"])
def test_no_checkpoint(tmp_path, path):
    (tmp_path / "config.yaml").write_text("system: flow\n")
    assert "no checkpoint at" in refusal(lambda argv: common.find_checkpoint(tmp_path / path))


# ------------------------------------------------------------------------------------------------------------
# Log, signals

def test_log_goes_on_at_the_checkpoint(tmp_path):
    """Lines beyond it and one that was cut by a kill are dropped, and those before are kept."""
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in (1, 2, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + lines[0][:9])
    open_log(tmp_path, 2, {}, "disabled", "")(3, loss=9.0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (2, 1.0), (3, 9.0)]


def _wait_for_a_signal():
    stop = common.catch_signals()
    print("ready", flush=True)
    while True:
        if stop.wait(0.01):
            print("asked to stop", flush=True)


def test_signals():
    """The first SIGINT asks, the second interrupts."""
    process = launch(_wait_for_a_signal)
    for said in ("ready", "asked to stop"):
        while said not in (process.log.read_text() if process.log.exists() else ""):
            process.join(0.01)
        os.kill(process.pid, signal.SIGINT)
    code, said = finish(process)
    assert code == 1 and "KeyboardInterrupt" in said
