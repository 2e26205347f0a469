"""espeak-ng, a synthesiser of many languages: what it says of a text, and in which phonemes.

Its library and voices are in the package espeakng-loader (espeak-ng is GPL-3.0, and only loaded).
"""

import ctypes
import re
import threading
from functools import cache, lru_cache
from unicodedata import name

import numpy as np

from trivox.common import UserError

LOCK = threading.Lock()  # the library is one for all threads, and so is its voice
UTF8, IPA = 1, 2


@cache
def espeak():
    """The library, initialised for synchronous synthesis. Returns (library, sample rate in Hz)."""
    import espeakng_loader

    lib = ctypes.CDLL(espeakng_loader.get_library_path())
    synchronous = 2
    rate = lib.espeak_Initialize(synchronous, 0, espeakng_loader.get_data_path().encode(), 0)
    lib.espeak_Synth.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
                                 ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]
    lib.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_int]
    lib.espeak_TextToPhonemes.restype = ctypes.c_char_p
    if rate <= 0:
        raise UserError("espeak-ng could not be initialised: is the package espeakng-loader whole?")
    return lib, rate


def take_voice(voice):
    """espeak(), which then speaks with this voice. Raises UserError for an unknown one."""
    lib, rate = espeak()
    if not voice or lib.espeak_SetVoiceByName(voice.encode("utf-8", "surrogateescape")) != 0:
        raise UserError(f"espeak-ng has no voice {voice!r}; some that it has: en-us, en-us+f2, en-gb-x-rp, de, fr")
    return lib, rate


def speak_espeak(text, voice="en-us"):
    """(samples,) float32 at espeak's rate, 22,050 Hz. "en-us+f2" is the voice en-us in its female variant 2."""
    chunks = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, count, events):
        if count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    with LOCK:
        lib, _ = take_voice(voice)
        lib.espeak_SetSynthCallback(receive)
        data = text.encode()
        lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, UTF8, None, None)
    return np.concatenate(chunks).astype(np.float32) / 32768 if chunks else np.zeros(0, np.float32)


# ------------------------------------------------------------------------------------------------------------
# Phonemes

MARKS = r"[.,;:!?'\"()\[\]{}…-]"
PUNCTUATION = re.compile(rf"((?:^|\s+){MARKS}(?:{MARKS}|\s)*|{MARKS}+(?:\s(?:{MARKS}|\s)*|$))")  # not that inside words
TITLE = re.compile(r"\b(Mr|Mrs|Ms|Dr|St|Messrs|Prof|Gen|Col|Capt|Lt|Sgt|Rev|Hon)\.(?=\s)")  # whose stop is no pause


@lru_cache(200_000)
def phonemes(text, voice):
    """A text as a voice of espeak-ng pronounces it, in the International Phonetic Alphabet with stress marks. Words are
    read in the context of those between two marks of punctuation; the marks stay where they are.

    Raises UserError for an unknown voice, for words of which the voice says nothing, and where an English one would
    spell letters of another script by their names or numbers.
    """
    if voice.startswith("en") and (other := [c for c in text if c.isalpha() and "LATIN" not in name(c, "")]):
        raise UserError(f"espeak-ng's voice {voice} reads English, and not {''.join(other)[:20]!r} in {text[:40]!r}")
    pieces = PUNCTUATION.split(TITLE.sub(r"\1", text))  # words and punctuation by turns
    with LOCK:
        lib, _ = take_voice(voice)
        for n, words in enumerate(pieces[::2]):
            pieces[2 * n] = pronounced(lib, words)
            for word in words.split():
                if not word.isascii() and any(map(str.isalnum, word)) and not pronounced(lib, word):
                    raise UserError(f"espeak-ng's voice {voice} says nothing for {word[:20]!r} in {text[:40]!r}")
    return "".join(pieces)


def pronounced(lib, words):
    """Words without punctuation around them, in IPA."""
    buffer, parts = ctypes.create_string_buffer(words.encode()), []
    place = ctypes.c_void_p(ctypes.addressof(buffer))
    while place.value:  # it reads a clause at a time
        parts.append(lib.espeak_TextToPhonemes(ctypes.byref(place), UTF8, IPA).decode())
    return re.sub(r"\([a-z-]+\)", "", " ".join(" ".join(parts).split()))  # (de): the language of what follows
