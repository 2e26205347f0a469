"""text.py: lines, bytes beside ByT5's tokenizer, states beside the encoder's class; weights.py by the encoder's
files."""

import os
import shutil
from copy import deepcopy

import pytest
import torch
from conftest import refusal

from trivox.text import TextFeatures, read_lines, text_ids

# ------------------------------------------------------------------------------------------------------------

# ------------------------------------------------------------------------------------------------------------
# Lines

@pytest.mark.parametrize("content, lines", [
    ("a\nb\r\nc\rd\n", ["a", "b", "c\rd"]), ("a\rb", ["a", "b"]), ("\ufeffa\n\n \nb", ["a", "b"]), (" a \n", ["a"]),
    ("a\u2028b\x85c\x0cd\x0be\x1cf\u2029g", ["a\u2028b\x85c\x0cd\x0be\x1cf\u2029g"]),
], ids=["ends", "old Macs'", "BOM", "blanks", "separators"])
def test_lines(tmp_path, content, lines):
    """A line ends at \\n or \\r\\n, without these at \\r, and not where Unicode would end one."""
    (tmp_path / "t.txt").write_bytes(content.encode())
    assert read_lines(tmp_path / "t.txt", 40) == lines


@pytest.mark.parametrize("content, words", [
    (b"a\n\xff\n", "line 2 of"), (b"a\r\n\r\n" + b"x" * 41, "line 3 of"),
    (b"\xef\xbb\xbf \n", "no line of text"), ("a".encode("utf-16"), "UTF-16"), (None, "cannot read"),
], ids=["not UTF-8", "too long", "blank", "UTF-16", "missing"])
def test_lines_that_cannot_be_read(tmp_path, content, words):
    """Are named by their file and number."""
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    said = refusal(lambda argv: read_lines(tmp_path / "t.txt", 40))
    assert words in said and "t.txt" in said


# ------------------------------------------------------------------------------------------------------------
# Bytes and states

@pytest.mark.parametrize("text", ["", "The ferry was late.", "naïve café — 数 🙂", "tab\tand\nline\x00"])
def test_text_ids_are_byt5s(text):
    from transformers import ByT5Tokenizer

    assert text_ids(text) == ByT5Tokenizer()(text).input_ids


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """T5's encoder, small and with random weights, in the hub's layout. Yields it and the folder it is in."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                    feed_forward_proj="gated-gelu")).eval()
    folder = tmp_path_factory.mktemp("hub") / "tiny-byt5"
    model.save_pretrained(folder)
    return model, str(folder)


TEXTS = ["", "a", "The ferry was late again.", "Schöne Grüße", "x" * 90]


@pytest.mark.parametrize("mode", ["on", "auto", "off"])
def test_encoder_states(encoder, tmp_path, monkeypatch, mode):
    """Cached or not, in a batch or alone, each text's states are those of the encoder that sees this text only."""
    model, folder = encoder
    features = TextFeatures(folder)
    features.fill_cache(tmp_path, TEXTS[1:], mode, write=True, width=32)
    assert bool(list(tmp_path.glob("text_*.f16"))) == (mode != "off")
    reopened = TextFeatures(folder)
    reopened.fill_cache(tmp_path, TEXTS[1:], mode, write=False, width=32)
    if mode != "off":  # the cache is there: no encoder is needed any more
        monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", None)
    for source in (features, reopened):
        states, length = source(TEXTS, multiple=16)
        assert states.dtype == torch.float32 and states.shape == (5, 96, 32)
        for text, row, n in zip(TEXTS, states, length.tolist()):
            with torch.inference_mode():
                alone = model(torch.tensor([text_ids(text)])).last_hidden_state[0]
            torch.testing.assert_close(row[:n], alone, atol=2e-3, rtol=2e-3)
            assert n == len(text_ids(text)) and not row[n:].any()


def test_encoder_states_of_a_text_that_is_not_cached(encoder, tmp_path):
    features = TextFeatures(encoder[1])
    features.fill_cache(tmp_path, ["a"], "on", True, 32)
    known, new = features(["a"])[0], features(["a", "new"])[0]
    torch.testing.assert_close(known[0], new[0, :2], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("value", [float("nan"), 1e6], ids=["nan", "beyond float16"])
def test_states_that_are_not_finite(encoder, tmp_path, monkeypatch, value):
    """Are refused by the name of their text, and leave no file."""
    encode = TextFeatures.encode
    monkeypatch.setattr(TextFeatures, "encode", lambda self, texts: [
        states + (value if text == "bad" else 0) for text, states in zip(texts, encode(self, texts))])
    said = refusal(lambda argv: TextFeatures(encoder[1]).fill_cache(tmp_path, ["good", "bad", "so"], "on", True, 32))
    assert "'bad'" in said and not list(tmp_path.iterdir())


def kept(encoder, folder, write=True):
    """(The cache's path, the states of TEXTS as they come out of it)."""
    features = TextFeatures(encoder)
    features.fill_cache(folder, TEXTS, "on", write, 32)
    return max(folder.glob("text_*.f16"), key=lambda path: path.stat().st_mtime_ns), features(TEXTS)[0]


@pytest.mark.parametrize("left", [-100, 0.5, 0], ids=["less 100 bytes", "half", "nothing"])
def test_states_that_were_cut_are_made_anew(encoder, tmp_path, capsys, left):
    path, whole = kept(encoder[1], tmp_path)
    size = path.stat().st_size
    os.truncate(path, size + left if left < 0 else int(size * left))
    again, states = kept(encoder[1], tmp_path)
    assert again == path and path.stat().st_size == size and torch.equal(states, whole)
    assert f"{path} has " in capsys.readouterr().out


def test_states_of_another_encoder_of_that_name(encoder, tmp_path):
    """Saved into the same folder, it is what speaks from then on; and one of another width is refused."""
    folder = tmp_path / "byt5"
    shutil.copytree(encoder[1], folder)
    assert torch.equal(kept(str(folder), tmp_path)[1], kept(str(folder), tmp_path)[1])
    other = deepcopy(encoder[0])
    with torch.no_grad():
        other.shared.weight.mul_(-1)
    other.save_pretrained(folder)
    _, states = kept(str(folder), tmp_path)
    with torch.inference_mode():
        alone = other(torch.tensor([text_ids(TEXTS[2])])).last_hidden_state[0]
    torch.testing.assert_close(states[2, :len(alone)], alone, atol=2e-3, rtol=2e-3)
    said = refusal(lambda argv: TextFeatures(str(folder)).fill_cache(tmp_path, ["new"], "on", True, 16))
    assert "32 wide" in said and "--byt5_width 32" in said


def test_a_disk_that_is_full_of_states(encoder, tmp_path):
    """One sentence, and no part of the file is left. (The part leads to /dev/full, where nothing can be written.)"""
    path, _ = kept(encoder[1], tmp_path)
    path.unlink()
    part = tmp_path / f"{path.name}.{os.getpid()}.part"
    part.symlink_to("/dev/full")
    assert "the disk is full" in refusal(lambda argv: kept(encoder[1], tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["missing", "config.json", "model.safetensors"])
def test_no_encoder(encoder, tmp_path, monkeypatch, damage):
    """What to get, from where, and where to put it."""
    monkeypatch.chdir(tmp_path)
    name = "google/byt5-small"
    if damage != "missing":
        name = str(shutil.copytree(encoder[1], tmp_path / "byt5"))
        (tmp_path / "byt5" / damage).write_bytes(b"{")
    said = refusal(lambda argv: TextFeatures(name)(["hello"]))
    assert name in said and "config.json" in said and "weights" in said


def test_encoder_put_there_by_hand(encoder, tmp_path, monkeypatch):
    """A folder of that name among the weights, where BigVGAN's are looked for too."""
    monkeypatch.setenv("TRIVOX_WEIGHTS", str(tmp_path))
    shutil.copytree(encoder[1], tmp_path / "byt5-small")
    assert TextFeatures("google/byt5-small")(["hello"])[0].shape == (1, 6, 32)


def test_a_voice_of_another_language_is_told(capsys):
    for told, pairs in ((False, "en-us en, cmn zh, de de, nb no, en-us+f2 en"), (True, "en-us de, en-gb fr, de en")):
        for voice, language in map(str.split, pairs.split(",")):
            TextFeatures("bytes", phonemes=voice).tell_language(language)
            assert ("read in the phonemes" in capsys.readouterr().out) == told
    TextFeatures("bytes").tell_language("de")
    assert not capsys.readouterr().out
