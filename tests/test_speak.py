"""speak.py: one text is the same sound by every door; sentences, options, what is refused."""

import json
from dataclasses import asdict
from threading import Event

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY_CODEC, TINY_FLOW, TINY_LLM, refusal

import evaluate
import sample
import serve
import train_codec_lm
import train_flow_tts
import train_llm_tts
from trivox import common, options, speak
from trivox.common import UserError
from trivox.sentences import split_text

TEXT = "The baker sold 2 books. Mr. Brown painted nine keys!"
QUICK = dict(overfit=4, batch_size=4, steps=2, warmup_steps=1, eval_every=2, device="cpu", dtype="float32",
             wandb_mode="disabled", eval_prompts="prompts.txt")
SYSTEMS = {
    "flow": (train_flow_tts, TINY_FLOW | dict(speak_every=2, eval_steps=2)),
    "codec": (train_codec_lm, TINY_CODEC | dict(context=256, cross_every=1, sample_every=2, eval_samples=1,
                                                eval_seconds=5.5, eval_cfg_scale=1.5)),
    "llm": (train_llm_tts, TINY_LLM | dict(packed=False, sample_every=2, eval_samples=1, eval_seconds=2)),
}


@pytest.fixture(scope="module")
def runs(data_dir, codec_tokens, llm_tokens, tmp_path_factory):
    """The folder of a run of each system; the trainers of two have spoken TEXT."""
    home = tmp_path_factory.mktemp("doors")
    (home / "prompts.txt").write_text(TEXT + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "catch_signals", Event)
        patch.chdir(home)
        for (name, (trainer, settings)), data in zip(SYSTEMS.items(), (data_dir, codec_tokens, llm_tokens)):
            settings = QUICK | settings | dict(data_dir=data, out_dir=home / name)
            if name == "llm":  # which has no prompts of a file
                settings["eval_prompts"] = "heldout"
            trainer.main([f"--{key}={value}" for key, value in settings.items()])
    return home


def pcm(path):
    return soundfile.read(path, dtype="int16")[0].astype(int)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_door(runs, system, tmp_path, monkeypatch):
    """One text, with numbers, an abbreviation and two sentences: `stream`, sample.py, serve.py, `speak` among other
    texts, the trainer's own sample and evaluate.py's make the same samples, but for the rounding of float32 sums over
    batches of other shapes."""
    monkeypatch.chdir(runs)
    speaker, text = speak.load(system), TEXT
    if system == "llm":  # the sentence that the trainer has spoken
        text = json.loads((runs / system / "samples" / "step_00000002" / "clips.jsonl").read_text())["text"]
    wav = np.concatenate(list(speaker.stream(text, seed=0)))
    wanted = (np.clip(wav, -1, 1) * 32767).round().astype(int)
    sample.main(["--ckpt", system, "--text", text, "--device", "cpu", "--out", str(tmp_path / "a.wav")])
    (tmp_path / "t.txt").write_text(text + "\n")
    sample.main(["--ckpt", system, "--text_file", str(tmp_path / "t.txt"), "--device", "cpu", "--out", str(tmp_path)])
    among = speaker.speak([{"text": "Two.", "seed": 7}, {"text": text, "seed": 0}, {"text": "Nine books and a house."}])
    doors = [pcm(tmp_path / "a.wav"), pcm(tmp_path / "0001.wav"),
             pcm(runs / system / "samples" / "step_00000002" / "000.wav"),
             (np.clip(among[1].wav, -1, 1) * 32767).round().astype(int)]
    if system == "flow":
        evaluate.main(["--ckpt", system, "--prompts", str(tmp_path / "t.txt"), "--device", "cpu", "--recogniser",
                       "sentences", "--out", str(tmp_path / "e")])
        doors.append(pcm(tmp_path / "e" / "000.wav"))
    if serve.find_spec("gradio"):
        page = serve.build(system, speaker)
        answer = next(f.fn for f in page.fns.values() if f.api_name == "speak")
        doors.append(answer(text, *(option.default for option in speaker.options))[0][1].astype(int))
    for door in doors:
        assert len(door) == len(wanted) and np.abs(door - wanted).max() <= 8  # of 32,767


@pytest.mark.parametrize("system", SYSTEMS)
def test_seconds_are_of_the_whole(runs, system):
    """Three sentences and the pauses between them take what was asked for: the flow TTS to a frame, the others at most.
    Streamed or among others of another length it is the same sound."""
    speaker, text = speak.load(runs / system), "The baker sold 2 books. Mr. Brown painted nine keys! Seven boxes."
    rate = speaker.mel.frame_rate if system == "flow" else speaker.c.frame_rate
    for seconds in (0.9, 1.4):
        wav = np.concatenate(list(speaker.stream(text, seed=5, seconds=seconds)))
        among = speaker.speak([{"text": "Two. Nine keys.", "seed": 7, "seconds": 0.5}, {"text": "Two."},
                               {"text": text, "seed": 5, "seconds": seconds}])
        assert len(among[2].wav) == len(wav) and np.abs(among[2].wav - wav).max() <= 8 / 32767
        assert len(wav) / speaker.sample_rate < seconds + 1 / rate
        assert system != "flow" or len(wav) / speaker.sample_rate > seconds - 1 / rate
    if system == "llm":
        assert len(np.concatenate(list(speaker.stream(text, seconds=0.01)))) == speaker.codec.hop_length
    else:
        with pytest.raises(UserError, match=r"--seconds 0.3 leaves no room.* between 3 sentences take 0.3 s"):
            speaker.stream(text, seconds=0.3)


def scripted(speaker, *sentences):
    """Let an LLM TTS speak so many codes of each sentence, -1 for none, whatever it is asked for."""
    spoken = [[*range(n), -1] + [-1] * 100 for n in sentences]
    speaker.run = lambda loop, parts: (torch.tensor(codes) for codes in zip(*spoken[:len(parts)]))
    speaker.make = lambda parts: [torch.arange(n)[:, None] for n in sentences[:len(parts)]]


@pytest.mark.parametrize("seconds, heard, cut, unheard", [
    (2.0, (10, 8, 5), "", ""),  # of 50 codes a second, pauses take 7.5
    (0.72, (10, 8, 3), "'Seven boxes.' has no end after 0.06 s", ""),
    (0.51, (10, 8), "'Nine keys.' has no end after 0.16 s", "'Seven boxes.': not heard, as the 0.51 s"),
    (0.36, (10,), "", "'Nine keys.', 'Seven boxes.': not heard, as the 0.36 s"),
    (0.14, (7,), "'Two books.' has no end after 0.14 s", "'Nine keys.', 'Seven boxes.': not heard"),
])
def test_what_seconds_leave(runs, seconds, heard, cut, unheard, capsys):
    """An LLM TTS that would say 10, 8 and 5 codes says as many as --seconds hold, pauses included, and a note tells the
    rest, streamed or not."""
    speaker = speak.load(runs / "llm")
    scripted(speaker, 10, 8, 5)
    asked = {"text": "Two books. Nine keys. Seven boxes.", "seconds": seconds}
    clip, told = speaker.speak([asked])[0], capsys.readouterr().err
    wav = np.concatenate(list(speaker.stream(**asked)))
    hop, pause = speaker.codec.hop_length, len(speaker.pause())
    assert speaker.c.frame_rate == 50 and len(wav) == len(clip.wav) == hop * sum(heard) + pause * (len(heard) - 1)
    assert clip.codes.flatten().tolist() == [code for n in heard for code in range(n)]
    assert capsys.readouterr().err == told and told.count("note: ") == bool(cut) + bool(unheard)
    assert cut in told and unheard in told


def test_sentences_are_numbered(runs):
    """The second sentence of a text is made from another seed than the first, and the same whatever the first is."""
    speaker = speak.load(runs / "codec")
    two, other = (speaker.speak([{"text": f"{first} Nine keys.", "seed": 3}], temperature=1.0)[0].codes
                  for first in ("Nine keys.", "Two books."))
    first = speaker.speak([{"text": "Nine keys.", "seed": 3}], temperature=1.0)[0].codes
    assert torch.equal(two[:len(first)], first) and not torch.equal(two[len(first):], first)
    assert torch.equal(other[-(len(two) - len(first)):], two[len(first):])


@pytest.mark.parametrize("text, pieces", [
    ("One. Two!  Three?", ["One.", "Two!", "Three?"]),
    ("  no   end ", ["no end"]),
    ("Mr. Brown is 2.5 m tall. So?", ["Mr. Brown is", "2.5 m tall.", "So?"]),
    ("aaaa bbbb cccc dddd", ["aaaa bbbb", "cccc dddd"]),
    ("aaaaaaaaaa bbbbbbbbbb", ["aaaaaaaaaa", "bbbbbbbbbb"]),  # words as long as the limit
    ("ééé ééé", ["ééé", "ééé"]),  # two bytes each
    ("... yes. . no. –", ["... yes. .", "no. –"]),  # a mark by itself is no sentence
])
def test_split_text(text, pieces):
    assert split_text(text, 13 if "Mr." in text else 10) == pieces


def test_no_word_is_lost():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcé.!? "), rng.integers(1, 30))).strip() + "x" for _ in range(300)]
    pieces = split_text(" ".join(words), 255)
    assert "".join(pieces).replace(" ", "") == "".join(words).replace(" ", "")
    assert all(0 < len(piece.encode()) < 256 for piece in pieces)


@pytest.mark.parametrize("text, words", [
    ("", "nothing to say"), (" ?! …", "nothing to say"), ("x" * 300, "300 bytes"), ("a\udcff", "not UTF-8"),
    (None, "what should it say"),
], ids=str)
@pytest.mark.parametrize("system", ["flow", "llm"])
def test_texts_that_cannot_be_said(runs, system, text, words):
    with pytest.raises(UserError, match=words.replace("bytes", "letters") if system == "llm" else words):
        next(speak.load(runs / system).stream(text))


def test_letters_stay_where_they_are_read(runs):
    """Bytes keep accents and other scripts; characters are English letters, and a sentence of none is refused."""
    assert speak.load(runs / "flow").sentences("Café № 2, слово.") == ["Café Number two, слово."]
    llm = speak.load(runs / "llm")
    assert llm.sentences("Café 2.") == ["Cafe two."]
    with pytest.raises(UserError, match="English letters"):
        llm.sentences("Hello. Слово.")


def test_another_language(runs):
    """The run's: its numbers, and its ends of sentences."""
    flow, llm = (speak.load(runs / name) for name in ("flow", "llm"))
    german = speak.FlowSpeaker(flow.model, flow.config | {"language": "de"})
    assert german.sentences("Es kostet 21 Mark. Er kam z. B. um 3.") == [
        "Es kostet einundzwanzig Mark.", "Er kam zum Beispiel um drei."]
    german = speak.LLMSpeaker(llm.model, llm.config | {"language": "de"}, llm.codec)
    assert german.sentences("Straße 2.") == ["Strasse zwei."]


def test_what_is_not_read_is_told(runs, capsys):
    """Once for the same characters, in a note that names them and says what becomes of them; no other text has one."""
    llm, flow = speak.load(runs / "llm"), speak.load(runs / "flow")
    spoken = speak.FlowSpeaker(flow.model, flow.config | {"phonemes": "en-us"})
    for speaker, text, unread in ((llm, "The word слово is one.", "слов"), (spoken, "A ★ is a ⌘.", "★⌘")):
        for _ in range(2):
            assert len(speaker.sentences(text)) == 1
        speaker.sentences("Café [2] 50% & so.")
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and said[0].startswith("note: ") and repr(unread) in said[0]
    assert flow.sentences("The word слово is ★.") and not capsys.readouterr().err


@pytest.mark.parametrize("system", ["codec", "llm"])
def test_what_has_no_end_is_told(runs, system, capsys):
    """A sentence that the model has not ended after --seconds, streamed or among others; and no other."""
    speaker, rate = speak.load(runs / system), speak.load(runs / system).c.frame_rate
    ended = []
    for seed in range(12):
        clip, = speaker.speak([{"text": "Two books.", "seed": seed}], seconds=4 / rate, temperature=1.0)
        among, said = capsys.readouterr().err, f"'Two books.' has no end after {4 / rate:.3g} s"
        ended.append(len(clip.codes) < 4)
        assert (said in among) != ended[-1]
        if len(clip.codes):
            list(speaker.stream("Two books.", seed=seed, seconds=4 / rate, temperature=1.0))
            assert (said in capsys.readouterr().err) != ended[-1]
    assert not all(ended)
    speaker.speak([{"text": "Two books.", "seed": seed} for seed in range(12)], seconds=4 / rate, temperature=1.0)
    assert f"{12 - sum(ended)} of 12 sentences, 'Two books.' for one, have no end" in capsys.readouterr().err


def test_phonemes(runs):
    """A model that reads them speaks homophones alike, where one of letters does not; and refuses other scripts."""
    spelled = speak.load(runs / "flow")
    spoken = speak.FlowSpeaker(spelled.model, spelled.config | {"phonemes": "en-us"})
    texts = [{"text": text, "seed": 1} for text in ("The knight rode here.", "The night rowed hear.")]
    for speaker, alike in ((spelled, False), (spoken, True)):
        one, other = speaker.speak(texts)
        assert np.array_equal(one.wav, other.wav) is alike
    assert not spoken.sayable("Café, слово.") and spoken.sayable("Café.")


def test_what_a_text_becomes(runs):
    """Sentences as they are read, and where a model reads something else than that, it: phonemes as espeak-ng has them,
    characters that the LLM TTS knows. Of a text that is read as it stands, but for capitals, nothing is to be told."""
    flow, llm = (speak.load(runs / name) for name in ("flow", "llm"))
    spoken = speak.FlowSpeaker(flow.model, flow.config | {"phonemes": "en-us"})
    text = "It's $5.  So?"
    assert flow.readings(text) == [("It's five dollars.", ""), ("So?", "")]
    assert spoken.readings(text) == [("It's five dollars.", "ɪts fˈaɪv dˈɑːlɚz."), ("So?", "sˈoʊ?")]
    assert llm.readings("Über № 7.") == [("Uber Number seven.", "")]
    assert llm.readings("A [2] ы.") == [("A (two) ы.", "a (two) \ufffd.")]
    assert [one.became(text) for one in (flow, spoken, llm)] == [
        "It's five dollars. So?", "ɪts fˈaɪv dˈɑːlɚz. sˈoʊ?", "it's five dollars. so?"]
    for speaker in (flow, llm):
        assert speaker.became("Mr. Brown  said: nine. So?") == ("Mister Brown said: nine. So?" if speaker is flow else
                                                                "mister brown said: nine. so?")
        assert speaker.became("Nine  keys. So?") == ""


@pytest.mark.parametrize("system, flags, words", [
    ("flow", ["--top_k", "1"], "--top_k is not an option of 'flow' checkpoints"),
    ("flow", ["--steps", "0"], "--steps 0 is out of range: at least 1 and at most 10,000"),
    ("flow", ["--seconds", "nan"], "--seconds nan is out of range"),
    ("flow", ["--seed", "-1"], "--seed -1 is out of range"),
    ("codec", ["--top_k", "1", "2", "3"], "3 numbers for 2 codebooks"),
    ("codec", ["--top_p", "0.5", "1.5"], "--top_p 1.5 is out of range"),
    ("codec", ["--prompt_wav", "a.wav"], "cannot read a.wav"),
    ("llm", ["--top_k", "1", "2"], "2 numbers: give one"),
    ("llm", ["--repetition_penalty", "0"], "--repetition_penalty 0.0 is out of range"),
    ("llm", ["--speaker", "a.wav"], "trained without voices"),
], ids=str)
def test_refused_options(runs, system, flags, words, tmp_path):
    """In one sentence, before a model has spoken or a file is there."""
    said = refusal(sample.main, "--ckpt", runs / system, "--text", "Two.", "--out", tmp_path / "a.wav", *flags)
    assert words in said and not list(tmp_path.iterdir())


def test_nothing_said(runs, capsys):
    """A model that makes no sound at all is told of, not written as a file that looks like a result; where one of two
    sentences is missing there is a moment of silence and a note."""
    speaker = speak.load(runs / "llm")
    spoken = [[-1] * 41, [*range(20), *range(20), -1]]

    def run(loop, parts):
        return (torch.tensor(codes) for codes in zip(*spoken[:len(parts)]))

    speaker.run = run
    with pytest.raises(UserError, match="no sound for 'two books.'"):
        list(speaker.stream("two books."))
    wav = np.concatenate(list(speaker.stream("two books. nine keys.")))
    assert len(wav) == 441 + int(0.15 * 22050) + 40 * 441 and not wav[:441].any() and wav[-441 * 30:].any()
    assert "note: the model made no sound for 'two books.'" in capsys.readouterr().err
    speaker.run = lambda loop, parts: [torch.tensor(codes[:codes.index(-1)]) for codes in ([-1], [*range(20), -1])]
    (clip,) = speaker.speak([{"text": "two books. nine keys."}])
    assert len(clip.wav) == 441 + int(0.15 * 22050) + 20 * 441
    assert "note: the model made no sound for 'two books.'" in capsys.readouterr().err


def test_requests_of_their_own(runs):
    """Options that differ from request to request hold for each, however they are batched."""
    speaker = speak.load(runs / "llm")
    one, two = speaker.speak([{"text": "Two books.", "temperature": 0.0}, {"text": "Two books.", "temperature": 1.5}])
    assert torch.equal(one.codes, speaker.speak([{"text": "Two books."}], temperature=0.0)[0].codes)
    assert torch.equal(two.codes, speaker.speak([{"text": "Two books."}], temperature=1.5)[0].codes)
    short, free = speak.load(runs / "flow").speak([{"text": "Two.", "seconds": 0.2}, {"text": "Two."}])
    assert len(short.mel) == round(0.2 * 22050 / 256) != len(free.mel)


def test_what_cannot_be_had_is_told_before_training(data_dir, tmp_path, monkeypatch):
    """Weights of a vocoder, prompts without a letter: refused before the first step, not at the first sample."""
    monkeypatch.setattr(common, "catch_signals", Event)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("Two books.\n!?\n")
    settings = QUICK | SYSTEMS["flow"][1] | dict(data_dir=data_dir, out_dir=tmp_path / "run")
    for changes, words in ((dict(eval_vocoder="bigvgan", eval_prompts="overfit"), "bigvgan"),
                           (dict(eval_prompts="p.txt"), "nothing to say in '!?'"),
                           (dict(eval_steps=0), "--eval_steps")):
        flags = [f"--{key}={value}" for key, value in (settings | changes).items()]
        assert words in refusal(train_flow_tts.main, *flags)
        assert not list(tmp_path.rglob("step_*"))


def test_options_are_told_once(runs):
    """What the flags, the page's controls and `stream` take are the same names, with the config's defaults."""
    import argparse

    parser = argparse.ArgumentParser()
    options.add_flags(parser)
    flags = {action.dest for action in parser._actions} - {"help"}
    assert flags == {option.name for of in options.OPTIONS.values() for option in of}
    for system in SYSTEMS:
        speaker = speak.load(runs / system)
        assert {option.name for option in speaker.options} <= flags
        settings = speaker.settings({})
        assert all(settings[option.name] == option.default for option in speaker.options)
        assert speaker.settings(settings) == settings
    assert "eval_cfg_scale" in asdict(train_codec_lm.Config()) and speaker.system == "llm"


def test_no_file_of_silence(runs, tmp_path, monkeypatch):
    """Where no sentence of several made a sound, nothing is left that looks like a result."""
    monkeypatch.setattr(speak.LLMSpeaker, "run", lambda self, loop, parts: iter([torch.full((len(parts),), -1)]))
    argv = ["--ckpt", runs / "llm", "--text", "Two books. Nine keys.", "--out", tmp_path / "a.wav", "--device", "cpu"]
    assert "no sound for 'Two books.'" in refusal(sample.main, *argv) and not list(tmp_path.iterdir())
