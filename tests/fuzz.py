"""Whatever is given to this project is read, or refused in a sentence: mutated configs, flags, checkpoints, data sets,
corpora and recordings, each fed to the code that reads it.

    python tests/fuzz.py                      a minute of them
    python tests/fuzz.py --count 10000        so many
    python tests/fuzz.py --seed 3 --case 17   one again, to see its traceback; its files stay

A case passes where the code goes through, or ends with a sentence (UserError, argparse). It fails by a traceback, by
taking longer than LIMIT, by a file that is written out of its folder, and by a process or a connection that is started.
Cases follow from the seed alone.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

from conftest import ROOT, TINY_CODEC, TINY_FLOW, TINY_LLM, OneProcess
from helpers import make_corpus, stirred, tone

import numpy as np
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file

import data
import evaluate
import export
import sample
import train_codec_lm
import train_flow_tts
import train_llm_tts
from model import CodecLM, FlowTTS, LLM
from trivox import common, echolancer, pages, prepare, recipes, run_folder, voices
from trivox.audio import MelConfig
from trivox.checkpoints import load_model, read_config
from trivox.codecs import load_codec
from trivox.corpora import read_corpus
from trivox.datasets import MelDataset, SentenceDataset, TokenDataset, keep_codec
from trivox.metadata import read_transcripts
from trivox.recordings import read_wav
from trivox.text import read_lines

LIMIT = 20  # seconds of a case
SYSTEMS = {"flow": (train_flow_tts, FlowTTS), "codec": (train_codec_lm, CodecLM), "llm": (train_llm_tts, LLM)}
MEL = MelConfig(n_mels=20)


# ------------------------------------------------------------------------------------------------------------
# What is mutated: made once, in a folder

def make_world(folder):
    """A corpus, the three kinds of data sets of it, and a run of each system that has not learnt anything."""
    torch.manual_seed(0)
    noise = np.random.default_rng(0)
    clips = {id: tone(0.4 + 0.1 * n) + 0.02 * noise.standard_normal(8820 + 2205 * n) for n, id in enumerate("abcd")}
    make_corpus(folder / "corpus", clips, [f"{id}|Text {id}.|Text {id}.|{'xy'[n % 2]}" for n, id in enumerate(clips)])
    (folder / "corpus" / "heldout.txt").write_text("b\n")
    prepare.SHARD_CLIPS = prepare.SHARD_SOURCES = 2
    prepare.prepare_mels(folder / "corpus", folder / "mels", MEL, 10.0)
    prepare.tokenize(folder / "corpus", folder / "tokens", "mel_rvq", mel=MelConfig(hop_length=441, n_mels=20),
                     sizes=[16, 16])
    prepare.tokenize(folder / "corpus", folder / "sentences", "mel_rvq", mel=MelConfig(hop_length=441, n_mels=20),
                     sizes=[32])
    prepare.embed(folder / "sentences", "stats")
    for system, settings in {
            "flow": TINY_FLOW | {"n_mels": 20, "data_dir": "mels", "eval_steps": 1},
            "codec": TINY_CODEC | {"data_dir": "tokens", "eval_seconds": 0.3},
            "llm": TINY_LLM | {"data_dir": "sentences", "eval_seconds": 0.3}}.items():
        trainer, build = SYSTEMS[system]
        c = trainer.Config(**settings | {"out_dir": f"runs/{system}", "device": "cpu", "dtype": "float32"})
        model = stirred(build(c), 0.3)
        optimizers, scaler = [torch.optim.AdamW(model.parameters())], torch.amp.GradScaler(enabled=False)
        optimizers[0].step()
        state = {"step": 1, "optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict(),
                 "place": {"taken": 0, "rows": [], "of": 3, "behind": 0}, "best": 1.0}
        run = folder / "runs" / system
        weights = {stem: model.state_dict() for stem in ("model", "ema")}
        run_folder.save_checkpoint(run, 1, weights, state, asdict(c) | {"out_dir": f"runs/{system}"}, True, 2)
        run_folder.save_checkpoint(run, 2, weights, state | {"step": 2}, asdict(c), False, 2)
        if system != "flow":
            (run / "codec").mkdir()
            keep_codec(folder / c.data_dir, run / "codec")
        (run / "config.yaml").write_text(yaml.safe_dump(asdict(c)))
        rows = [{"step": n, "loss": 1.0 / n, "val_loss": 2.0, "steps_per_second": 3.0} for n in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        samples = run / "samples" / "step_00000001"
        samples.mkdir(parents=True)
        soundfile.write(samples / "000.wav", tone(0.4), 22050)
        (samples / "clips.jsonl").write_text(json.dumps({"text": "Two.", "mel_distance": 1.0, "wer": 0.5}) + "\n")
        pages.write_page(run, defaults=asdict(c))  # matplotlib looks for a folder of its own, librosa compiles
    torch.save({"model_state_dict": echolancer.to_theirs(model)}, folder / "echolancer.pt")
    np.save(folder / "voice.npy", np.zeros(101, np.float32))
    (folder / "texts.txt").write_text("One sentence.\nTwo of 3 sentences, at $4.50.\n")
    soundfile.write(folder / "a.flac", tone(0.4), 22050)
    soundfile.write(folder / "f.wav", tone(0.4), 22050, subtype="FLOAT")
    read_wav(folder / "f.wav", 16000)


# ------------------------------------------------------------------------------------------------------------
# Mutations

class Malice:
    """What executes code where it is unpickled."""
    def __reduce__(self):
        return os.system, ("touch hacked",)


NASTY = [0, -1, 1, 2, 7, 2**31, 2**63, -2**63, 10**30, 0.5, -0.5, 1e-30, 1e308, float("nan"), float("inf"),
         -float("inf"), "", "x", "0", "-1", "nan", "1e400", "\0", "a" * 5000, "../../x", "/etc/passwd", "/", ".", "~",
         "é☃𝄞", "\u2028", None, True, False, [], {}, [[1], [2]], [None], {"a": {"b": [1]}}, "val", "test", "on", "flow",
         "codec", "llm", "mel_rvq"]
NASTY_YAML = ["&a [*a, *a]", "!!python/object/apply:os.system [touch hacked]", "!!timestamp x", "2001-99-99", "[" * 500,
              "{a: b}", "[1", ": :", "!!int x", "!!binary x", "<<: 1", "? x", "- - -", "%", "@", "`", "\t", "1_0",
              "0x1F", "12:30:45", "=", "!!set {a}", "!!omap [a]", "*b", "|", ">", "'", '"', "---\n---", "...",
              "\x85", "\ufeff"]


NUMBERS = {".idx": (np.int64, (0, 1, 2**62, -1)), ".u16": (np.uint16, (0, 255, 65535)), ".u8": (np.uint8, (0, 255)),
           ".f16": (np.float16, (np.nan, np.inf)), ".f32": (np.float32, (np.nan, np.inf))}


def nasty(rng):
    return rng.choice(NASTY)


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value)


def change_bytes(rng, content):
    """Bytes with one to three things wrong: cut, flipped, doubled, gone, new, or a number that is extreme."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randint(0, len(content)), rng.choice((1, 2, 4, 8, 16, 64, 1000))
        match rng.randrange(7):
            case 0:
                del content[at:]
            case 1 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 2:
                content[at:at] = content[at:at + size]
            case 3:
                del content[at:at + size]
            case 4:
                content[at:at] = rng.randbytes(size)
            case 5:
                content[at:at + 8] = rng.choice((0, 1, -1, 2**31, 2**62, -2**63)).to_bytes(8, "little", signed=True)
            case 6:
                content[at:at + 4] = np.float32(rng.choice((np.nan, np.inf, 3e38, 0, -1))).tobytes()
    return bytes(content)


def change_text(rng, text):
    """A text with lines gone, doubled, swapped, or with a word or a line that is nasty."""
    lines = text.split("\n")
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines) + 1)
        match rng.randrange(5):
            case 0:
                del lines[at:at + 1]
            case 1:
                lines[at:at] = lines[at - 1:at]
            case 2:
                rng.shuffle(lines)
            case 3:
                lines[at:at] = [rng.choice(NASTY_YAML) if rng.random() < 0.5 else as_text(nasty(rng))]
            case 4 if at < len(lines):
                parts = lines[at].replace(": ", ": \0").replace("|", "|\0").replace(",", ",\0").split("\0")
                parts[rng.randrange(len(parts))] = as_text(nasty(rng)) if rng.random() < 0.6 else rng.choice(NASTY_YAML)
                lines[at] = "".join(parts)
    return "\n".join(lines)


def change_value(rng, value):
    """A nested value with one place in it that is nasty, gone, or more than there was."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        value = value.copy()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                del value[key]
            case 1 if isinstance(value, dict):
                value[as_text(nasty(rng))] = nasty(rng)
            case 1:
                value.append(nasty(rng))
            case _:
                value[key] = change_value(rng, value[key])
        return value
    return nasty(rng)


def change_tensors(rng, tensors):
    """Tensors of which one is gone, new, of another shape or type, or not finite."""
    tensors = {key: x.clone() for key, x in tensors.items()}
    key = rng.choice(sorted(tensors))
    x = tensors.pop(key)
    match rng.randrange(6):
        case 0:
            tensors[rng.choice(("x", "base", "book_9", key + ".x"))] = x
        case 1:
            tensors[key] = x[:-1] if x.ndim and len(x) else torch.zeros(3)
        case 2:
            tensors[key] = x.flatten()[None]
        case 3:
            tensors[key] = x.to(rng.choice((torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64)))
        case 4 if x.is_floating_point():
            tensors[key] = x + rng.choice((float("nan"), float("inf"), 1e30))
    return {key: x.contiguous() for key, x in tensors.items()}


def change_file(rng, path):
    """Change a file by what kind it is of. Any may have other bytes, be gone, empty, a folder, a link to itself."""
    how = rng.random()
    if how < 0.08:
        path.unlink()
        return rng.choice((lambda: 0, path.mkdir, lambda: path.symlink_to(path.name), lambda: path.write_bytes(b"")))()
    if how > 0.5 and path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".txt", "") and path.stat().st_size:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".json", ".yaml") and rng.random() < 0.7:
            value = change_value(rng, yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text))
            text = yaml.safe_dump(value, allow_unicode=True) if path.suffix == ".yaml" else json.dumps(value)
        elif path.suffix == ".jsonl" and rng.random() < 0.8:
            lines = text.splitlines()
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(change_value(rng, json.loads(lines[at])))
            text = "\n".join(lines) + "\n"
        else:
            text = change_text(rng, text)
        return path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if how > 0.4 and path.suffix == ".safetensors":
        return save_file(change_tensors(rng, load_file(path)), path)
    if how > 0.4 and path.suffix == ".pt":
        value = torch.load(path, weights_only=True)
        value = Malice() if rng.random() < 0.2 else change_value(rng, value)
        return torch.save(value, path)
    if how > 0.6 and path.suffix in NUMBERS:
        kind, extremes = NUMBERS[path.suffix]
        numbers = np.fromfile(path, kind)
        numbers[rng.randrange(len(numbers))] = rng.choice(extremes)
        return numbers.tofile(path)
    path.write_bytes(change_bytes(rng, path.read_bytes()))


def change_some(rng, folder, count=2):
    """Change one or two of the files below a folder. Returns their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    chosen = rng.sample(files, min(len(files), rng.randint(1, count)))
    for path in chosen:
        change_file(rng, path)
    return [str(path.relative_to(folder)) for path in chosen]


def change_argv(rng, argv):
    """A command line with a word gone, doubled, new or nasty."""
    argv = list(argv)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(argv) + 1)
        match rng.randrange(6):
            case 0:
                del argv[at:at + 1]
            case 1:
                argv[at:at] = argv[at - 1:at]
            case 2:
                argv[at:at] = [as_text(nasty(rng))]
            case _:
                argv[at:at + 1] = [as_text(nasty(rng))]
    return [word.replace("\0", "") for word in argv]  # which no system lets through


# ------------------------------------------------------------------------------------------------------------
# Cases: each changes a copy of some of the world, and returns (what was done, the function that reads it)

def of_config(rng, world, here):
    """A published config, or flags, or both."""
    path = rng.choice(sorted((ROOT / "configs").glob("*.yaml")))
    trainer = SYSTEMS[path.name.partition("_")[0]][0]
    text, argv = path.read_text(), []
    if rng.random() < 0.7:
        text = change_text(rng, text) if rng.random() < 0.5 else yaml.safe_dump(
            change_value(rng, yaml.safe_load(text)), allow_unicode=True)
    if rng.random() < 0.5:
        keys = rng.sample(sorted(trainer.Config.__dataclass_fields__), 2)
        argv = [f"--{key}{rng.choice(' =')}{as_text(nasty(rng))}".split(" ", 1) for key in keys]
        argv = change_argv(rng, sum(argv, []))
    (here / "c.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))

    def read():
        c = common.load_config(trainer.Config, ["--config", "c.yaml", *argv])
        recipes.read_recipe("c.yaml", c, data.parse)

    return [path.name, *argv], read


def of_checkpoint(rng, world, here):
    system = rng.choice(sorted(SYSTEMS))
    run = shutil.copytree(world / "runs" / system, here / "runs" / system)
    for name in ("mels", "tokens", "sentences"):
        (here / name).symlink_to(world / name)
    if rng.random() < 0.5:  # as in older runs: else what has changed is seen by its checksum, and not read
        (run / "checkpoints" / "step_00000001" / run_folder.FILES).unlink()
    done = change_some(rng, run)
    trainer, build = SYSTEMS[system]

    def resume():
        checkpoint = run_folder.newest(run)
        c = common.load_config(trainer.Config, ["--config", str(world / "runs" / system / "config.yaml")])
        model = build(c)
        optimizers = [torch.optim.AdamW(model.parameters())]
        state = run_folder.load_run(checkpoint, c, {"model": model, "ema": build(c)}, optimizers,
                                    torch.amp.GradScaler(enabled=False))
        optimizers[0].step()
        with mock.patch.object(run_folder.subprocess, "run", lambda *args, **more: mock.Mock(stdout=b"")):  # git's
            run_folder.open_log(replace(c, out_dir=str(run), wandb_mode="disabled"), __file__, checkpoint, state)

    path = rng.choice([run, run / "checkpoints" / "best", run / "checkpoints" / "step_00000001" / "ema.safetensors"])
    what = rng.choice([resume, lambda: load_model(path), lambda: (evaluate.training_speed(path), read_config(path)),
                       lambda: pages.write_page(run),
                       lambda: sample.main(["--ckpt", str(path), "--out", "o.wav", "--seconds", "0.1", "--seed", "1",
                                            *([] if system == "codec" else ["--text", "Two."]), "--device", "cpu"])])
    return [system, *done], what


def of_echolancer(rng, world, here):
    path = Path(shutil.copy(world / "echolancer.pt", here))
    change_file(rng, path)
    return [], lambda: load_model(path)


def of_mels(rng, world, here):
    done = change_some(rng, shutil.copytree(world / "mels", here / "mels"))

    def read():
        mels = MelDataset(here / "mels", MEL)
        for split in ("train", "val", "all"):
            [mels.mel(i) for i in mels.clips(split)]
        [row["text"] for row in mels.rows]

    return done, read


def of_tokens(rng, world, here):
    done = change_some(rng, shutil.copytree(world / "tokens", here / "tokens"))

    def read():
        tokens = TokenDataset(here / "tokens", codec="mel_rvq", codebooks=2)
        codes = [tokens.codes(i) for i in tokens.clips("all")]
        load_codec(here / "tokens").decode(codes[0])

    return done, read


def of_sentences(rng, world, here):
    done = change_some(rng, shutil.copytree(world / "sentences", here / "sentences"))

    def read():
        sentences = SentenceDataset(here / "sentences")
        clips = sentences.clips("all")
        sentences.load_embeddings("stats", 101)
        sentences.lengths(clips), sentences.speaker(clips)
        for i in clips.tolist():
            sentences.codes(i), sentences.text(i), sentences.embedding(i), sentences.name(i)

    return done, read


def of_corpus(rng, world, here):
    """Read, prepared, tokenized with a codec that is there, and embedded."""
    root = shutil.copytree(world / "corpus", here / "corpus")
    if rng.random() < 0.2:  # texts beside the recordings
        (root / "metadata.csv").unlink()
        for path in sorted((root / "wavs").iterdir()):
            path.with_suffix(rng.choice((".txt", ".lab", ".normalized.txt"))).write_text("It was late.")
    done = change_some(rng, root, 3)
    columns = rng.choice((None, None, "id|text|normalized|speaker", "id|-|text", as_text(nasty(rng))))

    def tokens():
        prepare.tokenize(root, here / "tokens", str(world / "tokens"), columns=columns)
        prepare.embed(here / "tokens", "stats")

    def mels():
        prepare.prepare_mels(root, here / "mels", MEL, 10.0, columns=columns)
        MelDataset(here / "mels", MEL).mel(0)

    def again():
        """What a run that was killed, and a hand that meddled, have left."""
        shutil.copytree(world / "mels", here / "mels")
        change_some(rng, here / "mels")
        prepare.prepare_mels(world / "corpus", here / "mels", MEL, 10.0)

    return [*done, columns], rng.choice([tokens, mels, again, lambda: read_corpus(root, columns=columns),
                                         lambda: read_transcripts(root / "metadata.csv")])


def of_recordings(rng, world, here):
    name = rng.choice(("a.flac", "f.wav", "corpus/wavs/a.wav", "voice.npy", "texts.txt"))
    path = Path(shutil.copy(world / name, here))
    change_file(rng, path)
    config = {"speaker_width": 101, "sample_rate": 22050, "speaker_embedder": "stats"}
    return [path.name], rng.choice([
        lambda: read_wav(path, rng.choice((22050, 16000))), lambda: voices.read_voice(path, config),
        lambda: read_lines(path, rng.choice((None, 256)))])


def of_commands(rng, world, here):
    """Command lines of sample.py, evaluate.py, export.py and data.py, of which none makes much."""
    for name in ("mels", "tokens", "sentences", "runs", "corpus"):
        shutil.copytree(world / name, here / name)
    system = rng.choice(sorted(SYSTEMS))
    runs = [f"runs/{system}"]
    flags = rng.sample(["--seconds", "--seed", "--cfg_scale", "--temperature", "--top_k", "--top_p", "--steps",
                        "--solver", "--repetition_penalty", "--prompt_wav", "--prompt_seconds", "--speaker",
                        "--vocoder", "--out", "--text", "--text_file", "--clips", "--onnx", "--prompts"], 2)
    some = sum(([name, as_text(nasty(rng))] for name in flags), [])
    match rng.randrange(4):
        case 0:
            argv = ["--ckpt", *runs, "--text", "Two.", "--device", "cpu", *some, "--seconds", "0.1"]
            what, argv = sample.main, change_argv(rng, argv) if rng.random() < 0.5 else argv
        case 1:  # never on to what takes long: a data set that is not there
            argv = ["--ckpt", *runs, "--device", "cpu", *some, "--out", "e", "--data_dir", "nowhere"]
            what, argv = evaluate.main, change_argv(rng, argv) if rng.random() < 0.3 else argv
        case 2:
            what, argv = export.main, change_argv(rng, ["--ckpt", *runs, rng.choice(("--merge", "--echolancer")), "x"])
        case 3:
            line = rng.choice(["tokenize --codec mel_rvq --root corpus --out t --codebooks 2 --codebook_size 8,8",
                               "ljspeech --root corpus --out t --n_mels 20 --max_seconds 3",
                               "demo --sentences 3 --out t", "embed --data sentences --embedder stats",
                               "emilia --root corpus", "for c.yaml"])
            what, argv = data.parse, change_argv(rng, line.split())
    return [what.__module__, *argv], lambda: what([word.replace("\0", "") for word in argv])


KINDS = {of_config: 30, of_checkpoint: 20, of_echolancer: 2, of_mels: 10, of_tokens: 8, of_sentences: 8, of_corpus: 8,
         of_recordings: 8, of_commands: 6}


# ------------------------------------------------------------------------------------------------------------
# The watch

class Hang(BaseException):
    """The time of a case is over."""


class Escape(BaseException):
    """A file was written out of the case's folder, or code was executed."""


FORBIDDEN = {"os.system", "subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "socket.connect",
             "webbrowser.open"}
WRITES = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.link": (1,),
          "os.symlink": (1,), "os.truncate": (0,), "shutil.rmtree": (0,), "os.chmod": (0,)}
_watched = []  # the folder of the case that is being read; an audit hook cannot be taken off


def _audit(event, args):
    if not _watched:
        return
    written = [args[n] for n in WRITES.get(event, ())]
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)) and (
            set(args[1] or "") & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        written = [args[0]]
    for path in written:
        if isinstance(path, int):  # a folder that is open
            continue
        place = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path)))) + os.sep
        name = os.path.basename(os.fsdecode(path))
        if not (place.startswith((_watched[0], "/dev/")) or "__pycache__" in [name, *place.split(os.sep)]
                or name.startswith("trivox-yin-") or event == "os.mkdir" and os.path.isdir(path)):
            raise Escape(f"{event} {place}")
    if event in FORBIDDEN:
        raise Escape(f"{event} {args[:2]}")


@contextlib.contextmanager
def watched(folder):
    """Within, nothing may be written but below a folder, which is the current one, nothing started; time is short."""
    def alarm(number, frame):
        raise Hang(f"longer than {LIMIT} s")

    before, here, quiet = signal.signal(signal.SIGALRM, alarm), os.getcwd(), io.StringIO()
    os.chdir(folder)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    _watched.append(f"{folder}{os.sep}")
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _watched.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.chdir(here)


def run_case(world, folder, seed, number):
    """One case, in a folder of its own. Returns (its kind and what was changed; whether it went through; what went
    wrong, "" where nothing did)."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    here = folder / str(number)
    here.mkdir()
    done, read = kind(rng, world, here)
    told = f"{kind.__name__} {' '.join(map(str, done))}"[:300]
    try:
        with watched(here):
            common.run(lambda argv: read(), [])
        return told, True, ""
    except SystemExit as end:
        said = end.code
        wrong = "" if said in (0, None, 2) or isinstance(said, str) and said.startswith("error: ") else f"exit {said!r}"
        if isinstance(said, str) and len(said) > 3000:
            wrong = f"a sentence of {len(said)} characters"
        return told, not said, wrong
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            raise
        return told, False, "".join(traceback.format_exception(e))


def fuzz(seed=0, count=None, seconds=60.0, case=None):
    """Run cases until there were `count`, or for so many seconds. Returns (how many, how many went through, failures).
    """
    if _audit not in _hooked:
        sys.addaudithook(_audit)
        _hooked.append(_audit)
    before, sizes = prepare.parallel, (prepare.SHARD_CLIPS, prepare.SHARD_SOURCES)
    prepare.parallel = OneProcess
    folder = Path(tempfile.mkdtemp(prefix="trivox-fuzz-")).resolve()
    (folder / "cases").mkdir()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_world(folder / "world")
        start, through, failures, number = time.monotonic(), 0, [], -1
        while case is not None and number < 0 or case is None and (
                number + 1 < count if count else time.monotonic() - start < seconds):
            number = case if case is not None else number + 1
            faulthandler.dump_traceback_later(60 + LIMIT, exit=True, file=sys.__stderr__)  # what no signal interrupts
            told, went, wrong = run_case(folder / "world", folder / "cases", seed, number)
            faulthandler.cancel_dump_traceback_later()
            through += went
            if wrong:
                failures.append((number, told, wrong))
                print(f"\ncase {number}: {told}\n{wrong}\nagain: python tests/fuzz.py --seed {seed} --case {number}",
                      flush=True)
            if case is None:
                shutil.rmtree(folder / "cases" / str(number))
        return (1 if case is not None else number + 1), through, failures
    finally:
        prepare.parallel, (prepare.SHARD_CLIPS, prepare.SHARD_SOURCES) = before, sizes
        if case is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"its files: {folder / 'cases' / str(case)}")


_hooked = []


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="how many cases")
    parser.add_argument("--seconds", type=float, default=60.0, help="or for how long (%(default)s)")
    parser.add_argument("--case", type=int, help="one alone, by its number")
    args = parser.parse_args(argv)
    start = time.monotonic()
    count, through, failures = fuzz(args.seed, args.count, args.seconds, args.case)
    print(f"{count:,} cases in {time.monotonic() - start:.0f} s: {through:,} were read, "
          f"{count - through - len(failures):,} refused in a sentence, {len(failures)} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main(sys.argv[1:])
