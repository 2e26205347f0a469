"""What a run looks and sounds like: RUN/index.html, which opens from the disk and takes no server and no network.

Read from the run's folder: metrics.jsonl, config.yaml, page.json (what the trainer told), plots that are not our own
(*.png), and samples/, where step_00000260/003.wav is what was made of the fourth prompt at that step, 003.png its
spectrogram, a line a clip of clips.jsonl what is known about it, and reference/003.wav the recording.
"""

import json
import math
import platform
import re
import shutil
import statistics
import time
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

from trivox.common import UserError, checked, read_yaml
from trivox.files import read_json, read_rows, whole_folder, write_whole
from trivox.plots import HERE, plot_curves


def logged(path):
    """The objects of a .jsonl file that a run writes, none where there is no file. See `read_rows`."""
    return [row for _, row in read_rows(path, grows=True)] if path.exists() else []


def seconds(wav):
    """How long a recording is; None where there is none, or but the beginning of one."""
    import soundfile

    try:
        return soundfile.info(wav).duration or None
    except soundfile.LibsndfileError:
        return None


def read_clips(folder):
    """{(prompt, 0, or 1 where it is there again, …): what a page shows of its clip} of a folder of samples."""
    clips = {}
    for n, row in enumerate(logged(folder / "clips.jsonl")):
        for key, kind in {"text": str, "read": str, "wer": float, "mel_distance": float}.items():
            if key in row or key == "text":
                checked(kind, row.get(key), f"{key} in line {n + 1} of {folder / 'clips.jsonl'}")
        if length := seconds(folder / f"{n:03d}.wav"):
            again = sum(text == row["text"] for text, _ in clips)
            clips[row["text"], again] = row | {"n": n, "seconds": length}
    return clips


def percent(share):
    return f"{100 * share:.1f} %"


MEASURES = {  # the last value of a key of metrics.jsonl: what it is, how it is written
    "loss": ("training loss", "{:.4g}".format),
    "val_loss": ("validation loss", "{:.4g}".format),
    "val_text_perplexity": ("perplexity of characters, validation", "{:.4g}".format),
    "val_audio_perplexity": ("perplexity of codes, validation", "{:.4g}".format),
    "val_accuracy": ("accuracy, validation", percent),
    "wer": ("word error rate", percent),
    "speaker_accuracy": ("speaker accuracy", percent),
    "gpu_gb": ("GPU memory", "{:.1f} GB".format),
}
LOSSES = {"flow": "loss, mean squared error", "codec": "loss, nats a code", "llm": "loss, nats a token"}


def shown(key):
    """Whether a page shows this key of metrics.jsonl as a number."""
    return key in MEASURES or key.endswith("_per_second")


def read_run(folder):
    """All that a page shows of a run. Raises UserError where the folder holds none."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} is not the folder of a run: it has no metrics.jsonl")
    metrics, config = logged(folder / "metrics.jsonl"), read_yaml(folder / "config.yaml")
    for row in metrics:
        for key in ("step", *filter(shown, row)):
            checked(float, row.get(key), f"{key} in {folder / 'metrics.jsonl'}")
    path = folder / "page.json"
    told = checked(dict, read_json(path), f"what {path} holds") if path.exists() else {}
    defaults = checked(dict, told.pop("defaults", {}), f"defaults in {path}")
    last = {key: value for row in metrics for key, value in row.items()}

    updated = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / "metrics.jsonl").stat().st_mtime))
    steps = checked(int, config.get("steps", 0), f"steps in {folder / 'config.yaml'}")
    facts = {"steps": f"{last.get('step', 0):,} of {steps:,}", "updated": updated}
    facts |= {what: write(last[key]) for key, (what, write) in MEASURES.items() if key in last}
    if losses := [(row["val_loss"], row["step"]) for row in metrics if math.isfinite(row.get("val_loss", math.nan))]:
        facts["validation loss"] += "; best {:.4g}, at step {:,}".format(*min(losses))
    if left_out := [row for row in metrics if "left_out_step" in row]:
        facts["steps left out, not finite"] = f"{len(left_out):,}, the last {left_out[-1]['left_out_step']:,}"
    for key in [key for key in last if key.endswith("_per_second")]:
        speed = statistics.median(row[key] for row in metrics if key in row)
        facts[key.replace("_", " ")] = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
    facts |= {key: value for key, value in told.items() if value}

    def say(value):
        return value if isinstance(value, str) else json.dumps(value)

    return {"folder": folder, "name": folder.resolve().name, "metrics": metrics, "facts": facts,
            "config": {key: (say(value), say(defaults[key]) if key in defaults and defaults[key] != value else None)
                       for key, value in config.items()},
            "steps": {path.name: read_clips(path) for path in sorted((folder / "samples").glob("step_*"))
                      if path.is_dir() and path.name[5:].isdecimal()},
            "plots": sorted(path.name for path in folder.glob("*.png") if path.name != "curves.png")}


def table(runs, prefixes):
    """The listening table, (columns, rows). A column is a step of a run, equal steps together. A row has a prompt,
    what models read where that is something else, {it: names of runs}, its reference, the seconds of its longest clip,
    and a cell a column; None stands for what there is not.

    prefixes: where a run's samples/ are, seen from the page.
    """
    columns = []
    for i, r in enumerate(runs):
        wers = {row["step"]: row["wer"] for row in r["metrics"] if "wer" in row}
        for folder, clips in r["steps"].items():
            distances = [clip["mel_distance"] for clip in clips.values() if "mel_distance" in clip]
            columns.append({"run": i, "folder": folder, "step": int(folder[5:]), "wer": wers.get(int(folder[5:])),
                            "mel_distance": statistics.mean(distances) if distances else None})
    columns.sort(key=lambda column: column["step"])
    rows = []
    for key in dict.fromkeys(key for r in runs for clips in r["steps"].values() for key in clips):
        reference, cells, reads = None, [], {}
        for column in columns:
            r, prefix = runs[column["run"]], prefixes[column["run"]]
            clip = r["steps"][column["folder"]].get(key)
            cells.append(clip and clip | {"file": f"{prefix}samples/{column['folder']}/{clip['n']:03d}"})
            if clip and "read" in clip:
                reads.setdefault(clip["read"], {})[r["name"]] = True
            name = clip and f"samples/reference/{clip['n']:03d}"
            if clip and not reference and (length := seconds(r["folder"] / f"{name}.wav")):
                reference = {"file": prefix + name, "seconds": length}
        rows.append({"text": key[0], "reads": reads, "reference": reference, "cells": cells,
                     "longest": max(clip["seconds"] for clip in [reference, *cells] if clip)})
    return columns, rows


def render(path, runs, prefixes):
    """Write a page and its curves.png beside it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    units = {LOSSES.get(r["config"].get("system", ("",))[0], "loss") for r in runs}
    plot_curves(path.parent / "curves.png", {r["name"]: r["metrics"] for r in runs}, *units if len(units) == 1 else ())
    columns, rows = table(runs, prefixes)
    trials = []  # of the blind comparison: (prompt, a run, its newest clip, another run, its newest clip)
    for row in rows:
        newest = {column["run"]: f"{cell['file']}.wav" for column, cell in zip(columns, row["cells"]) if cell}
        trials += [(row["text"], *a, *b) for a, b in combinations(newest.items(), 2)]
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    html = environment.get_template("page.html").render(
        runs=runs, columns=columns, rows=rows, trials=trials,
        facts=dict.fromkeys(key for r in runs for key in r["facts"]),
        config=dict.fromkeys(key for r in runs for key in r["config"]),
        plots=[(r["name"], name, prefix) for r, prefix in zip(runs, prefixes) for name in r["plots"]])
    write_whole(path, html)


def write_page(out_dir, **facts):
    """RUN/index.html and RUN/curves.png of the run as it stands. `facts`, text by name, are kept in page.json beside
    what is known of the machine; `defaults` is the config's, a dict. A trainer gives them, and is not to end where
    there can be no page: that is a note."""
    import torch

    out_dir = Path(out_dir)
    if facts:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
        diff = out_dir / "code" / "git.diff"
        commit, _, changes = diff.read_text(encoding="utf-8").partition("\n") if diff.exists() else ("", "", "")
        facts |= {"device": device, "torch": torch.__version__, "transformers": version("transformers"),
                  "Python": platform.python_version(),
                  "trivox's commit": commit[:12] + (", changed as in code/git.diff" if changes else "")}
        write_whole(out_dir / "page.json", json.dumps(facts))
    try:
        render(out_dir / "index.html", [read_run(out_dir)], [""])
    except (UserError, OSError) as e:
        if not facts:
            raise
        print(f"note: the page of {out_dir} is not renewed: {e}", flush=True)


COPIED = r"\d+/(samples/(step_\d+|reference)/(\d+\.(wav|png)|clips\.jsonl)|[^/]+\.png)"  # of compared/, ever


def stranger(out):
    """A file or link of `out` that a page of several runs would overwrite or delete and that none has made, or None."""
    copies, page = out / "compared", out / "index.html"
    written = [out / "metrics.jsonl", *([] if copies.exists() else [page, out / "curves.png"])]
    if copies.is_symlink() or copies.is_file():
        written.append(copies)
    found = [path for path in written if path.exists() or path.is_symlink()]
    found += [path for path in sorted(copies.rglob("*")) if (path.is_symlink() or not path.is_dir())
              and not re.fullmatch(COPIED, path.relative_to(copies).as_posix())]
    if not found and page.exists() and b'aria-label="facts"' not in page.read_bytes():
        found = [page]
    return found[0] if found else None


def copy_shown(r, to):
    """Copies of the clips and the plots of a run that its page shows, into the new folder `to`."""
    names = {f"samples/{folder}/{clip['n']:03d}" for step, clips in r["steps"].items() for clip in clips.values()
             for folder in (step, "reference")}
    to.mkdir(parents=True)
    for name in [*r["plots"], *(name + ending for name in sorted(names) for ending in (".wav", ".png"))]:
        if (source := r["folder"] / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, to / name)


def compare(folders, out):
    """A folder with a page of several runs, which holds copies of their clips and can be moved or sent.

    Raises UserError where `out` holds what is of no comparison, and for a run that is named twice.
    """
    runs, prefixes = [read_run(folder) for folder in folders], [f"compared/{i}/" for i in range(len(folders))]
    names = [r["name"] for r in runs]
    if len({r["folder"].resolve() for r in runs}) < len(runs):
        raise UserError("one run is named twice")
    if strange := stranger(out):
        raise UserError(f"{strange} is of something else than a comparison, which would overwrite or delete it: --out "
                        "DIR names another folder")
    with whole_folder(out) as new:
        for r, prefix in zip(runs, prefixes):
            copy_shown(r, new / prefix)
        shutil.rmtree(out / "compared", ignore_errors=True)
    for r in runs:  # runs/a/flow and runs/b/flow
        r["name"] = r["name"] if names.count(r["name"]) == 1 else str(r["folder"])
    render(out / "index.html", runs, prefixes)
