"""Sampling loops: from a model's predictions to log-mels and codes."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from model import PAD, delay
from trivox import decoding
from trivox.common import UserError
from trivox.gpu import capture, graphs, repeat

# ------------------------------------------------------------------------------------------------------------
# Flow TTS

FRAMES, BYTES = 128, 32  # to multiples of which a GPU pads clips and texts, so that few graphs serve all


@torch.inference_mode()
def solve_flow(model, text, length, empty, seeds, frames=None, steps=16, cfg_scale=2.0, solver="euler",
               temperature=1.0):
    """Sample log-mels by solving the flow from noise (t = 1) to data (t = 0).

    text, length as in `encode_text`; empty (1, 1) or (1, 1, byt5_width) is the empty text; seeds: a number for
    each sample's noise. frames (B,), or None for the predicted durations. cfg_scale is the weight of classifier-
    free guidance (Ho & Salimans, 2022), 1 for none. solver: "euler", or with two evaluations a step "midpoint" or
    "heun". temperature: the deviation of the noise, 1 as in training (below it as in Grad-TTS, Popov et al., 2021).
    A GPU replays a step as one CUDA graph, kept for texts and clips of about these lengths.
    Returns a list of log-mels (frames, n_mels), not normalised.
    """
    c, device, captured = model.c, text.device, graphs(text.device) and steps > 2
    if captured:
        text = F.pad(text, (0, 0) * (text.ndim - 2) + (0, -text.shape[1] % BYTES))
    encoded, log_seconds = model.encode_text(text, length)
    if frames is None:
        frames = (log_seconds.exp() * c.sample_rate / c.hop_length).round().long().clamp(min=1)
    multiple = math.lcm(c.patch, FRAMES) if captured else c.patch
    x = torch.zeros(len(text), -(-int(frames.max()) // multiple) * multiple, c.n_mels, device=device)
    for i, (seed, n) in enumerate(zip(seeds, frames.tolist())):  # a sample does not depend on its neighbours
        x[i, :n] = temperature * torch.randn(n, c.n_mels, generator=torch.Generator().manual_seed(seed))
    whole = frames
    if cfg_scale != 1:  # samples with their text, then the same without, padded to as many bytes
        null, _ = model.encode_text(empty, torch.ones(1, dtype=torch.long, device=device))
        (states, mask, clock), L = (part.expand(len(text), *part.shape[1:]) for part in null), encoded[2].shape[1] - 1
        null = F.pad(states, (0, 0, 0, L)), F.pad(mask, (0, L)), F.pad(clock, (0, L))
        encoded, whole = [torch.cat(both) for both in zip(encoded, null)], frames.repeat(2)
    make = partial(flow_step, model, steps, cfg_scale, solver)
    changed = x, torch.zeros(1, dtype=torch.long, device=device)
    read = whole, *encoded, *(y for pair in model.keys_values(encoded) for y in pair)
    if captured:
        at = model.mel_input.weight.data_ptr()  # a graph reads weights where they were
        repeat(make, changed, read, steps, key=(model, at, steps, cfg_scale, solver))
    else:
        step = make(*changed, *read)
        for _ in range(steps):
            step()
    return [mel[:n].cpu() for mel, n in zip(x * model.mel_std + model.mel_mean, frames.tolist())]


def flow_step(model, steps, cfg_scale, solver, x, at, frames, *read):
    """A function that takes x (B, T, n_mels), in place, a step of a solver on, and `at` (1,), the number of steps that
    were taken. frames (B,), or with guidance (2 B,); read: what `encode_text` returns of them, then all `keys_values`.
    """
    encoded, pairs, dt = read[:3], list(zip(read[3::2], read[4::2])), -1 / steps
    halfway = dt / 2 if solver == "midpoint" else dt
    times = torch.tensor([[1 - i / steps, 1 - i / steps + halfway] for i in range(steps)], device=x.device)

    def velocity(x, t):
        x, t = x.repeat(len(frames) // len(x), 1, 1), t.expand(len(frames))
        v = model.velocity(x, t, frames, encoded, pairs).float()
        return v if cfg_scale == 1 else torch.lerp(*v.chunk(2)[::-1], cfg_scale)

    def step():
        t, later = times.index_select(0, at).unbind(1)  # (1,) each
        v = velocity(x, t)
        if solver == "midpoint":
            v = velocity(x + dt / 2 * v, later)
        elif solver == "heun":
            v = (v + velocity(x + dt * v, later)) / 2
        x.add_(dt * v)
        at.add_(1)

    return step


# ------------------------------------------------------------------------------------------------------------
# Codec LM

def generate_frames(model, frames, seeds, prompts=None, **options):
    """Sample clips of at most `frames` frames, arguments as for `stream_frames`. Returns a list of codes (T, Q),
    each with its prompt; clips of a model with text end where it says EOS."""
    codes = torch.stack(list(stream_frames(model, frames, seeds, prompts, **options)), 1)  # (B, T, Q)
    return [clip[:int((clip[:, 0] < model.c.codebook_size).sum())] for clip in codes]


@torch.inference_mode()
def stream_frames(model, frames, seeds, prompts=None, temperature=1.0, top_k=0, top_p=1.0, text=None, length=None,
                  seconds=None, cfg_scale=1.0):
    """Sample in delayed space, and yield frame after frame, (B, Q) codes on the CPU, as soon as it has its last book.

    frames: how long a clip may become. seeds: a number for each clip; what it becomes does not depend on its
    neighbours. prompts: for each clip codes (T, Q) to go on from, T from 0 up; they are yielded too. temperature,
    top_k (0 for all codes) and top_p (Holtzman et al., 2020): a number, or one for each book; temperature 0 takes
    the most probable code. text (B, L), length (B,), seconds (B,): see `read_text`; cfg_scale is the weight of
    classifier-free guidance by the text, 1 for none. Frames beyond a clip's end hold no code, but PAD or EOS. A GPU
    replays a step as one CUDA graph, and yields what some steps have made.

    Raises UserError for a prompt that is longer than the context.
    """
    c, B, Q, device = model.c, len(seeds), model.c.codebooks, model.heads.weight.device
    prompts = prompts or [torch.zeros(0, Q, dtype=torch.long)] * B
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if longest + Q > c.context:
        raise UserError(f"a prompt of {longest} frames is longer than the context, {c.context} steps, allows")
    known = torch.full((B, max(frames, longest), Q), -1)
    for row, prompt in zip(known, prompts):
        row[:len(prompt)] = prompt
    known = delay(known, model.bos, model.pad).to(device)  # -1 where a code is to be sampled
    rows, last = known.clone(), known.shape[1] - 1
    uniform = torch.stack([torch.rand(last, Q, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    uniform = uniform.to(device)

    guided = c.cross_every and text is not None and cfg_scale != 1
    read = None
    if c.cross_every:
        empty = torch.ones(B, 1, dtype=torch.long, device=device)  # a text is bytes and 1, which ends it
        text, length = (empty, empty[:, 0]) if text is None else (text, length)
        if guided:
            text, length = torch.cat((text, F.pad(empty, (0, text.shape[1] - 1)))), torch.cat((length, empty[:, 0]))
            seconds = seconds if seconds is None else seconds.repeat(2)
        read, _ = model.read_text(text, length, seconds)
    cache = model.empty_cache(B * (1 + guided), min(c.context, last))

    book = torch.arange(Q, device=device)
    barred = (torch.arange(model.symbols, device=device) >= c.codebook_size).repeat(Q, 1)  # (Q, symbols)
    barred[0, model.eos] = not c.cross_every
    top_k = torch.where((top_k := torch.tensor(top_k)) > 0, top_k, model.symbols).clamp(max=model.symbols)
    most = int(top_k.max()) if sorts(top_k, top_p, model.symbols, device) else None
    temperature, top_k, top_p = (torch.as_tensor(x, dtype=torch.float32).to(device).expand(Q)[:, None]
                                 for x in (temperature, top_k, top_p))
    end = torch.full((B, 1), known.shape[1] - Q, device=device)  # the frame that holds EOS
    at = torch.full((1,), shortest, device=device)  # the row before the one to be sampled

    def choose(x):
        logits = model.logits(x).float()
        if guided:
            given, free = logits.chunk(2)
            logits = torch.lerp(free, given, cfg_scale)
        logits, number = logits.masked_fill(barred, -torch.inf), uniform.index_select(1, at)[:, 0]
        new, given = pick(logits, number, temperature, top_k, top_p, most), known.index_select(1, at + 1)[:, 0]
        new = torch.where(given < 0, new, given).masked_fill(at - book >= end, model.pad)
        if c.cross_every:
            end.copy_(end.where(new[:, :1] != model.eos, at))
        rows.index_copy_(1, at.add_(1), new[:, None])

    def step():
        choose(model.hidden(rows.index_select(1, at).repeat(1 + guided, 1, 1), read, cache)[:, -1])

    row = min(shortest + 1, last)  # it and all before it are known
    if shortest < last:
        choose(model.hidden(rows[:, :row].repeat(1 + guided, 1, 1), read, cache)[:, -1])
    if graphs(device) and last - row > 8:
        step = capture(step, [rows, at, end, cache[0], *(x for state in cache[-1] for x in state)])
    burst, whole = 16 if graphs(device) else 1, 0  # a GPU need not wait for each row to be looked at; frames yielded
    while True:
        ready = min(row - Q, int(end.max())) if c.cross_every else row - Q  # the last frame that is whole
        new = rows[:, 1 + whole:1 + ready + Q].cpu()
        for frame in range(max(0, 1 + ready - whole)):
            yield new[:, frame:frame + Q].diagonal(0, 1, 2)
        whole = max(whole, 1 + ready)
        if row == last or ready < row - Q:
            return
        taken = min(burst, last - row)
        for _ in range(taken):
            step()
        row += taken


def sorts(top_k, top_p, symbols, device):
    """Whether probabilities must be sorted: where top_k or top_p, a number or one for each book, leave symbols out. A
    CPU, which takes little longer for it, always does: so a seed goes on to say there what it has said."""
    cut = (torch.as_tensor(top_k) < symbols).any() or (torch.as_tensor(top_p) < 1).any()
    return device.type == "cpu" or bool(cut)


def pick(logits, uniform, temperature, top_k, top_p, most):
    """One symbol for each row of logits (B, Q, symbols): the one that uniform (B, Q) in [0, 1) falls on where the
    probabilities stand side by side, the largest first. temperature, top_k, top_p (Q, 1); most: the largest top_k, or
    None where nothing is cut off: then they need not be sorted and stand as they are."""
    p = (logits / temperature.clamp(min=1e-6)).softmax(-1)
    if most is None:
        return falls_on(p, uniform)
    p, symbol = p.topk(most, -1) if most < p.shape[-1] else p.sort(-1, descending=True)
    upto = p.cumsum(-1)
    kept = (upto - p < top_p) & (torch.arange(most, device=p.device) < top_k)
    kept[..., 0] = True
    choice = (upto < uniform[..., None] * (p * kept).sum(-1, keepdim=True)).sum(-1, keepdim=True)
    return symbol.gather(-1, choice.clamp(max=kept.sum(-1, keepdim=True) - 1))[..., 0]


def falls_on(p, uniform):
    """The symbol (B, Q) at which the running sum of p (B, Q, symbols) exceeds uniform (B, Q), first in sums of blocks,
    then in one: PyTorch is slow to sum along 65,537. Sums are integers, in units of 2^-38: exact in any order, so that
    none of probability 0 is taken, nor one beyond the last."""
    symbols = p.shape[-1]
    width = math.isqrt(symbols - 1) + 1
    p = F.pad((p * 2 ** 38).long(), (0, -p.shape[-1] % width)).unflatten(-1, (-1, width))
    block = p.sum(-1)
    upto = block.cumsum(-1)
    wanted = (uniform * 2 ** 24).long()[..., None] * upto[..., -1:] >> 24  # below the total, as uniform is below 1
    at = (upto <= wanted).sum(-1, keepdim=True).clamp(max=upto.shape[-1] - 1)  # where p is NaN, any symbol will do
    wanted = wanted - (upto - block).gather(-1, at)
    within = p.gather(-2, at[..., None].expand(*at.shape, width))[..., 0, :]
    return (at * width + (within.cumsum(-1) <= wanted).sum(-1, keepdim=True))[..., 0].clamp(max=symbols - 1)


# ------------------------------------------------------------------------------------------------------------
# LLM TTS

def generate_speech(model, prompts, seeds, frames, **options):
    """Speak sentences, arguments as for `stream_speech`. Returns a list of codes (n,)."""
    codes = torch.stack(list(stream_speech(model, prompts, seeds, frames, **options)), 1)
    return [row[row >= 0] for row in codes]


@torch.inference_mode()
def stream_speech(model, prompts, seeds, frames, speaker=None, temperature=1.0, top_k=0, top_p=1.0,
                  repetition_penalty=1.0):
    """Speak several sentences at once, and yield code after code, (B,) on the CPU, -1 where a sentence has ended.

    prompts: a list of tokens, from `sentence`. seeds: a number for each; what it becomes does not depend on its
    neighbours. frames: how many codes at most, a number, or one for each; and no more than its prompt leaves room for
    in the context. speaker (B, speaker_width). top_k: 0 for all codes. temperature 0 takes the most probable code.
    repetition_penalty: logits of codes that have been spoken are divided by it, or multiplied where below 0 (Keskar et
    al., 2019); 1 for none. A GPU replays a step as one CUDA graph, of decoding.py's kernels where they support the
    model.

    Raises UserError for a prompt that leaves less than two codes for each of its characters.
    """
    c, B, device = model.c, len(prompts), model.embedding.weight.device
    longest = max(map(len, prompts))
    if (room := c.context - longest) < 2 * (longest - 3):
        raise UserError(f"a sentence of {longest - 3} characters leaves room for {max(0, room) / c.frame_rate:.1f} s "
                        f"of audio in the context of {c.context} tokens: break it into shorter ones")
    if (speaker is None) != (c.speaker_width == 0):
        raise UserError("this model speaks with the voice of a recording: name one with --speaker" if speaker is None
                        else "this model was trained without voices and takes none")
    rooms, tokens = torch.tensor([c.context - len(prompt) for prompt in prompts]), torch.full((B, longest), PAD)
    limit = torch.as_tensor(frames).expand(B).minimum(rooms)
    frames, limit = int(limit.max()), limit[:, None].to(device)
    for row, prompt in zip(tokens, prompts):
        row[longest - len(prompt):] = prompt
    voice = None if speaker is None else model.read_speaker(speaker)
    uniform = torch.stack([torch.rand(frames, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    uniform = uniform.to(device)
    cache = model.empty_cache(torch.tensor([longest - len(p) for p in prompts], device=device), longest + frames)
    most = min(top_k or c.codebook_size + 1, c.codebook_size + 1)
    cut = [torch.tensor([[x]], dtype=torch.float32, device=device) for x in (temperature, most, top_p)]
    most = most if sorts(most, top_p, c.codebook_size + 1, device) else None
    token, at = torch.zeros(B, 1, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long, device=device)
    codes = torch.full((B, frames), -1, device=device)
    spoken = torch.zeros(B, c.codebook_size + 1, dtype=torch.bool, device=device)

    def choose(x):
        logits = model.audio_logits(x)
        if repetition_penalty != 1:
            punished = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
            logits = torch.where(spoken, punished, logits)
        new = pick(logits[:, None], uniform.index_select(1, at), *cut, most)  # (B, 1)
        new = torch.where((token == c.audio_eos) | (at >= limit), c.codebook_size, new)  # it has ended
        spoken.scatter_(1, new, new < c.codebook_size)
        codes.index_copy_(1, at, torch.where(new < c.codebook_size, new, -1))
        token.copy_(torch.where(new < c.codebook_size, new + c.first_code, c.audio_eos))
        at.add_(1)

    def step():
        choose(hidden(token)[:, -1])

    choose(model.hidden(tokens.to(device), None, voice, cache)[:, -1])
    hidden = partial(model.hidden, voice=voice, cache=cache)
    if device.type == "cuda" and decoding.supports(model, B):
        hidden = decoding.make_step(model, cache, voice)
    if graphs(device) and frames > 8:
        step = capture(step, [token, at, codes, spoken, cache[0], *(x for state in cache[-1] for x in state)])
    burst, known = 16 if graphs(device) else 1, 0  # a GPU need not wait for each code to be looked at
    while known < frames:
        for _ in range(min(burst, frames - known) - (known == 0)):
            step()
        new = codes[:, known:known + burst].cpu()
        yield from new.T
        known += burst
        if bool((new[:, -1] < 0).all()):
            return


def follow(stream, sentences):
    """From what `stream_speech` yields, an iterator of codes (1,) for each of so many sentences, to be read in order:
    while the first is heard, the others are already being spoken."""
    heard, ended = [[] for _ in range(sentences)], [False] * sentences

    def codes(i):
        n = 0
        while True:
            while n < len(heard[i]):
                yield heard[i][n]
                n += 1
            step = None if ended[i] else next(stream, None)
            if step is None:
                return
            for k, code in enumerate(step):
                ended[k] |= int(code) < 0
                if not ended[k]:
                    heard[k].append(code[None])

    return [codes(i) for i in range(sentences)]
