"""open_speech.py: LJSpeech's sentences as they were packed, what is drawn of them, and a corpus that was killed."""

import hashlib
import lzma

import pytest
from conftest import ROOT, refusal

from data import main
from trivox import open_speech, synthesisers
from trivox.metadata import read_transcripts
from trivox.normalise import normalise_text
from trivox.open_speech import SENTENCES, SOURCE, bare, distinct, make_open_corpus, pack, sentences


def test_sentences(tmp_path):
    """They are those that were packed, in words, once each, and none is a prompt. Packed anew they are the same, but
    for abbreviations."""
    text = lzma.decompress(SENTENCES.read_bytes())
    assert hashlib.sha256(text).hexdigest() == "f2332960586a938f8a0420abe74ce7b1a431360a0a80704f3c3c818700d6d37e"
    rows = sentences()
    assert len(rows) == len({text for _, text in rows}) == 13074 and SENTENCES.stat().st_size < 700_000
    assert text.startswith(SOURCE.encode()) and "public domain" in SOURCE
    (tmp_path / "metadata.csv").write_text("".join(f"{id}|As it was.|{text}\n" for id, text in rows + rows[:9]))
    pack(tmp_path / "metadata.csv", tmp_path / "packed")
    anew = lzma.decompress((tmp_path / "packed").read_bytes()).decode()
    assert anew == SOURCE + "".join(f"{id}|{normalise_text(text, accents=True)}\n" for id, text in rows)
    prompts = {bare(line) for line in (ROOT / "configs" / "prompts_64.txt").read_text().splitlines()}
    assert len(prompts) == 64 and not prompts & {bare(text) for _, text in rows}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(...): the clips of a corpus and the ids held out, of which nothing is spoken."""
    def draw(**settings):
        with monkeypatch.context() as patch:
            patch.setattr(open_speech, "speak_corpus", lambda root, clips, heldout: told.append((clips, heldout)))
            told = []
            make_open_corpus(tmp_path, **{"voices": ["heart"]} | settings)
        return told[0]

    return draw


def test_what_is_held_out(drawn, capsys):
    """512, whatever is trained on; none of their texts is. More hours contain the fewer."""
    (all_, heldout), (one, same), (two, also) = drawn(), drawn(hours=1, voices=["a", "b"]), drawn(hours=2)
    assert heldout == same == also and len({*heldout}) == 512 and len(all_) == 13074
    train = [{id for id, *_ in clips} - {*heldout} for clips in (one, two, all_)]
    assert train[0] < train[1] < train[2] and len(train[1]) == pytest.approx(2 * len(train[0]), rel=0.1)
    texts = {id: bare(text) for id, text, _ in all_}
    assert not {texts[id] for id in heldout} & {texts[id] for id in train[2]}
    assert [clip for clip in all_ if clip in two] == two and {voice for *_, voice in one} == {"a", "b"}
    assert not capsys.readouterr().out
    drawn(hours=50)
    assert "less than --hours 50" in capsys.readouterr().out


def test_sentences_of_others(drawn, tmp_path, capsys):
    """Equal ones are left out, and what differs from a held-out one by case or marks; each is told."""
    (tmp_path / "list").write_text("One box.\nTwo boxes!\nOne box.\nONE BOX\nThree  boxes\ntwo boxes\n")
    assert distinct(tmp_path / "list")[:2] == [("clip-00000", "One box."), ("clip-00001", "Two boxes!")]
    assert "1 of 6 sentences are left out" in capsys.readouterr().out
    clips, heldout = drawn(transcripts=tmp_path / "list", heldout=2)
    texts = {id: bare(text) for id, text, _ in clips}
    assert "as their words are those of one that is held out" in capsys.readouterr().out
    assert not {texts.pop(id) for id in heldout} & {*texts.values()} and texts
    refuse = lambda n: refusal(lambda argv: make_open_corpus(tmp_path, ["en-us"], None, n, tmp_path / "list"))
    assert "leave none" in refuse(5)


def test_a_killed_corpus_goes_on(tmp_path, one_process, monkeypatch):
    """To the files that there would have been, of which those that are there are not spoken again."""
    flags = ["open", "--hours", "0.004", "--heldout", "2", "--voices", "en-us"]
    spoken, speak = [], synthesisers.speak

    def dies(text, voice):
        if len(spoken) == 3:
            raise KeyboardInterrupt
        spoken.append(text)
        return speak(text, voice)

    monkeypatch.setattr(synthesisers, "speak", dies)
    with pytest.raises(KeyboardInterrupt):
        main([*flags, "--out", str(tmp_path)])
    (tmp_path / "corpus" / "wavs" / "LJ.wav.1.part").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.wav")}
    monkeypatch.setattr(synthesisers, "speak", lambda text, voice: spoken.append(text) or speak(text, voice))
    main([*flags, "--out", str(tmp_path)])
    clips = read_transcripts(tmp_path / "corpus" / "metadata.csv")
    assert len(before) == 3 and all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert sorted(spoken) == sorted(clip["text"] for clip in clips)
    assert sorted(path.name for path in (tmp_path / "corpus" / "wavs").iterdir()) == sorted(
        f"{clip['id']}.wav" for clip in clips)
    heldout = (tmp_path / "corpus" / "heldout.txt").read_text().split()
    assert (tmp_path / "dataset_stats.json").exists() and len(heldout) == 2 and len(clips) > 3
