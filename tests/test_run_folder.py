"""run_folder.py: checkpoints that are whole or not at all, found however the folder was copied, written
by one process at a time."""

import json
import os
import resource
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import finish, launch, refusal
from helpers import Config, Killed, step_of

from trivox import run_folder
from trivox.common import UserError
from trivox.run_folder import find_checkpoint, load_checkpoint, named, newest, open_log, save_checkpoint


def save(folder, step, best=False, keep_last=2):
    """A checkpoint whose contents tell its step."""
    tensors = {"a": torch.full((300,), float(step)), "b": torch.tensor(step)}
    state = {"step": step, "moments": {0: {"m": torch.full((500,), float(step))}}, "best": float("inf")}
    save_checkpoint(folder, step, {"model": tensors, "ema": tensors}, state, {"system": "flow"}, best, keep_last)


def kept(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def with_links(run):
    """The folder as runs had it before: `latest` and `best` are links."""
    for name in ("latest", "best"):
        path = run / "checkpoints" / name
        target = path.read_text()
        path.unlink()
        path.symlink_to(target)


# ------------------------------------------------------------------------------------------------------------
# Saving

def test_a_thread_that_saves_ends_with_it():
    """One that stayed would keep OpenMP's threads, and all later steps would take 1.6 times as long."""
    names = []
    for n in range(2):
        run_folder.begin_save(lambda: names.append(threading.current_thread().name))
        run_folder.wait_for_save()
    assert len(names) == 2 and all(name.startswith("save") for name in names)
    until = time.monotonic() + 10
    while alive := [thread for thread in threading.enumerate() if thread.name.startswith("save")]:
        assert time.monotonic() < until, alive
        time.sleep(0.01)


def test_latest_best_and_keep_last(tmp_path):
    for step, best in ((1, False), (2, True), (3, False), (4, False)):
        save(tmp_path, step, best)
    folder = tmp_path / "checkpoints"
    assert kept(tmp_path) == ["best", "latest", "step_00000002", "step_00000003", "step_00000004"]
    assert step_of(named(folder, "best")) == 2 and step_of(named(folder, "latest")) == 4
    assert not any(path.is_symlink() for path in folder.iterdir())
    for path, name in ((tmp_path, "2"), (folder, "2"), (folder / "latest", "4"), (folder / "best", "2"),
                       (folder / "step_00000003", "3"), (folder / "step_00000003/ema.safetensors", "3")):
        assert find_checkpoint(path).name == f"step_0000000{name}"


def test_what_an_adapter_stands_on_is_not_deleted(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints/step_00000001/kept_for").write_text("runs/adapter")
    for step in (2, 3, 4):
        save(tmp_path, step)
    assert kept(tmp_path) == ["latest", "step_00000001", "step_00000003", "step_00000004"]


FILE_OPERATIONS = [(Path, "mkdir"), (Path, "write_text"), (Path, "open"), (Path, "rename"), (Path, "replace"),
                   (shutil, "rmtree"), (os, "fsync"), (run_folder, "save_file"), (torch, "save")]


@pytest.mark.parametrize("left_over", [False, True], ids=["", "with a left-over of that step"])
def test_killed_between_any_two_file_operations_of_a_save(tmp_path, monkeypatch, left_over):
    """Wherever it dies, what a run goes on from and `best` are whole, and the next save works."""
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
        state = step_of(newest(run)), step_of(named(run / "checkpoints", "best"))
        assert state in ((2, 1), (3, 1), (3, 3)), f"after {dies_at} operations"
        save(run, 4, keep_last=1)
        assert step_of(newest(run)) == 4 and not (run / "checkpoints/.saving").exists()
    assert dies_at > 10 and kept(run) == ["best", "latest", "step_00000003"]


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
    assert kept(tmp_path) == ["latest", "step_00000001"] and step_of(newest(tmp_path)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_read(tmp_path, value):
    save(tmp_path, 1, keep_last=1)
    tensors = {"a": torch.tensor([1, value]), "n": torch.tensor(3)}
    said = refusal(lambda argv: save_checkpoint(tmp_path, 2, {"ema": tensors}, {}, {}, False, 1))
    assert "step 2 is not saved" in said and kept(tmp_path) == ["latest", "step_00000001"]
    path = tmp_path / "checkpoints/step_00000001/ema.safetensors"
    run_folder.save_file(tensors, path)
    said = refusal(lambda argv: load_checkpoint(path.parent, "flow", "ema"))
    assert str(path) in said and "not finite" in said


def test_the_next_save_and_the_end_wait_for_the_one_before(tmp_path, monkeypatch):
    """Training changes tensors while a thread writes what they were; what the thread cannot do is told."""
    c, weights, begun = Config(out_dir=str(tmp_path)), {"a": torch.ones(4)}, []
    write = run_folder.save_checkpoint
    gate = threading.Event()

    def slow(*args):
        begun.append(args[1])
        assert gate.wait(20)
        write(*args)

    monkeypatch.setattr(run_folder, "save_checkpoint", slow)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run_folder.save_run(c, 1, {"model": weights, "ema": weights}, [], scaler, False)
    weights["a"].zero_()
    assert newest(tmp_path) is None
    gate.set()
    run_folder.save_run(c, 2, {"model": weights, "ema": weights}, [], scaler, False)
    assert 1 in begun and load_checkpoint(tmp_path / "checkpoints/step_00000001", "flow", "ema")[1]["a"].sum() == 4
    run_folder.close_run()
    assert newest(tmp_path).name == "step_00000002"
    weights["a"].fill_(float("nan"))
    run_folder.save_run(c, 3, {"model": weights, "ema": weights}, [], scaler, False)
    with pytest.raises(UserError, match="step 3 is not saved"):
        run_folder.close_run()


# ------------------------------------------------------------------------------------------------------------
# Going on

def copied(run, tmp_path, how):
    """A copy of the run folder."""
    out = tmp_path / "copy"
    if how == "zip":
        shutil.make_archive(str(tmp_path / "run"), "zip", run)
        shutil.unpack_archive(tmp_path / "run.zip", out)
    else:
        shutil.copytree(run, out, symlinks=how != "cp -rL")
    if how == "without links":
        for path in (out / "checkpoints").iterdir():
            if path.is_symlink() or path.is_file():
                path.unlink()
    return out


@pytest.mark.parametrize("how", ["cp -r", "cp -rL", "without links", "zip"])
@pytest.mark.parametrize("links", [False, True], ids=["", "of before"])
def test_copied_folders_go_on(tmp_path, how, links):
    """From the same step, and the next save works and keeps the best."""
    run = tmp_path / "run"
    for step in (1, 2, 3):
        save(run, step, best=step == 1)
    if links:
        with_links(run)
    out = copied(run, tmp_path, how)
    lost = how == "without links" or links and how == "zip"  # which leaves links out
    assert step_of(newest(out)) == 3 and step_of(find_checkpoint(out)) == (3 if lost else 1)
    assert not links or how != "cp -rL" or (out / "checkpoints/best").is_dir()
    save(out, 4, best=how == "cp -r")
    assert step_of(newest(out)) == step_of(named(out / "checkpoints", "latest")) == 4
    assert all(path.is_dir() == path.name.startswith("step_") for path in (out / "checkpoints").iterdir()
               if path.name != "best" or how == "cp -r")
    save(out, 5, best=True)
    assert kept(out) == ["best", "latest", "step_00000004", "step_00000005"]


def test_only_the_copies_of_links_are_there(tmp_path):
    save(tmp_path, 7, best=True)
    folder = tmp_path / "checkpoints"
    for name in ("best", "latest"):
        (folder / name).unlink()
        shutil.copytree(folder / "step_00000007", folder / name)
    shutil.rmtree(folder / "step_00000007")
    assert step_of(newest(tmp_path)) == 7
    save(tmp_path, 8, best=True)
    assert kept(tmp_path) == ["best", "latest", "step_00000007", "step_00000008"]


@pytest.mark.parametrize("file", ["config.yaml", "model.safetensors", "ema.safetensors", "state.pt"])
@pytest.mark.parametrize("cut", [False, True], ids=["missing", "cut off"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, capsys, file, cut):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "checkpoints/step_00000002" / file
    path.write_bytes(path.read_bytes()[:-40] if cut and file != "config.yaml" else b"\xff")
    if not cut:
        path.unlink()
    assert step_of(newest(tmp_path)) == 1
    assert f"step_00000002 is passed over, as {file}" in (said := capsys.readouterr().out) or str(path) in said
    shutil.rmtree(tmp_path / "checkpoints/step_00000001")
    assert "none of the 1 checkpoints" in refusal(lambda argv: newest(tmp_path))


@pytest.mark.parametrize("file", ["config.yaml", "model.safetensors", "ema.safetensors", "state.pt", "files.json"])
def test_what_a_copy_has_spoilt_is_passed_over(tmp_path, capsys, file):
    """Files as long as they were, but zeros from their middle on: as a lost connection, or a disk, leaves them."""
    for step in (1, 2):
        save(tmp_path, step)
    path = tmp_path / "checkpoints/step_00000002" / file
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2] + bytes(len(content) - len(content) // 2))
    assert step_of(newest(tmp_path)) == 1 and f"passed over, as {file} is" in capsys.readouterr().out


def test_the_best_alone_as_a_folder(tmp_path):
    """As cp -rL of an older run makes it, and nothing else came along: it stays the best."""
    save(tmp_path, 1, best=True)
    folder = tmp_path / "checkpoints"
    (folder / "best").unlink()
    (folder / "step_00000001").rename(folder / "best")
    (folder / "latest").unlink()
    checkpoint = newest(tmp_path)
    open_log(Config(out_dir=str(tmp_path)), __file__, checkpoint, {"step": 1, "is_best": True})
    for step in (2, 3, 4):
        save(tmp_path, step)
    assert step_of(named(folder, "best")) == 1 and step_of(named(folder, "latest")) == 4


def test_checkpoints_on_another_disk(tmp_path):
    """Links to what lies elsewhere: of a folder that is not there now, nothing begins anew; of one checkpoint, nothing
    is written beside what it leads to, and what is no longer needed goes as a link."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    save(run, 1)
    shutil.move(run / "checkpoints/step_00000001", disk / "step_00000001")
    (run / "checkpoints/step_00000001").symlink_to(disk / "step_00000001")
    open_log(Config(out_dir=str(run)), __file__, newest(run), {"step": 1, "is_best": True})
    for step in (2, 3, 4):
        save(run, step)
    assert kept(run) == ["best", "latest", "step_00000001", "step_00000003", "step_00000004"]
    save(run, 5, best=True)
    assert kept(run) == ["best", "latest", "step_00000004", "step_00000005"] and os.listdir(disk) == ["step_00000001"]
    shutil.move(run / "checkpoints", disk / "checkpoints")
    (run / "checkpoints").symlink_to(tmp_path / "unmounted")
    for resume in (False, True):
        said = refusal(lambda argv: run_folder.open_run(Config(out_dir=str(run), resume=resume)))
        assert "unmounted" in said and "mounted?" in said


def test_what_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step_00000000").touch()  # somebody's file
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or os.rmdir(path))
        for step in (1, 2, 3):
            save(tmp_path, step)
    assert "could not be deleted: Directory not empty" in capsys.readouterr().out
    save(tmp_path, 4)
    assert kept(tmp_path) == ["latest", "step_00000000", "step_00000003", "step_00000004"]


def test_newest_step_deleted_to_go_back(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    shutil.rmtree(tmp_path / "checkpoints/step_00000002")
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2)))
    checkpoint = run_folder.open_run(c := Config(out_dir=str(tmp_path), resume=True))
    assert step_of(checkpoint) == 1
    open_log(c, __file__, checkpoint, {"step": 1})
    run_folder.close_run()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1]


def test_a_run_is_not_begun_over_another(tmp_path):
    save(tmp_path, 1)
    assert "--resume" in refusal(lambda argv: run_folder.open_run(Config(out_dir=str(tmp_path))))
    assert kept(tmp_path) == ["latest", "step_00000001"]


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
    said = refusal(lambda argv: run_folder.load_weights(model, weights, "x.safetensors"))
    assert all(word in said for word in ["x.safetensors", *words]), said


@pytest.mark.parametrize("path", ["nothing", "", "checkpoints"])
def test_no_checkpoint(tmp_path, path):
    (tmp_path / "best").write_text("of something else\n" * 1000)
    (tmp_path / "config.yaml").write_text("system: flow\n")
    assert "no checkpoint at" in refusal(lambda argv: find_checkpoint(tmp_path / path))


def test_what_the_config_says_is_what_the_optimizer_does(tmp_path):
    """Weight decay, betas and eps of a checkpoint do not win over those of the config; its moments go on."""
    def optimizer(**settings):
        model = torch.nn.Linear(2, 2)
        made = torch.optim.AdamW([{"params": [model.weight], "weight_decay": settings.pop("decay")},
                                  {"params": [model.bias]}], **settings)
        model(torch.ones(1, 2)).sum().backward()
        made.step()
        return model, made

    scaler, c = torch.amp.GradScaler("cpu", enabled=False), Config(out_dir=str(tmp_path))
    model, before = optimizer(lr=1e-3, betas=(0.9, 0.99), eps=1e-8, decay=0.1)
    run_folder.save_run(c, 1, {"model": model.state_dict()}, [before], scaler, False)
    run_folder.close_run()
    _, now = optimizer(lr=1e-4, betas=(0.5, 0.6), eps=1e-3, decay=0.7)
    run_folder.load_run(tmp_path / "checkpoints/step_00000001", c, {"model": model}, [now], scaler)
    assert [(g["weight_decay"], g["betas"], g["eps"], g["lr"]) for g in now.param_groups] == [
        (0.7, (0.5, 0.6), 1e-3, 1e-4), (1e-2, (0.5, 0.6), 1e-3, 1e-4)]
    moments = zip(before.state_dict()["state"].values(), now.state_dict()["state"].values())
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in moments)
    wider = torch.nn.Linear(3, 2)
    c.seed, words = 5, ["weight is (2, 2) in", "seed was 0 and is now 5"]
    said = refusal(lambda argv: run_folder.load_run(tmp_path / "checkpoints/step_00000001", c, {"model": wider}, [now],
                                                    scaler))
    assert all(word in said for word in words)
    scaler = torch.amp.GradScaler("cpu")  # the run was in float32, and goes on in float16
    run_folder.load_run(tmp_path / "checkpoints/step_00000001", c, {"model": model}, [now], scaler)
    assert scaler.get_scale() == 2.0**16


# ------------------------------------------------------------------------------------------------------------
# One process

def _train_into(folder):
    run_folder.lock(folder)
    (folder / "holding").touch()
    while True:
        time.sleep(0.05)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    first = launch(_train_into, tmp_path)
    while not (tmp_path / "holding").exists():
        first.join(0.02)
    said = refusal(lambda argv: run_folder.open_run(Config(out_dir=str(tmp_path))))
    assert f"process {first.pid} on {socket.gethostname()}" in said and str(tmp_path) in said
    first.kill()
    finish(first)
    assert run_folder.open_run(Config(out_dir=str(tmp_path))) is None
    run_folder.close_run()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write into" in refusal(lambda argv: run_folder.open_run(Config(out_dir=str(tmp_path / "file"))))


# ------------------------------------------------------------------------------------------------------------
# Log

def test_log_goes_on_at_the_checkpoint(tmp_path, capsys):
    """Lines beyond it are dropped, and those before are kept; one that was cut by a kill is named."""
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in (1, 2, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + lines[0][:9])
    save(tmp_path, 2)
    open_log(Config(out_dir=str(tmp_path)), __file__, newest(tmp_path), {"step": 2})(3, loss=9.0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.5), (2, 1.0), (2, 1.0), (3, 9.0)]
    assert "line 6" in capsys.readouterr().out


def test_the_log_of_a_run_without_checkpoints_is_kept(tmp_path, capsys):
    for _ in range(2):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        open_log(Config(out_dir=str(tmp_path)), __file__)
        assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "metrics.old").read_text() == '{"step": 1}\n' * 2 and "metrics.old" in capsys.readouterr().out


def test_bytes_that_are_no_text(tmp_path, capsys):
    """In the log, and in the lock."""
    save(tmp_path, 1)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "clip": "\xc3\xa4"}\n\xff\xfe\n')
    (tmp_path / ".lock").write_bytes(b"\xff")
    c = Config(out_dir=str(tmp_path), resume=True)
    open_log(c, __file__, run_folder.open_run(c), {"step": 1})
    run_folder.close_run()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "clip": "ä"}\n'
    assert "line 2 of" in capsys.readouterr().out


def test_code_that_is_gone_is_kept_again_and_a_diff_may_hold_any_bytes(tmp_path, monkeypatch):
    save(tmp_path, 2)
    monkeypatch.setattr(run_folder.subprocess, "run", lambda *args, **more: type("Done", (), {"stdout": b"\xff\xfe"}))
    open_log(Config(out_dir=str(tmp_path)), __file__, newest(tmp_path), {"step": 2})
    assert (tmp_path / "code/model.py").exists() and (tmp_path / "code/from_step_00000002/git.diff").stat().st_size == 2


def test_a_wandb_run_goes_on(tmp_path, monkeypatch):
    """Under the id that its checkpoint has; a fresh run gets one."""
    asked = []
    fake = SimpleNamespace(Settings=lambda **more: None, init=lambda id=None, resume=None, **more: asked.append(
        (id, resume)) or SimpleNamespace(id=id or "fresh", log=lambda *args, **more: None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    c = Config(out_dir=str(tmp_path), wandb_mode="offline")
    log = open_log(c, __file__)
    save(tmp_path, 2)
    open_log(c, __file__, newest(tmp_path), {"step": 2, "wandb_id": log.wandb_id})
    assert asked == [(None, None), ("fresh", "allow")]


def test_wandb_that_cannot_begin_is_told(tmp_path):
    """As without a login, or for a URL that is none; before anything is written."""
    c = Config(out_dir=str(tmp_path), wandb_mode="offline", wandb_url="nonsense")
    assert "cannot log to W&B" in refusal(lambda argv: open_log(c, __file__)) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("change", [{"step": "x"}, {"step": -1}, {"best": None}, {"sums": 3}, {"place": {"taken": "x"}},
                                    {"place": {"other": 1}}, []], ids=str)
def test_a_state_of_other_things_is_refused(tmp_path, change):
    save(tmp_path, 1)
    path = tmp_path / "checkpoints/step_00000001/state.pt"
    torch.save(torch.load(path) | change if change else change, path)
    (path.parent / "config.yaml").write_text("system: flow\noptimizer: adamw\n")
    said = refusal(lambda argv: run_folder.load_run(path.parent, Config(), {}, [], torch.amp.GradScaler("cpu")))
    assert (f"{next(iter(change))} in {path} should" if change else f"what {path} holds should") in said


def test_what_a_kill_has_left_goes(tmp_path):
    save(tmp_path, 2)
    for folder in (tmp_path, tmp_path / "checkpoints"):
        (folder / "latest.123.part").touch()
    (tmp_path / ".123.part").mkdir()  # of an export into the run
    (tmp_path / "third.part").touch()  # somebody's own
    open_log(Config(out_dir=str(tmp_path)), __file__, newest(tmp_path), {"step": 2})
    assert [path.name for path in tmp_path.rglob("*.part")] == ["third.part"]


def test_changes_are_told(tmp_path, capsys):
    """Of settings, of the number of processes; a key that the checkpoint does not have had its default."""
    save(tmp_path, 2)
    open_log(Config(out_dir=str(tmp_path), seed=5), __file__, newest(tmp_path), {"step": 2, "world": 4})
    said = capsys.readouterr().out
    assert "seed was 0 and is now 5" in said and "4 processes shared the work, and now 1 do" in said
    assert "keep_last" not in said
