"""chinese.py, through normalise.py: numbers as they are read aloud."""

import random
import re
import time

import pytest

from trivox.normalise import normalise_text


@pytest.mark.parametrize("text, spoken", [line.split(" = ") for line in """
我有 5 个，12 = 我有五个,十二
他生于2023年。 = 他生于二零二三年。
1987年4月3日 = 一九八七年四月三日
2023-04-03 = 二零二三年四月三日
2023/4/3开会 = 二零二三年四月三日开会
05月03日 = 五月三日
98年5月 = 九八年五月
1990-1995年 = 一九九零到一九九五年
1998、1999年，1990和1991年 = 一九九八、一九九九年,一九九零和一九九一年
20世纪90年代 = 二十世纪九十年代
1980年代 = 一九八零年代
公元前221年 = 公元前二百二十一年
100年 = 一百年
1000年 = 一千年
2000年前 = 两千年前
5000年历史 = 五千年历史
3:30 = 三点三十分
10:05 = 十点零五分
10:00 = 十点
2:15:08 = 两点十五分八秒
比分2:1 = 比分二比一
人口1,234.5万 = 人口一千二百三十四点五万
100,000人 = 十万人
3.14 = 三点一四
0.05 = 零点零五
-3 = 负三
气温-3℃ = 气温零下三摄氏度
12° = 十二度
50% = 百分之五十
3%-5% = 百分之三到百分之五
5‰ = 千分之五
1/2 = 二分之一
¥100 = 一百元
￥2 = 两元
$3.5亿 = 三点五亿美元
3-5个 = 三到五个
8点-22点 = 八点到二十二点
1月5日-3月2日 = 一月五日到三月二日
2个-3个 = 两个到三个
1999年-2003年 = 一九九九年到二零零三年
上海-2024 = 上海-两千零二十四
气温在-5°C到-3°C = 气温在零下五摄氏度到零下三摄氏度
-1/2 = 负二分之一
10-15°C = 十到十五摄氏度
-5~3°C = 零下五到三摄氏度
$5-10 = 五到十美元
¥500-600 = 五百到六百元
3‰-5‰ = 千分之三到千分之五
9:00-17:00 = 九点到十七点
2023-04 = 二零二三年四月
8613800138000 = 八六一三八零零一三八零零零
400-800-8888 = 四零零八零零八八八八
1.5~2倍 = 一点五到两倍
2个 = 两个
2年级 = 二年级
第2次 = 第二次
2月2日2点 = 二月二日两点
2两 = 二两
2000元 = 两千元
第12页 = 第十二页
13812345678 = 一三八一二三四五六七八
电话010-62345678 = 电话零一零六二三四五六七八
编号A1024 = 编号A一零二四
007 = 零零七
192.168.0.1 = 一九二点一六八点零点一
iPhone 15 很贵 = iPhone 十五很贵
GPT-4 = GPT-四
100000001 = 一亿零一
1234567890123456789 = 一二三四五六七八九零一二三四五六七八九
１２３４５ = 一万二千三百四十五
٣个 = 三个
民國112年，臺灣有2萬人 = 民國一百一十二年,臺灣有兩萬人
""".strip().splitlines()])
def test_chinese(text, spoken):
    assert normalise_text(text, accents=True, language="zh") == spoken


def test_chinese_characters():
    """Traditional ones where the text has some, the language is written in them, or the place has them."""
    assert [normalise_text("2万", language=name) for name in ("zh", "cmn", "yue", "zh-TW", "zh_Hant")] == [
        "两万", "两万", "兩萬", "兩萬", "兩萬"]
    assert normalise_text("臺灣20000", language="zh") == "臺灣兩萬"


def test_any_chinese_text():
    """No digit stays, nothing fails, and what is normalised stays so, in linear time."""
    rng, signs = random.Random(0), "0123456789" * 3 + ".,-~:/%‰°C$¥￥ １２年月日时点分第个万亿两A" + "٣²"
    for _ in range(4000):
        text = "".join(rng.choice(signs) for _ in range(rng.randint(1, 24)))
        found = normalise_text(text, accents=True, language="zh")
        assert not re.search(r"\d", found) and found == normalise_text(found, accents=True, language="zh"), text
    for piece in ("9", "9,", "9.", "9-", "1:", "2/", "1,000", "0-", "1999-", "2年", "第2 ", "$"):
        start = time.process_time()
        normalise_text(piece * (40_000 // len(piece)), accents=True, language="zh")
        assert time.process_time() - start < 3, piece


def test_chinese_numbers_by_their_value():
    """What is said of a number is that number, as its words are added up."""
    def value(words):
        total = part = digit = 0
        for c in words:
            if c in "零一二三四五六七八九两":
                digit = 2 if c == "两" else "零一二三四五六七八九".index(c)
            elif c in "十百千":
                part, digit = part + (digit or 1) * {"十": 10, "百": 100, "千": 1000}[c], 0
            else:
                total, part, digit = (total + part + digit) * 10**8 if c == "亿" else (
                    total + (part + digit) * 10**4), 0, 0
        return total + part + digit

    rng = random.Random(0)
    for number in [*range(2000), *(rng.randrange(10 ** rng.randint(4, 15)) for _ in range(2000)),
                   *(int("".join(rng.choices("00015", k=12))) for _ in range(1000))]:
        if not re.fullmatch(r"1[3-9]\d{9}", str(number)):  # a telephone's
            assert value(normalise_text(f"{number}", language="zh")) == number
