"""Whether the three trainers do on a GPU what they do on a CPU: the first steps of each demo in each precision, their
losses beside those of the CPU in float32; and whether a run that was resumed ends with the bits of one that was not.

    python benchmarks/trainers.py [--steps 30] [flow] [codec] [llm]

Writes benchmarks/gpu/trainers_<gpu>.json, and ends with status 1 where losses are off by more than 2 % or NaN."""

import argparse
import json
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


def train(system, options, steps, out, resume=False):
    """The last line of the log, and the averaged weights, of so many steps of a demo."""
    if not resume:
        rmtree(out, ignore_errors=True)
    speaks = "speak" if system == "flow" else "sample"
    subprocess.run([sys.executable, SCRIPTS[system], "--config", f"configs/{system}_demo.yaml", *options.split(),
                    "--steps", str(steps), f"--{speaks}_every", "0", "--log_every", "10", "--eval_every", "1000",
                    "--out_dir", str(out), "--wandb_mode", "disabled", *["--resume"] * resume],
                   check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {key: value for line in lines for key, value in line.items()}


def same_when_resumed(system, steps):
    """Whether averaged weights after half of the steps, and a resumed run's other half, are those of one run."""
    from safetensors.torch import load_file

    ends = []
    for name, parts in ("whole", [steps]), ("resumed", [steps // 2, steps]):
        out = ROOT / "runs" / f"check_{system}_{name}"
        for n, last in enumerate(parts):
            train(system, "--deterministic true --lr 1e-3 --min_lr 1e-3 --warmup_steps 0", last, out, resume=n > 0)
        ends.append(load_file(max((out / "checkpoints").glob("step_*")) / "ema.safetensors"))
    return all(torch.equal(x, ends[1][key]) for key, x in ends[0].items())


def take(system, options, steps, runs):
    """Adds a run to those of a system, with how far off its losses are from those of the first, on a CPU."""
    found = train(system, options, steps, ROOT / "runs" / f"check_{system}")
    runs.append({"system": system, "options": options} | {key: found[key] for key in ("step", "loss", "val_loss")})
    runs[-1]["off"] = sum(abs(found[key] / runs[0][key] - 1) for key in ("loss", "val_loss"))
    print("{system} {options}: loss {loss:.4f}, validation {val_loss:.4f}, off by {off:.2%}".format(**runs[-1]),
          flush=True)


def take_rest(system, steps, runs):
    """On a GPU those in each precision; and whether a run can be resumed."""
    for options in OPTIONS if torch.cuda.is_available() else []:
        take(system, options, steps, runs)
    runs[0]["same_when_resumed"] = same = same_when_resumed(system, steps)
    print(f"{system}: resumed, the weights are {'the same to the bit' if same else 'NOT the same'}", flush=True)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("systems", nargs="*", default=list(SCRIPTS))
    args = parser.parse_args(argv)
    runs = {system: [] for system in args.systems}
    for system in runs:  # one after the other: they share a corpus, and a CPU's cores
        subprocess.run([sys.executable, "data.py", "for", f"configs/{system}_demo.yaml"], check=True, cwd=ROOT)
        take(system, "--device cpu --dtype float32", args.steps, runs[system])
    with ThreadPoolExecutor(3 if torch.cuda.is_available() else 1) as pool:
        list(pool.map(lambda system: take_rest(system, args.steps, runs[system]), runs))
    runs = sum(runs.values(), [])
    if torch.cuda.is_available():
        keep("trainers", {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "what": (
            "the demos' first steps: losses with each row's options"), "runs": runs,
            "command": f"python benchmarks/trainers.py --steps {args.steps}"})
    wrong = [f"{run['system']} {run['options']}" for run in runs if not run["off"] <= 0.02]
    wrong += [f"{run['system']} resumed" for run in runs if not run.get("same_when_resumed", True)]
    sys.exit(f"error: not as on a CPU: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
