"""emilia.py: files of pyarrow's and from a hub that is none; damage, other columns, kills, two processes, memory."""

import os
import random
import shutil
import signal
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import OneProcess, finish, launch, refusal
from helpers import contents, killed_anywhere
from num2words import num2words

from data import main
from trivox import emilia
from trivox.datasets import SentenceDataset
from trivox.emilia import EMILIA, convert_emilia

def rows_of(count, seed=0):
    """Rows of a parquet file: texts, and lists of codes up to the last one."""
    rng = np.random.default_rng(seed)
    texts = [f"Sentence {seed} {n} of “many”." for n in range(count)]
    return texts, [rng.integers(0, 65536, rng.integers(1, 40)).tolist() for _ in range(count)]


def write_parquet(path, texts, codes, kind=pyarrow.list_(pyarrow.int32()), changes=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"__key__": pyarrow.array([str(n) for n in range(len(texts))]), "codes": pyarrow.array(codes, kind),
               "text": pyarrow.array(texts, pyarrow.string())} | (changes or {})
    table = pyarrow.table({name: column for name, column in columns.items() if column is not None})
    pyarrow.parquet.write_table(table, path, row_group_size=16)


def emilia_folder(root, files=5, rows=30):
    for n in range(files):
        write_parquet(root / "data" / f"train-{n:05d}-of-{files:05d}.parquet", *rows_of(rows, n))
    return root


@pytest.mark.parametrize("kind", [pyarrow.list_(pyarrow.int64()), pyarrow.large_list(pyarrow.uint16())], ids=str)
def test_emilia(tmp_path, one_process, monkeypatch, capsys, kind):
    """Every row of every batch; those that cannot be used are counted by reason; the source is left as it is."""
    monkeypatch.setattr(emilia, "PARQUET_ROWS", 7)
    texts, codes = rows_of(50)
    codes[49] = [65535]
    bad_texts = [None, "", " \n", "no codes", "no codes", "a null", "all fine"]
    bad_codes = [[1], [2], [3], None, [], [4, None], [5]]
    if kind == pyarrow.list_(pyarrow.int64()):
        bad_texts, bad_codes = bad_texts + ["beyond", "below"], bad_codes + [[1, 65536], [-1]]
    root = tmp_path / "root"
    write_parquet(root / "b" / "2.parquet", bad_texts, bad_codes, kind)
    write_parquet(root / "a.parquet", texts, codes, kind, {"speaker": pyarrow.array(["x"] * 50)})
    write_parquet(root / "c.parquet", [None], [[1]], kind)
    before = {path: path.read_bytes() for path in root.rglob("*.parquet")}
    main(["emilia", "--out", str(tmp_path / "out"), "--root", str(root)])
    said = capsys.readouterr().out
    beyond = len(bad_texts) - 6
    assert "skipped 4 rows: no text" in said and "skipped 2 rows: no codes" in said
    assert f"skipped {beyond} rows: codes outside of 0 to 65,535" in said and "51 clips" in said
    dataset = SentenceDataset(tmp_path / "out", codec="neucodec", sample_rate=24000, frame_rate=50, codebook_size=65536)
    assert [dataset.codes(i).tolist() for i in range(51)] == codes + [[5]]
    assert [dataset.text(i) for i in range(51)] == [
        f"sentence zero {num2words(n)} of \"many\"." for n in range(50)] + ["all fine"]
    assert (dataset.speaker(dataset.clips("all")) == -1).all()
    info = dataset.codec
    assert (info["hop_length"], info["codebooks"], info["clips"], info["skipped"]) == (480, 1, 51, 6 + beyond)
    assert info["max_frames"] == max(map(len, codes)) and info["seconds"] == sum(map(len, codes + [[5]])) / 50
    assert {path: path.read_bytes() for path in root.rglob("*.parquet")} == before
    assert "without recordings" in refusal(main, "embed", "--data", tmp_path / "out", "--embedder", "stats")


def test_emilias_validation(tmp_path, one_process):
    """A thousandth of the texts, the same in whatever file and order they come, and none of them on both sides."""
    texts = [f"{n % 9000} people" for n in range(10_000)]
    sides = []
    for name, order in (("one", list(range(10_000))), ("two", random.Random(0).sample(range(10_000), 10_000))):
        for n in range(2):
            some = order[n * 5000:(n + 1) * 5000]
            write_parquet(tmp_path / name / f"{n}.parquet", [texts[i] for i in some], [[i] for i in some])
        convert_emilia(tmp_path / f"{name}_out", tmp_path / name)
        dataset = SentenceDataset(tmp_path / f"{name}_out")
        sides.append([{dataset.text(i) for i in dataset.clips(split)} for split in ("train", "val")])
        assert sorted(int(dataset.codes(i)[0]) for i in dataset.clips("all")) == list(range(10_000))
    assert sides[0] == sides[1] and 2 <= len(sides[0][1]) <= 20 and not sides[0][0] & sides[0][1]


@pytest.mark.parametrize("columns, words", [
    ({"codes": None}, ["text (string)", "__key__ (string)"]), ({"text": None}, ["codes (list<", "int32"]),
    ({"text": pyarrow.array([1, 2])}, ["text (int64)"]), ({"codes": pyarrow.array(["a", "b"])}, ["codes (string)"]),
    ({"codes": pyarrow.array([[0.5], [1.0]])}, ["codes (list<", "double"]),
], ids=["no codes", "no text", "text of numbers", "codes of text", "codes of floats"])
def test_other_columns(tmp_path, one_process, columns, words):
    """Which there are, and which were expected."""
    write_parquet(tmp_path / "root" / "a.parquet", ["a", "b"], [[1], [2]], changes=columns)
    said = refusal(main, "emilia", "--out", tmp_path / "out", "--root", tmp_path / "root")
    assert "a.parquet" in said and "expected text (string) and codes (list of integers)" in said
    assert all(word in said for word in words) and not (tmp_path / "out" / "codec.json").exists()


def test_damaged_parquet(tmp_path, one_process):
    root = emilia_folder(tmp_path / "root", 1)
    path, = root.rglob("*.parquet")
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], whole[:100] + bytes(400) + whole[500:], b""):
        path.write_bytes(damaged)
        assert f"cannot read {path}" in refusal(lambda argv: convert_emilia(tmp_path / "out", root))
        shutil.rmtree(tmp_path / "out")
    path.unlink()
    assert "no parquet file" in refusal(lambda argv: convert_emilia(tmp_path / "out", root))
    write_parquet(path, [None, ""], [[1], None])
    assert "none of the 2 rows" in refusal(lambda argv: convert_emilia(tmp_path / "out", root))


def _emilia(root, out, rank=0, world=1, pause=0):
    emilia.parallel, read_parquet = OneProcess, emilia.read_parquet
    emilia.read_parquet = lambda file: time.sleep(pause) or read_parquet(file)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    convert_emilia(out, root)


def test_emilia_killed_and_shared(tmp_path, one_process, monkeypatch):
    """SIGKILL half-way and again, killed before any file is in place, or two processes at once: byte for byte what one
    uninterrupted process makes; the files of another corpus are refused."""
    root = emilia_folder(tmp_path / "root")
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))
    second, process = launch(_emilia, root, shared, 1, 2), launch(_emilia, root, killed, 0, 1, 0.1)
    while len(list(killed.glob("*.idx"))) < 2 and process.is_alive():
        process.join(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL and not (killed / "codec.json").exists()
    assert "no token data set" in refusal(lambda argv: SentenceDataset(killed))
    (killed / "tokens_00004.12345.u16.part").touch()  # named after a process that was killed
    convert_emilia(whole, root)
    convert_emilia(killed, root)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        convert_emilia(shared, root)
    assert finish(second)[0] == 0
    assert contents(killed) == contents(whole) == contents(shared)
    small = emilia_folder(tmp_path / "small", 2, 5)
    convert_emilia(tmp_path / "small_whole", small)
    steps = killed_anywhere(lambda out: convert_emilia(out, small), tmp_path, tmp_path / "small_whole", monkeypatch)
    assert steps >= 10
    assert str(whole) in refusal(lambda argv: convert_emilia(whole, small))


# ------------------------------------------------------------------------------------------------------------
# The hub

class Hub:
    """Stands for the Hugging Face hub: a folder and what has been asked of it."""

    def __init__(self, root, monkeypatch):
        self.root, self.asked, self.fail, self.revision = root, [], None, "abc"
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)

    def dataset_info(self, repo, revision, files_metadata):
        assert repo == EMILIA and files_metadata
        files = [SimpleNamespace(rfilename=str(path.relative_to(self.root)), size=path.stat().st_size)
                 for path in self.root.rglob("*") if path.is_file()]
        return SimpleNamespace(siblings=files, sha=revision or self.revision)

    def download(self, repo, name, repo_type, revision, local_dir):
        assert repo == EMILIA and repo_type == "dataset"
        self.asked.append((name, revision))
        (Path(local_dir) / ".cache").mkdir(parents=True)
        if name == self.fail:
            raise ConnectionError
        (Path(local_dir) / name).parent.mkdir(parents=True)
        return shutil.copy(self.root / name, Path(local_dir) / name)


def test_emilia_from_the_hub(tmp_path, one_process, monkeypatch, capsys):
    """Each file is fetched once, of one revision, and deleted. A failed download is one sentence; the next run fetches
    only what is missing."""
    root = emilia_folder(tmp_path / "hub", 3)
    (root / "README.md").write_text("# Emilia")
    hub, out = Hub(root, monkeypatch), tmp_path / "out"
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.parquet"))
    hub.fail = names[1]
    said = refusal(main, "emilia", "--out", out)
    assert names[1] in said and "--root" in said and "again" in said
    hub.fail, hub.revision = None, "def"
    (out / "tokens_00000.download").mkdir()  # killed before it was deleted
    shutil.rmtree(out / "tokens_00001.download")
    main(["emilia", "--out", str(out)])
    assert hub.asked == [(name, "abc") for name in (names[0], names[1], names[1], names[2])]
    assert not list(out.rglob("*.parquet")) and not list(out.glob("*.download"))
    convert_emilia(tmp_path / "local", root)
    (out / "plan.json").rename(tmp_path / "plan.json")
    (tmp_path / "local" / "plan.json").unlink()
    assert contents(out) == contents(tmp_path / "local")
    (tmp_path / "plan.json").rename(out / "plan.json")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "GB of disk left" in refusal(lambda argv: convert_emilia(tmp_path / "full"))
    convert_emilia(out)  # all is there: nothing is needed


def test_emilia_offline(tmp_path):
    """From where, and what to do instead."""
    said = refusal(main, "emilia", "--out", tmp_path / "out")
    assert f"https://huggingface.co/datasets/{EMILIA}" in said and "--root" in said


# ------------------------------------------------------------------------------------------------------------
# Memory

def test_emilia_in_little_memory(tmp_path, one_process, monkeypatch):
    """Forty times as many rows, all in one row group, take no more memory than a batch of them."""
    monkeypatch.setattr(emilia, "PARQUET_ROWS", 500)
    peaks = []
    for rows in (500, 40 * 500):
        codes = pyarrow.ListArray.from_arrays(np.arange(rows + 1) * 100, np.arange(100 * rows) % 65536)
        root, out = tmp_path / f"{rows}", tmp_path / f"{rows}_out"
        root.mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"text": ["Hello."] * rows, "codes": codes}), root / "a.parquet")
        tracemalloc.start()
        convert_emilia(out, root)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] and len(SentenceDataset(out)) == rows
