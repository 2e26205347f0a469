"""Corpora: folders of recordings with their texts, made here or read.

A corpus is a folder in LJSpeech's layout: `metadata.csv`, a line `id|text|normalized text|speaker` a clip of which the
last two may be missing, and the recordings `wavs/<id>.wav` (or flac, ogg, mp3; any rate). Where there is a
`heldout.txt`, an id a line, it names the validation clips; else 2 % are drawn. `grammar.jsgf` says which sentences can
occur, for evaluate.py. Made here: sentences of a small grammar, spoken by espeak-ng, and composed pieces of music.
"""

import csv
import ctypes
import hashlib
import os
import random
import re
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import torch
from tqdm import tqdm

from audio import read_wav, write_wav
from common import UserError


def cores():
    """The processor cores that are for this process, one of those that torchrun started here."""
    return max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def parallel(threads=False):
    """A pool of a process a core, or a thread: `map` in it. The processes start anew, since the fork of one that runs
    torch's threads can hang. Raises UserError where one of them is killed."""
    pool = ThreadPoolExecutor(cores()) if threads else ProcessPoolExecutor(cores(), get_context("spawn"), _begin)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError("a process of those that share this work was killed, perhaps because the memory ran out; the "
                        "same command goes on where it stopped") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin():
    """One thread for torch; and an end with the process that is worked for, were it only killed."""
    torch.set_num_threads(1)
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


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


def make_demo_corpus(root, sentences, heldout, voices, transcripts=None, heldout_voices=(), heldout_voice_clips=48):
    """Speak sentences of the demo grammar, or those of a file, into a corpus at `root`; `heldout` of them are marked.

    transcripts: a metadata.csv (its normalised text is spoken) or a text with a sentence a line. heldout_voices speak
    `heldout_voice_clips` further sentences each (the last ones of a file), all of them marked; they are taken out of
    `voices`, which speak the others in turn. The speaker of a clip is its voice.
    """
    rng = random.Random(0)
    voices = [voice for voice in voices if voice not in heldout_voices]
    unheard = heldout_voice_clips * len(heldout_voices)
    if transcripts:
        clips = [(c["id"], c["text"]) for c in read_metadata(transcripts)]
    else:
        texts = {}
        while len(texts) < sentences + unheard:
            texts[demo_sentence(rng)] = None  # a dict keeps the order and no sentence twice
        clips = [(f"demo-{i:05d}", text) for i, text in enumerate(texts)]
    heard = len(clips) - unheard
    if not voices:
        raise UserError("all voices held out leave none to train on")
    if heldout >= heard:
        raise UserError(f"{heldout + unheard} of {len(clips)} sentences held out leave none to train on")
    turns = [voices[i % len(voices)] for i in range(heard)]
    turns += [heldout_voices[i % len(heldout_voices)] for i in range(unheard)]
    rows = [(id, text, text, voice) for (id, text), voice in zip(clips, turns)]
    root.mkdir(parents=True, exist_ok=True)
    metadata, lines = root / "metadata.csv", ["|".join(row) + "\n" for row in rows]
    spoken = set(metadata.open(encoding="utf-8")) if metadata.exists() else ()
    for (id, *_), line in zip(rows, lines):
        if line not in spoken:  # a recording of another text or voice
            clip_path(root, id).unlink(missing_ok=True)
    metadata.write_text("".join(lines), encoding="utf-8")
    with parallel() as pool:
        jobs = [(clip_path(root, id), text, voice) for id, text, _, voice in rows]
        list(tqdm(pool.map(_speak_clip, jobs, chunksize=64), "speaking", len(jobs), unit=" clips", leave=False))
    marked = rng.sample(clips[:heard], heldout) + clips[heard:]
    (root / "heldout.txt").write_text("".join(id + "\n" for id, _ in marked))
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
        list(tqdm(pool.map(_compose_piece, jobs, chunksize=16), "composing", pieces, unit=" pieces", leave=False))
    (root / "heldout.txt").write_text("".join(name + "\n" for name in names[pieces - heldout:]))


# ------------------------------------------------------------------------------------------------------------
# Corpora in LJSpeech's layout

LJSPEECH_URL = "https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2"
LJSPEECH_SHA256 = "be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5"
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")


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
    for ending in AUDIO_ENDINGS:
        if (found := path.with_name(path.stem + ending)).exists():
            return found
    return path


def transcribe(root, out):
    """Write out/metadata.csv for a folder of bare recordings, by Whisper base.en. Raises UserError without weights."""
    import whisper

    paths = sorted(p for p in (root / "wavs").rglob("*") if p.suffix.lower() in AUDIO_ENDINGS)
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


def draw_validation(ids, share=0.02):
    """2 % of the ids, at least one where there are two, chosen by hash: the same whatever the order or the machine."""
    ranked = sorted(ids, key=lambda id: hashlib.sha256(id.encode()).digest())
    return set(ranked[:max(round(share * len(ids)), int(len(ids) > 1))])


# ------------------------------------------------------------------------------------------------------------
# Emilia (He et al., 2024), 70,000 hours of English speech that Neuphonic has turned into NeuCodec's codes

EMILIA = "neuphonic/emilia-yodas-english-neucodec"
PARQUET_ROWS = 4096  # that are in memory at once


def emilia_files(root=None, revision=None):
    """The parquet files below `root`, or else those of the hub's repository at a revision, None for the newest. Returns
    {name: bytes} and the revision. Raises UserError for none."""
    if root is not None:
        files = {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.rglob("*.parquet"))}
        if not files:
            raise UserError(f"{root} holds no parquet file: expected those of {EMILIA}")
        return files, None
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(EMILIA, revision=revision, files_metadata=True)
    except Exception as e:  # offline, moved, refused: each its own class
        raise UserError(f"cannot reach {EMILIA} on the Hugging Face hub ({type(e).__name__}); get its parquet files "
                        f"from https://huggingface.co/datasets/{EMILIA} and give their folder as --root") from None
    files = {f.rfilename: f.size or 0 for f in info.siblings if f.rfilename.endswith(".parquet")}
    if not files:
        raise UserError(f"{EMILIA} at revision {info.sha} of the Hugging Face hub holds no parquet file")
    return dict(sorted(files.items())), info.sha


def download_parquet(name, revision, folder):
    """Fetch a file into `folder`, or what is missing of it. Returns its path."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        return hf_hub_download(EMILIA, name, repo_type="dataset", revision=revision, local_dir=folder)
    except Exception as e:  # offline, refused, no room: each its own class
        raise UserError(f"cannot download {name} of {EMILIA} ({type(e).__name__}): give the command again to go on, or "
                        f"get the parquet files from https://huggingface.co/datasets/{EMILIA} and give their folder as "
                        "--root") from None


def read_parquet(file):
    """A parquet file in batches: texts, a list of N str or None; how many codes each has, (N,); these codes, one text's
    after the other's, int64, -1 for a null. Raises UserError for a damaged file or other columns."""
    import pyarrow
    from pyarrow import compute, parquet, types

    try:
        table = parquet.ParquetFile(file, memory_map=True)  # a row group can be the whole file
        found = dict(zip(table.schema_arrow.names, table.schema_arrow.types))
        text, codes = found.get("text", pyarrow.null()), found.get("codes", pyarrow.null())
        strings = types.is_string(text) or types.is_large_string(text)
        lists = types.is_list(codes) or types.is_large_list(codes) or types.is_fixed_size_list(codes)
        if not strings or not lists or not types.is_integer(codes.value_type):
            raise UserError(f"{file} has the columns {', '.join(f'{name} ({kind})' for name, kind in found.items())}; "
                            "expected text (string) and codes (list of integers)")
        for batch in table.iter_batches(PARQUET_ROWS, columns=["text", "codes"], use_threads=False):
            counts = compute.fill_null(compute.list_value_length(batch["codes"]), 0).to_numpy(zero_copy_only=False)
            codes = batch["codes"].flatten().cast(pyarrow.int64(), safe=False)  # beyond int64 they become negative
            yield batch["text"].to_pylist(), counts, compute.fill_null(codes, -1).to_numpy(zero_copy_only=False)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"cannot read {file}: {' '.join(str(e).split())}") from None
