"""alphabet.py: characters beside Echolancer's table; those of a corpus, there and back."""

import re
import unicodedata

import numpy as np
import pytest
from helpers import random_texts

from trivox.alphabet import SYMBOLS, Alphabet, alphabet, of_texts
from trivox.normalise import normalise_text

PUBLISHED = {"a": 5, "b": 6, "c": 7, "d": 8, "e": 9, "f": 10, "g": 11, "h": 12, "i": 13, "j": 14, "k": 15, "l": 16,
             "m": 17, "n": 18, "o": 19, "p": 20, "q": 21, "r": 22, "s": 23, "t": 24, "u": 25, "v": 26, "w": 27, "x": 28,
             "y": 29, "z": 30, " ": 31, ".": 32, ",": 33, "!": 34, "?": 35, ";": 36, ":": 37, "'": 38, '"': 39, "(": 40,
             ")": 41, "-": 42}


def test_echolancers_are_the_published_ones():
    """The table of the published tokenizer, after NFKD, lower case and white space folded; all else is 1."""
    letters = Alphabet()
    assert SYMBOLS == "".join(PUBLISHED) and {letters.text([n]): n for n in range(5, 43)} == PUBLISHED
    for text in [*random_texts(2000), "", "  A\tb \n\u2003c ", "ﬁ Ⅷ ２ …", "İSTANBUL", "café"]:
        folded = re.sub(r"\s+", " ", unicodedata.normalize("NFKD", text).lower()).strip()
        ids = letters.ids(text)
        assert ids.dtype == np.uint8 and ids.tolist() == [PUBLISHED.get(c, 1) for c in folded]
        assert letters.text(ids) == "".join(c for c in folded if c in PUBLISHED)
    assert letters.text([2, 12, 13, 3, 0, 1, 4]) == "hi"


def test_unknown_characters():
    """Those without a number in the table, each once, in their order; what is folded is known."""
    letters = Alphabet()
    assert letters.unknown("The word слово, и ★.") == "слови★"
    assert letters.unknown("\tＡ Café… (so)") == "é" and not letters.unknown(SYMBOLS)
    assert letters.has_letters(letters.ids("… a?")) and not letters.has_letters(letters.ids("слово - (1)"))


TEXTS = {
    "de": ["Die Straße über den Fluss hat 25 Brücken.", "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich!"],
    "ru": ["Съешь же ещё этих мягких французских булок, да выпей чаю.", "В 1995 году ОН ушёл."],
    "zh": ["你好，世界。", "他说：「我们走吧！」"],
    "el": ["Ο ΟΔΥΣΣΕΥΣ ήταν εδώ;"], "tr": ["İstanbul'da IĞDIR'ı gördüm."],
    "und": ["həˈloʊ ˈwɜːld", "t͡ʃʰa˥˩ ni3 hao3 A B a b"], "ar": ["مرحبا بالعالم، كيف حالك؟"], "hi": ["नमस्ते दुनिया।"],
}


@pytest.mark.parametrize("language", TEXTS)
def test_that_of_a_corpus_holds_its_texts(language):
    """Each text comes back from its numbers as it was, in small letters but for what is no language; and the model
    knows all of it."""
    texts = [normalise_text(text, True, language) for text in TEXTS[language]]
    letters = alphabet(of_texts(texts, language == "und"), language)
    for text in texts:
        ids = letters.ids(text)
        assert ids.dtype == np.uint16 and ids.min() >= 5 and not letters.unknown(text)
        assert letters.text(ids) == unicodedata.normalize("NFC", text if language == "und" else text.lower())
        assert letters.ids(unicodedata.normalize("NFD", text)).tolist() == ids.tolist() and letters.has_letters(ids)
    assert "".join(sorted({*letters.symbols})) == letters.symbols


def test_what_a_corpus_lacks_is_read_as_its_like():
    """é by e where there is no é, capitals by small letters, full-width forms by usual ones; never in silence where
    there is nothing like it."""
    letters = Alphabet(of_texts(["the quick brown fox jumps over the lazy dog, ß and ä."]))
    assert letters.text(letters.ids("Café ÄRGER Straße Łodz Ｏｋ")) == "cafe ärger straße lodz ok"
    assert letters.unknown("слово ä 語") == "слов語"  # Latin letters for these would be other speech
    assert letters.text(letters.ids("ja、ne。")) == "ja,ne."
    decomposed = unicodedata.normalize("NFD", "감사 éñ")
    assert Alphabet("감사 é").unknown(decomposed) == "ñ" and Alphabet("감사 é").text(
        Alphabet("감사 é").ids(decomposed[:-2])) == "감사 é"
    assert letters.unknown("a ★ b ☃") == "★☃" and letters.ids("★").tolist() == [1]
    assert 1 not in Alphabet(of_texts(["Ab"], cased=True)).ids("Ab") and Alphabet(of_texts(["Ab"])).symbols == " ab"


def test_symbols_are_none_but_themselves():
    """Of what is no language: in X-SAMPA D and d are two sounds."""
    letters = alphabet(" dɛː", "und")
    assert letters.unknown("DƐ dɛː é") == "DƐé" and letters.ids("Dd").tolist() == [1, 6]
    assert letters.ids("dɛː  d").tolist() == [6, 7, 8, 5, 6]


def test_random_texts_there_and_back():
    texts = [" ".join(text.split()) for text in random_texts(300)]
    texts = [text for text in texts if not any("\ud800" <= c <= "\udfff" for c in text)]
    letters = Alphabet(of_texts(texts))
    for text in texts:
        once = letters.text(letters.ids(text))
        assert 1 not in letters.ids(text) and letters.ids(once).tolist() == letters.ids(text).tolist()
