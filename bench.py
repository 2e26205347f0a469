"""Sizes and speeds.

    python bench.py params configs/*.yaml    parameters, FLOPs, operators and memory of a training step, a row a config
    python bench.py memory CONFIG …          which batches fit on which GPU, counted without one
    python bench.py decode CONFIG            milliseconds a step of a codec LM's sampling, one clip at a time; of an LLM
                                             TTS's after 1,000 tokens, beside computing all of them anew
    python bench.py train CONFIG …           clips or tokens a second of training on random data, and memory
    python bench.py llm CONFIG               on a GPU: whether its paths agree, then tokens a second of decoding
    python bench.py onnx FOLDER | CONFIG     tokens a second of what export.py wrote, one sentence at a time; for a
                                             config with random weights, of 32 and of 8 bits
    python bench.py delta_rule               the delta rule: on a GPU the kernels' errors, then times beside fla-core;
                                             on a CPU our chunks beside transformers' plain PyTorch function
    python bench.py delta_rule check         errors alone, at small sizes: for compute-sanitizer
"""

import inspect
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from trivox.common import UserError, autocast, keep_freed_memory, pick_dtype, run  # first: see evaluate.py

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step import SECONDS, TEXT_BYTES, random_batch, training
from trivox.recipes import load_settings

ROOT = Path(__file__).resolve().parent
DEVICE, ERRORS = "cuda", ("o", "dq", "dk", "dv", "dg", "dbeta")


def step_of(c):
    """One training step on fake tensors, a clip of a flow TTS, the context of the others: nothing is computed. Returns
    (the model, FLOPs of its matrix products, forward and backward; attention's as if nothing were masked)."""
    from model import LLM, CodecLM, FlowTTS

    with FakeTensorMode(), FlopCounterMode(display=False) as flops:
        model, ids = {"flow": FlowTTS, "codec": CodecLM, "llm": LLM}[c.system](c), torch.zeros(1, dtype=torch.long)
        text = ids.expand(1, TEXT_BYTES)
        if c.system == "flow":
            frames = -(-int(SECONDS * c.sample_rate / c.hop_length) // c.patch) * c.patch
            text = text if c.text_encoder == "bytes" else torch.zeros(1, TEXT_BYTES, c.byt5_width)
            results = model(torch.zeros(1, frames, c.n_mels), torch.zeros(1), ids + frames, text, ids + TEXT_BYTES)
        elif c.system == "codec":
            read = (text, ids + TEXT_BYTES) if c.cross_every else ()
            x, log_seconds = model(torch.zeros(1, c.context, c.codebooks, dtype=torch.long), *read)
            results = model.logits(x), log_seconds
        else:
            voice = torch.zeros(1, c.speaker_width) if c.speaker_width else None
            results = [model(torch.zeros(1, c.context, dtype=torch.long), None, voice) @ model.embedding.weight.T]
        sum(x.mean() for x in results if x is not None).backward()
    return model, flops.get_total_flops()


def params_row(path):
    """Parameters by part and FLOPs of one step of a config."""
    c = load_settings(path)
    model, flops = step_of(c)

    def count(*modules, trained=False):
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad or not trained)

    text, blocks = count(*[m for name, m in model.named_children() if name == "encode_text"]), count(model.blocks)
    frozen = byt5_parameters() if c.system == "flow" and c.text_encoder != "bytes" else 0
    total, trained, clips = count(model) + frozen, count(model, trained=True), c.batch_size * c.grad_accum_steps
    return {"config": Path(path).name, "total": total, "trained": trained, "text": text, "blocks": blocks,
            "rest": total - frozen - text - blocks, "frozen": total - trained, "clips a step": clips,
            "TFLOP a step": flops * clips / 1e12}


def byt5_parameters():
    """Of ByT5-small's encoder, from its published shape."""
    from transformers import T5Config, T5EncoderModel

    shape = T5Config(vocab_size=384, d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_heads=6,
                     feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        return sum(p.numel() for p in T5EncoderModel(shape).parameters())


def params(paths):
    """Print the table of `bench.py params`."""
    if not paths:
        raise UserError("name the configs: python bench.py params configs/*.yaml")
    rows, shown = [params_row(path) for path in paths], {int: "{:,}", float: "{:.3f}", str: "{}"}
    for row, found in zip(rows, on_a_fake_gpu("step", paths)):
        row |= found
    cells = [list(rows[0]), *([shown[type(value)].format(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for name, *numbers in cells:
        print("  ".join([name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:]))]))
    print(f"FLOPs: matrix products, forward and backward, for clips of {SECONDS} s (language models: of the whole "
          f"context) and {TEXT_BYTES} bytes of text")
    if "GB" in rows[0]:
        print("GB: the most that tensors take of a GPU. Operators of a step, and GB that they read and write: without "
              "torch.compile")


def on_a_fake_gpu(what, paths):
    """The rows of benchmarks/memory.py, dicts, from a process of its own; none where it cannot run, which it says."""
    done = subprocess.run([sys.executable, "-W", "ignore", ROOT / "benchmarks" / "memory.py", what, *paths],
                          stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()] if done.returncode == 0 else []


def memory(paths):
    """Print what fits on which card of each config, with the flags that it takes."""
    for row in on_a_fake_gpu("fit", paths):
        print(f"{row['config']}: a single row with activation checkpointing needs {row['needs']:.1f} GB")
        for card, fitting in row["cards"].items():
            flags = [(f"--batch_size {size[0]} --grad_accum_steps {size[1]} " * (size != row["own"])
                      + "--activation_checkpointing" * recomputed).strip()
                     for recomputed, size in enumerate(fitting) if size]
            said = "fits as it is" if fitting[0] == row["own"] else " or ".join(flags) or "does not fit"
            print(f"{card:>5s} GB: {said}")


def decode(path):
    """Print how long a codec LM takes to sample, one clip at a time, in float32 and bfloat16, and the real-time factor:
    seconds of computing a second of audio. On a shared machine the fastest tenth says more than the median."""
    from model import CodecLM
    from trivox.checkpoints import cast_matrices
    from trivox.speak import CodecSpeaker

    keep_freed_memory()
    c = load_settings(path)
    if c.system == "llm":
        return decode_llm(c)
    if c.system != "codec":
        raise UserError(f"{path} is of the system {c.system!r}; 'codec' and 'llm' decode step by step")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model, marks = cast_matrices(CodecLM(c).eval().to(device), getattr(torch, dtype)), []
        speaker = CodecSpeaker(model, asdict(c) | {"dtype": dtype}, codec=None)
        for _ in speaker.codes(speaker.parts(None, speaker.settings({"seconds": 8.0, "top_k": 256}))[0]):
            marks.append(time.perf_counter())
        took, mean = sorted(1e3 * (b - a) for a, b in zip(marks, marks[1:])), 1e3 * (marks[-1] - marks[0]) / len(marks)
        each = [("median", statistics.median(took)), ("fastest tenth", took[len(took) // 10])]
        for name, ms in each if device == "cpu" else [("mean", mean)]:  # a GPU's frames come some at a time
            print(f"{dtype}, {torch.get_num_threads()} threads, {name}: {ms:.2f} ms a step, real-time factor "
                  f"{ms / 1e3 * c.frame_rate:.2f}")


def decode_llm(c, seen=1000):
    """Print tokens a second of an LLM TTS after so many tokens, one sentence at a time, by turns: with its cache, and
    without, when all are computed anew and the head takes the last alone."""
    from model import LLM
    from trivox.checkpoints import cast_matrices

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = pick_dtype("auto", device)
    torch.manual_seed(0)
    model = cast_matrices(LLM(c).eval().to(device), dtype)
    tokens = torch.randint(0, c.codebook_size, (1, seen), device=device)
    speaker = torch.randn(1, c.speaker_width, device=device) if c.speaker_width else None
    took = {"cached": [], "recomputed": []}
    with torch.inference_mode(), autocast(device, dtype):
        voice = None if speaker is None else model.read_speaker(speaker)
        cache = model.empty_cache(torch.zeros(1, dtype=torch.long, device=device), seen + 200)
        model.hidden(tokens, None, voice, cache)
        for turn in range(8):
            for name, repeats in (("cached", 20), ("recomputed", 1)):
                start = time.perf_counter()
                for _ in range(repeats):
                    x = model.hidden(tokens[:, :1], None, voice, cache) if name == "cached" else model.hidden(
                        tokens, None, voice)
                    model.audio_logits(x[:, -1]).argmax().item()
                took[name].append((time.perf_counter() - start) / repeats)
    cached, anew = (1 / statistics.median(took[name][1:]) for name in ("cached", "recomputed"))
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {dtype}, {torch.get_num_threads()} threads, after {seen:,} tokens: {cached:.2f} "
          f"tokens/s with the cache, {anew:.2f} recomputed, {cached / anew:.0f} times; real-time factor "
          f"{c.frame_rate / cached:.2f}")


def bench_train(path, repeats=20):
    """Print how fast a config trains in one process on random data: all of a step but for making its batch, as its
    trainer does it. On a GPU also writes benchmarks/gpu/train_<config>_<gpu>.json."""
    c = load_settings(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, gpu = pick_dtype(c.dtype, device), device.type == "cuda"
    (_, step), (batch, n), marks = training(c, device), random_batch(c, device), []
    for _ in range(repeats + 6 if gpu else 3):
        loss = step(batch)
        if gpu:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    if not math.isfinite(loss := loss.item() / n):  # what is not finite is multiplied faster, and no figure
        raise UserError(f"{path}: the loss is {loss}")
    seconds = statistics.median([b - a for a, b in zip(marks, marks[1:])][5 * gpu:])
    n, flops = n * c.grad_accum_steps, step_of(c)[1] * c.batch_size * c.grad_accum_steps / 1e12
    found = {"gpu": torch.cuda.get_device_name() if gpu else "", "torch": torch.__version__, "dtype": str(dtype)[6:],
             "command": f"python bench.py train {path}", "config": Path(path).name, "ms_a_step": 1e3 * seconds,
             "unit": "tokens" if c.system == "llm" else "clips", "per_second": n / seconds, "batch_size": c.batch_size,
             "grad_accum_steps": c.grad_accum_steps, "TFLOP_per_second": flops / seconds, "loss": loss,
             "gpu_gb": torch.cuda.max_memory_reserved() / 1e9 if gpu else None}
    print(f"{path}: {1e3 * seconds:.1f} ms a step of {c.batch_size} x {c.grad_accum_steps}, {n / seconds:,.0f} "
          f"{found['unit']} a second, {flops / seconds:.0f} TFLOP/s" + (f", {found['gpu_gb']:.1f} GB" if gpu else ""))
    if gpu:
        keep(f"train_{Path(path).stem}", found)


def bench_llm(path):
    """On a GPU: FlexAttention beside scaled_dot_product_attention, and the CUDA graph of decoding beside steps one by
    one; decoding of 1 and of 32 sentences. Prints, and writes benchmarks/gpu/<config>_<gpu>.json."""
    import numpy as np

    import model as model_module
    from model import LLM, sentence
    from trivox.generate import generate_speech
    from trivox.speak import cast_matrices

    c, device, gpu = load_settings(path), torch.device("cuda"), torch.cuda.get_device_name()
    torch.manual_seed(0)
    model, batch = LLM(c).to(device).eval(), random_batch(replace(c, batch_size=2), device)[0]
    few, where = (batch["tokens"], batch["document"]), batch["document"] >= 0
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        flex = model(*few)[where].float()
        model_module.takes_flex = lambda tokens: False
        dense = model(*few)[where].float()
        model_module.takes_flex = lambda tokens: tokens.is_cuda
    off = ((flex - dense).norm() / dense.norm()).item()
    print(f"{gpu}: FlexAttention is off by {off:.1e} from scaled_dot_product_attention, in bfloat16")
    if not off < 0.02:
        raise UserError("which is too much: see TILES in model.py")

    model, prompt = cast_matrices(model, torch.bfloat16), sentence(c, np.arange(5, 43).astype(np.uint8))
    found = {"gpu": gpu, "torch": torch.__version__, "command": f"python bench.py llm {path}",
             "config": Path(path).name, "flex_error": off}
    with torch.autocast("cuda", torch.bfloat16):
        graph = generate_speech(model, [prompt], [0], 200)[0]
        steps = generate_speech(model, [prompt], [0], 8)[0]  # too few for a graph to be captured
        if not torch.equal(graph[:len(steps)], steps):
            raise UserError("what the CUDA graph speaks is not what the steps speak one by one")
        for batch, top_p in itertools.product((1, 32), (1.0, c.eval_top_p)):
            took = []
            for repeat in range(4):
                start = time.perf_counter()
                codes = generate_speech(model, [prompt] * batch, range(batch), 500, top_p=top_p)
                took.append((time.perf_counter() - start, sum(map(len, codes))))
            took, made = min(took)
            found[f"decode_{batch}, top_p {top_p:g}"] = made / took
            print(f"decoding {batch}, top_p {top_p:g}: {made / took:,.0f} tokens/s, prefill and capture included; "
                  f"real-time factor {took / (made / batch / c.frame_rate):.4f}")
    keep(Path(path).stem, found)


def keep(name, found):
    """Write what was found on a GPU to benchmarks/gpu/<name>_<gpu>.json; benchmarks/results.py makes a table of it."""
    path = Path("benchmarks/gpu") / f"{name}_{re.sub('[^A-Za-z0-9]+', '_', found['gpu'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found | {"date": time.strftime("%Y-%m-%d")}, indent=1, ensure_ascii=False) + "\n",
                    encoding="utf-8")


def bench_onnx(path):
    """Print how many tokens a second models exported to ONNX speak, on all cores, one sentence at a time, by turns: the
    one in a folder, or for a config those of random weights of 32 and of 8 bits."""
    if path.is_dir():
        if not (path / "model.onnx").exists():
            raise UserError(f"{path} holds no model.onnx: python export.py --ckpt RUN --onnx {path}")
        return onnx_rates([path])
    from export import export_onnx
    from model import LLM
    from trivox.audio import MelConfig
    from trivox.codecs import MelRVQ

    c = load_settings(path)
    codec = MelRVQ(MelConfig(hop_length=441), torch.zeros(80), [torch.zeros(c.codebook_size, 80)])
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, name) for name in ("float32", "int8")]
        for one in folders:
            torch.manual_seed(0)
            export_onnx(LLM(c).eval(), asdict(c), codec, one, one.name == "int8")
        onnx_rates(folders)


def onnx_rates(folders, codes=200):
    """Print the tokens a second of each of the folders that export.py has written."""
    import numpy as np

    from trivox.speak_onnx import Speaker

    speakers, rates = {}, {folder: [] for folder in folders}
    for folder in folders:
        width = json.loads((folder / "config.json").read_text(encoding="utf-8"))["speaker_width"]
        voice = np.random.default_rng(0).standard_normal(width) if width else None
        speakers[folder] = Speaker(folder, os.cpu_count(), voice)
    for seed, folder in itertools.product(range(5), folders):
        marks = [time.perf_counter()]
        for _ in speakers[folder].codes("the captain painted seven wooden boxes yesterday.", seed, codes):
            marks.append(time.perf_counter())
        rates[folder] += [1 / (b - a) for a, b in zip(marks[1:], marks[2:])]
    for folder, some in rates.items():
        median, best = statistics.median(some), sorted(some)[-len(some) // 10]
        print(f"{folder.name}: median {median:.1f} tokens/s, fastest tenth {best:.1f}, real-time factor "
              f"{speakers[folder].c['frame_rate'] / median:.2f}")


def bench_delta_rule_cpu(repeats=15):
    """Print milliseconds of one forward + backward in float32 of transformers' function and ours, by turns, medians, at
    mild gates and at such as trained models have: on a shared machine only the ratios mean something."""
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid

    from trivox.delta_rule import chunk_gated_delta_rule as ours

    # unwrapped: where fla-core is installed, the name itself is a GPU kernel
    peer = inspect.unwrap(modeling_olmo_hybrid.torch_chunk_gated_delta_rule)
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, median of {repeats}; gates are logsigmoid(N(mean, 1))\n"
          f"{'(B, T, H, K, V)':24s}{'gates':>8s}{'transformers':>15s}{'ours':>11s}{'ratio':>8s}{'its forward':>14s}"
          f"{'ours':>11s}{'ours beside mild':>19s}")
    for B, T, H, K, V in (2, 1024, 6, 48, 96), (1, 2048, 16, 64, 64):
        q, k = torch.randn(B, T, H, K), F.normalize(torch.randn(B, T, H, K), dim=-1)
        v, do, beta, noise = *torch.randn(2, B, T, H, V), 2 * torch.rand(B, T, H), torch.randn(B, T, H)
        inputs = {mean: [x.detach().requires_grad_() for x in (q, k, v, F.logsigmoid(noise + mean), beta)]
                  for mean in (2, -3)}
        took = {(f, mean): [] for mean in inputs for f in (peer, ours)}
        for i in range(repeats + 2):
            for (f, mean), times in took.items():
                start = time.perf_counter()
                o = f(*inputs[mean])[0]
                forward = time.perf_counter()
                torch.autograd.grad(o, inputs[mean], do)
                if i > 1:  # the first two warm up
                    times.append((1e3 * (time.perf_counter() - start), 1e3 * (forward - start)))
        ms = {key: [statistics.median(x) for x in zip(*times)] for key, times in took.items()}
        for mean in inputs:
            (theirs, forward), (mine, my_forward) = ms[peer, mean], ms[ours, mean]
            print(f"{str((B, T, H, K, V)):24s}{mean:8d}{theirs:12.1f} ms{mine:8.1f} ms{theirs / mine:7.2f}x"
                  f"{forward:11.1f} ms{my_forward:8.1f} ms{mine / ms[ours, 2][0]:18.2f}x")


def delta_rule_inputs(B, T, H, K, V, dtype, normalise, gate=None, beta=None):
    """Fresh q, k, v, g, beta of a model's kind, with gradients, and the gradient of the output; g and beta float32."""
    q, k = torch.randn(B, T, H, K, device=DEVICE), torch.randn(B, T, H, K, device=DEVICE)
    k = k if normalise else F.normalize(k, dim=-1)
    g = F.logsigmoid(torch.randn(B, T, H, device=DEVICE) + 2) if gate is None else gate
    beta = 2 * torch.rand(B, T, H, device=DEVICE) if beta is None else beta
    v, do = torch.randn(2, B, T, H, V, device=DEVICE).to(dtype)
    return [x.requires_grad_() for x in (q.to(dtype), k.to(dtype), v, g, beta)], do


def delta_rule_errors(rule, inputs, do, **options):
    """Relative errors of o, dq, dk, dv, dg and dbeta to our chunks in plain PyTorch in float64, which the test suite
    holds to the loop. What `torch.empty` returns is NaN meanwhile."""
    from trivox.delta_rule import chunk_gated_delta_rule

    results = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    for f, x in (chunk_gated_delta_rule, [y.detach().double().requires_grad_() for y in inputs]), (rule, inputs):
        o = f(*x, **options)[0]
        results.append([o, *torch.autograd.grad(o, x, do.to(o.dtype))])
    torch.use_deterministic_algorithms(False)
    floor = 1e-6 * (results[0][0] * do).norm()                                # dg cancels where g << 0
    return {name: ((a - b).norm() / (b.norm().clamp(min=floor) if name == "dg" else b.norm())).item()
            for name, b, a in zip(ERRORS, *results)}


def delta_rule_is_correct(peer, shapes):
    """Print errors and what is wrong with them; returns whether nothing is."""
    from trivox.delta_rule import chunk_gated_delta_rule as ours

    print("relative errors to float64".ljust(34) + "".join(f"{name:>9s}" for name in ERRORS))
    wrong = []
    for *shape, normalise in shapes:
        for dtype in torch.bfloat16, torch.float32:
            rows, (x, do) = {}, delta_rule_inputs(*shape, dtype, normalise)
            for name, rule in ("trivox", ours), ("fla", peer):
                if rule and (name == "trivox" or dtype == torch.bfloat16):
                    rows[name] = delta_rule_errors(rule, x, do, use_qk_l2norm_in_kernel=normalise)
                    print(f"{str(tuple(shape)):24s}{name:8s}{str(dtype)[6:8]}",
                          "".join(f"{error:9.1e}" for error in rows[name].values()))
            for key, error in rows["trivox"].items():
                limit = 1e-4 if dtype == torch.float32 else 2e-2 if key == "o" else 3e-2
                limit = 1.1 * rows["fla"][key] if "fla" in rows else limit
                if not error <= limit:
                    wrong.append(f"{shape} {dtype}: {key} is off by {error:.2e}, may be by {limit:.2e}")
    for _ in range(200):
        depth, share, beta = 10 ** (6 * torch.rand(1).item() - 2), torch.rand(1).item(), 2 * torch.rand(1).item()
        B, T, H, K, V = 1, 200, 2, 64, 32
        gate = -depth * torch.rand(B, T, H, device=DEVICE) * (torch.rand(B, T, H, device=DEVICE) < share)
        x, do = delta_rule_inputs(B, T, H, K, V, torch.bfloat16, False, gate, torch.full_like(gate, beta))
        o = ours(*x)[0]
        if not all(y.isfinite().all() for y in (o, *torch.autograd.grad(o, x, do))):
            wrong.append(f"not finite where g reaches {-depth:.3g} in {share:.0%} of the steps and beta is {beta:.2f}")
    print("\n".join(wrong) if wrong else "errors are within bounds; all finite over 200 random gates")
    return not wrong


def bench_delta_rule_gpu(only_check=False):
    """On a GPU: whether the kernels are right, then medians of `do_bench` in µs beside flash-linear-attention (where
    fla-core is installed), our plain PyTorch and the floor; where it pays to cut time into segments; and the step of
    decoding. Prints, and writes benchmarks/gpu/delta_rule_<gpu>.json after each part. `check` ends after the first
    part, at small sizes: for compute-sanitizer."""
    import triton
    from triton.testing import do_bench

    from trivox import delta_rule
    from trivox import delta_rule_operators as operators

    try:
        from fla.ops.common import chunk_o
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as peer
        # fla-core refuses Hopper with Triton below 3.7.1, which compiles it wrongly: good for times, not for errors
        refused, chunk_o.TRITON_ABOVE_3_7_1 = not chunk_o.TRITON_ABOVE_3_7_1, True
    except ImportError:
        peer, refused = None, False
    ours = delta_rule.chunk_gated_delta_rule
    torch.manual_seed(int(time.time()))
    if only_check:
        if not delta_rule_is_correct(None, [(1, 130, 2, 48, 96, True), (2, 100, 2, 64, 64, False)]):
            raise UserError("the kernels are wrong here: see above")
        return
    shapes = (24, 1024, 6, 48, 96, True), (4, 2048, 16, 64, 64, False), (1, 16384, 16, 64, 64, False)
    right = delta_rule_is_correct(None if refused else peer, shapes)

    gpu = torch.cuda.get_device_name()
    found = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "right": right,
             "fla_refuses_this_triton": refused, "times_us": [], "segments_us": [],
             "command": "python bench.py delta_rule"}

    def microseconds(f, rep=300):
        return 1e3 * do_bench(f, warmup=50, rep=rep, return_mode="median")

    def captured(step, rep=300):
        step()                                                                # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return microseconds(graph.replay, rep)

    def both(rule, x, do, **options):
        def step():
            return torch.autograd.grad(rule(*x, **options)[0], x, do)

        eager = microseconds(lambda: rule(*x, **options)), microseconds(step)
        return eager if delta_rule.PATH == "torch" else (*eager, captured(step))

    much = torch.empty(2**29, dtype=torch.uint8, device=DEVICE)
    bytes_per_us = 2 * much.numel() / microseconds(lambda: much.clone())
    found["copy_TB_per_s"] = bytes_per_us / 1e6
    print(f"\n{gpu}, {bytes_per_us / 1e6:.2f} TB/s in a copy; bfloat16, µs, forward / forward + backward / the same in "
          f"a CUDA graph\n{'':24s}" + "".join(f"{name:>20s}" for name in (
              "trivox", "fla-core", "PyTorch", "floor", "fla-core / trivox")))
    for *shape, normalise in shapes:
        (B, T, H, K, V), (x, do) = shape, delta_rule_inputs(*shape, torch.bfloat16, normalise)
        options, row = dict(use_qk_l2norm_in_kernel=normalise), {"shape": shape}
        floor = B * T * H * (4 * K + 4 * V + 8) / bytes_per_us, B * T * H * (12 * K + 10 * V + 24) / bytes_per_us
        row |= {"trivox": both(ours, x, do, **options), "fla": peer and both(peer, x, do, **options), "floor": floor}
        delta_rule.PATH = "torch"
        row["torch"] = both(ours, x, do, **options)
        delta_rule.PATH = ""
        with torch.profiler.profile() as profile:
            torch.autograd.grad(ours(*x, **options)[0], x, do)
            torch.cuda.synchronize()
        row["kernels"] = {e.key: e.device_time_total for e in profile.key_averages() if e.key.endswith("_kernel")}
        found["times_us"].append(row)
        keep("delta_rule", found)
        cells = [" / ".join(f"{us:.0f}" for us in row[name]) if row[name] else "-"
                 for name in ("trivox", "fla", "torch", "floor")]
        ratio = " / ".join(f"{a / b:.2f}" for a, b in zip(row["fla"], row["trivox"])) if peer else "-"
        print(f"{str(tuple(shape)):24s}" + "".join(f"{cell:>20s}" for cell in (*cells, ratio)))
        print("    " + ", ".join(f"{name[:-7]} {us:.0f}" for name, us in row["kernels"].items()))

    B, T, H, K, V, normalise = shapes[0]
    x, do = delta_rule_inputs(*shapes[0][:5], torch.bfloat16, normalise)
    projection = torch.cat([y.detach().flatten(2) for y in x[:3]], -1).requires_grad_()
    views = [y.unflatten(-1, (H, -1)) for y in projection.split((H * K, H * K, H * V), -1)] + x[3:]
    found["views_us"] = {name: captured(lambda rule=rule: torch.autograd.grad(
        rule(*views, use_qk_l2norm_in_kernel=normalise)[0], views, do)) for name, rule in (
            ("trivox", ours), ("fla", peer)) if rule}
    print(f"{shapes[0][:5]} with q, k and v as slices of one projection, in a CUDA graph: " + ", ".join(
        f"{name} {us:.0f} µs" for name, us in found["views_us"].items()))

    print("\none scan or segments, 16 heads of 64, forward + backward in a CUDA graph, µs (* is what is chosen)\n"
          f"{'':24s}" + "".join(f"{n:>10d}" for n in (1, 2, 4, 8, 16)))
    choose = operators._segments
    for B, T in (1, 2048), (1, 4096), (1, 16384), (1, 65536), (2, 16384), (4, 16384):
        (x, do), times = delta_rule_inputs(B, T, 16, 64, 64, torch.bfloat16, False), {}
        chosen = choose(T // 32, B * 16 * 4, x[0].device)
        for n in sorted({1, 2, 4, 8, 16, chosen}):
            operators._segments = lambda chunks, programs, device: n
            times[n] = captured(lambda: torch.autograd.grad(ours(*x)[0], x, do), 100)
        operators._segments = choose
        found["segments_us"].append({"batch": B, "steps": T, "chosen": chosen, "times": times})
        print(f"B {B}, T {T:<17d}" + "".join(f"{us:10.0f}{'*' if n == chosen else ''}" for n, us in times.items()))

    x, _ = delta_rule_inputs(1, 1, 16, 64, 64, torch.bfloat16, False)
    x, states = [y.detach()[:, 0] for y in x], [torch.zeros(1, 16, 64, 64, device=DEVICE) for _ in range(17)]
    delta_rule.recurrent_step(*x, states[0])                                  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for state in states:
            delta_rule.recurrent_step(*x, state)
    found["step_us_a_layer"] = microseconds(graph.replay) / len(states)
    print(f"\nrecurrent_step, 17 layers of 16 heads of 64 in a CUDA graph: {found['step_us_a_layer']:.2f} µs a layer")

    x, do = delta_rule_inputs(4, 2048, 16, 64, 64, torch.bfloat16, False)
    graph, expected = torch.cuda.CUDAGraph(), [*torch.autograd.grad(ours(*x)[0], x, do)]
    with torch.cuda.graph(graph):
        results = torch.autograd.grad(ours(*x)[0], x, do)
    graph.replay()
    found["captured_equals_eager"] = all(torch.equal(a, b) for a, b in zip(results, expected))
    found["captured_us"] = microseconds(graph.replay)
    print(f"forward + backward of (4, 2048, 16, 64, 64) in a CUDA graph: {found['captured_us']:.0f} µs, results "
          f"{'equal' if found['captured_equals_eager'] else 'DIFFER'}")
    keep("delta_rule", found)
    if not right or not found["captured_equals_eager"]:
        raise UserError("the kernels are wrong here: see above")


def main(argv):
    if argv in (["-h"], ["--help"]):
        return print(__doc__.strip())
    if argv[:1] == ["params"]:
        return params(argv[1:])
    if argv[:1] == ["memory"] and len(argv) > 1:
        return memory(argv[1:])
    if argv[:1] == ["decode"] and len(argv) == 2:
        return decode(argv[1])
    if argv[:1] == ["train"] and len(argv) > 1:
        return [bench_train(path) for path in argv[1:]]
    if argv[:1] == ["llm"] and len(argv) == 2:
        return bench_llm(argv[1])
    if argv[:1] == ["onnx"] and len(argv) == 2:
        return bench_onnx(Path(argv[1]))
    if argv in (["delta_rule"], ["delta_rule", "check"]):
        return bench_delta_rule_gpu(argv[1:] == ["check"]) if torch.cuda.is_available() else bench_delta_rule_cpu()
    raise UserError(__doc__)


if __name__ == "__main__":
    run(main, sys.argv[1:])
