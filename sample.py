"""From a checkpoint to a waveform.

    python sample.py --ckpt runs/flow_demo --text "The baker sold nine golden apples." --out out.wav
    python sample.py --ckpt runs/codec_demo --seconds 20 --temperature 0.9
    python sample.py --ckpt runs/codec_demo --prompt_wav voice.wav --prompt_seconds 3 --seconds 10
    python sample.py --ckpt runs/llm_demo_speakers --text "The baker sold nine golden apples." --speaker voice.wav

The checkpoint decides what can be asked for; what is not given is taken from the config that it was trained with.
"""

import argparse
import sys
import time
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch

from trivox.audio import load_vocoder, read_wav, write_wav
from trivox.codecs import load_codec
from trivox.common import UserError, autocast, find_checkpoint, init_distributed, pick_dtype, run
from trivox.generate import stream_frames, stream_speech
from trivox.speak import (PAUSE, SPEAKING, add_options, cast_matrices, codec_folder, fill_options, follow,
                          generate_mels, llm_codec_folder, load_codec_lm, load_flow, load_llm, mel_config, play,
                          read_config, read_prompt, read_texts, read_voice, refuse_options, sampling, speech_limit,
                          split_text)
from trivox.text import TextFeatures, normalise_text, read_lines


def jobs(args):
    """What to make, (wav, text) one by one; a text of None where none was given."""
    if args.text_file:
        return [(args.out / f"{n:04d}.wav", line) for n, line in enumerate(read_lines(args.text_file))]
    return [(args.out, args.text)]


def report(path, seconds, took, first=None):
    heard = f", the first of it after {first:.2f} s" if first else ""
    print(f"{path}: {seconds:.2f} s of audio in {took:.2f} s{heard}, real-time factor {took / max(seconds, 1e-3):.2f}")


def sample_flow(args, device):
    refuse_options(args, "flow", "prompt_wav")
    if args.text is None and not args.text_file:
        raise UserError("what should it say? --text or --text_file")
    model, features, _ = load_flow(args.ckpt, device)
    mel = mel_config(model.c)
    vocode = load_vocoder(args.eval_vocoder, mel, device)
    pause = np.zeros(int(PAUSE * mel.sample_rate), np.float32)
    for path, text in jobs(args):
        start = time.perf_counter()
        pieces = split_text(text)
        seconds = args.seconds and [args.seconds * len(p) / sum(map(len, pieces)) for p in pieces]
        mels = generate_mels(model, features, pieces, args.seed, seconds, steps=args.eval_steps,
                             cfg_scale=args.eval_cfg_scale, solver=args.eval_solver)
        wav = np.concatenate([part for m in mels for part in (vocode(m), pause)][:-1])
        write_wav(path, wav, mel.sample_rate)
        report(path, len(wav) / mel.sample_rate, time.perf_counter() - start)


def sample_codec(args, config, device):
    import soundfile

    model = cast_matrices(load_codec_lm(args.ckpt, device)[0], pick_dtype("auto", device))
    c, options = model.c, sampling(args, model.c.codebooks)
    if not c.cross_every and (args.text or args.text_file or args.eval_cfg_scale != 1):
        raise UserError("this checkpoint was trained without text: no --text, --text_file or --cfg_scale")
    if args.text and args.prompt_wav:
        raise UserError("--prompt_wav continues a recording, --text begins a new one: give one of them")
    codec = load_codec(codec_folder(find_checkpoint(args.ckpt), config), device)
    prompt = torch.zeros(0, c.codebooks, dtype=torch.long)
    if args.prompt_wav:
        wav = read_wav(args.prompt_wav, codec.sample_rate)
        if args.eval_prompt_seconds:
            wav = wav[:round(args.eval_prompt_seconds * codec.sample_rate)]
        prompt = torch.from_numpy(codec.encode([wav])[0])
        if len(prompt) > c.context - c.codebooks:
            raise UserError(f"a prompt of {len(prompt) / c.frame_rate:.1f} s is longer than the context, which holds "
                            f"{(c.context - c.codebooks) / c.frame_rate:.1f} s: give a lower --prompt_seconds")
    frames = len(prompt) + max(1, round((args.seconds or config["eval_seconds"]) * c.frame_rate))
    features = TextFeatures("bytes")
    pause = np.zeros(int(PAUSE * codec.sample_rate), np.float32)
    for path, text in jobs(args):
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with soundfile.SoundFile(path, "w", codec.sample_rate, 1, "PCM_16") as file:
            pieces = split_text(text) if text else [""]
            for n, piece in enumerate(pieces):
                if n:
                    file.write(pause)
                read = read_texts(model, features, [piece])
                if text and args.seconds:
                    read["seconds"] = torch.tensor([args.seconds * len(piece) / sum(map(len, pieces))], device=device)
                with autocast(device, pick_dtype("auto", device)):
                    steps = stream_frames(model, frames, [args.seed * 1_000_003 + n], [prompt], **options, **read)
                    codes = (step[0].cpu() for step in steps)
                    codes = takewhile(lambda code: code[0] < c.codebook_size, codes)  # up to EOS
                    for wav in play(codec, codes):
                        file.write(np.clip(wav, -1, 1))
                        file.flush()
            seconds = file.tell() / codec.sample_rate
        report(path, seconds, time.perf_counter() - start)


def sample_llm(args, config, device):
    import soundfile

    model = cast_matrices(load_llm(args.ckpt, device)[0], pick_dtype("auto", device))
    options, voice = sampling(args, names=SPEAKING), None
    if args.text is None and not args.text_file:
        raise UserError("what should it say? --text or --text_file")
    if bool(args.speaker) != bool(model.c.speaker_width):
        raise UserError(f"{args.ckpt} was trained without voices: no --speaker" if args.speaker else
                        f"{args.ckpt} speaks with the voice of a recording: name one with --speaker")
    if args.speaker:
        voice = read_voice(args.speaker, config | {"speaker_width": model.c.speaker_width}, device).to(device)
    codec = load_codec(llm_codec_folder(args.ckpt, config), device)
    pause = np.zeros(int(PAUSE * codec.sample_rate), np.float32)
    frames = max(1, round((args.seconds or config["eval_seconds"]) * codec.frame_rate))
    todo = [(path, [read_prompt(model.c, piece) for piece in split_text(normalise_text(text), speech_limit(model.c))])
            for path, text in jobs(args)]
    for path, prompts in todo:
        path.parent.mkdir(parents=True, exist_ok=True)
        start, first = time.perf_counter(), None
        with soundfile.SoundFile(path, "w", codec.sample_rate, 1, "PCM_16") as file, \
                autocast(device, pick_dtype("auto", device)):
            for at in range(0, len(prompts), 16):  # so many sentences at once
                some = prompts[at:at + 16]
                stream = stream_speech(model, some, [args.seed * 1_000_003 + at + n for n in range(len(some))], frames,
                                       speaker=None if voice is None else voice.expand(len(some), -1), **options)
                for n, codes in enumerate(follow(stream, len(some)), at):
                    if n:
                        file.write(pause)
                    for wav in play(codec, codes):
                        file.write(np.clip(wav, -1, 1))
                        file.flush()
                        first = first or time.perf_counter() - start
            seconds = file.tell() / codec.sample_rate
        report(path, seconds, time.perf_counter() - start, first)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint folder or .safetensors file in one")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", help="what to say")
    text.add_argument("--text_file", type=Path, help="what to say, a wav a line")
    parser.add_argument("--out", type=Path, default=Path("out.wav"), help="the wav; with --text_file, a folder")
    parser.add_argument("--seconds", type=float, help="of audio to make; with text, instead of what is predicted")
    _, codec = add_options(parser)
    codec.add_argument("--prompt_wav", type=Path, help="a recording to go on from")
    codec.add_argument("--speaker", type=Path, help="a recording of the voice to speak with, or its embedding, .npy")
    args = parser.parse_args(argv)
    if args.seconds is not None and not args.seconds > 0:
        raise UserError(f"--seconds {args.seconds:g} is out of range")
    if not args.text_file and args.out.suffix.lower() != ".wav":
        raise UserError(f"--out {args.out}: what is written is a .wav")

    config = read_config(args.ckpt)
    fill_options(args, config)
    _, _, device = init_distributed(args.device)
    if config["system"] == "llm":
        refuse_options(args, "llm", "prompt_wav")
        sample_llm(args, config, device)
    elif config["system"] == "codec":
        refuse_options(args, "codec", "speaker")
        sample_codec(args, config, device)
    else:
        refuse_options(args, "flow", "speaker")
        sample_flow(args, device)


if __name__ == "__main__":
    run(main, sys.argv[1:])
