"""Echolancer's published checkpoints, to be spoken with, fine-tuned and exported as if they had been trained here.

https://github.com/ZDisket/Echolancer, MIT; weights on the Hugging Face hub as ZDisket/echolancer-*.
"""

import re
from pathlib import Path

import torch

from model import LLM, LLMConfig
from trivox.common import UserError
from trivox.run_folder import not_finite

CONFIG = {  # what a checkpoint's config would say, and how its authors sample
    "system": "llm", "codec": "neucodec", "sample_rate": 24000, "speaker_embedder": "ecapa", "eval_temperature": 0.8,
    "eval_top_k": 0, "eval_top_p": 0.92, "eval_repetition_penalty": 1.0, "eval_seconds": 15.0}


def is_one(path):
    """Whether a path is that of a PyTorch file; a run of this project's is a folder with safetensors."""
    return Path(path).suffix in (".pt", ".pth", ".bin") and Path(path).is_file()


def load(path):
    """The LLM in a published file. Raises UserError for a file that is damaged or something else."""
    state = read(path)
    model = LLM(config(state, path))
    model.load_state_dict(to_ours(state, model, path))
    return model


def read(path):
    """The state dict in a published file, float32, its names without what torch.compile and DDP put before them.
    Nothing in the file is executed."""
    try:
        state = torch.load(path, "cpu", weights_only=True)
        state = state.get("model_state_dict", state)
        state = {re.sub(r"^((_orig_mod|module)\.)+", "", key): x.float() for key, x in state.items()}
    except Exception as e:  # each kind of damage has its own
        raise UserError(f"cannot read {path} ({type(e).__name__}: {str(e).partition(chr(10))[0]})") from None
    if name := not_finite(state):
        raise UserError(f"{name} in {path} has numbers that are not finite: get the file anew")
    return state


def config(state, path):
    """The LLMConfig of a published state dict, from its shapes. What they do not tell is as in the three published
    models: heads of 64, ReLU² in the one of 10 blocks and GELU with dropout in the larger ones."""
    try:
        symbols, width = state["combined_emb.weight"].shape
        key, up = (state[f"decoder.dec.layers.0.{name}.weight"] for name in ("self_attn.W_k", "ffn.linear1"))
    except KeyError as e:
        raise UserError(f"{path} has no tensor {e}: is it a checkpoint of Echolancer's?") from None
    layers = sum(key.endswith("self_attn.W_q.weight") for key in state)
    macaron = "decoder.dec.layers.0.norm0.weight" in state
    return LLMConfig(
        width=width, layers=layers, heads=width // 64, kv_heads=len(key) // 64, ffn_width=len(up) * (1 + macaron),
        activation="relu2" if layers == 10 else "gelu", dropout=0.0 if layers == 10 else 0.05, macaron=macaron,
        codebook_size=symbols - 75, speaker_width=len(state.get("spk_norm.weight", ())))


def names(c):
    """{name of a weight here: its published name}, of models without recurrent blocks."""
    parts = {f"mixer.{name}": f"self_attn.W_{name[0]}" for name in ("query", "key", "value", "out")}
    parts |= {"ffn.up": "ffn.linear1", "ffn.down": "ffn.linear2"}
    norms = {"norm": "norm1", "ffn_norm": "norm3"}
    if c.macaron:
        parts |= {"first_ffn.up": "ffn0.linear1", "first_ffn.down": "ffn0.linear2"}
        norms |= {"first_norm": "norm0"}
    parts |= norms | {f"{here}.to_gamma_beta": f"{there}.to_gamma_beta" for here, there in norms.items()}
    blocks = {f"blocks.{i}.{here}.{x}": f"decoder.dec.layers.{i}.{there}.{x}"
              for i in range(c.layers) for here, there in parts.items() for x in ("weight", "bias")}
    return blocks | {"embedding.weight": "combined_emb.weight", "speaker_norm.weight": "spk_norm.weight",
                     "speaker_norm.bias": "spk_norm.bias"}


def to_theirs(model):
    """A model's weights by their published names, as Echolancer's own code loads them."""
    theirs = names(model.c)
    return {theirs[key]: x for key, x in model.state_dict().items() if key in theirs}


def to_ours(state, model, path):
    """A published state dict as one for `model`. UserError names a key that is missing, misshapen or unknown."""
    theirs, own = names(model.c), model.state_dict()
    known = {"combined_head.weight", "decoder.embed.weight", "decoder.out_proj.weight"}  # the embedding again
    for key, x in own.items():
        if key not in theirs:  # the mean and deviation of voices, which are 0 and 1 there
            continue
        if theirs[key] not in state:
            raise UserError(f"{path} has no tensor {theirs[key]!r}")
        if (there := state[theirs[key]].shape) != x.shape:
            raise UserError(f"{theirs[key]} is {tuple(there)} in {path}, but {tuple(x.shape)} in the model")
        known.add(theirs[key])
    if unknown := [key for key in state if key not in known and not key.endswith("alibi_slopes")]:
        raise UserError(f"{path} has an unknown tensor {unknown[0]!r}: is it a checkpoint of Echolancer's?")
    return {key: state[theirs[key]] if key in theirs else x for key, x in own.items()}
