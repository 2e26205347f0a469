"""check.py: the page of a corpus, by what is known of its clips."""

import re
import unicodedata

import numpy as np
import soundfile
from conftest import refusal
from helpers import make_corpus, tone

import data
from trivox import corpora
from trivox.recordings import write_wav


def test_the_page_of_a_corpus(tmp_path, one_process, capsys):
    """Hours, rates, what cannot be used and why, letters that a model does not know; the odd clips first, whose players
    find their recordings; and what is hostile in a text stays a text."""
    clips = {f"c{n:02d}": tone(1.0 + n / 100) for n in range(30)}
    clips |= {"quiet": 1e-3 * tone(1.2), "long": tone(6.0), "silent": 0 * tone(1), "gone": None}
    lines = [f"{id}|Text of the clip {id}." for id in clips]
    lines[3] = "c03|<script>alert(1)</script> \u0141\u00f3d\u017a \u732b"
    root = make_corpus(tmp_path / "my corpus #1", clips, [*lines, "c00|Again.", "c31|"])
    write_wav(root / "wavs" / "c04.wav", tone(1.0)[::2], 11025)
    (root / "heldout.txt").write_text("c01\n")
    out = tmp_path / "page"
    data.main(["check", "--root", str(root), "--out", str(out)])
    said, html = capsys.readouterr().out, (out / "index.html").read_text(encoding="utf-8")
    hours = sum(len(clips[id]) for id in clips if id[0] in "cql") / 22050 / 3600
    assert f"clips: 32, {hours:.2f} h; 4 that cannot be used" in said
    assert "22,050 Hz (31), 11,025 Hz (1)" in said and "held out: 1 by heldout.txt" in said
    for why in ("it is silent", "no such recording", "names it again, after line 1", "has no text"):
        assert why in html
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    marked = re.findall('class="unknown" title="([^"]*)"', html)
    assert unicodedata.name("\u732b").lower() in marked and "latin small letter a" not in marked
    players = re.findall('<audio [^>]*src="([^"]*)" aria-label="([^"]*)"', html)
    assert {id for _, id in players[:2]} == {"quiet", "long"} and len(players) == 20
    for url, id in players:
        file = out / url.replace("%20", " ").replace("%23", "#")
        assert np.array_equal(soundfile.read(file)[0], soundfile.read(root / "wavs" / f"{id}.wav")[0])
    assert (out / "check.png").stat().st_size > 1000


def test_the_alphabet_of_another_language(tmp_path, one_process):
    """Numbers are in its words; what Echolancer's alphabet has nothing like is marked."""
    root = make_corpus(tmp_path / "corpus", {"a": tone(1.0), "b": tone(1.1)}, ["a|Es war 5 Uhr.", "b|Привет, 12."])
    data.main(["check", "--root", str(root), "--out", str(tmp_path / "page"), "--language", "de"])
    html = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    named = {name: bool(unknown) for unknown, name in re.findall(r'<span( class="unknown")? title="([^"]*)"', html)}
    assert "latin small letter u with diaeresis" in named and not any("digit" in name for name in named)  # fünf
    assert named["cyrillic small letter te"] and not named["latin small letter z"]  # zwölf
    assert "<td>Es war 5 Uhr.</td><td>Es war fünf Uhr.</td>" in html


def test_a_language_that_was_not_told(tmp_path, one_process, capsys):
    """A tenth of the texts and more with letters that English has not; not the odd café."""
    texts = ["Zwölf Hühner.", "Der Weg, 5 km.", "Größe."]
    root = make_corpus(tmp_path / "corpus", {id: tone(1.0) for id in "abc"}, [f"{i}|{t}" for i, t in zip("abc", texts)])
    flags = "--root", str(root), "--out"
    for command in (["check"], ["ljspeech"], ["tokenize", "--codec", "mel_rvq", "--codebook_size", "4"]):
        data.main([*command, *flags, str(tmp_path / command[0])])
        said = capsys.readouterr().out
        assert "67% of the texts have letters such as ö ü ß" in said or "letters such as ö" in said, said
        data.main([*command, *flags, str(tmp_path / f"{command[0]}_de"), "--language", "de"])
        assert "have letters such as" not in capsys.readouterr().out
    corpora.tell_language([{"text": "A café."}] + [{"text": "A house."}] * 20, "en")
    assert not capsys.readouterr().out


def test_nothing_to_check(tmp_path, one_process):
    root = make_corpus(tmp_path / "corpus", {"a": 0 * tone(1)})
    said = refusal(data.main, "check", "--root", root, "--out", tmp_path / "out")
    assert "none of the 1 clips" in said and "it is silent" in said and not (tmp_path / "out").exists()
