"""The cross-entropy of a large vocabulary, of which no table of logits is kept."""

import torch
import torch.nn.functional as F

LOGITS = 2 ** 26  # how many are held at once


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made with the loss, chunk by chunk (as by Liger: Hsu et al., 2024), so that no logits are kept or
    made twice. Sums are float32 whatever x is: torch.nn.functional.linear_cross_entropy of torch 2.13 adds up losses as
    x's type, and those of 40,000 tokens in chunks of 512 came out 2.5 % too high in bfloat16."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, learns):
        learns_x, learns_weight = (learns and x for x in ctx.needs_input_grad[:2])
        rows, matrix, loss = max(1, LOGITS // len(weight)), weight.to(dtype), x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if learns_x else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if learns_weight else None
        with torch.autocast(x.device.type, enabled=False):
            for at in range(0, len(x), rows):
                some, wanted = x[at:at + rows].to(dtype), targets[at:at + rows]
                log_p = (some @ matrix.T).float().log_softmax(1)
                loss += F.nll_loss(log_p, wanted, reduction="sum")
                if not (learns_x or learns_weight):
                    continue
                p, counts = log_p.exp_(), (wanted >= 0)[:, None]
                p.scatter_add_(1, wanted.clamp(min=0)[:, None], torch.full_like(p[:, :1], -1)).mul_(counts)
                p = p.to(dtype)
                if learns_x:
                    dx[at:at + rows] = p @ matrix
                if learns_weight:
                    dweight += p.T @ some
        ctx.save_for_backward(dx, dweight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, scale):
        dx, dweight = ctx.saved_tensors
        return (None if dx is None else dx * scale.to(dx.dtype),
                None if dweight is None else (dweight * scale).to(ctx.dtype), None, None, None)


def linear_cross_entropy(x, weight, targets):
    """The sum of the cross-entropies of logits x @ weight.T, which are not held all at once.

    x (N, D), weight (symbols, D), targets (N,) int64, -100 for none. Returns float32 ().
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return LinearCrossEntropy.apply(x, weight, targets, dtype, torch.is_grad_enabled())
