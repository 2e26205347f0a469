"""From a checkpoint to numbers: how well is what it says understood, and how near is it to the recordings?

    python evaluate.py --ckpt runs/flow_demo                  on the held-out clips of its data set
    python evaluate.py --ckpt runs/flow_demo --prompts FILE   on the sentences of a file, one a line

Writes wavs, spectrograms, wer.jsonl and summary.json into RUN/evaluation, or --out. Beside each figure stands that of
the recordings themselves after the same mel and vocoder: the best that the vocoder allows. Durations are predicted.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from audio import load_vocoder, write_wav
from common import UserError, find_checkpoint, init_distributed, read_yaml, run
from data import MelDataset, read_lines
from page import plot_spectrograms
from sample import add_options, fill_options, generate_mels, load_flow, mel_config

# ------------------------------------------------------------------------------------------------------------
# Recognisers: functions from (wav, sample rate) to text

def spoken_words(text):
    """The words of a text as recognisers write them: lower case, no punctuation."""
    return " ".join(re.findall(r"[\w']+", text.lower()))


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

    with tempfile.NamedTemporaryFile("w", suffix=".jsgf") as f:
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


def word_error_rate(texts, heard):
    """Substitutions, insertions and deletions, as jiwer counts them, over the words of all `texts`."""
    import jiwer

    return jiwer.wer([spoken_words(t) for t in texts], [spoken_words(h) for h in heard])


def exact(texts, heard):
    """How many were heard without an error."""
    return sum(spoken_words(t) == spoken_words(h) for t, h in zip(texts, heard))


# ------------------------------------------------------------------------------------------------------------
# Distances between log-mels (frames, n_mels)

def mel_distances(mel, reference):
    """The mean absolute difference, in nats, and the mel-cepstral distortion, in dB, of two log-mels (frames, n_mels).

    Frames are paired by dynamic time warping on the cepstra 1 to 13, cosine transforms of the log-mel; the distortion
    is 10 / ln 10 · sqrt(2 · sum of their squared differences) (Kubichek, 1993).
    """
    import librosa
    from scipy.fft import dct

    mel, reference = np.asarray(mel), np.asarray(reference)
    a, b = (dct(m, norm="ortho")[:, 1:14] / np.sqrt(m.shape[1] / 2) for m in (mel, reference))
    _, path = librosa.sequence.dtw(a.T, b.T)
    i, j = path.T
    mcd = 10 / np.log(10) * np.sqrt(2 * np.square(a[i] - b[j]).sum(1)).mean()
    return float(np.abs(mel[i] - reference[j]).mean()), float(mcd)


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
    rng = np.random.default_rng(0)
    noise = [0.1 * rng.standard_normal(len(wav)) for wav in wavs[:16]]
    heard = [hear(wav, mel.sample_rate) for wav in wavs]
    summary = {
        "judge": judge, "vocoder": args.eval_vocoder, "prompts": len(texts),
        "steps": args.eval_steps, "cfg_scale": args.eval_cfg_scale, "solver": args.eval_solver, "seed": args.seed,
        "wer": word_error_rate(texts, heard),
        "wer_noise": word_error_rate(texts[:16], [hear(wav, mel.sample_rate) for wav in noise]),
        "wer_other_sentence": word_error_rate(texts, texts[1:] + texts[:1]),
        "exact": exact(texts, heard),
    }
    rows = [{"text": t, "heard": h, "wer": word_error_rate([t], [h]), "seconds": len(m) / mel.frame_rate}
            for t, h, m in zip(texts, heard, mels)]
    if clips:
        per_seed = [[hear(wav, mel.sample_rate) for wav in ceiling] for ceiling in ceilings]
        for row, m, reference in zip(rows, mels, references):
            row["mel_distance"], row["mcd"] = mel_distances(m, reference)
            row["duration_error"] = abs(len(m) / len(reference) - 1)
        summary |= {
            "wer_ceiling": float(np.mean([word_error_rate(texts, h) for h in per_seed])),
            "exact_ceiling": float(np.mean([exact(texts, h) for h in per_seed])),
            **{key: float(np.mean([row[key] for row in rows])) for key in ("mel_distance", "mcd", "duration_error")},
        }

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


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--prompts", help="heldout, overfit (the clips trained on), or a file with a sentence a line")
    parser.add_argument("--data_dir", help="data set of the prompts and references (the one trained on)")
    parser.add_argument("--out", type=Path, help="folder for what is written (RUN/evaluation)")
    parser.add_argument("--recogniser", choices=("auto", "whisper", "grammar", "sentences", "open"), default="auto")
    args = parser.parse_args(argv)
    folder = find_checkpoint(args.ckpt)
    out = args.out or Path(args.ckpt) / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    config = read_yaml(folder / "config.yaml")
    fill_options(args, config)
    s = evaluate_flow(args, folder, config, out)
    rows = [("", "generated", f"recordings through {s['vocoder']}"),
            ("word error rate", f"{s['wer']:.1%}", f"{s.get('wer_ceiling', math.nan):.1%}"),
            ("wholly right", f"{s['exact']} of {s['prompts']}", f"{s.get('exact_ceiling', math.nan):.1f}")]
    if "mcd" in s:
        rows += [("mel-cepstral distortion", f"{s['mcd']:.2f} dB", ""),
                 ("log-mel distance", f"{s['mel_distance']:.3f}", ""),
                 ("duration error", f"{s['duration_error']:.1%}", "")]
    lines = [f"{label:25}{value:14}{ceiling}".rstrip() for label, value, ceiling in rows]
    lines.append(f"judge: {s['judge']}")
    lines.append(f"by chance: {s['wer_other_sentence']:.0%} for another sentence, {s['wer_noise']:.0%} for noise")
    print("\n" + "\n".join(lines))
    (out / "table.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(main, sys.argv[1:])
