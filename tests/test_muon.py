"""muon.py against the singular value decomposition and against PyTorch's own, in both precisions that "auto" may be."""

import pytest
import torch
from conftest import chip

from trivox.muon import Muon, orthogonalise


@pytest.fixture(params=["float32", "bfloat16"], autouse=True)
def dtype(request, monkeypatch):
    """The precision in which matrices are multiplied here."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", chip(request.param))
    return request.param


@pytest.mark.parametrize("shape", [(32, 32), (3, 48, 20), (2, 20, 48)], ids=str)
def test_orthogonalise(shape, dtype):
    """Singular vectors stay, singular values from 1 down to 1/20 become about 1; matrices of a stack do not mix. The 8
    bits of bfloat16 are worth 0.02 of the largest value after five iterations."""
    torch.manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    G = U * torch.linspace(1, 0.05, S.shape[-1], dtype=torch.float64) @ Vh
    X = orthogonalise(G.float()).double()
    turned = U.mT @ X @ Vh.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < values.min() and values.max() < 1.25
    noise = 0.02 if dtype == "bfloat16" else 1e-4
    assert (turned - torch.diag_embed(values)).abs().max() < 2 * noise and X.shape == G.shape
    if len(shape) == 3:
        torch.testing.assert_close(orthogonalise(G[1].float()).double(), X[1], atol=noise, rtol=0)


def test_steps_are_pytorchs():
    """Ten steps on matrices of two shapes beside torch.optim.Muon, which multiplies in bfloat16: no farther apart than
    that is from float32. Momenta, which are not multiplied, are equal."""
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
