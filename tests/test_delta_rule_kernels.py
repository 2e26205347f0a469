"""delta_rule_kernels.py and delta_rule_operators.py without a GPU: kernels run by Triton's interpreter, and compiled
for every chip (benchmarks/kernels.py does that), each in a process of its own.

    python tests/test_delta_rule_kernels.py interpret | compile    what those processes do, in words

They are compiled, which takes minutes, where RECORD does not hold the hashes of the code as it is, and with --all.
"""
import hashlib
import itertools
import json
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kernels import SHAPES, Shape, build, launches, recorded
from helpers import mend_interpreter, spawn
from trivox import delta_rule
from trivox import delta_rule_operators as operators

ROOT = Path(__file__).parents[1]
CODE = "trivox/delta_rule_kernels.py", "trivox/delta_rule_operators.py"
RECORD = Path(__file__).with_suffix(".sha256")  # of CODE as it was when all of it last compiled as it should
FACTORS = dict(T=[1, 15, 16, 17, 63, 64, 65, 130], K=[16, 48, 64, 96], V=[16, 48, 64, 96], g=[0.0, -20.0, "mixed"],
               beta=[0.0, 1.0, 2.0, "mixed"], packed=[False, True], state=[False, True], dtype=["float32", "bfloat16"],
               heads=[(1, 1), (1, 2), (2, 2)], normalise=[False, True], segments=[1, 3], narrow=[False, True])
NAMES = "o", "state", "dq", "dk", "dv", "dg", "dbeta", "dstate"


def pairwise_cases(seed=19):
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


def run_case(seed, T, K, V, g, beta, packed, state, dtype, heads, normalise, segments, narrow, B=2):
    """The relative error of every result against the float64 loop."""
    torch.manual_seed(seed)
    B, (H, HV) = 1 if packed else B, heads
    ends = torch.tensor([0, T // 3, T // 3, T]) if packed else None
    operators._segments = lambda chunks, programs, device: min(segments, chunks)
    operators._processors = lambda device: 10**6 if narrow else 0
    q, k = torch.randn(B, T, H, K), F.normalize(torch.randn(B, T, H, K) + 2 * torch.randn(B, 1, H, K), dim=-1)
    gates, betas = -3 * torch.rand(B, T, HV) * (torch.rand(B, T, HV) < 0.5), 2 * torch.rand(B, T, HV)
    x = [q, 3 * k if normalise else k, torch.randn(B, T, HV, V), gates if g == "mixed" else torch.full_like(gates, g),
         betas if beta == "mixed" else torch.full_like(betas, beta)]
    x = [y.to(getattr(torch, dtype)) for y in x] + [torch.randn(3 if packed else B, HV, K, V)] * state
    do, dlast = torch.randn(B, T, HV, V).to(x[2].dtype), torch.randn(3 if packed else B, HV, K, V)
    return relative_errors(x, do, dlast, cu_seqlens=ends, use_qk_l2norm_in_kernel=normalise)


def relative_errors(x, do, dlast, **kwargs):
    """Of results and gradients, of the kernels against the float64 loop; x: q, k, v, g, β and maybe a state."""
    results = []
    for rule, to in (delta_rule.recurrent_gated_delta_rule, torch.float64), (delta_rule.chunk_gated_delta_rule, None):
        y = [z.to(to or z.dtype).requires_grad_() for z in x]
        o, last = rule(*y[:5], None, *y[5:] or [None], True, **kwargs)
        gradients = torch.autograd.grad([o, last], y, [do.to(o.dtype), dlast.to(last.dtype)], materialize_grads=True)
        results.append([o, last, *gradients])
    errors = {}
    for name, a, b in zip(NAMES, *results[::-1]):
        # what cancels is measured against what it is made of: dg where g << 0
        norm = max(b.norm().item(), 1e-6 * (results[0][0] * do).norm().item() if name == "dg" else 0.0)
        errors[name] = (a.double() - b).norm().item() / norm if norm else a.norm().item()
    return errors


def one_key(steps=1000, K=32, V=16, beta=1.99):
    """Errors in bfloat16 where one key is repeated and nothing decays, β |k|² being as given: as in silence."""
    torch.manual_seed(0)
    k = F.normalize(torch.randn(1, 1, 1, K), dim=-1).bfloat16().repeat(1, steps, 1, 1)
    q, v, do = (torch.randn(1, steps, 1, n).bfloat16() for n in (K, V, V))
    betas = torch.full((1, steps, 1), beta / k[0, 0, 0].double().square().sum().item())
    return relative_errors([q, k, v, torch.zeros(1, steps, 1), betas], do, torch.zeros(1, 1, K, V))


def hard_gates(B=1, T=128, H=2, K=32, V=32):
    """Errors in float32 where half of the gates let nothing through and the others nearly all: sums of logarithms lose
    the small ones."""
    torch.manual_seed(0)
    g = -0.1 * torch.rand(B, T, H)
    g[:, torch.rand(T) < 0.5] = -27.0
    q, k, v, do = (torch.randn(B, T, H, n) for n in (K, K, V, V))
    return relative_errors([q, F.normalize(k, dim=-1), v, g, 2 * torch.rand(B, T, H)], do, torch.randn(B, H, K, V))


def views(B=2, T=33, H=2, K=16, V=16):
    """For q, k and v that are parts of one tensor, then for some that cannot be taken as they lie, whether results and
    gradients have the bits that contiguous ones give; how many were copied, of those and of these."""
    wide = torch.randn(B, T, H * (2 * K + V))
    parts = [x.unflatten(2, (H, -1)) for x in wide.split([H * K, H * K, H * V], 2)]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]
    g, beta, found = -torch.rand(B, T, H), torch.rand(B, T, H), []
    for x in [y.contiguous() for y in parts], parts, turned:
        y = [z.detach().requires_grad_() for z in (*x, g, beta)]
        o, last = delta_rule.chunk_gated_delta_rule(*y, None, None, True, use_qk_l2norm_in_kernel=True)
        found.append([o, last, *torch.autograd.grad((o * o).sum() + last.sin().sum(), y)])
    assert [operators._rows(x)[1] for x in parts] == [wide.shape[2]] * 3
    assert [operators._rows(x)[1] for x in turned] == [H * K, H * K, H * V]
    copied = [sum(operators._rows(x)[0].data_ptr() != x.data_ptr() for x in xs) for xs in (parts, turned)]
    return [all(map(torch.equal, xs, found[0])) for xs in found[1:]], copied


def guard_interpreter():
    """A kernel may read and write what its launch was given, and nothing beside it, which the interpreter ignores."""
    import numpy as np
    from triton.runtime import interpreter

    builder, launch, given = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__, []

    def launched(self, *args, **kwargs):
        storages = [x.untyped_storage() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        given[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages]
        return launch(self, *args, **kwargs)

    def guarded(access):
        def checked(self, ptrs, *rest):
            mask = rest[1] if access.__name__ == "create_masked_store" else rest[0]
            at = np.asarray(ptrs.data)[np.broadcast_to(mask.data, np.shape(ptrs.data))].astype(np.int64)
            assert sum(((first <= at) & (at < end)).sum() for first, end in set(given)) == at.size, "out of bounds"
            return access(self, ptrs, *rest)
        return checked

    interpreter.GridExecutor.__call__ = launched
    for name in "create_masked_load", "create_masked_store":
        setattr(builder, name, guarded(getattr(builder, name)))


def no_scale():
    """With a scale of 0, which leaves no output: the largest difference of any gradient to the loop's."""
    x = [y.requires_grad_() for y in (*torch.randn(3, 1, 40, 1, 16), -torch.rand(1, 40, 1), torch.rand(1, 40, 1))]
    results = []
    for rule in delta_rule.chunk_gated_delta_rule, delta_rule.recurrent_gated_delta_rule:
        o, last = rule(*x, 0.0, None, True, use_qk_l2norm_in_kernel=True)
        results.append(torch.autograd.grad([o.sum() + last.square().sum()], x))
    return max((a - b).abs().max().item() for a, b in zip(*results))


def interpret():
    """A JSON line for each case, then one for the other things to be seen here."""
    from trivox.delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule, recurrent_step

    mend_interpreter()
    guard_interpreter()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)                                 # fills what is new with NaN
    assert torch.ones(1).new_empty(3).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()
    for n, case in enumerate(pairwise_cases()):
        print(json.dumps(run_case(n, **case)), flush=True)
    operators._segments, operators._processors = (lambda *_: 1), lambda device: 0
    found = {part.__name__: part() for part in (one_key, hard_gates, views, no_scale)}

    def inputs(B=2, T=40, H=1, HV=2, K=16, V=24):
        x = torch.randn(B, T, H, K), F.normalize(torch.randn(B, T, H, K), dim=-1), \
            torch.randn(B, T, HV, V), -torch.rand(B, T, HV), torch.rand(B, T, HV), torch.randn(B, HV, K, V)
        return [y.requires_grad_() for y in x]

    def scalar(rule, x, **kwargs):
        o, last = rule(*x[:5], None, x[5], True, **kwargs)
        return (o * o).sum() + last.sin().sum()

    # as operators: schema, fake and autograd formula agree with what they do, and a compiler traces them unbroken
    x = inputs()
    checks = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"
    torch.library.opcheck(operators.delta_rule_forward, (*x, None, 0.25, True, True), test_utils=checks)
    step = [y.detach()[:, 0] for y in x[:5]] + [x[5].detach().clone()]
    torch.library.opcheck(operators.delta_rule_step, (*step, 0.25, True), test_utils=checks[:1] + checks[2:3])
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
    delta_rule.PATH, operators.kernels.prepare_kernel = "triton", None
    x = [y.detach() for y in inputs(B=1)]
    for wrong in [0, 39], [1, 40], [0, 30, 20, 40]:
        try:
            chunk_gated_delta_rule(*x[:5], cu_seqlens=torch.tensor(wrong))
        except ValueError as error:
            assert str(error).startswith("cu_seqlens is ["), error
        else:
            raise AssertionError(wrong)
    print(json.dumps(found | {"operators": errors}))


TARGETS = 80, 86, 89, 90, 100, 120, "gfx942"
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}     # KiB a program can have
RARE = {"packed": Shape(1, 4096, 6, 48, 96, True, packed=True), "float16": Shape(4, 608, 6, 48, 96, True, "float16"),
        "float32 of 128": Shape(2, 256, 2, 128, 128, dtype="float32"),
        "float32 of 256": Shape(2, 256, 2, 256, 256, dtype="float32")}
CHIPS = dict.fromkeys(SHAPES, TARGETS) | dict.fromkeys(RARE, (80, 86, 90))  # few for what no published model needs
# bytes a thread spills at most, over those chips, compiled by Triton 3.9
SPILLED = {("speech", "prepare"): 0, ("speech", "forward SAVE"): 16, ("speech", "backward"): 112,
           ("speech", "gradients"): 184, ("speech", "forward"): 0, ("speech", "step"): 0,
           ("speech", "forward SAVE narrow"): 0, ("speech", "backward narrow"): 0, ("speech", "forward narrow"): 0,
           ("music", "prepare"): 0, ("music", "forward SAVE"): 24, ("music", "backward"): 16,
           ("music", "gradients"): 112, ("music", "forward"): 8, ("music", "step"): 0,
           ("music", "forward SAVE narrow"): 0, ("music", "backward narrow"): 0, ("music", "forward narrow"): 0,
           ("music", "forward MAP CUT"): 0, ("music", "forward SAVE CUT"): 32, ("music", "backward MAP CUT"): 0,
           ("music", "backward CUT"): 80, ("music", "forward CUT"): 24, ("music", "forward MAP CUT narrow"): 0,
           ("music", "forward SAVE CUT narrow"): 8, ("music", "backward MAP CUT narrow"): 0,
           ("music", "backward CUT narrow"): 0, ("music", "forward CUT narrow"): 16,
           ("packed", "prepare"): 0, ("packed", "forward SAVE"): 32, ("packed", "backward"): 168,
           ("packed", "gradients"): 160, ("packed", "forward SAVE narrow"): 0, ("packed", "backward narrow"): 0,
           ("float16", "prepare"): 0, ("float16", "forward SAVE"): 0, ("float16", "backward"): 88,
           ("float16", "gradients"): 136, ("float16", "forward SAVE narrow"): 0, ("float16", "backward narrow"): 0,
           ("float32 of 128", "prepare"): 0, ("float32 of 128", "forward SAVE"): 560,
           ("float32 of 128", "backward"): 168, ("float32 of 128", "gradients"): 4072,
           ("float32 of 256", "prepare"): 0, ("float32 of 256", "forward SAVE"): 4584,
           ("float32 of 256", "backward"): 0, ("float32 of 256", "gradients"): 6256}
OLDER = {("speech", "gradients"): 384, ("music", "gradients"): 192, ("packed", "gradients"): 336,  # by Triton 3.6
         ("float16", "gradients"): 368, ("float32 of 128", "forward SAVE"): 1032, ("float32 of 256", "gradients"): 6912}
WGMMA = re.compile(r"wgmma|tcgen05\.mma|\b[A-Z]*GMMA|\bUTC[A-Z]*MMA")           # in PTX and in machine code


def variants():
    """{(shape, name): launch}. The names say what is switched on: SAVE for training, CUT for a scan in segments, MAP
    for the launch that finds their maps, narrow for the tiles of a GPU that wide ones would not occupy."""
    found = {}
    for shape, sizes in (SHAPES | RARE).items():
        for segments, processors, grad in itertools.product((1, 4) if shape == "music" else (1,), (0, 10**6),
                                                            (True, False) if shape in SHAPES else (True,)):
            for launch in launches(sizes, processors, segments, grad):
                wide = found.get((shape, launch.name), launch)
                narrow = (wide.constants, wide.options) != (launch.constants, launch.options)
                found[shape, launch.name + " narrow" * narrow] = launch
    return found


def compile_all():
    """A JSON line for each variant and chip: shape, name, chip, registers, bytes spilled, bytes of shared memory, and
    the first match of WGMMA, or null."""
    jobs = [(*key, launch, target) for key, launch in variants().items() for target in CHIPS[key[0]]]

    def compiled(job):
        shape, name, launch, target = job
        *numbers, code = build(launch, target)
        return shape, name, str(target), *numbers, next(iter(WGMMA.findall(code)), None)

    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(compiled, jobs):
            print(json.dumps(row), flush=True)


CASES = pairwise_cases()


@pytest.fixture(scope="module")
def interpreted():
    return spawn(__file__, "interpret", TRITON_INTERPRET="1", TRIVOX_DELTA_RULE="triton")


def test_the_cases_are_few():
    assert len(CASES) <= 40


@pytest.mark.parametrize("n", range(len(CASES)), ids=lambda n: "-".join(map(str, CASES[n].values())))
def test_kernels_equal_the_float64_loop(n, interpreted):
    for name, error in interpreted[n].items():
        tolerance = 1e-4 if CASES[n]["dtype"] == "float32" else 2e-2 if name in ("o", "state") else 3e-2
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def test_operators_compiled_and_not_and_steps(interpreted):
    errors = interpreted[-1]["operators"]
    assert all(error <= 1e-5 for error in errors.values()), errors


def test_one_key_for_a_thousand_steps(interpreted):
    """β |k|² = 1.99 multiplies what S holds for the key by −0.99, and each rounding on the way lives on."""
    for name, error in interpreted[-1]["one_key"].items():
        limit = {"state": 0.01, "dk": 0.01, "dg": 0.05, "dbeta": 0.05}.get(name, 0.03)
        assert error <= limit, f"{name}: relative error {error:.1e}"


def test_gates_that_let_nothing_through(interpreted):
    errors = interpreted[-1]["hard_gates"]
    assert all(error <= 1e-5 for error in errors.values()), errors


def test_a_scale_of_nothing(interpreted):
    assert interpreted[-1]["no_scale"] <= 1e-5


def test_views_are_not_copied(interpreted):
    """q, k and v that are parts of one projection; what has its heads before its steps is, and is right too."""
    assert interpreted[-1]["views"] == [[True, True], [0, 3]]


def test_a_step_fits_the_grid():
    """Whose second and third axes end at 65,535: 4,096 sequences of 16 heads are more programs."""
    if operators.kernels.triton is None:
        pytest.skip("there is no Triton here")
    B, HV, K, V = 4096, 16, 256, 256
    q, k, v, g, beta, state = (torch.empty(B, HV, *n, device="meta") for n in ([K], [K], [V], [], [], [K, V]))
    with recorded() as calls:
        operators._step(q, k, v, g, beta, state, 1.0, True)
    (launch,) = calls
    assert launch.grid[0] == B * HV > max(launch.grid[1:]) * 100 and launch.grid[1] * launch.constants["BV"] >= V


def hashes():
    """What sha256sum writes about CODE."""
    return "".join(f"{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}  {name}\n" for name in CODE)


def test_every_variant_fits_every_chip(tmp_path, capsys, request):
    """In shared memory, spills no more than before, and multiplies matrices by mma.sync alone: with wgmma, Triton
    before 3.7.1 compiles a transposed accumulator wrongly. What has compiled so is recorded, and is then skipped."""
    compiled = RECORD.exists() and RECORD.read_text() == hashes()
    if compiled and not request.config.getoption("--all"):
        pytest.skip("the kernels are those that compiled before: ./run.sh test --all compiles them again")
    rows = spawn(__file__, "compile", TRITON_CACHE_DIR=str(tmp_path))
    variants = dict.fromkeys((shape, name) for shape, name, *_ in rows)
    found = {(shape, name, target): numbers for shape, name, target, *numbers in rows}
    with capsys.disabled():
        print("\nregisters / bytes spilled / bytes shared", *(f"{target:>15}" for target in TARGETS))
        for variant in variants:
            cells = ("/".join(map(str, found.get((*variant, str(target)), "–")[:3])) for target in TARGETS)
            print(f"{' '.join(variant):40}", *(f"{cell:>15}" for cell in cells))
    old = tuple(map(int, operators.kernels.triton.__version__.split(".")[:2])) < (3, 9)
    budgets = SPILLED | (OLDER if old else {})
    assert set(variants) == set(SPILLED) and len(rows) == len(found) == sum(len(CHIPS[shape]) for shape, _ in SPILLED)
    for (shape, name, target), (_, spilled, shared, other) in found.items():
        limit = SHARED[int(target) if target.isdigit() else target]
        assert shared <= limit * 1024, f"{name} takes {shared} bytes of shared memory, {target} has {limit} KiB"
        assert spilled <= budgets[shape, name], f"{name} spills {spilled} bytes on {target}"
        assert other is None, f"{name} has {other} on {target}"
    assert compiled, f"all is well; record that: sha256sum {' '.join(CODE)} > {RECORD.relative_to(ROOT)}"


if __name__ == "__main__":
    sys.exit({"interpret": interpret, "compile": compile_all}[sys.argv[1]]())
