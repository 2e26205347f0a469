"""A step of the LLM TTS on a GPU: one token of each sentence through all blocks, by five kernels a block.

A step alone is a matter of reading the weights once and of few launches. So a block is (1) LayerNorm, queries, keys and
values, (2) attention over the cache, split over keys, (3) its output matrix, (4) LayerNorm, up matrix and activation,
(5) the down matrix; (3) and (5) add to the residual stream in place. It is `LLM.hidden` for one token, to rounding.

Shapes: B rows, D width, H heads of width W, G of them to a key head, S steps of the cache, (N, K) a matrix.
"""
from __future__ import annotations  # the kernels' are Triton's, which may be missing

from functools import partial

import torch

from model import ALiBiAttention, LoRALinear

try:
    import triton
    import triton.language as tl
    jit = partial(triton.jit, do_not_specialize=("B", "S"))  # a kernel serves any number of rows and steps
except ImportError:  # there is none for this platform
    triton, jit = None, lambda kernel: kernel

MOST_ROWS, WIDEST = 64, 2048  # rows of a step, and the width of a row that is normed at once
COLUMNS = dict(queries=4, out=4, up=8, down=4)  # of a program's product, for one row
TILES = {  # for more, padded: columns of a program, in one head; slices of K, a warp each; K of a slice; stages
    (16, "queries"): (8, 8, 64, 3), (16, "out"): (8, 8, 64, 4), (16, "up"): (16, 4, 64, 4), (16, "down"): (8, 8, 64, 4),
    (32, "queries"): (8, 4, 64, 4), (32, "out"): (8, 8, 64, 3), (32, "up"): (32, 4, 64, 3), (32, "down"): (8, 8, 64, 3),
    (64, "queries"): (8, 4, 32, 4), (64, "out"): (8, 8, 32, 3), (64, "up"): (32, 4, 32, 3), (64, "down"): (8, 4, 64, 3),
}
PROGRAMS, MOST_SPLITS = 512, 32  # of attention: how many there should be, and to how many the keys of a row may go


# ------------------------------------------------------------------------------------------------------------
# Products

@jit
def _one_row(x, scale, shift, weight, n, K: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
             AHEAD: tl.constexpr):
    """As `_product` for one row, without tensor cores. The first weights are asked for before x is there."""
    total = tl.zeros([n.shape[0], BLOCK], tl.float32)
    for first in tl.static_range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        w = tl.load(weight + n[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        if AHEAD and first == 0:
            tl.extra.cuda.gdc_wait()
        y = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        if scale is not None:  # BLOCK covers the row
            y = tl.where(k < K, y - tl.sum(y, 0) / K, 0.0)
            y *= tl.rsqrt(tl.sum(y * y, 0) / K + EPS)
            y *= tl.load(scale + k, mask=k < K, other=0.0).to(tl.float32)
            y += tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
            y = y.to(w.dtype).to(tl.float32)
        total += w.to(tl.float32) * y[None, :]
    return tl.sum(total, 1)[None, :]


@jit
def _many_rows(x, scale, shift, weight, n, B, K: tl.constexpr, EPS: tl.constexpr, VOICED: tl.constexpr,
               ROWS: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """As `_product` on tensor cores. Each warp takes its slices of K, or one would wait for the sums of another."""
    part, row = tl.arange(0, SLICES)[:, None, None] * BLOCK, tl.arange(0, ROWS)[None, :, None]
    across, down = part + tl.arange(0, BLOCK)[None, None, :], part + tl.arange(0, BLOCK)[None, :, None]
    if scale is not None:
        total, squares = tl.zeros([SLICES, ROWS], tl.float32), tl.zeros([SLICES, ROWS], tl.float32)
        for first in tl.range(0, K, SLICES * BLOCK, num_stages=STAGES):
            k = first + across
            y = tl.load(x + row * K + k, mask=(row < B) & (k < K), other=0.0).to(tl.float32)
            total += tl.sum(y, 2)
            squares += tl.sum(y * y, 2)
        mean = tl.sum(total, 0) / K
        norm = tl.rsqrt(tl.maximum(tl.sum(squares, 0) / K - mean * mean, 0.0) + EPS)[None, :, None]
        mean = mean[None, :, None]
    y = tl.zeros([SLICES, ROWS, n.shape[0]], tl.float32)
    for first in tl.range(0, K, SLICES * BLOCK, num_stages=STAGES):
        k = first + across
        z = tl.load(x + row * K + k, mask=(row < B) & (k < K), other=0.0)
        w = tl.load(weight + n[None, None, :] * K + (first + down), mask=first + down < K, other=0.0)
        if scale is not None:
            at, there = (row * K + k, (row < B) & (k < K)) if VOICED else (k, k < K)
            a = tl.load(scale + at, mask=there, other=0.0).to(tl.float32)
            b = tl.load(shift + at, mask=there, other=0.0).to(tl.float32)
            z = ((z.to(tl.float32) - mean) * norm * a + b).to(w.dtype)
        y = tl.dot(z, w, y, input_precision="ieee")
    return tl.sum(y, 0)


@jit
def _product(x, scale, shift, weight, n, B, K: tl.constexpr, EPS: tl.constexpr, VOICED: tl.constexpr,
             ROWS: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
             AHEAD: tl.constexpr):
    """x (B, K), after LayerNorm where scale and shift are given, (K,) each or VOICED (B, K), times rows n of weight
    (N, K). Returns (ROWS, n) rounded to the weight's type. AHEAD, for one row: the kernel may begin while the one
    before runs (programmatic dependent launch), asks for weights, and waits for its end before it reads more."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    if ROWS == 1:
        y = _one_row(x, scale, shift, weight, n, K, EPS, BLOCK, AHEAD)
    else:
        y = _many_rows(x, scale, shift, weight, n, B, K, EPS, VOICED, ROWS, SLICES, BLOCK, STAGES)
    return y.to(weight.dtype.element_ty)


@jit
def queries_kernel(x, scale, shift, query, key, value, q, keys, values, seen, B, S, D: tl.constexpr, E: tl.constexpr,
                   W: tl.constexpr, EPS: tl.constexpr, VOICED: tl.constexpr, ROWS: tl.constexpr,
                   COLUMNS: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
                   AHEAD: tl.constexpr):
    """LayerNorm of x (B, D), then queries (B, D), and keys and values to place `seen` of the cache (B, E / W, S, W)."""
    at = tl.program_id(0) * COLUMNS
    row, n = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)
    weight = query if at < D else (key if at < D + E else value)
    c = at if at < D else (at - D) % E  # of that matrix the first column
    y = _product(x, scale, shift, weight, c + n, B, D, EPS, VOICED, ROWS, SLICES, BLOCK, STAGES, AHEAD)
    to = q if at < D else (keys if at < D + E else values)
    to += c.to(tl.int64) if at < D else (c // W * S + tl.load(seen)) * W + c % W
    tl.store(to + row.to(tl.int64) * (D if at < D else E * S) + n[None, :], y, mask=(row < B) & (n >= 0)[None, :])


@jit
def product_kernel(x, scale, shift, weight, y, B, N: tl.constexpr, K: tl.constexpr, EPS: tl.constexpr,
                   VOICED: tl.constexpr, AFTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   SLICES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr):
    """The product of x (B, K), maybe after LayerNorm, with weight (N, K): to y (B, N) after "relu2" or "gelu", or to
    "add" to it."""
    row, n = tl.arange(0, ROWS)[:, None], tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    z = _product(x, scale, shift, weight, n, B, K, EPS, VOICED, ROWS, SLICES, BLOCK, STAGES, AHEAD)
    z, y, mask = z.to(tl.float32), y + row * N + n[None, :], (row < B) & (n >= 0)[None, :]
    if AFTER == "add":
        z += tl.load(y, mask=mask, other=0.0).to(tl.float32)
    elif AFTER == "relu2":
        z = tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
    else:
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    tl.store(y, z.to(y.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------
# Attention

@jit
def attention_kernel(q, keys, values, slopes, seen, first, parts, tops, sums, arrived, y, S, KV: tl.constexpr,
                     G: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
                     SPLITS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr):
    """The query at place `seen` of G heads (B, KV · G · W) beside keys and values (B, KV, S, W) from first[b] on.

    A program takes some blocks of keys. The last one of a row and key head to be done, by the count in `arrived`, which
    it sets back to 0, adds up the parts in their order: parts (B · KV, SPLITS, GROUP, W), and of each query the highest
    score and the sum of exponentials, (B · KV, SPLITS, GROUP). GROUP: G, to a power of two. Scores are to base 2."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pair, split = tl.program_id(0), tl.program_id(1)
    position = tl.load(seen).to(tl.int32)
    start = tl.minimum(tl.load(first + pair // KV).to(tl.int32), position)  # what is only padding sees itself
    blocks = tl.cdiv(position + 1 - start, BLOCK)
    each = tl.cdiv(blocks, SPLITS)
    used = tl.cdiv(blocks, each)
    if split < used:
        g, w, i = tl.arange(0, 16 if GROUP < 16 else GROUP), tl.arange(0, W), tl.arange(0, BLOCK)
        query = tl.load(q + (pair * G + g)[:, None] * W + w[None, :], mask=(g < G)[:, None], other=0.0)
        slope = tl.load(slopes + pair % KV * G + g, mask=g < G, other=0.0).to(tl.float32) * 1.4426950408889634
        keys, values = keys + pair.to(tl.int64) * S * W, values + pair.to(tl.int64) * S * W
        o = tl.zeros([g.shape[0], W], tl.float32)
        top, total = tl.full([g.shape[0]], float("-inf"), tl.float32), tl.zeros([g.shape[0]], tl.float32)
        begin, end = start + split * each * BLOCK, tl.minimum(start + (split + 1) * each * BLOCK, position + 1)
        for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
            s = at + i
            k = tl.load(keys + s[None, :] * W + w[:, None], mask=(s < end)[None, :], other=0.0)
            v = tl.load(values + s[:, None] * W + w[None, :], mask=(s < end)[:, None], other=0.0)
            score = tl.dot(query, k, input_precision="ieee") * (W ** -0.5 * 1.4426950408889634)
            score += slope[:, None] * (s - position).to(tl.float32)[None, :]
            score = tl.where((s < end)[None, :], score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            p, kept = tl.exp2(score - higher[:, None]), tl.exp2(top - higher)
            total, top = total * kept + tl.sum(p, 1), higher
            o = tl.dot(p.to(v.dtype), v, o * kept[:, None], input_precision="ieee")
        mine = (pair * SPLITS + split) * GROUP + g
        tl.store(parts + mine[:, None] * W + w[None, :], o, mask=(g < G)[:, None])
        tl.store(tops + mine, top, mask=g < G)
        tl.store(sums + mine, total, mask=g < G)
        tl.debug_barrier()  # all of it is written before it is counted
        if tl.atomic_add(arrived + pair, 1) == used - 1:
            part, h = tl.arange(0, SPLITS)[:, None], tl.arange(0, GROUP)
            each_one, there = (pair * SPLITS + part) * GROUP + h[None, :], (part < used) & (h < G)[None, :]
            tops_of = tl.load(tops + each_one, mask=there, other=float("-inf"), cache_modifier=".cg")
            sums_of = tl.load(sums + each_one, mask=there, other=0.0, cache_modifier=".cg")
            weight = tl.exp2(tops_of - tl.where(h < G, tl.max(tops_of, 0), 0.0)[None, :])
            weight /= tl.where(h < G, tl.sum(weight * sums_of, 0), 1.0)[None, :]
            o_of = tl.load(parts + each_one[:, :, None] * W + w[None, None, :], mask=there[:, :, None], other=0.0,
                           cache_modifier=".cg")
            result = tl.sum(o_of * weight[:, :, None], 0).to(y.dtype.element_ty)
            tl.store(y + (pair * G + h)[:, None] * W + w[None, :], result, mask=(h < G)[:, None])
            tl.store(arrived + pair, 0)


# ------------------------------------------------------------------------------------------------------------
# Launching

def supports(model, rows):
    """Whether `make_step` can do a step of an LLM for so many rows."""
    c, dtype, device = model.c, model.embedding.weight.dtype, model.embedding.weight.device
    width, modules = c.width // c.heads, list(model.blocks.modules())
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    chip = device.type != "cuda" or not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)
    return (triton is not None and chip and rows <= MOST_ROWS and not model.training and autocast in (False, dtype)
            and all(isinstance(block.mixer, ALiBiAttention) for block in model.blocks) and not c.macaron
            and not any(isinstance(module, LoRALinear) for module in modules)
            and all(p.dtype == dtype for p in model.blocks.parameters())
            and width >= 16 and width & (width - 1) == 0 and c.width <= WIDEST and c.ffn_width % 16 == 0)


def product_options(rows, name, weight):
    """How a product of padded rows (rows, K) with a matrix (N, K) is divided, and its number of warps."""
    if rows == 1:
        columns, slices, stages = COLUMNS[name], 4, 1
        block = min(WIDEST, triton.next_power_of_2(weight.shape[1]))
    else:
        columns, slices, block, stages = TILES[rows, name]
        block = block * 2 // weight.itemsize
    while any(n % columns for n in weight.shape):
        columns //= 2
    return dict(ROWS=rows, COLUMNS=columns, SLICES=slices, BLOCK=block, STAGES=stages, num_warps=slices)


def attention_options(rows, kv_heads, group, steps):
    """How attention of so many rows over a cache of so many steps is divided."""
    block = 32 if rows * kv_heads < 64 else 64
    splits = min(PROGRAMS // (rows * kv_heads), MOST_SPLITS, -(-steps // block))
    splits = 2 ** (max(1, splits).bit_length() - 1)
    return dict(GROUP=triton.next_power_of_2(group), BLOCK=block, SPLITS=splits, STAGES=3, num_warps=4)


def goes_ahead(rows, device):
    """Whether kernels may begin while the one before runs. For more rows than one it is slower."""
    return rows == 1 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def norm_of(norm, voice, rows):
    """Scale and shift of an AdaLayerNorm, (D,) each; with the voices of so many rows, (γ, β), they are (B, D)."""
    if voice is None:
        return norm.weight, norm.bias
    gamma, beta = (x[:, 0].float().expand(rows, -1) for x in voice)
    return [x.to(norm.weight.dtype).contiguous()
            for x in (norm.weight * (1 + gamma), norm.bias * (1 + gamma) + beta)]


def make_step(model, cache, voice=None):
    """A function from tokens (B, 1) to states (B, 1, D), which are `model.hidden(token, None, voice, cache)`; it moves
    the cache on. It works in place, in memory that is allocated here, and so can be captured in a CUDA graph."""
    seen, first, key, states = cache
    c, B, S, device = model.c, len(first), len(key), first.device
    W, E, G = c.width // c.heads, c.width // c.heads * c.kv_heads, c.heads // c.kv_heads
    rows = 1 if B == 1 else max(16, triton.next_power_of_2(B))
    first = first.flatten().contiguous()
    ahead = dict(AHEAD=True, launch_pdl=True) if goes_ahead(rows, device) else dict(AHEAD=False)
    over = attention_options(B, c.kv_heads, G, S) | ahead
    empty = partial(torch.empty, dtype=model.embedding.weight.dtype, device=device)
    q, y, h = empty(B, c.width), empty(B, c.width), empty(B, c.ffn_width)
    parts = torch.empty(B * c.kv_heads, over["SPLITS"], over["GROUP"], W, device=device)
    tops, sums = parts.new_empty(2, *parts.shape[:3]).unbind()
    arrived = torch.zeros(B * c.kv_heads, dtype=torch.int32, device=device)
    norms = [[norm_of(*pair, B) for pair in zip(block.norms, says)]
             for block, says in zip(model.blocks, voice or [[None, None]] * len(model.blocks))]

    def product(name, x, norm, eps, weight, result, after):
        (N, K), voiced = weight.shape, voice is not None and eps is not None
        options = product_options(rows, name, weight) | ahead
        product_kernel[N // options["COLUMNS"],](x, *norm, weight, result, B, N, K, eps, voiced, after, **options)

    def hidden(token):
        x = model.embedding(token)
        for block, (keys, values), (norm, ffn_norm) in zip(model.blocks, states, norms):
            mixer, ffn = block.mixer, block.ffn
            options = product_options(rows, "queries", mixer.key.weight) | ahead
            queries_kernel[(c.width + 2 * E) // options["COLUMNS"],](
                x, *norm, mixer.query.weight, mixer.key.weight, mixer.value.weight, q, keys, values, seen, B, S,
                c.width, E, W, block.norm.eps, voice is not None, **options)
            attention_kernel[B * c.kv_heads, over["SPLITS"]](q, keys, values, mixer.slopes, seen, first, parts, tops,
                                                             sums, arrived, y, S, c.kv_heads, G, W=W, **over)
            product("out", y, (None, None), None, mixer.out.weight, x, "add")
            product("up", x, ffn_norm, block.ffn_norm.eps, ffn.up.weight, h, "relu2" if ffn.relu2 else "gelu")
            product("down", h, (None, None), None, ffn.down.weight, x, "add")
        seen.add_(1)
        return x

    return hidden
