"""Writes the tables of docs/results.md from benchmarks/results/*.json, a file a run, what evaluate.py found of it, from
benchmarks/gpu/*.json, what bench.py found on a GPU, and from benchmarks/memory.json, of which README.md has some rows.

    python benchmarks/results.py --add RUN --command "./run.sh" --machine "two cores of …" --took "5 min, 2 GB"

With --add it first makes such a file of RUN/evaluation/summary.json."""

import argparse
import json
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
sys.path.insert(0, str(ROOT))
from trivox.checkpoints import read_config  # noqa: E402 as they lie above this folder
from trivox.tables import ROWS, cells  # noqa: E402 likewise
README = "flow_ljspeech", "codec_ljspeech", "codec_music_300m", "llm_177m", "llm_550m", "llm_1b"  # rows of its table


def take_up(run, about):
    """Copy a run's summary into FOLDER, with what is known about it, its date, and the commit that trained it."""
    path, diff = run / "evaluation" / "summary.json", (run / "code" / "git.diff").read_text().strip()
    date = time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime))
    about |= {"system": read_config(run)["system"], "date": date, "commit": diff[:7] + " with changes" * ("\n" in diff),
              "summary": json.loads(path.read_text())}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{run.resolve().name}.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def table(found):
    """What a run found, as Markdown: the rows of evaluate.py's table."""
    where = ", ".join(filter(None, (found["machine"], found["took"], found["date"], f"commit {found['commit']}")))
    header, *rows = (f"| {' | '.join(row)} |" for row in cells(found["system"], ["found"], [found["summary"]]))
    return "\n".join([f"`{found['command']}`; {where}:\n", header, "|---" * (header.count("|") - 1) + "|", *rows])


def on_gpus():
    """What bench.py and the trainers found on GPUs, as Markdown."""
    lines = []
    for found in [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "gpu").glob("*.json"))]:
        if "command" not in found:
            continue
        lines += [f"`{found['command']}`; {found['gpu']}, torch {found['torch']}, {found['date']}:\n"]
        if "times_us" in found:
            lines += ["bfloat16, µs, forward / forward + backward / the same in a CUDA graph\n",
                      "| (B, T, H, K, V) | trivox | fla-core 0.6.0 | fla-core / trivox | plain PyTorch | floor |",
                      "|---|---|---|---|---|---|"]
            for row in found["times_us"]:
                ours, theirs, torchs, floor = (" / ".join(f"{us:.0f}" for us in row[name] or [])
                                               for name in ("trivox", "fla", "torch", "floor"))
                ratio = " / ".join(f"{a / b:.2f}" for a, b in zip(row["fla"] or [], row["trivox"]))
                lines += [f"| {tuple(row['shape'])} | {ours} | {theirs} | {ratio} | {torchs} | {floor} |"]
            lines += [f"\nTriton {found['triton']}; {found['copy_TB_per_s']:.2f} TB/s in a copy. A step of decoding: "
                      f"{found['step_us_a_layer']:.1f} µs a layer of 16 heads of 64. Errors are "
                      f"{'within bounds' if found['right'] else 'OUT OF BOUNDS'}; a captured graph "
                      f"{'equals' if found['captured_equals_eager'] else 'DIFFERS FROM'} eager calls to the bit."
                      + " fla-core refuses this Triton on this chip, whose results for it are wrong: its times only." *
                      found["fla_refuses_this_triton"] + f" {found.get('note', '')}\n"]
        elif "ms_a_step" in found:
            lines += ["{ms_a_step:.1f} ms a step of {batch_size} x {grad_accum_steps} on random data, "
                      "{per_second:,.0f} {unit} a second, "
                      "{TFLOP_per_second:.0f} TFLOP/s, {gpu_gb:.1f} GB, {dtype}.".format(**found)
                      + f" Note: {found.get('note')}." * ("note" in found), ""]
        elif "flex_error" in found:
            rates = [f"{rate:,.0f} ({key[7:].replace(', ', ' at a time, ')})" for key, rate in found.items()
                     if key.startswith("decode_")]
            lines += [f"Tokens a second of decoding, prefill and capture included: {', '.join(rates)}."
                      + f" Note: {found.get('note')}." * ("note" in found), ""]
        else:
            lines += [f"{found['what']}\n", "| system | options | steps | loss of the last ten | validation |",
                      "|---|---|---|---|---|"]
            lines += ["| {system} | `{options}` | {step} | {loss:.4f} | {val_loss:.4f} |".format(**run)
                      for run in found["runs"]] + [""]
    return "\n".join(lines)


def fits(only=()):
    """What fits on which card, as Markdown; of all configs in benchmarks/memory.json, or some."""
    def written(own, plain, saving):
        if plain == own:
            return "fits"
        sizes = [f"{size[0]} × {size[1]}{mark}" for size, mark in ((plain, ""), (saving, " †")) if size]
        return " or ".join(sizes) or "–"

    found = json.loads((ROOT / "benchmarks" / "memory.json").read_text())["configs"]
    rows = [one for one in found if not only or one["config"].removesuffix(".yaml") in only]
    return "\n".join(["| config | its batch | " + " | ".join(f"{card} GB" for card in rows[0]["cards"]) + " |",
                      "|---|---|" + "---|" * len(rows[0]["cards"]),
                      *("| `{}` | {} × {} | ".format(one["config"], *one["own"])
                        + " | ".join(written(one["own"], *sizes) for sizes in one["cards"].values()) + " |"
                        for one in rows)])


def replaced(path, name, text):
    """Write a block of a page anew."""
    block = f"<!-- {name}, by benchmarks/results.py -->\n\n{text}\n\n<!-- end of {name} -->"
    page = re.sub(f"<!-- {name},.*?<!-- end of {name} -->", lambda _: block, path.read_text(), flags=re.DOTALL)
    path.write_text(page)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in "add", "command", "machine", "took":
        parser.add_argument(f"--{name}", default="")
    if run := (args := vars(parser.parse_args(argv))).pop("add"):
        take_up(Path(run), args)
    page, found = PAGE.read_text(), [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    for system in ROWS:
        tables = [table(one) for one in found if one["system"] == system] or ["No run has been taken up yet."]
        block = "\n\n".join([f"<!-- {system}, by benchmarks/results.py -->", *tables, f"<!-- end of {system} -->"])
        page = re.sub(f"<!-- {system},.*?<!-- end of {system} -->", lambda _, block=block: block, page, flags=re.DOTALL)
    block = f"<!-- gpu, by benchmarks/results.py -->\n\n{on_gpus()}\n<!-- end of gpu -->"
    PAGE.write_text(re.sub("<!-- gpu,.*?<!-- end of gpu -->", lambda _: block, page, flags=re.DOTALL))
    replaced(PAGE, "memory", fits())
    replaced(ROOT / "README.md", "memory", fits(README))


if __name__ == "__main__":
    main(sys.argv[1:])
