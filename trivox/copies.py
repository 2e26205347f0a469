"""Copies of a run's checkpoints elsewhere, by fsspec: a folder, s3://, gs:// and so on. It knows files, not what is in
them.

    URL/step_00001000/…          the checkpoint, and in run/ the log, the settings, the code and the codec as they were.
                                 run/ is there first, and goes last: it tells a copy from somebody's checkpoint
    URL/step_00001000.json       {file: size}, written last: without it a copy does not count
    URL/best                     the name of the best checkpoint
"""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from trivox.common import UserError
from trivox.files import write_whole

RUN_FILES = ("metrics.jsonl", "config.yaml", "code", "codec")


def open_target(url):
    """(the file system, the path in it) of a URL. UserError where fsspec cannot open it."""
    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError, OSError) as e:  # ImportError names the package that the protocol needs
        raise UserError(f"cannot copy to {url}: {e}") from None


def newest_copy(url, out_dir):
    """The name of the newest checkpoint that is whole at a URL, "" where there is none. UserError where the URL cannot
    be read, lies within `out_dir`, or holds checkpoints that are no copies or are of another run than stands there."""
    files, root = open_target(url)
    if isinstance(files, LocalFileSystem) and Path(root).resolve().is_relative_to(out_dir.resolve()):
        raise UserError(f"copy_to {url} is within out_dir {out_dir}, and would be lost with it: name another place")
    own, here, there = out_dir / "metrics.jsonl", [], []
    try:
        strange, names = unfinished(files, root, False), copies_at(files, root)
        if names and own.exists():
            here, log = own.read_bytes().splitlines()[:1], f"{root}/{names[0]}/run/metrics.jsonl"
            there = files.cat_file(log).splitlines()[:1] if files.exists(log) else []
    except Exception as e:  # each file system has its own exceptions
        raise UserError(f"cannot read copy_to {url}: {type(e).__name__}: {e}") from None
    if strange:
        raise UserError(f"copy_to {url} holds {strange[0]}, which is no copy: name another place")
    if here and there and here != there:  # a first line has losses and times: no two runs begin alike
        raise UserError(f"copy_to {url} holds copies of another run than {out_dir}: name another place")
    return names[0] if names else ""


def send_copy(out_dir, name, url, keep_last, best):
    """Copy a checkpoint, and what else a run needs to go on, to a URL: whole, or it does not count. All older ones but
    the newest `keep_last` there and the best are then deleted, and what unfinished copies left. What fails is said, and
    training goes on."""
    try:
        files, root = open_target(url)
        clear(files, root)
        if name in unfinished(files, root, False):
            raise FileExistsError(f"there is a {name} that is no copy")
        delete(files, root, name)
        sources = {}
        for kind in RUN_FILES:
            paths = sorted((out_dir / kind).rglob("*")) if (out_dir / kind).is_dir() else [out_dir / kind]
            sources |= {f"run/{path.relative_to(out_dir)}": path for path in paths if path.is_file()}
        sources |= {f"{path.relative_to(out_dir / 'checkpoints' / name)}": path
                    for path in sorted((out_dir / "checkpoints" / name).rglob("*")) if path.is_file()}
        sizes = {}
        for there, path in sources.items():
            content = path.read_bytes() if there.startswith("run/") else None  # which may grow meanwhile
            target = f"{root}/{name}/{there}"
            files.makedirs(target.rpartition("/")[0], exist_ok=True)
            if content is None:
                files.put_file(str(path), target)
            else:
                files.pipe_file(target, content)
            sizes[there] = path.stat().st_size if content is None else len(content)
        files.pipe_file(f"{root}/{name}.json", json.dumps(sizes).encode())
        if best:
            files.pipe_file(f"{root}/best", name.encode())
        kept = files.cat_file(f"{root}/best").decode() if files.exists(f"{root}/best") else name
        for old in [old for old in copies_at(files, root) if old <= name][keep_last:]:
            if old != kept:
                delete(files, root, old)
    except Exception as e:  # each file system has its own exceptions, and none of them is to end a training run
        print(f"note: {name} could not be copied to {url} ({type(e).__name__}: {e}); the next one will be tried again",
              flush=True)
        with suppress(Exception):  # half of it would keep a full disk full
            clear(files, root)


def clear(files, root):
    """Delete what copies left that were not finished."""
    for name in unfinished(files, root, True):
        delete(files, root, name)


def delete(files, root, name):
    """Delete a copy, or what there is of it."""
    folder = f"{root}/{name}"
    if files.exists(f"{folder}.json"):
        files.rm_file(f"{folder}.json")
    if files.exists(folder):
        for path in files.ls(folder, detail=False):
            if not path.rstrip("/").endswith("/run"):
                files.rm(path, recursive=True)
        files.rm(folder, recursive=True)


def unfinished(files, root, copies):
    """The names of the checkpoints at a path that do not count, sorted: those that are copies, or those that are not.
    """
    found = []
    for name in sorted(names_at(files, root) - names_at(files, root, ".json")):
        inside = {path.rstrip("/").rpartition("/")[2] for path in files.ls(f"{root}/{name}", detail=False)}
        found += [name] * (("run" in inside or not inside) == copies)
    return found


def names_at(files, root, ending=""):
    """The names step_N of what has this ending at a path; without one, of folders."""
    if not files.exists(root):
        return set()
    files.invalidate_cache()
    names = (path.rstrip("/").rpartition("/")[2] for path in files.ls(root, detail=False))
    return {found[1] for name in names if (found := re.fullmatch(rf"(step_\d{{8,}}){re.escape(ending)}", name))}


def copies_at(files, root):
    """The names of the checkpoints that are whole at a path, the newest first."""
    return sorted(names_at(files, root, ".json"), key=lambda name: int(name[5:]), reverse=True)


def fetch_newest(url, out_dir):
    """Fetch the newest whole copy at a URL, and the best, into a run folder, where what is damaged gives way; nothing
    where there is none. UserError where a copy is not what it was."""
    files, root = open_target(url)
    folder = out_dir / "checkpoints"
    part = folder / ".fetching"
    try:
        if not (names := copies_at(files, root)):
            return
        best = files.cat_file(f"{root}/best").decode() if files.exists(f"{root}/best") else ""
        wanted = [names[0]] + [best] * (best in names[1:] and not (folder / best).exists())
        print(f"fetching {names[0]} from {url}", flush=True)
        shutil.rmtree(part, ignore_errors=True)
        for name in wanted:
            fetch(files, root, name, part / name)
    except UserError:
        raise
    except Exception as e:  # each file system has its own exceptions
        raise UserError(f"cannot fetch from {url}: {type(e).__name__}: {e}") from None
    for name in wanted:  # the newest is there first: what goes on from the best alone would go back
        if name == names[0] and (part / name / "run").exists():
            shutil.copytree(part / name / "run", out_dir, dirs_exist_ok=True)
        shutil.rmtree(part / name / "run", ignore_errors=True)
        shutil.rmtree(folder / name, ignore_errors=True)
        (part / name).rename(folder / name)
    part.rmdir()
    for pointer, name in {"best": best, "latest": names[0]}.items():
        if name:
            write_whole(folder / pointer, name)


def fetch(files, root, name, part):
    """Fetch one copy into a new folder."""
    for there, size in json.loads(files.cat_file(f"{root}/{name}.json")).items():
        target = part / there
        if not target.resolve().is_relative_to(part.resolve()):
            raise UserError(f"{root}/{name}.json names a file outside the run: {there}")
        target.parent.mkdir(parents=True, exist_ok=True)
        files.get_file(f"{root}/{name}/{there}", str(target))
        if (found := target.stat().st_size) != size:
            raise UserError(f"{root}/{name}/{there} has {found} bytes, not {size}: delete {name}.json there, and "
                            "--resume takes the copy before it")
