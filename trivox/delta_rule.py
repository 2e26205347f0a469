"""The gated delta rule, a recurrence over sequences: step by step, and in chunks in plain PyTorch. A GPU takes the
kernels of delta_rule_triton.py instead, as `_takes_kernels` decides.

In every head a state S, (K, V), maps keys to values. Each step forgets a little, then corrects what S holds for the
key k_t towards the value v_t; g_t ≤ 0 is the log-decay and β_t the size of the correction:

    S ← exp(g_t) S,    S ← S + k_t w_tᵀ with w_t = β_t (v_t − Sᵀk_t),    o_t = scale · Sᵀq_t                   (1)

A loop over time is slow, so time is cut into chunks of C steps. Let S be the state before a chunk, γ_i the decay from
there to the chunk's step i, D_ij = exp(g_{j+1} + … + g_i) the decay from step j to step i ≥ j. Unrolling (1),

    S_i = γ_i S + Σ_{j≤i} D_ij k_j w_jᵀ,       w_i = β_i (v_i − γ_i Sᵀk_i − Σ_{j<i} D_ij (k_i·k_j) w_j)

With a row for each step, Q' = scale · Q and R = −βK, outputs and corrections read the state in one and the same way,
and as A is strictly lower triangular, W can be had from S (the WY form of a product of Householder-like factors):

    O =      γQ' S + P W,    P = D ⊙ Q'Kᵀ lower triangular
    W = βV + γR S + A W,     A = D ⊙ R Kᵀ strictly lower triangular                                            (2)
      = X + Y S,             X = (I − A)⁻¹ βV,   Y = (I − A)⁻¹ γR;            S_C = γ_C S + (D_C K)ᵀ W         (3)

Of this only W and S_C, two small products a chunk, must be done in turn. The gradient does the same two in reverse,
Y and D_C K having changed places:

    dW = Pᵀ dO + D_C K dS_C,     dS = γ_C dS_C + (γQ')ᵀ dO + Yᵀ dW                                             (4)

Sources: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024, arXiv:2412.06464
(the rule and its chunks); Yang, Wang, Zhang, Shen, Kim, "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length", 2024, arXiv:2406.06484 (the WY form). Names and shapes are those of flash-linear-attention.
"""
import os

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from trivox import delta_rule_triton as kernels
from trivox.delta_rule_triton import need, sequence_lengths

PATH = os.environ.get("TRIVOX_DELTA_RULE", "")
if PATH not in ("", "torch", "triton"):
    raise ValueError(f"TRIVOX_DELTA_RULE is {PATH!r}, but must be torch, triton or not set")
CPU_ROWS = 4096  # steps × sequences × value heads that a CPU takes at once: 2048 to 8192 do equally well


def recurrent_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, *,
                               cu_seqlens=None, use_qk_l2norm_in_kernel=False):
    """Equation (1) as a loop over time, for autograd to differentiate: slow, and the oracle of everything else.
    Arguments, results and errors are those of `chunk_gated_delta_rule`."""
    _check(q, k, v, g, beta, initial_state, cu_seqlens)
    if cu_seqlens is not None:
        lengths = sequence_lengths(cu_seqlens, q.shape[1])
        inputs = zip(*(x.split(lengths, 1) for x in (q, k, v, g, beta)))
        states = [None] * len(lengths) if initial_state is None else initial_state.split(1)
        o, S = zip(*(recurrent_gated_delta_rule(*x, scale, s, True, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
                     for x, s in zip(inputs, states)))
        return torch.cat(o, 1), torch.cat(S) if output_final_state else None

    (B, _, H, K), (HV, V), dtype = q.shape, v.shape[2:], v.dtype
    S = v.new_zeros(B, HV, K, V) if initial_state is None else initial_state
    q, k, v, g, beta, S = (x.to(torch.promote_types(v.dtype, torch.float32)) for x in (q, k, v, g, beta, S))
    if use_qk_l2norm_in_kernel:
        q, k = q * _inverse_norm(q), k * _inverse_norm(k)
    q, k = (x.repeat_interleave(HV // H, 2)[..., None] for x in (q, k))                      # (B, T, HV, K, 1)
    v, g, beta = v[:, :, :, None], g.exp()[..., None, None], beta[..., None, None]           # (B, T, HV, 1, V|1)
    o = [v[:, :0, :, 0]]
    for q_t, k_t, v_t, gate, beta_t in zip(*(x.unbind(1) for x in (q, k, v, g, beta))):
        S = gate * S                                                                         # (B, HV, K, V)
        S = S + k_t * beta_t * (v_t - (S * k_t).sum(-2, keepdim=True))
        o.append((S * q_t).sum(-2)[:, None] * (K**-0.5 if scale is None else scale))         # (B, 1, HV, V)
    return torch.cat(o, 1).to(dtype), S if output_final_state else None


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, *,
                           cu_seqlens=None, use_qk_l2norm_in_kernel=False):
    """The gated delta rule in chunks, equations (3) and (4): a drop-in, in these arguments, for
    flash-linear-attention's function of the same name.

    Args:
        q, k: (B, T, H, K) queries and keys. Beyond β |k|² = 2 the recurrence itself diverges.
        v: (B, T, HV, V) values. HV is a multiple of H: value head i goes with key head i // (HV // H).
        g, beta: (B, T, HV) log-decay, from 0 down to any depth, and size of the correction.
        scale: of the queries, K^-½ unless given.
        initial_state: (N, HV, K, V), zeros unless given; N is B, or the number of packed sequences.
        output_final_state: whether to return the state after the last step.
        cu_seqlens: (N + 1,) integers, rising from 0 to T, where B is 1 and sequences are packed along T: sequence n is
            [cu_seqlens[n], cu_seqlens[n + 1]), and may be empty. They are read on the host, for which a GPU stops, once
            for a tensor that the kernels meet again, and not where they are captured in a CUDA graph.
        use_qk_l2norm_in_kernel: whether to put x · (Σx² + 1e-6)^-½ for q and k first.

    Returns:
        o, (B, T, HV, V) in v's dtype, and the final state, (N, HV, K, V), or None. State and arithmetic are float32,
        under autocast too, and float64 where v is; float32 products obey `torch.set_float32_matmul_precision`.

    Gradients reach every tensor, once. Saved for them are the inputs (of packed sequences a copy) and C + V + K·V/C
    float32 numbers a step and value head, C = 32 on a CPU and 64 elsewhere: (I − A)⁻¹, W and each chunk's S. All else
    is computed a second time. The kernels save 2C + V + K·V/C numbers in v's dtype and 4 float32 ones, C = 32, and
    take g below −27.7 (a decay of 1e-12) for −27.7. Gradients of gradients are refused.

    Raises ValueError if shapes do not fit together, K or V is not in 1..256, or cu_seqlens does not cover T.
    """
    N = _check(q, k, v, g, beta, initial_state, cu_seqlens)
    K, (HV, V), dtype = q.shape[3], v.shape[2:], torch.promote_types(v.dtype, torch.float32)
    S, scale = initial_state if initial_state is None else initial_state.to(dtype), K**-0.5 if scale is None else scale
    if _takes_kernels(v) and v.numel():
        q, k = q.to(v.dtype), k.to(v.dtype)
        save = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta, S) if x is not None)
        o, S, *_ = kernels.delta_rule_forward(q, k, v, g, beta, S, cu_seqlens, scale, use_qk_l2norm_in_kernel, save)
        return o, S if output_final_state else None

    lengths = [q.shape[1]] * N if cu_seqlens is None else sequence_lengths(cu_seqlens, q.shape[1])
    S = v.new_zeros(N, HV, K, V, dtype=dtype) if S is None else S
    if v.numel() == 0:
        return v, S if output_final_state else None
    o, S = _chunk_in_torch(q, k, v, g, beta, scale, S, cu_seqlens is not None, lengths, use_qk_l2norm_in_kernel)
    return o, S if output_final_state else None


def recurrent_step(q, k, v, g, beta, state, scale=None, *, use_qk_l2norm_in_kernel=False):
    """One step of equation (1), for decoding: one kernel on a GPU, and no gradients.

    q, k (B, H, K), v (B, HV, V), g, beta (B, HV); `state` (B, HV, K, V), float32 and contiguous, is updated in place.
    Returns o, (B, HV, V), in v's dtype. Raises ValueError if shapes do not fit together or the state is not such.
    """
    _check(*(x[:, None] for x in (q, k, v, g, beta)), state, None, name="state")
    need(state.dtype == torch.float32 and state.is_contiguous(), "state",
          f"{state.dtype}{'' if state.is_contiguous() else ', not contiguous'}", "torch.float32 and contiguous")
    scale = q.shape[-1]**-0.5 if scale is None else scale
    with torch.no_grad():
        if _takes_kernels(v):
            return kernels.delta_rule_step(q.to(v.dtype), k.to(v.dtype), v, g, beta, state, scale,
                                           use_qk_l2norm_in_kernel)
        dtype, (q, k, v, g, beta) = v.dtype, (x.float() for x in (q, k, v, g, beta))
        if use_qk_l2norm_in_kernel:
            q, k = q * _inverse_norm(q), k * _inverse_norm(k)
        q, k = (x.repeat_interleave(v.shape[1] // x.shape[1], 1)[..., None] for x in (scale * q, k))  # (B, HV, K, 1)
        state *= g.exp()[..., None, None]
        state.addcmul_(k, (beta[..., None] * (v - (k.mT @ state)[:, :, 0]))[:, :, None])
        return (q.mT @ state)[:, :, 0].to(dtype)


def _takes_kernels(v):
    """Where the path is chosen: a GPU takes the kernels, all else PyTorch; TRIVOX_DELTA_RULE=torch|triton overrides."""
    return (PATH == "triton" or not PATH and v.is_cuda and kernels.triton is not None) and v.dtype != torch.float64


def _chunk_in_torch(q, k, v, g, beta, scale, S, packed, lengths, normalise):
    # a CPU wants its working set in cache, so time goes by in segments; a GPU wants few launches, so all of it at once
    C, most = (32, CPU_ROWS // (32 * v.shape[2])) if v.device.type == "cpu" else (64, float("inf"))
    inputs, counts = (q, k, v, g[..., None], beta[..., None]), [len(lengths)] * -(-q.shape[1] // C)
    if packed:
        order, source, target, counts = _schedule(lengths, C, v.device)
        inputs, S = [F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, source) for x in inputs], S[order]

    segments, room, o = [], 0, []
    for count in counts:
        if count > room:
            segments, room = segments + [[]], most
        segments[-1].append(count)
        room -= count
    steps = [sum(segment) * C // v.shape[0] for segment in segments]
    steps[-1] = inputs[0].shape[1] - sum(steps[:-1])                          # the last chunk may be a short one
    for segment, *x in zip(segments, *(x.split(steps, 1) for x in inputs)):
        o_segment, S = _Chunks.apply(*x, S, scale, normalise, C, segment)
        o.append(o_segment)
    o = torch.cat(o, 1)
    return (o.index_select(1, target), S[order.argsort()]) if packed else (o, S)


class _Chunks(torch.autograd.Function):
    """Equations (2) to (4) over a segment of time, `counts` sequences having an n-th chunk in it. What is within chunks
    has M rows, one a chunk, sequence and value head, in the order of the scan."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, S, scale, normalise, C, counts):
        inputs, ctx.settings = (q, k, v, g, beta), (scale, normalise, C, [n * v.shape[2] for n in counts])
        with torch.autocast(v.device.type, enabled=False):
            _, k, v, beta, _, gamma, tail, _, _, reads, P, A = _within_chunks(*inputs, scale, normalise, C)
            inverse = _inverse(A)
            W, starts, last = _scan(inverse @ (beta * v), inverse @ reads[:, C:], tail * k, S.flatten(0, 1),
                                    gamma[:, -1:], ctx.settings[-1])
            ctx.save_for_backward(*inputs, inverse, W, starts)
            return _from_chunks((P @ W).baddbmm_(reads[:, :C], starts), inputs[2]), last.view(S.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlast):
        *inputs, inverse, W, starts = ctx.saved_tensors
        scale, normalise, C, sizes = ctx.settings
        with torch.autocast(do.device.type, enabled=False):
            (q, k, v, beta, norms, gamma, tail, decay, readers, reads, P,
             _) = _within_chunks(*inputs, scale, normalise, C)
            do = _to_chunks(do, inputs[2], C)
            dW, dends, dS = _scan(P.mT @ do, tail * k, inverse @ reads[:, C:], dlast.flatten(0, 1),
                                  gamma[:, -1:], sizes, reads[:, :C].mT @ do, reverse=True)  # dends (M, K, V)
            dx = inverse.mT @ dW                                                             # of βV + γR S

            # o and w read alike: through [Q'; R], from the chunk's start (γ, S) and from its steps (D, W)
            dout = torch.cat([do, dx], 1)                                                    # (M, 2C, V)
            dscores = _halves(dout @ W.mT).mul_(decay[:, None]).flatten(1, 2)                # (M, 2C, C)
            dreaders = _halves(dout @ starts.mT).mul_(gamma[:, None]).flatten(1, 2).baddbmm_(dscores, k)
            dk_steps, dk_tail = dscores.mT @ readers, tail * (W @ dends.mT)                  # (M, C, K)

            # g_t scales all that goes from before step t (a step, the start) to t or after (a step, the end). What
            # goes from a step to itself is left out: it would cancel only up to rounding, and hide the rest if g ≪ 0
            dg = _halves(_dot(readers, dreaders)).sum(1) - _dot(k, dk_steps)
            dg = dg.flip(1).cumsum(1).flip(1) + F.pad(_dot(k, dk_tail)[:, :-1], (0, 0, 1, 0)).cumsum(1)
            dg = dg + gamma[:, -1:] * (starts * dends).sum((1, 2), keepdim=True)

            itself, (dq, dr) = _dot(do, W), _halves(dreaders).unbind(1)
            dq = dq.addcmul_(itself, k).mul_(scale)
            dk = dk_steps.addcmul_(beta, dr, value=-1).add_(dk_tail).addcmul_(itself, readers[:, :C])
            dbeta = _dot(v, dx) - _dot(k, dr)
            if normalise:
                dq, dk = (r * (dy - y * _dot(y, dy)) for y, dy, r in zip((q, k), (dq, dk), norms))
            gradients = (_from_chunks(dy, x) for dy, x in zip((dq, dk, beta * dx, dg, dbeta), inputs))
            return *gradients, dS.view(dlast.shape), None, None, None, None


def _within_chunks(q, k, v, g, beta, scale, normalise, C):
    """What can be said of each chunk without its inverse and its state; the names are the module docstring's."""
    q, k, v, g, beta = (_to_chunks(x, v, C) for x in (q, k, v, g, beta))                     # (M, C, K|V|1)
    norms = [_inverse_norm(x) for x in (q, k)] if normalise else None
    q, k = (q * norms[0], k * norms[1]) if normalise else (q, k)
    # decays as products of factors ≤ 1: a difference of cumulative sums loses a small gate that follows a large one
    gate, strict = g.exp(), torch.ones(C, C, dtype=torch.bool, device=g.device).tril(-1)
    gamma, decay = gate.cumprod(1), torch.where(strict, gate, 1).cumprod(1)                  # (M, C, 1), (M, C, C)
    tail, decay = decay[:, -1, :, None].clone(), decay.mul_(strict)                          # D_C, strictly lower D
    readers = torch.cat([scale * q, -beta * k], 1)                                           # [Q'; R], (M, 2C, K)
    reads = _halves(readers).mul(gamma[:, None]).flatten(1, 2)                               # [γQ'; γR]
    P, A = _halves(readers @ k.mT).mul_(decay[:, None]).unbind(1)                            # (M, C, C) each
    P.diagonal(dim1=1, dim2=2).copy_(_dot(readers[:, :C], k)[..., 0])
    return q, k, v, beta, norms, gamma, tail, decay, readers, reads, P, A


def _inverse(A):
    """(I − A)⁻¹ of strictly lower triangular A, (M, C, C), C a power of 2, by doubling the blocks on the diagonal:
    [[a, 0], [b, c]]⁻¹ = [[a⁻¹, 0], [−c⁻¹ b a⁻¹, c⁻¹]]. Nothing on the way outgrows the result, while the sum of A's
    powers, shorter to write, has terms of about 3^C where β = 2 and keys are alike: float32 would keep no digit."""
    M, C, _ = A.shape
    inverse, n = torch.eye(C, dtype=A.dtype, device=A.device).repeat(M, 1, 1), 1
    while n < C:
        a, x = (y.view(M, C // (2 * n), 2 * n, C // (2 * n), 2 * n).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
                for y in (A, inverse))                                                       # (M, C / 2n, 2n, 2n)
        x[..., n:, :n] = x[..., n:, n:] @ (a[..., n:, :n] @ x[..., :n, :n])
        n *= 2
    return inverse


def _scan(W, read, write, S, decay, sizes, add=None, reverse=False):
    """Chunk after chunk, W += read S (in place), then S = decay S + add + writeᵀ W.

    W (M, C, V), read and write (M, C, K), decay (M, 1, 1), add (M, K, V) or None; the n-th chunks are the next
    sizes[n] rows. S (sequences · heads, K, V) has the longest sequences first, so those left are always its first.
    Returns W, the S that each chunk met, (M, K, V), and the last S.
    """
    add, s, met, ended = [None] * len(sizes) if add is None else add.split(sizes), S[:0], [], []
    chunks = list(zip(*(x.split(sizes) for x in (W, read, write.mT, decay)), add))
    for w, r, wt, d, a in reversed(chunks) if reverse else chunks:
        if len(w) > len(s):
            s = torch.cat([s, S[len(s):len(w)]])
        elif len(w) < len(s):
            s, rest = s.tensor_split([len(w)])
            ended.insert(0, rest)
        met.append(s)
        s = (d * s if a is None else a.addcmul_(d, s)).baddbmm_(wt, w.baddbmm_(r, s))
    return W, torch.cat(met[::-1] if reverse else met), torch.cat([s, *ended, S[sizes[0]:]])


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


def _to_chunks(x, v, C):
    """(B, T, H, D) → (M, C, D) in the dtype of the arithmetic, key heads repeated to the number of v's heads."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % C)) if x.shape[1] % C else x
    x = x.unflatten(1, (-1, C)).permute(1, 0, 3, 2, 4)[:, :, :, None]                        # (T / C, B, H, 1, C, D)
    x = x.expand(-1, -1, -1, v.shape[2] // x.shape[2], -1, -1)
    return x.reshape(-1, C, x.shape[-1]).to(torch.promote_types(v.dtype, torch.float32))


def _from_chunks(x, like):
    """(M, C, D) → the shape and dtype of `like`, repeated heads added up."""
    B, T, H, D = like.shape
    x = x.reshape(-(-T // x.shape[1]), B, H, -1, x.shape[1], D)                              # (T / C, B, H, ·, C, D)
    x = x.sum(3) if x.shape[3] > 1 else x.squeeze(3)
    return x.to(like.dtype).permute(1, 0, 3, 2, 4).reshape(B, -1, H, D)[:, :T]


def _halves(x):
    return x.unflatten(1, (2, -1))                                                           # (M, 2, C, ·)


def _dot(x, y):
    return (x * y).sum(-1, keepdim=True)


def _inverse_norm(x):
    return (_dot(x, x) + 1e-6).rsqrt()


def _check(q, k, v, g, beta, initial_state, cu_seqlens, name="initial_state"):
    """Raises ValueError unless the shapes fit together; returns the number of sequences."""
    for x, y, shape in ("q", q, "(B, T, H, K)"), ("v", v, "(B, T, HV, V)"):
        need(y.dim() == 4, x, f"of shape {tuple(y.shape)}", f"of shape {shape}")
    (B, T, H, K), (HV, V), N = q.shape, v.shape[2:], q.shape[0]
    for x, width in ("q", K), ("v", V):
        need(1 <= width <= 256, x, f"{width} wide", "1 to 256 wide")
    need(H and HV and HV % H == 0, "v", f"of {HV} heads", f"of a multiple of q's {H} heads")
    if cu_seqlens is not None:
        need(B == 1, "cu_seqlens", f"given with a batch of {B}", "given with a batch of 1, sequences packed along T")
        N = cu_seqlens.numel() - 1
        need(cu_seqlens.dim() == 1 and N > 0, "cu_seqlens", f"of shape {tuple(cu_seqlens.shape)}", "of shape (N + 1,)")
    for x, y, shape in (("k", k, (B, T, H, K)), ("v", v, (B, T, HV, V)), ("g", g, (B, T, HV)),
                        ("beta", beta, (B, T, HV)), (name, initial_state, (N, HV, K, V))):
        if y is not None:
            need(y.shape == shape, x, f"of shape {tuple(y.shape)}", f"of shape {shape}")
    return N
