"""The gated delta rule's Triton kernels. The equations, their numbers and their names are those of delta_rule.py;
delta_rule_operators.py launches what is here.

With W = βE, E needs no division by β later, and what is solved does not depend on the state:

    E = (I − A')⁻¹ (V − γK S),   A'_ij = −D_ij (k_i·k_j) β_j;   dV = (I − A')⁻ᵀ β (Pᵀ dO + D_C K dS_C),   dβ = E·dV / β

C is 32: the inverse is then two blocks of 16 and a product, and a warp does it. Four launches, forward and backward:

    prepare     every chunk      q k g β → (I − A')⁻¹, Pβ (C numbers a step each) and factors (ROWS float32 a step)
    forward     heads × V / BV   q k v (I − A')⁻¹ Pβ factors → o, and to train E (V a step) and S (K·V/C a step)
    backward    heads × V / BV   q k do (I − A')⁻¹ Pβ factors → dv, dS_C (K·V/C a step)
    gradients   every chunk      q k do dv E S dS_C factors → dq dk dg dβ

Only the middle two go through time, with nothing in them but (2) and (3). Where their programs would leave a GPU idle
(few heads, a long sequence) time is cut into segments too: a first launch finds the affine map S_end = M S_start + B
of each segment, all at once, and the second composes the maps before its own and starts there.

The names here and in flash-linear-attention, tensors and what each holds:

    inverse      A (solved)     (I − A')⁻¹; of 16 bits, the sum of two: keys that repeat with β near 2 amplify its error
    P            (none)         D ⊙ Q'Kᵀ β, lower triangular
    whole, part  g (cumulated)  log2 of γ: the sum of whole powers of 2, which is exact, and the sum of what they leave
    errors       v_new / β      E, what S lacked; states, state_grads  h, dh  S at a chunk's start, dS at its end
    factors      (none)         rows of γ/|k|, γ·scale/|q|, β·D_C/|k|, γ_C, β, whole, part, D_C, scale/|q| and 1/|k|

A chunk is C steps; it lies in a slot, and a packed sequence's slots begin at start // C + n, which needs no table but
leaves some empty. S is kept as (V, K), and tiles of values in the scans as (V, C).
"""
from __future__ import annotations  # the kernels' are Triton's, which may be missing

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # there is none for this platform
    triton, jit = None, lambda kernel: kernel


# ------------------------------------------------------------------------------------------------------------
# Parts of the kernels

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
def _head(x, token, row, h, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr):
    """Where in x, (tokens, H, K), the key head of value head h has its token; row: numbers from a step to the next."""
    return x + token * row + h // (HV // H) * K


@jit
def _halves(x):
    """x as the sum of two bfloat16, to 16 bits."""
    upper = x.to(tl.bfloat16)
    return upper, (x - upper.to(tl.float32)).to(tl.bfloat16)


@jit
def _fine_dot(a, b, PRECISION: tl.constexpr):
    """a @ b of float32 to 16 bits, by products of bfloat16 halves, or exactly. Without the lower halves' own product an
    inverse's errors would be alike in all chunks of repeating keys, and add up."""
    if PRECISION == "ieee":
        return tl.dot(a, b, input_precision="ieee")
    else:
        a1, a2 = _halves(a)
        b1, b2 = _halves(b)
        return tl.dot(a1, b1, tl.dot(a1, b2, tl.dot(a2, b1, tl.dot(a2, b2))))


@jit
def _split_dot(a, b, c, dtype: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b + c, b being of the given type; SPLIT: a, of float32, as the sum of two of that type."""
    if SPLIT:
        c = tl.dot((a - a.to(dtype).to(tl.float32)).to(dtype), b, c)
    return tl.dot(a.to(dtype), b, c, input_precision=PRECISION)


@jit
def _decay(whole, part, C: tl.constexpr):
    """D from the logarithms of γ, whole powers of 2 and the rest; 0 above the diagonal."""
    i, D = tl.arange(0, C), whole[:, None] - whole[None, :] + (part[:, None] - part[None, :])
    return tl.exp2(tl.where(i[:, None] >= i[None, :], D, float("-inf")))


@jit
def _inverse_of_16(A, PRECISION: tl.constexpr):
    """(I − A)⁻¹ by doubling the blocks on the diagonal."""
    i = tl.arange(0, 16)
    apart = i[:, None] ^ i[None, :]
    X = tl.where(apart == 0, 1.0, tl.where(apart == 1, A, 0.0))
    for level in tl.static_range(1, 4):
        X += _fine_dot(_fine_dot(X, tl.where(apart >> level == 1, A, 0.0), PRECISION), X, PRECISION)
    return X


@jit
def _store_inverse(to, X, C: tl.constexpr, SPLIT: tl.constexpr):
    """A block of 16 × 16 of an inverse; SPLIT: what its dtype lacks too, C² numbers further on."""
    i = tl.arange(0, 16)
    to += i[:, None] * C + i[None, :]
    rounded = X.to(to.dtype.element_ty)
    tl.store(to, rounded)
    if SPLIT:
        tl.store(to + C * C, (X - rounded.to(tl.float32)).to(to.dtype.element_ty))


@jit
def _compose(S, M, B, count, M_step, B_step, M_mask, B_mask, PRECISION: tl.constexpr):
    """S after the affine maps S M + B of `count` segments, each so far from the one before."""
    for _ in range(count):
        S = _fine_dot(S, tl.load(M, mask=M_mask, other=0.0), PRECISION) + tl.load(B, mask=B_mask, other=0.0)
        M, B = M + M_step, B + B_step
    return S


# ------------------------------------------------------------------------------------------------------------
# The kernels

@jit
def prepare_kernel(q, k, g, beta, inverse, P, factors, cu_seqlens, T, N, scale, q_row: tl.constexpr,
                   k_row: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
                   ROWS: tl.constexpr, BK: tl.constexpr, NORMALISE: tl.constexpr, SPLIT: tl.constexpr,
                   PRECISION: tl.constexpr):
    """(I − A')⁻¹, Pβ and the factors of each step."""
    slot, h = tl.program_id(0), tl.program_id(1)
    token, steps = _chunk(cu_seqlens, slot, T, N, C)
    if steps <= 0:
        return
    i, key = tl.arange(0, C), tl.arange(0, BK)
    valid = i < steps
    q, k = _head(q, token, q_row, h, H, HV, K), _head(k, token, k_row, h, H, HV, K)
    scores, keys = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    rq, rk = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for first in range(0, K, BK):
        at_q, at_k = i[:, None] * q_row + first + key[None, :], i[:, None] * k_row + first + key[None, :]
        mask = valid[:, None] & (first + key < K)[None, :]
        q_i, k_i = tl.load(q + at_q, mask=mask, other=0.0), tl.load(k + at_k, mask=mask, other=0.0)
        scores = tl.dot(q_i, tl.trans(k_i), scores, input_precision=PRECISION)
        keys = tl.dot(k_i, tl.trans(k_i), keys, input_precision=PRECISION)
        if NORMALISE:
            rq += tl.sum(q_i.to(tl.float32) * q_i.to(tl.float32), 1)
            rk += tl.sum(k_i.to(tl.float32) * k_i.to(tl.float32), 1)
    rq, rk = (tl.rsqrt(rq + 1e-6), tl.rsqrt(rk + 1e-6)) if NORMALISE else (rq + 1.0, rk + 1.0)
    rq *= scale

    g_i = tl.load(g + (token + i) * HV + h, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
    beta_i = tl.load(beta + (token + i) * HV + h, mask=valid, other=0.0).to(tl.float32)
    # 2^-40 is nothing beside 1. Whole powers of 2 are summed apart, exactly: so a small gate after large ones is kept
    g_i = tl.where(g_i < -40.0, -40.0, g_i)
    whole = tl.floor(g_i + 0.5)
    part = g_i - whole
    whole_C, part_C = tl.sum(whole, 0), tl.sum(part, 0)
    whole, part = tl.cumsum(whole, 0), tl.cumsum(part, 0)
    gamma, to_end = tl.exp2(whole + part), tl.exp2(whole_C - whole + (part_C - part))
    to = (slot.to(tl.int64) * HV + h) * C
    factors += to * ROWS + i
    tl.store(factors, gamma * rk)
    tl.store(factors + C, gamma * rq)
    tl.store(factors + 2 * C, beta_i * to_end * rk)
    tl.store(factors + 3 * C, tl.exp2(whole_C + part_C))
    tl.store(factors + 4 * C, beta_i)
    tl.store(factors + 5 * C, whole)
    tl.store(factors + 6 * C, part)
    tl.store(factors + 7 * C, to_end)
    if NORMALISE:
        tl.store(factors + 8 * C, rq)
        tl.store(factors + 9 * C, rk)

    decay = _decay(whole, part, C) * (rk * beta_i)[None, :]
    tl.store(P + to * C + i[:, None] * C + i[None, :], scores * decay * rq[:, None])
    A = tl.where(i[:, None] > i[None, :], keys * decay * -rk[:, None], 0.0)
    left, right = tl.split(A.reshape(2, 16, 2, 16).permute(1, 3, 0, 2))
    A11, A21 = tl.split(left)
    _, A22 = tl.split(right)
    X11, X22 = _inverse_of_16(A11, PRECISION), _inverse_of_16(A22, PRECISION)
    X21 = _fine_dot(_fine_dot(X22, A21, PRECISION), X11, PRECISION)
    inverse += to * (2 * C if SPLIT else C)
    _store_inverse(inverse, X11, C, SPLIT)
    _store_inverse(inverse + 16, tl.zeros([16, 16], tl.float32), C, SPLIT)
    _store_inverse(inverse + 16 * C, X21, C, SPLIT)
    _store_inverse(inverse + 16 * C + 16, X22, C, SPLIT)


@jit
def forward_kernel(q, k, v, inverse, P, factors, initial, maps, o, errors, states, final, cu_seqlens, T,
                   q_row: tl.constexpr, k_row: tl.constexpr, v_row: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
                   MAP: tl.constexpr, SAVE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
                   ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr,
                   PRECISION: tl.constexpr):
    """The scan, for BV values of a head and one segment of time: o, E, the S at the start of each chunk and at the end.
    MAP: as if the segment started from nothing, for V rows, and for K more from the identity with v = 0: B and M."""
    BLOCKS: tl.constexpr = (V + K + BV - 1) // BV if MAP else (V + BV - 1) // BV
    CC: tl.constexpr = 2 * C * C if SPLIT else C * C
    dtype: tl.constexpr = k.dtype.element_ty
    head, block, segment = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.program_id(1)
    h = head % HV
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
            S = _compose(S, maps + (V + key[:, None]) * K + key[None, :], maps + at_state, segment, (V + K) * K,
                         (V + K) * K, (key < K)[:, None] & keys, keys & values, PRECISION)

    token, remaining = token + segment * R * C, steps - segment * R * C
    chunk = (slot + segment * R).to(tl.int64) * HV + h
    q, k = _head(q, token, q_row, h, H, HV, K), _head(k, token, k_row, h, H, HV, K)
    v, o = v + token * v_row + h * V, o + (token * HV + h) * V
    inverse, P, factors = inverse + chunk * CC, P + chunk * C * C, factors + chunk * ROWS * C
    errors, states = errors + chunk * V * C, states + chunk * V * K
    at_q, at_k, at_step = (i[:, None] * q_row + key[None, :], i[:, None] * k_row + key[None, :],
                           i[:, None] * C + i[None, :])
    at_v, at_o = i[None, :] * v_row + value[:, None], i[None, :] * (HV * V) + value[:, None]
    # what no product takes, the compiler does not fetch ahead
    next_v = tl.load(v + at_v, mask=(i < remaining)[None, :] & values, other=0.0)
    next_end, next_q = tl.load(factors + 3 * C), tl.load(factors + C + i)
    for _ in range(tl.minimum(R, tl.cdiv(remaining, C))):
        valid = i < remaining
        v_i, gamma_C, gamma_q = next_v, next_end, next_q
        next_v = tl.load(v + C * v_row + at_v, mask=(i < remaining - C)[None, :] & values, other=0.0)
        next_end = tl.load(factors + HV * ROWS * C + 3 * C, mask=remaining > C, other=0.0)
        next_q = tl.load(factors + HV * ROWS * C + C + i, mask=i < remaining - C, other=0.0)
        k_i = tl.load(k + at_k, mask=valid[:, None] & keys, other=0.0)
        gamma_k, beta_to_end = tl.load(factors + i), tl.load(factors + 2 * C + i)
        s = S.to(dtype)
        e = v_i - gamma_k[None, :] * tl.dot(s, tl.trans(k_i), input_precision=PRECISION)
        lower = tl.zeros([BV, C], tl.float32)
        if SPLIT:
            lower = tl.dot(e.to(dtype), tl.trans(tl.load(inverse + C * C + at_step)), lower)
        e = _split_dot(e, tl.trans(tl.load(inverse + at_step)), lower, dtype, SPLIT, PRECISION)
        S = _split_dot(beta_to_end[None, :] * e, k_i, gamma_C * S, dtype, SPLIT, PRECISION)
        if not MAP:
            q_i = tl.load(q + at_q, mask=valid[:, None] & keys, other=0.0)
            P_i, e = tl.load(P + at_step), e.to(dtype)
            o_i = gamma_q[None, :] * tl.dot(s, tl.trans(q_i), input_precision=PRECISION)
            o_i += tl.dot(e, tl.trans(P_i), input_precision=PRECISION)
            tl.store(o + at_o, o_i.to(dtype), mask=valid[None, :] & values)
            if SAVE:
                tl.store(errors + i[None, :] * V + value[:, None], e, mask=values)
                tl.store(states + at_state, s, mask=keys & values)
        q, k, v, o = q + C * q_row, k + C * k_row, v + C * v_row, o + C * HV * V
        inverse, P, factors = inverse + HV * CC, P + HV * C * C, factors + HV * ROWS * C
        errors, states, remaining = errors + HV * V * C, states + HV * V * K, remaining - C
    if MAP:
        tl.store(maps + segment * (V + K) * K + at_state, S, mask=keys & (value < V + K)[:, None])
    else:
        if (segment + 1) * R * C >= steps:
            tl.store(final + at_first, S, mask=keys & values)


@jit
def backward_kernel(q, k, do, inverse, P, factors, dfinal, maps, map_grads, dv, state_grads, dinitial, cu_seqlens, T,
                    q_row: tl.constexpr, k_row: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, MAP: tl.constexpr,
                    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
                    BV: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """The scan in reverse: dv, the dS at the end of each chunk and at the start. MAP: from nothing; M is known."""
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    CC: tl.constexpr = 2 * C * C if SPLIT else C * C
    dtype: tl.constexpr = k.dtype.element_ty
    head, block, segment = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.program_id(1)
    h = head % HV
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
        map_grads += head.to(tl.int64) * tl.num_programs(1) * V * K
        if not MAP:
            last = tl.maximum(tl.cdiv(tl.cdiv(steps, C), R) - 1, 0)
            dS = _compose(dS, maps + (last * (V + K) + V + key[None, :]) * K + key[:, None],
                          map_grads + last * V * K + at_state, last - segment, -(V + K) * K, -V * K,
                          (key < K)[:, None] & keys, keys & values, PRECISION)

    chunks = tl.minimum(R, tl.cdiv(steps, C) - segment * R)
    token, ahead = token + (segment * R + chunks - 1) * C, chunks - 1
    chunk, remaining = (slot + segment * R + ahead).to(tl.int64) * HV + h, steps - (segment * R + ahead) * C
    q, k = _head(q, token, q_row, h, H, HV, K), _head(k, token, k_row, h, H, HV, K)
    do, dv, state_grads = do + (token * HV + h) * V, dv + (token * HV + h) * V, state_grads + chunk * V * K
    inverse, P, factors = inverse + chunk * CC, P + chunk * C * C, factors + chunk * ROWS * C
    at_q, at_k, at_step = (i[:, None] * q_row + key[None, :], i[:, None] * k_row + key[None, :],
                           i[:, None] * C + i[None, :])
    at_value = i[None, :] * (HV * V) + value[:, None]
    # an empty sequence has no last chunk, and the first sequence then none before it
    next_end = tl.load(factors + 3 * C, mask=ahead >= 0, other=0.0)
    next_tail = tl.load(factors + 2 * C + i, mask=i < chunks * C, other=0.0)
    for _ in range(chunks):
        valid, gamma_C, beta_to_end = i < remaining, next_end, next_tail
        next_end = tl.load(factors - HV * ROWS * C + 3 * C, mask=ahead > 0, other=0.0)
        next_tail = tl.load(factors - HV * ROWS * C + 2 * C + i, mask=i < ahead * C, other=0.0)
        k_i = tl.load(k + at_k, mask=valid[:, None] & keys, other=0.0)
        q_i = tl.load(q + at_q, mask=valid[:, None] & keys, other=0.0)
        do_i = tl.load(do + at_value, mask=valid[None, :] & values, other=0.0)
        inverse_i, P_i = tl.load(inverse + at_step), tl.load(P + at_step)
        gamma_k, gamma_q = tl.load(factors + i), tl.load(factors + C + i)
        ds = dS.to(dtype)
        de = beta_to_end[None, :] * tl.dot(ds, tl.trans(k_i), input_precision=PRECISION)
        de += tl.dot(do_i, P_i, input_precision=PRECISION)
        lower = tl.zeros([BV, C], tl.float32)
        if SPLIT:
            lower = tl.dot(de.to(dtype), tl.load(inverse + C * C + at_step), lower)
        dz = _split_dot(de, inverse_i, lower, dtype, SPLIT, PRECISION)
        if not MAP:
            tl.store(dv + at_value, dz.to(dtype), mask=valid[None, :] & values)
            tl.store(state_grads + at_state, ds, mask=keys & values)
        do_i = (do_i.to(tl.float32) * gamma_q[None, :]).to(dtype)
        dS = tl.dot(do_i, q_i, gamma_C * dS, input_precision=PRECISION)
        dS = tl.dot((dz * -gamma_k[None, :]).to(dtype), k_i, dS, input_precision=PRECISION)
        q, k, do, dv = q - C * q_row, k - C * k_row, do - C * HV * V, dv - C * HV * V
        inverse, P, factors = inverse - HV * CC, P - HV * C * C, factors - HV * ROWS * C
        state_grads, remaining, ahead = state_grads - HV * V * K, remaining + C, ahead - 1
    if MAP:
        tl.store(map_grads + segment * V * K + at_state, dS, mask=keys & values)
    else:
        if segment == 0:
            tl.store(dinitial + at_first, dS, mask=keys & values)


@jit
def gradients_kernel(q, k, do, factors, errors, states, dv, state_grads, dq, dk, dg, dbeta, cu_seqlens, T, N, scale,
                     q_row: tl.constexpr, k_row: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
                     NORMALISE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
                     ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """dq, dk, dg and dβ of a chunk, all else being known: no step of it waits for another chunk."""
    dtype: tl.constexpr = k.dtype.element_ty
    EARLY: tl.constexpr = not NORMALISE and BK <= 64
    slot, h = tl.program_id(0), tl.program_id(1)
    token, steps = _chunk(cu_seqlens, slot, T, N, C)
    if steps <= 0:
        return
    i, key = tl.arange(0, C), tl.arange(0, BK)
    valid, keys, chunk = i < steps, (key < K)[None, :], slot.to(tl.int64) * HV + h
    do, dv, errors = do + (token * HV + h) * V, dv + (token * HV + h) * V, errors + chunk * V * C
    states, state_grads = states + chunk * V * K, state_grads + chunk * V * K
    q = _head(q, token, q_row, h, H, HV, K) + i[:, None] * q_row + key[None, :]
    k, mask = _head(k, token, k_row, h, H, HV, K) + i[:, None] * k_row + key[None, :], valid[:, None] & keys
    if EARLY:  # asked for here they are there in time; with norms there are no registers for them
        q_i, k_i = tl.load(q, mask=mask, other=0.0), tl.load(k, mask=mask, other=0.0)
    dP, dA, through = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([BV, BV], tl.float32)
    dq_i, dr_i, dk_i = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    for first in range(0, V, BV):
        value = first + tl.arange(0, BV)
        values = (value < V)[None, :]
        at_value, at_state = i[:, None] * (HV * V) + value[None, :], value[:, None] * K + key[None, :]
        do_i = tl.load(do + at_value, mask=valid[:, None] & values, other=0.0)
        dz_i = tl.load(dv + at_value, mask=valid[:, None] & values, other=0.0)
        e_i = tl.load(errors + i[:, None] * V + value[None, :], mask=values, other=0.0)
        S_i = tl.load(states + at_state, mask=keys & (value < V)[:, None], other=0.0)
        dS_i = tl.load(state_grads + at_state, mask=keys & (value < V)[:, None], other=0.0)
        # its diagonal is wanted; as the last of these products it would force its layout on all, at twice the work
        through = tl.dot(S_i, tl.trans(dS_i), through, input_precision=PRECISION)
        dP = tl.dot(do_i, tl.trans(e_i), dP, input_precision=PRECISION)
        dA = tl.dot(dz_i, tl.trans(e_i), dA, input_precision=PRECISION)
        dq_i = tl.dot(do_i, S_i, dq_i, input_precision=PRECISION)
        dr_i = tl.dot(dz_i, S_i, dr_i, input_precision=PRECISION)
        dk_i = tl.dot(e_i, dS_i, dk_i, input_precision=PRECISION)

    factors += chunk * ROWS * C + i
    beta, whole, part = tl.load(factors + 4 * C), tl.load(factors + 5 * C), tl.load(factors + 6 * C)
    gamma, to_end = tl.exp2(whole + part), tl.load(factors + 7 * C)
    if not EARLY:
        q_i, k_i = tl.load(q, mask=mask, other=0.0), tl.load(k, mask=mask, other=0.0)
    if NORMALISE:
        rq, rk = tl.load(factors + 8 * C), tl.load(factors + 9 * C)
    else:
        rq, rk = tl.full([C], 1.0, tl.float32) * scale, tl.full([C], 1.0, tl.float32)
    at = tl.arange(0, BV)
    gamma_C = tl.max(gamma * to_end, 0)                                              # any step's is
    through = tl.sum(tl.where(at[:, None] == at[None, :], through, 0.0)) * gamma_C
    strict, itself = i[:, None] > i[None, :], i[:, None] == i[None, :]
    decay = _decay(whole, part, C) * rk[None, :]
    # of what passes from step j to step i, (pairs)_ij β_j: dβ_j is all that leaves j, and dg_t all that passes t
    dP *= decay * rq[:, None]
    pairs = dP * tl.dot(q_i, tl.trans(k_i), input_precision=PRECISION)
    own, pairs = tl.sum(tl.where(itself, pairs, 0.0), 0), tl.where(strict, pairs, 0.0)
    dq_i *= (gamma * rq)[:, None]
    arrives_q = tl.sum(dq_i * q_i.to(tl.float32), 1) + tl.sum(pairs * beta[None, :], 1)
    inside = tl.sum(pairs, 0)
    dP = (dP * beta[None, :]).to(dtype)
    at_key, to = i[:, None] * (HV * K) + key[None, :], (token * HV + h) * K
    if NORMALISE:  # what is along q does nothing
        dq_i -= (rq / scale * (rq / scale) * (arrives_q + beta * own))[:, None] * q_i.to(tl.float32)
    dq_i = tl.dot(dP, k_i, dq_i, input_precision=PRECISION)
    tl.store(dq + to + at_key, dq_i.to(dtype), mask=mask)

    dr_i *= -(gamma * rk)[:, None]
    dk_i *= (to_end * rk)[:, None]
    arrives_k, leaves = tl.sum(dr_i * k_i.to(tl.float32), 1), tl.sum(dk_i * k_i.to(tl.float32), 1)
    dk_i = tl.dot(tl.trans(dP), q_i, dr_i + beta[:, None] * dk_i, input_precision=PRECISION)
    direct = tl.sum(tl.where(itself, dA, 0.0), 0)
    dA = tl.where(strict, dA * decay * -rk[:, None], 0.0)
    pairs = dA * tl.dot(k_i, tl.trans(k_i), input_precision=PRECISION)
    arrives_k += tl.sum(pairs * beta[None, :], 1)
    inside += tl.sum(pairs, 0)
    dA *= beta[None, :]
    dA += tl.trans(dA)
    if NORMALISE:  # nor what is along k
        dA -= tl.where(itself, (rk * rk * (arrives_k + beta * (leaves + inside + own)))[None, :], 0.0)
    dk_i = tl.dot(dA.to(dtype), k_i, dk_i, input_precision=PRECISION)
    tl.store(dk + to + at_key, dk_i.to(dtype), mask=mask)

    # E·dV / β has the smaller error, unless β is so small that dV is
    small = tl.abs(beta) < 0.02
    dbeta_i = tl.where(small, leaves + inside + own, direct / tl.where(small, 1.0, beta))
    tl.store(dbeta + (token + i) * HV + h, dbeta_i, mask=valid)
    arrives = arrives_q + arrives_k - beta * inside
    dg_i = tl.sum(tl.where(i[:, None] >= i[None, :], arrives[:, None], (beta * leaves)[:, None]), 0)
    tl.store(dg + (token + i) * HV + h, dg_i + through, mask=valid)


@jit
def step_kernel(q, k, v, g, beta, state, o, scale, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
                V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORMALISE: tl.constexpr):
    """Equation (1) once, for BV values of a head."""
    value, head = tl.program_id(1) * BV + tl.arange(0, BV), tl.program_id(0).to(tl.int64)
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
