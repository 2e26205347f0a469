"""The models that the three trainers share parts of. This file knows nothing of files, corpora or command lines.

FlowTTS, a text-to-speech model by flow matching on log-mels. Notable:
- a non-causal Transformer over patches of mel frames predicts the velocity from data to noise (Lipman et al., 2023);
- RMSNorm without weights, modulated by time as in DiT (Peebles & Xie, 2023), with one shared modulation and a small
  table per block as in PixArt-alpha (Chen et al., 2023); SwiGLU; RMS-normed queries and keys; matrices without biases;
- a duration for each byte of text. Their sum is the length of the clip. Their running sum is *when* each byte is
  spoken, and there the rotary embedding of the cross-attention puts it. So alignment is learned as durations, from the
  lengths of whole clips and through the flow's own loss, and attention starts on the diagonal.

Shapes: B batch, T mel frames, L bytes of text, H heads, D width of the decoder, E width of the text.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import PositiveInt
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------
# Parts

def rms_norm(x):
    """x / root mean square of x over the last dimension (Zhang & Sennrich, 2019), without weights."""
    if x.is_cpu:  # three passes over memory, where PyTorch's own takes ten
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True, dtype=torch.float32) + 1e-6).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotary(position, head_width, base):
    """Rotary embeddings (Su et al., 2021) for real-valued positions (B, T): cosines and signed sines for `rotate`,
    each (B, 1, T, head_width)."""
    rate = base ** -(torch.arange(0, head_width, 2, device=position.device) / head_width)
    angle = (position.float()[..., None] * rate)[:, None]
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


def rotate(x, rope):
    """Turn the pairs (x[i], x[i + head_width / 2]) of (B, H, T, head_width) by their angles."""
    cos, sin = (part.to(x.dtype) for part in rope)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def attend(q, k, v, mask):
    """Attention of queries (B, H, T, head_width) to keys (B, H, S, head_width) where mask (B, 1, 1, S) is true.

    Training on a CPU takes the plain products: there the fused kernel's backward is several times slower.
    """
    if q.is_cpu and q.requires_grad:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head attention with RMS-normed, rotated queries and keys.

    With `positional`, queries and keys have a constant part in every head. Rotated, it makes the scores a function of
    the difference of positions that peaks where they agree, so that attention is local before anything is learned.
    """

    def __init__(self, width, heads, source_width=None, positional=False):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(source_width or width, width, bias=False)
        self.value = nn.Linear(source_width or width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.constant = nn.Parameter(torch.ones(2, heads, 1, width // heads)) if positional else None

    def forward(self, x, source, rope, source_rope, mask):
        """x (B, T, width), source (B, S, source_width), mask (B, 1, 1, S) -> (B, T, width)."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, head_width)
                   for y in (self.query(x), self.key(source), self.value(source)))
        q, k = rms_norm(q), rms_norm(k)
        if self.constant is not None:
            q, k = q + self.constant[0].to(q.dtype), k + self.constant[1].to(k.dtype)
        y = attend(rotate(q, rope), rotate(k, source_rope), v, mask)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, 2020)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LocalMix(nn.Module):
    """Depthwise convolution over 7 steps, added to its input; it starts as the identity."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 7, padding=3, groups=width)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x, mask):
        """x (B, T, width), mask (B, 1, 1, T) -> (B, T, width). What is masked is as if it were not there."""
        x = x * mask[:, 0, 0, :, None]
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------
# Flow-matching TTS

@dataclass
class FlowConfig:
    system: Literal["flow"] = "flow"
    # log-mels, as audio.MelConfig
    sample_rate: int = 22050  # Hz
    n_fft: int = 1024
    hop_length: int = 256  # samples
    n_mels: int = 80
    fmin: float = 0.0  # Hz
    fmax: float = 8000.0  # Hz
    # decoder
    width: PositiveInt = 256
    layers: PositiveInt = 6
    heads: PositiveInt = 4
    ffn_width: PositiveInt = 512
    patch: PositiveInt = 2  # mel frames that make one step of the decoder
    # text: "bytes" is an encoder trained with the decoder, anything else a frozen ByT5 of the hub or of a folder
    text_encoder: str = "bytes"
    text_width: PositiveInt = 256  # of the byte encoder, and of the projection of ByT5's states
    text_layers: int = 2  # of the byte encoder
    byt5_width: int = 1472  # of the frozen states


class TextBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.local = LocalMix(width)
        self.attention = Attention(width, heads)
        self.ffn = SwiGLU(width, 2 * width)

    def forward(self, x, rope, mask):
        x = self.local(x, mask)
        h = rms_norm(x)
        x = x + self.attention(h, h, rope, rope, mask)
        return x + self.ffn(rms_norm(x))


class FlowBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(9, c.width))
        self.local = LocalMix(c.width)
        self.self_attention = Attention(c.width, c.heads)
        self.cross_attention = Attention(c.width, c.heads, c.text_width, positional=True)
        self.ffn = SwiGLU(c.width, c.ffn_width)

    def forward(self, x, text, modulation, mel_rope, mel_mask, cross_rope, text_rope, text_mask):
        scale1, shift1, gate1, scale2, shift2, gate2, scale3, shift3, gate3 = (
            (modulation + self.modulation).to(x.dtype)[:, :, None].unbind(1))  # each (B, 1, D)
        x = self.local(x, mel_mask)
        h = torch.addcmul(shift1, rms_norm(x), 1 + scale1)
        x = torch.addcmul(x, gate1, self.self_attention(h, h, mel_rope, mel_rope, mel_mask))
        h = torch.addcmul(shift2, rms_norm(x), 1 + scale2)
        x = torch.addcmul(x, gate2, self.cross_attention(h, text, cross_rope, text_rope, text_mask))
        h = torch.addcmul(shift3, rms_norm(x), 1 + scale3)
        return torch.addcmul(x, gate3, self.ffn(h))


class FlowTTS(nn.Module):
    """Text -> log-mel. Inside, mels are normalised by the corpus's mean and standard deviation, kept as buffers."""

    def __init__(self, c: FlowConfig):
        super().__init__()
        self.c = c
        self.checkpointing = False  # recompute the blocks in the backward pass
        self.register_buffer("mel_mean", torch.tensor(-5.5175))  # LJSpeech's; the trainer sets the corpus's own
        self.register_buffer("mel_std", torch.tensor(2.0644))
        if c.text_encoder == "bytes":
            self.text_input = nn.Embedding(259, c.text_width)
        else:
            self.text_input = nn.Linear(c.byt5_width, c.text_width, bias=False)
        self.text_blocks = nn.ModuleList(TextBlock(c.text_width, c.text_width // 64) for _ in range(c.text_layers))
        self.duration = nn.Sequential(nn.Linear(c.text_width, c.text_width), nn.SiLU(), nn.Linear(c.text_width, 1))
        self.time = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width), nn.SiLU())
        self.modulation = nn.Linear(c.width, 9 * c.width)
        self.mel_input = nn.Linear(c.patch * c.n_mels, c.width)
        self.blocks = nn.ModuleList(FlowBlock(c) for _ in range(c.layers))
        self.final_modulation = nn.Linear(c.width, 2 * c.width)
        self.mel_output = nn.Linear(c.width, c.patch * c.n_mels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in (self.modulation, self.final_modulation, self.mel_output, self.duration[-1]):
            nn.init.zeros_(module.weight)  # at first: no modulation by time, velocity 0, all bytes equally long
        with torch.no_grad():
            self.modulation.bias.view(9, -1)[2::3] = 0.3  # gates
            self.duration[-1].bias.fill_(math.log(0.07))  # seconds a byte

    def encode_text(self, text, length):
        """text (B, L) byte ids or (B, L, byt5_width) states, length (B,) -> what `velocity` needs of it, log seconds.

        Returns ((states (B, L, E), mask (B, 1, 1, L), clock (B, L)), log_seconds (B,)). clock is the middle of each
        byte's duration, in units of the mean duration of the text's bytes.
        """
        mask = torch.arange(text.shape[1], device=text.device) < length[:, None]
        x = self.text_input(text)
        rope = rotary(torch.arange(text.shape[1], device=text.device)[None], 64, 100.0)
        for block in self.text_blocks:
            x = block(x, rope, mask[:, None, None])
        x = rms_norm(x)
        duration = self.duration(x)[..., 0].float().clamp(-7, 2).exp() * mask  # seconds
        seconds = duration.sum(1)
        clock = (duration.cumsum(1) - duration / 2) * (length / seconds)[:, None]
        return (x, mask[:, None, None], clock), seconds.log()

    def velocity(self, x_t, t, frames, encoded):
        """d x_t / dt of x_t = (1 - t) data + t noise.

        x_t (B, T, n_mels) with T a multiple of patch, t (B,) in [0, 1], frames (B,), encoded from `encode_text`.
        Returns (B, T, n_mels).
        """
        c, (text, text_mask, clock) = self.c, encoded
        steps = (frames + c.patch - 1) // c.patch  # (B,)
        position = torch.arange(x_t.shape[1] // c.patch, device=x_t.device)[None]  # of decoder steps
        mel_mask = (position < steps[:, None])[:, None, None]
        mel_rope = rotary(position, c.width // c.heads, 1000.0)
        bytes_per_step = text_mask.sum((1, 2, 3)) / steps
        cross_rope = rotary((position + 0.5) * bytes_per_step[:, None], c.width // c.heads, 100.0)
        text_rope = rotary(clock, c.width // c.heads, 100.0)

        rate = 10000.0 ** -(torch.arange(128, device=t.device) / 128)
        angle = 1000 * t[:, None] * rate
        time = self.time(torch.cat((angle.cos(), angle.sin()), -1))
        modulation = self.modulation(time).unflatten(-1, (9, -1))
        x_t = x_t * (torch.arange(x_t.shape[1], device=x_t.device) < frames[:, None])[..., None]
        x = self.mel_input(x_t.unflatten(1, (-1, c.patch)).flatten(2))  # (B, T / patch, D)
        for block in self.blocks:
            args = (x, text, modulation, mel_rope, mel_mask, cross_rope, text_rope, text_mask)
            x = checkpoint(block, *args, use_reentrant=False) if self.checkpointing and self.training else block(*args)
        scale, shift = self.final_modulation(time)[:, None].chunk(2, -1)
        return self.mel_output(torch.addcmul(shift, rms_norm(x), 1 + scale)).unflatten(-1, (c.patch, -1)).flatten(1, 2)

    def forward(self, x_t, t, frames, text, length):
        """One training step's outputs: velocity (B, T, n_mels), log_seconds (B,)."""
        encoded, log_seconds = self.encode_text(text, length)
        return self.velocity(x_t, t, frames, encoded), log_seconds

    @torch.inference_mode()
    def generate(self, text, length, empty, seeds, frames=None, steps=16, cfg_scale=2.0, solver="euler"):
        """Sample log-mels by solving the flow from noise (t = 1) to data (t = 0).

        text, length as in `encode_text`; empty (1, 1) or (1, 1, byt5_width) is the empty text; seeds: a number for
        each sample's noise. frames (B,), or None for the predicted durations. cfg_scale is the weight of classifier-
        free guidance (Ho & Salimans, 2022), 1 for none. solver: "euler", or with two evaluations a step "midpoint" or
        "heun".
        Returns a list of log-mels (frames, n_mels), not normalised.
        """
        c, device = self.c, text.device
        encoded, log_seconds = self.encode_text(text, length)
        if frames is None:
            frames = (log_seconds.exp() * c.sample_rate / c.hop_length).round().long().clamp(min=1)
        x = torch.zeros(len(text), -(-int(frames.max()) // c.patch) * c.patch, c.n_mels, device=device)
        for i, (seed, n) in enumerate(zip(seeds, frames.tolist())):  # a sample does not depend on its neighbours
            x[i, :n] = torch.randn(n, c.n_mels, generator=torch.Generator().manual_seed(seed))
        null, _ = self.encode_text(empty, torch.ones(1, dtype=torch.long, device=device))
        null = [part.expand(len(text), *part.shape[1:]) for part in null]

        def velocity(x, t):
            t = torch.full((len(x),), t, device=device)
            v = self.velocity(x, t, frames, encoded).float()
            return v if cfg_scale == 1 else torch.lerp(self.velocity(x, t, frames, null).float(), v, cfg_scale)

        for i in range(steps):
            t, dt = 1 - i / steps, -1 / steps
            v = velocity(x, t)
            if solver == "midpoint":
                v = velocity(x + dt / 2 * v, t + dt / 2)
            elif solver == "heun":
                v = (v + velocity(x + dt * v, t + dt)) / 2
            x = x + dt * v
        return [mel[:n].cpu() for mel, n in zip(x * self.mel_std + self.mel_mean, frames.tolist())]
