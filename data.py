"""Corpora to shards, shards to tensors.

    python data.py demo                  speak and prepare the demo corpus; nothing to download
    python data.py ljspeech              download and prepare LJSpeech 1.1 (2.6 GB, public domain)
    python data.py ljspeech --root DIR   prepare any folder in LJSpeech's layout, or of bare recordings

A corpus is a folder in LJSpeech's layout: `metadata.csv`, a line `id|text|normalized text|speaker` a clip of which the
last two may be missing, and the recordings `wavs/<id>.wav` (or flac, ogg, mp3; any rate). Where there is a
`heldout.txt`, an id a line, it names the validation clips; else 2 % are drawn. `grammar.jsgf` says which sentences can
occur, for evaluate.py.

A data set is a folder of shards made from a corpus: `mels_00000.f16` holds log-mels, (frames, n_mels) float16, one clip
after the other, and `mels_00000.jsonl` a line a clip. `dataset_stats.json` is written last and marks a whole one.
"""

import argparse
import csv
import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import sys
from dataclasses import asdict, fields
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from audio import MelConfig, log_mel, read_wav, write_wav
from common import UserError, run

# ------------------------------------------------------------------------------------------------------------
# The demo corpus: a small grammar, spoken by espeak-ng

TEMPLATES = (
    "the {person} {did} {number} {quality} {things} {where} the {place} {time}.",
    "the {person} {did} {number} {things} {time}.",
    "{time}, the {person} {did} the {quality} {things}.",
    "{number} {quality} {things} are {where} the {place}.",
    "the {things} {where} the {place} are {quality}.",
)
SLOTS = {
    "person": "doctor teacher farmer sister brother mother father neighbor baker driver singer captain".split(),
    "did": "found bought sold painted carried wanted counted washed dropped noticed borrowed cleaned".split(),
    "number": "two three four five six seven eight nine ten eleven twenty ninety".split(),
    "quality": "green yellow purple little heavy broken empty golden silver wooden beautiful expensive".split(),
    "things": "apples books chairs boxes flowers horses bottles letters pictures blankets candles monkeys".split(),
    "where": "behind under near inside across".split(),
    "place": "house garden river kitchen market school bridge window station village forest mountain".split(),
    "time": "today,yesterday,this morning,last night,every summer,on Monday,on Friday,after lunch".split(","),
}


def demo_sentence(rng):
    """One sentence of the grammar, drawn with a random.Random."""
    text = rng.choice(TEMPLATES).format(**{slot: rng.choice(words) for slot, words in SLOTS.items()})
    return text[0].upper() + text[1:]


def demo_grammar():
    """The same grammar in JSGF (Java Speech Grammar Format), as recognisers read it: lower case, no punctuation."""
    rules = [f"<{slot}> = {' | '.join(words).lower()};" for slot, words in SLOTS.items()]
    sentences = " | ".join(re.sub(r"[.,]", "", t).replace("{", "<").replace("}", ">") for t in TEMPLATES)
    return "\n".join(["#JSGF V1.0;", "grammar demo;", *rules, f"public <sentence> = {sentences};", ""])


@cache
def espeak():
    """espeak-ng's shared library, initialised for synchronous synthesis. Returns (library, sample rate in Hz)."""
    import espeakng_loader

    lib = ctypes.CDLL(espeakng_loader.get_library_path())
    synchronous = 2
    rate = lib.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
    lib.espeak_Synth.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
                                 ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]
    if rate <= 0:
        raise UserError("espeak-ng could not be initialised: is the package espeakng-loader whole?")
    return lib, rate


def speak(text, voice="en-us"):
    """Speak one text with espeak-ng. Returns (samples,) float32 in [-1, 1] at espeak's rate, 22,050 Hz.

    Raises UserError for an unknown voice; "en-us+f2" is the voice en-us in its female variant 2.
    """
    lib, _ = espeak()
    if lib.espeak_SetVoiceByName(voice.encode()) != 0:
        raise UserError(f"espeak-ng has no voice {voice!r}; en-us, en-us+f2, en-gb-x-rp are some")
    chunks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, count, events):
        if count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    lib.espeak_SetSynthCallback(receive)
    data, utf8 = text.encode(), 1
    lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, utf8, None, None)
    return np.concatenate(chunks).astype(np.float32) / 32768 if chunks else np.zeros(0, np.float32)


def _speak_clip(job):
    path, text, voice = job
    if not path.exists():
        wav = speak(text, voice)
        write_wav(path.with_suffix(".part.wav"), wav, espeak()[1])
        path.with_suffix(".part.wav").replace(path)


def make_demo_corpus(root, sentences, heldout, voices, transcripts=None):
    """Speak sentences of the demo grammar, or those of a file, into a corpus at `root`; `heldout` of them are marked.

    transcripts: a metadata.csv (its normalised text is spoken) or a text with a sentence a line.
    """
    rng = random.Random(0)
    if transcripts:
        clips = [(c["id"], c["text"]) for c in read_metadata(transcripts)]
    else:
        texts = {}
        while len(texts) < sentences:
            texts[demo_sentence(rng)] = None  # a dict keeps the order and no sentence twice
        clips = [(f"demo-{i:05d}", text) for i, text in enumerate(texts)]
    if heldout >= len(clips):
        raise UserError(f"{heldout} of {len(clips)} sentences held out leave none to train on")
    rows = [(id, text, text, voices[i % len(voices)]) for i, (id, text) in enumerate(clips)]
    root.mkdir(parents=True, exist_ok=True)
    metadata, lines = root / "metadata.csv", ["|".join(row) + "\n" for row in rows]
    spoken = set(metadata.open(encoding="utf-8")) if metadata.exists() else ()
    for (id, *_), line in zip(rows, lines):
        if line not in spoken:  # a recording of another text or voice
            clip_path(root, id).unlink(missing_ok=True)
    metadata.write_text("".join(lines), encoding="utf-8")
    with parallel() as pool:
        jobs = [(clip_path(root, id), text, voice) for id, text, _, voice in rows]
        list(tqdm(pool.imap(_speak_clip, jobs, chunksize=64), "speaking", len(jobs), unit=" clips", leave=False))
    (root / "heldout.txt").write_text("".join(id + "\n" for id, _ in rng.sample(clips, heldout)))
    if not transcripts:
        (root / "grammar.jsgf").write_text(demo_grammar())


# ------------------------------------------------------------------------------------------------------------
# Corpora in LJSpeech's layout

LJSPEECH_URL = "https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2"
LJSPEECH_SHA256 = "be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5"


def download_ljspeech(folder):
    """Download LJSpeech 1.1, check its checksum and unpack it. Returns the corpus folder."""
    import pooch

    if (folder / "LJSpeech-1.1" / "metadata.csv").exists():
        return folder / "LJSpeech-1.1"
    print(f"LJSpeech 1.1: downloading 2.6 GB from {LJSPEECH_URL} (public domain)")
    try:
        archive = pooch.retrieve(LJSPEECH_URL, f"sha256:{LJSPEECH_SHA256}", "LJSpeech-1.1.tar.bz2", folder,
                                 progressbar=True)
    except Exception as e:  # offline, refused, wrong checksum
        raise UserError(f"cannot download {LJSPEECH_URL} ({type(e).__name__}); unpack it by hand and give its folder "
                        "as --root") from None
    shutil.unpack_archive(archive, folder, filter="data")
    return folder / "LJSpeech-1.1"


def read_metadata(path, columns="id|text|normalized|speaker"):
    """The clips of a metadata.csv, or of a text with a sentence a line: dicts of id, text, speaker ("" if unknown).

    Raises UserError where the file is missing or holds no clip.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    clips = []
    for n, cells in enumerate(csv.reader(lines, delimiter="|", quoting=csv.QUOTE_NONE)):
        if len(cells) == 1:
            cells = [f"clip-{n:05d}", cells[0]]
        row = dict(zip(columns.split("|"), map(str.strip, cells)))
        text = row.get("normalized") or row.get("text", "")
        if row.get("id") and text:
            clips.append({"id": row["id"], "text": text, "speaker": row.get("speaker", "")})
    if not clips:
        raise UserError(f"{path} names no clip: expected lines such as LJ001-0001|text|normalized text")
    return clips


def read_lines(path, limit=None):
    """The lines of a text file that are not blank. Raises UserError where it is missing, has none, or has one of more
    than `limit` bytes."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    if not lines:
        raise UserError(f"{path} has no line of text")
    if limit and (longest := max(len(line.encode()) for line in lines)) > limit:
        raise UserError(f"{path} has a line of {longest} bytes; the text encoder reads {limit}")
    return lines


def clip_path(root, id):
    """The recording of a clip: wavs/<id> with any known ending. Raises UserError for an id that leads out of wavs/."""
    wavs = (root / "wavs").resolve()
    path = (wavs / f"{id}.wav").resolve()
    if not path.is_relative_to(wavs):
        raise UserError(f"the id {id!r} leads out of {wavs.name}/")
    for ending in (".wav", ".flac", ".ogg", ".mp3"):
        if (found := path.with_name(path.stem + ending)).exists():
            return found
    return path


def transcribe(root, out):
    """Write out/metadata.csv for a folder of bare recordings, by Whisper base.en. Raises UserError without weights."""
    import whisper

    paths = sorted(p for p in (root / "wavs").rglob("*") if p.suffix.lower() in (".wav", ".flac", ".ogg", ".mp3"))
    if not paths:
        raise UserError(f"{root} holds neither metadata.csv nor recordings in wavs/")
    try:
        model = whisper.load_model("base.en")
    except Exception as e:
        raise UserError(f"{root} has no metadata.csv, and Whisper, whose weights base.en.pt (145 MB) cannot be "
                        f"downloaded ({type(e).__name__}), cannot write it: put them into ~/.cache/whisper/") from None
    lines = []
    for path in tqdm(paths, "transcribing", unit=" clips"):
        text = model.transcribe(read_wav(path, 16000), language="en")["text"].strip().replace("|", " ")
        lines.append(f"{path.relative_to(root / 'wavs').with_suffix('')}|{text}|{text}\n")
    out.mkdir(parents=True, exist_ok=True)
    (out / "metadata.csv").write_text("".join(lines), encoding="utf-8")
    return out / "metadata.csv"


# ------------------------------------------------------------------------------------------------------------
# Shards

SHARD_CLIPS = 256
MAX_TEXT_BYTES = 256  # what the text encoder reads


def parallel():
    """A pool of a process a core. They start anew, since the fork of a process that runs torch's threads can hang."""
    return get_context("spawn").Pool(os.cpu_count())


def prepare(root, out, mel, max_seconds, metadata=None, columns="id|text|normalized|speaker"):
    """Turn the corpus at `root` into shards at `out`. Goes on where a killed run stopped.

    Clips that cannot be read, are empty, longer than `max_seconds` or have more than 256 bytes of text are skipped and
    listed with the reason. Raises UserError where no clip is left or `out` holds other shards.
    """
    clips = read_metadata(metadata or root / "metadata.csv", columns)
    heldout = root / "heldout.txt"
    val = set(heldout.read_text().split()) if heldout.exists() else draw_validation([c["id"] for c in clips])
    for clip in clips:
        clip["split"] = "val" if clip["id"] in val else "train"
    jobs = [(out / f"mels_{i:05d}", root, clips[i * SHARD_CLIPS:(i + 1) * SHARD_CLIPS], mel, max_seconds)
            for i in range(-(-len(clips) // SHARD_CLIPS))]
    plan = {"mel": asdict(mel), "max_seconds": max_seconds, "root": str(root.resolve()),
            "clips": hashlib.sha256(json.dumps(clips).encode()).hexdigest()}
    out.mkdir(parents=True, exist_ok=True)
    if (out / "plan.json").exists() and json.loads((out / "plan.json").read_text()) != plan:
        raise UserError(f"{out} holds shards of another corpus or other settings: delete it, or choose another --out")
    for part in out.glob("*.part"):  # of a run that was killed
        part.unlink()
    (out / ".plan").write_text(json.dumps(plan))
    (out / ".plan").replace(out / "plan.json")

    todo = [job for job in jobs if not job[0].with_suffix(".jsonl").exists()]
    if todo:
        bar = tqdm(None, "log-mels", sum(len(job[2]) for job in todo), unit=" clips", leave=False)
        with parallel() as pool, bar:
            for clips_done in pool.imap_unordered(_prepare_shard, todo):
                bar.update(clips_done)
    rows = [json.loads(line) for job in jobs for line in job[0].with_suffix(".jsonl").open(encoding="utf-8")]
    skipped = [r for r in rows if "skipped" in r]
    kept = [r for r in rows if "skipped" not in r]
    for r in skipped:
        print(f"skipped {r['id']}: {r['skipped']}")
    if not kept:
        raise UserError(f"none of the {len(rows)} clips of {root} could be used")
    if (root / "grammar.jsgf").exists():
        shutil.copy(root / "grammar.jsgf", out)
    frames, text_bytes = sum(r["frames"] for r in kept), [len(r["text"].encode()) for r in kept]
    mean = sum(r["sum"] for r in kept) / (frames * mel.n_mels)
    stats = {
        "mel_mean": mean, "mel_std": (sum(r["sum_sq"] for r in kept) / (frames * mel.n_mels) - mean**2) ** 0.5,
        "clips": len(kept), "validation_clips": sum(r["split"] == "val" for r in kept), "skipped": len(skipped),
        "seconds": frames / mel.frame_rate, "frames": frames, "max_frames": max(r["frames"] for r in kept),
        "text_bytes": {"min": min(text_bytes), "mean": sum(text_bytes) / len(kept), "max": max(text_bytes)},
        "mel": asdict(mel),
    }
    (out / ".stats").write_text(json.dumps(stats, indent=2) + "\n")
    (out / ".stats").replace(out / "dataset_stats.json")
    print(f"{out}: {len(kept):,} clips, {stats['seconds'] / 3600:.2f} h, {stats['validation_clips']} held out, "
          f"{len(skipped)} skipped; log-mel mean {mean:.4f}, std {stats['mel_std']:.4f}")


def draw_validation(ids):
    """2 % of the ids, at least one where there are two, chosen by hash: the same whatever the order or the machine."""
    ranked = sorted(ids, key=lambda id: hashlib.sha256(id.encode()).digest())
    return set(ranked[:max(round(0.02 * len(ids)), int(len(ids) > 1))])


def _prepare_shard(job):
    """One shard: first the mels, then, as the mark that they are whole, the index. Returns the number of clips."""
    path, root, clips, mel, max_seconds = job
    torch.set_num_threads(1)
    lines, offset = [], 0
    part = path.with_suffix(f".{os.getpid()}.part")  # the workers of a killed run may still be at this shard
    with part.open("wb") as f:
        for clip in clips:
            try:
                features = prepare_clip(root, clip, mel, max_seconds)
            except UserError as e:
                lines.append({**clip, "skipped": str(e)})
                continue
            features.numpy().astype(np.float16).tofile(f)
            lines.append({**clip, "offset": offset, "frames": len(features), "sum": features.double().sum().item(),
                          "sum_sq": features.double().square().sum().item()})
            offset += len(features)
    part.replace(path.with_suffix(".f16"))
    part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    part.replace(path.with_suffix(".jsonl"))
    return len(clips)


def prepare_clip(root, clip, mel, max_seconds):
    """The log-mel (frames, n_mels) of one clip. Raises UserError with the reason why it cannot be used."""
    if (size := len(clip["text"].encode())) > MAX_TEXT_BYTES:
        raise UserError(f"its text has {size} bytes, more than {MAX_TEXT_BYTES}")
    wav = read_wav(clip_path(root, clip["id"]), mel.sample_rate)
    if len(wav) / mel.sample_rate > max_seconds:
        raise UserError(f"{len(wav) / mel.sample_rate:.1f} s are more than {max_seconds:.1f} s")
    if np.abs(wav).max() < 1e-4:
        raise UserError("it is silent")
    return log_mel(wav, mel)


class MelDataset:
    """Read-only view of a prepared data set.

    rows: a dict a clip, with id, text, speaker, split, frames. stats: dataset_stats.json. grammar: JSGF or None.
    Raises UserError where the folder holds no data set, or one of other mel settings than `mel`.
    """

    def __init__(self, folder, mel):
        folder = Path(folder)
        try:
            self.stats = json.loads((folder / "dataset_stats.json").read_text())
        except (OSError, ValueError):
            raise UserError(f"no prepared data set at {folder}: python data.py demo, or data.py ljspeech") from None
        if (made_with := MelConfig(**self.stats["mel"])) != mel:
            raise UserError(f"{folder} was made with {made_with}, but the config asks for {mel}")
        self.folder, self.rows, self.shards = folder, [], []
        grammar = folder / "grammar.jsgf"
        self.grammar = grammar.read_text() if grammar.exists() else None
        for index in sorted(folder.glob("mels_*.jsonl")):
            rows = [json.loads(line) for line in index.open(encoding="utf-8")]
            if all("skipped" in row for row in rows):  # an empty file cannot be mapped
                continue
            self.rows += [{**row, "shard": len(self.shards)} for row in rows if "skipped" not in row]
            self.shards.append(np.memmap(index.with_suffix(".f16"), np.float16, "r").reshape(-1, mel.n_mels))

    def clips(self, split):
        """Indices of the clips of "train", "val" or "all"; UserError where there is none."""
        if clips := [i for i, row in enumerate(self.rows) if split in (row["split"], "all")]:
            return clips
        raise UserError(f"{self.folder} has no {split} clips")

    def mel(self, i):
        """The log-mel of clip i, (frames, n_mels) float32, not normalised."""
        row = self.rows[i]
        shard, start = self.shards[row["shard"]], row["offset"]
        return torch.from_numpy(shard[start:start + row["frames"]].astype(np.float32))


# ------------------------------------------------------------------------------------------------------------
# Text

def text_ids(text):
    """Byte ids as ByT5 numbers them (Xue et al., 2022): UTF-8 bytes + 3, then end-of-text 1; 0 is padding."""
    return [byte + 3 for byte in text.encode()] + [1]


class TextFeatures:
    """Texts to what a model reads of them: byte ids (B, L) int64, or a frozen ByT5's hidden states (B, L, E) float32.

    encoder: "bytes", or a ByT5 of the hub or of a local folder. `fill_cache` keeps states in a file; the states of any
    other text are computed when they are asked for.
    """

    def __init__(self, encoder, device="cpu"):
        self.encoder, self.device = encoder, device
        self.states, self.spans = None, {}  # the cache: (bytes of all texts, E) float16, and {text: (start, end)} in it

    def __call__(self, texts, multiple=1):
        """Returns (features, their number of steps padded to a multiple of `multiple`; lengths (B,))."""
        if self.encoder == "bytes":
            items = [torch.tensor(text_ids(text)) for text in texts]
        elif all(text in self.spans for text in texts):
            items = [torch.from_numpy(self.states[slice(*self.spans[text])].astype(np.float32)) for text in texts]
        else:
            items = self.encode(texts)
        length = torch.tensor([len(item) for item in items])
        features = items[0].new_zeros(len(items), -(-int(length.max()) // multiple) * multiple, *items[0].shape[1:])
        for row, item in zip(features, items):
            row[:len(item)] = item
        return features, length

    @torch.inference_mode()
    def encode(self, texts):
        """The frozen encoder's states, a list of (L, E) float32 on the CPU."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text_ids(t)) for t in texts], batch_first=True)
        states = self.byt5(input_ids=ids.to(self.device), attention_mask=(ids != 0).to(self.device)).last_hidden_state
        return [s[:n].float().cpu() for s, n in zip(states, (ids != 0).sum(1).tolist())]

    @cached_property
    def byt5(self):
        from transformers import T5EncoderModel

        by_hand = Path(os.environ.get("TRIVOX_WEIGHTS", "weights")) / self.encoder.rstrip("/").split("/")[-1]
        try:
            encoder = T5EncoderModel.from_pretrained(by_hand if by_hand.exists() else self.encoder)
        except Exception as e:  # offline, moved, damaged: each its own class
            raise UserError(f"cannot load the text encoder {self.encoder} ({type(e).__name__}); get config.json and "
                            f"the weights (1.2 GB) from https://huggingface.co/{self.encoder}/tree/main and put them "
                            f"into {by_hand}/") from None
        return encoder.eval().to(self.device)

    def fill_cache(self, folder, texts, mode, write):
        """Keep the states of all `texts` and of the empty one in `folder`, unless the encoder is "bytes".

        mode: "on", "off", or "auto" for where they take at most half of the free disk. `write` is true in the one
        process that computes and writes them; the others call this after it, with false.
        """
        if self.encoder == "bytes" or mode == "off":
            return
        texts = sorted({"", *texts}, key=lambda t: (len(t.encode()), t))
        ends = np.cumsum([len(text_ids(t)) for t in texts])
        digest = hashlib.sha256(json.dumps([self.encoder, texts]).encode()).hexdigest()[:16]
        path = Path(folder) / f"text_{digest}.f16"
        if write and not path.exists():
            width = self.byt5.config.d_model
            size, free = ends[-1] * width * 2, shutil.disk_usage(folder).free
            keep = mode == "on" or size < free / 2
            print(f"states of {self.encoder} for {len(texts):,} texts: {size / 1e9:.2f} GB, {free / 1e9:.1f} GB free; "
                  f"{'kept in ' + str(path) if keep else 'computed anew at each step'}")
            if not keep:
                return
            states = np.memmap(path.with_suffix(".part"), np.float16, "w+", shape=(int(ends[-1]), width))
            for i in tqdm(range(0, len(texts), 32), "text states", leave=False):  # sorted, so with little padding
                some = torch.cat(self.encode(texts[i:i + 32]))
                end = ends[min(i + 32, len(texts)) - 1]
                states[end - len(some):end] = some
            states.flush()
            path.with_suffix(".part").replace(path)
        if path.exists():
            self.states = np.memmap(path, np.float16, "r").reshape(int(ends[-1]), -1)
            self.spans = {t: (end - len(text_ids(t)), end) for t, end in zip(texts, ends.tolist())}


# ------------------------------------------------------------------------------------------------------------
# Command line

def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (("demo", "speak and prepare the demo corpus"), ("ljspeech", "prepare LJSpeech or its like")):
        p = commands.add_parser(name, help=help)
        p.add_argument("--out", type=Path, default=Path("data") / name, help="folder of the data set (%(default)s)")
        p.add_argument("--max_seconds", type=float, default=11.88, help="skip longer clips (%(default)s, 1,024 frames)")
        for f in fields(MelConfig):
            p.add_argument(f"--{f.name}", type=type(f.default), default=f.default, help="of log-mels (%(default)s)")
        if name == "demo":
            p.add_argument("--root", type=Path, help="folder of the spoken corpus (OUT/corpus)")
            p.add_argument("--sentences", type=int, default=4000, help="how many (%(default)s)")
            p.add_argument("--heldout", type=int, default=64, help="how many of them are for validation (%(default)s)")
            p.add_argument("--voices", default="en-us", help="espeak-ng voices, with commas between (%(default)s)")
            p.add_argument("--transcripts", type=Path, help="speak these instead: metadata.csv, or a sentence a line")
        else:
            p.add_argument("--root", type=Path, help="a corpus that is here; without it LJSpeech 1.1 is downloaded")
            p.add_argument("--columns", default="id|text|normalized|speaker", help="of its metadata.csv (%(default)s)")
    args = parser.parse_args(argv)
    mel = MelConfig(**{f.name: getattr(args, f.name) for f in fields(MelConfig)})
    if args.command == "demo":
        root = args.root or args.out / "corpus"
        make_demo_corpus(root, args.sentences, args.heldout, args.voices.split(","), args.transcripts)
        prepare(root, args.out, mel, args.max_seconds)
        return
    root = args.root or download_ljspeech(args.out.parent)
    if not (root / "wavs").is_dir():
        raise UserError(f"{root} has no folder wavs/: expected LJSpeech's layout, metadata.csv and wavs/")
    metadata = root / "metadata.csv"
    if not metadata.exists():
        metadata = args.out / "metadata.csv"
        if not metadata.exists():
            transcribe(root, args.out)
    prepare(root, args.out, mel, args.max_seconds, metadata, args.columns)


if __name__ == "__main__":
    run(main, sys.argv[1:])
