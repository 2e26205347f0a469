"""units.py, through normalise.py: what stands beside numbers in other languages than English, as foreign.tsv has it."""

import random
import re
import time

import pytest
from conftest import ROOT

from trivox.normalise import normalise_text
from trivox.units import UNITS

ROWS = [line.split("\t") for line in (ROOT / "tests" / "foreign.tsv").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("language, text, reading", ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_readings(language, text, reading):
    assert normalise_text(text, True, language) == reading


@pytest.mark.parametrize("language", [*UNITS, "sv", "mr"])
def test_any_text(language):
    """Nothing fails, and what is normalised stays so, in linear time; of what has units no number stays."""
    rng = random.Random(0)
    signs = [*"0123456789" * 2, *" .,:-/&+=%°€$£²hm", *" km| kg| Uhr| °C|er|e|º|ª|um |Dr. ".split("|"),
             *" г.| r.|-й| руб.| Mio.|usw. |§|№|m³|zł".split("|")]
    for _ in range(1500):
        text = "".join(rng.choice(signs) for _ in range(rng.randint(1, 20)))
        found = normalise_text(text, True, language)
        assert found == normalise_text(found, True, language), text
        assert language == "mr" or not re.search(r"\d", found), text
    for piece in ("9 km ", "1.", "3,50 € ", "14:30 ", "1-2", "3.10.2023 ", "z. B. ", "& ",
                  "1+1=", "$1", "5 m²", "1/2 ", "2:1", "0170 ", "1987 ", "5 Mio. €", "etc. "):
        start = time.process_time()
        normalise_text(piece * (20_000 // len(piece)), True, language)
        assert time.process_time() - start < 3, piece


def test_a_mark_without_a_number_stays():
    for text in ("100 %ig.", "Die km-Zahl", "h = Stunde", "C&A", "https://a.de/x&y"):
        assert re.search(r"%|km|§|h|&", normalise_text(text, True, "de"))
