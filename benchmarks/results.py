"""Writes the tables of docs/results.md from benchmarks/results/*.json: a file a run, what evaluate.py found of it.

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
from evaluate import CODEC_ROWS, FLOW_ROWS, LLM_ROWS, read_config  # noqa: E402 as they lie above this folder
ROWS = {"flow": FLOW_ROWS, "codec": CODEC_ROWS, "llm": LLM_ROWS}


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
    def written(form):
        try:
            return form.format(**found["summary"])
        except (KeyError, TypeError):  # not measured
            return ""

    where = ", ".join(filter(None, (found["machine"], found["took"], found["date"], f"commit {found['commit']}")))
    rows = [(label, written(form), written(beside)) for label, form, beside in ROWS[found["system"]]]
    return "\n".join([f"`{found['command']}`; {where}:\n", "| | found | beside it |", "|---|---|---|",
                      *("| {} | {} | {} |".format(*row) for row in rows if row[1])])


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
    PAGE.write_text(page)


if __name__ == "__main__":
    main(sys.argv[1:])
