"""The chunk-wise gated delta rule against the plain loop in float64, against transformers, and against itself."""
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from trivox import delta_rule
from trivox.delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule, recurrent_step

NAMES = "o", "state", "dq", "dk", "dv", "dg", "dbeta", "dstate"
GATES = {
    "none": lambda *s: torch.zeros(s), "soft": lambda *s: -0.1 * torch.rand(s), "-5": lambda *s: torch.full(s, -5.0),
    "-20": lambda *s: torch.full(s, -20.0), "mixed": lambda *s: -20 * torch.rand(s) * (torch.rand(s) < 0.5),
    "resets": lambda *s: torch.where(torch.rand(s) < 0.1, -1e4, -torch.rand(s)),
    "trained": lambda *s: F.logsigmoid(torch.randn(s) - 3),
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
        return delta_rule._Chunks.apply(q, k, v, g[..., None], beta[..., None], initial_state, 0.25, False, 64,
                                        [[2] * 3])

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
                                        (recurrent_gated_delta_rule, 1)])
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


@pytest.mark.parametrize("dtype, T, tolerance", [(torch.float32, 90, 3e-6), (torch.float64, 600, 1e-12)])
def test_decays_are_kept_down_to_the_least(dtype, T, tolerance):
    """A state of 1 that is only forgotten, and read each time: o_t = exp(g_1 + … + g_t), to 1e-20, in float64 1e-154;
    its gradient is the sum of all o, and that of g_t the sum of those from t on."""
    torch.manual_seed(0)
    one, g = torch.ones(1, T, 1, 1, dtype=dtype), (-torch.rand(1, T, 1, dtype=dtype)).requires_grad_()
    S = torch.ones(1, 1, 1, 1, dtype=dtype, requires_grad=True)
    o = chunk_gated_delta_rule(one, one, one, g, torch.zeros_like(g), 1.0, S)[0]
    dg, dS = torch.autograd.grad(o.sum(), (g, S))
    exact = g.detach().double().cumsum(1).exp().flatten()
    assert exact.min() < (1e-19 if dtype == torch.float32 else 1e-120)
    for result, expected in (o, exact), (dS, exact.sum()), (dg, exact.flip(0).cumsum(0).flip(0)):
        torch.testing.assert_close(result.double().flatten(), expected.flatten(), rtol=tolerance,
                                   atol=1e-20 if dtype == torch.float32 else 1e-154)


def test_trained_gates_make_no_denormals():
    """For each of which a CPU takes a hundred times as long: none in any result of any operator, there and back."""
    found = {}

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if not function.is_view and "empty" not in str(function):         # those are yet to be written
                for x in result if isinstance(result, tuple) else [result]:
                    if isinstance(x, torch.Tensor) and x.is_floating_point():
                        few = (x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)
                        found[str(function)] = found.get(str(function), 0) + few.sum().item()
            return result

    torch.manual_seed(0)
    with Look():
        everything(chunk_gated_delta_rule, *make(2, 150, 1, 2, 16, 24, "trained"))
    assert "aten.baddbmm_.default" in found and {function: n for function, n in found.items() if n} == {}


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
    *((name, {name: x}) for name in ("q", "k", "v") for x in (
        torch.zeros(2, 6, 2, 4).long(), torch.zeros(2, 6, 2, 4).numpy(), torch.zeros(2, 6, 2, 4).tolist(), None)),
    *((name, {name: x}) for name in ("g", "beta") for x in (
        torch.zeros(2, 6, 4).int(), torch.zeros(2, 6, 4) > 0, torch.zeros(2, 6, 4).cfloat(), torch.tensor(0.0), 0.0,
        torch.zeros(2, 6, 4, device="meta"))),
    ("k", dict(k=torch.zeros(2, 6, 2, 4, device="meta"))), ("q", dict(q=torch.tensor(0.0))),
    ("v", dict(v=torch.tensor(0.0))), ("initial_state", dict(initial_state=torch.zeros(2, 4, 4, 3).long())),
    ("initial_state", dict(initial_state=torch.zeros(2, 4, 4, 3, device="meta"))),
    ("initial_state", dict(initial_state=[0.0])),
    *(("cu_seqlens", dict(cu_seqlens=ends, batch=1)) for ends in (
        torch.tensor([0.0, 6.0]), [0, 6], torch.tensor([[0, 6]]), torch.tensor([]).long(), torch.tensor(6),
        torch.tensor([0, 6], device="meta"))),
    *(("scale", dict(scale=x)) for x in ("1", float("nan"), float("inf"), torch.tensor(1.0), 1j)),
    ("use_qk_l2norm_in_kernel", dict(use_qk_l2norm_in_kernel=torch.tensor([0, 6]))),
])
@pytest.mark.parametrize("rule", [chunk_gated_delta_rule, recurrent_gated_delta_rule])
def test_bad_input_is_named(rule, name, change):
    B = change.get("batch", 2)
    good = dict(q=torch.zeros(B, 6, 2, 4), k=torch.zeros(B, 6, 2, 4), v=torch.zeros(B, 6, 4, 3),
                g=torch.zeros(B, 6, 4), beta=torch.zeros(B, 6, 4))
    with pytest.raises(ValueError, match=rf"^{name} is .*, but must be "):
        rule(**good | {key: x for key, x in change.items() if key != "batch"})


def test_decay_of_each_channel_is_refused_in_words():
    q, k, v, _, beta, _ = make(1, 4, 1, 1, 4, 3)
    with pytest.raises(ValueError, match=r"^g is .*, a decay for each channel .* must be of shape \(1, 4, 1\)$"):
        chunk_gated_delta_rule(q, k, v, -torch.rand(1, 4, 1, 4), beta)


def test_arguments_of_the_library():
    """In the order of flash-linear-attention 0.6.0; what only it can do is refused by name."""
    names = ("q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_beta_sigmoid_in_kernel "
             "allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu chunk_indices cp_context").split()
    assert list(inspect.signature(chunk_gated_delta_rule).parameters)[:len(names)] == names
    *x, _ = make(1, 6, 1, 1, 4, 4)
    for name in (*names[9:12], "cp_context", "use_gate_in_kernel", "A_log", "dt_bias"):
        for value in (True,) if name not in ("A_log", "dt_bias", "cp_context") else (torch.zeros(1), object()):
            with pytest.raises(ValueError, match=f"^{name} is .*, but must be "):
                chunk_gated_delta_rule(*x, **{name: value})
    with pytest.raises(TypeError, match="head_first"):
        chunk_gated_delta_rule(*x, head_first=True)
    for ends in torch.tensor([0.0, 6.0]), torch.tensor([0, 2, 6]), [0, 6], torch.tensor([0, 6], device="meta"):
        with pytest.raises(ValueError, match="^cu_seqlens_cpu is .*, but must be "):
            chunk_gated_delta_rule(*x, cu_seqlens=torch.tensor([0, 6]), cu_seqlens_cpu=ends)
    with pytest.raises(ValueError, match="^cu_seqlens_cpu is given alone"):
        chunk_gated_delta_rule(*x, cu_seqlens_cpu=torch.tensor([0, 6]))


def test_cu_seqlens_cpu_is_read_instead(monkeypatch):
    *x, _ = make(1, 6, 1, 1, 4, 4)
    ends, other = torch.tensor([0, 2, 6]), torch.tensor([0, 5, 6])
    expected = chunk_gated_delta_rule(*x, cu_seqlens=ends)[0]
    assert torch.equal(chunk_gated_delta_rule(*x, 0.5, None, *[False] * 5, other, ends)[0], expected)
    # and where the kernels are on the way they need not look
    monkeypatch.setattr(delta_rule, "PATH", "triton")
    monkeypatch.setattr(delta_rule.operators, "delta_rule", lambda q, k, v, *_: (v, None))
    chunk_gated_delta_rule(*x, cu_seqlens=other, cu_seqlens_cpu=ends)
    assert delta_rule.operators.CHECKED[other] == (other._version, 6)
    with pytest.raises(ValueError, match="^cu_seqlens is "):
        chunk_gated_delta_rule(*x, cu_seqlens=ends, cu_seqlens_cpu=torch.tensor([0, 2, 5]))


@pytest.mark.parametrize("rule", [chunk_gated_delta_rule, recurrent_gated_delta_rule])
@pytest.mark.parametrize("B, T, ends", [(2, 0, None), (0, 0, None), (0, 40, None), (1, 0, [0, 0, 0])])
def test_no_steps_leave_the_state_alone(rule, B, T, ends):
    """What comes out is never the caller's own, and the gradients are zeros, the state's that of the final state."""
    x = [y.requires_grad_() for y in make(B, T, 1, 2, 4, 3, N=2 if ends else None)]
    ends = ends and torch.tensor(ends)
    o, last = rule(*x[:5], initial_state=x[5], output_final_state=True, cu_seqlens=ends)
    assert o.shape == (B, T, 2, 3) and torch.equal(last, x[5]) and o is not x[2] and last is not x[5]
    dlast = torch.randn_like(last)
    *gradients, dstate = torch.autograd.grad((o, last), x, (o.detach(), dlast))
    assert [y.shape for y in gradients] == [y.shape for y in x[:5]] and torch.equal(dstate, dlast)
    assert last.data_ptr() != x[5].data_ptr() or not last.numel()
    assert rule(*x[:5], cu_seqlens=ends)[1] is None
    o, last = rule(*(y.bfloat16() for y in x[:5]), output_final_state=True, cu_seqlens=ends)
    assert (o.dtype, last.dtype) == (torch.bfloat16, torch.float32) and not last.any()


@pytest.mark.parametrize("name, change", [
    ("state", dict(state=torch.zeros(2, 4, 3, 4))), ("state", dict(state=torch.zeros(2, 4, 4, 3).double())),
    ("state", dict(state=torch.zeros(2, 4, 3, 4).mT)), ("g", dict(g=torch.zeros(2, 2))),
    ("k", dict(k=torch.zeros(2, 4, 4))), ("state", dict(state=None)), ("state", dict(state=[0.0])),
    ("q", dict(q=torch.zeros(2, 1, 2, 4))), ("v", dict(v=torch.zeros(2, 4, 3).long())), ("v", dict(v=None)),
    ("beta", dict(beta=torch.zeros(2, 4, device="meta"))), ("scale", dict(scale=torch.tensor(1.0))),
])
def test_bad_input_of_a_step_is_named(name, change):
    good = dict(q=torch.zeros(2, 2, 4), k=torch.zeros(2, 2, 4), v=torch.zeros(2, 4, 3), g=torch.zeros(2, 4),
                beta=torch.zeros(2, 4), state=torch.zeros(2, 4, 4, 3))
    delta_rule.recurrent_step(**good)
    with pytest.raises(ValueError, match=rf"^{name} is .*, but must be "):
        delta_rule.recurrent_step(**good | change)


def test_gradients_of_gradients_are_refused():
    """In words, and also where they are a part of a loss, as in a gradient penalty: dropped, nobody would know."""
    *x, _ = [y.requires_grad_() for y in make(1, 40, 1, 1, 4, 4)]
    loss = chunk_gated_delta_rule(*x)[0].square().sum()
    dq, = torch.autograd.grad(loss, x[:1], create_graph=True)
    for wanted in (dq.sum(), x[:1]), (loss + dq.square().sum(), x):
        with pytest.raises(RuntimeError, match="gradients of gradients of the delta rule are refused"):
            torch.autograd.grad(*wanted, retain_graph=True)


def test_a_step_ignores_autocast():
    *x, state = make(2, 1, 1, 2, 16, 16)
    x, expected = [y[:, 0] for y in x], state.clone()
    o = recurrent_step(*x, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(recurrent_step(*x, state), o) and torch.equal(state, expected)
