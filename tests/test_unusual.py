"""unusual.py: the clips that stand out among the others, by closed forms."""

import numpy as np
import pytest

from trivox.unusual import measure, tell_unusual


@pytest.mark.parametrize("amplitude, silence", [(0.5, 0.0), (0.05, 0.25), (1.0, 0.6)])
def test_a_tone_and_silence(amplitude, silence):
    """A sine has the power of half its amplitude squared, whatever stands beside it."""
    wav = amplitude * np.sin(np.arange(22050 * 2) * 0.2)
    wav[:int(silence * len(wav))] *= 1e-4
    heard = measure(wav.astype(np.float32), 22050)
    assert heard["loudness"] == pytest.approx(10 * np.log10(amplitude ** 2 / 2), abs=0.1)
    assert heard["silence"] == pytest.approx(silence, abs=0.02)


@pytest.mark.parametrize("samples", [1, 100, 441])
def test_next_to_nothing(samples):
    heard = measure(np.zeros(samples, np.float32), 22050)
    assert np.isfinite([*heard.values()]).all()


def test_what_stands_out(capsys):
    """Of a hundred clips those that were spoiled, the furthest first, and no other; too few show nothing."""
    rng = np.random.default_rng(0)
    rows = [{"id": f"c{n}", "text": "x" * int(rng.integers(80, 120)), "frames": int(rng.integers(600, 700)),
             "loudness": rng.normal(-20, 2), "silence": rng.uniform(0.1, 0.2)} for n in range(100)]
    tell_unusual(rows, 100.0)
    assert capsys.readouterr().out == ""
    rows[7] |= {"text": "x" * 300}
    rows[8] |= {"text": "x" * 3, "loudness": -60.0}
    rows[9] |= {"silence": 0.9}
    rows[10].pop("loudness")
    tell_unusual(rows, 100.0)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["unusual c8", "unusual c9", "unusual c8", "unusual c7"]
    assert "-60 dB" in said[0] and "90%" in said[1] and "bytes of text a second" in said[2]
    tell_unusual(rows[:15], 100.0)
    assert capsys.readouterr().out == ""
