"""Lists of clips, read: what each recording says, and who says it, in whatever layout people keep that.

A line a clip. Bars, tabs, commas or semicolons stand between its columns, quoted or not, with a first line that names
them or without; or it is an object of JSON. Without names, what a column is shows in the whole file: one names
recordings, one is alike the text and so its normalized form, one has few different words in it and so the speaker.
Where that does not show, UserError asks for --columns.
"""

import csv
import io
import json
import math
import re
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

from trivox.common import UserError
from trivox.files import lines_of

ROLES = ("id", "text", "normalized", "speaker")
LISTS = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.txt", "filelist.txt",
         "manifest.jsonl", "manifest.json", "validated.tsv", "line_index.tsv", "txt.done.data", "text")
JSON = (".jsonl", ".json", ".ndjson")
NAMES = {role: names.split() for role, names in {  # what headers and JSON call them, the best first
    "id": "file_name filename file file_path filepath path audio_filepath audio_path audio_file audio_filename audio "
          "wav_path wav_file wav_filename wav wavs recording clip id clip_id utterance_id utt_id utterance utt key "
          "datei dateiname fichier archivo файл 文件",
    "text": "text sentence transcript transcription raw_text text_raw raw_transcription original_text texte texto "
            "testo satz текст 文本",
    "normalized": "normalized normalised normalized_text normalised_text text_normalized text_normalised "
                  "normalized_transcription clean_text",
    "speaker": "speaker speaker_id speaker_name spk spk_id client_id voice reader narrator sprecher locuteur hablante "
               "диктор"}.items()}
PATHS = "path", "filepath", "file_name", "filename", "file", "audio_filepath"  # of an object that is a recording
PARTS = "offset", "start", "start_time", "begin", "segment_start"  # where a clip begins in its recording
NOT_NAMES = {*"""m f male female man woman happy sad angry neutral calm surprised fearful disgusted en de fr es it nl pt
pl ru zh ja ko ar hi tr cs sv da fi no el he uk id th vi ro hu""".split()}  # entries of columns that name no speaker
FEW = 8  # clips, of which so little shows
ALIKE = 200  # so many lines are looked at to tell whether two columns say the same


def read_columns(text):
    """What --columns asks for: a list of ROLES, and "-" for a column that is not used. Raises UserError for other ones,
    one that comes twice, and where there is no id or no text."""
    columns = [name.strip() for name in text.split("|")]
    for name in columns:
        if name not in (*ROLES, "-"):
            raise UserError(f"--columns {text}: {name!r} is none of {', '.join(ROLES)}, nor -, which is for a column "
                            "that is not used")
        if name != "-" and columns.count(name) > 1:
            raise UserError(f"--columns {text}: {name} comes twice")
    if "id" not in columns or not {"text", "normalized"} & {*columns}:
        raise UserError(f"--columns {text}: a list of clips needs an id and a text, as in id|text|speaker")
    return columns


def read_list(path, columns=None, is_recording=None):
    """The clips of a list: (clips, layout). clips: dicts of id, text, speaker ("" if unknown) and line, its number; one
    that cannot be used has why as `skipped`. layout: how it was understood, for people.

    columns: as of `read_columns`; None for what the file shows. is_recording: a function that says whether there is a
    recording of a name; None where none is there yet, so that the first column names the clips.

    Raises UserError where the file is missing, holds no clip, has a line with more columns than the others, or columns
    of which it does not show what they are.
    """
    path, lines = Path(path), lines_of(Path(path))
    if path.suffix.lower() in JSON:
        if columns:
            raise UserError(f"--columns is for a list with columns, and {path} has objects of JSON")
        rows, layout = read_objects(path, lines)
    else:
        rows, layout = read_table(path, lines, columns, is_recording)
    clips, seen = [], {}
    for number, row in rows:
        text = " ".join((row.get("normalized") or row.get("text") or "").split())
        clip = {"id": row.get("id", ""), "text": text, "speaker": row.get("speaker", ""), "line": number}
        if any("\ud800" <= c <= "\udfff" for value in (clip["id"], text, clip["speaker"]) for c in value):
            clip |= {"id": f"line {number}", "text": "", "speaker": "",
                     "skipped": f"line {number} of {path.name} has halves of characters (surrogates) in it"}
        elif not clip["id"]:
            clip |= {"id": f"line {number}", "skipped": f"line {number} of {path.name} names no recording"}
        elif not text:
            clip["skipped"] = f"line {number} of {path.name} has no text"
        elif clip["id"] in seen:
            clip["skipped"] = f"line {number} of {path.name} names it again, after line {seen[clip['id']]}"
        else:
            seen[clip["id"]] = number
        clips.append(clip)
    if not clips:
        raise UserError(f"{path} names no clip: expected lines such as LJ001-0001|text|normalized text")
    return clips, layout


def read_transcripts(path):
    """What is to be spoken: the usable clips of a list, or of a text with a sentence a line, whose ids are clip-00000
    and so on. Dicts of id, text and speaker. What is left out is told. Raises UserError as `read_list` does."""
    path, lines = Path(path), lines_of(Path(path))
    said = [(number, " ".join(line.split())) for number, line in enumerate(lines, 1) if line.strip()]
    barred = [number for number, line in said if "|" in line or "\t" in line]
    if path.suffix.lower() not in JSON and len(barred) * 2 < len(said) and not header(lines):
        if barred:
            raise UserError(f"line {barred[0]} of {path} has a bar or a tab in it, and the others are a sentence each: "
                            "take it out, or give each line its id, as in a01|Good morning.")
        return [{"id": f"clip-{number - 1:05d}", "text": line, "speaker": ""} for number, line in said]
    clips, _ = read_list(path)
    for clip in clips:
        if "skipped" in clip:
            print(f"skipped {clip['id']}: {clip['skipped']}")
    if not (clips := [clip for clip in clips if "skipped" not in clip]):
        raise UserError(f"no line of {path} has a text")
    return [{key: clip[key] for key in ("id", "text", "speaker")} for clip in clips]


# ------------------------------------------------------------------------------------------------------------
# JSON

def read_objects(path, lines):
    """Rows of a file with an object of JSON a line, or of one array of them, or of one object that has a text for each
    recording: [(number of the line, {role: str})], and the layout."""
    rows, used = [], Counter()
    for number, value in objects_of(path, lines):
        for key in PARTS:
            if isinstance(value.get(key), (int, float)) and value[key] > 0:
                raise UserError(f"line {number} of {path} is about a part of a recording ({key} {value[key]}): cut the "
                                "parts into files of their own first")
        row = {key: plain(cell) for key, cell in value.items()}
        row = {key: cell for key, cell in row.items() if cell}  # so that what is empty gives way to what is not
        roles = dict(zip(row, roles_of(row)))
        used.update(f"{key} ({roles[key]})" if roles.get(key) else f"{key} (not used)" for key in value)
        rows.append((number, {role: row[key] for key, role in roles.items() if role}))
    return rows, f"JSON: {', '.join(used)}"


def objects_of(path, lines):
    """[(number of the line on which it begins, object)]."""
    content = "\n".join(lines)
    if content.lstrip()[:1] == "[" or re.match(r'\s*\{\s*"[^"\\]*"\s*:\s*"', content) and is_map(content):
        return list(entries_of(path, content))
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise UserError(f"line {number} of {path} is no object of JSON: {line[:40]!r}")
            found.append((number, value))
    return found


def is_map(content):
    """Whether JSON is one object with a text for each recording, {"a.wav": "It was late."}, and none of a clip."""
    try:
        pairs = json.loads(content, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return False
    return len(pairs) > 1 and all(isinstance(text, str) for _, text in pairs) and not (
        {"id", "text"} <= {*roles_of([name for name, _ in pairs])})


def entries_of(path, content):
    """(number of the line on which it begins, object) of each of an array, or of each text of a map, one that comes
    twice included."""
    decode, skip, end = json.JSONDecoder().raw_decode, re.compile(r"[\s,:]*"), {"[": "]", "{": "}"}[content.lstrip()[0]]
    at, number, counted = content.index(content.lstrip()[0]) + 1, 1, 0
    while (at := skip.match(content, at).end()) < len(content) and content[at] != end:
        number, counted, start = number + content.count("\n", counted, at), at, at
        try:
            value, at = decode(content, at)
            if end == "}":
                text, at = decode(content, skip.match(content, at).end())
                value = {"id": value, "text": text}
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"line {number} of {path} is no object of JSON: {content[start:start + 40]!r}")
        yield number, value
    if at >= len(content):
        raise UserError(f"{path} is cut off: its array of JSON has no end")
    if rest := content[at + 1:].strip():
        raise UserError(f"behind its array of JSON {path} has more: {rest[:40]!r}")


def plain(cell):
    """What JSON has for an id, a text or a speaker, as a str; of an object its path or its name; "" of what is none."""
    if isinstance(cell, dict):
        cell = next((cell[name] for name in (*PATHS, "name", "id") if cell.get(name) is not None), None)
    if isinstance(cell, float):  # pandas writes whole numbers so in a column with gaps, which are NaN
        cell = int(cell) if cell.is_integer() else cell if math.isfinite(cell) else None
    return str(cell).strip() if isinstance(cell, (str, int, float)) and not isinstance(cell, bool) else ""


# ------------------------------------------------------------------------------------------------------------
# Columns

FESTIVAL = re.compile(r'\(\s*(\S+)\s+"(.*)"\s*\)')  # ( arctic_a0001 "Author of the danger trail." )


def read_table(path, lines, columns=None, is_recording=None):
    """Rows of a file with columns: [(number of the line, {role: str})], and the layout."""
    festival = [(n, FESTIVAL.fullmatch(line.strip())) for n, line in enumerate(lines, 1) if line.strip()]
    if festival and all(match for _, match in festival):
        return [(n, {"id": match[1], "text": match[2].replace('\\"', '"')}) for n, match in festival], (
            "id, text, in brackets")
    named = header(lines)
    delimiter = named[0] if named else find_delimiter(lines, is_recording)
    if not delimiter:
        number, line = next(((n, line) for n, line in enumerate(lines, 1) if line.strip()), (0, ""))
        if not number:
            return [], ""
        raise UserError(f"line {number} of {path}, {line.strip()[:40]!r}, has no columns that can be told apart: "
                        "expected lines such as LJ001-0001|text, the recording first")
    rows = [(n, cells) for n, cells in split_cells(path, lines, delimiter, is_recording) if any(cells)]
    if not rows:
        return [], ""
    names = None
    if named:
        names, rows = rows[0][1], rows[1:]
    if columns:
        roles, width = read_columns(columns), None
    elif named:
        roles, width = roles_of(names), len(names)
    else:
        width = most_common_width(rows)
    width, where = width or len(roles), "the first line" if named else "--columns" if columns else "most lines"
    mark = {" ": "a blank", "|": "a bar", "\t": "a tab", ",": "a comma", ";": "a semicolon"}[delimiter]
    for number, cells in rows:
        if (has := max(n for n, cell in enumerate(cells, 1) if cell)) > width:
            raise UserError(f"line {number} of {path} has {has} columns, and {where} {width}: {mark} in a text "
                            "has to be taken out or quoted; where all lines should have more columns, --columns names "
                            "them")
    if delimiter in ",;" and width > 2 and not columns and not named and not any('"' in line for line in lines):
        raise UserError(f"{path} has {mark} within texts, perhaps, as in {', '.join(rows[0][1])[:60]!r}: quote the "
                        "texts, or say by --columns what its columns are, as in --columns \"id|text|speaker\"")
    if not columns and not named:
        roles = find_roles(path, [cells for _, cells in rows], width, is_recording)
    said = [role if role in ROLES else "not used" for role in roles]
    if names:
        said = [f"{name} ({role})" for name, role in zip(names, said)]
    return [(number, {role: cell for role, cell in zip(roles, cells) if role in ROLES})
            for number, cells in rows], f"{', '.join(said)}, with {mark} between"


def roles_of(names):
    """The role of each column by its name, None for one that is not used. Where two names fit a role, the better one
    has it."""
    plain = [str(name).strip().lower().replace(" ", "_").replace("-", "_") for name in names]
    roles = [None] * len(plain)
    for role, known in NAMES.items():
        if found := [(known.index(name), i) for i, name in enumerate(plain) if name in known]:
            roles[min(found)[1]] = role
    if "text" not in roles and "normalized" in roles:
        roles[roles.index("normalized")] = "text"
    return roles


def header(lines):
    """Where the first line names the columns: (delimiter, their roles); else None."""
    first = next((line for line in lines if line.strip()), "")
    for delimiter in "|\t,;":
        names = [name.strip().strip('"') for name in first.split(delimiter)]
        roles = roles_of(names)
        if "id" in roles and "text" in roles and len(names) < 40:
            return delimiter, roles
    return None


def find_delimiter(lines, is_recording):
    """What stands between the columns: a bar or a tab in half of the lines; a comma or a semicolon where what stands
    before the first of them is a recording in half of the lines; a blank where the first words are. None for nothing of
    that."""
    lines = [line for line in lines if line.strip()]
    usual = [mark for mark in "|\t" if sum(mark in line for line in lines) * 2 >= len(lines) > 0]
    for delimiter in usual[::-1] if is_recording else ():  # tabs behind recordings: then bars are in texts
        if sum(is_recording(line.split(delimiter)[0].strip().strip('"')) for line in lines) * 2 >= len(lines):
            return delimiter
    if usual:
        return usual[0]
    for delimiter in ",;":
        if is_recording and lines and sum(any(
                is_recording(cell.strip().strip('"')) for cell in line.split(delimiter)[:3]
                if delimiter in line) for line in lines) * 2 >= len(lines):
            return delimiter
    if is_recording and lines and sum(is_recording(line.split()[0]) for line in lines) * 2 >= len(lines):
        return " "  # as Kaldi has it
    return None


def split_cells(path, lines, delimiter, is_recording=None):
    """[(number of the line, cells)]. Between commas and semicolons a cell that begins with a quote is quoted, as RFC
    4180 has it; between bars and tabs where it shows (`quoted`), as people write plain quotes there. Raises UserError,
    by its line, for a quote that does not end, or not before the next clip begins."""
    if delimiter == " ":
        return [(number, line.split(None, 1)) for number, line in enumerate(lines, 1)]
    plain = [(number, [cell.strip() for cell in line.split(delimiter)]) for number, line in enumerate(lines, 1)]
    starts = [cell for _, cells in plain for cell in cells if cell.startswith('"')]
    if not starts or delimiter in "|\t" and not quoted(lines, delimiter):
        return plain
    if delimiter in "|\t":  # where people write a line a clip
        return [(number, [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])])
                for number, line in enumerate(lines, 1)]
    csv.field_size_limit(2**31 - 1)
    rows, reader = [], csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=delimiter, strict=True,
                                  skipinitialspace=True)
    number = 1
    try:
        for cells in reader:
            for inside in (part for cell in cells for part in cell.split("\n")[1:] if is_recording):
                if is_recording(inside.split(delimiter)[0].strip().strip('"')):
                    raise UserError(f"line {number} of {path} begins a quote that ends in another clip's line: write "
                                    "the quotes of a text double, and the text in quotes")
            rows.append((number, [" ".join(cell.split()) for cell in cells]))
            number = reader.line_num + 1
    except csv.Error as e:
        raise UserError(f"line {number} of {path} has quotes that do not match ({e}): a quote within a cell stands "
                        'double, as in a01,"""Yes,"" he said."') from None
    return rows


def quoted(lines, delimiter):
    """Whether bars or tabs stand between quoted cells: each line reads so, and either all ids are quoted or in quotes
    is what would else be read wrongly, a doubled quote or what stands between columns."""
    lines = [line for line in lines if line.strip()]
    try:
        rows = [next(csv.reader([line], delimiter=delimiter, strict=True)) for line in lines]
    except csv.Error:
        return False
    plain = [line.split(delimiter) for line in lines]
    return all(line.startswith('"') for line in lines) or any(len(row) < len(cells) for row, cells in zip(
        rows, plain)) or any(cell.startswith('"') and '""' in cell[1:-1] for cells in plain for cell in cells)


def most_common_width(rows):
    """How many columns most lines have, of those with an id and a text; of two equally common numbers the smaller, so
    that a bar in a text is told."""
    widths = Counter(len(cells) for _, cells in rows if all(cells[:2]) and len(cells) > 1)
    return min(widths, key=lambda width: (-widths[width], width)) if widths else 2


def find_roles(path, rows, width, is_recording):
    """The role of each column, by what stands in the whole file. Raises UserError where that does not show."""
    table = [[*cells, *[""] * width][:width] for cells in rows]
    columns = [[cells[n] for cells in table] for n in range(width)]
    id, found = 0, [0] * width
    if is_recording:
        found = [sum(map(is_recording, filter(None, column))) for column in columns]
        id = max(range(width), key=lambda n: (found[n], -n))
    roles = ["-"] * width
    roles[id] = "id"
    others = [n for n in range(width) if n != id and any(columns[n]) and found[n] * 2 <= len(table)]
    example = " | ".join(cell[:30] for cell in table[0])
    if not others:
        return roles
    if len(others) > 3:
        raise UserError(f"{path} has {width} columns, as in {example!r}: --columns says what they are, as in --columns "
                        "\"id|text|-|speaker\", - for those that are not used; a bar in a text has to be taken out")
    if len(others) == 1:
        roles[others[0]] = "text"
        return roles
    speakers = [s for s in (None, *others) if is_layout(columns, [n for n in others if n != s], s)]
    if not speakers and len(others) == 3 and is_twice(*(columns[n] for n in others)):
        speakers = others[2:]
    if len(speakers) != 1:
        raise UserError(f"{path} does not show which of its columns is the text and which the speaker, as in "
                        f"{example!r}: --columns says it, as in --columns \"id|text|speaker\" or \"id|speaker|text\", "
                        "or - for a column that is neither")
    if speakers[0] is not None:
        roles[speakers[0]] = "speaker"
    texts = [n for n in others if n != speakers[0]]
    for n, role in zip(texts, ("text", "normalized")):
        roles[n] = role
    return roles


def is_layout(columns, texts, speaker):
    """Whether these columns can be the text, or the text and its normalized form, and that one the speaker's name."""
    said = [columns[n] for n in texts]
    if len(texts) > 2 or len(texts) == 2 and not alike(*said) or not all(map(reads, said[:1])):
        return False
    if speaker is None:
        return len(texts) == 2
    name, entries = columns[speaker], {x.lower().partition("-")[0] for x in columns[speaker]}
    if len(texts) == 1 and entries <= {"", *NOT_NAMES}:  # beside a text and its normalized form voices may be called so
        return False
    return names_speakers(name, said[0]) and not any(alike(name, text) or names_speakers(text, name) for text in said)


def is_twice(text, again, name):
    """Whether a text stands there twice, as where nothing had to be normalized, and behind it something else."""
    return text == again and any(map(str.isalpha, "".join(text))) and reads(text) >= reads(name)


def alike(a, b):
    """Whether two columns say much the same in each line."""
    pairs = [(x.lower(), y.lower()) for x, y in zip(a, b) if x and y]
    pairs = pairs[::max(1, len(pairs) // ALIKE)]
    ratios = [SequenceMatcher(None, x, y, autojunk=False).ratio() for x, y in pairs if len(x) + len(y) < 4000]
    return bool(ratios) and sum(ratios) / len(ratios) >= 0.5


PLAIN = re.compile(r"(?=.*[A-Za-z])[A-Za-z][\w-]{1,30}", re.ASCII)
MEASURE = re.compile(r"[-+]?\d+(?:[.:,]\d+)+ ?(?:s|sec|ms|%)?|\d+ ?(?:s|sec|ms|%)")


def reads(column):
    """Whether most entries look like what is said: several words, or letters that need no space between words."""
    cells = [x for x in column if x]
    return sum(" " in x or any(c > "\u2e80" for c in x) for x in cells) * 3 >= len(cells) > 0


def names_speakers(column, text):
    """Whether a column has the speakers and not what they say. A speaker speaks twice, on average, and texts differ
    twice as much as their speakers, unless those are whole numbers; of a few clips a plain word beside several is
    enough. Times are no names."""
    names, texts = [x for x in column if x], [x for x in text if x]
    if not names or not texts:
        return False
    if all(map(MEASURE.fullmatch, names)):
        return False
    if len(names) <= FEW and all(PLAIN.fullmatch(x) for x in names) and all(" " in x for x in texts):
        return True
    if len({*names}) * 2 > len(names):
        return False
    numbers = all(x.isdecimal() for x in names) and not all(x.isdecimal() for x in texts)
    return numbers or len({*names}) * 2 <= len({*texts})
