"""Files that are there whole or not at all, and arrays that stay on the disk."""

import json
import os
import time

import numpy as np
import torch

from trivox.common import UserError


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


def padded(rows, steps):
    """Arrays of one type (steps_i, …) as a tensor (B, steps, …), which ends in zeros where they are shorter."""
    batch = np.empty((len(rows), steps, *rows[0].shape[1:]), rows[0].dtype)
    for place, row in zip(batch, rows):
        place[:len(row)], place[len(row):] = row, 0
    return torch.from_numpy(batch)
