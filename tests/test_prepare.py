"""prepare.py: hostile corpora, kills, two processes at once; codecs used again; speaker embeddings. files.py by the
kills: what it writes is there whole or not at all."""

import os
import re
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import OneProcess, finish, launch, refusal
from helpers import Killed, contents, killed_anywhere, make_corpus, sentence_folder, tone

from data import main
from trivox import files, prepare
from trivox.audio import MelConfig, log_mel
from trivox.codecs import load_codec
from trivox.datasets import MelDataset, SentenceDataset, TokenDataset, open_tokens
from trivox.prepare import embed, prepare_mels, tokenize
from trivox.recordings import read_wav, write_wav
from trivox.synthesisers import speak_espeak as speak
from trivox.voices import load_embedder

MEL = MelConfig()
CODEC_MEL = MelConfig(hop_length=512)


# ------------------------------------------------------------------------------------------------------------
# Log-mels

@pytest.mark.parametrize("shard_clips", [256, 3], ids=["one shard", "a shard of bad clips alone"])
def test_what_is_kept_and_what_is_skipped(tmp_path, one_process, monkeypatch, capsys, shard_clips):
    """Each bad clip is skipped for its own reason, which is printed, and the others are as if it were not there."""
    monkeypatch.setattr(prepare, "SHARD_CLIPS", shard_clips)
    good = {"a": tone(0.5), "deep/b": tone(0.7, 200), "c.d": tone(0.3, 800), "short": tone(0.001)}
    bad = {"cut": tone(1), "empty": tone(0), "silent": 0 * tone(1), "long": tone(2.1), "gone": None}
    hostile = {"../x": "leads out", str(tmp_path / "x"): "leads out", "wordy": "258 bytes, more than 256"}
    reasons = {"cut": "cannot read", "empty": "no sample", "silent": "silent", "gone": "no such recording",
               "long": "2.1 s are more than 2.0 s"} | hostile
    write_wav(tmp_path / "x.wav", tone(1), 22050)  # it is there, but it is none of the corpus's business
    lines = [f"{id}|Text of {id}|text of {id}" for id in (*good, *bad, *hostile)]
    lines[-1] = "wordy|" + "é" * 129
    root = make_corpus(tmp_path / "corpus", good | bad | {"wordy": tone(1)}, lines)
    cut = root / "wavs" / "cut.wav"
    cut.write_bytes(cut.read_bytes()[:20000])
    out = tmp_path / "out"
    prepare_mels(root, out, MEL, 2.0)

    said = capsys.readouterr().out
    for id, reason in reasons.items():
        line, = [line for line in said.splitlines() if line.startswith(f"skipped {id}: ")]
        assert reason in line
    dataset = MelDataset(out, MEL)
    assert [row["id"] for row in dataset.rows] == list(good)
    assert [row["text"] for row in dataset.rows] == [f"text of {id.replace('/', ' slash ')}" for id in good]
    mels = [dataset.mel(i) for i in range(len(good))]
    for m, id in zip(mels, good):
        wav, _ = soundfile.read(root / "wavs" / f"{id}.wav", dtype="float32")
        torch.testing.assert_close(m, log_mel(wav, MEL), atol=0.01, rtol=0)  # 16-bit floats
    every, stats = np.concatenate(mels).astype(np.float64), dataset.stats
    assert stats["mel_mean"] == pytest.approx(every.mean(), abs=2e-3)
    assert stats["mel_std"] == pytest.approx(every.std(), abs=2e-3)
    assert (stats["clips"], stats["skipped"], stats["frames"]) == (len(good), len(reasons), len(every))
    assert stats["seconds"] == pytest.approx(len(every) * 256 / 22050)
    assert stats["max_frames"] == max(map(len, mels)) and stats["text_bytes"]["max"] == len("text of deep slash b")


def test_what_is_not_finite_is_left_out_by_name(tmp_path, one_process, monkeypatch, capsys):
    """A recording of NaN, and a log-mel or an embedding that overflows: none gets into a shard or into a codec."""
    root = make_corpus(tmp_path / "corpus", {id: tone(0.5 - n / 10) for n, id in enumerate("abcd")})
    (root / "heldout.txt").write_text("d\n")
    soundfile.write(root / "wavs" / "a.wav", np.array([0, np.nan, 0.1]), 22050, subtype="FLOAT")
    spoil = lambda wav, mel: log_mel(wav, mel) * (torch.inf if len(wav) == 8820 else 1)
    monkeypatch.setattr(prepare, "log_mel", spoil)
    prepare_mels(root, tmp_path / "mels", MEL, 2.0)
    said = capsys.readouterr().out
    assert "skipped a: " in said and "skipped b: its log-mel has numbers that are not finite" in said
    assert [row["id"] for row in MelDataset(tmp_path / "mels", MEL).rows] == ["c", "d"]
    tokenize(root, tmp_path / "tokens", "mel_rvq", mel=MEL, sizes=[4])
    said = capsys.readouterr().out
    assert "without wavs/a.wav: " in said and "without wavs/b.wav: its log-mel" in said and "skipped a: " in said
    embedder = type("", (), {"width": 2, "__call__": lambda self, wav, rate: np.array([len(wav) > 10_000, np.nan])})
    monkeypatch.setattr(prepare, "cached_embedder", lambda name, device: embedder())
    assert "not finite" in refusal(lambda argv: embed(tmp_path / "tokens", "stats"))
    assert not (tmp_path / "tokens" / "speaker_stats.json").exists()


def test_floats_on_a_scale_of_integers(tmp_path, one_process, capsys):
    """The same log-mels as on a scale of 1, which is said; and so the same tokens."""
    clips = {id: tone(0.5, 200 + 100 * n) for n, id in enumerate("abcd")}
    roots = [make_corpus(tmp_path / name, clips) for name in ("plain", "scaled")]
    for id, wav in clips.items():
        for root, scale in zip(roots, (1, 32768)):
            soundfile.write(root / "wavs" / f"{id}.wav", np.rint(wav * 32768) * scale / 32768, 22050, subtype="FLOAT")
    made = []
    for root in roots:
        prepare_mels(root, root / "mels", MEL, 2.0)
        made.append([MelDataset(root / "mels", MEL).mel(n) for n in range(4)])
    assert "note: 4 clips, a for one, hold floats on a scale of ±32,768" in capsys.readouterr().out
    assert torch.equal(torch.cat(made[0]), torch.cat(made[1]))
    tokenize(roots[1], roots[1] / "tokens", "mel_rvq", mel=MEL, sizes=[4])
    assert "note: 4 clips, a for one" in capsys.readouterr().out


def test_characters_that_are_unknown(tmp_path, one_process, capsys):
    """A corpus in other letters, tokenized as if it were English, is told of."""
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.3), "b": tone(0.4)}, ["a|Привет, мир.", "b|Two words."])
    flags = ["tokenize", "--root", str(root), "--out", str(tmp_path / "out"), "--codec", "mel_rvq"]
    flags += ["--codebook_size", "4"]
    main([*flags, "--codebooks", "1"])
    said = capsys.readouterr().out
    assert "note: 40.9% of the characters of these texts are none of Echolancer's" in said
    main([*flags, "--codebooks", "1", "--characters", "auto"])
    assert "none of Echolancer's" not in capsys.readouterr().out
    assert SentenceDataset(tmp_path / "out").text(0) == "привет, мир."
    assert "no language 'xq'" in refusal(main, *flags, "--language", "xq")


def test_another_language(tmp_path, one_process, capsys):
    """Its numbers are words of its own, in log-mels' rows and in tokens' characters; the data set says so, and a run in
    another language does not take it, nor is it mixed with another."""
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.3), "b": tone(0.4)}, ["a|3 Hunde, 1,5 m.", "b|Straße 21"])
    flags = "--root", str(root), "--language", "de", "--out"
    main(["ljspeech", *flags, str(tmp_path / "mels")])
    main(["tokenize", *flags, str(tmp_path / "tokens"), "--codec", "mel_rvq", "--codebooks", "1", "--codebook_size",
          "4"])
    wanted = ["drei Hunde, eins Komma fünf Meter.", "Straße einundzwanzig"]
    assert [row["text"] for row in MelDataset(tmp_path / "mels", MEL, "de").rows] == wanted
    sentences = SentenceDataset(tmp_path / "tokens")
    assert [sentences.text(i) for i in (0, 1)] == [text.lower() for text in wanted]
    assert sentences.codec["characters"] == sentences.alphabet.symbols == "".join(sorted({*"".join(wanted).lower()}))
    made = (tmp_path / "tokens" / "tokens_00000.u16").stat().st_mtime_ns
    main(["tokenize", *flags, str(tmp_path / "tokens"), "--codec", "mel_rvq", "--codebooks", "1", "--codebook_size",
          "4", "--characters", "echolancer"])
    sentences = SentenceDataset(tmp_path / "tokens")
    assert "none of Echolancer's" not in capsys.readouterr().out
    assert [sentences.text(i) for i in (0, 1)] == ["drei hunde, eins komma funf meter.", "strasse einundzwanzig"]
    assert (tmp_path / "tokens" / "tokens_00000.u16").stat().st_mtime_ns == made  # what was encoded stays
    c = SimpleNamespace(codec="mel_rvq", sample_rate=22050, frame_rate=22050 / 256, codebook_size=4, codebooks=1)
    for take in (lambda language: MelDataset(tmp_path / "mels", MEL, language),
                 lambda language: open_tokens(TokenDataset, tmp_path / "tokens", c, language)):
        take("de")
        said = refusal(lambda argv: take("en"))
        assert "'de'" in said and "--language de" in said
    assert "other settings" in refusal(main, "ljspeech", *flags[:2], "--out", tmp_path / "mels")
    assert "there is no language 'xx'" in refusal(main, "ljspeech", "--root", root, "--language", "xx", "--out",
                                                       tmp_path / "x")


def test_any_ending_and_rate(tmp_path, one_process):
    """The same sound as flac in stereo at 44.1 kHz has the same mel."""
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.5), "b": None})
    twice_as_fast = 0.3 * np.sin(np.arange(22050) * 2 * np.pi * 300 / 44100)
    soundfile.write(root / "wavs" / "b.flac", np.stack([twice_as_fast] * 2, 1), 44100)
    prepare_mels(root, tmp_path / "out", MEL, 2.0)
    dataset = MelDataset(tmp_path / "out", MEL)
    a, b = (dataset.mel(i)[8:-8, :20].exp() for i in (0, 1))  # the bands about the tone
    torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("lines, reason", [
    ([], "names no clip"), (["a|x"], "none of the 1 clips"), (None, "no list of clips"),
], ids=["no line", "no recording", "no metadata"])
def test_corpora_without_clips(tmp_path, one_process, lines, reason):
    root = make_corpus(tmp_path / "corpus", {}, lines or [])
    if lines is None:
        (root / "metadata.csv").unlink()
    assert reason in refusal(lambda argv: prepare_mels(root, tmp_path / "out", MEL, 2.0))
    assert not (tmp_path / "out" / "dataset_stats.json").exists()


def test_held_out_clips(tmp_path, one_process):
    """Those that heldout.txt names, in the order of the corpus."""
    root = make_corpus(tmp_path / "corpus", {id: tone(0.1) for id in "abcde"})
    (root / "heldout.txt").write_text("d\nb\n")
    prepare_mels(root, tmp_path / "out", MEL, 2.0)
    dataset = MelDataset(tmp_path / "out", MEL)
    assert [dataset.rows[i]["id"] for i in dataset.clips("val")] == ["b", "d"]
    assert [dataset.rows[i]["id"] for i in dataset.clips("train")] == ["a", "c", "e"]


def test_a_folder_holds_one_data_set(data_dir, corpus, tmp_path, one_process):
    """Another corpus or other settings are refused, and what is there stays as it is."""
    before = contents(data_dir)
    other = make_corpus(tmp_path / "corpus", {"a": tone(0.1)})
    for root, mel in ((other, MEL), (corpus, replace(MEL, n_mels=40))):
        assert str(data_dir) in refusal(lambda argv: prepare_mels(root, data_dir, mel, 11.88))
    said = refusal(lambda argv: MelDataset(data_dir, replace(MEL, fmax=11025.0)))
    assert "fmax=8000.0" in said and "fmax=11025.0" in said
    prepare_mels(corpus, data_dir, MEL, 11.88)
    assert contents(data_dir) == before


def test_what_changed_is_made_anew_alone(tmp_path, one_process, monkeypatch, capsys):
    """A text, a recording, one more clip, one fewer: in shards of two only those that they are in are made, and the
    data set is then the one that is made from nothing, bit for bit. So for tokens, whose codec stays, and whose
    embeddings of those shards go."""
    monkeypatch.setattr(prepare, "SHARD_CLIPS", 2)
    monkeypatch.setattr(prepare, "SHARD_SOURCES", 2)
    root = make_corpus(tmp_path / "corpus", {id: tone(0.3, 200 + 40 * n) for n, id in enumerate("abcdef")})
    mels, tokens_at, made = tmp_path / "mels", tmp_path / "tokens", []
    metadata = root / "metadata.csv"
    prepare_shard, encode = prepare._prepare_shard, prepare.encode_shard
    monkeypatch.setattr(prepare, "_prepare_shard", lambda job: made.append(job[0].name) or prepare_shard(job))
    monkeypatch.setattr(prepare, "encode_shard", lambda job: made.append(job[0].name) or encode(job))
    lines = metadata.read_text().splitlines()
    changes = [
        (lambda: None, "012"), (lambda: None, ""),  # what is done, and the shards that are made
        (lambda: metadata.write_text("\n".join([*lines[:2], "c|Another|Another", *lines[3:]])), "1"),
        (lambda: write_wav(root / "wavs" / "f.wav", tone(0.3, 700), 22050), "2"),
        (lambda: metadata.write_text("\n".join([*lines, "a.wav|again|again"])), "13"),
        (lambda: metadata.write_text("\n".join(lines[:4])), ""), (lambda: (root / "heldout.txt").write_text("b\n"), ""),
    ]
    for change, shards in changes:
        change()
        made.clear()
        prepare_mels(root, mels, MEL, 2.0)
        tokens(root, tokens_at, sizes=[4])
        embed(tokens_at, "stats")
        assert made == [f"{kind}_0000{n}" for kind in ("mels", "tokens") for n in shards]
        prepare_mels(root, tmp_path / "again", MEL, 2.0)
        shutil.copytree(tokens_at, tmp_path / "tokens again", ignore=shutil.ignore_patterns("[ts]*_*", "codec.json"))
        tokens(root, tmp_path / "tokens again", sizes=[4])
        embed(tmp_path / "tokens again", "stats")
        assert contents(mels) == contents(tmp_path / "again")
        assert contents(tokens_at) == contents(tmp_path / "tokens again")
        for folder in "again", "tokens again":
            shutil.rmtree(tmp_path / folder)
    assert [len(dataset.clips("val")) for dataset in (MelDataset(mels, MEL), TokenDataset(tokens_at))] == [1, 1]
    said = capsys.readouterr().out
    assert "1 of 3 shards are made anew" in said and "mel_rvq stays as it was fitted" in said
    (root / "grammar.jsgf").write_text("#JSGF")
    prepare_mels(root, mels, MEL, 2.0)
    assert (mels / "grammar.jsgf").exists()
    (root / "grammar.jsgf").unlink()
    prepare_mels(root, mels, MEL, 2.0)
    assert not (mels / "grammar.jsgf").exists()


def _prepare_small_shards(root, out):
    prepare.SHARD_CLIPS, prepare_clip = 2, prepare.prepare_clip
    prepare.prepare_clip = lambda *args: time.sleep(0.02) or prepare_clip(*args)  # slow enough to be killed
    prepare_mels(root, out, MEL, 11.88)


def test_killed_while_preparing(corpus, tmp_path, one_process, monkeypatch):
    """SIGKILL once some of the shards are there, then again: byte for byte what an uninterrupted run makes."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = launch(_prepare_small_shards, corpus, killed)
    while len(list(killed.glob("*.jsonl"))) < 3 and process.is_alive():
        process.join(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL and not (killed / "dataset_stats.json").exists()
    monkeypatch.setattr(prepare, "SHARD_CLIPS", 2)
    prepare_mels(corpus, killed, MEL, 11.88)
    prepare_mels(corpus, whole, MEL, 11.88)
    assert contents(killed) == contents(whole)


def test_a_worker_that_outlives_its_killed_run(corpus, tmp_path, one_process, monkeypatch):
    """It finishes its shard, in its own process, while the next run is at the same one: both leave it whole."""
    jobs, prepare_shard, prepare_clip, pid = [], prepare._prepare_shard, prepare.prepare_clip, os.getpid()

    def noted(job):
        jobs.append(job)
        return prepare_shard(job)

    def outlived(*args):
        if len(jobs) == 1:
            with monkeypatch.context() as survivor:
                survivor.setattr(os, "getpid", lambda: pid + 1)
                noted(jobs[0])
        return prepare_clip(*args)

    prepare_mels(corpus, tmp_path / "whole", MEL, 11.88)
    monkeypatch.setattr(prepare, "_prepare_shard", noted)
    monkeypatch.setattr(prepare, "prepare_clip", outlived)
    prepare_mels(corpus, tmp_path / "out", MEL, 11.88)
    assert len(jobs) == 2 and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_in_the_middle_of_any_file(tmp_path, one_process, monkeypatch):
    """Plan, indices and statistics: whichever is cut in half, the next run makes it whole."""
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.1), "b": tone(0.2)})
    prepare_mels(root, tmp_path / "whole", MEL, 2.0)
    whole_file = files.whole_file
    for dies_at in range(10):
        left, out = [None] * dies_at, tmp_path / str(dies_at)

        @contextmanager
        def cut(path):
            if left:
                left.pop()
                with whole_file(path) as file:
                    yield file
                return
            with path.with_name(f"{path.name}.1.part").open("wb") as file:
                yield SimpleNamespace(write=lambda content: file.write(content[:len(content) // 2]))
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(files, "whole_file", cut)
            try:
                prepare_mels(root, out, MEL, 2.0)
                break
            except Killed:
                pass
        prepare_mels(root, out, MEL, 2.0)
        assert contents(out) == contents(tmp_path / "whole")
    assert dies_at >= 4


def test_processes_make_what_one_makes(data_dir, corpus, tmp_path, monkeypatch):
    """A shard each, on all cores: the same log-mels as in one process, bit for bit, and the same statistics."""
    monkeypatch.setattr(prepare, "SHARD_CLIPS", 20)
    prepare_mels(corpus, tmp_path / "out", MEL, 11.88)
    found = MelDataset(tmp_path / "out", MEL)
    wanted = MelDataset(data_dir, MEL)
    assert len(found.names) == 2 and found.stats == wanted.stats
    assert all(torch.equal(found.mel(i), wanted.mel(i)) for i in range(40))


# ------------------------------------------------------------------------------------------------------------
# Tokens

def tokens(root, out, **settings):
    tokenize(root, out, "mel_rvq", **dict(mel=CODEC_MEL, sizes=[32, 8]) | settings)
    return TokenDataset(out)


def test_text_corpus(corpus, tmp_path, one_process, monkeypatch):
    """Whole sentences keep their texts and the corpus's held-out clips; the stored codes are the codec's."""
    monkeypatch.setattr(prepare, "SHARD_SOURCES", 16)
    dataset = tokens(corpus, tmp_path)
    rows = (corpus / "metadata.csv").read_text().splitlines()
    assert [f"{r['id']}|{r['text']}|{r['text']}|{r['speaker']}" for r in dataset.rows] == rows
    assert {dataset.rows[i]["id"] for i in dataset.clips("val")} == set((corpus / "heldout.txt").read_text().split())
    assert dataset.grammar and len(dataset.clips("train")) == 34
    codec = load_codec(tmp_path)
    for i in (0, 17, 39):
        wav = read_wav(corpus / dataset.rows[i]["source"], 22050)
        np.testing.assert_array_equal(dataset.codes(i).numpy(), codec.encode([wav])[0])


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Nested folders of recordings of many kinds, two of them broken. Returns (folder, {file: seconds})."""
    root, rng, seconds = tmp_path_factory.mktemp("music"), np.random.default_rng(0), {}
    for n in range(24):
        name = f"{n % 3:03d}/{n:06d}.{('mp3', 'wav', 'flac', 'ogg')[n % 4]}"
        seconds[name] = rng.uniform(0.5, 5)
        (root / name).parent.mkdir(exist_ok=True)
        wav = tone(seconds[name], 200 + 50 * n) + 0.1 * rng.standard_normal(int(seconds[name] * 22050))
        soundfile.write(root / name, wav, 22050)
    (root / "000" / "broken.mp3").write_bytes(rng.bytes(5000))
    (root / "001" / "cut.wav").write_bytes((root / "001" / "000001.wav").read_bytes()[:30])
    (root / "cover.jpg").write_bytes(b"no sound")
    return root, seconds


def test_music(music, tmp_path, one_process, capsys):
    """Cut into chunks that tile each file but for a short rest; no file on both sides; the broken ones listed."""
    root, seconds = music
    dataset = tokens(root, tmp_path, chunk=(1.0, "seconds"))
    said = capsys.readouterr().out
    assert "skipped 000/broken: cannot read" in said and "skipped 001/cut: cannot read" in said and "2 skipped" in said
    size = round(22050 / 512) * 512
    for source in seconds:
        rows = [row for row in dataset.rows if row["source"] == source]
        samples = len(read_wav(root / source, 22050))
        assert [row["start"] for row in rows] == [n * size / 22050 for n in range(len(rows))]
        assert [row["frames"] for row in rows[:-1]] == [size // 512] * (len(rows) - 1)
        rest = samples - sum(row["frames"] for row in rows) * 512
        assert -512 < rest < size / 4 and len({row["split"] for row in rows}) == 1
    assert {row["source"] for row in dataset.rows} == set(seconds)
    sides = [{dataset.rows[i]["source"] for i in dataset.clips(split)} for split in ("train", "val")]
    assert len(sides[1]) == 1 and not sides[0] & sides[1] and not any(row["text"] for row in dataset.rows)


def _small_shards(root, out, rank=0, world=1):
    prepare.parallel, prepare.SHARD_SOURCES = OneProcess, 2
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    tokenize(root, out, "mel_rvq", (20, "frames"), mel=CODEC_MEL, sizes=[32, 8])


def _slow_small_shards(root, out):
    cut_source = prepare.cut_source
    prepare.cut_source = lambda *args: time.sleep(0.1) or cut_source(*args)
    _small_shards(root, out)


def test_killed_and_shared(music, tmp_path, one_process, monkeypatch):
    """SIGKILL half-way and again, or two processes at once: byte for byte what one uninterrupted process makes."""
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))
    second, process = launch(_small_shards, music[0], shared, 1, 2), launch(_slow_small_shards, music[0], killed)
    while len(list(killed.glob("*.jsonl"))) < 3 and process.is_alive():
        process.join(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL and not (killed / "codec.json").exists()
    assert "no token data set" in refusal(lambda argv: TokenDataset(killed))
    for part in killed.glob("*.part"):  # named after the process that was killed
        part.unlink()
    monkeypatch.setattr(prepare, "SHARD_SOURCES", 2)
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(key, "")  # so that they are put back
    for out, world in ((whole, 1), (killed, 1), (shared, 2)):
        _small_shards(music[0], out, 0, world)
    assert finish(second)[0] == 0
    assert contents(killed) == contents(whole) == contents(shared)


def test_what_killed_processes_left_half_goes(music, tmp_path, one_process):
    """Of any file; what else ends in .part stays."""
    for name in "tokens_00000.u16.7.part", "plan.json.8.part", "film.part":
        (tmp_path / name).touch()
    tokens(music[0], tmp_path)
    assert [path.name for path in tmp_path.glob("*.part")] == ["film.part"]


def test_a_folder_holds_one_set_of_tokens(music, tmp_path, one_process):
    tokens(music[0], tmp_path)
    before = contents(tmp_path)
    assert str(tmp_path) in refusal(lambda argv: tokens(music[0], tmp_path, sizes=[16, 8]))
    tokens(music[0], tmp_path)
    assert contents(tmp_path) == before


def test_a_data_set_of_before(demo_tokens, corpus, tmp_path, one_process, monkeypatch):
    """It gets its characters by the same command, and no recording is encoded for it."""
    old = shutil.copytree(demo_tokens, tmp_path / "old")
    for file in [old / "speakers.json", *old.glob("*.u8"), *old.glob("*.idx")]:
        file.unlink()
    assert len(TokenDataset(old).rows) == 40
    assert "tokenize again" in refusal(lambda argv: SentenceDataset(old))
    monkeypatch.setattr(prepare, "SHARD_SOURCES", 16)
    monkeypatch.setattr(prepare, "encode_shard", None)
    tokenize(corpus, old, "mel_rvq", mel=CODEC_MEL, sizes=[64])
    assert contents(old) == contents(demo_tokens)


def test_killed_before_any_file(demo_tokens, tmp_path, one_process, monkeypatch):
    root = make_corpus(tmp_path / "corpus", {"a": tone(0.4), "b": tone(0.5)}, ["a|One 1|One 1|x", "b|Two|Two|y"])
    make = lambda out: tokenize(root, out, str(demo_tokens))
    make(tmp_path / "whole")
    assert killed_anywhere(make, tmp_path, tmp_path / "whole", monkeypatch) >= 7


def test_a_codec_used_again(demo_tokens, tmp_path, one_process):
    """Other recordings with the centroids and mel settings of the first, whatever the flags say."""
    root = make_corpus(tmp_path / "corpus", {"a": speak("Hello there.", "en-us+f2"), "b": speak("Who are you?")})
    out = tmp_path / "out"
    main(["tokenize", "--codec", str(demo_tokens), "--root", str(root), "--out", str(out), "--codebook_size", "9"])
    assert (out / "codec.safetensors").read_bytes() == (demo_tokens / "codec.safetensors").read_bytes()
    dataset = SentenceDataset(out, codec="mel_rvq", frame_rate=22050 / 512, codebook_size=64)
    assert dataset.codec["mel"] == TokenDataset(demo_tokens).codec["mel"] and dataset.speakers == []
    codes, = load_codec(demo_tokens).encode([read_wav(root / "wavs" / "b.wav", 22050)])
    assert dataset.codes(1).tolist() == codes[:, 0].tolist()
    before = contents(out)
    assert str(out) in refusal(lambda argv: tokenize(root, out, "mel_rvq", mel=CODEC_MEL, sizes=[64]))
    assert contents(out) == before
    other = tmp_path / "other"
    other.mkdir()
    assert "--codec neucodec" in refusal(lambda argv: tokenize(root, out, str(sentence_folder(other))))
    assert "mel_rvq) nor a folder" in refusal(main, "tokenize", "--codec", "mimi", "--root", root, "--out", out)


def test_a_codec_of_two_corpora(tmp_path, one_process):
    """However few recordings one has, it weighs as much as the other: in the mean, and by a code of its own."""
    few = make_corpus(tmp_path / "few", {"a": tone(1.0, 2000.0)})
    many = make_corpus(tmp_path / "many", {f"b{n}": tone(1.0, 200.0) for n in range(9)})
    (few / "heldout.txt").write_text("")
    (many / "heldout.txt").write_text("b8\n")
    main(["tokenize", "--codec", "mel_rvq", "--root", str(few), "--fit", str(many), "--out", str(tmp_path / "out"),
          "--codebooks", "1", "--codebook_size", "2"])
    codec = load_codec(tmp_path / "out")
    means = [log_mel(read_wav(path, 22050), codec.mel).mean(0) for path in (few / "wavs/a.wav", many / "wavs/b0.wav")]
    torch.testing.assert_close(codec.mean, (means[0] + means[1]) / 2, atol=1e-4, rtol=0)
    found = sorted(codec.mean + codec.books[0], key=lambda centroid: float((centroid - means[0]).square().sum()))
    apart = (means[0] - means[1]).abs().mean()  # the frames at their ends are each like the other's
    assert (torch.stack(found) - torch.stack(means)).abs().mean() < apart / 5
    assert "as it is" in refusal(main, "tokenize", "--codec", "neucodec", "--root", few, "--fit", many, "--out", few)
    (few / "heldout.txt").write_text("a\n")
    said = refusal(main, "tokenize", "--codec", "mel_rvq", "--root", many, "--fit", few, "--out", tmp_path / "none")
    assert str(few) in said and "held out" in said


# ------------------------------------------------------------------------------------------------------------
# Speaker embeddings

@pytest.fixture(scope="module")
def voices(demo_tokens, tmp_path_factory):
    """A corpus of two voices and nobody's, and its tokens. One clip is too short; of the recordings, one goes silent
    after it is tokenized, and one is overwritten. Returns (corpus, tokens)."""
    root, out = tmp_path_factory.mktemp("voices"), tmp_path_factory.mktemp("tokens")
    lines = {"a1": "en-us", "a2": "en-us", "a3": "en-us", "f1": "en-us+f2", "f2": "en-us+f2", "n1": "", "n2": ""}
    clips = {id: speak(f"My name is {id}, who are you?", voice or "en-gb-x-rp") for id, voice in lines.items()}
    clips["a3"] = clips["a1"][8000:12000]
    make_corpus(root, clips, [f"{id}|Hello|Hello|{voice}" for id, voice in lines.items()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SHARD_SOURCES", 3)
        patch.setattr(prepare, "parallel", OneProcess)
        tokenize(root, out, str(demo_tokens))
    make_corpus(root, {"f2": 0 * clips["f2"]}, [f"{id}|Hello|Hello|{voice}" for id, voice in lines.items()])
    (root / "wavs" / "n2.wav").write_bytes(b"no audio")
    return root, out


def test_embeddings(voices, tmp_path, one_process, capsys):
    """The embedder's own of each recording; where there is none the speaker's mean, or else that of all."""
    root, out = voices[0], shutil.copytree(voices[1], tmp_path / "out")
    dataset = SentenceDataset(out)
    assert f"python data.py embed --data {out} --embedder stats" in refusal(
        lambda argv: dataset.load_embeddings("stats", 101))
    main(["embed", "--data", str(out), "--embedder", "stats"])
    said = capsys.readouterr().out
    for id, reason in (("a3", "0.18 s"), ("f2", "it is silent"), ("n2", "cannot read")):
        assert re.search(f"no embedding of {id}: .*{reason}", said)
    assert "3 of them means" in said
    embedder = load_embedder("stats")
    dataset.load_embeddings("stats", embedder.width)
    found = np.stack([dataset.embedding(i) for i in range(7)])
    assert found.dtype == np.float32 and found.shape == (7, embedder.width)
    own = {id: embedder(read_wav(root / "wavs" / f"{id}.wav", 22050), 22050) for id in ("a1", "a2", "f1", "n1")}
    for i, id in ((0, "a1"), (1, "a2"), (3, "f1"), (5, "n1")):
        np.testing.assert_array_equal(found[i], own[id])
    np.testing.assert_allclose(found[2], (own["a1"] + own["a2"]) / 2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[4], own["f1"], rtol=1e-5)
    np.testing.assert_allclose(found[6], sum(own.values()) / 4, rtol=1e-5, atol=1e-5)
    said = refusal(lambda argv: dataset.load_embeddings("stats", 192))
    assert "192" in said and str(embedder.width) in said
    (out / "speaker_stats_00001.f32").write_bytes(b"1234")
    assert "again" in refusal(lambda argv: dataset.load_embeddings("stats", embedder.width))


def test_embedding_killed(voices, tmp_path, one_process, monkeypatch):
    """Killed before any of its files is in place: nothing is computed twice but that one shard, and nothing differs."""
    heard = []

    class Heard:
        width = 3

        def __call__(self, wav, rate):
            heard.append(len(wav))
            return np.array([len(wav), np.abs(wav).sum(), rate], np.float32)

    monkeypatch.setattr(prepare, "cached_embedder", lambda name, device: Heard())

    def make(out):
        if not out.exists():
            shutil.copytree(voices[1], out)
        embed(out, "stats")

    make(tmp_path / "whole")
    once = len(heard)
    steps = killed_anywhere(make, tmp_path, tmp_path / "whole", monkeypatch)
    assert steps >= 7 and len(heard) <= once * (steps + 2) + 3 * steps
    del heard[:]
    make(tmp_path / "whole")
    assert not heard


def test_embeddings_of_chunks(demo_tokens, tmp_path, one_process):
    """Each chunk of a recording has the embedding of its own part."""
    root = tmp_path / "music"
    make_corpus(root, {"a": speak("The first of them was long ago, and the second was not.")}, []).joinpath(
        "metadata.csv").unlink()
    tokenize(root, tmp_path / "out", str(demo_tokens), chunk=(50, "frames"))
    embed(tmp_path / "out", "stats")
    dataset, wav = SentenceDataset(tmp_path / "out"), read_wav(root / "wavs" / "a.wav", 22050)
    assert len(dataset) > 2 and "no train clips that have both" in refusal(lambda argv: dataset.clips("train"))
    dataset.load_embeddings("stats", load_embedder("stats").width)
    np.testing.assert_array_equal(dataset.embedding(1), load_embedder("stats")(wav[50 * 512:100 * 512], 22050))


def test_what_cannot_be_embedded(demo_tokens, voices, tmp_path, one_process):
    (tmp_path / "emilia").mkdir()
    folder = sentence_folder(tmp_path / "emilia", [([1], "a", "", "train")])
    assert "without recordings" in refusal(main, "embed", "--data", folder, "--embedder", "stats")
    assert "neither a codec" in refusal(main, "embed", "--data", tmp_path, "--embedder", "stats")
    assert "speechbrain" in refusal(main, "embed", "--data", voices[1], "--embedder", "ecapa")
    root = make_corpus(tmp_path / "short", {"a": tone(0.2), "b": tone(0.1)})
    tokenize(root, tmp_path / "tokens", str(demo_tokens))
    said = refusal(main, "embed", "--data", tmp_path / "tokens", "--embedder", "stats")
    assert "2 clips" in said and "0.20 s" in said and not (tmp_path / "tokens" / "speaker_stats.json").exists()
    shutil.rmtree(root)
    for file in (tmp_path / "tokens").glob("speaker_stats*"):
        file.unlink()
    assert f"no longer at {root}" in refusal(main, "embed", "--data", tmp_path / "tokens", "--embedder", "stats")
