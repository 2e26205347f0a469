"""From a checkpoint to a waveform.

    python sample.py --ckpt runs/flow_demo --text "The baker sold nine golden apples." --out out.wav
    python sample.py --ckpt runs/codec_demo --seconds 20 --temperature 0.9
    python sample.py --ckpt runs/codec_demo --prompt_wav voice.wav --prompt_seconds 3 --seconds 10
    python sample.py --ckpt runs/llm_demo_speakers --text "The baker sold nine golden apples." --speaker voice.wav

The checkpoint decides what can be asked for; what is not given is taken from the config that it was trained with.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

from trivox.common import Folder, UserError, flag, init_distributed, run, some_path
from trivox.files import sigterm_unwinds
from trivox.options import add_flags, given_flags
from trivox.recordings import write_wav
from trivox.speak import load
from trivox.text import numbered_lines


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=flag(Folder), required=True,
                        help="run folder, checkpoint folder or .safetensors file in one")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", help="what to say")
    text.add_argument("--text_file", type=some_path, help="what to say, a wav a line, named by its number")
    parser.add_argument("--out", type=some_path, help="the wav (out.wav); with --text_file, a folder (out)")
    parser.add_argument("--verbose", action="store_true", help="print what a text becomes before the model reads it")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add_flags(parser)
    args = parser.parse_args(argv)
    args.out = args.out or Path("out" if args.text_file else "out.wav")
    if not args.text_file and args.out.suffix.lower() != ".wav":
        raise UserError(f"--out {args.out}: what is written is a .wav")
    texts = dict(numbered_lines(args.text_file)) if args.text_file else {1: args.text}  # by their lines
    outs = {n: args.out / f"{n:04d}.wav" if args.text_file else args.out for n in texts}
    for name in ("prompt_wav", "speaker"):
        if (source := getattr(args, name)) and source.resolve() in [out.resolve() for out in outs.values()]:
            raise UserError(f"--{name} {source} would be overwritten by what is spoken: name another --out")
    speaker = load(args.ckpt, init_distributed(args.device)[2])
    options = speaker.settings(given_flags(args))
    unsaid = {}
    for n, text in texts.items():  # what cannot be said is told before anything is spoken
        try:
            speaker.parts(text, options)
            if args.verbose and text is not None:
                print(f"{outs[n]}: it reads", *(f"{sentence!r}" + f" as {read!r}" * bool(read)
                                                for sentence, read in speaker.readings(text)), sep="\n    ")
        except UserError as e:
            if not args.text_file:
                raise
            unsaid[n] = str(e)
    if len(unsaid) == len(texts) and len({*unsaid.values()}) == 1:  # it is not about one line
        raise UserError([*unsaid.values()][0])
    for n, why in unsaid.items():
        print(f"error: line {n} of {args.text_file}: {why}", file=sys.stderr, flush=True)
    for n, text in texts.items():
        if n not in unsaid:
            write(outs[n], speaker, text, options)
    if unsaid:
        raise UserError(f"{len(unsaid):,} of {len(texts):,} lines of {args.text_file} were not spoken: line "
                        + ", ".join(map(str, unsaid)))


def write(path, speaker, text, options):
    """Speak into a file, which is there when all is spoken, and say how long it took. An earlier one stays till then,
    as a cut one would look like a result."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not all(os.access(place, os.W_OK) for place in (path.parent, path) if place.exists()):
            raise UserError(f"cannot write {path}: it is a folder, or one without the right to write")
    except OSError as e:
        raise UserError(f"cannot write {path}: {e}") from None
    start, stream = time.perf_counter(), speaker.stream(text, **options)
    wavs, first = [next(stream)], time.perf_counter() - start
    wav = np.concatenate([*wavs, *stream])
    try:
        with sigterm_unwinds():
            write_wav(path.resolve(), wav, speaker.sample_rate)  # what a link leads to is written, and not the link
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None
    took, seconds = time.perf_counter() - start, len(wav) / speaker.sample_rate
    print(f"{path}: {seconds:.2f} s of audio in {took:.2f} s, the first of it after {first:.2f} s, real-time factor "
        f"{took / seconds:.2f}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
