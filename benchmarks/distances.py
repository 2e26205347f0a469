"""How the Fréchet distance and the kernel distance (KAD) of music drift with the number of clips: composed pieces
beside others of the same law, and beside others with a little hiss, by their log-mel statistics. Prints a table of
means and standard deviations over draws.

    python benchmarks/distances.py
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from trivox.demo_music import MUSIC_RATE, compose  # noqa: E402 as they lie above this folder
from trivox.metrics import frechet_distance, kernel_distance, load_embedding  # noqa: E402
from trivox.parallel import parallel  # noqa: E402


def embed_piece(decibels, seed):
    """The vectors of a piece, and of the same piece with white noise of a level in dB of full scale: two (N, D)."""
    _, embed = load_embedding("logmel")
    wav = compose(seed)
    hiss = 10 ** (decibels / 20) * np.random.default_rng(seed).standard_normal(len(wav))
    return embed(wav, MUSIC_RATE), embed(wav + hiss, MUSIC_RATE)


def distances(a, b, seed):
    """Of two lists of clips (N, D): Fréchet and KAD of their windows, pooled as if all were independent; KAD without
    the pairs of one clip; KAD of one window drawn of each clip."""
    rng, pooled = np.random.default_rng(seed), (np.concatenate(a), np.concatenate(b))
    drawn = ([clip[rng.integers(len(clip))] for clip in clips] for clips in (a, b))
    return frechet_distance(*pooled), kernel_distance(*pooled), kernel_distance(a, b), kernel_distance(*drawn)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=1536, help="composed once; each draw takes two sets of them")
    parser.add_argument("--clips", type=int, nargs="+", default=(64, 128, 256, 512), help="in each set")
    parser.add_argument("--draws", type=int, default=6, help="of the largest sets; twice that of sets half as large")
    parser.add_argument("--hiss", type=float, default=-60, help="of the other law, in dB of full scale")
    args = parser.parse_args()
    if 2 * max(args.clips) > args.pieces:
        parser.error(f"two sets of {max(args.clips)} clips need {2 * max(args.clips)} pieces, not {args.pieces}")

    rng = np.random.default_rng(0)
    names = ["Fréchet, windows pooled", "KAD, windows pooled", "KAD", "KAD, a window a clip"]
    with parallel() as pool:
        made = pool.map(partial(embed_piece, args.hiss), range(args.pieces), chunksize=16)
        pieces, hissing = zip(*tqdm(made, "composing", args.pieces, unit=" pieces", leave=False, disable=None))
        print("| law | clips |", " | ".join(names), "|\n|---|---|" + "---|" * len(names))
        for law, others in (("the same", pieces), (f"hiss of {args.hiss:g} dB", hissing)):
            for n in args.clips:
                times = args.draws * max(args.clips) // n
                draws = [np.split(rng.permutation(args.pieces)[:2 * n], 2) for _ in range(times)]
                found = pool.map(distances, *zip(*(([others[i] for i in a], [pieces[i] for i in b]) for a, b in draws)),
                                 range(times))
                found = np.array([*tqdm(found, f"{n} clips", times, unit=" draws", leave=False, disable=None)])
                cells = (f"{mean:.3f} ± {sd:.3f}" for mean, sd in zip(found.mean(0), found.std(0, ddof=1)))
                print(f"| {law} | {n} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
