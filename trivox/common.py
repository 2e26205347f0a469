"""The plumbing that the three trainers share: config, process group, device, precision, signals."""

import argparse
import ctypes
import dataclasses
import difflib
import errno
import hashlib
import inspect
import os
import re
import reprlib
import shutil
import signal
import sys
import sysconfig
import threading
import typing
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import torch
import torch.distributed as dist
import yaml
from pydantic import Field, PositiveInt
from pydantic_core import PydanticCustomError
from torch.nn.parallel import DistributedDataParallel

from trivox.errors import UserError

TO_MEND = 2  # what a process of several ends with after a UserError: torchrun must not start it again
_caught = []  # the signals that asked this process to stop


def run(main, argv):
    """Call `main(argv)`, and end the process by what came of it: with 128 + N where signal N stopped it, with one line
    on stderr and exit status 1 after a UserError, and where the disk is full or the memory ran out."""
    status = TO_MEND
    sys.stdout, sys.stderr = (stream and Listened(stream) for stream in (sys.stdout, sys.stderr))
    try:
        result = main(argv)
        if dist.is_initialized():
            dist.destroy_process_group()
        if _caught:
            sys.exit(128 + _caught[0])
        return result
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except UserError as e:
        problem = e.args[0]
    except Exception as e:
        if disk_is_full(e):
            problem = f"the disk is full: {e}"
        elif (size := memory_lacks(e)) is not None:
            problem, status = f"the memory ran out{size}: a smaller model or batch needs less", 1  # may be tried again
        elif _marks() and (isinstance(e, dist.DistError)
                           or type(e) is RuntimeError and "gloo" in str(e) and "by peer" in str(e)):
            if _marks().exists():
                os._exit(1)  # another process has said why it left, and this one only misses it
            problem, status = f"a process does not reach the others: {' '.join(str(e).split())}", 1
        elif not isinstance(e, OSError) or e.filename is None:
            raise
        else:  # a place that the user named, and that is not what it should be
            problem = f"cannot use {e.filename}: {e.strerror}"
    if len(problem) > 1500:  # of what was found, damage can be of any length
        problem = f"{problem[:900]} … {problem[-500:]}"
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        sys.exit(f"error: {problem}")  # here main's frame is gone, and its progress bar has ended its line
    if _says_first(problem):
        print(f"error: {problem}", file=sys.stderr)
    if not dist.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at once: as Python leaves, Gloo's threads can end it by SIGABRT, and all would start again


class Listened:
    """A stream that goes on where nobody reads it any more, as after `| head`: work is not to be lost by that. It
    writes what its encoding lacks in its own way."""

    def __init__(self, stream):
        self.stream = getattr(stream, "stream", stream)
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            return self.deafen()

    def flush(self):
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.deafen()

    def deafen(self):
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return 0

    def __getattr__(self, name):
        return getattr(self.stream, name)


def disk_is_full(error):
    """Whether an exception tells of that. Libraries have their own, which quote the system's."""
    reasons = (errno.ENOSPC, errno.EDQUOT)
    words = [*map(os.strerror, reasons), "problem writing element"]  # the last are numpy's
    return getattr(error, "errno", None) in reasons or any(word in str(error) for word in words)


def memory_lacks(error):
    """", as N bytes were asked for" where an exception tells that memory ran out, "" where it does not say how many;
    None for any other."""
    words = ("can't allocate memory", "Storage size calculation overflowed", "Overflow when unpacking long",
             "array is too big", "Maximum allowed dimension exceeded")  # the last two are numpy's
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and all(word not in str(error) for word in words):
        return None
    size = re.search(r"allocate (\d+(?:\.\d+)?)\.? (\w+)", str(error))
    if size and size[2] == "bytes":
        return f", as {int(size[1]) / 2**30:,.1f} GiB more were asked for"
    return f", as {size[1]} {size[2]} more were asked for" if size else ""


def _marks():
    """The folder in which the processes that torchrun started together on this machine mark what they have said; None
    for a process alone."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file).parents[1] / "said" if file else None


def _says_first(problem):
    """Whether no other of these processes has said the same."""
    try:
        _marks().mkdir(exist_ok=True)
        (_marks() / hashlib.sha256(problem.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # of a full disk, say
        pass
    return True


# ------------------------------------------------------------------------------------------------------------
# Config: one dataclass a trainer, filled from YAML and then from flags

yaml.SafeLoader.add_implicit_resolver(  # PyYAML follows YAML 1.1, in which 1e-3 is a string
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def iso_639(code):
    if not re.fullmatch("[a-z]{2,3}", code):
        raise PydanticCustomError("language", "Language should be a code of ISO 639, such as en or de")
    return code


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Limit = Annotated[float, Field(gt=0)]  # infinity is none
Share = Annotated[float, Field(ge=0, le=1)]  # from nothing to all
Language = Annotated[str, pydantic.AfterValidator(iso_639)]
Fraction = Annotated[float, Field(ge=0, lt=1)]  # not all
Top = Annotated[float, Field(gt=0, le=1)]  # not nothing
Folder = Annotated[str, Field(min_length=1)]
Layers = Annotated[int, Field(ge=1, le=1000)]  # more are a slip of the hand, and would be built for ever
AnyLayers = Annotated[int, Field(ge=0, le=1000)]


def is_text(kind):
    return kind is str or typing.get_args(kind)[:1] == (str,) and typing.get_origin(kind) is Annotated


@dataclasses.dataclass
class RunConfig:
    """The settings that all trainers have: saving, logging, device, precision."""
    resume: bool = False  # go on with the run in out_dir, if there is one
    save_every: PositiveInt = 500  # steps
    keep_last: PositiveInt = 2  # checkpoints, besides the best
    log_every: PositiveInt = 10  # steps
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    language: Language = "en"  # of the texts: of their numbers, the ends of sentences, and the judge
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda or cpu
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: bfloat16 where the chip has it
    compile: bool = False
    activation_checkpointing: bool = False
    deterministic: bool = False  # the same bits on every run on a GPU, which is slower; a CPU gives them anyway
    copy_to: str = ""  # a folder, s3://…, gs://… or the like, to which each checkpoint is copied while training goes on
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
        parser.add_argument(*{f"--{key}", f"--{key.replace('_', '-')}"}, dest=key, nargs="?",
                            const="true" if types.get(key) is bool else None)
    flags, unknown = parser.parse_known_args(argv)
    path = vars(flags).pop("config", "")
    if path is None:
        raise UserError("--config should name a file")
    settings = [(key, value, path) for key, value in (read_yaml(path) if path else {}).items()
                if key != "data_recipe"]  # which data.py reads
    for key, text in vars(flags).items():
        with suppress(Exception):  # then the text itself is what has the wrong type
            text = text if text is None or is_text(types[key]) else yaml.safe_load(text)
        settings.append((key, text, f"--{key}"))
    settings += [(text.lstrip("-").partition("=")[0], None, "the command line") for text in unknown]
    values = {}
    for key, value, source in settings:
        if key not in types:
            near = difflib.get_close_matches(str(key)[:99], types, 1, cutoff=0)[0]
            raise UserError(f"unknown key {reprlib.repr(key)} in {source}; the nearest known key is {near!r}")
        values[key] = checked(types[key], value, f"{key} in {source}", f" (default {defaults[key]!r})")
    return cls(**values)


def checked(kind, value, what, more=""):
    """A value as a pydantic type has it, or a UserError that says what `what` should be."""
    if isinstance(value, bool) and typing.get_origin(kind) is typing.Literal:
        value = "on" if value else "off"  # YAML 1.1 takes these words for booleans
    try:
        value = pydantic.TypeAdapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError as e:
        raise UserError(f"{what} should {wanted(e)}, not {reprlib.repr(value)}{more}") from None
    if isinstance(value, str) and "\0" in value:  # no path can have it
        raise UserError(f"{what} has a zero byte: {value!r}")
    return value


def flag(kind):
    """A pydantic type, such as Positive, as the `type` of an argparse argument."""
    def parse(text):
        try:
            return pydantic.TypeAdapter(kind).validate_python(text)
        except pydantic.ValidationError as e:
            raise argparse.ArgumentTypeError(f"{text!r} should {wanted(e)}") from None

    return parse


def wanted(error):
    """What pydantic says that a value should have been."""
    return re.sub(r"^\w+ should ", "", error.errors()[0]["msg"])


def some_path(text):
    """A path as the `type` of an argparse argument. An empty one, of a shell's unset variable, would be here."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def read_yaml(path):
    """The mapping in a YAML file. UserError where it is missing or something else."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except Exception as e:  # dates, numbers, tags, depth: each kind of nonsense has its own
        raise UserError(f"cannot read the config {path}: {' '.join(str(e).split()) or type(e).__name__}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold 'key: value' lines, but holds one {type(values).__name__}")
    if strange := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"{path} has {reprlib.repr(strange[0])} where a key should be")
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
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: where torchrun is killed, save and end
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if device == "cpu":
            dist.barrier()  # where one left now, others would still look for it
    return rank, world, torch.device(device)


def distribute(model, world, device):
    """The model as DDP trains it in several processes, or itself where there is one."""
    if world == 1:
        return model
    own = [device.index] if device.type == "cuda" else None
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # from PyTorch 2.13 on
    return DistributedDataParallel(model, device_ids=own,  # buffers never change
                                   **{"forward_sync_buffers" if new else "broadcast_buffers": False})


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
    """Returns an Event that SIGINT or SIGTERM sets; `run` then ends with its status. A second SIGINT interrupts at
    once."""
    stop = threading.Event()

    def handler(number, frame):
        stop.set()
        _caught.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_IGN)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return stop
