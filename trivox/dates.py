"""Dates and times in English words: rules as those of `trivox/numerals.py`."""

import re

from trivox.numerals import ALONE, END, FREE, ends, in_words, said, year_words

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")
MONTH_OF = {month[:3]: month for month in MONTHS}

# ------------------------------------------------------------------------------------------------------------
# Dates

MONTH = (r"(?<![^\W_])(Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
         r"|Sep(?:t(?:ember)?)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)")
DAY = r"(0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
ISO_DATE = re.compile(rf"{FREE}([12]\d{{3}})([-/.])(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?:T(?=\d)|(?![\w/-]|[.,]\d))")
SLASH_DATE = re.compile(rf"{FREE}(\d{{1,2}})([-/.])(\d{{1,2}})\2([12]\d{{3}}|(?<=/)\d\d)(?![\w/-]|[.,]\d)")
MONTH_DAY = re.compile(rf"{MONTH}\.? {DAY}(?: ?- ?{DAY})?{END}(?![.,:/-]\d| ?[%°])(?:,? ([12]\d{{3}}){ALONE})?")
DAY_MONTH = re.compile(rf"(\b[Tt]he )?{FREE}(?:{DAY} ?- ?)?{DAY}(?: of)? {MONTH}{END}(\.?)(?:,? ([12]\d{{3}}){ALONE})?")
SHORT_DATE = re.compile(r"(?<=\b[Oo]n )(0?[1-9]|1[0-2])/(0?[1-9]|[12]\d|3[01])(?![\w/-]|[.,]\d)")
MONTH_YEAR = re.compile(rf"{MONTH}\.?(,? )([12]\d{{3}}){ALONE}")
YEAR = re.compile(rf"(?<![^\W_])((?:[Ii]n|[Ss]ince|[Uu]ntil|[Yy]ear|[Cc]irca|AD|BC|[Ss]ummer|[Ww]inter|[Ss]pring"
                  rf"|[Aa]utumn) )([12]\d{{3}}){ALONE}|{FREE}([12]\d{{3}})(?= (?:AD|BC|CE|BCE|A\.D|B\.C)\b)")


def date_words(year, month, day):
    words = f"{month} {in_words(day, 'ordinal')}"
    return f"{words}, {year_words(year)}" if year else words


def say_iso_date(match):
    return date_words(match[1], MONTHS[int(match[3]) - 1], match[4]) + ", " * match[0].endswith("T")


def say_slash_date(match):
    """11/27/2026 and 27/11/2026; where both could be the month, the first is, as in America, but for 3.4.2026."""
    first, mark, second, year = match.groups()
    month, day = (second, first) if int(first) > 12 or mark == "." and int(second) <= 12 else (first, second)
    if not (1 <= int(month) <= 12 and 1 <= int(day) <= 31):
        return match[0]
    if len(year) == 2:
        year = ("20" if int(year) < 50 else "19") + year
    return date_words(year, MONTHS[int(month) - 1], day)


def say_short_date(match):
    return date_words(None, MONTHS[int(match[1]) - 1], match[2])


def say_month_day(match):
    month, day, last, year = match.groups()
    words = date_words(None, MONTH_OF[month[:3]], day) + (f" to {in_words(last, 'ordinal')}" if last else "")
    return f"{words}, {year_words(year)}" if year else words


def say_day_month(match):
    """3 March, and 3-5 Mar. 2026."""
    the, first, day, month, stop, year = match.groups()
    words = (f"{in_words(first, 'ordinal')} to " if first else "") + in_words(day, "ordinal")
    stop = "" if year or len(month) < 5 and month not in MONTHS and not ends(match) else stop
    return f"{the or 'the '}{words} of {MONTH_OF[month[:3]]}" + (f", {year_words(year)}" if year else "") + stop


def say_month_year(match):
    return f"{MONTH_OF[match[1][:3]]}{match[2]}{year_words(match[3])}"


def say_year(match):
    return f"{match[1]}{year_words(match[2])}" if match[2] else year_words(match[3])


# ------------------------------------------------------------------------------------------------------------
# Times

HALF = rf"(?: ?([AaPp])(?:\. ?)?[Mm]{END}\.?)"  # of the day
CLOCK = re.compile(rf"{FREE}(\d{{1,2}}):([0-5]\d)(?::([0-5]\d))?(\.\d{{1,3}})?(?:{HALF}| ?o'clock)?(?![\w:]|[.,/]\d)")
HOUR = re.compile(rf"(?:{FREE}|(?<=[a-zA-Z]/))(1[0-2]|0?[1-9])(?:\.([0-5]\d))?{HALF}")
HOUR_RANGE = re.compile(rf"{FREE}(\d{{1,2}}(?:[:.]\d\d)?{HALF}?) ?- ?(?=\d{{1,2}}(?:[:.]\d\d)?{HALF}|\d{{1,2}}:\d\d)")
MILITARY = re.compile(rf"{FREE}([01]\d|2[0-3])([0-5]\d) ?(?:hours|hrs?|h){END}")
LASTED = re.compile(rf"{FREE}(\d{{1,3}}) ?h ?(\d{{1,2}}) ?m(?:in)?(?: ?(\d{{1,2}}) ?s(?:ec)?)?{END}")
RATIO = re.compile(r"(?<![\w.,:/])\d++(?:\.\d++)?+(?: ?: ?\d++(?:\.\d++)?+)++(?![\w:]|[.,/]\d)")


def half_words(half):
    """Its last stop is that of the sentence, too."""
    return f" {half.lower()}.m." if half else ""


def hour_words(hour, minutes, half):
    """An hour and its minutes: three thirty, seven oh five, ten o'clock, seventeen hundred."""
    if int(minutes or 0):
        words = f"{in_words(hour)} {'oh ' * (minutes[0] == '0')}{in_words(minutes)}"
    elif half or minutes is None:
        words = in_words(hour)
    else:
        words = "midnight" if int(hour) in (0, 24) else in_words(hour) + (" o'clock" if int(hour) < 13 else " hundred")
    return words + half_words(half)


def lasted(hours, minutes, seconds, decimals=""):
    """Three hours, thirty minutes and fifteen seconds."""
    parts = [f"{said(n)} {name}{'s' * (n.lstrip('0') != '1')}" for n, name in (
        (hours, "hour"), (minutes, "minute"), (seconds and seconds + (decimals or ""), "second")) if n]
    return ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]


def say_clock(match):
    hour, minutes, seconds, decimals, half = match.groups()
    if seconds and not decimals and not int(seconds):
        seconds = None
    if seconds and half:
        return f"{hour_words(hour, minutes, '')} and {in_words(seconds)} seconds{half_words(half)}"
    if seconds or decimals:
        some = (hour, minutes, seconds) if seconds else (None, hour, minutes)
        return lasted(*(n and str(int(n)) for n in some), decimals)
    if int(hour) > 24 and not int(minutes):
        return say_ratio(match)
    return hour_words(hour, minutes, half)


def say_hour(match):
    return hour_words(*match.groups())


def say_hour_range(match):
    return f"{match[1].removesuffix(':00')} to "  # as the hour behind it says what it is


def say_military(match):
    """0730 hours, 1400h, 1900 hrs."""
    hour, minutes = match.groups()
    hour = "oh " * (hour[0] == "0") + in_words(hour)
    return f"{hour} {'hundred' if minutes == '00' else 'oh ' * (minutes[0] == '0') + in_words(minutes)} hours"


def say_lasted(match):
    return lasted(*match.groups())


def say_ratio(match):
    return " to ".join(map(said, re.split(" ?: ?", match[0])))
