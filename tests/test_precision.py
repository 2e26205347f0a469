"""The three trainers in float16, and with their blocks compiled, beside float32 as it is: the same losses."""

import json
from threading import Event

import pytest
import torch
from conftest import TINY_CODEC, TINY_FLOW, TINY_LLM

import train_codec_lm
import train_flow_tts
import train_llm_tts

TRAINERS = {"flow": train_flow_tts, "codec": train_codec_lm, "llm": train_llm_tts}
TINY = {"flow": TINY_FLOW | dict(layers=1),
        "codec": TINY_CODEC | dict(pattern="A", layers=1, context=256, cross_every=1),
        "llm": TINY_LLM | dict(packed=False)}


@pytest.fixture(params=TRAINERS)
def losses(request, data_dir, codec_tokens, llm_tokens, tmp_path, monkeypatch):
    """losses(steps, key=value, …): those of each step of a tiny run, and at last that of validation."""
    system, runs = request.param, []
    trainer, folder = TRAINERS[system], {"flow": data_dir, "codec": codec_tokens, "llm": llm_tokens}[system]
    monkeypatch.setattr(trainer, "write_page", lambda *args, **more: None)
    monkeypatch.setattr(trainer.common, "catch_signals", Event)

    def train(steps, **changes):
        runs.append(tmp_path / str(len(runs)))
        settings = TINY[system] | dict(
            data_dir=folder, out_dir=runs[-1], batch_size=3, steps=steps, warmup_steps=2, lr=1e-3, eval_every=1000,
            save_every=1000, log_every=1, device="cpu", dtype="float32", wandb_mode="disabled",
            **{"speak_every" if system == "flow" else "sample_every": 0}) | changes
        trainer.main([f"--{key}={value}" for key, value in settings.items()])
        rows = [json.loads(line) for line in (runs[-1] / "metrics.jsonl").read_text().splitlines()]
        return torch.tensor([row[key] for row in rows for key in ("loss", "val_loss") if key in row])

    return train


def test_float16(losses):
    exact, half = losses(30), losses(30, dtype="float16")
    assert len(exact) == 31 and not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0)


def test_compiled(losses, monkeypatch):
    """No block has a graph break, and after three shapes nothing is compiled again. What stands behind the compiler's
    front is not inductor here, which takes minutes: benchmarks/trainers.py has that."""
    graphs, counters, compiles = [], torch._dynamo.utils.counters, torch.nn.Module.compile
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **options: compiles(
        block, backend="aot_eager", fullgraph=True, **options))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: graphs.append(
        counters["stats"]["unique_graphs"]) or clip(*args))
    exact = losses(20)
    torch._dynamo.reset()
    counters.clear()
    graphs.clear()
    compiled = losses(20, compile="true")
    torch.testing.assert_close(compiled, exact, rtol=1e-4, atol=0)
    assert graphs[0] > 0 and graphs[3] == graphs[-1] and not counters["graph_break"]
