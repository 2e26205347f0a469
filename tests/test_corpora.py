"""corpora.py: whatever a metadata.csv holds, folders that are no corpus, which clips are for validation."""

import hashlib
import json
import os

import pytest
import soundfile
from conftest import refusal
from helpers import make_corpus, tone

import data
from trivox import corpora
from trivox.audio import MelConfig
from trivox.corpora import corpus_sources, draw_validation, read_metadata
from trivox.datasets import TokenDataset
from trivox.prepare import tokenize
from trivox.recordings import write_wav

@pytest.mark.parametrize("columns, line, text, speaker", [
    ("id|text|normalized|speaker", "a|Dr. B|doctor B|jo", "doctor B", "jo"),
    ("id|text|normalized|speaker", "a|Dr. B|", "Dr. B", ""),
    ("id|text|normalized|speaker", "\ufeffa|\"Quoted, he said", "\"Quoted, he said", ""),
    ("speaker|id|text", "jo|a|Dr. B", "Dr. B", "jo"),
])
def test_metadata(tmp_path, columns, line, text, speaker):
    (tmp_path / "m.csv").write_text(line + "\n|no id\nb|\n\n", encoding="utf-8")
    assert read_metadata(tmp_path / "m.csv", columns) == [{"id": "a", "text": text, "speaker": speaker}]


@pytest.mark.parametrize("files, words", [
    ([], "no folder wavs/"), (["wavs/readme.txt"], "neither metadata.csv nor recordings"),
    (["wavs/a.wav"], "~/.cache/whisper/"),
])
def test_folders_that_are_no_corpus(tmp_path, files, words):
    """Among them one of bare recordings, where Whisper would have to write the transcripts and cannot be had."""
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        write_wav(tmp_path / file, tone(0.1), 22050) if file.endswith("wav") else (tmp_path / file).touch()
    said = refusal(data.main, "ljspeech", "--root", tmp_path, "--out", tmp_path / "out")
    assert words in said and not (tmp_path / "out").exists()


def test_transcripts_of_bare_recordings(tmp_path, monkeypatch):
    """Every recording in its line, more than are heard at once; what would break a line is no part of a text."""
    paths = [tmp_path / "wavs" / f"{n % 3}" / f"{n:03d}.wav" for n in range(70)]
    for n, path in enumerate(paths):
        write_wav(path, tone(0.01 * (n + 1)), 16000)
    monkeypatch.setattr(corpora, "load_recogniser", lambda name: (
        name, lambda wavs, rate: [f" it lasts|\n {len(wav)} " for wav in wavs]))
    clips = corpora.read_metadata(corpora.transcribe(tmp_path, tmp_path / "out"))
    assert {clip["id"]: clip["text"] for clip in clips} == {
        f"{n % 3}/{n:03d}": f"it lasts {soundfile.info(path).frames}" for n, path in enumerate(paths)}


def test_no_download(tmp_path):
    """From where, and what to do instead."""
    said = refusal(data.main, "ljspeech", "--out", tmp_path / "data" / "ljspeech")
    assert corpora.LJSPEECH_URL in said and "--root" in said


def test_validation_is_drawn():
    """2 % of the clips, the same in whatever order they stand."""
    ids = [f"clip-{i}" for i in range(500)]
    drawn = draw_validation(ids)
    assert len(drawn) == 10 and drawn == draw_validation(ids[::-1]) and drawn != set(ids[:10])
    assert [len(draw_validation(ids[:n])) for n in (1, 2, 30)] == [0, 1, 1]


def test_validation_is_drawn_by_file(tmp_path):
    """5 % of the files, whatever their order; ids that lead out of the corpus are for the shard to refuse."""
    root = make_corpus(tmp_path / "corpus", {}, [f"{n:03d}|text {n}" for n in range(200)] + ["../../x|out"])
    sources = corpus_sources(root)
    val = {s["source"] for s in sources if s["split"] == "val"}
    assert len(val) == 10 and "leads out" in sources[-1]["skipped"]
    lines = (root / "metadata.csv").read_text().splitlines()
    (root / "metadata.csv").write_text("\n".join(lines[::-1]))
    assert {s["source"] for s in corpus_sources(root) if s["split"] == "val"} == val


def test_a_name_that_is_no_utf8(tmp_path, one_process, capsys):
    """Its recording is used as any other, and drawn by its bytes."""
    names = [os.fsdecode(b"a\xe9"), "b"]
    for name in names:
        write_wav(tmp_path / "c" / f"{name}.wav", tone(0.3), 22050)
    tokenize(tmp_path / "c", tmp_path / "out", "mel_rvq", mel=MelConfig(), sizes=[8])
    assert {row["id"] for row in TokenDataset(tmp_path / "out").rows} == set(names)
    assert "2 clips" in capsys.readouterr().out
    assert corpora.draw_key(names[0]) == hashlib.sha256(b"a\xe9").digest()
    assert corpora.draw_key("é") == hashlib.sha256("é".encode()).digest()


@pytest.mark.parametrize("said, found", [
    ("a\nc d\n", {"a", "c d"}), ("\n  b \r\n", {"b"}), ("", set()), ("a b\n", "line 1"), ("a\nb.wav\n", "line 2"),
], ids=["with a space", "blanks", "empty", "two in a line", "an ending"])
def test_what_is_held_out(tmp_path, one_process, said, found):
    """By either kind of data set; an id that is none holds nothing out, and is refused with the nearest."""
    root = make_corpus(tmp_path / "corpus", {id: tone(0.3) for id in ("a", "b", "c d")})
    (root / "heldout.txt").write_text(said)
    mels = ("ljspeech", "--root", root, "--out", tmp_path / "mels")
    if isinstance(found, str):
        for words in refusal(data.main, *mels), refusal(lambda argv: corpus_sources(root)):
            assert found in words and "the nearest is" in words
    else:
        data.main([*map(str, mels)])
        rows = [json.loads(line) for line in (tmp_path / "mels" / "mels_00000.jsonl").open()]
        for clips in rows, corpus_sources(root):
            assert {clip["id"] for clip in clips if clip["split"] == "val"} == found
