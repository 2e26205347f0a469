"""cross_entropy.py beside PyTorch's in float64, whole and in chunks; what adding up in bfloat16 costs."""

import pytest
import torch
import torch.nn.functional as F

from trivox import cross_entropy
from trivox.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("rows", [1, 5], ids=["whole", "in chunks"])
def test_linear_cross_entropy(monkeypatch, rows):
    """Value and gradients beside float64's, with targets to be left out."""
    monkeypatch.setitem(cross_entropy.LOGITS, "cpu", 40 * 500 // rows)
    torch.manual_seed(0)
    x, weight = torch.randn(40, 24, requires_grad=True), torch.randn(500, 24, requires_grad=True)
    targets = torch.randint(0, 500, (40,)).masked_fill(torch.rand(40) < 0.3, -100)
    loss, *_ = linear_cross_entropy(x, weight, targets[:, None])
    (3 * loss).backward()
    a, b = (y.detach().double().requires_grad_() for y in (x, weight))
    wanted = F.cross_entropy(a @ b.T, targets, reduction="sum")
    (3 * wanted).backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(x.grad, a.grad.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weight.grad, b.grad.float(), atol=1e-5, rtol=1e-4)


def test_losses_add_up_in_bfloat16(monkeypatch):
    """The sum of many is as near to float64's as one is, though bfloat16 has but eight bits to add in."""
    monkeypatch.setitem(cross_entropy.LOGITS, "cpu", 16 * 500)
    torch.manual_seed(0)
    x, weight = torch.randn(3000, 24, requires_grad=True), torch.randn(500, 24, requires_grad=True)
    targets = torch.randint(0, 500, (3000,))
    with torch.autocast("cpu", torch.bfloat16):
        loss, *_ = linear_cross_entropy(x, weight, targets[:, None])
    loss.backward()
    a, b = (y.detach().double().requires_grad_() for y in (x, weight))
    wanted = F.cross_entropy(a @ b.T, targets, reduction="sum")
    wanted.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    for ours, exact in ((x.grad, a.grad), (weight.grad, b.grad)):
        assert (ours - exact).norm() < 0.01 * exact.norm()
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets[:, None])[0].item() == pytest.approx(wanted.item(), rel=1e-5)
