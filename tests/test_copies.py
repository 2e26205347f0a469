"""copies.py: checkpoints that are copied elsewhere whole or not at all, and fetched by a machine that lacks them."""

import json
import shutil

import fsspec
import pytest
import torch
from conftest import refusal
from helpers import Config, Killed, step_of

from trivox import run_folder
from trivox.run_folder import find_checkpoint, newest


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    url = f"file://{tmp_path}/there/a" if request.param == "file" else "memory://bucket/a"
    yield url
    fsspec.filesystem("memory").store.clear()


def trained(out_dir, url, steps=(1, 2, 3), best=1):
    c = Config(out_dir=str(out_dir), copy_to=url)
    out_dir.mkdir(exist_ok=True)
    (out_dir / "code").mkdir(exist_ok=True)
    (out_dir / "code" / "model.py").write_text("# as it was\n")
    for step in steps:
        with (out_dir / "metrics.jsonl").open("a") as f:
            f.write(json.dumps({"step": step}) + "\n")
        tensors = {"a": torch.full((300,), float(step)), "b": torch.tensor(step)}
        run_folder.save_run(c, step, {"model": tensors, "ema": tensors}, [], torch.amp.GradScaler(enabled=False),
                            step == best, moments={0: {"m": torch.full((500,), float(step))}})
    run_folder.close_run()
    return c


def test_checkpoints_are_copied_and_fetched(tmp_path, url):
    trained(tmp_path / "run", url)
    c = Config(out_dir=str(tmp_path / "other"), copy_to=url, resume=True)
    checkpoint = run_folder.open_run(c)
    run_folder.close_run()
    assert step_of(checkpoint) == 3 and step_of(find_checkpoint(tmp_path / "other")) == 1
    assert (tmp_path / "other/code/model.py").read_text() == "# as it was\n"
    assert [json.loads(line)["step"] for line in (tmp_path / "other/metrics.jsonl").open()] == [1, 2, 3]
    files, root = fsspec.url_to_fs(url)
    assert sorted(path.rpartition("/")[2] for path in files.ls(root, detail=False)) == [
        "best", *(name for n in (1, 2, 3) for name in (f"step_0000000{n}", f"step_0000000{n}.json"))]


def test_what_is_newer_elsewhere_is_fetched(tmp_path, url, capsys):
    """Into the folder of an old disk, or in place of what is damaged; the best, too, is not what a run goes on from."""
    trained(tmp_path / "run", url)
    c = Config(out_dir=str(tmp_path / "run"), copy_to=url, resume=True)
    for spoil in (lambda folder: shutil.rmtree(folder / "step_00000003"),
                  lambda folder: (folder / "step_00000003/state.pt").write_bytes(b"")):
        spoil(tmp_path / "run/checkpoints")
        assert step_of(run_folder.open_run(c)) == 3 and "fetching step_00000003" in capsys.readouterr().out
        run_folder.close_run()
    files, root = fsspec.url_to_fs(url)
    files.pipe_file(f"{root}/step_00000003/state.pt", b"")
    c = Config(out_dir=str(tmp_path / "new"), copy_to=url, resume=True)
    assert "delete step_00000003.json there" in refusal(lambda argv: run_folder.open_run(c))
    files.rm_file(f"{root}/step_00000003.json")
    assert step_of(run_folder.open_run(c)) == 2
    run_folder.close_run()
    assert step_of(find_checkpoint(tmp_path / "new")) == 1


def test_one_place_is_for_the_copies_of_one_run(tmp_path, url):
    trained(tmp_path / "run", url, (1, 2))
    trained(tmp_path / "other", "", (5,))
    for resume, words in (True, "of another run than"), (False, "already holds copies"):
        c = Config(out_dir=str(tmp_path / ("other" if resume else "new")), copy_to=url, resume=resume)
        assert words in refusal(lambda argv: run_folder.open_run(c))
    c = Config(out_dir=str(tmp_path / "run"), copy_to=f"{tmp_path}/run/code/copies", resume=True)
    assert "is within out_dir" in refusal(lambda argv: run_folder.open_run(c))


def test_checkpoints_that_are_no_copies_stay(tmp_path, capsys):
    """As where copy_to names another run's checkpoints by mistake."""
    trained(tmp_path / "other", "", (1, 2))
    target = tmp_path / "other/checkpoints"
    for resume in (False, True):
        c = Config(out_dir=str(tmp_path / "run"), copy_to=str(target), resume=resume)
        assert "step_00000001, which is no copy" in refusal(lambda argv: run_folder.open_run(c))
        run_folder.close_run()
    trained(tmp_path / "run", str(target), (2, 3))  # had they come there later
    assert "there is a step_00000002 that is no copy" in capsys.readouterr().out
    assert step_of(target / "step_00000001") == 1 and step_of(target / "step_00000002") == 2


def test_what_was_not_copied_is_made_up_for(tmp_path, url):
    """Nothing of a copy that failed is left; whatever else lies there is let alone."""
    files, root = fsspec.url_to_fs(url)
    files.makedirs(root, exist_ok=True)
    files.pipe_file(f"{root}/manifest.json", b"{}")
    trained(tmp_path / "run", url, (1,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(files), "pipe_file", lambda *args, **more: 1 / 0)
        trained(tmp_path / "run", url, (2,))
    assert not files.exists(f"{root}/step_00000002")
    assert step_of(run_folder.open_run(Config(out_dir=str(tmp_path / "run"), copy_to=url, resume=True))) == 2
    run_folder.wait_for_save()
    run_folder.close_run()
    names = {path.rstrip("/").rpartition("/")[2] for path in files.ls(root, detail=False)}
    assert {"step_00000002.json", "manifest.json"} <= names


def test_a_copy_that_is_written_anew_does_not_count_meanwhile(tmp_path, url):
    trained(tmp_path / "run", url, (1, 2))
    files, root = fsspec.url_to_fs(url)

    def dies(*args, **more):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(files), "put_file", dies)
        with pytest.raises(Killed):
            trained(tmp_path / "run", url, (2,))
    shutil.rmtree(tmp_path / "run")
    assert step_of(run_folder.open_run(Config(out_dir=str(tmp_path / "run"), copy_to=url, resume=True))) == 1
    run_folder.close_run()


def test_a_copy_that_was_not_finished_does_not_count(tmp_path, url):
    trained(tmp_path / "run", url, (1, 2), best=1)
    files, root = fsspec.url_to_fs(url)
    files.rm_file(f"{root}/step_00000002.json")
    c = Config(out_dir=str(tmp_path / "other"), copy_to=url, resume=True)
    assert step_of(run_folder.open_run(c)) == 1
    run_folder.close_run()


@pytest.mark.parametrize("there", ["../../outside", "/tmp/trivox_outside"])
def test_a_copy_cannot_write_outside_the_run(tmp_path, there):
    url = f"file://{tmp_path}/there"
    trained(tmp_path / "run", url, (1,))
    (tmp_path / "there/step_00000001.json").write_text(json.dumps({there: 3}))
    (tmp_path / "outside").write_text("old")
    c = Config(out_dir=str(tmp_path / "a/b"), copy_to=url, resume=True)
    assert "outside the run" in refusal(lambda argv: run_folder.open_run(c))


def test_a_target_that_fails_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "file").touch()
    trained(tmp_path / "run", f"file://{tmp_path}/file/a")
    assert "could not be copied" in capsys.readouterr().out and step_of(newest(tmp_path / "run")) == 3
    for resume in (False, True):  # before anything is trained
        assert "cannot copy to" in refusal(lambda argv: run_folder.open_run(
            Config(out_dir=str(tmp_path / "other"), copy_to="nosuch://a", resume=resume)))
