"""muon.py against the singular value decomposition and against PyTorch's own, which multiplies in bfloat16."""

import pytest
import torch

from trivox.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(32, 32), (3, 48, 20), (2, 20, 48)], ids=str)
def test_orthogonalise(shape):
    """Singular vectors stay, singular values from 1 down to 1/20 become about 1; matrices of a stack do not mix."""
    torch.manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    G = U * torch.linspace(1, 0.05, S.shape[-1], dtype=torch.float64) @ Vh
    X = orthogonalise(G.float()).double()
    turned = U.mT @ X @ Vh.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < values.min() and values.max() < 1.25
    assert (turned - torch.diag_embed(values)).abs().max() < 0.05 and X.shape == G.shape
    if len(shape) == 3:
        torch.testing.assert_close(orthogonalise(G[1].float()).double(), X[1], atol=0.02, rtol=0)


def test_steps_are_pytorchs():
    """Ten steps on matrices of two shapes beside torch.optim.Muon; momenta are equal."""
    torch.manual_seed(0)
    first = [torch.randn(shape) for shape in ((16, 40), (24, 24), (16, 40))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in first] for _ in range(2))
    a = Muon(ours, 0.02, weight_decay=0.5)
    b = torch.optim.Muon(theirs, 0.02, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")

    def step(seed):
        torch.manual_seed(seed)
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()

    for seed in range(10):
        step(seed)
    for p, q, start in zip(ours, theirs, first):
        assert (p - q).norm() < 0.02 * (p - start).norm()
    state_a, state_b = a.state_dict()["state"], b.state_dict()["state"]
    for i in state_a:
        torch.testing.assert_close(state_a[i]["momentum_buffer"], state_b[i]["momentum_buffer"])
