"""The music of the demos: short pieces, composed by rules and chance into a folder of recordings."""

import re

import numpy as np
from tqdm import tqdm

from trivox.common import UserError
from trivox.corpora import claim
from trivox.files import write_whole
from trivox.parallel import parallel
from trivox.recordings import write_wav

MUSIC_RATE = 22050  # Hz
SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))  # major and minor, in semitones
PROGRESSIONS = ((0, 5, 3, 4), (0, 4, 5, 3), (0, 3, 1, 4), (5, 3, 0, 4), (0, 2, 3, 4), (0, 3, 5, 4))  # scale degrees
RHYTHMS = ((1, 1, 1, 1), (1, .5, .5, 1, 1), (.5, .5, 1, .5, .5, 1), (1.5, .5, 1, 1), (1.5, .5, 1.5, .5),
           (.75, .75, .5, 1, 1))  # beats
KICKS = ((0, 8), (0, 6, 8), (0, 8, 10), (0, 4, 8, 12), (0, 7, 10))  # sixteenths of a bar
HATS = (4, 2, 1)  # sixteenths from one to the next


def compose(seed):
    """A piece of music of 6 to 11 s, (samples,) float32 at MUSIC_RATE: four bars, A A B A, and a last chord.

    Tempo, key, chords, motif, timbres and drums are drawn; in B the motif is turned over above other chords. The parts
    come in one after the other while all grow louder and brighter, so that each bar is known by its sound.
    """
    rng = np.random.default_rng(seed)
    beat, key, scale = 60 / rng.uniform(98, 170), rng.integers(45, 57), SCALES[rng.integers(2)]
    chords, rhythm = PROGRESSIONS[rng.integers(len(PROGRESSIONS))], RHYTHMS[rng.integers(len(RHYTHMS))]
    motif = rng.choice((0, 2, 4)) + np.cumsum([0, *rng.choice((-2, -1, -1, 1, 1, 2), len(rhythm) - 1)])
    kick, hat = KICKS[rng.integers(len(KICKS))], HATS[rng.integers(len(HATS))]
    pad, bass, lead = (waveform(rng) for _ in range(3))
    entries = dict(zip(("bass", "drums", "lead"), rng.permutation((1, 2, rng.integers(2)))))
    wav = np.zeros(int((18 * beat + 0.3) * MUSIC_RATE))

    def pitch(degree, octave):  # Hz
        return 440 * 2 ** ((key + scale[degree % 7] + 12 * (degree // 7 + octave) - 69) / 12)

    def add(sound, start, gain):  # start in beats
        at = int(start * beat * MUSIC_RATE)
        wav[at:at + len(sound)] += gain * sound[:len(wav) - at]

    for bar, section in enumerate("AABA"):
        gain, harmonics = 0.4 + 0.2 * bar, 3 + 3 * bar
        for half, root in enumerate(chords[2:] if section == "B" else chords[:2]):
            for degree in (root, root + 2, root + 4):
                add(note(pitch(degree, 0), 2 * beat, pad(harmonics), 0.05, 1.5), 4 * bar + 2 * half, 0.16 * gain)
            if bar >= entries["bass"]:
                for start, octave in ((0, -1), (1, -1), (1.5, 0)):
                    sound = note(pitch(root, octave), beat, bass(harmonics), 0.01, 0.4)
                    add(sound, 4 * bar + 2 * half + start, 0.3 * gain)
        if bar >= entries["drums"]:
            for step in kick:
                add(drum(rng, "kick"), 4 * bar + step / 4, 0.7 * gain)
            for step in (4, 12):
                add(drum(rng, "snare"), 4 * bar + step / 4, 0.35 * gain)
            for step in range(0, 16, hat):
                add(drum(rng, "hat"), 4 * bar + step / 4, 0.1 * gain)
        if bar >= entries["lead"]:
            start = 4 * bar
            for degree, length in zip(chords[2] - motif if section == "B" else chords[0] + motif, rhythm):
                add(note(pitch(degree, 1 + (bar == 3)), length * beat, lead(harmonics), 0.02, 0.8), start, 0.3 * gain)
                start += length
    for degree in (chords[0], chords[0] + 2, chords[0] + 4, chords[0] + 7):
        add(note(pitch(degree, 0), 2 * beat, pad(12), 0.01, 0.5), 16, 0.2)
    return (0.9 * wav / np.abs(wav).max()).astype(np.float32)


def waveform(rng):
    """Draw a timbre: a function from a number of harmonics to one period of the sound, 1,024 samples."""
    slope, even, phases = rng.uniform(0.7, 2), rng.choice((0.1, 1)), rng.uniform(0, 2 * np.pi, 20)

    def period(harmonics):
        k = np.arange(1, harmonics + 1)[:, None]
        waves = np.sin(2 * np.pi * k * np.arange(1024) / 1024 + phases[:harmonics, None])
        wave = (k ** -slope * np.where(k % 2, 1, even) * waves).sum(0)
        return wave / np.abs(wave).max()

    return period


def note(hertz, seconds, period, attack, decay):
    """A note of a waveform, swelling for `attack` seconds and falling by 1/e in `decay`; the end is faded."""
    t = np.arange(int(seconds * MUSIC_RATE)) / MUSIC_RATE
    wave = period[(t * hertz * len(period)).astype(int) % len(period)]
    return wave * np.minimum(t / attack, 1) * np.exp(-t / decay) * np.minimum((seconds - t) / 0.02, 1)


def drum(rng, name):
    t = np.arange(int(0.25 * MUSIC_RATE)) / MUSIC_RATE
    if name == "kick":
        return np.sin(2 * np.pi * (45 * t - 4 * np.exp(-30 * t))) * np.exp(-t / 0.08)
    noise = rng.standard_normal(len(t) + 1)
    if name == "snare":
        return (0.5 * noise[1:] + np.sin(2 * np.pi * 190 * t)) * np.exp(-t / 0.06)
    return np.diff(noise) * np.exp(-t / 0.02)


def _compose_piece(job):
    path, seed = job
    if not path.exists():
        write_wav(path, compose(seed), MUSIC_RATE)


def make_demo_music(root, pieces, heldout):
    """Compose pieces into a corpus at `root`: wavs/piece-00000.wav and on, of which the last `heldout` are held out.
    Raises UserError where `root` holds another's corpus."""
    if heldout >= pieces:
        raise UserError(f"{heldout} of {pieces} pieces held out leave none to train on")
    names = [f"wavs/piece-{i:05d}" for i in range(pieces)]
    there = [path.name for path in (root / "wavs").glob("*")]
    pieces_alone = all(re.fullmatch(r"piece-\d{5,}\.wav(\.\d+\.part)?", name) for name in there)
    claim(root, ("metadata.csv", "wavs", "heldout.txt"),
          bool(there) and pieces_alone and not (root / "metadata.csv").exists())
    with parallel() as pool:
        jobs = [(root / f"{name}.wav", seed) for seed, name in enumerate(names)]
        list(tqdm(pool.map(_compose_piece, jobs, chunksize=16), "composing", pieces, unit=" pieces", leave=False))
    write_whole(root / "heldout.txt", "".join(name + "\n" for name in names[pieces - heldout:]))
