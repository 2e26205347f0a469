"""From a checkpoint to a waveform: loading, options, sampling."""

import hashlib
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from model import LLM, CodecConfig, CodecLM, FlowConfig, FlowTTS, LLMConfig, sentence
from trivox import echolancer
from trivox.audio import MelConfig, read_wav
from trivox.common import (UserError, autocast, find_checkpoint, load_checkpoint, load_weights,
                           pick_dtype, read_yaml)
from trivox.datasets import TokenDataset
from trivox.generate import generate_frames, generate_speech, solve_flow
from trivox.text import MAX_TEXT_BYTES, TextFeatures, character_ids, normalise_text
from trivox.voices import load_embedder

# ------------------------------------------------------------------------------------------------------------
# Options and texts

def add_options(parser):
    """The options that sample.py and evaluate.py share; what is not given is taken from the checkpoint's config."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--cfg_scale", dest="eval_cfg_scale", type=float, help="guidance by the text, 1 for none")
    flow = parser.add_argument_group("flow TTS")
    flow.add_argument("--steps", dest="eval_steps", type=int, help="of the solver")
    flow.add_argument("--solver", dest="eval_solver", choices=("euler", "midpoint", "heun"))
    flow.add_argument("--vocoder", dest="eval_vocoder", choices=("griffinlim", "bigvgan"))
    codec = parser.add_argument_group("codec LM and LLM TTS")
    codec.add_argument("--temperature", dest="eval_temperature", type=float, help="0 takes the most probable codes")
    codec.add_argument("--top_k", dest="eval_top_k", type=int, nargs="+", help="0 for all; one number, or one a book")
    codec.add_argument("--top_p", dest="eval_top_p", type=float, nargs="+", help="one number, or one a book")
    codec.add_argument("--prompt_seconds", dest="eval_prompt_seconds", type=float, help="of a recording that goes on")
    codec.add_argument("--repetition_penalty", dest="eval_repetition_penalty", type=float, help="1 for none")
    return flow, codec


def fill_options(args, config):
    """Replace the options that were not given by the config's. Raises UserError for one of another system's."""
    for key, value in vars(args).items():
        if key.startswith("eval_"):
            if value is not None and key not in config:
                raise UserError(f"--{key.removeprefix('eval_')} is not an option of {config['system']!r} checkpoints")
            setattr(args, key, config.get(key) if value is None else value)
    if args.eval_steps is not None and args.eval_steps < 1:
        raise UserError(f"--steps {args.eval_steps}: the solver needs at least one")


def refuse_options(args, system, *names):
    """Raises UserError for the first of the named options that was given: checkpoints of `system` do not have it."""
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is not an option of {system!r} checkpoints")


def split_text(text, limit=MAX_TEXT_BYTES - 1):
    """Sentences of a text; those beyond `limit` bytes are cut between words.

    Raises UserError for a text without a letter or digit and for a word beyond the limit.
    """
    if not re.search(r"\w", text):
        raise UserError("there is nothing to say: the text has no letter and no digit")
    pieces = []
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        piece = ""
        for word in sentence.split():
            if len(word.encode()) > limit:
                raise UserError(f"{word[:20]!r}… is a word of {len(word.encode())} bytes; the model reads {limit}")
            if len(f"{piece} {word}".encode()) > limit:
                pieces, piece = [*pieces, piece], ""
            piece = f"{piece} {word}".strip()
        if re.search(r"\w", piece):
            pieces.append(piece)
        elif pieces and len(f"{pieces[-1]} {piece}".encode()) <= limit:  # a mark by itself is no sentence
            pieces[-1] += f" {piece}"
    return pieces


PAUSE = 0.15  # seconds between sentences

# ------------------------------------------------------------------------------------------------------------
# Flow TTS

def mel_config(c):
    """The log-mel settings in a config."""
    return MelConfig(**{f.name: getattr(c, f.name) for f in fields(MelConfig)})


def load_flow(ckpt, device):
    """The flow TTS of a run folder or checkpoint, with its averaged weights.

    Returns (model, its TextFeatures, the config it was trained with, a dict).
    """
    folder = find_checkpoint(ckpt)
    config, weights = load_checkpoint(folder, "flow", "ema")
    model = FlowTTS(FlowConfig(**{f.name: config[f.name] for f in fields(FlowConfig)}))
    load_weights(model, weights, folder / "ema.safetensors")
    return model.eval().to(device), TextFeatures(config["text_encoder"], device), config


def generate_mels(model, features, texts, seed=0, seconds=None, batch_size=32, **options):
    """Log-mels of texts, each within the encoder's limit; `seconds` (a list) replaces the predicted durations.

    options: steps, cfg_scale and solver of `solve_flow`. Returns a list of (frames, n_mels) float32 on the CPU.
    What a text becomes depends on its place in the list and on `seed`, not on its neighbours.
    """
    device = model.mel_mean.device
    empty = features([""])[0].to(device)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].encode()))
    mels = [None] * len(texts)
    for some in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        text, length = (x.to(device) for x in features([texts[i] for i in some]))
        rate = mel_config(model.c).frame_rate
        frames = seconds and torch.tensor([max(1, round(seconds[i] * rate)) for i in some], device=device)
        with autocast(device, pick_dtype("auto", device)):
            batch = solve_flow(model, text, length, empty, [seed * 1_000_003 + i for i in some], frames, **options)
        for i, mel in zip(some, batch):
            mels[i] = mel
    return mels


# ------------------------------------------------------------------------------------------------------------
# Codec LM

def load_codec_lm(ckpt, device):
    """The codec LM of a run folder or checkpoint, with its averaged weights. Returns (model, its config, a dict)."""
    folder = find_checkpoint(ckpt)
    config, weights = load_checkpoint(folder, "codec", "ema")
    model = CodecLM(CodecConfig(**{f.name: config[f.name] for f in fields(CodecConfig)}))
    load_weights(model, weights, folder / "ema.safetensors")
    return model.eval().to(device), config


def cast_matrices(model, dtype):
    """The same model with its matrices in a dtype, in place: a decoding step mostly waits for them to be read."""
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.to(dtype)
    return model


def open_tokens(folder, c, codec=None):
    """The token data set at `folder`, which has to be of the codec and geometry of the config `c`, and where a codec of
    our own is kept in the folder `codec`, made with that very one."""
    data = TokenDataset(folder, codec=c.codec, sample_rate=c.sample_rate, frame_rate=c.frame_rate,
                        codebooks=c.codebooks, codebook_size=c.codebook_size)
    check_codec(folder, codec or folder)
    return data


def check_codec(folder, kept):
    """Raises UserError where a codec of our own is kept in the folder `kept` that did not make the tokens at
    `folder`."""
    mine, theirs = (Path(place) / "codec.safetensors" for place in (kept, folder))
    if theirs.exists() and mine.exists() and mine.read_bytes() != theirs.read_bytes():
        raise UserError(f"the codec that made the tokens at {folder} was fitted anew: it is not that of {kept}; "
                        "data.py tokenize --codec takes the folder of one to use again")


def codec_folder(folder, config):
    """Where the codec of the checkpoint at `folder` is: RUN/codec, in which the trainer keeps it, or the data set."""
    kept = folder.parents[1] / "codec"
    return kept if kept.exists() else config["data_dir"]


def sampling(c, codebooks=1, names=("temperature", "top_k", "top_p", "cfg_scale")):
    """Options for `stream_frames` or, by other names, `stream_speech`, from a config or from the command line.

    Raises UserError for values out of range and for lists that are not of one number a book.
    """
    options = {name: getattr(c, f"eval_{name}") for name in names}
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        if len(values) not in (1, codebooks):
            raise UserError(f"--{name} has {len(values)} numbers for {codebooks} codebooks: give one, or one for each")
        if min(values) < 0 or name == "top_p" and not all(0 < p <= 1 for p in values) or (
                name == "repetition_penalty" and not min(values)):
            raise UserError(f"--{name} {min(values)} is out of range")
        options[name] = values[0] if len(values) == 1 else values
    return options


def generate_codes(model, features, prompts, frames, batch_size=32, **options):
    """Sample a clip for each prompt, a dict of its seed, its codes (T, Q) to go on from, T from 0 up, and its text.

    frames: how long a clip may become, or a list with a number for each. options: those of `sampling`. Returns a list
    of codes (frames, Q) with their prompts. What a clip becomes does not depend on its neighbours.
    """
    device, codes = model.embedding.weight.device, [None] * len(prompts)
    frames = frames if isinstance(frames, list) else [frames] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (frames[i], len(prompts[i]["text"] or "")))
    for some in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        text = read_texts(model, features, [prompts[i]["text"] or "" for i in some])
        with autocast(device, pick_dtype("auto", device)):
            batch = generate_frames(model, max(frames[i] for i in some), [prompts[i]["seed"] for i in some],
                                   [prompts[i]["codes"] for i in some], **text, **options)
        for i, clip in zip(some, batch):
            codes[i] = clip[:frames[i]]
    return codes


def read_texts(model, features, texts):
    """The arguments of CodecLM.stream that hold texts: none where the model has none."""
    if not model.c.cross_every:
        return {}
    text, length = (x.to(model.embedding.weight.device) for x in features(texts))
    return {"text": text, "length": length}


def play(codec, steps, window=4.0, overlap=0.25):
    """Decode frames as they come. steps: an iterable of (Q,) codes. Yields pieces of the waveform, (samples,) float32.

    Codecs look around, and Griffin-Lim finds its own phases; so windows of `window` seconds are decoded, and where they
    overlap one is faded into the next. What fits into one window is what the codec makes of it.
    """
    window, overlap = round(window * codec.frame_rate), max(1, round(overlap * codec.frame_rate))
    n = overlap * codec.hop_length
    fade, tail, codes = np.sin(np.pi / 2 * (np.arange(n) + 0.5) / n) ** 2, np.zeros(0), []

    def decoded():
        wav = np.array(codec.decode(torch.stack(codes)))
        wav[:len(tail)] = tail * (1 - fade[:len(tail)]) + wav[:len(tail)] * fade[:len(tail)]
        return wav

    for step in steps:
        codes.append(step)
        if len(codes) == window + overlap:
            wav = decoded()
            yield wav[:-n]
            tail, codes = wav[-n:], codes[-overlap:]
    if codes:
        yield decoded()


# ------------------------------------------------------------------------------------------------------------
# LLM TTS

SPEAKING = "temperature", "top_k", "top_p", "repetition_penalty"  # the options of `stream_speech`


def read_config(ckpt):
    """The config of a run, of a checkpoint, or what is known of a file of Echolancer's, as a dict."""
    config = echolancer.CONFIG if echolancer.is_one(ckpt) else read_yaml(find_checkpoint(ckpt) / "config.yaml")
    if config.get("system") not in ("flow", "codec", "llm"):
        raise UserError(f"{ckpt} is a checkpoint of the {config.get('system')!r} system, which there is not")
    return config


def load_llm(ckpt, device):
    """The LLM TTS of a run folder or checkpoint, with its averaged weights, or of a file of Echolancer's; an adapter is
    merged into the model that it was trained on. Returns (model, its config, a dict).

    Raises UserError for an adapter whose base is not there, or not what it was.
    """
    if echolancer.is_one(ckpt):
        return echolancer.load(ckpt).eval().to(device), echolancer.CONFIG
    folder = find_checkpoint(ckpt)
    config, weights = load_checkpoint(folder, "llm", "ema")
    model = LLM(LLMConfig(**{f.name: config[f.name] for f in fields(LLMConfig)}))
    if config["lora_rank"]:
        base, found = load_llm(config["init_from"], "cpu")[0].state_dict(), weights.pop("base")
        if not torch.equal(found, digest(base)):
            raise UserError(f"{folder} is an adapter for another model than is now at {config['init_from']}")
        weights = base | weights
    load_weights(model, weights, folder / "ema.safetensors")
    return model.eval().to(device).merge(), config


def initial_weights(model, source, data_dir):
    """Load the weights of `source`, any that `load_llm` reads, to train on; voices and adapters that it does not have
    begin as nothing. Raises UserError where they do not fit the model or the codec of the tokens at `data_dir`."""
    before, _ = load_llm(source, "cpu")
    weights = before.state_dict()
    if not echolancer.is_one(source):
        check_codec(data_dir, codec_folder(find_checkpoint(source), {"data_dir": data_dir}))
    new = {key: value for key, value in model.state_dict().items()
           if key not in weights and ("lora_" in key or "speaker_" in key or "to_gamma_beta" in key)}
    load_weights(model, weights | new, source)
    for name in "activation", "alibi", "heads", "kv_heads", "negative_eigenvalues":  # which shapes do not tell
        if (here := getattr(model.c, name)) != (there := getattr(before.c, name)):
            raise UserError(f"{name} is {there} in {source}, and {here} in this config")
    if model.c.lora_rank and any("lora_" not in key for key in new):
        raise UserError(f"an adapter learns no voices, and {source} has none: fine-tune it with speaker_width first")


def digest(weights):
    """SHA-256 of a state dict but for adapters in it, as a tensor (32,) uint8."""
    sha = hashlib.sha256()
    for key in sorted(key for key in weights if "lora_" not in key):
        sha.update(weights[key].detach().cpu().contiguous().numpy().tobytes())
    return torch.tensor(list(sha.digest()), dtype=torch.uint8)


def read_voice(path, config, device="cpu"):
    """The embedding (speaker_width,) float32 of a recording's voice, or one that was stored as .npy.

    Raises UserError for a recording that is silent, too short or no audio, and for an embedding of another width than
    the checkpoint's.
    """
    wanted = config["speaker_width"]
    if Path(path).suffix == ".npy":
        try:
            embedding = np.load(path, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError) as e:
            raise UserError(f"cannot read the embedding {path}: {e}") from None
    else:
        embedder, wav = load_embedder(config["speaker_embedder"], device), read_wav(path, config["sample_rate"])
        try:
            embedding = embedder(wav, config["sample_rate"])
        except UserError as e:
            raise UserError(f"no voice can be heard in {path}: {e}") from None
    if embedding.shape != (wanted,):
        raise UserError(f"{path} gives an embedding of shape {embedding.shape}; the checkpoint reads ({wanted},)")
    return torch.from_numpy(embedding)


def read_prompt(c, text):
    """A text as the tokens that a sentence begins with. Raises UserError where the model knows none of its letters."""
    characters = character_ids(normalise_text(text))
    if not has_letters(characters):
        raise UserError(f"the model reads English letters, and {text[:20]!r} has none")
    return sentence(c, characters)


def speech_limit(c):
    """How many characters a sentence may have: each needs room for about four codes."""
    return (c.context - 3) // 5


def speakable(c, data, clips):
    """Those of some clips of a SentenceDataset that `stream_speech` takes: neither too long nor without a letter."""
    characters = data.lengths(clips)[1]
    return [i for i in clips[3 * characters + 3 <= c.context].tolist() if has_letters(data.characters(i))]


def has_letters(characters):
    return ((characters >= 5) & (characters < 31)).any()


def speak_sentences(model, texts, seeds, speakers=None, seconds=15.0, batch_size=32, **options):
    """Codes (n, 1) int64 for each of some texts, of at most `seconds`. speakers: embeddings (N, speaker_width) or None;
    options: SPEAKING. What a text becomes does not depend on its neighbours."""
    device, codes = model.embedding.weight.device, [None] * len(texts)
    prompts, frames = [read_prompt(model.c, text) for text in texts], max(1, round(seconds * model.c.frame_rate))
    order = sorted(range(len(texts)), key=lambda i: len(prompts[i]))
    for some in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        voices = None if speakers is None else speakers[some].to(device)
        with autocast(device, pick_dtype("auto", device)):
            batch = generate_speech(model, [prompts[i] for i in some], [seeds[i] for i in some], frames, speaker=voices,
                                    **options)
        for i, clip in zip(some, batch):
            codes[i] = clip[:, None]
    return codes


def follow(stream, sentences):
    """From what `stream_speech` yields, an iterator of codes (1,) for each of so many sentences, to be read in order:
    while the first is heard, the others are already being spoken."""
    heard, ended = [[] for _ in range(sentences)], [False] * sentences

    def codes(i):
        n = 0
        while True:
            while n < len(heard[i]):
                yield heard[i][n]
                n += 1
            step = None if ended[i] else next(stream, None)
            if step is None:
                return
            for k, code in enumerate(step):
                ended[k] |= int(code) < 0
                if not ended[k]:
                    heard[k].append(code[None])

    return [codes(i) for i in range(sentences)]


def llm_codec_folder(ckpt, config):
    """Where the codec of an LLM TTS is, or its name."""
    return config["codec"] if echolancer.is_one(ckpt) else codec_folder(find_checkpoint(ckpt), config)
