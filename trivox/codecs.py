"""Waveforms to codes and back: the neural codecs of the hub, and residual k-means on log-mels, which needs no download.

Each codec has name, sample_rate (Hz, of what it encodes and of what it decodes), hop_length (samples a frame),
frame_rate (frames a second), codebooks (Q) and codebook_size, and

    encode(wavs, a list of (samples,) float32) -> a list of (frames, Q) int64 arrays, frames = samples / hop_length
        rounded up; what is missing to a whole frame is silence, and no clip is heard in another's codes
    decode(codes (frames, Q)) -> (frames * hop_length,) float32, of no codes a frame of silence
"""

from pathlib import Path

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt

from trivox.audio import griffin_lim, log_mel, read_mel_config
from trivox.common import Positive, UserError, checked
from trivox.files import read_json, write_whole
from trivox.weights import pretrained

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
        codec = MelRVQ.load(name, read_mel_config(info.get("mel"), Path(name) / "codec.json"))
        if (codec.codebooks, codec.codebook_size) != (info["codebooks"], info["codebook_size"]):
            raise UserError(f"{name}/codec.safetensors is not the codec that codec.json tells of: tokenize again")
        return codec
    if info["codec"] not in CODECS:
        raise UserError(f"{name} is of the codec {info['codec']!r}, which there is not: {', '.join(CODECS)}, mel_rvq")
    return load_codec(info["codec"], device)


def read_codec(folder):
    """codec.json of a token data set, a dict. Raises UserError where there is none, or a damaged one."""
    path = Path(folder) / "codec.json"
    if not path.is_file():
        raise UserError(f"{folder} is neither a codec ({', '.join(CODECS)}) nor a folder of tokens, which "
                        "python data.py tokenize makes")
    info = read_json(path, codec=str, sample_rate=PositiveInt, frame_rate=Positive, codebooks=PositiveInt,
                     codebook_size=PositiveInt)
    for key in ("clips", "hop_length"):  # which the first of these files did not have
        if key in info:
            checked(NonNegativeInt, info[key], f"{key} in {path}")
    characters = checked(str, info.get("characters", "a"), f"characters in {path}")
    if not characters or len({*characters}) < len(characters):
        raise UserError(f"characters in {path} should name some, and none of them twice: tokenize again")
    return info


class NeuralCodec:
    """One of the neural codecs in `transformers`: EnCodec at 6 kbit/s (Défossez et al., 2022), Descript's DAC (Kumar et
    al., 2023) or NeuCodec (Julian et al., 2025), on one device."""

    def __init__(self, name, device="cpu"):
        import transformers

        class_name, repo, size = CODECS[name]
        if not hasattr(transformers, class_name):
            raise UserError(f"transformers {transformers.__version__} has no {class_name}: install the version that "
                            "requirements.txt names")
        model = pretrained(getattr(transformers, class_name).from_pretrained, repo, f"the codec {name}",
                           f"config.json and the weights, model.safetensors ({size}),")
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
        if not mels.isfinite().all():
            raise UserError("a codebook cannot be fitted to log-mels with numbers that are not finite")
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
        from safetensors.torch import load

        path = Path(folder) / "codec.safetensors"
        try:
            tensors = load(path.read_bytes())  # safetensors opens only names of UTF-8
            mean, books = tensors["mean"], [tensors[f"book_{k}"] for k in range(len(tensors) - 1)]
        except Exception as e:  # missing, damaged, another's: each its own class
            raise UserError(f"cannot read mel_rvq's centroids at {path} ({type(e).__name__}): tokenize again") from None
        for x in (mean[None], *books):
            if x.dtype != torch.float32 or x.shape[1:] != (mel.n_mels,) or not len(x) or not x.isfinite().all():
                raise UserError(f"{path} does not hold centroids of {mel.n_mels} finite numbers: tokenize again")
        if not books:
            raise UserError(f"{path} holds no centroids: tokenize again")
        return cls(mel, mean, books)

    def save(self, folder):
        from safetensors.torch import save

        tensors = {"mean": self.mean} | {f"book_{k}": book for k, book in enumerate(self.books)}
        write_whole(Path(folder) / "codec.safetensors", save(tensors))

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
        sizes = torch.tensor([len(book) for book in self.books], device=codes.device)
        if codes.shape[1:] != sizes.shape or ((codes < 0) | (codes >= sizes)).any():
            raise UserError(f"there are codes that mel_rvq's books of {sizes.tolist()} do not have: another codec's?")
        return self.mean + sum(book[codes[:, k]] for k, book in enumerate(self.books))

    def decode(self, codes):
        if not len(codes):
            return np.zeros(self.hop_length, np.float32)
        return griffin_lim(self.mels(codes), self.mel)


def nearest(x, centroids):
    """The index of the nearest of centroids (size, D) to each of x (N, D), by |c|² − 2 x·c: one matrix product."""
    norms = centroids.square().sum(1)
    return torch.cat([torch.addmm(norms, part, centroids.T, alpha=-2).argmin(1) for part in x.split(8192)])


def decode_stream(codec, steps, window=4.0, overlap=0.25, margin=0.1):
    """Decode frames as they come. steps: an iterable of (Q,) codes. Yields pieces of the waveform, (samples,) float32.

    Codecs look around, and Griffin-Lim finds its own phases; so windows of `window` seconds are decoded, and where they
    overlap one is faded into the next, at equal power where they differ. `margin` seconds beyond the overlap are
    decoded with either, as the ends of what is decoded are its worst. What fits into one window is what the codec makes
    of it.
    """
    window, overlap, margin = (max(1, round(x * codec.frame_rate)) for x in (window, overlap, margin))
    n, hop = overlap * codec.hop_length, codec.hop_length
    fade, tail, codes, lead = np.sin(np.pi / 2 * (np.arange(n) + 0.5) / n) ** 2, np.zeros(0), [], 0

    def decoded():
        wav = np.array(codec.decode(torch.stack(codes)))[lead * hop:]
        a, b, f = tail, wav[:len(tail)], fade[:len(tail)]
        alike = np.clip(a @ b / max(1e-9, np.sqrt(a @ a * (b @ b))), 0, 1)  # 0 where their powers add up
        b[:] = (a * (1 - f) + b * f) / np.sqrt(f**2 + (1 - f)**2 + 2 * alike * f * (1 - f))
        return wav

    for step in steps:
        codes.append(step)
        if len(codes) == lead + window + overlap + margin:
            wav = decoded()
            yield wav[:window * hop]
            tail, codes, lead = wav[window * hop:window * hop + n], codes[lead + window - margin:], margin
    if codes[lead:]:
        yield decoded()
