"""The gated delta rule's kernels as PyTorch operators: what they need to be allocated, how they are launched, and their
gradients. delta_rule.py checks the arguments; delta_rule_kernels.py says what each tensor holds.
"""
from functools import cache

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from trivox import delta_rule_kernels as kernels

C, ROWS = 32, 10  # steps in a chunk, factors of each
PROGRAMS = 4      # of a scan in segments that a multiprocessor is given
CHECKED = WeakTensorKeyDictionary()  # cu_seqlens → version and T: to look at its values, a GPU must stop


def sequence_lengths(cu_seqlens, T):
    """Raises ValueError unless cu_seqlens rises from 0 to T; returns the lengths of the sequences."""
    ends = cu_seqlens.tolist()
    need(ends == sorted(ends) and (ends[0], ends[-1]) == (0, T), "cu_seqlens", ends, f"increasing from 0 to T = {T}")
    return [b - a for a, b in zip(ends, ends[1:])]


def need(ok, name, found, wanted):
    if not ok:
        raise ValueError(f"{name} is {found}, but must be {wanted}")


# ------------------------------------------------------------------------------------------------------------
# How the kernels are launched

@cache
def _settings(K, V, dtype, exact):
    """Of the three larger kernels: the widths of tiles, all of K and a part of V, and what the compiler is told."""
    BK = max(16, _power_of_2(K))
    settings = dict(K=K, V=V, C=C, ROWS=ROWS, BK=BK, BV=32 if V > 16 and BK * dtype.itemsize <= 512 else 16,
                    num_stages=1, num_warps=4 if BK <= 64 else 8,
                    PRECISION="ieee" if dtype == torch.float32 and exact else "tf32")
    if _small(K, dtype):
        settings |= dict(num_stages=2 if torch.version.hip else 3, num_warps=2)
    return settings


def _exact():
    return torch.get_float32_matmul_precision() == "highest"


def _power_of_2(n):
    """The first that is not below n. Triton's own function takes microseconds."""
    return 1 << (n - 1).bit_length()


def _scan_settings(K, V, dtype, heads, device, wide, warps):
    """Those of a scan of so many heads, segments counted. Where tiles of 32 values occupy the multiprocessors they are
    `wide`, in so many warps; where they do not, what counts is the time of a chunk."""
    settings = _settings(K, V, dtype, _exact())
    if _small(K, dtype) and V > 16:
        occupied = heads * -(-V // 32) >= 2 * _processors(device)
        return settings | (dict(BV=wide, num_warps=warps) if occupied else dict(BV=16, num_warps=4))
    return settings


def _small(K, dtype):
    return K <= 64 and dtype.itemsize == 2


def _split(dtype):
    """Whether an inverse is kept in two parts, as numbers of this type are too coarse for it."""
    return dtype.itemsize == 2


@cache
def _processors(device):
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def _segments(chunks, programs, device):
    """Into how many segments to cut time. A scan that is cut does its work twice over, and then its segments in turn:
    worth it where the GPU could hold four times its programs."""
    segments = min(PROGRAMS * _processors(device) // programs, chunks // 8)
    return segments if segments >= 4 else 1


def _rows(x):
    """x (B, T, H, K), and how far apart its steps are: a view of a wider tensor need not be copied."""
    B, T, H, K = x.shape
    apart, head, one = x.stride()[1:]
    if one != 1 or head != K and H > 1 or x.stride(0) != T * apart and B > 1:
        x = x.contiguous()
    return x, x.stride(1)


def _on_device(cu_seqlens, q):
    """cu_seqlens where q is; its values are checked, but only once, and not where a CUDA graph is being captured."""
    if cu_seqlens is None or q.is_cuda and torch.cuda.is_current_stream_capturing():
        return cu_seqlens
    if not _known(cu_seqlens, q.shape[1]):
        sequence_lengths(cu_seqlens, q.shape[1])
        remember(cu_seqlens, q.shape[1])
    return cu_seqlens.to(q.device).contiguous()


def remember(cu_seqlens, T):
    """That its values are right for T steps, so that no GPU has to stop for them again."""
    if not cu_seqlens.is_inference():  # those have no version
        CHECKED[cu_seqlens] = cu_seqlens._version, T


def _known(cu_seqlens, T):
    """A CPU's memory is also written from outside, and costs nothing to look at."""
    return (cu_seqlens.is_cuda and not cu_seqlens.is_inference()
            and CHECKED.get(cu_seqlens) == (cu_seqlens._version, T))


def _allocate(q, k, v, g, beta, initial, cu_seqlens, scale, normalise, save):
    """What `_forward` returns, yet to be written: o, the final state, inverse, P, factors, errors, states, maps."""
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = B * -(-T // C) if cu_seqlens is None else T // C + N
    segments = _segments(-(-T // C), N * HV * -(-(V + K) // 32), v.device)
    cut = segments if segments > 1 and _small(K, v.dtype) else 0     # a larger map would not fit in a program
    saved, float32 = slots if save else 0, dict(dtype=torch.float32)
    return (v.new_empty(v.shape), v.new_empty(N, HV, K, V, **float32),
            v.new_empty(slots, HV, 1 + _split(v.dtype), C, C), v.new_empty(slots, HV, C, C),
            v.new_empty(slots, HV, ROWS, C, **float32), v.new_empty(saved, HV, C, V), v.new_empty(saved, HV, V, K),
            v.new_empty(N * HV, cut, V + K, K, **float32))


def _forward(q, k, v, g, beta, initial, cu_seqlens, scale, normalise, save):
    cu_seqlens = _on_device(cu_seqlens, q)
    (q, q_row), (k, k_row), (v, v_row) = _rows(q), _rows(k), _rows(v)
    g, beta, initial = g.contiguous(), beta.contiguous(), initial if initial is None else initial.contiguous()
    results = _allocate(q, k, v, g, beta, initial, cu_seqlens, scale, normalise, save)
    o, final, inverse, P, factors, errors, states, maps = results
    (_, T, H, K), (N, HV, _, V), segments, SPLIT = q.shape, final.shape, maps.shape[1], _split(v.dtype)
    tile = _scan_settings(K, V, v.dtype, N * HV * max(segments, 1), v.device, 32, 2)
    with torch.cuda.device_of(v):
        kernels.prepare_kernel[P.shape[:2]](
            q, k, g, beta, inverse, P, factors, cu_seqlens, T, N, scale, q_row, k_row, H, HV, K, C, ROWS,
            min(tile["BK"], 64), normalise, SPLIT, tile["PRECISION"],
            num_warps=4 if tile["PRECISION"] == "ieee" else 1)
        for find_maps in (True, False) if segments else (False,):
            kernels.forward_kernel[-(-(V + K * find_maps) // tile["BV"]) * N * HV, max(segments, 1)](
                q, k, v, inverse, P, factors, initial, maps if segments else None, o, errors, states, final, cu_seqlens,
                T, q_row, k_row, v_row, H, HV, MAP=find_maps, SAVE=save and not find_maps, SPLIT=SPLIT, **tile)
    return results


def _allocate_gradients(q, k, do, dfinal, cu_seqlens, inverse, P, factors, errors, states, maps, scale, normalise):
    """What `_backward` returns, yet to be written: dq, dk, dv, dg, dbeta and the initial state's, for value heads."""
    (B, T, _, K), (HV, V) = q.shape, do.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (q.new_empty(B, T, HV, K), q.new_empty(B, T, HV, K), q.new_empty(do.shape), factors.new_empty(B, T, HV),
            factors.new_empty(B, T, HV), factors.new_empty(N, HV, K, V))


def _backward(q, k, do, dfinal, cu_seqlens, inverse, P, factors, errors, states, maps, scale, normalise):
    cu_seqlens = cu_seqlens if cu_seqlens is None else cu_seqlens.to(q.device).contiguous()
    (q, q_row), (k, k_row) = _rows(q), _rows(k)
    do, dfinal = do.contiguous(), dfinal if dfinal is None else dfinal.contiguous()
    results = _allocate_gradients(q, k, do, dfinal, cu_seqlens, inverse, P, factors, errors, states, maps, scale,
                                  normalise)
    dq, dk, dv, dg, dbeta, dinitial = results
    (_, T, H, K), (N, HV, _, V), segments = q.shape, dinitial.shape, maps.shape[1]
    tile = _scan_settings(K, V, q.dtype, N * HV * max(segments, 1), q.device, 16, 1)
    state_grads, map_grads = torch.empty_like(states), maps.new_empty(N * HV, segments, V, K)
    if normalise and abs(scale) < 1e-37:
        scale = 1.0  # the kernel divides scale/|q| by it, which is 0 in float32 then
    with torch.cuda.device_of(q):
        for find_maps in (True, False) if segments else (False,):
            kernels.backward_kernel[-(-V // tile["BV"]) * N * HV, max(segments, 1)](
                q, k, do, inverse, P, factors, dfinal, maps if segments else None, map_grads, dv, state_grads, dinitial,
                cu_seqlens, T, q_row, k_row, H, HV, MAP=find_maps, SPLIT=_split(q.dtype), **tile)
        kernels.gradients_kernel[P.shape[:2]](
            q, k, do, factors, errors, states, dv, state_grads, dq, dk, dg, dbeta, cu_seqlens, T, N, scale, q_row,
            k_row, H, HV, NORMALISE=normalise, **_settings(K, V, q.dtype, _exact()))
    return results


def _save_for_backward(ctx, inputs, output):
    q, k, v, g, beta, initial, cu_seqlens, ctx.scale, ctx.normalise, _ = inputs
    ctx.set_materialize_grads(False)
    if cu_seqlens is not None and cu_seqlens.is_inference():
        cu_seqlens = cu_seqlens.clone()
    ctx.save_for_backward(q, k, cu_seqlens, *output[2:])
    ctx.shape, ctx.dtypes = v.shape, (g.dtype, beta.dtype, initial is not None)


def _gradients(ctx, do, dfinal, *_):
    q, k, cu_seqlens, *saved = ctx.saved_tensors
    do = q.new_zeros(ctx.shape) if do is None else do
    dq, dk, dv, dg, dbeta, dinitial = delta_rule_backward(q, k, do, dfinal, cu_seqlens, *saved, ctx.scale,
                                                          ctx.normalise)
    H, heads = q.shape[2], dq.shape[2]
    dq, dk = (x if H == heads else x.unflatten(2, (H, -1)).sum(3) for x in (dq, dk))
    g, beta, initial = ctx.dtypes
    return dq, dk, dv, dg.to(g), dbeta.to(beta), dinitial if initial else None, None, None, None, None


def _step(q, k, v, g, beta, state, scale, normalise):
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    (B, HV, V), (H, K), o = v.shape, q.shape[1:], torch.empty_like(v)
    BV = 16 if K <= 64 else 8
    with torch.cuda.device_of(v):
        kernels.step_kernel[B * HV, -(-V // BV)](
            q, k, v, g, beta, state, o, scale, H, HV, K, V, _power_of_2(K), BV, normalise,
            num_warps=1 if K <= 64 else 2)
    return o


OPERATORS = torch.library.Library("trivox", "FRAGMENT")  # half the host's time of torch.library.custom_op
for schema, function, fake in (
        ("delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial, Tensor? cu_seqlens, "
         "float scale, bool normalise, bool save) -> "
         "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _forward, _allocate),
        ("delta_rule_backward(Tensor q, Tensor k, Tensor do, Tensor? dfinal, Tensor? cu_seqlens, Tensor inverse, "
         "Tensor P, Tensor factors, Tensor errors, Tensor states, Tensor maps, float scale, bool normalise) -> "
         "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _backward, _allocate_gradients),
        ("delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, float scale, "
         "bool normalise) -> Tensor", _step, lambda q, k, v, *_: torch.empty_like(v))):
    name = OPERATORS.define(schema)
    for key in "CPU", "CUDA":
        OPERATORS.impl(name, function, key)
    torch.library.register_fake(f"trivox::{name}", fake, lib=OPERATORS)
torch.library.register_autograd("trivox::delta_rule", _gradients, setup_context=_save_for_backward, lib=OPERATORS)
delta_rule_forward, delta_rule_backward, delta_rule_step = (
    getattr(torch.ops.trivox, name).default for name in ("delta_rule", "delta_rule_backward", "delta_rule_step"))


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *of):
        return x.clone()

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("gradients of gradients of the delta rule are refused; recurrent_gated_delta_rule has them")


def without_gradients(ctx, gradients, *of):
    """Gradients as they are; where their own may be asked for (`create_graph`), they hang on what they were made of,
    the incoming ones and ctx's inputs, so that asking is refused."""
    if not torch.is_grad_enabled():
        return gradients  # and what was saved is not read twice, which activation checkpointing forbids
    of = [x for x in (*of, *ctx.saved_tensors) if x is not None and x.requires_grad]
    return tuple(x if x is None else _Refusal.apply(x, *of) for x in gradients)


class _Eager(torch.autograd.Function):
    """The operator and its gradient; by the way that torch.library takes they would cost the host 70 µs more."""

    @staticmethod
    def forward(ctx, *inputs):
        output = delta_rule_forward(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx, *grads):
        with torch.no_grad():
            gradients = _gradients(ctx, *grads)
        return without_gradients(ctx, gradients, *grads)


def delta_rule(*inputs):
    """o and the final state, of the arguments of the operator."""
    return delta_rule_forward(*inputs)[:2] if torch.compiler.is_compiling() else _Eager.apply(*inputs)
