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
    (["--out", ""], "empty"), (["--out", "/proc/x"], "cannot use /proc/x"), (["--root", "nowhere"], "no folder"),
    (["--fmin", "12000", "--fmax", "13000"], "no log-mels"), (["--fmax", "11026"], "11025 or less"),
    (["--language", "en-us"], "--language"), (["--language", "EN"], "--language"),
], ids=" ".join)
def test_what_cannot_be_made(corpus, tmp_path, flags, words):
    assert words in refusal(main, "ljspeech", "--root", corpus, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["ljspeech"], ["tokenize", "--codec", "mel_rvq"], ["demo"], ["demo_music"]],
                         ids=" ".join)
def test_a_data_set_among_the_recordings(tmp_path, command):
    """By whatever name, it is refused before anything is written."""
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.1)})
    for out in root, root / "wavs", root / "wavs" / "..":
        assert "among whose files" in refusal(main, *command, "--root", root, "--out", out)
    assert sorted(path.name for path in root.rglob("*")) == ["a.wav", "metadata.csv", "wavs"]


@pytest.mark.parametrize("argv", [
    ["demo", "--sentences", 3 * 10**9], ["demo", "--heldout_voice_clips", 10**7], ["demo_music", "--pieces", 10**7],
], ids=str)
def test_what_would_never_end(tmp_path, argv):
    assert "less than or equal to 1000000" in refusal(main, *argv, "--out", tmp_path / "out")


def test_chunks_of_no_frame(tmp_path):
    """They are refused before there is a plan."""
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.1)})
    assert "--chunk_seconds 0.001 " in refusal(main, "tokenize", "--codec", "mel_rvq", "--root", root, "--out",
                                               tmp_path / "out", "--chunk_seconds", "0.001")
    assert not (tmp_path / "out").exists()


def test_an_empty_flag_is_no_default():
    for argv in (["for", "configs/flow_demo.yaml", "--data_dir", ""], ["tokenize", "--root", "x", "--codec", ""]):
        assert argv[-2] in refusal(main, *argv)


@pytest.mark.parametrize("sizes", ["12,x", "8,8,8", "0", "65537", "²", "9" * 5000])
def test_book_sizes(corpus, tmp_path, sizes):
    assert sizes[:800] in refusal(main, "tokenize", "--codec", "mel_rvq", "--root", corpus, "--out", tmp_path / "out",
                            "--codebook_size", sizes)
