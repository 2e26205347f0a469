"""Numbers in English words, and what stands beside them: labels, ranges, arithmetic, numbers that are read by digits.

A rule is a pattern and a function that says what it finds; `trivox/normalise.py` has their order. Patterns see white
space as single blanks. They take linear time: by possessive quantifiers (`++`), bounds, or starts that are rare.
"""

import re
from functools import lru_cache

DIGITS = dict(zip("0123456789.", "zero one two three four five six seven eight nine point".split()))
DIGIT = "zero one two three four five six seven eight nine".split()
# Abbreviations that are such only before a number
LABELS = {"No": "number", "no": "number", "Nos": "numbers", "nos": "numbers", "Nr": "number", "Vol": "volume",
          "vol": "volume", "vols": "volumes", "p": "page", "P": "page", "pp": "pages", "Pp": "pages", "Fig": "figure",
          "fig": "figure", "Figs": "figures", "figs": "figures", "Ch": "chapter", "ch": "chapter", "chap": "chapter",
          "Chap": "chapter", "Sec": "section", "sec": "section", "Art": "article", "art": "article",
          "Eq": "equation", "eq": "equation", "par": "paragraph", "Ex": "example", "Apt": "apartment",
          "apt": "apartment", "Rm": "room", "ext": "extension", "Ext": "extension", "Tab": "table", "ca": "circa",
          "max": "maximum", "Max": "maximum", "min": "minimum", "Min": "minimum", "avg": "average", "Avg": "average",
          "c": "circa", "est": "established", "Est": "established", "v": "version", "ver": "version", "Rte": "route",
          "Hwy": "highway", "Ste": "suite", "approx": "approximately"}
WORDLIKE = {"art", "sec", "par", "min", "ex"}  # which also end sentences: wait a sec.
MAGNITUDES = {"k": "thousand", "K": "thousand", "m": "million", "M": "million", "mn": "million", "mm": "million",
              "MM": "million", "mio": "million", "b": "billion", "B": "billion", "bn": "billion", "Bn": "billion",
              "T": "trillion", "tn": "trillion", "trn": "trillion"}
POWERS = {"2": "squared", "3": "cubed"}

# ------------------------------------------------------------------------------------------------------------
# Numbers

SYMBOL = "[$£€¥₹₩₽₺₴₪₫₣₿]"  # of a currency
NUMBER = r"(?:\d++(?:[.,]\d++)*+)"  # with points and commas among its digits
FROM = r"(?<!\d)(?<!\d[.,])"  # not within a number: a rule that finds nothing tries each number once, not each digit
POINTED = rf"(?:(?<![\w.])\.(?=\d))?+{NUMBER}"  # or with a point before them: .5
SIGN = r"(?:(?<![^\s(\[\"'=])(?<!\d[\"'])(?:[-+±]|[+±] )(?=[$£€¥]?+\.?\d))?+"  # behind no word or number
END = r"(?![^\W_])"  # no letter or digit follows
FREE, ALONE = r"(?<![\w.,:/$£€-])", r"(?![^\W_]|[.,:/-]\d| ?[%°])"  # no part of a longer number


@lru_cache(10_000)
def in_words(digits, form="cardinal"):
    from num2words import num2words

    return num2words(int(digits), to=form)


def plain(number):
    """A number without what groups its digits, by threes or as in India, and whether it had that."""
    if re.fullmatch(r"\d{1,3}(\.\d{3}){2,}", number):  # as in Germany
        number = number.replace(".", ",")
    grouped = re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?|\d{1,2}(,\d\d)+,\d{3}(\.\d+)?", number)
    return (number.replace(",", "") if grouped else number), bool(grouped)


def number_words(number):
    """Digits, with points or commas among them, in words: one by one where they are no number, as in 007 and what has
    more than 15 of them; the parts of 10.2.1 and of 10,20,30 by themselves."""
    if "," in number:
        return ", ".join(map(number_words, number.split(",")))
    whole, point, decimals = number.partition(".")
    if re.fullmatch(r"0|[1-9]\d{0,14}", whole) and (decimals.isdecimal() or not point):
        return " ".join([in_words(whole), *(DIGITS[c] for c in point + decimals)])
    if re.fullmatch(r"\d{1,2}(\.(0|[1-9]\d?)){2,}", number):  # a version
        return " point ".join(map(in_words, number.split(".")))
    return " ".join(DIGITS[c] for c in number)


def said(number):
    """A number as it is written, with commas or a point in front, in words."""
    return number_words(plain(number)[0])


def by_digits(text):
    """The digits of a text, one by one, with a pause between its groups."""
    return ", ".join(" ".join(DIGIT[int(d)] for d in group) for group in re.findall(r"\d+", text))


def year_words(digits):
    """1984, 1066, 2005, 2026: nineteen eighty-four, ten sixty-six, two thousand and five, twenty twenty-six."""
    return in_words(digits, "year") if len(digits) == 4 and digits[0] != "0" else number_words(digits)


def many(word):
    """The plural of a number's words: nineties, sixes, threes."""
    return word[:-1] + "ies" if word.endswith("y") else word + ("es" if word.endswith("x") else "s")


def sign_words(sign):
    return {"-": "minus ", "+": "plus ", "±": "plus or minus "}.get((sign or "").strip(), "")


# ------------------------------------------------------------------------------------------------------------
# What is read digit by digit

PHONE = re.compile(
    r"(?<![\w.,/+-])(?:"
    r"\+(?=(?:[ .()-]{0,2}\d){7,15}(?!\d))\d{1,3}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d{1,12}){1,6}"  # +44 20 7946 0958
    r"|(?:1[ .-])?\(\d{3,5}\) ?\d{3,4}[ .-]\d{3,4}"  # (555) 010-9999
    r"|(?:1[ .-])?\d{3}([ .-])\d{3}\1\d{4}"  # 555-010-9999
    r"|\d{3}-\d{4}"  # 555-0123
    r"|0\d{2,4} \d{3,4} \d{3,4}"  # 020 7946 0958
    r"|0\d{4} \d{6}"  # 07700 900123
    r"|\d{4}(?:[ -]\d{4}){3}"  # a card's
    r"|(?<=[A-Za-z,] [A-Z]{2} )\d{5}(?:-\d{4})?"  # CA 90210
    r")(?![\w-]|[.,/]\d)")
CALLED = re.compile(r"(\b(?:[Cc]all|[Dd]ial|[Pp]hone|[Ff]ax|[Tt]el)\.?(?: number)?(?: at| on| is|:)? )"
                    r"(\d{3}(?:[ -]?\d{4})?)(?![\w-]|[.,/:]\d)")
FLIGHT = re.compile(rf"(?<=\b[Ff]light )([A-Z]{{2}}) ?(\d{{1,4}}){END}")
TOLL_FREE = re.compile(r"(?<![\w-])1-8\d\d(?=-[A-Z])")  # 1-800-FLOWERS
CHAIN = re.compile(r"(?<![\w.,/-])\d{1,5}(?:-\d{1,7}){2,5}(?![\w-]|[.,/]\d)")


def say_phone(match):
    return "plus " * match[0].startswith("+") + by_digits(match[0])


say_toll_free = say_phone


def say_called(match):
    return match[1] + by_digits(match[2])


def say_flight(match):
    return f"{match[1]} {by_digits(match[2])}"


def say_chain(match):
    """2-1-3, and what is too long to be numbers: 123-45-6789."""
    if sum(map(str.isdecimal, match[0])) > 6:
        return by_digits(match[0])
    return "-".join(map(number_words, match[0].split("-")))


# ------------------------------------------------------------------------------------------------------------
# Labels, ranges, arithmetic, and all other numbers

ALIKE = r"(?!\d{1,9} (?:[a-z]{1,20}s|people|men|women|children) (?:are|were|have|can|will|should|could|ever)\b)"
LABELLED = re.compile(r"(?:^|[(,;:.]|\b(?:[Ss]ee|[Ii]n|of|[Uu]nder|by|and|to|per|with|from|or|the|cf|[Aa]s)) ?$")
LABEL = re.compile(rf"(?<![^\W_])(?:({'|'.join(LABELS)})\. ?|(No|Nos|pp|Vol|Fig|Apt|Hwy|approx) {ALIKE})(?=[$£€]?\d)")
HASH = re.compile(r"(?<!\w)# ?(?=\d)")
DECADE = re.compile(rf"(?<![\w.,'])'?([2-9]0)'?s{END}")
SHORT_YEAR = re.compile(r"(?<![^\s(-])'(\d)(\d)(?![\w'\"]|[.,:]\d)")
POWER = re.compile(r"(?<=[^\W_)])\^(\()?([-+]?)(\d++)(?(1)\))")
BY = re.compile(rf"{FROM}({NUMBER})( ?)([x×*])\2(?=\.?\d)")
TIMES = re.compile(r"(?<=\d) ?[x×](?=[ .,;!?)]|$)(?! ?[=+*/<>-])")
DIVIDED = re.compile(r"(?<=\d) / (?=\d)")
RANGE = re.compile(rf"(?<=[\d%°'\"])( ?)-\1(?={SYMBOL}?\d)")
COUNT = re.compile(rf"({SIGN})({POINTED})(\s?%|‰|(?:st|nd|rd|th|(?-i:s)){END}|\s(?:thousand|million|billion|trillion)\b"
                   rf"|(?-i:mn| ?bn| ?tr?n| ?pct){END}|(?<=\.\d)(?-i:[MB]){END}|(?-i:M)(?= [a-z]))?", re.IGNORECASE)


def say_label(match):
    label = match[1] or match[2]
    if label in WORDLIKE and not LABELLED.search(match.string[max(0, match.start() - 7):match.start()]):
        return match[0]
    return (LABELS[label].capitalize() if label[0].isupper() else LABELS[label]) + " "


def say_hash(match):
    return "number "


def say_decade(match):
    return many(in_words(match[1]))


def say_short_year(match):
    return f"oh {in_words(match[2])}" if match[1] == "0" else in_words(match[1] + match[2])


def say_power(match):
    return power_words(*match.groups()[1:])


def power_words(sign, power):
    if not sign and power in POWERS:
        return f" {POWERS[power]}"
    return f" to the power of {sign_words(sign)}{number_words(power)}"


def say_by(match):
    equation = "=" in match.string[match.end():match.end() + 12]
    return f"{said(match[1])} {'by' if match[3] == 'x' and not equation else 'times'} "


def say_times(match):
    return " times"


def say_divided(match):
    return " divided by "


def say_range(match):
    """To, but for a difference, 5-3=2, and a name, i7-9700."""
    start, end = match.span()
    if re.search(r"[^\W\d_][\d.,]+$", match.string[max(0, start - 12):start]):
        return match[0]
    before, after = match.string[max(0, start - 12):start], match.string[end:end + 12]
    sums = re.search("[=×÷]", before + after) or re.search(r"\+ ?[\d.]+$", before) or re.match(r"[\d.]+ ?\+ ?\d", after)
    return " minus " if sums else " to "


def say_count(match):
    """A number as such, with its sign and what follows it."""
    sign, number, suffix = match.groups()
    suffix = (suffix or "").strip()
    suffix = MAGNITUDES.get(suffix, suffix.lower())
    number, grouped = plain(number)
    if suffix == "%" and re.fullmatch(r"\d+,\d{1,2}", number):
        number = number.replace(",", ".")
    if suffix in ("st", "nd", "rd", "th") and number.isdecimal() and len(number) <= 15:
        words = in_words(number, "ordinal")
    else:
        year = suffix in ("", "s") and not grouped and re.fullmatch(r"1[1-9]\d\d|20[1-9]\d", number)
        words = in_words(number, "year") if year else number_words(number)
        if suffix == "s":  # the 1990s
            words = many(words)
        elif suffix:
            words += " " + {"%": "percent", "pct": "percent", "‰": "per mille"}.get(suffix, suffix)
    return sign_words(sign) + words


# ------------------------------------------------------------------------------------------------------------
# Where an abbreviation ends a sentence

STARTERS = set("""A After All Also Although An And Another Are As At Because Before Both But By Can Could Did Do Does
Even Every Everyone For From Had Has He Her Here His How However I If In Is It Its Just Later Let Many Meanwhile More
Most Mr. Mrs. Ms. My Nearly Never Next No Nobody Not Nothing Now Of On Once One Only Or Other Our Over She Since So Some
Someone Soon Still Such That The Their Then There These They This Those Though Three Thus To Today Two Under Until We
Were What When Where Which While Who Why Will With Would Yes Yesterday Yet You Your""".split())


def ends(match, skipped=0):
    """Whether what is matched, and so many characters behind it, stands at the end of a sentence: before nothing, or
    before a word that begins many."""
    end = match.end() + skipped
    rest = match.string[end:end + 40].lstrip("\"')]")
    word = re.match(r" [\"'(\[]*([A-Za-z]+\.?)", rest)
    return not rest.strip() or bool(word) and word[1] in STARTERS
