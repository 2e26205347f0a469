"""voices.py: what tells speakers apart does so, at any rate and loudness; ECAPA by a stand-in for speechbrain."""

import json
import random
import sys
from types import ModuleType

import librosa
import numpy as np
import pytest
import torch
from conftest import refusal
from helpers import tone

from trivox.demo_speech import demo_sentence
from trivox.synthesisers import speak_espeak as speak
from trivox.voices import ECAPA, load_embedder

VOICES = ("en-us", "en-us+f2", "en-us+m3", "en-us+f4", "en-us+m7", "en-gb-x-rp", "en-gb-x-rp+f3", "en-gb-scotland")


def test_stats_tell_voices_apart():
    """Of sentences never heard before; by the nearest of the voices' means. Chance is one in eight."""
    rng, embed = random.Random(3), load_embedder("stats")
    clips = np.stack([[embed(speak(demo_sentence(rng), voice), 22050) for _ in range(24)] for voice in VOICES])
    heard, unheard = clips[:, :16], clips[:, 16:]
    distances = np.square((unheard[:, :, None] - heard.mean(1)) / heard.std((0, 1))).sum(-1)
    assert (distances.argmin(-1) == np.arange(8)[:, None]).mean() >= 0.95


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
def test_stats_of_any_rate_and_loudness(rate):
    """The same of a whisper and a shout, much the same at any rate that keeps what there is to hear; pitch in Hz."""
    speech, embed = speak("The captain painted seven wooden boxes yesterday."), load_embedder("stats")
    wav = librosa.resample(speech, orig_sr=22050, target_sr=rate)
    found = embed(wav, rate)
    assert found.dtype == np.float32 and found.shape == (embed.width,) and np.isfinite(found).all()
    np.testing.assert_allclose(embed(0.003 * wav, rate), found, atol=0.02)
    if rate >= 16000:
        np.testing.assert_allclose(found[:64], embed(speech, 22050)[:64], atol=0.3)
    tones = sum(np.sin(2 * np.pi * 200 * k * np.arange(rate) / rate) / k for k in range(1, 6)).astype(np.float32)
    np.testing.assert_allclose(np.exp(embed(tones, rate)[-5:]), 200, rtol=0.02)


@pytest.mark.parametrize("seconds", [0.3, 0.31, 0.5])
def test_stats_of_little(seconds):
    rng = np.random.default_rng(0)
    click = np.zeros(int(22050 * seconds), np.float32)
    click[3000] = 1
    for wav in (tone(seconds), rng.standard_normal(len(click)).astype(np.float32) / 5, click):
        assert np.isfinite(load_embedder("stats")(wav, 22050)).all()


FILES = ("hyperparams.yaml", "mean_var_norm_emb.ckpt", "label_encoder.txt", "classifier.ckpt", "embedding_model.ckpt")


@pytest.fixture
def speechbrain(tmp_path, monkeypatch):
    """Stands for speechbrain 1: its class says what it was called with. Yields the folder of the weights too."""
    folder, calls = tmp_path / ECAPA.split("/")[-1], []
    folder.mkdir()
    for name in FILES:
        (folder / name).touch()
    monkeypatch.setenv("TRIVOX_WEIGHTS", str(tmp_path))

    class EncoderClassifier:
        @classmethod
        def from_hparams(cls, source, savedir, run_opts, overrides):
            calls.append((source, run_opts, overrides))
            assert savedir != source
            return cls()

        def encode_batch(self, wavs):
            calls.append(wavs)
            return wavs.mean(1)[:, None, None] * torch.ones(192)

    module = ModuleType("speechbrain.inference.classifiers")
    module.EncoderClassifier = EncoderClassifier
    for name in ("speechbrain", "speechbrain.inference"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return EncoderClassifier, folder, calls


def test_ecapa(speechbrain):
    """It is given 16 kHz, and its files are those of the folder, which its own settings would send to the hub."""
    _, folder, calls = speechbrain
    embed = load_embedder("ecapa", "cpu")
    assert calls == [(str(folder), {"device": "cpu"}, {"pretrained_path": str(folder)})]
    found = embed(np.full(24000, 0.25, np.float32), 48000)
    assert found.dtype == np.float32 and found.shape == (embed.width,) == (192,) and calls[1].shape == (1, 8000)
    np.testing.assert_allclose(found, 0.25, atol=0.01)


def test_ecapa_without_its_files(speechbrain, monkeypatch):
    """Which file, from where, where to put it; damaged ones; the package itself."""
    cls, folder, _ = speechbrain
    monkeypatch.setattr(cls, "from_hparams", lambda *args, **kwargs: json.loads("{"))
    assert str(folder) in refusal(lambda argv: load_embedder("ecapa"))
    (folder / "embedding_model.ckpt").unlink()
    said = refusal(lambda argv: load_embedder("ecapa"))
    assert f"https://huggingface.co/{ECAPA}/resolve/main/embedding_model.ckpt" in said and "83 MB" in said
    monkeypatch.setitem(sys.modules, "speechbrain.inference.classifiers", None)
    assert "pip install speechbrain" in refusal(lambda argv: load_embedder("ecapa"))
    assert "stats or ecapa" in refusal(lambda argv: load_embedder("xvector"))


@pytest.mark.parametrize("wav, reason", [
    (np.zeros(22050), "it is silent"), (tone(0.29), "0.29 s"), (np.zeros(0), "0.00 s"),
    (1e-5 * tone(0.5), "it is silent"),
], ids=["silent", "short", "empty", "all but silent"])
@pytest.mark.parametrize("name", ["stats", "ecapa"])
def test_no_voice(speechbrain, name, wav, reason):
    assert reason in refusal(lambda argv: load_embedder(name)(np.float32(wav), 22050))
