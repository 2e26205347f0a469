"""The speech of the demos: sentences of a small grammar, spoken into a corpus in LJSpeech's layout."""

import random
import re

from trivox.common import UserError
from trivox.metadata import read_transcripts
from trivox.synthesisers import not_its_own, speak_corpus

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


def is_demo(lines):
    """Whether these are the lines of a metadata.csv of the demo's own sentences: it is known by its ids."""
    return bool(lines) and all(re.fullmatch(r"demo-\d{5,}\|([^|]*)\|\1\|[^|]+\n", line) for line in lines)


def make_demo_corpus(root, sentences, heldout, voices, transcripts=None, heldout_voices=(), heldout_voice_clips=48):
    """Speak sentences of the demo grammar, or those of a file, into a corpus at `root`; `heldout` of them are marked.

    transcripts: a metadata.csv (its normalised text is spoken) or a text with a sentence a line. heldout_voices speak
    `heldout_voice_clips` further sentences each (the last ones of a file), all of them marked; they are taken out of
    `voices`, which speak the others in turn. The speaker of a clip is its voice.

    Raises UserError as `speak_corpus` does, and where nothing would be left to train on.
    """
    rng = random.Random(0)
    voices = [voice for voice in voices if voice not in heldout_voices]
    unheard = heldout_voice_clips * len(heldout_voices)
    if transcripts:
        clips = [(c["id"], c["text"]) for c in read_transcripts(transcripts)]
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
    not_its_own(transcripts, root)
    marked = rng.sample(clips[:heard], heldout) + clips[heard:]
    speak_corpus(root, [(*clip, voice) for clip, voice in zip(clips, turns)], [id for id, _ in marked], is_demo,
                 None if transcripts else demo_grammar())
