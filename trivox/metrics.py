"""Figures: of log-mels, sets of recordings, codes and voices. (What is understood of speech: judges.py.)"""

import math

import numpy as np
import torch

from model import delayed_batch, packed_batch, sentence
from trivox.common import UserError, autocast, widest
from trivox.cross_entropy import linear_cross_entropy
from trivox.gpu import send
from trivox.weights import pretrained


# ------------------------------------------------------------------------------------------------------------
# Distances between log-mels (frames, n_mels)

def mel_distances(mel, reference):
    """The mean absolute difference, in nats, and the mel-cepstral distortion, in dB, of two log-mels (frames, n_mels).

    Frames are paired by dynamic time warping on the cepstra 1 to 13, cosine transforms of the log-mel; the distortion
    is 10 / ln 10 · sqrt(2 · sum of their squared differences) (Kubichek, 1993).
    """
    import librosa
    from scipy.fft import dct

    mel, reference = np.asarray(mel), np.asarray(reference)
    a, b = (dct(m, norm="ortho")[:, 1:14] / np.sqrt(m.shape[1] / 2) for m in (mel, reference))
    _, path = librosa.sequence.dtw(a.T, b.T)
    i, j = path.T
    mcd = 10 / np.log(10) * np.sqrt(2 * np.square(a[i] - b[j]).sum(1)).mean()
    return float(np.abs(mel[i] - reference[j]).mean()), float(mcd)


# ------------------------------------------------------------------------------------------------------------
# Distances between sets of recordings, and structure within one

def frechet_distance(a, b):
    """|mean difference|² + tr(A + B − 2 (A B)^½) of the Gaussians fitted to two sets of vectors (N, D) (Fréchet, 1957;
    as a measure of audio: Kilgour et al., 2019). The trace of the root comes from A^½ B A^½, which stays symmetric and
    so can be had where there are fewer vectors than dimensions. None where one of the sets has less than two."""
    from scipy.linalg import eigh

    if min(len(a), len(b)) < 2:
        return None

    (mean_a, A), (mean_b, B) = ((x.mean(0), np.cov(x, rowvar=False)) for x in map(np.float64, (a, b)))
    values, vectors = eigh(A)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(eigh(root @ B @ root, eigvals_only=True).clip(0)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(A) + np.trace(B) - 2 * cross)


def kernel_distance(a, b):
    """The kernel audio distance (KAD; Chung et al., 2025, arXiv 2502.15602) of two sets of vectors, of which b is the
    reference: 100 times the unbiased estimate of the squared maximum mean discrepancy (Gretton et al., 2012, lemma 6),
    k(x, y) = exp(−|x − y|² / 2σ²), σ the median distance of the pairs in b.

    a, b: (N, D) independent vectors, or lists of (n, D), the n windows of each recording. Windows of one recording are
    alike and would pass for likeness of the set, so pairs of them are left out, and each recording counts the same.
    About 0 for two sets of one law, as often below as above; of less than some 10 recordings above, by σ, which b sets.
    Not symmetric. Takes 4 N² bytes, 260 MB for 8,000 vectors. None where a set has less than two recordings, and where
    σ is 0, since more than half of the pairs in b are equal.
    """
    from scipy.spatial.distance import pdist

    if min(len(a), len(b)) < 2:
        return None

    centre = np.float64(np.concatenate([*map(np.atleast_2d, b)])).mean(0)  # products of small numbers round less
    a, b = ([np.atleast_2d(np.float64(clip)) - centre for clip in clips] for clips in (a, b))
    sigma = np.median(pdist(np.concatenate(b)), overwrite_input=True)
    if sigma == 0:
        return None

    def kernel(x, y):
        squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
        return np.exp(squares / (-2 * sigma**2))

    def mean_kernel(x, y):  # over all pairs of clips, of the mean over their windows
        weigh = [np.concatenate([np.full(len(clip), 1 / len(clip) / len(clips)) for clip in clips]) for clips in (x, y)]
        x, y = np.concatenate(x), np.concatenate(y)
        return sum(weigh[0][i:i + 256] @ kernel(x[i:i + 256], y) @ weigh[1] for i in range(0, len(x), 256))

    def within(x):  # the same over pairs of different clips
        return (len(x) * mean_kernel(x, x) - np.mean([kernel(clip, clip).mean() for clip in x])) / (len(x) - 1)

    return float(100 * (within(a) + within(b) - 2 * mean_kernel(a, b)))


def band_frames(wav, rate):
    """(samples,) -> log-mels in 24 bands, (frames, 24), 40 a second."""
    import librosa

    mel = librosa.feature.melspectrogram(y=np.asarray(wav, np.float32), sr=rate, n_fft=2048, hop_length=rate // 40,
                                         n_mels=24, fmax=min(8000, rate / 2))
    return np.log(mel.T + 1e-4)


def load_embedding(name, device="cpu"):
    """What both distances are taken of. Returns (its name, a function from (wav, rate) to vectors (N, D)).

    logmel: mean and standard deviation of 24 bands in windows of 1 s, every half second. clap: LAION's CLAP for music
    (Wu et al., 2023), windows of 10 s. auto: clap where its weights are to be had.
    """
    if name == "auto":
        try:
            return load_embedding("clap", device)
        except UserError:
            name = "logmel"
    if name == "clap":
        return "CLAP embeddings", load_clap(device)

    def embed(wav, rate):
        frames = band_frames(wav, rate)
        frames = np.pad(frames, ((0, max(0, 40 - len(frames))), (0, 0)), mode="edge")
        windows = [frames[i:i + 40] for i in range(0, len(frames) - 39, 20)]
        return np.array([np.concatenate((w.mean(0), w.std(0))) for w in windows])

    return "log-mel statistics", embed


CLAP = "laion/larger_clap_music"


def load_clap(device):
    """CLAP through transformers. Raises UserError where its weights cannot be had."""
    import librosa
    from transformers import ClapFeatureExtractor, ClapModel

    def load(source):
        return ClapModel.from_pretrained(source), ClapFeatureExtractor.from_pretrained(source)

    model, extract = pretrained(load, CLAP, f"{CLAP} for the Fréchet distance (--embedding logmel needs no download)",
                                "config.json, preprocessor_config.json and the weights (780 MB)")
    model.eval().to(device)

    @torch.inference_mode()
    def embed(wav, rate):
        wav = librosa.resample(np.asarray(wav, np.float32), orig_sr=rate, target_sr=48000)
        windows = [wav[i:i + 480_000] for i in range(0, max(1, len(wav) - 239_999), 480_000)]
        features = extract(windows, sampling_rate=48000, return_tensors="pt").to(device)
        states = model.get_audio_features(**features)
        return getattr(states, "pooler_output", states).float().cpu().numpy()  # transformers 5 wraps it

    return embed


def coherence(frames, window=20, hop=5):
    """How well a piece keeps to where it is, at long range, from `band_frames` (40 a second): about 0 to 1.

    The distances between sliding windows, here of 0.5 s, are the piece's self-similarity matrix (Foote, 1999). This is
    the correlation, over all pairs of windows that do not overlap, of their distance in sound with their distance in
    time: Mantel's statistic (1967). With its windows in a random order a piece has about 0; one that goes somewhere,
    section by section, has more, and so has one that only drifts: read it beside that of real pieces. Returns None for
    pieces of less than 5 s, which have no long range.
    """
    if len(frames) < 200:
        return None
    windows = [frames[i:i + window] for i in range(0, len(frames) - window + 1, hop)]
    sound = np.array([np.concatenate((w.mean(0), w.std(0))) for w in windows])
    i, j = np.triu_indices(len(sound), window // hop)
    return float(np.corrcoef(j - i, np.linalg.norm(sound[i] - sound[j], axis=1))[0, 1])


def shuffled(frames, rng, window=20):
    """The piece with its windows of 0.5 s in a random order: what it sounds like stays, its form goes."""
    whole = frames[:len(frames) // window * window].reshape(-1, window, frames.shape[1])
    return rng.permutation(whole).reshape(-1, frames.shape[1])


# ------------------------------------------------------------------------------------------------------------
# Codes

def perplexity(nats):
    """exp of a cross-entropy; of one beyond 700, where float64 ends, that of 700."""
    return math.exp(min(nats, 700))


def unigram_cross_entropy(train, held_out, size):
    """What a model that knows only how often each code occurs pays for held-out codes, in nats, book by book.

    train, held_out: lists of (frames, Q) integers below `size`. To each count one half is added. Returns (Q,).
    """
    train, held_out = np.concatenate(train), np.concatenate(held_out)
    books = range(train.shape[1])
    counts = np.stack([np.bincount(train[:, q], minlength=size) for q in books]) + 0.5
    log_p = np.log(counts / counts.sum(1, keepdims=True))
    return np.array([-log_p[q, held_out[:, q]].mean() for q in books])


def score_clips(model, data, features, clips, device, dtype):
    """What the model knows of some clips, with their texts, as far as its context reaches.

    Returns three sums in one vector (2 Q + 1,) on the device: the cross-entropies of their codes for each book, given
    all that comes before; for each book how many were the most probable; the squared errors of log seconds.
    """
    c, Q = model.c, model.c.codebooks
    codes = [data.codes(i)[:c.context - Q] for i in clips]
    batch = {"tokens": delayed_batch(c, codes, multiple=16),
             "seconds": torch.tensor([len(x) / c.frame_rate for x in codes])}
    if c.cross_every:
        batch["text"], batch["length"] = features([data.rows[i]["text"] for i in clips], multiple=16)
    batch = send(batch, device)
    tokens, seconds = batch["tokens"], batch["seconds"]
    model.eval()
    with torch.no_grad(), autocast(device, dtype):
        x, log_seconds = model(tokens[:, :-1], batch.get("text"), batch.get("length"), seconds)
        targets = tokens[:, 1:].masked_fill(tokens[:, 1:] >= c.codebook_size, -100)
        _, *found = linear_cross_entropy(x.flatten(0, 1), model.heads.weight, targets.flatten(0, 1))
        errors = seconds.new_zeros(1) if log_seconds is None else (log_seconds - seconds.log()).square().sum()[None]
    return torch.cat((*found, errors)).to(widest(device))


@torch.no_grad()
def score_sentences(model, data, clips, voices, device, dtype, batch_size=16):
    """What an LLM TTS knows of some clips of a SentenceDataset, as far as its context reaches.

    voices: embeddings (N, speaker_width) or None. Returns four sums, (4,) float64: the cross-entropies of characters
    (and of the two tokens after them) and of codes (and their end), and how many there are of either.
    """
    c, sums = model.c, torch.zeros(4, dtype=widest(device), device=device)
    model.eval()
    for at in range(0, len(clips), batch_size):
        some = [sentence(c, data.characters(i), data.codes(i)) for i in clips[at:at + batch_size]]
        steps = min(c.context, -(-(max(map(len, some)) - 1) // 16) * 16)
        tokens, targets, _ = packed_batch([[one] for one in some], steps)
        audio = (targets >= c.first_code) & (targets != c.audio_bos)
        batch = {"tokens": tokens, "targets": targets.flatten()}
        batch |= {k: chosen.flatten().nonzero()[:, 0] for k, chosen in enumerate(((targets >= 0) & ~audio, audio))}
        batch |= {} if voices is None else {"speaker": voices[at:at + batch_size]}
        batch = send(batch, device)
        with autocast(device, dtype):
            x = model(batch["tokens"], None, batch.get("speaker")).flatten(0, 1)
            for k in range(2):
                targets = batch["targets"][batch[k], None]
                sums[k] += linear_cross_entropy(x[batch[k]], model.embedding.weight, targets)[0]
                sums[2 + k] += len(targets)
    return np.array(sums.tolist())


# ------------------------------------------------------------------------------------------------------------
# Voices

def voice_features(wav, rate):
    """What tells voices apart: mean and deviation of 20 MFCCs (Davis & Mermelstein, 1980) over what is not silence."""
    import librosa

    wav = librosa.resample(np.asarray(wav, np.float32), orig_sr=rate, target_sr=16000)
    wav, _ = librosa.effects.trim(wav, top_db=30)
    mfcc = librosa.feature.mfcc(y=wav, sr=16000, n_mfcc=21, n_fft=512, hop_length=160)[1:]  # the first is loudness
    return np.concatenate((mfcc.mean(1), mfcc.std(1)))


def name_speakers(known, names, wavs, rate):
    """Whose voices `wavs` are, by a linear discriminant on MFCCs of recordings whose speakers are known: lists."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))
    classifier.fit([voice_features(wav, rate) for wav in known], names)
    return classifier.predict([voice_features(wav, rate) for wav in wavs]).tolist()
