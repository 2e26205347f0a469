"""Whether the three trainers do on a GPU what they do on a CPU: the first steps of each demo in each precision, their
losses beside those of the CPU in float32; and whether a run that was resumed ends with the bits of one that was not.

    python benchmarks/trainers.py [--steps 30] [flow] [codec] [llm]

Writes benchmarks/gpu/trainers_<gpu>.json, and ends with status 1 where both losses together are off by more
than 2 %, or NaN."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import keep  # noqa: E402 as it lies above this folder
SCRIPTS = {"flow": "train_flow_tts.py", "codec": "train_codec_lm.py", "llm": "train_llm_tts.py"}
OPTIONS = ("--dtype float32", "--dtype bfloat16", "--dtype bfloat16 --compile true", "--dtype float16",
           "--dtype bfloat16 --activation_checkpointing true")
ON_A_CPU = "--device cpu --dtype float32"
# A GPU draws other noise than a CPU. At the flow TTS's own learning rate three seeds of it alone put runs up to 8.7 %
# apart in 30 steps, both losses together, at 1e-3 3.6 %; at this one, where the loss falls by a third, 0.07 %.
STEADY = "--lr", "1e-4", "--min_lr", "1e-4", "--warmup_steps", "0"


def train(system, options, steps, out, resume=False):
    """What the log says last of so many steps of a demo, a dict; of a run that fails, which it tells, losses of NaN."""
    if not resume:
        rmtree(out, ignore_errors=True)
    speaks = "speak" if system == "flow" else "sample"
    done = subprocess.run(
        [sys.executable, SCRIPTS[system], "--config", f"configs/{system}_demo.yaml", *STEADY, *options.split(),
         "--steps", str(steps), f"--{speaks}_every", "0", "--log_every", "10", "--eval_every", "1000",
         "--out_dir", str(out), "--wandb_mode", "disabled", *["--resume"] * resume],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // at_once()))})
    if done.returncode:
        print(f"{system} {options}: status {done.returncode}", done.stderr[-2000:], sep="\n", flush=True)
        return {"step": 0, "loss": math.nan, "val_loss": math.nan}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {key: value for line in lines for key, value in line.items()}


def at_once():
    """How many runs share the machine."""
    return min(8, os.cpu_count() // 2) if torch.cuda.is_available() else 1


def same_when_resumed(system, steps):
    """Whether averaged weights after half of the steps, and a resumed run's other half, are those of one run."""
    from safetensors.torch import load_file

    ends = []
    for name, parts in ("whole", [steps]), ("resumed", [steps // 2, steps]):
        out = ROOT / "runs" / f"check_{system}_{name}"
        for n, last in enumerate(parts):
            found = train(system, "--deterministic true", last, out, resume=n > 0)
            if not found["step"]:
                return False
        ends.append(load_file(max((out / "checkpoints").glob("step_*")) / "ema.safetensors"))
    same = all(torch.equal(x, ends[1][key]) for key, x in ends[0].items())
    print(f"{system}: resumed, the weights are {'the same to the bit' if same else 'NOT the same'}", flush=True)
    return same


def take(system, options, steps):
    """The losses of a run, which are also printed as soon as they are there."""
    found = train(system, options, steps, ROOT / "runs" / "_".join(["check", system, *re.findall(r"\w+", options)]))
    print(f"{system} {options}: loss {found['loss']:.4f}, validation {found['val_loss']:.4f}", flush=True)
    return {"system": system, "options": options} | {key: found[key] for key in ("step", "loss", "val_loss")}


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("systems", nargs="*", default=list(SCRIPTS))
    args = parser.parse_args(argv)
    for system in args.systems:
        subprocess.run([sys.executable, "data.py", "for", f"configs/{system}_demo.yaml"], check=True, cwd=ROOT)
    jobs = [(system, options) for options in (ON_A_CPU, *OPTIONS * torch.cuda.is_available())
            for system in args.systems]
    with ThreadPoolExecutor(at_once()) as pool:
        resumed = {system: pool.submit(same_when_resumed, system, args.steps) for system in args.systems}
        runs = list(pool.map(lambda job: take(*job, args.steps), jobs))
    on_a_cpu = {run["system"]: run for run in runs[:len(args.systems)]}
    for run in runs:
        run["off"] = sum(abs(run[key] / on_a_cpu[run["system"]][key] - 1) for key in ("loss", "val_loss"))
        print("{system} {options}: off by {off:.2%}".format(**run))
    for system, run in on_a_cpu.items():
        run["same_when_resumed"] = resumed[system].result()
    if torch.cuda.is_available():
        keep("trainers", {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "what": (
            "the demos' first steps: losses with each row's options"), "runs": runs,
            "command": f"python benchmarks/trainers.py --steps {args.steps}"})
    wrong = [f"{run['system']} {run['options']}" for run in runs if not run["off"] <= 0.02]
    wrong += [f"{run['system']} resumed" for run in runs if not run.get("same_when_resumed", True)]
    sys.exit(f"error: not as on a CPU: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
