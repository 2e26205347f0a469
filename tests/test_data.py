"""data.py: the settings of the command line are those of the data set."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import refusal
from helpers import make_corpus, tone

from data import main
from trivox.audio import LOG_FLOOR, MelConfig
from trivox.datasets import MelDataset

def test_command_line(tmp_path, one_process, capsys):
    """Of log-mels, in which silence is the floor."""
    root = make_corpus(tmp_path / "corpus", {"a": np.pad(tone(0.3), (0, 12000)), "b": tone(0.5)})
    main(["ljspeech", "--root", str(root), "--out", str(tmp_path / "out"), "--n_mels", "40"])
    dataset = MelDataset(tmp_path / "out", replace(MelConfig(), n_mels=40))
    assert dataset.mel(0)[-1].max() == pytest.approx(np.log(LOG_FLOOR), abs=0.01)
    assert json.loads((tmp_path / "out" / "dataset_stats.json").read_text())["mel"]["n_mels"] == 40


@pytest.mark.parametrize("flags, words", [
    (["--max_seconds", "nan"], "greater than 0"), (["--n_fft", "0"], "no log-mels"), (["--fmax", "nan"], "no log-mels"),
    (["--out", ""], "empty"), (["--out", "/proc/x"], "cannot use /proc/x"), (["--root", "nowhere"], "no folder wavs/"),
], ids=" ".join)
def test_what_cannot_be_made(corpus, tmp_path, flags, words):
    assert words in refusal(main, "ljspeech", "--root", corpus, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", ["12,x", "8,8,8", "0", "65537"])
def test_book_sizes(corpus, tmp_path, sizes):
    assert sizes in refusal(main, "tokenize", "--codec", "mel_rvq", "--root", corpus, "--out", tmp_path / "out",
                            "--codebook_size", sizes)
