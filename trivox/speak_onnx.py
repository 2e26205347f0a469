"""Speak with an exported model: python speak.py --text "…" --out out.wav. Needs what requirements.txt names, no torch.

export.py copies this script beside the model, and beside it a folder `trivox` of the files that read a text in training
and sampling too. A voice is an embedding in a .npy file, from export.py --speaker.
"""

import argparse
import io
import json
import os
import sys
import time
import wave
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAUSE = 0.15  # seconds between sentences


def broken(path, error):
    """What is said where a file of the export cannot be used."""
    why = "there is no such file" if not path.exists() else " ".join(str(error).split())[:300] or type(error).__name__
    return f"cannot read {path} ({why}): export the model again"


def missing(error):
    """What is said where something cannot be imported: a file of the export's, or a package."""
    name = error.name or "a package"
    if name.partition(".")[0] == "trivox":
        return broken(HERE / name.replace(".", "/"), error)
    return f"cannot import {name} ({error}): pip install -r {HERE / 'requirements.txt'}"


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))  # which python -P leaves out
try:
    import numpy as np
    import onnxruntime

    from trivox.alphabet import alphabet
    from trivox.errors import UserError
    from trivox.normalise import normalise_text
    from trivox.sentences import in_letters, split_text
except ImportError as e:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {missing(e)}")


class Speaker:
    """`speak` makes a waveform of a text: of its `sentences` one by one, by `codes` that `decode` turns into sound.

    Raises UserError for what is no export, or damaged, and for a voice that is not what the model takes.
    """

    def __init__(self, folder=HERE, threads=0, voice=None):
        folder = Path(folder)
        self.c = read_config(folder / "config.json")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0 for all cores

        def load(name):
            try:
                return onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
            except Exception as e:  # missing, cut, another's: onnxruntime has a class for each, and none above them
                raise UserError(broken(folder / name, e)) from None

        self.model, self.codec, self.voice, self.folder, self.load = load("model.onnx"), None, {}, folder, load
        if voice is not None and not self.c["speaker_width"]:
            raise UserError("this model speaks without voices: no --speaker")
        if width := self.c["speaker_width"]:
            shape = getattr(voice, "shape", None)  # of none there is none
            if shape != (width,) or voice.dtype.kind not in "fiu" or not np.isfinite(voice).all():
                raise UserError(f"this model speaks with a voice whose embedding has {width} numbers: "
                                "--speaker FILE.npy")
            self.speak_like(voice)

    def speak_like(self, voice):
        """Take another voice, the embedding (speaker_width,)."""
        session = self.load("voice.onnx")
        self.voice = {"voice": session.run(None, {"embedding": voice[None].astype(np.float32)})[0]}

    def sentences(self, text):
        """What is spoken one by one of a text. Says on stderr what of it the model does not read, and raises UserError
        for a text that nothing can be made of."""
        letters, language = self.letters(), self.c["language"]
        found = split_text(normalise_text(text, letters.own, language), self.c["sentence"], language, in_letters)
        for one in found:
            if not letters.has_letters(letters.ids(one)):
                raise UserError(f"the model reads {letters.what()}, and {one[:20]!r} has none")
        if unread := letters.unknown(" ".join(found)):
            note(f"the model reads {letters.what()}, and not {unread[:40]!r}: each is one unknown character to it")
        return found

    def ids(self, sentence):
        """The characters of a sentence as ids; 1 is any that the model does not know."""
        return self.letters().ids(sentence).tolist()

    def letters(self):
        return alphabet(self.c["characters"], self.c["language"])

    def speak(self, text, seed=0, seconds=None, **options):
        """The waveform of a text, (samples,) in [-1, 1]. seconds: of the whole text at most, to the nearest code;
        None for a limit to each sentence, that of the samples in training. options: as of `codes`. What is not heard is
        said on stderr.

        Raises UserError as `sentences` does, and where the model makes no sound at all.
        """
        found, rate, wavs, made = self.sentences(text), self.c["sample_rate"], [], 0
        for n, one in enumerate(found):
            left = self.c["seconds"] if seconds is None else seconds - made / rate
            frames, room = round(left * self.c["frame_rate"]), self.c["context"] - 3 - len(self.ids(one))
            frames = frames if n else max(1, frames)  # some sound there is of any text
            codes = list(self.codes(one, seed * 1_000_003 + n, min(frames, room), **options)) if frames > 0 else []
            if codes:
                wavs += [np.zeros(int(PAUSE * rate), np.float32)] * bool(wavs) + [self.decode(codes)]
                made = sum(map(len, wavs)) + int(PAUSE * rate)
            if seconds is not None and frames <= room and len(codes) >= frames:  # the time is over
                which = f"{one[:40]!r} is" if n == len(found) - 1 else (
                    f"from {one[:40]!r} on, {len(found) - n} of {len(found)} sentences are")
                note(f"{which} not heard to the end within {seconds:g} s: --seconds allows more")
                break
            if not codes:
                note(f"the model made no sound for {one[:40]!r}: try another seed")
            elif len(codes) >= min(frames, room):
                note(f"{one[:40]!r} has no end after {len(codes) / self.c['frame_rate']:.3g} s, and no more is heard: "
                     f"{'--seconds allows more, ' * (frames <= room)}another seed may end sooner")
        if not wavs:
            raise UserError(f"the model made no sound for {found[0][:40]!r}: try another seed")
        return np.concatenate(wavs)

    def codes(self, sentence, seed=0, frames=None, **options):
        """The codes of one of the `sentences`, one by one. options: temperature, top_k, top_p, repetition_penalty."""
        o, rng, size = self.c | options, np.random.default_rng(seed), self.c["codebook_size"]
        tokens, position, capacity = [2, *self.ids(sentence), 3, self.c["audio_bos"]], 0, 256
        frames = min(frames or round(o["seconds"] * o["frame_rate"]), o["context"] - len(tokens))
        states = {name: np.zeros([1, shape[1], capacity, shape[3]] if name[:3] in ("key", "val") else shape, np.float32)
                  for name, shape in self.c["states"].items()}
        spoken = np.zeros(size + 1, bool)
        while frames > 0:
            for chunk in [[t] for t in tokens] if self.c["one_by_one"] else [tokens]:
                while position + len(chunk) > capacity:
                    states = {name: np.concatenate((x, np.zeros_like(x)), 2) if name[:3] in ("key", "val") else x
                              for name, x in states.items()}
                    capacity *= 2
                logits, *new = self.model.run(None, {"tokens": np.array([chunk]), "position": np.array(position),
                                                     **self.voice, **states})
                for name, x in zip(states, new):
                    if name[:3] in ("key", "val"):
                        states[name][:, :, position:position + len(chunk)] = x
                    else:
                        states[name] = x
                position += len(chunk)
            code = pick(logits[0], spoken, rng, o)
            if code == size:
                return
            yield code
            spoken[code], tokens, frames = True, [5 + len(self.c["characters"]) + code], frames - 1

    def decode(self, codes):
        """Codes -> a waveform in [-1, 1]."""
        if (self.folder / "codec.onnx").exists():
            self.codec = self.codec or self.load("codec.onnx")
            return self.codec.run(None, {"codes": np.array(codes)[None, None]})[0].ravel()
        try:
            with np.load(self.folder / "codec.npz", allow_pickle=False) as codec:
                read = codec["mels"][codes], codec["filters"], int(codec["hop_length"]), int(codec["n_fft"])
        except Exception as e:  # missing, cut, another's: each its own class
            raise UserError(broken(self.folder / "codec.npz", e)) from None
        return griffin_lim(*read)


def note(problem):
    print(f"note: {problem}", file=sys.stderr)


NEEDED = {str: ("characters", "language"), dict: ("states",), bool: ("one_by_one",),
          int: ("codebook_size", "context", "sentence", "audio_bos", "sample_rate", "speaker_width", "top_k"),
          (int, float): ("frame_rate", "seconds", "top_p", "repetition_penalty", "temperature")}
MAY_BE_NONE = "one_by_one", "speaker_width", "top_k", "temperature"  # or false


def read_config(path):
    """config.json, a dict."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(broken(path, e)) from None
    if not isinstance(about, dict):
        raise UserError(broken(path, "it is no dictionary"))
    for kind, keys in NEEDED.items():
        for key in keys:
            value = about.get(key)
            may_be = value or key in MAY_BE_NONE
            if not isinstance(value, kind) or not may_be or isinstance(value, (int, float)) and value < 0:
                raise UserError(broken(path, f"{key} is {value!r} there" if key in about else f"it does not say {key}"))
    if about["audio_bos"] != (wanted := 6 + len(about["characters"]) + about["codebook_size"]):
        raise UserError(broken(path, f"audio_bos is {about['audio_bos']} and not {wanted}, as its characters have it"))
    return about


def pick(logits, spoken, rng, o):
    """A code by temperature (0: the likeliest), top-k, top-p and a penalty for codes that were spoken before."""
    if o["repetition_penalty"] != 1:
        punished = np.where(logits > 0, logits / o["repetition_penalty"], logits * o["repetition_penalty"])
        logits = np.where(spoken, punished, logits)
    if o["temperature"] == 0:
        return int(logits.argmax())
    p, least = np.exp((logits - logits.max()) / max(o["temperature"], 1e-6)), 0  # less would be 0 in 32 bits
    if 0 < o["top_k"] < len(p):
        least = np.partition(p, -o["top_k"])[-o["top_k"]]
    if o["top_p"] < 1:  # it counts the probability of those that top-k leaves out too
        ascending = np.sort(p)
        below = ascending.cumsum()
        least = max(least, ascending[np.searchsorted(below[:-1], (1 - o["top_p"]) * below[-1], "right")])
    left = np.flatnonzero(p >= least)
    below = p[left].cumsum(dtype=np.float64)
    return int(left[np.searchsorted(below, rng.random() * below[-1], "right")])


def griffin_lim(mel, filters, hop, n_fft, iterations=32):
    """Log-mels (frames, n_mels) -> (frames * hop,): mel filters inverted by multiplicative updates (Lee & Seung, 2001),
    phases by fast Griffin-Lim (Perraudin et al., 2013)."""
    target = np.exp(mel.T)
    magnitude, back = filters.T @ target, filters.T @ target
    for _ in range(30):
        magnitude *= back / (filters.T @ (filters @ magnitude) + 1e-10)
    window, frames = np.hanning(n_fft + 1)[:-1], magnitude.shape[1]
    starts, rng = hop * np.arange(frames), np.random.default_rng(0)
    size = starts[-1] + n_fft
    norm = np.zeros(size)
    for start in starts:
        norm[start:start + n_fft] += window ** 2

    def wave_of(spectrum):
        wav = np.zeros(size)
        for start, piece in zip(starts, np.fft.irfft(spectrum, axis=0).T * window):
            wav[start:start + n_fft] += piece
        return wav / np.maximum(norm, 1e-8)

    spectrum, before = magnitude * np.exp(2j * np.pi * rng.random(magnitude.shape)), 0
    for _ in range(iterations):
        wav = wave_of(spectrum)
        again = np.fft.rfft(np.stack([wav[s:s + n_fft] for s in starts], 1) * window[:, None], axis=0)
        angles = again - 0.99 / 1.99 * before
        spectrum, before = magnitude * angles / np.maximum(np.abs(angles), 1e-16), again
    pad = (n_fft - hop) // 2
    return wave_of(spectrum)[pad:pad + frames * hop].astype(np.float32)


def write(out, content):
    """Write a file whole or not at all: what was there before stays till then."""
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(out)
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror}") from None
    finally:
        try:
            part.unlink()
        except OSError:  # it is in place
            pass


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, default="out.wav")
    parser.add_argument("--speaker", type=Path, help="the embedding of a voice, .npy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0 for all cores, at most 1,024")
    for name in ("temperature", "top_p", "repetition_penalty"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--seconds", type=float, help="of the whole text, at most")
    parser.add_argument("--top_k", type=int)
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    if not 0 <= args.threads <= 1024:
        raise UserError(f"--threads {args.threads} is out of range: at least 0 and at most 1,024")
    try:
        voice = np.load(args.speaker, allow_pickle=False) if args.speaker else None
        if voice is not None and not isinstance(voice, np.ndarray):
            raise ValueError
    except (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile):
        raise UserError(f"cannot read the embedding {args.speaker}: expected a .npy file, which export.py --speaker "
                        "writes") from None
    options = {name: value for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seconds")
               if (value := getattr(args, name)) is not None}
    for name, low, high in (("temperature", 0, 100), ("top_k", 0, 10**6), ("top_p", 1e-6, 1),
                            ("repetition_penalty", 1e-6, 100), ("seconds", 0.01, 3600)):
        if not low <= options.get(name, high) <= high:
            raise UserError(f"--{name} {options[name]} is out of range: at least {low:g} and at most {high:,}")
    speaker, start = Speaker(HERE, args.threads, voice), time.perf_counter()
    wav, rate = speaker.speak(args.text, args.seed % 2 ** 32, **options), speaker.c["sample_rate"]
    took = time.perf_counter() - start
    seconds = len(wav) / rate
    with wave.open(content := io.BytesIO(), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(wav, -1, 1) * 32767).astype("<i2").tobytes())
    write(args.out, content.getvalue())
    print(f"{args.out}: {seconds:.2f} s of audio in {took:.2f} s, real-time factor {took / seconds:.2f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except ImportError as e:  # what only some texts need
        sys.exit(f"error: {missing(e)}")
