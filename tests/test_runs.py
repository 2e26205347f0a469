"""Each kind of run, in seconds, to its very end: training with samples.py and its page, checkpoints.py, evaluation,
sampling, and the page and the table of several. What one kind has and another lacks (texts, references, voices, word
errors) must be missed by none of them."""

import json
import shutil
from threading import Event

import pytest
import soundfile
import torch
from conftest import TINY_CODEC as CODEC, TINY_FLOW as FLOW, TINY_LLM as LLM, refusal
from matplotlib.figure import Figure

import evaluate
import page
import sample
import train_codec_lm
import train_flow_tts
import train_llm_tts
from trivox import common, speak

ALWAYS = dict(batch_size=4, steps=2, warmup_steps=1, eval_every=1, save_every=1, log_every=1, device="cpu",
              dtype="float32", wandb_mode="disabled", overfit=4)
VOICES = dict(packed=False, speaker_width=101, speaker_embedder="stats", sample_every=1, eval_samples=2, eval_seconds=1)
RUNS = {  # name: (trainer, its settings, what the page's first clip has)
    "flow": (train_flow_tts, FLOW | dict(speak_every=1, eval_steps=2, eval_prompts="overfit", eval_prompts_max=2),
             {"heard", "wer", "mel_distance"}),
    "flow, prompts of a file": (train_flow_tts, FLOW | dict(speak_every=1, eval_steps=1, eval_prompts="prompts.txt"),
                                {"heard", "wer"}),
    "flow, frozen ByT5": (train_flow_tts, FLOW | dict(
        text_encoder="byt5", byt5_width=16, text_layers=0, speak_every=2, eval_steps=1, eval_prompts="overfit",
        eval_prompts_max=1), {"heard", "wer", "mel_distance"}),
    "codec, no text": (train_codec_lm, CODEC | dict(sample_every=1, eval_samples=2, eval_seconds=1,
                                                    eval_prompt_seconds=0.5), {"text"}),
    "codec, no text and no prompt": (train_codec_lm, CODEC | dict(sample_every=2, eval_samples=1, eval_seconds=1,
                                                                  eval_prompt_seconds=0), {"text"}),
    "codec, text": (train_codec_lm, CODEC | dict(context=256, cross_every=1, sample_every=1, eval_samples=2,
                                                 eval_seconds=1), {"heard", "wer", "mel_distance"}),
    "codec, text of a file": (train_codec_lm, CODEC | dict(
        context=256, cross_every=1, sample_every=2, eval_samples=1, eval_seconds=1, eval_prompts="prompts.txt"),
        {"heard", "wer"}),
    "llm, packed": (train_llm_tts, LLM | dict(sample_every=1, eval_samples=2, eval_seconds=1),
                    {"heard", "wer", "mel_distance"}),
    "llm, padded": (train_llm_tts, LLM | dict(packed=False, sample_every=2, eval_samples=1, eval_seconds=1),
                    {"heard", "wer", "mel_distance"}),
    "llm, voices": (train_llm_tts, LLM | VOICES, {"heard", "wer", "mel_distance"}),
    "llm, adapter": (train_llm_tts, LLM | dict(lora_rank=2, init_from="llm, padded", sample_every=2, eval_samples=1,
                                               eval_seconds=1), {"heard", "wer", "mel_distance"}),
}


@pytest.fixture(scope="module", autouse=True)
def coarse_pictures():
    """Of few dots and without a layout, in a third of the time: nobody looks at them here."""
    savefig = Figure.savefig

    def draw(fig, path, **settings):
        fig.set_layout_engine("none")
        savefig(fig, path, **settings | {"dpi": 20})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", draw)
        yield


@pytest.fixture(scope="module")
def trained(data_dir, codec_tokens, llm_tokens, tmp_path_factory):
    """The folder in which each of RUNS has been trained, by its name."""
    from transformers import T5Config, T5EncoderModel

    home = tmp_path_factory.mktemp("runs")
    (home / "prompts.txt").write_text("Two books.\nNine golden apples.\n")
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                            feed_forward_proj="gated-gelu")).save_pretrained(home / "byt5")
    shutil.copytree(data_dir, home / "data")  # the states of texts are kept in it
    places = {train_flow_tts: home / "data", train_codec_lm: codec_tokens, train_llm_tts: llm_tokens}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "catch_signals", Event)
        patch.chdir(home)
        for name, (trainer, settings, _) in RUNS.items():
            settings = ALWAYS | settings | dict(data_dir=places[trainer], out_dir=home / name)
            trainer.main([f"--{key}={value}" for key, value in settings.items()])
    return home


@pytest.mark.parametrize("name", RUNS)
def test_page(trained, name):
    """It has a player for each prompt at each step, and says of each clip what is known of it."""
    html = (trained / name / "index.html").read_text()
    folders = sorted((trained / name / "samples").glob("step_*"))
    assert folders and all(html.count(f"samples/{folder.name}/") == 2 * len(list(folder.glob("*.wav")))
                           for folder in folders)
    clips = [json.loads(line) for line in (folders[-1] / "clips.jsonl").open()]
    assert RUNS[name][2] <= clips[0].keys() and ("WER" in html) == ("wer" in clips[0])


@pytest.fixture
def testset(corpus, tmp_path):
    """A list as Seed-TTS's, of four sentences of the corpus, the first of which no model here can say."""
    rows = [line.split("|") for line in (corpus / "metadata.csv").read_text().splitlines()[:5]]
    (tmp_path / "t" / "wavs").mkdir(parents=True)
    (tmp_path / "t" / "prompt-wavs").mkdir()
    lines = []
    for (id, text, *_), (other, *_) in zip(rows, rows[1:]):
        shutil.copy(corpus / "wavs" / f"{id}.wav", tmp_path / "t" / "wavs")
        shutil.copy(corpus / "wavs" / f"{other}.wav", tmp_path / "t" / "prompt-wavs")
        lines.append(f"{id}||prompt-wavs/{other}.wav|{text if lines else '...'}\n")
    (tmp_path / "t" / "meta.lst").write_text("".join(lines))
    return tmp_path / "t"


@pytest.mark.parametrize("name", ["flow", "codec, text", "llm, padded", "llm, voices"])
def test_evaluation_on_a_test_list(trained, testset, tmp_path, monkeypatch, capsys, name):
    """Its sentences are spoken, with its voices where there are any, and judged beside its recordings; the one that
    cannot be spoken is named."""
    monkeypatch.chdir(trained)
    heard = []
    monkeypatch.setattr(speak, "read_voice", lambda path, *args: heard.append(path) or torch.zeros(101))
    flags = ["--steps", "1"] if name == "flow" else []
    evaluate.main(["--ckpt", name, "--out", str(tmp_path / "e"), "--device", "cpu", "--testset", "seedtts",
                   "--testset_dir", str(testset), "--recogniser", "sentences", *flags])
    lines = [line.split("|") for line in (testset / "meta.lst").read_text().splitlines()]
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "e" / "wer.jsonl").open()]
    assert [row["text"] for row in rows] == [text for *_, text in lines[1:]] and summary["testset"] == "seedtts"
    assert summary["wer_recordings"] < 0.1 < summary["wer"]
    assert {*heard} == ({testset / prompt for _, _, prompt, _ in lines[1:]} if "voices" in name else set())
    said = capsys.readouterr().out
    assert f"1 of 4 clips of seedtts have no text that can be spoken, and are left out: {lines[0][0]}\n" in said
    assert "the test list seedtts" in said and "word error rate" in said
    assert len(soundfile.read(tmp_path / "e" / "002_reference.wav")[0]) > 1000


@pytest.mark.parametrize("name, flags, words", [
    ("flow", ["--testset", "seedtts"], "--testset and --testset_dir go together"),
    ("flow", ["--testset", "seedtts", "--testset_dir", "nowhere"], "meta.lst is missing"),
    ("flow", ["--testset", "seedtts", "--testset_dir", ".", "--prompts", "heldout"], "no --prompts"),
    ("codec, text", ["--testset", "seedtts", "--testset_dir", ".", "--embedding", "logmel"], "no --embedding"),
    ("codec, no text", ["--testset", "seedtts", "--testset_dir", "."], "without text says nothing"),
], ids=str)
def test_refused_test_lists(trained, tmp_path, monkeypatch, name, flags, words):
    monkeypatch.chdir(trained)
    assert words in refusal(evaluate.main, "--ckpt", name, "--device", "cpu", "--out", tmp_path / "e", *flags)


@pytest.mark.parametrize("name", RUNS)
def test_evaluation_and_sample(trained, name, tmp_path, monkeypatch, llm_tokens):
    """evaluate.py judges the run, and sample.py makes something to hear of it."""
    monkeypatch.chdir(trained)
    settings = RUNS[name][1]
    few = ["--prompts", "prompts.txt"] if "prompts" in name else [] if "flow" in name else ["--clips", "4"]
    evaluate.main(["--ckpt", name, "--out", str(tmp_path / "e"), "--device", "cpu", "--recogniser", "auto", *few])
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert ("wer" in summary) == ("wer" in RUNS[name][2]) and (tmp_path / "e" / "table.txt").read_text()
    assert ({"kad", "kad_halves", "kad_noise"} <= summary.keys()) == ("codec" in name)
    argv = ["--ckpt", name, "--out", str(tmp_path / "a.wav"), "--device", "cpu"]
    if "no text" in name:
        argv += ["--seconds", "1"]
    else:
        argv += ["--text", "Two books.", "--seconds", "1"]
    if "speaker_width" in settings:
        argv += ["--speaker", str(next((llm_tokens.parent).rglob("demo-00000.wav")))]
    sample.main(argv)
    assert soundfile.info(tmp_path / "a.wav").frames > 0


def test_side_by_side(trained, tmp_path, monkeypatch):
    """The page of all of them, whatever each lacks, and a table for those of a system."""
    monkeypatch.chdir(trained)
    page.main([*RUNS, "--out", str(tmp_path / "all")])
    html = (tmp_path / "all" / "index.html").read_text()
    assert all(name in html for name in RUNS)
    evaluate.main(["--ckpt", "codec, no text", "codec, text", "--out", str(tmp_path / "e"), "--device", "cpu",
                   "--clips", "4"])
    assert (tmp_path / "e" / "codec, text" / "table.txt").exists()
