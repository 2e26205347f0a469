"""The plumbing that the three trainers share: config, process group, checkpoints, log."""

import argparse
import ctypes
import dataclasses
import difflib
import errno
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import typing
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import pydantic
import torch
import torch.distributed as dist
import yaml
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel


class UserError(Exception):
    """Something that the user can mend: `run` prints it as one sentence, without a traceback."""


def run(main, argv):
    """Call `main(argv)`; a UserError ends the process with one line on stderr and exit status 1."""
    try:
        return main(argv)
    except UserError as e:
        problem = e.args[0]
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = f"the disk is full: {e}"
    sys.exit(f"error: {problem}")  # here main's frame is gone, and its progress bar has ended its line


# ------------------------------------------------------------------------------------------------------------
# Config: one dataclass a trainer, filled from YAML and then from flags

yaml.SafeLoader.add_implicit_resolver(  # PyYAML follows YAML 1.1, in which 1e-3 is a string
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


@dataclasses.dataclass
class RunConfig:
    """The settings that all trainers have: saving, logging, device, precision."""
    resume: bool = False  # go on with the run in out_dir, if there is one
    save_every: PositiveInt = 500  # steps
    keep_last: PositiveInt = 2  # checkpoints, besides the best
    log_every: PositiveInt = 10  # steps
    seed: int = 0
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda or cpu
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 where the chip has it
    compile: bool = False
    activation_checkpointing: bool = False
    deterministic: bool = False  # the same bits on every run on a GPU, which is slower; a CPU gives them anyway
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    wandb_url: str = ""  # of a W&B server of one's own


def load_config(cls, argv):
    """Fill the dataclass `cls` from `--config FILE` (YAML) and then from `--key value` flags; pydantic checks types.

    UserError for an unknown key (it names the nearest known one), a value of the wrong type, a bad file.
    """
    types = typing.get_type_hints(cls, include_extras=True)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    if "-h" in argv or "--help" in argv:
        sources = [inspect.getsource(c) for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]
        print("--config FILE, then any key below as a flag: --key value", *sources, sep="\n\n")
        sys.exit()
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -8e-1 for a flag
    for key in ("config", *types):
        parser.add_argument(*{f"--{key}", f"--{key.replace('_', '-')}"}, dest=key, nargs="?", const="true")
    flags, unknown = parser.parse_known_args(argv)
    path = vars(flags).pop("config", None)
    settings = [(key, value, path) for key, value in (read_yaml(path) if path else {}).items()
                if key != "data_recipe"]  # which data.py reads
    for key, text in vars(flags).items():
        with suppress(yaml.YAMLError):  # then the text itself is what has the wrong type
            text = text if types[key] is str else yaml.safe_load(text)
        settings.append((key, text, f"--{key}"))
    settings += [(text.lstrip("-").partition("=")[0], None, "the command line") for text in unknown]
    values = {}
    for key, value, source in settings:
        if key not in types:
            near = difflib.get_close_matches(str(key), types, 1, cutoff=0)[0]
            raise UserError(f"unknown key {key!r} in {source}; the nearest known key is {near!r}")
        if isinstance(value, bool) and typing.get_origin(types[key]) is typing.Literal:
            value = "on" if value else "off"  # YAML 1.1 takes these words for booleans
        try:
            values[key] = pydantic.TypeAdapter(types[key]).validate_python(value, strict=True)
        except pydantic.ValidationError as e:
            want = e.errors()[0]["msg"].removeprefix("Input should be ")
            raise UserError(f"{key} in {source} should be {want}, not {value!r} (default {defaults[key]!r})") from None
    return cls(**values)


def read_yaml(path):
    """The mapping in a YAML file. UserError where it is missing or something else."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"cannot read the config {path}: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold 'key: value' lines, but holds one {type(values).__name__}")
    return values


# ------------------------------------------------------------------------------------------------------------
# Process group, device, precision, signals

def begin(c):
    """What a run begins with, by its config: signals are caught, processes find each other, the seed is set.
    Returns (stop, an Event that SIGINT or SIGTERM sets; rank; number of processes; torch.device; torch.dtype)."""
    stop = catch_signals()
    rank, world, device = init_distributed(c.device)
    if c.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(c.seed)
    return stop, rank, world, device, pick_dtype(c.dtype, device)


def init_distributed(device):
    """Join torchrun's process group if there is one, GPUs over NCCL, CPU processes over Gloo. `device` is "auto",
    "cuda" (AMD's GPUs too), "mps" (Apple's, for one process) or "cpu". Returns (rank, number of processes,
    torch.device). UserError for a device that is not there."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local + 1} of this machine has no GPU of its own: torch sees "
                            f"{torch.cuda.device_count()}; ask for fewer with --gpus, or take --device cpu")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    elif device == "mps":
        if world > 1 or not torch.backends.mps.is_available():
            raise UserError(f"{'several processes cannot share it' if world > 1 else 'torch finds none here'}: mps is "
                            "Apple's GPU; take --device cpu")
    else:
        keep_freed_memory()
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world, torch.device(device)


def distribute(model, world, device):
    """The model as DDP trains it in several processes, or itself where there is one."""
    if world == 1:
        return model
    own = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=own, broadcast_buffers=False)


def unwrapped(model):
    """The model within DDP, or itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def memory_advice(c, what):
    """Turn a GPU's OutOfMemoryError over a micro-batch of `what` into a UserError: which flags make as large a step."""
    try:
        yield
    except torch.OutOfMemoryError:
        less = max((d for d in range(1, c.batch_size) if c.batch_size % d == 0), default=0)
        advice = f"--batch_size {less} --grad_accum_steps {c.grad_accum_steps * c.batch_size // max(less, 1)}"
        raise UserError(f"no GPU memory for micro-batches of {c.batch_size} {what}; for as many a step try "
                        f"{advice if less else '--activation_checkpointing'}") from None


def gpu_memory(device):
    """Peak GPU memory in GB, for the log; nothing on a CPU."""
    return {"gpu_gb": torch.cuda.max_memory_reserved() / 1e9} if device.type == "cuda" else {}


def keep_freed_memory():
    """Make glibc keep freed blocks of up to 32 MB, which the kernel would take back and clear again for the next
    tensor: a fifth less time for a training step on a CPU."""
    with suppress(OSError, AttributeError):  # another libc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def all_sum(values, device):
    """Sum a list of numbers over all processes. Returns a list of floats. A process alone waits for no GPU here."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=widest(device), device=device)
    dist.all_reduce(total)
    return total.tolist()


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def pick_dtype(name, device):
    """A torch.dtype by name; "auto" is bfloat16 where the chip multiplies it, else float16 on GPUs, float32 on CPUs; on
    Apple's GPUs, of which some take longer for it, float32."""
    if name == "auto" and device.type == "mps":
        name = "float32"
    elif name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        chip = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has no such function
        name = "bfloat16" if any(has for key, has in chip.items() if "bf16" in key) else "float32"
    return getattr(torch, name)


def widest(device):
    """float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def compiles(c, device):
    """Whether a trainer's blocks are to be compiled: where the config says so, and the device can. A CPU takes a C++
    compiler and Python's headers for it. Where it cannot be, a note says so, and training goes on without."""
    if not c.compile or device.type == "cuda":
        return c.compile
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    header, letters = Path(sysconfig.get_path("include"), "Python.h"), set(getattr(c, "layout", ""))
    why = ("that is not tried on Apple's GPUs" if device.type == "mps" else
           "on a CPU recurrent blocks would be compiled for each length anew" if letters & set("GDM") else
           f"on a CPU that needs the C++ compiler {compiler} (CXX names another)" if not shutil.which(compiler) else
           "" if header.exists() else f"on a CPU that needs {header} (on Debian and Ubuntu: apt install python3-dev)")
    if why:
        print(f"note: not compiled, which is slower: {why}")
    return not why


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def catch_signals():
    """Returns an Event that SIGINT or SIGTERM sets. A second SIGINT interrupts at once."""
    stop = threading.Event()

    def handler(number, frame):
        stop.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_IGN)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return stop


# ------------------------------------------------------------------------------------------------------------
# Run folder: RUN/{config.yaml, metrics.jsonl, code/, checkpoints/{step_00001000/, latest -> …, best -> …}}

def open_run(out_dir, config, script, resume, rank):
    """Make the run folder, with the effective config and the code as it is now, beside that which the run began with.

    Returns the checkpoint folder to go on from, None for a fresh run. UserError where there is one, and not `resume`.
    """
    out_dir, here = Path(out_dir), Path(__file__).parents[1]
    latest = out_dir / "checkpoints" / "latest"
    checkpoint = latest.resolve() if latest.exists() else None
    if checkpoint and not resume:
        raise UserError(f"{out_dir} already holds a run: --resume goes on with it, --out_dir names another folder")
    barrier()
    if rank == 0:
        code = out_dir / "code" / (f"from_{checkpoint.name}" if checkpoint else "")
        code.mkdir(parents=True, exist_ok=True)
        for source in (Path(script), here / "model.py"):
            if checkpoint and (code.parent / source.name).read_bytes() != source.read_bytes():
                print(f"note: {source.name} is not what this run was started with: that is in {code.parent}")
            shutil.copy(source, code)
        git = subprocess.run("git rev-parse HEAD; git diff HEAD", shell=True, cwd=here, capture_output=True, text=True)
        (code / "git.diff").write_text(git.stdout)
        if checkpoint:
            before = read_yaml(checkpoint / "config.yaml")
            for key in [key for key in config if key != "resume" and before.get(key) != config[key]]:
                print(f"note: {key} was {before.get(key)!r} and is now {config[key]!r}")
        (out_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return checkpoint


def save_checkpoint(out_dir, step, weights, state, config, best, keep_last):
    """Write checkpoints/step_N at once and whole, or not at all; then point `latest` (and `best`) at it.

    weights: {file stem: state dict}, written as safetensors. state: tensors, numbers and containers of them. All but
    the newest `keep_last` and the best are then deleted. UserError where the disk refuses; what was there stays.
    """
    folder = Path(out_dir) / "checkpoints"
    name, tmp = f"step_{step:08d}", folder / ".saving"
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        for stem, tensors in weights.items():
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, tmp / f"{stem}.safetensors")
        torch.save(state, tmp / "state.pt")
        (tmp / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        for path in tmp.iterdir():  # on the disk before the rename makes it visible
            with path.open("rb") as f:
                os.fsync(f)
        shutil.rmtree(folder / name, ignore_errors=True)
        tmp.rename(folder / name)
        for link in ["best"] * best + ["latest"]:  # killed in between, `latest` is still the step before
            (folder / ".link").unlink(missing_ok=True)
            (folder / ".link").symlink_to(name)
            (folder / ".link").replace(folder / link)
    except (OSError, RuntimeError, SafetensorError) as e:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(tmp, ignore_errors=True)
        last = (folder / "latest").resolve() if (folder / "latest").exists() else "none"
        raise UserError(f"could not save step {step}: {e}; the last good checkpoint is {last}") from None
    keep = sorted(folder.glob("step_*"))[-keep_last:] + [folder / name, (folder / "best").resolve()]
    for old in {path.resolve() for path in folder.glob("step_*")} - {path.resolve() for path in keep}:
        shutil.rmtree(old)


def find_checkpoint(path):
    """The checkpoint folder behind a run folder (its best, else its latest), a checkpoint folder or a file in one."""
    path = Path(path)
    for candidate in (path / "checkpoints" / "best", path / "checkpoints" / "latest", path, path.parent):
        if (candidate / "config.yaml").exists() and list(candidate.glob("*.safetensors")):
            return candidate.resolve()
    raise UserError(f"no checkpoint at {path}: give a run folder, a checkpoint folder or a .safetensors file in one")


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
    return config, *parts


def load_weights(model, weights, source):
    """Copy a state dict into a model; UserError names the first key that is missing, unknown or of another shape."""
    own = model.state_dict()
    for key in [*own, *weights]:
        if key not in weights or key not in own:
            raise UserError(f"{source} has {'an unknown' if key in weights else 'no'} tensor {key!r}: another model?")
        if (there := weights[key].shape) != (here := own[key].shape):
            raise UserError(f"{key} is {tuple(there)} in {source}, but {tuple(here)} in the model")
    model.load_state_dict(weights)


def load_run(checkpoint, c, models, optimizers, scaler, base=None):
    """Go on from a checkpoint of this run: load weights into {file stem: model}, and the optimizers' and the scaler's
    state. base: where an adapter is trained, the digest of the model that it is for, which has all other weights.

    Returns the trainer's own state. UserError for a checkpoint of another system, model or optimizer.
    """
    before, *found, state = load_checkpoint(checkpoint, c.system, *models, "state")
    for model, weights in zip(models.values(), found):
        if base is not None:
            if not torch.equal(weights.pop("base"), base):
                raise UserError(f"{checkpoint} is an adapter for another model than is now at {c.init_from}")
            weights = model.state_dict() | weights
        load_weights(model, weights, checkpoint)
    if before["optimizer"] != c.optimizer:
        raise UserError(f"{checkpoint} has the state of the optimizer {before['optimizer']}, not of {c.optimizer}; "
                        "--init_from starts a fresh one")
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    scaler.load_state_dict(state["scaler"])
    return state


def save_run(c, step, weights, optimizers, scaler, is_best, **state):
    """Save what `load_run` goes on from: {file stem: state dict}, and the trainer's own state. The first process writes
    it, and the others wait."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        state |= {"step": step, "optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict()}
        save_checkpoint(c.out_dir, step, weights, state, dataclasses.asdict(c), is_best, c.keep_last)
    barrier()


# ------------------------------------------------------------------------------------------------------------
# Log

def open_log(out_dir, step, config, wandb_mode, wandb_url):
    """Returns log(step, **numbers), which appends to metrics.jsonl and to W&B. Call it on rank 0 alone.

    Lines beyond `step`, of a run that was killed after its last checkpoint, are dropped.
    """
    path = Path(out_dir) / "metrics.jsonl"
    old = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    path.write_text("".join(line + "\n" for line in old if json.loads(line)["step"] <= step))
    run = None
    if wandb_mode != "disabled":
        import wandb
        server = {"base_url": wandb_url} if wandb_url else {}
        run = wandb.init(project="trivox", name=Path(out_dir).name, dir=out_dir, config=config, mode=wandb_mode,
                         settings=wandb.Settings(silent=True, **server))

    def log(step, **numbers):
        with path.open("a") as f:
            f.write(json.dumps({"step": step, **numbers}) + "\n")
        if run:
            run.log(numbers, step=step)

    return log
