"""codecs.py: neural codecs beside transformers' own classes, mel_rvq beside brute force; weights.py by their files."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import refusal
from helpers import narrow_codec

from trivox.audio import MelConfig, log_mel
from trivox.codecs import CODECS, MelRVQ, decode_stream, load_codec, neucodec_inputs
from trivox.synthesisers import speak_espeak as speak

MEL = MelConfig(hop_length=512)
GEOMETRY = {"encodec_24khz": (24000, 75, 8, 1024), "dac_44khz": (44100, 44100 / 512, 9, 1024),
            "neucodec": (24000, 50, 1, 65536)}


@pytest.fixture(scope="module", params=CODECS)
def neural(request, tmp_path_factory):
    """Each class of transformers, small and with random weights, in the hub's layout. Yields (ours, theirs)."""
    class_name, repo, _ = CODECS[request.param]
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    torch.manual_seed(0)
    theirs = getattr(transformers, class_name)(narrow_codec(request.param)).eval()
    if request.param == "encodec_24khz":  # its codebooks are zero until they are trained, what they hear hardly varies
        last = theirs.encoder.layers[-1].conv
        with torch.no_grad():
            last.parametrizations.weight.original0.mul_(1000)
            last.bias.sub_(theirs.encoder(torch.from_numpy(speak("One."))[None, None])[0].mean(1))
        for k, layer in enumerate(theirs.quantizer.layers):
            layer.codebook.embed.normal_().mul_(0.7 ** k)
    if request.param == "neucodec":  # and here all latents round to the same levels
        into, seen = theirs.quantizer.project_in, []
        hook = into.register_forward_hook(lambda module, args, latents: seen.append(latents[0]))
        with torch.no_grad():
            theirs.encode(**neucodec_inputs(speak("One.")[None, :19200]))
            into.weight.div_(seen[0].std(0)[:, None])
            into.bias.sub_(seen[0].mean(0)).div_(seen[0].std(0))
        hook.remove()
    weights = tmp_path_factory.mktemp("weights")
    theirs.save_pretrained(weights / repo.split("/")[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIVOX_WEIGHTS", str(weights))
        yield load_codec(request.param), theirs


@pytest.fixture(scope="module")
def speech():
    """Clips of 0.02, 1.3, 0.9 and 0.9 s at 22,050 Hz."""
    wav = speak("The captain painted seven wooden boxes yesterday.")
    return [wav[9000:9441], wav[4000:32665], wav[8000:27845], wav[20000:39845]]


@torch.inference_mode()
def direct(name, model, wav):
    """codes (frames, Q) straight from the class, for a wav of whole frames."""
    if name == "neucodec":
        return model.encode(**neucodec_inputs(wav[None])).audio_codes[0].T.numpy()
    values = torch.from_numpy(wav)[None, None]
    if name == "dac_44khz":
        return model.encode(values).audio_codes[0].T.numpy()
    return model.encode(values, bandwidth=6.0).audio_codes[0, 0].T.numpy()


# ------------------------------------------------------------------------------------------------------------
# The neural codecs

def assert_same(codes, others):
    """But for one code in twenty: sums in another order decide a tie in another way, here and in the books after it."""
    assert codes.shape == others.shape and (codes != others).mean() <= 0.05


def test_codes_are_the_classes_own(neural, speech):
    """Alone and among neighbours of other lengths; and 8 s have the published number of frames."""
    ours, theirs = neural
    assert (ours.sample_rate, ours.frame_rate, ours.codebooks, ours.codebook_size) == GEOMETRY[ours.name]
    whole = [wav[:len(wav) // ours.hop_length * ours.hop_length] for wav in speech[1:]]
    together = ours.encode(whole)
    for wav, codes in zip(whole, together):
        assert codes.shape == (len(wav) // ours.hop_length, ours.codebooks) and codes.dtype == np.int64
        assert_same(codes, direct(ours.name, theirs, wav))
    assert len(np.unique(together[0])) > 20
    alone = [ours.encode([wav])[0] for wav in speech]
    for a, b in zip(alone, ours.encode(speech, seconds=1.9)):
        assert_same(a, b)
    assert [len(codes) for codes in alone] == [-(-len(wav) // ours.hop_length) for wav in speech]


def test_decoding_is_the_classes_own(neural, speech):
    ours, theirs = neural
    codes = ours.encode(speech[1:2])[0]
    wav, ids = ours.decode(codes), torch.from_numpy(codes).T[None]
    assert wav.shape == (len(codes) * ours.hop_length,) and wav.dtype == np.float32
    with torch.inference_mode():
        decoded = theirs.decode(ids[None], [None]) if ours.name == "encodec_24khz" else theirs.decode(audio_codes=ids)
    np.testing.assert_allclose(wav, decoded.audio_values.flatten().numpy(), atol=1e-5)


@pytest.mark.parametrize("name", [name for name, (cls, *_) in CODECS.items() if hasattr(transformers, cls)])
def test_codecs_without_weights(name, tmp_path, monkeypatch):
    """Offline: which files, how large, from where, and where to put them. A damaged file counts as none."""
    monkeypatch.setenv("TRIVOX_WEIGHTS", str(tmp_path))
    _, repo, size = CODECS[name]
    for damaged in (False, True):
        if damaged:
            (tmp_path / repo.split("/")[-1]).mkdir()
            (tmp_path / repo.split("/")[-1] / "config.json").write_text("{")
        said = refusal(lambda argv: load_codec(name))
        for part in (size, f"https://huggingface.co/{repo}", "config.json", str(tmp_path / repo.split("/")[-1])):
            assert part in said
    assert "neither a codec" in refusal(lambda argv: load_codec("mimi"))


# ------------------------------------------------------------------------------------------------------------
# mel_rvq

@pytest.fixture(scope="module")
def rvq(speech):
    return MelRVQ.fit(torch.cat([log_mel(wav, MEL) for wav in speech[1:]]), MEL, [64, 16, 16, 16])


def test_mel_rvq_takes_the_nearest(rvq, speech):
    """By distances in 64 bits, one at a time, and each further book brings the log-mel nearer."""
    mels = log_mel(speech[1], MEL)
    codes = rvq.quantise(mels)
    left = (mels - rvq.mean).double().numpy()
    for k, book in enumerate(rvq.books):
        distances = np.square(left[:, None] - book.double().numpy()).sum(-1)
        taken = np.take_along_axis(distances, codes[:, k:k + 1].numpy(), 1)[:, 0]
        np.testing.assert_allclose(taken, distances.min(1), rtol=1e-3, atol=1e-3)
        left -= book.double().numpy()[codes[:, k]]
    errors = [(mels - MelRVQ(MEL, rvq.mean, rvq.books[:q]).mels(codes[:, :q])).square().mean() for q in range(5)
              if q] + [torch.tensor(0.0)]
    assert all(a > b for a, b in zip(errors, errors[1:])) and errors[0] < 0.2 * mels.var(0).mean()
    torch.testing.assert_close(rvq.mels(codes), mels - torch.from_numpy(left).float(), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:n_fft=1024 is too large")
def test_mel_rvq_clips_do_not_meet(rvq, speech):
    for wav, codes in zip(speech, rvq.encode(speech)):
        np.testing.assert_array_equal(codes, rvq.encode([wav])[0])
        assert len(codes) == -(-len(wav) // 512) and len(rvq.decode(codes)) == len(codes) * 512


def test_mel_rvq_of_too_little(speech):
    assert "64 codes" in refusal(lambda argv: MelRVQ.fit(log_mel(speech[0], MEL), MEL, [64]))


def test_seams_of_a_stream():
    """Where a codec finds other phases each time it is asked, its pieces keep their power as they meet, to 0.3 dB."""
    rng, hop, frames = np.random.default_rng(0), 441, 1000
    codec = SimpleNamespace(frame_rate=50.0, hop_length=hop, decode=lambda x: rng.standard_normal(len(x) * hop))
    power = np.square(np.concatenate([*decode_stream(codec, torch.zeros(frames, 1))])).reshape(-1, hop)
    assert len(power) == frames
    for seam in range(200, frames - 20, 200):
        assert abs(10 * np.log10(power[seam:seam + 12].mean())) < 0.3
