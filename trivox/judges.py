"""Speech judged: what of it is understood, how it sounds, whose voice it is, each with an interval; and whether one
system speaks better than another on the same sentences.

Intervals hold 95 %, by the bootstrap over sentences (Efron, 1979): they tell how far a figure would move with other
sentences of the kind, not with another training run.
"""

import hashlib
import json
import math
from contextlib import suppress

import numpy as np
from tqdm import tqdm

from trivox.common import UserError, checked
from trivox.files import read_json, write_whole
from trivox.parallel import parallel
from trivox.recognisers import UNSPACED, at_16_khz, compared_words

RESAMPLES = 5000
SECOND = 128  # sentences at most that the second judge of words hears and DNSMOS scores: together as long as all else

# ------------------------------------------------------------------------------------------------------------
# Intervals

def interval(values, weights=None, seed=0):
    """(low, high) of sum(values) / sum(weights), two lists of a number a sentence; the mean without weights. None for
    less than two sentences."""
    from scipy.stats import bootstrap

    values, weights = np.asarray(values, float), np.ones(len(values)) if weights is None else np.asarray(weights, float)
    values, weights = values[weights > 0], weights[weights > 0]  # a sentence may have no word that is compared
    if len(values) < 2:
        return None
    if (values == values[0] * weights / weights[0]).all():  # scipy warns where nothing varies
        return [float(values[0] / weights[0])] * 2
    found = bootstrap((values, weights), lambda v, w, axis: v.sum(axis) / w.sum(axis), paired=True, vectorized=True,
                      n_resamples=RESAMPLES, batch=500, method="percentile", rng=np.random.default_rng(seed))
    return [float(end) for end in found.confidence_interval]


def error_interval(errors, words):
    """`interval` of an error rate. Where no sentence has an error, resampling them would promise that none ever has:
    there the end is that of one error in each of as many sentences as may well have one (Clopper & Pearson, 1934)."""
    found = interval(errors, words)
    if found and not any(errors):
        found[1] = float((1 - 0.025 ** (1 / len(words))) / np.mean(words))
    return found


# ------------------------------------------------------------------------------------------------------------
# Words

def word_errors(texts, heard, language="en"):
    """What was heard of each text, as jiwer counts it on `compared_words`: a list of dicts of substitutions, deletions,
    insertions, errors (their sum), words, wer, character_errors, characters. Blanks are characters too, but where a
    language puts none between its words."""
    import jiwer

    rows, blank = [], "" if language.lower() in UNSPACED else " "
    for text, one in zip(texts, heard):
        asked, got = compared_words(text, language), compared_words(one, language)
        of_words = jiwer.process_words(asked, got)
        spelt, spoken = (text.replace(" ", blank) for text in (asked, got))
        of_characters = jiwer.process_characters(spelt, spoken)
        row = {key: getattr(of_words, key) for key in ("substitutions", "deletions", "insertions")}
        row["errors"], row["words"] = sum(row.values()), len(asked.split())
        row["character_errors"] = of_characters.substitutions + of_characters.deletions + of_characters.insertions
        row["characters"] = len(spelt)
        rows.append(row | {"wer": row["errors"] / max(1, row["words"])})
    return rows


def word_error_rate(texts, heard, language="en"):
    """Substitutions, insertions and deletions over the words of all `texts`."""
    return total(word_errors(texts, heard, language), "errors", "words")


def total(rows, key, of):
    return sum(row[key] for row in rows) / max(1, sum(row[of] for row in rows))


def words_summary(rows, ending=""):
    """The figures of some `word_errors`; `ending` is that of their names."""
    errors, words = [row["errors"] for row in rows], [row["words"] for row in rows]
    figures = {
        "wer": total(rows, "errors", "words"), "wer_interval": error_interval(errors, words),
        "cer": total(rows, "character_errors", "characters"),
        "cer_interval": error_interval(*([row[key] for row in rows] for key in ("character_errors", "characters"))),
        **{key: sum(row[key] for row in rows) for key in ("substitutions", "deletions", "insertions", "words")},
        "exact": sum(error == 0 for error in errors), "mostly_wrong": sum(row["wer"] > 0.5 for row in rows),
    }
    return {key + ending: value for key, value in figures.items()}


# ------------------------------------------------------------------------------------------------------------
# Sound and voice

def load_quality():
    """DNSMOS (Reddy et al., 2022), as (samples, sample rate) -> the overall mean opinion score that it predicts, 1 to
    5; None where its package is missing. It was made to judge noise suppressors: it compares systems, and says little
    of how natural a voice is. It reads 9.01 s; a shorter clip is repeated to fill that once. (The package fills up to
    eleven such windows and takes their mean: on 40 clips 0.005 lower, r = 0.97, in four times the time.)"""
    try:
        from speechmos import dnsmos
    except ImportError:
        return None

    def quality(wav, rate):
        wav = np.clip(at_16_khz(wav, rate), -1, 1)
        if not len(wav):
            return 1.0  # it would wait for ever for sound
        return float(dnsmos.run(np.resize(wav, max(len(wav), 144160)), sr=16000)["ovrl_mos"])

    return quality


def load_voice_encoder():
    """GE2E (Wan et al., 2018), as (samples, sample rate) -> what it hears of the voice, (256,) of length 1; None where
    its package is missing. No model here is conditioned on it."""
    try:
        from resemblyzer import VoiceEncoder
    except ImportError:
        return None
    encoder = VoiceEncoder("cpu", verbose=False)
    return lambda wav, rate: encoder.embed_utterance(at_16_khz(wav, rate)) if len(wav) else np.zeros(256)


def mean_and_interval(values, name, ending):
    return {name + ending: float(np.mean(values)), f"{name}_interval{ending}": interval(values)}


# ------------------------------------------------------------------------------------------------------------
# All of it

VERDICTS = {}  # {a recording: {who judged it: what was said}}: runs are judged beside the same recordings


def verdicts(who, wavs, rate, judge):
    """What judge(list of recordings) says of each of `wavs`; it is asked for those that it has not judged before."""
    known = [VERDICTS.setdefault(name_of(wav, rate), {}) for wav in wavs]
    new = {id(of): (of, wav) for of, wav in zip(known, wavs) if who not in of}
    for (of, _), said in zip(new.values(), judge([wav for _, wav in new.values()])):
        of[who] = said
    return [of[who] for of in known]


def name_of(wav, rate):
    return f"{rate} Hz, {hashlib.sha256(np.ascontiguousarray(wav, np.float32)).hexdigest()[:32]}"


def listen(judge, wavs, rate):
    """Texts of wavs, by a (what it is, hear) of recognisers.py."""
    what, hear = judge
    if not what.startswith("Whisper"):  # the others are told what can be said, so that their names do not tell all
        return hear(wavs, rate)
    return verdicts(what, wavs, rate, lambda some: hear(some, rate))


def recall(memory):
    """Take up the verdicts that a file keeps, and return them; of one that is missing or damaged, none."""
    with suppress(UserError):
        if memory and memory.exists():
            kept = checked(dict[str, dict[str, str | float | list[float]]], read_json(memory), str(memory))
            VERDICTS.update({name: VERDICTS.get(name, {}) | said for name, said in kept.items()})
            return kept
    return {}


def remember(memory, kept, wavs, rate):
    """Write the verdicts on `wavs` into a file, beside those that it has kept."""
    names = {name_of(wav, rate) for wav in wavs}
    said = {name: VERDICTS[name] for name in names & VERDICTS.keys() if VERDICTS[name] != kept.get(name)}
    if memory and said:
        try:
            write_whole(memory, json.dumps(kept | said))
        except OSError as e:
            print(f"note: {memory} cannot be written ({e.strerror}), so the recordings will be judged anew next time")


def first_of(count):
    """What is to be said of a figure of `count` sentences which is that of the first alone."""
    return f" on the first {SECOND} sentences" if count > SECOND else ""


def judge_speech(judges, rate, texts, wavs, ceiling=None, recordings=None, speakers=None, memory=None,
                 language="en"):
    """Judge `wavs`, each of which is to say a text, and in the same way the recordings of these sentences after the
    codec or vocoder (`ceiling`) and as they are (`recordings`), where there are any.

    judges: recognisers, of which the second, if any, is asked for word errors alone, and of the first `SECOND`
    sentences, as DNSMOS is. speakers: of each recording (one of all where not given), to tell how alike two recordings
    of a speaker are. memory: the path of a file that keeps what was said of the recordings, which two thirds of the
    judges' time go into. language: of the texts. Returns (summary, rows): figures of the recordings have the
    endings _ceiling and _recordings; a row a sentence.
    """
    kept = recall(memory)
    sets = {"": wavs, "_ceiling": ceiling, "_recordings": recordings}
    sets = {ending: some for ending, some in sets.items() if some}
    summary, rows = {"prompts": len(texts)}, [{"text": text, "seconds": len(wav) / rate}
                                              for text, wav in zip(texts, wavs)]
    noise = [0.1 * np.random.default_rng(n).standard_normal(len(wav)) for n, wav in enumerate(wavs[:16])]
    for n, judge in enumerate(judges):
        heard = {ending: listen(judge, some[:SECOND if n else None], rate) for ending, some in sets.items()}
        found = {ending: word_errors(texts, some, language) for ending, some in heard.items()}
        if n:
            summary["judge_2"] = judge[0] + first_of(len(texts))
            for ending, some in found.items():
                second = words_summary(some)
                summary |= {f"wer_2{ending}": second["wer"], f"wer_2_interval{ending}": second["wer_interval"]}
            continue
        summary |= {"judge": judge[0], "wer_noise": word_error_rate(texts[:16], listen(judge, noise, rate), language),
                    "wer_other_sentence": word_error_rate(texts, texts[1:] + texts[:1], language)}
        for ending, some in found.items():
            summary |= words_summary(some, ending)
        for i, row in enumerate(rows):
            row |= found[""][i] | {f"heard{ending}": heard[ending][i] for ending in heard}
            row |= {f"errors{ending}": found[ending][i]["errors"] for ending in heard}

    if quality := load_quality():
        quality(wavs[0], rate)  # here, so that threads need not each load it

        def score(some):
            with parallel(threads=True) as pool:
                jobs = pool.map(lambda wav: quality(wav, rate), some)
                return list(tqdm(jobs, "quality", len(some), unit=" clips", leave=False, disable=None))

        for ending, some in sets.items():
            values = verdicts("DNSMOS", some[:SECOND], rate, score)
            summary |= mean_and_interval(values, "mos", ending)
            for row, value in zip(rows, values):
                row[f"mos{ending}"] = value

    known = recordings or ceiling
    if known and (embed := load_voice_encoder()):
        def describe(some):
            return [embed(wav, rate).round(5).tolist() for wav in some]

        voices = {ending: verdicts("GE2E", some, rate, describe) for ending, some in sets.items()}
        own = voices["_recordings" if recordings else "_ceiling"]
        if recordings:  # each beside another recording of its speaker
            speakers = speakers or [""] * len(own)
            other = [next((m for k in range(1, len(own)) if speakers[m := (n + k) % len(own)] == speakers[n]), None)
                     for n in range(len(own))]
            voices["_recordings"] = [None if m is None else own[m] for m in other]
        else:
            voices.pop("_ceiling")
        for ending, some in voices.items():
            likeness = [None if a is None else float(np.dot(a, b)) for a, b in zip(some, own)]
            if values := [x for x in likeness if x is not None]:
                summary |= mean_and_interval(values, "similarity", ending)
            if not ending:
                for row, value in zip(rows, likeness):
                    row["similarity"] = value
    remember(memory, kept, [*(ceiling or []), *(recordings or [])], rate)
    return summary, rows


# ------------------------------------------------------------------------------------------------------------
# Two systems on the same sentences

def paired(a, b):
    """Whether the second of two systems is better, by the rows that `judge_speech` made of each. Returns (the number
    of sentences that both spoke, a list of dicts of name, pairs (the number of sentences that were judged so), a, b,
    difference (b - a), interval, and sentences: how many it would take to tell a difference of this size in four of
    five draws of them, None where there is none). A difference is told where its interval does not hold 0.

    Raises ValueError where no sentence is in both.
    """
    beside, pairs = {}, []
    for row in reversed(b):
        beside.setdefault(row["text"], []).append(row)
    for row in a:  # the first time that a text was spoken beside the first time, and so on
        if beside.get(row["text"]):
            pairs.append((row, beside[row["text"]].pop()))
    if not pairs:
        raise ValueError("no sentence was spoken by both")
    found = []
    for name, key, of in (("word error rate", "errors", "words"), ("character error rate", "character_errors",
                          "characters"), ("predicted MOS", "mos", None), ("similarity of voice", "similarity", None),
                          ("mel-cepstral distortion", "mcd", None), ("duration error", "duration_error", None)):
        judged = [pair for pair in pairs if all(row.get(key) is not None for row in pair)]
        if not judged:
            continue
        x, y = (np.array([pair[k][key] for pair in judged], float) for k in (0, 1))
        weights = np.array([pair[0][of] if of else 1 for pair in judged], float)
        difference = float((y - x).sum() / weights.sum())
        deviation = np.std((y - x - difference * weights) / weights.mean())
        found.append({"name": name, "pairs": len(judged), "a": float(x.sum() / weights.sum()),
                      "b": float(y.sum() / weights.sum()), "difference": difference,
                      "interval": interval(y - x, weights),
                      # 1.96 + 0.84: 95 % sure, in 80 % of the draws (Cohen, 1988)
                      "sentences": math.ceil((2.8 * deviation / difference) ** 2) if difference else None})
    return len(pairs), found
