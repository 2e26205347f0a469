"""data.py: hostile corpora, kills, the text encoder beside its own tokenizer and class, the demo's grammar."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import finish, launch, refusal

import data as data_module
from trivox import corpora, parallel, prepare
from trivox.audio import LOG_FLOOR, MelConfig, log_mel, write_wav
from trivox.corpora import clip_path, draw_validation, read_metadata
from trivox.datasets import MelDataset
from trivox.demo_speech import demo_grammar, demo_sentence, make_demo_corpus, speak
from trivox.metrics import word_error_rate
from trivox.prepare import prepare_mels
from trivox.recognisers import load_recogniser
from trivox.text import TextFeatures, text_ids

MEL = MelConfig()


def make_corpus(root, clips, metadata=None):
    """A corpus of {id: wav or None for no recording}; its metadata says "text of <id>", or what is in `metadata`."""
    for id, wav in clips.items():
        if wav is not None:
            write_wav(root / "wavs" / f"{id}.wav", wav, 22050)
    lines = [f"{id}|text of {id}|text of {id}" for id in clips] if metadata is None else metadata
    root.mkdir(exist_ok=True)
    (root / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def tone(seconds, hertz=300.0):
    return 0.3 * np.sin(np.arange(int(seconds * 22050)) * 2 * np.pi * hertz / 22050).astype(np.float32)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------------
# Preparing a corpus

@pytest.mark.parametrize("shard_clips", [256, 3], ids=["one shard", "a shard of bad clips alone"])
def test_what_is_kept_and_what_is_skipped(tmp_path, one_process, monkeypatch, capsys, shard_clips):
    """Each bad clip is skipped for its own reason, which is printed, and the others are as if it were not there."""
    monkeypatch.setattr(prepare, "SHARD_CLIPS", shard_clips)
    good = {"a": tone(0.5), "deep/b": tone(0.7, 200), "c.d": tone(0.3, 800), "short": tone(0.001)}
    bad = {"cut": tone(1), "empty": tone(0), "silent": 0 * tone(1), "long": tone(2.1), "gone": None}
    hostile = {"../x": "leads out", str(tmp_path / "x"): "leads out", "wordy": "258 bytes, more than 256"}
    reasons = {"cut": "cannot read", "empty": "no sample", "silent": "silent", "gone": "cannot read",
               "long": "2.1 s are more than 2.0 s"} | hostile
    write_wav(tmp_path / "x.wav", tone(1), 22050)  # it is there, but it is none of the corpus's business
    lines = [f"{id}|Text of {id}|text of {id}" for id in (*good, *bad, *hostile)]
    lines[-1] = "wordy|" + "é" * 129
    root = make_corpus(tmp_path / "corpus", good | bad | {"wordy": tone(1)}, lines)
    cut = root / "wavs" / "cut.wav"
    cut.write_bytes(cut.read_bytes()[:20000])
    out = tmp_path / "out"
    prepare_mels(root, out, MEL, 2.0)

    said = capsys.readouterr().out
    for id, reason in reasons.items():
        line, = [line for line in said.splitlines() if line.startswith(f"skipped {id}: ")]
        assert reason in line
    dataset = MelDataset(out, MEL)
    assert [row["id"] for row in dataset.rows] == list(good)
    assert [row["text"] for row in dataset.rows] == [f"text of {id}" for id in good]
    mels = [dataset.mel(i) for i in range(len(good))]
    for m, id in zip(mels, good):
        wav, _ = soundfile.read(root / "wavs" / f"{id}.wav", dtype="float32")
        torch.testing.assert_close(m, log_mel(wav, MEL), atol=0.01, rtol=0)  # 16-bit floats
    every, stats = np.concatenate(mels).astype(np.float64), dataset.stats
    assert stats["mel_mean"] == pytest.approx(every.mean(), abs=2e-3)
    assert stats["mel_std"] == pytest.approx(every.std(), abs=2e-3)
    assert (stats["clips"], stats["skipped"], stats["frames"]) == (len(good), len(reasons), len(every))
    assert stats["seconds"] == pytest.approx(len(every) * 256 / 22050)
    assert stats["max_frames"] == max(map(len, mels)) and stats["text_bytes"]["max"] == len("text of deep/b")


def test_any_ending_and_rate(tmp_path, one_process):
    """The same sound as flac in stereo at 44.1 kHz has the same mel."""
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.5), "b": None})
    twice_as_fast = 0.3 * np.sin(np.arange(22050) * 2 * np.pi * 300 / 44100)
    soundfile.write(root / "wavs" / "b.flac", np.stack([twice_as_fast] * 2, 1), 44100)
    prepare_mels(root, tmp_path / "out", MEL, 2.0)
    dataset = MelDataset(tmp_path / "out", MEL)
    a, b = (dataset.mel(i)[8:-8, :20].exp() for i in (0, 1))  # the bands about the tone
    torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("columns, line, text, speaker", [
    ("id|text|normalized|speaker", "a|Dr. B|doctor B|jo", "doctor B", "jo"),
    ("id|text|normalized|speaker", "a|Dr. B|", "Dr. B", ""),
    ("id|text|normalized|speaker", "\ufeffa|\"Quoted, he said", "\"Quoted, he said", ""),
    ("speaker|id|text", "jo|a|Dr. B", "Dr. B", "jo"),
])
def test_metadata(tmp_path, columns, line, text, speaker):
    (tmp_path / "m.csv").write_text(line + "\n|no id\nb|\n\n", encoding="utf-8")
    assert read_metadata(tmp_path / "m.csv", columns) == [{"id": "a", "text": text, "speaker": speaker}]


@pytest.mark.parametrize("lines, reason", [
    ([], "names no clip"), (["a|x"], "none of the 1 clips"), (None, "cannot read"),
], ids=["no line", "no recording", "no metadata"])
def test_corpora_without_clips(tmp_path, one_process, lines, reason):
    root = make_corpus(tmp_path / "corpus", {}, lines or [])
    if lines is None:
        (root / "metadata.csv").unlink()
    assert reason in refusal(lambda argv: prepare_mels(root, tmp_path / "out", MEL, 2.0))
    assert not (tmp_path / "out" / "dataset_stats.json").exists()


def test_validation_split(tmp_path, one_process):
    """heldout.txt rules; without it, 2 % are drawn, the same in whatever order the clips stand."""
    root = make_corpus(tmp_path / "corpus", {id: tone(0.1) for id in "abcde"})
    (root / "heldout.txt").write_text("d\nb\n")
    prepare_mels(root, tmp_path / "out", MEL, 2.0)
    dataset = MelDataset(tmp_path / "out", MEL)
    assert [dataset.rows[i]["id"] for i in dataset.clips("val")] == ["b", "d"]
    assert [dataset.rows[i]["id"] for i in dataset.clips("train")] == ["a", "c", "e"]

    ids = [f"clip-{i}" for i in range(500)]
    drawn = draw_validation(ids)
    assert len(drawn) == 10 and drawn == draw_validation(ids[::-1]) and drawn != set(ids[:10])
    assert [len(draw_validation(ids[:n])) for n in (1, 2, 30)] == [0, 1, 1]


def test_a_folder_holds_one_data_set(data_dir, corpus, tmp_path, one_process):
    """Another corpus or other settings are refused, and what is there stays as it is."""
    before = contents(data_dir)
    other = make_corpus(tmp_path / "corpus", {"a": tone(0.1)})
    for root, mel in ((other, MEL), (corpus, replace(MEL, n_mels=40))):
        assert str(data_dir) in refusal(lambda argv: prepare_mels(root, data_dir, mel, 11.88))
    said = refusal(lambda argv: MelDataset(data_dir, replace(MEL, fmax=11025.0)))
    assert "fmax=8000.0" in said and "fmax=11025.0" in said
    prepare_mels(corpus, data_dir, MEL, 11.88)
    assert contents(data_dir) == before


@pytest.mark.parametrize("stats", [None, "", '{"mel_mean": -5'])
def test_no_data_set(tmp_path, stats):
    if stats is not None:
        (tmp_path / "dataset_stats.json").write_text(stats)
    assert "no prepared data set" in refusal(lambda argv: MelDataset(tmp_path, MEL))


# ------------------------------------------------------------------------------------------------------------
# Kills

def _prepare_small_shards(root, out):
    prepare.SHARD_CLIPS, prepare_clip = 2, prepare.prepare_clip
    prepare.prepare_clip = lambda *args: time.sleep(0.02) or prepare_clip(*args)  # slow enough to be killed
    prepare_mels(root, out, MEL, 11.88)


def test_killed_while_preparing(corpus, tmp_path, one_process, monkeypatch):
    """SIGKILL once some of the shards are there, then again: byte for byte what an uninterrupted run makes."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = launch(_prepare_small_shards, corpus, killed)
    while len(list(killed.glob("*.jsonl"))) < 3 and process.is_alive():
        process.join(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL and not (killed / "dataset_stats.json").exists()
    monkeypatch.setattr(prepare, "SHARD_CLIPS", 2)
    prepare_mels(corpus, killed, MEL, 11.88)
    prepare_mels(corpus, whole, MEL, 11.88)
    assert contents(killed) == contents(whole)


def test_a_worker_that_outlives_its_killed_run(corpus, tmp_path, one_process, monkeypatch):
    """It finishes its shard, in its own process, while the next run is at the same one: both leave it whole."""
    jobs, prepare_shard, prepare_clip, pid = [], prepare._prepare_shard, prepare.prepare_clip, os.getpid()

    def noted(job):
        jobs.append(job)
        return prepare_shard(job)

    def outlived(*args):
        if len(jobs) == 1:
            with monkeypatch.context() as survivor:
                survivor.setattr(os, "getpid", lambda: pid + 1)
                noted(jobs[0])
        return prepare_clip(*args)

    prepare_mels(corpus, tmp_path / "whole", MEL, 11.88)
    monkeypatch.setattr(prepare, "_prepare_shard", noted)
    monkeypatch.setattr(prepare, "prepare_clip", outlived)
    prepare_mels(corpus, tmp_path / "out", MEL, 11.88)
    assert len(jobs) == 2 and contents(tmp_path / "out") == contents(tmp_path / "whole")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_killed_in_the_middle_of_any_text_file(tmp_path, one_process, monkeypatch):
    """Plan, index and statistics: whichever is cut in half, the next run makes it whole."""
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.1), "b": tone(0.2)})
    prepare_mels(root, tmp_path / "whole", MEL, 2.0)
    write_text = Path.write_text
    for dies_at in range(10):
        left, out = [None] * dies_at, tmp_path / str(dies_at)

        def write(path, text, **kwargs):
            if left:
                left.pop()
                return write_text(path, text, **kwargs)
            write_text(path, text[:len(text) // 2], **kwargs)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", write)
            try:
                prepare_mels(root, out, MEL, 2.0)
                break
            except Killed:
                pass
        prepare_mels(root, out, MEL, 2.0)
        assert contents(out) == contents(tmp_path / "whole")
    assert dies_at >= 3


# ------------------------------------------------------------------------------------------------------------
# Text

@pytest.mark.parametrize("text", ["", "The ferry was late.", "naïve café — 数 🙂", "tab\tand\nline\x00"])
def test_text_ids_are_byt5s(text):
    from transformers import ByT5Tokenizer

    assert text_ids(text) == ByT5Tokenizer()(text).input_ids


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """T5's encoder, small and with random weights, in the hub's layout. Yields it and the folder it is in."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                    feed_forward_proj="gated-gelu")).eval()
    folder = tmp_path_factory.mktemp("hub") / "tiny-byt5"
    model.save_pretrained(folder)
    return model, str(folder)


TEXTS = ["", "a", "The ferry was late again.", "Schöne Grüße", "x" * 90]


@pytest.mark.parametrize("mode", ["on", "auto", "off"])
def test_encoder_states(encoder, tmp_path, monkeypatch, mode):
    """Cached or not, in a batch or alone, each text's states are those of the encoder that sees this text only."""
    model, folder = encoder
    features = TextFeatures(folder)
    features.fill_cache(tmp_path, TEXTS[1:], mode, write=True)
    assert bool(list(tmp_path.glob("text_*.f16"))) == (mode != "off")
    reopened = TextFeatures(folder)
    reopened.fill_cache(tmp_path, TEXTS[1:], mode, write=False)
    if mode != "off":  # the cache is there: no encoder is needed any more
        monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", None)
    for source in (features, reopened):
        states, length = source(TEXTS, multiple=16)
        assert states.dtype == torch.float32 and states.shape == (5, 96, 32)
        for text, row, n in zip(TEXTS, states, length.tolist()):
            with torch.inference_mode():
                alone = model(torch.tensor([text_ids(text)])).last_hidden_state[0]
            torch.testing.assert_close(row[:n], alone, atol=2e-3, rtol=2e-3)
            assert n == len(text_ids(text)) and not row[n:].any()


def test_encoder_states_of_a_text_that_is_not_cached(encoder, tmp_path):
    features = TextFeatures(encoder[1])
    features.fill_cache(tmp_path, ["a"], "on", write=True)
    known, new = features(["a"])[0], features(["a", "new"])[0]
    torch.testing.assert_close(known[0], new[0, :2], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("damage", ["missing", "config.json", "model.safetensors"])
def test_no_encoder(encoder, tmp_path, monkeypatch, damage):
    """What to get, from where, and where to put it."""
    monkeypatch.chdir(tmp_path)
    name = "google/byt5-small"
    if damage != "missing":
        name = str(shutil.copytree(encoder[1], tmp_path / "byt5"))
        (tmp_path / "byt5" / damage).write_bytes(b"{")
    said = refusal(lambda argv: TextFeatures(name)(["hello"]))
    assert name in said and "config.json" in said and "weights" in said


def test_encoder_put_there_by_hand(encoder, tmp_path, monkeypatch):
    """A folder of that name among the weights, where BigVGAN's are looked for too."""
    monkeypatch.setenv("TRIVOX_WEIGHTS", str(tmp_path))
    shutil.copytree(encoder[1], tmp_path / "byt5-small")
    assert TextFeatures("google/byt5-small")(["hello"])[0].shape == (1, 6, 32)


# ------------------------------------------------------------------------------------------------------------
# The demo corpus

def test_demo_grammar():
    """PocketSphinx knows every word, and its grammar hears the sentences that are drawn. (Chance is about 90 %.)"""
    from pocketsphinx import Decoder

    dictionary = Decoder(loglevel="FATAL")
    rng = random.Random(1)
    words = {word.strip(",.").lower() for _ in range(3000) for word in demo_sentence(rng).split()}
    assert 90 < len(words) < 130 and not [word for word in words if dictionary.lookup_word(word) is None]
    texts = [demo_sentence(rng) for _ in range(8)]
    _, hear = load_recogniser("grammar", grammar=demo_grammar())
    assert word_error_rate(texts, [hear(speak(text), 22050) for text in texts]) <= 0.1
    assert word_error_rate(texts[1:], texts[:-1]) > 0.7


def test_demo_corpus(corpus):
    """No sentence twice; those held out are among them; every recording is there, at a speaking rate."""
    clips = read_metadata(corpus / "metadata.csv")
    heldout = (corpus / "heldout.txt").read_text().split()
    assert len({clip["text"] for clip in clips}) == len(clips) == 40 and len(set(heldout)) == 6
    assert set(heldout) < {clip["id"] for clip in clips} and {clip["speaker"] for clip in clips} == {"en-us"}
    for clip in clips:
        info = soundfile.info(clip_path(corpus, clip["id"]))
        assert info.samplerate == 22050 and 8 < len(clip["text"]) / info.duration < 25


def is_spoken(root, clip):
    """Whether the recording of a clip lasts as long as its text does in its voice. (espeak speaks no text twice quite
    alike; en-us+f2 is two hundredths slower than en-us and more.)"""
    return soundfile.info(clip_path(root, clip["id"])).frames == pytest.approx(
        len(speak(clip["text"], clip["speaker"])), rel=0.01)


LONG = "The old doctor went to the river with a very small boat, and came back in the evening."


@pytest.mark.parametrize("lines, ids, texts", [
    (["Hello there, who are you?", "", LONG], ["clip-00000", "clip-00002"], ["Hello there, who are you?", LONG]),
    ([f"x1|Dr. B|{LONG}", "x2|Hello there, who are you?"], ["x1", "x2"], [LONG, "Hello there, who are you?"]),
], ids=["a sentence a line", "csv"])
def test_speaking_transcripts(tmp_path, one_process, lines, ids, texts):
    """One voice after the other."""
    (tmp_path / "list").write_text("\n".join(lines))
    voices = ["en-us", "en-us+f2"]
    make_demo_corpus(tmp_path / "corpus", 0, 1, voices, tmp_path / "list")
    clips = read_metadata(tmp_path / "corpus" / "metadata.csv")
    assert [(c["id"], c["text"], c["speaker"]) for c in clips] == list(zip(ids, texts, voices))
    assert all(is_spoken(tmp_path / "corpus", clip) for clip in clips)
    assert not (tmp_path / "corpus" / "grammar.jsgf").exists()


def test_other_sentences_or_voices_are_spoken_anew(tmp_path, one_process):
    """Recordings that are there already are not taken for those of another text or voice."""
    (tmp_path / "list").write_text(f"{LONG}\nHello there, who are you?\n")
    make_demo_corpus(tmp_path / "corpus", 0, 1, ["en-us"], tmp_path / "list")
    (tmp_path / "list").write_text("Nothing of the kind was said.\nHello there, who are you?\n")
    make_demo_corpus(tmp_path / "corpus", 0, 1, ["en-us+f2"], tmp_path / "list")
    assert all(is_spoken(tmp_path / "corpus", clip) for clip in read_metadata(tmp_path / "corpus" / "metadata.csv"))


@pytest.mark.parametrize("line, voice, heldout, words", [
    ("Hello.", "martian", 0, "'martian'"), ("Hello.", "en-us", 1, "leave none"), ("", "en-us", 0, "names no clip"),
    ("../x|Hello.", "en-us", 0, "'../x' leads out"),
], ids=["voice", "all held out", "no sentence", "hostile id"])
def test_what_cannot_be_spoken(tmp_path, one_process, line, voice, heldout, words):
    (tmp_path / "list").write_text(line)
    assert words in refusal(lambda argv: make_demo_corpus(tmp_path / "corpus", 0, heldout, [voice], tmp_path / "list"))
    assert not list(tmp_path.rglob("*.wav"))


@pytest.mark.parametrize("files, words", [
    ([], "no folder wavs/"), (["wavs/readme.txt"], "neither metadata.csv nor recordings"),
    (["wavs/a.wav"], "~/.cache/whisper/"),
])
def test_folders_that_are_no_corpus(tmp_path, files, words):
    """Among them one of bare recordings, where Whisper would have to write the transcripts and cannot be had."""
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        write_wav(tmp_path / file, tone(0.1), 22050) if file.endswith("wav") else (tmp_path / file).touch()
    said = refusal(data_module.main, "ljspeech", "--root", tmp_path, "--out", tmp_path / "out")
    assert words in said and not (tmp_path / "out").exists()


def test_no_download(tmp_path):
    """From where, and what to do instead."""
    said = refusal(data_module.main, "ljspeech", "--out", tmp_path / "data" / "ljspeech")
    assert corpora.LJSPEECH_URL in said and "--root" in said


def test_command_line(tmp_path, one_process, capsys):
    """The settings of the command line are those of the data set; silence in a mel is the floor."""
    root = make_corpus(tmp_path / "corpus", {"a": np.pad(tone(0.3), (0, 12000)), "b": tone(0.5)})
    data_module.main(["ljspeech", "--root", str(root), "--out", str(tmp_path / "out"), "--n_mels", "40"])
    dataset = MelDataset(tmp_path / "out", replace(MEL, n_mels=40))
    assert dataset.mel(0)[-1].max() == pytest.approx(np.log(LOG_FLOOR), abs=0.01)
    assert json.loads((tmp_path / "out" / "dataset_stats.json").read_text())["mel"]["n_mels"] == 40


# ------------------------------------------------------------------------------------------------------------
# Processes that share work

def _die_at_three(n):
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def _sleep(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def _share(function, jobs):
    with parallel.parallel() as pool:
        list(pool.map(function, jobs))


def test_a_worker_that_is_killed():
    """Then nothing waits for it for ever."""
    assert "was killed" in refusal(lambda argv: _share(_die_at_three, range(8)))


def test_workers_end_with_whom_they_work_for(tmp_path):
    process = launch(_share, _sleep, [tmp_path] * parallel.cores())
    wait = time.monotonic() + 60
    while len(workers := list(tmp_path.iterdir())) < parallel.cores():
        assert process.is_alive() and time.monotonic() < wait
        time.sleep(0.05)
    process.kill()
    lines = [Path("/proc", worker.name, "cmdline") for worker in workers]
    while any(line.exists() and line.read_bytes() for line in lines):  # a zombie's is empty
        assert time.monotonic() < wait + 30
        time.sleep(0.05)
