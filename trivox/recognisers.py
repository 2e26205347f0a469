"""What hears: recognisers by name, each a function from (wav, sample rate) to text."""

import re
import tempfile

import numpy as np

from trivox.common import UserError
from trivox.text import normalise_text


def spoken_words(text):
    """The words of a text as recognisers write them: lower case, no punctuation, numbers in words."""
    return " ".join(re.findall(r"[\w']+", normalise_text(text, accents=True).lower()))


def load_recogniser(name, sentences=(), grammar=None, device="cpu"):
    """A recogniser by name. Returns (what it is, hear(wav, sample rate) -> text).

    grammar: PocketSphinx with the JSGF text `grammar`. whisper: Whisper base.en, where its weights are to be had.
    sentences: PocketSphinx with `sentences` as all that can be said. open: PocketSphinx with its own language model.
    auto: the first of these that there is.
    """
    if name == "auto" and grammar:
        name = "grammar"
    elif name == "auto":
        try:
            return load_recogniser("whisper", device=device)
        except UserError:
            name = "sentences" if sentences else "open"
    if name == "whisper":
        return "Whisper base.en", load_whisper(device)
    from pocketsphinx import Decoder

    if name == "open":
        return "PocketSphinx, open vocabulary", sphinx(Decoder(loglevel="FATAL"))
    if name == "grammar":
        if not grammar:
            raise UserError("this data set has no grammar.jsgf: choose another --recogniser")
        return "PocketSphinx, the corpus's grammar", sphinx(grammar_decoder(grammar))
    dictionary = Decoder(loglevel="FATAL")  # a word missing from it cannot stand in a grammar
    known = {" ".join(w for w in spoken_words(s).split() if dictionary.lookup_word(w)): s for s in sentences}
    hear = sphinx(grammar_decoder("#JSGF V1.0;\ngrammar set;\npublic <s> = " + " | ".join(filter(None, known)) + ";\n"))
    return f"PocketSphinx, one of {len(known)} sentences", lambda wav, rate: known.get(hear(wav, rate), "")


def load_whisper(device):
    """Whisper base.en (Radford et al., 2022). Raises UserError where its weights cannot be had."""
    import librosa
    import whisper

    try:
        model = whisper.load_model("base.en", device=device)
    except Exception as e:  # offline, a wrong checksum
        raise UserError(f"Whisper's weights base.en.pt (145 MB) cannot be downloaded ({type(e).__name__}): put them "
                        "into ~/.cache/whisper/, or choose another --recogniser") from None

    def hear(wav, rate):
        return model.transcribe(librosa.resample(wav, orig_sr=rate, target_sr=16000), language="en")["text"]

    return hear


def grammar_decoder(jsgf):
    from pocketsphinx import Decoder

    with tempfile.NamedTemporaryFile("w", suffix=".jsgf", encoding="utf-8") as f:
        f.write(jsgf)
        f.flush()
        return Decoder(jsgf=f.name, loglevel="FATAL")


def sphinx(decoder):
    """hear(wav, rate) of a PocketSphinx decoder. It stumbles over recordings that begin at once or hold digital
    silence; 0.3 s at both ends and a little noise all over mend that."""
    import librosa

    def hear(wav, rate):
        wav = librosa.resample(np.asarray(wav, np.float32), orig_sr=rate, target_sr=16000)
        wav = np.pad(0.5 * wav / max(np.abs(wav).max(), 1e-5), 4800)
        wav += 1e-3 * np.random.default_rng(0).standard_normal(len(wav))
        decoder.start_utt()
        decoder.process_raw((wav * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        return decoder.hyp().hypstr if decoder.hyp() else ""

    return hear
