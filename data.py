"""Corpora to shards, shards to tensors.

    python data.py demo                  speak and prepare the demo corpus; nothing to download
    python data.py ljspeech              download and prepare LJSpeech 1.1 (2.6 GB, public domain)
    python data.py ljspeech --root DIR   prepare any folder in LJSpeech's layout, or of bare recordings
    python data.py tokenize --codec NAME --root DIR --out DIR
                                         encode such a corpus, or nested folders of music, with a neural audio codec
    python data.py demo_music            compose and tokenize pieces of music; nothing to download
    python data.py emilia                fetch the pre-tokenised Emilia: 70,000 hours of English, 25 GB of tokens
    python data.py embed --data DIR --embedder NAME
                                         store what is heard of the speakers of such tokens

corpora.py says what a corpus is. A data set is a folder of shards made from one: `mels_00000.f16` holds log-mels,
(frames, n_mels) float16, one clip after the other, and `mels_00000.jsonl` a line a clip. `dataset_stats.json` is
written last and marks a whole one. A data set of tokens is made likewise; what is written last is `codec.json`, and
beside it mel_rvq leaves its centroids, `codec.safetensors`. It holds

    tokens_00000.u16             codes, (frames, Q) uint16
    tokens_00000.jsonl           a line a clip, for TokenDataset; Emilia has none
    tokens_00000.u8              the characters of the clips' normalised texts, uint8
    tokens_00000.idx             four int64 a clip, for SentenceDataset: the ends of its codes and of its characters,
                                 counted from the shard's start, its speaker (-1 for none), and 0 for train or 1 for val
    speakers.json                the speakers' names, sorted
    speaker_NAME_00000.f32       speaker embeddings in the order of the .idx, (N, width) float32; when all of them are
                                 there, `speaker_NAME.json` is written
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import threading
import time
import zlib
from collections import Counter
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from audio import CODECS, MelConfig, MelRVQ, load_codec, load_embedder, log_mel, read_codec, read_wav
from common import UserError, run
from corpora import (EMILIA, clip_path, cores, corpus_sources, download_ljspeech, download_parquet, draw_validation,
                     emilia_files, make_demo_corpus, make_demo_music, parallel, read_metadata, read_parquet, transcribe)
from text import MAX_TEXT_BYTES, character_ids, characters_text, normalise_text

# ------------------------------------------------------------------------------------------------------------
# Shards

SHARD_CLIPS = 256


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
            for clips_done in pool.map(_prepare_shard, todo):
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
SPLITS = ("train", "val")
FIT_SOURCES, FIT_FRAMES = 1000, 100_000  # what mel_rvq is fitted to: so many recordings, and at most so many frames


def tokenize(root, out, name, chunk=None, device="cpu", mel=None, sizes=None, columns="id|text|normalized|speaker",
             fit=()):
    """Encode the corpus at `root` into a token data set at `out`. Goes on where a killed run stopped.

    root: in LJSpeech's layout, or any folder in which recordings lie. name: one of audio.CODECS; "mel_rvq", which is
    fitted first: mel is its MelConfig, sizes those of its books, and `fit` more corpora that it is fitted to, as much
    to each; or the folder of tokens of a mel_rvq, which is used again. chunk: (number, "frames" or "seconds") to cut
    the recordings at; a rest is kept from a quarter of that on; None keeps them whole. Under torchrun each process
    writes its own shards, and the first of them closes the data set.

    Recordings that cannot be read or are silent are skipped and listed with the reason. Raises UserError where nothing
    is left or `out` holds other tokens.
    """
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    sources, fitted = corpus_sources(root, columns), None
    if name not in (*CODECS, "mel_rvq"):
        if not (Path(name) / "codec.json").exists():
            raise UserError(f"{name} is neither a codec ({', '.join(CODECS)}, mel_rvq) nor a folder of tokens")
        if (made_with := read_codec(name)["codec"]) != "mel_rvq":
            raise UserError(f"the tokens at {name} are {made_with}'s, which needs no folder: give --codec {made_with}")
        fitted = load_codec(name)
        name, mel, sizes = "mel_rvq", fitted.mel, [len(book) for book in fitted.books]
    plan = {"codec": name, "chunk": chunk, "root": str(root.resolve()), "mel": mel and asdict(mel), "sizes": sizes,
            "sources": hashlib.sha256(json.dumps(sources).encode()).hexdigest()}
    if fit:
        plan["fit"] = [str(other.resolve()) for other in fit]
    if fitted:
        plan["centroids"] = hashlib.sha256(torch.cat([fitted.mean[None], *fitted.books]).numpy().tobytes()).hexdigest()
    speakers = sorted({s["speaker"] for s in sources} - {""})
    open_plan(out, plan, speakers)

    if name == "mel_rvq":
        if rank == 0 and not (out / "codec.safetensors").exists():
            corpora = [(root, sources), *((other, corpus_sources(other)) for other in fit)]
            (fitted or fit_mel_rvq(corpora, mel, sizes)).save(out)
        wait_for([out / "codec.safetensors"])
        codec = job_codec = MelRVQ.load(out, mel)
        device = "cpu"
    else:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        job_codec = (name, f"cuda:{local}" if device == "cuda" else "cpu")
        codec = cached_codec(*job_codec)  # here as well, so that missing weights are one error
    frames = chunk and (chunk[0] if chunk[1] == "frames" else round(chunk[0] * codec.frame_rate))
    jobs = [(out / f"tokens_{i:05d}", root, sources[i * SHARD_SOURCES:(i + 1) * SHARD_SOURCES], job_codec, frames,
             speakers) for i in range(-(-len(sources) // SHARD_SOURCES))]
    todo = [job for job in jobs[rank::world] if not job[0].with_suffix(".idx").exists()]
    if todo:
        bar = tqdm(None, "tokens", sum(len(job[2]) for job in todo), unit=" recordings", leave=False)
        with parallel(threads=device == "cuda") as pool, bar:
            for sources_done in pool.map(_tokenize_shard, todo):
                bar.update(sources_done)
    if rank > 0:
        return

    wait_for([job[0].with_suffix(".idx") for job in jobs])
    rows = [row for job in jobs for row in read_jsonl(job[0].with_suffix(".jsonl"))]
    skipped = [r for r in rows if "skipped" in r]
    kept = [r for r in rows if "skipped" not in r]
    for r in skipped:
        print(f"skipped {r['id']}: {r['skipped']}")
    if not kept:
        raise UserError(f"none of the {len(sources)} recordings of {root} could be used")
    if (root / "grammar.jsgf").exists():
        shutil.copy(root / "grammar.jsgf", out)
    info = {
        "codec": name, "sample_rate": codec.sample_rate, "hop_length": codec.hop_length,
        "frame_rate": codec.frame_rate, "codebooks": codec.codebooks, "codebook_size": codec.codebook_size,
        "mel": mel and asdict(mel), "chunk_frames": frames,
    }
    close_tokens(out, info, len(kept), sum(r["split"] == "val" for r in kept), len(skipped),
                 sum(r["frames"] for r in kept), max(r["frames"] for r in kept))


def open_plan(out, plan, speakers):
    """Begin a token data set, or go on with one. Raises UserError where `out` holds another one."""
    plan = json.dumps(plan)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "plan.json").exists() and (out / "plan.json").read_text() != plan:
        raise UserError(f"{out} holds data of another corpus or other settings: delete it, or choose another --out")
    write_whole(out / "plan.json", plan)
    write_whole(out / "speakers.json", json.dumps(speakers))


def close_tokens(out, info, clips, validation_clips, skipped, frames, max_frames):
    """Mark a token data set as whole by its codec.json, and say what it holds."""
    seconds = frames / info["frame_rate"]
    counts = {"clips": clips, "validation_clips": validation_clips, "skipped": skipped, "seconds": seconds,
              "max_frames": max_frames}
    write_whole(out / "codec.json", json.dumps(info | counts, indent=2) + "\n")
    print(f"{out}: {clips:,} clips, {seconds / 3600:.2f} h, {validation_clips} held out, {skipped} skipped; "
          f"{info['codec']}, {info['frame_rate']:.1f} frames/s of {info['codebooks']} x {info['codebook_size']} codes")


def fit_mel_rvq(corpora, mel, sizes):
    """Fit mel_rvq to frames of the recordings for training, drawn by hash. corpora: pairs of a root and its sources;
    the frames of those that have few are repeated until all weigh as much."""
    mels = []
    for root, sources in corpora:
        train = {s["source"] for s in sources if s["split"] == "train"}
        drawn = sorted(train, key=lambda source: hashlib.sha256(source.encode()).digest())[:FIT_SOURCES // len(corpora)]
        if not drawn:
            raise UserError(f"all of {root} is held out: there is nothing that mel_rvq could be fitted to")
        jobs = [(root / source, mel, -(-FIT_FRAMES // len(corpora) // len(drawn))) for source in drawn]
        with parallel() as pool:
            some = list(tqdm(pool.map(_some_mels, jobs, chunksize=16), "log-mels", len(jobs), leave=False))
        mels.append(np.concatenate(some))
        print(f"fitting mel_rvq to {len(mels[-1]):,} frames of {len(jobs):,} recordings of {root}")
    most = max(map(len, mels))
    mels = [np.tile(x, (round(most / max(1, len(x))), 1)) for x in mels]
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
    """One shard: first its codes, then its sentences. Returns the number of sources."""
    path, root, sources, codec, chunk_frames, speakers = job
    index = path.with_suffix(".jsonl")
    if not index.exists():
        encode_shard(path, root, sources, cached_codec(*codec) if isinstance(codec, tuple) else codec, chunk_frames)
    write_sentences(path, [row for row in read_jsonl(index) if "skipped" not in row], speakers)
    return len(sources)


def encode_shard(path, root, sources, codec, chunk_frames):
    """The codes of a shard and then, as the mark that they are whole, their index, a line a clip."""
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


def write_sentences(path, rows, speakers):
    """The characters of a shard's clips and then, as the mark that they are whole, where each clip ends.

    rows: what its .jsonl says of the clips. speakers: the names of all speakers of the data set.
    """
    characters = [character_ids(normalise_text(row["text"])) for row in rows]
    number = {name: i for i, name in enumerate(speakers)}
    index = [(row["offset"] + row["frames"], end, number.get(row["speaker"], -1), SPLITS.index(row["split"]))
             for row, end in zip(rows, np.cumsum([len(ids) for ids in characters]))]
    write_whole(path.with_suffix(".u8"), b"".join(ids.tobytes() for ids in characters))
    write_whole(path.with_suffix(".idx"), np.array(index, np.int64).tobytes())


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


def write_whole(path, content):
    """Write a text, or bytes, into a file at once and whole, or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(content if isinstance(content, bytes) else content.encode())
    part.replace(path)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def wait_for(paths):
    """Wait for files that other processes write. There is no limit: torchrun ends all processes when one fails."""
    while not all(path.exists() for path in paths):
        time.sleep(0.2)


def check_tokens(folder, wanted):
    """codec.json and the grammar (JSGF or None) of a token data set. Raises UserError where the folder holds none, or
    one that is not what is wanted."""
    if not (folder / "codec.json").exists():
        raise UserError(f"no token data set at {folder}: python data.py tokenize makes one")
    codec, grammar = read_codec(folder), folder / "grammar.jsgf"
    for key, value in wanted.items():
        found = codec[key]
        if value is not None and (abs(found - value) > 0.01 if key == "frame_rate" else found != value):
            raise UserError(f"the tokens at {folder} have {key} {found}, but the config asks for {value}")
    return codec, grammar.read_text() if grammar.exists() else None


class TokenDataset:
    """Read-only view of a token data set.

    rows: a dict a clip, with id, text ("" where it is not a whole recording), speaker, split, source, start (seconds),
    frames. codec: codec.json. grammar: JSGF or None. Raises UserError where the folder holds no token data set, a
    damaged one, or one that is not what the config asks for: the codec's name, codebooks, codebook_size, frame_rate.
    """

    def __init__(self, folder, **wanted):
        folder = Path(folder)
        self.codec, self.grammar = check_tokens(folder, wanted)
        self.folder, self.rows, self.shards = folder, [], []
        for index in sorted(folder.glob("tokens_*.jsonl")):
            rows = [{**row, "shard": len(self.shards)} for row in read_jsonl(index) if "skipped" not in row]
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


class SentenceDataset:
    """Read-only view of a token data set of one codebook, for the LLM TTS: sentences, each of characters and codes.

    All of it stays on the disk, mapped, so that 31 million sentences can be opened. codec: codec.json. grammar: JSGF or
    None. speakers: their names. Raises UserError where the folder holds no such data set, a damaged one, or one that is
    not what the config asks for: codec, sample_rate, frame_rate, codebook_size.
    """

    def __init__(self, folder, **wanted):
        self.folder = folder = Path(folder)
        self.codec, self.grammar = check_tokens(folder, wanted)
        if (books := self.codec["codebooks"]) != 1:
            raise UserError(f"the tokens at {folder} have {books} codebooks, but the LLM TTS reads one: tokenize with "
                            "--codebooks 1, or with --codec neucodec")
        self.shards, self.embeddings = [], None  # of each shard codes (frames,), characters and index (N, 4)
        paths = sorted({path.with_suffix("") for path in folder.glob("tokens_*.*") if path.suffix in (".u16", ".idx")})
        if not all(path.exists() for path in [folder / "speakers.json", *(p.with_suffix(".idx") for p in paths)]):
            raise UserError(f"{folder} holds no characters: tokenize again, what has been encoded stays")
        for path in paths:
            index = map_file(path.with_suffix(".idx"), np.int64, 4)
            shard = [map_file(path.with_suffix(".u16"), np.uint16), map_file(path.with_suffix(".u8"), np.uint8)]
            if [len(x) for x in shard] != [*index[-1, :2]] if len(index) else any(map(len, shard)):
                raise UserError(f"{path}.u16 and .u8 do not hold what their index says: make the data set again")
            self.shards.append((*shard, index))
        self.first = np.cumsum([0, *(len(index) for *_, index in self.shards)])
        self.speakers = read_json(folder / "speakers.json")
        if len(self) != self.codec["clips"]:
            raise UserError(f"{folder} holds {len(self):,} of its {self.codec['clips']:,} clips: make it again")

    def __len__(self):
        return int(self.first[-1])

    def clips(self, split):
        """Indices (N,) int64 of the clips of "train", "val" or "all" that have codes and a text; UserError for none."""
        found = [np.zeros(0, np.int64)]
        for first, (*_, index) in zip(self.first, self.shards):
            usable = (np.diff(index[:, :2], axis=0, prepend=0) > 0).all(1)
            if split != "all":
                usable &= index[:, 3] == SPLITS.index(split)
            found.append(first + np.flatnonzero(usable))
        if not len(found := np.concatenate(found)):
            raise UserError(f"{self.folder} has no {split} clips that have both codes and a text")
        return found

    def by_shard(self, indices):
        """For each shard that some clips are in: (its index, where in `indices` they stand, their rows in it)."""
        indices = np.asarray(indices, np.int64)
        shard = np.searchsorted(self.first, indices, "right") - 1
        order = np.argsort(shard, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
            if len(at):
                yield self.shards[shard[at[0]]][2], at, indices[at] - self.first[shard[at[0]]]

    def lengths(self, indices):
        """How many codes and how many characters clips have, two (N,) int64 arrays."""
        lengths = np.zeros((2, len(indices)), np.int64)
        for index, at, rows in self.by_shard(indices):
            lengths[:, at] = (index[rows, :2] - np.where(rows[:, None] > 0, index[rows - 1, :2], 0)).T
        return lengths[0], lengths[1]

    def speaker(self, indices):
        """The speakers of clips, (N,) int64 numbers in `speakers`, -1 where there is none."""
        speakers = np.zeros(len(indices), np.int64)
        for index, at, rows in self.by_shard(indices):
            speakers[at] = index[rows, 2]
        return speakers

    def span(self, i, column):
        """The codes (column 0) or the characters (1) of clip i, mapped."""
        shard = int(np.searchsorted(self.first, i, "right")) - 1
        row, index = i - self.first[shard], self.shards[shard][2]
        return self.shards[shard][column][index[row - 1, column] if row else 0:index[row, column]]

    def codes(self, i):
        """The codes of clip i, (n,) uint16. Raises UserError for codes that the codec does not have."""
        codes, size = self.span(i, 0), self.codec["codebook_size"]
        if size < 65536 and size <= codes.max(initial=0):
            raise UserError(f"clip {i} of {self.folder} has a code {codes.max()}, beyond the codebook's {size}")
        return codes

    def characters(self, i):
        """The characters of clip i, (m,) uint8."""
        return self.span(i, 1)

    def text(self, i):
        """The text of clip i as the model sees it: normalised, in lower case."""
        return characters_text(self.characters(i))

    def recording(self, i):
        """The path of the recording that clip i is of. Raises UserError where the data set does not say."""
        shard = int(np.searchsorted(self.first, i, "right")) - 1
        path = self.folder / f"tokens_{shard:05d}.jsonl"
        if not path.exists():
            raise UserError(f"{self.folder} does not say which recordings its tokens are of")
        rows = [row for row in read_jsonl(path) if "skipped" not in row]
        return Path(read_json(self.folder / "plan.json")["root"]) / rows[i - self.first[shard]]["source"]

    def load_embeddings(self, name, width):
        """Open the speaker embeddings that `embed` has stored. Raises UserError where there are none, or of another
        width than wanted."""
        try:
            found = read_json(self.folder / f"speaker_{name}.json")["width"]
        except (OSError, ValueError):
            raise UserError(f"{self.folder} holds no speaker embeddings by {name}: python data.py embed --data "
                            f"{self.folder} --embedder {name}") from None
        if found != width:
            raise UserError(f"the speaker embeddings by {name} at {self.folder} are {found} wide, but the config asks "
                            f"for {width}")
        paths = sorted(self.folder.glob(f"speaker_{name}_*.f32"))
        self.embeddings = [map_file(path, np.float32, width) for path in paths]
        if [len(x) for x in self.embeddings] != [*np.diff(self.first)]:
            raise UserError(f"the speaker embeddings by {name} at {self.folder} are not one a clip: delete "
                            f"speaker_{name}* there, and embed again")

    def embedding(self, i):
        """The speaker embedding of clip i, (width,) float32."""
        shard = int(np.searchsorted(self.first, i, "right")) - 1
        return self.embeddings[shard][i - self.first[shard]].copy()


def best_fit(lengths, room):
    """Put sentences into rows of `room` tokens: the longest first, each into the fullest row that still has room for it
    (best-fit decreasing; as Ding et al., 2024, pack documents). lengths (N,), none above `room`. Returns lists of
    indices of `lengths`."""
    rows, free, sizes = [], {}, 0  # free: {room that is left: rows}; in `sizes` the bits of those that there are
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        if fits := sizes >> n:
            left = n + (fits & -fits).bit_length() - 1
            row = free[left].pop()
            sizes ^= (not free[left]) << left
        else:
            rows.append(row := [])
            left = room
        row.append(i)
        free.setdefault(left - n, []).append(row)
        sizes |= 1 << (left - n)
    return rows


def map_file(path, dtype, columns=None):
    """A file as a read-only array (N,) or (N, columns) that stays on the disk. Raises UserError where there is none, or
    one that holds no whole rows."""
    size = path.stat().st_size if path.exists() else -1
    if size < 0 or size % (np.dtype(dtype).itemsize * (columns or 1)):
        raise UserError(f"{path} is {'missing' if size < 0 else 'cut off'}: make the data set again")
    # torch's mapping keeps no file open, as numpy's does: there can be more shards than a process may open files
    array = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy() if size else np.zeros(0, np.uint8)
    array.flags.writeable = False
    return array.view(dtype) if columns is None else array.view(dtype).reshape(-1, columns)


# ------------------------------------------------------------------------------------------------------------
# Emilia

def emilia(out, root=None):
    """Turn Emilia's codes into a token data set at `out`. Goes on where a killed run stopped.

    Each parquet file of the hub's repository becomes a shard; it is fetched, read and deleted. root: a folder of such
    files, which are only read. Under torchrun each process has its own, and the first closes the data set. One text in
    a thousand, drawn by hash, is for validation, so that none is on both sides.

    Rows without text or codes, or with codes beyond 65,535, are skipped and counted. Raises UserError where the hub
    cannot be reached, columns differ, the disk is too small, or `out` holds other tokens.
    """
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    plan = out / "plan.json"
    files, revision = emilia_files(root, read_json(plan).get("revision") if plan.exists() else None)
    open_plan(out, {"codec": "neucodec", "root": str(root.resolve()) if root else EMILIA, "revision": revision,
                    "files": hashlib.sha256(json.dumps(files).encode()).hexdigest()}, [])
    jobs = [(out / f"tokens_{i:05d}", name, root, revision) for i, name in enumerate(files)]
    for path, *_ in jobs[rank::world]:
        if path.with_suffix(".idx").exists():  # killed before its download was deleted
            shutil.rmtree(path.with_suffix(".download"), ignore_errors=True)
    left = [size for (path, *_), size in zip(jobs, files.values()) if not path.with_suffix(".idx").exists()]
    if left and root is None:  # in a parquet file a code takes two bytes or more; a core has one at a time
        need, free = sum(left) / 2 + max(left) * min(len(left), cores()), shutil.disk_usage(out).free
        if free < need:
            raise UserError(f"{out} has {free / 1e9:.1f} GB of disk left; what is to come of {EMILIA}, "
                            f"{sum(left) / 1e9:.1f} GB of parquet files, takes about {need / 1e9:.1f} GB")
    todo = [job for job in jobs[rank::world] if not job[0].with_suffix(".idx").exists()]
    if todo:
        with parallel() as pool, tqdm(None, "tokens", len(todo), unit=" files", leave=False) as bar:
            for _ in pool.map(_convert_parquet, todo):
                bar.update()
    if rank > 0:
        return

    wait_for([path.with_suffix(".idx") for path, *_ in jobs])
    skipped, clips, val, frames, longest = Counter(), 0, 0, 0, 0
    for path, *_ in jobs:
        index = map_file(path.with_suffix(".idx"), np.int64, 4)
        skipped.update(read_json(path.with_suffix(".skipped")))
        if len(index):
            clips, val, frames = clips + len(index), val + int(index[:, 3].sum()), frames + int(index[-1, 0])
            longest = max(longest, int(np.diff(index[:, 0], prepend=0).max()))
    for reason, count in skipped.items():
        print(f"skipped {count:,} rows: {reason}")
    if not clips:
        raise UserError(f"none of the {sum(skipped.values())} rows of {root or EMILIA} could be used")
    info = {"codec": "neucodec", "sample_rate": 24000, "hop_length": 480, "frame_rate": 50.0, "codebooks": 1,
            "codebook_size": 65536, "mel": None, "chunk_frames": None}
    close_tokens(out, info, clips, val, sum(skipped.values()), frames, longest)


def _convert_parquet(job):
    """One parquet file to one shard: codes, characters, and, as the mark that they are whole, the index."""
    path, name, root, revision = job
    for part in path.parent.glob(f"{path.name}.*.part"):  # of a run that was killed
        part.unlink()
    download = path.with_suffix(".download")
    file = root / name if root is not None else download_parquet(name, revision, download)
    parts = [path.with_suffix(f".{os.getpid()}.{ending}.part") for ending in ("u16", "u8", "idx")]
    skipped, ends = Counter(), np.zeros(2, np.int64)
    try:
        with parts[0].open("wb") as u16, parts[1].open("wb") as u8, parts[2].open("wb") as idx:
            for texts, counts, codes in read_parquet(file):
                characters = [character_ids(normalise_text(text or "")) for text in texts]
                sizes = np.array([len(ids) for ids in characters])
                beyond = np.cumsum(np.append(0, (codes < 0) | (codes > 65535)))  # how many there are before each code
                reasons = np.select([sizes == 0, counts == 0, np.diff(beyond[np.append(0, np.cumsum(counts))]) > 0],
                                    ["no text", "no codes", "codes outside of 0 to 65,535"], "")
                skipped.update(reasons[reasons != ""].tolist())
                keep = reasons == ""
                if not keep.any():
                    continue
                characters = [ids for ids, kept in zip(characters, keep) if kept]
                index = np.full((len(characters), 4), -1, np.int64)
                index[:, :2] = ends + np.cumsum(np.stack([counts[keep], sizes[keep]], 1), axis=0)
                index[:, 3] = [zlib.crc32(ids) % 1000 == 0 for ids in characters]
                codes[np.repeat(keep, counts)].astype(np.uint16).tofile(u16)
                np.concatenate(characters).tofile(u8)
                index.tofile(idx)
                ends = index[-1, :2]
        write_whole(path.with_suffix(".skipped"), json.dumps(skipped))
        for part in parts:
            part.replace(path.with_suffix(part.suffixes[-2]))
    finally:
        shutil.rmtree(download, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# Speaker embeddings

def embed(folder, name, device="cpu"):
    """Store a speaker embedding, by one of audio.load_embedder's, of each clip of a token data set made by `tokenize`.
    Goes on where a killed run stopped.

    A clip of which none can be had is listed, and gets the mean of its speaker's others, or where there is none that of
    the data set. Raises UserError where no clip has any, or where the recordings are no longer there.
    """
    mark, codec = folder / f"speaker_{name}.json", read_codec(folder)
    paths = [path.with_suffix("") for path in sorted(folder.glob("tokens_*.idx"))]
    if not paths or not all(path.with_suffix(".jsonl").exists() for path in paths):
        raise UserError(f"{folder} does not say which recordings its tokens are of: tokenize again" if not paths else
                        f"the tokens at {folder} came without recordings: no voice can be heard")
    files = [folder / f"{path.name.replace('tokens', f'speaker_{name}')}.f32" for path in paths]
    if not mark.exists():
        if not (root := Path(read_json(folder / "plan.json")["root"])).is_dir():
            raise UserError(f"the recordings of {folder} are no longer at {root}: put them there again")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        width = cached_embedder(name, device).width  # here as well, so that a missing package is one error
        jobs = [(path, file, root, codec, name, device) for path, file in zip(paths, files) if not file.exists()]
        if jobs:
            bar = tqdm(None, "voices", len(jobs), unit=" shards", leave=False)
            with parallel(threads=device == "cuda") as pool, bar:
                for _ in pool.map(_embed_shard, jobs):
                    bar.update()
        close_embeddings(mark, paths, files, width)
    for file in files:
        file.with_suffix(".missing").unlink(missing_ok=True)
    info = read_json(mark)
    for id, reason in info["missing"]:
        print(f"no embedding of {id}: {reason}")
    print(f"{folder}: {info['clips']:,} speaker embeddings by {name}, {info['width']} wide, {len(info['missing'])} of "
          "them means")


def close_embeddings(mark, paths, files, width):
    """Put means where embeddings are missing, and then write the mark that all are there."""
    speakers = read_json(mark.parent / "speakers.json")
    sums, counts = np.zeros((len(speakers) + 1, width)), np.zeros((len(speakers) + 1, 1))
    clips, holes = 0, []
    for path, file in zip(paths, files):
        vectors, missing = np.fromfile(file, np.float32).reshape(-1, width), read_json(file.with_suffix(".missing"))
        speaker, have = map_file(path.with_suffix(".idx"), np.int64, 4)[:, 2], np.ones(len(vectors), bool)
        have[[row for row, *_ in missing]] = False
        np.add.at(sums, speaker[have], vectors[have])  # in the last row those of nobody, whose number is -1
        np.add.at(counts, speaker[have], 1)
        clips += len(vectors)
        if missing:
            holes.append((file, missing, speaker))
    if not counts.any():
        raise UserError(f"no voice can be heard in any of the {clips} clips of {mark.parent}; of the first it is said: "
                        f"{holes[0][1][0][2] if holes else 'there is none'}")
    means = np.where(counts > 0, sums / np.maximum(counts, 1), sums.sum(0) / counts.sum())
    means[-1] = sums.sum(0) / counts.sum()
    for file, missing, speaker in holes:
        vectors = np.fromfile(file, np.float32).reshape(-1, width)
        for row, *_ in missing:
            vectors[row] = means[speaker[row]]
        write_whole(file, vectors.tobytes())
    reasons = [(id, reason) for _, missing, _ in holes for _, id, reason in missing]
    write_whole(mark, json.dumps({"width": width, "clips": clips, "missing": reasons}, indent=2) + "\n")


cached_embedder = cache(load_embedder)


def _embed_shard(job):
    """The embeddings of one shard's clips, after a list of those that are missing: [row, id, reason]."""
    path, file, root, codec, name, device = job
    embedder, source, missing = cached_embedder(name, device), None, []
    rows = [row for row in read_jsonl(path.with_suffix(".jsonl")) if "skipped" not in row]
    vectors = np.zeros((len(rows), embedder.width), np.float32)
    for n, row in enumerate(rows):
        try:
            if source != row["source"]:
                wav, source = read_wav(root / row["source"], codec["sample_rate"]), row["source"]
            start = round(row["start"] * codec["sample_rate"])
            with on_gpu:
                vectors[n] = embedder(wav[start:start + row["frames"] * codec["hop_length"]], codec["sample_rate"])
        except UserError as e:
            missing.append((n, row["id"], str(e)))
    write_whole(file.with_suffix(".missing"), json.dumps(missing))
    write_whole(file, vectors.tobytes())


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
            p.add_argument("--heldout_voices", default="", help="further voices, for validation alone")
            p.add_argument("--heldout_voice_clips", type=int, default=48, help="sentences of each (%(default)s)")
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
            p.add_argument("--codec", required=True, help=f"{', '.join(CODECS)}, mel_rvq, or the folder of a mel_rvq's "
                           "tokens, which is used again as it is")
            p.add_argument("--fit", type=Path, nargs="+", default=[], help="more corpora that mel_rvq is fitted to, to "
                           "be tokenized with the same one later: for fine-tuning on them")
            p.add_argument("--chunk_frames", type=int, help="cut recordings to so many (2040 for bare folders of them; "
                           "those that metadata.csv names are kept whole)")
            p.add_argument("--chunk_seconds", type=float, help="or to so many")
            p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p = commands.add_parser("emilia", help="turn the pre-tokenised Emilia into a data set")
    p.add_argument("--out", type=Path, default=Path("data/emilia"), help="folder of the data set (%(default)s)")
    p.add_argument("--root", type=Path, help=f"its parquet files, if they are here; else those of {EMILIA} are fetched")
    p = commands.add_parser("embed", help="store speaker embeddings of the clips of a token data set")
    p.add_argument("--data", type=Path, required=True, help="its folder")
    p.add_argument("--embedder", choices=("stats", "ecapa"), required=True)
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of ecapa (%(default)s)")
    args = parser.parse_args(argv)
    if args.command == "emilia":
        emilia(args.out, args.root)
        return
    if args.command == "embed":
        embed(args.data, args.embedder, "cpu" if args.embedder == "stats" else args.device)
        return
    mel = MelConfig(**{f.name: getattr(args, f.name) for f in fields(MelConfig)})
    if args.command == "demo":
        root = args.root or args.out / "corpus"
        heldout_voices = args.heldout_voices.split(",") if args.heldout_voices else []
        make_demo_corpus(root, args.sentences, args.heldout, args.voices.split(","), args.transcripts, heldout_voices,
                         args.heldout_voice_clips)
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
        if args.fit and args.codec != "mel_rvq":
            raise UserError(f"--fit is for mel_rvq, which is fitted here; {args.codec} is as it is")
        if args.codec == "mel_rvq":
            tokenize(args.root, args.out, args.codec, chunk, mel=mel, sizes=book_sizes(args), columns=args.columns,
                     fit=args.fit)
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
