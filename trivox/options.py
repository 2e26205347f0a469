"""What a model can be asked for as it speaks: flags of sample.py, controls of the page, arguments of `Speaker.stream`.

It stands once, in OPTIONS.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trivox.common import UserError, some_path

SAMPLING = "temperature", "top_k", "top_p", "repetition_penalty"  # the LLM TTS's options that its ONNX script has too


@dataclass(frozen=True)
class Option:
    """A flag of sample.py, a control of the page, an argument of `stream`. What is out of [low, high] is refused;
    `usual` is how far the page's slider goes. A config may have another default, as eval_<name>."""
    name: str
    type: type
    help: str
    low: float | None = None
    high: float | None = None
    usual: float | None = None
    choices: tuple = ()
    each_book: bool = False  # one number for all codebooks, or a list with one for each
    default: Any = None


SECONDS = Option("seconds", float, "of audio in all, pauses too, instead of what is predicted", 0.01, 3600, 30)
SEED = Option("seed", int, "of all that is drawn at random", 0, 10**12, default=0)
GUIDANCE = Option("cfg_scale", float, "guidance by the text, 1 for none", 0, 100, 4)
TEMPERATURE = Option("temperature", float, "0 takes the most probable codes", 0, 100, 1.5, each_book=True)
TOP_K = Option("top_k", int, "most probable codes to choose from, 0 for all", 0, 10**6, 256, each_book=True)
TOP_P = Option("top_p", float, "choose among codes of together this probability, 1 for all", 1e-6, 1, 1, each_book=True)
OPTIONS = {
    "flow": (
        Option("steps", int, "of the solver, at least one", 1, 10_000, 64),
        Option("solver", str, "of the flow's equation", choices=("euler", "midpoint", "heun")),
        GUIDANCE,
        replace(TEMPERATURE, each_book=False, default=1.0, help="deviation of the noise that a clip begins as: 1 as in "
                "training, less for clearer words, 0 for the same clip with every seed"),
        Option("vocoder", str, "from log-mels to sound", choices=("griffinlim", "bigvgan")),
        SECONDS, SEED),
    "codec": (
        TEMPERATURE, TOP_K, TOP_P, GUIDANCE,
        replace(SECONDS, help="of audio to make, in all; with text, instead of what is predicted"),
        Option("prompt_wav", Path, "a recording to go on from"),
        Option("prompt_seconds", float, "of that recording, from its start; 0 for all", 0, 3600, 10), SEED),
    "llm": (
        *(replace(option, each_book=False) for option in (TEMPERATURE, TOP_K, TOP_P)),
        Option("repetition_penalty", float, "for codes that were spoken before, 1 for none", 1e-6, 100, 2),
        replace(SECONDS, help="of audio in all, pauses too, at most"),
        Option("speaker", Path, "a recording of the voice to speak with, of a person who agrees; or a voice as .npy"),
        SEED),
}


def add_flags(parser):
    """Add the options of all systems to an argparse parser; those that are not given become None."""
    for name in dict.fromkeys(option.name for options in OPTIONS.values() for option in options):
        found = {system: o for system, options in OPTIONS.items() for o in options if o.name == name}
        first, helps = next(iter(found.values())), dict.fromkeys(o.help for o in found.values())
        several = any(o.each_book for o in found.values())
        systems = "" if len(found) == len(OPTIONS) else f" ({', '.join(found)})"
        kind = some_path if first.type is Path else first.type
        parser.add_argument(f"--{name}", type=kind, choices=first.choices or None, default=None,
                            nargs="+" if several else None, help="; or ".join(helps) + systems)


def given_flags(args):
    """Those of an argparse result that are options and were given."""
    names = {option.name for options in OPTIONS.values() for option in options}
    values = {name: value for name, value in vars(args).items() if name in names and value is not None}
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in values.items()}


def read_options(system, config, given):
    """The value of each option of a system, {name: value}: what is given, else what the config says, a dict.

    Raises UserError for an option of another system, a value out of range, a list that is not of one number a book.
    """
    options = {option.name: option for option in OPTIONS[system]}
    if strange := [name for name in given if name not in options]:
        raise UserError(f"--{strange[0]} is not an option of {system!r} checkpoints")
    values, books = {}, config.get("codebooks", 1)
    for name, option in options.items():
        value, flag = given.get(name), f"--{name}"
        if value is None:  # eval_seconds is a limit, not a length
            value = option.default if name == "seconds" else config.get(f"eval_{name}", option.default)
            flag = f"--eval_{name}"
        several = value if isinstance(value, list) else [value]
        if len(several) not in ((1, books) if option.each_book else (1,)):
            raise UserError(f"{flag} has {len(several)} numbers" + (
                f" for {books} codebooks: give one, or one for each" if option.each_book else ": give one"))
        if option.choices and value not in option.choices:
            raise UserError(f"{flag} {value} is none of {', '.join(option.choices)}")
        low, high = option.low, option.high
        for x in several:
            if isinstance(x, (int, float)) and not low <= x <= high:
                raise UserError(f"{flag} {x} is out of range: at least {low:g} and at most {high:,g}")
        values[name] = several[0] if len(several) == 1 else several
    return values
