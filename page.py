"""What a run looks and sounds like: RUN/index.html, which opens from the disk and takes no server and no network.

    python page.py runs/a                      write the page of a run anew; the trainers do so by themselves
    python page.py runs/a runs/b [--out DIR]   several runs side by side, with blind comparisons; clips are copied
"""

import argparse
import sys

from trivox.common import run, some_path
from trivox.pages import compare, write_page


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=some_path, help="folders of runs")
    parser.add_argument("--out", type=some_path, help="folder for a page of several runs (compare/ beside the first)")
    args = parser.parse_args(argv)
    if len(args.runs) == 1 and not args.out:
        write_page(args.runs[0])
        return print(f"{args.runs[0] / 'index.html'}")
    out = args.out or args.runs[0].parent / "compare"
    compare(args.runs, out)
    print(f"{out / 'index.html'}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
