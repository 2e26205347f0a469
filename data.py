"""Corpora to data sets.

    python data.py for CONFIG            make the data of a config where they are not there, as its data_recipe says
    python data.py demo                  speak and prepare the demo corpus; nothing to download
    python data.py open                  speak and prepare LJSpeech's sentences, so any words; nothing to download
    python data.py ljspeech              download and prepare LJSpeech 1.1 (2.6 GB, public domain)
    python data.py ljspeech --root DIR   prepare any folder in LJSpeech's layout, or of bare recordings
    python data.py cut --root DIR        cut long recordings at pauses, and transcribe them: a corpus
    python data.py check --root DIR      see and hear what a corpus holds, on one page
    python data.py download              download LJSpeech 1.1 alone
    python data.py tokenize --codec NAME --root DIR --out DIR
                                         encode such a corpus, or nested folders of music, with a neural audio codec
    python data.py demo_music            compose and tokenize pieces of music; nothing to download
    python data.py emilia                fetch the pre-tokenised Emilia: 70,000 hours of English, 25 GB of tokens
    python data.py embed --data DIR --embedder NAME
                                         store what is heard of the speakers of such tokens

trivox/corpora.py says what a corpus is, trivox/datasets.py what a data set is, and trivox/recipes.py what a recipe is.
"""

import argparse
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from trivox.audio import MelConfig
from trivox.check import check_corpus
from trivox.codecs import CODECS
from trivox.common import Folder, Language, Limit, Positive, UserError, flag, run, some_path
from trivox.corpora import download_ljspeech, has_texts, other_lists
from trivox.cut import cut_corpus
from trivox.demo_music import make_demo_music
from trivox.demo_speech import make_demo_corpus
from trivox.emilia import EMILIA, convert_emilia
from trivox.foreign import known
from trivox.open_speech import make_open_corpus
from trivox.prepare import embed, prepare_mels, tokenize
from trivox.recipes import TRAINERS, make_data
from trivox.synthesisers import HIBARI_VOICES, default_voice
from trivox.transcripts import transcribe

Many = Annotated[int, Field(ge=1, le=1_000_000)]  # more are a slip of the hand, and would be made for ever
AnyMany = Annotated[int, Field(ge=0, le=1_000_000)]

# ------------------------------------------------------------------------------------------------------------
# The commands: the flags of each, `make`, which does it, and `result`, the file that it writes last


def for_config(p):
    """make the data of a config where they are not there"""
    p.add_argument("config", help="a YAML file; its data_recipe says how")
    p.add_argument("--data_dir", type=some_path,
                   help="your own data in place of the config's: they are only looked for")
    p.add_argument("--system", choices=TRAINERS, help="of a config that does not say it")
    p.set_defaults(make=lambda args: make_data(args.config, parse, args.data_dir, args.system))


def demo(p):
    """speak and prepare the demo corpus"""
    add_mels(p, "data/demo")
    p.add_argument("--root", type=some_path, help="folder of the spoken corpus (OUT/corpus)")
    p.add_argument("--sentences", type=flag(Many), default=4000, help="how many (%(default)s)")
    p.add_argument("--heldout", type=flag(NonNegativeInt), default=64,
                   help="how many of them are for validation (%(default)s)")
    add_voices(p)
    p.add_argument("--heldout_voices", default="", help="further voices, for validation alone")
    p.add_argument("--heldout_voice_clips", type=flag(AnyMany), default=48,
                   help="sentences of each (%(default)s)")
    p.add_argument("--transcripts", type=some_path, help="speak these instead: metadata.csv, or a sentence a line")

    def make(args):
        root, mel = args.root or args.out / "corpus", mel_config(args)
        heldout_voices = args.heldout_voices.split(",") if args.heldout_voices else []
        make_demo_corpus(root, args.sentences, args.heldout, voices(args), args.transcripts, heldout_voices,
                         args.heldout_voice_clips)
        prepare_mels(root, args.out, mel, args.max_seconds)

    p.set_defaults(make=make)


def open_speech(p):
    """speak and prepare LJSpeech's sentences"""
    add_mels(p, "data/open")
    p.add_argument("--root", type=some_path, help="folder of the spoken corpus (OUT/corpus)")
    p.add_argument("--hours", type=flag(Positive), help="about so many to train on, beside what is held out (all, 22)")
    p.add_argument("--heldout", type=flag(NonNegativeInt), default=512,
                   help="how many sentences are for validation (%(default)s)")
    add_voices(p)
    p.add_argument("--transcripts", type=some_path, help="speak these instead: metadata.csv, or a sentence a line")

    def make(args):
        root, mel = args.root or args.out / "corpus", mel_config(args)
        make_open_corpus(root, voices(args), args.hours, args.heldout, args.transcripts)
        prepare_mels(root, args.out, mel, args.max_seconds)

    p.set_defaults(make=make)


def ljspeech(p):
    """prepare LJSpeech or its like"""
    add_mels(p, "data/ljspeech")
    p.add_argument("--root", type=some_path, help="a corpus that is here; else LJSpeech 1.1 is downloaded")
    add_list(p)
    add_language(p)
    p.add_argument("--whisper", help="the model that does: tiny … large-v3, turbo, or a file of weights (base)")

    def make(args):
        root, metadata = args.root or download_ljspeech(args.out.parent), args.metadata
        if not metadata and not has_texts(root):
            if (others := other_lists(root)) and not args.whisper:
                raise UserError(f"{root} has no list of clips under a name that is known, but {others[0].name}: "
                                f"--metadata {others[0]} reads that, --whisper base transcribes anyway")
            metadata = transcribe(root, args.out, args.language, args.whisper)
        elif args.whisper:
            raise UserError(f"--whisper is for recordings without texts, and {metadata or root} has some")
        prepare_mels(root, args.out, mel_config(args), args.max_seconds, args.language,
                     **listed(args) | {"metadata": metadata})

    p.set_defaults(make=make)


def cut(p):
    """cut long recordings at pauses, and transcribe them"""
    add_out(p, "data/cut", "dropped.csv")
    p.add_argument("--root", type=some_path, required=True, help="a folder of recordings, of hours if you like")
    p.add_argument("--min_seconds", type=flag(Positive), default=2.0, help="of a clip (%(default)s)")
    p.add_argument("--max_seconds", type=flag(Positive), default=11.5,
                   help="of a clip, beside up to 0.3 s of pauses (%(default)s)")
    add_language(p)
    p.add_argument("--whisper", help="the model that transcribes: tiny … large-v3, turbo, or a file of weights (base)")

    def make(args):
        if args.min_seconds >= args.max_seconds:
            raise UserError(f"--min_seconds {args.min_seconds:g} is not less than --max_seconds {args.max_seconds:g}")
        cut_corpus(args.root, args.out, (args.min_seconds, args.max_seconds), args.language, args.whisper)

    p.set_defaults(make=make)


def check(p):
    """see and hear what a corpus holds, on one page"""
    add_out(p, "data/check", "index.html")
    p.add_argument("--root", type=some_path, required=True, help="a corpus that is here")
    add_list(p)
    add_language(p)
    p.set_defaults(make=lambda args: check_corpus(args.root, args.out, args.language, **listed(args)))


def download(p):
    """download LJSpeech 1.1"""
    p.add_argument("--out", type=some_path, default=Path("data"), help="where LJSpeech-1.1/ will be (%(default)s)")
    p.set_defaults(make=lambda args: download_ljspeech(args.out),
                   result=lambda args: args.out / "LJSpeech-1.1" / "metadata.csv")


def tokenize_corpus(p):
    """encode a corpus with a neural audio codec"""
    add_tokens(p, "data/tokenize", MelConfig())
    p.add_argument("--root", type=some_path, required=True, help="a corpus that is here")
    add_list(p)
    add_language(p)
    p.add_argument("--codec", type=flag(Folder), required=True, help=f"{', '.join(CODECS)}, mel_rvq, or the folder of "
                   "a mel_rvq's tokens or a run on them, which is used again as it is")
    p.add_argument("--fit", type=some_path, nargs="+", default=[], help="more corpora that mel_rvq is fitted to, to be "
                   "tokenized with the same one later: for fine-tuning on them")
    p.add_argument("--characters", choices=("echolancer", "auto"), default="", help="that the LLM TTS reads: "
                   "Echolancer's, which are English, or those of these texts (echolancer for en, else auto)")
    p.add_argument("--chunk_frames", type=flag(PositiveInt), help="cut recordings to so many (2040 for bare folders of "
                   "them; those of a list are kept whole)")
    p.add_argument("--chunk_seconds", type=flag(Positive), help="or to so many")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")

    def make(args):
        chunk = None if args.metadata or has_texts(args.root) else (2040, "frames")
        if args.chunk_seconds or args.chunk_frames:
            chunk = (args.chunk_seconds, "seconds") if args.chunk_seconds else (args.chunk_frames, "frames")
        fitted = dict(mel=mel_config(args), sizes=args.codebook_size, fit=args.fit)
        tokenize(args.root, args.out, args.codec, chunk, args.device, language=args.language,
                 characters=args.characters, **listed(args), **fitted if args.codec == "mel_rvq" else {})

    p.set_defaults(make=make)


def demo_music(p):
    """compose and tokenize pieces of music"""
    add_tokens(p, "data/demo_music", MelConfig(n_fft=2048, hop_length=512))
    p.add_argument("--root", type=some_path, help="folder of the composed corpus (OUT/corpus)")
    p.add_argument("--pieces", type=flag(Many), default=800, help="how many (%(default)s)")
    p.add_argument("--heldout", type=flag(NonNegativeInt), default=64,
                   help="how many of them are for validation (%(default)s)")

    def make(args):
        root = args.root or args.out / "corpus"
        make_demo_music(root, args.pieces, args.heldout)
        tokenize(root, args.out, "mel_rvq", mel=mel_config(args), sizes=args.codebook_size)

    p.set_defaults(make=make)


def emilia(p):
    """turn the pre-tokenised Emilia into a data set"""
    add_out(p, "data/emilia", "codec.json")
    p.add_argument("--root", type=some_path,
                   help=f"its parquet files, if they are here; else those of {EMILIA} are fetched")
    p.set_defaults(make=lambda args: convert_emilia(args.out, args.root))


def embed_speakers(p):
    """store speaker embeddings of the clips of a token data set"""
    p.add_argument("--data", type=some_path, required=True, help="its folder")
    p.add_argument("--embedder", choices=("stats", "ecapa"), required=True)
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of ecapa (%(default)s)")
    p.set_defaults(result=lambda args: args.data / f"speaker_{args.embedder}.json", make=lambda args: embed(
        args.data, args.embedder, args.device if args.embedder == "ecapa" else "cpu"))


COMMANDS = {"for": for_config, "demo": demo, "open": open_speech, "ljspeech": ljspeech, "cut": cut,
            "check": check, "download": download, "tokenize": tokenize_corpus, "demo_music": demo_music,
            "emilia": emilia, "embed": embed_speakers}


# ------------------------------------------------------------------------------------------------------------
# Flags that several of them have

def add_out(p, default, last):
    p.add_argument("--out", type=some_path, default=Path(default), help="folder of the data set (%(default)s)")
    p.set_defaults(result=lambda args: args.out / last)


def add_mels(p, out):
    add_out(p, out, "dataset_stats.json")
    add_mel_config(p, MelConfig(), "log-mels")
    p.add_argument("--max_seconds", type=flag(Limit), default=11.88,
                   help="skip longer clips (%(default)s, 1,024 frames)")


def add_voices(p):
    p.add_argument("--voices", default="auto", help=f"hibari's ({', '.join(HIBARI_VOICES)}) or espeak-ng's (en-us, "
                   "en-gb-x-rp …), with commas between; auto is heart, or en-us where hibari is not installed")


def voices(args):
    return [default_voice() if voice == "auto" else voice for voice in args.voices.split(",")]


def add_tokens(p, out, mel):
    add_out(p, out, "codec.json")
    add_mel_config(p, mel, "mel_rvq")
    p.add_argument("--codebooks", type=flag(PositiveInt), default=4, help="of mel_rvq (%(default)s)")
    p.add_argument("--codebook_size", default="1024", help="of mel_rvq; a number, or one a book (%(default)s)")


def add_mel_config(p, mel, of):
    for f in fields(MelConfig):
        p.add_argument(f"--{f.name}", type=type(f.default), default=getattr(mel, f.name), help=f"of {of} (%(default)s)")


def mel_config(args):
    mel = MelConfig(**{f.name: getattr(args, f.name) for f in fields(MelConfig)})
    if mel.fmax > mel.sample_rate / 2:
        raise UserError(f"--fmax {mel.fmax:g} is more than half of --sample_rate {mel.sample_rate}, and recordings "
                        f"have no such pitches: give {mel.sample_rate / 2:g} or less")
    return mel


def add_list(p):
    p.add_argument("--metadata", type=some_path, help="its list of clips, where that is not in the corpus, or not "
                   "called metadata.csv or the like")
    p.add_argument("--columns", help="what the columns of that list are, where it does not show: id|text|speaker, for "
                   "one; normalized is a text as it is spoken, - a column that is not used")
    p.add_argument("--drop", type=some_path, help="leave out the clips that this audit.csv of evaluate.py marks")


def add_language(p):
    p.add_argument("--language", type=flag(Language), default="en", help="what is spoken: its numbers become words, "
                   "and Whisper hears it (%(default)s)")


def listed(args):
    return {name: getattr(args, name) for name in ("metadata", "columns", "drop")}


# ------------------------------------------------------------------------------------------------------------
# The command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{self.prog}: {message} (--help says more)")


def parse(argv):
    """The arguments of a command, checked. Raises UserError for wrong ones."""
    parser = Parser("data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add in COMMANDS.items():
        add(commands.add_parser(name, help=add.__doc__))
    args = parser.parse_args(argv)
    if "codebook_size" in args:
        args.codebook_size = book_sizes(args)
    if getattr(args, "language", "en") != "en":
        known(args.language)  # raises UserError for what is none, before anything is made
    if args.command == "tokenize" and args.fit and args.codec != "mel_rvq":
        raise UserError(f"--fit is for mel_rvq, which is fitted here; {args.codec} is as it is")
    if getattr(args, "root", None) and args.out.resolve() in (args.root.resolve(), (args.root / "wavs").resolve()):
        raise UserError(f"--out {args.out} is the corpus, among whose files the data set's would lie: name another "
                        "folder")
    return args


def book_sizes(args):
    """The sizes of mel_rvq's books that --codebooks and --codebook_size ask for."""
    sizes = args.codebook_size.split(",")
    whole = all(re.fullmatch("[0-9]{1,9}", size) and 0 < int(size) <= 65536 for size in sizes)
    if not whole or len(sizes) not in (1, args.codebooks):
        raise UserError(f"--codebook_size {args.codebook_size}: expected one number of at most 65,536, or one for each "
                        f"of --codebooks {args.codebooks}")
    return [int(size) for size in sizes] * (args.codebooks if len(sizes) == 1 else 1)


def main(argv):
    args = parse(argv)
    args.make(args)


if __name__ == "__main__":
    run(main, sys.argv[1:])
