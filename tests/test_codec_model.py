"""The codec LM: blocks against transformers' with the same weights, the cached forward against the full one, the delay
pattern against MusicGen's."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import CODEC_LM as TINY, tiny_codec_lm

from model import (CausalAttention, CodecConfig, CodecLM, GatedDeltaNet, Mamba2, decayed_attention, delay, rotary,
                   undelay)
from trivox.common import UserError, read_yaml

def tokens_like(model, B, S):
    return torch.randint(0, model.symbols, (B, S, model.c.codebooks))


# ------------------------------------------------------------------------------------------------------------
# The delay pattern

@pytest.mark.parametrize("Q", [1, 2, 5, 9])
@pytest.mark.parametrize("T", [0, 1, 4, 17])
def test_delay_is_undone_and_musicgens(Q, T):
    from types import SimpleNamespace

    from transformers import MusicgenForCausalLM

    torch.manual_seed(0)
    codes = torch.randint(0, 20, (2, T, Q))
    delayed = delay(codes, bos=21, pad=21)
    assert torch.equal(undelay(delayed), codes) and delayed.shape == (2, T + Q, Q)

    if T + Q >= 2 * Q - 1:  # MusicGen leaves shorter ones alone
        decoder = SimpleNamespace(num_codebooks=Q, config=SimpleNamespace(audio_channels=1))
        front = torch.cat((torch.full((2, 1, Q), 21), codes), 1).mT.reshape(2 * Q, -1)
        _, pattern = MusicgenForCausalLM.build_delay_pattern_mask(decoder, front, 21, T + Q)
        assert torch.equal(delayed.mT.reshape(2 * Q, -1), pattern)

    told_apart, codes = delay(codes, bos=21, pad=20), torch.full((T + Q, Q), -1)
    for q in range(Q):
        codes[:1 + q, q], codes[1 + q + T:, q] = 21, 20
    assert torch.equal(told_apart >= 20, (codes >= 20).expand_as(told_apart))
    assert torch.equal(told_apart[0][codes >= 20], codes[codes >= 20])


# ------------------------------------------------------------------------------------------------------------
# Blocks

def output(mixer, x):
    """Of a mixer alone, outside of training and in it, where a CPU takes other paths."""
    position = torch.arange(x.shape[1])
    rope = rotary(position[None], 32, 10000.0)
    with torch.no_grad():
        y = mixer(x, position, rope)
    torch.testing.assert_close(mixer(x.clone().requires_grad_(), position, rope), y, atol=1e-5, rtol=1e-4)
    return y


@pytest.mark.parametrize("negative", [False, True])
def test_gdn_is_olmo_hybrids(negative):
    from transformers import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    torch.manual_seed(0)
    theirs = OlmoHybridGatedDeltaNet(OlmoHybridConfig(
        hidden_size=64, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=24,
        linear_value_head_dim=48, linear_allow_neg_eigval=negative, num_hidden_layers=4), 0)
    ours = GatedDeltaNet(CodecConfig(**TINY | dict(negative_eigenvalues=negative)))
    weights = {name: p.detach() + 0.3 * torch.randn_like(p) for name, p in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    ours.load_state_dict({
        "input.weight": torch.cat([weights[f"{name}_proj.weight"] for name in "qkvgab"]),
        "conv": weights["conv1d.weight"][:, 0].T, "A_log": weights["A_log"], "dt_bias": weights["dt_bias"],
        "norm.weight": weights["o_norm.weight"], "out.weight": weights["o_proj.weight"]})
    x = torch.randn(2, 77, 64)
    with torch.no_grad():
        wanted = theirs(x)
    assert wanted.std() > 0.1
    torch.testing.assert_close(output(ours, x), wanted, atol=1e-4, rtol=0)


def test_mamba2_is_transformers():
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    theirs = Mamba2Mixer(Mamba2Config(hidden_size=64, expand=2, head_dim=64, num_heads=2, state_size=128, n_groups=1,
                                      num_hidden_layers=1, use_bias=False, layer_norm_epsilon=1e-6, chunk_size=16), 0)
    ours = Mamba2(CodecConfig(**TINY))
    weights = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    own = {"input.weight": "in_proj.weight", "conv_bias": "conv1d.bias", "A_log": "A_log", "dt_bias": "dt_bias",
           "skip": "D", "norm.weight": "norm.weight", "out.weight": "out_proj.weight"}
    ours.load_state_dict({name: weights[other] for name, other in own.items()}
                         | {"conv": weights["conv1d.weight"][:, 0].T})
    x = torch.randn(2, 77, 64)
    with torch.no_grad():
        wanted = theirs(x)
    assert wanted.std() > 0.1
    torch.testing.assert_close(output(ours, x), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("T", [1, 64, 100])
def test_decayed_attention_is_the_float64_loop(T):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, T, 5), torch.randn(2, T, 5), torch.randn(2, T, 3, 4)
    g, state = -torch.rand(2, T, 3) ** 4 * 20, torch.randn(2, 3, 5, 4)
    S, o = state.double(), []
    for t in range(T):
        S = g[:, t].double().exp()[..., None, None] * S + k[:, t, None, :, None].double() * v[:, t, :, None].double()
        o.append((q[:, t, None, :, None].double() * S).sum(2))
    torch.testing.assert_close(decayed_attention(q, k, v, g, state).double(), torch.stack(o, 1), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(state.double(), S, atol=2e-5, rtol=1e-4)


def test_attention_is_qwen3s():
    """Grouped queries, norms of queries and keys, rotation."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    torch.manual_seed(0)
    config = Qwen3Config(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                         attn_implementation="sdpa")
    theirs, ours = Qwen3Attention(config, 0), CausalAttention(CodecConfig(width=128, heads=4, kv_heads=2))
    weights = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    ours.load_state_dict({"input.weight": torch.cat([weights[f"{name}_proj.weight"] for name in "qkv"]),
                          "query_norm.weight": weights["q_norm.weight"], "key_norm.weight": weights["k_norm.weight"],
                          "out.weight": weights["o_proj.weight"]})
    x = torch.randn(2, 40, 128)
    with torch.no_grad():
        wanted, _ = theirs(x, Qwen3RotaryEmbedding(config)(x, torch.arange(40)[None]), None)
    torch.testing.assert_close(output(ours, x), wanted, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("mixer", ["attention", "gdn", "delta", "mamba2"])
def test_cached_decoding_is_the_full_forward(mixer):
    """A prompt at once, the rest step by step; with text."""
    model = tiny_codec_lm(mixer=mixer, attn_every=0, cross_every=2)
    tokens, text, length = tokens_like(model, 2, 300), torch.randint(0, 259, (2, 30)), torch.tensor([30, 11])
    with torch.no_grad():
        logits = model.logits(model(tokens, text, length)[0])
        read, _ = model.read_text(text, length)
        cache = model.empty_cache(2, 300)
        steps = [model.hidden(tokens[:, :70], read, cache)]
        steps += [model.hidden(tokens[:, t:t + 1], read, cache) for t in range(70, 300)]
        cached = model.heads(torch.cat(steps, 1)).view_as(logits)
    assert logits.std() > 0.5 and int(cache[0]) == 300
    torch.testing.assert_close(cached, logits, atol=1e-4, rtol=0)


def test_no_step_sees_the_next_ones():
    model = tiny_codec_lm(pattern="GADM", layers=4)
    tokens = tokens_like(model, 1, 150)
    changed = tokens.clone()
    changed[:, 90:] = tokens_like(model, 1, 60)
    with torch.no_grad():
        a, b = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :90], b[:, :90], atol=1e-5, rtol=0)
    assert (a[:, 90:] - b[:, 90:]).abs().amin((0, 2)).max() > 0 and (a[:, 90] - b[:, 90]).abs().max() > 0.1


def test_beyond_the_context_the_ring_forgets():
    """One block of attention with a ring of 16: after 40 steps it gives what the last 16 alone give."""
    model = tiny_codec_lm(pattern="A", layers=1)
    tokens = tokens_like(model, 1, 40)
    with torch.no_grad():
        cache = model.empty_cache(1, 16)
        for t in range(40):
            last = model.hidden(tokens[:, t:t + 1], cache=cache)
        torch.testing.assert_close(last[:, 0], model.hidden(tokens[:, 24:])[:, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [dict(pattern="GADM", layers=4, cross_every=2, dropout=0.0), dict(mixer="delta")])
def test_every_weight_learns_and_checkpointing_changes_nothing(options):
    model = tiny_codec_lm(**options).train()
    tokens, text, gradients = tokens_like(model, 2, 40), (), []
    if model.c.cross_every:
        text = torch.randint(0, 259, (2, 9)), torch.tensor([9, 4]), torch.tensor([2.0, 1.0])
    for model.checkpointing in (False, True):
        model.zero_grad()
        x, log_seconds = model(tokens, *text)
        loss = F.cross_entropy(model.logits(x)[:, :-1].flatten(0, 2), tokens[:, 1:].flatten())
        (loss + (log_seconds.square().sum() if text else 0)).backward()
        assert all(p.grad.any() for p in model.parameters())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


def test_the_clock_follows_the_seconds():
    """The same text said twice as slowly is looked at at half the pace; without seconds, at the predicted one."""
    model = tiny_codec_lm(cross_every=1)
    text, length = torch.randint(0, 259, (1, 12)), torch.tensor([12])
    with torch.no_grad():
        (_, _, pace), log_seconds = model.read_text(text, length)
        (_, _, given), _ = model.read_text(text, length, 2 * log_seconds.exp())
    torch.testing.assert_close(pace, 12 / (log_seconds.exp() * model.c.frame_rate))
    torch.testing.assert_close(given, pace / 2)


@pytest.mark.parametrize("published, total", [("codec_ljspeech", 21_904_648), ("codec_music_300m", 294_263_072)])
def test_published_sizes(published, total):
    """To the last parameter, and baselines within 2 %."""
    paths = sorted((ROOT / "configs").glob(f"{published}*.yaml"))
    for path in paths:
        settings = read_yaml(path)
        c = CodecConfig(**{f.name: settings[f.name] for f in fields(CodecConfig) if f.name in settings})
        with torch.device("meta"):
            size = sum(p.numel() for p in CodecLM(c).parameters())
        assert c.cross_every or abs(size / total - 1) < (0.02 if path.stem != published else 1e-12), path.stem
    assert len([path for path in paths if "text" not in path.stem]) == 5


@pytest.mark.parametrize("settings, layout", [
    (dict(layers=8), "GGGAGGGA"), (dict(layers=6), "GGGAGA"), (dict(layers=6, last_layer_attention=False), "GGGAGG"),
    (dict(layers=3, attn_every=0, mixer="delta", last_layer_attention=False), "DDD"),
    (dict(mixer="attention"), "A" * 8), (dict(layers=5, pattern="AGDMG"), "AGDMG")])
def test_layout(settings, layout):
    assert CodecConfig(**settings).layout == layout


@pytest.mark.parametrize("settings, words", [
    (dict(layers=3, pattern="GXA"), "letter 'X'"), (dict(pattern="GGA"), "3 blocks, not 8"),
    (dict(heads=5, kv_heads=1), "5 heads do not divide the width 384"), (dict(kv_heads=4), "kv_heads 4"),
    (dict(width=48, heads=2, mixer="mamba2"), "width 48"), (dict(cross_every=2, text_width=100), "text_width 100")])
def test_impossible_settings_are_told_in_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        CodecConfig(**settings)
