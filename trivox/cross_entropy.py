"""The cross-entropy of large vocabularies, of which no table of logits is kept.

On a GPU a Triton kernel turns logits into their gradients in place, in one launch; elsewhere PyTorch does it in steps.
"""
from __future__ import annotations  # the kernel's are Triton's, which may be missing

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # there is none for this platform
    triton, jit = None, lambda kernel: kernel

LOGITS = {"cuda": 2 ** 29, "cpu": 2 ** 26}  # how many are held at once


@jit
def softmax_kernel(logits, targets, losses, hits, V, row_width, BLOCK: tl.constexpr, WRITE: tl.constexpr):
    """For a row of V logits: its cross-entropy, whether its target is the first of the largest, and WRITE: softmax −
    one-hot, the gradient, in the logits' place. A target below 0 is none: all three are 0."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits, target = logits + row * row_width, tl.load(targets + row)
    top, total, where = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32), i
    for first in range(0, V, BLOCK):
        x = tl.load(logits + first + i, mask=first + i < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total, where = total * tl.exp(top - finite) + tl.exp(x - finite), tl.where(x > top, first + i, where)
        top = higher
    highest = tl.max(top, 0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    wanted, counts = tl.load(logits + tl.maximum(target, 0)).to(tl.float32), target >= 0
    tl.store(losses + row, tl.where(counts, log_sum - wanted, 0.0))
    tl.store(hits + row, (tl.min(tl.where(top == highest, where, V), 0) == target).to(tl.float32))
    if WRITE:
        for first in range(0, row_width, BLOCK):
            p = tl.exp(tl.load(logits + first + i, mask=first + i < V, other=float("-inf")).to(tl.float32) - log_sum)
            p = tl.where(counts, p - tl.where(first + i == target, 1.0, 0.0), 0.0)
            tl.store(logits + first + i, p.to(logits.dtype.element_ty), mask=first + i < row_width)


def takes_kernel(x):
    return x.is_cuda and triton is not None


def softmax_in_place(logits, targets, V, write):
    """Logits (rows, V or more) and targets (rows,) -> cross-entropies (rows,), hits (rows,), both float32, and where it
    is asked for the gradient by the logits, in their type, for which their memory may be used."""
    if takes_kernel(logits):
        losses, hits = logits.new_empty(2, len(logits), dtype=torch.float32).unbind()
        block = min(4096, triton.next_power_of_2(V))
        softmax_kernel[(len(logits),)](logits, targets, losses, hits, V, logits.shape[1], block, write,
                                       num_warps=8 if block > 2048 else 4)
        return losses, hits, logits
    log_p = logits.float().log_softmax(1)
    losses, hits = F.nll_loss(log_p, targets, reduction="none"), (log_p.argmax(1) == targets).float()
    if write:
        p, counts = log_p.exp_(), (targets >= 0)[:, None]
        p.scatter_add_(1, targets.clamp(min=0)[:, None], torch.full_like(p[:, :1], -1)).mul_(counts)
        logits = p.to(logits.dtype)
    return losses, hits, logits


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made with the loss, chunk by chunk (as by Liger: Hsu et al., 2024), so that no logits are kept or
    made twice. Sums are float32 whatever x is: torch.nn.functional.linear_cross_entropy of torch 2.13 adds up losses as
    x's type, and those of 40,000 tokens in chunks of 512 came out 2.5 % too high in bfloat16."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, learns):
        learns_x, learns_weight = (learns and x for x in ctx.needs_input_grad[:2])
        Q, device = targets.shape[1], x.device.type
        V = len(weight) // Q
        with torch.autocast(device, enabled=False):
            matrix = weight.to(dtype)
            if takes_kernel(x):  # tensor cores want rows of logits that begin at multiples of 16 bytes
                matrix = F.pad(matrix.unflatten(0, (Q, V)), (0, 0, 0, -V % 8)).flatten(0, 1)
            held = LOGITS.get(device, 2 ** 26) if dtype != torch.float16 else 2 ** 26  # or sums of rows may overflow
            rows = max(1, held // len(matrix))
            rows = rows // 128 * 128 or rows
            sums = x.new_zeros(2, Q, dtype=torch.float32)
            dx = torch.empty_like(x) if learns_x else None
            dmatrix = torch.zeros_like(matrix, dtype=torch.float32) if learns_weight else None
            for at in range(0, len(x), rows):
                some = x[at:at + rows].to(dtype)
                losses, hits, p = softmax_in_place((some @ matrix.T).view(len(some) * Q, -1),
                                                   targets[at:at + rows].flatten(), V, learns_x or learns_weight)
                sums += torch.stack((losses, hits)).view(2, -1, Q).sum(1)
                p = p.view(len(some), -1)
                if learns_x:
                    dx[at:at + rows] = p @ matrix
                if learns_weight:
                    dmatrix += p.T @ some
        dweight = dmatrix if dmatrix is None else dmatrix.unflatten(0, (Q, -1))[:, :V].flatten(0, 1)
        ctx.save_for_backward(dx, dweight)
        ctx.dtype = weight.dtype
        losses, hits = sums.unbind()
        ctx.mark_non_differentiable(losses, hits)
        return losses.sum(), losses, hits

    @staticmethod
    def backward(ctx, scale, *_):
        dx, dweight = ctx.saved_tensors
        return (None if dx is None else dx * scale.to(dx.dtype),
                None if dweight is None else (dweight * scale).to(ctx.dtype), None, None, None)


def linear_cross_entropy(x, weight, targets):
    """The cross-entropies of logits x @ weight.T, which are not held all at once.

    x (N, D); weight (Q·V, D) of Q vocabularies one after the other, of V symbols each; targets (N, Q) int64, -100 for
    none. Returns the sum over all, float32 (), which has gradients; and for each vocabulary the sum and the number of
    targets that had the highest logit, (Q,) each, which have none.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return LinearCrossEntropy.apply(x, weight, targets, dtype, torch.is_grad_enabled())
