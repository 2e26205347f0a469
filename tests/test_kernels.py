"""The kernels of convolution.py and cross_entropy.py without a GPU: run by Triton's interpreter beside PyTorch in
float64, in a process of its own, and compiled.

    python tests/test_kernels.py    what that process does
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.kernels import Launch, build
from trivox import convolution, cross_entropy


def test_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


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


def a_launch(kernel, types, **constants):
    """Of types by the arguments' names, and how it is compiled: pointers, C and row are multiples of 16."""
    names = kernel.arg_names
    types = {name: kind for kind, some in types.items() for name in some.split()}
    even = [n for n, name in enumerate(names) if types.get(name, "")[:1] == "*" or name in ("C", "row")]
    warps = convolution.WARPS if "TAPS" in constants else 8
    return Launch("", kernel, None, {name: types.get(name, "constexpr") for name in names}, constants,
                  {(n,): [["tt.divisibility", 16]] for n in even}, dict(num_warps=warps), 0)


TILES = dict(STEPS=convolution.STEPS, CHANNELS=convolution.CHANNELS)
LAUNCHES = {
    "logits of codes": a_launch(cross_entropy.softmax_kernel, {
        "*bf16": "logits", "*i64": "targets", "*fp32": "losses hits", "i32": "V row_width"}, BLOCK=4096, WRITE=True),
    "causal with SiLU": a_launch(convolution.gradients_kernel, {
        "*bf16": "x dy dz", "*fp32": "weight sums", "i32": "T C row"}, bias=None, LEFT=3, TAPS=4, SILU=True, **TILES),
    "of seven taps": a_launch(convolution.convolution_kernel, {
        "*bf16": "x y", "*fp32": "weight bias", "i32": "T C row"}, LEFT=3, TAPS=7, SILU=False, **TILES)}


@pytest.mark.parametrize("chip", [80, 90])
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiled_without_spills(name, chip):
    registers, spilled, *_ = build(LAUNCHES[name], chip)
    assert spilled == 0 and registers <= 192


if __name__ == "__main__":
    interpret()
