"""Clips unlike the others of their corpus: in loudness, in silence, and in how much text is said in a second.

Such clips are often cut wrongly, or have another clip's text. They are told, and used.
"""

import math

import numpy as np

FRAME = 0.02  # s
QUIET = 40  # dB: a frame so far below the loud ones is silence
FAR = 6  # robust standard deviations from the median
FEWEST = 20  # clips that show what is usual
SHOWN = 5  # clips of each kind
KINDS = {  # what is measured: how far from the median is too little to be told, and how it is said
    "loudness": (10, "its speech is at {:.0f} dB of full scale, where the median is {:.0f}"),
    "silence": (0.3, "{:.0%} of it is silence, where the median is {:.0%}"),
    "speed": (0.5, "{:.1f} bytes of text a second, where the median is {:.1f}"),  # 0.5 of its logarithm: 1.6 times
}


def measure(wav, sample_rate):
    """What is heard of a clip (samples,): the loudness of all that is not silent, in dB of full scale, and the share of
    its frames that are silent, as {"loudness": …, "silence": …}."""
    size = max(1, round(FRAME * sample_rate))
    frames = wav[:len(wav) // size * size].reshape(-1, size) if len(wav) >= size else wav[None]
    power = 10 * np.log10(np.square(frames.astype(np.float64)).mean(1) + 1e-12)
    loud = power > np.quantile(power, 0.95) - QUIET
    loudness = 10 * np.log10(np.mean(10 ** (power[loud] / 10)))
    return {"loudness": round(float(loudness), 1), "silence": round(1 - float(loud.mean()), 3)}


def find_unusual(rows, beyond=1.0):
    """The clips that are unlike most of `rows`, dicts with text, seconds and what `measure` says: a list of (kind, how
    far from the median, row, why in words), the furthest of each kind first. beyond: from what distance on; 1 is where
    it is told."""
    found = []
    for kind, (least, words) in KINDS.items():
        known = [(row, value) for row in rows if (value := value_of(row, kind)) is not None]
        if len(known) < FEWEST:
            continue
        values = np.array([value for _, value in known], np.float64)
        scaled = np.log(values) if kind == "speed" else values
        off = np.abs(scaled - np.median(scaled))
        far = off / max(least, FAR * 1.4826 * np.median(off))
        for n in np.argsort(-far, kind="stable"):
            if far[n] > beyond:
                found.append((kind, far[n], known[n][0], words.format(values[n], np.median(values))))
    return found


def value_of(row, kind):
    """A row's loudness, silence or speed; None where it is not known."""
    if kind != "speed":
        return value if isinstance(value := row.get(kind), float) and math.isfinite(value) else None
    return len(row["text"].encode()) / row["seconds"] if row["text"] else None


def tell_unusual(rows, frame_rate):
    """Tell of the clips that are unlike most of `rows`, dicts with id, text, frames and what `measure` says."""
    found = find_unusual([{**row, "seconds": row["frames"] / frame_rate} for row in rows])
    for kind in KINDS:
        told = [(row, why) for of, _, row, why in found if of == kind]
        for row, why in told[:SHOWN]:
            print(f"unusual {row['id']}: {why}")
        if len(told) > SHOWN:
            print(f"unusual: {len(told) - SHOWN:,} more in {kind}")
