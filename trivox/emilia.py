"""Emilia (He et al., 2024), 70,000 hours of English speech as NeuCodec's codes (Neuphonic's), as a data set."""

import hashlib
import json
import os
import shutil
import zlib
from collections import Counter

import numpy as np
from tqdm import tqdm

from trivox.alphabet import Alphabet
from trivox.common import UserError
from trivox.files import map_file, read_json, wait_for, whole_file, write_whole
from trivox.normalise import normalise_text
from trivox.parallel import cores, parallel
from trivox.prepare import close_tokens, open_plan

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


def convert_emilia(out, root=None):
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
                    "files": hashlib.sha256(json.dumps(files).encode()).hexdigest()})
    if rank == 0:
        write_whole(out / "speakers.json", "[]")
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
    skipped, ends, letters = Counter(), np.zeros(2, np.int64), Alphabet()
    try:
        with (whole_file(path.with_suffix(".idx")) as idx, whole_file(path.with_suffix(".u8")) as u8,
              whole_file(path.with_suffix(".u16")) as u16):  # which comes to its place first
            for texts, counts, codes in read_parquet(file):
                characters = [letters.ids(normalise_text(text or "")) for text in texts]
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
                u16.write(codes[np.repeat(keep, counts)].astype(np.uint16).tobytes())
                u8.write(np.concatenate(characters).tobytes())
                idx.write(index.tobytes())
                ends = index[-1, :2]
            write_whole(path.with_suffix(".skipped"), json.dumps(skipped))
    finally:
        shutil.rmtree(download, ignore_errors=True)
