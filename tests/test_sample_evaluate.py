"""sample.py and evaluate.py: what is said, judged and refused."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import refusal
from scipy.fft import dct

import evaluate
import sample
from trivox.audio import MelConfig, log_mel
from trivox.demo_speech import speak
from trivox.metrics import mel_distances, word_error_rate
from trivox.recognisers import load_recogniser
from trivox.speak import generate_mels, load_flow, split_text
from trivox.text import TextFeatures

MEL = MelConfig()


# ------------------------------------------------------------------------------------------------------------
# Text

@pytest.mark.parametrize("text, pieces", [
    ("One. Two!  Three?", ["One.", "Two!", "Three?"]),
    ("  no   end ", ["no end"]),
    ("In the U.S.A. it is 3.5 m.", ["In the U.S.A.", "it is 3.5 m."]),
    ("aaaa bbbb cccc dddd", ["aaaa bbbb", "cccc dddd"]),
    ("ééé ééé", ["ééé", "ééé"]),  # two bytes each
    ("Yes. . no. –", ["Yes. .", "no. –"]),  # a mark by itself is no sentence
])
def test_split_text(text, pieces):
    assert split_text(text, 16 if "U.S" in text else 10) == pieces


def test_no_word_is_lost():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcé.!? "), rng.integers(1, 30))).strip() + "x" for _ in range(300)]
    pieces = split_text(" ".join(words))
    assert " ".join(pieces).split() == " ".join(words).split()
    assert all(0 < len(piece.encode()) < 256 for piece in pieces)


@pytest.mark.parametrize("text, words", [("", "nothing to say"), (" ?! …", "nothing to say"), ("x" * 300, "300 bytes")])
def test_text_that_cannot_be_said(run, tmp_path, text, words):
    assert words in refusal(sample.main, "--ckpt", run, "--text", text, "--out", tmp_path / "a.wav", "--device", "cpu")
    assert not (tmp_path / "a.wav").exists()


# ------------------------------------------------------------------------------------------------------------
# Speaking

def test_speaks_what_the_model_makes(run, tmp_path, capsys):
    """Two sentences, joined by a pause; --seconds is the length of the speech; the same seed is the same sound."""
    text = "The baker sold two books. Yesterday, the driver found nine golden keys."
    command = ["--ckpt", str(run), "--text", text, "--seconds", "3", "--steps", "2", "--device", "cpu", "--out"]
    for name in ("a", "b"):
        sample.main([*command, str(tmp_path / f"{name}.wav")])
    sample.main([*command, str(tmp_path / "c.wav"), "--seed", "1"])
    a, b, c = (soundfile.read(tmp_path / f"{name}.wav") for name in "abc")
    assert a[1] == 22050 and abs(len(a[0]) / 22050 - 3.15) < 2 * 256 / 22050
    assert np.array_equal(a[0], b[0]) and not np.array_equal(a[0], c[0])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and f"{len(a[0]) / 22050:.2f} s of audio" in said[0] and "real-time factor" in said[0]


def test_a_file_of_sentences(run, tmp_path):
    (tmp_path / "t.txt").write_text("The baker.\n\nThe driver sold five books today.\n")
    sample.main(["--ckpt", str(run), "--text_file", str(tmp_path / "t.txt"), "--out", str(tmp_path / "o"),
                 "--device", "cpu"])
    lengths = [soundfile.info(tmp_path / "o" / f"{n:04d}.wav").duration for n in (0, 1)]
    assert lengths[0] < lengths[1] and len(list((tmp_path / "o").iterdir())) == 2


def test_the_order_of_sentences_does_not_matter(run):
    """Batches are made of sentences of like length; each comes back in its place, with its own noise."""
    model, features, _ = load_flow(run, "cpu")
    texts = ["The baker sold two books near the old river today.", "Two books.", "The driver found nine golden keys."]
    together = generate_mels(model, features, texts, steps=2, batch_size=2)
    for i, mel in enumerate(together):
        alone = generate_mels(model, features, [""] * i + [texts[i]], steps=2)[i]
        torch.testing.assert_close(mel, alone, atol=0.05, rtol=0.02)  # bfloat16


@pytest.mark.parametrize("flags, words", [
    (["--ckpt", "nowhere", "--text", "Hello."], "no checkpoint at nowhere"),
    (["--text_file", "nowhere.txt"], "cannot read nowhere.txt"),
    (["--text", "Hello.", "--steps", "0"], "at least one"),
    (["--text", "Hello.", "--vocoder", "bigvgan"], "bigvgan_v2_22khz_80band_fmax8k_256x"),
], ids=" ".join)
def test_what_cannot_be_sampled(run, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(sample.main, "--ckpt", run, "--device", "cpu", *flags)
    assert not list(tmp_path.rglob("*.wav"))


def test_no_gpu(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    said = refusal(sample.main, "--ckpt", run, "--text", "Hello.", "--device", "cuda", "--out", tmp_path / "a.wav")
    assert "no GPU" in said


def test_a_checkpoint_of_another_system(run, tmp_path):
    folder = shutil.copytree((run / "checkpoints" / "latest").resolve(), tmp_path / "c")
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("system: flow", "system: xyz"))
    for main in (sample.main, evaluate.main):
        assert "'xyz'" in refusal(main, "--ckpt", folder, *(["--text", "Hello."] if main is sample.main else []))


# ------------------------------------------------------------------------------------------------------------
# Judging

def test_mel_distances():
    """0 for the same, also when each frame stands there twice; a louder copy differs in level alone, by its factor; the
    distortion of one cepstral coefficient by d is 10 / ln 10 · sqrt(2) d."""
    m = np.random.default_rng(0).standard_normal((30, 80)).astype(np.float32)
    assert mel_distances(m, m) == (0, 0) and mel_distances(np.repeat(m, 2, 0), m) == (0, 0)
    level, distortion = mel_distances(m + 0.5, m)
    assert level == pytest.approx(0.5, rel=1e-5) and distortion == pytest.approx(0, abs=1e-4)
    cepstrum = dct(m, norm="ortho")
    cepstrum[:, 5] += 0.01 * np.sqrt(40)
    _, distortion = mel_distances(dct(cepstrum, type=3, norm="ortho"), m)
    assert distortion == pytest.approx(10 / np.log(10) * np.sqrt(2) * 0.01, rel=1e-3)


def test_word_error_rate():
    """By hand: one substitution, one insertion and one deletion in seven words."""
    heard = ["the baker sold too", "three keys now"]
    assert word_error_rate(["The baker, sold two.", "Three old keys"], heard) == 3 / 7


def test_judge_of_a_closed_set():
    """It hears which of the sentences was spoken, even where one has a word that is in no dictionary."""
    sentences = ["The weather was fine.", "Nobody came to the station.", "She wrote to Xqzvk yesterday."]
    name, hear = load_recogniser("sentences", sentences)
    assert "one of 3 sentences" in name
    assert [hear(speak(s), 22050) for s in sentences] == sentences


@pytest.mark.parametrize("name, words", [("whisper", "base.en.pt"), ("grammar", "no grammar.jsgf")])
def test_no_judge(name, words):
    assert words in refusal(lambda argv: load_recogniser(name))


def test_evaluation(run, data, tmp_path, capsys):
    """The files it promises; its figures are those of the wavs it wrote, and the recordings through Griffin-Lim are
    understood far better than a model that has learnt nothing yet."""
    out = tmp_path / "e"
    evaluate.main(["--ckpt", str(run), "--out", str(out), "--prompts", "overfit", "--steps", "2", "--device", "cpu"])
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "wer.jsonl").open()]
    names = {f"{n:03d}{end}" for n in range(4) for end in (".wav", "_reference.wav", ".png")}
    assert {path.name for path in out.iterdir()} == names | {"wer.jsonl", "summary.json", "table.txt"}
    assert [row["text"] for row in rows] == [data.rows[i]["text"] for i in data.clips("all")[:4]]
    _, hear = load_recogniser("grammar", grammar=data.grammar)
    for n, row in enumerate(rows):
        assert row["seconds"] == pytest.approx(soundfile.info(out / f"{n:03d}.wav").duration)
        reference, rate = soundfile.read(out / f"{n:03d}_reference.wav", dtype="float32")
        assert (log_mel(reference, MEL) - data.mel(n)).abs().mean() < 0.4
        assert word_error_rate([row["text"]], [hear(reference, rate)]) <= 0.2
    assert summary["wer"] == word_error_rate([r["text"] for r in rows], [r["heard"] for r in rows])
    assert summary["wer_ceiling"] <= 0.1
    assert min(summary[key] for key in ("wer", "wer_noise", "wer_other_sentence")) > 0.5
    table = (out / "table.txt").read_text()
    assert f"{summary['wer']:.1%}" in table and f"{summary['wer_ceiling']:.1%}" in table
    assert table in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--prompts", "nowhere.txt"], "cannot read nowhere.txt"), (["--data_dir", "nowhere"], "no prepared data set"),
    (["--recogniser", "whisper"], "base.en.pt"), (["--steps", "0"], "at least one"),
], ids=" ".join)
def test_what_cannot_be_evaluated(run, tmp_path, flags, words):
    assert words in refusal(evaluate.main, "--ckpt", run, "--out", tmp_path / "e", "--device", "cpu", *flags)
    assert not list(tmp_path.rglob("*.*"))


def test_text_features_of_a_checkpoint(run):
    """A model that reads bytes needs no encoder."""
    _, features, config = load_flow(run, "cpu")
    assert isinstance(features, TextFeatures) and config["text_encoder"] == features.encoder == "bytes"
