"""finite.py: a step whose loss or gradient is not finite changes nothing, and is told with the clips that did it."""

import json
import math
import shutil
import subprocess
import sys
from threading import Event

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, same

import train_codec_lm
import train_flow_tts
import train_llm_tts
from trivox import run_folder
from trivox.audio import MelConfig
from trivox.datasets import MelDataset
from trivox.finite import Watch, lerp_unless
from trivox.muon import Muon

TRAINERS = {"flow": train_flow_tts, "codec": train_codec_lm, "llm": train_llm_tts}


def test_lerp_unless():
    """Against torch.lerp, and against nothing."""
    torch.manual_seed(0)
    x, ends = [torch.randn(5, 7), torch.randn(3)], [torch.randn(5, 7), torch.randn(3)]
    before = [y.clone() for y in x]
    lerp_unless(torch.tensor(1.0), x, [torch.full_like(y, float("nan")) for y in ends], 0.3)
    assert same(x, before)
    for bad in (None, torch.tensor(0.0)):
        wanted = [torch.lerp(y, z, 0.3) for y, z in zip(x, ends)]
        lerp_unless(bad, x, ends, 0.3)
        torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_changes_no_bit(bad):
    """Neither weights nor the optimizers' states; the next step is as if it had not been."""
    def steps(*scales):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 12), (8, 12), (20, 8), (6,))]
        optimizers = [Muon(weights[:3], 0.02), torch.optim.AdamW(weights[3:], lr=0.1, fused=True)]
        watch = Watch(torch.device("cpu"), optimizers, torch.amp.GradScaler("cpu", enabled=False))
        for n, scale in enumerate(scales):
            generator = torch.Generator().manual_seed(sum(scale == 1 for scale in scales[:n]))
            for p in weights:
                p.grad = torch.randn(p.shape, generator=generator) * scale
            good = watch.see(n, [], torch.zeros(1), torch.stack([p.grad.norm() for p in weights]).norm())
            assert bool(good) == (scale == 1)
            for optimizer in optimizers:
                optimizer.step()
        return [p.detach() for p in weights], [optimizer.state_dict() for optimizer in optimizers]

    assert same(steps(1, bad), steps(1)) and same(steps(bad, 1, bad, bad, 1), steps(1, 1))


@pytest.fixture(params=TRAINERS)
def run(request, tiny_run, tmp_path, monkeypatch):
    """(the trainer, train(key=value, …), the run's folder): a tiny run, in this process."""
    system, trainer = request.param, TRAINERS[request.param]
    monkeypatch.setattr(trainer, "write_page", lambda *args, **more: None)
    monkeypatch.setattr(trainer.common, "catch_signals", Event)

    def train(*flags, **changes):
        settings = tiny_run(system) | dict(steps=16, save_every=4, log_every=4, keep_last=50) | changes
        trainer.main([f"--{key}={value}" for key, value in settings.items()] + list(flags))

    return trainer, train, tmp_path / "run"


def spoil(trainer, monkeypatch, steps, then=lambda: None):
    """Make the gradient's norm NaN in these steps, and the gradients with it; then do something more."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def clipped(parameters, most):
        parameters = list(parameters)
        seen.append(1)
        if len(seen) in steps:
            parameters[0].grad.view(-1)[0] = float("nan")
            then()
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def weights(folder, step):
    """Of a checkpoint: weights, averages, the trainer's state."""
    system = run_folder.read_yaml(folder / "config.yaml")["system"]
    path = folder / "checkpoints" / f"step_{step:08d}"
    return run_folder.load_checkpoint(path, system, "model", "ema", "state")[1:]


def test_one_gradient_of_nan(run, monkeypatch):
    """Step 6 of 16 is left out and named; the log's means are over the other steps, and the run ends finite."""
    trainer, train, folder = run
    spoil(trainer, monkeypatch, {6})
    train()
    told = [row for row in rows(folder) if "left_out_step" in row]
    assert [row["left_out_step"] for row in told] == [6] and told[0]["not_finite_alone"] == [] and told[0]["clips"]
    assert all(np.isfinite(row["loss"]) for row in rows(folder) if "loss" in row)
    for part in weights(folder, 16)[:2]:
        assert run_folder.not_finite(part) is None


def test_a_step_that_is_left_out_changes_no_checkpoint(run, monkeypatch):
    """Steps 5 to 8 are left out: the checkpoint of step 8 holds the weights, averages and moments of step 4."""
    trainer, train, folder = run
    spoil(trainer, monkeypatch, {5, 6, 7, 8})
    train(steps=8)
    before, after = weights(folder, 4), weights(folder, 8)
    assert same(before[0], after[0]) and same(before[1], after[1])
    assert same([o["state"] for o in before[2]["optimizers"]], [o["state"] for o in after[2]["optimizers"]])


def test_ten_in_a_row_end_the_run(run, monkeypatch):
    """It says what to try, and is saved as it was before them; with --resume it goes on."""
    trainer, train, folder = run
    spoil(trainer, monkeypatch, range(3, 100))
    said = refusal(lambda argv: train())
    assert "10 steps in a row" in said and "as of step 12" in said and "--lr" in said
    assert run_folder.newest(folder).name == "step_00000012" and run_folder.not_finite(weights(folder, 12)[0]) is None


def test_ten_in_a_row_count_wherever_the_log_looks(run, monkeypatch):
    """Also where its lines are farther apart, and where the run had recovered when it was looked at."""
    trainer, train, folder = run
    spoil(trainer, monkeypatch, range(3, 13))
    assert "10 steps in a row" in refusal(lambda argv: train(log_every=16, steps=40))
    assert run_folder.newest(folder).name == "step_00000020"


def test_left_out_steps_are_told_when_a_signal_ends_the_run(run, monkeypatch):
    trainer, train, folder = run
    stop = Event()
    spoil(trainer, monkeypatch, {2}, then=stop.set)
    monkeypatch.setattr(trainer.common, "catch_signals", lambda: stop)
    train(log_every=10)
    assert [row["left_out_step"] for row in rows(folder) if "left_out_step" in row] == [2]
    assert run_folder.newest(folder).name == "step_00000002"


def spoil_validation(trainer, monkeypatch, bad):
    """Make the validation loss of what has a clip of bad(clips) NaN. Returns a list to which each call adds its clips
    and its val_loss."""
    validate, calls = trainer.validate, []

    def spoilt(c, model, data, more, clips, *args):
        found = validate(c, model, data, more, clips, *args)
        found |= {"val_loss": math.nan} if {*clips} & {*bad(clips)} else {}
        calls.append((list(clips), found["val_loss"]))
        return found

    monkeypatch.setattr(trainer, "validate", spoilt)
    return calls


def test_one_clip_of_nan_in_the_validation(run, monkeypatch, capsys):
    """It is named, in the log and on the screen, the loss is that of the others, and there is a best checkpoint. Later
    it alone is tried again."""
    trainer, train, folder = run
    first = []
    calls = spoil_validation(trainer, monkeypatch, lambda clips: first or first.append(clips[1]) or first)
    train(steps=4, eval_every=2)
    (whole, _), *tries, (others, loss), (again, _), _ = calls
    assert again == first
    assert [clip for [clip], _ in tries] == whole and others == [clip for clip in whole if clip not in first]
    assert calls[-1][0] == others and math.isfinite(loss)
    told = [row for row in rows(folder) if "val_loss" in row]
    assert [row["val_loss"] for row in told] == [loss, calls[-1][1]]
    assert run_folder.named(folder / "checkpoints", "best")
    assert told[0]["val_left_out"] == told[1]["val_left_out"] and len(told[0]["val_left_out"]) == 1
    assert f"leaves out {told[0]['val_left_out'][0]}:" in capsys.readouterr().out


def test_a_clip_that_the_model_could_not_take_comes_back(run, monkeypatch, capsys):
    """As where a young model overflows on it."""
    trainer, train, folder = run
    calls = spoil_validation(trainer, monkeypatch, lambda clips: calls[0][0][:1] if calls and len(calls) < 20 else
                             clips[:1] * (not calls))
    train(steps=8, eval_every=1)
    told = [row for row in rows(folder) if "val_loss" in row]
    assert len(told[0]["val_left_out"]) == 1 and "val_left_out" not in told[-1]
    assert calls[-1][0] == calls[0][0] and capsys.readouterr().out.count("leaves out") == 1


def test_a_model_of_nan_in_the_validation(run, monkeypatch):
    """Is no clip's fault: the loss stays NaN, until the model has recovered."""
    trainer, train, folder = run
    calls = spoil_validation(trainer, monkeypatch, lambda clips: clips if sum(len(c) > 1 for c, _ in calls) < 3 else [])
    train(steps=6, eval_every=1)
    told = [row for row in rows(folder) if "val_loss" in row]
    assert math.isnan(told[0]["val_loss"]) and math.isfinite(told[-1]["val_loss"])
    assert not any("val_left_out" in row for row in told)


@pytest.mark.long
def test_two_processes_find_the_same_clip(tiny_run, data_dir, tmp_path):
    """Over gloo, with a NaN in the log-mel itself: as one process does."""
    folder = shutil.copytree(data_dir, tmp_path / "data")
    data = MelDataset(folder, MelConfig())
    bad, mels = data.clips("val")[2], np.fromfile(path := folder / "mels_00000.f16", np.float16)
    mels[80 * (int(data.ends[bad]) - 1)] = np.nan
    mels.tofile(path)
    logs = []
    for world in (1, 2):
        settings = tiny_run("flow") | dict(data_dir=folder, out_dir=tmp_path / str(world), batch_size=2 // world,
                                           steps=4, eval_every=2)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
                   ROOT / "train_flow_tts.py", *[f"--{key}={value}" for key, value in settings.items()]]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        logs.append([row for row in rows(tmp_path / str(world)) if "val_loss" in row])
    for one, two in zip(*logs, strict=True):
        assert one["val_left_out"] == two["val_left_out"] == [data.rows[bad]["id"]]
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)


@pytest.mark.parametrize("fail, advised", [(1, True), (2, True), (3, False), (4, False), (0, False)])
def test_clips_to_leave_out(fail, advised, tmp_path):
    """Are named where they are the few: where most fail alone, it is the model that does."""
    watch = Watch(torch.device("cpu"), [], torch.amp.GradScaler("cpu", enabled=False))
    watch.most, watch.tried = 10, {f"clip{n}": n >= fail for n in range(4)}
    assert ("leave out the clips clip0" in refusal(lambda argv: watch.end(12, tmp_path))) == advised


def test_one_clip_of_nan(run, monkeypatch):
    """Whatever it is in, the run ends with finite weights and names the clip, and it alone."""
    trainer, train, folder = run
    make, poisoned, system = trainer.make_batch, [], next(name for name, one in TRAINERS.items() if one is trainer)

    def batch_with_nan(*args):
        batch, drawn = make(*args), args[3]
        clips = [one["clip"] if isinstance(one, dict) else one[0] for one in drawn]
        if not poisoned:
            poisoned.append(clips[0])
        if poisoned[0] in clips:
            if system == "flow":
                batch["mel"][clips.index(poisoned[0])] = float("nan")
            else:
                batch["poison"] = torch.ones(())
        return batch

    monkeypatch.setattr(trainer, "make_batch", batch_with_nan)
    if system != "flow":  # tokens cannot be NaN; a loss can
        loss = getattr(trainer, name := f"{system}_loss")

        def spoilt(*args):
            first, *more = loss(*args)
            return [first * float("nan") if "poison" in args[-1] else first, *more]

        monkeypatch.setattr(trainer, name, spoilt)
    train()
    told = [row for row in rows(folder) if "left_out_step" in row]
    assert told and all(len(row["not_finite_alone"]) == 1 for row in told)
    assert len({row["not_finite_alone"][0] for row in told}) == 1 and told[0]["not_finite_alone"][0] in told[0]["clips"]
    assert run_folder.not_finite(weights(folder, 16)[1]) is None
