"""What speaks: the voices of hibari and of espeak-ng, by name, and corpora of what they say.

hibari (package hibari-tts, Apache 2.0) is neural, speaks English, and has its voice `heart` in the package; its other
voices are downloaded on first use. Its NOTICE: distilled from Kokoro-82M's voice af_heart, by hexgrad (Apache 2.0). It
is an extra package, so all that must work goes without: espeak-ng, which is of the nineties and speaks every text.
"""

import re
import unicodedata
from functools import cache

from tqdm import tqdm

from trivox.common import UserError
from trivox.corpora import claim, clip_path
from trivox.espeak import espeak, speak_espeak, take_voice
from trivox.files import drop_parts, write_whole
from trivox.normalise import normalise_text
from trivox.parallel import parallel
from trivox.recordings import write_wav

HIBARI_VOICES = "heart", "emma", "fable", "fenrir", "kore"  # women: heart, emma, kore; British: emma, fable
CHARACTERS_A_SECOND = 17.4  # of heart, on LJSpeech's sentences; espeak-ng's en-us is a seventh faster


def default_voice():
    """The voice that speaks unless another is asked for: heart, or en-us where heart cannot be had, with a note."""
    try:
        check_voice("heart")
    except UserError as e:
        print(f"note: espeak-ng's voice en-us speaks, as {e}", flush=True)
        return "en-us"
    return "heart"


def check_voice(voice):
    """Raises UserError for a voice that cannot speak here: an unknown one, one of hibari without hibari, one that
    cannot be downloaded."""
    if voice in HIBARI_VOICES:
        hibari(voice)
    else:
        try:
            take_voice(voice)
        except UserError as e:
            raise UserError(f"{e}; hibari has {', '.join(HIBARI_VOICES)}") from None


def speak(text, voice):
    """Speak one text. Returns ((samples,) float32 in [-1, 1], sample rate in Hz); hibari says a text the same each
    time, espeak-ng not quite.

    Raises UserError as `check_voice` does, and for a text that the voice would not say, or not all of it.
    """
    if not any(map(str.isalnum, text)):
        raise UserError(f"there is nothing to say in {text[:40]!r}: it has no letter and no digit")
    if voice in HIBARI_VOICES:
        wav, rate = speak_hibari(text, voice), 24000
    else:
        wav, rate = speak_espeak(text, voice), espeak()[1]
    if not len(wav):
        raise UserError(f"the voice {voice} says nothing for {text[:40]!r}")
    return wav, rate


# ------------------------------------------------------------------------------------------------------------
# hibari

@cache
def hibari(voice):
    """hibari with a voice, one a process: it takes half a second. Raises UserError where it cannot be had."""
    try:
        from hibari import Hibari
    except ImportError:
        raise UserError(f"the voice {voice} needs the package hibari-tts, which is not installed: "
                        "pip install --no-deps -r requirements-extra.txt") from None
    try:
        return Hibari(voice)
    except Exception as e:  # offline, a damaged file, a voice that this version has not
        raise UserError(f"the voice {voice} cannot be loaded ({' '.join(str(e).split())}); heart is in the package "
                        "hibari-tts itself") from None


def speak_hibari(text, voice="heart"):
    """(samples,) float32 at 24,000 Hz. Numbers are in words first, as models read them. Raises UserError for letters
    and signs that hibari would leave out in silence, or read as their names."""
    model, text = hibari(voice), normalise_text(text, accents=True)
    if unsaid := [c for c in dict.fromkeys(text) if not says(voice, c)]:
        raise UserError(f"the voice {voice} cannot say {''.join(unsaid)[:20]!r} in {text[:40]!r}: it speaks English")
    if long := re.search(r"[^\W\d_]{25,}", text):  # of which it would say the beginning
        raise UserError(f"the voice {voice} cannot say {long[0][:40]!r}: it reads words of at most 24 letters")
    return trimmed(model(text.replace("](", "] ("), seed=0), 24000)  # for hibari, [a](/b/) is "a", said as "b"


def trimmed(wav, rate, silence=0.1):
    """A recording with so many seconds of silence at its ends at most, as what is 40 dB below its loudest is taken
    for. hibari leaves a quarter of a second before a sentence and half of one behind."""
    import librosa

    _, (start, end) = librosa.effects.trim(wav, top_db=40)
    margin = round(silence * rate)
    return wav[max(0, start - margin):end + margin]


@cache
def says(voice, c):
    """Whether hibari has a sound for a character, or need have none. Cyrillic letters, say, it reads as their names."""
    if c.isascii():
        return c.isprintable()
    return not (c.isalpha() and "LATIN" not in unicodedata.name(c, "")) and any(hibari(voice).phonemize(c))


# ------------------------------------------------------------------------------------------------------------
# Corpora

def speak_corpus(root, clips, heldout, known=lambda lines: False, grammar=None):
    """Speak clips, a list of (id, text, voice), into a corpus at `root`, on all cores. Goes on where a killed call
    stopped: what is there and is of the same text and voice stays.

    heldout: the ids that heldout.txt is to name. known: whether the lines of a metadata.csv are those of a corpus that
    may be made anew. grammar: the text of grammar.jsgf, if there is to be one. What cannot be said is listed with the
    reason, and has no recording.

    Raises UserError, before anything is written, for a voice that cannot speak, for hostile ids and one that comes
    twice, and where `root` holds another's corpus; afterwards where nothing could be said.
    """
    for voice in dict.fromkeys(voice for *_, voice in clips):
        check_voice(voice)
    paths = {}
    for id, *_ in clips:
        if id in paths:
            raise UserError(f"two sentences have the id {id!r}: give each its own")
        paths[id] = clip_path(root, id)  # that of a hostile id is refused
    metadata, lines = root / "metadata.csv", [f"{id}|{text}|{text}|{voice}\n" for id, text, voice in clips]
    spoken = read_lines_of(metadata)
    claim(root, ("metadata.csv", "wavs", "heldout.txt", "grammar.jsgf"), known(spoken) or spoken == lines)
    before = {*spoken}
    for path, line in zip(paths.values(), lines):
        if line not in before:  # a recording of another text or voice
            path.unlink(missing_ok=True)
    write_whole(metadata, "".join(lines))
    write_whole(root / "heldout.txt", "".join(id + "\n" for id in heldout))
    if grammar:
        write_whole(root / "grammar.jsgf", grammar)
    else:
        (root / "grammar.jsgf").unlink(missing_ok=True)
    drop_parts(root / "wavs")
    unsaid = []
    hours = [len(text) / CHARACTERS_A_SECOND / 3600 for _, text, _ in clips]
    bar = tqdm(None, "speaking", sum(hours), leave=False, bar_format="{desc}: {percentage:.0f}% {bar} about "
               "{n:.2f} of {total:.2f} h of speech [{elapsed}, {remaining} left]")
    with parallel() as pool, bar:
        jobs = [(clip_path(root, id), text, voice) for id, text, voice in clips]
        for (id, *_), some, reason in zip(clips, hours, pool.map(_speak_clip, jobs, chunksize=16)):
            bar.update(some)
            unsaid += [(id, reason)] if reason else []
    for id, reason in unsaid:
        print(f"not spoken {id}: {reason}")
    if len(unsaid) == len(clips):
        raise UserError(f"none of the {len(clips)} sentences could be spoken; of the first it is said: {unsaid[0][1]}")


def _speak_clip(job):
    """Nothing, or why a clip cannot be spoken."""
    path, text, voice = job
    try:
        if not path.exists():
            write_wav(path, *speak(text, voice))
    except UserError as e:
        return str(e)


def read_lines_of(metadata):
    """The lines of a metadata.csv, none where there is none or something else."""
    try:
        with metadata.open(encoding="utf-8") as file:
            return [*file]
    except (OSError, UnicodeDecodeError):
        return []


def not_its_own(transcripts, root):
    """Raises UserError where the sentences that are to be spoken are those of the corpus itself."""
    if transcripts and transcripts.resolve() == (root / "metadata.csv").resolve():
        raise UserError(f"--transcripts {transcripts} would be overwritten by the corpus: name another --root")
