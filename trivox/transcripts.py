"""Transcripts of recordings that have none, by Whisper: the list of clips of a folder that has no list."""

import json

import torch
from tqdm import tqdm

from trivox.common import UserError
from trivox.corpora import Recordings, few_texts, without_ending
from trivox.files import lines_of, read_rows, write_whole
from trivox.metadata import LISTS
from trivox.recognisers import load_recogniser
from trivox.recordings import read_wav

HEARD = 16  # recordings between two times that what was heard is written down


def is_utf8(path):
    """Whether the name of a file can stand in a file of UTF-8."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def transcribe(root, out, language="en", model=None):
    """Write out/metadata.csv for a folder of bare recordings, by Whisper. Goes on where a killed run stopped.

    What stands in that file already, corrected perhaps, stays. language: a code such as de. model: one that openai-
    whisper knows, or a file of weights; None for base. What cannot be read is told, and has no line. Raises
    UserError without weights, and where there is no recording.
    """
    recordings, growing = Recordings(root), out / "transcripts.jsonl"
    if not recordings.paths:
        raise UserError(f"{root} holds neither a list of clips ({', '.join(LISTS)}) nor recordings")
    if left := recordings.beside()[1]:
        print(f"note: {few_texts(recordings, left)}, and Whisper hears all")
    paths, before = can_be_listed(recordings.paths), transcribed(out)
    names = {path: clip_name(recordings, path) for path in paths}
    if before and before.keys() >= {*names.values()}:
        return out / "metadata.csv"
    try:
        what, hear = load_recogniser("whisper", device="cuda" if torch.cuda.is_available() else "cpu",
                                     language=language, model=model)
    except UserError as e:
        raise UserError(f"{root} has no list of clips, and Whisper, which would write it, cannot: {e}") from None
    out.mkdir(parents=True, exist_ok=True)
    by = {"by": what, "language": language}
    rows = [row for _, row in read_rows(growing, grows=True)] if growing.exists() else []
    heard = {row["path"]: row["text"] for row in rows[1:] if {*row} == {"path", "text"}} if rows[:1] == [by] else {}
    todo = [path for path in paths if path not in heard and names[path] not in before]
    print(f"{root} has no list of clips: {what} hears {len(todo):,} recordings of {len(paths):,}, language {language} "
          "(--language, --whisper); the others have been heard before")
    write_whole(growing, "".join(json.dumps(row) + "\n" for row in [by, *(
        {"path": path, "text": text} for path, text in heard.items())]))
    bar = tqdm(None, "transcribing", len(todo), unit=" clips")
    with growing.open("a", encoding="utf-8") as file, bar:
        for some in (todo[i:i + HEARD] for i in range(0, len(todo), HEARD)):
            wavs = {}
            for path in some:
                try:
                    wavs[path] = read_wav(root / path, 16000)
                except UserError as e:
                    print(f"skipped {path}: {e}")
            for path, text in zip(wavs, hear([*wavs.values()], 16000)):
                heard[path] = " ".join(text.replace("|", " ").split())
                file.write(json.dumps({"path": path, "text": heard[path]}) + "\n")
            file.flush()
            bar.update(len(some))
    lines = [f"{name}|{heard[path]}|{heard[path]}" for path, name in names.items() if path in heard]
    write_whole(out / "metadata.csv", "".join(f"{line}\n" for line in [*before.values(), *lines]))
    growing.unlink()
    return out / "metadata.csv"


def clip_name(recordings, path):
    """What a list calls a recording: its path without the ending, unless another one would be taken for it."""
    return bare if recordings.find(bare := without_ending(path)) == path else path


def transcribed(out):
    """The lines of out/metadata.csv that there are: {name of the recording: line}."""
    path = out / "metadata.csv"
    return {line.split("|")[0]: line for line in lines_of(path) if line} if path.exists() else {}


def can_be_listed(paths):
    """Those paths that can stand in metadata.csv. Of others it is told that they cannot."""
    can = []
    for path in paths:
        if not is_utf8(path):
            print(f"skipped {path!r}: its name is no UTF-8, as metadata.csv is: rename it")
        elif set(path) & {"|", "\n", "\r"} or path != path.strip() or path.startswith('"'):
            print(f"skipped {path!r}: its name would break its line of metadata.csv: rename it")
        else:
            can.append(path)
    return can
