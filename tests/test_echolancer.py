"""echolancer.py: published files, written by hand, and what their keys and formulas give."""

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_llm, voice

from trivox import echolancer
from trivox.checkpoints import initial_weights, load_model
from trivox.common import UserError


def logits(model, *args):
    with torch.no_grad():
        return model(*args) @ model.embedding.weight.T


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_published_file_that_is_not_finite(bad, tmp_path):
    state = echolancer.to_theirs(tiny_llm())
    state["decoder.dec.layers.1.ffn.linear2.weight"][3, 5] = bad
    torch.save({"model_state_dict": state}, path := tmp_path / "bad.pt")
    for load in (load_model, lambda path: initial_weights(tiny_llm(), path, tmp_path)):
        with pytest.raises(UserError, match="decoder.dec.layers.1.ffn.linear2.weight in .*bad.pt has numbers"):
            load(path)


def test_nothing_in_a_published_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "trap"), "w")

    torch.save({"model_state_dict": {"combined_emb.weight": Trap()}}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="cannot read"):
        echolancer.load(tmp_path / "bad.pt")
    assert not (tmp_path / "trap").exists()
