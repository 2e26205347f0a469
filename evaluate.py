"""From checkpoints to numbers: how near is what they make to the recordings, and how well is what they say understood?

    python evaluate.py --ckpt runs/flow_demo                  on the held-out clips of its data set
    python evaluate.py --ckpt runs/flow_demo --prompts FILE   on the sentences of a file, one a line
    python evaluate.py --ckpt runs/flow_demo --testset ljspeech --testset_dir DIR    on a test list of other papers'
    python evaluate.py --ckpt runs/codec_demo
    python evaluate.py --ckpt runs/codec_demo_music*          several runs of one system, side by side
    python evaluate.py --ckpt runs/a runs/b --paired          and is b better than a, on the same sentences?
    python evaluate.py --ckpt runs/llm_demo_speakers          also whose voice it is
    python evaluate.py audit --ckpt runs/flow_demo            which transcripts of its data set are wrong?

Writes wavs, spectrograms and summary.json into RUN/evaluation, or --out. Beside what was generated stand the recordings
after the same mel and vocoder, or the same codec, which is the best that it allows, and as they are. Durations are
predicted. In brackets stand intervals of 95 %, over sentences.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

from trivox import common  # first: from here on Ctrl-C is quiet

import numpy as np
import torch
from pydantic import PositiveInt

from trivox.audio import log_mel
from trivox.checkpoints import cast_matrices, check_codec, read_config
from trivox.common import Folder, Share, UserError, flag, init_distributed, pick_dtype, some_path
from trivox.datasets import MelDataset, SentenceDataset, TokenDataset, open_tokens
from trivox.echolancer import is_one as is_echolancer
from trivox.files import new_folder, write_whole
from trivox.judges import judge_speech
from trivox.metrics import (band_frames, coherence, frechet_distance, kernel_distance, load_embedding, mel_distances,
                            name_speakers, perplexity, score_clips, score_sentences, shuffled, unigram_cross_entropy)
from trivox.options import SAMPLING, add_flags, given_flags, read_options
from trivox.pages import logged
from trivox.parallel import parallel
from trivox.plots import plot_spectrograms
from trivox.recognisers import NAMES, load_recognisers
from trivox.recordings import read_wav, write_wav
from trivox.run_folder import find_checkpoint
from trivox.speak import Clip, LLMSpeaker, decode, load, speakable
from trivox.tables import describe, describe_paired
from trivox.testsets import LISTS, read_testset
from trivox.text import read_lines

SENTENCES = 512  # at most; of 64, no one can tell an error rate of 0.5 % from one of 0.9

# ------------------------------------------------------------------------------------------------------------
# Flow TTS

def evaluate_flow(speaker, args, out):
    """Speak the prompts and judge them beside the reference recordings. Writes files to `out`, returns the summary."""
    config, mel, given = speaker.config, speaker.mel, given_flags(args)
    options = read_options("flow", config, given)
    data = MelDataset(args.data_dir or config["data_dir"], mel, speaker.language)
    prompts, clips = str(args.prompts or "") or ("overfit" if config["overfit"] else "heldout"), []
    if prompts in ("heldout", "overfit"):
        clips = data.clips("val") if prompts == "heldout" else data.clips("all")[:config["overfit"] or 64]
        clips = sayable(speaker, clips, data.rows, data.folder)[:args.clips or SENTENCES]
    texts = [data.rows[i]["text"] for i in clips] or read_lines(prompts)[:args.clips]
    judges = load_recognisers(args.recogniser, texts, data.grammar, speaker.device, language=speaker.language)
    made = speaker.speak([{"text": text, "seed": options["seed"] + n} for n, text in enumerate(texts)],
                         **given | {"seed": None})

    vocoder, references = speaker.vocoder(options["vocoder"]), [data.mel(i) for i in clips]
    with parallel(threads=True) as pool:
        ceiling = list(pool.map(vocoder, references))
    speakers = [data.rows[i].get("speaker", "") for i in clips]
    heard, rows = judge_speech(judges, mel.sample_rate, texts, [clip.wav for clip in made], ceiling,
                               recordings(data, clips, mel.sample_rate), speakers, data.folder / "judged.json",
                               speaker.language)
    summary = {**said(options), **heard}
    if clips:
        for row, clip, reference in zip(rows, made, references):
            row["mel_distance"], row["mcd"] = mel_distances(clip.mel, reference)
            row["duration_error"] = abs(len(clip.mel) / len(reference) - 1)
        for key in ("mel_distance", "mcd", "duration_error"):
            summary[key] = float(np.mean([row[key] for row in rows]))
    write_clips(speaker, out, made, list(map(Clip, ceiling, references)), texts, "recording", range(8))
    write_summary(speaker, out, summary, rows)
    return summary, rows


# ------------------------------------------------------------------------------------------------------------
# Codec LM

def evaluate_codec(speaker, args, out):
    """Score the held-out codes, sample as many clips, and judge them beside the recordings through the same codec.
    Writes files to `out`, returns the summary."""
    model, c, config, given = speaker.model, speaker.c, speaker.config, given_flags(args)
    options = speaker.settings(given)
    if given.get("seconds") and not c.cross_every:
        raise UserError("--seconds is for sample.py: here clips are made as long as the recordings beside them")
    start = round(options["prompt_seconds"] * c.frame_rate)
    if options["prompt_seconds"] and not start:
        raise UserError(f"--prompt_seconds {options['prompt_seconds']} is not half a frame: give more, or 0 for none")
    data = open_tokens(TokenDataset, source := args.data_dir or config["data_dir"], c, speaker.language)
    check_codec(source, args.ckpt)
    val, train = data.clips("val"), data.clips("train")
    if config["overfit"]:
        val = train = data.clips("all")[:config["overfit"]]
    real = [data.codes(i)[:c.context - c.codebooks] for i in val]

    # What it knows of the codes, beside what their frequencies tell
    order, sums = sorted(range(len(val)), key=lambda n: len(real[n])), 0
    for some in (order[i:i + 8] for i in range(0, len(order), 8)):
        sums = sums + score_clips(model, data, speaker.features, [val[n] for n in some], speaker.device,
                                  pick_dtype(config["dtype"], speaker.device)).cpu().numpy()
    losses, hits = (part / sum(map(len, real)) for part in (sums[:c.codebooks], sums[c.codebooks:-1]))
    unigram = unigram_cross_entropy([data.codes(i).numpy() for i in train], [x.numpy() for x in real], c.codebook_size)
    summary = {
        "parameters": sum(p.numel() for p in model.parameters()), "checkpoint": find_checkpoint(args.ckpt).name,
        "steps_per_second": training_speed(args.ckpt), "clips": len(val), **said(options),
        "val_loss": losses.mean(), "perplexity": perplexity(losses.mean()), "accuracy": hits.mean(),
        "unigram": unigram.mean(), "below_unigram": 1 - losses.mean() / unigram.mean(),
        "books": [dict(zip(("loss", "unigram", "below_unigram", "accuracy"), map(float, book)))
                  for book in zip(losses, unigram, 1 - losses / unigram, hits)],
    }

    # What it makes: for each of the first held-out clips one as long, or with text, the same sentence
    judges = load_recognisers(args.recogniser, [row["text"] for row in data.rows], data.grammar, speaker.device,
                              language=speaker.language) if c.cross_every else []
    cast_matrices(model, speaker.dtype)
    spoken = (sayable(speaker, val, data.rows, data.folder)[:args.clips or SENTENCES] if c.cross_every
              else val[:args.clips or 64])
    real = [real[val.index(i)] for i in spoken]
    texts = [data.rows[i]["text"] if c.cross_every else None for i in spoken]
    requests = [{"text": text, "seed": options["seed"] + n} | (
        {} if c.cross_every else {"seconds": len(x) / c.frame_rate}) for n, (text, x) in enumerate(zip(texts, real))]
    made = speaker.speak(requests, **given | {"seed": None})
    again = [n for n, x in enumerate(real) if len(x) > start > 0][:0 if c.cross_every else 4]
    continued = speaker.speak([{"seed": options["seed"] + n, "prompt": real[n][:start],
                                "seconds": (len(real[n]) - start) / c.frame_rate} for n in again],
                              **given | {"seed": None})
    decoded = through_codec(speaker, real)

    wavs, rate, rng, rows = [clip.wav for clip in made], speaker.sample_rate, np.random.default_rng(0), []
    if c.cross_every:
        heard, rows = judge_speech(judges, rate, texts, wavs, [clip.wav for clip in decoded],
                                   recordings(data, spoken, rate), [data.rows[i].get("speaker", "") for i in spoken],
                                   data.folder / "judged.json", speaker.language)
        summary |= heard | judge_durations(rows, made, decoded)
    summary["embedding"], embed = load_embedding(args.embedding or config["eval_embedding"], speaker.device)
    known = [embed(clip.wav, rate) for clip in decoded]  # one (N, D) a clip
    noise = [embed(0.1 * rng.standard_normal(len(clip.wav)), rate) for clip in decoded]
    if len(known) > 1:
        summary["frechet_halves"] = frechet_distance(np.concatenate(known[::2]), np.concatenate(known[1::2]))
        summary["kad_halves"] = kernel_distance(known[::2], known[1::2])
    found = [embed(wav, rate) for wav in wavs]
    summary |= {"kad": kernel_distance(found, known), "kad_noise": kernel_distance(noise, known)}
    known = np.concatenate(known)
    summary |= {"frechet": frechet_distance(np.concatenate(found), known),
                "frechet_noise": frechet_distance(np.concatenate(noise), known),
                **judge_form([band_frames(wav, rate) for wav in wavs],
                             [band_frames(clip.wav, rate) for clip in decoded])}

    write_clips(speaker, out, made, decoded, texts, "recording, codec", range(8))
    for n, clip in zip(again, continued):
        write_wav(out / f"{n:03d}_continued.wav", clip.wav, rate)
        plot_spectrograms(out / f"{n:03d}_continued.png", f"after {options['prompt_seconds']:.1f} s of the recording",
                          {"continued": clip.mel, "recording, codec": decoded[n].mel}, speaker.mel)
    write_summary(speaker, out, summary, rows)
    return summary, rows


# ------------------------------------------------------------------------------------------------------------
# LLM TTS

def evaluate_llm(speaker, args, out):
    """Score held-out sentences, speak them, and judge them beside the recordings through the same codec; where there
    are voices, each with that of another clip of its speaker. Writes files to `out`, returns the summary."""
    model, c, config, given, rate = speaker.model, speaker.c, speaker.config, given_flags(args), speaker.sample_rate
    options = read_options("llm", config, given)
    exported = OnnxSpeaker(model, config, speaker.codec, args.onnx) if args.onnx else None
    source, rng = args.data_dir or config["data_dir"], np.random.default_rng(options["seed"])
    data = open_tokens(SentenceDataset, source, c, speaker.language)
    check_codec(source, args.ckpt)
    train, val = data.clips("train"), data.clips("val")
    if config["overfit"]:
        train = val = data.clips("all")[:config["overfit"]]

    # Clips to speak: three quarters of trained voices where there are others, which only the held-out clips have
    speakers = {i: int(s) for some in (train, val) for i, s in zip(some.tolist(), data.speaker(some))}
    trained = {speakers[i] for i in train.tolist()}
    can_be_spoken = speakable(c, data, val)
    if not can_be_spoken:
        raise UserError(f"none of the {len(val)} held-out sentences of {source} fits into the context of {c.context}")
    old, new = ([i for i in can_be_spoken if (speakers[i] in trained) == known] for known in (True, False))
    most = args.clips or SENTENCES
    clips = old[:most * 3 // 4 if new else most]
    count = len(clips)
    clips += interleave(new, speakers)[:most - len(clips)]
    texts = [data.text(i) for i in clips]

    # Other clips of their speakers: one to show the voice, the others to learn to tell voices by
    voices, known = None, []
    if c.speaker_width:
        data.load_embeddings(config["speaker_embedder"], c.speaker_width)
        others = {s: [i for i in (train if s in trained else val).tolist() if speakers[i] == s and i not in clips]
                  for s in {speakers[i] for i in clips}}
        shown = [int(rng.choice(others[speakers[i]][::2])) if others[speakers[i]] else i for i in clips]
        voices = torch.stack([torch.from_numpy(data.embedding(i)) for i in shown])
        known = [i for s in others for i in others[s][1::2][:40]]

    sums = score_sentences(model, data, clips, voices, speaker.device, pick_dtype(config["dtype"], speaker.device))
    counts = sum(np.bincount(data.codes(i), minlength=c.codebook_size) for i in train[:16384].tolist())
    p = counts[counts > 0] / counts.sum()
    summary = {
        "parameters": sum(p.numel() for p in model.parameters()), "checkpoint": find_checkpoint(args.ckpt).name,
        "clips": len(clips), "steps_per_second": training_speed(args.ckpt), **said(options),
        "text_perplexity": perplexity(sums[0] / sums[2]), "audio_perplexity": perplexity(sums[1] / sums[3]),
        "unigram_perplexity": math.exp(-(p * np.log(p)).sum()),
    }

    judges = load_recognisers(args.recogniser, sorted(set(texts)), data.grammar, speaker.device,
                              language=speaker.language)
    cast_matrices(model, speaker.dtype)
    speaker = exported or speaker
    requests = [{"text": text, "seed": options["seed"] + n} | ({} if voices is None else {"speaker": voices[n]})
                for n, text in enumerate(texts)]
    made = speaker.speak(requests, **given | {"seed": None, "speaker": None})
    real = through_codec(speaker, [torch.from_numpy(data.codes(i).astype(np.int64))[:, None] for i in clips])
    wavs, decoded = ([clip.wav for clip in some] for some in (made, real))
    heard, rows = judge_speech(judges, rate, texts, wavs, decoded, recordings(data, clips, rate),
                               [speakers[i] for i in clips], data.folder / "judged.json", speaker.language)
    summary |= heard | judge_durations(rows, made, real)
    if known:
        read = [read_wav(path, rate) for path in (data.recording(i) for i in known)]
        names = [data.speakers[speakers[i]] for i in known]
        asked = [data.speakers[speakers[i]] for i in clips]
        for key, some in (("speaker", wavs), ("speaker_ceiling", decoded)):
            named = name_speakers(read, names, some, rate)
            right = [a == b for a, b in zip(named, asked)]
            for row, name in zip(rows, named):
                row[key] = name
            summary[f"{key}_accuracy"] = float(np.mean(right[:count]))
            if new:
                summary[f"{key}_accuracy_new"] = float(np.mean(right[count:]))
        summary |= {"speaker_clips": len(asked[:count]), "speaker_clips_new": len(asked[count:]),
                    "voices": len(set(asked[:count])), "voices_new": len(set(asked[count:]))}
        for row, name in zip(rows, asked):
            row["speaker_asked"] = name
    write_clips(speaker, out, made, real, texts, "recording, codec", {*range(8), *range(len(made))[-4:]})
    write_summary(speaker, out, summary, rows)
    return summary, rows


class OnnxSpeaker(LLMSpeaker):
    """Speaks by the model that export.py has put into a folder."""

    def __init__(self, model, config, codec, folder):
        super().__init__(model, config, codec)
        from trivox.speak_onnx import Speaker, read_config

        about = read_config(folder / "config.json")
        for name in ("codebook_size", "speaker_width"):
            if about[name] != (wanted := getattr(self.c, name)):
                raise UserError(f"{folder} is an export of another model: its {name} is {about[name]}, and the "
                                f"checkpoint's {wanted}")
        any_voice = np.zeros(self.c.speaker_width, np.float32) if self.c.speaker_width else None
        self.exported = Speaker(folder, voice=any_voice)

    def make(self, parts):
        made = []
        for part in parts:
            if self.c.speaker_width:
                self.exported.speak_like(part["speaker"].numpy())
            frames, how = max(1, self.most_frames(part)), {key: part[key] for key in SAMPLING}
            codes = list(self.exported.codes(part["text"], part["seed"], frames, **how))
            made.append(torch.tensor(codes, dtype=torch.long)[:, None])
        return made


def interleave(clips, speakers):
    """Clips in an order that takes one of each speaker in turn."""
    turn = Counter()
    return sorted(clips, key=lambda i: (turn.update([speakers[i]]), turn[speakers[i]])[1])


# ------------------------------------------------------------------------------------------------------------
# Test lists

def evaluate_testset(speaker, args, out):
    """Say the sentences of a test list, with voices in that which the list shows, and judge them beside the recordings.
    Writes files to `out`, returns the summary."""
    found, given, rate = read_testset(args.testset, args.testset_dir), given_flags(args), speaker.sample_rate
    voices = speaker.system == "llm" and speaker.c.speaker_width
    if voices and not found[0]["prompt"]:
        raise UserError(f"the list {args.testset} shows no voice to speak with, and {args.ckpt} speaks with a "
                        "recording's")
    options = read_options(speaker.system, speaker.config, given)
    clips = [found[n] for n in sayable(speaker, range(len(found)), found, args.testset)[:args.clips]]
    texts = [clip["text"] for clip in clips]
    judges = load_recognisers(args.recogniser, texts, None, speaker.device, language=speaker.language)
    real = [read_wav(clip["recording"], rate) for clip in clips]  # what is damaged is told before hours of speaking
    if speaker.system != "flow":
        cast_matrices(speaker.model, speaker.dtype)
    made = speaker.speak([{"text": clip["text"], "seed": options["seed"] + n} | (
        {"speaker": clip["prompt"]} if voices else {}) for n, clip in enumerate(clips)], **given | {"seed": None})
    if speaker.system == "flow":
        with parallel(threads=True) as pool:
            mels = [log_mel(wav, speaker.mel) for wav in real]
            through = list(map(Clip, pool.map(speaker.vocoder(options["vocoder"]), mels), mels))
    else:
        through = through_codec(speaker, [torch.from_numpy(speaker.codec.encode([wav])[0]) for wav in real])
    heard, rows = judge_speech(judges, rate, texts, [clip.wav for clip in made], [clip.wav for clip in through], real,
                               [clip["speaker"] for clip in clips], language=speaker.language)
    summary = {"testset": args.testset, "checkpoint": find_checkpoint(args.ckpt).name, **said(options), **heard,
               **judge_durations(rows, made, through)}
    write_clips(speaker, out, made, through, texts, "recording", range(8))
    write_summary(speaker, out, summary, rows)
    return summary, rows


# ------------------------------------------------------------------------------------------------------------
# What the systems share

def said(options):
    """Options as a summary has them."""
    return {name: value for name, value in options.items() if isinstance(value, (int, float, str, list))}


def sayable(speaker, clips, rows, where):
    """Those of some clips, by number, whose texts can be spoken; says how many of `where` cannot, and which these are,
    the first five. rows: of each clip a dict with id and text."""
    can = {i: speaker.sayable(rows[i]["text"]) for i in clips}
    kept, left = ([i for i in clips if can[i] == said] for said in (True, False))
    if not kept:
        raise UserError(f"none of the {len(clips)} clips of {where} has a text that can be spoken")
    if left:
        print(f"note: {len(left)} of {len(clips)} clips of {where} have no text that can be spoken, and are left out: "
              + ", ".join(rows[i]["id"] for i in left[:5]) + ", …" * (len(left) > 5))
    return kept


def through_codec(speaker, codes):
    """Recordings as the codec gives them back: Clips of lists of codes (frames, Q)."""
    with parallel(threads=True) as pool:
        wavs = list(pool.map(lambda x: decode(speaker.codec, x), codes))
    return [Clip(wav, log_mel(wav, speaker.mel), x) for wav, x in zip(wavs, codes)]


def recordings(data, clips, rate):
    """The recordings that clips of a data set are, (samples,) each at `rate`; None where one is not where it was, which
    is said."""
    try:
        return [read_wav(data.recording(i), rate) for i in clips] or None
    except UserError as e:
        print(f"note: the recordings themselves are not judged, as they are not at hand: {e}")


def judge_durations(rows, made, real):
    """How far the durations of what was made are from those of the recordings, in the mean; of each, in `rows`."""
    for row, a, b in zip(rows, made, real):
        row["duration_error"] = abs(len(a.wav) / len(b.wav) - 1)
    return {"duration_error": float(np.mean([row["duration_error"] for row in rows]))}


def write_clips(speaker, out, made, references, texts, label, shown):
    """Wavs of what was made and of the references, if any; spectrograms of those whose number is in `shown`."""
    mel = speaker.mel
    for n, clip in enumerate(made):
        write_wav(out / f"{n:03d}.wav", clip.wav, mel.sample_rate)
        if references:
            write_wav(out / f"{n:03d}_reference.wav", references[n].wav, mel.sample_rate)
        if n in shown:
            mels = {"generated": clip.mel} | ({label: references[n].mel} if references else {})
            title = texts[n] or ""
            if read := title and speaker.became(title):
                title += f"\nread as: {read}"
            plot_spectrograms(out / f"{n:03d}.png", title, mels, mel)


def write_summary(speaker, out, summary, rows):
    """summary.json, and where texts were spoken wer.jsonl, a line a text; `read` is what the model reads of it where
    that is something else."""
    for row in rows:
        if read := speaker.became(row["text"]):
            row["read"] = read
    if rows:
        write_whole(out / "wer.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(out / "summary.json", json.dumps(summary, indent=2, default=float) + "\n")


def training_speed(ckpt):
    """The median of the steps a second that the run of a checkpoint logged; None where there is no log."""
    rows = logged(find_checkpoint(ckpt).parent.parent / "metrics.jsonl")
    speeds = [row["steps_per_second"] for row in rows if isinstance(row.get("steps_per_second"), (int, float))]
    return float(np.median(speeds)) if speeds else None


def judge_form(made, real, orders=8):
    """Coherence of generated and of real pieces, and whether it sees form: how often a real piece is above all of
    `orders` shuffles of its own windows. Empty where pieces are too short."""
    rng = np.random.default_rng(0)
    pieces = [(frames, value) for frames in real if (value := coherence(frames)) is not None]
    if not pieces:
        return {}
    mixed = [[coherence(shuffled(frames, rng)) for _ in range(orders)] for frames, _ in pieces]
    own = [value for frames in made if (value := coherence(frames)) is not None]
    return {"coherence": float(np.mean(own)) if own else None, "coherence_real": float(np.mean([v for _, v in pieces])),
            "coherence_shuffled": float(np.mean(mixed)),
            "coherence_ranked": float(np.mean([value > max(some) for (_, value), some in zip(pieces, mixed)]))}


# ------------------------------------------------------------------------------------------------------------
# The command

def audit_main(argv):
    """python evaluate.py audit --ckpt RUN"""
    from trivox.audit import audit

    parser = argparse.ArgumentParser(prog="evaluate.py audit", description="Which transcripts of a data set are wrong, "
                                     "as a model tells that was trained on it: OUT/audit.csv and a page with players.")
    parser.add_argument("--ckpt", type=flag(Folder), required=True, help="run folder, checkpoint folder or file in one")
    parser.add_argument("--data_dir", type=some_path, help="the data set (the one trained on)")
    parser.add_argument("--out", type=some_path, help="folder for what is written (RUN/audit)")
    parser.add_argument("--recogniser", choices=NAMES, default="auto", help="who hears them (%(default)s)")
    parser.add_argument("--share", type=flag(Share), default=0.2, help="of the clips, those whose text helps the "
                        "model least, that the recogniser hears (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    args = parser.parse_args(argv)
    if is_echolancer(args.ckpt):
        raise UserError(f"{args.ckpt} has no data to be asked about")
    run = Path(args.ckpt) if Path(args.ckpt).is_dir() else Path(args.ckpt).parent
    with new_folder(args.out or run / "audit") as out:
        speaker = load(args.ckpt, init_distributed(args.device)[2], cast=False)
        audit(speaker, args.data_dir or speaker.config["data_dir"], out, [args.recogniser], args.share)


def main(argv):
    if argv[:1] == ["audit"]:
        return audit_main(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=flag(Folder), required=True, nargs="+",
                        help="run folders, checkpoint folders or files in them")
    parser.add_argument("--prompts", type=some_path,
                        help="flow TTS: heldout, overfit, or a file with a sentence a line")
    parser.add_argument("--data_dir", type=some_path,
                        help="data set of the prompts and references (the one trained on)")
    parser.add_argument("--testset", choices=LISTS, help="not the data set's sentences, but those of a test list")
    parser.add_argument("--testset_dir", type=some_path, help="the folder with that list and its recordings")
    parser.add_argument("--out", type=some_path, help="folder for what is written (RUN/evaluation)")
    parser.add_argument("--recogniser", choices=NAMES, default=["auto"], nargs="+", help="the judge of words, and if "
                        "there are two, the one beside it (auto: the best two that are here and know the words)")
    parser.add_argument("--paired", action="store_true", help="is the second of two runs better than the first?")
    parser.add_argument("--onnx", type=some_path, help="speak with what export.py has written to this folder (LLM TTS)")
    parser.add_argument("--clips", type=flag(PositiveInt), help=f"how many to make at most ({SENTENCES}; 64 where they "
                        "have no text)")
    parser.add_argument("--embedding", choices=("auto", "clap", "logmel"), help="of the codec LM's Fréchet distance")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add_flags(parser)
    args = parser.parse_args(argv)
    if files := [ckpt for ckpt in args.ckpt if is_echolancer(ckpt)]:
        raise UserError(f"{files[0]} has no data to be judged by: fine-tune it with --init_from, or try sample.py")
    systems = {read_config(ckpt)["system"] for ckpt in args.ckpt}
    if len(systems) > 1:
        raise UserError("runs of different systems cannot stand side by side")
    system, summaries, rows, device = systems.pop(), [], [], init_distributed(args.device)[2]
    for name, of in (("prompts", "flow"), ("onnx", "llm"), ("embedding", "codec")):
        if getattr(args, name) is not None and of != system:
            raise UserError(f"--{name} is not an option of {system!r} checkpoints")
    if bool(args.testset) != bool(args.testset_dir):
        raise UserError("--testset and --testset_dir go together: the list's name, and the folder that has it")
    for name in ("prompts", "data_dir", "onnx", "embedding"):
        if args.testset and getattr(args, name) is not None:
            raise UserError(f"--testset has its own sentences: no --{name}")
    for name in ("prompt_wav", "speaker"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is for sample.py: here the data set has the recordings")
    if len({*args.recogniser}) > (1 if "auto" in args.recogniser else 2):
        raise UserError("--recogniser takes auto, which chooses two, or one or two other names")
    if system == "codec" and (args.paired or args.testset) and not all(
            read_config(ckpt)["cross_every"] for ckpt in args.ckpt):
        raise UserError(f"--{'testset' if args.testset else 'paired'} is about what is said, and a codec LM without "
                        "text says nothing")
    if args.paired and len(args.ckpt) != 2:
        raise UserError(f"--paired compares two runs, and --ckpt names {len(args.ckpt)}")
    runs = [Path(ckpt) if Path(ckpt).is_dir() else Path(ckpt).parent for ckpt in args.ckpt]
    names = tell_apart(runs)
    for ckpt, run, name in zip(args.ckpt, runs, names):
        out = args.out / name if args.out and len(runs) > 1 else args.out or run / "evaluation"
        evaluate = evaluate_testset if args.testset else {
            "flow": evaluate_flow, "codec": evaluate_codec, "llm": evaluate_llm}[system]
        with new_folder(out):  # here, so that where nothing can be written is told before hours of work
            speaker = load(ckpt, device, cast=False)
            print(f"evaluating {ckpt}: speaking and listening take minutes", flush=True)
            summary, judged = evaluate(speaker, argparse.Namespace(**vars(args) | {"ckpt": ckpt}), out)
        summaries.append(summary)
        rows.append(judged)
        lines = describe(system, ["generated"], summaries[-1:])
        write_whole(out / "table.txt", "\n".join(lines) + "\n")
    if len(args.ckpt) > 1:
        lines = describe(system, names, summaries)
        if any([row["text"] for row in some] != [row["text"] for row in rows[0]] for some in rows):
            lines.append("note: these runs spoke different sentences, so their figures do not compare")
    if args.paired:
        lines += ["", *describe_paired(names, *rows)]
        write_whole(out / "paired.txt", "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


def tell_apart(runs):
    """Names of run folders: their own, with so many of the folders that they are in that no two are the same. Raises
    UserError for a run that is named twice."""
    parts = [run.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise UserError("one run is named twice")
    return next(names for n in range(1, max(map(len, parts)) + 1)
                if len(set(names := ["_".join(some[1:][-n:]) for some in parts])) == len(parts))


if __name__ == "__main__":
    common.run(main, sys.argv[1:])
