"""Numbers in set phrases, where they are read as nowhere else: rules as those of `trivox/numerals.py`."""

import re

from trivox.numerals import FREE, by_digits, in_words, many, number_words, said, year_words
from trivox.quantities import COMPASS

BOOKS = """Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth Samuel Kings Chronicles Ezra Nehemiah Esther
Job Psalm Psalms Proverbs Ecclesiastes Song Isaiah Jeremiah Lamentations Ezekiel Daniel Hosea Joel Amos Obadiah Jonah
Micah Nahum Habakkuk Zephaniah Haggai Zechariah Malachi Matthew Mark Luke John Acts Romans Corinthians Galatians
Ephesians Philippians Colossians Thessalonians Timothy Titus Philemon Hebrews James Peter Jude Revelation Tobit Judith
Maccabees Wisdom Sirach Baruch Quran Koran Surah Sura Gita""".split()
BOOK = {"Gen": "Genesis", "Ex": "Exodus", "Exod": "Exodus", "Lev": "Leviticus", "Num": "Numbers", "Deut": "Deuteronomy",
        "Josh": "Joshua", "Judg": "Judges", "Sam": "Samuel", "Kgs": "Kings", "Chr": "Chronicles", "Chron": "Chronicles",
        "Neh": "Nehemiah", "Ps": "Psalm", "Pss": "Psalms", "Prov": "Proverbs", "Eccl": "Ecclesiastes", "Isa": "Isaiah",
        "Jer": "Jeremiah", "Lam": "Lamentations", "Ezek": "Ezekiel", "Dan": "Daniel", "Hos": "Hosea", "Mic": "Micah",
        "Hab": "Habakkuk", "Zech": "Zechariah", "Mal": "Malachi", "Matt": "Matthew", "Mt": "Matthew", "Mk": "Mark",
        "Lk": "Luke", "Jn": "John", "Rom": "Romans", "Cor": "Corinthians", "Gal": "Galatians", "Eph": "Ephesians",
        "Phil": "Philippians", "Col": "Colossians", "Thess": "Thessalonians", "Tim": "Timothy", "Heb": "Hebrews",
        "Jas": "James", "Pet": "Peter", "Rev": "Revelation"}
STREETS = "St|Ave|Blvd|Rd|Dr|Ln|Ct|Pl|Hwy|Pkwy|Street|Avenue|Boulevard|Road|Drive|Lane|Court|Place|Highway|Parkway"
MANY = """people users views subscribers followers downloads copies units dollars pounds euros jobs homes visitors
children workers barrels deaths cases women men voters members customers viewers households tourists residents
inhabitants passengers refugees years records lines parameters""".split()

ORDER = {"1": "First ", "2": "Second ", "3": "Third "}
VERSE = re.compile(r"(?:(?<![\w.,:-])([123]) (?=Sam|Kin|Kgs|Chr|Cor|Thes|Tim|Pet|Joh|Jn|Mac))?\b"
                   rf"({'|'.join(BOOKS)}|(?:{'|'.join(BOOK)})\b\.?) (\d{{1,3}}):([1-9]\d{{0,2}})(?:-(\d{{1,3}}))?"
                   r"(?![\w:]|[.,/-]\d| ?[AaPp]\.?[Mm]\b)")
DIRECTION = re.compile(rf"(?<=\d )([NSEW])\.? (?=(?:[A-Z][a-z]+|\d{{1,3}}(?:st|nd|rd|th))(?: [A-Z][a-z]+){{0,2}}"
                       rf" (?:{STREETS})\b)")
TYPE = re.compile(r"(?<=\d)[ -]?pt\.?(?= (?:font|type|text|bold|italic|Times|Arial|Helvetica)\b)")
MILLIONS = re.compile(rf"(?<=\d)m(?= (?:{'|'.join(MANY)})\b)")
DECADES = re.compile(r"(?:(?<=\b[Tt]he )|(?<=\bearly )|(?<=\bmid-)|(?<=\blate )|(?<=\bmid ))([12]\d\d0)'s(?!\w)")
HUNDREDS = re.compile(rf"{FREE}(10|100|1,?000|10,000|100,000)s(?= of\b)")
OUT_OF = re.compile(rf"{FREE}(\d{{1,3}}\.\d{{1,2}})/(5|10|20|100)(?![\w/]|[.,]\d)")
EVENLY = re.compile(r"(?<![\w.,-])(50|60|40|70|30|80|20|90|10)-(50|40|60|30|70|20|80|10|90)(?= (?:chance|split|deal"
                    r"|odds|share|bet|basis|mix|ratio|shot|partners?)\b)"
                    rf"|{FREE}(?<!ages )(50)-(50)(?![\w-]|[.,:/]\d| ?[%°])")
METRE = re.compile(rf"{FREE}(\d{{1,2}})/(2|4|8|16)(?= (?:time|signature|meter|metre)\b)")
AIRCRAFT = re.compile(r"(?<=\bBoeing )7([0-8])7(?:-(\d{1,4}))?(?![\w-]|[.,]\d)")
CVE = re.compile(r"(?<=\bCVE)-(\d{4})-(\d{4,7})(?![\w-])")
YEARS = re.compile(r"(?<![^\W_])(?:([Cc])a?\. ?(?=\d{3,4}(?!\d))"
                   r"|(?:(?<=\()|(?<=[,;] ))([bd])\. ?(?=(?:1\d|20)\d\d(?!\d)))")
STANDARD = re.compile(r"(?<![\w.])([GHTX])\.(\d)(\d\d)(?![\w-]|[.,/]\d)")
SEASON = re.compile(rf"{FREE}((?:19|20)0\d)-0([1-9])(?![\w-]|[.,/]\d)")


def say_verse(match):
    """John three sixteen; Psalm twenty-three, one to three."""
    order, book, chapter, verse, last = match.groups()
    book = BOOK.get(book.rstrip("."), book)
    mark = " " if len(verse) > 1 else ", "
    words = f"{ORDER.get(order, '')}{book} {number_words(chapter)}{mark}{number_words(verse)}"
    return words + (f" to {number_words(last)}" if last else "")


def say_direction(match):
    return f"{COMPASS[match[1]].capitalize()} "


def say_type(match):
    return " point"


def say_millions(match):
    return " million"


def say_decades(match):
    return many(year_words(match[1]))


def say_hundreds(match):
    """Tens, hundreds, tens of thousands."""
    return {"10": "tens", "100": "hundreds", "1000": "thousands", "10000": "tens of thousands",
            "100000": "hundreds of thousands"}[match[1].replace(",", "")]


def say_out_of(match):
    return f"{said(match[1])} out of {in_words(match[2])}"


def say_evenly(match):
    first, last = filter(None, match.groups())
    return f"{in_words(first)}-{in_words(last)}"


def say_metre(match):
    return f"{in_words(match[1])} {in_words(match[2])}"


def say_aircraft(match):
    """Boeing seven thirty-seven eight hundred."""
    kind, series = match.groups()
    words = f"seven {'oh seven' if kind == '0' else in_words(kind + '7')}"
    return words + (f" {number_words(series)}" if series else "")


def say_cve(match):
    return f" {year_words(match[1])}, {by_digits(match[2])}"


def say_years(match):
    """Circa 1450; (born 1984)."""
    if re.search(r"\b[aA]\. ?\d", match.string[max(0, match.start() - 40):match.start()]):
        return match[0]  # a. 1914, b. 1939, c. 1945
    return ("Circa " if match[1] == "C" else "circa ") if match[1] else {"b": "born ", "d": "died "}[match[2]]


def say_standard(match):
    """H two sixty-four, X five oh nine."""
    letter, first, rest = match.groups()
    last = f"oh {in_words(rest[1])}" if rest[0] == "0" and rest != "00" else in_words(rest)
    return f"{letter} {in_words(first)} {'hundred' if rest == '00' else last}"


def say_season(match):
    return f"{year_words(match[1])} to oh {in_words(match[2])}"
