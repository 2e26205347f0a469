"""Codecs and token data sets: transformers' own classes, brute force, kills, two processes, damaged music."""

import json
import os
import signal
import time

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import OneProcess, finish, launch, refusal
from test_data import contents, make_corpus, tone

from data import main
from trivox import prepare
from trivox.audio import MelConfig, log_mel, read_wav
from trivox.codecs import CODECS, MelRVQ, load_codec, neucodec_inputs
from trivox.corpora import corpus_sources
from trivox.datasets import TokenDataset
from trivox.demo_music import compose
from trivox.demo_speech import speak
from trivox.prepare import tokenize

MEL = MelConfig(hop_length=512)
SMALL = {  # the true geometry in frames, books and codes, with narrow layers
    "encodec_24khz": lambda: transformers.EncodecConfig(num_filters=4, hidden_size=16, codebook_dim=16),
    "dac_44khz": lambda: transformers.DacConfig(encoder_hidden_size=4, decoder_hidden_size=32, sampling_rate=44100),
    "neucodec": lambda: transformers.NeuCodecConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, encoder_hidden_size=2, quantization_dim=64, semantic_model_config=transformers.Wav2Vec2BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, output_hidden_size=32)),
}
GEOMETRY = {"encodec_24khz": (24000, 75, 8, 1024), "dac_44khz": (44100, 44100 / 512, 9, 1024),
            "neucodec": (24000, 50, 1, 65536)}


@pytest.fixture(scope="module", params=CODECS)
def neural(request, tmp_path_factory):
    """Each class of transformers, small and with random weights, in the hub's layout. Yields (ours, theirs)."""
    class_name, repo, _ = CODECS[request.param]
    if not hasattr(transformers, class_name):
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    torch.manual_seed(0)
    theirs = getattr(transformers, class_name)(SMALL[request.param]()).eval()
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


# ------------------------------------------------------------------------------------------------------------
# Tokenizing

def tokens(root, out, **settings):
    tokenize(root, out, "mel_rvq", **dict(mel=MEL, sizes=[32, 8]) | settings)
    return TokenDataset(out)


def test_text_corpus(corpus, tmp_path, one_process, monkeypatch):
    """Whole sentences keep their texts and the corpus's held-out clips; the stored codes are the codec's."""
    monkeypatch.setattr(prepare, "SHARD_SOURCES", 16)
    dataset = tokens(corpus, tmp_path)
    rows = (corpus / "metadata.csv").read_text().splitlines()
    assert [f"{r['id']}|{r['text']}|{r['text']}|{r['speaker']}" for r in dataset.rows] == rows
    assert {dataset.rows[i]["id"] for i in dataset.clips("val")} == set((corpus / "heldout.txt").read_text().split())
    assert dataset.grammar and len(dataset.clips("train")) == 34
    codec = load_codec(tmp_path)
    for i in (0, 17, 39):
        wav = read_wav(corpus / dataset.rows[i]["source"], 22050)
        np.testing.assert_array_equal(dataset.codes(i).numpy(), codec.encode([wav])[0])


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Nested folders of recordings of many kinds, two of them broken. Returns (folder, {file: seconds})."""
    root, rng, seconds = tmp_path_factory.mktemp("music"), np.random.default_rng(0), {}
    for n in range(24):
        name = f"{n % 3:03d}/{n:06d}.{('mp3', 'wav', 'flac', 'ogg')[n % 4]}"
        seconds[name] = rng.uniform(0.5, 5)
        (root / name).parent.mkdir(exist_ok=True)
        wav = tone(seconds[name], 200 + 50 * n) + 0.1 * rng.standard_normal(int(seconds[name] * 22050))
        soundfile.write(root / name, wav, 22050)
    (root / "000" / "broken.mp3").write_bytes(rng.bytes(5000))
    (root / "001" / "cut.wav").write_bytes((root / "001" / "000001.wav").read_bytes()[:30])
    (root / "cover.jpg").write_bytes(b"no sound")
    return root, seconds


def test_music(music, tmp_path, one_process, capsys):
    """Cut into chunks that tile each file but for a short rest; no file on both sides; the broken ones listed."""
    root, seconds = music
    dataset = tokens(root, tmp_path, chunk=(1.0, "seconds"))
    said = capsys.readouterr().out
    assert "skipped 000/broken: cannot read" in said and "skipped 001/cut: cannot read" in said and "2 skipped" in said
    size = round(22050 / 512) * 512
    for source in seconds:
        rows = [row for row in dataset.rows if row["source"] == source]
        samples = len(read_wav(root / source, 22050))
        assert [row["start"] for row in rows] == [n * size / 22050 for n in range(len(rows))]
        assert [row["frames"] for row in rows[:-1]] == [size // 512] * (len(rows) - 1)
        rest = samples - sum(row["frames"] for row in rows) * 512
        assert -512 < rest < size / 4 and len({row["split"] for row in rows}) == 1
    assert {row["source"] for row in dataset.rows} == set(seconds)
    sides = [{dataset.rows[i]["source"] for i in dataset.clips(split)} for split in ("train", "val")]
    assert len(sides[1]) == 1 and not sides[0] & sides[1] and not any(row["text"] for row in dataset.rows)


def _small_shards(root, out, rank=0, world=1):
    prepare.parallel, prepare.SHARD_SOURCES = OneProcess, 2
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    tokenize(root, out, "mel_rvq", (20, "frames"), mel=MEL, sizes=[32, 8])


def _slow_small_shards(root, out):
    cut_source = prepare.cut_source
    prepare.cut_source = lambda *args: time.sleep(0.1) or cut_source(*args)
    _small_shards(root, out)


def test_killed_and_shared(music, tmp_path, one_process, monkeypatch):
    """SIGKILL half-way and again, or two processes at once: byte for byte what one uninterrupted process makes."""
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))
    second, process = launch(_small_shards, music[0], shared, 1, 2), launch(_slow_small_shards, music[0], killed)
    while len(list(killed.glob("*.jsonl"))) < 3 and process.is_alive():
        process.join(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL and not (killed / "codec.json").exists()
    assert "no token data set" in refusal(lambda argv: TokenDataset(killed))
    for part in killed.glob("*.part"):  # named after the process that was killed
        part.unlink()
    monkeypatch.setattr(prepare, "SHARD_SOURCES", 2)
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(key, "")  # so that they are put back
    for out, world in ((whole, 1), (killed, 1), (shared, 2)):
        _small_shards(music[0], out, 0, world)
    assert finish(second)[0] == 0
    assert contents(killed) == contents(whole) == contents(shared)


def test_a_folder_holds_one_set_of_tokens(music, tmp_path, one_process):
    tokens(music[0], tmp_path)
    before = contents(tmp_path)
    assert str(tmp_path) in refusal(lambda argv: tokens(music[0], tmp_path, sizes=[16, 8]))
    tokens(music[0], tmp_path)
    assert contents(tmp_path) == before


def test_validation_is_drawn_by_file(tmp_path):
    """5 % of the files, whatever their order; ids that lead out of the corpus are for the shard to refuse."""
    root = make_corpus(tmp_path / "corpus", {}, [f"{n:03d}|text {n}" for n in range(200)] + ["../../x|out"])
    sources = corpus_sources(root)
    val = {s["source"] for s in sources if s["split"] == "val"}
    assert len(val) == 10 and "leads out" in sources[-1]["skipped"]
    lines = (root / "metadata.csv").read_text().splitlines()
    (root / "metadata.csv").write_text("\n".join(lines[::-1]))
    assert {s["source"] for s in corpus_sources(root) if s["split"] == "val"} == val


# ------------------------------------------------------------------------------------------------------------
# TokenDataset

def token_folder(folder, codes, **changes):
    """A token data set by hand: one clip of these codes (frames, Q)."""
    info = {"codec": "neucodec", "sample_rate": 24000, "frame_rate": 50.0, "codebooks": 1, "codebook_size": 65536}
    (folder / "codec.json").write_text(json.dumps(info | changes))
    row = {"id": "a", "text": "", "speaker": "", "split": "train", "source": "a.wav", "start": 0, "offset": 0,
           "frames": len(codes)}
    (folder / "tokens_00000.jsonl").write_text(json.dumps(row) + "\n")
    np.asarray(codes, np.uint16).tofile(folder / "tokens_00000.u16")
    return folder


def test_the_last_code_survives(tmp_path):
    dataset = TokenDataset(token_folder(tmp_path, [[0], [65535], [40000]]), codec="neucodec", frame_rate=50)
    assert dataset.codes(0).tolist() == [[0], [65535], [40000]] and dataset.codes(0).dtype == torch.int64
    assert "no val clips" in refusal(lambda argv: dataset.clips("val"))


@pytest.mark.parametrize("wanted, reasons", [
    ({"codec": "dac_44khz"}, ("codec neucodec", "dac_44khz")), ({"codebooks": 8}, ("codebooks 1", "8")),
    ({"frame_rate": 75.0}, ("frame_rate 50.0", "75.0")), ({"codebook_size": 1024}, ("codebook_size 65536", "1024")),
])
def test_tokens_of_another_kind(tmp_path, wanted, reasons):
    said = refusal(lambda argv: TokenDataset(token_folder(tmp_path, [[1]]), **wanted))
    assert str(tmp_path) in said and all(reason in said for reason in reasons)


def test_damaged_tokens(tmp_path):
    said = refusal(lambda argv: TokenDataset(token_folder(tmp_path, [[5], [1024]], codebook_size=1024)).codes(0))
    assert "a code 1024" in said and "clip a" in said
    assert "1 x 2 codes" in refusal(lambda argv: TokenDataset(token_folder(tmp_path, [[5]], codebooks=2)))
    (tmp_path / "tokens_00000.u16").unlink()
    assert "tokens_00000.u16" in refusal(lambda argv: TokenDataset(tmp_path))


# ------------------------------------------------------------------------------------------------------------
# The music of the demo

def test_demo_music(tmp_path, one_process):
    """Deterministic pieces of 6 to 11 s at full scale; those held out are the ones named."""
    main(["demo_music", "--out", str(tmp_path), "--pieces", "5", "--heldout", "2", "--codebooks", "1",
          "--codebook_size", "32"])
    dataset = TokenDataset(tmp_path, codec="mel_rvq", codebooks=1)
    assert [dataset.rows[i]["id"] for i in dataset.clips("val")] == ["wavs/piece-00003", "wavs/piece-00004"]
    for seed in range(5):
        wav, stored = compose(seed), read_wav(tmp_path / "corpus" / "wavs" / f"piece-{seed:05d}.wav", 22050)
        np.testing.assert_allclose(wav, stored, atol=1e-4)
        assert 6 < len(wav) / 22050 < 11.5 and np.abs(wav).max() == pytest.approx(0.9)
    assert "none to train on" in refusal(main, "demo_music", "--out", tmp_path, "--pieces", 2, "--heldout", 2)


@pytest.mark.parametrize("sizes", ["12,x", "8,8,8", "0", "65537"])
def test_book_sizes(corpus, tmp_path, sizes):
    assert sizes in refusal(main, "tokenize", "--codec", "mel_rvq", "--root", corpus, "--out", tmp_path / "out",
                            "--codebook_size", sizes)
