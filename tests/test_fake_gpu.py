"""fake_gpu.py, and on it the three trainers and a step of every config: nothing on the wrong device, and each wait for
the GPU has its reason. Processes of their own do that, as a stand-in for CUDA must be there before torch is:

    python tests/test_fake_gpu.py trainers | configs | faults    what they do, in words

Not covered, as it needs a true GPU: what kernels compute, and whether what is captured in a CUDA graph may be; torch's
compiler (test_precision.py has its front); the thread in which batches are made ahead (it is run without one); several
processes; frozen ByT5, BigVGAN and published codecs, of which no weights are at hand.
"""
import gc
import json
import os
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from threading import Event

from trivox import fake_gpu
import pytest
import torch
from conftest import TINY_CODEC, TINY_FLOW, TINY_LLM
from helpers import spawn

from benchmarks.step import random_batch, training
from trivox.recipes import load_settings

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda")
TINY = {"flow": TINY_FLOW | dict(layers=1, eval_prompts_max=1, eval_steps=2),
        "codec": TINY_CODEC | dict(context=256, cross_every=1, eval_samples=1, eval_seconds=1),
        "llm": TINY_LLM | dict(eval_samples=1, eval_seconds=1)}
VOICES = dict(packed="false", speaker_width=101, speaker_embedder="stats", dropout=0.1)
EVALUATED = "an evaluation has its sums read once"
SAVED = "a checkpoint waits for what it writes"
BEGINS = "once, before there is anything to wait for"
SAMPLED = "as samples begin or end, beside hundreds of operators that do not wait"
REASONS = {  # of the waits that stay: whose, and why
    "train_flow_tts.py main": "the model goes there once; the log's sums come back every log_every steps",
    "train_codec_lm.py main": "the same", "train_llm_tts.py main": "the same",
    "train_flow_tts.py validate": EVALUATED, "train_codec_lm.py validate": EVALUATED,
    "train_llm_tts.py validate": EVALUATED, "trivox/metrics.py score_sentences": EVALUATED,
    "trivox/run_folder.py to_host": SAVED, "trivox/run_folder.py load_run": BEGINS,
    "trivox/finite.py look": "with the log's sums",
    "trivox/run_folder.py load_weights": BEGINS, "trivox/speak.py make": SAMPLED, "trivox/speak.py run": SAMPLED,
    "trivox/generate.py solve_flow": "how long the longest sample becomes; the log-mels are for a vocoder on the CPU",
    "trivox/generate.py flow_step": SAMPLED,
    "trivox/generate.py stream_frames": "a text's end is looked for, and frames are handed on, in bursts",
    "trivox/generate.py stream_speech": "the same, 16 codes at a time",
    "trivox/generate.py generate_frames": SAMPLED, "trivox/generate.py generate_speech": SAMPLED,
}


def say(*rows):
    for row in rows:
        print(json.dumps(row), flush=True)


def run_trainers(gpu):
    """Each trainer's `main`: a run of three steps with evaluation, samples and a checkpoint; one that goes on with it;
    and one that starts from its weights, for the LLM TTS with voices. Says for each how many steps it made, the waits
    between the second step and the third, and all."""
    import train_codec_lm
    import train_flow_tts
    import train_llm_tts

    folders, out = json.loads(os.environ["FOLDERS"]), Path(os.environ["OUT"])
    clip, of_steps = torch.nn.utils.clip_grad_norm_, []

    def clipped(*args):
        of_steps.append(Counter(gpu.waits))
        return clip(*args)

    torch.nn.utils.clip_grad_norm_ = clipped
    for system, trainer in dict(flow=train_flow_tts, codec=train_codec_lm, llm=train_llm_tts).items():
        trainer.write_page, trainer.common.catch_signals = lambda *args, **more: None, Event
        first, sampled = out / system, "speak_every" if system == "flow" else "sample_every"
        common = TINY[system] | dict(
            data_dir=folders[system], out_dir=first, batch_size=3, overfit=3, warmup_steps=2, eval_every=3,
            save_every=3, log_every=3, device="cuda", wandb_mode="disabled")
        starts = dict(steps=1, init_from=first, out_dir=out / f"{system}_2", **{sampled: int(system == "llm")})
        starts |= VOICES if system == "llm" else {}
        for changes in {"steps": 3, sampled: 3}, {"steps": 4, "resume": "true", sampled: 0}, starts:
            gpu.begin()
            of_steps.clear()
            with redirect_stdout(sys.stderr):
                trainer.main([f"--{key}={value}" for key, value in (common | changes).items()])
            between = of_steps[2] - of_steps[1] if len(of_steps) > 2 else {}
            say([system, len(of_steps), [*between], [*gpu.waits]])


def run_faults(gpu):
    """What is said of a tensor on the wrong device, of a wait, of one in a CUDA graph; and memory in closed form."""
    c = replace(load_settings(ROOT / "configs" / "codec_demo.yaml"), batch_size=2, compile=False)
    (model, step), (batch, _) = training(c, CUDA), random_batch(c, CUDA)
    block = model.blocks[0]
    hook = block.register_forward_hook(lambda module, inputs, y: y.mean().item() and None)
    gpu.begin()
    step(batch)
    say(*([who, what] for what, _, who in gpu.waits))
    for _ in range(2):
        try:
            step(batch)
        except RuntimeError as e:
            say(["captured", str(e)])
    hook.remove()
    block.ffn_norm.weight = torch.nn.Parameter(torch.ones(c.width))
    try:
        block(torch.zeros(2, 5, c.width, device=CUDA), *[None] * 6)
    except Exception as e:
        say(["mixed", str(e)])
    try:
        fake_gpu.Kernel("a kernel", gpu).launch(torch.zeros(2))
    except Exception as e:
        say(["kernel", str(e)])
    del model, step, batch, block, hook
    gc.collect()
    before = gpu.now
    x = torch.zeros(1000, device=CUDA)
    gpu.begin()
    y = x[10:] + 1
    y = y * 2  # while there are three
    z = torch.empty(1, device=CUDA)
    say(["memory", gpu.peak - before, gpu.now - before, gpu.moved, gpu.operators])
    del x, y, z
    say(["freed", gpu.now - before])


def run_configs(gpu):
    """A step of each config, of two clips or rows, with a block of each kind, and short contexts."""
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        c = replace(load_settings(path), batch_size=2, grad_accum_steps=1, compile=False)
        if c.system == "flow":
            c = replace(c, layers=1, text_layers=min(1, c.text_layers))
        else:
            depth = max(*map(c.layout.index, c.layout), getattr(c, "cross_every", 0) - 1) + 1
            c = replace(c, layers=depth, pattern=c.layout[:depth], context=128)
        (_, step), (batch, _) = training(c, CUDA), random_batch(c, CUDA)
        gpu.begin()
        step(batch)
        say([path.name, gpu.operators, gpu.moved, gpu.peak, [*gpu.waits]])


def say_of(what, **environment):
    """What one of these processes says. Skips the test where there can be no fake GPU."""
    rows = spawn(__file__, what, **environment)
    if rows[0][0] == "lacks":
        pytest.skip(rows[0][1])
    return rows


@pytest.mark.long
def test_trainers(data_dir, codec_tokens, llm_tokens, tmp_path):
    """They come to their end, so that nothing was on the wrong device. Steps do not wait for the GPU; whoever does
    stands in REASONS."""
    folders = json.dumps(dict(flow=str(data_dir), codec=str(codec_tokens), llm=str(llm_tokens)))
    rows = say_of("trainers", FOLDERS=folders, OUT=str(tmp_path))
    assert [row[:2] for row in rows] == [[system, n] for system in TINY for n in (3, 1, 1)]
    assert [row[2] for row in rows] == [[]] * 9
    unexplained = [wait for row in rows for wait in row[3] if wait[2].partition(":")[0] not in REASONS]
    assert unexplained == []


@pytest.mark.long
def test_configs():
    """A step of each waits for nothing, and moves each byte that it holds at least once."""
    rows = {name: row for name, *row in say_of("configs")}
    assert rows.keys() == {path.name for path in (ROOT / "configs").glob("*.yaml")}
    wrong = {name for name, (operators, moved, peak, waits) in rows.items() if waits or not moved > peak > operators}
    assert wrong == set()


def test_faults():
    """Each is found; and peak memory and bytes moved, counted by hand."""
    found = {what: said for what, *said in say_of("faults")}
    assert [what for who, what in found.items() if "y.mean().item()" in who] == [["a number is read"]]
    assert found["captured"] == ["while a CUDA graph is captured, a number is read"]
    assert "cuda:0 and cpu" in found["mixed"][0] and "device cpu" in found["kernel"][0]
    # 1,000 floats take 4,096 bytes; two operators read and write 990; the one that is left takes 512
    assert found["memory"] == [3 * 4096, 2 * 4096 + 512, 4 * 3960, 4] and found["freed"] == [0]


if __name__ == "__main__":
    if fake_gpu.LACKS:
        say(["lacks", fake_gpu.LACKS])
    else:
        with fake_gpu.FakeGPU() as gpu:
            {"trainers": run_trainers, "configs": run_configs, "faults": run_faults}[sys.argv[1]](gpu)
