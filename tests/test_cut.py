"""cut.py: speech with pauses of known length, cut where these are."""

import csv
import json
import shutil

import numpy as np
import pytest
import soundfile
from conftest import refusal
from helpers import tone

import data
from trivox import corpora, cut, transcripts
from trivox.cut import cut_corpus, divide
from trivox.recordings import write_wav
from trivox.synthesisers import speak_espeak

RATE = 22050


@pytest.mark.parametrize("parts, clips", [
    ([], []), ([(0, 5)], [(0, 5)]), ([(0, 30)], [(0, 30)]),  # no pause to divide at
    ([(0, 3), (4, 7)], [(0, 7)]), ([(0, 3), (13, 15)], [(0, 3), (13, 15)]),  # near, and far
    ([(0, 4), (5, 8), (11, 14)], [(0, 8), (11, 14)]), ([(0, 4), (7, 9), (10, 14)], [(0, 4), (7, 14)]),
    ([(0, 1), (5, 8), (9, 14)], [(0, 8), (9, 14)]),  # not at the longest, which would leave less than 2
    ([(n * 3, n * 3 + 2) for n in range(12)], [(0, 8), (9, 17), (18, 26), (27, 35)]),
])
def test_divided_at_the_longest_pauses(parts, clips):
    found = divide(parts, 2, 12, 9)
    if len(parts) == 12:  # equal pauses: whichever, none is too long, and nothing is lost
        assert all(end - start <= 12 for start, end in found) and found[0][0] == 0 and found[-1][1] == 35
        assert all(a[1] + 1 == b[0] for a, b in zip(found, found[1:]))
    else:
        assert found == clips


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tape(tmp_path_factory):
    """Two recordings of sentences between pauses, and the samples of the first where each sentence is."""
    texts = ["The captain painted seven wooden boxes yesterday.", "Nobody came to the station that morning.",
             "Go.", "The teacher counted ninety little flowers behind the old garden house.",
             "Every summer the driver sold twenty golden candles near the river."]
    folder, wavs = tmp_path_factory.mktemp("tape"), [speak_espeak(text) for text in texts]
    noise = 1e-4 * np.random.default_rng(0).standard_normal(RATE * 2).astype(np.float32)
    spans, parts, at = [], [], 0
    for wav, pause in zip(wavs, (1.5, 1.2, 1.4, 1.3, 1.2)):
        loud = np.flatnonzero(np.abs(wav) > 0.02)
        spans.append((at + loud[0], at + loud[-1]))
        parts += [wav, noise[:int(pause * RATE)]]
        at += len(wav) + int(pause * RATE)
    (folder / "deep").mkdir()
    soundfile.write(folder / "deep" / "first.flac", np.concatenate(parts), RATE)
    soundfile.write(folder / "second.wav", np.stack([np.concatenate(parts[:2])] * 2, 1), RATE)
    write_wav(folder / "tone.wav", tone(3), RATE)
    (folder / "broken.wav").write_bytes(b"RIFF")
    return folder, spans


@pytest.fixture
def ears(extra, monkeypatch):
    """silero-vad as faster-whisper has it; Whisper's place is taken by a count of samples."""
    extra("faster_whisper")
    pytest.importorskip("faster_whisper", reason="pip install --no-deps -r requirements-extra.txt")
    monkeypatch.setattr(transcripts, "load_recogniser", lambda name, **kw: (
        "stub", lambda wavs, rate: [f"it lasts {len(wav)}" for wav in wavs]))


@pytest.mark.parametrize("block", [300, 4], ids=["in one block", "in blocks"])
def test_a_sentence_a_clip(tape, tmp_path, ears, one_process, monkeypatch, capsys, block):
    """Each is whole in one clip, bit for bit as in the recording; what is too short, no speech or damaged is in
    dropped.csv. Another run does nothing; other seconds are refused; what comes of it is a corpus."""
    monkeypatch.setattr(cut, "BLOCK", block)
    folder, spans = tape
    flags = ["cut", "--root", str(folder), "--out", str(tmp_path / "cut")]
    data.main(flags)
    rows = [row for file in (tmp_path / "cut" / "cuts").rglob("*.jsonl") for row in map(json.loads, file.open())
            if "stamp" not in row]
    first, _ = soundfile.read(folder / "deep" / "first.flac", dtype="float32")
    found = [row for row in rows if row["recording"] == "deep/first.flac"]
    assert len(found) == 5 and [("id" in row) for row in found] == [True, True, False, True, True]
    for row, (start, end) in zip(found, spans):
        assert row["start"] - 0.02 <= start / RATE and end / RATE <= row["end"] + 0.02
        if "id" in row:
            wav, _ = soundfile.read(tmp_path / "cut" / "wavs" / f"{row['id']}.wav", dtype="float32")
            at = round(row["start"] * RATE)
            near = [np.abs(first[at + n:at + n + len(wav)] - wav).max() for n in range(-12, 13) if at + n >= 0]
            assert min(near) < 1e-4
    dropped = [*csv.DictReader((tmp_path / "cut" / "dropped.csv").open())]
    reasons = {(row["recording"], row["reason"]) for row in dropped}
    assert any(name == "deep/first.flac" and "speech alone" in why for name, why in reasons)
    assert any(name == "broken.wav" and "cannot read" in why for name, why in reasons)
    clips, _ = corpora.read_corpus(tmp_path / "cut")
    assert {clip["id"] for clip in clips} == {row["id"] for row in rows if "id" in row} and len(clips) == 5
    before = files_in(tmp_path / "cut")
    data.main(flags)
    assert files_in(tmp_path / "cut") == before
    assert "another way" in refusal(data.main, *flags, "--max_seconds", "5")
    assert "not less than" in refusal(data.main, *flags, "--min_seconds", "20")


def test_killed_while_cutting(tape, tmp_path, ears, one_process, monkeypatch):
    """Between clips of a recording: the same files as an uninterrupted run's."""
    cut_corpus(tape[0], tmp_path / "whole")
    count, write = [], cut.write_wav

    def dies(*args):
        write(*args)
        count.append(args)
        if len(count) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cut, "write_wav", dies)
        cut_corpus(tape[0], tmp_path / "cut")
    cut_corpus(tape[0], tmp_path / "cut")
    assert files_in(tmp_path / "cut") == files_in(tmp_path / "whole")


def test_any_recording_is_cut(tape, tmp_path, ears, one_process, monkeypatch):
    """Floats on the scale of 16 bits as loud as the others, a stream whose header has no length to its end; of one that
    is cut off it is told."""
    wav, _ = soundfile.read(tape[0] / "second.wav")
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "plain.wav", wav[:, 0], RATE)
    soundfile.write(tmp_path / "in" / "scaled.wav", wav[:, 0] * 32768, RATE, subtype="FLOAT")
    content = (tmp_path / "in" / "plain.wav").read_bytes()
    (tmp_path / "in" / "stream.wav").write_bytes(content.replace(content[36:44], b"data" + b"\xff" * 4, 1))
    (tmp_path / "in" / "half.wav").write_bytes(content[:len(content) // 2])
    cut_corpus(tmp_path / "in", tmp_path / "out")
    loud = {path.stem: np.abs(soundfile.read(path)[0]).max() for path in (tmp_path / "out" / "wavs").iterdir()}
    assert {*loud} == {"plain_0001", "scaled_0001", "stream_0001"}
    assert loud["stream_0001"] == loud["plain_0001"] == pytest.approx(loud["scaled_0001"], rel=0.2)
    dropped = [*csv.DictReader((tmp_path / "out" / "dropped.csv").open())]
    assert [(row["recording"], "cut off" in row["reason"]) for row in dropped] == [("half.wav", True)]


def test_nothing_to_cut(tmp_path, ears, one_process, monkeypatch):
    write_wav(tmp_path / "in" / "a.wav", tone(3), RATE)
    assert "nothing in" in refusal(data.main, "cut", "--root", tmp_path / "in", "--out", tmp_path / "out")
    (tmp_path / "in" / "a.wav").unlink()
    assert "has no recordings" in refusal(data.main, "cut", "--root", tmp_path / "in", "--out", tmp_path / "o")


def test_without_faster_whisper(tmp_path):
    assert "requirements-extra.txt" in refusal(data.main, "cut", "--root", tmp_path, "--out", tmp_path / "out")


def test_cut_again(tape, tmp_path, ears, one_process, capsys):
    """What is new or changed is cut and heard, alone; twins by their endings are two recordings, also when one goes."""
    shutil.copytree(tape[0] / "deep", tmp_path / "in")
    cut_corpus(tmp_path / "in", tmp_path / "out")
    list = tmp_path / "out" / "metadata.csv"
    list.write_text(list.read_text().replace("it lasts", "Corrected", 1))
    wav, _ = soundfile.read(tape[0] / "second.wav")
    soundfile.write(tmp_path / "in" / "first.wav", wav, RATE)
    cut_corpus(tmp_path / "in", tmp_path / "out")
    clips = list.read_text().splitlines()
    assert len(clips) == 5 and clips[0].split("|")[1].startswith("Corrected")
    assert len({*(tmp_path / "out" / "wavs").iterdir()}) == 5
    soundfile.write(tmp_path / "in" / "first.wav", np.concatenate([wav, wav]), RATE)
    (tmp_path / "in" / "first.flac").unlink()
    capsys.readouterr()
    cut_corpus(tmp_path / "in", tmp_path / "out")
    said = capsys.readouterr().out
    assert "first.wav has changed, and is cut anew" in said and "1 recordings that were cut before" in said
    assert len(list.read_text().splitlines()) == 6
    assert "beside it" in refusal(data.main, "cut", "--root", tmp_path, "--out", tmp_path / "more")
