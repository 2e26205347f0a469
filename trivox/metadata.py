"""Lists of clips, read: what each recording says, and who says it, in whatever layout people keep that.

A line a clip. Bars, tabs, commas or semicolons stand between its columns, quoted or not, with a first line that names
them or without; or it is an object of JSON. Without names, what a column is shows in the whole file: one names
recordings, one is alike the text and so its normalized form, one has few different words in it and so the speaker.
Where that does not show, UserError asks for --columns.
"""

import csv
import io
import json
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

from trivox.common import UserError
from trivox.files import lines_of

ROLES = ("id", "text", "normalized", "speaker")
LISTS = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.txt", "filelist.txt", "manifest.jsonl")
NAMES = {role: names.split() for role, names in {  # what headers and JSON call them, the best first
    "id": "file_name filename file file_path filepath path audio_filepath audio_path audio_file audio_filename audio "
          "wav_path wav_file wav_filename wav wavs recording clip id clip_id utterance_id utt_id utterance utt key",
    "text": "text sentence transcript transcription raw_text text_raw raw_transcription original_text",
    "normalized": "normalized normalised normalized_text normalised_text text_normalized text_normalised "
                  "normalized_transcription clean_text",
    "speaker": "speaker speaker_id speaker_name spk spk_id client_id voice reader narrator"}.items()}
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
    if path.suffix.lower() in (".jsonl", ".json", ".ndjson"):
        if columns:
            raise UserError(f"--columns is for a list with columns, and {path} has objects of JSON")
        rows, layout = read_objects(path, lines)
    else:
        rows, layout = read_table(path, lines, columns, is_recording)
    clips, seen = [], {}
    for number, row in rows:
        text = " ".join((row.get("normalized") or row.get("text") or "").split())
        clip = {"id": row.get("id", ""), "text": text, "speaker": row.get("speaker", ""), "line": number}
        if not clip["id"]:
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
    if path.suffix.lower() not in (".jsonl", ".ndjson") and len(barred) * 2 < len(said) and not header(lines):
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
    """Rows of a file with an object of JSON a line: [(number of the line, {role: str})], and the layout."""
    rows, used = [], Counter()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"line {number} of {path} is no object of JSON: {line[:40]!r}")
        keys = roles_of(value)
        used.update(f"{key} ({role})" if role else f"{key} (not used)" for key, role in zip(value, keys))
        row = {}
        for role, cell in zip(keys, value.values()):
            if role == "id" and isinstance(cell, dict):  # as Hugging Face's datasets have it
                cell = cell.get("path")
            if role == "speaker" and isinstance(cell, int):
                cell = str(cell)
            if role and isinstance(cell, str):
                row[role] = cell.strip()
        rows.append((number, row))
    return rows, f"JSON: {', '.join(used)}"


# ------------------------------------------------------------------------------------------------------------
# Columns

def read_table(path, lines, columns=None, is_recording=None):
    """Rows of a file with columns: [(number of the line, {role: str})], and the layout."""
    named = header(lines)
    delimiter = named[0] if named else find_delimiter(lines, is_recording)
    if not delimiter:
        number, line = next(((n, line) for n, line in enumerate(lines, 1) if line.strip()), (0, ""))
        if not number:
            return [], ""
        raise UserError(f"line {number} of {path}, {line.strip()[:40]!r}, has no columns that can be told apart: "
                        "expected lines such as LJ001-0001|text, the recording first")
    rows = [(number, cells) for number, cells in split_cells(path, lines, delimiter) if any(cells)]
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
    mark = {"|": "a bar", "\t": "a tab", ",": "a comma", ";": "a semicolon"}[delimiter]
    for number, cells in rows:
        if (has := max(n for n, cell in enumerate(cells, 1) if cell)) > width:
            raise UserError(f"line {number} of {path} has {has} columns, and {where} {width}: {mark} in a text "
                            "has to be taken out or quoted; where all lines should have more columns, --columns names "
                            "them")
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
    before the first of them is a recording in half of the lines. None for nothing of that."""
    lines = [line for line in lines if line.strip()]
    for delimiter in "|\t":
        if sum(delimiter in line for line in lines) * 2 >= len(lines) > 0:
            return delimiter
    for delimiter in ",;":
        if is_recording and lines and sum(any(
                is_recording(cell.strip().strip('"')) for cell in line.split(delimiter)[:3]
                if delimiter in line) for line in lines) * 2 >= len(lines):
            return delimiter
    return None


def split_cells(path, lines, delimiter):
    """[(number of the line, cells)]. Between commas and semicolons a cell that begins with a quote is quoted, as RFC
    4180 has it; between bars and tabs where it shows (`quoted`), as people write plain quotes there. Raises UserError,
    by its line, for a quote that does not end."""
    plain = [(number, [cell.strip() for cell in line.split(delimiter)]) for number, line in enumerate(lines, 1)]
    starts = [cell for _, cells in plain for cell in cells if cell.startswith('"')]
    if not starts or delimiter in "|\t" and not quoted(lines, delimiter):
        return plain
    csv.field_size_limit(2**31 - 1)
    rows, reader = [], csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=delimiter, strict=True,
                                  skipinitialspace=True)
    number = 1
    try:
        for cells in reader:
            rows.append((number, [" ".join(cell.split()) for cell in cells]))
            number = reader.line_num + 1
    except csv.Error as e:
        raise UserError(f"line {number} of {path} has quotes that do not match ({e}): a quote within a cell stands "
                        'double, as in a01,"""Yes,"" he said."') from None
    return rows


def quoted(lines, delimiter):
    """Whether bars or tabs stand between quoted cells: it reads so, and in quotes is what would else be read wrongly, a
    doubled quote or what stands between columns or lines."""
    plain = [line.split(delimiter) for line in lines]
    try:
        rows = [*csv.reader(io.StringIO("\n".join(lines), newline=""), delimiter=delimiter, strict=True)]
    except csv.Error:
        return False
    return sum(map(len, rows)) < sum(map(len, filter(any, plain))) or any(
        cell.startswith('"') and '""' in cell[1:-1] for cells in plain for cell in cells)


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
    others = [n for n in range(width) if n != id and any(columns[n])]
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
    if len(texts) == 2:
        return alike(columns[texts[0]], columns[texts[1]]) and not (speaker is not None and measures(columns[speaker]))
    if len(texts) != 1 or speaker is None:
        return False
    names, said = columns[speaker], columns[texts[0]]
    return names_speakers(names, said) and not alike(names, said)


def alike(a, b):
    """Whether two columns say much the same in each line."""
    pairs = [(x.lower(), y.lower()) for x, y in zip(a, b) if x and y]
    pairs = pairs[::max(1, len(pairs) // ALIKE)]
    ratios = [SequenceMatcher(None, x, y, autojunk=False).ratio() for x, y in pairs if len(x) + len(y) < 4000]
    return bool(ratios) and sum(ratios) / len(ratios) >= 0.5


def measures(column):
    """Whether a column has numbers that name nobody: fractions, or whole ones that hardly come twice; times perhaps."""
    cells = [x for x in column if x]
    numbers = all(x.replace(".", "", 1).isdecimal() for x in cells)
    return numbers and (any("." in x for x in cells) or len({*cells}) * 2 > len(cells) > 2)


def names_speakers(column, text):
    """Whether a column has the speakers and not what they say: whole numbers beside words, half as many different
    entries, or no white space where most texts have some."""
    names, texts = [x for x in column if x], [x for x in text if x]
    if not names or not texts or measures(names):
        return False
    numbers = all(x.isdecimal() for x in names) and not all(x.isdecimal() for x in texts)
    if numbers or len({*names}) * 2 <= len({*texts}):
        return True
    spaced, words = (sum(" " in x for x in some) / len(some) for some in (names, texts))
    return spaced <= 0.1 and words >= 0.5
