"""What a run looks like: plots of its curves and of what it says."""

import json
from pathlib import Path

import numpy as np



def subplots(rows, columns, width, height):
    """A matplotlib figure of that size in inches and its axes, an array (rows, columns); it needs no screen."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def plot_spectrograms(path, title, mels, mel):
    """A PNG of log-mels, {label: (frames, n_mels)}, one above the other on the same axes; `mel` is their MelConfig."""
    fig, axes = subplots(len(mels), 1, 10, 2.4 * len(mels))
    for axis, (label, values) in zip(axes[:, 0], mels.items()):
        axis.imshow(np.asarray(values).T, origin="lower", aspect="auto", vmin=np.log(1e-5), vmax=2, cmap="magma",
                    extent=(0, len(values) / mel.frame_rate, 0, mel.n_mels))
        axis.set(xlim=(0, max(map(len, mels.values())) / mel.frame_rate), ylabel=f"{label}\nmel band")
    axes[0, 0].set_title(title, fontsize=10, wrap=True)
    axes[-1, 0].set_xlabel("seconds")
    fig.savefig(path, dpi=80)


def plot_curves(out_dir):
    """RUN/curves.png: losses over steps, and the word error rate where it was measured."""
    rows = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").open()]
    curves = {key: [(row["step"], row[key]) for row in rows if key in row] for key in ("loss", "val_loss", "wer")}
    fig, axes = subplots(1, 2 if curves["wer"] else 1, 10, 4)
    for key, label in (("loss", "training, moving weights"), ("val_loss", "validation, averaged weights")):
        axes[0, 0].plot(*zip(*curves[key]), label=label, marker="." if key == "val_loss" else None)
    axes[0, 0].set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    axes[0, 0].legend()
    if curves["wer"]:
        axes[0, 1].plot(*zip(*[(step, 100 * wer) for step, wer in curves["wer"]]), marker=".")
        axes[0, 1].set(xlabel="step", ylabel="word error rate, %", ylim=(0, None))
    fig.savefig(Path(out_dir) / "curves.png", dpi=100)
