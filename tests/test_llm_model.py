"""The LLM TTS's decoder: published sizes, caches, packing, LoRA, voices, FlexAttention."""

from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import LLM_TTS as TINY, tiny_llm, voice

import model as model_module
from model import LLM, LLMConfig, LoRALinear, alibi_score, alibi_slopes, flex_mask, packed_batch, sentence
from trivox.common import UserError, read_yaml
from trivox.cross_entropy import linear_cross_entropy

ALL = dict(macaron=True, pattern="GAG", alibi="standard", activation="gelu", speaker_width=12, lora_rank=4,
           lora_matrices="query up input")


def logits(model, *args, **kw):
    with torch.no_grad():
        return model(*args, **kw) @ model.embedding.weight.T


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
        linear_cross_entropy(x[0], model.embedding.weight, targets[0, :, None])[0].backward()
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
