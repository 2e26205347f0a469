"""metrics.py beside closed forms, scipy and what was counted by hand."""

import math

import numpy as np
import pytest
import scipy.linalg
from scipy.fft import dct
from scipy.spatial.distance import pdist
from sklearn.metrics.pairwise import rbf_kernel

import evaluate
from trivox.datasets import SentenceDataset
from trivox.metrics import (coherence, frechet_distance, kernel_distance, mel_distances, name_speakers,
                            perplexity, unigram_cross_entropy)
from trivox.recordings import read_wav


def test_perplexity_of_any_loss():
    assert perplexity(math.log(7)) == pytest.approx(7) and perplexity(np.float64(0)) == 1
    assert math.log(perplexity(1e6)) == math.log(perplexity(math.inf)) == pytest.approx(700)
    assert math.isnan(perplexity(math.nan))


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


def test_unigrams():
    """Four codes, of which training has 3, 1, 0, 0: with a half added (3.5, 1.5, 0.5, 0.5) / 6; the other book has one
    code alone."""
    train = [np.array([[0, 2], [0, 2]]), np.array([[0, 2], [1, 2]])]
    held_out = [np.array([[0, 2], [1, 2]]), np.array([[3, 0]])]
    wanted = [-np.log([3.5 / 6, 1.5 / 6, 0.5 / 6]).mean(), -np.log([4.5 / 6, 4.5 / 6, 0.5 / 6]).mean()]
    np.testing.assert_allclose(unigram_cross_entropy(train, held_out, 4), wanted)


def gaussian(rng, mean, covariance, n):
    """(n, D) vectors that have just this mean and covariance."""
    x = rng.standard_normal((n, len(mean)))
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x, rowvar=False)), (x - x.mean(0)).T).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance():
    """Of Gaussians: for commuting covariances in closed form, for others by scipy's root of their product; 0 for equal
    sets, also where there are fewer vectors than dimensions; symmetric."""
    rng = np.random.default_rng(0)
    a, b = np.array([1.0, 4, 9]), np.array([4.0, 4, 1])
    x, y = gaussian(rng, np.zeros(3), np.diag(a), 50), gaussian(rng, np.array([0, 3.0, 4]), np.diag(b), 70)
    assert frechet_distance(x, y) == pytest.approx(25 + ((a**0.5 - b**0.5) ** 2).sum())
    A, B = (m @ m.T + 0.1 * np.eye(5) for m in rng.standard_normal((2, 5, 5)))
    x, y = gaussian(rng, np.ones(5), A, 30), gaussian(rng, np.zeros(5), B, 40)
    wanted = 5 + np.trace(A + B - 2 * scipy.linalg.sqrtm(A @ B).real)
    assert frechet_distance(x, y) == pytest.approx(wanted) == frechet_distance(y, x)
    assert frechet_distance(x[:1], y) is None
    few = rng.standard_normal((4, 9))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_of_gaussians():
    """In closed form: of N(m, A) and N(n, B) the mean kernel is |I + (A + B) / σ²|^-½ exp(−½ d (σ² I + A + B)⁻¹ d), for
    d = m − n. Of the same vectors elsewhere nothing changes."""
    rng = np.random.default_rng(0)
    mean, other = np.zeros(3), np.array([1.0, 0, -0.5])
    A, B = (m @ m.T + 0.1 * np.eye(3) for m in rng.standard_normal((2, 3, 3)))
    x, y = rng.multivariate_normal(mean, A, 3000), rng.multivariate_normal(other, B, 2000)
    width = np.median(pdist(y)) ** 2

    def kernel(d, C):
        C = np.eye(3) + C / width
        return np.exp(-d @ np.linalg.solve(C, d) / width / 2) / np.linalg.det(C) ** 0.5

    wanted = 100 * (kernel(mean, 2 * A) + kernel(mean, 2 * B) - 2 * kernel(mean - other, A + B))
    assert wanted > 5 and kernel_distance(x, y) == pytest.approx(wanted, rel=0.05)
    assert kernel_distance(x + 1e4, y + 1e4) == pytest.approx(kernel_distance(x, y), rel=1e-6)


def test_kernel_distance_of_clips():
    """Beside scikit-learn's kernel, pair of clips by pair of clips. A clip of one vector is that vector."""
    rng = np.random.default_rng(0)
    x, y = ([9 + rng.standard_normal((n, 4)).astype(np.float32) for n in lengths]
            for lengths in ((3, 1, 5, 2), (2, 4, 4)))
    gamma = 0.5 / np.median(pdist(np.float64(np.concatenate(y)))) ** 2

    def mean(a, b, pairs):
        return np.mean([rbf_kernel(np.float64(a[i]), np.float64(b[j]), gamma).mean() for i, j in pairs])

    pairs = [[(i, j) for i in range(n) for j in range(m) if i != j or n != m] for n, m in ((4, 4), (3, 3), (4, 3))]
    wanted = 100 * (mean(x, x, pairs[0]) + mean(y, y, pairs[1]) - 2 * mean(x, y, pairs[2]))
    assert kernel_distance(x, y) == pytest.approx(wanted)
    x, y = rng.standard_normal((2, 300, 4))  # more than a block
    assert kernel_distance(x, y) == pytest.approx(kernel_distance(x[:, None], y[:, None]))
    assert kernel_distance(x[:1], y) is kernel_distance(x, y[:1]) is kernel_distance(x[:0], y) is None
    assert kernel_distance(x, 0.1 + 0 * y) is None  # σ is 0


def test_kernel_distance_is_unbiased():
    """Of sets of one law it is 0 in the mean, where Fréchet's is far above; so it is of clips whose windows are alike,
    which are above when pooled."""
    rng, found = np.random.default_rng(0), []
    for _ in range(150):
        x, y = rng.standard_normal((2, 20, 1, 4)) + 0.5 * rng.standard_normal((2, 20, 5, 4))
        flat = x.reshape(-1, 4), y.reshape(-1, 4)
        found.append((kernel_distance(x[:, 0], y[:, 0]), kernel_distance(x, y), kernel_distance(*flat),
                      frechet_distance(*flat)))
    independent, clips, pooled, frechet = np.mean(found, 0) / (np.std(found, 0) / 150**0.5)  # in standard errors
    assert abs(independent) < 2.5 and abs(clips) < 2.5 and pooled > 10 and frechet > 20


def test_coherence():
    """1 for what moves steadily, about 0 for noise; no different for another gain. Of pieces in three sections each is
    above its shuffles, of noise one in nine."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 5, 400)[:, None] * np.ones(24)
    assert coherence(ramp) == pytest.approx(1)
    noise = [rng.standard_normal((400, 24)) for _ in range(40)]
    assert abs(np.mean([coherence(x) for x in noise])) < 0.05
    pieces = [x + np.repeat(rng.standard_normal((3, 24)), [130, 140, 130], 0) for x in noise]
    assert coherence(3 * pieces[0] + 7) == pytest.approx(coherence(pieces[0]))
    assert evaluate.judge_form(noise, pieces)["coherence_ranked"] >= 0.95
    assert evaluate.judge_form(pieces, noise)["coherence_ranked"] < 0.35
    assert coherence(ramp[:100]) is None


def test_speakers_are_told_apart(llm_tokens):
    """Recordings of the three voices by others of them; and what is said does not matter."""
    data = SentenceDataset(llm_tokens)
    clips = data.clips("all").tolist()
    names = [data.speakers[s] for s in data.speaker(clips)]
    wavs = [read_wav(data.recording(i), 22050) for i in clips]
    known, asked = [i for i in range(len(clips)) if i % 4 < 2], [i for i in range(len(clips)) if i % 4 >= 2]
    found = name_speakers([wavs[i] for i in known], [names[i] for i in known], [wavs[i] for i in asked], 22050)
    assert np.mean([a == names[i] for a, i in zip(found, asked)]) >= 0.9
