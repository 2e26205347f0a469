"""audit.py: a clip's gain is that of the losses that train it, alone or among others; the list, its marks, and what
data.py makes of them."""

import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal
from helpers import stirred, tiny_codec_lm

import data as commands
import evaluate
import train_flow_tts as flow
from model import LLM, LLMConfig
from trivox import audit
from trivox.audit import codec_gains, flow_gains, llm_gains
from trivox.datasets import MelDataset, SentenceDataset, TokenDataset
from trivox.metrics import score_clips, score_sentences
from trivox.recordings import read_wav
from trivox.speak import load
from trivox.text import TextFeatures

CPU = torch.device("cpu")


def speaker(system, model, features=None, **config):
    return SimpleNamespace(system=system, model=model.eval(), c=model.c, features=features, device=CPU,
                           dtype=torch.float32, config=config)


def test_gains_of_the_flow(run):
    """The velocity's squared error with the text and with none, as the trainer has it."""
    of = load(run, CPU, cast=False)
    data, c = MelDataset(of.config["data_dir"], of.mel), SimpleNamespace(**of.config)
    gains, clips = flow_gains(of, data), [0, 7, 23]
    for clip in clips:
        losses = []
        for drop in (False, True):
            draws = [{"clip": clip, "t": t, "drop": drop, "silence": 0, "noise": clip} for t in audit.TIMES]
            with torch.no_grad():
                batch = flow.make_batch(c, data, of.features, draws, CPU)
                longest = batch["mel"].shape[1]
                noise = torch.randn(longest, 80, generator=torch.Generator().manual_seed(clip))
                batch["noise"][:] = noise * (torch.arange(longest) < batch["frames"][0])[:, None]
                losses.append(flow.flow_loss(c, of.model, batch)[0].sum().item())
        assert gains[clip] == pytest.approx(1 - losses[0] / losses[1], abs=2e-3)
    assert {*gains} == {*data.clips("all")}


def test_gains_of_the_codec_lm(codec_tokens):
    """The cross-entropy of its codes, as `score_clips` sums it."""
    data, features = TokenDataset(codec_tokens), TextFeatures("bytes")
    model = tiny_codec_lm(codebooks=2, codebook_size=16, frame_rate=50.0, cross_every=1)
    gains = codec_gains(speaker("codec", model, features), data)
    for clip in (0, 11, 39):
        own = score_clips(model, data, features, [clip], CPU, torch.float32)[:2].sum()
        without = score_clips(model, data, lambda texts, multiple: features([""] * len(texts), multiple), [clip], CPU,
                              torch.float32)[:2].sum()
        assert gains[clip] == pytest.approx((1 - own / without).item(), abs=1e-4)
    assert len(gains) == 40


def test_gains_of_the_llm(llm_tokens):
    """The cross-entropy of its codes beside that with another's characters, as `score_sentences` sums it."""
    torch.manual_seed(0)
    data = SentenceDataset(llm_tokens)
    model = stirred(LLM(LLMConfig(codebook_size=32, context=700, width=64, layers=2, heads=4, kv_heads=2,
                                  ffn_width=96)), 0.3)
    gains = llm_gains(speaker("llm", model), data)
    order = data.clips("all")
    order = order[np.argsort(sum(data.lengths(order)), kind="stable")].tolist()
    for n in (0, 5, len(order) - 1):
        clip, other = order[n], order[(n + 1) % len(order)]
        exchanged = SimpleNamespace(characters=lambda i: data.characters(other), codes=data.codes)
        own, without = (score_sentences(model, some, [clip], None, CPU, torch.float32)[1] for some in (data, exchanged))
        assert gains[clip] == pytest.approx(1 - own / without, abs=1e-4)
    assert {*gains} == {*order}


def test_the_list_and_its_marks(run, corpus, tmp_path, monkeypatch, capsys, one_process):
    """The worst heard first, then those whose text helps least; what is marked is left out by data.py, and may be
    changed by hand."""
    of = load(run, CPU)
    data = MelDataset(of.config["data_dir"], of.mel)
    texts = {i: data.rows[i]["text"] for i in range(40)}
    gains = {i: 0.01 * (i + 1) for i in range(40)} | {3: -0.2, 5: 0.0}
    wavs = {read_wav(data.recording(i), 16000).tobytes(): i for i in range(40)}
    heard = texts | {2: "nothing of the kind was said", 9: texts[9].split(" ", 1)[1]}
    monkeypatch.setattr(audit, "flow_gains", lambda *_: gains)
    monkeypatch.setattr(audit, "load_recognisers", lambda *_, **__: [("ears", lambda some, rate: [
        heard[wavs[wav.tobytes()]] for wav in some])])
    evaluate.main(["audit", "--ckpt", str(run), "--out", str(tmp_path / "audit"), "--share", "0.5"])
    assert "3 of 40 clips are marked" in capsys.readouterr().out
    rows = [*csv.DictReader((tmp_path / "audit" / "audit.csv").open(encoding="utf-8"))]
    ids = [data.rows[i]["id"] for i in range(40)]
    assert [row["id"] for row in rows] == [ids[i] for i in [2, 3, 5, 0, 1, 4, *range(6, 40)]]
    assert [row["id"] for row in rows if row["drop"]] == [ids[2], ids[3], ids[5]]
    assert sum(bool(row["wer"]) for row in rows) == 20 and 0 < float(rows[9]["wer"]) < 0.5
    page = (tmp_path / "audit" / "index.html").read_text(encoding="utf-8")
    assert page.index(ids[2]) < page.index(ids[3]) and "nothing of the kind" in page and page.count("<audio") == 40

    (edited := tmp_path / "edited.csv").write_text((tmp_path / "audit" / "audit.csv").read_text().replace(
        f"{ids[5]},x", f"{ids[5]},"))
    make = ["ljspeech", "--root", str(corpus), "--out", str(tmp_path / "mels"), "--drop", str(edited)]
    commands.main(make)
    said = capsys.readouterr().out
    assert said.count("edited.csv marks it to be dropped") == 2 and "38 clips" in said
    shutil.copy(edited, bad := tmp_path / "bad.csv")
    bad.write_text(bad.read_text().replace(f"{ids[2]},x", "demo-99999,x"))
    assert "'demo-99999', no clip's id" in refusal(commands.main, *make[:-1], bad)
    assert "columns id and drop" in refusal(commands.main, *make[:-1], corpus / "metadata.csv")


def test_a_model_without_text(tmp_path):
    model = tiny_codec_lm(cross_every=0)
    assert "trained without text" in refusal(lambda argv: audit.audit(speaker("codec", model), "x", tmp_path, [], 0.1))
