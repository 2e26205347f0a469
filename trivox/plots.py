"""Pictures: spectrograms, curves, how evenly codes are used."""

import io
import math
import re
from pathlib import Path

import numpy as np

from trivox.files import write_whole
from trivox.recordings import write_wav

HERE = Path(__file__).parent


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
    axes[0, 0].set_title(drawable(title), wrap=True, parse_math=False)
    axes[-1, 0].set_xlabel("time, s")
    save(fig, path)


def drawable(text):
    """A text with those characters in Latin letters that the font of the plots cannot draw, such as Chinese ones."""
    from anyascii import anyascii
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if ord(c) in known else anyascii(c) for c in text)


def save(fig, path, **options):
    """Write a figure as a PNG, whole or not at all."""
    fig.savefig(content := io.BytesIO(), format="png", **options)
    write_whole(path, content.getvalue())


def save_clip(path, wav, log_mel, mel):
    """What a page shows of a clip: path.wav, and path.png, the log-mel (frames, n_mels) alone, a pixel a value."""
    from matplotlib.image import imsave

    write_wav(path.with_suffix(".wav"), wav, mel.sample_rate)
    imsave(content := io.BytesIO(), np.asarray(log_mel).T, origin="lower", vmin=np.log(1e-5), vmax=2, cmap="magma",
           format="png")
    write_whole(path.with_suffix(".png"), content.getvalue())


CURVES = {  # what an axis shows: the keys of metrics.jsonl, in training and in validation
    "loss": ("loss", "val_loss"),
    "perplexity of characters": ("text_perplexity", "val_text_perplexity"),
    "perplexity of codes": ("audio_perplexity", "val_audio_perplexity"),
    "learning rate": ("lr",),
    "word error rate, %": ("wer",),
}
OVER_T = re.compile(r"val_loss_t(\d\.\d+)")  # keys of the flow TTS's loss, by the time t of the flow


def over_t(rows):
    """The loss at times t, [(t, loss)], as the last of some rows of metrics.jsonl has it that does; what is not finite
    is left out."""
    found = [[(float(at[1]), x) for key, x in row.items() if (at := OVER_T.fullmatch(key)) and math.isfinite(x)]
             for row in rows]
    return next(filter(None, reversed(found)), [])


def plot_curves(path, runs, loss="loss"):
    """A PNG of the curves of {name: rows of metrics.jsonl}, a panel for each of CURVES that there is, and one for the
    last loss over the time of the flow; two dots a pixel of the page. Losses and perplexities over steps have
    logarithmic axes; `loss` tells the unit of the former."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    there = {key for rows in runs.values() for row in rows for key in row}
    panels = {label: keys for label, keys in CURVES.items() if there & set(keys)}
    if any(map(over_t, runs.values())):
        panels["validation loss over t"] = ()
    columns = len(panels) or 1 if len(panels) < 5 else 3
    lines = -(-len(panels) // columns) or 1
    fig, axes = subplots(lines, columns, 3.8 * columns, 3.1 * lines + 0.4)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    for axis, (label, keys) in zip(axes.flat, panels.items()):
        if not keys:
            for i, rows in enumerate(runs.values()):
                axis.plot(*np.reshape(over_t(rows), (-1, 2)).T, ".--", color=f"C{i if len(runs) > 1 else 1}")
            axis.set(xlabel="t, from speech (0) to noise (1)", ylabel=label, xlim=(0, 1), ylim=(0, None))
            continue
        for i, rows in enumerate(runs.values()):
            for key, style in zip(keys, ("-", ".--")):
                points = [(row["step"], row[key] * (100 if key == "wer" else 1)) for row in rows
                          if key in row and math.isfinite(row[key])]  # a run may diverge
                axis.plot(*np.reshape(points, (-1, 2)).T, ".-" if key == "wer" else style,
                          color=f"C{i if len(runs) > 1 else keys.index(key)}")
        axis.set(xlabel="step", ylabel=loss if label == "loss" else label, xlim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        if len(keys) == 2 and any((line.get_ydata() > 0).any() for line in axis.get_lines()):
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(6))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        else:
            axis.set_ylim(0, None)
    colours = ("0.5", "0.5") if len(runs) > 1 else ("C0", "C1")
    marks = {name: Line2D((), (), color=f"C{i}") for i, name in enumerate(runs) if len(runs) > 1}
    marks["training"] = Line2D((), (), color=colours[0])
    marks["validation, averaged weights"] = Line2D((), (), color=colours[1], ls="--", marker=".")
    legend = fig.legend(marks.values(), marks.keys(), loc="outside lower left", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)
    save(fig, path, dpi=180)


def plot_coverage(path, counts):
    """A PNG of how evenly the symbols of {label: how often each occurs} are used: which share of all occurrences the
    most frequent ones make up."""
    fig, axes = subplots(1, 1, 5.4, 3.4)
    for label, n in counts.items():
        share = np.cumsum(np.sort(n)[::-1]) / max(1, np.sum(n))
        axes[0, 0].plot(np.arange(1, len(n) + 1) / len(n) * 100, share * 100,
                        label=f"{label}, {np.sum(n):,} of {len(n):,}")
    axes[0, 0].plot((0, 100), (0, 100), ":", color="0.5", label="all alike")
    axes[0, 0].set(xlabel="most frequent symbols, % of the vocabulary", ylabel="occurrences covered, %", xlim=(0, 100),
                   ylim=(0, 101))
    axes[0, 0].legend(loc="lower right")
    save(fig, path, dpi=180)
