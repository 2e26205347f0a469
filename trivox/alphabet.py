"""The characters that the LLM TTS reads, and their numbers: Echolancer's 38, or those of a corpus."""

import unicodedata
from functools import lru_cache

import numpy as np
from anyascii import anyascii

SYMBOLS = "abcdefghijklmnopqrstuvwxyz .,!?;:'\"()-"  # Echolancer's
FIRST = 5  # the number of the first; before are pad 0, unknown 1, BOS 2, EOS 3, mask 4
UNKNOWN = 1


class Alphabet:
    """Characters, a string in which each stands once, numbered from 5 on as they stand there.

    Echolancer's are small letters, to which others are decomposed (NFKD). One of a corpus is in composed letters (NFC),
    in lower case where it has no capital; a character that it lacks is read as what it has of its lower case or, of
    Latin letters and marks, its like in ASCII, such as e for é. exact: where each character is a symbol of its own, as
    in texts of phonemes, none is read as another.
    """

    def __init__(self, symbols=SYMBOLS, exact=False):
        self.symbols, self.own, self.exact = symbols, symbols != SYMBOLS, exact
        self.form, self.cased = "NFC" if self.own else "NFKD", exact or symbols != symbols.lower()
        self.number = {c: i for i, c in enumerate(symbols, FIRST)}
        self.dtype = np.uint16 if self.own else np.uint8
        points = np.array(list(map(ord, symbols)))
        self.by_point = np.full(points.max() + 2, UNKNOWN, self.dtype)  # the last for all beyond
        self.by_point[points] = np.arange(FIRST, FIRST + len(symbols))
        self.letters = np.array([False] * FIRST + [c.isalpha() for c in symbols])
        self.spell = lru_cache(4096)(self.spell)

    def ids(self, text):
        """The characters of a text as numbers, (n,) uint8, or uint16 of an alphabet of a corpus, white space folded;
        what it does not know is 1."""
        text = folded(text, self.form, self.cased)
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self.by_point[np.minimum(points, len(self.by_point) - 1)]
        if self.own and not self.exact and UNKNOWN in ids:
            ids = np.array([i for c in text for i in self.spell(c)], self.dtype)
        return ids

    def spell(self, c):
        """The numbers of one character, by others where the alphabet lacks it."""
        forms = [c, c.lower(), unicodedata.normalize("NFKC", c).lower()]
        if unicodedata.name(c, "").startswith("LATIN") or unicodedata.category(c)[0] == "P":
            forms += [anyascii(c), anyascii(c).lower()]  # of other letters that would be other speech
        for form in forms:
            if form and all(x in self.number for x in form):
                return [self.number[x] for x in form]
        return [UNKNOWN]

    def text(self, ids):
        """The text of numbers; pad, unknown, BOS, EOS and mask are left out."""
        return "".join(self.symbols[i - FIRST] for i in np.asarray(ids).tolist() if i >= FIRST)

    def unknown(self, text):
        """Those of a text that there is no number for, each once, in their order: a string."""
        text = unicodedata.normalize("NFC", text)
        return "".join(c for c in dict.fromkeys(text) if not c.isspace() and UNKNOWN in self.ids(c))

    def has_letters(self, ids):
        """Whether letters are among some numbers."""
        return bool(self.letters[ids].any())

    def what(self):
        """What it holds, in words."""
        some = [c for c in self.symbols if c.isalpha()]
        return "English letters" if not self.own else f"{len(some):,} letters, such as {' '.join(some[-5:])}"


@lru_cache(16)
def alphabet(symbols, language="en"):
    """The Alphabet of these characters, for texts in a language, made once."""
    return Alphabet(symbols, language == "und")


def folded(text, form, cased):
    """A text in a normal form of Unicode, in lower case unless `cased`, its white space folded."""
    text = unicodedata.normalize(form, text)
    if not cased:
        text = unicodedata.normalize(form, text.lower())
    return " ".join(text.split())


def of_texts(texts, cased=False):
    """The characters of some texts, in order of their code points, a blank among them."""
    return "".join(sorted({" "}.union(*(folded(text, "NFC", cased) for text in texts))))
