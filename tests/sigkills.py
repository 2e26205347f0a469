"""A run that is killed at random moments, while it saves and evaluates too, and goes on ends with the bits of one that
nobody disturbed.

    python tests/sigkills.py                  100 kills over the three systems
    python tests/sigkills.py --count 30       so many

The tests named sigkills do the same, once for each system, and ten times in all with --all.
"""

import argparse
import json
import os
import random
import signal
import sys
from pathlib import Path

from conftest import finish, same

from trivox import run_folder

SAVE, EVALUATE, STEPS = 3, 7, 60  # a run of 60 steps saves after each third, evaluates after each seventh


def survives(start, folder, system, kills, seed=None):
    """Kill runs `kills` times, at most ten each. start(out_dir, *flags, steps=…, …): a process that trains. Returns
    what it was killed in: {"saving": times, "evaluating": …, "training": …}."""
    rng, settings = random.Random(seed), dict(steps=STEPS, save_every=SAVE, eval_every=EVALUATE)
    whole, moments = start(folder / "whole", **settings), dict.fromkeys(("saving", "evaluating", "training"), 0)
    for n in range(0, kills, 10):
        run = folder / f"killed_{n}"
        for step in sorted(some_step(rng) for _ in range(min(10, kills - n))):
            process, log = start(run, "--resume", **settings), run / "metrics.jsonl"
            while not (step == 0 or log.exists() and f'"step": {step},' in log.read_text()) and process.is_alive():
                process.join(0.005)
            process.join(rng.uniform(0, 0.2))
            os.kill(process.pid, signal.SIGKILL)
            code, said = finish(process)
            assert code == -signal.SIGKILL, said
            moments[moment(run)] += 1
        for process in (whole, start(run, "--resume", **settings)):
            code, said = finish(process)
            assert code == 0, said
        for name in ("latest", "best"):
            assert same(checkpoint(run, name, system), checkpoint(folder / "whole", name, system))
        assert curve(run) == curve(folder / "whole")
        assert [row["step"] for row in curve(run) if "loss" in row] == list(range(1, STEPS + 1))
    return moments


def some_step(rng):
    """Half of them are steps after which something is saved or evaluated."""
    return rng.choice((rng.randrange(STEPS - 10), rng.randrange(0, STEPS - 10, rng.choice((SAVE, EVALUATE)))))


def moment(run):
    """What a run was at as it died."""
    if (run / "checkpoints" / ".saving").exists():
        return "saving"
    rows = curve(run) if (run / "metrics.jsonl").exists() else []
    return "evaluating" if rows and "loss" in rows[-1] and rows[-1]["step"] % EVALUATE == 0 else "training"


def curve(run):
    """All that the log says, but how long it took, and a last line that was cut."""
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [{key: x for key, x in json.loads(line).items() if not key.endswith("_per_second")} for line in lines]


def checkpoint(run, name, system):
    """Everything in a checkpoint."""
    folder = run_folder.named(run / "checkpoints", name)
    return folder.name, *run_folder.load_checkpoint(folder, system, "model", "ema", "state")[1:]


def main(argv):
    import pytest

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="kills (100)")
    parser.add_argument("--seed", type=int, help="of their moments")
    args = parser.parse_args(argv)
    tests = [str(Path(__file__).parent / f"test_train_{system}.py") for system in ("flow", "codec", "llm")]
    seed = [f"--kill-seed={args.seed}"] * (args.seed is not None)
    return pytest.main(["-q", "-s", "-k", "sigkills", f"--kills={-(-args.count // 3)}", *seed, *tests])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
