"""Recipes: what data a config needs and how they are made. It knows configs and files, but not what the commands do.

    data_recipe:
      by_hand:     # what the user has to put there; the path, and what it is
        data/mine_corpus: some minutes of recordings of one voice, wavs/ and a metadata.csv of lines id|text
      download:    # what is fetched, how large it is and its licence, for the user to read
      - NeuCodec's weights (2.5 GB, Apache 2.0)
      commands:    # of data.py, in this order; they make the config's data_dir
      - tokenize --codec neucodec --root data/mine_corpus --out data/mine
"""

import difflib
import importlib
import shlex
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pydantic

from trivox.common import UserError, checked, load_config, read_yaml

TRAINERS = {"flow": "train_flow_tts", "codec": "train_codec_lm", "llm": "train_llm_tts"}


class Recipe(pydantic.BaseModel, strict=True, extra="forbid"):
    by_hand: dict[str, str] = {}
    download: list[str] = []
    commands: list[str] = []


def load_settings(path, system=None, flags=()):
    """The Config of the trainer that a config file is for, filled from the file and then from flags.

    system: of a file that does not say it. Raises UserError where neither says it or both do and differ, and as
    `load_config` does.
    """
    said = read_yaml(path).get("system", system)
    if said is None:
        raise UserError(f"{path} does not say which system it is of: give it a line such as system: flow")
    if said not in list(TRAINERS):
        raise UserError(f"{path} is of the unknown system {said!r}; known are {', '.join(TRAINERS)}")
    if system not in (said, None):
        raise UserError(f"{path} is of the system {said!r}, not of {system!r}")
    trainer = importlib.import_module(TRAINERS[said])  # not above, as it takes seconds and imports run the other way
    return load_config(trainer.Config, ["--config", str(path), *flags])


def defaults(system):
    """The default of each setting of a system's trainer: what a run has that was made before there was the setting."""
    return {f.name: f.default for f in fields(importlib.import_module(TRAINERS[system]).Config)}


def complete(config, path):
    """The config of a run, a dict with its `system`, with the defaults of settings that there were not yet when it was
    made. Raises UserError for a value that the setting cannot have; path: where it is from."""
    kinds = get_type_hints(importlib.import_module(TRAINERS[config["system"]]).Config, include_extras=True)
    return defaults(config["system"]) | {
        key: checked(kinds[key], value, f"{key} in {path}") if key in kinds else value for key, value in config.items()}


def read_recipe(path, c, parse):
    """The Recipe in a config file, an empty one if there is none, and its commands: [(text, arguments, result)].

    c: the Config. parse: from a command line of data.py, as a list, to its arguments, among them the functions `make`,
    which runs it, and `result`, which says what file it writes last. Raises UserError for a bad recipe.
    """
    where, settings = f"data_recipe in {path}", read_yaml(path)
    if "data_recipe" not in settings:
        return Recipe(), []
    try:
        recipe = Recipe.model_validate(settings["data_recipe"])
    except pydantic.ValidationError as e:
        error = e.errors()[0]
        key = ".".join(map(str, error["loc"]))
        if not key:
            keys = ", ".join(Recipe.model_fields)
            raise UserError(f"{where} should be a dictionary of {keys}, not {error['input']!r}") from None
        if error["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, Recipe.model_fields, 1, cutoff=0)[0]
            raise UserError(f"unknown key {key!r} in {where}; the nearest known key is {near!r}") from None
        want = error["msg"].removeprefix("Input should be ")
        raise UserError(f"{key} in {where} should be {want}, not {error['input']!r}") from None
    commands = []
    for text in recipe.commands:
        try:
            args = parse(shlex.split(text))
            if "result" not in args:
                raise UserError(f"{args.command} makes no data of its own")
            commands.append((text, args, args.result(args)))
        except SystemExit:
            raise UserError(f"{where} has the command {text!r}, which only helps") from None
        except (UserError, ValueError) as e:  # ValueError where a quote is missing
            raise UserError(f"{where} has the command {text!r}: {e}") from None
    if not any(same_path(result, mark(c, c.data_dir)) for *_, result in commands):
        raise UserError(f"no command of the {where} makes {mark(c, c.data_dir)}, which data_dir asks for; without a "
                        "recipe, data_dir is for your own data")
    return recipe, commands


def make_data(path, parse, data_dir=None, system=None):
    """Make the data set of a config file by its recipe, or what is missing of it.

    data_dir: where it is not the config's own, it is the user's, and nothing is made. parse: as of `read_recipe`.
    Raises UserError for a bad config, for what is to be put there by hand, and where no data are there nor made.
    """
    c = load_settings(path, system)
    recipe, commands = read_recipe(path, c, parse)
    folder = Path(c.data_dir if data_dir is None else data_dir)
    if not same_path(folder, c.data_dir):
        commands = []
    of_folder = [mark(c, folder), *(result for *_, result in commands if same_path(result.parent, folder))]
    if all(file.exists() for file in of_folder):
        return print(f"{folder}: all that {path} needs is there")
    if not commands:
        make = "ljspeech" if c.system == "flow" else f"tokenize --codec {c.codec}"
        raise UserError(f"no data set at {folder}: python data.py {make} --root DIR --out {shlex.quote(str(folder))} "
                        "makes one of the recordings in DIR")
    if missing := [f"{there}: {what}" for there, what in recipe.by_hand.items() if not Path(there).exists()]:
        raise UserError(f"{path} needs what has to be put there by hand: {'; '.join(missing)}")
    print(f"{path} needs {folder}; to download, where it is not here yet:", *recipe.download or ["nothing"],
          sep="\n    ", flush=True)
    for text, args, result in commands:
        if not result.exists():
            print(f"python data.py {text}", flush=True)
            args.make(args)


def mark(c, folder):
    """The file that is written last into a data set for the Config `c`, and so marks a whole one."""
    return Path(folder) / ("dataset_stats.json" if c.system == "flow" else "codec.json")


def same_path(a, b):
    return Path(a).resolve() == Path(b).resolve()
