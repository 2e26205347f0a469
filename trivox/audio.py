"""Waveforms to log-mels and back: log-mels, vocoders.

Log-mels are BigVGAN's (NVIDIA, `bigvgan.meldataset.mel_spectrogram`), so that its vocoders read what is trained here.
Shapes: wav (samples,) float32 in [-1, 1]; log_mel (frames, n_mels) float32, natural logarithm of the magnitude.
"""

import json
import math
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch
import torch.nn.functional as F

from trivox.common import UserError, checked
from trivox.weights import hub_file

LOG_FLOOR = 1e-5  # magnitudes below it count as silence
LOUDEST_MEL = 40  # log-mels above it are damage


@dataclass(frozen=True)
class MelConfig:
    """How a log-mel is made; the defaults are those of nvidia/bigvgan_v2_22khz_80band_fmax8k_256x."""
    sample_rate: int = 22050  # Hz
    n_fft: int = 1024  # samples; the Hann window is as long
    hop_length: int = 256  # samples from frame to frame
    n_mels: int = 80
    fmin: float = 0.0  # Hz
    fmax: float = 8000.0  # Hz

    def __post_init__(self):
        if min(self.sample_rate, self.hop_length, self.n_mels) < 1 or self.n_fft < max(2, self.hop_length):
            raise UserError(f"there are no log-mels of {self}: sample_rate, hop_length and n_mels should be at least 1 "
                            "and n_fft at least hop_length")
        if not 0 <= self.fmin < self.fmax < math.inf or self.fmin >= self.sample_rate / 2:
            raise UserError(f"there are no log-mels from fmin {self.fmin} to fmax {self.fmax} Hz at a sample_rate of "
                            f"{self.sample_rate}")

    @property
    def frame_rate(self):
        """Frames per second."""
        return self.sample_rate / self.hop_length


def mel_config(c):
    """The MelConfig that a config holds."""
    return MelConfig(**{f.name: getattr(c, f.name) for f in fields(MelConfig)})


def read_mel_config(values, path):
    """The MelConfig that the file `path` says to be one, a dict. Raises UserError for a damaged one."""
    kinds = get_type_hints(MelConfig)
    if not isinstance(values, dict) or set(values) != set(kinds):
        raise UserError(f"the mel settings in {path} are damaged: expected {', '.join(kinds)}")
    return MelConfig(**{key: checked(kind, values[key], f"{key} in {path}") for key, kind in kinds.items()})


# ------------------------------------------------------------------------------------------------------------
# Log-mel

@cache
def mel_filters(mel):
    """Slaney's mel filters, (n_mels, n_fft // 2 + 1) float32."""
    from librosa.filters import mel as filters

    basis = filters(sr=mel.sample_rate, n_fft=mel.n_fft, n_mels=mel.n_mels, fmin=mel.fmin, fmax=mel.fmax)
    return torch.from_numpy(basis)


def log_mel(wav, mel):
    """(samples,) float32 array or tensor -> (samples // hop_length, n_mels) float32 tensor, at least one frame."""
    wav = torch.as_tensor(wav)
    left = (mel.n_fft - mel.hop_length) // 2
    right = mel.n_fft - mel.hop_length - left  # one more where the difference is odd
    wav = F.pad(wav, (0, max(0, max(right + 1, mel.hop_length) - len(wav))))  # reflection needs more than it adds
    wav = F.pad(wav[None, None], (left, right), mode="reflect")[0]
    window = torch.hann_window(mel.n_fft)
    spec = torch.stft(wav, mel.n_fft, mel.hop_length, window=window, center=False, return_complex=True)
    magnitude = torch.sqrt(torch.view_as_real(spec[0]).square().sum(-1) + 1e-9)  # (n_fft // 2 + 1, frames)
    return (mel_filters(mel) @ magnitude).clamp(min=LOG_FLOOR).log().T


# ------------------------------------------------------------------------------------------------------------
# Vocoders: functions from log_mel (frames, n_mels) to wav (frames * hop_length,), both on the CPU

def load_vocoder(name, mel, device="cpu", seed=0):
    """The vocoder "griffinlim" (nothing to download) or "bigvgan" (weights from the hub, MIT licence)."""
    if name == "griffinlim":
        return partial(griffin_lim, mel=mel, seed=seed)
    if name == "bigvgan":
        return load_bigvgan(mel, device)
    raise UserError(f"unknown vocoder {name!r}: griffinlim or bigvgan")


def griffin_lim(log_mel, mel, seed=0, iterations=32):
    """Invert the mel filters by multiplicative updates (Lee & Seung, 2001), then find phases by fast Griffin-Lim
    (Perraudin et al., 2013; librosa's) from random ones."""
    import librosa

    log_mel = np.asarray(log_mel, dtype=np.float32)
    if not (log_mel <= LOUDEST_MEL).all():
        raise UserError("the log-mels hold numbers that are no sound, NaN or infinite perhaps: the model or the codec "
                        "is damaged, or its temperature or guidance is far too high")
    filters, target = mel_filters(mel).numpy(), np.exp(log_mel.T)
    magnitude, back = filters.T @ target, filters.T @ target
    for _ in range(30):  # closer than librosa's mel_to_stft, in a tenth of its time
        magnitude *= back / (filters.T @ (filters @ magnitude) + 1e-10)
    wav = librosa.griffinlim(magnitude, n_iter=iterations, hop_length=mel.hop_length, n_fft=mel.n_fft,
                             random_state=seed)
    pad = target.shape[1] * mel.hop_length - len(wav)  # a frame of log_mel is centred half a hop later than librosa's
    return np.pad(wav, (pad // 2, pad - pad // 2)).astype(np.float32)


BIGVGAN = "nvidia/bigvgan_v2_22khz_80band_fmax8k_256x"


def load_bigvgan(mel, device):
    """BigVGAN v2 (Lee et al., 2023) with NVIDIA's weights. Built by hand: the package's own from_pretrained fails with
    huggingface_hub >= 1."""

    from bigvgan import bigvgan
    from bigvgan.env import AttrDict

    config, weights = hub_file(BIGVGAN, "config.json", "2 KB"), hub_file(BIGVGAN, "bigvgan_generator.pt", "450 MB")
    try:
        h = AttrDict(json.loads(Path(config).read_text(encoding="utf-8")))
        made_for = MelConfig(h.sampling_rate, h.n_fft, h.hop_size, h.num_mels, float(h.fmin), float(h.fmax))
        generator = bigvgan.BigVGAN(h)
        generator.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["generator"])
    except Exception as e:  # damaged, or not what it is named
        raise UserError(f"{config} and {weights} are not a whole BigVGAN ({type(e).__name__}): get them anew") from None
    if made_for != mel:
        raise UserError(f"BigVGAN reads {made_for}, but the model makes {mel}: take --vocoder griffinlim")
    generator.remove_weight_norm()
    generator.eval().to(device)

    @torch.inference_mode()
    def vocode(log_mel):
        return generator(torch.as_tensor(log_mel, dtype=torch.float32, device=device).T[None])[0, 0].cpu().numpy()

    return vocode
