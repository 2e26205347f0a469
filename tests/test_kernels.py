"""The kernels of convolution.py and cross_entropy.py without a GPU: run by Triton's interpreter beside PyTorch in
float64, in a process of its own, and compiled.

    python tests/test_kernels.py interpret    what that process does
"""
import json
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import spawn

from benchmarks.kernels import build, recorded
from trivox import convolution, cross_entropy


def test_in_the_interpreter():
    assert spawn(__file__, "interpret", TRITON_INTERPRET="1") == ["done"]


def compare(ours, exact, inputs, tolerance):
    """Two scalars and their gradients: relative errors of ours, in the 2-norm, are at most so large."""
    gradients = [torch.autograd.grad(y, inputs, 3.0 * torch.ones_like(y)) for y in (ours, exact)]
    for a, b in zip((ours, *gradients[0]), (exact, *gradients[1])):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-9


def interpret():
    torch.manual_seed(0)
    for B, T, C, taps, left, silu, bias in ((2, 70, 70, 4, 3, True, False), (1, 5, 40, 7, 3, False, True),
                                            (2, 130, 64, 4, 3, True, True), (1, 1, 3, 1, 0, False, False)):
        wide, weight = torch.randn(B, T, C + 6, requires_grad=True), torch.randn(taps, C, requires_grad=True)
        b, towards = torch.randn(C, requires_grad=True) if bias else None, torch.randn(B, T, C)
        x = F.pad(wide[..., 2:2 + C].double(), (0, 0, left, taps - 1 - left)).mT
        exact = F.conv1d(x, weight.double().T[:, None], b if b is None else b.double(), groups=C).mT
        exact = F.silu(exact) if silu else exact
        ours = convolution.convolution(wide[..., 2:2 + C], weight, b, left, silu)  # rows of a wider tensor
        compare((ours * towards).sum(), (exact * towards).sum(), [wide, weight, *[b] * bias], 1e-5)
    x = torch.randn(2, 20, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.trivox.convolution.default, (*x, None, 3, True))

    cross_entropy.takes_kernel = lambda x: True
    for Q, V, N in (1, 501, 20), (3, 27, 9), (1, 5001, 6):
        for dtype, tolerance in (torch.float32, 1e-5), (torch.bfloat16, 0.02):
            cross_entropy.LOGITS["cpu"] = 4 * Q * (V + 8)  # in chunks of 4 rows
            x, weight = torch.randn(N, 16, requires_grad=True), torch.randn(Q * V, 16, requires_grad=True)
            targets = torch.randint(0, V, (N, Q)).masked_fill(torch.rand(N, Q) < 0.3, -100)
            targets[0, 0] = (x[0] @ weight[:V].T).argmax()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                ours, losses, hits = cross_entropy.linear_cross_entropy(x, weight, targets)
            logits = (x.double() @ weight.double().T).view(N, Q, V)
            exact = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(N, Q)
            compare(ours, exact.sum(), [x, weight], tolerance)
            torch.testing.assert_close(losses.double(), exact.sum(0), rtol=tolerance, atol=0)
            if dtype == torch.float32:
                assert torch.equal(hits, (logits.argmax(-1) == targets).sum(0).float()) and hits[0] > 0
    zeros = cross_entropy.linear_cross_entropy(torch.zeros(4, 16), torch.zeros(27, 16),
                                               torch.tensor([[0], [1], [2], [-100]]))
    assert zeros[2].tolist() == [1]  # of equal logits the first is the highest


def launches():
    """Those of a training step's parts, by name: nothing is computed."""
    found = {}
    for name, taps, silu in ("causal, SiLU", 4, True), ("of seven taps", 7, False):
        x, weight, bias = torch.zeros(1, 64, 64).bfloat16(), torch.zeros(taps, 64), None if silu else torch.zeros(64)
        with recorded(convolution) as calls:
            convolution.convolution(x.requires_grad_(), weight.requires_grad_(), bias, 3, silu).sum().backward()
        assert len(calls) == 3  # y, gradients, dx
        found |= {f"{name} {n}": call for n, call in enumerate(calls)}
    for symbols in 1027, 65_611:
        with recorded(cross_entropy) as calls, mock.patch.object(cross_entropy, "takes_kernel", lambda x: True):
            logits = torch.zeros(1, -(-symbols // 8) * 8).bfloat16()
            cross_entropy.softmax_in_place(logits, torch.zeros(1).long(), symbols, True)
        found[f"{symbols} symbols"], = calls
    return found


LAUNCHES = {} if __name__ == "__main__" else launches()


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiled_without_spills(name, chip):
    registers, spilled, *_ = build(LAUNCHES[name], chip)
    assert spilled == 0 and registers <= 192


if __name__ == "__main__":
    interpret()
    print(json.dumps("done"))
