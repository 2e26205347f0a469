"""options.py: what is given, else what the config says; lists for codebooks; what is refused. Their flags and controls
are in test_speak.py and test_serve.py."""

import argparse

import pytest

from trivox.common import UserError
from trivox.options import OPTIONS, add_flags, given_flags, read_options


def test_given_or_of_the_config():
    """--eval_seconds is a limit of each sentence, and not the length of a text."""
    config = {"codebooks": 2, "eval_temperature": [0.5, 1.0], "eval_top_k": 9, "eval_top_p": 1.0, "eval_cfg_scale": 2.0,
              "eval_seconds": 8.0, "eval_prompt_seconds": 3.0}
    parser = argparse.ArgumentParser()
    add_flags(parser)
    given = given_flags(parser.parse_args(["--top_k", "3", "1", "--seed", "0"]))
    assert given == {"top_k": [3, 1], "seed": 0}
    assert read_options("codec", config, given) == {
        "temperature": [0.5, 1.0], "top_k": [3, 1], "top_p": 1.0, "cfg_scale": 2.0, "seconds": None, "prompt_wav": None,
        "prompt_seconds": 3.0, "seed": 0}
    assert read_options("codec", config, {"seconds": 4.0})["seconds"] == 4


@pytest.mark.parametrize("config, given, words", [
    ({}, {"steps": 3}, "--steps is not an option of 'codec'"), ({}, {"top_k": [1] * 3}, "--top_k has 3 numbers for 2"),
    ({"eval_top_p": 1.5}, {}, "--eval_top_p 1.5 is out of range"), ({}, {"seconds": float("nan")}, "--seconds nan"),
])
def test_refused(config, given, words):
    with pytest.raises(UserError, match=words):
        read_options("codec", {"codebooks": 2} | config, given)


@pytest.mark.parametrize("system", ["flow", "llm"])
def test_one_number(system):
    """Lists are for codebooks."""
    with pytest.raises(UserError, match="--temperature has 2 numbers: give one$"):
        read_options(system, {"eval_solver": "euler"}, {"temperature": [0.5, 0.7]})


def test_a_flag_is_of_one_type():
    """What several systems have by one name is read alike."""
    for name in {option.name for some in OPTIONS.values() for option in some}:
        of = [option for some in OPTIONS.values() for option in some if option.name == name]
        assert len({(option.type, option.choices, option.low, option.high) for option in of}) == 1
