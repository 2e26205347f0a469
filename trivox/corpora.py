"""Corpora: folders of recordings with their texts, read.

A corpus is a folder with recordings anywhere below it and a list of them (trivox/metadata.py): `metadata.csv` in
LJSpeech's layout, for one, whose recordings are `wavs/<id>.wav`, of any rate; or what they say stands in files beside
them (trivox/beside.py). Links are followed, to files and to
folders; what is hidden, as .git is, is passed over. Where there is a `heldout.txt`, an id a line, it names the clips
for validation; else some of those that can be used are drawn by hash, 2 % for log-mels and 5 % for tokens.
`grammar.jsgf` says which sentences can occur, for evaluate.py.
"""

import csv
import difflib
import hashlib
import os
import shutil
import unicodedata
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path, PurePosixPath

from trivox.beside import OTHERS, find_texts, is_text, read_beside
from trivox.common import UserError
from trivox.files import lines_of, write_whole
from trivox.metadata import LISTS, read_list
from trivox.recordings import AUDIO_ENDINGS

LJSPEECH_URL = "https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2"
LJSPEECH_SHA256 = "be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5"
FIRST = 3  # clips that are shown as they were understood
LIST_ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xlsx", ".xls", ".ods", ".parquet", ".lst", ".list")


MARK = ".made_by_trivox"  # in a corpus that a demo has made, and may make anew


def claim(root, names, made_before):
    """Make or take a folder for a corpus of a demo, and mark it as such. names: what it will have in it.

    made_before: whether it is known to be a demo's, as those of before there was the mark. Raises UserError where it is
    not and holds any of `names`.
    """
    for name in names:
        if (root / name).exists() and not made_before and not (root / MARK).exists():
            raise UserError(f"{root} has a {name} that no demo has made, and that would be overwritten: name another "
                            "--root, or an --out where there is none")
    root.mkdir(parents=True, exist_ok=True)
    write_whole(root / MARK, "This corpus is made by python data.py, which may make it anew: nothing here is kept.\n")


def download_ljspeech(folder):
    """Download LJSpeech 1.1, check its checksum and unpack it. Returns the corpus folder."""
    import pooch

    corpus, part = folder / "LJSpeech-1.1", folder / ".LJSpeech-1.1.part"
    if (corpus / "metadata.csv").exists():
        return corpus
    if corpus.exists():
        raise UserError(f"{corpus} has no metadata.csv: delete it, and it is downloaded again")
    print(f"LJSpeech 1.1: downloading 2.6 GB from {LJSPEECH_URL} (public domain)")
    try:
        archive = pooch.retrieve(LJSPEECH_URL, f"sha256:{LJSPEECH_SHA256}", "LJSpeech-1.1.tar.bz2", folder,
                                 progressbar=True)
    except Exception as e:  # offline, refused, wrong checksum
        raise UserError(f"cannot download {LJSPEECH_URL} ({type(e).__name__}); unpack it at {corpus}, or give its "
                        "folder as --root") from None
    shutil.rmtree(part, ignore_errors=True)
    shutil.unpack_archive(archive, part, filter="data")  # killed meanwhile, it leaves no half of a corpus
    (part / corpus.name).replace(corpus)
    part.rmdir()
    return corpus


class Recordings:
    """The recordings below the folder `root`: `paths`, sorted, as they stand under it, with / between their names; and
    `texts`, likewise, the files that may say what they say."""

    def __init__(self, root):
        def refused(e):
            raise UserError(f"cannot read {e.filename} ({e.strerror}): make it readable, or move it out of "
                            f"{root}") from None

        if not Path(root).is_dir():
            raise UserError(f"there is no folder {root}")
        self.root, self.paths, self.texts = Path(root), [], []
        above = {}  # the true paths of a folder and of those it is in
        for folder, folders, files in os.walk(root, followlinks=True, onerror=refused):
            folders[:] = [name for name in folders if not name.startswith(".")]
            real, outer = os.path.realpath(folder), above.get(os.path.dirname(folder), frozenset())
            if real in outer:  # a link to a folder that it lies in
                folders.clear()
                continue
            above[folder] = outer | {real}
            inside = Path(folder).relative_to(root).as_posix()
            seen = [name for name in files if not name.startswith(".")]
            self.paths += [f"{inside}/{name}".removeprefix("./") for name in seen if ending_of(name)]
            self.texts += [f"{inside}/{name}".removeprefix("./") for name in seen if is_text(name)]
        self.paths.sort(), self.texts.sort()
        self.exact, self.bare, self.called = {}, {}, defaultdict(list)  # by the path; without ending; by the name alone
        for path in self.paths:
            plain = unicodedata.normalize("NFC", path)
            self.exact[plain] = path
            bare = without_ending(plain)
            if bare not in self.bare or rank(plain) < rank(self.bare[bare]):
                self.bare[bare] = plain
            self.called[bare.rpartition("/")[2]].append(plain)

    def find(self, name):
        """The path of the recording that a list calls `name`: where it stands under root or under wavs/, with its
        ending or without, or the end of such a path where only one ends so.

        Raises UserError for a name that leads out of the corpus, that fits several, and that is nowhere.
        """
        plain = unicodedata.normalize("NFC", slashed(name))
        if (path := PurePosixPath(plain)).is_absolute():
            roots = [r for r in (os.path.abspath(self.root), os.path.realpath(self.root)) if path.is_relative_to(r)]
            if not roots:
                raise UserError(f"it leads out of {self.root}")
            plain = str(path.relative_to(roots[0]))
        plain = os.path.normpath(plain)
        if plain.split("/")[0] == "..":
            raise UserError(f"it leads out of {self.root}")
        for name in (plain, without_ending(plain)):
            for whole in (f"wavs/{name}", name):
                if whole in self.exact or whole in self.bare:
                    return self.there(self.exact[whole if whole in self.exact else self.bare[whole]])
        for bare in dict.fromkeys((plain, without_ending(plain))):
            fit = [path for path in self.called.get(bare.rpartition("/")[2], ())
                   if f"/{without_ending(path)}".endswith(f"/{bare}")]
            if len({without_ending(path) for path in fit}) > 1:
                raise UserError(f"it can be {fit[0]} and {fit[1]}: write the folder before the name")
            if fit:
                return self.there(self.exact[min(fit, key=rank)])
        raise UserError(f"cannot read {plain[:200]}: there is no such recording below {self.root}")

    def beside(self):
        """Where the texts of recordings stand that have files of their own, as `find_texts` returns it: ({}, those that
        there are) where fewer than half of the recordings have one."""
        found, left = find_texts(self.root, {path: without_ending(path) for path in self.paths}, self.texts)
        return (found, left) if len(found) * 2 >= len(self.paths) else ({}, [path for path, _ in found.values()])

    def there(self, path):
        """The same path. Raises UserError for a link to what is not here."""
        whole = self.root / path
        if whole.is_symlink() and not whole.exists():
            raise UserError(f"{path} is a link to {os.readlink(whole)}, and nothing is there: fetch it (git annex "
                            "get, for one), or mend the link")
        return path

    def has(self, name):
        """Whether there is one recording of that name."""
        try:
            return bool(self.find(name))
        except UserError:
            return False


def slashed(name):
    """A file's name with / between folders, and without the file:// of an address."""
    return (name.replace("\\", "/") if "\\" in name else name).removeprefix("file://")


def ending_of(name):
    """The ending of a recording's name, in lower case; "" of anything else's."""
    ending = os.path.splitext(name)[1].lower()
    return ending if ending in AUDIO_ENDINGS else ""


def rank(name):
    """Of recordings that differ in their endings alone, the one of the lowest rank is taken."""
    return AUDIO_ENDINGS.index(ending_of(name))


def without_ending(name):
    return name[:-len(ending)] if (ending := ending_of(name)) else name


def clip_path(root, id):
    """Where a corpus that is made here has a clip: wavs/<id>.wav. Raises UserError for an id that leads out of wavs/,
    or can be no file's name."""
    path = root / "wavs" / f"{id}.wav"
    if not os.path.normpath(path).startswith(os.path.normpath(root / "wavs") + os.sep):
        raise UserError(f"the id {id!r} leads out of wavs/")
    try:
        path.exists()
    except (OSError, ValueError) as e:  # too long, a zero byte
        raise UserError(f"the id {id[:40]!r} names no file ({getattr(e, 'strerror', None) or e})") from None
    return path


def find_list(root):
    """The list of clips of a corpus; None where there is none. A .json that is no array may be about anything."""
    by_name = {path.name.lower(): path for path in sorted(root.iterdir(), reverse=True) if path.is_file()} \
        if root.is_dir() else {}
    if (festival := root / "etc" / "txt.done.data").is_file():
        by_name.setdefault(festival.name, festival)
    found = [by_name[name] for name in LISTS if name in by_name and (
        not name.endswith(".json") or begins_array(by_name[name]))]
    if len(found) > 1:
        print(f"note: {root} has {' and '.join(path.name for path in found)}: the first is read, --metadata names "
              "another")
    return found[0] if found else None


def begins_array(path):
    with suppress(OSError), path.open("rb") as file:
        return file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    return False


def has_texts(root):
    """Whether a corpus says what its recordings say, in a list or beside them."""
    return bool(find_list(root) or Recordings(root).beside()[0])


def few_texts(recordings, left):
    """In words. left: the texts that `Recordings.beside` has found where they are too few."""
    return (f"{len(left):,} of {len(recordings.paths):,} recordings of {recordings.root} have a text beside them, such "
            f"as {left[0]}: too few to be its texts")


def other_lists(root):
    """Files of a corpus without a list that may be one under another name."""
    stems = {path.stem for folder in (root, root / "wavs") if folder.is_dir() for path in folder.iterdir()
             if ending_of(path.name)}  # beside one of which a text is that recording's
    known = OTHERS | {"speakers.json", "dropped.csv"}
    return [path for folder in (root, root / "wavs", root / "filelists") if folder.is_dir() for path in sorted(
        folder.iterdir()) if path.suffix.lower() in LIST_ENDINGS
            and path.name.lower() not in known and not path.name.startswith(".")
            and not (is_text(path.name) and path.stem in stems)]


def clip_id(path, ids):
    """What the clip of a recording is called in a data set: its path without wavs/ and, unless another is called so,
    without the ending. ids: {id: path} of those before, to which it is added."""
    id = path.removeprefix("wavs/")
    if ids.setdefault(without_ending(id), path) == path:
        return without_ending(id)
    ids[id] = path
    return id


def read_corpus(root, metadata=None, columns=None, drop=None):
    """The clips of a corpus, in the order of its list, or of their names where it has none: dicts of id, text, speaker
    and source, the recording's path under `root`; of one that cannot be used, why as `skipped`. Beside them what is
    held out: the sources that heldout.txt names, a set, or None where there is no such file. How the list was
    understood is told, with its first clips.

    columns, metadata: as of `read_list`. drop: an audit.csv, whose marked clips cannot be used. Raises UserError as it
    does, where there is no recording, and for a line of heldout.txt or of `drop` that names no clip.
    """
    recordings = Recordings(root)
    if metadata is not None and not metadata.exists() and (root / metadata).exists():
        metadata = root / metadata
    if metadata is None and not (metadata := find_list(root)):
        if not recordings.paths:
            raise UserError(f"{root} holds neither a list of clips ({', '.join(LISTS)}) nor a recording "
                            f"({', '.join(AUDIO_ENDINGS)})")
        if columns:
            raise UserError(f"{root} has no list of clips that --columns could be about: --metadata names one")
        found, left = recordings.beside()
        if found:
            ids, bare = {}, {path: without_ending(path) for path in recordings.paths}
            clips = read_beside(recordings.root, bare, found, lambda path: clip_id(path, ids))
            leave_out(clips, drop)
            if left:
                print(f"note: {len(left):,} texts beside recordings of {root} are of none of them, such as {left[0]}")
            show(f"{root}: texts in files such as {min(path for path, _ in found.values())}", clips)
            return clips, held_out(recordings, called(clips))
        if left:
            print(f"note: {few_texts(recordings, left)}, and it is read without texts")
        elif others := other_lists(root):
            print(f"note: {root} has no list of clips under a name that is known, and is read without texts; it has "
                  f"{', '.join(path.name for path in others[:3])}{', …' * (len(others) > 3)}: --metadata names a list")
        elif recordings.texts:
            print(f"note: {len(recordings.texts):,} files of text below {root}, such as {recordings.texts[0]}, are of "
                  "no recording that shows, and it is read without texts")
        clips = bare_clips(recordings)
        leave_out(clips, drop)
        return clips, held_out(recordings, called(clips))
    clips, layout = read_list(metadata, columns, recordings.has)
    outer = outer_folders([slashed(clip["id"]) for clip in clips if "skipped" not in clip], recordings)
    if outer:
        print(f"note: {metadata} names recordings by {outer}/, which is left out: they are below {root}")
    seen, names, ids = {}, {}, {}
    for clip in clips:
        line, clip["source"], name = clip.pop("line"), clip["id"], clip["id"]
        if "skipped" in clip:
            continue
        try:
            clip["source"] = recordings.find(slashed(name).removeprefix(f"{outer}/") if outer else name)
        except UserError as e:
            clip["skipped"] = str(e)
            continue
        names[name] = clip["source"]
        clip["id"] = clip_id(clip["source"], ids)
        if clip["source"] in seen:
            clip["skipped"] = f"line {line} of {metadata.name} names it again, after line {seen[clip['source']]}"
        seen.setdefault(clip["source"], line)
    leave_out(clips, drop)
    heldout = held_out(recordings, names | called(clips))
    if not int(os.environ.get("RANK") or 0):
        if unnamed := [path for path in recordings.paths if path not in seen]:
            print(f"note: {metadata} names none of {len(unnamed):,} recordings of {root}, such as {unnamed[0]}")
        show(f"{metadata}: {layout}", clips)
    return clips, heldout


def show(how, clips):
    """Print how a corpus was understood, with its first clips."""
    if not int(os.environ.get("RANK") or 0):
        print(f"{how}; {len(clips):,} clips, of which the first are")
        for clip in [clip for clip in clips if "skipped" not in clip][:FIRST]:
            print(f"    {clip['source']}: {clip['text'][:99]!r}, {clip['speaker'] or 'no speaker named'}")


def tell_language(clips, language):
    """Say where many texts have letters that English has not, and yet are read as English."""
    texts = [clip["text"] for clip in clips if clip.get("text")]
    letters = [{c for c in text if c.isalpha() and not c.isascii()} for text in texts]
    if language == "en" and sum(map(bool, letters)) > 0.1 * len(texts):
        some = " ".join(c for c, _ in Counter(c.lower() for found in letters for c in found).most_common(5))
        print(f"note: {sum(map(bool, letters)) / len(texts):.0%} of the texts have letters such as {some}, and their "
              "numbers are read in English: --language de and so on says what they are in")


def leave_out(clips, drop):
    """Mark the clips that an audit.csv marks in its column `drop` as skipped. Raises UserError for one that it names
    and that there is not, and for a file of another kind."""
    if drop is None:
        return
    reader = csv.DictReader(lines_of(drop), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as e:
        raise UserError(f"line {reader.line_num} of {drop} is no line of a CSV file ({e})") from None
    if not {"id", "drop"} <= {*(reader.fieldnames or ())}:
        raise UserError(f"{drop} should have the columns id and drop, as evaluate.py audit writes them")
    of = defaultdict(list)
    for clip in clips:
        of[clip["id"]].append(clip)
    for number, row in rows:
        if (row["drop"] or "").strip().lower() in ("", "no", "n", "false", "0"):
            continue
        if row["id"] not in of:
            near = difflib.get_close_matches(str(row["id"])[:99], of, 1, cutoff=0)
            raise UserError(f"line {number} of {drop} is about {row['id']!r}, no clip's id; the nearest is {near[0]!r}")
        for clip in of[row["id"]]:
            clip.setdefault("skipped", f"{drop.name} marks it to be dropped")


def called(clips):
    """What each clip can be called: {its id, its recording's path, with the ending and without: that path}."""
    named = {}
    for clip in clips:
        for name in (clip["source"], clip["id"], without_ending(clip["source"])):
            named.setdefault(unicodedata.normalize("NFC", name), clip["source"])
    return named


def bare_clips(recordings):
    """The clips of a folder without a list. Those that are links to others of it are left out, and counted."""
    root, clips, linked, ids = recordings.root, [], 0, {}
    own = {path for path in recordings.paths if os.path.realpath(root / path) == os.path.realpath(root) + f"/{path}"}
    for path in recordings.paths:
        clips.append({"id": clip_id(f"wavs/{path}", ids), "text": "", "speaker": "", "source": path})
        if path not in own:
            real = os.path.realpath(root / path)
            if os.path.relpath(real, os.path.realpath(root)) in own:
                linked += 1
                clips.pop()
            elif not os.path.exists(real):
                clips[-1]["skipped"] = f"it is a link to {os.readlink(root / path)}, and nothing is there"
    if linked:
        print(f"note: {linked} recordings of {root} are links to others of it, and are left out")
    return clips


def outer_folders(ids, recordings):
    """Folders that all ids begin with and that are not here, as those of the machine on which a list was made; "" where
    recordings are found as they are called, or not without these folders either."""
    if not ids or any(map(recordings.has, ids)):
        return ""
    shared = os.path.commonpath(ids) if len({id.startswith("/") for id in ids}) == 1 else ""
    if len(ids) == 1:
        shared = os.path.dirname(shared)
    folders = [folder for folder in shared.split("/") if folder != ".."]
    for n in range(1, len(folders) + 1):
        drop = "/".join(folders[:n])
        if drop and sum(recordings.has(id.removeprefix(f"{drop}/")) for id in ids) * 2 > len(ids):
            return drop
    return ""


def held_out(recordings, names):
    """What heldout.txt names for validation, a set of sources; None where there is no such file. names: {what a clip is
    called: its source}. Raises UserError for a line that is none of them."""
    if not (path := recordings.root / "heldout.txt").exists():
        return None
    found, sources = set(), {*names.values()}
    for number, line in enumerate(lines_of(path), 1):
        if not (name := unicodedata.normalize("NFC", line.strip())):
            continue
        try:
            source = names.get(name) or recordings.find(name)
        except UserError:
            source = None
        if source not in sources:
            near = difflib.get_close_matches(name[:99], names, 1, cutoff=0)
            raise UserError(f"line {number} of {path} is {name[:99]!r}, no clip's id; the nearest is {near[0]!r}")
        found.add(source)
    return found


def file_stamp(path):
    try:
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns
    except (OSError, ValueError):  # none is there, or its name can be none
        return None


def draw_key(id):
    """What an id, or the name of a file, is drawn by. A name that is no UTF-8 keeps its bytes."""
    return hashlib.sha256(id.encode("utf-8", "surrogateescape")).digest()


def draw_validation(ids, share=0.02):
    """A share of the ids, at least one where there are two, chosen by hash: the same in any order, on any machine."""
    ranked = sorted(ids, key=draw_key)
    return set(ranked[:max(round(share * len(ids)), int(len(ids) > 1))])
