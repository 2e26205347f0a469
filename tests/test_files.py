"""files.py, and whatever writes a result: on a full disk one sentence, and nothing half-written."""

import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import finish, launch, refusal
from helpers import make_corpus, tone

import sample
from trivox import common, files, plots, prepare
from trivox.audio import MelConfig
from trivox.codecs import MelRVQ
from trivox.files import whole_folder, write_whole
from trivox.recordings import write_wav


@pytest.fixture
def full(tmp_path, monkeypatch):
    """A corpus; from then on, whatever is opened to be written is a file on a full disk. Directories have room."""
    def opened(path, mode="r", *args, **kwargs):
        if "w" not in mode:
            return open(path, mode, *args, **kwargs)
        open(path, mode).close()
        return open("/dev/full", mode, *args, **kwargs)

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    make_corpus(tmp_path / "corpus", {"a": tone(0.1)})
    monkeypatch.setattr(Path, "open", opened)


def files_in(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


MEL = MelConfig()
CODEC = MelRVQ(MelConfig(hop_length=441), torch.zeros(80), [torch.zeros(4, 80)])
WRITERS = {
    "text": lambda out: write_whole(out / "a.json", "text"),
    "wav": lambda out: write_wav(out / "a.wav", tone(0.1), 22050),
    "png": lambda out: plots.plot_curves(out / "a.png", {"a": [{"step": 1, "loss": 2.0}]}),
    "codec": lambda out: CODEC.save(out),
    "codes": lambda out: prepare.encode_shard((out / "tokens_00000", out.parent / "corpus", [
        {"id": "a", "text": "a", "source": "wavs/a.wav"}], CODEC, None, "en")),
    "mels": lambda out: prepare._prepare_shard((out / "mels_00000", out.parent / "corpus", [
        {"id": "a", "text": "a", "source": "wavs/a.wav"}], MEL, 2.0, "en")),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_full_disk(tmp_path, full, write):
    """What little there is to write is lost as the file is closed, which numpy's tofile does not say."""
    (tmp_path / "out").mkdir()
    said = refusal(lambda argv: write(tmp_path / "out"))
    assert "the disk is full" in said and str(tmp_path / "out") in said
    assert files_in(tmp_path / "out") == set()


def test_folders_are_whole_or_not_at_all(tmp_path):
    """What was there before stays."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").touch()
    for name in ("there", "new"):
        with pytest.raises(OSError), whole_folder(tmp_path / name) as part:
            (part / "half").touch()
            raise OSError
    assert files_in(tmp_path) == {"old"} and not (tmp_path / "new").exists()
    with whole_folder(tmp_path / "there") as part:
        (part / "new").touch()
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new", "old"]
    for name in ("first", "second"):  # folders are joined
        with whole_folder(tmp_path / "there") as part:
            (part / "in").mkdir()
            (part / "in" / name).touch()
            (part / "in" / "both").write_text(name)
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["in", "new", "old"]
    assert files_in(tmp_path / "there" / "in") == {"first", "second", "both"}
    assert (tmp_path / "there" / "in" / "both").read_text() == "second"


@pytest.mark.parametrize("earlier", [True, False], ids=["over an earlier one", "new"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError], ids=["full disk", "Ctrl-C", "failure"])
def test_speech_is_there_whole_or_not_at_all(tmp_path, earlier, error):
    """What was there before stays; the disk has room for no wav of 0.2 s."""
    class Speaker:
        sample_rate = 22050

        def stream(self, text):
            yield tone(0.1)
            if error:
                raise error
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limit))
            yield tone(0.1)

    before, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if earlier:
        (tmp_path / "a.wav").write_text("earlier")
    try:
        with pytest.raises(error or common.UserError, match=None if error else "cannot write .*a.wav: "):
            sample.write(tmp_path / "a.wav", Speaker(), "", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, limit))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["earlier"] * earlier


def _killed(folder, wait):
    """SIGTERM in the middle of a folder, or of a file."""
    with whole_folder(folder) as part:
        (part / "half").touch()
        if wait:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.raise_signal(signal.SIGTERM)


def test_a_killed_process_leaves_no_folder(tmp_path):
    """SIGTERM clears away what is half; what SIGKILL leaves goes with the next folder, and what a living process is at
    stays."""
    assert finish(launch(_killed, tmp_path / "a", False))[0] == 128 + signal.SIGTERM and not (tmp_path / "a").exists()
    assert finish(launch(_killed, tmp_path / "a", True))[0] == -signal.SIGKILL
    assert len(list((tmp_path / "a").iterdir())) == 1 and files.holds_nothing(tmp_path / "a")
    (tmp_path / "a" / ".1.part").mkdir()
    assert not files.holds_nothing(tmp_path / "a")
    with whole_folder(tmp_path / "a") as part:
        (part / "new").touch()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".1.part", "new"]


def test_a_folder_that_stays_empty_goes(tmp_path):
    """With those that it is in, as far as they were made for it."""
    for made in ("a.txt", None):
        with pytest.raises(RuntimeError), files.new_folder(tmp_path / "x" / "y") as folder:
            if made:
                (folder / made).touch()
            raise RuntimeError
        assert (tmp_path / "x").exists() == bool(made)
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
    assert tmp_path.exists()


def test_only_our_parts_are_dropped(tmp_path):
    for name in "a.u16.12.part", "film.mkv.part", "a.u16":
        (tmp_path / name).touch()
    files.drop_parts(tmp_path)
    assert files_in(tmp_path) == {"film.mkv.part", "a.u16"}


@pytest.mark.parametrize("error", [
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), RuntimeError("I/O error: No space left on device (os error 28)"),
    shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])], ids=repr)
def test_what_libraries_say(error):
    """Each has its own exception."""
    assert common.disk_is_full(error) and not common.disk_is_full(RuntimeError("shapes differ"))
