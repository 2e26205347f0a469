"""Texts in files of their own: what a recording says stands in a file beside it (as in LibriTTS, or for the Montreal
aligner), in a folder like its own (VCTK), or in one file with a line for each recording of a folder (LibriSpeech)."""

import re
import unicodedata
from collections import defaultdict

from trivox.common import UserError
from trivox.files import lines_of

ONE = (".normalized.txt", ".txt", ".lab", ".original.txt")  # endings of the file of one recording, the best first
MANY = (".trans.tsv", ".trans.txt")  # of the file of a folder: ids, and behind a tab or a blank what they say
OTHERS = {"heldout.txt", "readme.txt", "license.txt", "licence.txt", "copying.txt", "speakers.txt", "speaker-info.txt"}
MICROPHONE = re.compile(r"_mic(\d)$")  # VCTK has each sentence twice
LABEL = re.compile(r"\s*\d+(?:\.\d+)?\s+\d+(?:\.\d+)?\s+\S+\s*|0 \d{3,} .*")  # when a sound begins and ends; TIMIT's


def is_text(name):
    """Whether a file may hold what recordings say, by its name."""
    return name.lower().endswith(ONE + MANY) and name.lower() not in OTHERS


def find_texts(root, bare, texts):
    """Where the text of each recording stands: {its path: (the file's path, its line there, or None for all of it)};
    and those texts beside them that are of no recording, a list.

    bare: {path of a recording below `root`: the same without its ending}. texts: paths of the files `is_text` takes.
    """
    beside, named, lines, found, used = defaultdict(dict), defaultdict(set), {}, {}, set()
    places = defaultdict(set)  # in which folders recordings of a name are
    for stem in bare.values():
        places[MICROPHONE.sub("", unicodedata.normalize("NFC", name_of(stem)))].add(folder_of(stem))
    for path in texts:
        plain = unicodedata.normalize("NFC", path)
        if plain.lower().endswith(MANY):
            for id, text in read_lines(root / path):
                lines[f"{folder_of(plain)}/{id}".removeprefix("/")] = path, text
            continue
        ending = next(ending for ending in ONE if plain.lower().endswith(ending))
        beside[stem := plain[:-len(ending)]][ending] = path
        named[name_of(stem)].add(stem)
    for path, stem in bare.items():
        stem = unicodedata.normalize("NFC", stem)
        if stem not in beside and stem not in lines:  # wav48/p225/p225_001_mic1.flac and txt/p225/p225_001.txt
            stem = MICROPHONE.sub("", stem)
            others = named.get(name_of(stem), ())
            if len(others) > 1 or len(places[name_of(stem)]) > 1:
                others = [other for other in others if "/" in stem and last_two(other) == last_two(stem)]
            stem = min(others) if len(others) == 1 else stem
        if stem in beside:
            found[path] = beside[stem][min(beside[stem], key=ONE.index)], None
        elif stem in lines:
            found[path] = lines[stem]
        used.add(stem)
    folders = {folder_of(stem) for stem in used if stem in beside}
    left = [min(beside[stem].values()) for stem in beside if stem not in used and folder_of(stem) in folders]
    return found, sorted(left + [stem for stem in lines if stem not in used])


def folder_of(path):
    return path.rpartition("/")[0]


def name_of(path):
    return path.rpartition("/")[2]


def last_two(path):
    return "/".join(path.split("/")[-2:])


def read_lines(path):
    """(id, text) of each line of a folder's file; of a text and its normalized form the latter."""
    mark = "\t" if path.name.lower().endswith(".tsv") else None
    for line in lines_of(path):
        if line.strip():
            id, *said = line.split(mark, 2 if mark else 1)
            yield id.strip(), (said or [""])[-1]


def read_text(root, file, line):
    """What a recording says, with single blanks. Raises UserError where nothing stands there, or no text."""
    lines = [one for one in (lines_of(root / file) if line is None else [line]) if one.strip()]
    said = " ".join(" ".join(lines).split())
    if not said:
        raise UserError(f"{file} has no text" if line is None else f"{file} has no text for it")
    if (len(lines) > 1 or said.startswith("0 ")) and all(map(LABEL.fullmatch, lines)):
        raise UserError(f"{file} tells when each sound begins and ends, and has no text")
    return said


def speaker_of(path):
    """The folder with whose name a recording's begins, as in 19/198/19_198_0003 and p225/p225_001; "" for none."""
    *folders, name = path.split("/")
    return next((folder for folder in folders if re.match(rf"{re.escape(folder)}[_-]", name)), "")


def read_beside(root, bare, found, clip_id):
    """The clips of a folder whose texts `find_texts` has found, as `corpora.read_corpus` returns them. clip_id: what
    gives a recording's path its id."""
    clips, names = [], {*bare.values()}
    for path, stem in bare.items():
        clips.append(clip := {"id": clip_id(path), "text": "", "speaker": speaker_of(stem), "source": path})
        microphone = MICROPHONE.search(stem)
        try:
            if path not in found:
                raise UserError("no file with its text stands beside it")
            if microphone and microphone[1] != "1" and MICROPHONE.sub("_mic1", stem) in names:
                raise UserError("it is what the first microphone has, too")
            clip["text"] = read_text(root, *found[path])
        except UserError as e:
            clip["skipped"] = str(e)
    return clips
