"""generate.py: solvers with known solutions, sampling beside the full forward and known distributions; what a text
becomes depends on no other; what a GPU captures in a CUDA graph, on a CPU by a twin of gpu.py's `capture`."""

from functools import partial
from types import FunctionType

import pytest
import torch
from helpers import encode, prompts_of, tiny_codec_lm, tiny_flow, tiny_llm, voice

from torch.utils._python_dispatch import TorchDispatchMode

from model import FlowTTS, delay
from trivox import generate as loops
from trivox import gpu
from trivox.common import UserError
from trivox.generate import (generate_frames, generate_speech, pick, solve_flow, sorts, stream_frames,
                             stream_speech)

TEXTS = ["A ferry.", "The captain painted seven wooden boxes.", "Eleven"]

# ------------------------------------------------------------------------------------------------------------
# Flow TTS

MEAN, STD = 0.7, 0.4  # of data whose every number is drawn from a normal distribution


def gaussian_velocity(x, t, frames, encoded, pairs):
    """E[noise - data | x] where data ~ N(MEAN, STD²): x_t is N((1 - t) MEAN, s²) with s² = (1 - t)² STD² + t², and so
    the flow takes the noise z to MEAN + STD z."""
    t = t[:, None, None]
    return -MEAN + (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2) * (x - (1 - t) * MEAN)


def generate(model, texts=TEXTS, **options):
    text, length = encode(texts)
    seeds = options.pop("seeds", range(len(texts)))
    return solve_flow(model, text, length, encode([""])[0], seeds, options.pop("frames", None), **options)


@pytest.mark.parametrize("solver, order, temperature", [("euler", 1, 1.0), ("midpoint", 2, 1.0), ("heun", 2, 0.5)])
def test_order_of_the_solvers(monkeypatch, solver, order, temperature):
    """Twice the steps, half or a quarter of the distance to where the flow truly ends. (Midpoint's is an eighth: the
    second-order errors of this flow cancel.)"""
    model = tiny_flow()
    model.mel_mean.fill_(-3.0)
    model.mel_std.fill_(2.0)
    monkeypatch.setattr(model, "velocity", gaussian_velocity)
    noise = torch.randn(20, 80, generator=torch.Generator().manual_seed(5))
    end = (MEAN + STD * temperature * noise) * 2.0 - 3.0
    errors = []
    for steps in (20, 40, 80):
        mel, = generate(model, ["a"], seeds=[5], frames=torch.tensor([20]), steps=steps, cfg_scale=1, solver=solver,
                        temperature=temperature)
        errors.append((mel - end).norm() / end.norm())
    assert errors[-1] < (0.02 if order == 1 else 0.001)
    for coarse, fine in zip(errors, errors[1:]):
        assert torch.log2(coarse / fine) > order - 0.15


def test_guidance_of_the_velocity_extrapolates_from_the_empty_text(monkeypatch):
    """One Euler step with constant velocities a (text) and b (none) takes x to x - (b + s (a - b))."""
    model = tiny_flow()
    model.mel_mean.fill_(0.0)
    model.mel_std.fill_(1.0)

    def constant(texts):
        return model.encode_text(*encode(texts))[0][0][:, 0].mean(-1)[:, None, None]

    monkeypatch.setattr(model, "velocity", lambda x, t, frames, text, pairs: (
        text[0][:, 0].mean(-1)[:, None, None] + 0 * x))
    with torch.inference_mode():
        a, b = constant(TEXTS[:1])[0], constant([""])[0]
    assert (a - b).abs() > 1e-3
    noise = torch.randn(6, 80, generator=torch.Generator().manual_seed(0))
    for s in (0.0, 1.0, 2.0, 3.5):
        mel, = generate(model, TEXTS[:1], frames=torch.tensor([6]), steps=1, cfg_scale=s)
        torch.testing.assert_close(mel, noise - (b + s * (a - b)), atol=1e-5, rtol=1e-5)


def test_without_guidance_the_empty_text_is_not_asked(monkeypatch):
    model, velocity, asked = tiny_flow(), FlowTTS.velocity, []
    monkeypatch.setattr(model, "velocity", lambda *args: asked.append(len(args[3][0])) or velocity(model, *args))
    generate(model, steps=3, cfg_scale=1)
    assert len(asked) == 3


@pytest.mark.parametrize("options", [dict(cfg_scale=2.0), dict(cfg_scale=1, solver="heun"),
                                     dict(frames=torch.tensor([7, 90, 31]))], ids=["guided", "plain", "lengths given"])
def test_a_mel_does_not_depend_on_its_neighbours(options):
    model = tiny_flow()
    together = generate(model, seeds=[3, 4, 5], steps=4, **options)
    for i, mel in enumerate(together):
        mine = options | ({"frames": options["frames"][i:i + 1]} if "frames" in options else {})
        single, = generate(model, TEXTS[i:i + 1], seeds=[3 + i], steps=4, **mine)
        torch.testing.assert_close(mel, single, atol=1e-3, rtol=1e-4)
        assert not torch.allclose(single, generate(model, TEXTS[i:i + 1], seeds=[9], steps=4, **mine)[0])


def test_predicted_lengths():
    """In frames of 256 / 22,050 s, and never none."""
    model = tiny_flow()
    torch.nn.init.zeros_(model.encode_text.duration[-1].weight)
    slow = [round((len(t) + 1) * 0.1353352832 * 22050 / 256) for t in TEXTS]
    for log_seconds, frames in ((-2.0, slow), (-7, [1, 3, 1])):
        torch.nn.init.constant_(model.encode_text.duration[-1].bias, log_seconds)
        assert [len(mel) for mel in generate(model, steps=1)] == frames


# ------------------------------------------------------------------------------------------------------------
# Codec LM

def test_pick_follows_the_cut_distribution():
    """Books with a temperature, a top_k and a top_p each; shares of 20,000 draws beside those worked out by hand."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    temperature, top_k, top_p = (torch.tensor(x)[:, None] for x in ([1, 0.5, 1, 1, 0.0], [4, 4, 2, 4, 4],
                                                                    [1, 1, 1, 0.6, 1]))
    uniform = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0))
    drawn = pick(logits.expand(20_000, 5, 4), uniform, temperature, top_k, top_p, 4)
    wanted = torch.tensor([[0.1, 0.4, 0.2, 0.3], [1 / 30, 16 / 30, 4 / 30, 9 / 30], [0, 4 / 7, 0, 3 / 7],
                           [0, 4 / 7, 0, 3 / 7], [0, 1, 0, 0]])
    for book, shares in zip(drawn.T, wanted):
        torch.testing.assert_close(book.bincount(minlength=4) / 20_000, shares, atol=0.015, rtol=0)
        assert not (book.bincount(minlength=4) > 0)[shares == 0].any()


def test_pick_of_all_symbols():
    """Where nothing is cut off: the symbol on which the number falls in their own order, worked out in float64 for
    vocabularies of many sizes; never one that is barred, nor one beyond the last; whatever the other rows are."""
    random, all_of_them = torch.Generator().manual_seed(0), (torch.ones(1, 1), None, None, None)
    for symbols in (1, 2, 5, 16, 17, 1027, 65_537):
        logits = 3 * torch.randn(60, 1, symbols, generator=random)
        logits[:, :, 1:][torch.rand(60, 1, symbols - 1, generator=random) < 0.4] = -torch.inf
        uniform = torch.rand(60, 1, generator=random)
        uniform[:3], uniform[3:6] = 0, 1 - 2 ** -24
        drawn, p = pick(logits, uniform, *all_of_them), logits.double().softmax(-1)
        assert (p.gather(-1, drawn[..., None]) > 0).all()
        upto, share = p.cumsum(-1).gather(-1, drawn[..., None])[..., 0], p.gather(-1, drawn[..., None])[..., 0]
        assert (uniform < upto + 1e-5).all() and (uniform > upto - share - 1e-5).all()
        assert torch.equal(drawn[7:8], pick(logits[7:8], uniform[7:8], *all_of_them))
    coldest = pick(logits, uniform, torch.zeros(1, 1), None, None, None)
    assert torch.equal(coldest, logits.argmax(-1))
    logits[:, :, :] = -torch.inf
    logits[:, :, -1] = 0  # only the last, in a block of its own
    assert (pick(logits, uniform, *all_of_them) == 65_536).all()


def test_what_is_cut():
    for top_k, top_p, found in ((5, 1, False), (9, 1.0, False), (4, 1, True), (5, 0.9, True), ([5, 4], 1, True),
                                (torch.tensor([5, 5]), [1, 1.0], False), (5, [1, 0.5], True)):
        assert sorts(top_k, top_p, 5, torch.device("cuda")) is found and sorts(top_k, top_p, 5, torch.device("cpu"))


def continuation(model, prompt, frames, **text):
    """Greedy sampling without a cache, by the full forward on ever longer delayed codes, one book after the other."""
    codes = torch.cat((prompt, torch.full((frames - len(prompt), prompt.shape[1]), -1)))
    while (codes == -1).any():
        delayed = delay(codes[None], model.bos, model.pad)
        row = int((delayed[0] == -1).any(1).nonzero()[0])
        with torch.no_grad():
            logits = model.logits(model(delayed[:, :row], **text)[0])[0, -1, :, :model.c.codebook_size]
        for q in (delayed[0, row] == -1).nonzero()[:, 0].tolist():
            codes[row - 1 - q, q] = logits[q].argmax()
    return codes


@pytest.mark.parametrize("length", [0, 1, 7])
def test_greedy_frames_are_the_full_forward(length):
    model = tiny_codec_lm(pattern="GADM", layers=4)
    prompt = torch.randint(0, 20, (length, 3))
    codes, = generate_frames(model, 12, [0], [prompt], temperature=0)
    assert torch.equal(codes, continuation(model, prompt, 12))


def test_guidance_of_the_logits_extrapolates_from_the_empty_text():
    model = tiny_codec_lm(cross_every=1)
    allowed = [*range(20), model.eos]
    text, length = torch.randint(3, 259, (1, 12)), torch.tensor([12])
    start = torch.full((1, 1, 3), model.bos)
    with torch.no_grad():
        given, free = (model.logits(model(start, t, n)[0])[0, 0, 0, allowed]
                       for t, n in ((text, length), (torch.tensor([[1]]), torch.tensor([1]))))
    picked = set()
    for scale in (0.0, 1.0, 3.0, 30.0):
        codes, = generate_frames(model, 1, [0], text=text, length=length, cfg_scale=scale, temperature=0)
        picked.add(first := allowed[(free + scale * (given - free)).argmax()])
        assert codes.tolist() == [] if first == model.eos else codes[0, 0] == first
    assert len(picked) > 1


def test_a_clip_does_not_depend_on_its_neighbours():
    """Nor on how long it may become; prompts of any lengths, with text and EOS."""
    model = tiny_codec_lm(pattern="GA", cross_every=1)
    model.heads.weight.data[model.eos] *= 2
    text, length = torch.randint(3, 259, (4, 12)), torch.tensor([12, 5, 12, 9])
    prompts = [torch.randint(0, 20, (n, 3)) for n in (0, 4, 2, 0)]
    options = dict(temperature=0.9, top_k=[0, 5, 7], top_p=0.9, cfg_scale=2.0)
    together = generate_frames(model, 60, [1, 2, 3, 4], prompts, text=text, length=length, **options)
    assert len({len(codes) for codes in together}) > 2 and min(map(len, together)) < 40
    for i, codes in enumerate(together):
        own = dict(text=text[i:i + 1], length=length[i:i + 1])
        alone, = generate_frames(model, 90, [i + 1], prompts[i:i + 1], **own, **options)
        shown = len(codes) if len(codes) < 60 else 58  # what is cut off has PAD beside its last frames
        assert torch.equal(alone[:shown], codes[:shown]) and torch.equal(codes[:len(prompts[i])], prompts[i])
        assert (codes >= 0).all() and (codes < 20).all()


def test_frames_stream_as_soon_as_they_are_whole():
    """Before a clip of 1000 frames ends, beyond the context, and the same as in one piece."""
    model, asked = tiny_codec_lm(context=30), []
    model.norm.register_forward_hook(lambda *_: asked.append(1))
    stream = stream_frames(model, 1000, [5, 6], [torch.zeros(4, 3, dtype=torch.long)] * 2)
    first = [next(stream) for _ in range(10)]
    assert len(asked) == 10 + 3 - 1 - 4
    first += [next(stream) for _ in range(40)]
    whole = generate_frames(model, 80, [5, 6], [torch.zeros(4, 3, dtype=torch.long)] * 2)
    for codes, streamed in zip(whole, torch.stack(first, 1)):
        assert len(codes) == 80 and torch.equal(codes[:50], streamed)


def test_a_prompt_beyond_the_context_is_told():
    with pytest.raises(UserError, match="prompt of 28 frames is longer"):
        generate_frames(tiny_codec_lm(context=30), 40, [0], [torch.zeros(28, 3, dtype=torch.long)])


# ------------------------------------------------------------------------------------------------------------
# LLM TTS

def say(model, prompt, seed, frames, speaker=None, **options):
    return generate_speech(model, [prompt], [seed], frames, speaker=speaker, **options)[0].tolist()


def test_greedy_speech_is_the_full_forward():
    """Only codes and the end of the audio may be said, with and without a penalty for what was said before."""
    model = tiny_llm(pattern="AGA", speaker_width=12)
    prompt, speaker, first = prompts_of(model)[0], voice(model, 1), model.c.first_code
    with torch.no_grad():
        model.embedding.weight[model.c.audio_eos] *= 0.1  # so that it does not end at once
    for penalty in (1.0, 1.3):
        tokens, codes = prompt[None], []
        while len(codes) < 30:
            row = (model(tokens, None, speaker) @ model.embedding.weight.T)[0, -1]
            allowed = torch.cat((row[first:first + 50], row[model.c.audio_eos, None]))
            for code in set(codes):
                allowed[code] = allowed[code] / penalty if allowed[code] > 0 else allowed[code] * penalty
            if (new := int(allowed.argmax())) == 50:
                break
            codes.append(new)
            tokens = torch.cat((tokens, torch.tensor([[new + first]])), 1)
        assert say(model, prompt, 0, 30, speaker, temperature=0, repetition_penalty=penalty) == codes
        assert len(set(codes)) > 3


def test_a_sentence_does_not_depend_on_its_neighbours():
    """Nor on how long it may become; and what streams is what comes at once."""
    model = tiny_llm(pattern="AGA")
    with torch.no_grad():
        model.embedding.weight[model.c.audio_eos] *= 3  # so that some end early
    prompts, options = prompts_of(model), dict(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.1)
    together = [codes.tolist() for codes in generate_speech(model, prompts, [1, 2, 3], 60, **options)]
    assert len(set(map(len, together))) > 1
    for n, (prompt, codes) in enumerate(zip(prompts, together)):
        alone = say(model, prompt, n + 1, 90, **options)
        assert alone[:len(codes)] == codes and (len(codes) == 60 or len(alone) == len(codes))
    stream, asked = stream_speech(model, prompts, [1, 2, 3], 60, **options), []
    model.blocks[0].register_forward_hook(lambda *_: asked.append(1))
    first = [next(stream) for _ in range(10)]
    assert len(asked) == 10
    for row, codes in zip(torch.stack(first, 1), together):
        assert row[row >= 0].tolist() == codes[:10]


def test_each_sentence_has_a_length_of_its_own():
    """Given, or what its prompt leaves of the context, which is not less beside a longer one."""
    model = tiny_llm(context=40)
    with torch.no_grad():
        model.embedding.weight[model.c.audio_eos] *= 0.1  # so that none ends by itself
    prompts, limits = prompts_of(model, (3, 9, 5)), [50, 60, 7]
    together = generate_speech(model, prompts, [1, 2, 3], limits, temperature=0)
    assert [len(codes) for codes in together] == [40 - 6, 40 - 12, 7]
    for n, codes in enumerate(together):
        assert say(model, prompts[n], n + 1, limits[n], temperature=0) == codes.tolist()


def test_what_cannot_be_spoken():
    model, voiced = tiny_llm(context=60), tiny_llm(speaker_width=12)
    long, short = prompts_of(model, (20, 3))
    with pytest.raises(UserError, match=r"20 characters leaves room for 0\.7 s of audio in the context of 60"):
        say(model, long, 0, 30)
    with pytest.raises(UserError, match="--speaker"):
        say(voiced, short, 0, 30)
    with pytest.raises(UserError, match="without voices"):
        say(model, short, 0, 30, torch.ones(1, 12))


# ------------------------------------------------------------------------------------------------------------
# What a GPU captures

def held(x, name="step", met=()):
    """What a function holds on to in its closure, in partials, containers and models: pairs of a name and a tensor or a
    number."""
    if id(x) in met:
        return
    met = *met, id(x)
    if x is None or isinstance(x, (torch.Tensor, int, float)):
        yield name, x
    elif isinstance(x, torch.nn.Module):
        yield from (*x.named_parameters(name), *x.named_buffers(name))
    else:
        inside = {}
        if isinstance(x, FunctionType):
            inside = {key: cell.cell_contents for key, cell in zip(x.__code__.co_freevars, x.__closure__ or ())}
        elif isinstance(x, partial):
            inside = {"func": x.func, "args": x.args, **x.keywords}
        elif hasattr(x, "__self__"):
            inside = {"self": x.__self__}
        elif isinstance(x, (list, tuple)):
            inside = dict(enumerate(x))
        for key, y in inside.items():
            yield from held(y, f"{name}.{key}", met)


def memory(x):
    return x.untyped_storage().data_ptr()


class Operators(TorchDispatchMode):
    """The operators of a step, each with its numbers and with the shapes of its tensors, and the names of those that
    outlive the step."""

    def __init__(self, held):
        super().__init__()
        self.names, self.record = {memory(x): name for name, x in held.items() if isinstance(x, torch.Tensor)}, []

    def told(self, x):
        if isinstance(x, (list, tuple)):
            return [self.told(y) for y in x]
        return (x.shape, x.dtype, self.names.get(memory(x))) if isinstance(x, torch.Tensor) else repr(x)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name, kwargs = f.name().partition("::")[2].partition(".")[0], kwargs or {}
        assert name not in ("item", "is_nonzero", "_local_scalar_dense", "equal", "nonzero", "masked_select", "cpu",
                            "rand", "randn", "bernoulli_", "exponential_"), f"a graph cannot do {name}"
        self.record.append((name, self.told(args), self.told([*kwargs.items()])))
        return f(*args, **kwargs)


def capture_on_a_cpu(step, state, pool=None):
    """The twin of `capture`. A graph does again what was done while it was captured, in the same memory. So here each
    step must do what the first did, on the same tensors, and ask for no value; what outlives a step stays where it is,
    and what it changes is in `state`, as `capture` sets back nothing else. Only what a step makes and leaves may be
    new in the next: for that a graph has memory of its own."""
    def checked():
        before = dict(held(step))
        values = {name: x.clone() for name, x in before.items() if isinstance(x, torch.Tensor)}
        with Operators(before) as operators:
            step()
        after = dict(held(step))
        assert after.keys() == before.keys()
        for name, x in before.items():
            if name not in values:
                assert after[name] == x, f"{name} was {x} and is now {after[name]}, which a graph will not see"
                continue
            assert isinstance(after[name], torch.Tensor) and after[name].data_ptr() == x.data_ptr(), f"{name} moved"
            if not torch.equal(x, values[name]):
                assert memory(x) in map(memory, state), f"{name} changes and is not in the state"
        return operators.record

    def replay():
        assert checked() == first, "this step does not do what the first did"

    before = [x.clone() for x in state]
    first = checked()
    for x, old in zip(state, before):
        x.copy_(old)
    return replay


@pytest.fixture
def captures(monkeypatch):
    """From here on loops do on a CPU what they do on a GPU. The list gets the number of replays of each capture."""
    counts = []

    def capture(step, state, pool=None):
        replay, n = capture_on_a_cpu(step, state), len(counts)
        counts.append(0)

        def counted():
            counts[n] += 1
            replay()

        return counted

    for module, name, value in ((loops, "graphs", lambda device: True), (loops, "capture", capture),
                                (gpu, "capture", capture), (gpu, "shared_pool", lambda: None), (gpu, "KEPT", {})):
        monkeypatch.setattr(module, name, value)
    return counts


@pytest.mark.parametrize("fault, words", [
    ("rebinds", "total moved"), ("hides", "hidden changes and is not in the state"), ("counts", "number was 0"),
    ("slices", "does not do what the first did"), ("asks", "cannot do"), ("none", None)])
def test_the_twin_catches_what_a_graph_would_do_wrongly(fault, words):
    total, hidden, at, number, row = torch.zeros(3), torch.zeros(3), torch.zeros(1, dtype=torch.long), 0, iter(range(9))

    def step():
        nonlocal total, number
        if fault == "rebinds":
            total = total + 1
        elif fault == "hides":
            hidden.add_(1)
        elif fault == "counts":
            number += 1
        elif fault == "slices":
            total[next(row)] += 1
        elif fault == "asks":
            total[int(at)] += 1
        total.index_add_(0, at, torch.ones(1))
        at.add_(1)

    def run():
        replay = capture_on_a_cpu(step, [total, at])
        for _ in range(3):
            replay()

    if words is None:
        run()
        assert total.tolist() == [1, 1, 1] and number == 0 and not hidden.any()
    else:
        with pytest.raises(AssertionError, match=words):
            run()


@pytest.mark.parametrize("pattern, text, prompts, options", [
    ("GADM", False, (0, 0), dict(frames=60, top_k=5)), ("AG", True, (0, 4, 2), dict(cfg_scale=2.0, top_p=0.9)),
    ("DM", True, (1,), dict(temperature=0.8)), ("A", False, (7, 1), dict(frames=50, temperature=0))],
    ids=["beyond the context", "guided", "text", "greedy"])
def test_captured_frames_are_the_same(captures, monkeypatch, pattern, text, prompts, options):
    """The same frames as without a graph, all but the first step of them replayed, none long after the last clip's
    end."""
    model, B = tiny_codec_lm(pattern=pattern, layers=len(pattern), cross_every=text, context=30), len(prompts)
    model.heads.weight.data[model.eos] *= 3
    options = {"frames": 90, **options}
    frames = options.pop("frames")
    prompts = [torch.randint(0, 20, (n, 3)) for n in prompts]
    if text:
        options |= dict(text=torch.randint(3, 259, (B, 12)), length=torch.tensor([12, 5, 9][:B]))
    captured = list(stream_frames(model, frames, range(B), prompts, **options))
    with monkeypatch.context() as patch:
        patch.setattr(loops, "graphs", lambda device: False)
        plain = list(stream_frames(model, frames, range(B), prompts, **options))
    assert torch.equal(torch.stack(captured), torch.stack(plain))
    assert len(plain) < frames - 20 if text else len(plain) == frames
    needed = len(plain) + 3 - 2 - min(map(len, prompts))
    assert len(captures) == 1 and needed <= captures[0] < needed + 18


def test_captured_speech_is_the_same(captures, monkeypatch):
    model = tiny_llm(pattern="AGA", speaker_width=12)
    with torch.no_grad():
        model.embedding.weight[model.c.audio_eos] *= 2
    asked = dict(speaker=voice(model, 3), temperature=0.9, top_k=20, repetition_penalty=1.1)
    captured = list(stream_speech(model, prompts_of(model), [1, 2, 3], 60, **asked))
    monkeypatch.setattr(loops, "graphs", lambda device: False)
    plain = list(stream_speech(model, prompts_of(model), [1, 2, 3], 60, **asked))
    assert torch.equal(torch.stack(captured)[:len(plain)], torch.stack(plain))
    assert (torch.stack(captured)[len(plain):] == -1).all() and captures[0] >= len(plain) - 1 > 15


@pytest.mark.parametrize("options", [dict(cfg_scale=2.0), dict(cfg_scale=1, solver="midpoint"), dict(solver="heun")],
                         ids=["euler", "midpoint", "heun"])
def test_captured_mels_are_the_same_whatever_is_padded(captures, monkeypatch, options):
    """One graph for clips and texts of about these lengths, another for longer ones; the padding is not heard. The
    newest graphs are kept."""
    model, asked = tiny_flow(), [((8, 3), (5, 90)), ((3, 30), (128, 1)), ((33, 3), (9, 7)), ((7, 7), (129, 40))]

    def mels(lengths, frames):
        return generate(model, ["a" * n for n in lengths], frames=torch.tensor(frames), steps=4, **options)

    captured = [mels(*one) for one in asked]
    assert captures == [8, 4, 4] and len(gpu.KEPT) == 3
    monkeypatch.setattr(gpu, "MOST_KEPT", 2)
    mels(*asked[3])
    assert captures == [8, 4, 8] and len(gpu.KEPT) == 2
    mels(*asked[2])
    assert captures == [8, 8, 8]
    mels(*asked[0])
    assert captures == [8, 8, 8, 4]
    monkeypatch.setattr(loops, "graphs", lambda device: False)
    for one, together in zip(asked, captured):
        for mel, plain, frames in zip(together, mels(*one), one[1]):
            assert len(mel) == frames
            torch.testing.assert_close(mel, plain, atol=1e-3, rtol=1e-4)
    assert len(captures) == 4
