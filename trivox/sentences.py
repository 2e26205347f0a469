"""The sentences of a text, which are spoken one by one."""

import re
import unicodedata

from trivox.errors import UserError
from trivox.normalise import CALENDAR

BRACKET = re.compile(r"(?<=[.!?][)\]]) (?=[\"'(\[]*[A-Z])")  # behind a sentence in brackets
NOON = re.compile(r"\b[ap]\.m\.$")
WHEN = re.compile(rf"(?:{'|'.join([*CALENDAR, *CALENDAR.values(), 'May'])}|[ECMP][SD]?T|GMT|UTC|BST|CET|Eastern|Central"
                  r"|Pacific|Mountain|Greenwich|Tomorrow|Today)\b")  # what goes on behind a.m. or p.m.
AT = re.compile(r"(?:At|By|From|Around|About|Since|Until|After|Before|Every|On|Near|Between)(?: \S+){1,5}$")
SHORT = 200  # characters, of which AT has fewer
UNSPACED = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff]")
SYLLABLE = re.compile("[\u1100-\u11ff\u3040-\u318f\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
CLINGING = "Mn", "Mc", "Me", "Pe", "Pf", "Po", "Pd"  # categories of what stays with the character before
STOP = re.compile(r"[。！？।॥۔؟።։](?![\"'」』”’)\]）。！？।])")


def in_bytes(text):
    """How much of what a text encoder reads a text is."""
    return len(text.encode())


def in_letters(text):
    """How long a text is when it is spoken: its characters, of which one that stands for a syllable or a word counts as
    three letters, and one that goes with the one before as none."""
    return sum(0 if unicodedata.category(c) == "Mn" else 3 if SYLLABLE.match(c) else 1 for c in text)


def split_text(text, limit, language="en", size=in_bytes):
    """The sentences of a text, by the rules of sentencex, which know abbreviations and the stops of many scripts; those
    whose `size` is beyond `limit` are cut between words, and of scripts without blanks behind a comma or, failing that,
    anywhere.
    Marks by themselves stay with the sentence beside them, closing ones with the one before; where that is cut, those
    that would stand alone are left out.

    Raises UserError for a text without a letter or digit, for a word beyond the limit, and for what is no Unicode.
    """
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{text.encode(errors='replace').decode()[:40]!r} is not UTF-8 text")
    if not says(text):
        raise UserError(f"there is nothing to say in {text[:40]!r}: it has no letter and no digit")
    pieces = []
    for sentence in sentences(text, language):
        piece = ""
        for word in sentence.split():
            blank = " "
            for part in cut_word(word, limit, size):
                if size(piece + blank + part) > limit + (not piece):
                    pieces, piece = [*pieces, piece], ""
                piece, blank = (piece + blank + part).strip(), ""
        pieces.append(piece)
    return list(filter(says, pieces))


def cut_word(word, limit, size):
    """What may be put apart of a word: all of it, unless its size is beyond `limit` and it is of a script without
    blanks."""
    if size(word) <= limit:
        return [word]
    parts = []
    for part in re.findall(r"[^、，,;；:：]+[、，,;；:：]*|[、，,;；:：]+", word):
        if size(part) <= limit:
            parts.append(part)
            continue
        for n, c in enumerate(part):
            stays = unicodedata.category(c) in CLINGING or not UNSPACED.match(c) and not UNSPACED.match(part[n - 1])
            if n and stays:
                parts[-1] += c
            else:
                parts.append(c)
    if max(map(size, parts)) > limit:
        unit = "bytes" if size is in_bytes else "letters"
        raise UserError(f"{word[:20]!r}… is a word of {size(word)} {unit}; the model reads {limit}")
    return parts


def says(piece):
    return any(map(str.isalnum, piece))


def sentences(text, language):
    """The sentences of a text, however long, in linear time."""
    import sentencex

    found, pieces = [], []  # what is whole, and the pieces of the last one
    spoken, size = False, 0  # of the last one: whether it says anything, its length
    for part in (part for chunk in chunks(text) for part in sentencex.segment(language, chunk)):
        for one in BRACKET.split(" ".join(part.split())):
            closing = re.match(r"[\"')\]]+(?= |$)", one) if pieces else None
            if closing:  # it closes what was opened before
                pieces[-1], one = pieces[-1] + closing[0], one[closing.end():].strip()
            if not one:
                continue
            goes_on = pieces and NOON.search(pieces[-1][-9:]) and (
                WHEN.match(one) or size < SHORT and AT.match(" ".join(pieces)))
            if pieces and not goes_on and spoken and says(one):
                found.append(" ".join(pieces))
                pieces, spoken, size = [], False, 0
            pieces.append(one)
            spoken, size = spoken or says(one), size + len(one) + 1
    return found + [" ".join(pieces)] * bool(pieces)


def chunks(text):
    """A text cut behind stops of scripts without blanks, of which sentencex takes the square of the time."""
    start = 0
    for stop in STOP.finditer(text):
        if stop.end() - start >= 1000:
            yield text[start:stop.end()]
            start = stop.end()
    yield text[start:]
