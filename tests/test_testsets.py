"""testsets.py: the three lists as they come, with what may be in them; what is missing or none of them is refused.
(test_runs.py judges runs by one.)"""

import pytest
from conftest import refusal

from trivox.testsets import LISTS, read_testset


@pytest.fixture
def lists(tmp_path):
    """A function: the folder of a list of these lines, with these recordings."""
    def make(name, text, files=()):
        for file in files:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / LISTS[name]).write_bytes(text.encode())
        return tmp_path
    return make


def test_seedtts(lists):
    """With a BOM, Windows's line ends and a separator that Python takes for one; a fifth cell is the recording."""
    folder = lists("seedtts", "\ufeffa-b|We asked.|prompt-wavs/a.wav|Get the\u2028trust fund.\r\n\r\n"
                   "c-d|No.|prompt-wavs/c.wav|Yes.|other/d.wav\n",
                   ["prompt-wavs/a.wav", "wavs/a-b.wav", "prompt-wavs/c.wav", "other/d.wav"])
    assert read_testset("seedtts", folder) == [
        {"id": "a-b", "text": "Get the\u2028trust fund.", "speaker": "prompt-wavs/a.wav",
         "prompt": folder / "prompt-wavs/a.wav", "recording": folder / "wavs/a-b.wav"},
        {"id": "c-d", "text": "Yes.", "speaker": "prompt-wavs/c.wav", "prompt": folder / "prompt-wavs/c.wav",
         "recording": folder / "other/d.wav"}]


def test_librispeech_pc(lists):
    folder = lists("librispeech_pc", "61-70968-0000\t4.9\tHe began.\t61-70970-0001\t5.2\tYoung Fitzooth, come!\n",
                   ["61/70968/61-70968-0000.flac", "61/70970/61-70970-0001.flac"])
    assert read_testset("librispeech_pc", folder) == [
        {"id": "61-70970-0001", "text": "Young Fitzooth, come!", "speaker": "61",
         "prompt": folder / "61/70968/61-70968-0000.flac", "recording": folder / "61/70970/61-70970-0001.flac"}]


def test_ljspeech(lists):
    folder = lists("ljspeech", "DUMMY1/LJ045-0096.wav|Mrs. De Mohrenschildt thought.\nLJ049-0022|The Secret Service.",
                   ["wavs/LJ045-0096.wav", "wavs/LJ049-0022.wav"])
    assert [(clip["id"], clip["text"], clip["prompt"]) for clip in read_testset("ljspeech", folder)] == [
        ("LJ045-0096", "Mrs. De Mohrenschildt thought.", None), ("LJ049-0022", "The Secret Service.", None)]


@pytest.mark.parametrize("name, text, words", [
    ("seedtts", "a-b|No.|a.wav|Yes.\n", ["meta.lst, line 1", "wavs/a-b.wav' is missing"]),
    ("seedtts", f"{'x' * 5000}|No.|a.wav|Yes.\n", ["meta.lst, line 1", "is missing"]),
    ("seedtts", "a\0b|No.|a.wav|Yes.\n", ["meta.lst, line 1", "is missing"]),
    ("seedtts", "a|b|c|d|e|f\n", ["meta.lst, line 1", "no line of such a list"]),
    ("librispeech_pc", "\n61-1-1 4.9 He began.\n", ["line 2", "no line of such a list"]),
    ("librispeech_pc", "a\tb\tc\td\te\tf\n", ["line 1", "no line of such a list"]),
    ("ljspeech", "../../etc/passwd|Hello.\n", ["line 1", "no line of such a list"]),
    ("ljspeech", "LJ001-0001|Hello.|Hello.\n", ["line 1", "no line of such a list"]),
    ("ljspeech", "\n\n", ["has no line of text"]),
], ids=str)
def test_faults(lists, name, text, words):
    said = refusal(lambda argv: read_testset(name, lists(name, text, ["a.wav"])))
    assert all(word in said for word in words), said


def test_no_list(tmp_path):
    said = refusal(lambda argv: read_testset("ljspeech", tmp_path))
    assert f"{tmp_path / LISTS['ljspeech']} is missing" in said and "--testset ljspeech takes" in said
