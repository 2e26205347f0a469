"""One road from a text to sound, for all three systems.

    speaker = load("runs/flow_demo")
    for wav in speaker.stream("The baker sold nine golden apples.", seed=1):
        ...                                             # (samples,) float32 at speaker.sample_rate

A text is normalised, broken into sentences, refused with a message where nothing can be made of it, and spoken
sentence by sentence with a pause between. sample.py, serve.py, evaluate.py, bench.py and the samples of the trainers
all come this way, so that one text with one seed is the same sound however it is asked for. What can be asked for is in
options.py.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, islice, pairwise, takewhile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import sentence
from trivox.alphabet import alphabet
from trivox.audio import LOG_FLOOR, MelConfig, load_vocoder, log_mel, mel_config
from trivox.checkpoints import cast_matrices, codec_of, load_model
from trivox.codecs import decode_stream, load_codec
from trivox.common import UserError, autocast, pick_dtype
from trivox.espeak import phonemes
from trivox.generate import follow, generate_frames, generate_speech, solve_flow, stream_frames, stream_speech
from trivox.normalise import normalise_text
from trivox.options import OPTIONS, SAMPLING, read_options
from trivox.parallel import parallel
from trivox.recordings import read_wav
from trivox.sentences import in_letters, split_text
from trivox.text import MAX_TEXT_BYTES, TextFeatures
from trivox.voices import read_voice

PAUSE = 0.15  # seconds between sentences
BATCH = 32  # sentences that are spoken at once
STREAMS = 16  # sentences of an LLM TTS that are spoken ahead while the first is heard

# ------------------------------------------------------------------------------------------------------------
# The road

@dataclass
class Clip:
    """What was made: wav (samples,) float32, its log-mel (frames, n_mels), and its codes (frames, Q), if it has any."""
    wav: np.ndarray
    mel: torch.Tensor
    codes: torch.Tensor | None = None


def print_note(said):
    print(f"note: {said}", file=sys.stderr)


def quoted(texts):
    """Some texts for a note: the first three, shortened."""
    return ", ".join(repr(text[:40]) for text in texts[:3]) + f" and {len(texts) - 3:,} more" * (len(texts) > 3)


class Speaker:
    """What is the same in all systems. Each adds how a text is read (`sentences`), and how sentences become sound: in
    `play` and `sound` one after the other, as they come, and in `make` and `clip` many at once.

    model: on its device. config: the dict that it was trained with. mel: the MelConfig of its clips' log-mels.
    """
    system, limit, loop_options = "", MAX_TEXT_BYTES - 1, ()  # bytes of a sentence; options of its sampling loop
    features = None  # the TextFeatures that texts are read by, where they are

    def __init__(self, model, config, mel):
        self.model, self.c, self.config, self.mel = model, model.c, config, mel
        self.sample_rate, self.device = model.c.sample_rate, next(model.parameters()).device
        self.dtype = speaking_dtype(config, self.device)
        self.note, self.told = print_note, set()  # takes what was not read or heard; what characters it was told of
        self.language = config.get("language", "en")
        defaults = read_options(self.system, config, {})
        self.options = [replace(option, default=defaults[option.name]) for option in OPTIONS[self.system]
                        if option.name not in self.lacks()]

    def lacks(self):
        """{an option of the system that this model does not have: why}."""
        return {}

    def settings(self, given):
        """The value of each option, which may be given again. Raises UserError for what is out of range or this model
        cannot do."""
        lacks = self.lacks()
        for name in [name for name in lacks if given.get(name) is not None]:
            raise UserError(f"{lacks[name]}: no --{name}")
        options = read_options(self.system, self.config, given)
        return {name: value for name, value in options.items() if name not in lacks}

    def sayable(self, text):
        """Whether something can be made of a text."""
        try:
            return bool(self.sentences(text))
        except UserError:
            return False

    def sentences(self, text):
        """What is spoken one by one of a text. Raises UserError for a text that nothing can be made of."""
        if text is None:
            raise UserError("what should it say? --text or --text_file")
        text = normalise_text(text, accents=True, language=self.language)
        sentences = split_text(text, self.limit, self.language)
        if self.features and self.features.phonemes:
            self.features(sentences)  # raises UserError for what cannot be pronounced
            self.tell_unread(self.features.unread(text), "the voice has no sound for", "it is left out")
        return sentences

    def reads(self, sentence):
        """One of `sentences` as the model reads it: its letters, or its phonemes."""
        return phonemes(sentence, self.features.phonemes) if self.features and self.features.phonemes else sentence

    def readings(self, text):
        """What becomes of a text: [(sentence, what the model reads, or "" where that differs in capitals alone)]."""
        return [(s, "" if (read := self.reads(s)).lower() == s.lower() else read) for s in self.sentences(text)]

    def became(self, text):
        """What the model reads of a text, or "" where that differs in capitals and white space alone."""
        read = " ".join(map(self.reads, self.sentences(text)))
        return "" if read.lower() == " ".join(text.lower().split()) else read

    def tell_unread(self, characters, what, became):
        """Tell, once for the same ones, which characters are not read, and what becomes of them."""
        if characters and characters not in self.told:
            self.told.add(characters)
            self.note(f"{what} {characters[:40]!r}: {became}")

    def parts(self, text, settings):
        """The sentences of a text with all that is known of them, dicts: the settings, text, seed, and start and end,
        seconds of speech before and after it where `seconds` are asked for, else None.

        Raises UserError as `sentences` does, and where `seconds` are too few for the pauses between sentences.
        """
        sentences, seconds = self.sentences(text), settings["seconds"]
        spans = (self.share_out(seconds, [len(s or " ") for s in sentences]) if seconds else
                 [(None, None)] * len(sentences))
        return [settings | {"text": s, "seed": settings["seed"] * 1_000_003 + n, "start": start, "end": end}
                for n, (s, (start, end)) in enumerate(zip(sentences, spans))]

    def share_out(self, seconds, lengths):
        """(start, end) of each of some sentences in the speech of a sound of so many seconds, without its pauses: each
        has its part by its length."""
        if (speech := seconds - PAUSE * (len(lengths) - 1)) <= 0:
            raise UserError(f"--seconds {seconds:g} leaves no room to speak: the pauses between {len(lengths)} "
                            f"sentences take {seconds - speech:g} s")
        upto = [speech * n / sum(lengths) for n in accumulate(lengths, initial=0)]
        return list(pairwise(upto))

    def stream(self, text=None, **options):
        """Speak a text, and yield waveform, (samples,) float32, as it comes. options: as in `self.options`.

        Raises UserError as `parts` and `settings` do, and where the model makes no sound at all. One of several
        sentences that it says nothing of is a moment of silence, and a note.
        """
        self.model.eval()
        parts = self.parts(text, self.settings(options))
        return self.with_pauses(parts)

    def with_pauses(self, parts):
        """What `stream` yields: the sound of one sentence after the other."""
        silent, cut, unheard, spoken, pause = [], [], [], 0, []
        for part, steps in zip(parts, self.play(parts)):
            if (most := self.most_frames(part, spoken)) is not None and most < 1:
                unheard.append(part)
                continue
            yield from pause
            samples, pause = 0, [self.pause()]
            for wav in self.sound(islice(steps, most), part):
                samples += len(wav)
                yield wav
            if not samples:
                silent.append(part["text"] or "what was asked for")
                if len(silent) == len(parts):
                    break
                yield (wav := decode(self.codec, torch.zeros(0, 1)))
                samples = len(wav)
            if most is not None:
                frames = round(samples * self.c.frame_rate / self.sample_rate)
                spoken += frames
                cut += [(part, most)] * (frames >= most)
        if len(silent) + len(unheard) == len(parts):
            raise UserError(f"the model made no sound for {silent[0][:40]!r}: try another seed")
        self.tell_lost(silent, cut, unheard, len(parts))

    def speak(self, requests, **options):
        """Speak many texts at once. requests: dicts of a text and of the options that are its own, such as seed, also
        `prompt`, codes (T, Q) to go on from; `speaker` may be an embedding. Returns a list of Clips.

        What a text becomes does not depend on its neighbours. A sentence that the model says nothing of is a moment of
        silence, and a note.
        """
        self.model.eval()
        parts = []
        for request in requests:
            own = {key: x for key, x in request.items() if key != "text"}
            parts.append(self.parts(request.get("text"), self.settings(options | own)))
        flat = [part for some in parts for part in some]
        made, alike = [None] * len(flat), {}
        for i in sorted(range(len(flat)), key=lambda i: self.size(flat[i])):
            alike.setdefault(repr(self.shared(flat[i])), []).append(i)
        batches = [order[i:i + BATCH] for order in alike.values() for i in range(0, len(order), BATCH)]
        for some in tqdm(batches, "speaking", unit=" batches", leave=False, disable=None):
            with autocast(self.device, self.dtype):
                for i, x in zip(some, self.make([flat[i] for i in some])):
                    made[i] = x
        made, heard = iter(made), []  # heard: (what was made, part) of each text's sentences
        silent, cut, unheard = [], [], []
        for some in parts:
            heard.append([])
            spoken = 0
            for part, x in zip(some, made):
                most = self.most_frames(part, spoken)
                if most is not None and most < 1:
                    unheard.append(part)
                    continue
                heard[-1].append((x[:most], part))
                silent += [part["text"] or "what was asked for"] * (not len(x))
                if most is not None:
                    cut += [(part, most)] * (len(x) >= most)
                    spoken += min(max(1, len(x)), most)
        self.tell_lost(silent, cut, unheard, len(flat))
        with parallel(threads=True) as pool:  # Griffin-Lim leaves the lock to others while it works
            clips = iter(list(pool.map(lambda one: self.clip(*one), [one for some in heard for one in some])))
        return [self.join([next(clips) for _ in some]) for some in heard]

    def most_frames(self, part, spoken=0):
        """After how many frames a sentence is cut off where the model does not end it, when those before it have so
        many; less than 1 where it is not heard at all, None where the model always ends it."""

    def tell_lost(self, silent, cut, unheard, of):
        """Tell which of so many sentences the model made no sound of, texts; which were cut off, [(part, after how many
        frames)]; and which were left out, as the time was over, parts."""
        if silent:
            self.note(f"the model made no sound for {quoted(silent)}: try another seed")
        if cut:
            (part, most), seconds = cut[0], cut[0][1] / self.c.frame_rate
            which = f"{len(cut)} of {of} sentences, {part['text'][:40]!r} for one, have" if len(cut) > 1 else (
                f"{part['text'][:40]!r} has")
            flag = "--seconds" if part["end"] else "--seconds, or --eval_seconds in training,"
            allows = "" if most == self.room(part) else f"{flag} allows more, "
            self.note(f"{which} no end after {seconds:.3g} s, and no more is heard: {allows}another seed may end "
                      "sooner")
        if unheard:
            self.note(f"{quoted([part['text'] for part in unheard])}: not heard, as the {unheard[0]['seconds']:g} s of "
                      "--seconds are over before")

    def room(self, part):
        """How many frames of a sentence the model's context holds; None where it does not matter."""

    def shared(self, part):
        """What the sentences of a batch have in common: options of the sampling loop, and whether they have a length.
        """
        return {name: part[name] for name in self.loop_options if name in part}, part["end"] is not None

    def size(self, part):
        """What sentences of a batch should have in common, so that little is padded."""
        return len((part["text"] or "").encode())

    def pause(self):
        return np.zeros(int(PAUSE * self.sample_rate), np.float32)

    def join(self, clips):
        """The clips of some sentences as one."""
        if len(clips) == 1:
            return clips[0]
        silence = torch.full((round(PAUSE * self.mel.frame_rate), self.mel.n_mels), math.log(LOG_FLOOR))
        wavs, mels = ([x for clip in some for x in (clip, pause)][:-1] for some, pause in (
            ([clip.wav for clip in clips], self.pause()), ([clip.mel for clip in clips], silence)))
        codes = None if clips[0].codes is None else torch.cat([clip.codes for clip in clips])
        return Clip(np.concatenate(wavs), torch.cat(mels), codes)

    def under_autocast(self, steps):
        """An iterator's items, each made under autocast; what is done with them is not."""
        while True:
            with autocast(self.device, self.dtype):
                if (step := next(steps, None)) is None:
                    return
            yield step


def speaking_dtype(config, device):
    """bfloat16 where the chip has it, unless the config asks for float32."""
    return torch.float32 if config.get("dtype") == "float32" else pick_dtype("auto", torch.device(device))


def load(ckpt, device="cpu", cast=True):
    """The Speaker of a run folder or checkpoint, with its averaged weights, or of a file of Echolancer's. cast: whether
    a language model's matrices take the type that they are multiplied in, which speaks faster."""
    model, config = load_model(ckpt, device)
    if config["system"] == "flow":
        return FlowSpeaker(model, config)
    codec = load_codec(codec_of(ckpt, config), device)
    model = cast_matrices(model, speaking_dtype(config, device)) if cast else model
    return (CodecSpeaker if config["system"] == "codec" else LLMSpeaker)(model, config, codec)


# ------------------------------------------------------------------------------------------------------------
# Flow TTS

class FlowSpeaker(Speaker):
    """features: the TextFeatures that the model reads, where they are at hand."""
    system, loop_options = "flow", ("steps", "cfg_scale", "solver", "temperature")

    def __init__(self, model, config, features=None):
        super().__init__(model, config, mel_config(model.c))
        self.features = features or TextFeatures(config["text_encoder"], self.device, config.get("phonemes", ""))
        self.vocoder = cache(lambda name: load_vocoder(name, self.mel, self.device))

    def settings(self, given):
        settings = super().settings(given)
        self.vocoder(settings["vocoder"])  # here, and not by several threads at once, nor after hours of training
        return settings

    def parts(self, text, settings):
        parts = super().parts(text, settings)
        if self.features.encoder != "bytes" and not {part["text"] for part in parts} <= set(self.features.spans):
            _ = self.features.byt5  # likewise the encoder, for a text whose states are not kept
        return parts

    def play(self, parts):
        for at in [0, *range(1, len(parts), BATCH)]:  # the first by itself: so it is heard soon
            some = parts[at:at + (BATCH if at else 1)]
            with autocast(self.device, self.dtype):
                mels = self.make(some)
            yield from ([mel] for mel in mels)

    def sound(self, steps, part):
        return (self.clip(mel, part).wav for mel in steps)

    def make(self, parts):
        """Log-mels, a list of (frames, n_mels) float32 on the CPU."""
        text, length = (x.to(self.device) for x in self.features([part["text"] for part in parts]))
        frames, rate = None, self.mel.frame_rate
        if parts[0]["end"]:
            frames = torch.tensor([max(1, round(part["end"] * rate) - round(part["start"] * rate)) for part in parts],
                                  device=self.device)
        how, _ = self.shared(parts[0])
        return solve_flow(self.model, text, length, self.features([""])[0].to(self.device),
                          [part["seed"] for part in parts], frames, **how)

    def clip(self, mel, part):
        return Clip(self.vocoder(part["vocoder"])(mel), mel)


# ------------------------------------------------------------------------------------------------------------
# Codec LM

class CodecSpeaker(Speaker):
    """codec: the one that the model's codes are of."""
    system, loop_options = "codec", ("temperature", "top_k", "top_p", "cfg_scale")

    def __init__(self, model, config, codec):
        super().__init__(model, config, MelConfig(sample_rate=model.c.sample_rate))
        self.codec, self.features = codec, TextFeatures("bytes", phonemes=config.get("phonemes", ""))

    def lacks(self):
        return {} if self.c.cross_every else {"cfg_scale": "this checkpoint was trained without text"}

    def settings(self, given):
        prompt, given = given.get("prompt"), {key: x for key, x in given.items() if key != "prompt"}
        settings = super().settings(given)
        if prompt is None and settings["prompt_wav"]:
            prompt = self.read_prompt(settings)
        return settings | {"prompt": prompt}

    def read_prompt(self, settings):
        """The codes (T, Q) of a recording to go on from. Raises UserError where it is longer than the context."""
        wav, asked = read_wav(settings["prompt_wav"], self.sample_rate), settings["prompt_seconds"]
        samples = round(asked * self.sample_rate)
        if asked and not samples:
            raise UserError(f"--prompt_seconds {asked} is not half a sample: give more, or 0 for the whole recording")
        wav = wav[:samples or None]
        prompt = torch.from_numpy(self.codec.encode([wav])[0])
        if len(prompt) > (room := self.c.context - self.c.codebooks):
            raise UserError(f"a prompt of {len(prompt) / self.c.frame_rate:.1f} s is longer than the context, which "
                            f"holds {room / self.c.frame_rate:.1f} s: give a lower --prompt_seconds")
        return prompt

    def sentences(self, text):
        if text is None:
            return [None]
        if not self.c.cross_every:
            raise UserError("this checkpoint was trained without text: no --text and no --text_file")
        return super().sentences(text)

    def parts(self, text, settings):
        if text is not None and settings["prompt"] is not None:
            raise UserError("--prompt_wav continues a recording, --text begins a new one: give one of them")
        return super().parts(text, settings)

    def play(self, parts):
        return map(self.codes, parts)

    def sound(self, steps, part):
        return decode_stream(self.codec, steps)

    def codes(self, part):
        """What is decoded as it comes: the codes (Q,) of frame after frame, up to the end of the clip."""
        steps = self.under_autocast(self.run(stream_frames, [part]))
        return takewhile(lambda codes: codes[0] < self.c.codebook_size, (step[0] for step in steps))

    def make(self, parts):
        """Codes, a list of (frames, Q) int64, with their prompts."""
        made = self.run(generate_frames, parts)
        return [codes[:self.frames(part)] for codes, part in zip(made, parts)]

    def run(self, loop, parts):
        """stream_frames or generate_frames over some sentences."""
        nothing = torch.zeros(0, self.c.codebooks, dtype=torch.long)
        how, _ = self.shared(parts[0])
        if self.c.cross_every:
            text, length = (x.to(self.device) for x in self.features([part["text"] or "" for part in parts]))
            how |= {"text": text, "length": length}
            if parts[0]["text"] and parts[0]["end"]:
                how["seconds"] = torch.tensor([part["end"] - part["start"] for part in parts], device=self.device)
        return loop(self.model, max(map(self.frames, parts)), [part["seed"] for part in parts],
                    [nothing if part["prompt"] is None else part["prompt"] for part in parts], **how)

    def frames(self, part):
        """How long a clip may become, with its prompt."""
        return frames_left(self, part, 0) + (0 if part["prompt"] is None else len(part["prompt"]))

    def most_frames(self, part, spoken=0):
        return frames_left(self, part, spoken) if part["text"] else None

    def size(self, part):
        return self.frames(part), super().size(part)

    def clip(self, codes, part):
        return Clip(wav := decode(self.codec, codes), log_mel(wav, self.mel), codes)


def frames_left(speaker, part, spoken):
    """How many frames a sentence of a language model may have when those before it have so many: up to where it is to
    end, or as many as the config says. The first has one at least."""
    if part["end"] is None:
        return max(1, round(speaker.config["eval_seconds"] * speaker.c.frame_rate))
    return max(round(part["end"] * speaker.c.frame_rate) - spoken, 0 if spoken else 1)


def decode(codec, codes):
    """The sound of codes (frames, Q), as `decode_stream` makes it: (samples,) float32."""
    return np.concatenate([*decode_stream(codec, codes)] or [codec.decode(codes)])


# ------------------------------------------------------------------------------------------------------------
# LLM TTS

class LLMSpeaker(Speaker):
    """codec: the one that the model's codes are of."""
    system, loop_options = "llm", SAMPLING

    def __init__(self, model, config, codec):
        super().__init__(model, config, MelConfig(sample_rate=model.c.sample_rate))
        self.codec, self.limit, self.letters = codec, speech_limit(model.c), alphabet(
            model.c.characters, self.language)

    def lacks(self):
        return {} if self.c.speaker_width else {"speaker": "this checkpoint was trained without voices"}

    def settings(self, given):
        settings = super().settings(given)
        if self.c.speaker_width and settings["speaker"] is None:
            raise UserError("this checkpoint speaks with the voice of a recording: name one with --speaker")
        if self.c.speaker_width and isinstance(settings["speaker"], (str, Path)):
            config = self.config | {"speaker_width": self.c.speaker_width, "sample_rate": self.sample_rate}
            settings["speaker"] = read_voice(settings["speaker"], config, self.device)
        return settings

    def sentences(self, text):
        if text is None:
            return super().sentences(text)
        letters = self.letters
        text = normalise_text(text, letters.own, self.language)
        sentences = split_text(text, self.limit, self.language, in_letters)
        for one in sentences:
            read_prompt(self.c, one, letters)
        self.tell_unread(letters.unknown(" ".join(sentences)), f"the model reads {letters.what()}, and not",
                         "each is one unknown character to it")
        return sentences

    def share_out(self, seconds, lengths):
        """Each may have what those before it leave, as the model takes the time that it takes."""
        return [(0, seconds - PAUSE * n) for n in range(len(lengths))]

    def reads(self, sentence):
        """Its characters, with � for those that the model does not know."""
        return "".join(self.letters.text([i]) or "\ufffd" for i in self.letters.ids(sentence))

    def play(self, parts):
        for at in range(0, len(parts), STREAMS):  # so many sentences at once
            some = parts[at:at + STREAMS]
            yield from follow(self.under_autocast(self.run(stream_speech, some)), len(some))

    def sound(self, steps, part):
        return decode_stream(self.codec, steps)

    def shared(self, part):
        return super().shared(part)[0]

    def most_frames(self, part, spoken=0):
        return min(frames_left(self, part, spoken), self.room(part))

    def room(self, part):
        return self.c.context - len(self.prompt(part))

    def prompt(self, part):
        return read_prompt(self.c, part["text"], self.letters)

    def make(self, parts):
        """Codes, a list of (n, 1) int64."""
        return [codes[:, None] for codes in self.run(generate_speech, parts)]

    def run(self, loop, parts):
        """stream_speech or generate_speech over some sentences."""
        how = self.shared(parts[0])
        if self.c.speaker_width:
            how["speaker"] = torch.stack([part["speaker"] for part in parts]).to(self.device)
        return loop(self.model, [self.prompt(part) for part in parts], [part["seed"] for part in parts],
                    [max(1, self.most_frames(part)) for part in parts], **how)

    def clip(self, codes, part):
        return Clip(wav := decode(self.codec, codes), log_mel(wav, self.mel), codes)


def read_prompt(c, text, letters):
    """A text as the tokens that a sentence begins with. Raises UserError where the model knows none of its letters."""
    if not letters.has_letters(characters := letters.ids(text)):
        raise UserError(f"the model reads {letters.what()}, and {text[:20]!r} has none")
    return sentence(c, characters)


def speech_limit(c):
    """How many letters a sentence may have, as `in_letters` counts: each needs room for about four codes."""
    return (c.context - 3) // 5


def speakable(c, data, clips):
    """Those of some clips of a SentenceDataset that are spoken whole: neither too long nor without a letter."""
    limit = speech_limit(c)
    return [i for i in clips.tolist()
            if data.alphabet.has_letters(data.characters(i)) and in_letters(data.text(i)) <= limit]
