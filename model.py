"""The models that the three trainers share parts of. This file knows nothing of files, corpora or command lines.

FlowTTS, a text-to-speech model by flow matching on log-mels. Notable:
- a non-causal Transformer over patches of mel frames predicts the velocity from data to noise (Lipman et al., 2023);
- RMSNorm without weights, modulated by time as in DiT (Peebles & Xie, 2023), with one shared modulation and a small
  table per block as in PixArt-alpha (Chen et al., 2023); SwiGLU; RMS-normed queries and keys; matrices without biases;
- a duration for each byte of text. Their sum is the length of the clip. Their running sum is *when* each byte is
  spoken, and there the rotary embedding of the cross-attention puts it. So alignment is learned as durations, from the
  lengths of whole clips and through the flow's own loss, and attention starts on the diagonal.

CodecLM, a language model over the token streams of a neural audio codec. Notable:
- all books of a step are predicted at once, each delayed by one step more than the one before (MusicGen's pattern);
- a letter a block says how it mixes time: attention (rotary, grouped queries, normed queries and keys), gated DeltaNet
  as in OLMo Hybrid, a plainer delta mixer, or Mamba-2; every block is pre-norm, with a SwiGLU;
- every mixer has a state, by which a step costs the same however long the clip is: the recurrent ones a matrix a head,
  attention a ring of the last keys and values;
- text, where there is any, through the same encoder, clock and positional cross-attention as in FlowTTS.

LLM, a text-to-speech model that reads characters and goes on in the codes of a codec of one book. Notable:
- Echolancer's decoder to the last parameter: pre-norm LayerNorm without a final one, matrices without biases, grouped
  queries, ReLU² or GELU, embedding and head in one, positions by linear biases alone (ALiBi: Press et al., 2022) whose
  slopes fall from block to block;
- alignment is left to attention; a voice, where there is one, scales and shifts every norm (AdaLN);
- sentences of many lengths are packed into rows of one length, in which none sees another;
- FlexAttention on GPUs, which holds no bias; scaled_dot_product_attention elsewhere and in decoding.

Shapes: B batch, T mel frames, codec frames or tokens, S delayed steps or keys, Q codebooks, L bytes of text, H heads, D
width of the decoder, E width of the text.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import FiniteFloat, NonNegativeInt, PositiveInt
from torch.utils.checkpoint import checkpoint

from trivox import convolution
from trivox.alphabet import FIRST, SYMBOLS
from trivox.common import AnyLayers, Fraction, Layers, NotNegative, Positive, UserError
from trivox.delta_rule import chunk_gated_delta_rule, recurrent_step

# ------------------------------------------------------------------------------------------------------------
# Parts

def rms_norm(x, eps=1e-6):
    """x / root mean square of x over the last dimension (Zhang & Sennrich, 2019), without weights."""
    if x.is_cpu:  # three passes over memory, where PyTorch's own takes ten
        return x * x.square().mean(-1, keepdim=True, dtype=torch.float32).add_(eps).rsqrt_().to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], eps=eps)


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
        return self.look(x, rope, *self.keys_values(source, source_rope), mask)

    def keys_values(self, source, rope):
        """What `look` needs of a source (B, S, source_width): keys and values, each (B, H, S, head_width)."""
        k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.key(source), self.value(source)))
        return self.place(k, 1, rope), v

    def look(self, x, rope, k, v, mask):
        """x (B, T, width) -> (B, T, width)."""
        q = self.place(self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), 0, rope)
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def place(self, x, side, rope):
        """Queries (side 0) or keys (side 1), normed, with their constant part and rotated to their positions."""
        x = rms_norm(x)
        return rotate(x if self.constant is None else x + self.constant[side].to(x.dtype), rope)


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
        if convolution.takes_kernel(x):
            same = (torch.arange(7, device=x.device) == 3)[:, None]
            return convolution.convolution(x, self.conv.weight[:, 0].T + same, self.conv.bias, left=3)
        if torch.compiler.is_compiling():  # which would compile a convolution's backward anew for each length
            padded, weight = F.pad(x, (0, 0, 3, 3)), self.conv.weight[:, 0].T.to(x.dtype)
            return x + self.conv.bias.to(x.dtype) + sum(padded[:, i:i + x.shape[1]] * w for i, w in enumerate(weight))
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


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


class TextEncoder(nn.Module):
    """Text to states, and to the duration of each byte in seconds."""

    def __init__(self, input, width, layers):
        super().__init__()
        self.input = input
        self.blocks = nn.ModuleList(TextBlock(width, width // 64) for _ in range(layers))
        self.duration = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, text, length):
        """text (B, L) byte ids or (B, L, E') states, as `input` reads it, and length (B,).

        Returns ((states (B, L, E), mask (B, 1, 1, L), clock (B, L)), log_seconds (B,)). clock is the middle of each
        byte's duration, in units of the mean duration of the text's bytes.
        """
        mask = torch.arange(text.shape[1], device=text.device) < length[:, None]
        x = self.input(text)
        rope = rotary(torch.arange(text.shape[1], device=text.device)[None], 64, 100.0)
        for block in self.blocks:
            x = block(x, rope, mask[:, None, None])
        x = rms_norm(x)
        duration = self.duration(x)[..., 0].float().clamp(-7, 2).exp() * mask  # seconds
        seconds = duration.sum(1)
        clock = (duration.cumsum(1) - duration / 2) * (length / seconds)[:, None]
        return (x, mask[:, None, None], clock), seconds.log()


# ------------------------------------------------------------------------------------------------------------
# Flow-matching TTS

@dataclass
class FlowConfig:
    system: Literal["flow"] = "flow"
    # log-mels, as audio.MelConfig
    sample_rate: PositiveInt = 22050  # Hz
    n_fft: PositiveInt = 1024
    hop_length: PositiveInt = 256  # samples
    n_mels: PositiveInt = 80
    fmin: NotNegative = 0.0  # Hz
    fmax: Positive = 8000.0  # Hz
    # decoder
    width: PositiveInt = 256
    layers: Layers = 6
    heads: PositiveInt = 4
    ffn_width: PositiveInt = 512
    patch: PositiveInt = 2  # mel frames that make one step of the decoder
    prediction: Literal["velocity", "mel"] = "velocity"  # mel: the clean one, of which the velocity follows
    # text: "bytes" is an encoder trained with the decoder, anything else a frozen ByT5 of the hub or of a folder
    text_encoder: str = "bytes"
    text_width: PositiveInt = 256  # of the byte encoder, and of the projection of ByT5's states
    text_layers: AnyLayers = 2  # of the byte encoder
    byt5_width: PositiveInt = 1472  # of the frozen states
    phonemes: str = ""  # bytes: not of the text, but of its IPA by this voice of espeak-ng, such as en-us

    def __post_init__(self):
        if self.phonemes and self.text_encoder != "bytes":
            raise UserError(f"--phonemes {self.phonemes} is for the text_encoder bytes: {self.text_encoder} has learnt "
                            "to read texts as they are spelled")
        if self.width % (2 * self.heads):
            raise UserError(f"{self.heads} heads do not divide the width {self.width} into even parts")
        if self.text_width % 64:
            raise UserError(f"the text_width {self.text_width} is not a multiple of 64")


class FlowBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(9, c.width))
        self.local = LocalMix(c.width)
        self.self_attention = Attention(c.width, c.heads)
        self.cross_attention = Attention(c.width, c.heads, c.text_width, positional=True)
        self.ffn = SwiGLU(c.width, c.ffn_width)

    def forward(self, x, text, pair, modulation, mel_rope, mel_mask, cross_rope, text_rope, text_mask):
        """text (B, L, E), of which the cross-attention's keys and values are, where they are not given as a pair."""
        scale1, shift1, gate1, scale2, shift2, gate2, scale3, shift3, gate3 = (
            (modulation + self.modulation).to(x.dtype)[:, :, None].unbind(1))  # each (B, 1, D)
        x = self.local(x, mel_mask)
        h = torch.addcmul(shift1, rms_norm(x), 1 + scale1)
        x = torch.addcmul(x, gate1, self.self_attention(h, h, mel_rope, mel_rope, mel_mask))
        h = torch.addcmul(shift2, rms_norm(x), 1 + scale2)
        pair = pair or self.cross_attention.keys_values(text, text_rope)
        x = torch.addcmul(x, gate2, self.cross_attention.look(h, cross_rope, *pair, text_mask))
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
            text_input = nn.Embedding(259, c.text_width)
        else:
            text_input = nn.Linear(c.byt5_width, c.text_width, bias=False)
        self.encode_text = TextEncoder(text_input, c.text_width, c.text_layers)
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
        for module in (self.modulation, self.final_modulation, self.mel_output, self.encode_text.duration[-1]):
            nn.init.zeros_(module.weight)  # at first: no modulation by time, velocity 0, all bytes equally long
        with torch.no_grad():
            self.modulation.bias.view(9, -1)[2::3] = 0.3  # gates
            self.encode_text.duration[-1].bias.fill_(math.log(0.07))  # seconds a byte

    def keys_values(self, encoded):
        """What the blocks make of a text from `encode_text`, a pair of tensors each: the same at all times."""
        text, _, clock = encoded
        rope = rotary(clock, self.c.width // self.c.heads, 100.0)
        return [block.cross_attention.keys_values(text, rope) for block in self.blocks]

    def velocity(self, x_t, t, frames, encoded, pairs=None):
        """d x_t / dt of x_t = (1 - t) data + t noise.

        x_t (B, T, n_mels) with T a multiple of patch, t (B,) in [0, 1], frames (B,), encoded from `encode_text`, pairs
        from `keys_values` or None. Returns (B, T, n_mels).
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
        for block, pair in zip(self.blocks, pairs or [None] * len(self.blocks)):
            args = (x, text, pair, modulation, mel_rope, mel_mask, cross_rope, text_rope, text_mask)
            x = checkpoint(block, *args, use_reentrant=False) if self.checkpointing and self.training else block(*args)
        scale, shift = self.final_modulation(time)[:, None].chunk(2, -1)
        y = self.mel_output(torch.addcmul(shift, rms_norm(x), 1 + scale)).unflatten(-1, (c.patch, -1)).flatten(1, 2)
        # Li & He (2025): a clean mel has fewer dimensions than a velocity. Below t = 0.2 it gives x_t - 0.2 v, which is
        # between the two, as errors of a mel divided by less would outweigh all others
        return (x_t - y) / t.clamp(min=0.2)[:, None, None] if c.prediction == "mel" else y

    def forward(self, x_t, t, frames, text, length):
        """One training step's outputs: velocity (B, T, n_mels), log_seconds (B,)."""
        encoded, log_seconds = self.encode_text(text, length)
        return self.velocity(x_t, t, frames, encoded), log_seconds


# ------------------------------------------------------------------------------------------------------------
# Codec LM

@dataclass
class CodecConfig:
    system: Literal["codec"] = "codec"
    # tokens; a data set must be of the same
    codec: str = "encodec_24khz"
    sample_rate: PositiveInt = 24000  # Hz
    frame_rate: Positive = 75.0  # frames a second
    codebooks: PositiveInt = 8
    codebook_size: PositiveInt = 1024
    context: PositiveInt = 1024  # delayed steps that are trained on at once, and that attention looks back over
    # decoder
    width: PositiveInt = 384
    layers: Layers = 8
    heads: PositiveInt = 6  # of every mixer but mamba2, whose heads are 64 wide
    kv_heads: PositiveInt = 2  # of attention
    ffn_width: PositiveInt = 1024
    mixer: Literal["attention", "gdn", "delta", "mamba2"] = "gdn"  # of the blocks that the next two lines leave
    attn_every: NonNegativeInt = 4  # each block of this number is attention; 0 for none
    last_layer_attention: bool = True
    pattern: str = ""  # instead of those three, a letter a block: A attention, G gdn, D delta, M mamba2
    negative_eigenvalues: bool = True  # gdn: corrections of up to 2, which can turn a state around
    dropout: Fraction = 0.0
    # text: a byte-level encoder that every n-th block looks at; clips are then whole sentences, which end in EOS
    cross_every: NonNegativeInt = 0  # 0 for a model without text
    text_width: PositiveInt = 256
    text_layers: AnyLayers = 2
    phonemes: str = ""  # not the text is read, but its IPA by this voice of espeak-ng, such as en-us

    @property
    def layout(self):
        """A letter for each block."""
        attention = {i for i in range(self.layers) if self.attn_every and (i + 1) % self.attn_every == 0}
        attention |= {self.layers - 1} if self.last_layer_attention else set()
        return self.pattern or "".join("A" if i in attention else LETTERS[self.mixer] for i in range(self.layers))

    def __post_init__(self):
        check_blocks(self, LETTERS)
        if "M" in self.layout and self.width % 32:
            raise UserError(f"the width {self.width} is not a multiple of 32, which mamba2 needs")
        if self.context <= self.codebooks:
            raise UserError(f"a context of {self.context} has room for no frame of {self.codebooks} delayed codebooks: "
                            "raise --context")
        if self.cross_every and self.text_width % 64:
            raise UserError(f"the text_width {self.text_width} is not a multiple of 64")
        if self.phonemes and not self.cross_every:
            raise UserError(f"--phonemes {self.phonemes} is for a model with text: give --cross_every too")


LETTERS = {"attention": "A", "gdn": "G", "delta": "D", "mamba2": "M"}


def check_blocks(c, letters):
    """Raises UserError where the layout and the heads of a config do not fit together. letters: {mixer: its letter}."""
    if unknown := set(c.layout) - set(letters.values()):
        raise UserError(f"pattern {c.pattern!r} has the letter {min(unknown)!r}; it may have "
                        + ", ".join(f"{letter} for {name}" for name, letter in letters.items()))
    if min(c.heads, c.kv_heads, c.layers, c.width) < 1:
        raise UserError(f"layers {c.layers}, width {c.width}, heads {c.heads} and kv_heads {c.kv_heads} should each be "
                        "at least 1")
    if len(c.layout) != c.layers:
        raise UserError(f"pattern {c.pattern!r} lays out {len(c.pattern)} blocks, not {c.layers}")
    if c.width % (4 * c.heads):
        raise UserError(f"{c.heads} heads do not divide the width {c.width} into multiples of 4")
    if c.heads % c.kv_heads:
        raise UserError(f"kv_heads {c.kv_heads} does not divide heads {c.heads}")


def delay(codes, bos, pad):
    """Codes (B, T, Q) to delayed steps (B, T + Q, Q): MusicGen's pattern (Copet et al., 2023), with BOS in front.

    Book q's code of frame t stands in row 1 + t + q. Rows before a book's first code hold `bos`, after its last `pad`:

        row       0    1    2    3    4    5
        book 0  BOS    a    b    c  PAD  PAD
        book 1  BOS  BOS    a    b    c  PAD      so that a row can be predicted from those above it at once, and
        book 2  BOS  BOS  BOS    a    b    c      each code from all coarser ones of its frame.

    A clip that is whole ends in one more frame, (EOS, PAD, …, PAD), to be appended before.
    """
    B, T, Q = codes.shape
    row, book = (torch.arange(n, device=codes.device) for n in (T + Q, Q))
    frame = row[:, None] - 1 - book  # (T + Q, Q)
    delayed = codes.gather(1, frame.clamp(0, max(T - 1, 0)).expand(B, -1, -1)) if T else codes.new_zeros(B, Q, Q)
    return delayed.masked_fill(frame >= T, pad).masked_fill(frame < 0, bos)


def undelay(delayed):
    """Delayed steps (B, T + Q, Q) back to codes (B, T, Q)."""
    T, Q = delayed.shape[1] - delayed.shape[2], delayed.shape[2]
    return torch.stack([delayed[:, 1 + q:1 + q + T, q] for q in range(Q)], 2)


def delayed_batch(c, clips, multiple=1):
    """Clips, a list of (frames, Q) codes, to delayed steps (B, S, Q) in one tensor: PAD fills what the shorter ones
    lack to a multiple of frames, and where the model has text, and so clips are whole, EOS ends each of them."""
    bos, pad, eos = c.codebook_size + 1, c.codebook_size, c.codebook_size + 2
    whole = int(c.cross_every > 0)
    longest = -(-(max(map(len, clips)) + whole) // multiple) * multiple
    codes = torch.stack([F.pad(clip, (0, 0, 0, longest - len(clip)), value=pad) for clip in clips])
    if whole:
        codes[range(len(clips)), [len(clip) for clip in clips], 0] = eos
    return delay(codes, bos, pad)


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x, self.eps) * self.weight.to(x.dtype)


class CausalAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary embeddings and RMS-normed queries and keys.

    Its state is a ring of the last keys and values: attention looks back over so many steps and no further.
    """

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_width = c.heads, c.kv_heads, c.width // c.heads
        # queries, keys, values
        self.input = nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * self.head_width, bias=False)
        self.input.weight.parts = [n * self.head_width for n in (c.heads, c.kv_heads, c.kv_heads)]  # for Muon
        self.query_norm, self.key_norm = RMSNorm(self.head_width), RMSNorm(self.head_width)
        self.out = nn.Linear(c.width, c.width, bias=False)

    def empty_state(self, batch, steps):
        return [self.out.weight.new_zeros(batch, self.kv_heads, steps, self.head_width) for _ in range(2)]

    def forward(self, x, look, rope, state=None):
        """look, where there is a state: the places (T,) of the steps in the ring, and a bias (T, S), -inf where a step
        may not look."""
        x = self.input(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, all heads, T, head_width)
        q, k, v = x.split((self.heads, self.kv_heads, self.kv_heads), 1)
        q, k = rotate(self.query_norm(q), rope), rotate(self.key_norm(k), rope)
        T = q.shape[2]
        if state is not None:
            place, bias = look
            for kept, new in zip(state, (k, v)):
                kept.index_copy_(2, place, new.to(kept.dtype))
            y = self.attend(q, *(kept.to(q.dtype) for kept in state), bias)
        elif q.is_cpu and q.requires_grad:  # as in `attend`
            y = self.attend(q, k, v, torch.full((T, T), -torch.inf).triu_(1))
        else:  # no mask tensor, so that a GPU takes its flash kernel
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def attend(self, q, k, v, bias):
        """Plain products; q (B, H, T, head_width), k and v (B, KV heads, S, head_width), bias (T, S)."""
        q = (q * self.head_width ** -0.5).unflatten(1, (self.kv_heads, -1))  # (B, KV, H / KV, T, head_width)
        scores = (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])
        return ((scores + bias.to(q.dtype)).softmax(-1).flatten(2, 3) @ v).unflatten(2, q.shape[2:4]).flatten(1, 2)


def causal_conv(x, weight, past=None, starts=None, bias=None):
    """SiLU of the depthwise convolution of x (B, T, C) over this step and the 3 before, weight (4, C), oldest first.

    past: the 3 steps before x, (B, 3, C), zeros unless given; it is replaced by x's last. starts (B, T): where a step
    is the first of a sentence of a packed row, which does not see the steps before it.
    """
    T = x.shape[1]
    if past is None and starts is None and convolution.takes_kernel(x):
        return convolution.convolution(x, weight, bias, left=3, silu=True)
    x = F.pad(x, (0, 0, 3, 0)) if past is None else torch.cat((past.to(x.dtype), x), 1)
    if past is not None:
        past.copy_(x[:, T:])
    if T == 1:
        x = (x * weight.to(x.dtype)).sum(1, keepdim=True)
        return F.silu(x if bias is None else x + bias.to(x.dtype))
    bias = 0 if bias is None else bias.to(x.dtype)
    a, b, c, d = (x[:, i:i + T] * w for i, w in enumerate(weight.to(x.dtype)))  # a CPU's own convolution is slower
    if starts is not None:
        step = torch.arange(T, device=x.device)
        age = (step - (step * starts).cummax(1).values)[..., None]  # steps since the sentence began
        a, b, c = (y * (age >= lag) for y, lag in ((a, 3), (b, 2), (c, 1)))
    return F.silu(a + b + c + d + bias)


def delta_rule(q, k, v, g, beta, S, normalise):
    """The gated delta rule, arguments as for `chunk_gated_delta_rule`, from the state S (B, H, K, V), which is updated,
    or from none."""
    if S is not None and q.shape[1] == 1:
        step = (x.squeeze(1) for x in (q, k, v, g, beta))
        return recurrent_step(*step, S, use_qk_l2norm_in_kernel=normalise).unsqueeze(1)
    o, last = chunk_gated_delta_rule(q, k, v, g, beta, initial_state=S, output_final_state=S is not None,
                                     use_qk_l2norm_in_kernel=normalise)
    if S is not None:
        S.copy_(last)
    return o


class SplitLinear(nn.Linear):
    """A matrix that makes parts of given widths. A GPU trains it part by part, each padded to a multiple of 8: another
    width takes it three times as long, and so the parts' gradients need not be put together."""

    def forward(self, x, widths):
        if not x.is_cuda or x.shape[1] == 1:
            return super().forward(x).split(widths, -1)
        return [F.linear(x, F.pad(w, (0, 0, 0, -len(w) % 8)))[..., :len(w)] for w in self.weight.split(widths)]


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (Yang et al., 2024) as OLMo Hybrid has it: keys 3/4 and values 3/2 as wide as attention's."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.keys, self.values = c.heads, c.width * 3 // 4, c.width * 3 // 2
        self.correction = 2 if c.negative_eigenvalues else 1
        # queries, keys, values; output gate; step size and correction of each head
        self.input = SplitLinear(c.width, 2 * self.keys + 2 * self.values + 2 * c.heads, bias=False)
        self.input.weight.parts = [self.keys, self.keys, self.values, self.values, c.heads, c.heads]
        self.conv = nn.Parameter(torch.empty(4, 2 * self.keys + self.values).uniform_(-0.5, 0.5))
        self.A_log, self.dt_bias = decay_parameters(c.heads)
        self.norm = RMSNorm(self.values // c.heads, eps=1e-5)  # the state begins at 0, so outputs may be small
        self.out = nn.Linear(self.values, c.width, bias=False)

    def empty_state(self, batch, steps):
        shape = batch, self.heads, self.keys // self.heads, self.values // self.heads
        return [self.out.weight.new_zeros(batch, 3, self.conv.shape[1]),
                self.conv.new_zeros(shape, dtype=torch.float32)]

    def forward(self, x, position, rope, state=None, starts=None):
        past, S = state or (None, None)
        qkv, gate, of_heads = self.input(x, (self.conv.shape[1], self.values, 2 * self.heads))
        dt, beta = of_heads.chunk(2, -1)
        qkv = causal_conv(qkv, self.conv, past, starts)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in qkv.split((self.keys, self.keys, self.values), -1))
        g = -self.A_log.float().exp() * F.softplus(dt.float() + self.dt_bias)
        if starts is not None:
            g = g.masked_fill(starts[..., None], -50.0)  # forgets the sentence before, on a GPU all but 1e-12 of it
        o = delta_rule(q, k, v, g, self.correction * beta.sigmoid(), S, normalise=True)
        return self.out(self.norm(o).flatten(2) * F.silu(gate))


def decay_parameters(heads):
    """A_log and dt_bias as Mamba-2 begins with them (Dao & Gu, 2024): decay rates exp(A_log) uniform in 1..16, step
    sizes softplus(dt_bias) log-uniform in 0.001..0.1."""
    dt = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
    return (nn.Parameter(torch.empty(heads).uniform_(1, 16).log()), nn.Parameter(dt + (-torch.expm1(-dt)).log()))


class DeltaMixer(nn.Module):
    """The gated delta rule with RMS-normed queries and keys and two gates, forget and update, per head."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.head_width = c.heads, c.width // c.heads
        self.input = nn.Linear(c.width, 3 * c.width, bias=False)  # queries, keys, values
        self.input.weight.parts = [c.width] * 3
        self.query_norm, self.key_norm = RMSNorm(self.head_width), RMSNorm(self.head_width)
        self.gates = nn.Linear(c.width, 2 * c.heads)
        self.gates.weight.parts = [c.heads] * 2
        self.out = nn.Linear(c.width, c.width, bias=False)

    def empty_state(self, batch, steps):
        shape = batch, self.heads, self.head_width, self.head_width
        return [self.gates.weight.new_zeros(shape, dtype=torch.float32)]

    def forward(self, x, position, rope, state=None):
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in self.input(x).chunk(3, -1))
        k = self.key_norm(k) * self.head_width ** -0.5  # longer than 1 the update would diverge
        forget, update = self.gates(x).float().chunk(2, -1)
        S = None if state is None else state[0]
        o = delta_rule(self.query_norm(q), k, v, F.logsigmoid(forget), update.sigmoid(), S, normalise=False)
        return self.out(o.flatten(2))


def decayed_attention(q, k, v, g, state=None, C=64):
    """Mamba-2's recurrence, S ← exp(g_t) S + k_t v_tᵀ, o_t = Sᵀq_t, in chunks of C steps (Dao & Gu, 2024, section 6).

    q, k (B, T, K), the same for all heads; v (B, T, H, V); g (B, T, H) ≤ 0; state (B, H, K, V), zeros unless given, is
    updated. Returns (B, T, H, V), all in float32.
    """
    T = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        if T % C and T > 1:
            q, k, v, g = (F.pad(x, (0, 0) * (x.ndim - 2) + (0, -T % C)) for x in (q, k, v, g))
        q, k, v, g = (x.float().unflatten(1, (-1, min(C, x.shape[1]))) for x in (q, k, v, g))  # (B, N, C, …)
        v, g = v.transpose(2, 3), g.transpose(2, 3).cumsum(-1)  # (B, N, H, C, V), (B, N, H, C)
        past = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril()
        decay = (g[..., None] - g[..., None, :]).masked_fill(~past, -torch.inf).exp()  # (B, N, H, C, C)
        o = ((q @ k.mT)[:, :, None] * decay) @ v
        added = k.mT[:, :, None] @ ((g[..., -1:] - g).exp()[..., None] * v)  # (B, N, H, K, V)
        S, starts = torch.zeros_like(added[:, 0]) if state is None else state, []
        for new, kept in zip(added.unbind(1), g[..., -1, None, None].exp().unbind(1)):
            starts.append(S)
            S = kept * S + new
        if state is not None:
            starts[0] = state.clone()
            state.copy_(S)
        o = o + (q[:, :, None] @ torch.stack(starts, 1)) * g.exp()[..., None]
        return o.transpose(2, 3).flatten(1, 2)[:, :T]


class Mamba2(nn.Module):
    """Mamba-2's block (Dao & Gu, 2024) with one group: twice as wide inside, heads of 64, states of 128."""

    K = 128

    def __init__(self, c):
        super().__init__()
        self.inner, self.heads = 2 * c.width, c.width // 32
        # gate; values, keys, queries; step size of each head
        self.input = SplitLinear(c.width, 2 * self.inner + 2 * self.K + self.heads, bias=False)
        self.input.weight.parts = [self.inner, self.inner, self.K, self.K, self.heads]
        self.conv = nn.Parameter(torch.empty(4, self.inner + 2 * self.K).uniform_(-0.5, 0.5))
        self.conv_bias = nn.Parameter(torch.zeros(self.inner + 2 * self.K))
        self.A_log, self.dt_bias = decay_parameters(self.heads)
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(self.inner)
        self.out = nn.Linear(self.inner, c.width, bias=False)

    def empty_state(self, batch, steps):
        return [self.out.weight.new_zeros(batch, 3, self.conv.shape[1]),
                self.conv.new_zeros(batch, self.heads, self.K, 64, dtype=torch.float32)]

    def forward(self, x, position, rope, state=None):
        past, S = state or (None, None)
        gate, vkq, dt = self.input(x, (self.inner, self.conv.shape[1], self.heads))
        vkq = causal_conv(vkq, self.conv, past, bias=self.conv_bias)
        v, k, q = vkq.split((self.inner, self.K, self.K), -1)
        v, dt = v.unflatten(-1, (self.heads, 64)), F.softplus(dt.float() + self.dt_bias)  # (B, T, H, 64), (B, T, H)
        o = decayed_attention(q, k, v * dt[..., None], -self.A_log.float().exp() * dt, S)
        o = (o + self.skip[:, None] * v).to(v.dtype)
        return self.out(self.norm(o.flatten(2) * F.silu(gate)))


MIXERS = {"A": CausalAttention, "G": GatedDeltaNet, "D": DeltaMixer, "M": Mamba2}


class CodecBlock(nn.Module):
    def __init__(self, c, letter, reads_text):
        super().__init__()
        self.norm = RMSNorm(c.width)
        self.mixer = MIXERS[letter](c)
        self.cross_norm = RMSNorm(c.width) if reads_text else None
        self.cross_attention = Attention(c.width, c.heads, c.text_width, positional=True) if reads_text else None
        self.ffn_norm = RMSNorm(c.width)
        self.ffn = SwiGLU(c.width, c.ffn_width)
        self.dropout = nn.Dropout(c.dropout) if c.dropout else nn.Identity()

    def forward(self, x, look, rope, state, text, cross_rope, text_mask):
        x = x + self.dropout(self.mixer(self.norm(x), look, rope, state))
        if self.cross_attention is not None:
            x = x + self.dropout(self.cross_attention.look(self.cross_norm(x), cross_rope, *text, text_mask))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class CodecLM(nn.Module):
    """A language model over the token streams of a neural audio codec, all books of a delayed step at once.

    Symbols of each book: the codes, then PAD, BOS and EOS.
    """

    def __init__(self, c: CodecConfig):
        super().__init__()
        self.c = c
        self.checkpointing = False  # recompute the blocks in the backward pass
        self.symbols = c.codebook_size + 3
        self.pad, self.bos, self.eos = range(c.codebook_size, self.symbols)
        self.embedding = nn.Embedding(c.codebooks * self.symbols, c.width)  # a table a book, one after the other
        self.blocks = nn.ModuleList(CodecBlock(c, letter, bool(c.cross_every) and (i + 1) % c.cross_every == 0)
                                    for i, letter in enumerate(c.layout))
        self.norm = RMSNorm(c.width)
        self.heads = nn.Linear(c.width, c.codebooks * self.symbols, bias=False)
        if c.cross_every:
            self.encode_text = TextEncoder(nn.Embedding(259, c.text_width), c.text_width, c.text_layers)
        nn.init.normal_(self.embedding.weight, std=c.codebooks ** -0.5)  # so that their sum has the size of 1
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, DeltaMixer):
                nn.init.constant_(module.gates.bias[:c.heads], 4.0)  # a state lasts some fifty steps
        nn.init.zeros_(self.heads.weight)  # at first all symbols are equally likely
        if c.cross_every:
            nn.init.zeros_(self.encode_text.duration[-1].weight)  # and all bytes equally long
            nn.init.constant_(self.encode_text.duration[-1].bias, math.log(0.07))  # seconds a byte
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("out.weight", "down.weight")):  # as in GPT-2: the sum over all blocks has the size of 1
                nn.init.normal_(weight, std=(2 * c.layers * weight.shape[1]) ** -0.5)

    def read_text(self, text, length, seconds=None):
        """text (B, L) byte ids, length (B,) -> (what the blocks need of it, log_seconds (B,) as predicted).

        seconds (B,): how long the clip is, where that is known; else the prediction sets the clock's pace.
        """
        (states, mask, clock), log_seconds = self.encode_text(text, length)
        seconds = log_seconds.detach().exp() if seconds is None else seconds
        pace = length / (seconds * self.c.frame_rate)  # bytes a frame
        rope = rotary(clock, self.c.width // self.c.heads, 100.0)
        kv = [b.cross_attention and b.cross_attention.keys_values(states, rope) for b in self.blocks]
        return (kv, mask, pace), log_seconds

    def empty_cache(self, batch, steps):
        """What `hidden` keeps of the steps it has seen, for attention of the last `steps`: (their number, steps,
        states). The number and the states are updated in place."""
        device = self.heads.weight.device
        seen, step = torch.zeros((), dtype=torch.long, device=device), torch.arange(steps, device=device)
        return seen, step, [block.mixer.empty_state(batch, steps) for block in self.blocks]

    def hidden(self, tokens, text=None, cache=None):
        """Delayed steps (B, S, Q) -> states (B, S, D), of which `logits` makes the logits of the steps after them.

        text: from `read_text`. cache: from `empty_cache`, moved on by S steps. A ring that is full takes one step at a
        time.
        """
        c, (_, S, Q) = self.c, tokens.shape
        x = self.embedding(tokens + torch.arange(Q, device=tokens.device) * self.symbols).sum(2)  # (B, S, D)
        position, look, states = torch.arange(S, device=x.device), None, [None] * len(self.blocks)
        if cache is not None:
            seen, step, states = cache
            position = position + seen
            look = position % len(step), torch.where(step <= position[:, None], 0.0, -torch.inf)
            seen += S
        rope = rotary(position[None], c.width // c.heads, 10000.0)
        kv, mask, cross_rope = [None] * len(self.blocks), None, None
        if text is not None:
            kv, mask, pace = text
            cross_rope = rotary((position + 0.5) * pace[:, None], c.width // c.heads, 100.0)
        for block, state, pair in zip(self.blocks, states, kv):
            args = (x, look, rope, state, pair, cross_rope, mask)
            x = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=c.dropout > 0) if (
                self.checkpointing and self.training) else block(*args)
        return self.norm(x)

    def forward(self, tokens, text=None, length=None, seconds=None):
        """What training takes, of delayed steps (B, S, Q), and of what `read_text` takes where the model has text:
        (states (B, S, D), of which `heads` makes the logits of the next step; log_seconds (B,) or None)."""
        read, log_seconds = (None, None) if text is None else self.read_text(text, length, seconds)
        return self.hidden(tokens, read), log_seconds

    def logits(self, x):
        """States (…, D) -> logits (…, Q, symbols)."""
        return self.heads(x).unflatten(-1, (self.c.codebooks, self.symbols))


# ------------------------------------------------------------------------------------------------------------
# LLM TTS

PAD, BOS, EOS = 0, 2, 3  # Echolancer's ids: five such, then characters, then codes, then 32 more


@dataclass
class LLMConfig:
    system: Literal["llm"] = "llm"
    # tokens; a data set must be of the same
    codec: str = "neucodec"
    sample_rate: PositiveInt = 24000  # Hz
    frame_rate: Positive = 50.0  # codes a second
    codebook_size: PositiveInt = 65536
    context: PositiveInt = 1024  # tokens of a row of training, and of a sentence with its audio
    characters: str = SYMBOLS  # those that it reads, each once; auto for those of the data set. These are Echolancer's
    # decoder
    width: PositiveInt = 1024
    layers: Layers = 10
    heads: PositiveInt = 16
    kv_heads: PositiveInt = 4
    ffn_width: PositiveInt = 4096
    activation: Literal["relu2", "gelu"] = "relu2"
    alibi: Literal["layered", "standard"] = "layered"  # slopes that fall from block to block, or the same in each
    pattern: str = ""  # a letter a block: A attention, G gated DeltaNet; all attention unless given
    macaron: bool = False  # half of the feed-forward layer before the mixer and half after it, each at half its weight
    negative_eigenvalues: bool = True  # of G: corrections of up to 2, which can turn a state around
    dropout: Fraction = 0.0  # within the feed-forward layers
    speaker_width: NonNegativeInt = 0  # of the embedding of a voice, which every norm then reads; 0 for none
    # LoRA: low-rank corrections of some matrices are all that is trained
    lora_rank: NonNegativeInt = 0  # 0 for none
    lora_alpha: FiniteFloat = 32.0
    lora_dropout: Fraction = 0.1
    lora_matrices: str = "query key value out up down"  # of the blocks; G has input and out

    @property
    def layout(self):
        """A letter for each block."""
        return self.pattern or "A" * self.layers

    @property
    def first_code(self):
        """The token of the first code, behind those of the characters."""
        if self.characters == "auto":
            raise UserError("characters: auto takes those of a data set, and none has been opened: the config.yaml of "
                            "a run has them")
        return FIRST + len(self.characters)

    @property
    def audio_bos(self):
        return self.first_code + self.codebook_size + 1

    @property
    def audio_eos(self):
        return self.audio_bos + 1

    def __post_init__(self):
        check_blocks(self, {"attention": "A", "gdn": "G"})
        if not self.characters or len({*self.characters}) < len(self.characters):
            raise UserError(f"characters {self.characters!r} should name some, and none of them twice")


def sentence(c, characters, codes=None):
    """The tokens (n,) int64 of a sentence: BOS, characters, EOS, audio BOS, and where they are known its codes and
    audio EOS. characters (m,), codes (k,): whole numbers, as shards hold them."""
    n = len(characters) + 3
    tokens = np.empty(n if codes is None else n + len(codes) + 1, np.int64)
    tokens[0], tokens[1:n - 2], tokens[n - 2], tokens[n - 1] = BOS, characters, EOS, c.audio_bos
    if codes is not None:
        tokens[n:-1], tokens[-1] = codes, c.audio_eos
        tokens[n:-1] += c.first_code
    return torch.from_numpy(tokens)


def packed_batch(rows, steps):
    """Rows, each a list of sentences one after the other, as tensors (B, steps) int64: tokens; targets, the next token
    of the same sentence, -100 where there is none; document, which sentence of its row a token is of, -1 for none.

    A sentence takes one step less than it has tokens, since its last is only predicted. What is too long is cut.
    """
    tokens, targets, document = (np.full((len(rows), steps), fill) for fill in (PAD, -100, -1))
    for row, inputs, nexts, number in zip(rows, tokens, targets, document):
        at = 0
        for d, one in enumerate(one.numpy() for one in row):
            end = min(at + len(one) - 1, steps)
            inputs[at:end], nexts[at:end], number[at:end] = one[:end - at], one[1:end - at + 1], d
            at = end
    return tuple(map(torch.from_numpy, (tokens, targets, document)))


def alibi_slopes(c, layer):
    """What a step of distance costs each head of a block, (heads,). Press et al. (2022): a geometric sequence from
    2^(-8 / heads) on, with every other one of the next finer sequence where heads are no power of two. "layered" is
    Echolancer's: 1/2, 1/4, … in the first block, and ever smaller, so that the last ones see everything alike."""
    if c.alibi == "layered":
        return 2.0 ** -(torch.arange(1, c.heads + 1) + layer * c.heads // max(1, (c.layers - 1) * c.heads // 32))
    whole = 2 ** int(math.log2(c.heads))
    finer = (2 * torch.arange(c.heads - whole) + 1) * 4 / whole
    return 2.0 ** -torch.cat((torch.arange(1, whole + 1) * 8 / whole, finer))


class ALiBiAttention(nn.Module):
    """Grouped-query attention with linear biases; its state are the keys and values of all steps, (B, KV heads, S,
    head_width) each."""

    def __init__(self, c, layer):
        super().__init__()
        self.head_width, kv_width = c.width // c.heads, c.width // c.heads * c.kv_heads
        self.query, self.out = (nn.Linear(c.width, c.width, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(c.width, kv_width, bias=False) for _ in range(2))
        self.kv_heads = c.kv_heads
        self.register_buffer("slopes", alibi_slopes(c, layer), persistent=False)

    def empty_state(self, batch, steps):
        return [self.out.weight.new_zeros(batch, self.kv_heads, steps, self.head_width) for _ in range(2)]

    def forward(self, x, position, look, state=None, starts=None):
        """look: FlexAttention's block mask and options, or the distances (B or 1, 1, T, S) from queries to keys, -inf
        where a query may not look."""
        q, k, v = (matrix(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
                   for matrix in (self.query, self.key, self.value))
        if state is not None:
            for kept, new in zip(state, (k, v)):
                kept.index_copy_(2, position, new.to(kept.dtype))
            k, v = (kept.to(q.dtype) for kept in state)
        if isinstance(look, torch.Tensor):
            bias = (self.slopes[:, None, None] * look).to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        else:
            mask, options = look
            y = flex_attention()(q, k, v, partial(alibi_score, self.slopes), mask, enable_gqa=True,
                                 kernel_options=options)
        return self.out(y.transpose(1, 2).flatten(2))


def alibi_score(slopes, score, b, h, query, key):
    return score + slopes[h] * (key - query)


# FlexAttention's tiles, as torch.compile's own search finds them best on an H100. Its default takes twice as long.
# Not ROWS_GUARANTEED_SAFE: a tile may hold nothing that a query sees, and then all would be NaN.
TILES = dict(fwd_BLOCK_M=128, fwd_BLOCK_N=64, fwd_num_warps=4, fwd_num_stages=3,
            bwd_BLOCK_M1=64, bwd_BLOCK_N1=64, bwd_BLOCK_M2=64, bwd_BLOCK_N2=64, bwd_num_warps=4, bwd_num_stages=3)


def flex_options(x, head_width):
    """Never the kernel for few queries, which would take these tiles for its own and write beside what is its."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    fits = dtype.itemsize == 2 and head_width <= 64 and x.is_cuda and not torch.version.hip
    return dict(FORCE_USE_FLEX_ATTENTION=True) | (TILES if fits and torch.cuda.get_device_capability()[0] >= 8 else {})


def takes_flex(tokens):
    return tokens.is_cuda


@cache
def flex_attention():
    """FlexAttention (Dong et al., 2024), compiled: without that it would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_mask(document, B, T, device):
    """FlexAttention's block mask: no query looks ahead, nor, where document (B, T) is given, at another sentence."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b, h, query, key):
        return (key <= query) & (True if document is None else document[b, query] == document[b, key])

    return create_block_mask(sees, None if document is None else B, None, T, T, device, _compile=device.type == "cuda")


class AdaLayerNorm(nn.LayerNorm):
    """LayerNorm, then scaled and shifted as a voice says (as in AdaSpeech: Chen et al., 2021), at first not at all."""

    def __init__(self, width, speaker_width):
        super().__init__(width)
        self.to_gamma_beta = nn.Linear(speaker_width, 2 * width) if speaker_width else None

    def read(self, speaker):
        return (1.5 * self.to_gamma_beta(speaker)[:, None]).chunk(2, -1)

    def forward(self, x, voice=None):
        with torch.autocast(x.device.type, enabled=False):  # it would hand on float32, to be cast for each matrix
            x = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return x if voice is None else x * (1 + voice[0]) + voice[1]


class FeedForward(nn.Module):
    """ReLU², (So et al., 2021), or GELU between two matrices."""

    def __init__(self, c, width):
        super().__init__()
        self.up, self.down = nn.Linear(c.width, width, bias=False), nn.Linear(width, c.width, bias=False)
        self.relu2, self.dropout = c.activation == "relu2", nn.Dropout(c.dropout)

    def forward(self, x):
        x = F.relu(self.up(x)) if self.relu2 else F.gelu(self.up(x))
        return self.down(self.dropout(x * x if self.relu2 else x))  # autocast takes squares to float32


class LLMBlock(nn.Module):
    """Mixer and feed-forward layer; with `macaron` the latter in two halves around the mixer (Lu et al., 2019)."""

    def __init__(self, c, layer, letter):
        super().__init__()
        ffn_width = c.ffn_width // (1 + c.macaron)
        self.first_norm = AdaLayerNorm(c.width, c.speaker_width) if c.macaron else None
        self.first_ffn = FeedForward(c, ffn_width) if c.macaron else None
        self.norm = AdaLayerNorm(c.width, c.speaker_width)
        self.mixer = ALiBiAttention(c, layer) if letter == "A" else GatedDeltaNet(c)
        self.ffn_norm, self.ffn = AdaLayerNorm(c.width, c.speaker_width), FeedForward(c, ffn_width)

    @property
    def norms(self):
        return [norm for norm in (self.first_norm, self.norm, self.ffn_norm) if norm is not None]

    def forward(self, x, position, look, state, starts, voice):
        *first, own, ffn = voice or [None] * 3
        if self.first_ffn is not None:
            x = x + 0.5 * self.first_ffn(self.first_norm(x, first[0]))
        x = x + self.mixer(self.norm(x, own), position, look, state, starts)
        y = self.ffn(self.ffn_norm(x, ffn))
        return x + (y if self.first_ffn is None else 0.5 * y)


class LoRALinear(nn.Linear):
    """A matrix that stays as it is, and a low-rank one beside it that learns, 0 at first (Hu et al., 2022)."""

    def __init__(self, linear, c):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, bound = linear.weight, linear.in_features ** -0.5
        self.lora_A = nn.Parameter(torch.empty(c.lora_rank, linear.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, c.lora_rank))
        self.dropout, self.scale = nn.Dropout(c.lora_dropout), c.lora_alpha / c.lora_rank
        self.kind = type(linear)

    def forward(self, x, widths=None):
        x = super().forward(x) + self.scale * (self.dropout(x) @ self.lora_A.T @ self.lora_B.T)
        return x if widths is None else x.split(widths, -1)


class LLM(nn.Module):
    """A language model over a sentence's characters and then its codes. The embedding is the output head too."""

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.c = c
        self.checkpointing = False  # recompute the blocks in the backward pass
        self.embedding = nn.Embedding(c.first_code + c.codebook_size + 32, c.width)
        self.blocks = nn.ModuleList(LLMBlock(c, i, letter) for i, letter in enumerate(c.layout))
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear) and "gamma" not in name:
                last = name.endswith(("out", "down"))  # as in GPT-2: the sum over all blocks has the size of 1
                nn.init.normal_(module.weight, std=((2 * c.layers if last else 1) * module.in_features) ** -0.5)
        if c.speaker_width:
            self.register_buffer("speaker_mean", torch.zeros(c.speaker_width))  # the trainer sets those of its data
            self.register_buffer("speaker_std", torch.ones(c.speaker_width))
            self.speaker_norm = nn.LayerNorm(c.speaker_width)
            for norm in (norm for block in self.blocks for norm in block.norms):
                nn.init.zeros_(norm.to_gamma_beta.weight)
                nn.init.zeros_(norm.to_gamma_beta.bias)
        if c.lora_rank:
            self.requires_grad_(False)
            matrices = [(module, name, child) for module in self.blocks.modules()
                        for name, child in module.named_children()
                        if isinstance(child, nn.Linear) and name != "to_gamma_beta"]
            if unknown := set(c.lora_matrices.split()) - {name for _, name, _ in matrices}:
                raise UserError(f"lora_matrices names {min(unknown)!r}; these blocks have "
                                + ", ".join(sorted({name for _, name, _ in matrices})))
            for module, name, child in matrices:
                if name in c.lora_matrices.split():
                    setattr(module, name, LoRALinear(child, c))

    @torch.no_grad()
    def merge(self):
        """Add the low-rank corrections to their matrices, in place, for good. Returns the model."""
        for module in list(self.blocks.modules()):
            for name, child in module.named_children():
                if isinstance(child, LoRALinear):
                    merged = child.kind(child.in_features, child.out_features, bias=False, device="meta")
                    merged.weight = nn.Parameter(child.weight + child.scale * child.lora_B @ child.lora_A)
                    setattr(module, name, merged)
        self.c = replace(self.c, lora_rank=0)
        return self

    def read_speaker(self, speaker):
        """Embeddings of voices (B, speaker_width) -> for each block and each of its norms (γ, β), (B, 1, D) each."""
        speaker = F.normalize((speaker - self.speaker_mean) / self.speaker_std, dim=-1)
        speaker = F.normalize(self.speaker_norm(speaker), dim=-1)
        return [[norm.read(speaker) for norm in block.norms] for block in self.blocks]

    def empty_cache(self, first, steps):
        """What `hidden` keeps of the steps it has seen, `steps` at most: (their number, first, steps, states). first
        (B,): how many steps of padding each row begins with, so that all end together."""
        seen, step = torch.zeros((), dtype=torch.long, device=first.device), torch.arange(steps, device=first.device)
        return seen, first[:, None], step, [block.mixer.empty_state(len(first), steps) for block in self.blocks]

    def hidden(self, tokens, document=None, voice=None, cache=None):
        """Tokens (B, T) -> states (B, T, D), of which the embedding makes logits.

        document (B, T): which sentence of a packed row a token is of; it sees no other. voice: from `read_speaker`.
        cache: from `empty_cache`, moved on by T steps.
        """
        B, T = tokens.shape
        position, starts, states = torch.arange(T, device=tokens.device), None, [None] * len(self.blocks)
        if cache is not None:
            seen, first, key, states = cache
            position = position + seen
            seen += T
            sees = (key <= position[:, None]) & (key >= first[:, None]) | (key == position[:, None])  # (B, T, S)
            starts = position == first if T > 1 else None  # (B, T)
        else:
            key, sees = position, position <= position[:, None]
            if document is not None:
                starts = F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
                sees = sees & (document[:, :, None] == document[:, None])
        x = self.embedding(tokens)
        if cache is None and takes_flex(tokens):
            look = flex_mask(document, B, T, tokens.device), flex_options(x, self.c.width // self.c.heads)
        else:
            look = (key - position[:, None]).float().masked_fill(~sees, -torch.inf).view(-1, 1, T, len(key))
        for block, state, says in zip(self.blocks, states, voice or [None] * len(self.blocks)):
            args = (x, position, look, state, starts, says)
            x = checkpoint(block, *args, use_reentrant=False) if self.checkpointing and self.training else block(*args)
        return x

    def forward(self, tokens, document=None, speaker=None):
        """What training takes: states (B, T, D) of tokens (B, T), of which `embedding.weight` makes the logits of the
        next ones. speaker (B, speaker_width) or None; document: see `hidden`."""
        return self.hidden(tokens, document, None if speaker is None else self.read_speaker(speaker))

    def audio_logits(self, x):
        """States (B, D) -> logits (B, codebook_size + 1) of the codes and, last, of the end of the audio."""
        first = self.c.first_code
        end = self.c.audio_eos - first
        rows = -(-(end + 1) // 8) * 8  # a GPU takes three times as long for a number that is no multiple of 8
        logits = F.linear(x, self.embedding.weight[first:first + rows]).float()
        return torch.cat((logits[:, :self.c.codebook_size], logits[:, end:end + 1]), 1)
