"""Corpora to shards, shards to tensors.

    python data.py demo                  speak and prepare the demo corpus; nothing to download
    python data.py ljspeech              download and prepare LJSpeech 1.1 (2.6 GB, public domain)
    python data.py ljspeech --root DIR   prepare any folder in LJSpeech's layout, or of bare recordings
    python data.py tokenize --codec NAME --root DIR --out DIR
                                         encode such a corpus, or nested folders of music, with a neural audio codec
    python data.py demo_music            compose and tokenize pieces of music; nothing to download

A corpus is a folder in LJSpeech's layout: `metadata.csv`, a line `id|text|normalized text|speaker` a clip of which the
last two may be missing, and the recordings `wavs/<id>.wav` (or flac, ogg, mp3; any rate). Where there is a
`heldout.txt`, an id a line, it names the validation clips; else 2 % are drawn. `grammar.jsgf` says which sentences can
occur, for evaluate.py.

A data set is a folder of shards made from a corpus: `mels_00000.f16` holds log-mels, (frames, n_mels) float16, one clip
after the other, and `mels_00000.jsonl` a line a clip. `dataset_stats.json` is written last and marks a whole one.
A data set of tokens is made likewise of `tokens_00000.u16`, (frames, Q) uint16, and `tokens_00000.jsonl`; what is
written last is `codec.json`, and beside it mel_rvq leaves its centroids, `codec.safetensors`.
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
import threading
import time
from dataclasses import asdict, fields
from functools import cache, cached_property
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from audio import CODECS, MelConfig, MelRVQ, load_codec, log_mel, read_codec, read_wav, write_wav
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
# The music of the demo

MUSIC_RATE = 22050  # Hz
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))  # major and minor, in semitones
PROGRESSIONS = ((0, 5, 3, 4), (0, 4, 5, 3), (0, 3, 1, 4), (5, 3, 0, 4), (0, 2, 3, 4), (0, 3, 5, 4))  # scale degrees
RHYTHMS = ((1, 1, 1, 1), (1, .5, .5, 1, 1), (.5, .5, 1, .5, .5, 1), (1.5, .5, 1, 1), (1.5, .5, 1.5, .5),
           (.75, .75, .5, 1, 1))  # beats
KICKS = ((0, 8), (0, 6, 8), (0, 8, 10), (0, 4, 8, 12), (0, 7, 10))  # sixteenths of a bar
HATS = (4, 2, 1)  # sixteenths from one to the next


def compose(seed):
    """A piece of music of 6 to 11 s, (samples,) float32 at MUSIC_RATE: four bars, A A B A, and a last chord.

    Tempo, key, chords, motif, timbres and drums are drawn; in B the motif is turned over above other chords. The parts
    come in one after the other while all grow louder and brighter, so that each bar is known by its sound.
    """
    rng = np.random.default_rng(seed)
    beat, key, scale = 60 / rng.uniform(98, 170), rng.integers(45, 57), SCALES[rng.integers(2)]
    chords, rhythm = PROGRESSIONS[rng.integers(len(PROGRESSIONS))], RHYTHMS[rng.integers(len(RHYTHMS))]
    motif = rng.choice((0, 2, 4)) + np.cumsum([0, *rng.choice((-2, -1, -1, 1, 1, 2), len(rhythm) - 1)])
    kick, hat = KICKS[rng.integers(len(KICKS))], HATS[rng.integers(len(HATS))]
    pad, bass, lead = (waveform(rng) for _ in range(3))
    entries = dict(zip(("bass", "drums", "lead"), rng.permutation((1, 2, rng.integers(2)))))
    wav = np.zeros(int((18 * beat + 0.3) * MUSIC_RATE))

    def pitch(degree, octave):  # Hz
        return 440 * 2 ** ((key + scale[degree % 7] + 12 * (degree // 7 + octave) - 69) / 12)

    def add(sound, start, gain):  # start in beats
        at = int(start * beat * MUSIC_RATE)
        wav[at:at + len(sound)] += gain * sound[:len(wav) - at]

    for bar, section in enumerate("AABA"):
        gain, harmonics = 0.4 + 0.2 * bar, 3 + 3 * bar
        for half, root in enumerate(chords[2:] if section == "B" else chords[:2]):
            for degree in (root, root + 2, root + 4):
                add(note(pitch(degree, 0), 2 * beat, pad(harmonics), 0.05, 1.5), 4 * bar + 2 * half, 0.16 * gain)
            if bar >= entries["bass"]:
                for start, octave in ((0, -1), (1, -1), (1.5, 0)):
                    sound = note(pitch(root, octave), beat, bass(harmonics), 0.01, 0.4)
                    add(sound, 4 * bar + 2 * half + start, 0.3 * gain)
        if bar >= entries["drums"]:
            for step in kick:
                add(drum(rng, "kick"), 4 * bar + step / 4, 0.7 * gain)
            for step in (4, 12):
                add(drum(rng, "snare"), 4 * bar + step / 4, 0.35 * gain)
            for step in range(0, 16, hat):
                add(drum(rng, "hat"), 4 * bar + step / 4, 0.1 * gain)
        if bar >= entries["lead"]:
            start = 4 * bar
            for degree, length in zip(chords[2] - motif if section == "B" else chords[0] + motif, rhythm):
                add(note(pitch(degree, 1 + (bar == 3)), length * beat, lead(harmonics), 0.02, 0.8), start, 0.3 * gain)
                start += length
    for degree in (chords[0], chords[0] + 2, chords[0] + 4, chords[0] + 7):
        add(note(pitch(degree, 0), 2 * beat, pad(12), 0.01, 0.5), 16, 0.2)
    return (0.9 * wav / np.abs(wav).max()).astype(np.float32)


def waveform(rng):
    """Draw a timbre: a function from a number of harmonics to one period of the sound, 1,024 samples."""
    slope, even, phases = rng.uniform(0.7, 2), rng.choice((0.1, 1)), rng.uniform(0, 2 * np.pi, 20)

    def period(harmonics):
        k = np.arange(1, harmonics + 1)[:, None]
        waves = np.sin(2 * np.pi * k * np.arange(1024) / 1024 + phases[:harmonics, None])
        wave = (k ** -slope * np.where(k % 2, 1, even) * waves).sum(0)
        return wave / np.abs(wave).max()

    return period


def note(hertz, seconds, period, attack, decay):
    """A note of a waveform, swelling for `attack` seconds and falling by 1/e in `decay`; the end is faded."""
    t = np.arange(int(seconds * MUSIC_RATE)) / MUSIC_RATE
    wave = period[(t * hertz * len(period)).astype(int) % len(period)]
    return wave * np.minimum(t / attack, 1) * np.exp(-t / decay) * np.minimum((seconds - t) / 0.02, 1)


def drum(rng, name):
    t = np.arange(int(0.25 * MUSIC_RATE)) / MUSIC_RATE
    if name == "kick":
        return np.sin(2 * np.pi * (45 * t - 4 * np.exp(-30 * t))) * np.exp(-t / 0.08)
    noise = rng.standard_normal(len(t) + 1)
    if name == "snare":
        return (0.5 * noise[1:] + np.sin(2 * np.pi * 190 * t)) * np.exp(-t / 0.06)
    return np.diff(noise) * np.exp(-t / 0.02)


def _compose_piece(job):
    path, seed = job
    if not path.exists():
        write_wav(path.with_suffix(".part.wav"), compose(seed), MUSIC_RATE)
        path.with_suffix(".part.wav").replace(path)


def make_demo_music(root, pieces, heldout):
    """Compose pieces into a corpus at `root`: wavs/piece-00000.wav and on, of which the last `heldout` are held out."""
    if heldout >= pieces:
        raise UserError(f"{heldout} of {pieces} pieces held out leave none to train on")
    names = [f"wavs/piece-{i:05d}" for i in range(pieces)]
    with parallel() as pool:
        jobs = [(root / f"{name}.wav", seed) for seed, name in enumerate(names)]
        list(tqdm(pool.imap(_compose_piece, jobs, chunksize=16), "composing", pieces, unit=" pieces", leave=False))
    (root / "heldout.txt").write_text("".join(name + "\n" for name in names[pieces - heldout:]))


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


def cores():
    """The processor cores that are for this process, one of those that torchrun started here."""
    return max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def parallel():
    """A pool of a process a core. They start anew, since the fork of a process that runs torch's threads can hang."""
    return get_context("spawn").Pool(cores(), torch.set_num_threads, (1,))


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


def draw_validation(ids, share=0.02):
    """2 % of the ids, at least one where there are two, chosen by hash: the same whatever the order or the machine."""
    ranked = sorted(ids, key=lambda id: hashlib.sha256(id.encode()).digest())
    return set(ranked[:max(round(share * len(ids)), int(len(ids) > 1))])


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
# Tokens

SHARD_SOURCES = 64
FIT_SOURCES, FIT_FRAMES = 1000, 100_000  # what mel_rvq is fitted to: so many recordings, and at most so many frames
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")


def tokenize(root, out, name, chunk=None, device="cpu", mel=None, sizes=None, columns="id|text|normalized|speaker"):
    """Encode the corpus at `root` into a token data set at `out`. Goes on where a killed run stopped.

    root: in LJSpeech's layout, or any folder in which recordings lie. name: one of audio.CODECS, or "mel_rvq", which is
    fitted first: mel is its MelConfig, sizes those of its books. chunk: (number, "frames" or "seconds") to cut the
    recordings at; a rest is kept from a quarter of that on. None keeps them whole. Under torchrun each process writes
    its own shards, and the first of them closes the data set.

    Recordings that cannot be read or are silent are skipped and listed with the reason. Raises UserError where nothing
    is left or `out` holds other tokens.
    """
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    sources = corpus_sources(root, columns)
    plan = {"codec": name, "chunk": chunk, "root": str(root.resolve()), "mel": mel and asdict(mel), "sizes": sizes,
            "sources": hashlib.sha256(json.dumps(sources).encode()).hexdigest()}
    plan = json.dumps(plan)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "plan.json").exists() and (out / "plan.json").read_text() != plan:
        raise UserError(f"{out} holds data of another corpus or other settings: delete it, or choose another --out")
    write_whole(out / "plan.json", plan)

    if name == "mel_rvq":
        if rank == 0 and not (out / "codec.safetensors").exists():
            fit_mel_rvq(root, sources, mel, sizes).save(out)
        wait_for([out / "codec.safetensors"])
        codec = job_codec = MelRVQ.load(out, mel)
        device = "cpu"
    else:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        job_codec = (name, f"cuda:{local}" if device == "cuda" else "cpu")
        codec = cached_codec(*job_codec)  # here as well, so that missing weights are one error
    frames = chunk and (chunk[0] if chunk[1] == "frames" else round(chunk[0] * codec.frame_rate))
    jobs = [(out / f"tokens_{i:05d}", root, sources[i * SHARD_SOURCES:(i + 1) * SHARD_SOURCES], job_codec, frames)
            for i in range(-(-len(sources) // SHARD_SOURCES))]
    todo = [job for job in jobs[rank::world] if not job[0].with_suffix(".jsonl").exists()]
    if todo:
        bar = tqdm(None, "tokens", sum(len(job[2]) for job in todo), unit=" recordings", leave=False)
        with (ThreadPool(cores()) if device == "cuda" else parallel()) as pool, bar:
            for sources_done in pool.imap_unordered(_tokenize_shard, todo):
                bar.update(sources_done)
    if rank > 0:
        return

    indices = [job[0].with_suffix(".jsonl") for job in jobs]
    wait_for(indices)
    rows = [json.loads(line) for index in indices for line in index.open(encoding="utf-8")]
    skipped = [r for r in rows if "skipped" in r]
    kept = [r for r in rows if "skipped" not in r]
    for r in skipped:
        print(f"skipped {r['id']}: {r['skipped']}")
    if not kept:
        raise UserError(f"none of the {len(sources)} recordings of {root} could be used")
    if (root / "grammar.jsgf").exists():
        shutil.copy(root / "grammar.jsgf", out)
    seconds = sum(r["frames"] for r in kept) / codec.frame_rate
    info = {
        "codec": name, "sample_rate": codec.sample_rate, "hop_length": codec.hop_length,
        "frame_rate": codec.frame_rate, "codebooks": codec.codebooks, "codebook_size": codec.codebook_size,
        "mel": mel and asdict(mel), "chunk_frames": frames, "clips": len(kept),
        "validation_clips": sum(r["split"] == "val" for r in kept), "skipped": len(skipped), "seconds": seconds,
        "max_frames": max(r["frames"] for r in kept),
    }
    write_whole(out / "codec.json", json.dumps(info, indent=2) + "\n")
    print(f"{out}: {len(kept):,} clips, {seconds / 3600:.2f} h, {info['validation_clips']} held out, {len(skipped)} "
          f"skipped; {name}, {codec.frame_rate:.1f} frames/s of {codec.codebooks} x {codec.codebook_size} codes")


def corpus_sources(root, columns="id|text|normalized|speaker"):
    """The recordings of a corpus: dicts of id, text, speaker, source (the file's path under `root`), split.

    heldout.txt names those for validation, by id; else 5 % of the files are drawn. Raises UserError for none.
    """
    if (root / "metadata.csv").exists():
        sources = [{**c, "source": c["id"]} for c in read_metadata(root / "metadata.csv", columns)]
        for s in sources:
            try:
                s["source"] = f"wavs/{clip_path(root, s['id']).relative_to((root / 'wavs').resolve())}"
            except UserError as e:
                s["skipped"] = str(e)
    else:
        files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix.lower() in AUDIO_ENDINGS)
        sources = [{"id": str(Path(f).with_suffix("")), "text": "", "speaker": "", "source": f} for f in files]
    if not sources:
        raise UserError(f"{root} holds neither metadata.csv nor a recording ({', '.join(AUDIO_ENDINGS)})")
    if (root / "heldout.txt").exists():
        heldout = set((root / "heldout.txt").read_text(encoding="utf-8").splitlines())
        val = {s["source"] for s in sources if s["id"] in heldout}
    else:
        val = draw_validation(sorted({s["source"] for s in sources}), 0.05)
    return [{**s, "split": "val" if s["source"] in val else "train"} for s in sources]


def fit_mel_rvq(root, sources, mel, sizes):
    """Fit mel_rvq to frames of the recordings for training, drawn by hash."""
    train = {s["source"] for s in sources if s["split"] == "train"}
    drawn = sorted(train, key=lambda source: hashlib.sha256(source.encode()).digest())[:FIT_SOURCES]
    jobs = [(root / source, mel, -(-FIT_FRAMES // len(drawn))) for source in drawn]
    with parallel() as pool:
        mels = list(tqdm(pool.imap(_some_mels, jobs, chunksize=16), "log-mels", len(jobs), leave=False))
    print(f"fitting mel_rvq to {sum(map(len, mels)):,} frames of {len(jobs):,} recordings")
    return MelRVQ.fit(torch.from_numpy(np.concatenate(mels)), mel, sizes)


def _some_mels(job):
    """At most so many frames of a recording, evenly spaced; none of one that cannot be read."""
    path, mel, count = job
    try:
        mels = log_mel(read_wav(path, mel.sample_rate), mel).numpy()
    except UserError:
        return np.zeros((0, mel.n_mels), np.float32)
    return mels[np.linspace(0, len(mels) - 1, min(count, len(mels))).astype(int)]


cached_codec = cache(load_codec)
on_gpu = threading.Lock()  # of the threads that read for one GPU, one encodes at a time


def _tokenize_shard(job):
    """One shard: first the codes, then, as the mark that they are whole, the index. Returns the number of sources."""
    path, root, sources, codec, chunk_frames = job
    if isinstance(codec, tuple):
        codec = cached_codec(*codec)
    lines, offset, waiting = [], 0, []  # waiting: (line, wav) that have been read
    part = path.with_suffix(f".{os.getpid()}.part")  # the workers of a killed run may still be at this shard
    with part.open("wb") as f:
        for n, source in enumerate(sources):
            try:
                waiting += cut_source(root, source, codec, chunk_frames)
            except UserError as e:
                lines.append({**source, "skipped": str(e)})
            seconds = sum(len(wav) for _, wav in waiting) / codec.sample_rate
            if waiting and (seconds > 600 or n == len(sources) - 1):
                with on_gpu:
                    codes = codec.encode([wav for _, wav in waiting])
                for (line, _), c in zip(waiting, codes):
                    c.astype(np.uint16).tofile(f)
                    lines.append({**line, "offset": offset, "frames": len(c)})
                    offset += len(c)
                waiting = []
    part.replace(path.with_suffix(".u16"))
    write_whole(path.with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    return len(sources)


def cut_source(root, source, codec, chunk_frames):
    """One recording, whole or in chunks: [(line of the index, wav)]. Raises UserError where it cannot be used."""
    if "skipped" in source:
        raise UserError(source["skipped"])
    wav = read_wav(root / source["source"], codec.sample_rate)
    if np.abs(wav).max() < 1e-4:
        raise UserError("it is silent")
    size = (chunk_frames or 0) * codec.hop_length
    if len(wav) <= size or not size:
        return [({**source, "start": 0.0}, wav)]
    starts = [start for start in range(0, len(wav), size) if len(wav) - start >= size / 4]
    return [({**source, "id": f"{source['id']}_{n:03d}", "text": "", "start": start / codec.sample_rate},
             wav[start:start + size]) for n, start in enumerate(starts)]


def write_whole(path, text):
    """Write a text file at once and whole, or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def wait_for(paths):
    """Wait for files that other processes write. There is no limit: torchrun ends all processes when one fails."""
    while not all(path.exists() for path in paths):
        time.sleep(0.2)


class TokenDataset:
    """Read-only view of a token data set.

    rows: a dict a clip, with id, text ("" where it is not a whole recording), speaker, split, source, start (seconds),
    frames. codec: codec.json. grammar: JSGF or None. Raises UserError where the folder holds no token data set, a
    damaged one, or one that is not what the config asks for: the codec's name, codebooks, codebook_size, frame_rate.
    """

    def __init__(self, folder, **wanted):
        folder = Path(folder)
        if not (folder / "codec.json").exists():
            raise UserError(f"no token data set at {folder}: python data.py tokenize makes one")
        self.codec = read_codec(folder)
        for key, value in wanted.items():
            found = self.codec[key]
            if value is not None and (abs(found - value) > 0.01 if key == "frame_rate" else found != value):
                raise UserError(f"the tokens at {folder} have {key} {found}, but the config asks for {value}")
        self.folder, self.rows, self.shards = folder, [], []
        grammar = folder / "grammar.jsgf"
        self.grammar = grammar.read_text() if grammar.exists() else None
        for index in sorted(folder.glob("tokens_*.jsonl")):
            rows = [json.loads(line) for line in index.open(encoding="utf-8")]
            rows = [{**row, "shard": len(self.shards)} for row in rows if "skipped" not in row]
            shard = index.with_suffix(".u16")
            shape = sum(row["frames"] for row in rows), self.codec["codebooks"]
            if not shard.exists() or shard.stat().st_size != 2 * shape[0] * shape[1]:
                raise UserError(f"{shard} does not hold the {shape[0]} x {shape[1]} codes of its index: tokenize again")
            self.rows += rows
            self.shards.append(np.memmap(shard, np.uint16, "r", shape=shape) if rows else None)

    def clips(self, split):
        """Indices of the clips of "train", "val" or "all"; UserError where there is none."""
        if clips := [i for i, row in enumerate(self.rows) if split in (row["split"], "all")]:
            return clips
        raise UserError(f"{self.folder} has no {split} clips")

    def codes(self, i):
        """The codes of clip i, (frames, Q) int64. Raises UserError for codes that the codec does not have."""
        row = self.rows[i]
        codes = self.shards[row["shard"]][row["offset"]:row["offset"] + row["frames"]].astype(np.int64)
        if codes.max() >= self.codec["codebook_size"]:
            raise UserError(f"clip {row['id']} of {self.folder} has a code {codes.max()}, beyond the codebook's "
                            f"{self.codec['codebook_size']}")
        return torch.from_numpy(codes)


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
    for name, help in (("demo", "speak and prepare the demo corpus"), ("ljspeech", "prepare LJSpeech or its like"),
                       ("tokenize", "encode a corpus with a neural audio codec"),
                       ("demo_music", "compose and tokenize pieces of music")):
        p = commands.add_parser(name, help=help)
        p.add_argument("--out", type=Path, default=Path("data") / name, help="folder of the data set (%(default)s)")
        mel = MelConfig(n_fft=2048, hop_length=512) if name == "demo_music" else MelConfig()
        for f in fields(MelConfig):
            p.add_argument(f"--{f.name}", type=type(f.default), default=getattr(mel, f.name),
                           help=f"of {'mel_rvq' if name in ('tokenize', 'demo_music') else 'log-mels'} (%(default)s)")
        if name in ("demo", "ljspeech"):
            p.add_argument("--max_seconds", type=float, default=11.88,
                           help="skip longer clips (%(default)s, 1,024 frames)")
        else:
            p.add_argument("--codebooks", type=int, default=4, help="of mel_rvq (%(default)s)")
            p.add_argument("--codebook_size", default="1024", help="of mel_rvq; a number, or one a book (%(default)s)")
        if name == "demo":
            p.add_argument("--root", type=Path, help="folder of the spoken corpus (OUT/corpus)")
            p.add_argument("--sentences", type=int, default=4000, help="how many (%(default)s)")
            p.add_argument("--heldout", type=int, default=64, help="how many of them are for validation (%(default)s)")
            p.add_argument("--voices", default="en-us", help="espeak-ng voices, with commas between (%(default)s)")
            p.add_argument("--transcripts", type=Path, help="speak these instead: metadata.csv, or a sentence a line")
        elif name == "demo_music":
            p.add_argument("--root", type=Path, help="folder of the composed corpus (OUT/corpus)")
            p.add_argument("--pieces", type=int, default=800, help="how many (%(default)s)")
            p.add_argument("--heldout", type=int, default=64, help="how many of them are for validation (%(default)s)")
        else:
            p.add_argument("--root", type=Path, required=name == "tokenize",
                           help="a corpus that is here" + "; else LJSpeech 1.1 is downloaded" * (name == "ljspeech"))
            p.add_argument("--columns", default="id|text|normalized|speaker", help="of its metadata.csv (%(default)s)")
        if name == "tokenize":
            p.add_argument("--codec", choices=(*CODECS, "mel_rvq"), required=True)
            p.add_argument("--chunk_frames", type=int, help="cut recordings to so many (2040 for bare folders of them; "
                           "those that metadata.csv names are kept whole)")
            p.add_argument("--chunk_seconds", type=float, help="or to so many")
            p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    mel = MelConfig(**{f.name: getattr(args, f.name) for f in fields(MelConfig)})
    if args.command == "demo":
        root = args.root or args.out / "corpus"
        make_demo_corpus(root, args.sentences, args.heldout, args.voices.split(","), args.transcripts)
        prepare(root, args.out, mel, args.max_seconds)
        return
    if args.command == "demo_music":
        root = args.root or args.out / "corpus"
        make_demo_music(root, args.pieces, args.heldout)
        tokenize(root, args.out, "mel_rvq", mel=mel, sizes=book_sizes(args))
        return
    if args.command == "tokenize":
        chunk = None if (args.root / "metadata.csv").exists() else (2040, "frames")
        if args.chunk_seconds or args.chunk_frames:
            chunk = (args.chunk_seconds, "seconds") if args.chunk_seconds else (args.chunk_frames, "frames")
        if args.codec == "mel_rvq":
            tokenize(args.root, args.out, args.codec, chunk, mel=mel, sizes=book_sizes(args), columns=args.columns)
        else:
            tokenize(args.root, args.out, args.codec, chunk, args.device, columns=args.columns)
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


def book_sizes(args):
    """The sizes of mel_rvq's books that --codebooks and --codebook_size ask for."""
    sizes = args.codebook_size.split(",")
    if not all(size.isdigit() and 0 < int(size) <= 65536 for size in sizes) or len(sizes) not in (1, args.codebooks):
        raise UserError(f"--codebook_size {args.codebook_size}: expected one number of at most 65,536, or one for each "
                        f"of --codebooks {args.codebooks}")
    return [int(size) for size in sizes] * (args.codebooks if len(sizes) == 1 else 1)


if __name__ == "__main__":
    run(main, sys.argv[1:])
