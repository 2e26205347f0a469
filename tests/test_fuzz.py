"""tests/fuzz.py: some of its cases, and that it sees what it looks for."""

import os
import subprocess
import time
from pathlib import Path

import fuzz
import pytest

from trivox import common


def test_some_mutations(capsys):
    """None of them ends in a traceback, hangs, or leaves its folder. Many are read, as mutations are small."""
    count, through, failures = fuzz.fuzz(seed=0, count=100)
    assert failures == [] and count == 100 and 20 < through < 80, capsys.readouterr().out


def at_fault(tmp_path, monkeypatch, fault):
    """What is said of a case of which the reading is at fault."""
    monkeypatch.setattr(fuzz, "KINDS", {lambda rng, world, here: ([], fault): 1})
    monkeypatch.setattr(fuzz, "make_world", lambda folder: None)
    monkeypatch.setattr(fuzz, "LIMIT", 0.2)
    (_, _, wrong), = fuzz.fuzz(count=1)[2]
    return wrong


@pytest.mark.parametrize("fault, words", [
    (lambda: {}["x"], "KeyError"), (lambda: time.sleep(9), "Hang"), (lambda: os.system("true"), "Escape: os.system"),
    (lambda: Path("../x").write_text("x"), "Escape: open"), (lambda: os.mkdir("/tmp/x/y"), "Escape: os.mkdir"),
    (lambda: subprocess.run(["true"]), "Escape: subprocess"), (lambda: os.open("/tmp/x", os.O_CREAT), "Escape: open"),
])
def test_it_sees(tmp_path, monkeypatch, capsys, fault, words):
    assert words in at_fault(tmp_path, monkeypatch, fault)


def test_a_sentence_is_no_fault(monkeypatch, capsys):
    def refuse():
        raise common.UserError("no")

    monkeypatch.setattr(fuzz, "KINDS", {lambda rng, world, here: ([], refuse): 1})
    monkeypatch.setattr(fuzz, "make_world", lambda folder: None)
    assert fuzz.fuzz(count=3) == (3, 0, [])
