"""Depthwise convolution along time in Triton. A GPU's own kernels for it take five times as long, and what
torch.compile makes of shifted sums reads everything once for each tap again.
"""
from __future__ import annotations  # the kernels' are Triton's, which may be missing

import torch

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # there is none for this platform
    triton, jit = None, lambda kernel: kernel

STEPS, CHANNELS, WARPS = 64, 64, 4  # of a program


@jit
def _place(T, C, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's clip, steps and channels."""
    blocks = tl.cdiv(T, STEPS)
    return ((tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * STEPS + tl.arange(0, STEPS),
            tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))


@jit
def _shifted(x, clip, step, channel, T, C, row):
    """x (clips, T, C), rows so far apart, at some steps, as float32; 0 before and after a clip."""
    mask = ((step >= 0) & (step < T))[:, None] & (channel < C)[None, :]
    return tl.load(x + (clip * T + step)[:, None] * row + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _weighted(x, weight, bias, clip, step, channel, T, C, row, LEFT: tl.constexpr, TAPS: tl.constexpr):
    z = tl.zeros([step.shape[0], channel.shape[0]], tl.float32)
    for tap in tl.static_range(TAPS):
        w = tl.load(weight + tap * C + channel, mask=channel < C, other=0.0).to(tl.float32)
        z += w[None, :] * _shifted(x, clip, step + (tap - LEFT), channel, T, C, row)
    if bias is not None:
        z += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    return z


@jit
def convolution_kernel(x, weight, bias, y, T, C, row, LEFT: tl.constexpr, TAPS: tl.constexpr, SILU: tl.constexpr,
                       STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """y_t = silu(bias + Σ_i weight_i x_{t + i − LEFT})."""
    clip, step, channel = _place(T, C, STEPS, CHANNELS)
    z = _weighted(x, weight, bias, clip, step, channel, T, C, row, LEFT, TAPS)
    z = z * tl.sigmoid(z) if SILU else z
    tl.store(y + (clip * T + step)[:, None] * C + channel[None, :], z.to(y.dtype.element_ty),
             mask=(step < T)[:, None] & (channel < C)[None, :])


@jit
def gradients_kernel(x, weight, bias, dy, dz, sums, T, C, row, LEFT: tl.constexpr, TAPS: tl.constexpr,
                     SILU: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The gradient before the SiLU, and for each program's steps those of the weights and, in the last row, of the
    bias: sums (programs, TAPS + 1, C)."""
    clip, step, channel = _place(T, C, STEPS, CHANNELS)
    d = _shifted(dy, clip, step, channel, T, C, C)
    if SILU:
        z = _weighted(x, weight, bias, clip, step, channel, T, C, row, LEFT, TAPS)
        s = tl.sigmoid(z)
        d *= s * (1 + z * (1 - s))
        tl.store(dz + (clip * T + step)[:, None] * C + channel[None, :], d.to(dz.dtype.element_ty),
                 mask=(step < T)[:, None] & (channel < C)[None, :])
    sums += tl.program_id(0).to(tl.int64) * (TAPS + 1) * C + channel
    for tap in tl.static_range(TAPS):
        shifted = _shifted(x, clip, step + (tap - LEFT), channel, T, C, row)
        tl.store(sums + tap * C, tl.sum(d * shifted, 0), mask=channel < C)
    tl.store(sums + TAPS * C, tl.sum(d, 0), mask=channel < C)


def _rows(x):
    """x (B, T, C), and how far apart its steps are: a view of a wider tensor need not be copied."""
    if x.stride(2) != 1 or x.stride(0) != x.shape[1] * x.stride(1):
        x = x.contiguous()
    return x, x.stride(1)


def _launch(kernel, x, weight, bias, *results, left, silu):
    (x, row), (_, T, C) = _rows(x), x.shape
    kernel[len(x) * -(-T // STEPS), -(-C // CHANNELS)](
        x, weight.contiguous(), bias, *results, T, C, row, left, len(weight), silu, STEPS, CHANNELS,
        num_warps=WARPS)


def _forward(x, weight, bias, left, silu):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(convolution_kernel, x, weight, bias, y, left=left, silu=silu)
    return y


def _backward(dy, x, weight, bias, left, silu):
    dy, sums = dy.contiguous(), x.new_empty(len(x) * -(-x.shape[1] // STEPS), len(weight) + 1, x.shape[2],
                                            dtype=torch.float32)
    dz = torch.empty_like(dy) if silu else dy
    _launch(gradients_kernel, x, weight, bias, dy, dz, sums, left=left, silu=silu)
    return _forward(dz, weight.flip(0), None, len(weight) - 1 - left, False), sums.sum(0)


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, ctx.left, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    dx, sums = torch.ops.trivox.convolution_backward(dy, x, weight, bias, ctx.left, ctx.silu)
    return dx, sums[:-1].to(weight.dtype), None if bias is None else sums[-1].to(bias.dtype), None, None


OPERATORS = torch.library.Library("trivox", "FRAGMENT")
for schema, function, fake in (
        ("convolution(Tensor x, Tensor weight, Tensor? bias, int left, bool silu) -> Tensor", _forward,
         lambda x, *_: x.new_empty(x.shape)),
        ("convolution_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, int left, bool silu) -> "
         "(Tensor, Tensor)", _backward,
         lambda dy, x, weight, *_: (x.new_empty(x.shape), x.new_empty(len(weight) + 1, x.shape[2],
                                                                     dtype=torch.float32)))):
    name = OPERATORS.define(schema)
    for key in "CPU", "CUDA":
        OPERATORS.impl(name, function, key)
    torch.library.register_fake(f"trivox::{name}", fake, lib=OPERATORS)
torch.library.register_autograd("trivox::convolution", _gradients, setup_context=_save_for_backward, lib=OPERATORS)


def convolution(x, weight, bias=None, left=0, silu=False):
    """Each channel of x (B, T, C) by itself: Σ_i weight[i] x[t + i − left] for weight (taps, C), plus bias (C,), and of
    that the SiLU where it is asked for. Returns (B, T, C) of x's type; sums are float32."""
    return torch.ops.trivox.convolution(x, weight, bias, left, silu)


def takes_kernel(x):
    return x.is_cuda and triton is not None
