"""From a checkpoint of the LLM TTS to what others read.

    python export.py --ckpt runs/llm_demo --onnx speech          speech/speak.py then speaks without PyTorch
    python export.py --ckpt runs/llm_demo --onnx speech --int8   with weights of 8 bits
    python export.py --ckpt runs/llm_lora --merge runs/merged    an adapter and the model that it is for, as one
    python export.py --ckpt runs/llm_177m --echolancer FILE.pt   a checkpoint as Echolancer's own code loads it

model.onnx is prefill and decoding step in one: it reads any number of tokens and a cache of any capacity.

    tokens (1, T) int64, position () int64      the steps that the cache holds already
    voice (norms, 2, D)                         of models with voices: γ and β of each norm, from voice.onnx
    key_i, value_i (1, KV heads, S, head width) of block i where it is attention: steps beyond `position` do not count
    conv_i (1, 3, channels), state_i (1, H, K, V)   and where it is recurrent; then T is 1
    -> logits (1, codebook_size + 1)            of the codes and, last, of the end of the audio
    -> new_key_i, new_value_i (1, KV heads, T, head width), to be written into the cache at `position`
    -> new_conv_i, new_state_i

voice.onnx: embedding (1, speaker_width) -> voice. What speak.py reads besides is in config.json and codec.npz, or for
NeuCodec codec.onnx: codes (1, 1, n) int64 -> (1, 1, samples). Texts are read by copies of this repository's own files,
in the folder trivox, and requirements.txt names the packages that all this needs.
"""

import argparse
import io
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

from trivox import echolancer  # first: from here on Ctrl-C is quiet

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file

from trivox.alphabet import SYMBOLS
from trivox.audio import mel_filters
from trivox.codecs import load_codec
from trivox.checkpoints import codec_of, load_model, read_config
from trivox.common import Folder, UserError, flag, run, some_path
from trivox.files import holds_nothing, whole_folder, write_whole
from trivox.options import SAMPLING, read_options
from trivox.run_folder import find_checkpoint
from trivox.speak import speech_limit
from trivox.voices import read_voice

ROOT = Path(__file__).parent
TEXT_ROOMS = ("__init__", "alphabet", "chinese", "dates", "errors", "foreign", "markup", "normalise", "numerals",
              "quantities", "sentences", "units", "usage")  # what a text goes through, none of which imports torch
# Which speak.py and they import
PACKAGES = "onnxruntime", "numpy", "num2words", "anyascii", "emoji", "sentencex"

# ------------------------------------------------------------------------------------------------------------
# ONNX

class CachedAttention(nn.Module):
    """ALiBiAttention with its past as an input. Nothing of the past is copied: its scores and those of the new steps
    are made apart and meet in one softmax."""

    def __init__(self, attention):
        super().__init__()
        self.inner = attention

    def forward(self, x, position, look, state, starts=None):
        """look: distances from the T new steps to the past, (T, S), and to each other, (T, T), -inf where not to look.
        state: keys and values (1, KV heads, S, head_width), and a list that the new ones are appended to."""
        a, (past_k, past_v, new), T = self.inner, state, x.shape[1]
        q, k, v = (f(x).unflatten(-1, (-1, a.head_width)).transpose(1, 2) for f in (a.query, a.key, a.value))
        new += [k, v]
        q = (q * a.head_width ** -0.5).unflatten(1, (a.kv_heads, -1))  # (1, KV, H / KV, T, head_width)
        slopes, group, S = a.slopes.view(a.kv_heads, -1, 1, 1), q.shape[2], past_k.shape[2]
        scores = [(q.flatten(2, 3) @ keys.mT).unflatten(2, (group, T)) + slopes * distance
                  for keys, distance in zip((past_k, k), look)]
        p = torch.cat(scores, -1).softmax(-1).flatten(2, 3)
        y = p[..., :S] @ past_v + p[..., S:] @ v
        return a.out(y.unflatten(2, (group, T)).flatten(1, 2).transpose(1, 2).flatten(2))


class CachedDeltaNet(nn.Module):
    """GatedDeltaNet, a step at a time, which appends its new state to a list."""

    def __init__(self, mixer):
        super().__init__()
        self.inner = mixer

    def forward(self, x, position, look, state, starts=None):
        *past, new = state
        new += [part.clone() for part in past]
        return self.inner(x, position, None, new)


class Step(nn.Module):
    """What model.onnx computes; arguments and results are listed above. Takes the model's blocks over."""

    def __init__(self, model, int8):
        super().__init__()
        self.c, self.blocks, self.embedding, self.int8 = model.c, model.blocks, model.embedding, int8
        for letter, block in zip(self.c.layout, self.blocks):
            block.mixer = (CachedAttention if letter == "A" else CachedDeltaNet)(block.mixer)
        if int8:  # a second table to be looked up in; that which is multiplied by becomes one of 8 bits later
            scale = model.embedding.weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
            self.register_buffer("scale", scale)
            self.register_buffer("table", (model.embedding.weight / scale).round().to(torch.int8))
            codes = [*range(self.c.first_code, self.c.first_code + self.c.codebook_size), self.c.audio_eos]
            self.register_buffer("head", model.embedding.weight[codes].T.contiguous())
            self.embedding = None

    def forward(self, tokens, position, voice, states):
        c, step = self.c, torch.arange(tokens.shape[1])
        S = max([state[0].shape[2] for state, letter in zip(states, c.layout) if letter == "A"], default=1)
        slot, own = torch.arange(S)[None], (step[None] - step[:, None]).float()
        past = (slot - position - step[:, None]).float().masked_fill(slot >= position, -torch.inf)
        look = past, own.masked_fill(own > 0, -torch.inf)
        x = self.table[tokens].float() * self.scale[tokens[..., None], 0] if self.int8 else self.embedding(tokens)
        news, n = [], 0
        for block, state in zip(self.blocks, states):
            says = voice if voice is None else voice[n:n + len(block.norms)].unbind(0)
            n += len(block.norms)
            news.append([])
            x = block(x, position, look, (*state, news[-1]), None, says)
        if self.int8:
            return (x[:, -1:] @ self.head)[:, 0], news
        logits = F.linear(x[:, -1], self.embedding.weight)  # the whole table, which the file then holds once
        return torch.cat((logits[:, c.first_code:][:, :c.codebook_size], logits[:, c.audio_eos, None]), 1), news


class Voice(nn.Module):
    """What voice.onnx computes: an embedding (1, speaker_width) -> (norms, 2, D)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, embedding):
        return torch.stack([torch.cat(says)[:, 0] for block in self.model.read_speaker(embedding) for says in block])


def write_onnx(module, args, path, inputs, outputs, dynamic=None):
    """Export to an ONNX file, with the weights in another beside it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(module.eval(), args, path, dynamo=True, input_names=inputs, output_names=outputs,
                          dynamic_shapes=dynamic, optimize=True, verbose=False, external_data=True)


def export_onnx(model, config, codec, folder, int8):
    """Write model.onnx, voice.onnx, config.json, the codec, and speak.py with what it imports, into a folder. int8:
    matrices of 8 bits, with a scale for each 128 weights of an output; what they multiply is rounded in such blocks
    too, so that the outliers of ReLU² spoil no more than their own block. The model is of no further use."""
    c = model.c
    folder.mkdir(parents=True, exist_ok=True)
    if c.speaker_width:
        write_onnx(Voice(model), (torch.randn(1, c.speaker_width),), folder / "voice.onnx", ["embedding"], ["voice"])
    states = [[x[:, :, :7] if letter == "A" else x for x in block.mixer.empty_state(1, 7)]
              for letter, block in zip(c.layout, model.blocks)]
    parts = {"A": ("key", "value"), "G": ("conv", "state")}
    names = [f"{part}_{i}" for i, letter in enumerate(c.layout) for part in parts[letter]]
    norms = sum(len(block.norms) for block in model.blocks)
    steps, capacity = torch.export.Dim("steps", min=1, max=c.context), torch.export.Dim("capacity", min=1)
    recurrent = "G" in c.layout
    args = (torch.zeros(1, 1 if recurrent else 5, dtype=torch.long), torch.tensor(3),
            torch.randn(norms, 2, c.width) if c.speaker_width else None, states)
    dynamic = ({} if recurrent else {1: steps}, {}, {} if c.speaker_width else None,
               [[{2: capacity} if letter == "A" else {}] * 2 for letter in c.layout])
    write_onnx(Step(model, int8), args, folder / "model.onnx",
               ["tokens", "position", *["voice"] * bool(c.speaker_width), *names],
               ["logits", *(f"new_{name}" for name in names)], dynamic)
    if int8:
        quantise(folder / "model.onnx")
    options = read_options("llm", config, {})
    shapes = {name: list(x.shape) for name, x in zip(names, (x for state in states for x in state))}
    about = {"characters": c.characters, "language": config.get("language", "en"), "codebook_size": c.codebook_size,
             "context": c.context, "sentence": speech_limit(c), "audio_bos": c.audio_bos, "frame_rate": c.frame_rate,
             "states": shapes, "one_by_one": recurrent, "speaker_width": c.speaker_width,
             "sample_rate": codec.sample_rate, "seconds": config["eval_seconds"],
             **{name: options[name] for name in SAMPLING}}
    export_codec(codec, folder)
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    export_script(folder)


def export_script(folder):
    """speak.py, the files of this repository that it reads texts by, and requirements.txt, at the versions of ours."""
    shutil.copy(ROOT / "trivox" / "speak_onnx.py", folder / "speak.py")
    (folder / "trivox").mkdir(exist_ok=True)
    for room in TEXT_ROOMS:
        shutil.copy(ROOT / "trivox" / f"{room}.py", folder / "trivox")
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    wanted = [line for line in lines if line.partition("==")[0] in PACKAGES]
    (folder / "requirements.txt").write_text("".join(wanted), encoding="utf-8")


def quantise(path):
    """Give an ONNX file's matrices 8 bits, in place."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    how = DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=True, accuracy_level=4, bits=8)
    quantiser = MatMulNBitsQuantizer(onnx.load(path), algo_config=how)
    quantiser.process()
    for old in path.parent.glob("model.onnx*"):
        old.unlink()
    large = quantiser.model.model.ByteSize() > 2 ** 31 - 2 ** 20
    quantiser.model.save_model_to_file(path, use_external_data_format=large)


def export_codec(codec, folder):
    """codec.npz for mel_rvq: log-mels of its codes, mel filters and STFT; codec.onnx for NeuCodec."""
    if codec.name == "mel_rvq":
        np.savez(folder / "codec.npz", mels=codec.mels(torch.arange(codec.codebook_size)[:, None]).numpy(),
                 filters=mel_filters(codec.mel).numpy(), hop_length=codec.hop_length, n_fft=codec.mel.n_fft)
        return

    class Decode(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = codec.model

        def forward(self, codes):
            return self.model.decode(audio_codes=codes).audio_values

    write_onnx(Decode(), (torch.zeros(1, 1, 50, dtype=torch.long),), folder / "codec.onnx", ["codes"], ["wav"],
               ({2: torch.export.Dim("frames", min=2)},))


def is_export(folder):
    """Whether a folder holds an earlier export, by its config.json, which no other program's looks like."""
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(about, dict) and {"characters", "audio_bos", "one_by_one", "states"} <= set(about)


# ------------------------------------------------------------------------------------------------------------

def merge(ckpt, out):
    """Write the model that an adapter and its base make, as a checkpoint folder with its codec."""
    model, config = load_model(ckpt)
    if not config.get("lora_rank"):
        raise UserError(f"{ckpt} is no adapter: it has nothing to merge")
    if not holds_nothing(out):
        raise UserError(f"{out} is there already and not empty: name another folder")
    kept = find_checkpoint(ckpt).parent.parent / "codec"
    with whole_folder(out) as new:
        folder = new / "checkpoints" / "latest"
        folder.mkdir(parents=True)
        save_file({key: x.contiguous() for key, x in model.state_dict().items()}, folder / "ema.safetensors")
        merged = config | {"lora_rank": 0, "init_from": ""}
        (folder / "config.yaml").write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")
        if kept.exists():
            shutil.copytree(kept, new / "codec")
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=flag(Folder), required=True,
                        help="run or checkpoint folder, or a checkpoint of Echolancer's")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--onnx", type=some_path, help="folder for ONNX files and a script that speaks with them")
    what.add_argument("--merge", type=some_path, help="folder for a merged adapter")
    what.add_argument("--echolancer", type=some_path, help="file for a checkpoint by Echolancer's names")
    parser.add_argument("--int8", action="store_true", help="of --onnx: weights of 8 bits")
    parser.add_argument("--speaker", type=some_path,
                        help="of --onnx: a recording whose voice's embedding is put there too")
    args = parser.parse_args(argv)
    if not args.onnx and (args.int8 or args.speaker):
        raise UserError(f"{'--int8' if args.int8 else '--speaker'} is of --onnx alone: leave it out")
    config = read_config(args.ckpt)
    if config["system"] != "llm":
        raise UserError(f"{args.ckpt} is a checkpoint of the {config['system']!r} system; what is exported is 'llm'")
    if args.merge:
        merge(args.ckpt, args.merge)
    elif args.echolancer:
        model, _ = load_model(args.ckpt)
        weights = echolancer.to_theirs(model)
        if "G" in model.c.layout or model.c.speaker_width and model.speaker_mean.any():
            raise UserError("Echolancer has no recurrent blocks, and none of the voices of the embedder stats")
        if model.c.characters != SYMBOLS:
            raise UserError(f"Echolancer reads the characters {SYMBOLS!r}, and this model {model.c.characters!r}")
        read = echolancer.config(weights, args.ckpt)
        for name in "activation", "alibi", "heads", "kv_heads":
            if (here := getattr(model.c, name)) != (there := getattr(read, name)):
                raise UserError(f"{name} is {here}, and Echolancer would read a model of this size with {there}")
        torch.save({"model_state_dict": weights}, content := io.BytesIO())
        write_whole(args.echolancer, content.getbuffer())
    else:
        if not holds_nothing(args.onnx) and not is_export(args.onnx):
            raise UserError(f"{args.onnx} is not empty, and no earlier export, whose files may be overwritten: name "
                            "another folder")
        model, _ = load_model(args.ckpt)
        if args.speaker and not model.c.speaker_width:
            raise UserError(f"{args.ckpt} was trained without voices: no --speaker")
        voice = read_voice(args.speaker, config | {"speaker_width": model.c.speaker_width}) if args.speaker else None
        with whole_folder(args.onnx) as folder:
            export_onnx(model, config, load_codec(codec_of(args.ckpt, config)), folder, args.int8)
            if args.speaker:
                np.save(content := io.BytesIO(), voice.numpy())
                write_whole(folder / f"{args.speaker.stem}.npy", content.getvalue())
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
            new = {path.name for path in folder.iterdir()}
        for name in {"codec.onnx", "codec.onnx.data", "model.onnx.data"} - new:  # of an earlier export: not this one's
            (args.onnx / name).unlink(missing_ok=True)
        print(f"{args.onnx}: {size:,.0f} MB; python {args.onnx}/speak.py --text ... needs no PyTorch, but "
              f"pip install -r {args.onnx}/requirements.txt")


if __name__ == "__main__":
    run(main, sys.argv[1:])
