"""A text as it is spoken: what every model and judge reads instead of what was written.

Marks of every kind become the few of ASCII, without those of HTML and Markdown (`trivox/markup.py`); addresses,
numbers, abbreviations and symbols become words (numbers by `numerals.py`, `dates.py` and `quantities.py`, of other
languages by `foreign.py`). What is in words stays as it is, so that a text may be normalised twice. Plain capitals
stay: whether FBI is spelt and NASA read is known to who pronounces them, espeak-ng for one, and transcripts have them
so. Initials, a.m., p.m. and U.S. keep their stops, as in LJSpeech's transcripts, and a dash is written as there.

Letters of other scripts, and symbols that have no word here, stay too; `trivox/alphabet.py` tells which of
them a model does not know.
"""

import html
import re
import unicodedata
from functools import lru_cache

from trivox import dates, numerals, quantities, usage
from trivox.dates import MONTHS
from trivox.foreign import NUMERO, code_of, say_foreign
from trivox.markup import TAG, one_line, untagged
from trivox.numerals import LABELS, STARTERS, ends, in_words
from trivox.units import UNITS

# ------------------------------------------------------------------------------------------------------------
# Marks

FOLDS = str.maketrans({
    **dict.fromkeys("‘’‚‛′‵´ʹʻʼʽ‹›＇", "'"), **dict.fromkeys("“”„‟″‶«»〝〞「」『』", '"'),
    **dict.fromkeys("‐‑‒–—―⁃", "-"), **dict.fromkeys("•‣●▪■◦∙", " - "), "№": "No. ", "⁄": "/", "∶": ":", "∕": "/",
    "∗": "*", "？": "? ", "！": "! ", "˚": "°", "‼": "!!", "⁉": "!?"})
BRACKETS = str.maketrans("[]{}", "()()")  # where letters are those of English, these are the only brackets known
DEGREE = re.compile(r"(?<=\d)( ?)º(?= ?[CF]\b)|(?<=\d\d)()º(?!\w)")
MINUS = re.compile(r"(?<=\d) ?− ?(?=\d)|(?<=\w) − (?=\w)")
NEGATIVE = re.compile(r"− (?=[$£€¥]?\.?\d)")
BELOW = re.compile(r"(?:(?<=[^\d\s]\s)|^)–(?=[$£€¥]?\.?\d)")
DASH = re.compile(r"(?:(?<!\s)\s++)?[—―]+\s*+|(?<!\s)\s++–\s*+|–\s++")  # which is a pause
INVISIBLE = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e"
                       r"\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]")
CLOSE_BLANK = re.compile(r"(?<=\d)[\u00a0\u2007\u2009\u202f](?=\d{3}(?!\d))")  # which groups digits
SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
SUPERSCRIPT = re.compile(r"([⁺⁻]?)([⁰¹²³⁴-⁹]+)(?![⁺⁻])")
SYMBOLS = {  # what is said of a symbol that no rule has read
    "&": "and", "@": "at", "#": "hash", "%": "percent", "+": "plus", "=": "equals", "/": "slash", "\\": "backslash",
    "*": "asterisk", "_": "underscore", "~": "tilde", "^": "caret", "<": "less than", ">": "greater than", "|": "-",
    "$": "dollar", "£": "pound", "€": "euro", "¥": "yen", "¢": "cent", "₹": "rupee", "§": "section", "¶": "paragraph",
    "©": "copyright", "®": "registered", "™": "trademark", "℠": "service mark", "°": "degrees", "×": "times",
    "÷": "divided by", "±": "plus or minus", "∓": "minus or plus", "√": "square root of", "∞": "infinity",
    "≈": "approximately", "≅": "approximately", "≠": "not equal to", "≤": "less than or equal to",
    "≥": "greater than or equal to", "→": "to", "←": "from", "↔": "to and from", "⇒": "implies", "↑": "up",
    "↓": "down", "‰": "per mille", "†": "dagger", "‡": "double dagger", "·": "-", "∑": "sum of", "∈": "in",
    "∂": "partial", "∆": "delta", "∫": "integral of", "✓": "check mark"}
SYMBOL = re.compile(" ?(" + "|".join(f"{re.escape(symbol)}+" for symbol in SYMBOLS) + ") ?")
SPACED_MINUS = re.compile(r"(?<=[=+×÷*] )- (?=[$£€¥]?\.?\d)"
                          r"|(?:(?<=^)|(?<=[\s(]))[B-HJ-Zb-z] - (?=\d[\d.]{0,9} ?[=+×÷*<>])")
PAIRS = {"<=": "less than or equal to", ">=": "greater than or equal to", "!=": "not equal to", "==": "equals",
         "=>": "to", "->": "to", "<-": "from", "+/-": "±", "&&": "and", "||": "or"}
PAIR = re.compile("|".join(rf" ?(?<![=<>!+-]){re.escape(pair)}(?![=<>-]) ?" for pair in PAIRS))
SHARP = re.compile(r"(?<![^\W_])([A-GJ])#(?!\w)")
MARKS = tuple("#*>")  # of Markdown, before a line
BUSY = re.compile(r"[^A-Za-z ,.;:'\"!?()-]|[a-z]--[a-z]|[A-Za-z]\.[A-Za-z]{2}|[ (]\.[A-Za-z]"
                  r"|^\.[A-Za-z]")  # what most sentences have none of

# ------------------------------------------------------------------------------------------------------------
# Abbreviations: without their stop, which stays only where it also ends the sentence

TITLES = {  # before a name
    "Mr": "Mister", "Mrs": "Missus", "Ms": "Miz", "Mx": "Mix", "Messrs": "Messrs", "Dr": "Doctor", "Drs": "Doctors",
    "Prof": "Professor", "Gen": "General", "Col": "Colonel", "Capt": "Captain", "Lt": "Lieutenant", "Sgt": "Sergeant",
    "Maj": "Major", "Cpl": "Corporal", "Pvt": "Private", "Cmdr": "Commander", "Adm": "Admiral", "Rev": "Reverend",
    "Hon": "Honorable", "Gov": "Governor", "Sen": "Senator", "Rep": "Representative", "Pres": "President",
    "Fr": "Father", "Supt": "Superintendent", "Det": "Detective", "Insp": "Inspector", "Amb": "Ambassador",
    "Msgr": "Monsignor", "Atty": "Attorney", "Mt": "Mount", "Ft": "Fort", "St": "Saint", "Sr": "Sister",
    "Asst": "Assistant"}
SAINTS = set("""Arnaud Aubyn Cloud Honore Joe Leger Nazaire Vrain Xavier Barbara Boniface
Brendan Cyril Gall Gallen Hilaire Hilda Hubert Ignatius
Malo Moritz Quentin Remo Rita
Agatha Agnes Alban Ambrose Andrew Anne Ann Anthony Augustine Barnabas Bartholomew Basil
Benedict Bernard Bernardino Botolph Bride Bridget Catherine Catharine Cecilia Christopher Clair Clare Clement Columba
Croix Cuthbert David Denis Dunstan Edmund Edward Elizabeth Elmo Etienne Francis Gabriel George Germain Giles Gregory
Helen Helena Helens Helier Ives James Jerome Joan John Johns Joseph Jude Kilda Kitts Laurence Lawrence Leonard Louis
Lucia Lucy Luke Margaret Mark Martin Martins Mary Matthew Maurice Michael Monica Moritz Nicholas Olave Pancras Patrick
Paul Pauls Peter Peters Petersburg Philip Pierre Sebastian Sepulchre Simon Stephen Stephens Swithin Teresa Thomas Tropez
Ursula Valentine Vincent Vitus Wilfrid""".split())
ROADS = {"St": "Street", "Ave": "Avenue", "Av": "Avenue", "Blvd": "Boulevard", "Rd": "Road", "Dr": "Drive",
         "Ln": "Lane", "Ct": "Court", "Pl": "Place", "Sq": "Square", "Hwy": "Highway", "Pkwy": "Parkway"}
WORDS = {"etc": "et cetera", "e.g": "for example", "i.e": "that is", "vs": "versus", "approx": "approximately",
         "cf": "compare", "viz": "namely", "al": "al", "a.k.a": "also known as", "Inc": "Incorporated",
         "Ltd": "Limited", "Co": "Company", "Corp": "Corporation", "Bros": "Brothers", "Dept": "Department",
         "dept": "department", "Univ": "University", "Assn": "Association", "Govt": "Government", "govt": "government",
         "Jr": "Junior", "Sr": "Senior", "Esq": "Esquire", "Bldg": "Building", "misc": "miscellaneous",
         "incl": "including", "excl": "excluding", "Ph.D": "PhD", "Tel": "Telephone", "tel": "telephone",
         "max": "maximum", "min": "minimum", "avg": "average", "est": "estimated", "abt": "about", "asst": "assistant",
         "mgr": "manager", "intl": "international", "natl": "national", "mfg": "manufacturing"}
NAMES = {"Max", "Min", "Avg", "Est"}  # but for what begins a sentence that goes on
CLOSELY = {"max", "min", "avg", "est", "Tel", "tel"}  # only where the sentence visibly goes on
SURE = {"Mr", "Mrs", "Ms", "Mx", "Dr", "Messrs", "Prof", "Capt", "Lt", "Sgt", "Cpl", "Cmdr"}  # whatever follows
FIRMS = {"Inc", "Ltd", "Co", "Corp"}
# Also without a stop, as in Britain, before a name
PLAIN = {"Mr", "Mrs", "Ms", "Dr", "Prof", "Messrs", "Capt", "Lt", "Sgt", "Cpl", "Maj", "Rev", "Mt"}
SMALL = {"w/o": "without", "w/": "with", "c/o": "care of", "n/a": "N A", "N/A": "N A", "and/or": "and or",
         "he/she": "he or she", "his/her": "his or her", "vs": "versus"}
WEEKDAYS = {"Mon": "Monday", "Tue": "Tuesday", "Tues": "Tuesday", "Wed": "Wednesday", "Thu": "Thursday",
            "Thur": "Thursday", "Thurs": "Thursday", "Fri": "Friday", "Sat": "Saturday", "Sun": "Sunday"}
CALENDAR = WEEKDAYS | {month[:3]: month for month in MONTHS if month != "May"} | {"Sept": "September"}
ABBREVIATION = re.compile(r"(?<![\w.@])([A-Za-z]\.[a-z]\.[a-z]|[A-Za-z]\.[a-z]|Ph\.D|[A-Za-z][a-z]{1,6})\.")
TITLE = re.compile(rf"(?<![\w.])({'|'.join(PLAIN)}|St)(?= [A-Z]| and (?:Mrs?|Ms|Dr|Miss)\b)")
ROADWAY = re.compile(r"(?<=[a-z] )(St|Ave|Rd|Blvd|Ln|Hwy|Pkwy)(?![\w.'/-]| [A-Z])")
GLUED = re.compile(rf"\b({'|'.join(SURE)}|etc|e\.g|i\.e)\.(?=[A-Za-z])")  # Mr.Poe
SHORT = re.compile(rf"(?<![\w/])({'|'.join(SMALL)})(?![\w/.])")
NUMERAL = re.compile(r"\b([Vv]ols?|[Cc]h(?:ap)?|[Pp]p?|[Pp]t|[Ff]igs?|[Ss]ec)\. ([ivxlc]{1,9})"
                     r"(?:-([ivxlc]{1,9}))?(?!\w)")
RANGE_ENDS = re.compile(rf"(?:\d|\d ?[ap]\.?m\.?|\d[%°'\"€])$|\b(?:{'|'.join(CALENDAR)})\.?$")
RANGE_STARTS = re.compile(rf"[$£€]?\d|(?:{'|'.join(CALENDAR)})\b")
WHEN = re.compile(r"\b(?:[Ii]n|[Oo]n|since|until|till|late|early|mid|last|next|by|of|this|every|through)[ -]$")
SPAN = re.compile(rf"(?<!\w)({'|'.join(CALENDAR)})\.? ?- ?({'|'.join(CALENDAR)})(?!\w)(\.?)")  # Mon-Fri

# ------------------------------------------------------------------------------------------------------------
# Roman numerals, where they are safe

ROMAN = (r"(?=[IVXLC])(?:C{1,3}(?=[IVXL]))?(?:X[LC](?=[IVX])|L(?=[IVX]))?X{0,3}(?:IX|IV|V?I{0,3})"
         r"(?![^\W_]|[.-][A-Z])")  # of few hundreds
RULERS = """Henry Louis Charles George Edward Elizabeth James William Mary Richard Philip Pius Paul Benedict Napoleon
Leo Gregory Innocent Clement Alexander Nicholas Peter Catherine Ferdinand Francis Frederick Wilhelm Leopold Albert
Alfonso Carlos Felipe Gustav Christian Haakon Olav Harald Otto Ivan Ptolemy Ramses Ramesses Thutmose Amenhotep Darius
Xerxes Cyrus Urban Boniface Sixtus Julius Adrian Hadrian Robert David Margaret Mehmed Murad Selim Constantine Justinian
Theodosius Emmanuel Umberto Rama Edmund Cleopatra Sigismund Maximilian Rudolf Eric Canute Joseph John Stephen
Baldwin""".split()
COUNTED = """War Chapter Part Act Scene Section Volume Book Article Phase Type Class Level Title Appendix Figure Table
Episode Season Bowl Stage Grade Unit Division Corps Mark Apollo Gemini Olympiad Vatican Fantasy Rocky Saturn Lesson
Module Group Category Annex Schedule Round Tier Pentium Canto Psalm Sonnet Letter Lecture Plate""".split()
NUMBERED = re.compile(rf"\b({'|'.join(RULERS + COUNTED + [*map(str.upper, COUNTED)])}|WW|(?:[Vv]ol|[Cc]h|[Pp]t)\.)"
                      rf" ({ROMAN})")
ALSO_LETTERS = {"Type", "Class", "Figure", "Table", "Group", "Category", "Annex", "Appendix", "Section", "Grade"}
VERBS = {"of", "was", "is", "and", "had", "has", "died", "in", "who", "were", "began", "ended", "or"}  # of Charles I
PRONOUN = {"was", "had", "has", "is", "were"}  # before which I is a number only behind what is sure:
RANK = re.compile(r"\b(?:King|Queen|Pope|Emperor|Empress|Tsar|Czar|Kaiser|Sultan|Shah|Pharaoh|Duke|Prince|[Oo]f) $")
SURELY = {"War", "WW", "Chapter", "Act", "Part", "Scene", "Volume", "Book", "Psalm", "Canto", "Sonnet", "Phase"}
DIVIDED = {*COUNTED, "scene", "verse", "part", "section", "page", "chapter", "line"}  # Act I scene 2
SHORTER = {"WW": "World War", "vol.": "volume", "Vol.": "Volume", "ch.": "chapter", "Ch.": "Chapter",
           "pt.": "part", "Pt.": "Part"}
VALUES = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}

# ------------------------------------------------------------------------------------------------------------
# Addresses

LABEL = r"[^\W_](?:[\w-]{0,62})"
SUFFIXES = ("com|org|net|edu|gov|mil|int|info|biz|io|ai|app|dev|co|tv|me|us|uk|de|fr|es|it|nl|ch|at|be|se|no|fi|dk|pl"
            "|ru|jp|cn|in|au|ca|br|eu|xyz|online|site")
FILES = "txt|pdf|csv|json|html|htm|xml|py|js|ts|css|md|doc|docx|xls|xlsx|jpg|jpeg|png|gif|wav|exe|zip|yaml|yml|sh|cpp"
EMAIL = re.compile(rf"(?<![\w.+@-])[\w.+-]{{1,64}}@{LABEL}(?:\.{LABEL}){{1,8}}(?![\w@])")
URL = re.compile(r"(?<![\w@.])(?:(?:https?|ftp)://|www\.(?=\w))[^\s<>\"|]++")
DOMAIN = re.compile(rf"(?<![\w@./-])(?:[A-Za-z0-9][A-Za-z0-9-]{{0,62}}\.){{1,6}}"
                    rf"(?:(?:{SUFFIXES})(?![\w-]|\.\w|@)(?:/[^\s<>\"|]*+)?|(?:{FILES})(?![\w-]))")
DOTTED = re.compile(rf"(?<![\w.,;:!?'\")])\.(?=(?:com|org|net|edu|gov|NET|{FILES}|mp[34]|flac|ogg|env|git|gitignore|ini"
                    r"|cfg|toml|log|bin|dll|tar|gz|rar|\w{2,6}rc)(?!\w)"
                    r"|[a-z]{2,5} (?:domain|file|extension|site|address|format)(?:s|es)?\b)")
HANDLE = re.compile(r"(?<![\w@])@(?=\w)")
HASHTAG = re.compile(r"(?<![\w#])#([^\W\d]\w{0,99})")
SPELT = {".": "dot", "-": "dash", "_": "underscore", "/": "slash", "@": "at", "+": "plus", "?": "question mark",
         "=": "equals", "&": "and", "#": "hash", "%": "percent", "~": "tilde", ":": "colon", ",": "comma",
         ";": "semicolon", "!": "exclamation mark", "*": "asterisk", "(": "(", ")": ")"}
EMPHASIS = re.compile(r"(?<![\w*_~`])(\*{1,3}|_{1,3}|~~|`{1,3})(?=[^\s*_~`])([^*_~`]{1,500}?)(?<=\S)\1(?![\w*_~`])")
RULE = re.compile(r"(?<![-=*_~#])([-=*_~#])\1{2,}+(?=\s|$)")  # a line of marks


def address(match):
    """An e-mail's, a page's or a file's, with its marks in words; what ends a sentence is none of it."""
    text = re.sub(r"^(https?|ftp)://", "", match[0])
    end = len(text.rstrip(".,;:!?)]'"))
    text, rest = text[:end], text[end:]
    text = re.sub(r"^www(?=\.)", "w w w", text.rstrip("/") or text)
    return "".join(f" {SPELT[c]} " if c in SPELT else c for c in text) + rest


def say_addresses(text):
    if "@" in text:
        text = HANDLE.sub("at ", EMAIL.sub(address, text))
    if "#" in text:
        text = HASHTAG.sub(lambda tag: "hashtag " + re.sub(r"(?<=[a-z])(?=[A-Z])", " ", tag[1]).replace("_", " "), text)
    if "." in text:
        text = DOTTED.sub("dot ", DOMAIN.sub(address, URL.sub(address, text)))
    return text


# ------------------------------------------------------------------------------------------------------------
# The way of a text

PASSES = 12  # two for nearly all texts, and at most four for 30,000 random ones


def normalise_text(text, accents=False, language="en"):
    """A text as it is spoken: numbers, amounts, dates, times, units, addresses, abbreviations and symbols in words,
    quotes, dashes and ellipses as in ASCII, emoji by their names, white space folded. What is invisible is left out,
    and so are the marks of Markdown and HTML around what they emphasise, and http:// in front of an address.

    accents: whether letters stay as they are; otherwise Latin ones become those of English, such as strasse. language:
    of the words, as num2words calls it, such as "de"; of others than English, only numbers are put in words. Texts of
    "und", which is none, such as phonemes, stay as they are but for white space.

    Raises UserError for numbers in what is no language; where it is not known, digits stay.
    """
    if language == "und":
        return " ".join(text.split())
    for _ in range(PASSES):  # what is normalised has to stay so, and words that were apart may have met
        before, text = text, once(text, accents, language)
        if text == before:
            break
    return text


def once(text, accents, language):
    """What normalise_text does, once."""
    english = code_of(language) == "en"
    if "&" in text:
        text = re.sub(r"&(?:[A-Za-z]{2,8}|#\d{1,7});", lambda entity: html.unescape(entity[0]), text)
    if english and "<" in text:
        text = untagged(text)
    if "\n" in text or text.startswith(MARKS):
        text = one_line(text)
    if not text.isascii():
        text = fold(text, accents, english, language)
    elif not text.isprintable():
        text = INVISIBLE.sub("", text)
    text = re.sub(r" ?\.(?: \.){2,}", "...", " ".join((text if accents else text.translate(BRACKETS)).split()))
    if not english:
        return say_foreign(text, language)
    text = re.sub(r"\bWW(?=(?:II?|[12])\b)", "World War ", calm(text))
    if "/" in text or "vs" in text:
        text = SHORT.sub(lambda short: SMALL[short[1]], text)
    if BUSY.search(text):
        text = GLUED.sub(r"\1. ", say_symbols(say_numbers(say_marks(say_addresses(text)))))
    if "-" in text:
        text = SPAN.sub(say_span, text)
    if re.search("[A-Za-z.] [IVXLC]", text):
        text = NUMBERED.sub(say_roman, text)
    text = NUMERAL.sub(say_numeral, text)
    text = ABBREVIATION.sub(say_abbreviation, ROADWAY.sub(say_road, TITLE.sub(say_title, text)))
    return " ".join(text.split())


def fold(text, accents, english, language):
    """A text that is not in ASCII, with marks, digits, and, unless `accents`, Latin letters as in ASCII."""
    text = BELOW.sub("-", text) if english else text
    text = DASH.sub(say_dash, CLOSE_BLANK.sub("," if english else "", text))
    if code_of(language) in UNITS:
        text = re.sub(r"(?<!\w)[nN]\.?[º°]\s?(?=\d)", "№", text)
    text = name_emoji(text.replace("№", NUMERO.get(code_of(language), "№")), language)
    if english:
        text = text.replace("≠", "!=")  # which is not to become = and a stroke
        text = re.sub(r"(?<=[\d)]) ?[∙⋅] ?(?=[\d(])|(?<=\d) · (?=\d)", "×", re.sub(r"(?<=\d)·(?=\d)", ".", text))
        text = re.sub("[™℠]", lambda mark: f" {SYMBOLS[mark[0]]}", text)  # before it is two letters
        text = SUPERSCRIPT.sub(say_superscript, NEGATIVE.sub("-", MINUS.sub(" minus ", DEGREE.sub(r"\1\2°", text))))
    elif code_of(language) in UNITS:
        text = re.sub(r"(?<=\d)(\s?)º(?=\s?[CF]\b)", r"\1°", text)
        text = re.sub(r"(?<=\d)(\s?[kк]?[mм])²(?!\w)", r"\1^2", re.sub(r"(?<=\d)(\s?m)³(?!\w)", r"\1^3", text))
    text = INVISIBLE.sub("", text).replace("−", "-").translate(FOLDS)
    text = "".join(number_apart(c, following) for c, following in zip(text, text[1:] + " "))
    text = unicodedata.normalize("NFKC" if accents else "NFKD", text).translate(FOLDS)
    if not accents:
        text = re.sub(r"[^\W\d_]", in_english_letters, text)
        text = re.sub(r"(?<=[A-Za-z])[\u0300-\u036f]+", "", text)
    return re.sub(r"\d", lambda digit: str(int(digit[0])), text)  # of whatever script


def say_dash(match):
    """A pause as LJSpeech writes it; between bounds, such as hours, it is that of a range."""
    before, after = match.string[max(0, match.start() - 6):match.start()], match.string[match.end():match.end() + 6]
    bounds = RANGE_ENDS.search(before) and RANGE_STARTS.match(after)
    if bounds and ("—" not in match[0] or match[0] == "—"):
        return " - " if match[0][0].isspace() else "-"
    return " " * bool(before.strip("([\"'“‘")) + "--" + " " * (bool(after) and not re.match("[\"'”’»)?!.,;:]", after)
                                              or match[0][-1].isspace())


def number_apart(c, following):
    """A character that is a number, ½ as 1/2 and ③ as 3, apart from its neighbours: CO₂ is not CO2."""
    if unicodedata.category(c) != "No":
        return c
    return f" {unicodedata.normalize('NFKC', c).replace('⁄', '/')}" + " " * following.isalnum()


def say_superscript(match):
    """A power behind a number, a unit or a variable; the number of a footnote behind a word."""
    power, before = match[0].translate(SUPER), match.string[max(0, match.start() - 4):match.start()]
    return f"^{power}" if re.search(r"(?:\d|\)|(?<![^\W_])[^\W_]{1,3})$", before) else (
        f" {power}" + " " * match.string[match.end():match.end() + 1].isalnum())


def name_emoji(text, language):
    """Emoji by the names that Unicode gives them, in the language where emoji has it."""
    if max(text) < "\u2300" and "\ufe0f" not in text:
        return text
    import emoji

    code = code_of(language)
    code = code if code in emoji.LANGUAGES else "en"
    emoji.config.load_language(code)

    def name(chars, data):
        if chars.strip("\ufe0f") in SYMBOLS or ord(chars[0]) in FOLDS:
            return chars
        name = data.get(code, data["en"]).strip(":").replace("_", " ")
        return f" {name}" + " " * text[data["match_end"]:data["match_end"] + 1].isalnum()

    return emoji.replace_emoji(text, name)


def in_english_letters(match):
    """A Latin letter that is none of English as those that stand for it: ß ss, Ł L, Æ Ae."""
    c, following = match[0], match.string[match.end():match.end() + 1]
    if c.isascii():
        return c
    letters = english_letters(c)
    if len(letters) > 1 and c.isupper():
        return letters.upper() if following.isupper() else letters.capitalize()
    return letters


@lru_cache(4096)
def english_letters(c):
    from anyascii import anyascii

    letters = anyascii(c)
    return letters if letters.isalpha() and "LATIN" in unicodedata.name(c, "") else c


# The rules of what digits say, in the order in which they are tried: what is longest and surest first. What a rule has
# read has no digit any more, so that no other reads it.
RULES = [(getattr(room, name), getattr(room, f"say_{name.lower()}")) for room, names in (
    (usage, "VERSE DIRECTION TYPE MILLIONS DECADES HUNDREDS OUT_OF EVENLY METRE AIRCRAFT CVE YEARS STANDARD SEASON"),
    (quantities, "PLACE FEET"), (numerals, "PHONE TOLL_FREE CALLED FLIGHT"), (quantities, "THOUSANDS"),
    (dates, "ISO_DATE SLASH_DATE SHORT_DATE MONTH_DAY DAY_MONTH MONTH_YEAR YEAR"), (numerals, "CHAIN"),
    (dates, "HOUR_RANGE CLOCK HOUR MILITARY LASTED RATIO"),
    (quantities, "NOTES SPREAD CODE_BEFORE PRICE PRICE_BEHIND CENTS FRACTION SCIENTIFIC"),
    (numerals, "LABEL HASH DECADE SHORT_YEAR BY TIMES DIVIDED RANGE"), (quantities, "SIZE SQUARE POWERED UNIT RATE"),
    (numerals, "POWER COUNT"),
) for name in names.split()]


def say_numbers(text):
    """With all that digits say in words, apart from letters beside them."""
    if not re.search("[0-9]", text):
        return text

    def apart(say):
        def sub(match):
            words, (start, end) = say(match), match.span()
            if words == match[0]:
                return words
            before, after = match.string[start - 1:start].isalnum(), match.string[end:end + 1].isalnum()
            return " " * (before and words[0].isalnum()) + words + " " * (after and words[-1].isalnum())
        return sub

    text = quantities.say_inches(text)
    for pattern, say in RULES:
        text = pattern.sub(apart(say), text)
    return text


def say_marks(text):
    """Without markup, and with signs of several characters in words."""
    text = TAG.sub(r"(\1)", RULE.sub(" - ", EMPHASIS.sub(r"\2", text)))
    if "`" in text:  # as in TeX
        text = text.replace("``", '"').replace("''", '"').replace("`", "'")
    text = PAIR.sub(lambda pair: f" {PAIRS[pair[0].strip()]} ".replace(" ± ", " ±"), text)
    text = re.sub(r"\bC\+\+", "C plus plus", SHARP.sub(r"\1 sharp", text))
    text = re.sub(r"((?<![^\W_])\w) ?\* ?(?=\w(?![^\W_]))|([\d)])\*(?=[\w(])", r"\1\2 times ", text)
    text = re.sub(r"(?<=\))/(?=[\w(])", " over ", text)
    text = SPACED_MINUS.sub(lambda minus: "-" if minus[0] == "- " else f"{minus[0][0]} minus ", text)
    text = re.sub(r"(?<=[^\W_])--(?=[^\W_\d])", " -- ", text)
    text = re.sub(r"(?<=\d)\*\*(?=\d)", "^", text)
    text = re.sub(r"(?<=[^\W_])\^(?=[A-Za-z])", " to the power of ", text)
    text = re.sub(r"(?<=\d) ?~ ?(?=\d)", "-", text)
    text = re.sub(r"(?<![^\s(])~ ?(?=[$£€]?\d)", "about ", text)
    return " ".join(text.split())


def say_symbols(text):
    """What no rule has read, in words, once for a row of them."""
    def say(symbol):
        following = text[symbol.end():symbol.end() + 1]
        return f" {SYMBOLS[symbol[1][0]]}" + " " * (following not in tuple(".,;:!?)"))

    return SYMBOL.sub(say, text)


def calm(text):
    """A SENTENCE OF CAPITALS in small letters, as IT and US in it are no names."""
    if not text.isupper() or len(words := re.findall("[A-Z]{2,}", text)) < 4 or not {*words} & LOUD:
        return text
    def lower(match):
        word = match[0]
        kept = word == "I" or word in CAPITALS or word == "US" and match.string[:match.start()].endswith("THE ") or (
            len(word) < 5 and not {*word} & {*"AEIOUY"} and word.capitalize() not in SHORTENED)
        return word if kept else word.lower()

    text = re.sub(rf"\b({'|'.join(map(str.upper, RULERS + COUNTED))}) {ROMAN}|\b[A-Z]{{2,}}\b|[A-Z]", lambda match: (
        match[0].replace(match[1], match[1].capitalize()) if match[1] else lower(match)), text)
    return re.sub(r"(?:^|[.!?] )\W*[a-z]", lambda start: start[0].upper(), text)


LOUD = {word.upper() for word in STARTERS}
CAPITALS = set("""UK USA FBI CIA BBC NASA NATO UN EU TV UFO AIDS USSR UNESCO UNICEF ABC IBM AI""".split())
SHORTENED = {*TITLES, *ROADS, *WORDS, *CALENDAR, "Vs", "Shh", "Hmm", "Pst", "Psst", "Tsk", "Brr", "Grr", "Mmm", "Nth",
             "Th", "Rd", "Nd"}  # without a vowel, and yet in small letters


def value(numeral):
    """A Roman numeral's."""
    values = [VALUES[c] for c in numeral]
    return sum(-v if v < w else v for v, w in zip(values, [*values[1:], 0]))


def say_numeral(match):
    """vol. xii, pp. iv-x."""
    numerals = [numeral.upper() for numeral in match.groups()[1:] if numeral]
    if not all(re.fullmatch(ROMAN, numeral) for numeral in numerals):
        return match[0]
    label = SHORTER.get(f"{match[1]}.") or LABELS[match[1].lower()]
    words = f"{label} " + " to ".join(in_words(value(numeral)) for numeral in numerals)
    return words.capitalize() if match[1][0].isupper() else words


LOUDLY = {name.upper() for name in COUNTED}


def say_roman(match):
    """Henry the eighth, World War two; not the I of "Charles, I think", nor an initial."""
    name, numeral = match.groups()
    rest = match.string[match.end():match.end() + 30]
    kind = name.capitalize() if name in LOUDLY else name
    if len(numeral) == 1:
        word, before = re.match(" ([A-Za-z]+)", rest), match.string[max(0, match.start() - 12):match.start()]
        if numeral == "I" and kind not in ("War", "WW") and word and (
                word[1] not in (VERBS if kind in RULERS else VERBS | DIVIDED)
                or word[1] in PRONOUN and (kind not in SURELY or word[1] == "had") and not RANK.search(before)):
            return match[0]
        if rest[:1] == "." and kind in RULERS and not ends(match, 1) or numeral != "I" and kind in ALSO_LETTERS:
            return match[0]
    number = value(numeral)
    return f"{name} the {in_words(number, 'ordinal')}" if name in RULERS else (
        f"{SHORTER.get(name, name)} {in_words(number)}")


ROAD = re.compile(r"([A-Z][a-z']+|(?:[a-z]+-)?(?:first|second|third)"
                  r"|[a-z-]*(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|teen|tie|hundred)th) $")
HOUSE = re.compile(r"(?:teen|ty|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred)"
                   r"(?: [A-Z][a-z.]*){1,3} $")  # a number in front of a road's name


NO_ROAD = {"Dear", "Hello", "Hi", "Thanks", "Mount", "Mont", "Fort", "Port", "Cape", "Lake", "Rue", "General", "Miss"}
ON_ROAD = re.compile(r"\b(?:[Oo]n|[Ii]n|[Aa]t|down|up|along|from|to|near) (?:[A-Z]\w+ )+$")


def is_road(match, named):
    """Whether St. or Dr. is a street or drive: behind its name, and not before that of a saint or doctor."""
    before = match.string[max(0, match.start() - 40):match.start()]
    road = ROAD.search(before)
    following = re.match(r"\.? ([A-Z][a-z]+)", match.string[match.end():match.end() + 30])
    no_saint = match[1] == "St" and following and not {following[1], following[1].removesuffix("s")} & SAINTS
    return road and road[1] not in STARTERS | NO_ROAD and (
        not named or ends(match) or no_saint or HOUSE.search(before))


def say_span(match):
    return f"{CALENDAR[match[1]]} to {CALENDAR[match[2]]}" + match[3] * ends(match)


def say_title(match):
    """One without a stop, before a name."""
    return ROADS["St"] if match[1] == "St" and is_road(match, True) else TITLES[match[1]]


def say_road(match):
    """One without a stop, behind its name: 10 Downing St, London."""
    return ROADS[match[1]] if is_road(match, False) else match[0]


def say_abbreviation(match):
    """Its words, if it is one here: a title before a name, a road behind one, a day or month in mid-sentence. The stop
    stays where it ends the sentence too."""
    word, before = match[1], match.string[max(0, match.start() - 40):match.start()]
    rest = match.string[match.end():match.end() + 40]
    named, goes_on = re.match(" [A-Z]", rest), re.match(r"[,;:)-]| [a-z(]", rest)
    stop = "." if ends(match) else ""
    if word in ROADS and (word not in TITLES or is_road(match, named)):
        if ON_ROAD.search(before) and re.match(" [A-Z][a-z]+ [a-z]", rest) and not HOUSE.search(before):
            stop = "."
        return ROADS[word] + stop if ROAD.search(before) else match[0]
    if word in NAMES and not (re.match(" [a-z]", rest) and re.search(r"(?:^|[.!?:] [\"'(]*)$", before)):
        return match[0]
    title = word.capitalize() if word in ("mr", "mrs", "ms", "dr", "prof") else word  # as `calm` leaves them
    if title in TITLES and (named and word != "Sr" or title in SURE):
        following = re.match(r" ([A-Za-z]+)", rest)
        if following and following[1] in ("Mr", "Mrs", "Ms", "Dr", "Mister", "Missus", "Miz"):
            return TITLES[title]
        if title == "Hon" and stop and following and following[1] != "Will" and not before.endswith("he "):
            return match[0]
        alone = not rest.strip("\"')] ") or stop and re.search(r"\b(?:the|an?) $", before) and (
            not following or following[1] != "Will")
        return TITLES[title] + "." * bool(alone)
    if word in CALENDAR:
        if word in WEEKDAYS and before.endswith("the "):
            return match[0]
        return CALENDAR[word] + "." * (not goes_on) if goes_on or stop and WHEN.search(before) else match[0]
    said = WORDS.get(word) or WORDS.get(word.lower(), "").capitalize()
    if not said or word in CLOSELY and not goes_on or word == "al" and not before.endswith("et "):
        return match[0]
    if word in FIRMS and re.match(" [A-Z][a-z]+ [a-z]", rest):
        stop = "."  # a sentence, sooner than a name
    before_capital = re.match(r"[\"')\]]* [\"'(]*[A-Z]", rest)
    return said + ("." if word == "etc" and (rest.startswith("..") or before_capital) else stop)
