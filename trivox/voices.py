"""Recordings to speaker embeddings: what is heard of a voice.

Each embedder has a width, and is a function from (wav (samples,) float32, sample_rate in Hz) to (width,) float32. They
raise UserError for a recording that is silent or shorter than 0.3 s.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import numpy as np
import torch

from trivox.audio import MelConfig, log_mel
from trivox.common import UserError
from trivox.recordings import read_wav
from trivox.weights import hub_file

ECAPA = "speechbrain/spkrec-ecapa-voxceleb"


def load_embedder(name, device="cpu"):
    """The speaker embedder "stats" (nothing to download) or "ecapa" (speechbrain's weights, Apache 2.0)."""
    if name == "stats":
        return StatsEmbedder()
    if name == "ecapa":
        return EcapaEmbedder(device)
    raise UserError(f"unknown speaker embedder {name!r}: stats or ecapa")


def voice_at(wav, sample_rate, wanted):
    """A recording of a voice at `wanted` Hz. Raises UserError where there is too little to hear."""
    if len(wav) < 0.3 * sample_rate:
        raise UserError(f"it lasts {len(wav) / sample_rate:.2f} s, and a voice takes 0.3 s to be known")
    if np.abs(wav).max() < 1e-4:
        raise UserError("it is silent")
    if sample_rate != wanted:
        import librosa
        wav = librosa.resample(wav, orig_sr=sample_rate, target_sr=wanted)
    return wav


class StatsEmbedder:
    """How a voice sounds and how high it is: mean, standard deviation and skewness of 32 mel cepstra (Davis &
    Mermelstein, 1980) and five quantiles of the logarithm of its pitch in Hz (YIN; de Cheveigné & Kawahara, 2002), over
    the frames within 30 dB of the loudest. They have units of their own: standardise them over a data set."""
    width = 3 * 32 + 5
    mel = MelConfig(sample_rate=16000, n_fft=512, n_mels=40, fmin=60.0, fmax=7600.0)

    def __init__(self):
        import librosa
        from filelock import FileLock

        # librosa's first call compiles; processes that write what they compiled to numba's cache at once crash on it
        with FileLock(Path(gettempdir()) / f"trivox-yin-{os.getuid()}.lock"):
            librosa.yin(np.zeros(1024, np.float32), fmin=60, fmax=500, sr=8000, frame_length=512, hop_length=128)

    def __call__(self, wav, sample_rate):
        import librosa
        from scipy.fft import dct

        wav = voice_at(wav, sample_rate, self.mel.sample_rate)
        wav = wav / np.abs(wav).max()
        mels = log_mel(wav, self.mel).numpy()
        power = np.exp(2 * mels).sum(1)
        cepstra = dct(mels[power > 1e-3 * power.max()], norm="ortho")[:, 1:33]  # the one before is the loudness
        mean, std = cepstra.mean(0), cepstra.std(0)
        skewness = ((cepstra - mean) ** 3).mean(0) / (std + 1e-6) ** 3
        low, frames = librosa.resample(wav, orig_sr=16000, target_sr=8000), dict(frame_length=512, hop_length=128)
        pitch = librosa.yin(low, fmin=60, fmax=500, sr=8000, **frames)
        power = librosa.feature.rms(y=low, **frames)[0] ** 2
        pitch = np.quantile(np.log(pitch[power > 1e-3 * power.max()]), [0.1, 0.25, 0.5, 0.75, 0.9])
        return np.concatenate([mean, std, skewness, pitch]).astype(np.float32)


class EcapaEmbedder:
    """ECAPA-TDNN (Desplanques et al., 2020) with speechbrain's weights, trained on VoxCeleb, on one device."""
    width = 192

    def __init__(self, device="cpu"):
        try:
            from speechbrain.inference.classifiers import EncoderClassifier
        except Exception as e:  # missing, or at odds with torch or torchaudio
            raise UserError(f"the speaker embedder ecapa needs the package speechbrain ({type(e).__name__}: {e}): pip "
                            "install speechbrain, or take stats") from None
        files = {"hyperparams.yaml": "2 KB", "mean_var_norm_emb.ckpt": "2 KB", "label_encoder.txt": "129 KB",
                 "classifier.ckpt": "6 MB", "embedding_model.ckpt": "83 MB"}  # it loads the classifier too
        folder = [Path(hub_file(ECAPA, name, size)).absolute() for name, size in files.items()][0].parent
        try:
            with TemporaryDirectory() as links:  # which speechbrain makes to all that it loads
                self.model = EncoderClassifier.from_hparams(
                    str(folder), savedir=links, run_opts={"device": str(device)},
                    overrides={"pretrained_path": str(folder)})  # else the file itself sends it to the hub
        except Exception as e:  # damaged, or not what it is named
            raise UserError(f"{folder} holds no whole ECAPA-TDNN ({type(e).__name__}): get its files anew") from None

    @torch.inference_mode()
    def __call__(self, wav, sample_rate):
        wav = voice_at(wav, sample_rate, 16000)
        return self.model.encode_batch(torch.from_numpy(wav)[None]).flatten().float().cpu().numpy()


def read_voice(path, config, device="cpu"):
    """The embedding (speaker_width,) float32 of a recording's voice, or one that was stored as .npy.

    Raises UserError for a recording that is silent, too short or no audio, and for an embedding of another width than
    the checkpoint's.
    """
    wanted = config["speaker_width"]
    if Path(path).suffix == ".npy":
        try:
            embedding = np.load(path, allow_pickle=False).astype(np.float32)
        except Exception as e:  # missing, damaged, pickled, an archive: each its own class
            raise UserError(f"cannot read the embedding {path}: {e}") from None
    else:
        embedder, wav = load_embedder(config["speaker_embedder"], device), read_wav(path, config["sample_rate"])
        try:
            embedding = embedder(wav, config["sample_rate"])
        except UserError as e:
            raise UserError(f"no voice can be heard in {path}: {e}") from None
    if embedding.shape != (wanted,):
        raise UserError(f"{path} gives an embedding of shape {embedding.shape}; the checkpoint reads ({wanted},)")
    if not np.isfinite(embedding).all():
        raise UserError(f"{path} gives an embedding with numbers that are not finite")
    return torch.from_numpy(embedding)
