"""delta_rule_triton.py without a GPU: its kernels run by Triton's interpreter, and compiled for every chip, each in a
process of its own.

    python tests/test_delta_rule_triton.py interpret | compile    what those processes do, in words

They are compiled, which takes minutes, where RECORD does not hold the hashes of the code as it is, and with --all.
"""
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = "trivox/delta_rule.py", "trivox/delta_rule_triton.py"
RECORD = Path(__file__).with_suffix(".sha256")  # of CODE as it was when all of it last compiled as it should
FACTORS = dict(T=[1, 15, 16, 17, 63, 64, 65, 130], K=[16, 48, 64, 96], V=[16, 48, 64, 96], g=[0.0, -20.0, "mixed"],
               beta=[0.0, 1.0, 2.0, "mixed"], packed=[False, True], state=[False, True], dtype=["float32", "bfloat16"],
               heads=[(1, 1), (1, 2), (2, 2)], normalise=[False, True], segments=[1, 3])
NAMES = "o", "state", "dq", "dk", "dv", "dg", "dbeta", "dstate"


def pairwise_cases(seed=7):
    """Cases in which every two values of two factors meet, each case the best of 30 random ones for what it costs."""
    def cost(T, packed, dtype, heads, **_):
        return heads[1] * -(-T // 16) * (1 if packed else 2) * (2 if dtype == "bfloat16" else 1)

    draw, names = random.Random(seed), list(FACTORS)
    left = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in FACTORS[a] for y in FACTORS[b]}
    cases = []
    while left:
        first = draw.choice(sorted(left, key=str))
        drawn = [{n: draw.choice(FACTORS[n]) for n in names} | dict([first[:2], first[2:]]) for _ in range(30)]
        met = [{(a, c[a], b, c[b]) for a, b in itertools.combinations(names, 2)} & left for c in drawn]
        best = max(range(30), key=lambda n: len(met[n]) / (40 + cost(**drawn[n])))
        left -= met[best]
        cases.append(drawn[best])
    return cases


def run_case(seed, T, K, V, g, beta, packed, state, dtype, heads, normalise, segments, B=2, device="cpu"):
    """The relative error of every result against the float64 loop."""
    import torch
    import torch.nn.functional as F

    from trivox import delta_rule, delta_rule_triton

    torch.manual_seed(seed)
    B, (H, HV) = 1 if packed else B, heads
    ends = torch.tensor([0, T // 3, T // 3, T]) if packed else None
    delta_rule_triton._segments = lambda chunks, programs, device: min(segments, chunks)
    q, k = torch.randn(B, T, H, K), F.normalize(torch.randn(B, T, H, K) + 2 * torch.randn(B, 1, H, K), dim=-1)
    gates, betas = -3 * torch.rand(B, T, HV) * (torch.rand(B, T, HV) < 0.5), 2 * torch.rand(B, T, HV)
    x = [q, 3 * k if normalise else k, torch.randn(B, T, HV, V), gates if g == "mixed" else torch.full_like(gates, g),
         betas if beta == "mixed" else torch.full_like(betas, beta)]
    x = [y.to(getattr(torch, dtype)) for y in x] + [torch.randn(3 if packed else B, HV, K, V)] * state
    do, dlast = torch.randn(B, T, HV, V).to(x[2].dtype), torch.randn(3 if packed else B, HV, K, V)

    results = []
    for rule, to in (delta_rule.recurrent_gated_delta_rule, torch.float64), (delta_rule.chunk_gated_delta_rule, None):
        y = [z.to(to or z.dtype).requires_grad_() for z in x]
        o, last = rule(*y[:5], None, y[5] if state else None, True, cu_seqlens=ends, use_qk_l2norm_in_kernel=normalise)
        gradients = torch.autograd.grad([o, last], y, [do.to(o.dtype), dlast.to(last.dtype)], materialize_grads=True)
        results.append([o, last, *gradients])
    errors = {}
    for name, a, b in zip(NAMES, *results[::-1]):
        # what cancels is measured against what it is made of: dg where g << 0
        norm = max(b.norm().item(), 1e-6 * (results[0][0] * do).norm().item() if name == "dg" else 0.0)
        errors[name] = (a.double() - b).norm().item() / norm if norm else a.norm().item()
    return errors


def mend_interpreter():
    """It cuts float32 off to bfloat16 instead of rounding, and multiplies bfloat16 matrices as integers.
    Triton 3.6's, beside numpy 2.4, also fails to make an int of a scalar."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    patch = interpreter._patch_lang_tensor

    def rounded(x, source, target, mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(x).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(x).view(np.uint32)
            return np.where(np.isnan(x), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return convert(x, source, target, mode)

    def widened(self, *matrices):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in matrices[:2])
        return dot(self, a, b, *matrices[2:])

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = rounded, widened
    interpreter._patch_lang_tensor = patched


def interpret():
    """A JSON line for each case, then for each of the other things to be seen here."""
    import torch

    from trivox import delta_rule, delta_rule_triton
    from trivox.delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule, recurrent_step

    mend_interpreter()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)                                 # fills what is new with NaN
    assert torch.ones(1).new_empty(3).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()
    for n, case in enumerate(pairwise_cases()):
        print(json.dumps(run_case(n, **case)), flush=True)

    def inputs(B=2, T=40, H=1, HV=2, K=16, V=24):
        x = torch.randn(B, T, H, K), torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1), \
            torch.randn(B, T, HV, V), -torch.rand(B, T, HV), torch.rand(B, T, HV), torch.randn(B, HV, K, V)
        return [y.requires_grad_() for y in x]

    def scalar(rule, x, **kwargs):
        o, last = rule(*x[:5], None, x[5], True, **kwargs)
        return (o * o).sum() + last.sin().sum()

    # as operators: schema, fake and autograd formula agree with what they do, and a compiler traces them unbroken
    delta_rule_triton._segments = lambda chunks, programs, device: 1
    x = inputs()
    checks = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"
    torch.library.opcheck(delta_rule_triton.delta_rule_forward, (*x, None, 0.25, True, True), test_utils=checks)
    step = [y.detach()[:, 0] for y in x[:5]] + [x[5].detach().clone()]
    torch.library.opcheck(delta_rule_triton.delta_rule_step, (*step, 0.25, True), test_utils=checks[:1] + checks[2:3])
    errors = {}
    for name, T, kwargs in ("compiled", 40, {}), ("compiled, packed", 40, dict(cu_seqlens=torch.tensor([0, 7, 40]))):
        compiled = torch.compile(lambda x: scalar(chunk_gated_delta_rule, x, **kwargs), backend="aot_eager",
                                 fullgraph=True)
        for T in 40, 70:                                                     # the second time with T as a symbol
            x = inputs(B=1, T=T)
            if kwargs:
                x[5], kwargs["cu_seqlens"] = torch.randn(2, 2, 16, 24, requires_grad=True), torch.tensor([0, 7, T])
            a, b = (torch.autograd.grad(f(x), x)
                    for f in (compiled, lambda x: scalar(recurrent_gated_delta_rule, x, **kwargs)))
            errors[f"{name}, {T} steps"] = max(((c - d).norm() / d.norm()).item() for c, d in zip(a, b))
    q, k, v, g, beta, state = (y.detach() for y in inputs(T=5))
    o, last = recurrent_gated_delta_rule(q, k, v, g, beta, None, state, True, use_qk_l2norm_in_kernel=True)
    compiled = torch.compile(recurrent_step, backend="aot_eager", fullgraph=True)
    for name, path, f in ("", "triton", recurrent_step), (" in torch", "torch", recurrent_step), \
            (" compiled", "triton", compiled):
        delta_rule.PATH, S = path, state.clone()
        steps = [f(*(y[:, t] for y in (q, k, v, g, beta)), S, use_qk_l2norm_in_kernel=True) for t in range(5)]
        errors["step" + name] = max((torch.stack(steps, 1) - o).abs().max().item(), (S - last).abs().max().item())

    # what is only known on the device is wrong before any launch
    delta_rule.PATH, delta_rule_triton._prepare_kernel = "triton", None
    x = [y.detach() for y in inputs(B=1)]
    for wrong in [0, 39], [1, 40], [0, 30, 20, 40]:
        try:
            chunk_gated_delta_rule(*x[:5], cu_seqlens=torch.tensor(wrong))
        except ValueError as error:
            assert str(error).startswith("cu_seqlens is ["), error
        else:
            raise AssertionError(wrong)
    print(json.dumps(errors))


TARGETS = 80, 86, 89, 90, 100, 120, "gfx942"
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}     # KiB a program can have
# bytes a thread spills at most, over all chips: what the caps of `_settings` on registers cost
SPILLED = {("speech", "prepare"): 0, ("speech", "forward SAVE"): 80, ("speech", "forward"): 24,
           ("speech", "backward"): 96, ("speech", "gradients"): 280, ("speech", "step"): 0,
           ("music", "prepare"): 0, ("music", "forward SAVE"): 72, ("music", "forward"): 24,
           ("music", "backward"): 120, ("music", "gradients"): 128, ("music", "step"): 0,
           ("music", "forward MAP CUT"): 0, ("music", "forward SAVE CUT"): 64, ("music", "forward CUT"): 40,
           ("music", "backward MAP CUT"): 40, ("music", "backward CUT"): 144}
SHAPES = {"speech": (24, 608, 6, 48, 96, True), "music": (4, 2048, 16, 64, 64, False)}


def launches(shape, segments, grad=True):
    """What the host code launches for a model's shape: (name, kernel, signature, constants, attributes, options). It
    runs for true, on a CPU; only the kernels are replaced, by what writes down how they are called."""
    import inspect

    import torch

    from trivox import delta_rule, delta_rule_triton

    calls, B, T, H, K, V, normalise = [], *shape
    kernels = {name: kernel for name, kernel in vars(delta_rule_triton).items() if name.endswith("_kernel")}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return self

        def __call__(self, *args, num_warps, num_stages=3, maxnreg=None, **kwargs):
            function = kernels[self.name].fn
            arguments = inspect.signature(function).bind(*args, **kwargs).arguments
            signature, constants, attributes = {}, {}, {}
            for n, (name, x) in enumerate(arguments.items()):
                if isinstance(x, torch.Tensor):
                    signature[name] = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}[x.dtype]
                elif x is None or "constexpr" in str(function.__annotations__.get(name)):
                    signature[name], constants[name] = "constexpr", x
                else:
                    signature[name] = "i32" if isinstance(x, int) else "fp32"
                if isinstance(x, torch.Tensor) or signature[name] == "i32" and x % 16 == 0:
                    attributes[n,] = [["tt.divisibility", 16]]
            modes = [name for name in ("MAP", "SAVE") if constants.get(name)] + ["CUT"] * (segments > 1)
            name = " ".join([self.name[1:-len("_kernel")], *modes]) if self.name != "_step_kernel" else "step"
            calls.append((name, kernels[self.name], signature, constants, attributes,
                          dict(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)))

    delta_rule_triton._segments = lambda chunks, programs, device: segments
    delta_rule.PATH = "triton"
    x = [torch.empty(B, T, H, n, dtype=torch.bfloat16, requires_grad=grad) for n in (K, K, V)]
    x += [torch.empty(B, T, H, requires_grad=grad) for _ in range(2)]
    try:
        vars(delta_rule_triton).update({name: Recorder(name) for name in kernels})
        o, _ = delta_rule.chunk_gated_delta_rule(*x, use_qk_l2norm_in_kernel=normalise)
        if grad:
            o.sum().backward()
        elif segments == 1:
            delta_rule.recurrent_step(*(y[:, 0].contiguous() for y in x), torch.empty(B, H, K, V),
                                      use_qk_l2norm_in_kernel=normalise)
    finally:
        vars(delta_rule_triton).update(kernels)
    return calls


def build(shape, call, target):
    """A row: shape, kernel, target, registers, bytes spilled, bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, kernel, signature, constants, attributes, options = call
    chip = GPUTarget("hip", target, 64) if isinstance(target, str) else GPUTarget("cuda", target, 32)
    options = {key: x for key, x in options.items() if key != "maxnreg" or x and chip.backend == "cuda"}
    built = triton.compile(ASTSource(kernel, signature, constants, attributes), target=chip, options=options)
    if isinstance(target, str):
        registers, spilled = (int(re.search(rf"\.{field}:\s+(\d+)", built.asm["amdgcn"])[1])
                              for field in ("vgpr_count", "private_segment_fixed_size"))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    return shape, name, str(target), registers, spilled, built.metadata.shared


def compile_all():
    """A JSON line for each kernel, model and chip; the names say what is switched on: SAVE for training, CUT for a scan
    in segments, MAP for the launch that finds their maps."""
    calls = {}
    for shape, sizes in SHAPES.items():
        for segments, grad in itertools.product((1, 4) if shape == "music" else (1,), (True, False)):
            for call in launches(sizes, segments, grad):
                if segments == 1 or call[0].startswith(("forward", "backward")):
                    calls[shape, call[0]] = call
    jobs = [(shape, call, target) for (shape, _), call in calls.items() for target in TARGETS]
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(lambda job: build(*job), jobs):
            print(json.dumps(row), flush=True)


CASES = pairwise_cases()


@pytest.fixture(scope="module")
def interpreted():
    return [json.loads(line) for line in spawn("interpret", TRITON_INTERPRET="1", TRIVOX_DELTA_RULE="triton")]


def spawn(what, **environment):
    """The lines that a process of its own prints."""
    if sys.platform != "linux":
        pytest.skip("Triton is for Linux")
    run = subprocess.run([sys.executable, __file__, what], cwd=ROOT, text=True, capture_output=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return run.stdout.splitlines()


def test_the_cases_are_few():
    assert len(CASES) <= 40


@pytest.mark.parametrize("n", range(len(CASES)), ids=lambda n: "-".join(map(str, CASES[n].values())))
def test_kernels_equal_the_float64_loop(n, interpreted):
    for name, error in interpreted[n].items():
        tolerance = 1e-4 if CASES[n]["dtype"] == "float32" else 2e-2 if name in ("o", "state") else 3e-2
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def test_operators_compiled_and_not_and_steps(interpreted):
    assert all(error <= 1e-5 for error in interpreted[-1].values()), interpreted[-1]


def hashes():
    """What sha256sum writes about CODE."""
    return "".join(f"{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}  {name}\n" for name in CODE)


def test_every_variant_fits_every_chip(tmp_path, capsys, request):
    """In shared memory, and spilling no more than before. What has compiled so is recorded, and is then skipped."""
    recorded = RECORD.exists() and RECORD.read_text() == hashes()
    if recorded and not request.config.getoption("--all"):
        pytest.skip("the kernels are those that compiled before: ./run.sh test --all compiles them again")
    rows = [json.loads(line) for line in spawn("compile", TRITON_CACHE_DIR=str(tmp_path))]
    variants = dict.fromkeys((shape, name) for shape, name, *_ in rows)
    found = {(shape, name, target): numbers for shape, name, target, *numbers in rows}
    with capsys.disabled():
        print("\nregisters / bytes spilled / bytes shared", *(f"{target:>15}" for target in TARGETS))
        for variant in variants:
            print(f"{' '.join(variant):40}", *("{:>15}".format("/".join(map(str, found[*variant, str(target)])))
                                               for target in TARGETS))
    assert len(rows) == len(found) == len(TARGETS) * len(SPILLED) and set(variants) == set(SPILLED)
    for (shape, name, target), (_, spilled, shared) in found.items():
        limit = SHARED[int(target) if target.isdigit() else target]
        assert shared <= limit * 1024, f"{name} takes {shared} bytes of shared memory, {target} has {limit} KiB"
        assert spilled <= SPILLED[shape, name], f"{name} spills {spilled} bytes on {target}"
    assert recorded, f"all is well; record that: sha256sum {' '.join(CODE)} > {RECORD.relative_to(ROOT)}"


if __name__ == "__main__":
    sys.exit({"interpret": interpret, "compile": compile_all}[sys.argv[1]]())
