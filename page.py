"""What a run looks and sounds like: RUN/index.html, which opens from the disk and takes no server and no network.

    python page.py runs/a                        write the page of a run anew; the trainers do so after each evaluation
    python page.py runs/a runs/b --out compare   several runs side by side, with blind comparisons, clips and all

Read from the run's folder: metrics.jsonl, config.yaml, page.json (what the trainer told), and samples/, where
step_00000260/003.wav is what was made of the fourth prompt at that step, 003.png its spectrogram, a line a clip of
clips.jsonl what is known about it, and reference/003.wav the recording.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np

from audio import write_wav
from common import UserError, read_yaml, run

HERE = Path(__file__).parent

# ------------------------------------------------------------------------------------------------------------
# Plots


def subplots(rows, columns, width, height):
    """A matplotlib figure of that size in inches and its axes, an array (rows, columns); it needs no screen."""
    from matplotlib import rc_file
    from matplotlib.figure import Figure

    rc_file(HERE / "page.mplstyle")
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def plot_spectrograms(path, title, mels, mel):
    """A PNG of log-mels, {label: (frames, n_mels)}, one above the other on the same axes; `mel` is their MelConfig."""
    fig, axes = subplots(len(mels), 1, 10, 2.4 * len(mels))
    for axis, (label, values) in zip(axes[:, 0], mels.items()):
        axis.imshow(np.asarray(values).T, origin="lower", aspect="auto", vmin=np.log(1e-5), vmax=2, cmap="magma",
                    extent=(0, len(values) / mel.frame_rate, 0, mel.n_mels))
        axis.set(xlim=(0, max(map(len, mels.values())) / mel.frame_rate), ylabel=f"{label}\nmel band")
        axis.grid(False)
    axes[0, 0].set_title(title, wrap=True, parse_math=False)
    axes[-1, 0].set_xlabel("time, s")
    fig.savefig(path)


def save_clip(path, wav, log_mel, mel):
    """What a page shows of a clip: path.wav, and path.png, the log-mel (frames, n_mels) alone, a pixel a value."""
    from matplotlib.image import imsave

    write_wav(path.with_suffix(".wav"), wav, mel.sample_rate)
    imsave(path.with_suffix(".png"), np.asarray(log_mel).T, origin="lower", vmin=np.log(1e-5), vmax=2, cmap="magma")


def plot_curves(path, runs):
    """A PNG of the curves of {name: rows of metrics.jsonl}: losses, learning rate, and the word error rate if there."""
    heard = any("wer" in row for rows in runs.values() for row in rows)
    fig, axes = subplots(1, 2 + heard, 4.6 * (2 + heard), 3.4)
    panels = [("loss", "loss", "-"), ("val_loss", "loss", ".--"), ("lr", "learning rate", "-")]
    panels += [("wer", "word error rate, %", ".-")] * heard
    for i, (name, rows) in enumerate(runs.items()):
        for key, label, style in panels:
            points = [(row["step"], row[key] * (100 if key == "wer" else 1)) for row in rows if key in row]
            axis = axes[0, {"loss": 0, "val_loss": 0, "lr": 1, "wer": 2}[key]]
            what = {"loss": "training", "val_loss": "validation, averaged weights"}.get(key, "")
            if points:
                axis.plot(*zip(*points), style, color=f"C{i if len(runs) > 1 else int(key == 'val_loss')}",
                          label=" ".join(filter(None, (name if len(runs) > 1 else "", what))))
            axis.set(xlabel="step", ylabel=label, xlim=(0, None))
    axes[0, 0].set_yscale("log")
    for text in axes[0, 0].legend().get_texts():
        text.set_parse_math(False)
    if heard:
        axes[0, 2].set_ylim(0, None)
    fig.savefig(path, transparent=True)


# ------------------------------------------------------------------------------------------------------------
# Pages

def read_rows(path):
    """The objects of a .jsonl file, without a last line that a kill has cut; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def read_run(folder):
    """All that a page shows of a run. Raises UserError where the folder holds none."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} is not the folder of a run: it has no metrics.jsonl")
    metrics = read_rows(folder / "metrics.jsonl")
    facts = json.loads((folder / "page.json").read_text()) if (folder / "page.json").exists() else {}
    defaults = facts.pop("defaults", {})
    speeds = {key: statistics.median(row[key] for row in metrics if key in row)
              for key in dict.fromkeys(key for row in metrics for key in row if key.endswith("_per_second"))}
    facts |= {key.replace("_", " "): f"{value:.3g}" for key, value in speeds.items()}
    last = {key: row[key] for row in metrics for key in ("step", "loss", "val_loss", "wer") if key in row}
    config = [(key, value, key in defaults and defaults[key] != value)
              for key, value in read_yaml(folder / "config.yaml").items()]
    steps = {path.name: {n: row for n, row in enumerate(read_rows(path / "clips.jsonl"))}
             for path in sorted((folder / "samples").glob("step_*"))}
    return {"folder": folder, "name": folder.resolve().name, "facts": facts, "last": last, "config": config,
            "steps": steps, "metrics": metrics}


def table(runs, prefixes):
    """The rows of the listening table: a prompt, its reference, and a cell for each step of each run, or None.

    prefixes: where a run's samples/ are, seen from the page.
    """
    prompts = dict.fromkeys(row["text"] for r in runs for clips in r["steps"].values() for row in clips.values())
    rows = []
    for text in prompts:
        cells, reference = [], None
        for r, prefix in zip(runs, prefixes):
            for step, clips in r["steps"].items():
                n = next((n for n, row in clips.items() if row["text"] == text), None)
                cells.append(n if n is None else {"run": r["name"], "step": int(step[5:]), **clips[n],
                                                  "file": f"{prefix}samples/{step}/{n:03d}"})
                if n is not None and (r["folder"] / "samples" / "reference" / f"{n:03d}.wav").exists():
                    reference = reference or f"{prefix}samples/reference/{n:03d}"
        rows.append({"text": text, "reference": reference, "cells": cells})
    return rows


def render(path, runs, prefixes):
    """Write a page and its curves.png beside it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    plot_curves(path.parent / "curves.png", {r["name"]: r["metrics"] for r in runs})
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    rows = table(runs, prefixes)
    blind = []  # each prompt's last clip of each run
    for row in rows:
        last = {cell["run"]: f"{cell['file']}.wav" for cell in row["cells"] if cell}
        if len(last) > 1:
            blind.append({"text": row["text"], "clips": [last.get(r["name"]) for r in runs]})
    html = environment.get_template("page.html").render(runs=runs, rows=rows, blind=blind)
    path.with_suffix(".part").write_text(html, encoding="utf-8")
    path.with_suffix(".part").replace(path)


def write_page(out_dir, **facts):
    """RUN/index.html and RUN/curves.png of the run as it stands. `facts`, text by name, are kept in page.json beside
    what is known of the machine; `defaults` is the config's, a dict."""
    import torch

    out_dir = Path(out_dir)
    if facts:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
        diff = out_dir / "code" / "git.diff"
        commit = diff.read_text(encoding="utf-8").partition("\n")[0] if diff.exists() else ""
        facts |= {"device": device, "torch": torch.__version__, "Python": platform.python_version(), "commit": commit}
        (out_dir / "page.json").write_text(json.dumps(facts))
    render(out_dir / "index.html", [read_run(out_dir)], [""])


def compare(folders, out):
    """A folder with a page of several runs, which holds copies of their clips and can be moved or sent."""
    runs = [read_run(folder) for folder in folders]
    prefixes = [f"run{i}/" for i in range(len(runs))]
    for r, prefix in zip(runs, prefixes):
        shutil.rmtree(out / prefix, ignore_errors=True)
        (out / prefix).mkdir(parents=True)
        if r["steps"]:
            shutil.copytree(r["folder"] / "samples", out / prefix / "samples")
    names = [r["name"] for r in runs]
    for r, folder in zip(runs, folders):  # runs/a/flow and runs/b/flow
        r["name"] = r["name"] if names.count(r["name"]) == 1 else str(folder)
    render(out / "index.html", runs, prefixes)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, help="folder for the page of several runs")
    args = parser.parse_args(argv)
    if len(args.runs) == 1 and not args.out:
        write_page(args.runs[0])
        print(args.runs[0] / "index.html")
    elif not args.out:
        raise UserError("several runs need a folder for their page: --out DIR")
    else:
        compare(args.runs, args.out)
        print(args.out / "index.html")


if __name__ == "__main__":
    run(main, sys.argv[1:])
