"""beside.py, through corpora.py: texts in files of their own, in the layouts of published corpora."""

import json

import pytest
from conftest import refusal
from helpers import tone

import data
from trivox.audio import MelConfig
from trivox.corpora import has_texts, read_corpus
from trivox.datasets import MelDataset, TokenDataset
from trivox.recordings import write_wav

TEXTS = ["It was late.", "Two came.", "Nobody knew."]


def folder(root, files):
    """{path: its text, or None for a recording}."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8") if text is not None else write_wav(path, tone(0.3), 22050)
    return root


LAYOUTS = {
    "LibriTTS": ({f"dev-clean/19/198/19_198_{n}{ending}": text and text(said)
                  for n, said in enumerate(TEXTS) for ending, text in (
        (".wav", None), (".normalized.txt", str), (".original.txt", str.upper))}, "19"),
    "VCTK": ({name: text for n, said in enumerate(TEXTS) for name, text in (
        (f"wav48/p225/p225_00{n}_mic1.wav", None), (f"wav48/p225/p225_00{n}_mic2.wav", None),
        (f"txt/p225/p225_00{n}.txt", f"{said}\n"))} | {"speaker-info.txt": "ID AGE\n"}, "p225"),
    "LibriSpeech": ({f"19/198/19-198-{n}.wav": None for n in range(3)} | {
        "19/198/19-198.trans.txt": "".join(f"19-198-{n} {said}\n" for n, said in enumerate(TEXTS))}, "19"),
    "LibriTTS, a table": ({f"19/198/19_198_{n}.wav": None for n in range(3)} | {
        "19/198/19_198.trans.tsv": "".join(f"19_198_{n}\t{said.upper()}\t{said}\n" for n, said in enumerate(TEXTS))},
        "19"),
    "Montreal's aligner": ({f"bob/{n}{ending}": text and said for n, said in enumerate(TEXTS)
                            for ending, text in ((".wav", None), (".lab", True))}, ""),
    "a folder of texts": ({f"{folder}{n}{ending}": text and said for n, said in enumerate(TEXTS)
                           for folder, ending, text in (("wavs/", ".wav", None), ("transcripts/", ".txt", True))}, ""),
    "a word a line": ({f"wavs/é{n}.TXT": said.replace(" ", "\n") for n, said in enumerate(TEXTS)}
                      | {f"wavs/e\u0301{n}.wav": None for n in range(3)}, ""),
}


@pytest.mark.parametrize("files, speaker", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path, capsys, files, speaker):
    root = folder(tmp_path / "corpus", files)
    clips, heldout = read_corpus(root)
    assert has_texts(root) and heldout is None
    assert [(clip["text"], clip["speaker"]) for clip in clips if "skipped" not in clip] == [
        (text, speaker) for text in TEXTS]
    assert all("microphone" in clip["skipped"] for clip in clips if "skipped" in clip)
    said = capsys.readouterr().out
    assert "texts in files such as" in said and "'It was late.', " + (speaker or "no speaker named") in said


def test_what_is_missing_is_told(tmp_path, capsys):
    """Recordings without a text, empty texts, labels, and texts of no recording; of too few texts none is read."""
    files = {f"{name}.wav": None for name in "abcdef"} | {
        "a.txt": "Yes.", "b.txt": " \n", "c.lab": "0 50000 pau\n50000 90000 h\n", "d.txt": "So.", "z.txt": "Lost."}
    root = folder(tmp_path / "corpus", files)
    clips, _ = read_corpus(root)
    assert [clip.get("skipped", clip["text"])[:18] for clip in clips] == [
        "Yes.", "b.txt has no text", "c.lab tells when e", "So.", "no file with its t", "no file with its t"]
    assert "1 texts beside recordings" in (said := capsys.readouterr().out) and "z.txt" in said
    for name in "bcd":
        next(root.glob(f"{name}.[tl]*")).unlink()
    assert {clip["text"] for clip in read_corpus(root)[0]} == {""} and not has_texts(root)
    assert "1 of 6 recordings" in capsys.readouterr().out


def test_nothing_is_guessed(tmp_path, capsys):
    """One text for recordings of one name in two folders is neither's; a metadata.json that is no list is none; numbers
    before a text are no labels, but for TIMIT's."""
    twice = folder(tmp_path / "twice", {"a/1.wav": None, "b/1.wav": None, "txt/1.txt": "Whose?", "metadata.json": "{}"})
    assert [clip["text"] for clip in read_corpus(twice)[0]] == ["", ""]
    assert "metadata.json" in capsys.readouterr().out
    (twice / "metadata.json").unlink()
    assert read_corpus(twice) and "txt/1.txt, are of no recording" in capsys.readouterr().out
    root = folder(tmp_path / "corpus", {"a.wav": None, "a.txt": "5 000 hommes", "b.wav": None, "b.txt": "0 46797 She"})
    (root / "metadata.json").write_text('{"name": "mine", "licence": "none"}')
    assert [clip.get("skipped", clip["text"])[:12] for clip in read_corpus(root)[0]] == ["5 000 hommes", "b.txt tells "]


def test_from_a_folder_to_data_sets(tmp_path, one_process, capsys):
    """Both kinds, with heldout.txt; nothing is transcribed, nor cut."""
    root = folder(tmp_path / "corpus", {f"{n}{ending}": text and said for n, said in enumerate(TEXTS)
                                        for ending, text in ((".wav", None), (".txt", True))} | {"heldout.txt": "1\n"})
    data.main(["ljspeech", "--root", str(root), "--out", str(tmp_path / "mels")])
    data.main(["tokenize", "--root", str(root), "--out", str(tmp_path / "tokens"), "--codec", "mel_rvq",
               "--codebooks", "1", "--codebook_size", "4"])
    for made in MelDataset(tmp_path / "mels", MelConfig()), TokenDataset(tmp_path / "tokens"):
        assert [(row["text"], row["split"]) for row in made.rows] == [*zip(TEXTS, ["train", "val", "train"])]
    assert json.loads((tmp_path / "tokens" / "codec.json").read_text())["chunk_frames"] is None
    assert "has some" in refusal(data.main, "ljspeech", "--root", root, "--out", tmp_path / "x", "--whisper", "base")
