"""Corpora to data sets: the shards of log-mels, of tokens and of speaker embeddings that datasets.py describes."""

import hashlib
import json
import os
import shutil
import threading
import time
from collections import Counter
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from trivox.alphabet import SYMBOLS, UNKNOWN, alphabet, of_texts
from trivox.audio import log_mel
from trivox.codecs import CODECS, MelRVQ, load_codec, read_codec
from trivox.common import UserError
from trivox.corpora import draw_key, draw_validation, file_stamp, has_texts, read_corpus, tell_language
from trivox.datasets import AGAIN, SPLITS, kept_rows
from trivox.files import drop_parts, map_file, read_json, read_rows, read_text, wait_for, whole_file, write_whole
from trivox.metadata import LISTS
from trivox.normalise import normalise_text
from trivox.parallel import parallel
from trivox.recordings import SCALES, read_recording
from trivox.text import MAX_TEXT_BYTES
from trivox.unusual import measure, tell_unusual
from trivox.voices import load_embedder

SHARD_CLIPS = 256


def prepare_mels(root, out, mel, max_seconds, language="en", **listed):
    """Turn the corpus at `root` into shards at `out`. Goes on where a killed run stopped, and makes anew what other
    clips or changed recordings are in.

    Clips that cannot be read, are empty, longer than `max_seconds` or have more than 256 bytes of text are skipped
    and listed with the reason. language: in which numbers become words. listed: more for `corpora.read_corpus`.
    Raises UserError where no clip is left or `out` holds another corpus's shards or those of other settings.
    """
    if not (listed.get("metadata") or has_texts(root)):
        raise UserError(f"{root} has no list of clips ({', '.join(LISTS)}), nor texts in files beside them")
    clips, heldout = read_corpus(root, **listed)
    tell_language(clips, language)
    jobs = [(out / f"mels_{i:05d}", root, clips[i * SHARD_CLIPS:(i + 1) * SHARD_CLIPS], mel, max_seconds, language)
            for i in range(-(-len(clips) // SHARD_CLIPS))]
    plan = {"mel": asdict(mel), "max_seconds": max_seconds, "root": str(root.resolve()), **of_language(language)}
    open_plan(out, plan, {job[0].name: job[2] for job in jobs}, "dataset_stats.json")
    drop_parts(out)

    todo = [job for job in jobs if not job[0].with_suffix(".jsonl").exists()]
    if todo:
        bar = tqdm(None, "log-mels", sum(len(job[2]) for job in todo), unit=" clips", leave=False)
        with parallel() as pool, bar:
            for clips_done in pool.map(_prepare_shard, todo):
                bar.update(clips_done)
    drop_parts(out, "mels_*")  # those of a killed run's processes that ended after it
    skipped = split_rows(root, [job[0] for job in jobs], heldout, 0.02, "id", out / "dataset_stats.json")
    kept = []
    for path, *_ in jobs:
        rows = kept_rows(path.with_suffix(".jsonl"), sum=float, sum_sq=float)
        for row in rows:
            mean, square = (row[key] / (row["frames"] * mel.n_mels) for key in ("sum", "sum_sq"))
            if not mean * mean <= square * (1 + 1e-9):
                raise UserError(f"{path}.jsonl has a log-mel of mean {mean:g} and mean square {square:g} for "
                                f"{row['id']}, which none can have: {AGAIN}")
        index = [(row["offset"] + row["frames"], SPLITS.index(row["split"])) for row in rows]
        write_whole(path.with_suffix(".idx"), np.array(index, np.int64).tobytes())
        kept += rows
    tell_scales(kept)
    tell_unusual(kept, mel.frame_rate)
    take_grammar(root, out)
    frames, text_bytes = sum(r["frames"] for r in kept), [len(r["text"].encode()) for r in kept]
    mean, square = (sum(r[key] for r in kept) / (frames * mel.n_mels) for key in ("sum", "sum_sq"))
    if square - mean * mean <= 1e-9 * square:
        raise UserError(f"every clip of {root} sounds the same throughout (log-mel {mean:.3g}): there is nothing to "
                        "learn in silence")
    stats = {
        "mel_mean": mean, "mel_std": (square - mean * mean) ** 0.5,
        "clips": len(kept), "validation_clips": sum(r["split"] == "val" for r in kept), "skipped": len(skipped),
        "seconds": frames / mel.frame_rate, "frames": frames, "max_frames": max(r["frames"] for r in kept),
        "text_bytes": {"min": min(text_bytes), "mean": sum(text_bytes) / len(kept), "max": max(text_bytes)},
        "mel": asdict(mel), **of_language(language),
    }
    write_whole(out / "dataset_stats.json", json.dumps(stats, indent=2) + "\n")
    print(f"{out}: {len(kept):,} clips, {stats['seconds'] / 3600:.2f} h, {stats['validation_clips']} held out, "
        f"{len(skipped)} skipped; log-mel mean {mean:.4f}, std {stats['mel_std']:.4f}")


OF_CLIPS = ("shards", "clips", "sources")  # what a plan says of the clips; the last two in data sets of before


def open_plan(out, plan, shards=None, mark=None):
    """Begin a data set, or go on with one.

    plan: its settings; what is there of others is refused. shards: {name: clips}, of the corpus at plan["root"]. One
    that was made of other clips, or of recordings that have changed since, goes to be made anew, with what was made of
    it and the file `mark`, which says that all is whole. Under torchrun the first process does that. Raises UserError
    where `out` holds another data set.
    """
    path, plan = out / "plan.json", json.loads(json.dumps(plan))
    digests = {name: digest(Path(plan["root"]), clips) for name, clips in (shards or {}).items()}
    content = json.dumps(plan | {"shards": digests} if shards else plan)
    if int(os.environ.get("RANK") or 0) > 0:
        while not path.exists() or read_text(path) != content:
            time.sleep(0.2)
        return
    out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        old = read_json(path)
        if not isinstance(old, dict) or {key: old[key] for key in old if key not in OF_CLIPS} != plan:
            raise UserError(f"{out} holds data of another corpus or other settings: delete it, or choose another --out")
        if shards:
            drop_stale(out, shards, old.get("shards", {}), digests, mark)
    write_whole(path, content)


def digest(root, clips):
    """What a shard is made of, hashed: its clips, and the size and the time of each recording."""
    made_of = [(clip, file_stamp(root / clip["source"])) for clip in clips]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def drop_stale(out, shards, old, new, mark):
    """Remove the shards at `out` that are made of other than `shards`, {name: clips}. old, new: their digests."""
    kind = next(iter(shards)).partition("_")[0]
    there = {path.name.partition(".")[0] for path in out.glob(f"{kind}_*.jsonl")}
    stale = {name for name in there if name not in shards or (
        old[name] != new[name] if name in old else not made_of(out / f"{name}.jsonl", shards[name]))}
    if not stale:
        return
    print(f"{out}: {len(stale)} of {len(there)} shards are made anew, as their clips or recordings are others than "
          "before")
    voices = sorted(out.glob("speaker_*"), key=lambda path: path.suffix != ".json")  # all, as some are means over all
    files = [path for name in stale for path in out.glob(f"{name}.*")]
    for path in (out / mark, out / "grammar.jsgf", *voices, *files):
        path.unlink(missing_ok=True)
    if stale == there:
        (out / "codec.safetensors").unlink(missing_ok=True)  # mel_rvq's, which was fitted to other recordings
    elif (out / "codec.safetensors").exists():
        print(f"note: mel_rvq stays as it was fitted before; delete {out} to have it fitted to what is there now")


def made_of(path, clips):
    """Whether the shard of a data set of before, whose plan has no digests, is of these clips."""
    rows, known = [row for _, row in read_rows(path)], {clip["source"]: clip for clip in clips}
    return {row.get("source") for row in rows} == known.keys() and all(
        row.get("text", "") in ("", normalise_text(known[row["source"]]["text"], accents=True)) for row in rows)


def split_rows(root, shards, heldout, share, key, mark):
    """Write into the rows of the shards' .jsonl which clips are for validation: those of `heldout`, a set of sources,
    or where it is None a share of those that can be used, drawn by their `key`. Returns the rows that were skipped,
    each of which is told with its reason. mark: the file that goes where something changes.

    Raises UserError where no clip can be used, and where none can be of those that heldout.txt names.
    """
    skipped, kept, rows_of = [], [], {}
    for path in shards:
        rows_of[path] = []
        for number, row in read_rows(file := path.with_suffix(".jsonl")):
            if not all(isinstance(row.get(name), str) for name in ("id", "source")):
                raise UserError(f"line {number} of {file} names no clip and its recording: {AGAIN}")
            rows_of[path].append(row)
            (skipped if "skipped" in row else kept).append(row)
    for row in skipped:
        print(f"skipped {row.get('id')}: {row['skipped']}")
    if not kept:
        raise UserError(f"none of the {len(skipped):,} clips of {root} could be used")
    val = heldout if heldout is not None else draw_validation(sorted({row[key] for row in kept}), share)
    of = key if heldout is None else "source"
    if heldout and not any(row[of] in val for row in kept):
        raise UserError(f"none of the {len(heldout):,} clips that {root / 'heldout.txt'} names could be used")
    for path, rows in rows_of.items():
        before = json.dumps(rows)
        for row in rows:
            if "skipped" not in row:
                row["split"] = SPLITS[int(row[of] in val)]
        if json.dumps(rows) != before:
            mark.unlink(missing_ok=True)
            write_whole(path.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    return skipped


def take_grammar(root, out):
    """Of a corpus that has a grammar, or has none any more."""
    if (root / "grammar.jsgf").exists():
        shutil.copy(root / "grammar.jsgf", out)
    else:
        (out / "grammar.jsgf").unlink(missing_ok=True)


def as_spoken(clip, language):
    """A clip with its text as it is spoken later. One whose text says nothing is skipped."""
    text = normalise_text(clip["text"], True, language)
    if clip["text"] and not any(map(str.isalnum, text)):
        return {"skipped": f"its text, {clip['text'][:40]!r}, has no letter and no digit"} | clip
    return clip | {"text": text}


def of_language(language):
    """What a data set says of the language of its texts: nothing of English, as those of before."""
    return {} if language == "en" else {"language": language}


def scaled(full_scale):
    """What a row says of a recording of floats whose full scale is not 1, and nothing of others."""
    return {} if full_scale == 1 else {"full_scale": full_scale}


def tell_scales(rows):
    """Tell of the clips whose recordings hold floats on a scale of integers, and were brought to 1."""
    for scale, count in Counter(row["full_scale"] for row in rows if row.get("full_scale") in SCALES).items():
        first = next(row["id"] for row in rows if row.get("full_scale") == scale)
        print(f"note: {count:,} clips, {first} for one, hold floats on a scale of ±{scale:,.0f}, which are read as ±1")


def _prepare_shard(job):
    """One shard: first the mels, then, as the mark that they are whole, their rows. Returns the number of clips."""
    path, root, clips, mel, max_seconds, language = job
    clips = [as_spoken(clip, language) for clip in clips]
    torch.set_num_threads(1)
    lines, offset = [], 0
    with whole_file(path.with_suffix(".f16")) as f:
        for clip in clips:
            try:
                features, heard = prepare_clip(root, clip, mel, max_seconds)
            except UserError as e:
                lines.append({**clip, "skipped": str(e)})
                continue
            f.write(features.numpy().astype(np.float16).tobytes())
            lines.append({**clip, **heard, "offset": offset, "frames": len(features),
                          "sum": features.double().sum().item(), "sum_sq": features.double().square().sum().item()})
            offset += len(features)
    write_whole(path.with_suffix(".jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    return len(clips)


def prepare_clip(root, clip, mel, max_seconds):
    """The log-mel (frames, n_mels) of one clip, and what `measure` says of it. Raises UserError with the reason why it
    cannot be used."""
    if "skipped" in clip:
        raise UserError(clip["skipped"])
    if (size := len(clip["text"].encode())) > MAX_TEXT_BYTES:
        raise UserError(f"its text has {size} bytes, more than {MAX_TEXT_BYTES}")
    wav, full_scale = read_recording(root / clip["source"], mel.sample_rate, max_seconds)
    if np.abs(wav).max() < 1e-4:
        raise UserError("it is silent")
    features = log_mel(wav, mel)
    if not features.half().isfinite().all():
        raise UserError("its log-mel has numbers that are not finite")
    return features, measure(wav, mel.sample_rate) | scaled(full_scale)


# ------------------------------------------------------------------------------------------------------------
# Tokens

SHARD_SOURCES = 64
FIT_SOURCES, FIT_FRAMES = 1000, 100_000  # what mel_rvq is fitted to: so many recordings, and at most so many frames


def tokenize(root, out, name, chunk=None, device="cpu", mel=None, sizes=None, fit=(), language="en", characters="",
             **listed):
    """Encode the corpus at `root` into a token data set at `out`. Goes on where a killed run stopped, and makes anew
    what other clips or changed recordings are in; mel_rvq is fitted anew only where that is all.

    root: with a list of clips, or any folder in which recordings lie. name: one of codecs.CODECS; "mel_rvq", which
    is fitted first: mel is its MelConfig, sizes those of its books, and `fit` more corpora that it is fitted to, as
    much to each; or the folder of tokens of a mel_rvq, which is used again. chunk: (number, "frames" or "seconds")
    to cut the recordings at; a rest is kept from a quarter of that on; None keeps them whole. language: in which
    numbers become words. characters: what the LLM TTS reads, "echolancer" for its letters, "auto" for those of these
    texts; English has the former unless told, other languages the latter. listed: more for `corpora.read_corpus`.
    Under torchrun each process writes its own shards, and the first of them closes the data set.

    Recordings that cannot be read or are silent are skipped and listed with the reason. Raises UserError where nothing
    is left or `out` holds other tokens.
    """
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    (sources, heldout), fitted = read_corpus(root, **listed), None
    if rank == 0:
        tell_language(sources, language)
    if (Path(name) / "codec" / "codec.json").exists():  # a run
        name = str(Path(name) / "codec")
    if name not in (*CODECS, "mel_rvq"):
        if not (Path(name) / "codec.json").exists():
            raise UserError(f"{name} is neither a codec ({', '.join(CODECS)}, mel_rvq) nor a folder of tokens")
        if (made_with := read_codec(name)["codec"]) != "mel_rvq":
            raise UserError(f"the tokens at {name} are {made_with}'s, which needs no folder: give --codec {made_with}")
        fitted = load_codec(name)
        name, mel, sizes = "mel_rvq", fitted.mel, [len(book) for book in fitted.books]
    plan = {"codec": name, "chunk": chunk, "root": str(root.resolve()), "mel": mel and asdict(mel), "sizes": sizes,
            **of_language(language)}
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
    shards = [(out / f"tokens_{i:05d}", sources[i * SHARD_SOURCES:(i + 1) * SHARD_SOURCES])
              for i in range(-(-len(sources) // SHARD_SOURCES))]
    open_plan(out, plan, {path.name: clips for path, clips in shards}, "codec.json")
    if world == 1:
        drop_parts(out)

    if name == "mel_rvq":
        if rank == 0 and not (out / "codec.safetensors").exists():
            corpora = [(root, sources, heldout), *((other, *read_corpus(other)) for other in fit)]
            (fitted or fit_mel_rvq(corpora, mel, sizes)).save(out)
        wait_for([out / "codec.safetensors"])
        codec = job_codec = MelRVQ.load(out, mel)
        device = "cpu"
    jobs = [(path, root, clips, job_codec, frames, language) for path, clips in shards]
    todo = [job for job in jobs[rank::world] if not job[0].with_suffix(".jsonl").exists()]
    if todo:
        bar = tqdm(None, "tokens", sum(len(job[2]) for job in todo), unit=" recordings", leave=False)
        with parallel(threads=device == "cuda") as pool, bar:
            for sources_done in pool.map(encode_shard, todo):
                bar.update(sources_done)
    if rank > 0:
        return

    wait_for([path.with_suffix(".jsonl") for path, _ in shards])
    drop_parts(out, "tokens_*")  # of several processes none writes any more
    skipped = split_rows(root, [path for path, _ in shards], heldout, 0.05, "source", out / "codec.json")
    write_whole(out / "speakers.json", json.dumps(speakers))
    rows = {path: kept_rows(path.with_suffix(".jsonl"), speaker=str) for path, _ in shards}
    kept = [row for some in rows.values() for row in some]
    own = (characters or ("echolancer" if language == "en" else "auto")) == "auto" and any(row["text"] for row in kept)
    letters = alphabet(of_texts([row["text"] for row in kept], language == "und") if own else SYMBOLS, language)
    unknown = sum(write_sentences(path, rows[path], speakers, letters, language) for path in rows)
    if unknown > 0.001 * (there := sum(len(row["text"]) for row in kept)):
        print(f"note: {unknown / there:.1%} of the characters of these texts are none of Echolancer's, and so unknown "
              "to the LLM TTS: --characters auto keeps them, and --language says in which language they are")
    tell_scales(kept)
    tell_unusual(kept, codec.frame_rate)
    take_grammar(root, out)
    info = {
        "codec": name, "sample_rate": codec.sample_rate, "hop_length": codec.hop_length,
        "frame_rate": codec.frame_rate, "codebooks": codec.codebooks, "codebook_size": codec.codebook_size,
        "mel": mel and asdict(mel), "chunk_frames": frames, **of_language(language),
        **({"characters": letters.symbols} if own else {}),
    }
    close_tokens(out, info, len(kept), sum(r["split"] == "val" for r in kept), len(skipped),
                 sum(r["frames"] for r in kept), max(r["frames"] for r in kept))


def close_tokens(out, info, clips, validation_clips, skipped, frames, max_frames):
    """Mark a token data set as whole by its codec.json, and say what it holds."""
    seconds = frames / info["frame_rate"]
    counts = {"clips": clips, "validation_clips": validation_clips, "skipped": skipped, "seconds": seconds,
              "max_frames": max_frames}
    write_whole(out / "codec.json", json.dumps(info | counts, indent=2) + "\n")
    print(f"{out}: {clips:,} clips, {seconds / 3600:.2f} h, {validation_clips} held out, {skipped} skipped; "
          f"{info['codec']}, {info['frame_rate']:.1f} frames/s of {info['codebooks']} x {info['codebook_size']} codes")


def fit_mel_rvq(corpora, mel, sizes):
    """Fit mel_rvq to frames of the recordings for training, drawn by hash. corpora: for each a root, its clips, and the
    sources that are held out or None; the frames of those that have few are repeated until all weigh as much."""
    mels = []
    for root, clips, heldout in corpora:
        train = {clip["source"] for clip in clips if "skipped" not in clip}
        train -= draw_validation(sorted(train), 0.1) if heldout is None else heldout  # 5 % of those that can be used
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
        mels = log_mel(read_recording(path, mel.sample_rate)[0], mel).numpy()
    except UserError as e:
        return str(e)
    if not np.isfinite(mels).all():
        return "its log-mel has numbers that are not finite"
    return mels[np.linspace(0, len(mels) - 1, min(count, len(mels))).astype(int)]


cached_codec = cache(load_codec)
on_gpu = threading.Lock()  # of the threads that read for one GPU, one encodes at a time


def encode_shard(job):
    """One shard: its codes and then, as the mark that they are whole, their rows. Returns the number of sources."""
    path, root, sources, codec, chunk_frames, language = job
    codec = cached_codec(*codec) if isinstance(codec, tuple) else codec
    lines, offset, waiting = [], 0, []  # waiting: (line, wav) that have been read
    with whole_file(path.with_suffix(".u16")) as f:
        for n, source in enumerate(sources):
            source = as_spoken(source, language)
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
    return len(sources)


def write_sentences(path, rows, speakers, letters, language="en"):
    """The characters of a shard's clips and then, as the mark that they are whole, where each clip ends.

    rows: what its .jsonl says of the clips. speakers: the names of all speakers of the data set. letters: the Alphabet
    that they are written in. language: of the texts. Returns how many characters it does not know.
    """
    characters = [letters.ids(normalise_text(row["text"], letters.own, language)) for row in rows]
    number = {name: i for i, name in enumerate(speakers)}
    index = [(row["offset"] + row["frames"], end, number.get(row["speaker"], -1), SPLITS.index(row["split"]))
             for row, end in zip(rows, np.cumsum([len(ids) for ids in characters]))]
    this, other = (".ids", ".u8") if letters.own else (".u8", ".ids")
    write_whole(path.with_suffix(this), b"".join(ids.tobytes() for ids in characters))
    path.with_suffix(other).unlink(missing_ok=True)
    write_whole(path.with_suffix(".idx"), np.array(index, np.int64).tobytes())
    return sum(int((ids == UNKNOWN).sum()) for ids in characters)


def cut_source(root, source, codec, chunk_frames):
    """One recording, whole or in chunks: [(line of the index, wav)]. Raises UserError where it cannot be used."""
    if "skipped" in source:
        raise UserError(source["skipped"])
    wav, full_scale = read_recording(root / source["source"], codec.sample_rate)
    source = source | scaled(full_scale)
    if np.abs(wav).max() < 1e-4:
        raise UserError("it is silent")
    size = (chunk_frames or 0) * codec.hop_length
    if len(wav) <= size or not size:
        return [({**source, **measure(wav, codec.sample_rate), "start": 0.0}, wav)]
    starts = [start for start in range(0, len(wav), size) if len(wav) - start >= size / 4]
    return [({**source, **measure(wav[start:start + size], codec.sample_rate), "id": f"{source['id']}_{n:03d}",
              "text": "", "start": start / codec.sample_rate}, wav[start:start + size])
            for n, start in enumerate(starts)]


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
                (wav, _), source = read_recording(root / row["source"], codec["sample_rate"]), row["source"]
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
