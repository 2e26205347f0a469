"""normalise.py, and of what it is made: numerals.py, dates.py, quantities.py, usage.py, foreign.py and markup.py.
normalised.tsv beside its readings, numbers beside num2words, letters beside anyascii; what must hold for any
text."""

import random
import re
import time
import unicodedata

import pytest
from anyascii import anyascii
from conftest import ROOT, refusal
from helpers import random_texts
from num2words import CONVERTER_CLASSES, num2words

from trivox import dates, normalise, numerals, quantities
from trivox.alphabet import Alphabet
from trivox.normalise import normalise_text
from trivox.open_speech import sentences

READINGS = [line.split("\t") for line in (ROOT / "tests" / "normalised.tsv").read_text().splitlines() if "\t" in line]

# ------------------------------------------------------------------------------------------------------------
# Readings


def test_readings():
    """Of normalised.tsv: what is asked for in the trackers of TTS projects, and what was wrong here."""
    found = {text: normalise_text(text, accents=True) for text, _ in READINGS}
    assert found == dict(READINGS) and len(READINGS) >= 240


def test_each_rule_is_reached(monkeypatch):
    """Each rule about digits finds something to say among them; none is there that nothing needs."""
    used = set()
    monkeypatch.setattr(normalise, "RULES", [(pattern, lambda match, n=n, say=say: (used.add(n), say(match))[1])
                                             for n, (pattern, say) in enumerate(normalise.RULES)])
    for text, _ in READINGS:
        normalise_text(text, accents=True)
    assert used == {*range(len(normalise.RULES))}


@pytest.mark.parametrize("text, spoken", [
    ("He has 3 cats.", "He has three cats."), ("in 1984, 1905 and 1800", None), ("It was 3985.", None),
    ("the 1990s", "the nineteen nineties"), ("1,234,567 of them", f"{num2words(1234567)} of them"),
    ("the 1st, 2nd, 3RD and 21st", "the first, second, third and twenty-first"), ("1,000th", "one thousandth"),
    ("pi is 3.14", f"pi is {num2words('3.14')}"), ("0.50", "zero point five zero"),
    ("-5 or 3-4", "minus five or three to four"), ("$29.95", "twenty-nine dollars, ninety-five cents"),
    ("£1.01", "one pound, one penny"), ("€0.99", "ninety-nine cents"), ("$1", "one dollar"), ("$0.00", "zero dollars"),
    ("$1,200", "one thousand, two hundred dollars"), ("£2.5 million", "two point five million pounds"),
    ("12.5% or 3 %", "twelve point five percent or three percent"), ("1.2.3", "one point two point three"),
    ("007", "zero zero seven"), ("1,23,4", "one, twenty-three, four"), ("5stars or 5S", "five stars or five S"),
    ("٣ and १२ and ３", "three and twelve and three"), ("2½ of ½", "two and one half of one half"),
    ("10² CO₂", "ten squared CO two"), ("MP3s, B2B, 4K", "MP threes, B two B, four K"), ("$", "dollar"),
    ("%", "percent"), ("café Zürich Ångström", "cafe Zurich Angstrom"), ("", ""), (" two\n lines ", "two lines"),
    ("“Yes” — ‘no’… it´s", "\"Yes\" -- 'no'... it's"), ("soft\u00adhyphen AT&T", "softhyphen AT and T"),
    ("12:45", "twelve forty-five"), ("[a] {b}", "(a) (b)"),
    ("no digit: kept (as it is); \"so\"!", "no digit: kept (as it is); \"so\"!"),
])
def test_normalised(text, spoken):
    if spoken is None:  # years as years, other numbers as such
        spoken = re.sub(r"\d+", lambda n: num2words(int(n[0]), to="year" if int(n[0]) < 2000 else "cardinal"), text)
    assert normalise_text(text) == spoken


@pytest.mark.parametrize("text, spoken", [
    ("CHAPTER I\n\nIt rained", "CHAPTER one. It rained"), ("It rained\nall night", "It rained all night"),
    ("He left,\n\nand sat.", "He left, and sat."), ("Is it?\n\nNo", "Is it? No"), ("# One\nSo it is", "One. So it is"),
    ("so:\n- an egg\n- a cup\n\nGo", "so: an egg. a cup. Go"), ("so -\n-5 or 6", "so - minus five or six"),
    ("> It is\n> so", "It is so"), ("Run:\n```sh\nls\n```\nthen go", "Run: ls. then go"),
    ("<h1>Eggs</h1><p>They are <b>good</b></p>", "Eggs. They are good"), ("one<br>two", "one two"),
])
def test_lines(text, spoken):
    """What ends with a paragraph, a heading or an item ends a sentence; where a line is only full, it goes on."""
    assert normalise_text(text) == spoken == normalise_text(spoken)


def test_numbers_are_num2words():
    rng = random.Random(0)
    for n in [0, 1, 1099, 2000, 10**15 - 1] + [rng.randrange(10 ** rng.randrange(1, 16)) for _ in range(200)]:
        if not (1100 <= n <= 1999 or 2010 <= n <= 2099):
            assert normalise_text(f"x {n} y") == f"x {num2words(n)} y"
        assert normalise_text(f"{n:,}") == num2words(n)  # no year has a comma
        assert normalise_text(f"{n}th") == num2words(n, to="ordinal")


def test_tables():
    """What stands in a table is said where it should be: units, currencies, labels, titles, roads, symbols."""
    wrong = {}

    def check(text, spoken):
        if (found := normalise_text(text, accents=True)) != spoken:
            wrong[text] = found, spoken

    for sign in quantities.UNITS:
        one, several = quantities.unit_names(sign)
        check(f"1 {sign} is", f"one {one} is")
        check(f"2.5 {sign} are", f"two point five {several} are")
    for sign, name in quantities.PER.items():
        check(f"5 kg/{sign}", f"five kilograms per {name}")
    for symbol, (one, several, *_) in quantities.MONEY.items():
        check(f"{symbol}1 or 2{symbol}", f"one {one} or two {several}")
    for place, name in quantities.PLACES.items():
        check(f"{place}$2", f"two {name} dollars")
    for code, symbol in quantities.CODES.items():
        check(f"2 {code}, {code} 2", ", ".join([normalise_text(f"{symbol}2")] * 2))
    for short, name in numerals.MAGNITUDES.items():
        check(f"$2{short}", f"two {name} dollars")
    for label, name in numerals.LABELS.items():
        check(f"in {label}. 2", f"in {name.capitalize() if label[0].isupper() else name} two")
    for month in dates.MONTHS:
        for short in (month, month[:3], month[:3] + "."):
            check(f"{short} 2, 2026", f"{month} second, twenty twenty-six")
            check(f"on 2 {short} 2026 he", f"on the second of {month}, twenty twenty-six he")
    for short, title in normalise.TITLES.items():
        check(f"the {short}. Poe", f"the {title} Poe" if short != "Sr" else "the Senior Poe")
    for short, title in ((short, normalise.TITLES[short]) for short in normalise.PLAIN):
        check(f"the {short} Poe", f"the {title} Poe")
    for short, road in normalise.ROADS.items():
        check(f"on Elm {short}. he sat", f"on Elm {road} he sat")
        check(f"on Elm {short}. He sat", f"on Elm {road}. He sat")
    for short, words in normalise.WORDS.items():
        check(f"Poe et {short}. so", f"Poe et {words} so")
    for short, words in normalise.SMALL.items():
        check(f"a {short} b", f"a {words} b")
    for short, name in normalise.CALENDAR.items():
        check(f"on {short}., he", f"on {name}, he")
        check(f"{short}.-{short}.", f"{name} to {name}.")
    for symbol, words in normalise.SYMBOLS.items():
        check(f"so {symbol} so", f"so {words} so")
    for pair, words in normalise.PAIRS.items():
        check(f"a {pair} b", f"a {normalise.SYMBOLS.get(words, words)} b")
    for n, name in enumerate(normalise.RULERS + normalise.COUNTED):
        check(f"{name} III", f"{name} the third" if n < len(normalise.RULERS) else f"{name} three")
    for mark, word in normalise.SPELT.items():
        if mark not in "()@#:,;!":
            check(f"www.a.org/a{mark}b", f"w w w dot a dot org slash a {word} b")
    assert wrong == {}


def test_roman_numerals():
    """All of them up to 89, as sums of their letters' values."""
    tens, ones = ["", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX"], ["", *"I II III IV V VI VII VIII IX".split()]
    for n in range(1, 90):
        if n not in (40, 50):  # sizes, and letters
            assert normalise_text(f"Chapter {tens[n // 10]}{ones[n % 10]}") == f"Chapter {num2words(n)}"


# ------------------------------------------------------------------------------------------------------------
# Letters and emoji

def test_latin_letters_are_those_of_english():
    """As anyascii writes them, whatever their marks; with `accents` they stay. Other scripts' letters stay in both."""
    for text, spoken in (("Straße Łodz Ærø Þór œuvre ÆON", "Strasse Lodz Aero Thor oeuvre AEON"), ("ﬁ ŉ ǆ", "fi 'n dz"),
                         ("Ǽ İ ơ", "Ae I o"), ("слово και 你好", "слово και 你好")):
        assert normalise_text(text) == spoken
    letters = [c for c in map(chr, range(0xc0, 0x250)) if c.isalpha()]
    assert all(1 not in Alphabet().ids(normalise_text(c)) for c in letters if anyascii(c).isalpha())
    assert normalise_text("Straße Łodz", accents=True) == "Straße Łodz"
    assert normalise_text("слово", accents=True) == "слово"


def test_emoji_have_names():
    """Unicode's, in the language that is asked for, apart from their neighbours."""
    assert normalise_text("So😀so. 👍🏽!") == "So grinning face so. thumbs up medium skin tone!"
    assert normalise_text("😀", language="de") == "grinsendes gesicht" and normalise_text("😀", language="xx")


# ------------------------------------------------------------------------------------------------------------
# Any text

def mixed_texts(count, seed):
    """Pieces that rules are about, beside each other as nobody would write them."""
    rng = random.Random(seed)
    pieces = [piece for text, _ in READINGS for piece in text.split()] + list(" .,-'\"()/$%°²½\u00a0\u200b👍ß你")
    return [rng.choice(("", " ", " ", "-")).join(rng.choices(pieces, k=rng.randrange(1, 9))) for _ in range(count)]


def test_normalising_anything():
    """No digit is left, white space is folded, and what is normalised stays so."""
    huge = [str(10**400), "9" * 10_000, f"${10**400}.5", "1." * 3000, "1," * 3000, "-" * 99 + "1", f"{10**60:,}"]
    for text in huge + random_texts(2000, seed=1) + mixed_texts(2000, 2):
        for accents in (True, False):
            spoken = normalise_text(text, accents)
            assert not re.search(r"\d", spoken) and spoken == " ".join(spoken.split()), text
            assert normalise_text(spoken, accents) == spoken, text
    assert normalise_text(str(10**400)) == " ".join(["one"] + ["zero"] * 400)


def test_nothing_vanishes():
    """Each word of letters that is no abbreviation is there afterwards, whatever stands beside it; and each character
    that is neither white space nor invisible is there, or has become a word or a mark."""
    rng = random.Random(3)
    words = sorted({word for _, text in sentences()[:500] for word in re.findall("[a-z]{5,}", text)})
    for text in mixed_texts(500, 4):
        word = rng.choice(words)
        for mixed in (f"{text} {word}", f"{word} {text}", f"{word}, {text}"):
            assert re.search(rf"\b{word}\b", normalise_text(mixed), re.I), mixed
    for c in map(chr, [*range(0x21, 0x7f), *range(0xa1, 0x3000), *range(0x1f000, 0x1fb00)]):
        kept = normalise_text(f"so {c} so", accents=True) != "so so"
        assert kept or unicodedata.category(c) in ("Cf", "Mn", "Zs", "Zl", "Zp", "Lo", "Mc", "Cn"), ascii(c)


@pytest.mark.parametrize("piece", [*"1a.,-'\"(/:$%@#*_~<&=^° ", "1.", "1,", "1-", "a.", "a@", "I ", "½", "²", "👍",
                                   "Mr. ", "MR ", "1 000 ", "5-10 ", "$1", "1$", "1:", "A.", "http://", "\u00a0", "1\"",
                                   "é"])
def test_time_is_linear(piece):
    """10 kB of one thing in less than a second or two, and twice as much in about twice the time."""
    times = []
    for size in (5_000, 20_000):
        text, start = piece * (size // len(piece)), time.process_time()
        normalise_text(text)
        times.append(time.process_time() - start)
    assert times[1] < 3 and times[1] < 9 * times[0] + 0.4


# Abbreviations that LJSpeech's transcripts have, as its README lists them, and some that it does not list
LJSPEECH = {"Mr": "Mister", "Mrs": "Missus", "Dr": "Doctor", "St": "Saint", "Co": "Company", "Jr": "Junior",
            "Maj": "Major", "Gen": "General", "Drs": "Doctors", "Rev": "Reverend", "Lt": "Lieutenant",
            "Hon": "Honorable", "Sgt": "Sergeant", "Capt": "Captain", "Esq": "Esquire", "Ltd": "Limited",
            "Col": "Colonel", "Ft": "Fort", "Inc": "Incorporated", "Messrs": "Messrs", "etc": "et cetera",
            "viz": "namely", "i.e": "that is", "e.g": "for example"}


def test_ljspeech_is_normalised():
    """Its 13,074 sentences stay as they are, but for the abbreviations among them, whose words stay in turn. Quick."""
    changed, start = 0, time.process_time()
    for _, text in sentences():
        spoken = normalise_text(text, accents=True)
        if spoken != text:
            changed += 1
            wanted = text.replace("Giltspur St.", "Giltspur Street")
            wanted = re.sub(rf"\b({'|'.join(map(re.escape, LJSPEECH))})\b\.?", lambda short: LJSPEECH[short[1]], wanted)
            assert re.findall(r"\w+", spoken) == re.findall(r"\w+", wanted), text
            assert normalise_text(spoken, accents=True) == spoken
    assert 600 < changed < 650 and time.process_time() - start < 5


# ------------------------------------------------------------------------------------------------------------
# Other languages

@pytest.mark.parametrize("language, text, spoken", [
    ("de", "3 Katzen, 3,5 kg und -5", "drei Katzen, drei Komma fünf Kilogramm und minus fünf"),
    ("de-AT", "1.234.567 oder 1 000 000", f"{num2words(1234567, lang='de')} oder {num2words(10**6, lang='de')}"),
    ("fr", "l'an 2026", "l'an deux mille vingt-six"), ("pt_BR", "21", "vinte e um"), ("nb", "7", "syv"),
    ("de", "007 z.B. Dr. 5%", "null null sieben zum Beispiel Doktor fünf Prozent"), ("zh", "没有数字。", "没有数字。"),
    ("en-GB", "$5", "five dollars"), ("EN", "$5", "five dollars"), ("De", "5,05", "fünf Komma null fünf"),
    ("it", "3,50 e 3", "tre virgola cinque zero e tre"), ("cy", "3.5", "tri pwynt pump"),
    ("de", "1.234,56 und 1.234", f"{num2words('1234.56', lang='de')} und {num2words(1234, lang='de')}"),
    ("es", "1,234.56", num2words("1234.56", lang="es")), ("fr", "1 234 pages, de 12 34",
     f"{num2words(1234, lang='fr')} pages, de douze trente-quatre"),
    ("fr", "1 234,5", num2words("1234.5", lang="fr")), ("es", "sala 1 234", "sala uno doscientos treinta y cuatro"),
    ("de", "Im 19. Jahrhundert. Es war 19. Dann", "Im neunzehnten Jahrhundert. Es war neunzehn. Dann"),
    ("de", "das 19. Jahrhundert, am 3. Mai", "das neunzehnte Jahrhundert, am dritten Mai"),
    ("ru", "5 книг, 3 года", "пять книг, три года"),
    ("ru", "3 апреля, 31 мая", "третьего апреля, тридцать первого мая"),
    ("ru", "В 1987 году, к 2000 году", "В тысяча девятьсот восемьдесят седьмом году, к двухтысячному году"),
    ("ru", "2023 год, с 1961 года", "две тысячи двадцать третий год, с тысяча девятьсот шестьдесят первого года"),
    ("ru", "дом № 5", "дом номер пять"), ("de", "Haus № 5", "Haus Nummer fünf"),
    ("de", "“Straße”…", '"Straße"...'), ("am", "1234567", None),
])
def test_languages(language, text, spoken):
    """Numbers are in their words, marks as in ASCII, and the rules of English off."""
    found = normalise_text(text, accents=True, language=language)
    assert found == spoken or spoken is None and not re.search(r"\d", found)


def test_all_languages_of_num2words():
    """None fails, and none leaves a digit."""
    for language in CONVERTER_CLASSES:
        found = normalise_text(f"x 7, 1984, -5, 3,14, 2.5, 1.000.000, 007, {'9' * 30}", language=language)
        assert not re.search(r"\d", found), (language, found)


def test_decimals_of_all_languages():
    """Each tells 3.5 from 3, 3.05 and 5, in whatever case it is named."""
    for language in CONVERTER_CLASSES:
        found = {normalise_text(text, language=language) for text in ("3", "3,5", "3,05", "5", "0,7")}
        assert len(found) == 5, (language, found)
        assert normalise_text("3,5", language=language.upper()) == normalise_text("3,5", language=language)


def test_a_language_without_numbers(capsys):
    """Its digits stay, which is said once; what is no language is refused."""
    assert [normalise_text("मेरे पास 5 हैं, 12", language=name) for name in ("hi", "hi", "ur")] == ["मेरे पास 5 हैं, 12"] * 3
    assert capsys.readouterr().err.count("digits stay") == 2
    assert "no language 'xx'" in refusal(lambda argv: normalise_text("5", language="xx"))
