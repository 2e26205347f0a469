"""A run's folder: who writes into it, where the run stands, and checkpoints, which are there whole or not at all.

    RUN/config.yaml                     the settings as they are now
    RUN/metrics.jsonl                   the log, an object a line
    RUN/code/                           the trainer and the model as the run began, and as it went on from a step
    RUN/checkpoints/step_00001000/      config.yaml, model.safetensors, ema.safetensors, state.pt; files.json, how long
                                        they are and their checksums; `kept_for` where an adapter of another run stands
                                        on it
    RUN/checkpoints/{latest,best}       files that name two of them. Older runs have links instead, and copies of
                                        those can be folders: all are read
    RUN/.lock                           which process trains here
"""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

import filelock
import torch
import torch.distributed as dist
import yaml
from pydantic import NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from trivox.common import UserError, barrier, checked, read_yaml
from trivox.copies import fetch_newest, newest_copy, send_copy
from trivox.files import read_json, write_whole

# ------------------------------------------------------------------------------------------------------------
# Finding checkpoints

STEP = re.compile(r"step_(\d+)$")
FILES = "files.json"  # of a checkpoint: {name: [bytes, CRC-32]}


def fault(folder, read=False):
    """What is wrong with a checkpoint folder, or "" where a run can go on from it. read: also whether its files are
    still what was written, for which all of them are read."""
    if (folder / FILES).exists():
        try:
            written = checked(dict[str, list[int]], read_json(folder / FILES), f"{folder / FILES}")
            if not {"config.yaml", "state.pt"} <= written.keys():
                return f"{FILES} is damaged"
            for name, (size, crc) in written.items():
                if (there := (folder / name).stat().st_size) != size:
                    return f"{name} is cut off" if there < size else f"{name} is not what was written"
                if read and checksum(folder / name) != crc:
                    return f"{name} is not what was written"
            return ""
        except OSError:
            return f"{name} is missing"
        except (UserError, ValueError):
            return f"{FILES} is damaged"
    for name in ("config.yaml", "model.safetensors", "ema.safetensors", "state.pt"):
        path = folder / name
        try:
            if name == "state.pt" and not zipfile.is_zipfile(path):
                return f"{name} is {'cut off' if path.exists() else 'missing'}"
            if name.endswith(".safetensors"):
                with safe_open(path, "pt"):  # looks whether the file is as long as its head says
                    pass
            if name == "config.yaml" and "system" not in read_yaml(path):
                return f"{name} is cut off"
        except (OSError, SafetensorError, zipfile.BadZipFile):
            return f"{name} is {'cut off' if path.exists() else 'missing'}"
        except UserError as e:
            return str(e)
    return ""


def checksum(path):
    """The CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def steps_in(folder):
    """The checkpoint folders step_N in a folder, the newest first."""
    found = {int(match[1]): path for path in folder.glob("step_*") if (match := STEP.match(path.name))
             and path.is_dir()}
    return [found[step] for step in sorted(found, reverse=True)]


def named(folder, name):
    """The checkpoint folder that `latest` or `best` in a folder of checkpoints stands for, None where there is none."""
    path = folder / name
    if path.is_symlink():  # of an older run. Only its last part counts: the run may have been moved
        path = folder / Path(os.readlink(path)).name
    elif path.is_file():
        with suppress(OSError, UnicodeDecodeError):
            said = path.read_text(encoding="utf-8").strip() if path.stat().st_size < 100 else ""
            path = folder / said if STEP.match(said) else path
    return path if has_weights(path) else None


def has_weights(folder):
    return (folder / "config.yaml").is_file() and any(folder.glob("*.safetensors"))


def find_checkpoint(path):
    """The checkpoint folder behind a run folder (its best, else its latest, else its newest), a checkpoint folder or a
    file in one, or a file that names one."""
    path = Path(path)
    for folder in (path / "checkpoints", path):
        named_ones = (named(folder, name) for name in ("best", "latest"))
        for candidate in (*named_ones, *(step for step in steps_in(folder) if has_weights(step))):
            if candidate:
                return candidate.resolve()
    for candidate in (path, named(path.parent, path.name), path.parent):
        if candidate and has_weights(candidate):
            return candidate.resolve()
    raise UserError(f"no checkpoint at {path}: give a run folder, a checkpoint folder or a .safetensors file in one")


def newest(out_dir):
    """The checkpoint that a run goes on from, None where there is none. Damaged ones are passed over, and named.
    UserError where all are damaged."""
    folder, faults = Path(out_dir) / "checkpoints", {}
    copies = [path for name in ("latest", "best") if (path := folder / name).is_dir() and not path.is_symlink()]
    for path in [*steps_in(folder), *copies]:
        if not (wrong := fault(path, read=True)):
            for name, what in faults.items():
                print(f"note: {folder / name} is passed over, as {what}")
            return path.absolute()
        faults[path.name] = wrong
    if faults:
        name, what = next(iter(faults.items()))
        raise UserError(f"none of the {len(faults)} checkpoints of {out_dir} is whole (of {name} {what}): move them "
                        "away to begin anew")
    return None


# ------------------------------------------------------------------------------------------------------------
# One process writes

_locks = {}  # of this process: {folder: its lock}


def lock(out_dir):
    """Make `out_dir` this process's own until it ends. UserError, which names host and process, where another trains
    into it. That of a process which is gone does not count."""
    out_dir = Path(out_dir).resolve()
    if out_dir in _locks:
        return
    path = out_dir / ".lock"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(path, timeout=0)  # by flock; where a share has no such thing, by what the file says
        held.acquire()
        if not (said := path.read_text(encoding="utf-8", errors="replace")) or said.startswith("process "):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except filelock.Timeout:
        said = " ".join(path.read_text(encoding="utf-8", errors="replace").split())
        raise UserError(f"another process trains into {out_dir} now ({said}): wait for its end, or name another "
                        "--out_dir") from None
    except OSError as e:
        raise UserError(f"cannot write into {out_dir}: {e.strerror or e}") from None
    _locks[out_dir] = held


def close_run():
    """What a run ends with: its last save is whole, and its folder is free. UserError where that save failed. No
    process leaves before: torchrun kills the others half a minute after the first that ends with a status."""
    try:
        wait_for_save()
    finally:
        while _locks:
            _locks.popitem()[1].release()
        barrier()


# ------------------------------------------------------------------------------------------------------------
# Beginning and going on

def open_run(c):
    """Where the run of a config stands: the checkpoint folder to go on from, None for a fresh run. Nothing is written
    yet but the lock. Where --resume is given, and `copy_to` has a newer checkpoint than there is here, it is fetched.

    UserError where there is a run and no --resume, another process is at it, or a machine does not see the folder.
    """
    answer = [None, None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            answer = [_open(c), None, _holder(c)]
        except UserError as e:
            answer[1] = str(e)
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1]:
        raise UserError(answer[1])
    if dist.is_initialized():
        for _ in range(50):  # a share can take seconds to show on one machine what another has written
            if seen := _holder(c) == answer[2]:
                break
            time.sleep(0.2)
        everywhere = [None] * processes()
        dist.all_gather_object(everywhere, (seen, socket.gethostname()))
        if missing := sorted({host for seen, host in everywhere if not seen}):
            raise UserError(f"out_dir {c.out_dir} is not the same folder on {', '.join(missing)} as where it is "
                            "written: several machines train into one that they share")
    return answer[0]


def _holder(c):
    """What the lock of a run says."""
    try:
        return (Path(c.out_dir) / ".lock").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _open(c):
    out_dir = Path(c.out_dir)
    if (link := out_dir / "checkpoints").is_symlink() and not link.exists():
        raise UserError(f"{link} leads to {os.readlink(link)}, which is not there now: is that disk mounted?")
    there = newest(out_dir) if out_dir.exists() else None
    if there and not c.resume:
        raise UserError(f"{c.out_dir} already holds a run: --resume goes on with it, --out_dir names another folder")
    lock(out_dir)
    if not c.copy_to:
        return there
    copy = newest_copy(c.copy_to, out_dir)  # what cannot be is told now, and not at the first checkpoint
    if copy and not c.resume:
        raise UserError(f"{c.copy_to} already holds copies of a run: --resume goes on with it, --copy_to names another "
                        "place")
    here = STEP.match(there.name) if there else None
    if copy and (not there or here and int(copy[5:]) > int(here[1])):  # also where a newer one here is damaged
        fetch_newest(c.copy_to, out_dir)
        there = newest(out_dir)
    elif here and copy != there.name:  # its copy failed, or was not asked for
        best = named(there.parent, "best")
        begin_save(send_copy, out_dir, there.name, c.copy_to, c.keep_last, best == there)
    return there


def load_checkpoint(folder, system, *stems):
    """Read a checkpoint of one system. Returns (config, weights of each stem, …); "state" is the trainer's state.

    Nothing in the files is executed. UserError for another system's checkpoint and for a missing or damaged file.
    """
    config = read_yaml(folder / "config.yaml")
    if config.get("system") != system:
        raise UserError(f"{folder} is a checkpoint of the {config.get('system')!r} system, not of {system!r}")
    parts = []
    for stem in stems:
        path = folder / ("state.pt" if stem == "state" else f"{stem}.safetensors")
        try:
            parts.append(torch.load(path, "cpu", weights_only=True) if stem == "state" else load_file(path))
        except Exception as e:  # each library has its own exceptions for a damaged file
            raise UserError(f"cannot read {path} ({type(e).__name__}: {str(e).partition(chr(10))[0]})") from None
        if stem != "state" and (name := not_finite(parts[-1])):
            raise UserError(f"{name} in {path} has numbers that are not finite: take an older checkpoint")
    return config, *parts


def not_finite(tensors):
    """The name of the first of some tensors that holds a NaN or an infinity, None where all are finite."""
    return next((name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()), None)


def load_weights(model, weights, source):
    """Copy a state dict into a model; UserError names the first key that is missing, unknown or of another shape."""
    own = model.state_dict()
    for key in [*own, *weights]:
        if key not in weights or key not in own:
            raise UserError(f"{source} has {'an unknown' if key in weights else 'no'} tensor {key!r}: another model?")
        if (there := weights[key].shape) != (here := own[key].shape):
            raise UserError(f"{key} is {tuple(there)} in {source}, but {tuple(here)} in the model")
    model.load_state_dict(weights)


SHAPELESS = "activation", "alibi", "heads", "kv_heads", "negative_eigenvalues", "prediction", "characters"


def check_shapeless(c, before, source):
    """Raises UserError where settings of a model that no shape of its weights tells are others in the config `c` than
    in that of `source`, the dict `before`. Phonemes may be of another language, but not letters."""
    before = {f.name: f.default for f in dataclasses.fields(c)} | before  # a key that was not there had its default
    for key in SHAPELESS:
        if hasattr(c, key) and (there := before[key]) != (here := getattr(c, key)):
            raise UserError(f"{key} is {there} in {source}, and {here} in this config")
    if hasattr(c, "phonemes") and bool(there := before["phonemes"]) != bool(here := c.phonemes):
        raise UserError(f"phonemes is {there!r} in {source}, and {here!r} in this config: one of them reads letters")


Place = dict[Literal["taken", "rows", "of", "which", "behind"], int | list]  # order.py's; lists are of older runs


def load_run(checkpoint, c, models, optimizers, scaler, base=None):
    """Go on from a checkpoint of this run: load weights into {file stem: model}, and the optimizers' and the scaler's
    state; learning rates and the like are those of the config. base: where an adapter is trained, the digest of the
    model that it is for, which has all other weights.

    Returns the trainer's own state. UserError for a checkpoint of another system, model or optimizer.
    """
    before, *found, state = load_checkpoint(checkpoint, c.system, *models, "state")
    state = {"best": float("inf"), "sums": [], "place": None} | checked(  # older runs had none
        dict, state, f"what {checkpoint / 'state.pt'} holds")
    for key, kind in {"step": NonNegativeInt, "best": float, "sums": list[float], "place": Place | list | None}.items():
        checked(kind, state.get(key), f"{key} in {checkpoint / 'state.pt'}")
    if (optimizer := before.get("optimizer")) != c.optimizer:
        raise UserError(f"{checkpoint} has the state of the optimizer {optimizer}, not of {c.optimizer}; --init_from "
                        "starts a fresh one")
    for model, weights in zip(models.values(), found):
        if base is not None:
            if "base" not in weights or not torch.equal(weights.pop("base"), base):
                raise UserError(f"{checkpoint} is an adapter for another model than is now at {c.init_from}")
            weights = model.state_dict() | weights
        try:
            load_weights(model, weights, checkpoint)
            check_shapeless(c, before, checkpoint)
        except UserError as e:
            raise UserError(f"{e}; {', '.join(changes(c, before)) or 'no setting has changed'}: what a run's model is "
                            "made of stays, and another --out_dir begins anew") from None
    try:
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            told = [{key: x for key, x in group.items() if key != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, own in zip(optimizer.param_groups, told):
                group.update(own)
        if state["scaler"]:  # that of a run which had none, in another precision, is empty
            scaler.load_state_dict(state["scaler"])
    except Exception as e:  # each part of it fails in a way of its own
        raise UserError(f"{checkpoint / 'state.pt'} is no whole state of training ({type(e).__name__}: {e}): move that "
                        "checkpoint away to go on from the one before") from None
    return state


def changes(c, before):
    """What a config says now that its checkpoint, of the settings `before`, does not; a key that was not there had its
    default."""
    before = {f.name: f.default for f in dataclasses.fields(c)} | before
    return [f"{key} was {before[key]!r} and is now {value!r}" for key, value in dataclasses.asdict(c).items()
            if key != "resume" and before[key] != value]


def open_log(c, script, checkpoint=None, state=None):
    """Begin to write into the run's folder: the effective config, the code as it is now, beside that which the run
    began with, and the log. Says what differs from the checkpoint that it goes on from, which has been loaded, and
    whose `state` is given. Call it in the first process alone.

    Returns log(step, **numbers), which appends to metrics.jsonl and to W&B. Lines beyond the checkpoint, of a run that
    was killed after it, are dropped.
    """
    out_dir, here, config = Path(c.out_dir), Path(__file__).parents[1], dataclasses.asdict(c)
    run = c.wandb_mode != "disabled" and begin_wandb(c, out_dir, config, (state or {}).get("wandb_id"))
    step, world = (state["step"], state.get("world")) if checkpoint else (0, None)
    code = out_dir / "code"
    now = code / f"from_{checkpoint.name}" if checkpoint else code
    now.mkdir(parents=True, exist_ok=True)
    for part in (*out_dir.glob("*.part"), *(out_dir / "checkpoints").glob("*.part")):
        if re.search(r"\.\d+\.part$", part.name):  # a process's that was killed
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    shutil.rmtree(out_dir / "checkpoints" / ".fetching", ignore_errors=True)
    for source in (Path(script), here / "model.py"):
        began = code / source.name
        if not began.exists():
            shutil.copy(source, began)
        elif checkpoint and began.read_bytes() != source.read_bytes():
            print(f"note: {source.name} is not what this run was started with: that is in {code}")
        shutil.copy(source, now)
    git = subprocess.run("git rev-parse HEAD; git diff HEAD", shell=True, cwd=here, capture_output=True)
    (now / "git.diff").write_bytes(git.stdout)
    if checkpoint:
        for change in changes(c, read_yaml(checkpoint / "config.yaml")):
            print(f"note: {change}")
        if world not in (None, processes()):
            print(f"note: {world} processes shared the work, and now {processes()} do")
        for pointer in ["best"] * state.get("is_best", False) + ["latest"]:  # a kill may have come between
            point(out_dir / "checkpoints", pointer, f"step_{step:08d}")
    write_whole(out_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    path, lines = out_dir / "metrics.jsonl", []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            lines += [line + b"\n"] * (json.loads(line)["step"] <= step)
        except (ValueError, TypeError, KeyError):
            print(f"note: line {number} of {path} is no line of a log, and is dropped: {line[:60]!r}")
    if not checkpoint and path.exists() and (content := path.read_bytes()):
        with path.with_suffix(".old").open("ab") as old:
            old.write(content)
        print(f"note: {path} is of a run that has no checkpoint: what it held is now in {old.name}")
    write_whole(path, b"".join(lines))

    def log(step, **numbers):
        with path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **numbers}) + "\n")
        if run:
            run.log(numbers, step=step)

    log.wandb_id = run.id if run else None
    return log


def begin_wandb(c, out_dir, config, known):
    """The run at W&B, with the id that is known of it. UserError where it cannot be begun."""
    import wandb

    server = {"base_url": c.wandb_url} if c.wandb_url else {}
    try:
        return wandb.init(project="trivox", name=out_dir.name, dir=out_dir, config=config, mode=c.wandb_mode, id=known,
                          resume="allow" if known else None, settings=wandb.Settings(silent=True, **server))
    except Exception as e:  # it has dozens
        raise UserError(f"cannot log to W&B ({' '.join(str(e).split())[:200]}): --wandb_mode offline or disabled goes "
                        "without") from None


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


# ------------------------------------------------------------------------------------------------------------
# Saving

_saving = []


def begin_save(work, *args):
    """Do some work in a thread that ends with it, for which `wait_for_save` waits. OpenMP keeps a team for each thread
    that has computed, and with one team more than before, those of training wait for each other in every operator: a
    step took 1.6 times as long."""
    pool = ThreadPoolExecutor(1, "save")
    _saving.append(pool.submit(work, *args))
    pool.shutdown(wait=False)


def save_run(c, step, weights, optimizers, scaler, is_best, **state):
    """Save what `load_run` goes on from: {file stem: state dict}, and the trainer's own state. The first process copies
    it to the host and goes on, while a thread writes; the next save, and `close_run`, wait for that one.

    UserError, also of the save before, where the disk refuses, or where weights are not finite."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    wait_for_save()
    state |= {"step": step, "is_best": is_best, "world": processes(), "scaler": scaler.state_dict(),
              "optimizers": [o.state_dict() for o in optimizers]}
    copies = to_host(weights), to_host(state)
    begin_save(_save, c, step, *copies, is_best)


def _save(c, step, weights, state, is_best):
    save_checkpoint(c.out_dir, step, weights, state, dataclasses.asdict(c), is_best, c.keep_last)
    if c.copy_to:
        send_copy(Path(c.out_dir), f"step_{step:08d}", c.copy_to, c.keep_last, is_best)


def wait_for_save():
    """Until the last save is on the disk. UserError where it failed."""
    while _saving:
        _saving.pop().result()


def to_host(x):
    """Copies of the tensors in containers, on the CPU: training changes the tensors themselves."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(x, dict):
        return {key: to_host(value) for key, value in x.items()}
    return type(x)(map(to_host, x)) if isinstance(x, (list, tuple)) else x


def save_checkpoint(out_dir, step, weights, state, config, best, keep_last):
    """Write checkpoints/step_N at once and whole, or not at all; then let `latest` (and `best`) name it.

    weights: {file stem: state dict}, written as safetensors. state: tensors, numbers and containers of them. All but
    the newest `keep_last`, the best and what adapters stand on are then deleted. UserError where weights are not
    finite, and where the disk refuses; what was there stays.
    """
    folder = Path(out_dir) / "checkpoints"
    name, tmp = f"step_{step:08d}", folder / ".saving"
    for stem, tensors in weights.items():
        if bad := not_finite(tensors):
            raise UserError(f"step {step} is not saved: {bad} of {stem} has numbers that are not finite. --resume goes "
                            "on from the last checkpoint; try a smaller --lr, or --dtype float32")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        for stem, tensors in weights.items():
            save_file({key: x.detach().contiguous().cpu() for key, x in tensors.items()}, tmp / f"{stem}.safetensors")
        torch.save(state, tmp / "state.pt")
        (tmp / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        written = {path.name: [path.stat().st_size, checksum(path)] for path in sorted(tmp.iterdir())}
        (tmp / FILES).write_text(json.dumps(written), encoding="utf-8")
        for path in tmp.iterdir():  # on the disk before the rename makes it visible
            with path.open("rb") as f:
                os.fsync(f)
        shutil.rmtree(folder / name, ignore_errors=True)
        tmp.rename(folder / name)
        for pointer in ["best"] * best + ["latest"]:
            point(folder, pointer, name)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(tmp, ignore_errors=True)
        last = next((path for path in steps_in(folder) if not fault(path)), "none")
        raise UserError(f"could not save step {step}: {e}; the last good checkpoint is {last}") from None
    whole = [path for path in steps_in(folder) if not fault(path)]
    keep = {*whole[:keep_last], folder / name, named(folder, "best")}
    for old in steps_in(folder):
        if old not in keep and not (old / "kept_for").exists():
            try:
                old.unlink() if old.is_symlink() else shutil.rmtree(old)
            except OSError as e:  # which is no reason to end a training run
                print(f"note: {old}, which is no longer needed, could not be deleted: {e.strerror or e}", flush=True)


def point(folder, pointer, name):
    """Let the file `latest` or `best` name a checkpoint, at once. A folder of that name, from a copy of an older run
    that followed links, becomes the checkpoint that it is."""
    path = folder / pointer
    if path.is_dir() and not path.is_symlink():
        if fault(path):
            shutil.rmtree(path)
            return point(folder, pointer, name)
        own = folder / f"step_{torch.load(path / 'state.pt', weights_only=True)['step']:08d}"
        if fault(own):
            shutil.rmtree(own, ignore_errors=True)
            path.rename(own)
        else:
            shutil.rmtree(path)
    write_whole(path, name)
