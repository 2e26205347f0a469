"""files.py, and whatever writes a result: on a full disk one sentence, and nothing half-written."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refusal
from helpers import make_corpus, tone

import sample
from trivox import common, plots, prepare
from trivox.audio import MelConfig, write_wav
from trivox.codecs import MelRVQ
from trivox.files import whole_folder, write_whole


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
    "codes": lambda out: prepare.encode_shard(out / "tokens_00000", out.parent / "corpus", [
        {"id": "a", "text": "a", "source": "wavs/a.wav"}], CODEC, None),
    "mels": lambda out: prepare._prepare_shard((out / "mels_00000", out.parent / "corpus", [
        {"id": "a", "text": "a", "split": "train"}], MEL, 2.0)),
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


def test_speech_into_a_full_disk(tmp_path):
    """libsndfile does not say why it cannot write."""
    class Speaker:
        sample_rate = 22050

        def stream(self, text):
            yield tone(0.1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limit))
            yield tone(0.1)

    before, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        said = refusal(lambda argv: sample.write(tmp_path / "a.wav", Speaker(), "", {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, limit))
    assert "disk full" in said and files_in(tmp_path) == set()


@pytest.mark.parametrize("error", [
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), RuntimeError("I/O error: No space left on device (os error 28)"),
    shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])], ids=repr)
def test_what_libraries_say(error):
    """Each has its own exception."""
    assert common.disk_is_full(error) and not common.disk_is_full(RuntimeError("shapes differ"))
