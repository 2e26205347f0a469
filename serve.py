"""A local page to type text and listen.

    pip install -r requirements-extra.txt
    python serve.py --ckpt runs/flow_demo

Only this machine can reach it unless --host says otherwise. One clip is made at a time; whoever comes while
QUEUE others wait is told so.
"""

import argparse
import os
import sys
import time
from html import escape
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from trivox.common import UserError, find_checkpoint, init_distributed, run

MAX_TEXT = 2000  # characters
MAX_UPLOAD = "20mb"
MAX_VOICE = 30  # seconds of an upload that are read
QUEUE = 16  # requests that may wait
SEED = ("seed", "number", 0, 0, 2**31 - 1)

# ------------------------------------------------------------------------------------------------------------
# What each system can be asked: its controls, and speak(text, *their values) -> (samples,) float32

def flow_speaker(ckpt, config, device):
    """Returns (sample rate, [(label, kind, value, lowest, highest or choices)], speak)."""
    from trivox.audio import load_vocoder
    from trivox.speak import generate_mels, load_flow, mel_config, split_text

    model, features, _ = load_flow(ckpt, device)
    mel = mel_config(model.c)
    vocode = load_vocoder(config["eval_vocoder"], mel, device)

    def speak(text, steps, cfg_scale, solver, seconds, seed):
        pieces = split_text(text)
        lengths = [seconds * len(piece) / sum(map(len, pieces)) for piece in pieces] if seconds else None
        mels = generate_mels(model, features, pieces, int(seed), lengths, steps=int(steps), cfg_scale=cfg_scale,
                             solver=solver)
        return np.concatenate([vocode(m) for m in mels])

    return mel.sample_rate, [
        ("steps of the solver", "slider", config["eval_steps"], 1, 64),
        ("guidance by the text, 1 for none", "slider", config["eval_cfg_scale"], 1, 4),
        ("solver", "choice", config["eval_solver"], None, ["euler", "midpoint", "heun"]),
        ("seconds, 0 for as predicted", "slider", 0, 0, 30),
        SEED,
    ], speak


def codec_speaker(ckpt, config, device):
    """The same for a codec LM. Raises UserError for one without text."""
    import torch

    from trivox.codecs import load_codec
    from trivox.speak import codec_folder, generate_codes, load_codec_lm, split_text
    from trivox.text import TextFeatures

    model, _ = load_codec_lm(ckpt, device)
    if not model.c.cross_every:
        raise UserError(f"{ckpt} was trained without text, so there is nothing to type: sample.py continues recordings")
    codec, features = load_codec(codec_folder(find_checkpoint(ckpt), config), device), TextFeatures("bytes")
    frames = round(config["eval_seconds"] * model.c.frame_rate)
    nothing = torch.zeros(0, model.c.codebooks, dtype=torch.long)

    def speak(text, temperature, top_p, top_k, cfg_scale, seed):
        prompts = [{"seed": int(seed) * 1_000_003 + n, "codes": nothing, "text": piece}
                   for n, piece in enumerate(split_text(text))]
        codes = generate_codes(model, features, prompts, frames, temperature=temperature, top_p=top_p, top_k=int(top_k),
                               cfg_scale=cfg_scale)
        return np.concatenate([codec.decode(x) for x in codes if len(x)] or [np.zeros(codec.hop_length, np.float32)])

    return codec.sample_rate, [
        ("temperature", "slider", float(config["eval_temperature"]), 0, 1.5),
        ("top p", "slider", 1.0, 0.05, 1),
        ("top k, 0 for all", "slider", 0, 0, model.c.codebook_size),
        ("guidance by the text, 1 for none", "slider", float(config["eval_cfg_scale"]), 1, 4),
        SEED,
    ], speak


def llm_speaker(ckpt, config, device):
    """The same for an LLM TTS; where it speaks with voices, a recording of one is the last of its controls."""
    from trivox.codecs import load_codec
    from trivox.speak import PAUSE, llm_codec_folder, load_llm, read_voice, speak_sentences, speech_limit, split_text
    from trivox.text import normalise_text

    model, _ = load_llm(ckpt, device)
    codec = load_codec(llm_codec_folder(ckpt, config), device)
    pause = np.zeros(int(PAUSE * codec.sample_rate), np.float32)

    def speak(text, temperature, top_p, top_k, repetition_penalty, seed, recording=None):
        pieces, voices = split_text(normalise_text(text), speech_limit(model.c)), None
        if model.c.speaker_width:
            if not recording:
                raise UserError("this model speaks with the voice of a recording: upload one under 'controls', of a "
                                "person who agrees to it")
            voice = read_voice(shorten(recording), config | {"speaker_width": model.c.speaker_width}, device)
            voices = voice.expand(len(pieces), -1)
        spoken = speak_sentences(model, pieces, [int(seed) * 1_000_003 + n for n in range(len(pieces))], voices,
                                 config["eval_seconds"], temperature=temperature, top_k=int(top_k), top_p=top_p,
                                 repetition_penalty=repetition_penalty)
        if not any(map(len, spoken)):
            raise UserError("the model said nothing: try another seed")
        return np.concatenate([wav for codes in spoken if len(codes) for wav in (codec.decode(codes), pause)])

    recording = ("a voice to speak with, of a person who agrees to it", "audio", None, None, None)
    return codec.sample_rate, [
        ("temperature", "slider", float(config["eval_temperature"]), 0, 1.5),
        ("top p", "slider", float(config["eval_top_p"]), 0.05, 1),
        ("top k, 0 for all", "slider", config["eval_top_k"], 0, model.c.codebook_size),
        ("repetition penalty, 1 for none", "slider", float(config["eval_repetition_penalty"]), 1, 2),
        SEED,
    ] + [recording] * bool(model.c.speaker_width), speak


def shorten(path):
    """The first MAX_VOICE seconds of an upload, mono, as a wav beside it: a small file may hold days. Returns its path.

    Raises UserError for what is not audio.
    """
    import soundfile

    try:
        with soundfile.SoundFile(path) as f:
            if f.channels > 8 or f.samplerate > 192_000:
                raise UserError(f"a recording of {f.channels} channels at {f.samplerate:,} Hz is more than can be read")
            wav, rate = f.read(MAX_VOICE * f.samplerate, dtype="float32", always_2d=True).mean(1), f.samplerate
    except soundfile.LibsndfileError:
        raise UserError("the upload is not a recording that can be read: wav, flac, ogg or mp3") from None
    short = Path(path).with_name("voice.wav")
    soundfile.write(short, wav, rate, subtype="FLOAT")
    return short


SPEAKERS = {"flow": flow_speaker, "codec": codec_speaker, "llm": llm_speaker}

# ------------------------------------------------------------------------------------------------------------
# The page

def build(name, rate, controls, speak):
    """The page as gradio.Blocks."""
    import gradio as gr

    def answer(text, *values):
        if len(text := text or "") > MAX_TEXT:
            raise gr.Error(f"That are {len(text):,} characters; {MAX_TEXT:,} at a time is all.", print_exception=False)
        values = [value if given is None else given for given, (_, _, value, _, _) in zip(values, controls)]
        start = time.perf_counter()
        try:
            wav = speak(text, *values)
        except UserError as e:
            raise gr.Error(str(e), print_exception=False) from None
        took, seconds = time.perf_counter() - start, len(wav) / rate
        pcm = (np.clip(wav, -1, 1) * 32767).astype(np.int16)
        return (rate, pcm), f"{seconds:.2f} s of audio in {took:.2f} s, real-time factor {took / seconds:.2f}"

    # what people uploaded and heard is deleted after an hour
    with gr.Blocks(title=f"trivox: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(f"<h1>trivox: {escape(name)}</h1>")
        text = gr.Textbox(label="text", lines=3, elem_id="text")
        inputs = [text]
        with gr.Accordion("controls", open=False):
            for label, kind, value, low, high in controls:
                if kind == "slider":
                    inputs.append(gr.Slider(low, high, value, label=label, step=1 if isinstance(value, int) else 0.05))
                elif kind == "choice":
                    inputs.append(gr.Radio(high, value=value, label=label))
                elif kind == "audio":
                    inputs.append(gr.Audio(label=label, type="filepath", sources=["upload"], buttons=[],
                                           elem_id="recording"))
                else:
                    inputs.append(gr.Number(value, label=label, minimum=low, maximum=high, precision=0))
        button = gr.Button("Speak", variant="primary", elem_id="speak")
        audio = gr.Audio(label="audio", elem_id="audio", autoplay=True, buttons=["download"])
        took = gr.Markdown(elem_id="took")
        gr.on([button.click, text.submit], answer, inputs, [audio, took], api_name="speak", concurrency_limit=1)
    return page.queue(max_size=QUEUE)


def launch(page, **options):
    """Start to serve the page, which then asks nothing of any other host."""
    import gradio as gr

    theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("monospace",))
    return page.launch(max_file_size=MAX_UPLOAD, share=False, show_error=True, theme=theme, footer_links=[], **options)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint folder or .safetensors file in one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all that can reach this machine (%(default)s)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    args = parser.parse_args(argv)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if not find_spec("gradio"):
        raise UserError("serve.py needs Gradio: pip install -r requirements-extra.txt")
    from trivox.speak import read_config

    _, _, device = init_distributed(args.device)
    config = read_config(args.ckpt)
    if config["system"] not in SPEAKERS:
        raise UserError(f"{args.ckpt} is a checkpoint of the {config['system']!r} system, which has no page")
    page = build(args.ckpt, *SPEAKERS[config["system"]](args.ckpt, config, device))
    try:
        launch(page, server_name=args.host, server_port=args.port, quiet=True, prevent_thread_lock=True)
    except OSError:
        raise UserError(f"cannot serve at {args.host}:{args.port}, which may be taken: try another --port") from None
    print(f"http://{args.host}:{args.port}, until Ctrl-C")
    page.block_thread()


if __name__ == "__main__":
    run(main, sys.argv[1:])
