"""export.py and speak_onnx.py, the script that it puts beside a model: what is spoken without PyTorch is what PyTorch
speaks."""

import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal
from helpers import narrow_codec, prompts_of, tiny_llm, voice

import export
from trivox import speak, speak_onnx
from trivox.alphabet import SYMBOLS, of_texts
from trivox.audio import MelConfig, log_mel
from trivox.codecs import MelRVQ, load_codec
from trivox.generate import generate_speech
from trivox.errors import UserError
from trivox.synthesisers import speak_espeak

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.onnx's own doings
EVAL = dict(eval_temperature=0.8, eval_top_k=0, eval_top_p=0.9, eval_repetition_penalty=1.1, eval_seconds=2.0)


@pytest.fixture
def exported(tmp_path):
    """exported(model, int8) is the folder of an export of a model that no run has made, with a codec."""
    def make(model, int8=False):
        torch.manual_seed(0)
        codec = MelRVQ(MelConfig(hop_length=441), torch.full((80,), -4.0), [torch.randn(50, 80)])
        export.export_onnx(model, EVAL, codec, tmp_path / "onnx", int8)
        return tmp_path / "onnx"

    return make


def speaker_of(folder, embedding=None):
    return speak_onnx.Speaker(folder, 1, None if embedding is None else embedding[0].numpy())


@pytest.mark.parametrize("options", [
    dict(), dict(macaron=True, alibi="standard", activation="gelu", speaker_width=12, seed=3), dict(pattern="GAG"),
    dict(characters=" абв")], ids=["published", "voices and more", "recurrent", "own characters"])
def test_greedy_tokens_are_pytorchs(exported, options):
    """300 of them, after prompts of two lengths, beyond the capacity that the cache begins with, with penalties for
    what was spoken, so that they do not repeat."""
    model = tiny_llm(**options)
    with torch.no_grad():
        model.embedding.weight[model.c.audio_eos] *= 0.1  # so that it does not end at once
    embedding, prompts = voice(model, 1), prompts_of(model)[:2]
    wanted = [generate_speech(model, [prompt], [0], 300, speaker=embedding, temperature=0, repetition_penalty=penalty)
              [0].tolist() for prompt, penalty in zip(prompts, (1.2, 1.5))]
    speaker = speaker_of(exported(model), embedding)
    for prompt, penalty, codes in zip(prompts, (1.2, 1.5), wanted):
        speaker.ids = lambda text: prompt[1:-2].tolist()
        found = list(speaker.codes("", frames=300, temperature=0, repetition_penalty=penalty))
        assert found == codes and len(codes) == 300 and len(set(codes)) > 5


def test_8_bits(exported):
    """A byte a weight, the embedding twice, and logits that move by little in spite of ReLU²'s outliers."""
    model = tiny_llm(width=256, ffn_width=512, heads=4, codebook_size=2000, layers=2)
    with torch.no_grad():
        model.blocks[0].ffn.up.weight[:3] *= 30
        prompt = prompts_of(model)[0]
        wanted = model.audio_logits(model.hidden(prompt[None])[:, -1])[0].numpy()
    size = sum(p.numel() for p in model.parameters()) + model.embedding.weight.numel()
    folder = exported(model, int8=True)
    speaker = speaker_of(folder)
    feed = {"tokens": prompt[None].numpy(), "position": np.array(0),
            **{name: np.zeros(shape, np.float32) for name, shape in speaker.c["states"].items()}}
    found = speaker.model.run(None, feed)[0][0]
    assert np.corrcoef(found, wanted)[0, 1] > 0.999
    assert sum(path.stat().st_size for path in folder.glob("model.onnx*")) < 1.2 * size


def without(tmp_path, *names):
    """The environment of a Python that cannot import these."""
    folder = tmp_path / "without"
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})")
    return os.environ | {"PYTHONPATH": str(folder)}


def say(folder, env, *argv, flags=()):
    """What the script in `folder` ends with, called from the folder of this repository. flags: of Python."""
    return subprocess.run([sys.executable, *flags, str(folder / "speak.py"), *map(str, argv)], capture_output=True,
                          text=True, cwd=ROOT, env=env)


HEAVY = "torch", "transformers", "librosa", "scipy"


def test_the_script_needs_no_pytorch(whole, tmp_path):
    """In a Python in which torch, transformers and librosa cannot be imported."""
    np.save(tmp_path / "voice.npy", np.ones(12, np.float32))
    env, out = without(tmp_path, *HEAVY), tmp_path / "out.wav"
    voiced = ["--speaker", tmp_path / "voice.npy", "--out", out, "--threads", 1]
    said = say(whole, env, "--text", "Dr. Hall sold 2 books on 3/4/2021. Yes!", *voiced)
    assert said.returncode == 0 and "real-time factor" in said.stdout, said.stderr
    assert 0.2 < out.stat().st_size / 2 / 22050 < 4.3
    assert not say(whole, env, "--text", "hi", *voiced, flags=["-P"]).returncode
    for argv, words in ((["--text", "hi"], "12 numbers"), (["--text", "...", *voiced], "nothing to say"),
                        (["--text", "", *voiced], "nothing to say"), (["--text", "слово", *voiced], "English letters"),
                        (["--text", "a\udcff", *voiced], "not UTF-8"),
                        (["--text", "hi", "--speaker", tmp_path / "none.npy"], "none.npy"),
                        (["--text", "hi", "--top_p", 2, *voiced], "--top_p 2"),
                        (["--text", "x" * 99, *voiced], "99 letters")):
        said = say(whole, env, *argv)
        assert said.returncode == 1 and said.stderr.startswith("error: ") and words in said.stderr
        assert said.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["num2words", "onnxruntime"])
def test_a_package_that_is_not_there(whole, tmp_path, name):
    np.save(tmp_path / "voice.npy", np.ones(12, np.float32))
    said = say(whole, without(tmp_path, *HEAVY, name), "--text", "2 books.", "--speaker", tmp_path / "voice.npy")
    assert said.returncode == 1 and said.stderr.startswith(f"error: cannot import {name} (")
    assert said.stderr.endswith(f"pip install -r {whole / 'requirements.txt'}\n") and said.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["trivox", "trivox/dates.py", "trivox/sentences.py"])
def test_files_that_read_texts_and_are_not_there(whole, tmp_path, name):
    folder = shutil.copytree(whole, tmp_path / "onnx")
    shutil.move(folder / name, tmp_path / "elsewhere")
    said = say(folder, without(tmp_path, *HEAVY), "--text", "hi")
    assert said.returncode == 1 and said.stderr.startswith(f"error: cannot read {folder / 'trivox'}")
    assert said.stderr.endswith("export the model again\n") and said.stderr.count("\n") == 1


def test_the_packages_are_those_imported(whole):
    """By the script and what it reads texts by; each at the version of this repository's requirements.txt."""
    scripts = [*whole.rglob("*.py")]
    found = {name for path in scripts for name in re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.M)}
    lines = (whole / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in lines} == found - {*sys.stdlib_module_names, "trivox"}
    assert {*lines} <= {*(ROOT / "requirements.txt").read_text().splitlines()} and len(scripts) > 5


def readings(sentences, ids, texts):
    """Of each text its sentences with their ids, or why it has none, and what was said of it on stderr."""
    import contextlib
    import io

    found = []
    for text in texts:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                read = [[one, [int(i) for i in ids(one)]] for one in sentences(text)]
            except Exception as e:
                read = f"{type(e).__name__}: {e}"
        found.append([read, said.getvalue()])
    return found


ASK = """
import json, sys
import speak, trivox

speaker = object.__new__(speak.Speaker)
speaker.c = speak.read_config(speak.HERE / "config.json") | json.loads(sys.argv[1])
print(json.dumps([trivox.__file__, readings(speaker.sentences, speaker.ids, json.load(sys.stdin))]))
"""


@pytest.mark.parametrize("language, characters", [
    ("en", SYMBOLS), ("de", SYMBOLS), ("de", of_texts(["Zwölf Boxkämpfer jagen Viktor über den Deich: ß!"])),
    ("und", " ABab.")], ids=["en", "de", "de, own characters", "symbols"])
def test_texts_are_read_as_everywhere(whole, tmp_path, language, characters):
    """By the copy, in a process without torch: sentences, ids, notes and refusals are those of trivox.speak."""
    texts = [line.split("\t")[0] for name in ("sentences.tsv", "normalised.tsv")
             for line in (ROOT / "tests" / name).read_text().splitlines()]
    texts += ["", " \n", "?!", "🙂", "слово", "The word слово, and ★.", "你好。", "a\udcff", "x" * 300, "1234567890",
              "Ünï", "Am 3. Mai kostet es 1.234,50 Euro. Ja?", "  Tabs\tand\nlines ", "½ ② ﬁ ＡＢ", "nine keys " * 5000]
    config = EVAL | {"language": language}
    here = speak.LLMSpeaker(tiny_llm(characters=characters), config, None)
    wanted = readings(lambda text: (here.told.clear(), here.sentences(text))[1], here.letters.ids, texts)
    env, about = without(tmp_path, *HEAVY), json.dumps({"language": language, "characters": characters})
    env["PYTHONPATH"] += os.pathsep + str(whole)
    said = subprocess.run([sys.executable, "-c", inspect.getsource(readings) + ASK, about],
                          input=json.dumps(texts), capture_output=True, text=True, cwd=tmp_path, env=env)
    assert said.returncode == 0, said.stderr
    package, found = json.loads(said.stdout)
    assert Path(package).parent == whole / "trivox"
    for text, one, other in zip(texts, found, wanted, strict=True):
        assert one == other, text
    assert speak_onnx.PAUSE == speak.PAUSE


@pytest.fixture
def parrot():
    """A speaker that makes a code of each character of a sentence, 0.1 s long, and of an X no end."""
    speaker = object.__new__(speak_onnx.Speaker)
    speaker.c = {"characters": SYMBOLS, "language": "en", "sentence": 30, "context": 40, "seconds": 1.5,
                 "sample_rate": 1000, "frame_rate": 10}
    speaker.codes = lambda text, seed, frames: [seed] * min(frames, 99 if "X" in text else len(text.strip("Zz.")))
    speaker.decode = lambda codes: np.ones(100 * len(codes), np.float32)
    return speaker


@pytest.mark.parametrize("text, seconds, length, words", [
    ("One. Three.", None, 0.3 + 0.15 + 0.5, []),
    ("One. Three.", 30, 0.95, []),
    ("Xes. Three.", None, 1.5 + 0.15 + 0.5, ["'Xes.' has no end after 1.5 s", "--seconds allows more"]),
    ("Xes. Three.", 9, 3.3 + 0.15 + 0.5, ["'Xes.' has no end after 3.3 s, and no more is heard: another seed"]),
    ("One. Three. Five.", 0.7, 0.65, ["from 'Three.' on, 2 of 3 sentences are not heard", "within 0.7 s"]),
    ("One. Three. Five.", 0.4, 0.3, ["from 'Three.' on, 2 of 3 sentences are not heard"]),
    ("One. Three.", 0.8, 0.85, ["'Three.' is not heard to the end"]),
    ("Three.", 0.01, 0.1, ["'Three.' is not heard to the end within 0.01 s"]),
    ("One. Zzz. Three.", 30, 0.95, ["made no sound for 'Zzz.'"]),
])
def test_seconds(parrot, capsys, text, seconds, length, words):
    """They are of the whole text at most, to the nearest code; without them a sentence has those of the config. What is
    not heard is said."""
    wav = parrot.speak(text, 1, seconds)
    said = capsys.readouterr().err
    assert len(wav) == round(1000 * length) and said.count("note: ") == bool(words)
    assert all(word in said for word in words)


def test_no_sound_at_all(parrot):
    with pytest.raises(UserError, match="no sound for 'Zzz.': try another seed"):
        parrot.speak("Zzz. Zz.")


def test_sampling_follows_the_cut_distribution():
    """Shares of 4,000 draws beside those worked out by hand, as for `generate.pick`."""
    p, rng = np.array([0.1, 0.4, 0.2, 0.3]), np.random.default_rng(0)
    plain = dict(temperature=1, top_k=0, top_p=1, repetition_penalty=1)
    for options, wanted in (({}, p), (dict(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
                            (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]), (dict(top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
                            (dict(temperature=0), [0, 1, 0, 0])):
        drawn = [speak_onnx.pick(np.log(p), np.zeros(4, bool), rng, plain | options) for _ in range(4000)]
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, wanted, atol=0.03)
    spoken = np.array([True, False, False, False])
    punishing = plain | dict(temperature=0, repetition_penalty=1.2)
    assert speak_onnx.pick(np.array([2.0, 1.9, 0, 0]), spoken, rng, punishing) == 1


def test_griffin_lim_is_as_near_as_librosas():
    """The log-mel of what the script makes is no farther from what was asked for than that of audio.griffin_lim."""
    from trivox.audio import griffin_lim, mel_filters

    mel = MelConfig(hop_length=441)
    wanted = log_mel(speak_espeak("The captain painted boxes."), mel).numpy()
    mine = speak_onnx.griffin_lim(wanted, mel_filters(mel).numpy(), mel.hop_length, mel.n_fft)
    theirs = griffin_lim(wanted, mel)
    assert len(mine) == len(theirs) == len(wanted) * 441
    off = [np.abs(log_mel(wav.astype(np.float32), mel).numpy() - wanted)[3:-3].mean() for wav in (mine, theirs)]
    assert off[0] < 1.1 * off[1] + 0.02


def test_neucodec(tmp_path, monkeypatch):
    """transformers' class, small and with random weights: its decoder as ONNX gives the same sound for any length."""
    import transformers

    if not hasattr(transformers, "NeuCodecModel"):
        pytest.skip(f"transformers {transformers.__version__} has no NeuCodecModel")
    torch.manual_seed(0)
    transformers.NeuCodecModel(narrow_codec("neucodec")).save_pretrained(tmp_path / "neucodec")
    monkeypatch.setenv("TRIVOX_WEIGHTS", str(tmp_path))
    codec = load_codec("neucodec")
    export.export_codec(codec, tmp_path)
    speaker = object.__new__(speak_onnx.Speaker)
    speaker.folder, speaker.codec = tmp_path, None
    speaker.load = lambda name: speak_onnx.onnxruntime.InferenceSession(tmp_path / name)
    for frames in (7, 33):
        codes = np.random.default_rng(frames).integers(0, 65536, frames)
        wanted = codec.decode(codes[:, None])
        np.testing.assert_allclose(speaker.decode(codes), wanted, atol=2e-3 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an export with voices, 12 numbers wide. Tests only read it."""
    folder = tmp_path_factory.mktemp("whole") / "onnx"
    torch.manual_seed(0)
    codec = MelRVQ(MelConfig(hop_length=441), torch.full((80,), -4.0), [torch.randn(50, 80)])
    export.export_onnx(tiny_llm(speaker_width=12), EVAL, codec, folder, False)
    return folder


@pytest.mark.parametrize("file", ["config.json", "model.onnx", "voice.onnx", "codec.npz"])
@pytest.mark.parametrize("damage", ["missing", "cut", "another's"])
def test_a_damaged_export(whole, tmp_path, file, damage):
    """One sentence that names the file, which neither PyTorch nor the command's own plumbing is there to say."""
    folder = shutil.copytree(whole, tmp_path / "onnx")
    content = {"missing": None, "cut": (folder / file).read_bytes()[:100], "another's": b"[]"}[damage]
    (folder / file).unlink()
    if content:
        (folder / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        speaker = speaker_of(folder, torch.ones(1, 12))
        speaker.decode([1, 2])
    said = str(error.value)
    assert said.startswith(f"cannot read {folder / file} (") and "export" in said and "\n" not in said


@pytest.mark.parametrize("wrong, words", [
    ({"characters": ""}, "characters is ''"), ({"characters": 5}, "characters is 5"), ({"language": None}, "language"),
    ({"states": {}}, "states"), ({"sample_rate": 0}, "sample_rate is 0"), ({"seconds": -1}, "seconds is -1"),
    ({"characters": SYMBOLS + "ß"}, "audio_bos")], ids=str)
def test_a_changed_config_of_an_export(whole, tmp_path, wrong, words):
    folder = shutil.copytree(whole, tmp_path / "onnx")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | wrong))
    with pytest.raises(UserError, match=f"config.json .*{re.escape(words)}"):
        speak_onnx.read_config(folder / "config.json")


@pytest.mark.parametrize("content", ["nothing", "archive", "pickle", "text", "not finite", "too many"])
def test_what_is_no_voice(whole, tmp_path, monkeypatch, content):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        if content == "archive":
            np.savez(file, a=np.ones(12))
        elif content != "nothing":
            np.save(file, {"pickle": np.array([{}] * 12), "text": np.array(["x"] * 12), "too many": np.ones(13),
                           "not finite": np.full(12, np.nan)}[content])
    assert "--speaker" in script(monkeypatch, whole, "--text", "hi", "--speaker", path, "--out", tmp_path / "a.wav")
    assert [*tmp_path.iterdir()] == [path]


def script(monkeypatch, folder, *argv):
    """What the script in `folder` says as it refuses these arguments."""
    monkeypatch.setattr(speak_onnx, "HERE", folder)
    monkeypatch.setattr(sys, "argv", ["speak.py", *map(str, argv)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    return refusal(lambda argv: speak_onnx.main())


def test_what_the_script_refuses(whole, tmp_path, monkeypatch):
    """What was there before stays, and nothing half is left."""
    np.save(tmp_path / "voice.npy", np.ones(12, np.float32))
    (tmp_path / "a.wav").write_text("earlier")
    for flags, words in ((["--threads", 10**20], "--threads 1"), (["--threads", -1], "--threads -1"),
                         (["--out", tmp_path / "a.wav" / "b.wav"], "a.wav/b.wav"),
                         (["--out", tmp_path], "cannot write"),
                         (["--temperature", -1], "--temperature -1")):
        said = script(monkeypatch, whole, "--text", "hi", "--speaker", tmp_path / "voice.npy", "--out",
                      tmp_path / "a.wav", "--seconds", 0.1, *flags)
        assert words in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "voice.npy"]
    assert (tmp_path / "a.wav").read_text() == "earlier"


def test_a_temperature_of_next_to_nothing():
    """The likeliest is drawn, where a division by less than 32 bits can hold would leave nothing to draw from."""
    plain, logits = dict(top_k=0, top_p=1, repetition_penalty=1), np.float32([1, 3, 2])
    for temperature in (1e-300, 1e-45, 1e-6):
        options = plain | dict(temperature=temperature)
        assert speak_onnx.pick(logits, np.zeros(3, bool), np.random.default_rng(0), options) == 1


def test_folders_that_are_no_export(whole, tmp_path, monkeypatch):
    """They stay as they are; an earlier export is written anew, and nothing of the earlier one is left to be read."""
    monkeypatch.setattr(export, "read_config", lambda ckpt: {"system": "llm"})
    monkeypatch.setattr(export, "load_model", lambda ckpt: (tiny_llm(), {}))
    monkeypatch.setattr(export, "load_codec", lambda name: None)
    monkeypatch.setattr(export, "codec_of", lambda ckpt, config: None)
    monkeypatch.setattr(export, "export_onnx", lambda model, config, codec, folder, int8: (
        (folder / "codec.npz").write_text("new"), (folder / "config.json").write_text("new"),
        export.export_script(folder)))
    for name in "config.json", "notes.txt":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text('{"mine": 1}')
        assert "no earlier export" in refusal(export.main, "--ckpt", "x", "--onnx", tmp_path / name)
        assert [path.read_text() for path in (tmp_path / name).iterdir()] == ['{"mine": 1}']
    folder = shutil.copytree(whole, tmp_path / "onnx")
    (folder / "codec.onnx").touch()
    (folder / "notes.txt").touch()
    (folder / "trivox" / "dates.py").write_text("old")
    (folder / "trivox" / "notes.txt").touch()
    export.main(["--ckpt", "x", "--onnx", str(folder)])
    assert (folder / "codec.npz").read_text() == "new" and (folder / "notes.txt").exists()
    assert "old" != (folder / "trivox" / "dates.py").read_text() and (folder / "trivox" / "notes.txt").exists()
    assert not (folder / "codec.onnx").exists() and not list(folder.glob(".*"))


@pytest.mark.parametrize("what", ["--merge", "--echolancer"])
@pytest.mark.parametrize("flag", [["--int8"], ["--speaker", "a.wav"]], ids=" ".join)
def test_flags_of_onnx_alone(tmp_path, what, flag):
    assert f"{flag[0]} is of --onnx" in refusal(export.main, "--ckpt", "x", what, tmp_path / "x", *flag)


def test_refusals(run, tmp_path):
    assert "'flow'" in refusal(export.main, "--ckpt", run, "--onnx", tmp_path / "x")
    assert "no checkpoint" in refusal(export.main, "--ckpt", tmp_path, "--onnx", tmp_path / "x")
