"""train_llm_tts.py, and what sample.py, evaluate.py and export.py do for its checkpoints."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, TINY_LLM as TINY, finish, launch, refusal, same

import evaluate
import export
import sample
import train_llm_tts as trainer
from model import LLM
from train_llm_tts import Config, counts, llm_loss, make_batch, rows_from
from trivox import codecs, common, echolancer, generate, run_folder, speak
from trivox import metrics as figures
from trivox.alphabet import SYMBOLS, Alphabet, of_texts
from trivox.checkpoints import embedding_for, load_model
from trivox.datasets import SentenceDataset
from trivox.prepare import write_sentences
from trivox.voices import read_voice

CPU = torch.device("cpu")

@pytest.fixture
def flags(llm_tokens, tmp_path):
    """flags(steps=3, …) is the command line of a tiny training run into tmp_path/run."""
    def make(*bare, **changes):
        settings = TINY | dict(
            data_dir=llm_tokens, out_dir=tmp_path / "run", batch_size=4, steps=6, warmup_steps=2, lr=1e-3,
            eval_every=100, sample_every=0, save_every=100, log_every=1, device="cpu", dtype="float32",
            wandb_mode="disabled")
        settings |= changes
        return [f"--{key}={value}" for key, value in settings.items()] + list(bare)

    return make


@pytest.fixture
def in_process(monkeypatch):
    """The trainer in this process, whose signal handlers are pytest's; it leaves the run's page out, to save time."""
    monkeypatch.setattr(common, "catch_signals", Event)
    monkeypatch.setattr(trainer, "write_page", lambda *args, **facts: None)
    return trainer.main


@pytest.fixture(scope="session")
def base(llm_tokens, tmp_path_factory):
    """The folder of a run that has learnt four sentences by heart. Tests only read it."""
    out = tmp_path_factory.mktemp("llm") / "base"
    settings = TINY | dict(
        data_dir=llm_tokens, out_dir=out, packed=False, batch_size=4, steps=150, warmup_steps=5, lr=2e-2, min_lr=1e-3,
        optimizer="muon", ema_decay=0.9, overfit=4, eval_every=75, sample_every=0, eval_temperature=0, device="cpu",
        dtype="float32", wandb_mode="disabled")
    code, said = finish(launch(common.run, trainer.main, [f"--{key}={value}" for key, value in settings.items()]))
    assert code == 0, said
    return out


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def parts(run, name="latest"):
    """Everything in a checkpoint."""
    folder = run_folder.find_checkpoint(run / "checkpoints" / name)
    return folder.name, run_folder.load_checkpoint(folder, "llm", "model", "ema", "state")[1:]


def voices_of(llm_tokens):
    data = SentenceDataset(llm_tokens)
    width = json.loads((llm_tokens / "speaker_stats.json").read_text())["width"]
    data.load_embeddings("stats", width)
    return data, width


# ------------------------------------------------------------------------------------------------------------
# Batches and the loss

@pytest.mark.parametrize("packed", [True, False])
def test_the_walk(llm_tokens, packed):
    """Each epoch takes each sentence once, in another order, and the walk can be taken up anywhere, with another number
    of rows a step too."""
    c, data = Config(**TINY | dict(packed=packed, context=700)), SentenceDataset(llm_tokens)
    clips = data.clips("train")
    walk = rows_from(c, data, clips, 4, None)
    steps = [next(walk) for _ in range(60)]
    for many in ([4] * 60, [4] * 7 + [2] * 60, [4] * 5 + [7] * 30, [4] * 3 + [1] * 9 + [5] * 40):
        place, taken = None, []
        for n, count in enumerate(many):
            rows, place = next(rows_from(c, data, clips, count, place))
            assert len(rows) == count and (many[:n + 1] != [4] * (n + 1) or (rows, place) == steps[n])
            taken += [clip for row in rows for clip in row]
        epochs = [taken[i:i + len(clips)] for i in range(0, len(taken), len(clips))]
        assert all(sorted(epoch) == clips.tolist() for epoch in epochs[:-1]) and epochs[0] != epochs[1]
        assert {len(row) > 1 for row, *_ in [steps[0]] for row in row} <= {packed, False}


@pytest.mark.parametrize("packed", [True, False])
def test_loss_against_brute_force(llm_tokens, packed):
    """Sentence by sentence, alone, without padding, in float64, from the published sequence. `score_sentences` sums
    the same."""
    torch.manual_seed(0)
    c, data = Config(**TINY | dict(packed=packed, context=700)), SentenceDataset(llm_tokens)
    model = LLM(c).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    longest = max(data.clips("train"), key=lambda i: sum(data.lengths([i])))
    rows = [[int(longest)], [1], [2, 3] if packed else [2]]
    rows = [row for row in rows if sum(map(len, data.lengths(row)))]
    with torch.no_grad():
        found = llm_loss(model, make_batch(c, data, {}, rows, 0, CPU))
    model.double()
    wanted, number = np.zeros(2), np.zeros(2)
    for row in rows:
        for i in row:
            codes, characters = data.codes(i).tolist(), data.characters(i).tolist()
            whole = [2, *characters, 3, 43 + 32 + 1, *(43 + x for x in codes), 43 + 32 + 2]
            n = len(whole) - 1
            with torch.no_grad():
                p = (model(torch.tensor([whole[:n]])) @ model.embedding.weight.T)[0].log_softmax(-1)
            for t, target in enumerate(whole[1:n + 1]):
                kind = int(t >= len(characters) + 2)
                wanted[kind] -= p[t, target].item()
                number[kind] += 1
    np.testing.assert_allclose([x.item() for x in found], wanted, rtol=1e-5)
    if not packed:
        assert counts(data, rows) == tuple(number)
        sums = figures.score_sentences(model.float(), data, [i for i, in rows], None, CPU, torch.float32)
        np.testing.assert_allclose(sums, [*wanted, *number], rtol=1e-5)


def test_a_voice_is_another_sentence_of_the_speakers(llm_tokens):
    data, width = voices_of(llm_tokens)
    c = Config(**TINY, packed=False, speaker_width=width, speaker_embedder="stats")
    clips = data.clips("train")[:8].tolist()
    shown = trainer.speakers_clips(data, data.clips("train"), data.clips("val"))
    drawn = [make_batch(c, data, shown, [[i] for i in clips], step, CPU)["speaker"] for step in range(6)]
    everyone = {speaker: {data.embedding(i).tobytes() for i in data.clips("all") if data.speaker([i])[0] == speaker}
                for speaker in range(3)}
    for batch in drawn:
        for i, voice in zip(clips, batch.numpy()):
            assert voice.tobytes() in everyone[int(data.speaker([i])[0])]
    assert not torch.equal(drawn[0], drawn[1])
    assert sorted(shown) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------
# The same result

def test_sigkills(flags, sigkills):
    """Killed at random moments and resumed, a packed run with dropout ends with the bits of the one that nobody
    disturbed."""
    def start(out, *bare, **settings):
        settings |= dict(out_dir=out, dropout=0.2, optimizer="muon", context=512, batch_size=3)
        return launch(common.run, trainer.main, flags(*bare, **settings))

    sigkills(start, "llm", 3)


def test_two_processes_are_one(flags, tmp_path):
    """Over gloo, packed, with voices left out: the same curve and the same validation."""
    settings = dict(steps=10, eval_every=5, context=512)
    single = launch(common.run, trainer.main, flags(out_dir=tmp_path / "one", **settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               ROOT / "train_llm_tts.py", *flags(out_dir=tmp_path / "two", **settings | dict(batch_size=2))]
    pair = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert pair.returncode == 0, pair.stderr
    code, said = finish(single)
    assert code == 0, said
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"steps_per_second", "tokens_per_second"}:
            assert two[key] == pytest.approx(one[key], abs=1e-4 * max(1, one[key])), key


# ------------------------------------------------------------------------------------------------------------
# From data to sound

def test_sentences_learnt_by_heart(base, llm_tokens, tmp_path, capsys):
    """Spoken greedily, they are the codes that were trained on; sample.py writes the codec's sound of them, and
    evaluate.py finds them all, also where the model has become ONNX."""
    data = SentenceDataset(llm_tokens)
    clips = data.clips("all")[:4]
    texts = [data.text(i) for i in clips]
    for i, clip in zip(clips, speak.load(base).speak([{"text": text} for text in texts], seconds=15.0)):
        assert np.array_equal(clip.codes[:, 0], data.codes(i))
    argv = ["--ckpt", str(base), "--device", "cpu", "--out"]
    sample.main([*argv, str(tmp_path / "a.wav"), "--text", texts[0].capitalize()])
    wav, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 22050 and len(wav) == 441 * len(data.codes(clips[0]))
    assert "the first of it after" in capsys.readouterr().out
    codec = codecs.load_codec(llm_tokens)
    np.testing.assert_allclose(wav, codec.decode(data.codes(clips[0])[:, None].astype(int)).clip(-1, 1), atol=1e-4)

    sample.main([*argv, str(tmp_path / "b.wav"), "--text", " ".join(texts[:2])])
    both = soundfile.info(tmp_path / "b.wav").frames
    assert both == 441 * sum(len(data.codes(i)) for i in clips[:2]) + int(0.15 * 22050)
    export.main(["--ckpt", str(base), "--onnx", str(tmp_path / "onnx")])
    for name, words in (("config.json", "config.json"), ("model.onnx", "model.onnx")):
        folder = shutil.copytree(tmp_path / "onnx", tmp_path / name)
        (folder / name).unlink()
        said = refusal(evaluate.main, "--ckpt", base, "--out", tmp_path / "e", "--device", "cpu", "--onnx", folder)
        assert str(folder / words) in said and not (tmp_path / "e").exists()
    for options in [], ["--onnx", str(tmp_path / "onnx")]:
        evaluate.main(["--ckpt", str(base), "--out", str(tmp_path / "e"), "--device", "cpu", *options])
        summary = json.loads((tmp_path / "e" / "summary.json").read_text())
        assert summary["wer"] == summary["wer_ceiling"] and summary["duration_error"] == 0
        assert summary["audio_perplexity"] < 1.1 and "speaker_accuracy" not in summary
        assert soundfile.info(tmp_path / "e" / "000.wav").frames == 441 * len(data.codes(clips[0]))


def test_what_can_be_spoken(llm_tokens):
    """The prompts of a run are those held-out sentences that the road speaks whole, and stream_speech takes them."""
    data, model = SentenceDataset(llm_tokens), LLM(Config(**TINY | dict(context=250))).eval()
    speaker = speak.LLMSpeaker(model, asdict(Config(**TINY | dict(context=250))), codec=None)
    clips = data.clips("all")
    whole = speak.speakable(model.c, data, clips)
    assert whole == [i for i in clips.tolist() if speaker.sentences(data.text(i)) == [data.text(i)]]
    assert 0 < len(whole) < len(clips)
    for i in whole:
        next(generate.stream_speech(model, [speak.read_prompt(model.c, data.text(i), data.alphabet)], [0], 1))


def test_sentences_are_followed_in_order():
    """While the first is read the others are spoken too; no step is asked for twice."""
    steps = [torch.tensor(x) for x in ([1, 5, 7], [2, -1, 8], [-1, -1, 9], [-1, -1, -1])]
    asked = []
    first, second, third = generate.follow((asked.append(1) or step for step in steps), 3)
    assert next(first).tolist() == [1] and len(asked) == 1
    assert [int(x) for x in first] == [2] and len(asked) == 3
    assert [int(x) for x in second] == [5] and len(asked) == 3
    assert [int(x) for x in third] == [7, 8, 9] and len(asked) == 4


@pytest.fixture(scope="session")
def voiced(base, llm_tokens, tmp_path_factory):
    """The folder of a run that has been given voices. Tests only read it."""
    out, (_, width) = tmp_path_factory.mktemp("llm") / "voiced", voices_of(llm_tokens)
    settings = TINY | dict(
        data_dir=llm_tokens, out_dir=out, init_from=base, speaker_width=width, speaker_embedder="stats", packed=False,
        batch_size=4, steps=3, warmup_steps=1, lr=1e-2, eval_every=3, sample_every=3, eval_samples=2, eval_seconds=1,
        device="cpu", dtype="float32", wandb_mode="disabled")
    code, said = finish(launch(common.run, trainer.main, [f"--{key}={value}" for key, value in settings.items()]))
    assert code == 0, said
    return out


def test_voices(voiced, llm_tokens, corpus, tmp_path):
    """What begins as nothing has learnt; a recording, its stored embedding and evaluate.py's table of speakers."""
    data, width = voices_of(llm_tokens)
    model, config = load_model(voiced)
    assert all(norm.to_gamma_beta.weight.any() for block in model.blocks for norm in block.norms)
    assert model.speaker_mean.any()
    page = (voiced / "index.html").read_text()
    assert data.text(data.clips("val")[0]) in page and "coverage.png" in page and "perplexity of codes" in page
    assert (voiced / "samples" / "step_00000003" / "001.wav").exists()
    recording = next((corpus / "wavs").glob("*.wav"))
    voice = read_voice(recording, config)
    np.save(tmp_path / "voice.npy", voice.numpy())
    for n, speaker in enumerate((recording, tmp_path / "voice.npy")):
        sample.main(["--ckpt", str(voiced), "--text", "The baker.", "--speaker", str(speaker), "--seconds", "1",
                     "--device", "cpu", "--out", str(tmp_path / f"{n}.wav")])
    assert (tmp_path / "0.wav").read_bytes() == (tmp_path / "1.wav").read_bytes()
    evaluate.main(["--ckpt", str(voiced), "--out", str(tmp_path / "e"), "--clips", "6", "--device", "cpu"])
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["voices"] == 2 and summary["voices_new"] == 1 and summary["speaker_clips"] == 4
    assert summary["speaker_ceiling_accuracy"] >= 0.5 and 0 <= summary["speaker_accuracy"] <= 1


# ------------------------------------------------------------------------------------------------------------
# LoRA and export

def test_adapters(flags, base, tmp_path, in_process, capsys):
    """Saved alone, resumed, spoken with, merged."""
    run = tmp_path / "adapter"
    settings = dict(init_from=base, lora_rank=2, lora_matrices="query down", packed=False, out_dir=run, lr=1e-2)
    in_process(flags(steps=3, **settings))
    assert "1,280 of them trained" in (said := capsys.readouterr().out) and "%)" in said
    in_process(flags("--resume", steps=5, **settings))
    whole = tmp_path / "whole"
    in_process(flags(steps=5, **settings | dict(out_dir=whole)))
    assert parts(run)[0] == "step_00000005" and set(parts(run)[1][0]) == set(parts(whole)[1][0])
    saved, averages, _ = parts(run)[1]
    assert all("lora_" in key or key == "base" for key in saved) and sum(x.numel() for x in saved.values()) == 1280 + 32

    model, _ = load_model(run)
    assert model.c.lora_rank == 0
    export.main(["--ckpt", str(run), "--merge", str(tmp_path / "merged")])
    merged, _ = load_model(tmp_path / "merged")
    assert same(merged.state_dict(), model.state_dict())
    plain = load_model(base)[0].state_dict()
    key = "blocks.0.mixer.query"
    wanted = plain[f"{key}.weight"] + 16 * averages[f"{key}.lora_B"] @ averages[f"{key}.lora_A"]
    torch.testing.assert_close(model.state_dict()[f"{key}.weight"], wanted)
    assert not torch.equal(wanted, plain[f"{key}.weight"])



def test_a_run_that_is_no_adapter_cannot_go_on_as_one(flags, base, tmp_path, in_process):
    shutil.copytree(base, tmp_path / "run")
    said = refusal(in_process, *flags("--resume", steps=200, lora_rank=2, packed=False, init_from=base,
                                      out_dir=tmp_path / "run"))
    assert "is no adapter" in said and "--init_from" in said


def test_what_an_adapter_stands_on(flags, base, tmp_path, in_process):
    """The very step: it is found when both runs have been moved, it stays when its own run goes on, and what is another
    model is refused."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(base, here / "base", symlinks=True)
    settings = dict(lora_rank=2, lora_matrices="query down", packed=False, lr=1e-2)
    in_process(flags(steps=2, **settings | dict(init_from=here / "base", out_dir=here / "adapter")))
    step = run_folder.find_checkpoint(here / "base")
    assert Path((step / "kept_for").read_text().strip()) == here / "adapter"
    in_process(flags("--resume", steps=154, save_every=1, keep_last=1, eval_every=1000, optimizer="muon",
                     out_dir=here / "base"))
    assert step.exists() and len(run_folder.steps_in(here / "base" / "checkpoints")) <= 3

    spoken = load_model(here / "adapter")[0].state_dict()
    here.rename(there)
    assert same(load_model(there / "adapter")[0].state_dict(), spoken)
    in_process(flags("--resume", steps=3, **settings | dict(init_from=there / "base", out_dir=there / "adapter")))
    assert parts(there / "adapter")[0] == "step_00000003"

    weights = there / "base" / "checkpoints" / step.name / "ema.safetensors"
    tensors = run_folder.load_file(weights)
    run_folder.save_file({key: x + 1 for key, x in tensors.items()}, weights)
    for main, argv in ((sample.main, ["--text", "hello", "--out", tmp_path / "x.wav"]), (evaluate.main, [])):
        assert "adapter for another model" in refusal(main, "--ckpt", there / "adapter", *argv)
    assert "adapter for another model" in refusal(in_process, *flags("--resume", steps=4, **settings | dict(
        init_from=there / "base", out_dir=there / "adapter")))
    shutil.rmtree(there / "base")
    assert "is gone: it was" in refusal(sample.main, "--ckpt", there / "adapter", "--text", "hello")


def test_another_model_where_a_moved_base_was(flags, base, tmp_path, in_process):
    """The base that was moved together with its adapter is found beside it, in speaking and in going on."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(base, here / "base", symlinks=True)
    settings = dict(lora_rank=2, lora_matrices="query down", packed=False, lr=1e-2)
    in_process(flags(steps=1, **settings | dict(init_from=here / "base", out_dir=here / "adapter")))
    spoken, step = load_model(here / "adapter")[0].state_dict(), run_folder.find_checkpoint(here / "base")
    shutil.copytree(here, there, symlinks=True)
    tensors = run_folder.load_file(step / "ema.safetensors")
    for damage in (lambda path: run_folder.save_file({key: x + 1 for key, x in tensors.items()}, path),
                   lambda path: path.write_bytes(b"cut")):
        damage(step / "ema.safetensors")
        assert same(load_model(there / "adapter")[0].state_dict(), spoken)
    in_process(flags("--resume", steps=2, **settings | dict(init_from=there / "base", out_dir=there / "adapter")))
    assert parts(there / "adapter")[0] == "step_00000002"


@pytest.mark.parametrize("packed", [True, False])
def test_sentences_beyond_the_context(flags, llm_tokens, tmp_path, in_process, monkeypatch, capsys, packed):
    """They are left out, which is said; of the others each is drawn whole."""
    data, drawn = SentenceDataset(llm_tokens), set()
    lengths = sum(data.lengths(clips := data.clips("train"))) + 3
    context = int(np.sort(lengths)[4])
    monkeypatch.setattr(trainer, "make_batch", lambda c, data, shown, rows, step, device: drawn.update(
        clip for row in rows for clip in row) or make_batch(c, data, shown, rows, step, device))
    in_process(flags(packed=packed, context=context, steps=8, batch_size=2, eval_every=4))
    assert drawn == {*clips[lengths <= context].tolist()}
    said = capsys.readouterr().out
    assert f"{(lengths > context).sum()} of {len(clips)} clips" in said and f"--context {lengths.max()} " in said
    assert all(np.isfinite(row["audio_perplexity"]) for row in metrics(tmp_path / "run")
                           if "audio_perplexity" in row)


def test_a_clip_is_tried_as_it_was_drawn(flags, llm_tokens, tmp_path, in_process, monkeypatch):
    """Alone, that is, with the voice of the step that was not finite, whenever that is looked at."""
    _, width = voices_of(llm_tokens)
    drawn, clip_norm, seen = [], torch.nn.utils.clip_grad_norm_, []

    def made(c, data, shown, rows, step, device):
        batch = make_batch(c, data, shown, rows, step, device)
        drawn.extend((clip, voice.numpy().tobytes(), len(rows)) for [clip], voice in zip(rows, batch["speaker"]))
        return batch

    def clipped(parameters, most):
        seen.append(clip_norm(parameters, most))
        return seen[-1] * (float("nan") if len(seen) == 2 else 1)

    monkeypatch.setattr(trainer, "make_batch", made)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    in_process(flags(steps=4, log_every=4, packed=False, speaker_width=width, speaker_embedder="stats"))
    alone = [(clip, voice) for clip, voice, rows in drawn if rows == 1]
    assert len(alone) == 4 and alone == [(clip, voice) for clip, voice, rows in drawn if rows == 4][4:8]


def test_fine_tuning_an_echolancer(flags, tmp_path, in_process):
    """A published file is where a run begins, and what sample.py reads; a run can be written as one."""
    torch.manual_seed(0)
    c = Config(**TINY | dict(width=128, activation="gelu"))
    model = LLM(c)
    torch.save({"model_state_dict": echolancer.to_theirs(model)}, tmp_path / "published.pt")
    settings = dict(width=128, activation="gelu", packed=False, init_from=tmp_path / "published.pt")
    in_process(flags(steps=1, lr=0, min_lr=0, **settings))
    run = load_model(tmp_path / "run")[0]
    assert same(run.state_dict(), model.state_dict())
    loaded, config = load_model(tmp_path / "published.pt")
    assert same(loaded.state_dict(), model.state_dict()) and config["codec"] == "neucodec"
    export.main(["--ckpt", str(tmp_path / "run"), "--echolancer", str(tmp_path / "again.pt")])
    assert same(echolancer.read(tmp_path / "again.pt"), echolancer.read(tmp_path / "published.pt"))
    said = refusal(in_process, *flags(steps=1, **settings | dict(layers=3, out_dir=tmp_path / "other")))
    assert "no tensor 'blocks.2" in said
    said = refusal(in_process, *flags(steps=1, **settings | dict(activation="relu2", out_dir=tmp_path / "other")))
    assert "activation is gelu in" in said
    assert "data to be judged by" in refusal(evaluate.main, "--ckpt", tmp_path / "published.pt")


# ------------------------------------------------------------------------------------------------------------
# Alphabets

RUSSIAN = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопярстувжшыз")


@pytest.fixture
def rewritten(llm_tokens, tmp_path):
    """rewritten(name, symbols, letters, **more): a copy of the tokens whose texts are in these letters, by an alphabet,
    that of the texts unless given."""
    def make(name, symbols=None, letters=RUSSIAN, **more):
        folder = shutil.copytree(llm_tokens, tmp_path / name)
        rows = {path: [json.loads(line) for line in path.open()] for path in folder.glob("tokens_*.jsonl")}
        for some in rows.values():
            for row in some:
                row["text"] = row["text"].lower().translate(letters)
        symbols = symbols or of_texts(row["text"] for some in rows.values() for row in some)
        for path, some in rows.items():
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
            write_sentences(path.with_suffix(""), some, json.loads((folder / "speakers.json").read_text()),
                            Alphabet(symbols), more.get("language", "en"))
        info = json.loads((folder / "codec.json").read_text())
        (folder / "codec.json").write_text(json.dumps(info | {"characters": symbols} | more))
        return folder

    return make


def test_the_corpus_own_characters(flags, rewritten, tmp_path, in_process, capsys):
    """They size the embedding, stay with the run, are what it speaks from, and are not changed under it."""
    data = rewritten("russian", language="ru")
    own = dict(data_dir=data, language="ru", packed=False)
    said = refusal(in_process, *flags(**own))
    assert "--characters auto" in said and "абвгд" in said
    in_process(flags(**own | dict(characters="auto", overfit=4, eval_temperature=0)))
    model, config = load_model(tmp_path / "run")
    symbols = SentenceDataset(data).alphabet.symbols
    assert model.c.characters == config["characters"] == symbols and "а" in symbols and len(symbols) < 32
    assert len(model.embedding.weight) == 5 + len(symbols) + 32 + 32
    run = ["--ckpt", str(tmp_path / "run"), "--device", "cpu"]
    sample.main([*run, "--text", "Хелло ц, щ.", "--out", str(tmp_path / "out.wav"), "--seconds", "0.2"])
    said = capsys.readouterr().err
    assert f"{sum(map(str.isalpha, symbols))} letters" in said and "'щ'" in said
    assert "letters, such as" in refusal(sample.main, *run, "--text", "…語…", "--out", tmp_path / "out.wav")
    evaluate.main(["--ckpt", str(tmp_path / "run"), "--clips", "2", "--device", "cpu"])
    said = refusal(export.main, *run[:2], "--echolancer", tmp_path / "again.pt")
    assert "Echolancer reads the characters" in said and "абц" not in said and "абвг" in said
    in_process(flags("--resume", **own | dict(steps=7, characters="auto", overfit=4)))
    more = rewritten("more", language="ru", symbols=symbols + "ѣ")
    said = refusal(in_process, *flags("--resume", **own | dict(steps=8, characters="auto", overfit=4, data_dir=more)))
    assert "have the characters 'ѣ'" in said and "--characters auto" in said
    fewer = rewritten("fewer", language="ru", letters=RUSSIAN | {ord("z"): "а"})
    assert len(SentenceDataset(fewer).alphabet.symbols) <= len(symbols)
    in_process(flags("--resume", **own | dict(steps=8, characters="auto", overfit=4, data_dir=fewer)))
    assert load_model(tmp_path / "run")[1]["characters"] == symbols


def test_an_adapter_in_its_own_characters(flags, rewritten, tmp_path, in_process):
    """On a part of the characters of its model, which have some beyond 16 bits; merged, they are there."""
    data = rewritten("rare", letters={ord("a"): "𠮷", ord("b"): "\u0301"})
    own = dict(packed=False, overfit=4, steps=1, characters="auto")
    in_process(flags(**own, data_dir=data))
    part = rewritten("part", letters={ord("a"): "𠮷", ord("b"): "𠮷"})
    in_process(flags(**own | dict(data_dir=part, init_from=tmp_path / "run", lora_rank=2, out_dir=tmp_path / "lora")))
    export.main(["--ckpt", str(tmp_path / "lora"), "--merge", str(tmp_path / "merged")])
    merged, config = load_model(tmp_path / "merged")
    assert config["characters"] == merged.c.characters == load_model(tmp_path / "run")[1]["characters"]
    assert "𠮷" in merged.c.characters and speak.load(tmp_path / "merged").sentences("𠮷 two") == ["𠮷 two"]


def test_other_characters_take_over_what_is_known(flags, rewritten, base, tmp_path, in_process, capsys):
    """They stay what they were, however those of the data set are ordered; new ones are told, and come behind."""
    torch.manual_seed(0)
    c = Config(**TINY | dict(characters=" bß" + "".join(sorted({*SYMBOLS} - {*" bz"}))))
    moved, before = embedding_for(LLM(c), one := load_model(base)[0], "x"), one.embedding.weight
    assert torch.equal(moved[5 + c.characters.index("k")], before[5 + SYMBOLS.index("k")])
    assert torch.equal(moved[c.first_code:], before[43:]) and torch.equal(moved[:5], before[:5])
    said = capsys.readouterr().out
    assert "'ß' are new to x" in said and "'z' are those of x" in said
    shuffled = rewritten("shuffled", "".join(sorted(SYMBOLS)), {})
    settings = dict(init_from=base, packed=False, overfit=4, steps=1, lr=0, min_lr=0, characters="auto")
    in_process(flags(**settings, data_dir=shuffled))
    here, there = load_model(tmp_path / "run")[0], load_model(base)[0]
    rows = []
    for folder, model in ((shuffled, here), (base, there)):
        data = SentenceDataset(folder if folder == shuffled else load_model(base)[1]["data_dir"])
        data.read_in(model.c.characters)
        rows.append(figures.score_sentences(model, data, data.clips("all"), None, CPU, torch.float32))
    assert here.c.characters == there.c.characters and rows[0] == pytest.approx(rows[1], rel=1e-5)
    data = rewritten("russian", language="ru")
    in_process(flags(**settings | dict(data_dir=data, language="ru", out_dir=tmp_path / "russian_run")))
    said, new = capsys.readouterr().out, load_model(tmp_path / "russian_run")[0]
    assert "абвг" in said and "new to" in said and "will not read" not in said
    assert new.c.characters.startswith(SYMBOLS) and "ф" in new.c.characters
    assert torch.equal(new.embedding.weight[new.c.first_code:], there.embedding.weight[43:])
    assert torch.equal(new.embedding.weight[5 + new.c.characters.index(".")], there.embedding.weight[32])
    adapter = dict(lora_rank=2, data_dir=data, language="ru", out_dir=tmp_path / "adapter")
    said = refusal(in_process, *flags(**settings | adapter))
    assert "an adapter learns no characters" in said


# ------------------------------------------------------------------------------------------------------------
# Refusals

@pytest.mark.parametrize("settings, words", [
    (dict(codec="neucodec"), ["mel_rvq", "neucodec"]), (dict(codebook_size=64), ["codebook_size 32", "64"]),
    (dict(frame_rate=75), ["frame_rate 50", "75"]), (dict(pattern="GX"), ["'X'", "A for attention"]),
    (dict(speaker_width=8), ["packed to false"]), (dict(lora_rank=2), ["--init_from"]),
    (dict(speaker_width=8, packed=False), ["by ecapa", "data.py embed"]),
    (dict(speaker_width=8, packed=False, speaker_embedder="stats"), ["wide", "asks for 8"]),
    (dict(context=16), ["context of 16", "raise --context"]),
    (dict(context=16, packed=False), ["context of 16", "raise --context"]),
    (dict(data_dir="nowhere"), ["no token data set at nowhere"]), (dict(eval_top_p=1.5), ["--eval_top_p", "1.5"]),
    (dict(init_from="nowhere"), ["no checkpoint at nowhere"]),
], ids=str)
def test_refused_settings(flags, in_process, tmp_path, settings, words):
    """In one sentence that names both what was found and what was expected, before anything is trained."""
    said = refusal(in_process, *flags(**settings))
    assert all(word in said for word in words), said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_refused_samples(base, voiced, run, corpus, tmp_path):
    """Texts that cannot be said, recordings that show no voice, embeddings of another width, others' options."""
    noise = np.random.default_rng(0).standard_normal(22050) * 0.1
    soundfile.write(tmp_path / "silent.wav", np.zeros(22050), 22050)
    soundfile.write(tmp_path / "short.wav", noise[:2000], 22050)
    (tmp_path / "text.wav").write_text("not audio")
    np.save(tmp_path / "wide.npy", np.zeros(7, np.float32))
    (tmp_path / "bad.npy").write_text("no array")
    recording = next((corpus / "wavs").glob("*.wav"))
    for ckpt, argv, words in (
        (base, ["--text", ""], ["nothing to say"]), (base, ["--text", "Ω 你好"], ["English letters"]),
        (base, ["--text", "x" * 300], ["300 letters"]), (base, [], ["--text or --text_file"]),
        (base, ["--text", "hi", "--speaker", recording], ["without voices"]),
        (voiced, ["--text", "hi"], ["--speaker"]),
        (voiced, ["--text", "hi", "--speaker", tmp_path / "silent.wav"], ["silent.wav: it is silent"]),
        (voiced, ["--text", "hi", "--speaker", tmp_path / "short.wav"], ["0.3 s"]),
        (voiced, ["--text", "hi", "--speaker", tmp_path / "text.wav"], ["cannot read"]),
        (voiced, ["--text", "hi", "--speaker", tmp_path / "none.wav"], ["cannot read"]),
        (voiced, ["--text", "hi", "--speaker", tmp_path / "wide.npy"], ["(7,)", "checkpoint reads"]),
        (voiced, ["--text", "hi", "--speaker", tmp_path / "bad.npy"], ["cannot read the embedding"]),
        (base, ["--text", "hi", "--solver", "heun"], ["--solver", "'llm'"]),
        (base, ["--text", "hi", "--prompt_wav", recording], ["--prompt_wav", "'llm'"]),
        (run, ["--text", "hi", "--speaker", recording], ["--speaker", "'flow'"]),
        (base, ["--text", "hi", "--temperature", -1], ["--temperature -1"]),
        (base, ["--text", "hi", "--seconds", -1], ["--seconds -1"]),
        (base, ["--text", "hi", "--out", tmp_path / "out.mp3"], ["out.mp3", ".wav"]),
        (base, ["--text", "hi", "--repetition_penalty", 0], ["--repetition_penalty 0"]),
    ):
        said = refusal(sample.main, "--ckpt", ckpt, "--out", tmp_path / "out.wav", "--device", "cpu", *argv)
        assert all(word in said for word in words), said
    assert not (tmp_path / "out.wav").exists()
    assert "'flow'" in refusal(export.main, "--ckpt", run, "--onnx", tmp_path / "x")
    said = refusal(export.main, "--ckpt", base, "--onnx", tmp_path / "x", "--speaker", recording)
    assert "without voices" in said and not (tmp_path / "x").exists()
    assert "no adapter" in refusal(export.main, "--ckpt", base, "--merge", tmp_path / "x")
