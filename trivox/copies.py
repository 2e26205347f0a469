"""Copies of a run's checkpoints elsewhere, by fsspec: a folder, s3://, gs:// and so on. It knows files, not what is in
them.

    URL/step_00001000/…          the checkpoint, and in run/ the log, the settings, the code and the codec as they were
    URL/step_00001000.json       {file: size}, written last: without it a copy does not count
    URL/best                     the name of the best checkpoint
"""

import json
import shutil
from pathlib import Path

import fsspec

from trivox.common import UserError

RUN_FILES = ("metrics.jsonl", "config.yaml", "code", "codec")


def open_target(url):
    """(the file system, the path in it) of a URL. UserError where fsspec cannot open it."""
    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError, OSError) as e:  # ImportError names the package that the protocol needs
        raise UserError(f"cannot copy to {url}: {e}") from None


def send_copy(out_dir, name, url, keep_last, best):
    """Copy a checkpoint, and what else a run needs to go on, to a URL: whole, or it does not count. All but the newest
    `keep_last` there and the best are then deleted. What fails is said, and training goes on."""
    try:
        files, root = open_target(url)
        sources = {f"{path.relative_to(out_dir / 'checkpoints' / name)}": path
                   for path in sorted((out_dir / "checkpoints" / name).rglob("*")) if path.is_file()}
        for kind in RUN_FILES:
            paths = sorted((out_dir / kind).rglob("*")) if (out_dir / kind).is_dir() else [out_dir / kind]
            sources |= {f"run/{path.relative_to(out_dir)}": path for path in paths if path.is_file()}
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
        keep = {*copies_at(files, root)[:keep_last], files.cat_file(f"{root}/best").decode()
                if files.exists(f"{root}/best") else name}
        for old in set(copies_at(files, root)) - keep:
            files.rm_file(f"{root}/{old}.json")
            files.rm(f"{root}/{old}", recursive=True)
    except Exception as e:  # each file system has its own exceptions, and none of them is to end a training run
        print(f"note: {name} could not be copied to {url} ({type(e).__name__}: {e}); the next one will be tried again",
              flush=True)


def copies_at(files, root):
    """The names of the checkpoints that are whole at a path, the newest first."""
    if not files.exists(root):
        return []
    files.invalidate_cache()
    names = [Path(path).stem for path in files.ls(root, detail=False) if path.endswith(".json")]
    return sorted(names, key=lambda name: int(name.removeprefix("step_")), reverse=True)


def fetch_newest(url, out_dir):
    """Fetch the newest whole copy at a URL, and the best, into a run folder without checkpoints; nothing where there is
    none. UserError where a copy is not what it was."""
    files, root = open_target(url)
    try:
        if not (names := copies_at(files, root)):
            return
        best = files.cat_file(f"{root}/best").decode() if files.exists(f"{root}/best") else names[0]
        print(f"fetching {names[0]} from {url}", flush=True)
        for name in [best] * (best in names[1:]) + names[:1]:
            fetch(files, root, name, out_dir)
    except UserError:
        raise
    except Exception as e:  # each file system has its own exceptions
        raise UserError(f"cannot fetch from {url}: {type(e).__name__}: {e}") from None
    for pointer, name in {"best": best, "latest": names[0]}.items():
        (out_dir / "checkpoints" / pointer).write_text(name)


def fetch(files, root, name, out_dir):
    """Fetch one copy into a run folder, the checkpoint at once and last."""
    sizes, part = json.loads(files.cat_file(f"{root}/{name}.json")), out_dir / "checkpoints" / ".fetching"
    shutil.rmtree(part, ignore_errors=True)
    for there, size in sizes.items():
        target = part / there
        if not target.resolve().is_relative_to(part.resolve()):
            raise UserError(f"{root}/{name}.json names a file outside the run: {there}")
        target.parent.mkdir(parents=True, exist_ok=True)
        files.get_file(f"{root}/{name}/{there}", str(target))
        if (found := target.stat().st_size) != size:
            raise UserError(f"{root}/{name}/{there} has {found} bytes, not {size}: delete {name}.json there, and "
                            "--resume takes the copy before it")
    if (part / "run").exists():
        shutil.copytree(part / "run", out_dir, dirs_exist_ok=True)
        shutil.rmtree(part / "run")
    part.rename(out_dir / "checkpoints" / name)
