"""Corpora to data sets: the shards of log-mels, of tokens and of speaker embeddings that datasets.py describes."""

import hashlib
import json
import os
import shutil
import threading
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from trivox.audio import log_mel, read_wav
from trivox.codecs import CODECS, MelRVQ, load_codec, read_codec
from trivox.common import UserError
from trivox.corpora import clip_path, corpus_sources, draw_key, draw_validation, held_out, read_metadata
from trivox.datasets import SPLITS, kept_rows
from trivox.files import drop_parts, map_file, read_json, read_rows, read_text, wait_for, whole_file, write_whole
from trivox.normalise import normalise_text
from trivox.parallel import parallel
from trivox.text import MAX_TEXT_BYTES, character_ids
from trivox.voices import load_embedder

SHARD_CLIPS = 256


def prepare_mels(root, out, mel, max_seconds, metadata=None, columns="id|text|normalized|speaker", anew=False):
    """Turn the corpus at `root` into shards at `out`. Goes on where a killed run stopped.

    Clips that cannot be read, are empty, longer than `max_seconds` or have more than 256 bytes of text are skipped and
    listed with the reason. anew: of a corpus that data.py has spoken, shards of what it said before are made anew.
    Raises UserError where no clip is left or `out` holds other shards.
    """
    clips = read_metadata(metadata or root / "metadata.csv", columns)
    val = held_out(root, {clip["id"] for clip in clips})
    if val is None:
        val = draw_validation([clip["id"] for clip in clips])
    for clip in clips:
        clip["split"] = "val" if clip["id"] in val else "train"
    jobs = [(out / f"mels_{i:05d}", root, clips[i * SHARD_CLIPS:(i + 1) * SHARD_CLIPS], mel, max_seconds)
            for i in range(-(-len(clips) // SHARD_CLIPS))]
    plan = {"mel": asdict(mel), "max_seconds": max_seconds, "root": str(root.resolve()),
            "clips": hashlib.sha256(json.dumps(clips).encode()).hexdigest()}
    out.mkdir(parents=True, exist_ok=True)
    if (out / "plan.json").exists() and (old := read_json(out / "plan.json")) != plan:
        if not anew or not isinstance(old, dict) or old | {"clips": plan["clips"]} != plan:
            raise UserError(f"{out} holds shards of another corpus or other settings: delete it, or choose another "
                            "--out")
        print(f"{out}: {root} has other sentences or voices than before, so its log-mels are made anew")
        for path in (out / "dataset_stats.json", out / "grammar.jsgf", *out.glob("mels_*")):  # the mark goes first
            path.unlink(missing_ok=True)
    drop_parts(out)
    write_whole(out / "plan.json", json.dumps(plan))

    todo = [job for job in jobs if not job[0].with_suffix(".jsonl").exists()]
    if todo:
        bar = tqdm(None, "log-mels", sum(len(job[2]) for job in todo), unit=" clips", leave=False)
        with parallel() as pool, bar:
            for clips_done in pool.map(_prepare_shard, todo):
                bar.update(clips_done)
    drop_parts(out, "mels_*")  # those of a killed run's processes that ended after it
    indices = [job[0].with_suffix(".jsonl") for job in jobs]
    skipped = told_skipped(indices)
    kept = [row for index in indices for row in kept_rows(index, sum=float, sum_sq=float)]
    if not kept:
        raise UserError(f"none of the {len(clips)} clips of {root} could be used")
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
    write_whole(out / "dataset_stats.json", json.dumps(stats, indent=2) + "\n")
    print(f"{out}: {len(kept):,} clips, {stats['seconds'] / 3600:.2f} h, {stats['validation_clips']} held out, "
        f"{len(skipped)} skipped; log-mel mean {mean:.4f}, std {stats['mel_std']:.4f}")


def told_skipped(indices):
    """The rows of .jsonl files that were skipped, after each was told with its reason."""
    rows = [row for index in indices for _, row in read_rows(index) if "skipped" in row]
    for row in rows:
        print(f"skipped {row.get('id')}: {row['skipped']}")
    return rows


def _prepare_shard(job):
    """One shard: first the mels, then, as the mark that they are whole, the index. Returns the number of clips."""
    path, root, clips, mel, max_seconds = job
    clips = [clip | {"text": normalise_text(clip["text"], accents=True)} for clip in clips]  # as it is spoken later
    torch.set_num_threads(1)
    lines, index, offset = [], [], 0
    with whole_file(path.with_suffix(".f16")) as f:
        for clip in clips:
            try:
                features = prepare_clip(root, clip, mel, max_seconds)
            except UserError as e:
                lines.append({**clip, "skipped": str(e)})
                continue
            f.write(features.numpy().astype(np.float16).tobytes())
            index.append((offset + len(features), SPLITS.index(clip["split"])))
            lines.append({**clip, "offset": offset, "frames": len(features), "sum": features.double().sum().item(),
                          "sum_sq": features.double().square().sum().item()})
            offset += len(features)
    write_whole(path.with_suffix(".idx"), np.array(index, np.int64).tobytes())
    write_whole(path.with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
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
    features = log_mel(wav, mel)
    if not features.half().isfinite().all():
        raise UserError("its log-mel has numbers that are not finite")
    return features


# ------------------------------------------------------------------------------------------------------------
# Tokens

SHARD_SOURCES = 64
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
    if name != "mel_rvq":
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        job_codec = (name, f"cuda:{local}" if device == "cuda" else "cpu")
        codec = cached_codec(*job_codec)  # here as well, so that missing weights are one error
    frame_rate = mel.frame_rate if name == "mel_rvq" else codec.frame_rate
    frames = chunk and (chunk[0] if chunk[1] == "frames" else round(chunk[0] * frame_rate))
    if chunk and not frames:
        raise UserError(f"--chunk_seconds {chunk[0]} is not half a frame of {1 / frame_rate:.4f} s: give more")
    open_plan(out, plan, speakers)
    if world == 1:
        drop_parts(out)

    if name == "mel_rvq":
        if rank == 0 and not (out / "codec.safetensors").exists():
            corpora = [(root, sources), *((other, corpus_sources(other)) for other in fit)]
            (fitted or fit_mel_rvq(corpora, mel, sizes)).save(out)
        wait_for([out / "codec.safetensors"])
        codec = job_codec = MelRVQ.load(out, mel)
        device = "cpu"
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
    drop_parts(out, "tokens_*")  # of several processes none writes any more
    indices = [job[0].with_suffix(".jsonl") for job in jobs]
    skipped = told_skipped(indices)
    kept = [row for index in indices for row in kept_rows(index)]
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
    if (out / "plan.json").exists() and read_text(out / "plan.json") != plan:
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
        drawn = sorted(train, key=draw_key)[:FIT_SOURCES // len(corpora)]
        if not drawn:
            raise UserError(f"all of {root} is held out: there is nothing that mel_rvq could be fitted to")
        jobs = [(root / source, mel, -(-FIT_FRAMES // len(corpora) // len(drawn))) for source in drawn]
        with parallel() as pool:
            some = list(tqdm(pool.map(_some_mels, jobs, chunksize=16), "log-mels", len(jobs), leave=False))
        for source, found in zip(drawn, some):
            if isinstance(found, str):
                print(f"mel_rvq is fitted without {source}: {found}")
        some = [found for found in some if not isinstance(found, str)]
        mels.append(np.concatenate([np.zeros((0, mel.n_mels), np.float32), *some]))
        print(f"fitting mel_rvq to {len(mels[-1]):,} frames of {len(jobs):,} recordings of {root}")
    most = max(map(len, mels))
    mels = [np.tile(x, (round(most / max(1, len(x))), 1)) for x in mels]
    return MelRVQ.fit(torch.from_numpy(np.concatenate(mels)), mel, sizes)


def _some_mels(job):
    """At most so many frames of a recording, evenly spaced; or why there are none, a text."""
    path, mel, count = job
    try:
        mels = log_mel(read_wav(path, mel.sample_rate), mel).numpy()
    except UserError as e:
        return str(e)
    if not np.isfinite(mels).all():
        return "its log-mel has numbers that are not finite"
    return mels[np.linspace(0, len(mels) - 1, min(count, len(mels))).astype(int)]


cached_codec = cache(load_codec)
on_gpu = threading.Lock()  # of the threads that read for one GPU, one encodes at a time


def _tokenize_shard(job):
    """One shard: first its codes, then its sentences. Returns the number of sources."""
    path, root, sources, codec, chunk_frames, speakers = job
    index = path.with_suffix(".jsonl")
    if not index.exists():
        encode_shard(path, root, sources, cached_codec(*codec) if isinstance(codec, tuple) else codec, chunk_frames)
    write_sentences(path, kept_rows(index, speaker=str), speakers)
    return len(sources)


def encode_shard(path, root, sources, codec, chunk_frames):
    """The codes of a shard and then, as the mark that they are whole, their index, a line a clip."""
    lines, offset, waiting = [], 0, []  # waiting: (line, wav) that have been read
    with whole_file(path.with_suffix(".u16")) as f:
        for n, source in enumerate(sources):
            source = source | {"text": normalise_text(source["text"], accents=True)}  # as it is spoken later
            try:
                waiting += cut_source(root, source, codec, chunk_frames)
            except UserError as e:
                lines.append({**source, "skipped": str(e)})
            seconds = sum(len(wav) for _, wav in waiting) / codec.sample_rate
            if waiting and (seconds > 600 or n == len(sources) - 1):
                with on_gpu:
                    codes = codec.encode([wav for _, wav in waiting])
                for (line, _), c in zip(waiting, codes):
                    f.write(c.astype(np.uint16).tobytes())
                    lines.append({**line, "offset": offset, "frames": len(c)})
                    offset += len(c)
                waiting = []
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
    rows = kept_rows(path.with_suffix(".jsonl"), source=str, start=(int, float))
    vectors = np.zeros((len(rows), embedder.width), np.float32)
    for n, row in enumerate(rows):
        try:
            if source != row["source"]:
                wav, source = read_wav(root / row["source"], codec["sample_rate"]), row["source"]
            start = round(row["start"] * codec["sample_rate"])
            with on_gpu:
                vector = embedder(wav[start:start + row["frames"] * codec["hop_length"]], codec["sample_rate"])
            if not np.isfinite(vector).all():
                raise UserError(f"its embedding by {name} has numbers that are not finite")
            vectors[n] = vector
        except UserError as e:
            missing.append((n, row["id"], str(e)))
    write_whole(file.with_suffix(".missing"), json.dumps(missing))
    write_whole(file, vectors.tobytes())
