"""finite.py: a step whose loss or gradient is not finite changes nothing, and is told with the clips that did it."""

import json
from threading import Event

import numpy as np
import pytest
import torch
from conftest import refusal, same

import train_codec_lm
import train_flow_tts
import train_llm_tts
from trivox import run_folder
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
