"""Numbers in the words of other languages than English, by num2words, and what it leaves out: decimals, groups of
digits, ordinals with a stop. What stands beside them, such as units, is in units.py."""

import re
import sys
from functools import lru_cache, partial

from trivox import units
from trivox.chinese import say_chinese
from trivox.errors import UserError
from trivox.units import STARTERS, WEAK, plain, say_units

LONGEST = {"am": 6}  # digits, of which num2words makes Amharic words; with more it does not end
NAMED = {"nb": "no", "nn": "no", "kk": "kz"}  # what num2words calls a language
# What is said of the mark before decimals, where num2words loses them, or zeros among them
POINTS = {"it": "virgola", "cy": "pwynt", "bn": "দশমিক", "tr": "virgül", "ar": "فاصلة", "fa": "ممیز", "id": "koma",
          "vi": "phẩy"}
# What is said of the stops in 1.2.3
DOTS = {"de": "Punkt", "fr": "point", "es": "punto", "it": "punto", "pt": "ponto", "nl": "punt", "ru": "точка",
        "pl": "kropka"}
MINUS = {"pl": "minus"}  # where num2words knows no number below zero
# The languages of ISO 639-1 and a few more: of one that num2words does not know, digits stay as they are
LANGUAGES = set("""aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz
ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja
jv jw ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne
ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv
sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu cmn haw yue""".split())
CHINESE = "zh", "cmn", "yue"  # the last in traditional characters
# Those that put a blank between groups of three digits, of which one is enough
SPACED = set("fr ru uk be bg cs sk pl sv no nb nn fi et lv lt hu kk hr sr sl".split())
BLANKS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?!\d|[.,]\d{3})")
NUMBER = re.compile(r"((?<!\S)-)?(\d++(?:[.,]\d++)*+)")
# Those that write an ordinal as a number with a stop
ORDINALS = set("de da no nb nn fi cs sk hu et lv sl hr sr is".split())
ORDINAL = re.compile(r"(?<![\w.,])([1-9]\d{0,2})\. (?=([^\W\d_]+))")
# German nouns that are counted so: a capital behind the stop begins no sentence there
COUNTED = set("""Jahrhundert Jahrhunderts Jahrhunderte Jahrtausend Jahrtausends Jh Januar Jänner Februar März April Mai
Juni Juli August September Oktober November Dezember Kapitel Band Akt Szene Tag Tages Woche Monat Jahr Jahres
Lebensjahr Geburtstag Klasse Platz Rang Stock Stockwerk Etage Auflage Ausgabe Weltkrieg Weltkriegs Weltkrieges
Bundesliga Liga Runde Satz Halbzeit Minute Stunde Mal Spieltag Semester Bezirk Armee Division Korps Infanterie
Wahlperiode Staffel Folge Etappe Advent""".split())
# Before any noun; the last leave its gender to the ordinal
ARTICLE = re.compile(r"\b(?:[dD](?:er|ie|as|e[mns])|[aAiI]m|[vV]om|[zZ]u[mr]|[bB]eim|[aAiI]ns"
                     r"|(?:[mdsk]?ein|ihr|unser|eur|jed|dies)e[mnrs]?|[mdskMDSK]?[eE]in|[iI]hr|unser|euer) $")
MINE = re.compile(r"\b(?:[mdskMDSK]?[eE]in|[iI]hr|unser|euer) $")
NEUTER = re.compile(r"Auto|Bein|Bier|Bild|Boot|Buch|Dorf|Fahrrad|Fenster|Foto|Geschäft|Glas|Haus|Jahr|Kapitel|Kind"
                    r"|Konzert|Land|Leben|Lied|Mal|Pferd|Rad|Spiel|Stück|Tor|Zimmer|\w+(?:chen|lein|ment|um|zeug)")
# 1., 2. und 3. Platz
LISTED = re.compile(r"(?<![\w.,])\d{1,3}\.(?:, \d{1,3}\.)+(?:,? (?:und|oder|bis|sowie) \d{1,3}\.)? (?=[A-ZÄÖÜ])")

# Russian days of months and years of four digits, which are ordinals, and the case that what follows asks for
MONTHS = "|".join(units.MONTHS["ru"])
DAY = r"(?:0?[1-9]|[12]\d|3[01])"
RUSSIAN = re.compile(rf"(?:(?<![\w.,-])|(?<=\d-))({DAY})(?= (?:{MONTHS})\b|(?: и | по |-){DAY} (?:{MONTHS})\b)"
                     r"|(?<![\w.,-])([12]\d{3})(?= (год(?:а|у|ом|е)?)\b)")
SINCE = re.compile(r"(?<=\b[Сс] )([12]\d{3})(?= (?:по|до) [12]\d{3} г(?:од|[.]|\b))"
                   r"|(?<=\b[Оо]т )([12]\d{3})(?= до [12]\d{3} г(?:од|[.]|\b))")
DURING = re.compile(r"(\b[Вв] )?(?<![\w.,-])([12]\d{3})-([12]\d{3}) ?(гг?\.|год(?:ах|ы|ов))(?!\w)")
CASES = {"год": "n", "года": "g", "году": "p", "годом": "i", "годе": "p"}
NUMERO = {"ru": "номер ", "uk": "номер ", "bg": "номер ", "be": "нумар ",
          "de": "Nummer ", "fr": "numéro ", "es": "número ", "it": "numero ", "pt": "número ", "nl": "nummer ",
          "pl": "numer "}  # what is said for №


def known(language):
    """What num2words calls a language, None where it has no numbers of it. Raises UserError for what is no language."""
    from num2words import CONVERTER_CLASSES

    names = {name.lower(): name for name in CONVERTER_CLASSES}
    whole, code = language.replace("-", "_").lower(), code_of(language)
    for name in (whole, code, NAMED.get(code)):
        if name in names:
            return names[name]
    if code not in (*LANGUAGES, "und"):
        raise UserError(f"there is no language {language!r}: give a code of ISO 639, such as "
                        "en, de, fr, es, ru or zh, or und, for texts that stay as they are")
    return None


def code_of(language):
    """The first part of a language's name: de of de-AT and De."""
    return re.split("[-_]", language)[0].lower()


@lru_cache(200)
def tell(language):
    """Once in a process, that digits stay."""
    print(f"note: num2words has no numbers of {language!r}: digits stay as they are", file=sys.stderr)


def say_foreign(text, language):
    """A text with its numbers in the words of another language: of Chinese by `chinese.py`, of the others by num2words.
    Where that has none of it, digits stay, and that is said. Raises UserError for what is no language."""
    code = code_of(language)
    if not re.search(r"\d", text):
        return say_units(text, code, words_of)
    name = known(language)
    text = BLANKS.sub(lambda number: number[0].replace(" ", "") if code in SPACED or number[0].count(" ") > 1
                      else number[0], text)
    if code in CHINESE:
        return " ".join(say_chinese(text, code == "yue" or bool(re.search("(?i)hant|tw|hk|mo", language))).split())
    if not name:
        tell(language)
        return text
    text = say_units(text, code, partial(say_plain, name=name))
    if code == "ru":
        text = DURING.sub(say_during, SINCE.sub(lambda match: ordinal_year(match[0], "g"), text))
        text = RUSSIAN.sub(say_russian, text)
    if code == "de":
        text = LISTED.sub(say_listed, text)
    if code in ORDINALS:
        text = ORDINAL.sub(lambda match: say_ordinal(match, code, name), text)
    return " ".join(NUMBER.sub(lambda match: say_number(match, name), text).split())


def say_ordinal(match, code, name):
    """19. Jahrhundert, before which a sentence does not end: neunzehntes, after im neunzehnten."""
    number, following = match.groups()
    before = match.string[max(0, match.start() - 30):match.start()]
    counts = code == "de" and (following in COUNTED or ARTICLE.search(before) and following not in STARTERS)
    if not following[0].islower() and not counts:
        return match[0]
    words = words_of(number, name, "ordinal") or words_of(number, name)
    if not words:
        return match[0]
    return words + german_ending(before, following) * (code == "de") + " "


def german_ending(before, following):
    """Of an ordinal, by what stands before it and by its noun: im zweiten, mein zweites Auto."""
    if WEAK.search(before):
        return "n"
    return ("s" if NEUTER.fullmatch(following) else "r") * bool(MINE.search(before) and following[0].isupper())


def say_listed(match):
    """Der 1., 2. und 3. Platz."""
    ending = "n" * bool(WEAK.search(match.string[max(0, match.start() - 30):match.start()]))
    return re.sub(r"(\d+)\.", lambda number: (words_of(number[1], "de", "ordinal") or number[1]) + ending, match[0])


def ordinal_year(digits, case, **more):
    return words_of(digits, "ru", "ordinal", case=case, gender="m", **more) or digits


def say_during(match):
    """В 1941-1945 гг.: в … первом - … пятом годах."""
    within, first, last, word = match.groups()
    case = "p" if within or word == "годах" else "g" if word == "годов" else "n"
    rest = match.string[match.end():]
    stop = "." * (word[-1] == "." and (not rest or rest[1:2].isupper()))
    word = {"p": "годах", "g": "годов", "n": "годы"}[case]
    return f"{within or ''}{ordinal_year(first, case)} - {ordinal_year(last, case)} {word}{stop}"


def say_russian(match):
    """третьего апреля, в тысяча девятьсот восемьдесят седьмом году."""
    day, year, word = match.groups()
    before = match.string[max(0, match.start() - 3):match.start()]
    if day:  # к пятому, по пятое, else пятого
        case = "d" if re.search(r"\b[Кк]о? $", before) else "n" if re.search(r"\bпо $", before) else "g"
        return words_of(str(int(day)), "ru", "ordinal", case=case, gender="n") or match[0]
    case = "d" if word == "году" and re.search(r"\b(?:[Кк]|[Пп]о) $", before) else CASES[word]
    return words_of(day or year, "ru", "ordinal", case=case, gender="n" if day else "m") or match[0]


def say_number(match, name):
    """A number, with points or commas before groups of three digits or before decimals; of what is no number, its
    digits."""
    minus, number = match.groups()
    grouped = plain(number)
    number = grouped if re.fullmatch(r"\d+(?:\.\d+)?", grouped) else number
    parts, dots = re.fullmatch(r"(0|[1-9]\d{0,14})(?:[.,](\d{1,15}))?", number), {".": DOTS.get(name, ".")}
    if parts and len(parts[1]) > LONGEST.get(name, 15):
        parts = None
    words = parts and decimal_words("-" * bool(minus), parts[1], parts[2], name)
    words = words or (minus or "") + " ".join(words_of(c, name) or c if c.isdecimal() else dots.get(c, c)
                                           for c in number)
    found, (start, end) = match.string, match.span()
    return " " * found[start - 1:start].isalnum() + words + " " * found[end:end + 1].isalnum()


def say_plain(number, form="cardinal", name="", **inflected):
    """The words of a number as Python writes it."""
    if "." not in number or form != "cardinal":
        return words_of(number, name, form, **inflected)
    minus, whole, decimals = re.fullmatch(r"(-?)(\d+)\.(\d+)", number).groups()
    return decimal_words(minus, whole, decimals, name)


def decimal_words(minus, whole, decimals, name):
    """A number with its decimals, digit by digit where num2words does not know them; None where it fails."""
    if not decimals or tells_decimals(name):
        return words_of(minus + whole + "." * bool(decimals) + (decimals or ""), name)
    point = POINTS.get(name.partition("_")[0])
    words = [words_of(minus + whole, name), point, *(words_of(c, name) for c in decimals)]
    return " ".join(words) if all(words) else None


@lru_cache(100)
def tells_decimals(name):
    """Whether num2words says four numbers so that each can be told from the others."""
    said = [words_of(number, name) for number in ("3", "3.5", "3.05", "0.7")]
    return all(said) and len({*said}) == 4 and not any("," in words for words in said) and said[1] != words_of(
        "3.55", name)


@lru_cache(10_000)
def words_of(number, name, form="cardinal", **inflected):
    """In the words of num2words; none where it fails."""
    from num2words import num2words

    if number.startswith("-") and name in MINUS:
        words = words_of(number[1:], name, form, **inflected)
        return words and f"{MINUS[name]} {words}"
    try:
        return str(num2words(number if "." in number else int(number), lang=name, to=form, **inflected))
    except Exception:  # each of its languages has its own limits and errors
        return None
