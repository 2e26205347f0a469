"""synthesisers.py: hibari's voices where hibari is installed, what it will not say, and what speaks without it.
(espeak-ng's voices and the corpora of both are heard in test_demo_speech.py.)"""

import json
import re
import sys

import numpy as np
import pytest
import soundfile
from conftest import refusal

from data import main
from trivox import synthesisers
from trivox.corpora import clip_path
from trivox.metadata import read_transcripts
from trivox.synthesisers import check_voice, default_voice, hibari, speak, speak_corpus, trimmed

SENTENCE = "The captain painted seven wooden boxes yesterday."


@pytest.fixture
def with_hibari():
    return pytest.importorskip("hibari", reason="no hibari: pip install --no-deps -r requirements-extra.txt")


@pytest.fixture
def without_hibari(monkeypatch):
    """As where the package is not there."""
    monkeypatch.setitem(sys.modules, "hibari", None)
    hibari.cache_clear()
    yield
    hibari.cache_clear()


def test_heart(with_hibari):
    """It is the voice of what is spoken; at a speaking rate, neither silent nor cut off, and the same each time."""
    assert default_voice() == "heart"
    (wav, rate), (again, _) = speak(SENTENCE, "heart"), speak(SENTENCE, "heart")
    assert rate == 24000 and wav.dtype == np.float32 and 8 < len(SENTENCE) / (len(wav) / rate) < 25
    assert 0.1 < np.abs(wav).max() < 1 and np.array_equal(wav, again)
    loud = np.flatnonzero(np.abs(wav) > 0.02 * np.abs(wav).max())
    assert 0.05 < loud[0] / rate < 0.2 and 0.05 < (len(wav) - loud[-1]) / rate < 0.25


def test_trimmed():
    """A tone keeps at most a tenth of a second of silence at each end, to the frames of 23 ms that it is found by."""
    tone = np.sin(np.arange(24000) / 10).astype(np.float32)
    for before, behind in ((0.3, 0.5), (0, 0.02), (0.05, 0.3)):
        wav = np.pad(tone, (round(before * 24000), round(behind * 24000)))
        kept = len(trimmed(wav, 24000)) / 24000 - 1
        assert kept == pytest.approx(min(before, 0.1) + min(behind, 0.1), abs=0.09)
    assert len(trimmed(np.zeros(100, np.float32), 24000)) <= 100


def test_numbers_and_brackets(with_hibari):
    """It says what models read, and takes no text for a spelling with its phonemes."""
    for written, said in (("In 1990, $5.20", "In nineteen ninety, five dollars, twenty cents"),
                          ("one [box](/tri/) more", "one [box] (/tri/) more")):
        assert np.array_equal(speak(written, "heart")[0], speak(said, "heart")[0])
    assert len(speak("one [box](/a/)", "heart")[0]) > len(speak("one a", "heart")[0])


@pytest.mark.parametrize("text, words", [
    ("", "nothing to say"), ("... -", "nothing to say"), ("你好", "'你好'"), ("He said 你 once.", "'你'"),
    ("Привет", "'Привет'"), ("a ħ b", "'ħ'"), ("a ☆", "cannot say '☆'"), ("One ★ face", "cannot say"),
    ("a" * 25, "at most 24 letters"), ("٣ ﷺ", "cannot say"),
], ids=ascii)
def test_what_heart_cannot_say(with_hibari, text, words):
    """It is refused, not left out in silence. Accents are said."""
    assert words in refusal(lambda argv: speak(text, "heart"))
    assert len(speak("Zoë, naïve, Dvořák, Müller", "heart")[0]) > 24000


def test_voices_that_cannot_be_downloaded(with_hibari):
    """Those of hibari that are not in its package, without a net."""
    hibari.cache_clear()
    assert "the voice emma cannot be loaded" in refusal(lambda argv: check_voice("emma"))
    for voice in "martian", "":
        said = refusal(lambda argv: check_voice(voice))
        assert f"no voice {voice!r}" in said and "hibari has heart" in said


def test_without_hibari(without_hibari, capsys):
    """espeak-ng speaks, and a note says what is missing; heart is refused in words."""
    assert default_voice() == "en-us"
    said = capsys.readouterr().out
    assert "hibari-tts" in said and "pip install --no-deps -r requirements-extra.txt" in said and said.count("\n") == 1
    assert "hibari-tts" in refusal(lambda argv: speak(SENTENCE, "heart"))
    wav, rate = speak(SENTENCE, "en-us")
    assert rate == 22050 and 8 < len(SENTENCE) / (len(wav) / rate) < 25


def test_a_demo_in_another_voice(with_hibari, tmp_path, one_process, monkeypatch, capsys):
    """Where espeak-ng spoke and hibari is there now: its recordings and log-mels are made anew, then nothing more."""
    flags = ["demo", "--sentences", "4", "--heldout", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(synthesisers, "check_voice", lambda voice: synthesisers.take_voice(voice))
        main(flags)
    before = json.loads((tmp_path / "dataset_stats.json").read_text())
    assert {c["speaker"] for c in read_transcripts(tmp_path / "corpus" / "metadata.csv")} == {"en-us"}
    capsys.readouterr()
    main(flags)
    assert "made anew" in capsys.readouterr().out
    assert {c["speaker"] for c in read_transcripts(tmp_path / "corpus" / "metadata.csv")} == {"heart"}
    assert {soundfile.info(path).samplerate for path in tmp_path.rglob("*.wav")} == {24000}
    after = json.loads((tmp_path / "dataset_stats.json").read_text())
    assert after["frames"] != before["frames"] and after["clips"] == 4
    monkeypatch.setattr(synthesisers, "speak", None)
    main(flags)
    assert "made anew" not in capsys.readouterr().out
    assert "other settings" in refusal(main, *flags, "--n_mels", "40")


def test_what_cannot_be_said_is_listed(tmp_path, one_process, capsys):
    """It has no recording; the rest has. Of nothing at all there is no corpus."""
    clips = [("a", "Hello there.", "en-us"), ("b", "...", "en-us")]
    speak_corpus(tmp_path, clips, ["a"])
    assert re.findall("not spoken (.): (.*)\n", capsys.readouterr().out) == [
        ("b", "there is nothing to say in '...': it has no letter and no digit")]
    assert [clip_path(tmp_path, id).exists() for id in "ab"] == [True, False]
    assert "none of the 1" in refusal(lambda argv: speak_corpus(tmp_path, clips[1:], []))
    assert "two sentences have the id 'a'" in refusal(lambda argv: speak_corpus(tmp_path, clips[:1] * 2, []))
