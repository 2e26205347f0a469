"""Checkpoints to models: what a run has learnt, ready to speak, to be scored or to be trained further."""

import hashlib
import inspect
import sys
from dataclasses import fields
from pathlib import Path

import torch

from model import LLM, CodecConfig, CodecLM, FlowConfig, FlowTTS, LLMConfig
from trivox import echolancer
from trivox.common import UserError, find_checkpoint, load_checkpoint, load_weights, read_yaml
from trivox.datasets import check_codec

MODELS = {"flow": (FlowTTS, FlowConfig), "codec": (CodecLM, CodecConfig), "llm": (LLM, LLMConfig)}


def read_config(ckpt):
    """The config of a run, of a checkpoint, or what is known of a file of Echolancer's, as a dict."""
    config = echolancer.CONFIG if echolancer.is_one(ckpt) else read_yaml(find_checkpoint(ckpt) / "config.yaml")
    if config.get("system") not in MODELS:
        raise UserError(f"{ckpt} is a checkpoint of the {config.get('system')!r} system, which there is not")
    return config


def load_model(ckpt, device="cpu"):
    """The model of a run folder or checkpoint, with its averaged weights, or of a file of Echolancer's; an adapter is
    merged into the model that it was trained on. Returns (model, the config it was trained with, a dict).

    Raises UserError for a damaged checkpoint, and for an adapter whose base is not there, or not what it was.
    """
    if echolancer.is_one(ckpt):
        return echolancer.load(ckpt).eval().to(device), echolancer.CONFIG
    folder = find_checkpoint(ckpt)
    system = read_config(ckpt)["system"]
    config, weights = load_checkpoint(folder, system, "ema")
    code = folder.parent.parent / "code" / "model.py"
    if code.exists() and without_imports(code) != without_imports(inspect.getfile(LLM)):
        print(f"note: model.py is not what this run was started with: that is {code}", file=sys.stderr)
    build, settings = MODELS[system]
    model = build(settings(**{f.name: config[f.name] for f in fields(settings) if f.name in config}))
    if config.get("lora_rank"):
        base, found = load_model(config["init_from"])[0].state_dict(), weights.pop("base")
        if not torch.equal(found, digest(base)):
            raise UserError(f"{folder} is an adapter for another model than is now at {config['init_from']}")
        weights = base | weights
    load_weights(model, weights, folder / "ema.safetensors")
    model = model.eval().to(device)
    return model.merge() if system == "llm" else model, config


def without_imports(path):
    """The lines of a source file but for imports: where files lie does not change a model."""
    return [line for line in Path(path).read_text().splitlines() if not line.startswith(("import ", "from "))]


def codec_of(ckpt, config):
    """The codec that a checkpoint's tokens are of, as `load_codec` takes it: RUN/codec, in which the trainer keeps it,
    the folder of its data set, or, for Echolancer's files, its name."""
    if echolancer.is_one(ckpt):
        return config["codec"]
    kept = find_checkpoint(ckpt).parent.parent / "codec"
    return kept if kept.exists() else config["data_dir"]


def initial_weights(model, source, data_dir):
    """Load the weights of `source`, any LLM that `load_model` reads, to train on; voices and adapters that it does not
    have begin as nothing. Raises UserError where they do not fit the model or the codec of the tokens at `data_dir`."""
    if (system := read_config(source)["system"]) != "llm":
        raise UserError(f"{source} is a checkpoint of the {system!r} system, not of 'llm'")
    before, _ = load_model(source)
    weights = before.state_dict()
    if not echolancer.is_one(source):
        check_codec(data_dir, codec_of(source, {"data_dir": data_dir}))
    new = {key: value for key, value in model.state_dict().items()
           if key not in weights and ("lora_" in key or "speaker_" in key or "to_gamma_beta" in key)}
    load_weights(model, weights | new, source)
    for name in "activation", "alibi", "heads", "kv_heads", "negative_eigenvalues":  # which shapes do not tell
        if (here := getattr(model.c, name)) != (there := getattr(before.c, name)):
            raise UserError(f"{name} is {there} in {source}, and {here} in this config")
    if model.c.lora_rank and any("lora_" not in key for key in new):
        raise UserError(f"an adapter learns no voices, and {source} has none: fine-tune it with speaker_width first")


def digest(weights):
    """SHA-256 of a state dict but for adapters in it, as a tensor (32,) uint8."""
    sha = hashlib.sha256()
    for key in sorted(key for key in weights if "lora_" not in key):
        sha.update(weights[key].detach().cpu().contiguous().numpy().tobytes())
    return torch.tensor(list(sha.digest()), dtype=torch.uint8)


def cast_matrices(model, dtype):
    """The same model with its matrices, and the norms of its blocks, in a dtype, in place: a decoding step mostly waits
    for them to be read, and for casts."""
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or name.startswith("blocks.") and "norm" in name:
            module.to(dtype)
    return model
