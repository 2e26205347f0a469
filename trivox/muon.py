"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): momentum, orthogonalised, for matrices.

PyTorch's own always multiplies in bfloat16, which a CPU without such units does 200 times slower than float32, and
takes one matrix at a time. Here those of a shape go together, in float32 where the chip has no bfloat16. State dicts
are those of `torch.optim.Muon`.
"""

import torch

from trivox.common import pick_dtype


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


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; a step is scaled by 0.2 √max(M, N), to the size of AdamW's (Liu et al., 2025),
    so that both take one learning rate. `params` are matrices (M, N)."""

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, some in shapes.items():
                buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in some]
                gradients = [p.grad for p in some]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                updates = orthogonalise(torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])))
                torch._foreach_mul_(some, 1 - group["lr"] * group["weight_decay"])
                lr = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_add_(some, list(updates.to(some[0].dtype).unbind()), alpha=-lr)
