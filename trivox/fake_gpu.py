"""A GPU that is none: the same Python runs as on a GPU, on tensors that have a shape and a device but no numbers.

It tells what a CPU can tell of a GPU: that no operator is given tensors of two devices, where the host waits for the
GPU, the peak of its memory, how many operators a step takes, and how many bytes they read and write. Tensors of the CPU
are real meanwhile, so that all of a trainer runs: data, batches, losses, evaluation, samples, checkpoints. What is read
back from the GPU is made up: copies are zeros, single numbers are ANSWERS.

    from trivox import fake_gpu                    # before torch, in a process of its own
    with fake_gpu.FakeGPU() as gpu:
        train_flow_tts.main(argv)
    print(gpu.waits, gpu.peak)

A PyTorch without CUDA knows no streams and no guard of that device. A few lines of C++ stand in for them, compiled once
into the user's cache. They have to be loaded before torch is: so this file imports it after that.
"""
import ctypes
import hashlib
import linecache
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  c10::Stream getDefaultStream(c10::Device) const override { return getStream(getDevice()); }
  c10::Stream getNewStream(c10::Device, int) const override { return getStream(getDevice()); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(getDevice()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
using at::CUDAHooksRegistry; using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
"""


def load_guard():
    """Load GUARD into this process, where torch has no CUDA of its own. Returns why that cannot be, or nothing."""
    torch_folder = Path(find_spec("torch").origin).parent
    libraries = [torch_folder / "lib" / f"lib{name}.so" for name in ("torch_global_deps", "torch_cpu")]
    if (torch_folder / "lib" / "libtorch_cuda.so").exists():
        return ""
    if "torch" in sys.modules:
        return "torch was imported before trivox.fake_gpu"
    if not all(path.exists() for path in libraries):
        return "a fake GPU needs PyTorch for Linux"
    about = GUARD + (torch_folder / "version.py").read_text(encoding="utf-8") + str(torch_folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivox"
    library = cache / f"fake_gpu_{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        if compiler is None:
            return "a fake GPU needs a C++ compiler, such as g++"
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            source, made = Path(folder, "guard.cpp"), Path(folder, "guard.so")
            source.write_text(GUARD, encoding="utf-8")
            done = subprocess.run(
                [compiler, "-std=c++20", "-shared", "-fPIC", source, "-o", made, f"-I{torch_folder / 'include'}",
                 f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
            if done.returncode:
                return f"{compiler} cannot compile the stand-in of CUDA: {done.stderr.strip().splitlines()[0]}"
            made.replace(library)
    for path in (*libraries, library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return ""


LACKS = load_guard()  # what keeps a fake GPU from running here, in a sentence

import torch  # noqa: E402
import torch.nn.attention.flex_attention  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten  # noqa: E402

from trivox import convolution, cross_entropy, decoding, delta_rule_kernels, delta_rule_operators  # noqa: E402
from trivox import gpu as gpu_room  # noqa: E402
from trivox.common import UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = {"b": False, "i": 16, "f": 1.0}  # a condition, a number, a measure
aten, ours = torch.ops.aten, torch.ops.trivox

READS = {  # operators for whose result the host waits, as it decides what comes next or how large that is
    aten._local_scalar_dense.default: "a number is read", aten.equal.default: "two tensors are compared",
    aten.nonzero.default: "places are counted", aten.masked_select.default: "places are counted",
    aten.repeat_interleave.Tensor: "repeats are counted", aten._unique2.default: "values are counted",
    aten.bincount.default: "values are counted"}
COMPOSITE = cache(lambda f: torch._C._dispatch_has_kernel_for_dispatch_key(f.name(), "CompositeImplicitAutograd"))
INDEXED = aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default
HOST = {ours.delta_rule.default: delta_rule_operators._forward,  # what stands around the kernels is run as it is
        ours.delta_rule_backward.default: delta_rule_operators._backward,
        ours.delta_rule_step.default: delta_rule_operators._step,
        ours.convolution.default: convolution._forward, ours.convolution_backward.default: convolution._backward}


class FakeGPU(TorchDispatchMode):
    """Within it there is one CUDA device. One to a process: torch.cuda is replaced for good.

    waits: {(what for, the line of ours that asked, "file.py function: text of the line"): how often}.
    operators, moved: dispatched and in bytes, read and written, since the last `begin`; views count as operators alone.
    now, peak: bytes that tensors occupy, in blocks of 512, and the most since the last `begin`.

    Raises UserError where LACKS says so; RuntimeError for operators that are given tensors of two devices, and for a
    wait while a CUDA graph is captured.
    """

    def __init__(self):
        super().__init__()
        if LACKS:
            raise UserError(LACKS)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits, self.alive, self.graphs, self.capturing = Counter(), {}, {}, False
        self.now = 0
        self.begin()
        stand_in(self)

    def begin(self):
        """Count a step anew."""
        self.operators, self.moved, self.peak = 0, 0, self.now
        self.waits.clear()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else f(*args)
        inputs = [*tensors_of(args), *tensors_of(kwargs.values())] if kwargs else [*tensors_of(args)]
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        gpu = [x for x in inputs if isinstance(x, FakeTensor)]
        if not gpu and to != "cuda":
            return f(*args, **kwargs)
        if f in HOST:
            with self:
                return HOST[f](*args, **kwargs)
        if torch.is_inference_mode_enabled() and COMPOSITE(f):  # elsewhere that has been done before
            with self:
                return f.decompose(*args, **kwargs)
        if f in READS and gpu:
            self.wait(READS[f])
            if f is aten._local_scalar_dense.default:
                return answer(args[0])
            if f is aten.equal.default:
                return True
            raise RuntimeError(f"the shape of what {f} returns depends on numbers, which a fake GPU does not have")
        if f in INDEXED:
            places = [x for x in args[1] if x is not None]
            if any(x.dtype in (torch.bool, torch.uint8) for x in places):
                self.wait("places are counted")
                with self.fake:
                    args = [args[0], [*chain(*map(as_if_all, args[1]))], *args[2:]]
            elif not all(isinstance(x, FakeTensor) for x in (*places, *args[2:3])):
                self.wait("indices are copied to the GPU")
        if f is aten._to_copy.default and to is not None and (to == "cuda") != bool(gpu):
            self.copies(args[0], bool(gpu), kwargs.get("non_blocking"))
        if f is aten.copy_.default and len(gpu) == 1:
            self.copies(args[1], isinstance(args[1], FakeTensor), len(args) > 2 and args[2])
            if not isinstance(args[0], FakeTensor):
                return args[0].zero_()
        if len(gpu) < len(inputs):
            args, kwargs = tree_map_only(torch.Tensor, self.on_the_cpu, (args, kwargs))
        if f is aten._fused_sgd_.default:  # for which PyTorch has no fake implementation
            on_one_device("the fused SGD", inputs)
            return self.ran(gpu, [], f)
        with self.fake:
            results = f(*args, **kwargs)
        made = [*tensors_of([results])]
        if not all(x.is_cuda for x in made):
            return tree_map_only(FakeTensor, lambda x: x if x.is_cuda else torch.zeros(x.shape, dtype=x.dtype), results)
        self.ran(gpu, made, f)
        return results

    def on_the_cpu(self, x):
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

    def copies(self, x, back, non_blocking):
        """A copy of x between the devices: the host goes on only where it need not see the numbers, and they lie in
        pinned memory."""
        if back:
            self.wait("numbers are copied back")
        elif not (non_blocking and getattr(x, "pinned", False)):
            self.wait("numbers are copied to the GPU")

    def wait(self, what):
        """Keep what the host waits for, and which line of ours asks for it."""
        if self.capturing:
            raise RuntimeError(f"while a CUDA graph is captured, {what}")
        frame = sys._getframe(1)
        while frame and (not frame.f_code.co_filename.startswith(str(ROOT)) or frame.f_code.co_filename == __file__
                         or "site-packages" in frame.f_code.co_filename):
            frame = frame.f_back
        if frame is None:
            return self.waits.update([(what, "", "PyTorch")])
        path, line = Path(frame.f_code.co_filename).relative_to(ROOT), frame.f_lineno
        while frame.f_code.co_name.startswith("<") and frame.f_back:  # of a comprehension: the function around it
            frame = frame.f_back
        text = linecache.getline(str(ROOT / path), line).strip()
        self.waits[what, f"{path}:{line}", f"{path} {frame.f_code.co_name}: {text}"] += 1

    def ran(self, inputs, outputs, f=None):
        """Count an operator, and the memory that it has taken."""
        self.operators += 1
        before = {x.untyped_storage()._cdata for x in inputs}
        new = [x for x in outputs if x.untyped_storage()._cdata not in before]
        if f is None or f._schema.is_mutable or new and "empty" not in f._opname:
            self.moved += sum(x.numel() * x.itemsize for x in (*inputs, *outputs))
        for x in new:
            storage = x.untyped_storage()
            if (key := storage._cdata) not in self.alive:
                size = -(-storage.nbytes() // 512) * 512
                self.alive[key] = weakref.ref(storage, partial(self.freed, key, size))
                self.now += size
        self.peak = max(self.peak, self.now)

    def freed(self, key, size, _):
        del self.alive[key]
        self.now -= size


def as_if_all(x):
    """An index, or of a mask the indices of all places."""
    if x is None or x.dtype not in (torch.bool, torch.uint8):
        return [x]
    return [torch.zeros(x.numel(), dtype=torch.long, device=x.device)] * x.ndim


def answer(x):
    return ANSWERS["b" if x.dtype == torch.bool else "f" if x.dtype.is_floating_point else "i"]


def tensors_of(arguments):
    """The tensors among an operator's arguments, and in lists among them."""
    for x in arguments:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from (y for y in x if isinstance(y, torch.Tensor))


# ------------------------------------------------------------------------------------------------------------
# What takes the place of CUDA's Python side, of Triton and of attention's kernels

class Nothing(nullcontext):
    """A stream, an event, a graph: whatever is asked of it is done."""

    def __init__(self, *args, **options):
        super().__init__(self)

    def __getattr__(self, name):
        return lambda *args, **options: self


class Kernel:
    """Stands for a Triton kernel: it looks at where its tensors are."""

    def __init__(self, name, gpu):
        self.name, self.gpu = name, gpu

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        tensors = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
        on_one_device(self.name, tensors)
        self.gpu.ran(tensors, [])


def on_one_device(name, tensors):
    if found := {str(x.device) for x in tensors if not x.is_cuda}:
        raise RuntimeError(f"{name} is given a tensor of the device {found.pop()}")


def compile_block(gpu, block):
    """What torch.compile's partitioner chooses to keep for the backward pass is kept, and all else of the block is
    computed a second time, operator by operator. Blocks that print alike share graphs: empty gpu.graphs between models.
    """
    plain, kind = block.forward, repr(block)

    def forward(*args):
        leaves, tree = tree_flatten(args)
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        others = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        own = dict(block.named_parameters()) | dict(block.named_buffers())
        key = (kind, torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"), block.training,
               *((x.shape, x.dtype, x.requires_grad) for x in tensors))
        if key not in gpu.graphs:
            def run(own, tensors):
                given = iter(tensors)
                return torch.func.functional_call(block, own, tuple(tree_unflatten(
                    [next(given) if is_tensor else x for is_tensor, x in zip(place, others)], tree)))

            place = [isinstance(x, torch.Tensor) for x in leaves]
            gpu.graphs[key] = aot_function(run, fw_compiler=as_it_is, bw_compiler=as_it_is,
                                           partition_fn=min_cut_rematerialization_partition)
            block.forward = plain
            with _disable_current_modes(), gpu.fake, warnings.catch_warnings(action="ignore"):
                gpu.graphs[key](own, tensors)  # makes the graphs
            block.forward = forward
        return gpu.graphs[key](own, tensors)

    block.forward = forward


def as_it_is(graph, _):
    return make_boxed_func(graph)


class Attention(torch.autograd.Function):
    """What kernels that hold no scores allocate and keep: output, and a number for each query."""

    @staticmethod
    def forward(ctx, gpu, q, k, v, *others):
        o = q.new_empty(len(q), q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        of_queries = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, o, of_queries)
        ctx.gpu, ctx.others = gpu, len(others)
        gpu.ran([q, k, v, *others], [o, of_queries])
        return o

    @staticmethod
    def backward(ctx, do):
        saved, gpu = ctx.saved_tensors, ctx.gpu
        gradients = [torch.empty_like(x) for x in saved[:3]]
        gpu.ran([do, *saved], [*gradients, torch.empty_like(saved[-1])])
        return None, *gradients, *[None] * ctx.others


def stand_in(gpu):
    """Replace what would ask for a true GPU."""
    torch.__future__.set_swap_module_params_on_conversion(False)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made on the CPU and copied
    properties = SimpleNamespace(name="a fake GPU", major=9, minor=0, multi_processor_count=132,
                                 total_memory=80 * 10 ** 9)
    for name, value in dict(is_available=True, device_count=1, current_device=0, is_initialized=False,
                            get_device_capability=(9, 0), get_device_properties=properties, set_device=None,
                            _lazy_init=None, get_device_name=properties.name, is_bf16_supported=True,
                            graph_pool_handle=None, manual_seed=None, manual_seed_all=None, set_rng_state=None,
                            get_rng_state=torch.zeros(16, dtype=torch.uint8)).items():
        setattr(torch.cuda, name, lambda *args, value=value, **options: value)
    for name in "Stream", "Event", "CUDAGraph", "current_stream", "stream", "device", "device_of":
        setattr(torch.cuda, name, Nothing)
    torch.cuda.max_memory_reserved = torch.cuda.max_memory_allocated = lambda *args: gpu.peak
    torch.cuda.synchronize = lambda *args: gpu.wait("all is waited for")
    torch.cuda.is_current_stream_capturing = lambda: gpu.capturing

    @contextmanager
    def graph(*args, **options):
        gpu.capturing = True
        try:
            yield
        finally:
            gpu.capturing = False

    def pinned(x):
        x = x.detach()
        x.pinned = True
        return x

    def to_list(x):
        gpu.wait("numbers are read")
        return torch.full(x.shape, answer(x), dtype=x.dtype).tolist()

    torch.cuda.graph = graph
    torch.Tensor.pin_memory, torch.Tensor.record_stream, FakeTensor.tolist = pinned, lambda *args: None, to_list
    torch.compile = lambda f, **options: f
    torch.nn.Module.compile = lambda block, **options: compile_block(gpu, block)

    save, attention, flex = torch.save, F.scaled_dot_product_attention, torch.nn.attention.flex_attention

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls)

    def fused(q, k, v, attn_mask=None, **options):
        if not q.is_cuda:
            return attention(q, k, v, attn_mask=attn_mask, **options)
        others = [] if attn_mask is None else [attn_mask]
        on_one_device("attention", [q, k, v, *others])
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
        return Attention.apply(gpu, q, k, v, *others)

    def flexible(q, k, v, score_mod, block_mask, **options):
        place = torch.zeros(1, dtype=torch.int32, device=q.device)
        score_mod(q.new_zeros(1), place, place, place, place)
        others = [x for x in block_mask.as_tuple() if isinstance(x, torch.Tensor)]
        on_one_device("FlexAttention", [q, k, v, *others])
        return Attention.apply(gpu, q, k, v, *others)

    gpu_room.in_thread = lambda items, count: items  # a mode is a thread's own
    torch.Generator, F.scaled_dot_product_attention, flex.flex_attention = Generator, fused, flexible
    torch.save = lambda x, *args: save(tree_map_only(FakeTensor, torch.Tensor.cpu, x), *args)
    for module in convolution, cross_entropy, decoding, delta_rule_kernels:
        if module.triton is None:
            module.triton = SimpleNamespace(next_power_of_2=lambda n: 1 << (n - 1).bit_length())
        for name in {name for name in vars(module) if name.endswith("_kernel")} - {"takes_kernel"}:
            setattr(module, name, Kernel(name, gpu))
