"""What it costs the flow TTS's demo, on a CPU, that no step and no save can spoil a run: the look for NaN in each step,
and how long a save holds training up beside writing it in the foreground.

    python benchmarks/saving.py
"""

import statistics
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import FlowTTS  # noqa: E402 as they lie above this folder
from trivox import finite, run_folder  # noqa: E402
from trivox.muon import Muon  # noqa: E402
from trivox.recipes import load_settings  # noqa: E402


def ms(f, times=30):
    """Median milliseconds of a call."""
    marks = [time.perf_counter()]
    for _ in range(times):
        f()
        marks.append(time.perf_counter())
    return 1e3 * statistics.median(b - a for a, b in zip(marks, marks[1:]))


def main():
    c = load_settings(ROOT / "configs" / "flow_demo.yaml")
    model = FlowTTS(c)
    ema, scaler = deepcopy(model), torch.amp.GradScaler("cpu", enabled=False)
    matrices = [m.weight for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [Muon(matrices, 1e-4), torch.optim.AdamW(others, lr=1e-4, fused=True)]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
    watch = finite.Watch(torch.device("cpu"), optimizers, scaler)
    seen = ms(lambda: watch.see(1, [], torch.ones(2), torch.ones(())))
    print(f"the look for NaN: {seen:.3f} ms a step")
    weights = {"model": model.state_dict(), "ema": ema.state_dict()}
    state = {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    for turn in range(5):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            run_folder.save_run(replace(c, out_dir=folder), 1, weights, optimizers, scaler, True)
            held = time.perf_counter() - start
            run_folder.wait_for_save()
            start = time.perf_counter()
            run_folder.save_checkpoint(folder, 2, weights, state, asdict(c), True, 2)
            whole = time.perf_counter() - start
        print(f"save {turn + 1}: training waits {1e3 * held:.0f} ms, in the foreground {1e3 * whole:.0f}: "
              f"{held / whole:.2f}")


if __name__ == "__main__":
    main()
