"""corpora.py: whatever a metadata.csv holds, folders that are no corpus, which clips are for validation."""

import hashlib
import json
import os

import pytest
import soundfile
from conftest import refusal
from helpers import make_corpus, tone

import data
from trivox import corpora
from trivox.audio import MelConfig
from trivox.corpora import Recordings, draw_validation, read_corpus
from trivox.datasets import TokenDataset
from trivox.prepare import tokenize
from trivox.recordings import write_wav

@pytest.mark.parametrize("files, words", [
    ([], "neither a list of clips"), (["wavs/readme.txt"], "neither a list of clips"),
    (["wavs/a.wav"], "~/.cache/whisper/"),
])
def test_folders_that_are_no_corpus(tmp_path, files, words):
    """Among them one of bare recordings, where Whisper would have to write the transcripts and cannot be had."""
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        write_wav(tmp_path / file, tone(0.1), 22050) if file.endswith("wav") else (tmp_path / file).touch()
    said = refusal(data.main, "ljspeech", "--root", tmp_path, "--out", tmp_path / "out")
    assert words in said and not (tmp_path / "out").exists()


def test_no_download(tmp_path):
    """From where, and what to do instead."""
    said = refusal(data.main, "ljspeech", "--out", tmp_path / "data" / "ljspeech")
    assert corpora.LJSPEECH_URL in said and "--root" in said


def test_validation_is_drawn():
    """2 % of the clips, the same in whatever order they stand."""
    ids = [f"clip-{i}" for i in range(500)]
    drawn = draw_validation(ids)
    assert len(drawn) == 10 and drawn == draw_validation(ids[::-1]) and drawn != set(ids[:10])
    assert [len(draw_validation(ids[:n])) for n in (1, 2, 30)] == [0, 1, 1]


def test_validation_is_drawn_by_file(tmp_path, one_process):
    """5 % of the files that can be used, whatever their order: an unusable one that would be drawn is not held out, and
    the next one is; which ones does not depend on those that are not used."""
    clips = {f"{n:03d}": tone(0.05) for n in range(40)}
    root, held = make_corpus(tmp_path / "corpus", clips), []
    for n in range(3):
        tokenize(root, tmp_path / str(n), "mel_rvq", mel=MelConfig(), sizes=[8])
        data_set = TokenDataset(tmp_path / str(n))
        held.append({data_set.rows[i]["source"] for i in data_set.clips("val")})
        rows = (root / "metadata.csv").read_text().splitlines()
        if n == 0:
            (root / "metadata.csv").write_text("\n".join(rows[::-1]))
        else:
            for source in held[0]:
                write_wav(root / source, 0 * tone(0.05), 22050)
    assert len(held[0]) == 2 and held[0] == held[1] and len(held[2]) == 2 and not held[2] & held[0]


def test_one_is_held_out_of_those_that_can_be_used(tmp_path, one_process):
    """Of two, where the one that was drawn is silent; where only one is left, none."""
    root = make_corpus(tmp_path / "corpus", {id: tone(0.3) for id in "abc"})
    for n, held_out in enumerate((1, 1, 0)):
        data.main(["ljspeech", "--root", str(root), "--out", str(tmp_path / "mels")])
        stats = json.loads((tmp_path / "mels" / "dataset_stats.json").read_text())
        rows = [json.loads(line) for line in (tmp_path / "mels" / "mels_00000.jsonl").open()]
        drawn = [row["id"] for row in rows if row.get("split") == "val"]
        assert (stats["clips"], stats["validation_clips"], len(drawn)) == (3 - n, held_out, held_out)
        for id in drawn:
            write_wav(root / "wavs" / f"{id}.wav", 0 * tone(0.3), 22050)


def test_a_name_that_is_no_utf8(tmp_path, one_process, capsys):
    """Its recording is used as any other, and drawn by its bytes."""
    names = [os.fsdecode(b"a\xe9"), "b"]
    for name in names:
        write_wav(tmp_path / "c" / f"{name}.wav", tone(0.3), 22050)
    tokenize(tmp_path / "c", tmp_path / "out", "mel_rvq", mel=MelConfig(), sizes=[8])
    assert {row["id"] for row in TokenDataset(tmp_path / "out").rows} == set(names)
    assert "2 clips" in capsys.readouterr().out
    assert corpora.draw_key(names[0]) == hashlib.sha256(b"a\xe9").digest()
    assert corpora.draw_key("é") == hashlib.sha256("é".encode()).digest()


@pytest.mark.parametrize("said, found", [
    ("a\nc d\n", {"a", "c d"}), ("\n  b \r\n", {"b"}), ("", set()), ("\ufeffa\nb", {"a", "b"}),
    ("b.wav\nwavs/a.wav\nwavs/c d\n", {"a", "b", "c d"}), ("a b\n", "line 1"), ("a\nd.wav\n", "line 2"),
], ids=["with a space", "blanks", "empty", "BOM", "endings and folders", "two in a line", "a typo"])
def test_what_is_held_out(tmp_path, one_process, said, found):
    """By either kind of data set; an id that is none holds nothing out, and is refused with the nearest."""
    root = make_corpus(tmp_path / "corpus", {id: tone(0.3) for id in ("a", "b", "c d", "e")})
    (root / "heldout.txt").write_text(said, encoding="utf-8")
    mels = ("ljspeech", "--root", root, "--out", tmp_path / "mels")
    if isinstance(found, str):
        for words in refusal(data.main, *mels), refusal(lambda argv: read_corpus(root)):
            assert found in words and "the nearest is" in words
        return
    data.main([*map(str, mels)])
    tokenize(root, tmp_path / "tokens", "mel_rvq", mel=MelConfig(), sizes=[8])
    for path in tmp_path / "mels" / "mels_00000.jsonl", tmp_path / "tokens" / "tokens_00000.jsonl":
        rows = [json.loads(line) for line in path.open()]
        assert {row["id"] for row in rows if row["split"] == "val"} == found
    for id in found:
        write_wav(root / "wavs" / f"{id}.wav", 0 * tone(0.3), 22050)
    if found:
        assert "could be used" in refusal(data.main, *mels)
        assert not (tmp_path / "mels" / "dataset_stats.json").exists()


# ------------------------------------------------------------------------------------------------------------
# Recordings by their names

FILES = ["wavs/a.wav", "wavs/c.d.FLAC", "wavs/deep/b.Wav", "clips/e.mp3", "two/x.wav", "three/x.wav", "wavs/é.wav",
         "wavs/both.wav", "wavs/both.flac", ".git/annex/f.wav", "wavs/.g.wav", "notes.txt"]


@pytest.fixture
def named(tmp_path):
    for file in FILES:
        (tmp_path / "corpus" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / file).write_bytes(b"x")
    (tmp_path / "outside.wav").touch()
    return tmp_path / "corpus"


@pytest.mark.parametrize("name, found", [
    ("a", "wavs/a.wav"), ("a.wav", "wavs/a.wav"), ("wavs/a", "wavs/a.wav"), ("a.WAV", "wavs/a.wav"),
    ("{root}/wavs/a.wav", "wavs/a.wav"), ("./wavs//a.wav", "wavs/a.wav"), ("wavs\\a.wav", "wavs/a.wav"),
    ("c.d", "wavs/c.d.FLAC"), ("deep/b", "wavs/deep/b.Wav"), ("b", "wavs/deep/b.Wav"), ("e", "clips/e.mp3"),
    ("e\u0301", "wavs/é.wav"), ("é.wav", "wavs/é.wav"), ("both", "wavs/both.wav"), ("both.flac", "wavs/both.flac"),
    ("two/x", "two/x.wav"), ("x", "two/x.wav and"), ("c", "no such"), ("A", "no such"), ("f", "no such"),
    ("g", "no such"), ("../outside", "leads out"), ("wavs/../../outside.wav", "leads out"), ("/etc/a.wav", "leads out"),
    ("deep/../a", "wavs/a.wav"), ("\0", "no such"), ("a" * 5000, "no such"), ("eep/b", "no such"),
])
def test_names(named, name, found):
    recordings = Recordings(named)
    if found in FILES:
        assert recordings.find(name.format(root=named)) == found
    else:
        assert found.replace("two/x.wav and", "it can be") in refusal(lambda argv: recordings.find(name))


def test_links(tmp_path, one_process, capsys):
    """To recordings and folders anywhere, as git-annex and hubs keep them; rings of them end; one to nothing is
    named."""
    clips, store = {"a": tone(0.3), "b": None, "linked/c": None, "d": None}, tmp_path / "store"
    root = make_corpus(tmp_path / "corpus", clips)
    for file in ("4f.blob", "folder/c.wav"):
        write_wav(store / file, tone(0.3, 500), 22050)
    (root / "wavs" / "b.wav").symlink_to(store / "4f.blob")
    (root / "wavs" / "linked").symlink_to(store / "folder")
    (root / "wavs" / "d.wav").symlink_to(".git/annex/objects/d")
    (store / "folder" / "ring").symlink_to(root)
    data.main(["ljspeech", "--root", str(root), "--out", str(tmp_path / "mels")])
    said = capsys.readouterr().out
    assert "3 clips, " in said and "1 skipped" in said and "d: wavs/d.wav is a link to .git/annex/objects/d" in said
    tokenize(root / "wavs", tmp_path / "tokens", "mel_rvq", (20, "frames"), mel=MelConfig(), sizes=[8])
    assert {row["source"] for row in TokenDataset(tmp_path / "tokens").rows} == {"a.wav", "b.wav", "linked/c.wav"}
    assert "skipped d: it is a link to" in capsys.readouterr().out


@pytest.mark.parametrize("lines, ids, words", [
    (["DUMMY/a.wav|It was late.", "DUMMY/b.wav|Two came."], "ab", "by DUMMY/"),
    (["/home/jo/set/wavs/a.wav|It was late.", "/home/jo/set/wavs/b.wav|Two came."], "ab", "by /home/jo/set/"),
    (["a|It was late.", "b|Two came.", "a.wav|Late."], "ab", "line 3 of metadata.csv names it again, after line 1"),
    (["a|It was late.|bob", "b|Two came.|bob"], "ab", "id, text, speaker, with a bar between; 2 clips"),
])
def test_how_a_list_is_understood(tmp_path, capsys, lines, ids, words):
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.1), "b": tone(0.1)}, lines)
    clips, heldout = read_corpus(root)
    said = capsys.readouterr().out + str(clips)
    assert [clip["id"] for clip in clips if "skipped" not in clip] == [*ids] and heldout is None
    assert words in said and "wavs/a.wav: 'It was late.', " in said


def test_two_recordings_of_one_name(tmp_path, one_process):
    """Each is a clip of its own, by whichever door; what is dropped or held out by an id is every clip of that id."""
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.3), "b": tone(0.3)}, ["a.wav|One.", "a.flac|Two.", "b|Three."])
    soundfile.write(root / "wavs" / "a.flac", tone(0.4, 500), 22050)
    clips, _ = read_corpus(root)
    assert [(clip["id"], clip["source"]) for clip in clips] == [
        ("a", "wavs/a.wav"), ("a.flac", "wavs/a.flac"), ("b", "wavs/b.wav")]
    assert sorted(clip["id"] for clip in read_corpus(root / "wavs")[0]) == ["a", "a.wav", "b"]
    (root / "metadata.csv").write_text("a|One.\nb|Three.\na|Again.\n")
    (tmp_path / "audit.csv").write_text("id,drop\na,x\nb,no\n")
    clips, _ = read_corpus(root, drop=tmp_path / "audit.csv")
    assert [clip.get("skipped", "")[:9] for clip in clips] == ["audit.csv", "", "line 3 of"]
    for bad in ('id,drop\n"a,x\n', "id,drop\na,x\rb,\n"):
        (tmp_path / "audit.csv").write_text(bad)
        assert "audit.csv" in refusal(lambda argv: read_corpus(root, drop=tmp_path / "audit.csv"))


def test_what_is_not_read_is_told(tmp_path, capsys, one_process):
    """Recordings that no line names; files that may be lists, where no list has a known name; a text of marks alone."""
    root = make_corpus(tmp_path / "corpus", {id: tone(0.3) for id in "abc"}, ["a|One.", "b|\u200b-"])
    data.main(["ljspeech", "--root", str(root), "--out", str(tmp_path / "mels")])
    said = capsys.readouterr().out
    assert "names none of 1 recordings" in said and "wavs/c.wav" in said
    assert "skipped b: its text, '\\u200b-', has no letter and no digit" in said
    (root / "metadata.csv").rename(root / "train_list.txt")
    said = refusal(data.main, "ljspeech", "--root", root, "--out", tmp_path / "new")
    assert "train_list.txt" in said and "--metadata" in said
    data.main(["check", "--root", str(root), "--out", str(tmp_path / "page")])
    assert "train_list.txt" in capsys.readouterr().out
    assert "--metadata names one" in refusal(data.main, "check", "--root", root, "--columns", "id|text")
    (root / "train_list.txt").rename(root / "Metadata.CSV")
    assert [clip["text"] for clip in read_corpus(root)[0]] == ["One.", "\u200b-"]
