"""plots.py: titles in any script. What the pictures show is looked at in tests/test_pages.py."""

import warnings

import numpy as np

from trivox.audio import MelConfig
from trivox.plots import drawable, plot_spectrograms


def test_titles_of_any_script(tmp_path):
    """What the font has not is in Latin letters, instead of empty boxes and a warning for each."""
    assert drawable("Die Straße, улица") == "Die Straße, улица" and drawable("老渔夫 5") == "LaoYuFu 5"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_spectrograms(tmp_path / "a.png", "老渔夫 हिन्दी 😀", {"generated": np.zeros((9, 80))}, MelConfig())
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
