"""datasets.py: log-mels, codes and sentences as they were stored; damaged data sets, and those of another kind.
Rows of sentences are packed as a search over all of them would."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import refusal
from helpers import sentence_folder

from trivox.audio import MelConfig
from trivox.datasets import MelDataset, SentenceDataset, TokenDataset, best_fit
from trivox.text import character_ids

@pytest.mark.parametrize("stats", [None, "", '{"mel_mean": -5'])
def test_no_data_set(tmp_path, stats):
    if stats is not None:
        (tmp_path / "dataset_stats.json").write_text(stats)
    assert "no prepared data set" in refusal(lambda argv: MelDataset(tmp_path, MelConfig()))


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
    assert "1 x 2 codes" in refusal(lambda argv: TokenDataset(token_folder(tmp_path, [[5]], codebooks=2)))
    (tmp_path / "tokens_00000.u16").unlink()
    assert "tokens_00000.u16" in refusal(lambda argv: TokenDataset(tmp_path))


# ------------------------------------------------------------------------------------------------------------
# Sentences

def test_sentences_survive(tmp_path):
    """The last code, unknown characters, a clip without a text, one without codes, shards without clips."""
    clips = [([0, 65535, 40000], "Ünknown ☃ 2", "b", "train"), ([], "silent", "", "val"), ([7], "", "a", "train"),
             ([1, 2], "Last.", "", "val")]
    open_files = len(os.listdir("/proc/self/fd"))
    dataset = SentenceDataset(sentence_folder(tmp_path, [], clips[:1], [], clips[1:], [], speakers=["a", "b"]))
    assert len(os.listdir("/proc/self/fd")) <= open_files  # a data set may have thousands of shards
    assert len(dataset) == 4 and dataset.speakers == ["a", "b"] and dataset.speaker([3, 0, 2]).tolist() == [-1, 1, 0]
    assert dataset.codes(0).tolist() == [0, 65535, 40000] and dataset.codes(0).dtype == np.uint16
    assert dataset.characters(0).tolist() == character_ids("unknown ☃ two").tolist() and 1 in dataset.characters(0)
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
