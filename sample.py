"""From a checkpoint and text to a waveform.

    python sample.py --ckpt runs/flow_demo --text "The baker sold nine golden apples." --out out.wav
"""

import argparse
import re
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from audio import MelConfig, load_vocoder, write_wav
from common import (UserError, autocast, find_checkpoint, init_distributed, load_checkpoint, load_weights, pick_dtype,
                    run)
from data import MAX_TEXT_BYTES, TextFeatures, read_lines
from model import FlowConfig, FlowTTS


def mel_config(c):
    """The log-mel settings in a config."""
    return MelConfig(**{f.name: getattr(c, f.name) for f in fields(MelConfig)})


def load_flow(ckpt, device):
    """The flow TTS of a run folder or checkpoint, with its averaged weights.

    Returns (model, its TextFeatures, the config it was trained with, a dict).
    """
    folder = find_checkpoint(ckpt)
    config, weights = load_checkpoint(folder, "flow", "ema")
    model = FlowTTS(FlowConfig(**{f.name: config[f.name] for f in fields(FlowConfig)}))
    load_weights(model, weights, folder / "ema.safetensors")
    return model.eval().to(device), TextFeatures(config["text_encoder"], device), config


def add_options(parser):
    """The options that sample.py and evaluate.py share; what is not given is taken from the checkpoint's config."""
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint folder or .safetensors file in one")
    parser.add_argument("--steps", dest="eval_steps", type=int, help="of the solver")
    parser.add_argument("--cfg_scale", dest="eval_cfg_scale", type=float, help="guidance by the text, 1 for none")
    parser.add_argument("--solver", dest="eval_solver", choices=("euler", "midpoint", "heun"))
    parser.add_argument("--vocoder", dest="eval_vocoder", choices=("griffinlim", "bigvgan"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")


def fill_options(args, config):
    """Replace the options that were not given by the config's. Raises UserError for a solver without steps."""
    for key, value in vars(args).items():
        if key.startswith("eval_") and value is None:
            setattr(args, key, config[key])
    if args.eval_steps < 1:
        raise UserError(f"--steps {args.eval_steps}: the solver needs at least one")


def split_text(text, limit=MAX_TEXT_BYTES - 1):
    """Sentences of a text; those beyond `limit` bytes are cut between words.

    Raises UserError for a text without a letter or digit and for a word beyond the limit.
    """
    if not re.search(r"\w", text):
        raise UserError("there is nothing to say: the text has no letter and no digit")
    pieces = []
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        piece = ""
        for word in sentence.split():
            if len(word.encode()) > limit:
                raise UserError(f"{word[:20]!r}… is a word of {len(word.encode())} bytes; the encoder reads {limit}")
            if len(f"{piece} {word}".encode()) > limit:
                pieces, piece = [*pieces, piece], ""
            piece = f"{piece} {word}".strip()
        pieces.append(piece)
    return pieces


def generate_mels(model, features, texts, seed=0, seconds=None, batch_size=32, **options):
    """Log-mels of texts, each within the encoder's limit; `seconds` (a list) replaces the predicted durations.

    options: steps, cfg_scale and solver of FlowTTS.generate. Returns a list of (frames, n_mels) float32 on the CPU.
    What a text becomes depends on its place in the list and on `seed`, not on its neighbours.
    """
    device = model.mel_mean.device
    empty = features([""])[0].to(device)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].encode()))
    mels = [None] * len(texts)
    for some in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        text, length = (x.to(device) for x in features([texts[i] for i in some]))
        rate = mel_config(model.c).frame_rate
        frames = seconds and torch.tensor([max(1, round(seconds[i] * rate)) for i in some], device=device)
        with autocast(device, pick_dtype("auto", device)):
            batch = model.generate(text, length, empty, [seed * 1_000_003 + i for i in some], frames, **options)
        for i, mel in zip(some, batch):
            mels[i] = mel
    return mels


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="what to say")
    text.add_argument("--text_file", type=Path, help="what to say, a wav a line")
    parser.add_argument("--out", type=Path, default=Path("out.wav"), help="the wav; with --text_file, a folder")
    parser.add_argument("--seconds", type=float, help="length of the audio, instead of the predicted one")
    args = parser.parse_args(argv)

    _, _, device = init_distributed(args.device)
    model, features, config = load_flow(args.ckpt, device)
    fill_options(args, config)
    mel = mel_config(model.c)
    vocode = load_vocoder(args.eval_vocoder, mel, device)
    if args.text_file:
        jobs = [(args.out / f"{n:04d}.wav", line) for n, line in enumerate(read_lines(args.text_file))]
    else:
        jobs = [(args.out, args.text)]
    pause = np.zeros(int(0.15 * mel.sample_rate), np.float32)
    for path, text in jobs:
        start = time.perf_counter()
        pieces = split_text(text)
        seconds = args.seconds and [args.seconds * len(p) / sum(map(len, pieces)) for p in pieces]
        mels = generate_mels(model, features, pieces, args.seed, seconds, steps=args.eval_steps,
                             cfg_scale=args.eval_cfg_scale, solver=args.eval_solver)
        wav = np.concatenate([part for m in mels for part in (vocode(m), pause)][:-1])
        write_wav(path, wav, mel.sample_rate)
        took, length = time.perf_counter() - start, len(wav) / mel.sample_rate
        print(f"{path}: {length:.2f} s of audio in {took:.2f} s, real-time factor {took / length:.2f}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
