"""The chunk-wise gated delta rule against the plain loop in float64, against transformers, and against itself."""
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from trivox import delta_rule
from trivox.delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule

NAMES = "o", "state", "dq", "dk", "dv", "dg", "dbeta", "dstate"
GATES = {
    "none": lambda *s: torch.zeros(s), "soft": lambda *s: -0.1 * torch.rand(s), "-5": lambda *s: torch.full(s, -5.0),
    "-20": lambda *s: torch.full(s, -20.0), "mixed": lambda *s: -20 * torch.rand(s) * (torch.rand(s) < 0.5),
    "resets": lambda *s: torch.where(torch.rand(s) < 0.1, -1e4, -torch.rand(s)),
}


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch):
    """Several segments even in small tests; and one thread, since on a busy machine a second one only waits here."""
    monkeypatch.setattr(delta_rule, "CPU_ROWS", 800)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(B, T, H, HV, K, V, gate="soft", beta=None, N=None, dtype=torch.float32):
    """q, k (unit length, half of each pointing one way, as speech does in a pause), v, g, beta, initial_state."""
    q, k = torch.randn(B, T, H, K), F.normalize(torch.randn(B, T, H, K) + 2 * torch.randn(B, 1, H, K), dim=-1)
    beta = 2 * torch.rand(B, T, HV) if beta is None else torch.full((B, T, HV), beta)
    x = q, k, torch.randn(B, T, HV, V), GATES[gate](B, T, HV), beta, torch.randn(B if N is None else N, HV, K, V)
    return [y.to(dtype) for y in x]


def everything(rule, q, k, v, g, beta, state, weights=None, dtype=None, **kwargs):
    """Output, final state and the gradients of a random projection of both; `weights` makes it the same projection."""
    x = [y if y is None else y.detach().to(dtype or y.dtype).requires_grad_() for y in (q, k, v, g, beta, state)]
    o, last = rule(*x[:5], initial_state=x[5], output_final_state=True, **kwargs)
    do, dlast = weights or (torch.randn_like(v), torch.randn(last.shape))
    loss = (o.to(last.dtype) * do).sum() + (last * dlast).sum()
    return [o, last, *torch.autograd.grad(loss, [y for y in x if y is not None], materialize_grads=True)], (do, dlast)


def assert_close(result, reference, do=None, tolerance=5e-5):
    for name, a, b in zip(NAMES, result, reference):
        # dg cancels where g << 0: what is left of it there is measured against what it was made of
        floor = 1e-6 * (reference[0] * do).norm() if name == "dg" and do is not None else 0.0
        error = (a - b).norm() / torch.clamp(b.norm(), min=floor) if b.norm() + floor else a.norm()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("T", [1, 15, 16, 17, 32, 63, 64, 65, 130, 257])
@pytest.mark.parametrize("gate, beta", [*((g, None) for g in GATES), ("none", 2.0), ("-20", 2.0)])
def test_chunks_equal_the_float64_loop(T, gate, beta):
    torch.manual_seed(T)
    for H, HV, K, V, carried in (2, 2, 48, 24, True), (1, 3, 7, 33, False):
        *x, state = make(2, T, H, HV, K, V, gate, beta)
        state = state if carried else None
        reference, weights = everything(recurrent_gated_delta_rule, *x, state, dtype=torch.float64)
        assert_close(everything(chunk_gated_delta_rule, *x, state, weights)[0], reference, weights[0])


def test_the_gpu_setting_equals_the_float64_loop():
    torch.manual_seed(0)
    q, k, v, g, beta, state = x = make(2, 150, 2, 4, 16, 24, "mixed", 2.0)

    def chunks_of_64(q, k, v, g, beta, initial_state, output_final_state):
        return delta_rule._Chunks.apply(q, k, v, g[..., None], beta[..., None], initial_state, 0.25, False, 64, [2] * 3)

    reference, weights = everything(recurrent_gated_delta_rule, *x, dtype=torch.float64)
    assert_close(everything(chunks_of_64, *x, weights)[0], reference, weights[0])


@pytest.mark.parametrize("normalise", [False, True])
def test_gradcheck(normalise):
    torch.manual_seed(0)
    ends = torch.tensor([0, 1, 1, 35])
    x = [y.requires_grad_() for y in make(1, 35, 1, 2, 2, 1, "mixed", N=3, dtype=torch.float64)]
    x[0].data *= 3
    assert torch.autograd.gradcheck(lambda *x: chunk_gated_delta_rule(
        *x[:5], 0.7, x[5], True, cu_seqlens=ends, use_qk_l2norm_in_kernel=normalise), x, atol=1e-7)


@pytest.mark.parametrize("T", [1, 64, 200])
@pytest.mark.parametrize("normalise", [False, True])
def test_equals_transformers(T, normalise):
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid
    peer = inspect.unwrap(modeling_olmo_hybrid.torch_chunk_gated_delta_rule)
    torch.manual_seed(T)
    x = make(2, T, 2, 4, 24, 16)
    reference, weights = everything(peer, *x, use_qk_l2norm_in_kernel=normalise)
    assert_close(everything(chunk_gated_delta_rule, *x, weights, use_qk_l2norm_in_kernel=normalise)[0], reference)


@pytest.mark.parametrize("rule, rows", [(chunk_gated_delta_rule, 200), (chunk_gated_delta_rule, 1000),
                                        (recurrent_gated_delta_rule, None)])
def test_packed_equals_each_alone(rule, rows, monkeypatch):
    monkeypatch.setattr(delta_rule, "CPU_ROWS", rows)
    torch.manual_seed(0)
    ends = [0, 5, 70, 70, 110, 111, 240, 240]
    *x, states = make(1, 240, 1, 2, 8, 12, "mixed", N=len(ends) - 1)
    packed, (do, dlast) = everything(rule, *x, states, cu_seqlens=torch.tensor(ends))
    alone = [everything(rule, *(y[:, a:b] for y in x), states[n:n + 1], (do[:, a:b], dlast[n:n + 1]))[0]
             for n, (a, b) in enumerate(itertools.pairwise(ends))]
    dims = (0 if "state" in name else 1 for name in NAMES)
    assert_close(packed, [torch.cat(parts, dim) for parts, dim in zip(zip(*alone), dims)], tolerance=2e-6)


def test_a_carried_state_joins_two_halves():
    torch.manual_seed(0)
    *x, state = make(2, 150, 2, 2, 16, 16)
    whole = chunk_gated_delta_rule(*x, initial_state=state, output_final_state=True)
    first, middle = chunk_gated_delta_rule(*(y[:, :77] for y in x), initial_state=state, output_final_state=True)
    second, last = chunk_gated_delta_rule(*(y[:, 77:] for y in x), initial_state=middle, output_final_state=True)
    assert_close([torch.cat([first, second], 1), last], whole, tolerance=2e-6)


@pytest.mark.parametrize("depth", [-20.0, -1e4, -float("inf")])
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_extreme_gates_stay_finite(depth, share):
    torch.manual_seed(0)
    x = make(1, 100, 1, 2, 16, 16)
    x[3] = torch.where(torch.rand(x[3].shape) < share, depth, x[3])
    assert all(y.isfinite().all() for y in everything(chunk_gated_delta_rule, *x)[0])


def test_dtypes_and_autocast():
    torch.manual_seed(0)
    x = make(2, 70, 2, 2, 16, 16)
    half = [y.bfloat16() for y in x[:5]] + x[5:]
    reference, weights = everything(chunk_gated_delta_rule, *(y.float() for y in half))
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = everything(chunk_gated_delta_rule, *half, weights)
    assert [y.dtype for y in result] == [torch.bfloat16, torch.float32] + [torch.bfloat16] * 5 + [torch.float32]
    assert_close([y.float() for y in result], reference, tolerance=4e-3)         # one rounding to bfloat16
    assert_close(result[1:2], reference[1:2], tolerance=1e-6)                    # none in the state


def test_saves_for_backward_what_the_docstring_says():
    B, T, H, K, V, C = 2, 64, 3, 16, 24, 32
    x, saved = [y.requires_grad_() for y in make(B, T, H, H, K, V)[:5]], {}
    with saved_tensors_hooks(lambda y: saved.setdefault(y.untyped_storage().data_ptr(), y), lambda y: y):
        chunk_gated_delta_rule(*x)
    known = {y.data_ptr() for y in x}
    floats = sum(y.untyped_storage().nbytes() // 4 for pointer, y in saved.items() if pointer not in known)
    assert floats == B * T * H * (C + V + K * V // C)


@pytest.mark.parametrize("name, change", [
    ("q", dict(q=torch.zeros(2, 6, 4))), ("v", dict(v=torch.zeros(2, 6, 4))),
    ("k", dict(k=torch.zeros(2, 6, 2, 5))), ("k", dict(k=torch.zeros(2, 7, 2, 4))),
    ("v", dict(v=torch.zeros(2, 7, 4, 3))), ("v", dict(v=torch.zeros(2, 6, 3, 3))),
    ("v", dict(v=torch.zeros(2, 6, 4, 257))), ("v", dict(v=torch.zeros(2, 6, 4, 0))),
    ("q", dict(q=torch.zeros(2, 6, 2, 257), k=torch.zeros(2, 6, 2, 257))), ("q", dict(q=torch.zeros(2, 6, 2, 0))),
    ("g", dict(g=torch.zeros(2, 6, 2))), ("beta", dict(beta=torch.zeros(2, 6, 4, 1))),
    ("initial_state", dict(initial_state=torch.zeros(3, 4, 4, 3))),
    ("cu_seqlens", dict(cu_seqlens=torch.tensor([0, 6]))),
    *(("cu_seqlens", dict(cu_seqlens=torch.tensor(ends), batch=1))
      for ends in ([1, 6], [0, 5], [0, 4, 2, 6], [0], [0, 7])),
    ("initial_state", dict(cu_seqlens=torch.tensor([0, 2, 6]), initial_state=torch.zeros(1, 4, 4, 3), batch=1)),
])
@pytest.mark.parametrize("rule", [chunk_gated_delta_rule, recurrent_gated_delta_rule])
def test_bad_input_is_named(rule, name, change):
    B = change.get("batch", 2)
    good = dict(q=torch.zeros(B, 6, 2, 4), k=torch.zeros(B, 6, 2, 4), v=torch.zeros(B, 6, 4, 3),
                g=torch.zeros(B, 6, 4), beta=torch.zeros(B, 6, 4))
    with pytest.raises(ValueError, match=rf"^{name} is .*, but must be "):
        rule(**good | {key: x for key, x in change.items() if key != "batch"})


def test_unknown_arguments_are_named():
    *x, _ = make(1, 4, 1, 1, 4, 4)
    with pytest.raises(TypeError, match="head_first"):
        chunk_gated_delta_rule(*x, head_first=True)


@pytest.mark.parametrize("rule", [chunk_gated_delta_rule, recurrent_gated_delta_rule])
def test_no_steps_leave_the_state_alone(rule):
    *x, state = make(2, 0, 1, 2, 4, 3)
    o, last = rule(*x, initial_state=state, output_final_state=True)
    assert o.shape == (2, 0, 2, 3) and torch.equal(last, state)


@pytest.mark.parametrize("name, change", [
    ("state", dict(state=torch.zeros(2, 4, 3, 4))), ("state", dict(state=torch.zeros(2, 4, 4, 3).double())),
    ("state", dict(state=torch.zeros(2, 4, 3, 4).mT)), ("g", dict(g=torch.zeros(2, 2))),
    ("k", dict(k=torch.zeros(2, 4, 4))),
])
def test_bad_input_of_a_step_is_named(name, change):
    good = dict(q=torch.zeros(2, 2, 4), k=torch.zeros(2, 2, 4), v=torch.zeros(2, 4, 3), g=torch.zeros(2, 4),
                beta=torch.zeros(2, 4), state=torch.zeros(2, 4, 4, 3))
    delta_rule.recurrent_step(**good)
    with pytest.raises(ValueError, match=rf"^{name} is .*, but must be "):
        delta_rule.recurrent_step(**good | change)
