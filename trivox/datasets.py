"""Data sets as trainers read them: log-mels, codes, sentences. prepare.py makes them.

A data set is a folder of shards made from a corpus: `mels_00000.f16` holds log-mels, (frames, n_mels) float16, one clip
after the other, `mels_00000.jsonl` a line a clip, and `mels_00000.idx` two int64 a clip, which are read in no time: the
end of its frames, counted from the shard's start, and 0 for train or 1 for val. `dataset_stats.json` is written last
and marks a whole one. A data set of tokens is made likewise; what is written last is `codec.json`, and beside it
mel_rvq leaves its centroids, `codec.safetensors`. It holds

    tokens_00000.u16             codes, (frames, Q) uint16
    tokens_00000.jsonl           a line a clip, for TokenDataset; Emilia has none
    tokens_00000.u8              the characters of the clips' normalised texts, as Echolancer numbers them, uint8; or
    tokens_00000.ids             uint16, as the alphabet of the corpus does, which is in codec.json
    tokens_00000.idx             four int64 a clip, for SentenceDataset: the ends of its codes and of its characters,
                                 counted from the shard's start, its speaker (-1 for none), and 0 for train or 1 for val
    speakers.json                the speakers' names, sorted
    speaker_NAME_00000.f32       speaker embeddings in the order of the .idx, (N, width) float32; when all of them are
                                 there, `speaker_NAME.json` is written
"""

import math
import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from pydantic import FiniteFloat, PositiveInt

from trivox.alphabet import FIRST, SYMBOLS, alphabet
from trivox.audio import read_mel_config
from trivox.codecs import read_codec
from trivox.common import Positive, UserError
from trivox.corpora import Recordings
from trivox.files import map_file, read_json, read_rows, read_text

SPLITS = ("train", "val")
AGAIN = "delete the files of that shard, and give the data.py command that made it again"
MISSING = "shards are missing; give the data.py command that made it again"


class ClipDataset:
    """Clips in shards, as MelDataset and TokenDataset have them: of each a line of a .jsonl, and rows of an array.

    rows: a sequence of dicts, read as they are asked for. frames: how many each clip has, (N,) int64. Raises UserError
    where a shard is missing, cut off or not what its index says. Of a data set without .idx, as they were before, all
    lines are read at once.

    dtype: of a number; columns: numbers a frame. clips: how many there should be, None where that is not known.
    """

    def __init__(self, folder, stem, ending, dtype, columns, clips):
        self.folder, self.ending, self.dtype, self.columns = folder, ending, dtype, columns
        self.frames = self.recordings = None
        self.lines, self.mapped = {}, lru_cache(8192)(self.map)  # of shards: rows that were read, and arrays
        with os.scandir(folder) as entries:
            size = {entry.name: entry.stat().st_size for entry in entries if entry.name.startswith(f"{stem}_")}
        self.names = sorted(name.removesuffix(".jsonl") for name in size if name.endswith(".jsonl"))
        for n, name in enumerate(self.names):
            if name != f"{stem}_{n:05d}":
                raise UserError(f"{folder / f'{stem}_{n:05d}.jsonl'} is missing: {AGAIN}")
        ends, splits = [], []
        for n, name in enumerate(self.names):
            if (file := f"{name}.idx") in size:
                index = read_index(f"{folder}/{file}", size[file], 4 if stem == "tokens" else 2)
            else:
                index = np.array([(row["offset"] + row["frames"], SPLITS.index(row["split"]))
                                  for row in self.read_lines(n)], np.int64).reshape(-1, 2)
            ends.append(index[:, 0])
            splits.append(index[:, -1])
            frames, file = int(index[-1, 0]) if len(index) else 0, f"{name}{ending}"
            if size.get(file, 0) != frames * columns * np.dtype(dtype).itemsize:
                what = (f"does not hold the {frames:,} x {columns} numbers of its index" if file in size else
                        "is missing")
                raise UserError(f"{folder / file} {what}: {AGAIN}")
        self.first = np.cumsum([0, *map(len, ends)])
        self.ends, self.split = (np.concatenate([np.zeros(0, np.int64), *some]) for some in (ends, splits))
        self.frames = np.diff(self.ends, prepend=0)
        begin = self.first[:-1][np.diff(self.first) > 0]
        self.frames[begin] = self.ends[begin]
        if (wrong := np.flatnonzero((self.frames <= 0) | (self.split < 0) | (self.split > 1))).size:
            path = folder / self.names[self.shard(int(wrong[0]))]
            raise UserError(f"{path}.idx is damaged, it has clips without frames or for neither train nor val: {AGAIN}")
        if clips not in (None, len(self.frames)):
            raise UserError(f"{folder} holds {len(self.frames):,} of its {clips:,} clips: {MISSING}")
        self.rows = Rows(self)

    def shard(self, i):
        """The number of the shard that clip i is in."""
        return int(np.searchsorted(self.first, i, "right")) - 1

    def read_lines(self, n):
        """The rows of shard n. Raises UserError for a line that is none, and for one at odds with the shard's index."""
        if n in self.lines:
            return self.lines[n]
        path = self.folder / f"{self.names[n]}.jsonl"
        rows = kept_rows(path)
        if self.frames is not None:
            here = slice(self.first[n], self.first[n + 1])
            indexed = [*zip(self.frames[here].tolist(), self.split[here].tolist())]
            if [(row["frames"], SPLITS.index(row["split"])) for row in rows] != indexed:
                raise UserError(f"{path} does not list the clips of its .idx: {AGAIN}")
        return self.lines.setdefault(n, rows)

    def clips(self, split):
        """Indices of the clips of "train", "val" or "all"; UserError where there is none."""
        of = self.split == SPLITS.index(split) if split != "all" else np.ones(len(self.split), bool)
        if clips := np.flatnonzero(of).tolist():
            return clips
        raise UserError(f"{self.folder} has no {split} clips")

    def numbers(self, i):
        """What the shard holds of clip i, (frames, columns), mapped."""
        return self.mapped(self.shard(i))[self.ends[i] - self.frames[i]:self.ends[i]]

    def map(self, n):
        return map_file(self.folder / f"{self.names[n]}{self.ending}", self.dtype, self.columns)

    def recording(self, i):
        """The path of the recording that clip i is of, or of a part. Raises UserError where that is not known."""
        root, row = Path(read_json(self.folder / "plan.json", root=str)["root"]), self.rows[i]
        if "source" not in row:  # of log-mels of before
            self.recordings = self.recordings or Recordings(root)
            return root / self.recordings.find(row["id"])
        return root / row["source"]


CLIP = {"id": str, "text": str, "split": str, "offset": int, "frames": int}  # what is known of each clip


def kept_rows(path, **kinds):
    """The rows of a shard's .jsonl but for those that were skipped. kinds: of what they have besides CLIP. Raises
    UserError for a line that is no such row, and for clips that do not stand one behind the other."""
    rows, end = [], 0
    for number, row in read_rows(path):
        if "skipped" in row:
            continue
        for key, kind in (CLIP | kinds).items():
            if not isinstance(value := row.get(key), kind) or isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"line {number} of {path} has the {key} {value!r}: {AGAIN}")
        if row["split"] not in SPLITS or not 0 < row["frames"] < 2**40 or row["offset"] != end:
            raise UserError(f"line {number} of {path} has the split {row['split']!r}, the offset {row['offset']} and "
                            f"{row['frames']} frames, where the clip before ends at {end}: {AGAIN}")
        rows.append(row)
        end += row["frames"]
    return rows


class Rows(Sequence):
    """The rows of a ClipDataset: a shard's are read when the first of them is asked for."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data.frames)

    def __getitem__(self, i):
        i = range(len(self))[i]
        n = self.data.shard(i)
        return self.data.read_lines(n)[i - self.data.first[n]]

    def __iter__(self):
        return chain.from_iterable(map(self.data.read_lines, range(len(self.data.names))))


def read_index(path, size, columns):
    """An .idx of so many bytes, (N, columns) int64. A small one is read: there may be more than a process may map."""
    if size % (8 * columns):
        raise UserError(f"{path} is cut off: {AGAIN}")
    if size > 1 << 20:
        return map_file(Path(path), np.int64, columns)
    return np.fromfile(path, np.int64).reshape(-1, columns)


class MelDataset(ClipDataset):
    """Read-only view of a prepared data set.

    rows: a dict a clip, with id, text, speaker, split, frames. stats: dataset_stats.json. grammar: JSGF or None.
    Raises UserError where the folder holds no data set, a damaged one, or one of other mel settings than `mel`.
    """

    def __init__(self, folder, mel, language="en"):
        folder = Path(folder)
        path = folder / "dataset_stats.json"
        if not path.exists():
            raise UserError(f"no prepared data set at {folder}: python data.py demo, or data.py ljspeech")
        self.stats = read_json(path, mel=dict, mel_mean=FiniteFloat, mel_std=Positive, clips=PositiveInt)
        if (made_with := read_mel_config(self.stats["mel"], path)) != mel:
            raise UserError(f"{folder} was made with {made_with}, but the config asks for {mel}")
        check_language(folder, self.stats, language)
        self.grammar = read_grammar(folder)
        super().__init__(folder, "mels", ".f16", np.float16, mel.n_mels, self.stats["clips"])

    def mel(self, i):
        """The log-mel of clip i, (frames, n_mels) float32, not normalised; `numbers` has it as it is stored."""
        return torch.from_numpy(self.numbers(i).astype(np.float32))


def check_language(folder, info, language):
    """Raises UserError where the texts of a data set were put into words in another language than this one."""
    if (found := info.get("language", "en")) != language:
        raise UserError(f"the texts of {folder} are in the language {found!r}, but the config's is {language!r}: "
                        f"--language {found}, or make the data set again with data.py … --language {language}")


def read_grammar(folder):
    path = folder / "grammar.jsgf"
    return read_text(path) if path.exists() else None


def check_tokens(folder, wanted):
    """codec.json and the grammar (JSGF or None) of a token data set. Raises UserError where the folder holds none, or
    one that is not what is wanted."""
    if not (folder / "codec.json").exists():
        raise UserError(f"no token data set at {folder}: python data.py tokenize makes one")
    codec = read_codec(folder)
    for key, value in wanted.items():
        found = codec[key]
        if value is not None and (abs(found - value) > 0.01 if key == "frame_rate" else found != value):
            raise UserError(f"the tokens at {folder} have {key} {found}, but the config asks for {value}")
    return codec, read_grammar(folder)


class TokenDataset(ClipDataset):
    """Read-only view of a token data set.

    rows: a dict a clip, with id, text ("" where it is not a whole recording), speaker, split, source, start (seconds),
    frames. codec: codec.json. grammar: JSGF or None. Raises UserError where the folder holds no token data set, a
    damaged one, or one that is not what the config asks for: the codec's name, codebooks, codebook_size, frame_rate.
    """

    def __init__(self, folder, **wanted):
        folder = Path(folder)
        self.codec, self.grammar = check_tokens(folder, wanted)
        if next(folder.glob("tokens_*.idx"), None) and not next(folder.glob("tokens_*.jsonl"), None):
            raise UserError(f"{folder} holds sentences, for the LLM TTS alone: it does not say which clips they are")
        super().__init__(folder, "tokens", ".u16", np.uint16, self.codec["codebooks"], self.codec.get("clips"))

    def codes(self, i):
        """The codes of clip i, (frames, Q) int64. Raises UserError for codes that the codec does not have."""
        codes = self.numbers(i).astype(np.int64)
        if codes.max() >= self.codec["codebook_size"]:
            raise UserError(f"clip {self.rows[i]['id']} of {self.folder} has a code {codes.max()}, beyond the "
                            f"codebook's {self.codec['codebook_size']}")
        return torch.from_numpy(codes)


class SentenceDataset:
    """Read-only view of a token data set of one codebook, for the LLM TTS: sentences, each of characters and codes.

    Nearly all of it stays on the disk, mapped, so that 31 million sentences can be opened. codec: codec.json. grammar:
    JSGF or None. speakers: their names. alphabet: that by which characters are numbered. Raises UserError where the
    folder holds no such data set, a damaged one, or one that is not what the config asks for: codec, sample_rate,
    frame_rate, codebook_size, characters.
    """

    def __init__(self, folder, **wanted):
        self.folder = folder = Path(folder)
        characters = wanted.pop("characters", "auto")
        self.codec, self.grammar = check_tokens(folder, wanted)
        self.stored = alphabet(self.codec.get("characters", SYMBOLS))
        self.read_in(self.stored.symbols if characters == "auto" else characters)
        self.endings = (".u16", np.uint16), (".ids" if self.stored.own else ".u8", self.stored.dtype)
        if (books := self.codec["codebooks"]) != 1:
            raise UserError(f"the tokens at {folder} have {books} codebooks, but the LLM TTS reads one: tokenize with "
                            "--codebooks 1, or with --codec neucodec")
        self.paths, self.index, self.embeddings = [], [], None  # of each shard its path and its index (N, 4)
        with os.scandir(folder) as entries:
            size = {entry.name: entry.stat().st_size for entry in entries if entry.name.startswith("tokens_")}
        names = sorted({name.rpartition(".")[0] for name in size if name.endswith((".u16", ".idx"))})
        if not (folder / "speakers.json").exists() or not all(f"{name}.idx" in size for name in names):
            raise UserError(f"{folder} holds no characters: tokenize again, what has been encoded stays")
        self.speakers = read_json(folder / "speakers.json")
        if not isinstance(self.speakers, list) or not all(isinstance(name, str) for name in self.speakers):
            raise UserError(f"{folder / 'speakers.json'} should hold a list of names: {AGAIN}")
        for name in names:
            index = read_index(path := f"{folder}/{name}.idx", size[f"{name}.idx"], 4)
            for (ending, dtype), end in zip(self.endings, index[-1, :2] if len(index) else (0, 0)):
                if size.get(name + ending) != np.dtype(dtype).itemsize * end:
                    raise UserError(f"{folder / name}{ending} does not hold what its index says: {AGAIN}")
            if ((np.diff(index[:, :2], axis=0, prepend=0) < 0).any() or (index[:, 2:] < (-1, 0)).any()
                    or (index[:, 2:] >= (max(1, len(self.speakers)), 2)).any()):
                raise UserError(f"{path} is damaged, it has clips that end before they begin, of no speaker or for "
                                f"neither train nor val: {AGAIN}")
            self.paths.append(folder / name)
            self.index.append(index)
        self.first = np.cumsum([0, *map(len, self.index)])
        if (clips := self.codec.get("clips")) != len(self):
            raise UserError(f"{folder} holds {len(self):,} of its {clips or 0:,} clips: {MISSING}")
        self.mapped, self.rows_of = lru_cache(8192)(self.map), lru_cache(8)(self.read_rows)

    def read_in(self, symbols):
        """Number characters as a model does that reads these. Raises UserError where it knows not all of the texts'."""
        if lacks := "".join(c for c in self.stored.symbols if c not in symbols):
            raise UserError(f"the texts of {self.folder} have the characters {lacks!r}, and the model reads "
                            f"{symbols!r}: --characters auto for a model that reads these too, or data.py tokenize "
                            "--characters again")
        self.alphabet = alphabet(symbols)
        self.number = np.array([*range(FIRST), *(self.alphabet.number[c] for c in self.stored.symbols)],
                               self.alphabet.dtype)

    def map(self, shard, column):
        """The codes (column 0) or the characters (1) of a shard."""
        ending, dtype = self.endings[column]
        return map_file(self.paths[shard].with_suffix(ending), dtype)

    def __len__(self):
        return int(self.first[-1])

    def clips(self, split):
        """Indices (N,) int64 of the clips of "train", "val" or "all" that have codes and a text; UserError for none."""
        found = [np.zeros(0, np.int64)]
        for first, index in zip(self.first, self.index):
            usable = (np.diff(index[:, :2], axis=0, prepend=0) > 0).all(1)
            if split != "all":
                usable &= index[:, 3] == SPLITS.index(split)
            found.append(first + np.flatnonzero(usable))
        if not len(found := np.concatenate(found)):
            raise UserError(f"{self.folder} has no {split} clips that have both codes and a text")
        return found

    def by_shard(self, indices):
        """For each shard that some clips are in: (its index, where in `indices` they stand, their rows in it)."""
        indices = np.asarray(indices, np.int64)
        shard = np.searchsorted(self.first, indices, "right") - 1
        order = np.argsort(shard, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
            if len(at):
                yield self.index[shard[at[0]]], at, indices[at] - self.first[shard[at[0]]]

    def lengths(self, indices):
        """How many codes and how many characters clips have, two (N,) int64 arrays."""
        lengths = np.zeros((2, len(indices)), np.int64)
        for index, at, rows in self.by_shard(indices):
            lengths[:, at] = (index[rows, :2] - np.where(rows[:, None] > 0, index[rows - 1, :2], 0)).T
        return lengths[0], lengths[1]

    def speaker(self, indices):
        """The speakers of clips, (N,) int64 numbers in `speakers`, -1 where there is none."""
        speakers = np.zeros(len(indices), np.int64)
        for index, at, rows in self.by_shard(indices):
            speakers[at] = index[rows, 2]
        return speakers

    def span(self, i, column):
        """The codes (column 0) or the characters (1) of clip i, mapped."""
        shard = self.first.searchsorted(i, "right") - 1
        row, index = i - self.first[shard], self.index[shard]
        return self.mapped(shard, column)[index[row - 1, column] if row else 0:index[row, column]]

    def codes(self, i):
        """The codes of clip i, (n,) uint16. Raises UserError for codes that the codec does not have."""
        codes, size = self.span(i, 0), self.codec["codebook_size"]
        if size < 65536 and size <= codes.max(initial=0):
            raise UserError(f"clip {i} of {self.folder} has a code {codes.max()}, beyond the codebook's {size}")
        return codes

    def characters(self, i):
        """The characters of clip i, (m,) uint8 or uint16. Raises UserError for characters that there are not."""
        characters = self.span(i, 1)
        if (last := characters.max(initial=0)) >= len(self.number):
            raise UserError(f"clip {i} of {self.folder} has a character {last}, beyond the last, "
                            f"{len(self.number) - 1}: {AGAIN}")
        return self.number[characters]

    def text(self, i):
        """The text of clip i as the model sees it: normalised, in lower case where the alphabet has no capitals."""
        return self.alphabet.text(self.characters(i))

    def name(self, i):
        """What to call clip i: its recording where the data set tells, else its number."""
        try:
            return str(self.recording(i))
        except UserError:
            return f"sentence {i} of {self.folder}"

    def recording(self, i):
        """The path of the recording that clip i is of. Raises UserError where the data set does not say."""
        return Path(read_json(self.folder / "plan.json", root=str)["root"]) / self.row(i)["source"]

    def row(self, i):
        """What was known of clip i as it was made, a dict with id, text, speaker and source, its recording's path below
        the corpus. Raises UserError where the data set does not say."""
        shard = int(np.searchsorted(self.first, i, "right")) - 1
        return self.rows_of(shard)[i - self.first[shard]]

    def read_rows(self, shard):
        path = self.paths[shard].with_suffix(".jsonl")
        if not path.exists():
            raise UserError(f"{self.folder} does not say which recordings its tokens are of")
        rows = kept_rows(path, source=str)
        if len(rows) != len(self.index[shard]):
            raise UserError(f"{path} does not list the clips of its .idx: {AGAIN}")
        return rows

    def load_embeddings(self, name, width):
        """Open the speaker embeddings that `embed` has stored. Raises UserError where there are none, of another width
        than wanted, or with numbers that are not finite."""
        try:
            found = read_json(self.folder / f"speaker_{name}.json", width=int)["width"]
        except UserError:
            raise UserError(f"{self.folder} holds no speaker embeddings by {name}: python data.py embed --data "
                            f"{self.folder} --embedder {name}") from None
        if found != width:
            raise UserError(f"the speaker embeddings by {name} at {self.folder} are {found} wide, but the config asks "
                            f"for {width}")
        paths = sorted(self.folder.glob(f"speaker_{name}_*.f32"))
        self.embeddings = [map_file(path, np.float32, width) for path in paths]
        if [len(x) for x in self.embeddings] != [*np.diff(self.first)]:
            raise UserError(f"the speaker embeddings by {name} at {self.folder} are not one a clip: delete "
                            f"speaker_{name}* there, and embed again")
        for first, path, vectors in zip(self.first, paths, self.embeddings):
            if (wrong := np.flatnonzero(~np.isfinite(vectors).all(1))).size:
                raise UserError(f"row {wrong[0]} of {path}, of {self.name(first + wrong[0])}, has numbers that are not "
                                f"finite: delete speaker_{name}* there, and give python data.py embed --data "
                                f"{self.folder} --embedder {name} again")

    def embedding(self, i):
        """The speaker embedding of clip i, (width,) float32."""
        shard = int(np.searchsorted(self.first, i, "right")) - 1
        return self.embeddings[shard][i - self.first[shard]].copy()


def best_fit(lengths, room):
    """Put sentences into rows of `room` tokens: the longest first, each into the fullest row that still has room for it
    (best-fit decreasing; as Ding et al., 2024, pack documents). lengths (N,), none above `room`. Returns lists of
    indices of `lengths`."""
    rows, free, sizes = [], {}, 0  # free: {room that is left: rows}; in `sizes` the bits of those that there are
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        if fits := sizes >> n:
            left = n + (fits & -fits).bit_length() - 1
            row = free[left].pop()
            sizes ^= (not free[left]) << left
        else:
            rows.append(row := [])
            left = room
        row.append(i)
        free.setdefault(left - n, []).append(row)
        sizes |= 1 << (left - n)
    return rows


def open_tokens(kind, folder, c, language):
    """The TokenDataset or SentenceDataset (`kind`) at `folder`, which has to be of the codec and geometry of the config
    `c`, with texts in this language and in its characters."""
    keys = "codec", "sample_rate", "frame_rate", "codebook_size", "codebooks" if kind is TokenDataset else "characters"
    data = kind(folder, **{key: getattr(c, key) for key in keys})
    check_language(folder, data.codec, language)
    return data


def keep_codec(folder, kept):
    """Copy what tells the codec of the tokens at `folder` into a run: they mean nothing without it."""
    kept.mkdir(exist_ok=True)
    for path in Path(folder).glob("codec.*"):
        shutil.copy(path, kept)
