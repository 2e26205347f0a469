"""sample.py, evaluate.py and tables.py: what is said, judged, told and refused."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, refusal

import evaluate
import sample
from trivox import judges, tables
from trivox.audio import MelConfig, log_mel
from trivox.judges import word_error_rate
from trivox.recognisers import load_recogniser
from trivox.run_folder import find_checkpoint

MEL = MelConfig()


@pytest.mark.parametrize("text, words", [("", "nothing to say"), (" ?! …", "nothing to say"), ("x" * 300, "300 bytes")])
def test_text_that_cannot_be_said(run, tmp_path, text, words):
    assert words in refusal(sample.main, "--ckpt", run, "--text", text, "--out", tmp_path / "a.wav", "--device", "cpu")
    assert not (tmp_path / "a.wav").exists()


# ------------------------------------------------------------------------------------------------------------
# Speaking

def test_speaks_what_the_model_makes(run, tmp_path, capsys):
    """Two sentences, joined by a pause; --seconds is the length of the whole; the same seed is the same sound."""
    text = "The baker sold two books. Yesterday, the driver found nine golden keys."
    command = ["--ckpt", str(run), "--text", text, "--seconds", "3", "--steps", "2", "--device", "cpu", "--out"]
    for name in ("a", "b"):
        sample.main([*command, str(tmp_path / f"{name}.wav")])
    sample.main([*command, str(tmp_path / "c.wav"), "--seed", "1"])
    sample.main(["--ckpt", str(run), "--text", "Dr. Hall sold 2 books. So.", "--device", "cpu", "--verbose", "--out",
                 str(tmp_path / "d.wav")])
    a, b, c = (soundfile.read(tmp_path / f"{name}.wav") for name in "abc")
    assert a[1] == 22050 and abs(len(a[0]) / 22050 - 3) < 256 / 22050
    assert np.array_equal(a[0], b[0]) and not np.array_equal(a[0], c[0])
    said = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in said[3:6]] == [
        f"{tmp_path / 'd.wav'}: it reads", "'Doctor Hall sold two books.'", "'So.'"]
    assert len(said) == 7 and f"{len(a[0]) / 22050:.2f} s of audio" in said[0] and "real-time factor" in said[0]


def test_a_file_of_sentences(run, tmp_path, capsys):
    """A wav a line, by the numbers of the lines; one that cannot be said stops no other, and the status tells."""
    flags = ["--ckpt", str(run), "--text_file", str(tmp_path / "t.txt"), "--device", "cpu", "--out"]
    (tmp_path / "t.txt").write_text("\ufeffThe baker.\n\nThe driver sold\u2028five books today.\n", encoding="utf-8")
    sample.main([*flags, str(tmp_path / "o")])
    lengths = [soundfile.info(tmp_path / "o" / f"{n:04d}.wav").duration for n in (1, 3)]
    assert lengths[0] < lengths[1] and len(list((tmp_path / "o").iterdir())) == 2
    (tmp_path / "t.txt").write_text("...\nThe baker.\n" + "x" * 999 + "\n")
    capsys.readouterr()
    said = refusal(sample.main, *flags, tmp_path / "p")
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["0002.wav"] and said.endswith("line 1, 3")
    told = capsys.readouterr().err
    for words in ("error: line 1 of", "nothing to say", "error: line 3 of", "999 bytes"):
        assert words in told
    (tmp_path / "t.txt").write_text("...\n...\n")
    assert "nothing to say" in refusal(sample.main, *flags, tmp_path / "q") and not (tmp_path / "q").exists()


@pytest.mark.parametrize("flags, words", [
    (["--ckpt", "nowhere", "--text", "Hello."], "no checkpoint at nowhere"),
    (["--text_file", "nowhere.txt"], "cannot read nowhere.txt"),
    (["--text", "Hello.", "--steps", "0"], "at least 1"),
    (["--text", "Hello.", "--vocoder", "bigvgan"], "bigvgan_v2_22khz_80band_fmax8k_256x"),
], ids=" ".join)
def test_what_cannot_be_sampled(run, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(sample.main, "--ckpt", run, "--device", "cpu", *flags)
    assert not list(tmp_path.rglob("*.wav"))


def test_where_nothing_can_be_written(run, tmp_path):
    """A folder, and a place that refuses even whoever may write anywhere."""
    (tmp_path / "folder.wav").mkdir()
    for out in tmp_path / "folder.wav", "/proc/a.wav":
        assert f"cannot write {out}: " in refusal(
            sample.main, "--ckpt", run, "--text", "Two books.", "--seconds", 0.3, "--out", out, "--device", "cpu")


@pytest.mark.parametrize("name", ["ckpt", "text_file", "out", "prompt_wav", "speaker"])
def test_an_empty_path_is_not_this_folder(name, capsys):
    with pytest.raises(SystemExit) as end:
        sample.main(["--ckpt", "x", f"--{name}", ""])
    assert end.value.code == 2 and f"--{name}" in capsys.readouterr().err


def test_names_that_are_no_utf8_and_links(run, tmp_path):
    """What a link leads to is written, and the link stays."""
    path = tmp_path / os.fsdecode(b"a\xff.wav")
    path.symlink_to("b.wav")
    sample.main(["--ckpt", str(run), "--text", "Two.", "--seconds", "0.3", "--out", str(path), "--device", "cpu"])
    assert path.is_symlink() and soundfile.info(tmp_path / "b.wav").duration > 0.2


@pytest.mark.parametrize("name", ["prompt_wav", "speaker"])
def test_its_own_input_is_not_overwritten(tmp_path, monkeypatch, name):
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 22050)
    (tmp_path / "b.wav").symlink_to("a.wav")
    monkeypatch.chdir(tmp_path)
    for out in ("a.wav", "./a.wav", "b.wav"):
        assert "overwritten" in refusal(sample.main, "--ckpt", "x", f"--{name}", tmp_path / "a.wav", "--out", out)


@pytest.mark.parametrize("flags", [["--seconds", "inf"], ["--cfg_scale", "nan"], ["--seed", "-1"], ["--seed", 2 ** 63]])
def test_numbers_that_cannot_be(run, tmp_path, flags):
    argv = ["--ckpt", run, "--text", "Hello.", "--device", "cpu", "--out", tmp_path / "a.wav"]
    said = refusal(sample.main, *argv, *flags)
    assert f"{flags[0]} {flags[1]} is out of range" in said


def test_no_gpu(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    said = refusal(sample.main, "--ckpt", run, "--text", "Hello.", "--device", "cuda", "--out", tmp_path / "a.wav")
    assert "no GPU" in said


def test_a_checkpoint_of_another_system(run, tmp_path):
    folder = shutil.copytree(find_checkpoint(run), tmp_path / "c")
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("system: flow", "system: xyz"))
    for main in (sample.main, evaluate.main):
        assert "'xyz'" in refusal(main, "--ckpt", folder, *(["--text", "Hello."] if main is sample.main else []))


# ------------------------------------------------------------------------------------------------------------
# Judging

def test_evaluation(run, data, tmp_path, capsys, monkeypatch):
    """The files it promises; its figures are those of the wavs it wrote, and the recordings, through Griffin-Lim and as
    they are, are understood far better than a model that has learnt nothing yet."""
    out = tmp_path / "e"
    monkeypatch.setattr(judges, "load_quality", lambda: lambda wav, rate: 1 + len(wav) / rate)
    evaluate.main(["--ckpt", str(run), "--out", str(out), "--prompts", "overfit", "--steps", "2", "--device", "cpu",
                   "--recogniser", "grammar", "sentences"])
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "wer.jsonl").open()]
    names = {f"{n:03d}{end}" for n in range(4) for end in (".wav", "_reference.wav", ".png")}
    assert {path.name for path in out.iterdir()} == names | {"wer.jsonl", "summary.json", "table.txt"}
    assert [row["text"] for row in rows] == [data.rows[i]["text"] for i in data.clips("all")[:4]]
    _, hear = load_recogniser("grammar", grammar=data.grammar)
    for n, row in enumerate(rows):
        assert row["seconds"] == pytest.approx(soundfile.info(out / f"{n:03d}.wav").duration)
        assert row["mos_recordings"] - 1 == pytest.approx(soundfile.info(data.recording(n)).duration)
        reference, rate = soundfile.read(out / f"{n:03d}_reference.wav", dtype="float32")
        assert (log_mel(reference, MEL) - data.mel(n)).abs().mean() < 0.4
        assert word_error_rate([row["text"]], hear([reference], rate)) <= 0.2
    assert summary["wer"] == word_error_rate([r["text"] for r in rows], [r["heard"] for r in rows])
    assert max(summary["wer_ceiling"], summary["wer_recordings"], summary["wer_2_recordings"]) <= 0.1
    assert min(summary[key] for key in ("wer", "wer_2", "wer_noise", "wer_other_sentence")) > 0.5
    assert summary["wer_interval"][0] <= summary["wer"] <= summary["wer_interval"][1]
    table = (out / "table.txt").read_text()
    assert table in capsys.readouterr().out
    assert re.split("  +", table.splitlines()[0].strip()) == [
        "generated", "recordings through griffinlim", "recordings"]
    cells = next(re.split("  +", line) for line in table.splitlines() if line.startswith("word error rate"))
    assert [float(cell.split("%")[0]) for cell in cells[1:]] == pytest.approx(
        [100 * summary[f"wer{ending}"] for ending in ("", "_ceiling", "_recordings")], abs=0.05)
    assert all(re.fullmatch(r"[\d.]+% \([\d.]+% to [\d.]+%\)", cell) for cell in cells[1:])
    assert f"quality, predicted (DNSMOS)   {summary['mos']:.2f} (" in table
    assert "judge of words: PocketSphinx, the corpus's grammar; the second PocketSphinx, one of 4 sentences" in table


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_tables_of_older_runs(path):
    """What runs found before there were intervals is told as ever."""
    found = json.loads(path.read_text())
    summary, (_, *rows) = found["summary"], tables.cells(found["system"], ["found"], [found["summary"]])
    told = {label: own for label, own, *_ in rows}
    for label, key, form in ("word error rate", "wer", ".1%"), ("validation loss", "val_loss", ".4f"):
        assert told.get(label) == (f"{summary[key]:{form}}" if key in summary else None)


def test_evaluation_of_two_runs(run, tmp_path, capsys):
    """Two files of one name have folders of their own under --out; the speed of training is found, in a cut log too.
    That they have not spoken the same sentences is said, and those that both have are compared: the same model is not
    told apart from itself."""
    files = []
    for name, clips in ("a", 4), ("b", 3):
        shutil.copytree(run, tmp_path / name / "run")
        (tmp_path / name / "run" / "metrics.jsonl").write_text('{"step": 1, "steps_per_second": 2.0}\n{"step": 2, "st')
        files.append(tmp_path / name / "run" / "checkpoints" / "step_00000100" / "ema.safetensors")
        config = files[-1].parent / "config.yaml"
        config.write_text(config.read_text().replace("overfit: 4", f"overfit: {clips}"))
        assert evaluate.training_speed(files[-1]) == 2
    evaluate.main(["--ckpt", *map(str, files), "--out", str(tmp_path / "e"), "--prompts", "overfit", "--steps", "1",
                   "--device", "cpu", "--paired"])
    folders = [tmp_path / "e" / f"{name}_run_checkpoints_step_00000100" for name in "ab"]
    assert sorted((tmp_path / "e").iterdir()) == folders and not (folders[0] / "paired.txt").exists()
    said, paired = capsys.readouterr().out, (folders[1] / "paired.txt").read_text()
    assert "a_run_checkpoints" in said and paired in said and "note: these runs spoke different sentences" in paired
    assert "on the 3 sentences that both spoke" in paired
    assert re.search(r"\nword error rate: .* difference [+-]0.0% .*, not told apart\n", paired)
    assert "named twice" in refusal(evaluate.main, "--ckpt", files[0], files[0].parent, "--device", "cpu")


def test_evaluation_without_recordings_or_judge(run, data_dir, tmp_path, capsys, monkeypatch):
    """Where the recordings are gone, or no recogniser knows the words, that is said, and all else is judged."""
    moved = shutil.copytree(data_dir, tmp_path / "data")
    (moved / "plan.json").write_text(json.dumps({"root": str(tmp_path / "gone")}))
    argv = ["--ckpt", str(run), "--out", str(tmp_path / "e"), "--steps", "1", "--device", "cpu",
            "--data_dir", str(moved)]
    evaluate.main([*argv, "--prompts", "overfit", "--clips", "2"])
    said, summary = capsys.readouterr().out, json.loads((tmp_path / "e" / "summary.json").read_text())
    assert "note: the recordings themselves are not judged" in said and str(tmp_path / "gone") in said
    assert "recordings through griffinlim" in said and "griffinlim  recordings" not in said
    assert summary["prompts"] == 2 and "wer_ceiling" in summary and "wer_recordings" not in summary

    (moved / "grammar.jsgf").unlink()
    (tmp_path / "t.txt").write_text("She wrote to Xqzvk.\n")
    evaluate.main([*argv, "--prompts", str(tmp_path / "t.txt")])
    said, summary = capsys.readouterr().out, json.loads((tmp_path / "e" / "summary.json").read_text())
    assert "note: no recogniser" in said and "error rate" not in said and "judge" not in summary
    assert [json.loads(line)["text"] for line in (tmp_path / "e" / "wer.jsonl").open()] == ["She wrote to Xqzvk."]
    assert soundfile.info(tmp_path / "e" / "000.wav").duration > 0.1


def test_where_no_evaluation_can_be_written(run, tmp_path):
    (tmp_path / "e").touch()
    for out in (tmp_path / "e", "/proc/e"):
        assert f"cannot use {out}: " in refusal(evaluate.main, "--ckpt", run, "--out", out, "--device", "cpu")
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--ckpt", str(run), "--out", ""])
    assert end.value.code == 2


@pytest.mark.parametrize("flags, words", [
    (["--prompts", "nowhere.txt"], "cannot read nowhere.txt"), (["--data_dir", "nowhere"], "no prepared data set"),
    (["--recogniser", "whisper"], "base.en.pt"), (["--steps", "0"], "at least 1"),
    (["--paired"], "compares two runs, and --ckpt names 1"),
], ids=" ".join)
def test_what_cannot_be_evaluated(run, tmp_path, flags, words):
    assert words in refusal(evaluate.main, "--ckpt", run, "--out", tmp_path / "e", "--device", "cpu", *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ckpt", "prompts", "data_dir", "onnx", "out"])
def test_an_empty_flag_is_no_default(run, tmp_path, name, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--ckpt", str(run), "--out", str(tmp_path / "e"), "--device", "cpu", f"--{name}", ""])
    assert end.value.code == 2 and f"--{name}" in capsys.readouterr().err and not (tmp_path / "e").exists()
