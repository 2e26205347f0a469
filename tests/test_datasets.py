"""datasets.py: log-mels, codes and sentences as they were stored; damaged data sets, and those of another kind.
Rows of sentences are packed as a search over all of them would."""

import json
import os
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import refusal
from helpers import make_corpus, sentence_folder, tone

from trivox import prepare
from trivox.alphabet import SYMBOLS, Alphabet
from trivox.audio import MelConfig
from trivox.datasets import MelDataset, SentenceDataset, TokenDataset, best_fit
from trivox.prepare import prepare_mels


# ------------------------------------------------------------------------------------------------------------
# Log-mels, and what they share with tokens

@pytest.mark.parametrize("stats, words", [
    (None, "no prepared data set"), ("", "damaged"), ('{"mel_mean": -5', "damaged"), ("[1]", "one list"),
    ('{"mel": {"n_mels": 80}, "mel_mean": -5, "mel_std": 0, "clips": 1}', "mel_std"),
    ('{"mel": {"n_mels": 80}, "mel_mean": -5, "mel_std": 1, "clips": 1}', "mel settings"),
    ('{"mel": {}, "mel_mean": NaN, "mel_std": 1, "clips": 1}', "mel_mean"),
])
def test_no_data_set(tmp_path, stats, words):
    if stats is not None:
        (tmp_path / "dataset_stats.json").write_text(stats)
    said = refusal(lambda argv: MelDataset(tmp_path, MelConfig()))
    assert words in said and str(tmp_path) in said


@pytest.fixture
def three_shards(tmp_path, one_process, monkeypatch):
    """The folder of five clips of log-mels in three shards, one of which has nothing that could be used."""
    monkeypatch.setattr(prepare, "SHARD_CLIPS", 2)
    clips = {id: tone(0.1 + 0.1 * n) for n, id in enumerate("abcdef")} | {"c": None, "d": None}
    prepare_mels(make_corpus(tmp_path / "corpus", clips), tmp_path / "data", MelConfig(), 2.0)
    return tmp_path / "data"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_whose_figures_no_log_mel_has(tmp_path, one_process):
    """A mean square below the square of the mean gave statistics that are no numbers, and a traceback."""
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.3), "b": tone(0.4)})
    prepare_mels(root, tmp_path / "out", MelConfig(), 2.0)
    rows = tmp_path / "out" / "mels_00000.jsonl"
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    for changes in ({"sum": 1e200}, {"sum_sq": -1.0}):
        write_lines(rows, [row | (changes if row["id"] == "b" else {}) for row in kept])
        said = refusal(lambda argv: prepare_mels(root, tmp_path / "out", MelConfig(), 2.0))
        assert "mels_00000.jsonl has a log-mel" in said and "for b" in said and "delete the files" in said


@pytest.mark.parametrize("indexed", [True, False], ids=["", "as they were before .idx"])
def test_damaged_log_mels(three_shards, indexed):
    """Whatever is missing, cut off or at odds: the file is named, and never a wrong mel returned."""
    good = {path.name: path.read_bytes() for path in three_shards.iterdir() if indexed or path.suffix != ".idx"}
    whole = [MelDataset(three_shards, MelConfig()).mel(i) for i in range(4)]

    def said(change):
        for path in three_shards.iterdir():
            path.unlink()
        for name, content in good.items():
            (three_shards / name).write_bytes(content)
        change()

        def read(argv):
            data = MelDataset(three_shards, MelConfig())
            assert [row["id"] for row in data.rows] == list("abef") and len(data.rows) == 4
            assert all(torch.equal(data.mel(i), mel) for i, mel in enumerate(whole))

        return refusal(read)

    first, last = three_shards / "mels_00000", three_shards / "mels_00002"
    for path in first, last:
        f16, index = path.with_suffix(".f16"), path.with_suffix(".jsonl")
        assert str(f16) in said(lambda: os.truncate(f16, f16.stat().st_size - 160 * 5))
        assert str(f16) in said(f16.unlink)
        assert (str(index) if path == first else "2 of its 4 clips") in said(index.unlink)
        rows = [json.loads(line) for line in good[index.name].splitlines()]
        for n, changes in ((0, {"frames": -1}), (1, {"frames": rows[1]["frames"] + 1}), (1, {"offset": 0}),
                           (0, {"offset": 10 ** 9}), (1, {"split": "test"}), (0, {"id": None}), (1, {"frames": 2.5}),
                           (0, {"frames": 10 ** 30})):
            bad = [row | (changes if k == n else {}) for k, row in enumerate(rows)]
            words = said(lambda: write_lines(index, bad))
            assert str(path) in words and "delete" in words, words
        for line in (b"{", b"[" * 5000, b"7", b"\xff"):
            assert f"line 1 of {index}" in said(lambda: index.write_bytes(line + b"\n" + good[index.name]))
    if indexed:
        index = first.with_suffix(".idx")
        for content in (good[index.name][:-1], good[index.name][16:], good[index.name][::-1], b""):
            words = said(lambda: index.write_bytes(content))
            assert "mels_00000" in words or "3 of its 4" in words
    swapped = said(lambda: first.with_suffix(".jsonl").write_bytes(good["mels_00002.jsonl"]))
    assert "mels_00000" in swapped


def test_a_missing_shard_of_tokens(demo_tokens, tmp_path):
    for name, words in (("tokens_00001", "tokens_00001.jsonl is missing"), ("tokens_00002", "32 of its 40 clips")):
        folder = shutil.copytree(demo_tokens, tmp_path / name)
        for path in folder.glob(f"{name}*"):
            path.unlink()
        assert words in refusal(lambda argv: TokenDataset(folder))


def test_a_million_clips_open_at_once(tmp_path):
    """By what is not read: no line of any .jsonl, and no shard is mapped."""
    stats = {"mel": asdict(MelConfig(n_mels=1)), "mel_mean": 0, "mel_std": 1, "clips": 600}
    (tmp_path / "dataset_stats.json").write_text(json.dumps(stats))
    for n in range(300):
        (tmp_path / f"mels_{n:05d}.jsonl").write_text("not read")
        np.array([(1, 0), (3, 1)], np.int64).tofile(tmp_path / f"mels_{n:05d}.idx")
        np.full(3, n, np.float16).tofile(tmp_path / f"mels_{n:05d}.f16")
    open_files, data = len(os.listdir("/proc/self/fd")), MelDataset(tmp_path, MelConfig(n_mels=1))
    assert data.clips("val") == list(range(1, 600, 2)) and not data.lines and not data.mapped.cache_info().misses
    assert all(data.mel(i).flatten().tolist() == [i // 2] * (1 + i % 2) for i in range(600))
    assert len(os.listdir("/proc/self/fd")) <= open_files


# ------------------------------------------------------------------------------------------------------------
# Tokens

def token_folder(folder, codes, **changes):
    """A token data set by hand: one clip of these codes (frames, Q)."""
    info = {"codec": "neucodec", "sample_rate": 24000, "frame_rate": 50.0, "codebooks": 1, "codebook_size": 65536}
    (folder / "codec.json").write_text(json.dumps(info | changes))
    row = {"id": "a", "text": "", "speaker": "", "split": "train", "source": "a.wav", "start": 0, "offset": 0,
           "frames": len(codes)}
    (folder / "tokens_00000.jsonl").write_text(json.dumps(row) + "\n")
    np.asarray(codes, np.uint16).tofile(folder / "tokens_00000.u16")
    return folder


def test_the_last_code_survives(tmp_path):
    dataset = TokenDataset(token_folder(tmp_path, [[0], [65535], [40000]]), codec="neucodec", frame_rate=50)
    assert dataset.codes(0).tolist() == [[0], [65535], [40000]] and dataset.codes(0).dtype == torch.int64
    assert "no val clips" in refusal(lambda argv: dataset.clips("val"))


@pytest.mark.parametrize("wanted, reasons", [
    ({"codec": "dac_44khz"}, ("codec neucodec", "dac_44khz")), ({"codebooks": 8}, ("codebooks 1", "8")),
    ({"frame_rate": 75.0}, ("frame_rate 50.0", "75.0")), ({"codebook_size": 1024}, ("codebook_size 65536", "1024")),
])
def test_tokens_of_another_kind(tmp_path, wanted, reasons):
    said = refusal(lambda argv: TokenDataset(token_folder(tmp_path, [[1]]), **wanted))
    assert str(tmp_path) in said and all(reason in said for reason in reasons)


def test_damaged_tokens(tmp_path):
    said = refusal(lambda argv: TokenDataset(token_folder(tmp_path, [[5], [1024]], codebook_size=1024)).codes(0))
    assert "a code 1024" in said and "clip a" in said
    assert "1 x 2 numbers" in refusal(lambda argv: TokenDataset(token_folder(tmp_path, [[5]], codebooks=2)))
    (tmp_path / "tokens_00000.u16").unlink()
    assert "tokens_00000.u16" in refusal(lambda argv: TokenDataset(tmp_path))


# ------------------------------------------------------------------------------------------------------------
# Sentences

def test_sentences_survive(tmp_path):
    """The last code, unknown characters, a clip without a text, one without codes, shards without clips."""
    clips = [([0, 65535, 40000], "Ünknown ★ 2", "b", "train"), ([], "silent", "", "val"), ([7], "", "a", "train"),
             ([1, 2], "Last.", "", "val")]
    open_files = len(os.listdir("/proc/self/fd"))
    dataset = SentenceDataset(sentence_folder(tmp_path, [], clips[:1], [], clips[1:], [], speakers=["a", "b"]))
    assert len(os.listdir("/proc/self/fd")) <= open_files  # a data set may have thousands of shards
    assert len(dataset) == 4 and dataset.speakers == ["a", "b"] and dataset.speaker([3, 0, 2]).tolist() == [-1, 1, 0]
    assert dataset.codes(0).tolist() == [0, 65535, 40000] and dataset.codes(0).dtype == np.uint16
    assert dataset.characters(0).tolist() == Alphabet().ids("unknown ★ two").tolist() and 1 in dataset.characters(0)
    assert [dataset.text(i) for i in range(4)] == ["unknown  two", "silent", "", "last."]
    assert [dataset.codes(i).tolist() for i in (1, 2, 3)] == [[], [7], [1, 2]]
    assert [x.tolist() for x in dataset.lengths([3, 1, 0, 2])] == [[2, 0, 3, 1], [5, 6, 13, 0]]
    assert [x.tolist() for x in dataset.lengths([])] == [[], []]
    assert [dataset.clips(split).tolist() for split in ("train", "val", "all")] == [[0], [3], [0, 3]]
    with pytest.raises(ValueError):
        dataset.codes(0)[0] = 1
    assert "no val clips" in refusal(lambda argv: SentenceDataset(sentence_folder(tmp_path, clips[:1])).clips("val"))


def test_sentences_are_those_of_token_dataset(demo_tokens):
    ours = SentenceDataset(demo_tokens, codec="mel_rvq", sample_rate=22050, frame_rate=22050 / 512, codebook_size=64)
    theirs = TokenDataset(demo_tokens)
    assert len(ours) == 40 and ours.grammar == theirs.grammar and ours.codec == theirs.codec
    assert ours.speakers == ["en-us"] and not ours.speaker(range(40)).any()
    for split in ("train", "val", "all"):
        assert ours.clips(split).tolist() == theirs.clips(split)
    order = np.random.default_rng(0).permutation(40)
    for i, codes, characters in zip(order.tolist(), *ours.lengths(order)):
        assert ours.codes(i).tolist() == theirs.codes(i)[:, 0].tolist() and len(ours.codes(i)) == codes
        assert ours.text(i) == theirs.rows[i]["text"].lower() and len(ours.text(i)) == characters


def test_sentences_in_their_own_characters(tmp_path):
    """Thousands of them too; a model of others is refused, and so is a list that names one twice."""
    many = "".join(map(chr, range(0x4e00, 0x4e00 + 3000)))
    clips = [([1], many[i:i + 100], "", "train") for i in range(0, 3000, 100)]
    dataset = SentenceDataset(sentence_folder(tmp_path, clips, characters=" " + many), characters="auto")
    assert [dataset.text(i) for i in range(30)] == [many[i:i + 100] for i in range(0, 3000, 100)]
    assert dataset.alphabet.symbols == " " + many and dataset.characters(29).max() == 3005
    assert not [*tmp_path.glob("*.u8")] and len(SentenceDataset(tmp_path, characters=" " + many)) == 30
    said = refusal(lambda argv: SentenceDataset(tmp_path, characters=SYMBOLS))
    assert "--characters auto" in said and "abc" in said and str(tmp_path) in said
    info = json.loads((tmp_path / "codec.json").read_text())
    for wrong in (" aba", 7):
        (tmp_path / "codec.json").write_text(json.dumps(info | {"characters": wrong}))
        assert "characters" in refusal(lambda argv: SentenceDataset(tmp_path))
    (tmp_path / "codec.json").write_text(json.dumps(info | {"characters": " ab"}))
    assert "a character" in refusal(lambda argv: SentenceDataset(tmp_path).characters(29))


@pytest.mark.parametrize("changes, wanted, words", [
    ({"codebooks": 8}, {}, ("8 codebooks", "--codebooks 1", "neucodec")),
    ({}, {"codec": "mel_rvq"}, ("codec neucodec", "mel_rvq")), ({}, {"sample_rate": 22050}, ("24000", "22050")),
    ({}, {"frame_rate": 75.0}, ("50.0", "75.0")), ({}, {"codebook_size": 256}, ("65536", "256")),
])
def test_sentences_of_another_kind(tmp_path, changes, wanted, words):
    sentence_folder(tmp_path, [([1], "a", "", "train")], **changes)
    said = refusal(lambda argv: SentenceDataset(tmp_path, **wanted))
    assert all(word in said for word in words)


@pytest.mark.parametrize("file", ["tokens_00000.u16", "tokens_00000.u8", "tokens_00000.idx"])
def test_damaged_sentences(tmp_path, file):
    for keep in (None, 1, -1, -2):
        sentence_folder(tmp_path, [([1, 2, 3], "abcd", "", "train"), ([4], "e", "", "train")])
        whole = (tmp_path / file).read_bytes()
        (tmp_path / file).unlink() if keep is None else (tmp_path / file).write_bytes(whole[:keep])
        assert "again" in refusal(lambda argv: SentenceDataset(tmp_path))
    said = refusal(lambda argv: SentenceDataset(sentence_folder(tmp_path, [([1], "a", "", "train")], clips=2)))
    assert "1 of its 2 clips" in said
    sentence_folder(tmp_path, [([1, 1024], "a", "", "train")], codebook_size=1024)
    assert "a code 1024" in refusal(lambda argv: SentenceDataset(tmp_path).codes(0))
    assert "no token data set" in refusal(lambda argv: SentenceDataset(tmp_path / "none"))


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_voices_that_are_not_finite(llm_tokens, tmp_path, bad):
    """Are named when they are opened: file, row, recording, and what to do."""
    folder = shutil.copytree(llm_tokens, tmp_path / "data")
    width = json.loads((folder / "speaker_stats.json").read_text())["width"]
    voices = np.fromfile(path := folder / "speaker_stats_00000.f32", np.float32).reshape(-1, width)
    voices[3, 7] = bad
    voices.tofile(path)
    said = refusal(lambda argv: SentenceDataset(folder).load_embeddings("stats", width))
    assert f"row 3 of {path}" in said and SentenceDataset(folder).name(3) in said
    assert "data.py embed" in said and "delete speaker_stats*" in said


def test_best_fit():
    """Every sentence once, no row too full; and as few rows as a search over all free rows makes."""
    rng = np.random.default_rng(0)
    for n, room in ((1, 5), (200, 100), (500, 1024), (300, 7)):
        lengths = rng.integers(1, room + 1, n)
        rows = best_fit(lengths, room)
        assert sorted(i for row in rows for i in row) == list(range(n))
        assert max(lengths[row].sum() for row in rows) <= room
        left = []
        for length in sorted(lengths, reverse=True):
            fits = [x for x in left if x >= length]
            if fits:
                left.remove(min(fits))
            left.append((min(fits) if fits else room) - length)
        assert len(rows) == len(left)
