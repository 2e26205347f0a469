"""From checkpoints to numbers: how near is what they make to the recordings, and how well is what they say understood?

    python evaluate.py --ckpt runs/flow_demo                  on the held-out clips of its data set
    python evaluate.py --ckpt runs/flow_demo --prompts FILE   on the sentences of a file, one a line
    python evaluate.py --ckpt runs/codec_demo
    python evaluate.py --ckpt runs/codec_demo_music*          several runs of one system, side by side
    python evaluate.py --ckpt runs/llm_demo_speakers          also whose voice it is

Writes wavs, spectrograms and summary.json into RUN/evaluation, or --out. Beside what was generated stand the recordings
themselves after the same mel and vocoder, or the same codec: the best that it allows. Durations are predicted.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from trivox.audio import MelConfig, load_vocoder, log_mel, read_wav, write_wav
from trivox.codecs import load_codec
from trivox.common import UserError, find_checkpoint, init_distributed, pick_dtype, run
from trivox.datasets import MelDataset, SentenceDataset
from trivox.echolancer import is_one as is_echolancer
from trivox.metrics import (band_frames, coherence, frechet_distance, judge_speech, load_embedding, mel_distances,
                            name_speakers, score_clips, score_sentences, shuffled, unigram_cross_entropy)
from trivox.plots import plot_spectrograms
from trivox.recognisers import load_recogniser
from trivox.speak import (SPEAKING, add_options, check_codec, codec_folder, fill_options, generate_codes, generate_mels,
                          load_codec_lm, load_flow, load_llm, mel_config, open_tokens, read_config, refuse_options,
                          sampling, speak_sentences, speakable)
from trivox.text import TextFeatures, read_lines

# ------------------------------------------------------------------------------------------------------------
# Evaluation of the flow TTS

def evaluate_flow(args, folder, config, out):
    """Speak the prompts and judge them beside the reference recordings. Writes files to `out`, returns the summary."""
    _, _, device = init_distributed(args.device)
    mel = mel_config(argparse.Namespace(**config))
    data = MelDataset(args.data_dir or config["data_dir"], mel)
    prompts = args.prompts or ("overfit" if config["overfit"] else "heldout")
    clips = []
    if prompts in ("heldout", "overfit"):
        clips = data.clips("val") if prompts == "heldout" else data.clips("all")[:config["overfit"] or 64]
    texts = [data.rows[i]["text"] for i in clips] or read_lines(prompts)
    references = [data.mel(i).numpy() for i in clips]
    judge, hear = load_recogniser(args.recogniser, texts, data.grammar, device)
    model, features, _ = load_flow(folder, device)
    mels = generate_mels(model, features, texts, args.seed, steps=args.eval_steps, cfg_scale=args.eval_cfg_scale,
                         solver=args.eval_solver)
    mels = [m.numpy() for m in mels]

    seeds = range(3 if args.eval_vocoder == "griffinlim" else 1)  # Griffin-Lim starts from random phases
    vocoders = [load_vocoder(args.eval_vocoder, mel, device, seed) for seed in seeds]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wavs = list(pool.map(vocoders[0], mels))
        ceilings = [list(pool.map(vocoder, references)) for vocoder in vocoders]
    heard, rows = judge_speech(hear, mel.sample_rate, texts, wavs, ceilings if clips else [])
    summary = {"judge": judge, "vocoder": args.eval_vocoder, "prompts": len(texts), "steps": args.eval_steps,
               "cfg_scale": args.eval_cfg_scale, "solver": args.eval_solver, "seed": args.seed, **heard}
    if clips:
        for row, m, reference in zip(rows, mels, references):
            row["mel_distance"], row["mcd"] = mel_distances(m, reference)
            row["duration_error"] = abs(len(m) / len(reference) - 1)
        for key in ("mel_distance", "mcd", "duration_error"):
            summary[key] = float(np.mean([row[key] for row in rows]))

    for n, (wav, m) in enumerate(zip(wavs, mels)):
        write_wav(out / f"{n:03d}.wav", wav, mel.sample_rate)
        if clips:
            write_wav(out / f"{n:03d}_reference.wav", ceilings[0][n], mel.sample_rate)
        if n < 8:
            shown = {"generated": m} | ({"recording": references[n]} if clips else {})
            plot_spectrograms(out / f"{n:03d}.png", texts[n], shown, mel)
    (out / "wer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


# ------------------------------------------------------------------------------------------------------------
# Evaluation of the codec LM

def evaluate_codec(args, folder, config, out):
    """Score the held-out codes, sample as many clips, and judge them beside the recordings through the same codec.
    Writes files to `out`, returns the summary."""
    _, _, device = init_distributed(args.device)
    model, _ = load_codec_lm(folder, device)
    c, dtype, features = model.c, pick_dtype(config["dtype"], device), TextFeatures("bytes")
    source = args.data_dir or config["data_dir"]
    kept, options = codec_folder(folder, config), sampling(args, c.codebooks)
    data, codec = open_tokens(source, c, kept), load_codec(kept, device)
    val, train = data.clips("val"), data.clips("train")
    if config["overfit"]:
        val = train = data.clips("all")[:config["overfit"]]
    real = [data.codes(i)[:c.context - c.codebooks] for i in val]

    # What it knows of the codes, beside what their frequencies tell
    order, sums = sorted(range(len(val)), key=lambda n: len(real[n])), 0
    for some in (order[i:i + 8] for i in range(0, len(order), 8)):
        sums = sums + score_clips(model, data, features, [val[n] for n in some], device, dtype)
    losses, hits = (part / sum(map(len, real)) for part in (sums[:c.codebooks], sums[c.codebooks:-1]))
    unigram = unigram_cross_entropy([data.codes(i).numpy() for i in train], [x.numpy() for x in real], c.codebook_size)
    summary = {
        "parameters": sum(p.numel() for p in model.parameters()), "checkpoint": folder.name,
        "steps_per_second": training_speed(args.ckpt), "clips": len(val), "seed": args.seed, **options,
        "val_loss": losses.mean(), "perplexity": math.exp(losses.mean()), "accuracy": hits.mean(),
        "unigram": unigram.mean(), "below_unigram": 1 - losses.mean() / unigram.mean(),
        "books": [dict(zip(("loss", "unigram", "below_unigram", "accuracy"), map(float, book)))
                  for book in zip(losses, unigram, 1 - losses / unigram, hits)],
    }

    # What it makes: for each of the first held-out clips one as long, or with text, the same sentence
    real = real[:args.clips]
    texts = [data.rows[i]["text"] for i in val[:args.clips]] if c.cross_every else [None] * len(real)
    start, empty = round(args.eval_prompt_seconds * c.frame_rate), torch.zeros(0, c.codebooks, dtype=torch.long)
    prompts = [{"seed": args.seed * 1_000_003 + n, "codes": empty, "text": t} for n, t in enumerate(texts)]
    limit = round(config["eval_seconds"] * c.frame_rate) if c.cross_every else [len(x) for x in real]
    made = generate_codes(model, features, prompts, limit, **options)
    again = [n for n, x in enumerate(real) if len(x) > start > 0][:0 if c.cross_every else 4]
    continued = generate_codes(model, features, [prompts[n] | {"codes": real[n][:start]} for n in again],
                               [len(real[n]) for n in again], **options)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Griffin-Lim leaves the lock to others while it works
        wavs, recordings, goes_on = (list(pool.map(codec.decode, codes)) for codes in (made, real, continued))

    rate, rng = codec.sample_rate, np.random.default_rng(0)
    if c.cross_every:
        judge, hear = load_recogniser(args.recogniser, [row["text"] for row in data.rows], data.grammar, device)
        heard, rows = judge_speech(hear, rate, texts, wavs, [recordings])
        summary |= {"judge": judge, "prompts": len(texts), **heard}
        (out / "wer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        summary["duration_error"] = float(np.mean([abs(len(a) / len(b) - 1) for a, b in zip(made, real)]))
    summary["embedding"], embed = load_embedding(args.eval_embedding, device)
    known = [embed(wav, rate) for wav in recordings]  # one (N, D) a clip
    heard = np.concatenate([embed(wav, rate) for wav in wavs])
    noise = np.concatenate([embed(0.1 * rng.standard_normal(len(wav)), rate) for wav in recordings])
    if len(known) > 1:
        summary["frechet_halves"] = frechet_distance(np.concatenate(known[::2]), np.concatenate(known[1::2]))
    known = np.concatenate(known)
    summary |= {"frechet": frechet_distance(heard, known), "frechet_noise": frechet_distance(noise, known),
                **judge_form([band_frames(wav, rate) for wav in wavs], [band_frames(wav, rate) for wav in recordings])}

    mel = MelConfig(sample_rate=rate)
    for n, (wav, recording) in enumerate(zip(wavs, recordings)):
        write_wav(out / f"{n:03d}.wav", wav, rate)
        if n < 8 or c.cross_every:
            write_wav(out / f"{n:03d}_reference.wav", recording, rate)
        if n < 8:
            plot_spectrograms(out / f"{n:03d}.png", texts[n] or "", {
                "generated": log_mel(wav, mel), "recording, codec": log_mel(recording, mel)}, mel)
    for n, wav in zip(again, goes_on):
        write_wav(out / f"{n:03d}_continued.wav", wav, rate)
        plot_spectrograms(out / f"{n:03d}_continued.png", f"after {args.eval_prompt_seconds:.1f} s of the recording", {
            "continued": log_mel(wav, mel), "recording, codec": log_mel(recordings[n], mel)}, mel)
    (out / "summary.json").write_text(json.dumps(summary, indent=2, default=float) + "\n")
    return summary


# ------------------------------------------------------------------------------------------------------------
# Evaluation of the LLM TTS

def evaluate_llm(args, folder, config, out):
    """Score held-out sentences, speak them, and judge them beside the recordings through the same codec; where there
    are voices, each with that of another clip of its speaker. Writes files to `out`, returns the summary."""
    _, _, device = init_distributed(args.device)
    model, _ = load_llm(folder, device)
    c, dtype, rng = model.c, pick_dtype(config["dtype"], device), np.random.default_rng(args.seed)
    source, kept = args.data_dir or config["data_dir"], codec_folder(folder, config)
    options = sampling(args, names=SPEAKING)
    data = SentenceDataset(source, codec=c.codec, sample_rate=c.sample_rate, frame_rate=c.frame_rate,
                           codebook_size=c.codebook_size)
    check_codec(source, kept)
    codec, train, val = load_codec(kept, device), data.clips("train"), data.clips("val")
    if config["overfit"]:
        train = val = data.clips("all")[:config["overfit"]]

    # Clips to speak: three quarters of trained voices where there are others, which only the held-out clips have
    speakers = {i: int(s) for some in (train, val) for i, s in zip(some.tolist(), data.speaker(some))}
    trained = {speakers[i] for i in train.tolist()}
    can_be_spoken = speakable(c, data, val)
    if not can_be_spoken:
        raise UserError(f"none of the {len(val)} held-out sentences of {source} fits into the context of {c.context}")
    old, new = ([i for i in can_be_spoken if (speakers[i] in trained) == known] for known in (True, False))
    clips = old[:args.clips * 3 // 4 if new else args.clips]
    count = len(clips)
    clips += interleave(new, speakers)[:args.clips - len(clips)]
    texts = [data.text(i) for i in clips]

    # Other clips of their speakers: one to show the voice, the others to learn to tell voices by
    voices, known = None, []
    if c.speaker_width:
        data.load_embeddings(config["speaker_embedder"], c.speaker_width)
        others = {s: [i for i in (train if s in trained else val).tolist() if speakers[i] == s and i not in clips]
                  for s in set(speakers[i] for i in clips)}
        shown = [int(rng.choice(others[speakers[i]][::2])) if others[speakers[i]] else i for i in clips]
        voices = torch.stack([torch.from_numpy(data.embedding(i)) for i in shown])
        known = [i for s in others for i in others[s][1::2][:40]]

    sums = score_sentences(model, data, clips, voices, device, dtype)
    counts = sum(np.bincount(data.codes(i), minlength=c.codebook_size) for i in train[:16384].tolist())
    p = counts[counts > 0] / counts.sum()
    summary = {
        "parameters": sum(p.numel() for p in model.parameters()), "checkpoint": folder.name, "clips": len(clips),
        "steps_per_second": training_speed(args.ckpt), "seed": args.seed, **options,
        "text_perplexity": math.exp(sums[0] / sums[2]), "audio_perplexity": math.exp(sums[1] / sums[3]),
        "unigram_perplexity": math.exp(-(p * np.log(p)).sum()),
    }

    seeds = [args.seed * 1_000_003 + n for n in range(len(clips))]
    if args.onnx:
        made = speak_onnx(args.onnx, texts, seeds, voices, config["eval_seconds"] * c.frame_rate, options)
    else:
        made = speak_sentences(model, texts, seeds, voices, config["eval_seconds"], **options)
    real = [torch.from_numpy(data.codes(i).astype(np.int64))[:, None] for i in clips]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Griffin-Lim leaves the lock to others while it works
        wavs, recordings = (list(pool.map(codec.decode, codes)) for codes in (made, real))
    rate = codec.sample_rate
    judge, hear = load_recogniser(args.recogniser, sorted(set(texts)), data.grammar, device)
    heard, rows = judge_speech(hear, rate, texts, wavs, [recordings])
    summary |= {"judge": judge, "prompts": len(texts), **heard,
                "duration_error": float(np.mean([abs(len(a) / len(b) - 1) for a, b in zip(made, real)]))}
    if known:
        read = [read_wav(path, rate) for path in (data.recording(i) for i in known)]
        names = [data.speakers[speakers[i]] for i in known]
        asked = [data.speakers[speakers[i]] for i in clips]
        for key, some in (("speaker", wavs), ("speaker_ceiling", recordings)):
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

    mel = MelConfig(sample_rate=rate)
    for n, (wav, recording) in enumerate(zip(wavs, recordings)):
        write_wav(out / f"{n:03d}.wav", wav, rate)
        write_wav(out / f"{n:03d}_reference.wav", recording, rate)
        if n < 8 or n >= len(clips) - 4:
            plot_spectrograms(out / f"{n:03d}.png", texts[n], {
                "generated": log_mel(wav, mel), "recording, codec": log_mel(recording, mel)}, mel)
    (out / "wer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "summary.json").write_text(json.dumps(summary, indent=2, default=float) + "\n")
    return summary


def speak_onnx(folder, texts, seeds, voices, frames, options):
    """What `speak_sentences` does, by the model that export.py has put into a folder."""
    from trivox.speak_onnx import Speaker

    speaker, made = Speaker(folder, voice=None if voices is None else voices[0].numpy()), []
    for n, (text, seed) in enumerate(zip(texts, seeds)):
        if voices is not None:
            speaker.speak_like(voices[n].numpy())
        made.append(torch.tensor(list(speaker.codes(text, seed, round(frames), **options)), dtype=torch.long)[:, None])
    return made


def interleave(clips, speakers):
    """Clips in an order that takes one of each speaker in turn."""
    turn = Counter()
    return sorted(clips, key=lambda i: (turn.update([speakers[i]]), turn[speakers[i]])[1])


def training_speed(ckpt):
    """The median of the steps a second that a run logged; None where there is no log."""
    log = Path(ckpt) / "metrics.jsonl"
    rows = [json.loads(line) for line in log.open()] if log.exists() else []
    speeds = [row["steps_per_second"] for row in rows if "steps_per_second" in row]
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
# Tables: label, how a run's figure is written, what stands beside it

FLOW_ROWS = [
    ("word error rate", "{wer:.1%}", "{wer_ceiling:.1%}"),
    ("wholly right", "{exact} of {prompts}", "{exact_ceiling:.1f}"),
    ("mel-cepstral distortion", "{mcd:.2f} dB", ""),
    ("log-mel distance", "{mel_distance:.3f}", ""),
    ("duration error", "{duration_error:.1%}", ""),
]
CODEC_ROWS = [
    ("parameters", "{parameters:,}", ""),
    ("checkpoint", "{checkpoint}", ""),
    ("steps a second", "{steps_per_second:.2f}", ""),
    ("validation loss", "{val_loss:.4f}", "{unigram:.4f} training unigrams"),
    ("perplexity", "{perplexity:.2f}", ""),
    ("below the unigrams", "{below_unigram:.1%}", ""),
    ("accuracy", "{accuracy:.1%}", ""),
    ("word error rate", "{wer:.1%}", "{wer_ceiling:.1%} recordings through the codec"),
    ("wholly right", "{exact} of {prompts}", "{exact_ceiling:.0f}"),
    ("duration error", "{duration_error:.1%}", ""),
    ("Fréchet distance", "{frechet:.2f}", "{frechet_halves:.2f} halves of the recordings, {frechet_noise:.0f} noise"),
    ("coherence", "{coherence:.3f}", "{coherence_real:.3f} recordings, {coherence_shuffled:.3f} shuffled"),
]


LLM_ROWS = [
    ("parameters", "{parameters:,}", ""),
    ("checkpoint", "{checkpoint}", ""),
    ("steps a second", "{steps_per_second:.2f}", ""),
    ("perplexity of characters", "{text_perplexity:.2f}", ""),
    ("perplexity of codes", "{audio_perplexity:.2f}", "{unigram_perplexity:.0f} training unigrams"),
    ("word error rate", "{wer:.1%}", "{wer_ceiling:.1%} recordings through the codec"),
    ("wholly right", "{exact} of {prompts}", "{exact_ceiling:.0f}"),
    ("duration error", "{duration_error:.1%}", ""),
    ("speaker named, trained voices", "{speaker_accuracy:.1%} of {speaker_clips}",
     "{speaker_ceiling_accuracy:.1%} of the recordings through the codec, {voices} voices"),
    ("speaker named, untrained voices", "{speaker_accuracy_new:.1%} of {speaker_clips_new}",
     "{speaker_ceiling_accuracy_new:.1%} of the recordings through the codec, {voices_new} voices"),
]


def table(rows, names, summaries, beside):
    """Lines of text: a column for each run, and one for what stands beside, as the first run has it."""
    def written(form, summary):
        try:
            return form.format(**summary)
        except (KeyError, TypeError):  # not measured
            return ""

    cells = [["", *names, beside]]
    for label, form, other in rows:
        cells.append([label, *(written(form, summary) for summary in summaries), written(other, summaries[0])])
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    return ["".join(map(str.ljust, row, widths)).rstrip() for row in cells if any(row[1:])]


def book_rows(summary):
    """Rows for the codebooks of a codec LM."""
    return [row for q in range(len(summary["books"])) for row in (
        (f"book {q}: loss", f"{{books[{q}][loss]:.4f}}", f"{{books[{q}][unigram]:.4f}} training unigrams"),
        (f"book {q}: below, right", f"{{books[{q}][below_unigram]:.1%}}, {{books[{q}][accuracy]:.1%}}", ""))]


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, nargs="+", help="run folders, checkpoint folders or files in them")
    flow, codec = add_options(parser)
    flow.add_argument("--prompts", help="heldout, overfit (the clips trained on), or a file with a sentence a line")
    parser.add_argument("--data_dir", help="data set of the prompts and references (the one trained on)")
    parser.add_argument("--out", type=Path, help="folder for what is written (RUN/evaluation)")
    parser.add_argument("--recogniser", choices=("auto", "whisper", "grammar", "sentences", "open"), default="auto")
    codec.add_argument("--onnx", type=Path, help="speak with what export.py has written to this folder (LLM TTS)")
    codec.add_argument("--clips", type=int, default=64, help="how many to sample at most (%(default)s)")
    codec.add_argument("--embedding", dest="eval_embedding", choices=("auto", "clap", "logmel"),
                       help="of the Fréchet distance")
    args = parser.parse_args(argv)
    if files := [ckpt for ckpt in args.ckpt if is_echolancer(ckpt)]:
        raise UserError(f"{files[0]} has no data to be judged by: fine-tune it with --init_from, or try sample.py")
    configs = [read_config(ckpt) for ckpt in args.ckpt]
    if len({config["system"] for config in configs}) > 1:
        raise UserError("runs of different systems cannot stand side by side")
    system, summaries = configs[0]["system"], []
    refuse_options(args, system, *["prompts"] * (system != "flow"), *["onnx"] * (system != "llm"))
    for ckpt, config in zip(args.ckpt, configs):
        run_args = argparse.Namespace(**vars(args) | {"ckpt": ckpt})
        fill_options(run_args, config)
        out = args.out / Path(ckpt).name if args.out and len(configs) > 1 else args.out or Path(ckpt) / "evaluation"
        out.mkdir(parents=True, exist_ok=True)
        evaluate = {"flow": evaluate_flow, "codec": evaluate_codec, "llm": evaluate_llm}[system]
        summaries.append(evaluate(run_args, find_checkpoint(ckpt), config, out))
        lines = describe(system, ["generated"], summaries[-1:])
        (out / "table.txt").write_text("\n".join(lines) + "\n")
    if len(configs) > 1:
        lines = describe(system, [Path(ckpt).name for ckpt in args.ckpt], summaries)
    print("\n" + "\n".join(lines))


def describe(system, names, summaries):
    """The table of some runs of one system, and how to read it."""
    first = summaries[0]
    if system == "flow":
        lines = table(FLOW_ROWS, names, summaries, f"recordings through {first['vocoder']}")
    elif system == "llm":
        lines = table(LLM_ROWS, names, summaries, "beside it")
    else:
        lines = table(CODEC_ROWS + book_rows(first), names, summaries, "beside it")
        lines.append(f"Fréchet distance of {first['embedding']}; {first['clips']} held-out clips")
        if "coherence_ranked" in first:
            lines.append(f"{first['coherence_ranked']:.0%} of the recordings have more coherence than 8 shuffles each")
    if "judge" in first:
        lines.append(f"judge: {first['judge']}")
        lines.append(f"by chance: {first['wer_other_sentence']:.0%} for another sentence, {first['wer_noise']:.0%} for "
                     "noise")
    return lines


if __name__ == "__main__":
    run(main, sys.argv[1:])
