"""The speech of the demos: sentences of a small grammar, spoken by espeak-ng into a corpus in LJSpeech's layout."""

import ctypes
import random
import re
from functools import cache

import numpy as np
from tqdm import tqdm

from trivox.audio import write_wav
from trivox.common import UserError
from trivox.corpora import claim, clip_path, read_metadata
from trivox.files import write_whole
from trivox.parallel import parallel

TEMPLATES = (
    "the {person} {did} {number} {quality} {things} {where} the {place} {time}.",
    "the {person} {did} {number} {things} {time}.",
    "{time}, the {person} {did} the {quality} {things}.",
    "{number} {quality} {things} are {where} the {place}.",
    "the {things} {where} the {place} are {quality}.",
)
SLOTS = {
    "person": "doctor teacher farmer sister brother mother father neighbor baker driver singer captain".split(),
    "did": "found bought sold painted carried wanted counted washed dropped noticed borrowed cleaned".split(),
    "number": "two three four five six seven eight nine ten eleven twenty ninety".split(),
    "quality": "green yellow purple little heavy broken empty golden silver wooden beautiful expensive".split(),
    "things": "apples books chairs boxes flowers horses bottles letters pictures blankets candles monkeys".split(),
    "where": "behind under near inside across".split(),
    "place": "house garden river kitchen market school bridge window station village forest mountain".split(),
    "time": "today,yesterday,this morning,last night,every summer,on Monday,on Friday,after lunch".split(","),
}


def demo_sentence(rng):
    """One sentence of the grammar, drawn with a random.Random."""
    text = rng.choice(TEMPLATES).format(**{slot: rng.choice(words) for slot, words in SLOTS.items()})
    return text[0].upper() + text[1:]


def demo_grammar():
    """The same grammar in JSGF (Java Speech Grammar Format), as recognisers read it: lower case, no punctuation."""
    rules = [f"<{slot}> = {' | '.join(words).lower()};" for slot, words in SLOTS.items()]
    sentences = " | ".join(re.sub(r"[.,]", "", t).replace("{", "<").replace("}", ">") for t in TEMPLATES)
    return "\n".join(["#JSGF V1.0;", "grammar demo;", *rules, f"public <sentence> = {sentences};", ""])


@cache
def espeak():
    """espeak-ng's shared library, initialised for synchronous synthesis. Returns (library, sample rate in Hz)."""
    import espeakng_loader

    lib = ctypes.CDLL(espeakng_loader.get_library_path())
    synchronous = 2
    rate = lib.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
    lib.espeak_Synth.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
                                 ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]
    if rate <= 0:
        raise UserError("espeak-ng could not be initialised: is the package espeakng-loader whole?")
    return lib, rate


def speak(text, voice="en-us"):
    """Speak one text with espeak-ng. Returns (samples,) float32 in [-1, 1] at espeak's rate, 22,050 Hz.

    Raises UserError for an unknown voice; "en-us+f2" is the voice en-us in its female variant 2.
    """
    lib, _ = take_voice(voice)
    chunks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, count, events):
        if count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    lib.espeak_SetSynthCallback(receive)
    data, utf8 = text.encode(), 1
    lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, utf8, None, None)
    return np.concatenate(chunks).astype(np.float32) / 32768 if chunks else np.zeros(0, np.float32)


def take_voice(voice):
    """espeak(), which then speaks with this voice. Raises UserError for an unknown one."""
    lib, rate = espeak()
    if lib.espeak_SetVoiceByName(voice.encode("utf-8", "surrogateescape")) != 0:
        raise UserError(f"espeak-ng has no voice {voice!r}; en-us, en-us+f2, en-gb-x-rp are some")
    return lib, rate


def _speak_clip(job):
    path, text, voice = job
    if not path.exists():
        write_wav(path, speak(text, voice), espeak()[1])


def read_lines_of(metadata):
    """The lines of a metadata.csv, none where there is none or something else."""
    try:
        with metadata.open(encoding="utf-8") as file:
            return [*file]
    except (OSError, UnicodeDecodeError):
        return []


def is_demo(lines):
    """Whether these are the lines of a metadata.csv of the demo's own sentences: it is known by its ids."""
    return bool(lines) and all(re.fullmatch(r"demo-\d{5,}\|([^|]*)\|\1\|[^|]+\n", line) for line in lines)


def make_demo_corpus(root, sentences, heldout, voices, transcripts=None, heldout_voices=(), heldout_voice_clips=48):
    """Speak sentences of the demo grammar, or those of a file, into a corpus at `root`; `heldout` of them are marked.

    transcripts: a metadata.csv (its normalised text is spoken) or a text with a sentence a line. heldout_voices speak
    `heldout_voice_clips` further sentences each (the last ones of a file), all of them marked; they are taken out of
    `voices`, which speak the others in turn. The speaker of a clip is its voice.

    Raises UserError, before anything is written, for an unknown voice and where `root` holds another's corpus.
    """
    rng = random.Random(0)
    voices = [voice for voice in voices if voice not in heldout_voices]
    unheard = heldout_voice_clips * len(heldout_voices)
    if transcripts:
        clips = [(c["id"], c["text"]) for c in read_metadata(transcripts)]
    else:
        texts = {}
        while len(texts) < sentences + unheard:
            texts[demo_sentence(rng)] = None  # a dict keeps the order and no sentence twice
        clips = [(f"demo-{i:05d}", text) for i, text in enumerate(texts)]
    heard = len(clips) - unheard
    if not voices:
        raise UserError("all voices held out leave none to train on")
    if heldout >= heard:
        raise UserError(f"{heldout + unheard} of {len(clips)} sentences held out leave none to train on")
    turns = [voices[i % len(voices)] for i in range(heard)]
    turns += [heldout_voices[i % len(heldout_voices)] for i in range(unheard)]
    rows = [(id, text, text, voice) for (id, text), voice in zip(clips, turns)]
    for voice in dict.fromkeys(turns):
        take_voice(voice)
    metadata, lines = root / "metadata.csv", ["|".join(row) + "\n" for row in rows]
    if transcripts and transcripts.resolve() == metadata.resolve():
        raise UserError(f"--transcripts {transcripts} would be overwritten by the corpus: name another --root")
    for id, *_ in rows:
        clip_path(root, id)  # that of a hostile id is refused
    spoken = read_lines_of(metadata)
    claim(root, ("metadata.csv", "wavs", "heldout.txt", "grammar.jsgf"), is_demo(spoken) or spoken == lines)
    for (id, *_), line in zip(rows, lines):
        if line not in spoken:  # a recording of another text or voice
            clip_path(root, id).unlink(missing_ok=True)
    write_whole(metadata, "".join(lines))
    with parallel() as pool:
        jobs = [(clip_path(root, id), text, voice) for id, text, _, voice in rows]
        list(tqdm(pool.map(_speak_clip, jobs, chunksize=64), "speaking", len(jobs), unit=" clips", leave=False))
    marked = rng.sample(clips[:heard], heldout) + clips[heard:]
    write_whole(root / "heldout.txt", "".join(id + "\n" for id, _ in marked))
    if not transcripts:
        write_whole(root / "grammar.jsgf", demo_grammar())
