"""Waveform to representation and back: files, log-mels, vocoders, codecs, speaker embedders.

Log-mels are BigVGAN's (NVIDIA, `bigvgan.meldataset.mel_spectrogram`), so that its vocoders read what is trained here.
Shapes: wav (samples,) float32 in [-1, 1]; log_mel (frames, n_mels) float32, natural logarithm of the magnitude.
"""

import json
import os
import re
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError

LOG_FLOOR = 1e-5  # magnitudes below it count as silence


@dataclass(frozen=True)
class MelConfig:
    """How a log-mel is made; the defaults are those of nvidia/bigvgan_v2_22khz_80band_fmax8k_256x."""
    sample_rate: int = 22050  # Hz
    n_fft: int = 1024  # samples; the Hann window is as long
    hop_length: int = 256  # samples from frame to frame
    n_mels: int = 80
    fmin: float = 0.0  # Hz
    fmax: float = 8000.0  # Hz

    @property
    def frame_rate(self):
        """Frames per second."""
        return self.sample_rate / self.hop_length


def read_wav(path, sample_rate):
    """Read any file that libsndfile knows (wav, flac, ogg, mp3) as mono at `sample_rate`.

    Returns (samples,) float32. Raises UserError with the reason where the file is missing, damaged or empty.
    """
    import soundfile

    try:
        wav, rate = soundfile.read(path, dtype="float32", always_2d=True)
        cut = re.search(r"^data : \d+ \(should be", soundfile.info(path, verbose=True).extra_info, re.MULTILINE)
    except (soundfile.LibsndfileError, OSError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    if cut:  # libsndfile reads what there is
        raise UserError(f"cannot read {path}: it is cut off, its header promises more samples than it holds")
    wav = wav.mean(1)
    if not len(wav) or not np.isfinite(wav).all():
        raise UserError(f"{path} holds {'no sample' if not len(wav) else 'samples that are not numbers'}")
    if rate != sample_rate:
        import librosa
        wav = librosa.resample(wav, orig_sr=rate, target_sr=sample_rate)
    return wav


def write_wav(path, wav, sample_rate):
    """Write (samples,) floats as 16-bit PCM, clipped to [-1, 1]."""
    import soundfile

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.clip(wav, -1, 1), sample_rate, subtype="PCM_16")


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

    filters, target = mel_filters(mel).numpy(), np.exp(np.asarray(log_mel, dtype=np.float32).T)
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
    import json

    from bigvgan import bigvgan
    from bigvgan.env import AttrDict

    config, weights = hub_file(BIGVGAN, "config.json", "2 KB"), hub_file(BIGVGAN, "bigvgan_generator.pt", "450 MB")
    try:
        h = AttrDict(json.loads(Path(config).read_text()))
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


def hub_file(repo, name, size):
    """The local path of a file of a Hugging Face repository: weights/<repo's name>/<file> if put there by hand, else
    the hub's cache or a download. Raises UserError that says where to get the file and where to put it."""
    local = Path(os.environ.get("TRIVOX_WEIGHTS", "weights")) / repo.split("/")[-1] / name
    if local.exists():
        return local
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo, name)
    except Exception as e:  # offline, moved, refused: each its own exception class
        raise UserError(f"cannot download {name} ({size}) of {repo} ({type(e).__name__}); get it from "
                        f"https://huggingface.co/{repo}/resolve/main/{name} and put it at {local}") from None


# ------------------------------------------------------------------------------------------------------------
# Codecs. Each has name, sample_rate (Hz, of what it encodes and of what it decodes), hop_length (samples a frame),
# frame_rate (frames a second), codebooks (Q) and codebook_size, and
#     encode(wavs, a list of (samples,) float32) -> a list of (frames, Q) int64 arrays, frames = samples / hop_length
#         rounded up; what is missing to a whole frame is silence, and no clip is heard in another's codes
#     decode(codes (frames, Q)) -> (frames * hop_length,) float32, of no codes a frame of silence

CODECS = {  # name: class in `transformers`, repository on the hub, size of its weights
    "encodec_24khz": ("EncodecModel", "facebook/encodec_24khz", "93 MB"),
    "dac_44khz": ("DacModel", "descript/dac_44khz", "307 MB"),
    "neucodec": ("NeuCodecModel", "neuphonic/neucodec", "2.5 GB"),
}


def load_codec(name, device="cpu"):
    """The codec "encodec_24khz", "dac_44khz" or "neucodec", or, given the folder of a token data set, the one that its
    tokens were made with. Raises UserError where there is neither, or where the weights cannot be had."""
    if name in CODECS:
        return NeuralCodec(name, device)
    info = read_codec(name)
    if info["codec"] == "mel_rvq":
        return MelRVQ.load(name, MelConfig(**info["mel"]))
    return load_codec(info["codec"], device)


def read_codec(folder):
    """codec.json of a token data set, a dict. Raises UserError where there is none."""
    try:
        return json.loads((Path(folder) / "codec.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} is neither a codec ({', '.join(CODECS)}) nor a folder of tokens, which "
                        "python data.py tokenize makes") from None


class NeuralCodec:
    """One of the neural codecs in `transformers`: EnCodec at 6 kbit/s (Défossez et al., 2022), Descript's DAC (Kumar et
    al., 2023) or NeuCodec (Julian et al., 2025), on one device."""

    def __init__(self, name, device="cpu"):
        import transformers

        class_name, repo, size = CODECS[name]
        by_hand = Path(os.environ.get("TRIVOX_WEIGHTS", "weights")) / repo.split("/")[-1]
        if not hasattr(transformers, class_name):
            raise UserError(f"transformers {transformers.__version__} has no {class_name}: install the version that "
                            "requirements.txt names")
        try:
            model = getattr(transformers, class_name).from_pretrained(by_hand if by_hand.exists() else repo)
        except Exception as e:  # offline, moved, damaged: each its own class
            raise UserError(f"cannot load the codec {name} ({type(e).__name__}); get config.json and the weights, "
                            f"model.safetensors ({size}), from https://huggingface.co/{repo}/tree/main and put them "
                            f"into {by_hand}/") from None
        self.name, self.device, self.model, config = name, device, model.eval().to(device), model.config
        self.hop_length = config.hop_length
        if name == "neucodec":  # which hears 16 kHz and speaks 24; here it is given 24 as well
            self.sample_rate, self.codebooks = config.output_sampling_rate, 1
            self.codebook_size = int(np.prod(config.quantization_levels))
        else:
            self.sample_rate, self.codebook_size = config.sampling_rate, config.codebook_size
            self.codebooks = (config.n_codebooks if name == "dac_44khz"
                              else model.quantizer.get_num_quantizers_for_bandwidth(6.0))
        self.frame_rate = self.sample_rate / self.hop_length

    def encode(self, wavs, seconds=60):
        """`seconds` of audio go through the model at once."""
        frames = [max(1, -(-len(wav) // self.hop_length)) for wav in wavs]
        # DAC and NeuCodec look ahead, into the padding too: clips of one length alone share a batch. EnCodec is causal
        # but for the reflection at the start, which sees six frames, so that it may be given more silence.
        multiple = 64 if self.name == "encodec_24khz" else 1
        groups, codes = {}, [None] * len(wavs)
        for i, n in enumerate(frames):
            groups.setdefault(-(-n // multiple) * multiple, []).append(i)
        for n, group in groups.items():
            size = max(1, int(seconds * self.frame_rate / n))
            for batch in (group[start:start + size] for start in range(0, len(group), size)):
                padded = np.zeros((len(batch), n * self.hop_length), np.float32)
                for row, i in zip(padded, batch):
                    row[:len(wavs[i])] = wavs[i]
                for i, c in zip(batch, self._encode(padded).long().cpu().numpy()):
                    codes[i] = c[:frames[i]]
        return codes

    @torch.inference_mode()
    def _encode(self, wavs):
        """(B, whole frames of samples) float32 -> codes (B, frames, Q), of any integer type."""
        if self.name == "neucodec":
            return self.model.encode(**{k: v.to(self.device) for k, v in neucodec_inputs(wavs).items()}).audio_codes.mT
        wavs = torch.from_numpy(wavs)[:, None].to(self.device)
        if self.name == "dac_44khz":
            return self.model.encode(wavs).audio_codes.mT
        return self.model.encode(wavs, bandwidth=6.0).audio_codes[0].mT

    @torch.inference_mode()
    def decode(self, codes):
        if not len(codes):
            return np.zeros(self.hop_length, np.float32)
        codes = torch.as_tensor(codes, device=self.device).T[None]  # (1, Q, frames)
        with torch.autocast(codes.device.type, enabled=False):  # of the model that the codes come from
            if self.name == "encodec_24khz":
                wav = self.model.decode(codes[None], [None]).audio_values
            else:
                wav = self.model.decode(audio_codes=codes).audio_values
        return wav.flatten().float().cpu().numpy()


def neucodec_inputs(wavs):
    """What NeuCodec's encoder reads of (B, samples) at 24 kHz: the wave at 16 kHz, and w2v-BERT's log-mels of it.

    As in transformers' NeuCodecFeatureExtractor, which needs torchaudio, the wave gets one more sample and is then
    padded to whole frames of 320: the log-mels, which lose a frame at the end, are then as many as the codes.
    """
    import librosa
    from transformers import SeamlessM4TFeatureExtractor

    wavs = librosa.resample(wavs, orig_sr=24000, target_sr=16000)
    wavs = np.pad(wavs, ((0, 0), (0, 320 - wavs.shape[1] % 320)))
    features = SeamlessM4TFeatureExtractor()(list(wavs), sampling_rate=16000, return_tensors="pt")
    return {"input_values": torch.from_numpy(wavs)[:, None], "input_features": features["input_features"],
            "input_features_mask": features["attention_mask"]}


class MelRVQ:
    """Log-mels through a residual vector quantiser, decoded by Griffin-Lim: the codec that needs no download.

    mel: MelConfig. mean: (n_mels,) log-mel that is taken off first. books: (size, n_mels) float32 tensors; each
    quantises by its nearest centroid what the ones before it leave.
    """
    name = "mel_rvq"

    def __init__(self, mel, mean, books):
        self.mel, self.mean, self.books = mel, mean, books
        self.sample_rate, self.hop_length, self.frame_rate = mel.sample_rate, mel.hop_length, mel.frame_rate
        self.codebooks, self.codebook_size = len(books), max(map(len, books))

    @classmethod
    def fit(cls, mels, mel, sizes, seed=0):
        """Fit books of the given sizes to log-mels (N, n_mels) float32, by k-means on what is left before each."""
        from sklearn.cluster import KMeans, kmeans_plusplus

        if len(mels) < max(sizes):
            raise UserError(f"a codebook of {max(sizes)} codes cannot be fitted to {len(mels)} frames: take a smaller "
                            "--codebook_size")
        mean, books = mels.mean(0), []
        left = mels - mean
        for size in sizes:
            # seeding with few frames and one trial each takes a tenth of the time and costs a hundredth of the error
            few = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))[:2 * size]].numpy()
            seeds, _ = kmeans_plusplus(few, size, random_state=seed, n_local_trials=1)
            kmeans = KMeans(size, init=seeds, n_init=1, max_iter=8).fit(left.numpy())
            books.append(torch.from_numpy(kmeans.cluster_centers_))
            left = left - books[-1][nearest(left, books[-1])]
        return cls(mel, mean, books)

    @classmethod
    def load(cls, folder, mel):
        from safetensors.torch import load_file

        path = Path(folder) / "codec.safetensors"
        try:
            tensors = load_file(path)
            return cls(mel, tensors["mean"], [tensors[f"book_{k}"] for k in range(len(tensors) - 1)])
        except Exception as e:  # missing, damaged, another's: each its own class
            raise UserError(f"cannot read mel_rvq's centroids at {path} ({type(e).__name__}): tokenize again") from None

    def save(self, folder):
        from safetensors.torch import save_file

        part = Path(folder) / "codec.part"
        save_file({"mean": self.mean} | {f"book_{k}": book for k, book in enumerate(self.books)}, part)
        part.replace(part.with_suffix(".safetensors"))

    def encode(self, wavs):
        whole = [np.pad(wav, (0, -len(wav) % self.hop_length)) for wav in wavs]
        mels = [log_mel(wav, self.mel)[:max(1, len(wav) // self.hop_length)] for wav in whole]
        return [c.numpy() for c in self.quantise(torch.cat(mels)).split([len(m) for m in mels])]

    def quantise(self, mels):
        """(N, n_mels) -> codes (N, Q) int64."""
        left, codes = mels - self.mean, []
        for book in self.books:
            codes.append(nearest(left, book))
            left = left - book[codes[-1]]
        return torch.stack(codes, 1)

    def mels(self, codes):
        """codes (N, Q) -> the log-mel (N, n_mels) that they stand for."""
        codes = torch.as_tensor(codes)
        return self.mean + sum(book[codes[:, k]] for k, book in enumerate(self.books))

    def decode(self, codes):
        if not len(codes):
            return np.zeros(self.hop_length, np.float32)
        return griffin_lim(self.mels(codes), self.mel)


def nearest(x, centroids):
    """The index of the nearest of centroids (size, D) to each of x (N, D), by |c|² − 2 x·c: one matrix product."""
    norms = centroids.square().sum(1)
    return torch.cat([torch.addmm(norms, part, centroids.T, alpha=-2).argmin(1) for part in x.split(8192)])


# ------------------------------------------------------------------------------------------------------------
# Speaker embedders. Each has a width, and is a function from (wav (samples,) float32, sample_rate in Hz) to what is
# heard of the voice, (width,) float32. They raise UserError for a recording that is silent or shorter than 0.3 s

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
