"""In which order a run takes its clips: epoch after epoch, shuffled. It knows numbers of clips, not what they are."""

import zlib
from itertools import islice

import numpy as np

POOL = 16  # steps whose clips are drawn together and sorted by length


def steps(seed, clips, lengths, count, place=None, done=0):
    """Walk in steps of `count` pairs (epoch, clip), of clips that are about equally long; the steps of a pool are in
    any order. lengths: how long clips are, of a list of them. done: how many steps are behind, where no place tells, as
    for runs of before there were places. See `walk`."""
    def arrange(pairs, rng):
        order = np.argsort(lengths([clip for _, clip in pairs]), kind="stable")
        return [pairs[i] for step in rng.permutation(POOL) for i in order[step * count:(step + 1) * count]]

    return islice(walk(seed, clips, count, POOL * count, arrange, place), done, None)


def walk(seed, clips, count, size, arrange, place=None, within=False):
    """Step after step, for ever: yields (the `count` rows of a step, the place behind them).

    Epochs of the shuffled `clips` stand one after the other, and `size` of them at a time make a pool (with `within`
    fewer where an epoch ends): arrange(pairs (epoch, clip), a NumPy generator) makes its rows. All of this follows from
    the seed.

    A place (a dict of numbers and lists) tells how far the walk has come, and goes into a checkpoint. It holds for any
    `count` and `size`: so a run that goes on with another batch or another number of processes still takes each clip
    once an epoch. Where there are other clips than there were, a new epoch begins, and that is said.
    """
    which = zlib.crc32(np.array(clips, np.int64).tobytes())
    place = {"taken": 0, "rows": [], "of": len(clips), "which": which, "behind": 0} | (place or {})
    taken, rows, behind = place["taken"], place["rows"], place["behind"]
    if (of := place["of"]) != len(clips) or place["which"] != which:
        what = "they are other ones" if of == len(clips) else f"there were {of:,}"
        print(f"note: there are {len(clips):,} clips, and {what}: a new epoch begins", flush=True)
        taken, rows, behind = -(-taken // of) * len(clips), [], 0
    epoch, order = -1, None
    while True:
        while len(rows) < count:
            pool, end = [], taken + (min(size, len(clips) - taken % len(clips)) if within else size)
            key = [taken // len(clips), taken % len(clips) // size] if within else [taken // size]
            while taken < end:
                if epoch != taken // len(clips):
                    epoch = taken // len(clips)
                    order = np.random.default_rng([seed, 1, epoch]).permutation(clips)
                first = taken % len(clips)
                some = order[first:first + end - taken].tolist()
                pool += [(epoch, clip) for clip in some]
                taken += len(some)
            rows = rows + arrange(pool, np.random.default_rng([seed, 2, *key]))[behind:]
            behind = 0
        step, rows = rows[:count], rows[count:]
        yield step, {"taken": taken, "rows": rows, "of": len(clips), "which": which}
