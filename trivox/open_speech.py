"""Open speech: LJSpeech's sentences, of which a corpus of any English words is spoken.

The sentences are those of LJSpeech 1.1 by Keith Ito (https://keithito.com/LJ-Speech-Dataset/), from books that are in
the public domain, as the data set itself is. `ljspeech_sentences.txt.xz` has the normalised ones as
`normalise_text` wrote them while it left Mr. and other abbreviations alone, the first of those that are equal; they are
put in words where a corpus of them is prepared. It was made by

    python -c "from trivox.open_speech import pack; pack('data/LJSpeech-1.1/metadata.csv')"
"""

import lzma
import random
import re
from pathlib import Path

from trivox.common import UserError
from trivox.metadata import read_transcripts
from trivox.files import write_whole
from trivox.normalise import normalise_text
from trivox.synthesisers import CHARACTERS_A_SECOND, not_its_own, speak_corpus

SENTENCES = Path(__file__).with_name("ljspeech_sentences.txt.xz")
SOURCE = "# LJSpeech 1.1 by Keith Ito, public domain, https://keithito.com/LJ-Speech-Dataset/ : id|normalised text\n"


def pack(metadata, path=SENTENCES):
    """Write the sentences of LJSpeech's metadata.csv into `path`: after a line that says whose they are, lines
    id|text, compressed."""
    lines = "".join(f"{id}|{text}\n" for id, text in distinct(metadata))
    write_whole(Path(path), lzma.compress((SOURCE + lines).encode(), preset=9 | lzma.PRESET_EXTREME))


def sentences():
    """The 13,074 sentences of LJSpeech, in its order: a list of (id, text)."""
    lines = lzma.decompress(SENTENCES.read_bytes()).decode().splitlines()
    return [tuple(line.split("|")) for line in lines[1:]]


def distinct(metadata):
    """The sentences of a metadata.csv, or of a text with one a line, normalised: a list of (id, text), the first of
    those that are equal. It tells how many were left out."""
    clips, ids = read_transcripts(metadata), {}
    for clip in clips:
        ids.setdefault(normalise_text(clip["text"], accents=True), clip["id"])
    if len(ids) < len(clips):
        print(f"note: {len(clips) - len(ids):,} of {len(clips):,} sentences are left out, as they were there before")
    return [(id, text) for text, id in ids.items()]


def make_open_corpus(root, voices, hours=None, heldout=512, transcripts=None):
    """Speak LJSpeech's sentences, or those of a file, into a corpus at `root`; `heldout` of them are marked.

    The voices take turns. hours: about so much speech to train on, beside what is held out, drawn such that more hours
    contain the fewer; None is for all. transcripts: as of `make_demo_corpus`. What is held out depends on neither hours
    nor voices, and no text of it is trained on, in whatever case and punctuation.

    Raises UserError as `speak_corpus` does, and where nothing would be left to train on.
    """
    rows = distinct(transcripts) if transcripts else sentences()
    not_its_own(transcripts, root)
    if heldout >= len(rows):
        raise UserError(f"{heldout} of {len(rows)} sentences held out leave none to train on")
    marked = random.Random(0).sample(rows, heldout)
    words = {bare(text) for _, text in marked}
    train = [row for row in rows if bare(row[1]) not in words]
    if alike := len(rows) - heldout - len(train):
        print(f"note: {alike} sentences are left out, as their words are those of one that is held out")
    keep, seconds = {*marked}, 0.0
    for row in random.Random(1).sample(train, len(train)):
        if hours and seconds >= hours * 3600:
            break
        keep.add(row)
        seconds += len(row[1]) / CHARACTERS_A_SECOND
    else:
        if hours and seconds < hours * 3600:
            print(f"note: all sentences together last about {seconds / 3600:.2f} h, less than --hours {hours:g}")
    clips = [(*row, voices[i % len(voices)]) for i, row in enumerate(rows) if row in keep]
    speak_corpus(root, clips, [id for id, _ in marked])


def bare(text):
    """The words of a text, in lower case, without punctuation."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))
