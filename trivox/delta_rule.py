"""The gated delta rule, a recurrence over sequences: step by step, and in chunks in plain PyTorch. A GPU takes the
kernels of delta_rule_kernels.py instead, as `_takes_kernels` decides.

In every head a state S, (K, V), maps keys to values. Each step forgets a little, then corrects what S holds for the
key k_t towards the value v_t; g_t ≤ 0 is the log-decay and β_t the size of the correction:

    S ← exp(g_t) S,    S ← S + k_t w_tᵀ with w_t = β_t (v_t − Sᵀk_t),    o_t = scale · Sᵀq_t                   (1)

A loop over time is slow, so time is cut into chunks of C steps. Let S be the state before a chunk, γ_i the decay from
there to the chunk's step i, D_ij = exp(g_{j+1} + … + g_i) the decay from step j to step i ≥ j. Unrolling (1),

    S_i = γ_i S + Σ_{j≤i} D_ij k_j w_jᵀ,       w_i = β_i (v_i − γ_i Sᵀk_i − Σ_{j<i} D_ij (k_i·k_j) w_j)

With a row for each step, Q' = scale · Q and R = −βK, outputs and corrections read the state in one and the same way,
and as A is strictly lower triangular, W can be had from S (the WY form of a product of Householder-like factors):

    O = γQ' S + P W,                           P = D ⊙ Q'Kᵀ lower triangular
    W = βV + γR S + A W,                       A = D ⊙ R Kᵀ strictly lower triangular                          (2)
      = (I − A)⁻¹ (βV + γR S);                 S_C = γ_C S + (D_C K)ᵀ W                                        (3)

Of this only W and S_C, three small products a chunk, must be done in turn. The gradient does the same in reverse, D_C K
having changed places with γR and γQ'; X = βV + γR S:

    dW = Pᵀ dO + D_C K dS_C,     dX = (I − A)⁻ᵀ dW,     dS = γ_C dS_C + (γQ')ᵀ dO + (γR)ᵀ dX                   (4)

Decays γ and D below 1e-20 (of float32; the square root of its smallest normal number, over 10) are made 0, and so is
what of (I − A)⁻¹ is smaller: their products would be denormal, and a CPU takes a hundred times as long for each.

Sources: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024, arXiv:2412.06464
(the rule and its chunks); Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length", 2024, arXiv:2406.06484 (the WY form). Names and shapes are those of flash-linear-attention.
"""
import math
import os

import torch
import torch.nn.functional as F

from trivox import delta_rule_operators as operators
from trivox.common import widest
from trivox.delta_rule_operators import need, sequence_lengths

PATH = os.environ.get("TRIVOX_DELTA_RULE", "")
if PATH not in ("", "torch", "triton"):
    raise ValueError(f"TRIVOX_DELTA_RULE is {PATH!r}, but must be torch, triton or not set")
CPU_ROWS = 4096  # steps × sequences × value heads that a CPU takes at once: 2048 to 8192 do equally well
FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
INTEGERS = frozenset((torch.int64, torch.int32))


def recurrent_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                               use_qk_l2norm_in_kernel=False, *, cu_seqlens=None):
    """Equation (1) as a loop over time, for autograd to differentiate: slow, and the oracle of everything else.
    Arguments, results and errors are those of `chunk_gated_delta_rule`, cu_seqlens by name."""
    _check(q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel, cu_seqlens)
    if cu_seqlens is not None:
        lengths = sequence_lengths(cu_seqlens, q.shape[1])
        inputs = zip(*(x.split(lengths, 1) for x in (q, k, v, g, beta)))
        states = [None] * len(lengths) if initial_state is None else initial_state.split(1)
        o, S = zip(*(recurrent_gated_delta_rule(*x, scale, s, True, use_qk_l2norm_in_kernel)
                     for x, s in zip(inputs, states)))
        return torch.cat(o, 1), torch.cat(S) if output_final_state else None

    (B, _, H, K), (HV, V), dtype = q.shape, v.shape[2:], v.dtype
    if v.numel() == 0:
        return chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state)
    o, scale = [], K**-0.5 if scale is None else scale
    S = v.new_zeros(B, HV, K, V) if initial_state is None else initial_state
    q, k, v, g, beta, S = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v, g, beta, S))
    if use_qk_l2norm_in_kernel:
        q, k = q * _inverse_norm(q), k * _inverse_norm(k)
    q, k = (x.repeat_interleave(HV // H, 2)[..., None] for x in (scale * q, k))              # (B, T, HV, K, 1)
    v, g, beta = v[:, :, :, None], g.exp()[..., None, None], beta[..., None, None]           # (B, T, HV, 1, V|1)
    for q_t, k_t, v_t, gate, beta_t in zip(*(x.unbind(1) for x in (q, k, v, g, beta))):
        S = gate * S                                                                         # (B, HV, K, V)
        S = S + k_t * beta_t * (v_t - (S * k_t).sum(-2, keepdim=True))
        o.append((S * q_t).sum(-2))                                                          # (B, HV, V)
    return torch.stack(o, 1).to(dtype), S if output_final_state else None


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,
                           state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None,
                           cp_context=None, *, use_gate_in_kernel=False, A_log=None, dt_bias=None):
    """The gated delta rule in chunks, equations (3) and (4): a drop-in for flash-linear-attention 0.6's function of the
    same name, by position too.

    Args:
        q, k: (B, T, H, K) queries and keys. Beyond β |k|² = 2 the recurrence itself diverges.
        v: (B, T, HV, V) values. HV is a multiple of H: value head i goes with key head i // (HV // H).
        g, beta: (B, T, HV) log-decay, from 0 down to any depth, and size of the correction.
        scale: of the queries, K^-½ unless given.
        initial_state: (N, HV, K, V), zeros unless given; N is B, or the number of packed sequences.
        output_final_state: whether to return the state after the last step.
        use_qk_l2norm_in_kernel: whether to put x · (Σx² + 1e-6)^-½ for q and k first.
        cu_seqlens: (N + 1,) integers, rising from 0 to T, where B is 1 and sequences are packed along T: sequence n is
            [cu_seqlens[n], cu_seqlens[n + 1]), and may be empty. They are read on the host, for which a GPU stops, once
            for a tensor that the kernels meet again, and not where they are captured in a CUDA graph.
        cu_seqlens_cpu: the same numbers on the CPU, read instead, so that a GPU need not stop. Nobody compares the two.
        chunk_indices: not needed, and not looked at. Arguments that are not named here are refused.

    Returns:
        o, (B, T, HV, V) in v's dtype, and the final state, (N, HV, K, V), or None. State and arithmetic are float32,
        under autocast too, and float64 where v is; float32 products obey `torch.set_float32_matmul_precision`.

    Gradients reach every tensor, once. Saved for them are the inputs (of packed sequences a copy) and C + V + K·V/C
    float32 numbers a step and value head, C = 32 on a CPU and 64 elsewhere: (I − A)⁻¹, W and each chunk's S. All else
    is computed a second time. The kernels save 3C + V + K·V/C numbers in v's dtype and 10 float32 ones, C = 32, and
    take g below −27.7 (a decay of 1e-12) for −27.7, so that of a state of 1e12 something is left; they round q, k and
    what reads the state to v's dtype, which in float16 must then stay below 65,504. NaN and inf spoil all of their
    sequence, the steps before them too, and no other. They read q, k and v where these lie: slices of a projection are
    not copied. Gradients of gradients are refused. Where β |k|² is near 2 and keys repeat, as in silence, nothing is
    forgotten, rounding neither: at 1.99, 1,000 steps of one key in bfloat16 leave an error of 1.4 % of the output.

    Raises ValueError, naming the argument, if it is no tensor, not of floats (cu_seqlens: of integers), on another
    device than q or of a shape that does not fit the others', if K or V is not in 1..256, or cu_seqlens does not cover
    T, and for what is refused.
    """
    if (use_beta_sigmoid_in_kernel or allow_neg_eigval or state_v_first or use_gate_in_kernel
            or not (cp_context is A_log is dt_bias is None)):
        _refuse(use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
                state_v_first=state_v_first, cp_context=cp_context, use_gate_in_kernel=use_gate_in_kernel, A_log=A_log,
                dt_bias=dt_bias)
    N = _check(q, k, v, g, beta, scale, initial_state, use_qk_l2norm_in_kernel, cu_seqlens, cu_seqlens_cpu)
    (_, T, _, K), (HV, V), dtype, lengths = q.shape, v.shape[2:], torch.promote_types(v.dtype, torch.float32), None
    S, scale = initial_state if initial_state is None else initial_state.to(dtype), K**-0.5 if scale is None else scale
    if cu_seqlens_cpu is not None and not torch.compiler.is_compiling():
        lengths = sequence_lengths(cu_seqlens_cpu, T)
        operators.remember(cu_seqlens, T)
    if _takes_kernels(v) and v.numel():
        q, k = q.to(v.dtype), k.to(v.dtype)
        save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta, S) if x is not None)
        o, S = operators.delta_rule(q, k, v, g, beta, S, cu_seqlens, scale, use_qk_l2norm_in_kernel, save)
        return o, S if output_final_state else None

    if lengths is None:
        lengths = [T] * N if cu_seqlens is None else sequence_lengths(cu_seqlens, T)
    S = v.new_zeros(N, HV, K, V, dtype=dtype) if S is None else S
    o, S = _chunk_in_torch(q, k, v, g, beta, scale, S, cu_seqlens is not None, lengths, use_qk_l2norm_in_kernel)
    return o, S if output_final_state else None


def recurrent_step(q, k, v, g, beta, state, scale=None, *, use_qk_l2norm_in_kernel=False):
    """One step of equation (1), for decoding: one kernel on a GPU, and no gradients.

    q, k (B, H, K), v (B, HV, V), g, beta (B, HV); `state` (B, HV, K, V), float32 and contiguous, is updated in place.
    Returns o, (B, HV, V), in v's dtype. Raises ValueError as `chunk_gated_delta_rule` does, and for another state.
    """
    _check(q, k, v, g, beta, scale, state, use_qk_l2norm_in_kernel, step=True)
    scale = q.shape[2]**-0.5 if scale is None else scale
    if _takes_kernels(v):
        with torch.no_grad():
            return operators.delta_rule_step(q.to(v.dtype), k.to(v.dtype), v, g, beta, state, scale,
                                             use_qk_l2norm_in_kernel)
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        dtype, (q, k, v, g, beta) = v.dtype, (x.float() for x in (q, k, v, g, beta))
        if use_qk_l2norm_in_kernel:
            q, k = q * _inverse_norm(q), k * _inverse_norm(k)
        q, groups = scale * q, v.shape[1] // q.shape[1]
        if groups > 1:
            q, k = q.repeat_interleave(groups, 1), k.repeat_interleave(groups, 1)
        S, shape = state.flatten(0, 1), v.shape                                              # (B HV, K, V)
        q, k, v = (x.reshape(len(S), 1, -1) for x in (q, k, v))                              # (B HV, 1, K|V)
        S.mul_(g.exp().view(-1, 1, 1))
        S.addcmul_(k.mT, beta.reshape(-1, 1, 1) * (v - torch.bmm(k, S)))
        return torch.bmm(q, S).view(shape).to(dtype)


def _takes_kernels(v):
    """Where the path is chosen: a GPU takes the kernels, all else PyTorch; TRIVOX_DELTA_RULE=torch|triton overrides."""
    return v.dtype != torch.float64 and (
        PATH == "triton" or not PATH and v.is_cuda and operators.kernels.triton is not None)


def _chunk_in_torch(q, k, v, g, beta, scale, S, packed, lengths, normalise):
    # a CPU wants its working set in cache, so time goes by in segments; a GPU wants few launches, so all of it at once
    C, most = (32, CPU_ROWS // (32 * v.shape[2])) if v.device.type == "cpu" else (64, float("inf"))
    inputs, counts = (q, k, v, g[..., None], beta[..., None]), [len(lengths)] * -(-q.shape[1] // C)
    if v.numel() == 0:
        packed, counts = False, []
    if packed:
        order, source, target, counts = _schedule(lengths, C, v.device)
        inputs, S = [F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, source) for x in inputs], S[order]

    segments, room = [], 0
    for count in counts:
        if count > room:
            segments, room = segments + [[]], most
        segments[-1].append(count)
        room -= count
    o, S = _Chunks.apply(*inputs, S, scale, normalise, C, segments)
    return (o.index_select(1, target), S[order.argsort()]) if packed else (o, S)


class _Chunks(torch.autograd.Function):
    """Equations (2) to (4), one segment of time after the other; a segment is a list of how many sequences have a first
    chunk in it, a second, ... What is within chunks has M rows, one a chunk, sequence and value head, in the order of
    the scan."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, S, scale, normalise, C, segments):
        inputs, ctx.settings, saved = (q, k, v, g, beta), (scale, normalise, C, segments), []
        o, last = v.new_empty(v.shape), S.clone(memory_format=torch.contiguous_format)
        with torch.autocast(v.device.type, enabled=False):
            for x, sizes, o_segment in _segments(segments, C, *inputs, o):
                _, k, beta, _, gamma, tail, _, _, reads, P, A = _within_chunks(*x, scale, normalise, C)
                inverse, W = _inverse(A), beta * _to_chunks(x[2], v, C)                      # W: βV as yet
                starts = _scan(W, reads[:, 1], inverse, W, tail * k, gamma[:, -1:], last.flatten(0, 1), sizes)
                _from_chunks((P @ W).baddbmm_(reads[:, 0], starts), o_segment)
                saved += inverse, W, starts
        ctx.save_for_backward(*inputs, *saved)
        return o, last

    @staticmethod
    def backward(ctx, do, dlast):
        with torch.no_grad():
            gradients = _Chunks.gradients(ctx, do, dlast)
        return operators.without_gradients(ctx, gradients, do, dlast)

    @staticmethod
    def gradients(ctx, do, dlast):
        (scale, normalise, C, segments), (q, k, v, g, beta, *saved) = ctx.settings, ctx.saved_tensors
        inputs = q, k, v, g, beta
        gradients, dS = [x.new_empty(x.shape) for x in inputs], dlast.flatten(0, 1).clone()
        with torch.autocast(do.device.type, enabled=False):
            for x, sizes, do, *results in reversed(_segments(segments, C, *inputs, do, *gradients)):
                starts, W, inverse = saved.pop(), saved.pop(), saved.pop()
                q, k, beta, norms, gamma, tail, decay, readers, reads, P, _ = _within_chunks(*x, scale, normalise, C)
                v, dout = _to_chunks(x[2], x[2], C), _pair(do, do, x[2], C).flatten(1, 2)    # [dO; dX yet to come]
                dW = P.mT @ dout[:, :C]
                dends = _scan(dW, tail * k, inverse.mT, dout, reads.flatten(1, 2), gamma[:, -1:], dS, sizes, True)

                # o and w read alike: through [Q'; R], from the chunk's start (γ, S) and from its steps (D, W). What
                # goes from a step to itself is kept apart: dg has none of it, and there it would cancel only up to
                # rounding, and hide the rest if g ≪ 0
                dscores = _halves(dout @ W.mT).mul_(decay[:, None])                          # (M, 2, C, C)
                diagonal = dscores.diagonal(dim1=2, dim2=3)
                itself = diagonal[:, 0, :, None].clone()
                diagonal.zero_()
                dscores = dscores.flatten(1, 2)
                dreaders = _halves(dout @ starts.mT).mul_(gamma[:, None]).flatten(1, 2).baddbmm_(dscores, k)
                dq, dr = _halves(dreaders).unbind(1)                                         # (M, C, K)
                dk_steps, dk_tail = dscores.mT @ readers.flatten(1, 2), (W @ dends.mT).mul_(tail)

                # g_t scales all that goes from before step t (a step, the start) to t or after (a step, the end)
                k_dr = _dot(k, dr)
                dg = _dot(readers[:, 0], dq) - beta * k_dr - _dot(k, dk_steps)
                dg = dg.flip(1).cumsum(1).flip(1) + F.pad(_dot(k, dk_tail)[:, :-1], (0, 0, 1, 0)).cumsum(1)
                dg += gamma[:, -1:] * dends.mul_(starts).sum((1, 2), keepdim=True)

                dx = dout[:, C:]
                dk = dk_steps.addcmul_(beta, dr, value=-1).add_(dk_tail).addcmul_(itself, readers[:, 0])
                dq, dv, dbeta = dq.addcmul_(itself, k).mul_(scale), beta * dx, _dot(v, dx) - k_dr
                if normalise:
                    dq, dk = (r * (dy - y * _dot(y, dy)) for y, dy, r in zip((q, k), (dq, dk), norms.unbind(1)))
                for y, dy in zip(results, (dq, dk, dv, dg, dbeta)):
                    _from_chunks(dy, y)
        return *gradients, dS.view(dlast.shape), None, None, None, None


def _segments(segments, C, *inputs):
    """For each segment its part of q, k, v, g, beta, the rows that its first chunks have, its second, ..., and its part
    of what else there is."""
    if not segments:
        return []
    B, T, HV = inputs[2].shape[:3]
    steps = [sum(segment) * C // B for segment in segments]
    steps[-1] = T - sum(steps[:-1])                                           # the last chunk may be a short one
    parts = zip(*(x.split(steps, 1) for x in inputs))
    return [(x[:5], [n * HV for n in segment], *x[5:]) for segment, x in zip(segments, parts)]


def _within_chunks(q, k, v, g, beta, scale, normalise, C):
    """What can be said of each chunk without its inverse and its state; the names are the module docstring's."""
    qk, g, beta = _pair(q, k, v, C), _to_chunks(g, v, C), _to_chunks(beta, v, C)             # (M, 2, C, K), (M, C, 1)
    norms = _inverse_norm(qk) if normalise else None
    qk = qk * norms if normalise else qk
    # sums in float64, where there is one, and no gate counts for more than it takes to decay to 0: a small gate after
    # large ones is kept
    least = math.log(_least(g.dtype)) - 1
    since = g.to(widest(g.device)).clamp(min=least).cumsum(1)
    gamma, decay = (F.threshold_(x.to(g.dtype).clamp_(min=least).exp_(), _least(g.dtype), 0.0)
                    for x in (since, (since - since.mT).tril_()))                            # (M, C, 1), (M, C, C)
    tail = decay.tril_()[:, -1, :, None]                                                     # D_C
    readers = qk * torch.stack([torch.full_like(beta, scale), -beta], 1)                     # [Q'; R], (M, 2, C, K)
    reads = readers * gamma[:, None]                                                         # [γQ'; γR]
    P, A = _halves(readers.flatten(1, 2) @ qk[:, 1].mT).mul_(decay[:, None]).unbind(1)       # A's diagonal is not used
    return *qk.unbind(1), beta, norms, gamma, tail, decay, readers, reads, P, A


def _inverse(A):
    """(I − A)⁻¹ by substitution; of A, (M, C, C), only what is below the diagonal is read. Nothing on the way outgrows
    the result, while the sum of A's powers has terms of about 3^C where β = 2 and keys are alike: float32 would keep no
    digit. All is 2^60 times as large meanwhile, so that products of decays stay normal."""
    large = torch.eye(A.shape[1], dtype=A.dtype, device=A.device).mul_(2.0**60)
    inverse = torch.linalg.solve_triangular(-A, large, upper=False, unitriangular=True)
    return F.hardshrink(inverse, _least(A.dtype) * 2.0**60).mul_(2.0**-60)


def _least(dtype):
    """The smallest decay that is not 0: 1.1e-20 for float32."""
    return torch.finfo(dtype).tiny**0.5 / 10


def _scan(x, read, inverse, out, write, decay, S, sizes, reverse=False):
    """Chunk after chunk: x += read S, the last C rows of out = inverse x, S = decay S + writeᵀ out, all in place.

    x (M, C, V), read (M, C, K), inverse (M, C, C), out (M, C or 2C, V) and write (M, as many, K), decay (M, 1, 1); the
    n-th chunks are the next sizes[n] rows. S (sequences · heads, K, V) has the longest sequences first, so those left
    are always its first. Returns the S that each chunk met, (M, K, V).
    """
    met, C = S.new_empty(len(x), *S.shape[1:]), x.shape[1]
    chunks = list(zip(*(y.split(sizes) for y in (x, read, inverse, out, write.mT, decay, met))))
    for x, r, i, o, w, d, before in reversed(chunks) if reverse else chunks:
        s = S[:len(x)]
        before.copy_(s)
        o[:, -C:] = i @ x.baddbmm_(r, before)
        s.mul_(d).baddbmm_(w, o)
    return met


def _schedule(lengths, C, device):
    """Packed sequences in the order of the scan: the first chunk of each, longest sequence first, then the second of
    each that has one, and so on. Returns the order of the sequences, the token at every place (T, a zero, after a
    sequence's end), the place of every token, and the number of sequences that have a first chunk, a second, ..."""
    lengths = torch.tensor(lengths)
    order = lengths.argsort(descending=True)
    starts, lengths, T = (lengths.cumsum(0) - lengths)[order], lengths[order], int(lengths.sum())
    n, sequence = (torch.arange(0, int(lengths[0]), C)[:, None] < lengths).nonzero(as_tuple=True)
    step = n[:, None] * C + torch.arange(C)                                                  # (chunks, C)
    source = torch.where(step < lengths[sequence, None], starts[sequence, None] + step, T).flatten()
    target = torch.empty(T + 1, dtype=torch.long).scatter_(0, source, torch.arange(len(source)))[:T]
    return order.to(device), source.to(device), target.to(device), n.bincount().tolist()


def _chunks_of(x, v, C):
    """(B, T, H, D) → a view (T / C, B, H, HV / H, C, D), zeros behind the last step."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % C)) if x.shape[1] % C else x
    x = x.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4)[:, :, :, None]
    return x.expand(-1, -1, -1, v.shape[2] // x.shape[2], -1, -1)


def _to_chunks(x, v, C):
    """(B, T, H, D) → (M, C, D) in the dtype of the arithmetic, key heads repeated to the number of v's heads."""
    return _chunks_of(x, v, C).reshape(-1, C, x.shape[-1]).to(torch.promote_types(v.dtype, torch.float32))


def _pair(x, y, v, C):
    """Two of (B, T, H, D) → (M, 2, C, D), likewise."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    return torch.stack([_chunks_of(x.to(dtype), v, C), _chunks_of(y.to(dtype), v, C)], 4).flatten(0, 3)


def _from_chunks(x, to):
    """(M, C, D) into `to`, (B, T, H, D) of any dtype, repeated heads added up."""
    (B, T, H, D), C = to.shape, x.shape[1]
    x = x.reshape(-(-T // C), B, H, -1, C, D)
    x = (x.sum(3) if x.shape[3] > 1 else x.squeeze(3)).permute(1, 0, 3, 2, 4)                # (B, T / C, C, H, D)
    if T % C:
        to.copy_(x.reshape(B, -1, H, D)[:, :T])
    else:
        to.unflatten(1, (-1, C)).copy_(x)


def _halves(x):
    return x.unflatten(1, (2, -1))                                                           # (M, 2, C, ·)


def _dot(x, y):
    return (x * y).sum(-1, keepdim=True)


def _inverse_norm(x):
    return (_dot(x, x) + 1e-6).rsqrt()


def _check(q, k, v, g, beta, scale, state, normalise, cu_seqlens=None, cu_seqlens_cpu=None, step=False):
    """Raises ValueError unless the arguments fit together, those of one step having no T; returns the number of
    sequences. The host's time counts: one look at each, and words only where something is wrong."""
    try:
        shape, v_shape, device = q.shape, v.shape, q.device
        (H, K), (HV, V), N = shape[-2:], v_shape[-2:], shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if (len(shape) == 4 - step and k.shape == shape and v_shape[:-2] == shape[:-2]
                and g.shape == beta.shape == v_shape[:-1] and 0 < K <= 256 and 0 < V <= 256 and HV >= H > 0 == HV % H
                and q.dtype in FLOATS and k.dtype in FLOATS and v.dtype in FLOATS and g.dtype in FLOATS
                and beta.dtype in FLOATS and k.device == v.device == g.device == beta.device == device
                and (not step if state is None else state.shape == (N, HV, K, V) and state.device == device
                     and (state.dtype == torch.float32 and state.is_contiguous() if step else state.dtype in FLOATS))
                and (cu_seqlens is cu_seqlens_cpu is None
                     or shape[0] == 1 and N > 0 and cu_seqlens.dtype in INTEGERS and len(cu_seqlens.shape) == 1
                     and cu_seqlens.device.type in ("cpu", device.type)
                     and (cu_seqlens_cpu is None or cu_seqlens_cpu.shape == cu_seqlens.shape
                          and cu_seqlens_cpu.dtype in INTEGERS and cu_seqlens_cpu.device.type == "cpu"))
                and (scale is None or isinstance(scale, (int, float)) and -1e300 < scale < 1e300)
                and isinstance(normalise, bool)):
            return N
    except (AttributeError, IndexError, TypeError, ValueError):
        pass
    _diagnose(q, k, v, g, beta, scale, state, normalise, cu_seqlens, cu_seqlens_cpu, step)


def _diagnose(q, k, v, g, beta, scale, state, normalise, cu_seqlens, cu_seqlens_cpu, step):
    """Raises ValueError, naming what `_check` found to be wrong."""
    given = dict(q=q, k=k, v=v, g=g, beta=beta, cu_seqlens=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu)
    given["state" if step else "initial_state"] = state
    given = {name: x for name, x in given.items() if x is not None or name in ("q", "k", "v", "g", "beta", "state")}
    for name, x in given.items():
        need(isinstance(x, torch.Tensor), name, f"of type {type(x).__name__}", "a tensor")
        dtypes, home = (INTEGERS, torch.device("cpu")) if name.startswith("cu_") else (FLOATS, q.device)
        need(x.dtype in dtypes, name, f"of {x.dtype}", f"of {' or '.join(sorted(map(str, dtypes)))}")
        need(x.device == home or name == "cu_seqlens" and x.device == q.device, name, f"on {x.device}", f"on {home}")

    for name, x, form in ("q", q, "(B, T, H, K)"), ("v", v, "(B, T, HV, V)"):
        form = form.replace(" T,", "") if step else form
        need(x.dim() == 4 - step, name, f"of shape {tuple(x.shape)}", f"of shape {form}")
        need(1 <= x.shape[-1] <= 256, name, f"{x.shape[-1]} wide", "1 to 256 wide")
    (*rows, H, K), (HV, V), N = q.shape, v.shape[-2:], q.shape[0]
    need(H and HV and HV % H == 0, "v", f"of {HV} heads", f"of a multiple of q's {H} heads")
    if cu_seqlens is not None:
        need(N == 1, "cu_seqlens", f"given with a batch of {N}", "given with a batch of 1, sequences packed along T")
        found, N = tuple(cu_seqlens.shape), cu_seqlens.numel() - 1
        need(len(found) == 1 and N > 0, "cu_seqlens", f"of shape {found}", "of shape (N + 1,)")
    need(cu_seqlens_cpu is None or cu_seqlens is not None, "cu_seqlens_cpu", "given alone", "given beside cu_seqlens")
    shapes = dict(k=(*rows, H, K), v=(*rows, HV, V), g=(*rows, HV), beta=(*rows, HV), state=(N, HV, K, V),
                  initial_state=(N, HV, K, V), cu_seqlens_cpu=(N + 1,))
    for name, shape in shapes.items():
        found = tuple(given[name].shape) if name in given else shape
        channels = ", a decay for each channel as Kimi has them" if name == "g" and found == (*rows, HV, K) else ""
        need(found == shape, name, f"of shape {found}{channels}", f"of shape {shape}")
    if step:
        need(state.dtype == torch.float32 and state.is_contiguous(), "state",
             f"{state.dtype}{'' if state.is_contiguous() else ', not contiguous'}", "torch.float32 and contiguous")
    need(scale is None or isinstance(scale, (int, float)) and -1e300 < scale < 1e300, "scale",
         f"of type {type(scale).__name__}" if not isinstance(scale, float) else scale, "a finite int or float")
    need(isinstance(normalise, bool), "use_qk_l2norm_in_kernel", f"of type {type(normalise).__name__}", "True or False")
    raise ValueError("the arguments do not fit together")                     # unless the two disagree, unreached


def _refuse(**given):
    """Raises ValueError, naming what the library does within its kernels and its caller has to do here."""
    instead = dict(
        use_beta_sigmoid_in_kernel="False: give beta.sigmoid() as beta", state_v_first="False: give initial_state.mT",
        allow_neg_eigval="False: give 2 * beta.sigmoid() as beta", cp_context="None: all of T has to be in one process")
    gate = "left out: give -A_log.exp() * F.softplus(g + dt_bias) as g"
    for name, x in given.items():
        need(x is None or x is False, name, x if x is True else f"of type {type(x).__name__}", instead.get(name, gate))
