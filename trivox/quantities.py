"""Amounts of money, units and fractions in English words: rules as those of `trivox/numerals.py`."""

import re
from math import gcd

from trivox.numerals import (END, FROM, MAGNITUDES, NUMBER, POINTED, POWERS, SIGN, SYMBOL, in_words, number_words,
                             many, plain, power_words, said, sign_words, year_words)

# ------------------------------------------------------------------------------------------------------------
# Tables

# The names of one and of many, of a hundredth and of many
MONEY = {"$": ("dollar", "dollars", "cent", "cents"), "£": ("pound", "pounds", "penny", "pence"),
         "€": ("euro", "euros", "cent", "cents"), "¥": ("yen", "yen", "sen", "sen"),
         "₹": ("rupee", "rupees", "paisa", "paise"), "₩": ("won", "won", "jeon", "jeon"),
         "₽": ("ruble", "rubles", "kopeck", "kopecks"), "₺": ("lira", "lira", "kurus", "kurus"),
         "₴": ("hryvnia", "hryvnias", "kopeck", "kopecks"), "₪": ("shekel", "shekels", "agora", "agorot"),
         "₣": ("Swiss franc", "Swiss francs", "centime", "centimes"), "₫": ("dong", "dong", "xu", "xu"),
         "₿": ("bitcoin", "bitcoins", "", "")}
PLACES = {"US": "U.S.", "A": "Australian", "AU": "Australian", "C": "Canadian", "CA": "Canadian", "NZ": "New Zealand",
          "HK": "Hong Kong", "S": "Singapore"}  # of a dollar
NO_DOLLAR = {"R": ("real", "reais", "centavo", "centavos"),  # R$5
             "MX": ("Mexican peso", "Mexican pesos", "centavo", "centavos")}
CODES = {"USD": "US$", "AUD": "A$", "CAD": "C$", "NZD": "NZ$", "EUR": "€", "GBP": "£", "JPY": "¥", "INR": "₹",
         "CHF": "₣"}
# Signs of units, only behind a number: the names of one and of many; case counts
UNITS = {
    "mm": "millimeter", "cm": "centimeter", "dm": "decimeter", "m": "meter", "km": "kilometer", "nm": "nanometer",
    "μm": "micrometer", "mi": "mile", "yd": "yard", "yds": "yard", "ft": "foot feet", "in.": "inch inches",
    "ha": "hectare", "mg": "milligram", "g": "gram", "kg": "kilogram", "μg": "microgram", "lb": "pound", "lbs": "pound",
    "kgs": "kilogram", "Kg": "kilogram", "KG": "kilogram", "kms": "kilometer",
    "oz": "ounce", "fl oz": "fluid_ounce", "ml": "milliliter", "mL": "milliliter", "cl": "centiliter",
    "dl": "deciliter", "l": "liter", "L": "liter", "gal": "gallon", "qt": "quart", "pt": "pint", "cc": "cc cc",
    "tsp": "teaspoon", "tbsp": "tablespoon", "Tbsp": "tablespoon", "Tsp": "teaspoon",
    "ns": "nanosecond", "μs": "microsecond", "ms": "millisecond",
    "sec": "second", "secs": "second", "min": "minute", "mins": "minute", "h": "hour", "hr": "hour", "hrs": "hour",
    "yr": "year", "yrs": "year", "wk": "week", "wks": "week", "mo": "month", "mos": "month",
    "Hz": "hertz hertz", "kHz": "kilohertz kilohertz", "MHz": "megahertz megahertz", "GHz": "gigahertz gigahertz",
    "V": "volt", "mV": "millivolt", "kV": "kilovolt", "W": "watt", "mW": "milliwatt", "kW": "kilowatt",
    "MW": "megawatt", "GW": "gigawatt", "Wh": "watt_hour", "kWh": "kilowatt_hour", "MWh": "megawatt_hour",
    "mA": "milliamp", "mAh": "milliamp_hour", "Ah": "amp_hour", "Ω": "ohm", "kΩ": "kilohm", "kJ": "kilojoule",
    "cal": "calorie", "kcal": "kilocalorie", "Pa": "pascal", "hPa": "hectopascal", "kPa": "kilopascal", "bar": "bar",
    "psi": "PSI PSI", "dB": "decibel", "kB": "kilobyte", "KB": "kilobyte", "MB": "megabyte", "GB": "gigabyte",
    "TB": "terabyte", "PB": "petabyte", "KiB": "kibibyte", "MiB": "mebibyte", "GiB": "gibibyte",
    "bps": "bit_per_second", "kbps": "kilobit_per_second", "Mbps": "megabit_per_second", "Gbps": "gigabit_per_second",
    "px": "pixel", "dpi": "dot_per_inch", "mph": "mile_per_hour", "kph": "kilometer_per_hour",
    "kmh": "kilometer_per_hour",
    "rpm": "revolution_per_minute", "fps": "frame_per_second", "bpm": "beat_per_minute", "ppm": "part_per_million",
    "ppb": "part_per_billion", "mol": "mole", "lm": "lumen", "lx": "lux lux", "sq ft": "square_foot square_feet",
    "sq in": "square_inch square_inches", "sq yd": "square_yard", "sq m": "square_meter",
    "sq km": "square_kilometer", "sq mi": "square_mile", "cu ft": "cubic_foot cubic_feet",
    "°C": "degree_Celsius degrees_Celsius", "°F": "degree_Fahrenheit degrees_Fahrenheit", "°": "degree",
    "s": "second"}
APART = {"s"}  # only behind a blank: 60s are the sixties
SQUARED = {"mm", "cm", "m", "km", "ft", "in", "yd", "mi"}
PER = {"h": "hour", "hr": "hour", "s": "second", "sec": "second", "min": "minute", "m": "meter", "km": "kilometer",
       "kg": "kilogram", "g": "gram", "l": "liter", "L": "liter", "ml": "milliliter", "mL": "milliliter",
       "lb": "pound", "oz": "ounce", "gal": "gallon", "day": "day", "d": "day", "yr": "year", "year": "year",
       "mo": "month", "month": "month", "week": "week", "hour": "hour", "minute": "minute", "second": "second",
       "person": "person", "dl": "deciliter", "dL": "deciliter"}
SLASHED = {"24/7": "twenty-four seven", "9/11": "nine eleven", "50/50": "fifty-fifty", "20/20": "twenty twenty"}
FRACTIONS = {*range(2, 11), 12, 16, 20, 24, 25, 32, 50, 64, 100, 1000}  # denominators; of others, it is "over"
COMPASS = {"N": "north", "S": "south", "E": "east", "W": "west"}

# ------------------------------------------------------------------------------------------------------------
# Money

AMOUNT = rf"\.?{NUMBER}"
SCALE = r"(?i:thousand|million|billion|trillion)"
MAGNITUDE = rf"(?:[ -]?({SCALE})\b| ?({'|'.join(MAGNITUDES)}){END})"
# What an amount is one of: a $5 million deal
ARTICLE = re.compile(r"\b[Aa]n? (?:[\d.,]{1,9} to |[+-]?)$")
FIXED = re.compile(r"\b(?:[Tt]h(?:e|is|at|ese|ose)|[Hh]is|her|their|my|our|your|its|one|each) $")
NO_NOUN = set("""of or and in per to for is was are were be at on by with from as but that which who he she it they we
I you before after when than more less each a an the if while then so because have has had will would could""".split())
PRICED = set("bill bills note notes deal fine prize fee coin coins project loan bond bonds ticket race run".split())
WIDE = set("film lens camera gun cannon shell round projector print".split())  # of 35mm
EACH = rf"(?:(/)(?:({'|'.join(PER)}){END}(?:\.(?= [a-z]))?|(?=[A-Za-z])))"  # a price of a unit, or of an hour
DOLLARS = rf"(?:\b({'|'.join([*PLACES, *NO_DOLLAR])})(?:(?<=\w\w) )?(?=\$))"  # US $5, but A$5: A is an article
PRICE = re.compile(rf"({SIGN}){DOLLARS}?({SYMBOL}) ?(-(?=\.?\d))?({AMOUNT})"
                   rf"(?: ?- ?({SYMBOL})? ?({AMOUNT}))?{MAGNITUDE}?"
                   rf"(?: (?:USD|AUD|CAD|EUR|GBP))?{EACH}?")
PRICE_BEHIND = re.compile(rf"({SIGN})(?<![\w.,])({NUMBER})(?: ?- ?({NUMBER}))?{MAGNITUDE}?"
                          rf"(?: ?({SYMBOL}(?!\d))| ({'|'.join(CODES)}){END}){EACH}?")
NOTES = re.compile(rf"[$£€](\d{{1,3}}(?:,\d{{3}})*+)s{END}")
SPREAD = re.compile(rf"(?<=[$£€])(\d{{1,3}}(?:\.\d{{1,3}})?)(?:m|M|k|K|bn|B)-(?=\d)"
                    rf"|(?<=illion)-(?={SYMBOL}?\d)|(?<=\d[KkMm])-(?={SYMBOL}\d)|(?<=inches)-(?=\d)")
CODE_BEFORE = re.compile(rf"(?<![^\W_])(?:({'|'.join(CODES)})|Rs\.?) ?(?=\d)")
CENTS = re.compile(rf"(?<![\w.,])({NUMBER}) ?¢")
THOUSANDS = re.compile(r"(?<![\w.,'])([1-9]\d{0,2})((?:[ _']\d{3})++)(?:[,.](\d{1,2}))?(?![\w.]*\d)")


def before_noun(match):
    """Whether an amount stands before a noun that it is one of, where its unit has no plural: a $5 bill, a 6 ft man."""
    start, end = match.span()
    if re.match("-an?-[a-z]", match.string[end:end + 5]):  # $100-a-day
        return True
    before, after = match.string[max(0, start - 18):start], re.match(r"[ -]([a-z]+)", match.string[end:end + 30])
    if not after or after[1] in NO_NOUN:
        return False
    return bool(ARTICLE.search(before)) or after[1] in PRICED and bool(FIXED.search(before)) or (
        after[1] in WIDE and re.search(r"\dmm$", match[0]))


def money_words(currency, number, suffix, place="", single=False):
    """An amount: $29.95, £3 million, €3,50; in the singular before a noun."""
    one, several, cent, cents = MONEY[currency]
    if place in NO_DOLLAR:
        one, several, cent, cents = NO_DOLLAR[place]
    elif place:
        one, several = f"{PLACES[place]} {one}", f"{PLACES[place]} {several}"
    suffix = suffix.lower()
    if single:
        several, cents = one, cent
    if re.fullmatch(r"(\d{1,3}(\.\d{3})+|\d+),\d\d", number):
        number = number.replace(".", "").replace(",", ".")
    number, _ = plain(number)
    units, _, hundredths = number.partition(".")
    if re.fullmatch(r"\d\d", hundredths) and not suffix and cent:
        parts = [(units, one, several), (hundredths.lstrip("0"), cent, cents)]
        parts = [f"{number_words(n)} {name if n == '1' else names}" for n, name, names in parts if n.strip("0")]
        return ", ".join(parts) or f"zero {several}"
    return f"{number_words(number)} {suffix and suffix + ' '}{one if number == '1' and not suffix else several}"


def say_price(match):
    sign, place, currency, minus, number, other, last, word, short, per, unit = match.groups()
    suffix, first = word or MAGNITUDES.get(short, ""), ""
    single = not per and ("-" in match[0] and bool(word) and not last and word in match[0].split("-")[-1]
                          or before_noun(match))
    if last:
        first = money_words(currency, number, suffix, place, single) if other else said(number)
        first, number = first + " to ", last
    words = sign_words(sign or minus) + first + money_words(other or currency, number, suffix, place, single)
    return words + (f" per {PER.get(unit, '')}" if per else "")


def say_price_behind(match):
    sign, number, last, word, short, symbol, code, per, unit = match.groups()
    *place, currency = re.findall(r"[A-Z]+|\W", symbol or CODES[code])
    first, number = (f"{said(number)} to ", last) if last else ("", number)
    suffix = word or MAGNITUDES.get(short, "")
    words = sign_words(sign) + first + money_words(currency, number, suffix, *place)
    return words + (f" per {PER.get(unit, '')}" if per else "")


def say_notes(match):
    """Paid in $20s, in fives, in hundreds."""
    return many(re.sub("^one (?=hundred$|thousand$)", "", said(match[1])))


def say_spread(match):
    """$1m-2m as $1-2m."""
    return f"{match[1]}-" if match[1] else " to "


def say_code_before(match):
    return CODES.get(match[1], "₹")


def say_cents(match):
    return f"{said(match[1])} cent{'s' * (match[1] != '1')}"


def say_thousands(match):
    """1 000 000 and 10_000 with commas. Of two groups alone, with a blank between them, the second must be round: "room
    12 345 people" is no number."""
    first, rest, decimals = match.groups()
    if rest[0] == " " and len(rest) == 4 and rest[2:] != "00":
        return match[0]
    return first + re.sub(r"[ _']", ",", rest) + (f".{decimals}" if decimals else "")


# ------------------------------------------------------------------------------------------------------------
# Units and fractions

SIZE = re.compile(r"(?<=\d)( ?(?:ft|in|cm|mm|m|km|yd|inch|inches|feet|meters|metres|px)\.?|') ?[x×] ?(?=\d)")
SQUARE = re.compile(r"(?<=\d )([Ss]q|[Cc]u|fl)\. ?(?=(?:ft|in|yd|m|km|mi|oz)\b)")
STOP = r"(\.(?= [a-z]|[,;:]| \d{1,3} ?(?:min|sec|oz|in|ft)s?\b))"  # which ends no sentence
COUNTED = re.compile(r" [A-Z][a-z]{1,20} \d")  # Group 3 V Group 4
NAMES = "|".join(sorted(map(re.escape, UNITS), key=len, reverse=True))
UNIT = re.compile(rf"({SIGN}){FROM}(?<!\^)(?<!\^-)({POINTED})( (?:thousand|million|billion))?([ -]?)"
                  rf"(?:({'|'.join(SQUARED)})\^?([23])|({NAMES}))(?:/({'|'.join(PER)})(?:\^?([23]))?)?"
                  rf"{END}(?!['^]\w|/[^\W\d]){STOP}?")
SCIENTIFIC = re.compile(rf"(?<![\w.,:/$£€])(\d{{1,9}}(?:\.\d{{1,12}}(?=[eE])|(?=e|E[-+])))[eE]\+?(-?\d{{1,3}}){END}"
                        r"(?![.,]\d)")
POWERED = re.compile(rf"(?<=\b10)\^([-+]?)(\d{{1,3}}) ({NAMES})(?:/({'|'.join(PER)})(?:\^?([23]))?)?{END}{STOP}?")
RATE = re.compile(rf"(?<=\d)/({'|'.join(name for name in PER if len(name) > 2)}){END}")
FEET = re.compile(r"(?<![\w.])(\d{1,2})(?:' ?| ?ft\.? )(\d{1,2}(?:\.\d++)?+)"
                  r"(?:\"|''| ?in(?:\.(?! [A-Z])|\b)|(?![\w']))")
INCHES = re.compile(r"""(' ?\d{1,2}(?:\.\d{1,4})?)"|(\d?)\"""")
PLACE = re.compile(r"(?<![\w.])(-?\d{1,3}(?:\.\d++)?+) ?° ?"
                   r"(?:(\d{1,2}(?:\.\d++)?+)' ?(?:(\d{1,2}(?:\.\d++)?+)\" ?)?)?(?:([NSEW])\b)?")
FRACTION = re.compile(rf"(?<![\w.,/$£€])(?:(\d{{1,3}})[ -])?(\d{{1,4}})/(\d{{1,4}})"
                      rf"(?:(?:ths?|rds?|nds?|s){END}|[ -]?({NAMES}){END}{STOP}?)?(?![\w/]|[.,]\d)")


GRADED = re.compile(r"\b(?:scored?|scores|rat(?:ed?|es|ing)|graded?|marks?|g(?:a|i)ve[sn]? (?:it|him|her|them|this))"
                    r"(?: of| at| it)?(?: an?)?:? (?:only |just |about )?$")


def unit_names(sign):
    """The names of one and of many."""
    one, *several = UNITS[sign].split()
    head, *rest = one.split("_")
    plural = several[0] if several else "_".join([head + "s", *rest] if rest[:1] == ["per"] else [one + "s"])
    return one.replace("_", " "), plural.replace("_", " ")


def say_unit(match):
    """5 km, 60 mph, 100 m^2, 9.81 m/s^2, a 5-km run."""
    sign, number, scale, mark, base, power, unit, per, per_power, _ = match.groups()
    if (unit in APART and mark != " " and "." not in number
            or unit in ("V", "W") and mark == " " and COUNTED.match(match.string, match.end())):
        return match[0]
    one, several = unit_names(unit or ("in." if base == "in" else base))
    if power:
        one, several = (f"{'square' if power == '2' else 'cubic'} {name}" for name in (one, several))
    single = number == "1" and not scale or mark == "-" or not per and before_noun(match)
    words = f"{said(number)}{scale or ''}{mark if mark == '-' else ' '}{one if single else several}"
    words += per_words(per, per_power)
    following = match.string[match.end():match.end() + 3]
    if unit == "in." and (not following.strip("\"')") or re.match(" [A-Z]", following)):
        words += "."  # of the sentence, too
    return sign_words(sign) + words


def per_words(per, power):
    """" per second squared", " per cubic meter"."""
    if not per:
        return ""
    if per == "s" and power:
        return f" per second {POWERS[power]}"
    return f" per {'square ' * (power == '2')}{'cubic ' * (power == '3')}{PER[per]}"


def say_scientific(match):
    """1.5e-3 as 1.5×10^-3, which is read as that is."""
    return f"{match[1]}×10^{match[2]}"


def say_powered(match):
    """3×10^8 m/s: what a rule for units does not see is that a number stands before the power."""
    sign, power, unit, per, per_power, _ = match.groups()
    return f"{power_words(sign, power)} {unit_names(unit)[1]}{per_words(per, per_power)}"


def say_size(match):
    """5 ft. x 8 ft."""
    return f"{match[1]} by "


def say_square(match):
    return f"{match[1].lower()} "


def say_rate(match):
    return f" per {PER[match[1]]}"


def say_feet(match):
    feet, inches = match.groups()
    single = before_noun(match)  # a 6 ft. 2 in. man
    stop = "." * (match[0].endswith(".") and not match.string[match.end():].strip("\"')"))  # of the sentence, too
    return (f"{in_words(feet)} {'foot' if single or feet == '1' else 'feet'} "
            f"{said(inches)} inch{'es' * (not single and inches != '1')}{stop}")


def say_inches(text):
    """27" where no quotation is open that the mark could close; what is behind feet or minutes is theirs."""
    is_open = False

    def say(match):
        nonlocal is_open
        if match[1]:
            return match[0]
        if match[2] and not is_open:
            single = re.search(r"\b[Aa]n? [\d.]{1,6}$|(?<![\d/])(?<!\d )\d{1,2}/\d{1,3}$", text[:match.end(2)][-10:])
            return f"{match[2]} inch" + "es" * (not single)
        is_open = not is_open
        return match[0]

    return INCHES.sub(say, text)


def say_place(match):
    """40°26'46"N, 45°N; other degrees are units."""
    degrees, minutes, seconds, compass = match.groups()
    if not (minutes or compass):
        return match[0]
    parts = [f"{said(n)} {name}{'s' * (n != '1')}" for n, name in (
        (degrees.lstrip("-"), "degree"), (minutes, "minute"), (seconds, "second")) if n]
    return "minus " * degrees.startswith("-") + " ".join(parts + ([COMPASS[compass]] if compass else []))


def fraction_words(over, under):
    """One half, three quarters, five eighths."""
    name = {"2": "half", "4": "quarter"}.get(under) or in_words(under, "ordinal")
    several = "halves" if under == "2" else name + "s"
    return f"{in_words(over)} {name if over == '1' else several}"


def say_fraction(match):
    whole, over, under, unit, _ = match.groups()
    first = f"{number_words(whole)} " if whole else ""
    n, m = int(over), int(under)
    last = f" {unit_names(unit)[n > m or bool(whole)]}" if unit else ""
    if f"{over}/{under}" in SLASHED:
        return first + SLASHED[f"{over}/{under}"] + last
    if n <= m in (5, 10, 20, 100) and GRADED.search(match.string[max(0, match.start() - 24):match.start()]):
        return f"{first}{in_words(over)} out of {in_words(under)}{last}"
    if m in FRACTIONS and n and n < 100 and gcd(n, m) == 1 and over[0] != "0":
        return first + "and " * (n < m and bool(whole)) + fraction_words(over, under) + last
    if len(over) == 4:  # 2019/20
        return f"{first}{year_words(over)} slash {number_words(under)}{last}"
    return f"{first}{number_words(over)} {'out of' if n <= m else 'over'} {number_words(under)}{last}"
