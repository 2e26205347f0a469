"""demo_music.py: its pieces."""

import numpy as np
import pytest
from conftest import refusal

from data import main
from trivox.datasets import TokenDataset
from trivox.recordings import read_wav
from trivox import demo_music
from trivox.corpora import MARK
from trivox.demo_music import compose, make_demo_music

def test_demo_music(tmp_path, one_process):
    """Deterministic pieces of 6 to 11 s at full scale; those held out are the ones named."""
    main(["demo_music", "--out", str(tmp_path), "--pieces", "5", "--heldout", "2", "--codebooks", "1",
          "--codebook_size", "32"])
    dataset = TokenDataset(tmp_path, codec="mel_rvq", codebooks=1)
    assert [dataset.rows[i]["id"] for i in dataset.clips("val")] == ["wavs/piece-00003", "wavs/piece-00004"]
    for seed in range(5):
        wav, stored = compose(seed), read_wav(tmp_path / "corpus" / "wavs" / f"piece-{seed:05d}.wav", 22050)
        np.testing.assert_allclose(wav, stored, atol=1e-4)
        assert 6 < len(wav) / 22050 < 11.5 and np.abs(wav).max() == pytest.approx(0.9)
    assert "none to train on" in refusal(main, "demo_music", "--out", tmp_path, "--pieces", 2, "--heldout", 2)


def test_another_corpus_stays(tmp_path, one_process, monkeypatch):
    """One of before there was the mark is known by its pieces, and none is composed again."""
    make_demo_music(tmp_path / "ours", 2, 1)
    (tmp_path / "ours" / MARK).unlink()
    monkeypatch.setattr(demo_music, "compose", None)
    make_demo_music(tmp_path / "ours", 2, 1)
    for name in "wavs/song.wav", "metadata.csv", "heldout.txt":
        root = tmp_path / name.replace("/", "_")
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("mine")
        assert "--root" in refusal(lambda argv: make_demo_music(root, 2, 1))
        assert [path for path in root.rglob("*") if path.is_file()] == [root / name]
