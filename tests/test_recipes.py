"""recipes.py: each published config says how its data are made; own data are only looked for; bad recipes are told of
before anything is made."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT, refusal

import data
from trivox.recipes import load_settings, make_data, read_recipe

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPE = """
data_recipe:
  download:
  - some weights (1 GB, MIT)
  commands:
  - demo --out data/demo
  - tokenize --codec mel_rvq --root "data/demo/corpus" --out data/demo_llm
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(text of a config, …) is `data.py for` it in an empty folder. Commands only write what they write last;
    `make.done` are those that were run."""
    monkeypatch.chdir(tmp_path)

    def parse(argv):
        args = data.parse(argv)

        def pretend(args):
            make.done.append(args.command)
            touch(args.result(args))

        args.make = pretend
        return args

    def make(text, *args):
        Path("my.yaml").write_bytes(text.encode())
        make_data("my.yaml", parse, *args)

    make.done = []
    return make


def touch(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published(path, monkeypatch):
    """The commands are those of data.py, read what is there by then, and make data as the config wants them."""
    monkeypatch.chdir(ROOT)
    c = load_settings(path)
    recipe, commands = read_recipe(path, c, data.parse)
    assert commands[-1][2].parent == Path(c.data_dir)
    there = [Path(place) for place in recipe.by_hand]
    for text, args, result in commands:
        flags = {"codec": "mel_rvq", "fit": []} | vars(args)
        codec, reads = flags["codec"], [flags.get(key) for key in ("root", "data", "transcripts")] + flags["fit"]
        reads += [Path(codec)] * ("/" in codec)
        assert all(any(file.is_relative_to(place) for place in there) for file in reads if file), text
        there.append(result.parent)
        if result.parent == Path(c.data_dir) and args.command in ("tokenize", "demo_music"):
            assert codec == c.codec or Path(codec) in there
            if codec == "mel_rvq":
                assert args.codebook_size == [c.codebook_size] * getattr(c, "codebooks", 1)
                assert (args.sample_rate, args.sample_rate / args.hop_length) == (c.sample_rate, c.frame_rate)
    if getattr(c, "speaker_width", 0):
        assert commands[-1][2].name == f"speaker_{c.speaker_embedder}.json"
    fetching = [args for _, args, _ in commands if args.command in ("ljspeech", "download", "emilia")]
    assert recipe.download or all(vars(args).get("root") for args in fetching)


def test_what_is_there_is_not_made_again(make, capsys):
    """Said before it begins; what is left is made, and then nothing, even where the corpus was deleted."""
    config = "system: llm" + RECIPE
    make(config)
    said = capsys.readouterr().out
    assert make.done == ["demo", "tokenize"] and said.index("some weights (1 GB") < said.index("data.py demo --out")
    Path("data/demo_llm/codec.json").unlink()
    make(config)
    assert make.done == ["demo", "tokenize", "tokenize"]
    Path("data/demo/dataset_stats.json").unlink()
    capsys.readouterr()
    make(config)
    said = capsys.readouterr().out
    assert len(make.done) == 3 and said.count("\n") == 1 and "is there" in said and "GB" not in said
    make(config, "./data/../data/demo_llm/")  # the same folder
    assert len(make.done) == 3


def test_embeddings_of_other_tokens(make):
    """Where a command's result is there, but not what it was made of, both are told apart."""
    config = "system: llm" + RECIPE + "  - embed --data data/demo_llm --embedder stats\n"
    touch("data/demo_llm/speaker_stats.json")
    make(config)
    assert make.done == ["demo", "tokenize"]


@pytest.mark.parametrize("system, mark, words", [
    ("flow", "dataset_stats.json", "ljspeech --root DIR --out 'data/my own'"),
    ("codec", "codec.json", "tokenize --codec encodec_24khz --root DIR --out 'data/my own'"),
    ("llm", "codec.json", "tokenize --codec neucodec --root DIR --out 'data/my own'")])
def test_own_data(make, system, mark, words):
    """Nothing is made or downloaded for them, with a recipe or without."""
    recipe = RECIPE.replace("data/demo_llm", "data/demo_tokens") if system == "codec" else RECIPE
    recipe = recipe[:recipe.index("  - tokenize")] if system == "flow" else recipe
    for text, args in ((f"system: {system}{recipe}", ["data/my own"]),
                       (f"system: {system}\ndata_dir: 'data/my own'  # mine", [])):
        touch("data/my own/other")
        assert words in refusal(lambda argv: make(text, *argv), *args)
        touch(f"data/my own/{mark}")
        make(text, *args)
        Path(f"data/my own/{mark}").unlink()
    assert not make.done


def test_by_hand(make):
    config = "system: llm" + RECIPE + "  by_hand: {data/corpus: 'FMA (93 GiB)', data/other: 'Other'}\n"
    touch("data/other/a.wav")
    said = refusal(lambda argv: make(config))
    assert "data/corpus: FMA (93 GiB)" in said and "data/other" not in said and not make.done
    touch("data/corpus/a.wav")
    make(config)
    assert len(make.done) == 2


@pytest.mark.parametrize("text", [
    "system: llm{}", "system: 'llm' # or \"codec\"\nout_dir:  \"runs/a #1\"   # its place\n{}", "\ufeffsystem: llm{}",
    "# data_dir: data/other\nsystem: llm\ndata_dir: 'data/demo_llm'   # there{}", "{}\nsystem: llm"], ids=range(5))
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_however_it_is_written(make, text, newline):
    make(text.format(RECIPE).replace("\n", newline))
    assert make.done == ["demo", "tokenize"]


@pytest.mark.parametrize("recipe, words", [
    ("[demo]", ["data_recipe", "dictionary"]), ("", ["data_recipe", "None"]),
    ("{comands: [demo]}", ["'comands'", "'commands'"]), ("{commands: demo}", ["commands", "list", "'demo'"]),
    ("{commands: [3]}", ["commands.0", "string"]), ("{download: {a: b}, commands: [demo]}", ["download", "list"]),
    ("{by_hand: [data], commands: [demo]}", ["by_hand", "dictionary"]),
    ("{commands: [demo, tokenise --out data/demo_llm]}", ["tokenise", "'tokenize'"]),
    ("{commands: [demo, emilia --outt data/demo_llm]}", ["--outt"]),
    ("{commands: [demo --sentences many]}", ["--sentences", "'many'"]),
    ("{commands: [demo, 'demo_music --out data/demo_llm --codebook_size 3,x']}", ["--codebook_size 3,x"]),
    ("{commands: [demo, \"emilia --out 'data\"]}", ["quotation"]), ("{commands: [demo --help]}", ["--help"]),
    ("{commands: [for my.yaml]}", ["'for my.yaml'"]), ("{commands: ['']}", ["command"]),
    ("{commands: [demo; rm -rf /]}", ["'demo;'"]),
    ("{commands: [demo]}", ["data/demo_llm", "data_dir"]), ("{download: []}", ["data/demo_llm"]),
    ("{commands: [emilia]}", ["data/demo_llm"]), ("{commands: [demo --out data/demo_llm]}", ["codec.json"]),
])
def test_bad_recipes(make, recipe, words):
    """Before anything is made, and even where the data are there."""
    for _ in range(2):
        said = refusal(lambda argv: make(f"system: llm\ndata_recipe: {recipe}\n"))
        assert all(word in said for word in [*words, "my.yaml"]), said
        touch("data/demo_llm/codec.json")
    assert not make.done


@pytest.mark.parametrize("text, system, words", [
    ("steps: 3", None, "system: flow"), ("system: lm", None, "'lm'"), ("system: [llm]", None, "['llm']"),
    ("system: llm", "codec", "'codec'"), ("system: llm\nstps: 3", None, "'steps'"), ("steps: x", "llm", "'x'")])
def test_bad_configs(make, text, system, words):
    assert words in refusal(lambda argv: make(text, None, system))


def test_a_download_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Ctrl-C while it is unpacked leaves nothing that looks like a corpus."""
    import pooch

    touch(tmp_path / "LJSpeech-1.1" / "metadata.csv")
    archive = shutil.make_archive(tmp_path / "a", "tar", tmp_path, "LJSpeech-1.1")
    monkeypatch.setattr(pooch, "retrieve", lambda *args, **settings: archive)
    unpack, command = shutil.unpack_archive, ["download", "--out", str(tmp_path / "data")]

    def stopped(archive, folder, **how):
        unpack(archive, folder, **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "unpack_archive", stopped)
        data.main(command)
    assert not (tmp_path / "data" / "LJSpeech-1.1").exists()
    data.main(command)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["LJSpeech-1.1"]


def test_the_commands_themselves(tmp_path, monkeypatch, one_process, capsys):
    """Spoken, fitted, encoded and heard, in one process; what one command leaves the next one finds."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("""
system: llm
data_dir: data/tokens
data_recipe:
  commands:
  - demo --out data/demo --sentences 6 --heldout 2
  - tokenize --codec mel_rvq --root data/demo/corpus --out data/tokens --codebooks 1 --codebook_size 8
  - embed --data data/tokens --embedder stats
""")
    data.main(["for", "c.yaml"])
    assert Path("data/tokens/speaker_stats.json").exists()
    capsys.readouterr()
    data.main(["for", "c.yaml", "--data_dir", "data/tokens"])
    assert capsys.readouterr().out == "data/tokens: all that c.yaml needs is there\n"
