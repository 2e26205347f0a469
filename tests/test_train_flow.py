"""train_flow_tts.py: what a step draws, kills and signals, two processes beside one, learning, refusals."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_FLOW as TINY, checkpoint, finish, launch, refusal, same, train
from helpers import tiny_flow
from scipy import stats
from scipy.special import logit

import train_flow_tts as trainer
from train_flow_tts import Config, draw, flow_loss, make_batch, validate
from trivox import common
from trivox.checkpoints import load_model
from trivox.datasets import MelDataset
from trivox.run_folder import newest, steps_in
from trivox.text import TextFeatures

CPU = torch.device("cpu")


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def losses(run):
    """{step: loss}; each step has one line."""
    rows = [(row["step"], row["loss"]) for row in metrics(run) if "loss" in row]
    assert len(rows) == len(dict(rows))
    return dict(rows)


# ------------------------------------------------------------------------------------------------------------
# What a step draws

def test_draws_depend_on_seed_epoch_and_clip_alone():
    """Each clip of each epoch has noise and a time of its own."""
    draws = [draw(Config(seed=seed), epoch, clip) for seed in (0, 1) for epoch in (0, 1) for clip in range(50)]
    assert len({d["noise"] for d in draws}) == len({d["t"] for d in draws}) == len(draws)
    assert draws[3] == draw(Config(), 0, 3)


def test_distributions():
    """The moments of what is drawn, each within four standard errors of the config's."""
    n, c = 4000, Config(timestep_logit_mean=-0.8, timestep_logit_std=0.8, timestep_uniform=0, silence_prob=0.3,
                        max_silence_sec=0.5, text_condition_dropout=0.1)
    draws = [draw(c, epoch, clip) for epoch in range(40) for clip in range(100)]
    t = np.array([d["t"] for d in draws])
    logits = logit(1 - t)  # t = 1 - sigmoid(N(mean, std))
    assert logits.mean() == pytest.approx(-0.8, abs=4 * 0.8 / n**0.5)
    assert logits.std() == pytest.approx(0.8, abs=4 * 0.8 / (2 * n) ** 0.5)
    assert sum(d["drop"] for d in draws) == pytest.approx(0.1 * n, abs=4 * (n * 0.1 * 0.9) ** 0.5)
    silences = np.array([d["silence"] for d in draws if d["silence"]])
    assert len(silences) == pytest.approx(0.3 * n, abs=4 * (n * 0.3 * 0.7) ** 0.5 + 0.05 * n)  # some are of 0 frames
    assert silences.max() <= 0.5 * 22050 / 256
    assert silences.mean() == pytest.approx(0.25 * 22050 / 256, abs=4 * 12.5 / len(silences) ** 0.5 + 0.5)


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_times(share):
    """A share of them is uniform on (0, 1], the others are logit-normal, by Kolmogorov and Smirnov's test."""
    c = Config(timestep_logit_mean=-0.8, timestep_logit_std=0.8, timestep_uniform=share)
    t = np.array([draw(c, epoch, clip)["t"] for epoch in range(40) for clip in range(100)])
    assert 0 < t.min() and t.max() <= 1
    assert stats.kstest(t, lambda t: share * t + (1 - share) * stats.norm.sf(logit(1 - t), -0.8, 0.8)).pvalue > 0.01


@pytest.mark.parametrize("n", [1, 7, 64, 512])
def test_validation_times_are_even(monkeypatch, n):
    """No gap is much larger than between even times, also among the shorter half of the clips and the longer. Where a
    frame's loss is t, the loss of each tenth lies in it, and theirs all is the mean."""
    times, frames = [], np.arange(n)[::-1] + 100

    def losses(c, model, draws):
        times.extend(d["t"] for d in draws)
        return torch.tensor([d["t"] * (frames[d["clip"]] + d["silence"]) for d in draws]), torch.zeros(len(draws))

    monkeypatch.setattr(trainer, "make_batch", lambda c, data, features, draws, device: draws)
    monkeypatch.setattr(trainer, "flow_loss", losses)
    c = Config(batch_size=5, timestep_uniform=0.25)
    found = validate(c, tiny_flow(), SimpleNamespace(frames=frames), None, [*range(n)], 0, 1, CPU, torch.float32)
    by_time = {float(key.removeprefix("val_loss_t")): loss for key, loss in found.items() if "_t0" in key}
    assert len(by_time) == min(n, 10) or n == 7
    assert all(t - 0.051 < loss < t + 0.051 for t, loss in by_time.items())
    assert found["val_loss"] == pytest.approx(np.mean(times), abs=0.03) and found["val_duration_loss"] == 0
    assert len(times) == n and 0 < min(times) and max(times) <= 1
    for some in (times, times[:n // 2], times[n // 2:]):
        assert np.diff([0, *sorted(some), 1]).max() <= 2.7 / max(1, len(some))


def test_a_batch_is_its_clips(data):
    """Mels with silence at their ends, dropped texts, noise over the frames that count: the same in any company."""
    c, features = Config(**TINY), TextFeatures("bytes")
    draws = [dict(clip=i, t=0.1 * i, drop=i == 2, silence=5 * i, noise=77 + i) for i in range(4)]
    batch = make_batch(c, data, features, draws, CPU)
    for i, d in enumerate(draws):
        n = data.rows[i]["frames"]
        assert batch["frames"][i] == n + 5 * i
        assert torch.equal(batch["mel"][i, :n], data.mel(i)) and not batch["noise"][i, n + 5 * i:].any()
        assert (batch["mel"][i, n:n + 5 * i] == np.float32(np.log(1e-5))).all()
        alone = make_batch(c, data, features, [d], CPU)
        assert torch.equal(batch["noise"][i, :n + 5 * i], alone["noise"][0, :n + 5 * i])
        assert torch.equal(batch["text"][i, :batch["length"][i]], alone["text"][0, :alone["length"][0]])
    assert batch["length"][2] == 1 and batch["mel"].shape[1] % 32 == 0


def test_validation_does_not_depend_on_the_batch_size(data):
    """The mean over all frames and clips, with their texts, whatever the micro-batches."""
    model, clips = tiny_flow(), list(range(len(data.rows)))[:11]
    results = [[*validate(Config(**TINY, batch_size=size, text_condition_dropout=0.5), model, data,
                          TextFeatures("bytes"), clips, 0, 1, CPU, torch.float32).values()] for size in (1, 4, 16)]
    np.testing.assert_allclose(results[1:], [results[0]] * 2, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# The same result

def test_sigkills(flags, sigkills):
    """Killed at random moments and resumed, a run ends with the bits of the one that nobody disturbed."""
    def start(out, *bare, **settings):
        return train(flags(*bare, out_dir=out, dtype="auto", silence_prob=0.5, **settings))

    sigkills(start, "flow", 4)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(flags, tmp_path, signum):
    """It saves the step it is at, says which, leaves with 143 or 130; resumed, it ends as if it had not stopped, with
    the same curve. (A line of it is the mean over four steps.)"""
    settings = dict(steps=40, log_every=4)
    assert finish(train(flags(out_dir=tmp_path / "whole", **settings)))[0] == 0
    process, log = train(flags(**settings)), tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and '"step": 8,' in log.read_text()):
        process.join(0.002)
    os.kill(process.pid, signum)
    code, said = finish(process)
    step = checkpoint(tmp_path / "run")[1]["state"]["step"]
    assert code == 128 + signum and 8 <= step < 40 and f"after step {step};" in said
    code, said = finish(train(flags("--resume", **settings)))
    assert code == 0 and f"from step {step}" in said
    assert same(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "whole"))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def test_two_processes_are_one(flags, tmp_path):
    """Over gloo, with the same clips a step: the same curve for 50 steps, the same validation."""
    settings = dict(steps=50, eval_every=25, silence_prob=0.5)
    single = train(flags(out_dir=tmp_path / "one", **settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               ROOT / "train_flow_tts.py", *flags(out_dir=tmp_path / "two", **settings | dict(batch_size=2))]
    pair = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert pair.returncode == 0, pair.stderr
    assert finish(single)[0] == 0
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for key in one.keys() & {"step", "loss", "duration_loss", "val_loss", "val_duration_loss"}:
            assert two[key] == pytest.approx(one[key], abs=1e-4)
        assert two.get("grad_norm", 0) == pytest.approx(one.get("grad_norm", 0), rel=1e-3)


@pytest.fixture
def in_process(monkeypatch):
    """The trainer in this process, whose signal handlers are pytest's, and which fails where it would go on forever. It
    leaves the run's page out, to save time."""
    monkeypatch.setattr(common, "catch_signals", Event)
    monkeypatch.setattr(trainer, "write_page", lambda *args, **facts: None)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it goes on forever"))
    signal.alarm(60)
    yield trainer.main
    signal.alarm(0)


def test_gradient_accumulation(flags, tmp_path, in_process):
    """Two micro-batches of two clips have the gradient of one of four. (After one step AdamW's first moment is a tenth
    of the gradient.)"""
    moments = []
    for size in (4, 2):
        run = tmp_path / str(size)
        in_process(flags(out_dir=run, batch_size=size, grad_accum_steps=4 // size, steps=1, optimizer="adamw",
                         silence_prob=0.5))
        optimizer, = checkpoint(run)[1]["state"]["optimizers"]
        moments.append({i: m["exp_avg"] for i, m in optimizer["state"].items()})
    for i, whole in moments[0].items():
        torch.testing.assert_close(moments[1][i], whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-4)
    assert metrics(tmp_path / "2")[0]["loss"] == pytest.approx(metrics(tmp_path / "4")[0]["loss"], rel=1e-5)


def test_overfit_reads_the_first_clips_alone(flags, data, in_process, monkeypatch):
    read, stored = set(), MelDataset.numbers
    monkeypatch.setattr(MelDataset, "numbers", lambda self, i: read.add(i) or stored(self, i))
    in_process(flags(overfit=3, eval_every=2))
    assert read == set(data.clips("all")[:3])


def test_schedule_and_average(flags, tmp_path, in_process):
    """Warm-up in equal steps, then half a cosine down to min_lr; the average follows the weights at (1 + n) / (10 + n)
    while that is below ema_decay."""
    in_process(flags(steps=12, warmup_steps=4, lr=1e-2, min_lr=1e-3))
    rates = [row["lr"] for row in metrics(tmp_path / "run") if "lr" in row]
    np.testing.assert_allclose(rates[:4], [0.0025, 0.005, 0.0075, 0.01])
    np.testing.assert_allclose(rates[8], (1e-2 + 1e-3) / 2)
    assert rates[4:] == sorted(rates[4:], reverse=True) and 1e-3 < rates[-1] < 1.5e-3

    settings = dict(warmup_steps=0, ema_decay=0.15, keep_last=4, save_every=1)
    in_process(flags(out_dir=tmp_path / "ema", steps=3, **settings))
    weights = [checkpoint(tmp_path / "ema", f"step_{step:08d}")[1] for step in (1, 2, 3)]
    for key, second in weights[1]["model"].items():
        for step, decay in ((1, 0.15), (2, 0.15)):  # (1 + 1) / (10 + 1) is above
            wanted = torch.lerp(weights[step - 1]["ema"][key], weights[step]["model"][key], 1 - decay)
            torch.testing.assert_close(weights[step]["ema"][key], wanted)


# ------------------------------------------------------------------------------------------------------------
# Learning

def test_it_learns_what_the_text_says(run, data):
    """Of pure noise, the right text tells at least a fifth more of the mel than its bytes in another order, which a
    model that ignores them, their order or the clock cannot know. An untrained one is at 2, the variance of both."""
    model, config = load_model(run)
    c, features = Config(**config), TextFeatures("bytes")
    draws = [dict(clip=clip, t=1.0, drop=False, silence=0, noise=clip) for clip in data.clips("train")[:4]]
    batch = make_batch(c, data, features, draws, CPU)
    mixed = {**batch, "text": batch["text"].clone()}
    for text, n in zip(mixed["text"], batch["length"]):
        text[:n - 1] = text[:n - 1].flip(0)
    with torch.no_grad():
        right, wrong = (flow_loss(c, model, b)[0].sum().item() / batch["frames"].sum().item() for b in (batch, mixed))
    assert right < 0.8 * wrong and right < 1.2
    assert metrics(run)[-1]["val_duration_loss"] < 0.01  # lengths to 10 %


def test_no_time_is_left_untaught(flags, data, tmp_path, in_process):
    """After 200 steps the loss over t is smooth: nowhere a fifth above the mean of its neighbours, and at t = 1, where
    sampling begins, not 1.4 times that at 0.9. (With the published times alone it is 1.6 times that.)"""
    in_process(flags(steps=200, lr=8e-3, min_lr=1e-4, warmup_steps=20, timestep_uniform=0.25, timestep_logit_mean=-0.8,
                     timestep_logit_std=0.8, ema_decay=0.98, batch_size=8, log_every=50, patch=4, prediction="mel"))
    model, config = load_model(tmp_path / "run")
    c, features, clips, curve = Config(**config), TextFeatures("bytes"), data.clips("all")[:8], []
    for t in np.linspace(0, 1, 26):
        draws = [dict(clip=clip, t=float(t), drop=False, silence=0, noise=clip) for clip in clips]
        batch = make_batch(c, data, features, draws, CPU)
        with torch.no_grad():
            curve.append((flow_loss(c, model, batch)[0].sum() / batch["frames"].sum()).item())
    steps = np.log(curve)
    assert (steps[1:-1] - (steps[:-2] + steps[2:]) / 2).max() < np.log(1.2)
    assert curve[-1] < 1.4 * np.interp(0.9, np.linspace(0, 1, 26), curve)


@pytest.mark.parametrize("settings", [dict(optimizer="adamw", lr=3e-3), dict(activation_checkpointing="true"),
                                      dict(patch=1, text_layers=0), dict(dtype="bfloat16"),
                                      dict(patch=4, prediction="mel", phonemes="en-us")], ids=str)
def test_variants_train(flags, tmp_path, in_process, settings):
    """The validation loss falls by a tenth in 25 steps."""
    in_process(flags(**dict(steps=25, lr=1e-2, ema_decay=0.5, eval_every=1) | settings))
    curve = [row["val_loss"] for row in metrics(tmp_path / "run") if "val_loss" in row]
    assert curve[-1] < 0.9 * curve[0]


def test_a_run_keeps_what_it_was_made_of(run):
    """The effective config beside each checkpoint, the trainer and the model as they were, the curves."""
    config = common.read_yaml(run / "config.yaml")
    assert config == common.read_yaml(newest(run) / "config.yaml")
    assert config["overfit"] == 4 and config.keys() == asdict(Config()).keys()
    for name in ("train_flow_tts.py", "model.py"):
        assert (run / "code" / name).read_bytes() == (ROOT / name).read_bytes()
    assert (run / "code" / "git.diff").exists() and (run / "curves.png").read_bytes()[1:4] == b"PNG"


def test_it_speaks_while_it_trains(flags, tmp_path, in_process, monkeypatch):
    """Wavs and a word error rate at the steps asked for, of the sentences of a file; where no recogniser knows the
    words, it speaks all the same."""
    (tmp_path / "prompts.txt").write_text("The baker bought two boxes today.\n\nAn unheard sentence.\n")
    settings = dict(speak_every=2, eval_prompts=tmp_path / "prompts.txt", eval_steps=1)
    in_process(flags(steps=3, eval_recogniser="grammar", **settings))
    rows = [row for row in metrics(tmp_path / "run") if "wer" in row]
    assert [row["step"] for row in rows] == [2, 3] and all(row["wer"] > 0.5 for row in rows)
    for step in (2, 3):
        folder = tmp_path / "run" / "samples" / f"step_{step:08d}"
        assert sorted(path.name for path in folder.iterdir()) == [
            "000.png", "000.wav", "001.png", "001.wav", "clips.jsonl"]
    monkeypatch.setattr(trainer, "load_recognisers", lambda *_, quick, language: [])
    in_process(flags(steps=1, out_dir=tmp_path / "deaf", **settings))
    assert not [row for row in metrics(tmp_path / "deaf") if "wer" in row]
    assert (tmp_path / "deaf" / "samples" / "step_00000001" / "001.wav").exists()


def test_fine_tuning(flags, run, tmp_path, in_process):
    """A first step at a rate of almost nothing leaves the averaged weights of the other run as they are, which validate
    as they did there; the optimizer is fresh."""
    in_process(flags(init_from=run, steps=1, lr=1e-12, min_lr=1e-12, overfit=4, timestep_logit_mean=-2))
    there, here = checkpoint(run, "best")[1]["ema"], checkpoint(tmp_path / "run")[1]
    for key in there:
        torch.testing.assert_close(here["model"][key], there[key], atol=1e-6, rtol=1e-6)
    best = min(row["val_loss"] for row in metrics(run) if "val_loss" in row)
    assert metrics(tmp_path / "run")[-1]["val_loss"] == pytest.approx(best, rel=1e-4)
    assert here["state"]["step"] == 1


@pytest.mark.parametrize("settings, words", [
    (dict(prediction="mel"), "prediction is velocity"), (dict(phonemes="de"), "reads letters"),
], ids=str)
def test_fine_tuning_another_model(flags, run, in_process, settings, words):
    """Also where the shapes of its weights are the same."""
    assert words in refusal(in_process, *flags(init_from=run, steps=1, **settings))


# ------------------------------------------------------------------------------------------------------------
# Refusals

def test_texts_without_phonemes(flags, data, in_process, monkeypatch):
    """All are counted before the first step, and the first is named."""
    for row, text in zip(data.rows, ("One слово.", "Two.", "你好", "One слово.")):
        monkeypatch.setitem(row, "text", text)
    monkeypatch.setattr(trainer, "MelDataset", lambda *args: data)
    said = refusal(in_process, *flags(phonemes="en-us"))
    assert "2 of the texts of" in said and "'One слово.'" in said and "--phonemes ''" in said


@pytest.mark.parametrize("settings, words", [
    (dict(data_dir="nowhere"), ["no prepared data set at nowhere"]),
    (dict(n_mels=100), ["n_mels=80", "n_mels=100"]),
    (dict(init_from="nowhere"), ["no checkpoint at nowhere"]),
    (dict(speak_every=1, eval_prompts="nowhere.txt"), ["nowhere.txt"]),
    (dict(speak_every=1, eval_prompts="long.txt"), ["300 bytes"]),
    (dict(speak_every=1, eval_vocoder="bigvgan"), ["bigvgan", "config.json"]),
    (dict(speak_every=1, eval_recogniser="whisper"), ["base.en.pt"]),
    (dict(speak_every=1, eval_prompts="foreign.txt", phonemes="en-us"), ["reads English", "'слово'"]),
    (dict(text_encoder="google/byt5-small"), ["google/byt5-small"]),
    (dict(text_encoder="google/byt5-small", phonemes="en-us"), ["--phonemes", "as they are spelled"]),
    (dict(phonemes="nowhere"), ["no voice 'nowhere'"]),
    (dict(batch_size=0), ["batch_size"]),
    (dict(grad_accum_steps=0), ["grad_accum_steps"]),
    (dict(log_every=0), ["log_every"]),
    (dict(heads=3), ["heads"]),
    (dict(text_width=96), ["text_width"]),
], ids=str)
def test_what_cannot_be_trained(flags, tmp_path, in_process, monkeypatch, settings, words):
    """Said before the first step, and before there is a checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "long.txt").write_text("x" * 300 + "\n")
    (tmp_path / "foreign.txt").write_text("One слово.\n")
    said = refusal(in_process, *flags(**settings))
    assert all(word in said for word in words), said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("size, advice", [
    (12, "--batch_size 6 --grad_accum_steps 6"), (3, "--batch_size 1 --grad_accum_steps 9"),
    (1, "--activation_checkpointing"),
])
def test_out_of_memory(flags, in_process, monkeypatch, size, advice):
    """The micro-batch it was, and settings of the same effective batch that need less."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer, "flow_loss", full)
    said = refusal(in_process, *flags(batch_size=size, grad_accum_steps=3))
    assert f"micro-batches of {size} clips" in said and said.endswith(advice)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


@pytest.fixture
def copy(run, flags, tmp_path):
    """The command line that goes on with a copy of the trained run."""
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    return partial(flags, steps=104, overfit=4)


def test_a_run_is_not_overwritten(copy, tmp_path, in_process):
    before = files(tmp_path)
    assert "already holds a run: --resume" in refusal(in_process, *copy())
    assert files(tmp_path) == before


def test_a_finished_run_is_left_alone(copy, tmp_path, in_process, capsys):
    before = files(tmp_path / "run" / "checkpoints")
    in_process(copy("--resume", steps=100))
    assert "complete: 100 of 100" in capsys.readouterr().out and files(tmp_path / "run" / "checkpoints") == before


@pytest.mark.parametrize("damage, changes, words", [
    ("model.safetensors", {}, ["none of the", "model.safetensors is cut off"]),
    ("ema.safetensors", {}, ["none of the", "ema.safetensors is cut off"]),
    ("state.pt", {}, ["none of the", "state.pt is cut off"]),
    ("another system", {}, ["'codec'", "'flow'"]),
    ("", dict(width=128, heads=4), ["(64, ", "(128, "]),
    ("", dict(layers=3), ["blocks.2"]),
    ("", dict(optimizer="adamw"), ["optimizer"]),
    ("", dict(prediction="mel"), ["prediction is velocity", "and mel in this config", "another --out_dir"]),
    ("", dict(phonemes="en-us"), ["phonemes is ''", "reads letters"]),
], ids=str)
def test_what_cannot_be_resumed(copy, tmp_path, in_process, damage, changes, words):
    """One sentence, and the folder stays as it is."""
    checkpoints = steps_in(tmp_path / "run" / "checkpoints")
    if damage == "another system":
        (checkpoints[0] / "config.yaml").write_text("system: codec\n")
        (checkpoints[0] / "files.json").unlink()  # which tells that this is not what was written there
    for path in [folder / damage for folder in checkpoints if "." in damage]:
        path.write_bytes(path.read_bytes()[:1000])
    (tmp_path / "run" / ".lock").touch()
    before = {path: content for path, content in files(tmp_path / "run").items() if ".lock" not in str(path)}
    said = refusal(in_process, *copy("--resume", **changes))
    assert all(word in said for word in words), said
    assert {path: content for path, content in files(tmp_path / "run").items() if ".lock" not in str(path)} == before


def test_a_kill_while_the_config_was_written(copy, tmp_path, in_process):
    """RUN/config.yaml is only for the reader; the run goes on without it."""
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text()[:40] + "\nhalf a li")
    in_process(copy("--resume"))
    assert checkpoint(tmp_path / "run")[0] == "step_00000104"


def _with_little_room(size, argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # no file may grow beyond it
    common.run(trainer.main, argv)


@pytest.mark.parametrize("room", [0.5, 1.5], ids=["in the weights", "in the optimizer's state"])
def test_full_disk(flags, tmp_path, room):
    """One sentence, exit status 1; the last good checkpoint is there, alone, and the run goes on from it."""
    settings = dict(optimizer="adamw", save_every=3)
    assert finish(train(flags(steps=3, **settings)))[0] == 0
    before = checkpoint(tmp_path / "run")
    size = (newest(tmp_path / "run") / "model.safetensors").stat().st_size
    code, said = finish(launch(_with_little_room, int(room * size), flags("--resume", **settings)))
    assert code == 1 and "Traceback" not in said
    assert "error: could not save step 6" in said and "step_00000003" in said.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["best", "latest", before[0]]
    assert same(checkpoint(tmp_path / "run"), before)
    assert finish(train(flags("--resume", **settings)))[0] == 0 and checkpoint(tmp_path / "run")[0] == "step_00000006"


def test_refused_as_a_program(tmp_path):
    """From a shell: nothing but the sentence on stderr, and 1."""
    command = [sys.executable, ROOT / "train_flow_tts.py", "--data_dir", tmp_path / "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: no prepared data set")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
