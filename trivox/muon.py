"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): momentum, orthogonalised, for matrices.

PyTorch's own always multiplies in bfloat16, which a CPU without such units does 200 times slower than float32, and
takes one matrix at a time. Here those of a shape go together, in float32 where the chip has no bfloat16. State dicts
are those of `torch.optim.Muon`.
"""

import torch
from torch import distributed

from trivox.common import pick_dtype
from trivox.finite import lerp_unless


def orthogonalise(G, steps=5):
    """About U Vᵀ of each matrix G = U S Vᵀ, (…, M, N), by Newton-Schulz iterations: singular values end in 0.7 to 1.2.

    The quintic's coefficients are Jordan's, chosen so that small singular values grow fastest.
    """
    X = G.to(pick_dtype("auto", G.device))
    X = X.mT.contiguous() if G.shape[-2] > G.shape[-1] else X  # products add to copies, which views make slow
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    X = X.flatten(0, -3) if X.ndim > 2 else X[None]
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
    return (X.mT if G.shape[-2] > G.shape[-1] else X).reshape(G.shape)


def shared(make, count):
    """Items 0 to `count` - 1 of equal shapes, stacked; make(list of numbers) stacks those of these numbers. Of several
    processes each makes its share, and all get all. Returns (the items, what to call before they are used)."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if world == 1:
        return make([*range(count)]), lambda: None
    share = -(-count // world)
    mine = make([(distributed.get_rank() * share + i) % count for i in range(share)])  # some are made twice
    items = mine.new_empty(world * share, *mine.shape[1:])
    return items[:count], distributed.all_gather([*items.split(share)], mine, async_op=True).wait


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; a step is scaled by 0.2 √max(M, N), to the size of AdamW's (Liu et al., 2025),
    so that both take one learning rate. `params` are matrices (M, N). One with an attribute `parts`, numbers of rows,
    is several matrices in one. Processes, which must have the same gradients, share the work. Like PyTorch's fused
    optimizers it changes nothing where its attribute `found_inf`, a tensor, is 1."""

    _step_supports_amp_scaling = True  # so that a GradScaler sets found_inf, instead of waiting for the GPU

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        bad = getattr(self, "found_inf", None)  # a tensor, as for PyTorch's fused optimizers
        for group in self.param_groups:
            some, shapes, changes = [p for p in group["params"] if p.grad is not None], {}, []
            for p in some:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                for part in zip(*(x.split(getattr(p, "parts", len(p))) for x in (p, p.grad, buffer))):
                    shapes.setdefault(part[0].shape, []).append(part)
            for shape, parts in shapes.items():
                weights, gradients, momenta = map(list, zip(*parts))
                lerp_unless(bad, momenta, gradients, 1 - group["momentum"])

                def make(numbers, gradients=gradients, momenta=momenta, momentum=group["momentum"]):
                    some = [[x[i] for i in numbers] for x in (gradients, momenta)]
                    return orthogonalise(torch.stack(torch._foreach_lerp(*some, momentum)))

                changes.append((weights, 0.2 * max(shape) ** 0.5, *shared(make, len(weights))))
            for weights, scale, updates, wait in changes:
                wait()
                # contiguous, as the fused SGD reads memory as it lies
                updates = [*updates.to(weights[0].dtype).contiguous().unbind()]
                torch._fused_sgd_(weights, updates, [], weight_decay=group["weight_decay"] / scale, momentum=0.0,
                                  lr=group["lr"] * scale, dampening=0.0, nesterov=False, maximize=False,
                                  is_first_step=False, grad_scale=None, found_inf=bad)
