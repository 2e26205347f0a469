"""demo_speech.py: the grammar is heard as it is spoken; texts, voices and held-out sentences of a spoken corpus."""

import random

import pytest
import soundfile
from conftest import refusal

from data import main
from trivox import synthesisers
from trivox.corpora import MARK, clip_path
from trivox.metadata import read_transcripts
from trivox.demo_speech import demo_grammar, demo_sentence, make_demo_corpus
from trivox.judges import word_error_rate
from trivox.recognisers import load_recogniser
from trivox.synthesisers import speak_espeak as speak


def test_demo_grammar():
    """PocketSphinx knows every word, and its grammar hears the sentences that are drawn. (Chance is about 90 %.)"""
    from pocketsphinx import Decoder

    dictionary = Decoder(loglevel="FATAL")
    rng = random.Random(1)
    words = {word.strip(",.").lower() for _ in range(3000) for word in demo_sentence(rng).split()}
    assert 90 < len(words) < 130 and not [word for word in words if dictionary.lookup_word(word) is None]
    texts = [demo_sentence(rng) for _ in range(8)]
    _, hear = load_recogniser("grammar", grammar=demo_grammar())
    assert word_error_rate(texts, hear([speak(text) for text in texts], 22050)) <= 0.1
    assert word_error_rate(texts[1:], texts[:-1]) > 0.7


def test_demo_corpus(corpus):
    """No sentence twice; those held out are among them; every recording is there, at a speaking rate."""
    clips = read_transcripts(corpus / "metadata.csv")
    heldout = (corpus / "heldout.txt").read_text().split()
    assert len({clip["text"] for clip in clips}) == len(clips) == 40 and len(set(heldout)) == 6
    assert set(heldout) < {clip["id"] for clip in clips} and {clip["speaker"] for clip in clips} == {"en-us"}
    for clip in clips:
        info = soundfile.info(clip_path(corpus, clip["id"]))
        assert info.samplerate == 22050 and 8 < len(clip["text"]) / info.duration < 25


def is_spoken(root, clip):
    """Whether the recording of a clip lasts as long as its text does in its voice. (espeak speaks no text twice quite
    alike; en-us+f2 is two hundredths slower than en-us and more.)"""
    return soundfile.info(clip_path(root, clip["id"])).frames == pytest.approx(
        len(speak(clip["text"], clip["speaker"])), rel=0.01)


LONG = "The old doctor went to the river with a very small boat, and came back in the evening."


@pytest.mark.parametrize("lines, ids, texts", [
    (["Hello there, who are you?", "", LONG], ["clip-00000", "clip-00002"], ["Hello there, who are you?", LONG]),
    ([f"x1|{LONG.upper()}|{LONG}", "x2|Hello there, who are you?|", "x3||"], ["x1", "x2"],
     [LONG, "Hello there, who are you?"]),
], ids=["a sentence a line", "csv"])
def test_speaking_transcripts(tmp_path, one_process, lines, ids, texts):
    """One voice after the other."""
    (tmp_path / "list").write_text("\n".join(lines))
    voices = ["en-us", "en-us+f2"]
    make_demo_corpus(tmp_path / "corpus", 0, 1, voices, tmp_path / "list")
    clips = read_transcripts(tmp_path / "corpus" / "metadata.csv")
    assert [(c["id"], c["text"], c["speaker"]) for c in clips] == list(zip(ids, texts, voices))
    assert all(is_spoken(tmp_path / "corpus", clip) for clip in clips)
    assert not (tmp_path / "corpus" / "grammar.jsgf").exists()


def test_other_sentences_or_voices_are_spoken_anew(tmp_path, one_process):
    """Recordings that are there already are not taken for those of another text or voice."""
    (tmp_path / "list").write_text(f"{LONG}\nHello there, who are you?\n")
    make_demo_corpus(tmp_path / "corpus", 0, 1, ["en-us"], tmp_path / "list")
    (tmp_path / "list").write_text("Nothing of the kind was said.\nHello there, who are you?\n")
    make_demo_corpus(tmp_path / "corpus", 0, 1, ["en-us+f2"], tmp_path / "list")
    assert all(is_spoken(tmp_path / "corpus", clip) for clip in read_transcripts(tmp_path / "corpus" / "metadata.csv"))


@pytest.mark.parametrize("line, voice, heldout, words", [
    ("Hello.", "martian", 0, "'martian'"), ("Hello.", "en-us", 1, "leave none"), ("", "en-us", 0, "names no clip"),
    ("../x|Hello.", "en-us", 0, "'../x' leads out"),
], ids=["voice", "all held out", "no sentence", "hostile id"])
def test_what_cannot_be_spoken(tmp_path, one_process, line, voice, heldout, words):
    (tmp_path / "list").write_text(line)
    assert words in refusal(lambda argv: make_demo_corpus(tmp_path / "corpus", 0, heldout, [voice], tmp_path / "list"))
    assert not list(tmp_path.rglob("*.wav"))


def files_in(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["metadata.csv", "wavs/demo-00000.wav", "heldout.txt", "grammar.jsgf"])
def test_another_corpus_stays(tmp_path, one_process, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("demo-00000|Mine.|Mine.\n")
    before = files_in(tmp_path)
    said = refusal(lambda argv: make_demo_corpus(tmp_path, 5, 1, ["en-us"]))
    assert name.split("/")[0] in said and "--root" in said and files_in(tmp_path) == before


def test_a_corpus_is_not_spoken_over_itself(tmp_path, one_process):
    """Neither by a voice that there is not, nor where its own metadata.csv is what should be spoken."""
    make_demo_corpus(tmp_path, 3, 1, ["en-us"])
    before, metadata = files_in(tmp_path), tmp_path / "wavs" / ".." / "metadata.csv"
    assert "'martian'" in refusal(lambda argv: make_demo_corpus(tmp_path, 3, 1, ["en-us", "martian"]))
    assert "overwritten" in refusal(lambda argv: make_demo_corpus(tmp_path, 3, 1, ["en-us+f2"], metadata))
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("listed", [None, "x1|One book.\nx2|Two books.\n"], ids=["sentences", "transcripts"])
def test_a_corpus_of_before_there_was_the_mark(tmp_path, one_process, monkeypatch, listed):
    """It is known as the demo's, and nothing is spoken again."""
    if listed:
        (tmp_path / "list").write_text(listed)
    make = lambda: make_demo_corpus(tmp_path / "corpus", 2, 1, ["en-us"], tmp_path / "list" if listed else None)
    make()
    before = files_in(tmp_path / "corpus")
    (tmp_path / "corpus" / MARK).unlink()
    monkeypatch.setattr(synthesisers, "speak", None)
    make()
    assert files_in(tmp_path / "corpus") == before


def test_heldout_voices(tmp_path, one_process):
    """They speak sentences of their own, all held out; the others' are as without them."""
    make_demo_corpus(tmp_path / "plain", 10, 2, ["en-us", "en-us+f2"])
    main(["demo", "--out", str(tmp_path / "out"), "--sentences", "10", "--heldout", "2", "--voices",
          "en-us,en-us+m3,en-us+f2", "--heldout_voices", "en-us+m3,en-gb-x-rp", "--heldout_voice_clips", "3"])
    clips = read_transcripts(tmp_path / "out" / "corpus" / "metadata.csv")
    plain, voices = read_transcripts(tmp_path / "plain" / "metadata.csv"), [clip["speaker"] for clip in clips]
    assert clips[:10] == plain and voices[10:] == ["en-us+m3", "en-gb-x-rp"] * 3
    assert len({clip["text"] for clip in clips}) == 16
    heldout = (tmp_path / "out" / "corpus" / "heldout.txt").read_text().split()
    assert heldout[2:] == [clip["id"] for clip in clips[10:]] and set(heldout[:2]) < {clip["id"] for clip in plain}
    refuse = lambda *args: refusal(lambda argv: make_demo_corpus(tmp_path / "x", *args))
    assert "leave none" in refuse(5, 1, ["a"], None, ["a"]) and "leave none" in refuse(5, 5, ["a"], None, ["b"], 2)
