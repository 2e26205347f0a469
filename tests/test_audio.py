"""audio.py against BigVGAN's own code and closed forms; weights.py by the files of BigVGAN."""

import json

import numpy as np
import pytest
import torch
from bigvgan import bigvgan, meldataset
from bigvgan.env import AttrDict
from conftest import refusal

from trivox.audio import BIGVGAN, MelConfig, griffin_lim, load_vocoder, log_mel
from trivox.synthesisers import speak_espeak as speak

MEL = MelConfig()


@pytest.fixture(scope="module")
def speech():
    return speak("The captain painted seven wooden boxes yesterday.")


def sine(hertz, rate, seconds=0.5):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def pitch(wav, rate):
    """The frequency of the strongest partial, to a fraction of a Hz."""
    spectrum = np.abs(np.fft.rfft(wav * np.hanning(len(wav)), 16 * len(wav)))
    return spectrum.argmax() * rate / (16 * len(wav))


# ------------------------------------------------------------------------------------------------------------
# Log-mel

@pytest.mark.parametrize("samples", [385, 1023, 8192, 22051])
@pytest.mark.parametrize("mel", [MEL, MelConfig(24000, 2048, 300, 100, 20.0, 12000.0)], ids=["22 kHz", "24 kHz"])
def test_log_mel_is_bigvgans(mel, samples, speech):
    samples += mel.n_fft - 1024  # reflection needs as many
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(samples)) / 5
    for wav in (noise, speech[4000:4000 + samples]):
        theirs = meldataset.mel_spectrogram(torch.as_tensor(wav)[None], mel.n_fft, mel.n_mels, mel.sample_rate,
                                            mel.hop_length, mel.n_fft, mel.fmin, mel.fmax)[0].T
        torch.testing.assert_close(log_mel(wav, mel), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [1, 2, 255, 256, 384, 385, 511, 512, 513, 22049])
def test_frames(samples):
    """One for each whole hop, and one for the shortest of clips."""
    m = log_mel(np.full(samples, 0.1, np.float32), MEL)
    assert m.shape == (max(1, samples // 256), 80) and m.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# Griffin-Lim

def test_griffin_lim_round_trip(speech):
    """The mel of the sound has to be within 0.25 nats (2 dB) of the mel that it was made from. Half a frame of delay
    costs 0.2 nats, forgotten phases (random ones, no iteration) 0.8."""
    m = log_mel(speech, MEL)
    wav = griffin_lim(m, MEL)
    assert wav.shape == (len(m) * 256,) and wav.dtype == np.float32
    assert (log_mel(wav, MEL) - m).abs().mean() < 0.25


@pytest.mark.parametrize("hertz, band", [(220, 40), (1000, 40), (3100, 100)])
def test_griffin_lim_keeps_a_pitch(hertz, band):
    """To the width of the mel band that it is in."""
    assert abs(pitch(griffin_lim(log_mel(sine(hertz, 22050), MEL), MEL), 22050) - hertz) < band


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:n_fft=1024 is too large")
def test_griffin_lim_of_next_to_nothing(frames):
    wav = griffin_lim(np.full((frames, 80), -4.0), MEL)
    assert wav.shape == (frames * 256,) and np.isfinite(wav).all()


# ------------------------------------------------------------------------------------------------------------
# What cannot be

def test_no_sound_of_damaged_log_mels():
    for value in (np.nan, np.inf, 1e4):
        assert "no sound" in refusal(lambda argv: griffin_lim(np.full((4, 80), value), MEL))


@pytest.mark.parametrize("changes", [{"hop_length": 0}, {"n_mels": 0}, {"n_fft": 100}, {"fmin": np.nan},
                                     {"fmax": np.inf}, {"fmin": 9e3},
                                     {"fmin": 12e3, "fmax": 13e3}, {"sample_rate": 200, "fmin": 100.0}], ids=str)
def test_mel_settings_that_cannot_be(changes):
    assert "no log-mels" in refusal(lambda argv: MelConfig(**changes))


# ------------------------------------------------------------------------------------------------------------
# BigVGAN

@pytest.fixture
def weights(tmp_path, monkeypatch):
    """BigVGAN's class, small and with random weights, in the hub's layout. Yields it and the folder it is in."""
    h = AttrDict(
        resblock="1", upsample_rates=[8, 8, 2, 2], upsample_kernel_sizes=[16, 16, 4, 4], upsample_initial_channel=32,
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3, 5]], activation="snakebeta", snake_logscale=True,
        use_tanh_at_final=False, use_bias_at_final=False, num_mels=80, sampling_rate=22050, n_fft=1024, hop_size=256,
        win_size=1024, fmin=0, fmax=8000)
    monkeypatch.setenv("TRIVOX_WEIGHTS", str(tmp_path))
    folder = tmp_path / BIGVGAN.split("/")[-1]
    folder.mkdir()
    torch.manual_seed(0)
    generator = bigvgan.BigVGAN(h)
    torch.save({"generator": generator.state_dict()}, folder / "bigvgan_generator.pt")
    (folder / "config.json").write_text(json.dumps(h))
    return generator, folder


def test_bigvgan_is_the_packages_own(weights):
    m = torch.randn(13, 80, generator=torch.Generator().manual_seed(0))
    wav = load_vocoder("bigvgan", MEL)(m.numpy())
    assert wav.shape == (13 * 256,)
    with torch.no_grad():
        theirs = weights[0].eval()(m.T[None])[0, 0]
    torch.testing.assert_close(torch.from_numpy(wav), theirs, atol=1e-5, rtol=1e-4)


def test_bigvgan_of_another_mel(weights):
    said = refusal(lambda argv: load_vocoder("bigvgan", MelConfig(n_mels=100)))
    assert "n_mels=80" in said and "n_mels=100" in said


@pytest.mark.parametrize("file", ["config.json", "bigvgan_generator.pt"])
def test_bigvgan_without_its_weights(weights, file):
    """Which file, from where, and where to put it."""
    (weights[1] / file).unlink()
    said = refusal(lambda argv: load_vocoder("bigvgan", MEL))
    assert f"https://huggingface.co/{BIGVGAN}/resolve/main/{file}" in said and str(weights[1] / file) in said


@pytest.mark.parametrize("file", ["config.json", "bigvgan_generator.pt"])
def test_bigvgan_with_damaged_weights(weights, file):
    path = weights[1] / file
    path.write_bytes(path.read_bytes()[:100])
    assert str(path) in refusal(lambda argv: load_vocoder("bigvgan", MEL))


def test_unknown_vocoder():
    assert "'wavenet'" in refusal(lambda argv: load_vocoder("wavenet", MEL))
