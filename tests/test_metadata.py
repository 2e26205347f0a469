"""metadata.py: what people's lists of clips look like, and what cannot be told of them."""

import csv
import io
import json

import pytest
from conftest import refusal

from trivox.metadata import read_columns, read_list, read_transcripts

TEXTS = ["The cat sat on the mat.", "Dr. Bell came, at last!", "Was it late?", "Two of 3 boats sank; one did not.",
         "Nobody knew.", "It rained for a week.", "She said so.", "A long way home, and no road."]
NORMALIZED = [text.replace("Dr.", "doctor").replace("3", "three") for text in TEXTS]
SPEAKERS = ["bob", "ann", "bob", "bob", "ann", "ann", "bob", "ann"]
IDS = [f"c{n}" for n in range(8)]
CLIPS = [*zip(IDS, NORMALIZED, SPEAKERS)]


def table(*columns, delimiter="|", header="", quote=csv.QUOTE_NONE):
    """A file with these columns, by Python's own writer where something is quoted."""
    if quote == csv.QUOTE_NONE:
        lines = [delimiter.join(map(str, cells)) for cells in zip(*columns)]
    else:
        writer = csv.writer(out := io.StringIO(), delimiter=delimiter, quoting=quote, lineterminator="\n")
        writer.writerows(zip(*columns))
        lines = out.getvalue().splitlines()
    return "\n".join([header] * bool(header) + lines) + "\n"


def objects(**columns):
    return "".join(json.dumps(dict(zip(columns, cells))) + "\n" for cells in zip(*columns.values()))


def understood(path, columns=None):
    clips, _ = read_list(path, columns, lambda name: name.rpartition("/")[2].removesuffix(".wav") in IDS)
    return [(clip["id"].rpartition("/")[2].removesuffix(".wav"), clip["text"], clip["speaker"]) for clip in clips]


FILES = [f"wavs/{id}.wav" for id in IDS]
NUMBERS = ["1" if name == "ann" else "0" for name in SPEAKERS]
LAYOUTS = {
    "id|text": (table(IDS, NORMALIZED), "t"), "id|text|normalized": (table(IDS, TEXTS, NORMALIZED), "t"),
    "id|text|speaker": (table(IDS, NORMALIZED, SPEAKERS), "ts"),
    "id|speaker|text": (table(IDS, SPEAKERS, NORMALIZED), "ts"),
    "id|text|normalized|speaker": (table(IDS, TEXTS, NORMALIZED, SPEAKERS), "ts"),
    "speaker|id|text|normalized": (table(SPEAKERS, IDS, TEXTS, NORMALIZED), "ts"),
    "text|id": (table(NORMALIZED, IDS), "t"), "VITS": (table(FILES, NUMBERS, NORMALIZED), "tn"),
    "Tacotron": (table(FILES, NORMALIZED), "t"), "tabs": (table(FILES, SPEAKERS, NORMALIZED, delimiter="\t"), "ts"),
    "an empty column": (table(IDS, NORMALIZED, [""] * 8), "t"),
    "Common Voice": (table(SPEAKERS, FILES, NORMALIZED, NUMBERS, delimiter="\t",
                           header="client_id\tpath\tsentence\tup_votes"), "ts"),
    "header": (table(IDS, SPEAKERS, TEXTS, NORMALIZED, header="ID|Speaker|Text|Normalized Text"), "ts"),
    "CSV": (table(FILES, NORMALIZED, delimiter=",", header="file_name,transcription", quote=csv.QUOTE_MINIMAL), "t"),
    "CSV without header": (table(FILES, SPEAKERS, NORMALIZED, delimiter=",", quote=csv.QUOTE_ALL), "ts"),
    "semicolons": (table(IDS, [text.replace(";", ",") for text in NORMALIZED], delimiter=";"), "t;"),
    "quoted bars": (table(IDS, [f'{text} | "yes"' for text in NORMALIZED], SPEAKERS, quote=csv.QUOTE_MINIMAL), "ts|"),
    "JSON": (objects(audio_filepath=FILES, duration=[1.5] * 8, text=NORMALIZED, speaker=SPEAKERS), "ts"),
    "JSON, one array": (json.dumps([dict(file=f, text=t) for f, t in zip(FILES, NORMALIZED)], indent=1) + "\n", "t"),
    "JSON, a text for each": (json.dumps(dict(zip(FILES, NORMALIZED)), indent=1) + "\n", "t"),
    "Kaldi": (table(IDS, NORMALIZED, delimiter=" "), "t"),
    "Festival": ("".join(f'( {id} "{text}" )\n' for id, text in zip(IDS, NORMALIZED)), "t"),
    "JSON of datasets": (objects(audio=[{"path": f} for f in FILES], sentence=NORMALIZED, speaker_id=[0, 1] * 4), "t0"),
}


@pytest.mark.parametrize("content, what", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\ufeff"])
def test_layouts(tmp_path, content, what, ends):
    """Whatever the order and the marks, the same clips; with a BOM and with Windows' ends of lines too."""
    path = tmp_path / ("list.jsonl" if content[0] in "[{" else "metadata.csv")
    path.write_bytes((ends if ends == "\ufeff" else "").encode() + content.replace(
        "\n", ends if ends != "\ufeff" else "\n").encode())
    texts = [text.replace(";", ",") if ";" in what else f'{text} | "yes"' if "|" in what else text
             for text in NORMALIZED]
    speakers = SPEAKERS if "s" in what else NUMBERS if "n" in what else ["0", "1"] * 4 if "0" in what else [""] * 8
    assert understood(path) == [*zip(IDS, texts, speakers)]


@pytest.mark.parametrize("columns, line, clip", [
    ("id|text|normalized|speaker", "a|Dr. B|doctor B|jo", ("a", "doctor B", "jo")),
    ("speaker|id|text", "jo|a|Dr. B", ("a", "Dr. B", "jo")), ("id|-|text", "a|1.5|Dr. B", ("a", "Dr. B", "")),
    ("id|text", 'a|"Quoted," he said', ("a", '"Quoted," he said', "")), ("id|text", 'a|"Hm."|', ("a", '"Hm."', "")),
    ("id|text|speaker", "a|b", ("a", "b", "")),
    ("id|text|speaker", "a|It was  here.|bob", ("a", "It was here.", "bob")),
])
def test_columns(tmp_path, columns, line, clip):
    (tmp_path / "m.csv").write_text(line)
    (found,), _ = read_list(tmp_path / "m.csv", columns)
    assert (found["id"], found["text"], found["speaker"]) == clip


@pytest.mark.parametrize("content, words", [
    (table(IDS, [*NORMALIZED[:-1], "Hello | world"]), "line 8 of", ), ("p|Hello | world|Hello | world\n", "5 columns"),
    (table(IDS, NORMALIZED, [f"{n}.25" for n in range(8)]), "--columns"),  # seconds, and no speaker
    (table(IDS, ["one", "two"] * 4, SPEAKERS), "--columns"), ("c0|bob|hi\n", "--columns"),
    (table(IDS, NORMALIZED, NORMALIZED[::-1]), "--columns"),
    (table(FILES, NORMALIZED, delimiter=","), "line 2 of"),  # a comma in a text that is not quoted
    ('wavs/c0.wav,"Never, he said\nwavs/c1.wav,b\n', "line 1 of"), ("\n".join(TEXTS), "line 1 of"),
    ("\n\n", "names no clip"), ("file,text\nc0,a,b\n", "line 2 of"), ("", "names no clip"),
], ids=["a stray bar", "stray bars alone", "seconds", "words and names", "a line", "two texts", "a stray comma",
        "a quote without end", "sentences", "blank", "more than the header", "empty"])
def test_what_does_not_show(tmp_path, content, words):
    """Nothing is guessed: the line is named, or --columns asked for."""
    (tmp_path / "metadata.csv").write_text(content)
    said = refusal(lambda argv: understood(tmp_path / "metadata.csv"))
    assert words in said and str(tmp_path / "metadata.csv") in said


def test_rows_that_cannot_be_used(tmp_path):
    """They stay in their place, each with its reason."""
    lines = ["c0|Hello there.", "|no id", "c1|", "", "c2", "c0|Again.", "c3|One\u2028two\x0cthree."]
    (tmp_path / "m.csv").write_text("\n".join(lines), encoding="utf-8")
    clips, _ = read_list(tmp_path / "m.csv")
    assert [clip.get("skipped", clip["text"]) for clip in clips] == [
        "Hello there.", "line 2 of m.csv names no recording", "line 3 of m.csv has no text",
        "line 5 of m.csv has no text", "line 6 of m.csv names it again, after line 1", "One two three."]


def test_what_comes_twice_in_a_map_of_json(tmp_path):
    (tmp_path / "a.json").write_text('{\n  "a": "One.",\n  "b": "Two.",\n\n  "a": "Three."\n}\n')
    clips, _ = read_list(tmp_path / "a.json")
    assert [clip.get("skipped", clip["text"]) for clip in clips] == [
        "One.", "Two.", "line 5 of a.json names it again, after line 2"]


@pytest.mark.parametrize("columns, words", [
    ("id|words", "'words'"), ("id|speaker", "an id and a text"), ("id|text|text", "comes twice"), ("", "''"),
    ("text", "an id and a text"),
])
def test_wrong_columns(columns, words):
    assert words in refusal(lambda argv: read_columns(columns))


@pytest.mark.parametrize("content, clips", [
    ("One.\n\nTwo, and more.\n", [("clip-00000", "One."), ("clip-00002", "Two, and more.")]),
    ("a|One.\nb|Two.|\n", [("a", "One."), ("b", "Two.")]), ("file_name,text\na.wav,One.\n", [("a.wav", "One.")]),
    ("One.\nTwo | three.\nFour.\n", "line 2 of"), ("a|\n", "no line"),
    ('[{"id": "a", "text": "One."}, {"id": "b", "text": "Two."}]', [("a", "One."), ("b", "Two.")]),
    ('{"a.wav": "One.", "b.wav": "Two."}', [("a.wav", "One."), ("b.wav", "Two.")]), ('["One.", "Two."]', "no object"),
])
def test_transcripts(tmp_path, content, clips):
    (path := tmp_path / ("a.json" if content[0] in "[{" else "a.txt")).write_text(content)
    if isinstance(clips, list):
        assert [(clip["id"], clip["text"]) for clip in read_transcripts(path)] == clips
    else:
        assert clips in refusal(lambda argv: read_transcripts(path))


@pytest.mark.parametrize("name, content, words", [
    ("a.json", b'[{"file": "a", "text": "Hm."},\n', "cut off"),
    ("a.json", b'[{"file": "a", "text": "Hm."},\n5]', "line 2"),
    ("a.json", b'[{"file": "a", "text": "Hm."}]\n[]', "behind its array"),
    ("a.xlsx", b"PK\x03\x04\xff", "spreadsheet"), ("a.parquet", b"PAR1\xff", "Parquet"),
    ("a.csv", b"\x1f\x8b\x08", "gzip"),
])
def test_files_of_other_kinds(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in refusal(lambda argv: read_list(tmp_path / name))


@pytest.mark.parametrize("content", [
    "c0|EN-US|EN|It was late.\nc1|EN-US|EN|Nobody came.\n", "c0|EN|EN|It was late.\nc1|EN|EN|Nobody came.\n",
    "c0|0|0|It was late.\nc1|0|0|Nobody came.\n", "c0|It was late.|p220|p220\nc1|Nobody came.|p225|p225\n",
    "c0|你好世界|ni3 hao3 shi4 jie4\nc1|再见|zai4 jian4\n", "c0|$5|five dollars\nc1|1999|nineteen ninety nine\n",
    "c0|It was late.|1.8s\nc1|Nobody came.|1.9s\n", "c0|It was late.|00:00:03\nc1|Nobody came.|00:00:03\n",
    "c0|It was late.|EN\nc1|Nobody came.|EN\n", "c0|It was late.|happy\nc1|Nobody came.|sad\n",
    "c0|It was late.|m\nc1|Nobody came.|m\n", table(IDS * 2, ["right", "left"] * 8, [f"spk{n}" for n in range(16)]),
    "c0.wav,It is late,she said\nc1.wav,Yes, it was late.\n", "c0.wav,It is late,she said\nc1.wav,Well,he said\n",
    'c0.wav,"I will go.\nc1.wav,And never return."\nc2.wav,So.\n',
], ids=str)
def test_nothing_is_guessed(tmp_path, content):
    """Languages, moods, times, phonemes and the like are no speakers; a quotation joins no lines."""
    (tmp_path / "metadata.csv").write_text(content, encoding="utf-8")
    said = refusal(lambda argv: understood(tmp_path / "metadata.csv"))
    assert "--columns" in said or "line 1 of" in said


@pytest.mark.parametrize("content, clips", [
    ('c0|"I will go.\nc1|And never return."\n', [("c0", '"I will go.', ""), ("c1", 'And never return."', "")]),
    ('"c0"|"It was late."\n"c1"|"So."\n', [("c0", "It was late.", ""), ("c1", "So.", "")]),
    ('"id"|"text"\n"c0"|"It was late."\n', [("c0", "It was late.", "")]),
    ("c0\tIt was | late.\nc1\tSo | so.\n", [("c0", "It was | late.", ""), ("c1", "So | so.", "")]),
    ("c0|wavs/c0.wav|It was late.\nc1|wavs/c1.wav|So.\n", [("c0", "It was late.", ""), ("c1", "So.", "")]),
    ("c0|Hi.|Hi.|en-us\nc1|Hi.|Hi.|de\n", [("c0", "Hi.", "en-us"), ("c1", "Hi.", "de")]),
    ("|\n||\n", "names no clip"),
], ids=str)
def test_what_looks_odd(tmp_path, content, clips):
    (tmp_path / "metadata.csv").write_text(content, encoding="utf-8")
    if isinstance(clips, str):
        assert clips in refusal(lambda argv: understood(tmp_path / "metadata.csv"))
    else:
        assert understood(tmp_path / "metadata.csv") == clips


@pytest.mark.parametrize("row, clip", [
    ({"file": "c0", "text": "Hi.", "speaker_id": 1.0}, ("c0", "Hi.", "1")),
    ({"file": "c0", "text": "Hi.", "speaker": {"name": "jo"}}, ("c0", "Hi.", "jo")),
    ({"file": "c0", "text": 7, "speaker": True}, ("c0", "7", "")),
    ({"audio": {"filepath": "c0"}, "text": None, "transcript": "Hi."}, ("c0", "Hi.", "")),
    ({"file": "c0", "text": "Hi.", "offset": 0.0, "duration": 2.0}, ("c0", "Hi.", "")),
    ({"file": "c0", "text": "Hi.", "speaker": float("nan")}, ("c0", "Hi.", "")),
    ({"file": "c0", "text": "Hi.", "speaker": 1.5, "duration": float("inf")}, ("c0", "Hi.", "1.5")),
    ({"file": "c0", "text": "Hi.", "offset": 0.5}, "part of a recording"),
    ({"file": "c0", "text": "bad \ud800"}, ("line 1", "", "")),
])
def test_values_of_json(tmp_path, row, clip):
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    if isinstance(clip, str):
        assert clip in refusal(lambda argv: understood(tmp_path / "metadata.jsonl"))
    else:
        assert understood(tmp_path / "metadata.jsonl") == [clip]
