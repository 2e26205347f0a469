"""Checkpoints to models: what a run has learnt, ready to speak, to be scored or to be trained further."""

import hashlib
import inspect
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

from model import LLM, CodecConfig, CodecLM, FlowConfig, FlowTTS, LLMConfig
from trivox import echolancer
from trivox.alphabet import FIRST, SYMBOLS
from trivox.codecs import read_codec
from trivox.common import UserError, read_yaml
from trivox.recipes import complete
from trivox.run_folder import check_shapeless, find_checkpoint, load_checkpoint, load_weights

MODELS = {"flow": (FlowTTS, FlowConfig), "codec": (CodecLM, CodecConfig), "llm": (LLM, LLMConfig)}


def read_config(ckpt):
    """The config of a run, of a checkpoint, or what is known of a file of Echolancer's, as a dict. Settings that there
    were not yet have their defaults."""
    if echolancer.is_one(ckpt):
        return echolancer.CONFIG
    config = read_yaml(path := find_checkpoint(ckpt) / "config.yaml")
    if config.get("system") not in list(MODELS):
        raise UserError(f"{ckpt} is a checkpoint of the {config.get('system')!r} system, which there is not")
    return complete(config, path)


def load_model(ckpt, device="cpu"):
    """The model of a run folder or checkpoint, with its averaged weights, or of a file of Echolancer's; an adapter is
    merged into the model that it was trained on. Returns (model, the config it was trained with, a dict).

    Raises UserError for a damaged checkpoint, and for an adapter whose base is not there, or not what it was.
    """
    if echolancer.is_one(ckpt):
        return echolancer.load(ckpt).eval().to(device), echolancer.CONFIG
    folder, config = find_checkpoint(ckpt), read_config(ckpt)
    system = config["system"]
    _, weights = load_checkpoint(folder, system, "ema")
    code = folder.parent.parent / "code" / "model.py"
    if code.exists() and without_imports(code) != without_imports(inspect.getfile(LLM)):
        print(f"note: model.py is not what this run was started with: that is {code}", file=sys.stderr)
    build, settings = MODELS[system]
    check_sizes(settings, config, weights, folder)
    model = build(settings(**{f.name: config[f.name] for f in fields(settings)}))
    if config.get("lora_rank"):
        _, base = find_base(config["init_from"], folder, weights.pop("base", None))
        weights = base | weights
    load_weights(model, weights, folder / "ema.safetensors")
    model = model.eval().to(device)
    return model.merge() if system == "llm" else model, config


SIZES = ("layers", "text_layers", "width", "ffn_width", "text_width", "byt5_width", "n_mels", "patch", "heads",
         "codebooks")


def check_sizes(settings, config, weights, source):
    """Raises UserError for sizes far beyond those of the weights: such a model would fill the memory before it turned
    out not to be theirs."""
    most = 4 * max([1024, len(weights), *(n for x in weights.values() for n in x.shape)])
    for f in fields(settings):
        if f.name in SIZES and config[f.name] > (len(weights) if f.name.endswith("layers") else most):
            raise UserError(f"{f.name} {config[f.name]:,} in the config of {source} is not that of its weights: "
                            "another model?")


def find_base(path, adapter, wanted):
    """What an adapter, a checkpoint folder, was trained on, by its digest: where it was, or, if both were moved, in the
    same place beside the run. Returns (the checkpoint, its weights). UserError where it is in neither."""
    path, run = Path(path), adapter.resolve().parent.parent
    beside = [above / Path(*path.parts[-n:]) for above in run.parents for n in (3, 2, 1)]
    faults = []
    for place in dict.fromkeys((path, *beside)):
        if place == adapter or not (echolancer.is_one(place) or place.exists() and any(place.rglob("*.safetensors"))):
            continue
        try:
            weights = load_model(place)[0].state_dict()
        except UserError as e:  # the right one may be in another place
            faults.append(str(e))
            continue
        if wanted is not None and torch.equal(wanted, digest(weights)):
            return place, weights
        faults.append(f"{adapter} is an adapter for another model than is now at {place}: put the one that it was "
                      "trained on there, or beside the run as it was")
    raise UserError(faults[0] if faults else f"the model that the adapter in {run} was trained on is gone: it was "
                    f"{path}. Put it there, or beside the run as it was")


def keep_base(source, run, checkpoint):
    """The absolute path of the checkpoint that an adapter is trained on in the folder `run`, of `source`, or of
    `checkpoint`, an adapter to go on with. There a file `kept_for` keeps it from being deleted by its own run."""
    if checkpoint:
        before = read_yaml(checkpoint / "config.yaml")
        if not before.get("lora_rank"):
            raise UserError(f"{checkpoint} is no adapter, and cannot go on as one: --init_from {run} with another "
                            "--out_dir begins one on it")
        _, weights = load_checkpoint(checkpoint, "llm", "ema")
        return str(find_base(before["init_from"], checkpoint, weights.get("base"))[0].resolve())
    if echolancer.is_one(source):
        return str(Path(source).resolve())
    folder = find_checkpoint(source)
    try:
        (folder / "kept_for").write_text(f"{Path(run).resolve()}\n", encoding="utf-8", errors="surrogateescape")
    except OSError as e:
        print(f"note: {folder} cannot be kept from being deleted by its own run ({e.strerror})")
    return str(folder)


def without_imports(path):
    """The lines of a source file but for imports: where files lie does not change a model."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith(("import ", "from "))]


def codec_of(ckpt, config):
    """The codec that a checkpoint's tokens are of, as `load_codec` takes it: RUN/codec, in which the trainer keeps it,
    the folder of its data set, or, for Echolancer's files, its name. Raises UserError where it is another by now."""
    if echolancer.is_one(ckpt):
        return config["codec"]
    kept = find_checkpoint(ckpt).parent.parent / "codec"
    if not kept.exists():
        kept = config["data_dir"]
    if Path(kept).is_dir() and (lacks := differs(read_codec(kept), config)):
        key, here, there = lacks
        raise UserError(f"{ckpt} was trained on tokens of {key} {there}, but the codec at {kept} has {here}: put back "
                        "the one that it was trained with, or its config.yaml")
    return kept


def differs(codec, config):
    """The first setting of a codec that is not the config's: (key, the codec's, the config's); None where all are."""
    for key in "codec", "sample_rate", "frame_rate":
        here, there = codec[key], config[key]
        if abs(here - there) > 0.01 if key == "frame_rate" else here != there:
            return key, here, there
    return None


def check_codec(folder, ckpt):
    """Raises UserError where the tokens at `folder` are not of the codec that a checkpoint was trained on, as its
    config and RUN/codec tell, where the centroids of a codec of our own are kept."""
    if echolancer.is_one(ckpt):  # which does not tell
        return
    before, codec, kept = read_config(ckpt), read_codec(folder), find_checkpoint(ckpt).parent.parent / "codec"
    if lacks := differs(codec, before):
        key, here, there = lacks
        raise UserError(f"{ckpt} was trained on tokens of {key} {there}, but those at {folder} have {here}: name "
                        "tokens of its own codec by --data_dir")
    mine, theirs = (Path(place) / "codec.safetensors" for place in (kept, folder))
    if theirs.exists() and not mine.exists():
        raise UserError(f"{mine} is gone, which tells whether the tokens at {folder} are of the codec of {ckpt}: put "
                        "it there again, with codec.json, from the data set that it was trained on")
    if mine.exists() and not theirs.exists():
        raise UserError(f"{theirs}, the codec of the tokens there, is gone: tokenize again")
    if mine.exists() and mine.read_bytes() != theirs.read_bytes():
        raise UserError(f"the codec that made the tokens at {folder} was fitted anew: it is not that of {kept}; "
                        "data.py tokenize --codec takes the folder of one to use again")


def initial_weights(model, source, data_dir):
    """Load the weights of `source`, any LLM that `load_model` reads, to train on; voices and adapters that it does not
    have begin as nothing. Raises UserError where they do not fit the model or the codec of the tokens at `data_dir`."""
    if (system := read_config(source)["system"]) != "llm":
        raise UserError(f"{source} is a checkpoint of the {system!r} system, not of 'llm'")
    before, _ = load_model(source)
    weights = before.state_dict()
    check_codec(data_dir, source)
    if model.c.characters != before.c.characters:
        weights["embedding.weight"] = embedding_for(model, before, source)
    new = {key: value for key, value in model.state_dict().items()
           if key not in weights and ("lora_" in key or "speaker_" in key or "to_gamma_beta" in key)}
    load_weights(model, weights | new, source)
    check_shapeless(model.c, asdict(before.c) | {"characters": model.c.characters}, source)
    if model.c.lora_rank and any("lora_" not in key for key in new):
        raise UserError(f"an adapter learns no voices, and {source} has none: fine-tune it with speaker_width first")


def characters_of(c, checkpoint, symbols):
    """The characters that a model to be trained reads: those of its config, or where that says auto, those of the run's
    `checkpoint`, else of the model that it begins with and then those of its data set, `symbols`, that are new."""
    if c.characters != "auto":
        return c.characters
    if checkpoint:
        return read_yaml(checkpoint / "config.yaml").get("characters", SYMBOLS)
    known = read_config(c.init_from).get("characters", SYMBOLS) if c.init_from else ""
    return known + "".join(x for x in symbols if x not in known)


def embedding_for(model, before, source):
    """The embedding of `before`, the model of `source`, in the characters of `model`. Those that are new to it begin as
    `model` has them. That is said, and which there are no more."""
    here, there = model.c, before.c
    old, new = before.embedding.weight.detach(), model.embedding.weight.detach().clone()
    if here.lora_rank:
        raise UserError(f"an adapter learns no characters, and {source} reads {there.characters!r}, where this model "
                        f"reads {here.characters!r}: fine-tune it without lora_rank first")
    if (old.shape[1], there.codebook_size) != (new.shape[1], here.codebook_size):
        return old  # of another size, which is told where weights are loaded
    known = [c for c in here.characters if c in there.characters]
    rows = [[*range(FIRST), *(FIRST + c.characters.index(x) for x in known), *range(c.first_code, len(weights))]
            for c, weights in ((here, new), (there, old))]
    new[rows[0]] = old[rows[1]]
    for some, others, became in ((here, there, f"are new to {source}, and are learnt from nothing"),
                                 (there, here, f"are those of {source} that this model will not read")):
        if found := "".join(c for c in some.characters if c not in others.characters):
            print(f"note: the characters {found!r} {became}")
    return new


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
