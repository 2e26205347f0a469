"""The LLM TTS's decoder: published sizes and keys, caches, packing, LoRA, voices, FlexAttention, sampling."""

from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import model as model_module
from model import CHARACTERS, LLM, LLMConfig, LoRALinear, alibi_score, alibi_slopes, flex_mask, packed_batch, sentence
from trivox import cross_entropy, echolancer
from trivox.common import UserError, read_yaml
from trivox.cross_entropy import linear_cross_entropy
from trivox.generate import generate_speech, stream_speech

TINY = dict(codebook_size=50, context=400, width=64, layers=3, heads=4, kv_heads=2, ffn_width=96)
ALL = dict(macaron=True, pattern="GAG", alibi="standard", activation="gelu", speaker_width=12, lora_rank=4,
           lora_matrices="query up input")


def tiny_llm(seed=0, **changes):
    """A tiny model in which no weight is zero, so that every part of it takes part."""
    torch.manual_seed(seed)
    model = LLM(LLMConfig(**TINY | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.ndim == 1 else 0.3 * p.shape[-1] ** -0.5))
    return model


def logits(model, *args, **kw):
    with torch.no_grad():
        return model(*args, **kw) @ model.embedding.weight.T


def voice(model, B):
    return torch.randn(B, 12, generator=torch.Generator().manual_seed(5)) if model.c.speaker_width else None


# ------------------------------------------------------------------------------------------------------------
# As published

@pytest.mark.parametrize("name, total", [("llm_177m", 177_327_104), ("llm_550m", 548_606_720),
                                         ("llm_1b", 1_290_158_592)])
def test_published_sizes(name, total):
    """To the last parameter; half the feed-forward layer twice is as many."""
    settings = read_yaml(ROOT / "configs" / f"{name}.yaml")
    c = LLMConfig(**{f.name: settings[f.name] for f in fields(LLMConfig) if f.name in settings})
    with torch.device("meta"):
        assert sum(p.numel() for p in LLM(c).parameters()) == total
        assert c.audio_bos == 65_580 and c.audio_eos == 65_581 and LLM(c).embedding.num_embeddings == 65_611
        c.macaron = True
        assert sum(p.numel() for p in LLM(c).parameters()) == total + 2 * c.width * c.layers


def echolancers(c, x, state):
    """Echolancer's forward pass from FACTS' formulas and its own keys, sum by sum in float64, without a voice or with
    state["speaker"]."""
    state = {key: value.double() for key, value in state.items()}
    x, (T, H) = state["combined_emb.weight"][x], (len(x), c.heads)

    def norm(name, x):
        y = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        y = y * state[f"{name}.weight"] + state[f"{name}.bias"]
        if "speaker" in state:
            affine = state["spk_norm.weight"], state["spk_norm.bias"]
            s = F.layer_norm(F.normalize(state["speaker"], dim=0), (12,), *affine)
            s = state[f"{name}.to_gamma_beta.weight"] @ F.normalize(s, dim=0) + state[f"{name}.to_gamma_beta.bias"]
            y = y * (1 + 1.5 * s[:c.width]) + 1.5 * s[c.width:]
        return y

    for l in range(c.layers):
        at = f"decoder.dec.layers.{l}."
        q, k, v = (norm(at + "norm1", x) @ state[f"{at}self_attn.W_{n}.weight"].T for n in "qkv")
        heads = []
        for h in range(H):
            own, shared = slice(16 * h, 16 * h + 16), slice(16 * (h // 2), 16 * (h // 2) + 16)  # 4 heads, 2 of keys
            slope = 2.0 ** -(h + 1 + l * H // max(1, (c.layers - 1) * H // 32))
            scores = q[:, own] @ k[:, shared].T / 4 + slope * (torch.arange(T)[None] - torch.arange(T)[:, None])
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, shared])
        x = x + torch.cat(heads, -1) @ state[at + "self_attn.W_o.weight"].T
        up, down = (state[f"{at}ffn.linear{n}.weight"].T for n in (1, 2))
        x = x + (norm(at + "norm3", x) @ up).relu() ** 2 @ down
    return x @ state["combined_emb.weight"].T


@pytest.mark.parametrize("speakers", [0, 12])
def test_published_checkpoints_load(speakers, tmp_path):
    """A file with the published keys, duplicates and buffers; the logits worked out from the keys; and back again."""
    ours = tiny_llm(speaker_width=speakers)
    state = echolancer.to_theirs(ours)
    for key in ("combined_head.weight", "decoder.embed.weight", "decoder.out_proj.weight"):
        state[key] = state["combined_emb.weight"]
    state["decoder.dec.layers.0.self_attn.alibi_slopes"] = torch.ones(4)
    path = tmp_path / "published.pt"
    torch.save({"epoch": 3, "model_state_dict": {f"_orig_mod.{key}": x for key, x in state.items()}}, path)
    loaded = tiny_llm(seed=1, speaker_width=speakers)
    loaded.load_state_dict(echolancer.to_ours(echolancer.read(path), loaded, path))
    tokens, speaker = torch.randint(0, 125, (1, 40)), voice(ours, 1)
    assert torch.equal(logits(loaded, tokens, None, speaker), logits(ours, tokens, None, speaker))
    reference = echolancers(ours.c, tokens[0], state | ({"speaker": speaker[0]} if speakers else {}))
    torch.testing.assert_close(logits(ours, tokens, None, speaker)[0].double(), reference, atol=1e-4, rtol=0)

    key = "decoder.dec.layers.1.ffn.linear2.weight"
    for value, words in ((None, f"no tensor '{key}'"), (torch.ones(3, 64), rf"{key} is \(3, 64\)")):
        broken = {k: v for k, v in state.items() if k != key} | ({key: value} if value is not None else {})
        torch.save({"model_state_dict": broken}, path)
        with pytest.raises(UserError, match=words):
            echolancer.to_ours(echolancer.read(path), loaded, path)


def test_nothing_in_a_published_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "trap"), "w")

    torch.save({"model_state_dict": {"combined_emb.weight": Trap()}}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="cannot read"):
        echolancer.load(tmp_path / "bad.pt")
    assert not (tmp_path / "trap").exists()


def test_slopes():
    """The published ones from FACTS' formula; the standard ones as transformers has them, heads no power of two too."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    c = LLMConfig(layers=27, heads=20, kv_heads=5, width=1280)
    for layer, step in ((0, 0), (13, 16), (26, 32)):  # 26 · 20 // 32 = 16
        assert alibi_slopes(c, layer).tolist() == [2.0 ** -(i + step) for i in range(1, 21)]
    for heads in (1, 4, 6, 12, 20, 24):
        c = LLMConfig(alibi="standard", heads=heads, kv_heads=1, width=4 * heads)
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(alibi_slopes(c, 3), theirs)


# ------------------------------------------------------------------------------------------------------------
# The same result

@pytest.mark.parametrize("options", [{}, ALL, dict(layers=2, pattern="GG")], ids=["published", "all options", "gdn"])
def test_cached_decoding_is_the_full_forward(options):
    """300 steps: a prompt at once, the rest step by step; rows of which one begins after padding."""
    model, first = tiny_llm(**options), 13
    tokens, speaker = torch.randint(0, 125, (2, 300)), voice(model, 2)
    full = logits(model, tokens, None, speaker)
    late = tokens.clone()
    late[1, first:] = tokens[1, :-first]
    with torch.no_grad():
        voices = speaker if speaker is None else model.read_speaker(speaker)
        cache = model.empty_cache(torch.tensor([0, first]), 300)
        steps = [model.hidden(late[:, :40], None, voices, cache)]
        steps += [model.hidden(late[:, t:t + 1], None, voices, cache) for t in range(40, 300)]
        cached = torch.cat(steps, 1) @ model.embedding.weight.T
    assert full.std() > 0.3 and int(cache[0]) == 300
    torch.testing.assert_close(cached[0], full[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(cached[1, first:], full[1, :-first], atol=1e-4, rtol=0)


def some_sentences(c, seed=0, n=7):
    rng = np.random.default_rng(seed)
    return [sentence(c, rng.integers(5, 43, rng.integers(3, 12)).astype(np.uint8),
                     rng.integers(0, c.codebook_size, rng.integers(4, 40)).astype(np.uint16)) for _ in range(n)]


@pytest.mark.parametrize("options", [{}, dict(pattern="GAG", macaron=True)], ids=["attention", "recurrent"])
def test_a_packed_sentence_is_the_sentence_alone(options):
    model = tiny_llm(**options)
    some = some_sentences(model.c)
    tokens, targets, document = packed_batch([some[:4], some[4:]], 200)
    packed = logits(model, tokens, document)
    for b, row in enumerate((some[:4], some[4:])):
        at = 0
        for one in row:
            n = len(one) - 1
            alone = logits(model, one[None, :-1])[0]
            torch.testing.assert_close(packed[b, at:at + n], alone, atol=2e-5, rtol=1e-4)
            assert torch.equal(targets[b, at:at + n], one[1:]) and torch.equal(tokens[b, at:at + n], one[:-1])
            at += n
        assert (targets[b, at:] == -100).all() and (document[b, at:] == -1).all()
    without = logits(model, tokens)
    assert (without[0, len(some[0]) + 3] - packed[0, len(some[0]) + 3]).abs().max() > 1e-2


def test_code_65535_fits():
    """The last code and the ids after it are past what 16 bits hold."""
    one = sentence(LLMConfig(), np.array([5, 42], np.uint8), np.array([0, 65535], np.uint16))
    assert one.tolist() == [2, 5, 42, 3, 65580, 43, 65578, 65581]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_sdpa():
    """ALiBi's score and the document mask, packed and not, through FlexAttention's own reference path."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    T, slopes = 256, alibi_slopes(LLMConfig(**TINY), 1)
    document = torch.arange(T).view(1, T).repeat(2, 1) // torch.tensor([[60], [100]])
    q, k, v = torch.randn(2, 4, T, 16), torch.randn(2, 2, T, 16), torch.randn(2, 2, T, 16)
    for doc in (None, document):
        flexed = flex_attention(q, k, v, lambda *a: alibi_score(slopes, *a), flex_mask(doc, 2, T, q.device),
                                enable_gqa=True)
        distance = torch.arange(T)[None] - torch.arange(T)[:, None]
        sees = (distance <= 0)[None] & (True if doc is None else doc[:, :, None] == doc[:, None])
        bias = slopes[:, None, None] * distance.float().masked_fill(~sees, -torch.inf)[:, None]
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        torch.testing.assert_close(flexed, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_model_takes_flex_attention_where_it_is_told(monkeypatch):
    """The forward pass with FlexAttention, as on a GPU, is that with scaled_dot_product_attention."""

    from torch.nn.attention.flex_attention import flex_attention

    model = tiny_llm()
    tokens, _, document = packed_batch([some_sentences(model.c)[:5]], 256)
    wanted = logits(model, tokens, document)
    monkeypatch.setattr(model_module, "flex_attention", lambda: flex_attention)
    monkeypatch.setattr(model_module, "takes_flex", lambda tokens: True)
    torch.testing.assert_close(logits(model, tokens, document), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 5], ids=["whole", "in chunks"])
def test_linear_cross_entropy(monkeypatch, rows):
    """Value and gradients beside float64's, with targets to be left out."""
    monkeypatch.setattr(cross_entropy, "LOGITS", 40 * 500 // rows)
    torch.manual_seed(0)
    x, weight = torch.randn(40, 24, requires_grad=True), torch.randn(500, 24, requires_grad=True)
    targets = torch.randint(0, 500, (40,)).masked_fill(torch.rand(40) < 0.3, -100)
    loss = linear_cross_entropy(x, weight, targets)
    (3 * loss).backward()
    a, b = (y.detach().double().requires_grad_() for y in (x, weight))
    wanted = F.cross_entropy(a @ b.T, targets, reduction="sum")
    (3 * wanted).backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(x.grad, a.grad.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weight.grad, b.grad.float(), atol=1e-5, rtol=1e-4)


def test_losses_add_up_in_bfloat16(monkeypatch):
    """The sum of many is as near to float64's as one is, though bfloat16 has but eight bits to add in."""
    monkeypatch.setattr(cross_entropy, "LOGITS", 16 * 500)
    torch.manual_seed(0)
    x, weight = torch.randn(3000, 24, requires_grad=True), torch.randn(500, 24, requires_grad=True)
    targets = torch.randint(0, 500, (3000,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    a, b = (y.detach().double().requires_grad_() for y in (x, weight))
    wanted = F.cross_entropy(a @ b.T, targets, reduction="sum")
    wanted.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    for ours, exact in ((x.grad, a.grad), (weight.grad, b.grad)):
        assert (ours - exact).norm() < 0.01 * exact.norm()
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets).item() == pytest.approx(wanted.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Voices and LoRA

def test_voices_change_nothing_at_first():
    """To the bit: AdaLN begins as LayerNorm; then a voice matters, and its length does not."""
    torch.manual_seed(0)
    base, tokens = LLM(LLMConfig(**TINY)), torch.randint(0, 125, (2, 50))
    voiced = LLM(LLMConfig(**TINY | dict(speaker_width=12)))
    voiced.load_state_dict(base.state_dict(), strict=False)
    speaker = voice(voiced, 2)
    assert torch.equal(logits(voiced, tokens, None, speaker), logits(base, tokens))
    with torch.no_grad():
        for block in voiced.blocks:
            block.norm.to_gamma_beta.weight.normal_()
    a, b, c = (logits(voiced, tokens, None, x) for x in (speaker, 7 * speaker, speaker.flip(0)))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert (a - c).abs().max() > 0.05


def test_lora():
    """0 at first, trained alone, and merged the same within 1e-5."""
    torch.manual_seed(0)
    c = LLMConfig(**TINY | dict(lora_rank=4, lora_matrices="query value down"))
    base, lora, tokens = LLM(LLMConfig(**TINY)), LLM(c), torch.randint(0, 125, (2, 50))
    lora.load_state_dict(base.state_dict(), strict=False)
    assert torch.equal(logits(lora.eval(), tokens), logits(base, tokens))
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert trained == {name for name in lora.state_dict() if "lora_" in name} and len(trained) == 3 * 3 * 2
    loss = lora(tokens).square().sum()
    loss.backward()
    assert all((p.grad is not None) == (name in trained) for name, p in lora.named_parameters())
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if name in trained:
                p.normal_(std=0.1)
    apart = logits(lora, tokens)
    merged = lora.merge()
    assert (apart - logits(base, tokens)).abs().max() > 0.05 and merged.c.lora_rank == 0
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged, tokens), apart, atol=1e-5, rtol=1e-5)


def test_every_weight_learns_and_checkpointing_changes_nothing():
    model, gradients = tiny_llm(**ALL | dict(lora_rank=0)).train(), []
    tokens, targets, document = packed_batch([some_sentences(model.c)[:3]], 120)
    for model.checkpointing in (False, True):
        model.zero_grad()
        x = model(tokens, document, voice(model, 1))
        linear_cross_entropy(x[0], model.embedding.weight, targets[0]).backward()
        assert all(p.grad.any() for p in model.parameters())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


@pytest.mark.parametrize("settings, words", [
    (dict(layers=3, pattern="GXA"), "letter 'X'"), (dict(pattern="GGA"), "3 blocks, not 10"),
    (dict(heads=5), "5 heads do not divide"), (dict(kv_heads=3), "kv_heads 3"),
    (dict(lora_rank=2, lora_matrices="query keys"), "'keys'.*down, key, out")])
def test_impossible_settings_are_told_in_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        LLM(LLMConfig(**settings | dict(codebook_size=8, width=64, ffn_width=8)))


# ------------------------------------------------------------------------------------------------------------
# Sampling

def spoken(model, prompt, seed, frames, speaker=None, **options):
    return generate_speech(model, [prompt], [seed], frames, speaker=speaker, **options)[0].tolist()


def prompts_of(model, lengths=(5, 9, 3)):
    rng = np.random.default_rng(1)
    return [sentence(model.c, rng.integers(5, 43, n).astype(np.uint8)) for n in lengths]


def test_greedy_sampling_is_the_full_forward():
    """Only codes and the end of the audio may be said, with and without a penalty for what was said before."""
    model = tiny_llm(pattern="AGA", speaker_width=12)
    prompt, speaker = prompts_of(model)[0], voice(model, 1)
    with torch.no_grad():
        model.embedding.weight[model.c.audio_eos] *= 0.1  # so that it does not end at once
    for penalty in (1.0, 1.3):
        tokens, codes = prompt[None], []
        while len(codes) < 30:
            row = logits(model, tokens, None, speaker)[0, -1]
            allowed = torch.cat((row[CHARACTERS:CHARACTERS + 50], row[model.c.audio_eos, None]))
            for code in set(codes):
                allowed[code] = allowed[code] / penalty if allowed[code] > 0 else allowed[code] * penalty
            if (new := int(allowed.argmax())) == 50:
                break
            codes.append(new)
            tokens = torch.cat((tokens, torch.tensor([[new + CHARACTERS]])), 1)
        assert spoken(model, prompt, 0, 30, speaker, temperature=0, repetition_penalty=penalty) == codes
        assert len(set(codes)) > 3


def test_a_sample_does_not_depend_on_its_neighbours():
    """Nor on how long it may become; and what streams is what comes at once."""
    model = tiny_llm(pattern="AGA")
    with torch.no_grad():
        model.embedding.weight[model.c.audio_eos] *= 3  # so that some end early
    prompts, options = prompts_of(model), dict(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.1)
    together = [codes.tolist() for codes in generate_speech(model, prompts, [1, 2, 3], 60, **options)]
    assert len(set(map(len, together))) > 1
    for n, (prompt, codes) in enumerate(zip(prompts, together)):
        alone = spoken(model, prompt, n + 1, 90, **options)
        assert alone[:len(codes)] == codes and (len(codes) == 60 or len(alone) == len(codes))
    stream, asked = stream_speech(model, prompts, [1, 2, 3], 60, **options), []
    model.blocks[0].register_forward_hook(lambda *_: asked.append(1))
    first = [next(stream) for _ in range(10)]
    assert len(asked) == 10
    for row, codes in zip(torch.stack(first, 1), together):
        assert row[row >= 0].tolist() == codes[:10]


def test_refusals():
    model, voiced = tiny_llm(context=60), tiny_llm(speaker_width=12)
    long, short = prompts_of(model, (20, 3))
    with pytest.raises(UserError, match=r"20 characters leaves room for 0\.7 s of audio in the context of 60"):
        spoken(model, long, 0, 30)
    with pytest.raises(UserError, match="--speaker"):
        spoken(voiced, short, 0, 30)
    with pytest.raises(UserError, match="without voices"):
        spoken(model, short, 0, 30, torch.ones(1, 12))
