"""Files that are there whole or not at all, and arrays that stay on the disk."""

import json
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from threading import current_thread, main_thread

import numpy as np
import torch

from trivox.common import UserError, checked


def write_whole(path, content):
    """Write a text, or bytes, into a file at once and whole, or not at all."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path):
    """A file to write bytes into, which is `path` when it is whole, or goes. (Arrays go by `write`: their `tofile` says
    nothing of a full disk.)"""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # processes of a killed run may still write another
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except (Exception, KeyboardInterrupt, SystemExit) as e:
        with suppress(OSError):
            part.unlink()
        if isinstance(e, OSError) and e.errno and not e.filename:  # a full disk's names none
            e.filename = str(path)
        raise


@contextmanager
def whole_folder(path):
    """A folder to fill. What is in it comes into the folder `path` when all of it is whole, or not at all. What killed
    processes have left there of theirs goes."""
    there, part = path.exists(), path / f".{os.getpid()}.part"
    for old in left_overs(path):
        shutil.rmtree(old, ignore_errors=True)
    try:
        with sigterm_unwinds():
            part.mkdir(parents=True)
            yield part
            move_into(part, path)
    except BaseException:
        shutil.rmtree(part if there else path, ignore_errors=True)
        raise


def move_into(folder, path):
    """What is in a folder goes into the folder `path`, in place of files of its names there; folders are joined."""
    for file in folder.iterdir():
        if file.is_dir() and (path / file.name).is_dir():
            move_into(file, path / file.name)
        else:
            file.replace(path / file.name)
    folder.rmdir()


def left_overs(path):
    """The folders that `whole_folder` was filling for `path` in processes that are gone."""
    found = [(part, re.fullmatch(r"\.(\d{1,9})\.part", part.name)) for part in path.glob(".*.part")]
    return [part for part, name in found if name and not is_another(int(name[1]))]


def is_another(pid):
    """Whether it is the number of a process, and not of this one."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid != os.getpid()


def holds_nothing(path):
    """Whether there is no folder `path`, or nothing in it but what killed processes have left."""
    return not path.exists() or path.is_dir() and {*path.iterdir()} <= {*left_overs(path)}


@contextmanager
def new_folder(path):
    """The folder `path`, made where it is not there. What was made of it goes again where nothing came into it."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except BaseException:
        with suppress(OSError):  # one that is not empty
            for folder in made:
                folder.rmdir()
        raise


@contextmanager
def sigterm_unwinds():
    """Meanwhile SIGTERM ends the process as Ctrl-C does, so that what is half made is cleared away. A handler that is
    there already stays."""
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def drop_parts(folder, names="*"):
    """Remove the files NAME.PID.part that killed processes have left half-written."""
    for part in folder.glob(f"{names}.part"):
        if re.search(r"\.\d+\.part$", part.name):  # not a browser's download
            part.unlink(missing_ok=True)


def read_text(path):
    """A text file whole. UserError where it is missing, or no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path} ({getattr(e, 'strerror', None) or e})") from None


BINARY = {b"PK\x03\x04": "a spreadsheet or an archive", b"\xd0\xcf\x11\xe0": "a spreadsheet",
          b"PAR1": "in Parquet's format", b"\x1f\x8b": "packed by gzip"}  # what files begin with that are no text


def lines_of(path):
    """The lines of a text file, without their ends: a list of str, of which the blank ones keep their place.

    A line ends at \\n or \\r\\n, and where the file has none of these, at \\r; nothing else that Unicode calls a line's
    end does. Raises UserError where the file is missing or no UTF-8.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path} is UTF-16: save it as UTF-8") from None
        for mark, what in BINARY.items():
            if content.startswith(mark):
                raise UserError(f"{path} is {what}, and no text: write it as CSV in UTF-8") from None
        line = content[:e.start].count(b"\n") + 1
        raise UserError(f"line {line} of {path} is no UTF-8: save the file as UTF-8") from None
    return [line.removesuffix("\r") for line in text.split("\n" if "\n" in text else "\r")]


def read_json(path, **kinds):
    """What a JSON file holds. kinds: where it has to be an object, a pydantic type for each key that must be there.
    UserError for a file that is missing or damaged."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"cannot read {path} (it is damaged, {' '.join(str(e).split())}): make it again") from None
    if kinds and not isinstance(value, dict):
        raise UserError(f"{path} should hold an object, but holds one {type(value).__name__}: make it again")
    for key, kind in kinds.items():
        value[key] = checked(kind, value.get(key), f"{key} in {path}")
    return value


def read_rows(path, grows=False):
    """The objects of a file of JSON lines: (number of the line, dict) after (number, dict). grows: of a file that a
    kill may have cut, a last line that is no object is left out. UserError for any other line that is none."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise UserError(f"cannot read {path} ({e.strerror}): make it again") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield number, row
        elif not grows or number < len(lines):
            raise UserError(f"line {number} of {path} is no object of JSON but {line[:40]!r}: "
                            + ("delete that line" if grows else "make the file again"))


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
