"""decoding.py without a GPU: its kernels run by Triton's interpreter beside `LLM.hidden`, and compiled for two chips,
each in a process of its own.

    python tests/test_decoding.py interpret | compile | compile_some    what those processes do, in words
"""
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from helpers import mend_interpreter, spawn, tiny_llm, voice

from benchmarks.kernels import build, recorded
from model import LLM, LLMConfig
from trivox import decoding
from trivox.checkpoints import cast_matrices
from trivox.recipes import read_yaml

ROOT = Path(__file__).parents[1]
CASES = {  # rows, steps of the prompt, steps of the cache, changes of the model
    "alone": (1, 70, 79, dict(layers=2)),
    "alone, with a voice": (1, 3, 9, dict(speaker_width=12, activation="gelu", kv_heads=4)),
    "three, one key head": (3, 38, 45, dict(kv_heads=1, alibi="standard")),
    "three, with voices": (3, 66, 70, dict(speaker_width=12, activation="gelu", layers=2)),
    "17": (17, 30, 37, {}),
    "17, with voices": (17, 5, 12, dict(speaker_width=12)),
    "three of six heads": (3, 20, 27, dict(width=96, heads=6, kv_heads=2)),
    "bfloat16, alone": (1, 40, 45, dict(dtype="bfloat16")),
    "bfloat16": (3, 40, 45, dict(dtype="bfloat16", speaker_width=12)),
    "float16": (3, 40, 45, dict(dtype="float16")),
}
STEPS = 2
ERRORS = dict(float32=1e-5, bfloat16=0.04, float16=0.005)
SIZES = "llm_177m", "llm_1b"


def run_case(rows, prompt, steps, changes):
    """The largest difference of some steps' states and of the cache to those of `LLM.hidden`, relative to the largest
    of them; rows begin after paddings of many lengths."""
    dtype = getattr(torch, changes.get("dtype", "float32"))
    model = tiny_llm(**dict(layers=1) | {key: x for key, x in changes.items() if key != "dtype"})
    tokens, first = torch.randint(0, 90, (rows, prompt + STEPS)), torch.arange(rows) * 7 % prompt
    speaker = voice(model, rows)
    says = speaker if speaker is None else [[[x.to(dtype) for x in norm] for norm in block]
                                            for block in model.read_speaker(speaker)]
    model, states = cast_matrices(model, dtype), []
    assert decoding.supports(model, rows)
    caches = [model.empty_cache(first, steps) for _ in range(2)]
    for cache in caches:
        model.hidden(tokens[:, :prompt], None, says, cache)
    for hidden in partial(model.hidden, voice=says, cache=caches[0]), decoding.make_step(model, caches[1], says):
        states.append(torch.cat([hidden(tokens[:, t:t + 1]) for t in range(prompt, prompt + STEPS)], 1))
    assert [int(cache[0]) for cache in caches] == [prompt + STEPS] * 2
    pairs = [states, *zip(*(sum(cache[-1], []) for cache in caches))]
    assert all(a.dtype == b.dtype == dtype and a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def interpret():
    """A JSON line for each case: its name and its error."""
    mend_interpreter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills what is new with NaN
    decoding.PROGRAMS = 20  # so that one row has several splits, and many have one
    decoding.COLUMNS = dict.fromkeys(decoding.COLUMNS, 16)  # the fewer programs, the sooner it is done
    decoding.TILES = {key: (16, *rest) for key, (_, *rest) in decoding.TILES.items()}
    with torch.inference_mode():
        for name, case in CASES.items():
            print(json.dumps([name, run_case(*case)]), flush=True)


def compile_all(every=1):
    """A JSON line for each size, number of rows, product or attention, and chip, or for every seventh: those,
    registers, bytes spilled, bytes of shared memory."""
    jobs = []
    for size in SIZES:
        settings = read_yaml(ROOT / "configs" / f"{size}.yaml")
        settings = {f.name: settings[f.name] for f in fields(LLMConfig) if f.name in settings}
        model = LLM(LLMConfig(**settings | dict(layers=1, codebook_size=8))).to(torch.bfloat16).eval()
        for rows, chip in itertools.product((1, 8, 32, 64), (80, 90)):
            decoding.goes_ahead = lambda rows, device, chip=chip: rows == 1 and chip == 90  # the other cannot
            with torch.inference_mode(), recorded(decoding) as calls:
                cache = model.empty_cache(torch.zeros(rows, dtype=torch.long), model.c.context)
                decoding.make_step(model, cache)(torch.zeros(rows, 1, dtype=torch.long))
            assert len(calls) == 5
            names = "queries", "attention", "out", "up", "down"
            jobs += [(size, rows, name, call, chip) for name, call in zip(names, calls)]

    def compiled(job):
        *names, call, chip = job
        return *names, chip, *build(call, chip)[:3]

    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(compiled, jobs[::every]):
            print(json.dumps(row), flush=True)


def test_a_step_is_the_plain_one():
    """In float32 to rounding: rows of any number and padding, voices, grouped queries, several splits of keys."""
    found = dict(spawn(__file__, "interpret", TRITON_INTERPRET="1"))
    assert found.keys() == CASES.keys()
    assert {name: x for name, x in found.items() if not x < ERRORS[CASES[name][3].get("dtype", "float32")]} == {}


def test_kernels_compile(request):
    """For both chips, at the published sizes: none spills, and all find room on chips with 99 KiB for a program. Every
    seventh of the 80, which meets each of sizes, rows, products and chips, and with --all every one."""
    everything = request.config.getoption("--all")
    found = spawn(__file__, "compile" if everything else "compile_some")
    assert len(found) == (80 if everything else 12)
    assert [row for row in found if row[5] > 0 or row[6] > 99 * 1024] == []


def test_what_is_not_supported():
    """Then the plain path is taken."""
    model = tiny_llm()
    assert decoding.supports(model, 64) and not decoding.supports(model, 65)
    assert not decoding.supports(tiny_llm().train(), 1)
    for changes in dict(pattern="AGA"), dict(macaron=True), dict(lora_rank=2), dict(width=96), dict(ffn_width=100):
        assert not decoding.supports(tiny_llm(**changes), 1), changes
    assert decoding.supports(tiny_llm(lora_rank=2).merge(), 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not decoding.supports(model, 1) and decoding.supports(cast_matrices(tiny_llm(), torch.bfloat16), 1)


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all, "compile_some": partial(compile_all, 7)}[sys.argv[1]]()
