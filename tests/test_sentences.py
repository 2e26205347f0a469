"""sentences.py: where the sentences of a text end, and how long it takes to find that."""

import time
import unicodedata

import pytest
from conftest import ROOT

from trivox.errors import UserError
from trivox.normalise import normalise_text
from trivox.sentences import in_letters, sentences, split_text


def test_sentences():
    """Of sentences.tsv: a text, and its sentences once it is normalised."""
    rows = [line.split("\t") for line in (ROOT / "tests" / "sentences.tsv").read_text().splitlines()]
    found = {text: split_text(normalise_text(text, accents=True), 255) for text, *_ in rows}
    assert found == {text: sentences for text, *sentences in rows} and len(rows) > 30


@pytest.mark.parametrize("piece, language", [("at 5 p.m. Monday ", "en"), ("... ", "en"), ("你好吗我很好。", "zh"),
                                             ("He left. ", "en")])
def test_splitting_takes_linear_time(piece, language):
    times = []
    for size in (10_000, 40_000):
        text, start = piece * (size // len(piece)), time.process_time()
        found = sentences(text, language)
        times.append(time.process_time() - start)
        assert "".join("".join(found).split()) == "".join(text.split())
    assert times[1] < 1 and times[1] < 9 * times[0] + 0.1


@pytest.mark.parametrize("text, pieces", [
    ("今天天气很好，我们去公园，然后回家。", ["今天天气很好，我们去公园，", "然后回家。"]),
    ("今天天气很好我们去公园然后回家吃饭「真的」。", ["今天天气很好我们去公园然后回家", "吃饭「真的」。"]),
    ("ก็" * 20, ["ก็" * 7, "ก็" * 7, "ก็" * 6]), ("iPhone15很好" * 5, ["iPhone15很好" * 3, "iPhone15很好" * 2]),
    ("これは、" + "あ" * 20, ["これは、" + "あ" * 11, "あ" * 9]),
], ids=["commas", "no commas", "vowels", "letters", "both"])
def test_scripts_without_blanks(text, pieces):
    """What is too long is cut behind a comma, else anywhere but before a mark or within a word of Latin letters."""
    assert split_text(text, 45, "zh") == pieces and "".join(pieces) == text


def test_length_in_letters():
    """A sentence of phonemes is as long as its symbols, and not as their bytes; a Han character takes a syllable."""
    ipa = "ˈzɪlbən ʃtˈeːən vˈoːɐ̯ dɛm hˈaʊ̯s ʊnt vˈaʁtən"
    assert in_letters(ipa) == sum(unicodedata.category(c) != "Mn" for c in ipa) < len(ipa.encode()) - 10
    assert split_text(ipa, in_letters(ipa), "und", in_letters) == [ipa]
    assert in_letters("好 a한ก") == 3 + 1 + 1 + 3 + 1
    assert split_text("今天天气很好我们去公园然后回家。", 30, "zh", in_letters) == [
        "今天天气很好我们去公", "园然后回家。"]
    with pytest.raises(UserError, match="is a word of 31 letters; the model reads 30"):
        split_text("x" * 31, 30, "de", in_letters)


def test_words_that_are_too_long():
    for word in ("x" * 46, "好" + "x" * 46, "я" * 23, "x" * 20 + "," + "y" * 46):
        with pytest.raises(UserError, match="bytes; the model reads 45"):
            split_text(f"A {word} b.", 45, "zh")


def test_sentences_of_other_languages():
    """Abbreviations are those of the language, where sentencex knows it; one that it does not know is no error."""
    assert split_text("Das ist z.B. gut. Ja!", 99, "de") == ["Das ist z.B. gut.", "Ja!"]
    assert split_text("One. Two!", 99, "xx") == ["One.", "Two!"]
