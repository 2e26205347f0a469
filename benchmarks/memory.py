"""What a training step takes of a GPU, found without one (trivox/fake_gpu.py), as JSON, a line a config:

    python benchmarks/memory.py step CONFIG …    peak memory, operators, and bytes read and written; `bench.py params`
                                                 prints them
    python benchmarks/memory.py fit CONFIG …     what fits on cards of 24, 40, 80 and 141 GB; `bench.py memory` prints
                                                 it
    python benchmarks/memory.py keep             `fit` for the configs of the table in docs/results.md, kept in
                                                 benchmarks/memory.json, from which benchmarks/results.py writes it

The step is that of `bench.py train`: bfloat16, AdamW or Muon, averaged weights, random data. With compile: true, blocks
keep for their backward pass what torch.compile's partitioner keeps; a kernel that fuses several operators needs less
than they one by one, and PyTorch's allocator more than what tensors occupy. So a step is said to fit where MARGIN times
its peak and CONTEXT find room: on an H100 four configs took 0.88 to 1.31 times the peak.

Memory grows in proportion to the rows of a batch. So it is counted for the batch of the config and for a quarter of it,
with activation checkpointing and without, and between them interpolated; `off` is by how much, at the half of it.
"""

import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from trivox import fake_gpu  # noqa: E402 before torch
import torch  # noqa: E402

import trivox.gpu  # noqa: E402
from benchmarks.step import random_batch, training  # noqa: E402
from trivox.common import UserError, run  # noqa: E402
from trivox.recipes import load_settings  # noqa: E402

CARDS = 24, 40, 80, 141  # GB
MARGIN, CONTEXT = 1.25, 1e9
PUBLISHED = ["flow_ljspeech", "codec_ljspeech", "codec_ljspeech_text", "codec_ljspeech_attention",
             "codec_ljspeech_recurrent", "codec_ljspeech_mamba2", "codec_ljspeech_mamba2_hybrid", "codec_music_300m",
             "codec_music_300m_attention", "codec_music_300m_recurrent", "codec_music_300m_mamba2",
             "codec_music_300m_mamba2_hybrid", "llm_177m", "llm_177m_speaker", "llm_lora", "llm_550m", "llm_1b"]



def count(gpu, c, wanted):
    """For each (batch_size, activation_checkpointing): the FakeGPU's (peak, operators, moved) over a step, of no more
    than two micro-batches. The optimizer's state is there already."""
    gpu.graphs.clear()
    device, found = torch.device("cuda"), []
    model, step = training(replace(c, grad_accum_steps=min(2, c.grad_accum_steps)), device)
    for size, model.checkpointing in wanted:
        batch, _ = random_batch(replace(c, batch_size=size), device)
        if not found:
            step(batch)
        gc.collect()
        gpu.begin()
        step(batch)
        found.append((gpu.peak, gpu.operators, gpu.moved))
    return found


def step_row(gpu, path):
    """The figures of a step of a config: its peak, and of all its micro-batches operators and bytes, as they are
    without compile."""
    c = load_settings(path)
    own = [(c.batch_size, c.activation_checkpointing)]
    (peak, *plain), = count(gpu, c, own)
    if c.compile:
        (_, *plain), = count(gpu, replace(c, compile=False), own)
    times = c.grad_accum_steps / min(2, c.grad_accum_steps)
    return {"config": Path(path).name, "GB": peak / 1e9, "operators": round(plain[0] * times),
            "GB moved": plain[1] * times / 1e9}


def fit_row(gpu, path):
    """What fits of a config. cards: for each, without activation checkpointing and with it, the largest part of the
    config's batch that fits as [batch_size, grad_accum_steps], or [] where none does. needs: GB for a single row with
    checkpointing."""
    c = load_settings(path)
    B, half, least = (max(1, c.batch_size // n) for n in (1, 2, 4))
    wanted = [(size, checkpointing) for checkpointing in (False, True) for size in (B, least)] + [(half, False)]
    peaks = dict(zip(wanted, (found[0] for found in count(gpu, replace(c, grad_accum_steps=2), wanted))))

    def needs(size, checkpointing):
        high, low = peaks[B, checkpointing], peaks[least, checkpointing]
        return MARGIN * (low + (high - low) * (size - least) / max(1, B - least)) + CONTEXT

    off = needs(half, False) / (MARGIN * peaks[half, False] + CONTEXT) - 1
    row = {"config": Path(path).name, "needs": needs(1, True) / 1e9, "off": off,
           "own": [B, c.grad_accum_steps], "cards": {}}
    for card in CARDS:
        row["cards"][card] = [next(([size, c.grad_accum_steps * B // size] for size in range(B, 0, -1)
                                    if B % size == 0 and needs(size, checkpointing) <= card * 1e9), [])
                              for checkpointing in (False, True)]
    return row


def main(argv):
    what, paths = argv[:1], argv[1:]
    if what == ["keep"]:
        paths = [str(ROOT / "configs" / f"{name}.yaml") for name in PUBLISHED]
    if what not in (["step"], ["fit"], ["keep"]) or not paths:
        raise UserError(__doc__)
    trivox.gpu.replayed = lambda step, *_: step  # a graph that is replayed does nothing here
    rows, found = {"step": step_row}.get(what[0], fit_row), []
    with fake_gpu.FakeGPU() as gpu:
        for path in paths:
            found.append(rows(gpu, path))
            print(json.dumps(found[-1]), flush=True)
    if what == ["keep"]:
        about = {"command": "python benchmarks/memory.py keep", "torch": torch.__version__, "date":
                 time.strftime("%Y-%m-%d"), "margin": MARGIN, "context_gb": CONTEXT / 1e9, "configs": found}
        (ROOT / "benchmarks" / "memory.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    run(main, sys.argv[1:])
