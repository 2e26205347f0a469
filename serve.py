"""A local page to type text and listen.

    pip install -r requirements-serve.txt
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
from typing import Annotated

import numpy as np
from pydantic import Field

from trivox.common import Folder, UserError, flag, init_distributed, run
from trivox.recordings import AUDIO_ENDINGS, read_start

MAX_TEXT = 2000  # characters
MAX_UPLOAD = "20mb"
MAX_VOICE = 30  # seconds of an upload that are read
QUEUE = 16  # requests that may wait
Port = Annotated[int, Field(ge=0, le=65535)]


def shorten(path, speaker):
    """The first MAX_VOICE seconds of an upload, mono, as a wav beside it: a small file may hold days. Returns its path.

    Raises UserError for what is not audio.
    """
    import soundfile

    try:
        wav, full_scale = read_start(path, speaker.sample_rate, MAX_VOICE)
    except UserError as e:
        raise UserError(str(e).replace(str(path), "the upload")) from None
    if full_scale != 1:
        speaker.note(f"the upload holds floats on a scale of ±{full_scale:,.0f}, which are read as ±1")
    short = Path(path).with_name("voice.wav")
    soundfile.write(short, wav, speaker.sample_rate, subtype="FLOAT")
    return short


def control(option):
    """The control of the page for an option of trivox.speak's."""
    import gradio as gr

    label, value = f"{option.name.replace('_', ' ')}, {option.help}", option.default
    if option.type is Path:
        # not gr.Audio, which takes webm for video and refuses it
        return gr.File(label=label, type="filepath", file_types=[*AUDIO_ENDINGS], elem_id=option.name)
    if option.choices:
        return gr.Radio(list(option.choices), value=value, label=label)
    if isinstance(value, list):
        return gr.Textbox(" ".join(map(str, value)), label=f"{label}; one number, or one a book")
    if value is None or option.usual is None:
        # of an empty one Gradio makes 0 when 'controls' is opened
        low, unless = (0, "; 0 for none") if value is None else (option.low, "")
        return gr.Number(value or 0, label=label + unless, minimum=low, maximum=option.high,
                         precision=0 if option.type is int else None)
    step = 1 if option.type is int else 0.05
    return gr.Slider(min(max(option.low, step * (option.low > 0)), value), max(option.usual, value), value, label=label,
                     step=step)


def asked(option, value, speaker):
    """What a control's value stands for. Raises UserError for what is no number, and for an upload that is no audio."""
    if option.type is Path and value:
        return shorten(value, speaker)
    if option.name == "speaker":
        raise UserError("this model speaks with the voice of a recording: upload one under 'controls', of a person who "
                        "agrees to it")
    if isinstance(option.default, list) and value is not None:
        try:
            return [option.type(x) for x in value.replace(",", " ").split()] or None
        except ValueError:
            raise UserError(f"{option.name} {value!r} should be numbers") from None
    if option.default is None and not value:
        return None
    return option.type(value) if isinstance(value, (int, float)) else value


def told(readings, notes):
    """HTML: the sentences as they are read, the phonemes or characters that they become below, and notes."""
    lines = [escape(sentence) + f"<br><small>{escape(read)}</small>" * bool(read) for sentence, read in readings]
    lines += [f"<b>note:</b> {escape(note)}" for note in notes]
    return ("<p>It read:</p>" * bool(readings)) + "".join(f"<p>{line}</p>" for line in lines)


def build(name, speaker):
    """The page, as gradio.Blocks, of one of trivox.speak's Speakers."""
    import gradio as gr

    def answer(text, *values):
        if len(text := text or "") > MAX_TEXT:
            raise gr.Error(f"That are {len(text):,} characters; {MAX_TEXT:,} at a time is all.", print_exception=False)
        start, notes = time.perf_counter(), []
        speaker.note, speaker.told = notes.append, set()  # one request at a time: see concurrency_limit
        try:
            options = {option.name: asked(option, value, speaker) for option, value in zip(speaker.options, values)}
            goes_on = options.get("prompt_wav") and not text.strip()
            wav = np.concatenate(list(speaker.stream(None if goes_on else text, **options)))
        except UserError as e:
            raise gr.Error(escape("; ".join([str(e), *notes])), print_exception=False) from None  # it shows HTML
        took, seconds = time.perf_counter() - start, len(wav) / speaker.sample_rate
        pcm = (np.clip(wav, -1, 1) * 32767).astype(np.int16)
        return (speaker.sample_rate, pcm), (f"{seconds:.2f} s of audio in {took:.2f} s, real-time factor "
                                            f"{took / seconds:.2f}"), told(
            [] if goes_on else speaker.readings(text), notes)

    # what people uploaded and heard is deleted after an hour
    with gr.Blocks(title=f"trivox: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(f"<h1>trivox: {escape(name)}</h1>")
        text = gr.Textbox(label="text", lines=3, elem_id="text")
        with gr.Accordion("controls", open=False):
            inputs = [text, *map(control, speaker.options)]
        button = gr.Button("Speak", variant="primary", elem_id="speak")
        audio = gr.Audio(label="audio", elem_id="audio", autoplay=True, buttons=["download"])
        took = gr.Markdown(elem_id="took")
        outputs = [audio, took, gr.HTML(elem_id="read")]
        gr.on([button.click, text.submit], answer, inputs, outputs, api_name="speak", concurrency_limit=1)
    return page.queue(max_size=QUEUE)


def launch(page, **options):
    """Start to serve the page, which then asks nothing of any other host."""
    import gradio as gr

    theme = gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("monospace",))
    return page.launch(max_file_size=MAX_UPLOAD, share=False, show_error=True, theme=theme, footer_links=[], **options)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=flag(Folder), required=True,
                        help="run folder, checkpoint folder or .safetensors file in one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all that can reach this machine (%(default)s)")
    parser.add_argument("--port", type=flag(Port), default=7860)
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    args = parser.parse_args(argv)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if not find_spec("gradio"):
        raise UserError("serve.py needs Gradio: pip install -r requirements-serve.txt")
    from trivox.speak import load

    speaker = load(args.ckpt, init_distributed(args.device)[2])
    if speaker.system == "codec" and not speaker.c.cross_every:
        raise UserError(f"{args.ckpt} was trained without text, so there is nothing to type: sample.py continues "
                        "recordings")
    if speaker.system == "flow":
        speaker.settings({})  # a vocoder that cannot be had is told now
    page = build(args.ckpt, speaker)
    try:
        launch(page, server_name=args.host, server_port=args.port, quiet=True, prevent_thread_lock=True)
    except OSError:
        raise UserError(f"cannot serve at {args.host}:{args.port}, which may be taken: try another --port") from None
    print(f"http://{args.host}:{args.port}, until Ctrl-C")
    page.block_thread()


if __name__ == "__main__":
    run(main, sys.argv[1:])
