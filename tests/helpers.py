"""What tests make by hand: tiny models, codecs, corpora and data sets; and kills, which the making of data survives."""

import io
import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from model import LLM, CodecConfig, CodecLM, FlowConfig, FlowTTS, LLMConfig, sentence
from trivox import common
from trivox.alphabet import SYMBOLS, Alphabet
from trivox.prepare import write_sentences
from trivox.recordings import write_wav
from trivox.run_folder import load_checkpoint
from trivox.text import text_ids

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------------------------------------------------------
# Models: untrained, and no weight is zero, so that every part takes part

FLOW = dict(width=64, layers=2, heads=2, ffn_width=128, text_width=64, text_layers=1)
CODEC_LM = dict(width=64, layers=2, heads=2, kv_heads=1, ffn_width=128, codebooks=3, codebook_size=20, context=400,
                frame_rate=10.0, text_width=64, text_layers=1)
LLM_TTS = dict(codebook_size=50, context=400, width=64, layers=3, heads=4, kv_heads=2, ffn_width=96)


def stirred(model, by):
    """The model with noise on its weights, on vectors 0.1 of it and on matrices `by` over the root of their width."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.ndim == 1 else by * p.shape[-1] ** -0.5))
    return model.eval()


def tiny_flow(seed=0, **changes):
    torch.manual_seed(seed)
    return stirred(FlowTTS(FlowConfig(**FLOW | changes)), 0.3)


def encode(texts):
    """What a flow TTS reads of texts: byte ids, padded, and their lengths."""
    ids = [torch.tensor(text_ids(text)) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([len(i) for i in ids])


def tiny_codec_lm(seed=0, **changes):
    torch.manual_seed(seed)
    return stirred(CodecLM(CodecConfig(**CODEC_LM | changes)), 1)


def tiny_llm(seed=0, **changes):
    torch.manual_seed(seed)
    return stirred(LLM(LLMConfig(**LLM_TTS | changes)), 0.3)


def voice(model, B):
    """Speaker embeddings (B, 12) for an LLM with voices, None for one without."""
    return torch.randn(B, 12, generator=torch.Generator().manual_seed(5)) if model.c.speaker_width else None


def prompts_of(model, lengths=(5, 9, 3)):
    """Prompts of so many characters for an LLM."""
    rng = np.random.default_rng(1)
    return [sentence(model.c, rng.integers(5, 43, n).astype(np.uint8)) for n in lengths]


def narrow_codec(name):
    """The config of one of transformers' codecs: its true geometry in frames, books and codes, with narrow layers."""
    import transformers

    if name == "encodec_24khz":
        return transformers.EncodecConfig(num_filters=4, hidden_size=16, codebook_dim=16)
    if name == "dac_44khz":
        return transformers.DacConfig(encoder_hidden_size=4, decoder_hidden_size=32, sampling_rate=44100)
    semantic = transformers.Wav2Vec2BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                               intermediate_size=64, output_hidden_size=32)
    return transformers.NeuCodecConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, encoder_hidden_size=2, quantization_dim=64, semantic_model_config=semantic)


# ------------------------------------------------------------------------------------------------------------
# Corpora and data sets

def tone(seconds, hertz=300.0):
    return 0.3 * np.sin(np.arange(int(seconds * 22050)) * 2 * np.pi * hertz / 22050).astype(np.float32)


def make_corpus(root, clips, metadata=None):
    """A corpus of {id: wav or None for no recording}; its metadata says "text of <id>", or what is in `metadata`."""
    for id, wav in clips.items():
        if wav is not None:
            write_wav(root / "wavs" / f"{id}.wav", wav, 22050)
    lines = [f"{id}|text of {id}|text of {id}" for id in clips] if metadata is None else metadata
    root.mkdir(exist_ok=True)
    (root / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def sentence_folder(folder, *shards, speakers=(), **changes):
    """A token data set by hand: shards of clips (codes, text, speaker, split)."""
    info = {"codec": "neucodec", "sample_rate": 24000, "frame_rate": 50.0, "codebooks": 1, "codebook_size": 65536,
            "clips": sum(map(len, shards))}
    for file in folder.glob("tokens_*"):
        file.unlink()
    letters = Alphabet(changes.get("characters", SYMBOLS))
    (folder / "codec.json").write_text(json.dumps(info | changes))
    (folder / "speakers.json").write_text(json.dumps(speakers))
    for n, clips in enumerate(shards):
        ends = np.cumsum([0, *(len(codes) for codes, *_ in clips)]).tolist()
        rows = [{"text": text, "speaker": speaker, "split": split, "offset": at, "frames": len(codes)}
                for (codes, text, speaker, split), at in zip(clips, ends)]
        np.concatenate([np.zeros(0), *(codes for codes, *_ in clips)]).astype(np.uint16).tofile(
            folder / f"tokens_{n:05d}.u16")
        write_sentences(folder / f"tokens_{n:05d}", rows, speakers, letters)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------------
# Kills

class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def die_at(step, patch):
    """Make the process die instead of putting its step-th file in place."""
    left, replace = [None] * step, Path.replace

    def replacing(path, target):
        if not left:
            raise Killed
        left.pop()
        return replace(path, target)

    patch.setattr(Path, "replace", replacing)


def killed_anywhere(make, folder, whole, monkeypatch):
    """Kill `make(folder)` before each of its files is in place, and call it again: nothing tells the difference."""
    for step in range(40):
        with monkeypatch.context() as patch:
            die_at(step, patch)
            try:
                make(folder / str(step))
                break
            except Killed:
                pass
        make(folder / str(step))
        for part in (folder / str(step)).glob("*.part"):
            part.unlink()
        assert contents(folder / str(step)) == contents(whole)
    return step


# ------------------------------------------------------------------------------------------------------------
# Triton without a GPU

def spawn(file, what, **environment):
    """What a test file prints as a script, in a process of its own: JSON, of each line one."""
    if sys.platform != "linux":
        pytest.skip("Triton is for Linux")
    run = subprocess.run([sys.executable, file, what], cwd=ROOT, text=True, capture_output=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def mend_interpreter():
    """It cuts float32 off to bfloat16 instead of rounding, and multiplies bfloat16 matrices as integers.
    Triton 3.6's, beside numpy 2.4, also fails to make an int of a scalar."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    patch = interpreter._patch_lang_tensor

    def rounded(x, source, target, mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(x).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(x).view(np.uint32)
            return np.where(np.isnan(x), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return convert(x, source, target, mode)

    def widened(self, *matrices):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in matrices[:2])
        return dot(self, a, b, *matrices[2:])

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = rounded, widened
    interpreter._patch_lang_tensor = patched


# ------------------------------------------------------------------------------------------------------------
# Runs: the settings that all have, and what a checkpoint holds that tests write by hand

@dataclass
class Config(common.RunConfig):
    system: str = "flow"
    optimizer: str = "adamw"
    out_dir: str = ""
    wandb_mode: str = "disabled"


def step_of(folder):
    """The step of a checkpoint all of whose files agree on it."""
    _, model, ema, state = load_checkpoint(folder, "flow", "model", "ema", "state")
    assert {*model["a"].tolist(), *ema["a"].tolist(), *state["moments"][0]["m"].tolist()} == {state["step"]}
    return state["step"]


def free_port():
    """Of this machine, for processes to meet at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# ------------------------------------------------------------------------------------------------------------
# Texts

def random_texts(count, seed=0):
    """Anything that a string can hold: much of ASCII, some of every plane, white space, digits, lone surrogates."""
    rng = random.Random(seed)
    kinds = (lambda: rng.randrange(128), lambda: rng.randrange(0x250), lambda: rng.randrange(0x110000),
             lambda: ord(rng.choice(" \t\n\u2003\u00a0 0123456789.,$£€%-+½²③٣۷‘“—…éß&sthrdn")))
    return ["".join(chr(rng.choice(kinds)()) for _ in range(rng.randrange(40))) for _ in range(count)]


def muxed(av, wav, rate, form, codec, live=False, **options):
    """What FFmpeg writes: into a file, or `live` into what cannot seek, as a pipe."""
    content = io.BytesIO()
    target = type("Pipe", (), {"write": lambda self, some: content.write(some)})() if live else content
    with av.open(target, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wav[None], format="flt", layout="mono")
        frame.sample_rate = rate
        fifo, resampler = av.AudioFifo(), av.AudioResampler(stream.format.name, "mono", rate)
        for some in resampler.resample(frame) + resampler.resample(None):
            fifo.write(some)
        while some := fifo.read(stream.codec_context.frame_size or 1024, partial=True):
            container.mux(stream.encode(some))
        container.mux(stream.encode(None))
    return content.getvalue()
