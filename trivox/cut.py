"""From long recordings to a corpus: cut at pauses, into clips that a model can be trained on.

Speech is found by silero-vad (https://github.com/snakers4/silero-vad, MIT), whose weights come with faster-whisper.
"""

import csv
import importlib.util
import io
import json
import os

import numpy as np
from tqdm import tqdm

from trivox.common import UserError
from trivox.corpora import Recordings, clip_id, file_stamp
from trivox.files import drop_parts, read_json, read_rows, write_whole
from trivox.headers import CUT, look
from trivox.parallel import parallel
from trivox.recognisers import at_16_khz
from trivox.recordings import read_recording, write_wav
from trivox.transcripts import can_be_listed, transcribe, transcribed

BLOCK = 300  # s that are in memory at once
PAUSE = 0.1  # s, the shortest at which speech is cut
PAD = 0.15  # s of a pause that stay with the speech before and after it, or half of it
FAR = 1.0  # s: speech so far apart is never one clip
OTHERS = 24000  # Hz
FIELDS = "recording", "start", "end", "reason"


def cut_corpus(root, out, seconds=(2.0, 12.0), language="en", model=None):
    """Cut the recordings below `root` into clips of so many seconds, transcribe them, and write a corpus of them at
    `out`: wavs/, metadata.csv, and dropped.csv, which says of each stretch of speech that is no clip where it was and
    why. Goes on where a killed run stopped.

    language, model: as of `transcripts.transcribe`. Raises UserError as that does, where faster-whisper is missing, and
    where `out` holds other cuts.
    """
    if not importlib.util.find_spec("faster_whisper"):
        raise UserError("speech is found by a part of faster-whisper, which is missing: pip install --no-deps -r "
                        "requirements-extra.txt")
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--out {out} is in {root}, whose recordings are cut, and its own would be: name a folder "
                        "beside it")
    recordings = Recordings(root)
    paths = can_be_listed(recordings.paths)
    if not paths:
        raise UserError(f"{root} has no recordings")
    plan = {"cut": str(root.resolve()), "seconds": [*seconds]}
    if (out / "cut.json").exists() and read_json(out / "cut.json") != plan or (
            not (out / "cut.json").exists() and (out / "wavs").exists()):
        raise UserError(f"{out} holds another corpus, or one cut in another way: name another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "cut.json", json.dumps(plan))
    for folder in {out / "cuts", *(path.parent for path in (out / "cuts").rglob("*.part"))}:
        drop_parts(folder)
    gone, ids = forget(root, paths, out)
    sizes = [(root / path).stat().st_size if (root / path).exists() else 0 for path in paths]
    names = {path: clip_id(path, ids) for path in paths}  # a.wav and a.mp3 are not both a
    with parallel() as pool, tqdm(None, "cutting", sum(sizes), unit="B", unit_scale=True, leave=False) as bar:
        jobs = [(root, path, name, out, seconds) for path, name in names.items()]
        for size, _ in zip(sizes, pool.map(cut_recording, jobs)):
            bar.update(size)
    rows = [row for path in paths for _, row in read_rows(out / "cuts" / f"{path}.jsonl") if "stamp" not in row]
    if not any("id" in row for row in rows):
        reasons = [f"; of {row['recording']} it is said: {row['reason']}" for row in rows]
        raise UserError(f"nothing in {root} could be cut into clips{(reasons or [', as no speech is found'])[0]}")
    transcribe(out, out, language, model)
    heard = {name for name, line in transcribed(out).items() if line.split("|")[1]}
    for row in rows:
        if "id" in row and f"wavs/{row['id']}" not in heard:
            row["reason"] = "no word is heard in it"
    dropped = [row for row in rows if "reason" in row]
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, FIELDS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(dropped)
    write_whole(out / "dropped.csv", content.getvalue())
    kept = [row for row in rows if "reason" not in row]
    if gone:
        print(f"note: {len(gone):,} recordings that were cut before are no longer in {root}; their clips stay")
    hours = [sum(row["end"] - row["start"] for row in some) / 3600 for some in (kept, dropped)]
    print(f"{out}: {len(kept):,} clips, {hours[0]:.2f} h, of {len(paths):,} recordings; {len(dropped):,} stretches of "
          f"{hours[1]:.2f} h are left out, {out / 'dropped.csv'} says why. Read metadata.csv, and correct it")


def cut_recording(job):
    """Write the clips of one recording and then, as the mark that they are whole, cuts/<its path>.jsonl: a row for each
    stretch of speech, with its start and end in seconds and the id of its clip, or the reason why it is none."""
    root, path, name, out, seconds = job
    mark = out / "cuts" / f"{path}.jsonl"
    if mark.exists():
        return
    rows, count = [], 0
    try:
        for start, wav, rate, reason in stretches(root / path, seconds):
            rows.append({"recording": path, "start": round(start, 3), "end": round(start + len(wav) / rate, 3)})
            if reason:
                rows[-1]["reason"] = reason
                continue
            count += 1
            rows[-1]["id"] = f"{name}_{count:04d}"
            write_wav(out / "wavs" / f"{rows[-1]['id']}.wav", wav, rate)
    except UserError as e:
        rows.append({"recording": path, "start": 0.0, "end": 0.0, "reason": str(e)})
    mark.parent.mkdir(parents=True, exist_ok=True)
    rows.insert(0, {"recording": path, "name": name, "stamp": file_stamp(root / path)})
    write_whole(mark, "".join(json.dumps(row) + "\n" for row in rows))


def forget(root, paths, out):
    """Take away what was cut of recordings that have changed since. Returns those that are there no more, whose clips
    stay, and how each was called: {name: path}."""
    gone, ids, lines = [], {}, transcribed(out)
    for mark in sorted((out / "cuts").rglob("*.jsonl")):
        rows = [row for _, row in read_rows(mark)]
        path = ids[rows[0]["name"]] = rows[0]["recording"]
        if path not in paths:
            gone.append(path)
        elif rows[0].get("stamp") != json.loads(json.dumps(file_stamp(root / path))):
            print(f"{path} has changed, and is cut anew")
            for row in rows:
                (out / "wavs" / f"{row.get('id')}.wav").unlink(missing_ok=True)
                lines.pop(f"wavs/{row.get('id')}", None)
            write_whole(out / "metadata.csv", "".join(f"{line}\n" for line in lines.values()))
            mark.unlink()
    return gone, ids


def stretches(path, seconds):
    """The stretches of speech in a recording, joined where pauses are short and cut at the longest: (start in seconds,
    wav (samples,), its sample rate, why it is no clip or "")."""
    shortest, longest = seconds
    rest, at = np.zeros(0, np.float32), 0  # what is still to be cut, and the sample that it begins with
    for block, rate, last in blocks(path):
        rest = np.concatenate([rest, block])
        found = divide(speech(rest, rate), shortest * rate, longest * rate, FAR * rate)
        if last:
            keep = len(rest)
        elif found and found[-1][1] - found[-1][0] < BLOCK * rate:  # the last one may go on in the next block
            keep = max(0, found.pop()[0] - round(2 * PAD * rate))
        else:
            keep = max(0, len(rest) - rate)
        for n, (start, end) in enumerate(found):
            before = found[n - 1][1] if n else 0
            after = found[n + 1][0] if n + 1 < len(found) else len(rest)
            start, end = (round(start - min(PAD * rate, (start - before) / 2)),
                          round(end + min(PAD * rate, (after - end) / 2)))
            length = (end - start) / rate
            reason = "" if shortest <= length <= longest + 2 * PAD else f"{length:.1f} s of speech without a pause"
            if length < shortest:
                reason = f"{length:.1f} s of speech alone"
            yield (at + start) / rate, rest[start:end], rate, reason
        rest, at = rest[keep:], at + keep


def blocks(path):
    """A recording in blocks: (wav (samples,), its sample rate, whether it is the last one). Floats, whose scale only
    the whole tells, and what libsndfile does not read, come in one, at OTHERS Hz. Raises UserError where nothing reads
    it, and where it is cut off."""
    import soundfile

    try:
        raw = path.open("rb")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    with raw:
        source, stated = look(path, raw)
        try:
            file = soundfile.SoundFile(source or os.fsencode(path))
        except (soundfile.LibsndfileError, ValueError, TypeError):
            file = None
        if not file or file.subtype in ("FLOAT", "DOUBLE"):
            yield read_recording(path, OTHERS)[0], OTHERS, True
            return
        with file:
            size, there = BLOCK * file.samplerate, 0
            block = file.read(size, dtype="float32", always_2d=True).mean(1)
            while len(block):
                there += len(block)
                after = file.read(size, dtype="float32", always_2d=True).mean(1)
                yield block, file.samplerate, not len(after)
                block = after
            if stated and there < file.frames:
                raise UserError(f"cannot read {path} beyond {there / file.samplerate:.1f} s: {CUT}")


def speech(wav, rate):
    """Where there is speech, between pauses of PAUSE and more: [(start, end)], samples."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    options = VadOptions(min_silence_duration_ms=round(PAUSE * 1000), speech_pad_ms=0)
    return [(round(part["start"] * rate / 16000), min(len(wav), round(part["end"] * rate / 16000)))
            for part in get_speech_timestamps(at_16_khz(wav, rate), options)]


def divide(parts, shortest, longest, far):
    """Parts of speech [(start, end)] as clips: neighbours that are less than `far` apart together, and these divided at
    the longest pause, if possible one that leaves `shortest` on both sides, until none is longer than `longest`. What
    has no pause stays as it is."""
    groups = []
    for part in parts:
        if groups and part[0] - groups[-1][-1][1] < far:
            groups[-1].append(part)
        else:
            groups.append([part])
    clips, todo = [], groups[::-1]
    while todo:
        group = todo.pop()
        start, end = group[0][0], group[-1][1]
        if end - start <= longest or len(group) == 1:
            clips.append((start, end))
            continue

        def at(n):
            """How good it is to divide before part n."""
            return group[n - 1][1] - start >= shortest and end - group[n][0] >= shortest, group[n][0] - group[n - 1][1]

        best = max(range(1, len(group)), key=at)
        todo += [group[best:], group[:best]]
    return clips
