"""The house: imports run one way, no file is too long, each room says what it is and has its tests; the commands that
the documents name are understood."""

import argparse
import ast
import glob
import importlib
import re
import shlex
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from trivox import common, launch

ROOMS = {path.stem: path for path in sorted((ROOT / "trivox").glob("*.py")) if path.stem != "__init__"}
COMMANDS = {path.stem: path for path in sorted(ROOT.glob("*.py")) if path.stem != "model"}
TESTS = sorted((ROOT / "tests").glob("*.py"))
DOCUMENTS = [path for name in ("README.md", "CONTRIBUTING.md", "docs/**/*.md") for path in sorted(ROOT.glob(name))]


def imported(path):
    """The modules that a file imports, at its top or later."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(path):
    """The rooms that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("trivox.")} & set(ROOMS)


# ------------------------------------------------------------------------------------------------------------
# Imports

def test_rooms_import_no_command():
    """trivox/ is what commands are made of. Only recipes.py finds the trainer that a config is for by its name."""
    assert {room: found for room, path in ROOMS.items() if (found := imported(path) & set(COMMANDS))} == {}
    assert {room for room, path in ROOMS.items() if "importlib" in imported(path)} <= {"recipes"}


def test_rooms_have_an_order():
    """In which each imports only those before it: the graph has no cycle."""
    list(TopologicalSorter({room: rooms_of(path) for room, path in ROOMS.items()}).static_order())


def test_the_model_knows_nothing_of_files():
    assert rooms_of(ROOT / "model.py") == {"alphabet", "common", "convolution", "delta_rule"}
    assert not imported(ROOT / "model.py") & set(COMMANDS)


def test_tests_do_not_import_each_other():
    assert {path.name for path in TESTS if any(name.startswith("test_") for name in imported(path))} == set()


# ------------------------------------------------------------------------------------------------------------
# Files

def test_no_file_is_too_long():
    """A screenful of screenfuls: 600 lines, and model.py, which is three models."""
    lengths = {path: len(path.read_text().splitlines()) for path in (*ROOMS.values(), *COMMANDS.values(), *TESTS)}
    assert {path.name: n for path, n in lengths.items() if n > 600} == {}


def test_each_file_says_what_it_is():
    files = [*ROOMS.values(), *COMMANDS.values(), *TESTS, ROOT / "model.py"]
    assert [path.name for path in files if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_each_room_has_its_tests():
    """tests/test_<room>.py, or a file of tests whose docstring names the room's file."""
    said = " ".join(ast.get_docstring(ast.parse(path.read_text())) or "" for path in TESTS)
    untested = [room for room in ROOMS if not (ROOT / "tests" / f"test_{room}.py").exists()
                and not re.search(rf"\b{room}\.py", said)]
    assert untested == []


# ------------------------------------------------------------------------------------------------------------
# The commands in the documents: parsed by the commands' own parsers, and not run

class Parsed(Exception):
    """The command line was understood."""


@pytest.fixture
def only_parsed(monkeypatch):
    """No parser gets further than to have understood its arguments; those that a document leaves out may be missing."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser, argv=None, namespace=None):
        parse_args(parser, argv, namespace)
        raise Parsed

    def error(parser, message):
        raise Parsed if "arguments are required" in message else common.UserError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for parser in (argparse.ArgumentParser, importlib.import_module("data").Parser):
        monkeypatch.setattr(parser, "error", error)
    bench = importlib.import_module("bench")  # which has no parser, but a function for each command
    for name, value in vars(bench).items():
        if callable(value) and getattr(value, "__module__", "") == "bench" and name != "main":
            monkeypatch.setattr(bench, name, understood)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.chdir(ROOT)


def understood(*args):
    raise Parsed


def shell_lines(text):
    """The lines of a document's code blocks, and its `code` in a line of text."""
    blocks = re.findall(r"^ *```.*?\n(.*?)^ *```", text, re.M | re.S)
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))
    return [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()] + [
        " ".join(span.split()) for span in spans]


def commands(text):
    """The commands of a document that are ours, as lists of words: [script, argument, …]."""
    copies = {}
    for line in shell_lines(text):
        if not re.search(r"(^|[\s/;&|(])(python3?|run\.sh|cp) ", line):
            continue
        line = re.sub(r"\\?\[[^\]]*\|[^\]]*\]", "", line)  # [one | another]
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words = list(lexer)
        words = [word for before, word in zip(["", *words], words) if before.startswith("--") or word not in "…..."]
        for n in [0, *(n + 1 for n, word in enumerate(words) if set(word) <= set(";&|<>"))]:
            command = []
            for word in words[n:]:
                if set(word) <= set(";&|<>"):
                    break
                command.append(copies.get(word, word).strip("[]"))
            while command and re.fullmatch(r"\w+=.*", command[0]):  # VARIABLE=value
                del command[0]
            match [*(Path(word).name for word in command[:1]), *command[1:]]:
                case ["cp", source, target]:
                    copies[target] = source
                case ["python" | "python3", script, *rest] if script.endswith(".py"):
                    yield [script, *rest]
                case ["run.sh", *rest]:
                    yield ["run.sh", *rest]


PLACEHOLDERS = {"N": "2", "FILE": "configs/flow_demo.yaml", "CONFIG": "configs/flow_demo.yaml"}


def understand(script, argv):
    """Raises what a command raises for arguments that it does not know, and an AssertionError for files that are not
    there."""
    argv = [PLACEHOLDERS.get(word, word) for word in argv]
    for word in argv:
        if word.startswith(("configs/", "benchmarks/", "docs/", "tests/")):
            assert glob.glob(word, root_dir=ROOT), f"there is no {word}"
    if script == "run.sh":
        if argv[:1] == ["test"]:
            names = " ".join(re.findall(r"def test_\w+|class \w+", " ".join(path.read_text() for path in TESTS)))
            chosen = argv[argv.index("-k") + 1].split() if "-k" in argv else []
            unknown = [word for word in chosen if word not in ("and", "or", "not") and word not in names]
            assert not unknown, f"no test is named {unknown}"
        elif argv[:1] not in (["--help"], ["-h"]):
            launch.assignments(argv, {})
        return
    if script.endswith("/speak.py"):  # which export.py puts beside a model
        script = "trivox/speak_onnx.py"
    assert (ROOT / script).exists(), f"there is no {script}"
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    try:
        if script.startswith("train_") and "--help" not in argv:
            common.load_config(module.Config, argv)
        else:
            module.main(*[argv] if module.main.__code__.co_argcount else [])
    except (Parsed, SystemExit) as end:
        assert not getattr(end, "code", None), f"it says: {end.code}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_the_documents(path, only_parsed, monkeypatch, capsys):
    """Each names a script that there is, and only what this script's own parser knows."""
    wrong = []
    for script, *argv in commands(path.read_text(encoding="utf-8")):
        monkeypatch.setattr("sys.argv", [script, *argv])
        try:
            understand(script, argv)
        except (common.UserError, AssertionError) as e:
            wrong.append(f"{shlex.join([script, *argv])}: {e}")
    assert not wrong, "\n" + "\n".join(wrong)
