"""The delta rule's kernels as they are compiled for the two published models: what can be seen without a GPU.

    python benchmarks/kernels.py [90 …]    a table for each chip: 80, 86, 89, 90, 100, 120 (compute capability × 10)

Registers and bytes spilled are a thread's, shared memory a program's. Instructions: all, those of the main loop (the
longest), then kinds of them, in the loop or, without one, in all; "conv.": conversions, and a few permutations (PRMT).

Are loads of chunk n + 1 in flight while n is computed? Asynchronous copies (LDGSTS) are committed in groups, and a wait
leaves the newest unfinished: a loop with "left 7 of 7" commits 7 groups a turn and waits until 7 are left, those of one
whole turn; "0 of 7" would wait for all. A load to registers (LDG) holds up the first instruction that needs it: "ahead"
counts the instructions between the two, round the loop's end, for the load of the loop that has the fewest.

Bytes are those of a launch's tensors, each once and whole: inputs read, outputs written, a step's state both. So rows
of `factors` that a kernel leaves out are counted. What several programs of a head read (q, k, P, the inverse) counts
once: the cache should have it. The floor reads the inputs in both directions and dO, writes o and five gradients.
"""
import inspect
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter, namedtuple
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trivox import delta_rule, delta_rule_kernels as kernels, delta_rule_operators as operators

Shape = namedtuple("Shape", "B T H K V normalise dtype packed", defaults=(False, "bfloat16", False))
Launch = namedtuple("Launch", "name kernel grid signature constants attributes options bytes")
SHAPES = {"speech": Shape(24, 1024, 6, 48, 96, True), "music": Shape(4, 2048, 16, 64, 64)}
PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}  # A100, A40, L40S, H100, B200, RTX PRO 6000
KINDS = {"HMMA": "HMMA", "LDSM": "LDSM", "LDS/STS": "LDS STS", "LDG/STG": "LDG STG", "LDL/STL": "LDL STL",
         "LDGSTS": "LDGSTS", "BAR": "BAR", "conv.": "F2F F2FP F2I I2F HADD2 PRMT"}


@contextmanager
def recorded(kernels=kernels):
    """Meanwhile no kernel of a module is launched: how it would have been goes into the list that this yields."""
    calls, types = [], {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    types |= {torch.int32: "*i32", torch.int64: "*i64"}

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: self.launch(grid, *args, **kwargs)

        def launch(self, grid, *args, num_warps, num_stages=3, launch_pdl=False, **kwargs):
            arguments = inspect.signature(self.kernel.fn).bind(*args, **kwargs).arguments
            signature, constants, attributes, moved = {}, {}, {}, 0
            for n, (name, x) in enumerate(arguments.items()):
                if isinstance(x, torch.Tensor):
                    signature[name], moved = types[x.dtype], moved + x.nbytes * (2 if name == "state" else 1)
                elif x is None or "constexpr" in str(self.kernel.fn.__annotations__.get(name)):
                    signature[name], constants[name] = "constexpr", x
                else:
                    signature[name] = "i32" if isinstance(x, int) else "fp32"
                if signature[name][0] == "*" or signature[name] == "i32" and x % 16 == 0:
                    attributes[n,] = [["tt.divisibility", 16]]
            about = *(x for x in ("MAP", "SAVE") if constants.get(x)), *["CUT"] * (arguments.get("maps") is not None)
            name = " ".join([self.kernel.fn.__name__[:-len("_kernel")], *about])
            calls.append(Launch(name, self.kernel, grid, signature, constants, attributes,
                                dict(num_warps=num_warps, num_stages=num_stages), moved))

    with mock.patch.multiple(kernels, **{name: Recorder(x) for name, x in vars(kernels).items() if "_kernel" in name}):
        yield calls


def launches(shape, processors=0, segments=None, grad=True):
    """What the operators, which do run, launch for a Shape: forward and backward, or without `grad` forward and a step.
    processors: the GPU's multiprocessors; for 0, tiles are wide. segments: in place of what the operators choose."""
    B, T, H, K, V, normalise, dtype, packed = shape
    x = [torch.empty(B, T, H, n, dtype=getattr(torch, dtype), requires_grad=grad) for n in (K, K, V)]
    x += [torch.empty(B, T, H, requires_grad=grad) for _ in range(2)]
    more = dict(cu_seqlens=torch.tensor([0, 7, T]), initial_state=torch.empty(2, H, K, V)) if packed else {}
    with recorded() as calls, mock.patch.object(delta_rule, "PATH", "triton"), mock.patch.multiple(
            operators, _processors=lambda device: processors,
            _segments=operators._segments if segments is None else lambda *_: segments):
        o, _ = delta_rule.chunk_gated_delta_rule(*x, use_qk_l2norm_in_kernel=normalise, **more)
        if grad:
            o.sum().backward()
        else:
            delta_rule.recurrent_step(*(y[:, 0].contiguous() for y in x), torch.empty(B, H, K, V),
                                      use_qk_l2norm_in_kernel=normalise)
    return calls


def build(launch, target):
    """Compiled for a chip, 90 or "gfx942": registers, bytes spilled, bytes of shared memory, and the code as text."""
    triton, kind = kernels.triton, ("hip", target, 64) if isinstance(target, str) else ("cuda", target, 32)
    source = triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    built = triton.compile(source, target=triton.backends.compiler.GPUTarget(*kind), options=launch.options)
    if kind[0] == "hip":
        code, wanted = built.asm["amdgcn"], r"\.vgpr_count:\s+(\d+)|\.private_segment_fixed_size:\s+(\d+)"
        spilled, registers = (int(a or b) for a, b in re.findall(wanted, code))
        return registers, spilled, built.metadata.shared, code
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        code = subprocess.check_output([tool, "-sass", "-res-usage", file.name], text=True)
    return *map(int, re.search(r"REG:(\d+) STACK:(\d+)", code).groups()), built.metadata.shared, built.asm["ptx"] + code


def loads_ahead(loop):
    """The fewest instructions between an LDG and the first that reads what it loads, in the same turn or the next."""
    found = []
    for n, (name, text) in enumerate(loop):
        if name == "LDG":
            width, register = re.search(r"LDG\.E\D*(\d*)\S* R(\d+)", text).groups()
            wanted, later = {f"R{int(register) + i}" for i in range(int(width or 32) // 32)}, loop[n + 1:] + loop[:n]
            reads = (re.findall(r"\bR\d+", x if x[:2] == "ST" else x.partition(",")[2]) for _, x in later)
            found.append(next((i for i, read in enumerate(reads) if wanted & set(read)), len(loop)))
    return min(found, default="–")


def row(launch, target, steps):
    *numbers, code = build(launch, target)
    code = [(re.match(r"\w+", text)[0], text) for text in re.findall(r"/\*\w{4,5}\*/ +(?:@!?U?P\w+ +)?(\w[^;]*)", code)]
    jumps = [(n, int(text.split("0x")[1], 16) // 16) for n, (name, text) in enumerate(code) if name == "BRA"]
    end, start = max(jumps, key=lambda jump: jump[0] - jump[1])
    loop = code[start:end + 1] if end - start > 50 else []
    counts = Counter(name for name, _ in loop or code)
    left = [f"{int(text.split('0x')[1], 16)} of {counts['LDGDEPBAR']}" for name, text in loop if name == "DEPBAR"]
    return [launch.name, launch.options["num_warps"], *numbers, len(code), len(loop) or "–",
            *(sum(counts[name] for name in names.split()) for names in KINDS.values()), ", ".join(left) or "–",
            loads_ahead(loop), f"{launch.bytes / steps:,.0f}", f"{launch.bytes / 1e6:.0f}"]


def main(targets):
    for target, (name, (B, T, H, K, V, *_)) in itertools.product(map(int, targets), SHAPES.items()):
        training = launches(SHAPES[name], PROCESSORS[target])
        inference = launches(SHAPES[name], PROCESSORS[target], grad=False)[1:]  # without `prepare`, which is the same
        rows = ["kernel", "warps", "regs", "spilled", "shared", "all", "loop", *KINDS, "left", "ahead", "B/step", "MB"],
        rows += *(row(x, target, B * H * (1 if x.name == "step" else T)) for x in training + inference),
        widths = [max(len(str(x)) for x in column) for column in zip(*rows)]
        print(f"\n{name} on sm_{target}, {PROCESSORS[target]} multiprocessors; B/step is for a step and head")
        for first, *rest in rows:
            print(first.ljust(widths[0]), *(str(x).rjust(width) for x, width in zip(rest, widths[1:])), sep="  ")
        moved, floor = sum(launch.bytes for launch in training), B * T * H * (12 * K + 10 * V + 24)
        print(f"training: {moved / B / T / H:,.0f} B a step and head, {moved / 1e6:.0f} MB; floor {floor / 1e6:.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1:] or ["90"])
