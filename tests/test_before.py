"""Data sets and runs that were made when all files lay side by side still load, speak and resume.

tests/fixtures/make_before.py had the code of then make them, and write down what it made of them in float32.
"""

import json
import shutil
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
import yaml

import train_codec_lm
import train_flow_tts
import train_llm_tts
from trivox import common, muon, recipes, speak
from trivox.run_folder import find_checkpoint, newest

FIXTURES = Path(__file__).parent / "fixtures"
BEFORE = json.loads((FIXTURES / "before.json").read_text())
TRAINERS = {"flow": train_flow_tts, "codec": train_codec_lm, "llm": train_llm_tts}


@pytest.fixture(params=TRAINERS)
def system(request, tmp_path, monkeypatch):
    """The name of a system whose data set and run of then lie in the working folder."""
    shutil.unpack_archive(FIXTURES / f"before_{request.param}.tar.xz", tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(muon, "pick_dtype", lambda name, device: torch.float32)  # whatever the chip has
    return request.param


# The calls that speak, as make_before.py's `say` makes them: what the averaged weights of run/ say, from seed 0

def say_flow(text):
    return speak.load("run").speak([{"text": text}], seconds=0.3, steps=2, cfg_scale=2.0)[0].mel


def say_codec(text):
    speaker = speak.load("run")
    speaker.config["eval_seconds"] = 0.4
    return speaker.speak([{"text": text}], temperature=0.7, top_k=0, top_p=1.0, cfg_scale=1.5)[0].codes


def say_llm(text):
    return speak.load("run").speak([{"text": text}], seconds=0.4, temperature=0.7, top_k=0, top_p=1.0)[0].codes


def test_speaks(system):
    """The same codes, or the same log-mel within 0.001."""
    said = {"flow": say_flow, "codec": say_codec, "llm": say_llm}[system]("Two books.")
    before = BEFORE[system]["said"]
    if system == "flow":
        assert list(said.shape) == before["shape"]
        for value, name in ((said.mean(), "mean"), (said.std(), "std"), (said[0], "first"), (said[-1], "last")):
            np.testing.assert_allclose(value, before[name], rtol=0, atol=1e-3)
    else:
        assert said.tolist() == before


def test_settings_that_there_were_not_yet(system):
    """Have their defaults, whatever key a checkpoint lacks."""
    path, defaults = find_checkpoint("run") / "config.yaml", recipes.defaults(system)
    config = common.read_yaml(path)
    path.write_text(yaml.safe_dump({key: value for key, value in config.items()
                                    if key == "system" or value != defaults.get(key)}))
    assert len(common.read_yaml(path)) < len(config)
    test_speaks(system)


def test_resumes(system, monkeypatch):
    """With the config that it left behind, a run goes on from step 3 to 6 with the same losses on the same data."""
    monkeypatch.setattr(common, "catch_signals", Event)
    run = Path("run")
    log = (run / "metrics.jsonl").read_text()
    TRAINERS[system].main(["--config", "run/config.yaml", "--resume"])
    now = (run / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in now.removeprefix(log).splitlines()]
    assert now.startswith(log) and len(rows) == len(BEFORE[system]["losses"])
    for row, before in zip(rows, BEFORE[system]["losses"]):
        assert row["step"] == before["step"]
        np.testing.assert_allclose([row[name] for name in before], [*before.values()], rtol=1e-4)
    assert newest(run).name == "step_00000006" and (run / "index.html").exists()
