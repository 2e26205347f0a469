"""The gated delta rule's Triton kernels and what launches them, as PyTorch operators. The interface, the
equations and their names are those of delta_rule.py, which checks the arguments.

With W = βE, E needs no division by β later, and what is solved does not depend on the state:

    E = (I − A')⁻¹ (V − γK S),   A'_ij = −D_ij (k_i·k_j) β_j;   dV = (I − A')⁻ᵀ β (Pᵀ dO + D_C K dS_C),   dβ = E·dV / β

C is 32: the inverse is then two blocks of 16 and a product, and a warp does it. Four launches, forward and backward:

    _prepare    every chunk      q k g β → (I − A')⁻¹, P (C numbers a step each) and factors (4 float32: γ, β, norms)
    _forward    heads × V / 32   q k v (I − A')⁻¹ P factors → o, and to train E (V a step) and S (K·V/C a step)
    _backward   heads × V / 32   q k do (I − A')⁻¹ P factors → dv, dS_C (K·V/C a step)
    _gradients  every chunk      q k do dv E S dS_C P factors → dq dk dg dβ

Only the middle two go through time, with nothing in them but (2) and (3). Where their programs would leave a GPU idle
(few heads, a long sequence) time is cut into segments too: a first launch finds the affine map S_end = M S_start + B
of each segment, all at once, and the second composes the maps before its own and starts there. See `_segments`.

The floor, one pass over inputs, outputs and gradients; what the kernels move if each tile is read once; and products
done, all forward and backward with bfloat16 q, k, v and float32 g, β, and times at an H200's 4.8 TB/s and 990 TFLOP/s:

    (B, T, H, K, V)        a step and head: floor, moved, products    all of it: floor, moved, products
    (24, 1024, 6, 48, 96)  1,560 B    4,176 B    152 kFLOP            230 MB 48 µs    616 MB 128 µs    22 GFLOP 23 µs
    (4, 2048, 16, 64, 64)  1,432 B    3,856 B    138 kFLOP            188 MB 39 µs    505 MB 105 µs    18 GFLOP 18 µs

A chunk is C steps; it lies in a slot, and a packed sequence's slots begin at start // C + n, which needs no table but
leaves some empty. S is kept as (V, K), and tiles of values as (V, C); decays are powers of 2.
"""
from __future__ import annotations  # the kernels' are Triton's, which may be missing

import torch
from torch.utils.weak import WeakTensorKeyDictionary

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # there is none for this platform
    triton, jit = None, lambda kernel: kernel

C, PROGRAMS = 32, 4  # steps in a chunk, programs of a scan that a multiprocessor holds at once
CHECKED = WeakTensorKeyDictionary()  # cu_seqlens → version and T: to look at its values, a GPU must stop


def sequence_lengths(cu_seqlens, T):
    """Raises ValueError unless cu_seqlens rises from 0 to T; returns the lengths of the sequences."""
    ends = cu_seqlens.tolist()
    need(ends == sorted(ends) and (ends[0], ends[-1]) == (0, T), "cu_seqlens", ends, f"increasing from 0 to T = {T}")
    return [b - a for a, b in zip(ends, ends[1:])]


def need(ok, name, found, wanted):
    if not ok:
        raise ValueError(f"{name} is {found}, but must be {wanted}")

def _settings(K, V, dtype, registers):
    """Of the three larger kernels: the widths of tiles, all of K and a part of V, and what the compiler is told. With
    128 registers a thread a multiprocessor holds four programs of small tiles at once, with 168 three."""
    BK, exact = max(16, triton.next_power_of_2(K)), torch.get_float32_matmul_precision() == "highest"
    settings = dict(K=K, V=V, C=C, BK=BK, BV=32 if V > 16 and BK * dtype.itemsize <= 512 else 16, num_stages=1,
                    num_warps=4 if BK <= 64 else 8, PRECISION="ieee" if dtype == torch.float32 and exact else "tf32")
    if _small(K, dtype):
        settings.update({"num_stages": 2} if torch.version.hip else {"num_stages": 2, "maxnreg": registers})
    return settings


def _small(K, dtype):
    return K <= 64 and dtype.itemsize == 2


def _segments(chunks, programs, device):
    """Into how many segments to cut time. A scan that is cut does its work twice over, and then its segments in turn:
    worth it where the GPU could hold four times its programs."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
    segments = min(PROGRAMS * processors // programs, chunks // 8)
    return segments if segments >= 4 else 1


def _allocate(q, k, v, g, beta, initial, cu_seqlens, scale, normalise, save):
    """What `delta_rule_forward` returns, yet to be written: o, the final state, (I − A')⁻¹, P, factors, E, S, maps."""
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = B * -(-T // C) if cu_seqlens is None else T // C + N
    segments = _segments(-(-T // C), N * HV * -(-(V + K) // 32), v.device)
    cut = segments if segments > 1 and _small(K, v.dtype) else 0     # a larger map would not fit in a program
    saved, float32 = slots if save else 0, dict(dtype=torch.float32)
    return (v.new_empty(v.shape), v.new_empty(N, HV, K, V, **float32), v.new_empty(slots, HV, C, C),
            v.new_empty(slots, HV, C, C), v.new_empty(slots, HV, 4, C, **float32), v.new_empty(saved, HV, V, C),
            v.new_empty(saved, HV, V, K), v.new_empty(N * HV, cut, V + K, K, **float32))


def _allocate_gradients(q, k, do, dfinal, cu_seqlens, inverse, P, factors, E, starts, maps, normalise):
    """What `delta_rule_backward` returns, yet to be written: dq, dk, dv, dg, dbeta and the initial state's, for value
    heads."""
    (B, T, _, K), (HV, V) = q.shape, do.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (q.new_empty(B, T, HV, K), q.new_empty(B, T, HV, K), q.new_empty(do.shape), factors.new_empty(B, T, HV),
            factors.new_empty(B, T, HV), factors.new_empty(N, HV, K, V))


def _on_device(cu_seqlens, q):
    """cu_seqlens where q is; its values are checked, but only once, and not where a CUDA graph is being captured."""
    if cu_seqlens is None or q.is_cuda and torch.cuda.is_current_stream_capturing():
        return cu_seqlens
    version = None if cu_seqlens.is_inference() else (cu_seqlens._version, q.shape[1])
    if version is None or CHECKED.get(cu_seqlens) != version:
        sequence_lengths(cu_seqlens, q.shape[1])
        CHECKED[cu_seqlens] = version
    return cu_seqlens.to(q.device).contiguous()


@torch.library.custom_op("trivox::delta_rule", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, Tensor g, "
                         "Tensor beta, Tensor? initial, Tensor? cu_seqlens, float scale, bool normalise, bool save) -> "
                         "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def delta_rule_forward(q, k, v, g, beta, initial, cu_seqlens, scale, normalise, save):
    cu_seqlens = _on_device(cu_seqlens, q)
    q, k, v, g, beta, initial = (x if x is None else x.contiguous() for x in (q, k, v, g, beta, initial))
    results = _allocate(q, k, v, g, beta, initial, cu_seqlens, scale, normalise, save)
    o, final, inverse, P, factors, E, starts, maps = results
    (_, T, H, K), (N, HV, _, V), segments = q.shape, final.shape, maps.shape[1]
    tile = _settings(K, V, v.dtype, 128)
    with torch.cuda.device_of(v):
        _prepare_kernel[P.shape[:2]](
            q, k, g, beta, inverse, P, factors, cu_seqlens, T, N, scale, H, HV, K, C, min(tile["BK"], 64), normalise,
            tile["PRECISION"], num_warps=4 if tile["PRECISION"] == "ieee" else 1)
        for find_maps in (True, False) if segments else (False,):
            _forward_kernel[-(-(V + K * find_maps) // tile["BV"]) * N * HV, max(segments, 1)](
                q, k, v, inverse, P, factors, initial, maps if segments else None, o, E, starts, final, cu_seqlens, T,
                H, HV, MAP=find_maps, SAVE=save and not find_maps, **tile)
    return results


@torch.library.custom_op("trivox::delta_rule_backward", mutates_args=(), schema="(Tensor q, Tensor k, Tensor do, "
                         "Tensor? dfinal, Tensor? cu_seqlens, Tensor inverse, Tensor P, Tensor factors, Tensor E, "
                         "Tensor starts, Tensor maps, bool normalise) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
                         "Tensor)")
def delta_rule_backward(q, k, do, dfinal, cu_seqlens, inverse, P, factors, E, starts, maps, normalise):
    cu_seqlens = cu_seqlens if cu_seqlens is None else cu_seqlens.to(q.device).contiguous()
    q, k, do, dfinal = (x if x is None else x.contiguous() for x in (q, k, do, dfinal))
    results = _allocate_gradients(q, k, do, dfinal, cu_seqlens, inverse, P, factors, E, starts, maps, normalise)
    dq, dk, dv, dg, dbeta, dinitial = results
    (_, T, H, K), (N, HV, _, V), segments = q.shape, dinitial.shape, maps.shape[1]
    tile = _settings(K, V, q.dtype, 128)
    dends, dmaps = torch.empty_like(starts), maps.new_empty(N * HV, segments, V, K)
    with torch.cuda.device_of(q):
        for find_maps in (True, False) if segments else (False,):
            _backward_kernel[-(-V // tile["BV"]) * N * HV, max(segments, 1)](
                q, k, do, inverse, P, factors, dfinal, maps if segments else None, dmaps, dv, dends, dinitial,
                cu_seqlens, T, H, HV, MAP=find_maps, **tile)
        _gradients_kernel[P.shape[:2]](
            q, k, do, P, factors, E, starts, dv, dends, dq, dk, dg, dbeta, cu_seqlens, T, N, H, HV, NORMALISE=normalise,
            **_settings(K, V, q.dtype, 168))
    return results


def _save_for_backward(ctx, inputs, output):
    q, k, v, g, beta, initial, cu_seqlens, _, ctx.normalise, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, cu_seqlens, *output[2:])
    ctx.shape, ctx.dtypes = v.shape, (g.dtype, beta.dtype, initial is not None)


def _gradients(ctx, do, dfinal, *_):
    q, k, cu_seqlens, *saved = ctx.saved_tensors
    do = q.new_zeros(ctx.shape) if do is None else do
    dq, dk, dv, dg, dbeta, dinitial = delta_rule_backward(q, k, do, dfinal, cu_seqlens, *saved, ctx.normalise)
    H, heads = q.shape[2], dq.shape[2]
    dq, dk = (x if H == heads else x.unflatten(2, (H, -1)).sum(3) for x in (dq, dk))
    g, beta, initial = ctx.dtypes
    return dq, dk, dv, dg.to(g), dbeta.to(beta), dinitial if initial else None, None, None, None, None


delta_rule_forward.register_autograd(_gradients, setup_context=_save_for_backward)
delta_rule_forward.register_fake(_allocate)
delta_rule_backward.register_fake(_allocate_gradients)


@torch.library.custom_op("trivox::delta_rule_step", mutates_args=("state",), schema="(Tensor q, Tensor k, Tensor v, "
                         "Tensor g, Tensor beta, Tensor(a!) state, float scale, bool normalise) -> Tensor")
def delta_rule_step(q, k, v, g, beta, state, scale, normalise):
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    (B, HV, V), (H, K), o = v.shape, q.shape[1:], torch.empty_like(v)
    BV = 16 if K <= 64 else 8
    with torch.cuda.device_of(v):
        _step_kernel[-(-V // BV), B * HV](q, k, v, g, beta, state, o, scale, H, HV, K, V, triton.next_power_of_2(K), BV,
                                          normalise, num_warps=1 if K <= 64 else 2)
    return o


delta_rule_step.register_fake(lambda q, k, v, g, beta, state, scale, normalise: torch.empty_like(v))


@jit
def _sequence(cu_seqlens, n, T, C: tl.constexpr):
    """First token, number of steps and first slot of sequence n."""
    if cu_seqlens is None:
        return n.to(tl.int64) * T, T, n * tl.cdiv(T, C)
    else:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        return start, (tl.load(cu_seqlens + n + 1) - start).to(tl.int32), (start // C).to(tl.int32) + n


@jit
def _chunk(cu_seqlens, slot, T, N, C: tl.constexpr):
    """First token of the chunk in a slot, and the steps from there to its sequence's end (0 or less: nothing there)."""
    if cu_seqlens is None:
        n = slot // tl.cdiv(T, C)
    else:
        n = slot * 0 - 1
        for first in range(0, N, 256):
            i = first + tl.arange(0, 256)
            slots = tl.load(cu_seqlens + i, mask=i < N, other=0) // C + i
            n += tl.sum(((slots <= slot) & (i < N)).to(tl.int32), 0)
    start, steps, first = _sequence(cu_seqlens, n, T, C)
    return start + (slot - first) * C, steps - (slot - first) * C


@jit
def _fine_dot(a, b, PRECISION: tl.constexpr):
    """a @ b of float32 to 16 bits, by three products of bfloat16 halves, or exactly."""
    if PRECISION == "ieee":
        return tl.dot(a, b, input_precision="ieee")
    else:
        a1, b1 = a.to(tl.bfloat16), b.to(tl.bfloat16)
        a2, b2 = (a - a1.to(tl.float32)).to(tl.bfloat16), (b - b1.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(a1, b1, tl.dot(a1, b2, tl.dot(a2, b1)))


@jit
def _inverse_of_16(A, PRECISION: tl.constexpr):
    """(I − A)⁻¹ by doubling the blocks on the diagonal, as `_inverse` does."""
    i = tl.arange(0, 16)
    apart = i[:, None] ^ i[None, :]
    X = tl.where(apart == 0, 1.0, tl.where(apart == 1, A, 0.0))
    for level in tl.static_range(1, 4):
        X += _fine_dot(_fine_dot(X, tl.where(apart >> level == 1, A, 0.0), PRECISION), X, PRECISION)
    return X


@jit
def _prepare_kernel(q, k, g, beta, inverse, P, factors, cu_seqlens, T, N, scale, H: tl.constexpr, HV: tl.constexpr,
                    K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, NORMALISE: tl.constexpr,
                    PRECISION: tl.constexpr):
    """(I − A')⁻¹, P, and the factors of each step: log2 γ, β, 1/|k| and scale/|q| (1 and scale unless normalised)."""
    slot, h = tl.program_id(0), tl.program_id(1)
    token, steps = _chunk(cu_seqlens, slot, T, N, C)
    if steps <= 0:
        return
    i, key = tl.arange(0, C), tl.arange(0, BK)
    there = i < steps
    q, k = q + (token * H + h // (HV // H)) * K, k + (token * H + h // (HV // H)) * K
    scores, keys = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    rq, rk = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for first in range(0, K, BK):
        at = i[:, None] * (H * K) + first + key[None, :]
        mask = there[:, None] & (first + key < K)[None, :]
        q_i, k_i = tl.load(q + at, mask=mask, other=0.0), tl.load(k + at, mask=mask, other=0.0)
        scores = tl.dot(q_i, tl.trans(k_i), scores, input_precision=PRECISION)
        keys = tl.dot(k_i, tl.trans(k_i), keys, input_precision=PRECISION)
        if NORMALISE:
            rq += tl.sum(q_i.to(tl.float32) * q_i.to(tl.float32), 1)
            rk += tl.sum(k_i.to(tl.float32) * k_i.to(tl.float32), 1)
    rq, rk = (tl.rsqrt(rq + 1e-6), tl.rsqrt(rk + 1e-6)) if NORMALISE else (rq + 1.0, rk + 1.0)

    g_i = tl.load(g + (token + i) * HV + h, mask=there, other=0.0).to(tl.float32) * 1.4426950408889634
    beta_i = tl.load(beta + (token + i) * HV + h, mask=there, other=0.0).to(tl.float32)
    # 2^-40 is nothing beside 1; without a bound a small gate would be lost in the sum after a large one
    since = tl.cumsum(tl.where(g_i < -40.0, -40.0, g_i), 0)
    to = (slot.to(tl.int64) * HV + h) * C
    tl.store(factors + to * 4 + i, since)
    tl.store(factors + to * 4 + C + i, beta_i)
    tl.store(factors + to * 4 + 2 * C + i, rk)
    tl.store(factors + to * 4 + 3 * C + i, scale * rq)

    decay = since[:, None] - since[None, :]
    decay = tl.exp2(tl.where(i[:, None] >= i[None, :], decay, float("-inf"))) * rk[None, :]
    tl.store(P + to * C + i[:, None] * C + i[None, :], scores * decay * (scale * rq)[:, None])
    A = tl.where(i[:, None] > i[None, :], keys * decay * -rk[:, None] * beta_i[None, :], 0.0)
    left, right = tl.split(A.reshape(2, 16, 2, 16).permute(1, 3, 0, 2))
    a, b = tl.split(left)
    zero, c = tl.split(right)
    a, c = _inverse_of_16(a, PRECISION), _inverse_of_16(c, PRECISION)
    b = _fine_dot(_fine_dot(c, b, PRECISION), a, PRECISION)
    i = tl.arange(0, 16)
    inverse += to * C + i[:, None] * C + i[None, :]
    tl.store(inverse, a)
    tl.store(inverse + 16, zero)
    tl.store(inverse + 16 * C, b)
    tl.store(inverse + 16 * C + 16, c)


@jit
def _forward_kernel(q, k, v, inverse, P, factors, initial, maps, o, E, starts, final, cu_seqlens, T,
                    H: tl.constexpr, HV: tl.constexpr, MAP: tl.constexpr, SAVE: tl.constexpr, K: tl.constexpr,
                    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """The scan, for BV values of a head and one segment of time: o, E, the S at the start of each chunk and at the end.
    MAP: as if the segment started from nothing, for V rows, and for K more from the identity with v = 0: B and M."""
    BLOCKS: tl.constexpr = (V + K + BV - 1) // BV if MAP else (V + BV - 1) // BV
    head, block, segment = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.program_id(1)
    h = head % HV
    dtype: tl.constexpr = k.dtype.element_ty
    token, steps, slot = _sequence(cu_seqlens, head // HV, T, C)
    R = tl.cdiv(tl.cdiv(T, C), tl.num_programs(1))                                   # chunks in a segment
    if (segment > 0) & (segment * R * C >= steps):
        return
    i, key, value = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    keys, values = (key < K)[None, :], (value < V)[:, None]
    at_state, at_first = value[:, None] * K + key[None, :], (head.to(tl.int64) * K + key[None, :]) * V + value[:, None]
    if MAP:
        S = tl.where(value[:, None] - V == key[None, :], 1.0, 0.0)
    else:
        S = tl.zeros([BV, BK], tl.float32)
        if initial is not None:
            S += tl.load(initial + at_first, mask=keys & values, other=0.0)
    if maps is not None:
        maps += head.to(tl.int64) * tl.num_programs(1) * (V + K) * K
        if not MAP:
            for _ in range(segment):
                M = tl.load(maps + (V + key[:, None]) * K + key[None, :], mask=(key < K)[:, None] & keys, other=0.0)
                S = _fine_dot(S, M, PRECISION) + tl.load(maps + at_state, mask=keys & values, other=0.0)
                maps += (V + K) * K

    token += segment * R * C
    chunk = (slot + segment * R).to(tl.int64) * HV + h
    q, k = q + (token * H + h // (HV // H)) * K, k + (token * H + h // (HV // H)) * K
    v, o = v + (token * HV + h) * V, o + (token * HV + h) * V
    inverse, P, factors = inverse + chunk * C * C, P + chunk * C * C, factors + chunk * 4 * C
    E, starts = E + chunk * V * C, starts + chunk * V * K
    at_key, at_value = i[:, None] * (H * K) + key[None, :], i[None, :] * (HV * V) + value[:, None]
    at_step, left = i[:, None] * C + i[None, :], steps - segment * R * C
    for _ in range(tl.minimum(R, tl.cdiv(left, C))):
        there = i < left
        k_i = tl.load(k + at_key, mask=there[:, None] & keys, other=0.0)
        v_i = tl.load(v + at_value, mask=there[None, :] & values, other=0.0)
        inverse_i = tl.load(inverse + at_step)
        since, end = tl.load(factors + i), tl.load(factors + C - 1)
        beta, rk = tl.load(factors + C + i), tl.load(factors + 2 * C + i)
        if not MAP:
            q_i = tl.load(q + at_key, mask=there[:, None] & keys, other=0.0)
            P_i = tl.load(P + at_step)
            sq = tl.load(factors + 3 * C + i)
        s = S.to(dtype)
        z = v_i - (tl.exp2(since) * rk)[None, :] * tl.dot(s, tl.trans(k_i), input_precision=PRECISION)
        e = tl.dot(z.to(dtype), tl.trans(inverse_i), input_precision=PRECISION)
        w = beta[None, :] * e
        if not MAP:
            o_i = (tl.exp2(since) * sq)[None, :] * tl.dot(s, tl.trans(q_i), input_precision=PRECISION)
            o_i = tl.dot(w.to(dtype), tl.trans(P_i), o_i, input_precision=PRECISION)
            tl.store(o + at_value, o_i.to(dtype), mask=there[None, :] & values)
            if SAVE:
                tl.store(E + value[:, None] * C + i[None, :], e.to(dtype), mask=values)
                tl.store(starts + at_state, s, mask=keys & values)
        w *= (tl.exp2(end - since) * rk)[None, :]
        S = tl.dot(w.to(dtype), k_i, tl.exp2(end) * S, input_precision=PRECISION)
        q, k, v, o = q + C * H * K, k + C * H * K, v + C * HV * V, o + C * HV * V
        inverse, P, factors = inverse + HV * C * C, P + HV * C * C, factors + HV * 4 * C
        E, starts, left = E + HV * V * C, starts + HV * V * K, left - C
    if MAP:
        tl.store(maps + segment * (V + K) * K + at_state, S, mask=keys & (value < V + K)[:, None])
    else:
        if (segment + 1) * R * C >= steps:
            tl.store(final + at_first, S, mask=keys & values)


@jit
def _backward_kernel(q, k, do, inverse, P, factors, dfinal, maps, dmaps, dv, dends, dinitial, cu_seqlens, T,
                     H: tl.constexpr, HV: tl.constexpr, MAP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                     C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """The scan in reverse: dv, the dS at the end of each chunk and at the start. MAP: from nothing; M is known."""
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    head, block, segment = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.program_id(1)
    h = head % HV
    dtype: tl.constexpr = k.dtype.element_ty
    token, steps, slot = _sequence(cu_seqlens, head // HV, T, C)
    R = tl.cdiv(tl.cdiv(T, C), tl.num_programs(1))
    if (segment > 0) & (segment * R * C >= steps):
        return
    i, key, value = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    keys, values = (key < K)[None, :], (value < V)[:, None]
    at_state, at_first = value[:, None] * K + key[None, :], (head.to(tl.int64) * K + key[None, :]) * V + value[:, None]
    dS = tl.zeros([BV, BK], tl.float32)
    if not MAP:
        if dfinal is not None:
            dS += tl.load(dfinal + at_first, mask=keys & values, other=0.0)
    if maps is not None:
        maps += head.to(tl.int64) * tl.num_programs(1) * (V + K) * K
        dmaps += head.to(tl.int64) * tl.num_programs(1) * V * K
        if not MAP:
            last = tl.maximum(tl.cdiv(tl.cdiv(steps, C), R) - 1, 0)
            for j in range(last - segment):
                M = tl.load(maps + ((last - j) * (V + K) + V + key[None, :]) * K + key[:, None],
                            mask=(key < K)[:, None] & keys, other=0.0)
                dS = _fine_dot(dS, M, PRECISION) + tl.load(dmaps + (last - j) * V * K + at_state, mask=keys & values,
                                                           other=0.0)

    chunks = tl.minimum(R, tl.cdiv(steps, C) - segment * R)
    token += (segment * R + chunks - 1) * C
    chunk = (slot + segment * R + chunks - 1).to(tl.int64) * HV + h
    q, k = q + (token * H + h // (HV // H)) * K, k + (token * H + h // (HV // H)) * K
    do, dv, dends = do + (token * HV + h) * V, dv + (token * HV + h) * V, dends + chunk * V * K
    inverse, P, factors = inverse + chunk * C * C, P + chunk * C * C, factors + chunk * 4 * C
    at_key, at_value = i[:, None] * (H * K) + key[None, :], i[None, :] * (HV * V) + value[:, None]
    at_step, left = i[:, None] * C + i[None, :], steps - (segment * R + chunks - 1) * C
    for _ in range(chunks):
        there = i < left
        k_i = tl.load(k + at_key, mask=there[:, None] & keys, other=0.0)
        q_i = tl.load(q + at_key, mask=there[:, None] & keys, other=0.0)
        do_i = tl.load(do + at_value, mask=there[None, :] & values, other=0.0)
        inverse_i, P_i = tl.load(inverse + at_step), tl.load(P + at_step)
        since, end = tl.load(factors + i), tl.load(factors + C - 1)
        beta, rk, sq = tl.load(factors + C + i), tl.load(factors + 2 * C + i), tl.load(factors + 3 * C + i)
        ds = dS.to(dtype)
        de = (tl.exp2(end - since) * rk)[None, :] * tl.dot(ds, tl.trans(k_i), input_precision=PRECISION)
        de = beta[None, :] * tl.dot(do_i, P_i, de, input_precision=PRECISION)
        dz = tl.dot(de.to(dtype), inverse_i, input_precision=PRECISION)
        if not MAP:
            tl.store(dv + at_value, dz.to(dtype), mask=there[None, :] & values)
            tl.store(dends + at_state, ds, mask=keys & values)
        do_i = do_i.to(tl.float32) * (tl.exp2(since) * sq)[None, :]
        dz *= -(tl.exp2(since) * rk)[None, :]
        dS = tl.dot(do_i.to(dtype), q_i, tl.exp2(end) * dS, input_precision=PRECISION)
        dS = tl.dot(dz.to(dtype), k_i, dS, input_precision=PRECISION)
        q, k, do, dv = q - C * H * K, k - C * H * K, do - C * HV * V, dv - C * HV * V
        inverse, P, factors = inverse - HV * C * C, P - HV * C * C, factors - HV * 4 * C
        dends, left = dends - HV * V * K, left + C
    if MAP:
        tl.store(dmaps + segment * V * K + at_state, dS, mask=keys & values)
    else:
        if segment == 0:
            tl.store(dinitial + at_first, dS, mask=keys & values)


@jit
def _gradients_kernel(q, k, do, P, factors, E, starts, dv, dends, dq, dk, dg, dbeta, cu_seqlens, T, N,
                      H: tl.constexpr, HV: tl.constexpr, NORMALISE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                      C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """dq, dk, dg and dβ of a chunk, all else being known: no step of it waits for another chunk."""
    slot, h = tl.program_id(0), tl.program_id(1)
    token, steps = _chunk(cu_seqlens, slot, T, N, C)
    if steps <= 0:
        return
    i, key = tl.arange(0, C), tl.arange(0, BK)
    dtype: tl.constexpr = k.dtype.element_ty
    there, keys, chunk = i < steps, (key < K)[None, :], slot.to(tl.int64) * HV + h
    do, dv, E = do + (token * HV + h) * V, dv + (token * HV + h) * V, E + chunk * V * C
    starts, dends, factors = starts + chunk * V * K, dends + chunk * V * K, factors + chunk * 4 * C
    dP, dA, through = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([BV, BK], tl.float32)
    dq_i, dr_i, dk_i = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    for first in range(0, V, BV):
        value = first + tl.arange(0, BV)
        values = (value < V)[:, None]
        at_value, at_state = i[None, :] * (HV * V) + value[:, None], value[:, None] * K + key[None, :]
        do_i = tl.load(do + at_value, mask=there[None, :] & values, other=0.0)
        dz_i = tl.load(dv + at_value, mask=there[None, :] & values, other=0.0)
        e_i = tl.load(E + value[:, None] * C + i[None, :], mask=values, other=0.0)
        S_i = tl.load(starts + at_state, mask=keys & values, other=0.0)
        dS_i = tl.load(dends + at_state, mask=keys & values, other=0.0)
        through += S_i.to(tl.float32) * dS_i.to(tl.float32)
        dP = tl.dot(tl.trans(do_i), e_i, dP, input_precision=PRECISION)
        dA = tl.dot(tl.trans(dz_i), e_i, dA, input_precision=PRECISION)
        dq_i = tl.dot(tl.trans(do_i), S_i, dq_i, input_precision=PRECISION)
        dr_i = tl.dot(tl.trans(dz_i), S_i, dr_i, input_precision=PRECISION)
        dk_i = tl.dot(tl.trans(e_i), dS_i, dk_i, input_precision=PRECISION)

    at_key, mask = i[:, None] * (H * K) + key[None, :], there[:, None] & keys
    q_i = tl.load(q + (token * H + h // (HV // H)) * K + at_key, mask=mask, other=0.0)
    k_i = tl.load(k + (token * H + h // (HV // H)) * K + at_key, mask=mask, other=0.0)
    P_i = tl.load(P + chunk * C * C + i[:, None] * C + i[None, :])
    since, beta = tl.load(factors + i), tl.load(factors + C + i)
    rk, sq, end = tl.load(factors + 2 * C + i), tl.load(factors + 3 * C + i), tl.load(factors + C - 1)
    strict, itself = i[:, None] > i[None, :], i[:, None] == i[None, :]
    decay = since[:, None] - since[None, :]
    decay = tl.exp2(tl.where(i[:, None] >= i[None, :], decay, float("-inf"))) * rk[None, :]
    # of what passes from step j to step i, (pairs)_ij β_j: dβ_j is all that leaves j, and dg_t all that passes t
    pairs, direct = dP * P_i, tl.sum(tl.where(itself, dA, 0.0), 0)
    own = tl.sum(tl.where(itself, pairs, 0.0), 0)
    dP *= decay * sq[:, None]
    dA = tl.where(strict, dA * decay * -rk[:, None], 0.0)
    pairs = tl.where(strict, pairs, 0.0) + dA * tl.dot(k_i, tl.trans(k_i), input_precision=PRECISION)
    dP, dA = (dP * beta[None, :]).to(dtype), (dA * beta[None, :]).to(dtype)
    dq_i *= (tl.exp2(since) * sq)[:, None]
    dr_i *= -(tl.exp2(since) * rk)[:, None]
    dk_i *= (tl.exp2(end - since) * rk)[:, None]
    qf, kf = q_i.to(tl.float32), k_i.to(tl.float32)
    leaves, inside = tl.sum(dk_i * kf, 1), tl.sum(pairs, 0)
    arrives = tl.sum(dq_i * qf + dr_i * kf, 1) + tl.sum(pairs * beta[None, :], 1) - beta * inside
    # E·dV / β has the smaller error, unless β is so small that dV is
    small = tl.abs(beta) < 0.02
    dbeta_i = tl.where(small, leaves + inside + own, direct / tl.where(small, 1.0, beta))
    tl.store(dbeta + (token + i) * HV + h, dbeta_i, mask=there)
    dg_i = tl.sum(tl.where(i[:, None] >= i[None, :], arrives[:, None], (beta * leaves)[:, None]), 0)
    tl.store(dg + (token + i) * HV + h, dg_i + tl.exp2(end) * tl.sum(through), mask=there)

    dq_i = tl.dot(dP, k_i, dq_i, input_precision=PRECISION)
    dk_i = tl.dot(dA, k_i, dr_i + beta[:, None] * dk_i, input_precision=PRECISION)
    dk_i = tl.dot(tl.trans(dP), q_i, dk_i, input_precision=PRECISION)
    dk_i = tl.dot(tl.trans(dA), k_i, dk_i, input_precision=PRECISION)
    if NORMALISE:
        rq = tl.rsqrt(tl.sum(qf * qf, 1) + 1e-6)
        dq_i -= qf * (rq * rq * tl.sum(dq_i * qf, 1))[:, None]
        dk_i -= kf * (rk * rk * tl.sum(dk_i * kf, 1))[:, None]
    at_key = i[:, None] * (HV * K) + key[None, :]
    tl.store(dq + (token * HV + h) * K + at_key, dq_i.to(dtype), mask=mask)
    tl.store(dk + (token * HV + h) * K + at_key, dk_i.to(dtype), mask=mask)


@jit
def _step_kernel(q, k, v, g, beta, state, o, scale, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
                 V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORMALISE: tl.constexpr):
    """Equation (1) once, for BV values of a head."""
    value, head = tl.program_id(0) * BV + tl.arange(0, BV), tl.program_id(1).to(tl.int64)
    key, h = tl.arange(0, BK), head // HV * H + head % HV // (HV // H)
    at_state, mask = (head * K + key[:, None]) * V + value[None, :], (key < K)[:, None] & (value < V)[None, :]
    S = tl.load(state + at_state, mask=mask, other=0.0)
    q_t = tl.load(q + h * K + key, mask=key < K, other=0.0).to(tl.float32)
    k_t = tl.load(k + h * K + key, mask=key < K, other=0.0).to(tl.float32)
    v_t = tl.load(v + head * V + value, mask=value < V, other=0.0).to(tl.float32)
    if NORMALISE:
        q_t *= tl.rsqrt(tl.sum(q_t * q_t, 0) + 1e-6)
        k_t *= tl.rsqrt(tl.sum(k_t * k_t, 0) + 1e-6)
    S *= tl.exp(tl.load(g + head).to(tl.float32))
    w = tl.load(beta + head).to(tl.float32) * (v_t - tl.sum(S * k_t[:, None], 0))
    S += k_t[:, None] * w[None, :]
    tl.store(state + at_state, S, mask=mask)
    o_t = tl.sum(S * (scale * q_t)[:, None], 0)
    tl.store(o + head * V + value, o_t.to(o.dtype.element_ty), mask=value < V)
