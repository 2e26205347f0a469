"""Does a corpus in another language train? Thirty sentences each of German, Russian and Chinese, spoken by espeak-ng,
are learned by heart by all three systems, and Whisper base hears what they say. Nothing is downloaded.

    python benchmarks/languages.py OUT
    python benchmarks/languages.py OUT --languages ru --systems llm

OUT is the folder of corpora, data sets and runs: what is done there is not done again, so a second call only prints.
The table has of each run its loss on the same sentences, first and last, and error rates: of what the model says, of
the recordings through the same vocoder or codec, and of the recordings; words, and of Chinese characters. espeak-ng's
voices are hard to hear for Whisper base, so the last column leaves the text aside: character errors of what it hears
of the model beside what it hears of the recording through codec or vocoder, and in brackets beside that of the next;
and of how many sentences the recording whose log-mel is nearest, stretched in time (librosa's dtw), is their own."""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from trivox.audio import MelConfig, log_mel  # noqa: E402 as they lie above this folder
from trivox.files import write_whole  # noqa: E402 likewise
from trivox.judges import total, word_errors  # noqa: E402 likewise
from trivox.normalise import normalise_text  # noqa: E402 likewise
from trivox.recordings import read_wav, write_wav  # noqa: E402 likewise
from trivox.synthesisers import speak  # noqa: E402 likewise

VOICES = {"de": "de", "ru": "ru", "zh": "cmn"}  # espeak-ng's, of what data.py and Whisper call the language
SYSTEMS = {  # of each the commands that make its data and train it, as far as they do not depend on the language
    "flow": ("ljspeech", "train_flow_tts.py --config configs/flow_demo.yaml --phonemes '' --batch_size 10 --steps 2500 "
             "--text_condition_dropout 0 --eval_cfg_scale 1 --eval_every 500 --speak_every 2500 --save_every 500"),
    "codec": ("tokenize --codec mel_rvq --hop_length 441 --codebooks 4 --codebook_size 256",
              "train_codec_lm.py --config configs/codec_demo_text.yaml --mixer attention --batch_size 10 --steps 200 "
              "--text_condition_dropout 0 --eval_cfg_scale 1 --eval_every 50 --sample_every 200 --save_every 100"),
    "llm": ("tokenize --codec mel_rvq --hop_length 441 --codebooks 1 --codebook_size 512",
            "train_llm_tts.py --config configs/llm_demo.yaml --characters auto --codebook_size 512 --batch_size 10 "
            "--steps 400 --eval_every 100 --sample_every 400 --save_every 200"),
}


def make_corpus(language, root):
    """The sentences of a language in LJSpeech's layout: the list has the digits, the voice their words."""
    texts = (Path(__file__).parent / "languages" / f"{language}.txt").read_text(encoding="utf-8").splitlines()
    for n, text in enumerate(texts):
        write_wav(root / "wavs" / f"{language}-{n:02d}.wav", *speak(normalise_text(text, True, language),
                                                                    VOICES[language]))
    write_whole(root / "metadata.csv", "".join(f"{language}-{n:02d}|{text}\n" for n, text in enumerate(texts)))


def python(command, **flags):
    """Run one of the project's commands, and end with its status where it fails."""
    words = shlex.split(command) + [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    print("python", shlex.join(words), flush=True)
    if status := subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        sys.exit(status)


def learn(language, system, out):
    """Make the data, train by heart and evaluate; the run is OUT/LANGUAGE/SYSTEM."""
    run, data, corpus = out / language / system, out / language / f"data_{system}", out / language / "corpus"
    prepare, train = SYSTEMS[system]
    if not (corpus / "metadata.csv").exists():
        make_corpus(language, corpus)
    python(f"data.py {prepare}", root=corpus, out=data, language=language)
    start = time.perf_counter()
    python(train, data_dir=data, out_dir=run, language=language, overfit=30, eval_prompts="overfit",
           eval_recogniser="auto", log_every=25, resume=True)
    write_whole(out / language / f"{system}_minutes.txt", f"{(time.perf_counter() - start) / 60:.1f}\n")
    python("evaluate.py", ckpt=run)


def nearest(evaluation):
    """Of how many clips the recording whose log-mel is nearest is their own, by dynamic time warping."""
    import librosa

    mel = MelConfig()
    paths = sorted(evaluation.glob("*_reference.wav"))
    real = [log_mel(read_wav(path, mel.sample_rate), mel).T.numpy() for path in paths]
    made = [log_mel(read_wav(path.with_name(path.name.replace("_reference", "")), mel.sample_rate), mel).T.numpy()
            for path in paths]

    def distance(a, b):
        costs, steps = librosa.sequence.dtw(a, b)
        return costs[-1, -1] / len(steps)

    found = [min(range(len(real)), key=lambda n: distance(one, real[n])) for one in made]
    return f"{sum(n == own for own, n in enumerate(found))} of {len(made)}"


def row(language, system, out):
    """A line of the table, as Markdown; None where the run has not been evaluated."""
    run = out / language / system
    if not (run / "evaluation" / "summary.json").exists():
        return None
    found = json.loads((run / "evaluation" / "summary.json").read_text())
    clips = [json.loads(line) for line in (run / "evaluation" / "wer.jsonl").read_text().splitlines()]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [one["val_loss"] for one in logged if "val_loss" in one]
    minutes = (out / language / f"{system}_minutes.txt").read_text().strip()
    if "heard" not in clips[0]:
        rates, same = "no recogniser is here", ""
    else:
        rates = " / ".join(f"{100 * found[f'wer{ending}']:.1f} %" for ending in ("", "_ceiling", "_recordings"))
        real, said = ([clip[key] for clip in clips] for key in ("heard_ceiling", "heard"))
        same, chance = (total(word_errors(some, said, language), "character_errors", "characters")
                        for some in (real, real[1:] + real[:1]))
        same = f"{100 * same:.1f} % ({100 * chance:.0f} %)"
    return (f"| {language} | {system} | {logged[-1]['step']} | {minutes} | {losses[0]:.3f} → {losses[-1]:.3f} | "
            f"{rates} | {same} | {nearest(run / 'evaluation')} |")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder that takes all")
    parser.add_argument("--languages", nargs="+", choices=VOICES, default=[*VOICES])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[*SYSTEMS])
    args = parser.parse_args(argv)
    out = args.out.resolve()
    for language in args.languages:
        for system in args.systems:
            if not row(language, system, out):
                learn(language, system, out)
    print("\n| language | system | steps | minutes | loss | errors: model / recordings through codec or vocoder / "
          "recordings | model beside recording, as heard | nearest is its own |\n|---|---|---|---|---|---|---|---|")
    print("\n".join(filter(None, (row(language, system, out) for language in VOICES for system in SYSTEMS))))


if __name__ == "__main__":
    main(sys.argv[1:])
