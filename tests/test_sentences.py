"""Sentences for the LLM TTS: characters beside Echolancer's table, numbers beside num2words, token data sets beside
TokenDataset, Emilia from files of pyarrow's and from a hub that is not one, speaker embeddings, kills."""

import json
import os
import random
import re
import shutil
import signal
import time
import tracemalloc
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import OneProcess, finish, launch, refusal
from num2words import num2words
from test_data import Killed, contents, make_corpus, tone

from data import main
from trivox import emilia, prepare
from trivox.audio import MelConfig, log_mel, read_wav
from trivox.codecs import load_codec
from trivox.corpora import read_metadata
from trivox.datasets import SentenceDataset, TokenDataset
from trivox.demo_speech import make_demo_corpus, speak
from trivox.emilia import EMILIA, convert_emilia
from trivox.prepare import embed, tokenize, write_sentences
from trivox.text import character_ids, characters_text, normalise_text
from trivox.voices import load_embedder

MEL = MelConfig(hop_length=512)

# ------------------------------------------------------------------------------------------------------------
# Characters

PUBLISHED = {"a": 5, "b": 6, "c": 7, "d": 8, "e": 9, "f": 10, "g": 11, "h": 12, "i": 13, "j": 14, "k": 15, "l": 16,
             "m": 17, "n": 18, "o": 19, "p": 20, "q": 21, "r": 22, "s": 23, "t": 24, "u": 25, "v": 26, "w": 27, "x": 28,
             "y": 29, "z": 30, " ": 31, ".": 32, ",": 33, "!": 34, "?": 35, ";": 36, ":": 37, "'": 38, '"': 39, "(": 40,
             ")": 41, "-": 42}


def random_texts(count, seed=0):
    """Anything that a string can hold: much of ASCII, some of every plane, white space, digits, lone surrogates."""
    rng = random.Random(seed)
    kinds = (lambda: rng.randrange(128), lambda: rng.randrange(0x250), lambda: rng.randrange(0x110000),
             lambda: ord(rng.choice(" \t\n\u2003\u00a0 0123456789.,$£€%-+½²③٣۷‘“—…éß&sthrdn")))
    return ["".join(chr(rng.choice(kinds)()) for _ in range(rng.randrange(40))) for _ in range(count)]


def test_characters_are_the_published_ones():
    """The table of the published tokenizer, after NFKD, lower case and white space folded; all else is 1."""
    assert [character_ids(symbol).tolist() for symbol in PUBLISHED if symbol != " "] == [
        [number] for symbol, number in PUBLISHED.items() if symbol != " "]
    for text in [*random_texts(2000), "", "  A\tb \n\u2003c ", "ﬁ Ⅷ ２ …", "İSTANBUL", "café"]:
        folded = re.sub(r"\s+", " ", unicodedata.normalize("NFKD", text).lower()).strip()
        ids = character_ids(text)
        assert ids.dtype == np.uint8 and ids.tolist() == [PUBLISHED.get(c, 1) for c in folded]
        assert characters_text(ids) == "".join(c for c in folded if c in PUBLISHED)
    assert characters_text([2, 12, 13, 3, 0, 1, 4]) == "hi"


@pytest.mark.parametrize("text, spoken", [
    ("He has 3 cats.", "He has three cats."), ("in 1984, 1905 and 1800", None), ("It was 3985.", None),
    ("the 1990s", "the nineteen nineties"), ("1,234,567 of them", f"{num2words(1234567)} of them"),
    ("the 1st, 2nd, 3RD and 21st", "the first, second, third and twenty-first"), ("1,000th", "one thousandth"),
    ("pi is 3.14", f"pi is {num2words('3.14')}"), ("0.50", "zero point five zero"),
    ("-5 or 3-4", "minus five or three-four"), ("$29.95", "twenty-nine dollars, ninety-five cents"),
    ("£1.01", "one pound, one penny"), ("€0.99", "ninety-nine cents"), ("$1", "one dollar"), ("$0.00", "zero dollars"),
    ("$1,200", "one thousand, two hundred dollars"), ("£2.5 million", "two point five million pounds"),
    ("12.5% or 3 %", "twelve point five percent or three percent"), ("1.2.3", "one point two point three"),
    ("007", "zero zero seven"), ("1,23,4", "one, two three, four"), ("5stars or 5S", "five stars or five S"),
    ("٣ and १२ and ３", "three and twelve and three"), ("2½ of ½", "two and one half of one half"),
    ("10² CO₂", "ten two CO two"), ("MP3s, B2B, 4K", "MP threes, B two B, four K"), ("$", "$"), ("%", "%"),
    ("café Zürich Ångström", "cafe Zurich Angstrom"), ("“Yes” — ‘no’… it´s", "\"Yes\" - 'no'... it's"), ("", ""),
    ("soft\u00adhyphen AT&T", "softhyphen AT and T"), (" two\n lines ", "two lines"), ("12:45", "twelve:forty-five"),
    ("no digit: kept (as it is); \"so\"!", "no digit: kept (as it is); \"so\"!"),
])
def test_normalised(text, spoken):
    if spoken is None:  # years as years, other numbers as such
        spoken = re.sub(r"\d+", lambda n: num2words(int(n[0]), to="year" if int(n[0]) < 2000 else "cardinal"), text)
    assert normalise_text(text) == spoken


def test_numbers_are_num2words():
    rng = random.Random(0)
    for n in [0, 1, 1099, 2000, 10**15 - 1] + [rng.randrange(10 ** rng.randrange(1, 16)) for _ in range(200)]:
        if not 1100 <= n <= 1999:
            assert normalise_text(f"x {n} y") == f"x {num2words(n)} y"
        assert normalise_text(f"{n:,}") == num2words(n)  # no year has a comma
        assert normalise_text(f"{n}th") == num2words(n, to="ordinal")


def test_normalising_anything():
    """No digit is left, white space is folded, and what is normalised stays so."""
    huge = [str(10**400), "9" * 10_000, f"${10**400}.5", "1." * 3000, "1," * 3000, "-" * 99 + "1", f"{10**60:,}"]
    for text in huge + random_texts(3000, seed=1):
        spoken = normalise_text(text)
        assert not re.search(r"\d", spoken) and spoken == " ".join(spoken.split()) == normalise_text(spoken), text
        assert len(character_ids(spoken)) >= len(spoken)
    assert normalise_text(str(10**400)) == " ".join(["one"] + ["zero"] * 400)


# ------------------------------------------------------------------------------------------------------------
# Token data sets

@pytest.fixture(scope="module")
def spoken(corpus, tmp_path_factory):
    """The tokens of the demo corpus, one book, in three shards. Tests only read them."""
    out = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SHARD_SOURCES", 16)
        patch.setattr(prepare, "parallel", OneProcess)
        tokenize(corpus, out, "mel_rvq", mel=MEL, sizes=[64])
    return out


def sentence_folder(folder, *shards, speakers=(), **changes):
    """A token data set by hand: shards of clips (codes, text, speaker, split)."""
    info = {"codec": "neucodec", "sample_rate": 24000, "frame_rate": 50.0, "codebooks": 1, "codebook_size": 65536,
            "clips": sum(map(len, shards))}
    for file in folder.glob("tokens_*"):
        file.unlink()
    (folder / "codec.json").write_text(json.dumps(info | changes))
    (folder / "speakers.json").write_text(json.dumps(speakers))
    for n, clips in enumerate(shards):
        ends = np.cumsum([0, *(len(codes) for codes, *_ in clips)]).tolist()
        rows = [{"text": text, "speaker": speaker, "split": split, "offset": at, "frames": len(codes)}
                for (codes, text, speaker, split), at in zip(clips, ends)]
        np.concatenate([np.zeros(0), *(codes for codes, *_ in clips)]).astype(np.uint16).tofile(
            folder / f"tokens_{n:05d}.u16")
        write_sentences(folder / f"tokens_{n:05d}", rows, speakers)
    return folder


def test_sentences_survive(tmp_path):
    """The last code, unknown characters, a clip without a text, one without codes, shards without clips."""
    clips = [([0, 65535, 40000], "Ünknown ☃ 2", "b", "train"), ([], "silent", "", "val"), ([7], "", "a", "train"),
             ([1, 2], "Last.", "", "val")]
    open_files = len(os.listdir("/proc/self/fd"))
    dataset = SentenceDataset(sentence_folder(tmp_path, [], clips[:1], [], clips[1:], [], speakers=["a", "b"]))
    assert len(os.listdir("/proc/self/fd")) == open_files  # a data set may have thousands of shards
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


def test_sentences_are_those_of_token_dataset(spoken, corpus):
    ours = SentenceDataset(spoken, codec="mel_rvq", sample_rate=22050, frame_rate=22050 / 512, codebook_size=64)
    theirs = TokenDataset(spoken)
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


def test_a_data_set_of_before(spoken, corpus, tmp_path, one_process, monkeypatch):
    """It gets its characters by the same command, and no recording is encoded for it."""
    old = shutil.copytree(spoken, tmp_path / "old")
    for file in [old / "speakers.json", *old.glob("*.u8"), *old.glob("*.idx")]:
        file.unlink()
    assert len(TokenDataset(old).rows) == 40
    assert "tokenize again" in refusal(lambda argv: SentenceDataset(old))
    monkeypatch.setattr(prepare, "SHARD_SOURCES", 16)
    monkeypatch.setattr(prepare, "encode_shard", None)
    tokenize(corpus, old, "mel_rvq", mel=MEL, sizes=[64])
    assert contents(old) == contents(spoken)


def die_at(step, patch):
    """Make the process die instead of putting its step-th file in place."""
    left, replace = [None] * step, Path.replace

    def replacing(path, target):
        if not left:
            raise Killed
        left.pop()
        return replace(path, target)

    patch.setattr(Path, "replace", replacing)


def killed_anywhere(make, folder, whole, monkeypatch):
    """Kill `make(folder)` before each of its files is in place, and call it again: nothing tells the difference."""
    for step in range(40):
        with monkeypatch.context() as patch:
            die_at(step, patch)
            try:
                make(folder / str(step))
                break
            except Killed:
                pass
        make(folder / str(step))
        for part in (folder / str(step)).glob("*.part"):
            part.unlink()
        assert contents(folder / str(step)) == contents(whole)
    return step


def test_killed_before_any_file(spoken, tmp_path, one_process, monkeypatch):
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.4), "b": tone(0.5)}, ["a|One 1|One 1|x", "b|Two|Two|y"])
    make = lambda out: tokenize(root, out, str(spoken))
    make(tmp_path / "whole")
    assert killed_anywhere(make, tmp_path, tmp_path / "whole", monkeypatch) >= 7


def test_a_codec_used_again(spoken, tmp_path, one_process):
    """Other recordings with the centroids and mel settings of the first, whatever the flags say."""
    root = make_corpus(tmp_path / "corpus", {"a": speak("Hello there.", "en-us+f2"), "b": speak("Who are you?")})
    out = tmp_path / "out"
    main(["tokenize", "--codec", str(spoken), "--root", str(root), "--out", str(out), "--codebook_size", "9"])
    assert (out / "codec.safetensors").read_bytes() == (spoken / "codec.safetensors").read_bytes()
    dataset = SentenceDataset(out, codec="mel_rvq", frame_rate=22050 / 512, codebook_size=64)
    assert dataset.codec["mel"] == TokenDataset(spoken).codec["mel"] and dataset.speakers == []
    codes, = load_codec(spoken).encode([read_wav(root / "wavs" / "b.wav", 22050)])
    assert dataset.codes(1).tolist() == codes[:, 0].tolist()
    before = contents(out)
    assert str(out) in refusal(lambda argv: tokenize(root, out, "mel_rvq", mel=MEL, sizes=[64]))
    assert contents(out) == before
    other = tmp_path / "other"
    other.mkdir()
    assert "--codec neucodec" in refusal(lambda argv: tokenize(root, out, str(sentence_folder(other))))
    assert "mel_rvq) nor a folder" in refusal(main, "tokenize", "--codec", "mimi", "--root", root, "--out", out)


def test_a_codec_of_two_corpora(tmp_path, one_process):
    """However few recordings one has, it weighs as much as the other: in the mean, and by a code of its own."""
    few = make_corpus(tmp_path / "few", {"a": tone(1.0, 2000.0)})
    many = make_corpus(tmp_path / "many", {f"b{n}": tone(1.0, 200.0) for n in range(9)})
    (few / "heldout.txt").write_text("")
    (many / "heldout.txt").write_text("b8\n")
    main(["tokenize", "--codec", "mel_rvq", "--root", str(few), "--fit", str(many), "--out", str(tmp_path / "out"),
          "--codebooks", "1", "--codebook_size", "2"])
    codec = load_codec(tmp_path / "out")
    means = [log_mel(read_wav(path, 22050), codec.mel).mean(0) for path in (few / "wavs/a.wav", many / "wavs/b0.wav")]
    torch.testing.assert_close(codec.mean, (means[0] + means[1]) / 2, atol=1e-4, rtol=0)
    found = sorted(codec.mean + codec.books[0], key=lambda centroid: float((centroid - means[0]).square().sum()))
    apart = (means[0] - means[1]).abs().mean()  # the frames at their ends are each like the other's
    assert (torch.stack(found) - torch.stack(means)).abs().mean() < apart / 5
    assert "as it is" in refusal(main, "tokenize", "--codec", "neucodec", "--root", few, "--fit", many, "--out", few)
    (few / "heldout.txt").write_text("a\n")
    said = refusal(main, "tokenize", "--codec", "mel_rvq", "--root", many, "--fit", few, "--out", tmp_path / "none")
    assert str(few) in said and "held out" in said


def test_heldout_voices(tmp_path, one_process):
    """They speak sentences of their own, all held out; the others' are as without them."""
    make_demo_corpus(tmp_path / "plain", 10, 2, ["en-us", "en-us+f2"])
    main(["demo", "--out", str(tmp_path / "out"), "--sentences", "10", "--heldout", "2", "--voices",
          "en-us,en-us+m3,en-us+f2", "--heldout_voices", "en-us+m3,en-gb-x-rp", "--heldout_voice_clips", "3"])
    clips = read_metadata(tmp_path / "out" / "corpus" / "metadata.csv")
    plain, voices = read_metadata(tmp_path / "plain" / "metadata.csv"), [clip["speaker"] for clip in clips]
    assert clips[:10] == plain and voices[10:] == ["en-us+m3", "en-gb-x-rp"] * 3
    assert len({clip["text"] for clip in clips}) == 16
    heldout = (tmp_path / "out" / "corpus" / "heldout.txt").read_text().split()
    assert heldout[2:] == [clip["id"] for clip in clips[10:]] and set(heldout[:2]) < {clip["id"] for clip in plain}
    refuse = lambda *args: refusal(lambda argv: make_demo_corpus(tmp_path / "x", *args))
    assert "leave none" in refuse(5, 1, ["a"], None, ["a"]) and "leave none" in refuse(5, 5, ["a"], None, ["b"], 2)


# ------------------------------------------------------------------------------------------------------------
# Emilia

def rows_of(count, seed=0):
    """Rows of a parquet file: texts, and lists of codes up to the last one."""
    rng = np.random.default_rng(seed)
    texts = [f"Sentence {seed} {n} of “many”." for n in range(count)]
    return texts, [rng.integers(0, 65536, rng.integers(1, 40)).tolist() for _ in range(count)]


def write_parquet(path, texts, codes, kind=pyarrow.list_(pyarrow.int32()), changes={}):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"__key__": pyarrow.array([str(n) for n in range(len(texts))]), "codes": pyarrow.array(codes, kind),
               "text": pyarrow.array(texts, pyarrow.string())} | changes
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
    assert killed_anywhere(lambda out: convert_emilia(out, small), tmp_path, tmp_path / "small_whole", monkeypatch) >= 10
    assert str(whole) in refusal(lambda argv: convert_emilia(whole, small))


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


# ------------------------------------------------------------------------------------------------------------
# Speaker embeddings

@pytest.fixture(scope="module")
def voices(spoken, tmp_path_factory):
    """A corpus of two voices and nobody's, and its tokens. One clip is too short; of the recordings, one goes silent
    after it is tokenized, and one is overwritten. Returns (corpus, tokens)."""
    root, out = tmp_path_factory.mktemp("voices"), tmp_path_factory.mktemp("tokens")
    lines = {"a1": "en-us", "a2": "en-us", "a3": "en-us", "f1": "en-us+f2", "f2": "en-us+f2", "n1": "", "n2": ""}
    clips = {id: speak(f"My name is {id}, who are you?", voice or "en-gb-x-rp") for id, voice in lines.items()}
    clips["a3"] = clips["a1"][8000:12000]
    make_corpus(root, clips, [f"{id}|Hello|Hello|{voice}" for id, voice in lines.items()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SHARD_SOURCES", 3)
        patch.setattr(prepare, "parallel", OneProcess)
        tokenize(root, out, str(spoken))
    make_corpus(root, {"f2": 0 * clips["f2"]}, [f"{id}|Hello|Hello|{voice}" for id, voice in lines.items()])
    (root / "wavs" / "n2.wav").write_bytes(b"no audio")
    return root, out


def test_embeddings(voices, tmp_path, one_process, capsys):
    """The embedder's own of each recording; where there is none the speaker's mean, or else that of all."""
    root, out = voices[0], shutil.copytree(voices[1], tmp_path / "out")
    dataset = SentenceDataset(out)
    assert f"python data.py embed --data {out} --embedder stats" in refusal(
        lambda argv: dataset.load_embeddings("stats", 101))
    main(["embed", "--data", str(out), "--embedder", "stats"])
    said = capsys.readouterr().out
    for id, reason in (("a3", "0.18 s"), ("f2", "it is silent"), ("n2", "cannot read")):
        assert re.search(f"no embedding of {id}: .*{reason}", said)
    assert "3 of them means" in said
    embedder = load_embedder("stats")
    dataset.load_embeddings("stats", embedder.width)
    found = np.stack([dataset.embedding(i) for i in range(7)])
    assert found.dtype == np.float32 and found.shape == (7, embedder.width)
    own = {id: embedder(read_wav(root / "wavs" / f"{id}.wav", 22050), 22050) for id in ("a1", "a2", "f1", "n1")}
    for i, id in ((0, "a1"), (1, "a2"), (3, "f1"), (5, "n1")):
        np.testing.assert_array_equal(found[i], own[id])
    np.testing.assert_allclose(found[2], (own["a1"] + own["a2"]) / 2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[4], own["f1"], rtol=1e-5)
    np.testing.assert_allclose(found[6], sum(own.values()) / 4, rtol=1e-5, atol=1e-5)
    said = refusal(lambda argv: dataset.load_embeddings("stats", 192))
    assert "192" in said and str(embedder.width) in said
    (out / "speaker_stats_00001.f32").write_bytes(b"1234")
    assert "again" in refusal(lambda argv: dataset.load_embeddings("stats", embedder.width))


def test_embedding_killed(voices, tmp_path, one_process, monkeypatch):
    """Killed before any of its files is in place: nothing is computed twice but that one shard, and nothing differs."""
    heard = []

    class Heard:
        width = 3

        def __call__(self, wav, rate):
            heard.append(len(wav))
            return np.array([len(wav), np.abs(wav).sum(), rate], np.float32)

    monkeypatch.setattr(prepare, "cached_embedder", lambda name, device: Heard())

    def make(out):
        if not out.exists():
            shutil.copytree(voices[1], out)
        embed(out, "stats")

    make(tmp_path / "whole")
    once = len(heard)
    steps = killed_anywhere(make, tmp_path, tmp_path / "whole", monkeypatch)
    assert steps >= 7 and len(heard) <= once * (steps + 2) + 3 * steps
    del heard[:]
    make(tmp_path / "whole")
    assert not heard


def test_embeddings_of_chunks(spoken, tmp_path, one_process):
    """Each chunk of a recording has the embedding of its own part."""
    root = tmp_path / "music"
    make_corpus(root, {"a": speak("The first of them was long ago, and the second was not.")}, []).joinpath(
        "metadata.csv").unlink()
    tokenize(root, tmp_path / "out", str(spoken), chunk=(50, "frames"))
    embed(tmp_path / "out", "stats")
    dataset, wav = SentenceDataset(tmp_path / "out"), read_wav(root / "wavs" / "a.wav", 22050)
    assert len(dataset) > 2 and "no train clips that have both" in refusal(lambda argv: dataset.clips("train"))
    dataset.load_embeddings("stats", load_embedder("stats").width)
    np.testing.assert_array_equal(dataset.embedding(1), load_embedder("stats")(wav[50 * 512:100 * 512], 22050))


def test_what_cannot_be_embedded(spoken, voices, tmp_path, one_process):
    convert_emilia(tmp_path / "emilia", emilia_folder(tmp_path / "root", 1))
    assert "without recordings" in refusal(main, "embed", "--data", tmp_path / "emilia", "--embedder", "stats")
    assert "neither a codec" in refusal(main, "embed", "--data", tmp_path, "--embedder", "stats")
    assert "speechbrain" in refusal(main, "embed", "--data", voices[1], "--embedder", "ecapa")
    root = make_corpus(tmp_path / "short", {"a": tone(0.2), "b": tone(0.1)})
    tokenize(root, tmp_path / "tokens", str(spoken))
    said = refusal(main, "embed", "--data", tmp_path / "tokens", "--embedder", "stats")
    assert "2 clips" in said and "0.20 s" in said and not (tmp_path / "tokens" / "speaker_stats.json").exists()
    shutil.rmtree(root)
    for file in (tmp_path / "tokens").glob("speaker_stats*"):
        file.unlink()
    assert f"no longer at {root}" in refusal(main, "embed", "--data", tmp_path / "tokens", "--embedder", "stats")
