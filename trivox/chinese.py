"""Numbers in Chinese words: years, dates, times, shares, money and ranges as they are read aloud.

num2words has no Chinese, and cn2an 0.5.24 reads 2023-04-03 as two subtractions, 100年 as the name of a year, and the
number of a telephone in hundreds of millions; its package leaves folders called build and src beside its own.
"""

import re
from functools import lru_cache

LONGEST = 15  # digits of a number; a longer one is read digit by digit
HAN = "〇㐀-鿿豈-﫿"
BLANKS = re.compile(rf"(?<=[{HAN}]) (?=[-¥$€£]?\d)|(?<=[\d%]) (?=[{HAN}])")  # which are for the eye
NUMBER = r"(?:\d{1,3}(?:,\d{3})++(?![\d,])|\d++)(?:\.\d++)?+"
# Before these, 2 is 两, not 二
COUNTED = re.compile("(?!年[级級代])(?:小时|小時|分钟|分鐘|厘米|毫米|公里|公斤|[个個只隻条條张張块塊瓶杯份本辆輛台臺"
                     "匹头頭位间間家件种種次天年周週秒岁歲倍米克吨噸升元名座艘棵首句段支把双雙套场場人口架颗顆片篇封部幅粒"
                     "朵群对對轮輪届屆股包盒箱袋碗盘盤枚根所门門点點百千万萬亿億])")
MONEY = {"¥": "元", "$": "美元", "€": "欧元", "£": "英镑"}
UNITS = {"°C": "摄氏度", "°F": "华氏度", "°": "度"}
TRADITIONAL = str.maketrans("万亿点负两欧镑摄华", "萬億點負兩歐鎊攝華")  # of the words that are made here


def say_chinese(text, traditional=False):
    """A text with its numbers in words, in traditional characters where it has some itself, or they are asked for."""
    text = BLANKS.sub("", "".join(str(int(c)) if c.isdecimal() else c for c in text))
    some = re.findall(f"[{HAN}]", text)
    traditional = traditional or any(in_code(c, "big5") and not in_code(c, "gb2312") for c in some)
    for pattern, say in RULES:
        text = pattern.sub(lambda match, say=say: say(match).translate(TRADITIONAL if traditional else {}), text)
    return text


def in_code(c, code):
    """Whether a code has this character: GB 2312 has the simplified ones, Big5 the traditional ones."""
    try:
        return bool(c.encode(code))
    except UnicodeEncodeError:
        return False


def cardinal(number, within=False):
    """The words of a whole number; within: behind those of a larger one, where 15 is 一十五 and not 十五."""
    for unit, name in ((10**8, "亿"), (10**4, "万"), (1000, "千"), (100, "百"), (10, "十")):
        if number >= unit:
            high, low = divmod(number, unit)
            words = ("" if unit == 10 and high == 1 and not within else cardinal(high, within)) + name
            return words + ("零" * (low < unit // 10) + cardinal(low, True) if low else "")
    return digits(str(number))


@lru_cache(10_000)
def words_of(number):
    """Digits, with or without commas and decimals, in words; one by one where they are too many, or begin with 0."""
    whole, _, decimals = number.replace(",", "").partition(".")
    words = digits(whole) if len(whole) > LONGEST or re.match("0.", whole) else cardinal(int(whole))
    return re.sub("^二(?=[千万亿])", "两", words) + ("点" + digits(decimals) if decimals else "")


def digits(text):
    """Digits one by one, with the points between them."""
    return "".join("零一二三四五六七八九"[int(c)] if c.isdecimal() else "点" * (c == ".") for c in text)


def counted(number, following):
    """The words of a number before what it counts: 2个 are 两个."""
    return "两" if number == "2" and COUNTED.match(following) else words_of(number)


def say_date(match):
    year, _, month, day = match.groups()
    return f"{digits(year)}年{words_of(str(int(month)))}月{words_of(str(int(day)))}日"


def say_time(match):
    """3:30, 10:05, 10:00, 2:15:08."""
    hour, minute, second = (part and int(part) for part in match.groups())
    words = counted(str(hour), "点") + "点"
    if minute or second:
        words += "零" * (0 < minute < 10) + words_of(str(minute)) + "分"
    return words + (f"{words_of(str(second))}秒" if second else "")


def say_range(match):
    money, minus, low, share, below, high, unit = match.groups()
    rest = match.string[match.end():match.end() + 2]
    if unit in ("%", "‰"):
        part = "百分之" if unit == "%" else "千分之"
        return f"{'负' * bool(minus)}{part}{words_of(low)}到{'负' * bool(below)}{part}{words_of(high)}"
    sign = "零下" if unit in ("°C", "°F") else "负"
    if unit or money:
        rest = UNITS.get(unit) or MONEY[money]
    words = f"{sign * bool(minus)}{'百分之' * bool(share)}{counted(low, rest)}到"
    return f"{words}{sign * bool(below)}{counted(high, rest)}" + (rest if unit or money else "")


def say_number(match):
    """A number with its sign, its money, its unit. What stands behind Latin letters, as in A1024, is no number."""
    minus, money, number, large, unit = match.groups()
    if minus and re.search(f"[{HAN}]$", match.string[:match.start()]) and not unit.startswith("°"):
        return "-" + say_number(NUMBERS.match(match.string, match.start() + 1))  # 上海-2024: no number below 0
    before, after = match.string[:match.start()][-1:], match.string[match.end():match.end() + 2]
    if re.match("[A-Za-z]", before) and len(number) > 2 and number.isdecimal():
        words = digits(number) + large
    elif money:
        words = counted(number, large or "元") + large + MONEY[money]
    elif unit in ("%", "‰"):
        words = f"{'百' if unit == '%' else '千'}分之{words_of(number)}{large}"
    else:
        words = (words_of(number) if before == "第" else counted(number, large + after)) + large + UNITS.get(unit, "")
    return ("零下" if unit in ("°C", "°F") else "负") * bool(minus) + words


NUMBERS = re.compile(rf"(?:(?<![\dA-Za-z)])(-))?([¥$€£])?({NUMBER})([百千万萬亿億]{{0,2}})(%|‰|°[CF]?|)")
RULES = [(re.compile(pattern), say) for pattern, say in (
    (rf"(?<=\d)([{HAN}]{{1,2}}|°[CF]?)[-~](?=\d)|(?<=:\d\d)()[-~](?=\d{{1,2}}:\d\d)",  # 8点-22点, 9:00-17:00
     lambda match: f"{match[1] or ''}到"),
    (r"(?<![\d.-])((?:19|20)\d\d)-(0[1-9]|1[0-2])(?![\d.年-])",
     lambda match: f"{digits(match[1])}年{words_of(str(int(match[2])))}月"),
    (r"(?<![\d.-])([12]\d{3})([-/.])(0?[1-9]|1[0-2])\2(0?[1-9]|[12]\d|3[01])(?![\d.-])", say_date),
    (r"(?<![\d.,第-])([12]\d{3})[-~]([12]\d{3})(?=年)", lambda match: f"{digits(match[1])}到{digits(match[2])}"),
    (r"(?<![\d.第-])(?<!\d,)[12]\d{3}(?=(?:[、和与與及或][12]\d{3})+年)",  # 1998、1999年
     lambda match: digits(match[0])),
    # A year, and not 1000年 or 2000年前, which are so many of them; 98年5月
    (r"(?<![\d.,第-])(?:(?!1000|[12]\d00年[前来來间間历歷以之])[12]\d{3}(?=年)|\d\d(?=年\d{1,2}月))",
     lambda match: digits(match[0])),
    (r"(?<![\d.,第:-])0\d(?=[月日时時点點分秒])", lambda match: words_of(str(int(match[0])))),  # 05月
    (r"(?<![\d:.,])([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?(?![\d:])", say_time),
    (r"(?<![\d:.,])(\d{1,4}):(\d{1,4})(?![\d:])", lambda match: f"{words_of(match[1])}比{words_of(match[2])}"),
    (r"(?<![\d/.,A-Za-z-])(-?)(\d{1,3})/([1-9]\d{0,2})(?![\d/.,A-Za-z-])",
     lambda match: f"{'负' * bool(match[1])}{words_of(match[3])}分之{words_of(match[2])}"),
    # Numbers of telephones, versions, addresses of machines
    (r"(?<![\d.,])(?:0\d+(?:-\d+)+|\d{3,4}-\d{3,4}-\d{4}(?![\d-])|(?:86)?1[3-9]\d{9}(?!\d|\.\d)|\d+(?:\.\d+){2,})",
     lambda match: digits(match[0])),
    (rf"(?<![\d.,A-Za-z{HAN}-])([¥$€£])?(-)?({NUMBER})([%‰]?)[-~](-)?({NUMBER})(%|‰|°[CF]?)?(?![\d-])", say_range),
    (rf"(?<![\d.,A-Za-z-])([¥$€£])?()({NUMBER})([%‰]?)[-~](-)?({NUMBER})(%|‰|°[CF]?)?(?![\d-])", say_range),
)] + [(NUMBERS, say_number)]
