"""train_codec_lm.py, and what sample.py and evaluate.py do for its checkpoints."""

import json
import shutil
import subprocess
import sys
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_CODEC as TINY, finish, launch, refusal

import evaluate
import sample
import train_codec_lm as trainer
from model import CodecLM
from train_codec_lm import Config, codec_loss, make_batch
from trivox import speak
from trivox import metrics as figures
from trivox import common
from trivox.audio import MelConfig
from trivox.checkpoints import codec_of, read_config
from trivox.codecs import MelRVQ, decode_stream
from trivox.datasets import TokenDataset
from trivox.recordings import read_wav, write_wav
from trivox.text import TextFeatures

CPU = torch.device("cpu")

@pytest.fixture
def flags(codec_tokens, tmp_path):
    """flags(steps=3, …) is the command line of a tiny training run into tmp_path/run."""
    def make(*bare, **changes):
        settings = TINY | dict(
            data_dir=codec_tokens, out_dir=tmp_path / "run", batch_size=4, steps=6, warmup_steps=2, eval_every=100,
            sample_every=0, save_every=100, log_every=1, device="cpu", dtype="float32", wandb_mode="disabled")
        settings |= changes
        return [f"--{key}={value}" for key, value in settings.items()] + list(bare)

    return make


@pytest.fixture
def in_process(monkeypatch):
    """The trainer in this process, whose signal handlers are pytest's; it leaves the run's page out, to save time."""
    monkeypatch.setattr(common, "catch_signals", Event)
    monkeypatch.setattr(trainer, "write_page", lambda *args, **facts: None)
    return trainer.main


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def tiny_lm(**changes):
    """A tiny model in which no weight is zero, and its config."""
    torch.manual_seed(0)
    c = Config(**TINY | changes)
    model = CodecLM(c).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return c, model


# ------------------------------------------------------------------------------------------------------------
# The loss

@pytest.mark.parametrize("cross_every", [0, 1])
def test_loss_against_brute_force(codec_tokens, cross_every):
    """Code by code: the book k of frame t is predicted from the delayed steps up to t + k, of one clip alone, without
    padding, in float64. `score_clips` sums the same, without the text's EOS."""
    c, model = tiny_lm(cross_every=cross_every, context=256)
    data, features = TokenDataset(codec_tokens), TextFeatures("bytes")
    clips = [0, 3, 5]
    with torch.no_grad():
        entropy, entropies, hits, duration = codec_loss(c, model, make_batch(
            c, data, features, [dict(clip=i, cut=0.5, drop=False) for i in clips], CPU))
    scores = figures.score_clips(model, data, features, clips, CPU, torch.float32)

    model.double()
    wanted, right, eos, errors = np.zeros(2), np.zeros(2), 0, 0
    for i in clips:
        codes = data.codes(i).tolist()
        T, PAD, BOS, EOS = len(codes), 16, 17, 18
        rows = [[BOS, BOS]] + [[codes[t][0] if t < T else PAD, codes[t - 1][1] if t else BOS] for t in range(T + 1)]
        text = features([data.rows[i]["text"]]) if cross_every else ()
        with torch.no_grad():
            x, log_seconds = model(torch.tensor([rows]), *text, seconds=torch.tensor([T / 50]))
            logits = model.logits(x)
        p = logits[0].softmax(-1).numpy()
        for t in range(T):
            for k in range(2):
                wanted[k] -= np.log(p[t + k, k, codes[t][k]])
                right[k] += p[t + k, k].argmax() == codes[t][k]
        if cross_every:
            eos -= np.log(p[T, 0, EOS])
            errors += (log_seconds.item() - np.log(T / 50)) ** 2
    np.testing.assert_allclose(scores[:2], wanted, rtol=1e-5)
    np.testing.assert_array_equal(scores[2:4], right)
    np.testing.assert_allclose(entropies, wanted + [eos, 0], rtol=1e-5)
    assert entropy.item() == pytest.approx(sum(wanted) + eos, rel=1e-5)
    assert abs(hits.numpy() - right).max() <= (3 if cross_every else 0)  # EOS may have been foreseen
    np.testing.assert_allclose([duration, scores[-1]], [errors, errors], rtol=1e-4, atol=1e-6)


def test_long_clips_are_cut_anywhere(codec_tokens):
    """To 62 frames that stand together, the first and the last places included; another place in each epoch."""
    c, data = Config(**TINY), TokenDataset(codec_tokens)
    clip = max(range(40), key=lambda i: data.rows[i]["frames"])
    whole, starts = data.codes(clip), set()
    for cut in np.append(np.arange(0, 1, 0.004), np.nextafter(1, 0)):
        rows = make_batch(c, data, None, [dict(clip=clip, cut=cut, drop=False)], CPU)["tokens"][0]
        codes = torch.stack([rows[1:63, 0], rows[2:64, 1]], 1)
        starts |= {i for i in range(len(whole) - 61) if torch.equal(whole[i:i + 62], codes)}
    assert {0, len(whole) - 62} <= starts and len(starts) > 20
    cuts = {trainer.draw(c, epoch, i)["cut"] for epoch in range(8) for i in range(8)}
    assert len(cuts) == 64 and 0 <= min(cuts) and max(cuts) < 1


# ------------------------------------------------------------------------------------------------------------
# The same result

def test_sigkills(flags, sigkills):
    """Killed at random moments and resumed, a run with dropout ends with the bits of the one that nobody disturbed."""
    def start(out, *bare, **settings):
        settings |= dict(out_dir=out, dtype="auto", dropout=0.2, optimizer="muon")
        return launch(common.run, trainer.main, flags(*bare, **settings))

    sigkills(start, "codec", 3)


def test_two_processes_are_one(flags, tmp_path):
    """Over gloo, with text and the same clips a step: the same curve, the same validation, of each book."""
    settings = dict(steps=12, eval_every=6, cross_every=1, context=256, text_condition_dropout=0.3)
    single = launch(common.run, trainer.main, flags(out_dir=tmp_path / "one", **settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               ROOT / "train_codec_lm.py", *flags(out_dir=tmp_path / "two", **settings | dict(batch_size=2))]
    pair = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert pair.returncode == 0, pair.stderr
    code, said = finish(single)
    assert code == 0, said
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"steps_per_second", "clips_per_second"}:
            tolerance = 0.02 if "accuracy" in key else 1e-4 * max(1, one[key])
            assert two[key] == pytest.approx(one[key], abs=tolerance), key


# ------------------------------------------------------------------------------------------------------------
# From data to sound

def test_clips_learnt_by_heart(flags, codec_tokens, tmp_path, in_process):
    """Two sentences learnt, by their phonemes, half of the time without text. Given it, code for code comes back, and
    then EOS; given the first half second alone, the rest. sample.py writes just that; of a recording, whose codes are
    not quite those that were learnt, what goes on from them."""
    in_process(flags(steps=150, overfit=2, context=256, batch_size=2, lr=2e-2, min_lr=1e-3, optimizer="muon", width=64,
                     cross_every=1, phonemes="en-us", text_condition_dropout=0.5, ema_decay=0.9, log_every=50,
                     eval_seconds=4, eval_prompt_seconds=0.5, eval_temperature=0))
    right = [row["accuracy_book0"] for row in metrics(tmp_path / "run") if "accuracy_book0" in row]
    assert 0.95 < right[-1] <= 1 + 1e-6  # of codes and EOS
    data, speaker = TokenDataset(codec_tokens), speak.load(tmp_path / "run")
    texts, codes = [data.rows[i]["text"] for i in (0, 1)], [data.codes(i) for i in (0, 1)]
    spoken = [{"text": texts[i]} for i in (0, 1)]
    begun = [{"prompt": codes[i][:25], "seconds": 1.0} for i in (0, 1)]
    for requests, length in ((spoken, 200), (begun, 75)):
        for clip, wanted in zip(speaker.speak(requests), codes):
            wanted = wanted[:length]
            assert len(clip.codes) == len(wanted) and (clip.codes == wanted).float().mean() > 0.95

    codec = MelRVQ.load(codec_tokens, MelConfig(hop_length=441))
    write_wav(tmp_path / "prompt.wav", codec.decode(codes[0]), 22050)
    heard = torch.from_numpy(codec.encode([read_wav(tmp_path / "prompt.wav", 22050)[:11025]])[0])
    [onward] = speaker.speak([{"prompt": heard, "seconds": 1.0}])
    for argv, frames in ((["--text", texts[0]], len(codes[0])),
                         (["--prompt_wav", tmp_path / "prompt.wav", "--seconds", 1], len(onward.codes))):
        sample.main([str(x) for x in ["--ckpt", tmp_path / "run", "--out", tmp_path / "out.wav", *argv]])
        assert len(read_wav(tmp_path / "out.wav", 22050)) == frames * 441


@pytest.mark.parametrize("frames", [1, 79, 80, 86, 87, 88, 500])
def test_playing_as_it_comes(frames):
    """With a codec whose frames do not look at each other, the pieces are the whole; the first is there before the last
    code has been asked for."""
    codec = SimpleNamespace(frame_rate=20, hop_length=7, decode=lambda x: np.repeat(x[:, 0].numpy() / 1e3, 7))
    codes, asked = torch.arange(frames)[:, None], []
    pieces = decode_stream(codec, (asked.append(1) or step for step in codes))
    first = next(pieces)
    assert len(asked) == min(frames, 87)
    np.testing.assert_allclose(np.concatenate([first, *pieces]), codec.decode(codes))


# ------------------------------------------------------------------------------------------------------------
# Refusals

@pytest.mark.parametrize("settings, words", [
    (dict(codec="dac_44khz"), ["mel_rvq", "dac_44khz"]),
    (dict(codebooks=3), ["codebooks 2", "3"]),
    (dict(codebook_size=32), ["codebook_size 16", "32"]),
    (dict(frame_rate=75), ["frame_rate 50", "75"]),
    (dict(pattern="GX"), ["'X'", "A for attention"]),
    (dict(heads=3), ["3 heads", "width 32"]),
    (dict(cross_every=1), ["context of 64", "raise --context"]),
    (dict(phonemes="en-us"), ["--phonemes en-us", "--cross_every"]),
    (dict(phonemes="nowhere", cross_every=1, context=256), ["no voice 'nowhere'"]),
    (dict(context=2), ["context of 2", "2 delayed codebooks", "raise --context"]),
    (dict(data_dir="nowhere"), ["no token data set at nowhere"]),
    (dict(eval_top_k=[1, 2, 3]), ["--eval_top_k", "3 numbers for 2"]),
    (dict(eval_top_p=1.5), ["--eval_top_p", "1.5"]),
], ids=str)
def test_refused_settings(flags, in_process, tmp_path, settings, words):
    """In one sentence that names both what was found and what was expected, before anything is trained."""
    said = refusal(in_process, *flags(**settings))
    assert all(word in said for word in words), said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_refused_codec(flags, in_process, codec_tokens, tmp_path):
    """Of the same name and geometry, but fitted to something else: neither resumed nor evaluated. RUN/codec is what the
    run began with, so that it can be sampled without the data set."""
    in_process(flags(steps=1))
    other = shutil.copytree(codec_tokens, tmp_path / "other")
    MelRVQ(MelConfig(hop_length=441), torch.zeros(80), [torch.zeros(16, 80) for _ in range(2)]).save(other)
    assert "fitted anew" in refusal(in_process, *flags("--resume", steps=2, data_dir=other))
    assert "fitted anew" in refusal(evaluate.main, "--ckpt", tmp_path / "run", "--data_dir", other)
    run = tmp_path / "run"
    assert codec_of(run, read_config(run)) == run / "codec"
    said = refusal(lambda argv: codec_of(run, read_config(run) | {"frame_rate": 1e30}))
    assert "frame_rate 1e+30" in said and f"the codec at {run / 'codec'} has 50.0" in said


def test_refused_model_of_the_same_shapes(flags, in_process, tmp_path):
    """Settings that no shape tells: neither resumed nor begun from."""
    in_process(flags(steps=1))
    there = Config().negative_eigenvalues
    said = refusal(in_process, *flags("--resume", steps=2, negative_eigenvalues=not there))
    assert f"negative_eigenvalues is {there}" in said and "another --out_dir" in said
    other = flags(init_from=tmp_path / "run", out_dir=tmp_path / "other", steps=1, negative_eigenvalues=not there)
    assert f"negative_eigenvalues is {there}" in refusal(in_process, *other)


def test_refused_codec_of_another_name(flags, in_process, codec_tokens, tmp_path):
    """Or one that nothing tells of: neither resumed nor begun from, with whatever flags, nor evaluated."""
    in_process(flags(steps=1))
    run, new = tmp_path / "run", shutil.copytree(codec_tokens, tmp_path / "new")
    (new / "codec.safetensors").unlink()
    begun = flags(steps=2, init_from=run, out_dir=tmp_path / "other"), flags("--resume", steps=2)
    for changes, words in ((dict(codec="encodec_24khz"), ["codec mel_rvq", "encodec_24khz"]),
                           (dict(sample_rate=24000), ["sample_rate 22050", "24000"]),
                           (dict(frame_rate=75.0), ["frame_rate 50", "75"]), ({}, ["codec.safetensors", "again"])):
        codec = json.loads((codec_tokens / "codec.json").read_text()) | changes
        (new / "codec.json").write_text(json.dumps(codec))
        told = [f"--{key}={value}" for key, value in (changes | dict(data_dir=new)).items()]
        for argv in begun:
            said = refusal(in_process, *argv, *told)
            assert all(word in said for word in words), said
    shutil.rmtree(run / "codec")
    for argv in begun:
        assert f"{run / 'codec' / 'codec.safetensors'} is gone" in refusal(in_process, *argv)
    assert not (tmp_path / "other" / "checkpoints").exists() and len(metrics(run)) == 2


def test_a_published_codec_keeps_nothing(flags, in_process, codec_tokens, tmp_path):
    """Of an older run, that is: it goes on and can be begun from by the name of its codec."""
    data = shutil.copytree(codec_tokens, tmp_path / "data")
    (data / "codec.safetensors").unlink()
    (data / "codec.json").write_text((data / "codec.json").read_text().replace("mel_rvq", "neucodec"))
    settings = dict(codec="neucodec", data_dir=data)
    in_process(flags(steps=1, **settings))
    shutil.rmtree(tmp_path / "run" / "codec")
    in_process(flags("--resume", steps=2, **settings))
    shutil.rmtree(tmp_path / "run" / "codec")
    in_process(flags(steps=1, init_from=tmp_path / "run", out_dir=tmp_path / "other", **settings))


def test_a_loss_beyond_what_exp_can_tell(flags, in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "score_clips", lambda *args: figures.score_clips(*args) * 1e4)
    in_process(flags(steps=2, eval_every=1))
    rows = [row for row in metrics(tmp_path / "run") if "val_loss" in row]
    assert [row["val_loss"] > 709 and np.log(row["val_perplexity"]) for row in rows] == pytest.approx([700, 700])


def test_refused_samples(flags, in_process, run, tmp_path, corpus):
    """A prompt that the context cannot hold, options of another system, runs of two systems in one table."""
    in_process(flags(steps=1))
    prompt = next((corpus / "wavs").glob("*.wav"))
    ckpt = ["--ckpt", tmp_path / "run", "--out", tmp_path / "out.wav"]
    for argv, words in (
        (["--prompt_wav", prompt, "--prompt_seconds", 9], ["prompt", "context"]),
        (["--prompt_wav", prompt, "--prompt_seconds", 1e-6], ["--prompt_seconds 1e-06", "0 for"]),
        (["--solver", "heun"], ["--solver", "'codec'"]),
        (["--text", "hello"], ["without text"]),
        (["--top_k", 1, 2, 3], ["--top_k", "3 numbers for 2"]),
    ):
        said = refusal(sample.main, *ckpt, *argv)
        assert all(word in said for word in words), said
    for argv, words in ((["--top_k", 1], ["--top_k", "'flow'"]),
                        (["--prompt_wav", prompt], ["--prompt_wav", "'flow'"])):
        said = refusal(sample.main, "--ckpt", run, "--text", "hello", *argv)
        assert all(word in said for word in words), said
    assert "different systems" in refusal(evaluate.main, "--ckpt", run, tmp_path / "run")
    said = refusal(evaluate.main, "--ckpt", tmp_path / "run", "--prompt_seconds", 1e-6)
    assert "not half a frame" in said and not (tmp_path / "run" / "evaluation").exists()
    assert not (tmp_path / "out.wav").exists()
