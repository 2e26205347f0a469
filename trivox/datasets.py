"""Data sets as trainers read them: log-mels, codes, sentences. prepare.py makes them.

A data set is a folder of shards made from a corpus: `mels_00000.f16` holds log-mels, (frames, n_mels) float16, one clip
after the other, and `mels_00000.jsonl` a line a clip. `dataset_stats.json` is written last and marks a whole one. A
data set of tokens is made likewise; what is written last is `codec.json`, and beside it mel_rvq leaves its centroids,
`codec.safetensors`. It holds

    tokens_00000.u16             codes, (frames, Q) uint16
    tokens_00000.jsonl           a line a clip, for TokenDataset; Emilia has none
    tokens_00000.u8              the characters of the clips' normalised texts, uint8
    tokens_00000.idx             four int64 a clip, for SentenceDataset: the ends of its codes and of its characters,
                                 counted from the shard's start, its speaker (-1 for none), and 0 for train or 1 for val
    speakers.json                the speakers' names, sorted
    speaker_NAME_00000.f32       speaker embeddings in the order of the .idx, (N, width) float32; when all of them are
                                 there, `speaker_NAME.json` is written
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from trivox.audio import MelConfig
from trivox.codecs import read_codec
from trivox.common import UserError
from trivox.files import map_file, read_json, read_jsonl
from trivox.text import characters_text

SPLITS = ("train", "val")


class MelDataset:
    """Read-only view of a prepared data set.

    rows: a dict a clip, with id, text, speaker, split, frames. stats: dataset_stats.json. grammar: JSGF or None.
    Raises UserError where the folder holds no data set, or one of other mel settings than `mel`.
    """

    def __init__(self, folder, mel):
        folder = Path(folder)
        try:
            self.stats = json.loads((folder / "dataset_stats.json").read_text())
        except (OSError, ValueError):
            raise UserError(f"no prepared data set at {folder}: python data.py demo, or data.py ljspeech") from None
        if (made_with := MelConfig(**self.stats["mel"])) != mel:
            raise UserError(f"{folder} was made with {made_with}, but the config asks for {mel}")
        self.folder, self.rows, self.shards = folder, [], []
        grammar = folder / "grammar.jsgf"
        self.grammar = grammar.read_text() if grammar.exists() else None
        for index in sorted(folder.glob("mels_*.jsonl")):
            rows = [json.loads(line) for line in index.open(encoding="utf-8")]
            if all("skipped" in row for row in rows):  # an empty file cannot be mapped
                continue
            self.rows += [{**row, "shard": len(self.shards)} for row in rows if "skipped" not in row]
            shard = np.asarray(np.memmap(index.with_suffix(".f16"), np.float16, "r"))
            self.shards.append(shard.reshape(-1, mel.n_mels))

    def clips(self, split):
        """Indices of the clips of "train", "val" or "all"; UserError where there is none."""
        if clips := [i for i, row in enumerate(self.rows) if split in (row["split"], "all")]:
            return clips
        raise UserError(f"{self.folder} has no {split} clips")

    def stored(self, i):
        """The log-mel of clip i, (frames, n_mels) float16, mapped, not normalised."""
        row = self.rows[i]
        return self.shards[row["shard"]][row["offset"]:row["offset"] + row["frames"]]

    def mel(self, i):
        """The same as a tensor, float32."""
        return torch.from_numpy(self.stored(i).astype(np.float32))


def check_tokens(folder, wanted):
    """codec.json and the grammar (JSGF or None) of a token data set. Raises UserError where the folder holds none, or
    one that is not what is wanted."""
    if not (folder / "codec.json").exists():
        raise UserError(f"no token data set at {folder}: python data.py tokenize makes one")
    codec, grammar = read_codec(folder), folder / "grammar.jsgf"
    for key, value in wanted.items():
        found = codec[key]
        if value is not None and (abs(found - value) > 0.01 if key == "frame_rate" else found != value):
            raise UserError(f"the tokens at {folder} have {key} {found}, but the config asks for {value}")
    return codec, grammar.read_text() if grammar.exists() else None


class TokenDataset:
    """Read-only view of a token data set.

    rows: a dict a clip, with id, text ("" where it is not a whole recording), speaker, split, source, start (seconds),
    frames. codec: codec.json. grammar: JSGF or None. Raises UserError where the folder holds no token data set, a
    damaged one, or one that is not what the config asks for: the codec's name, codebooks, codebook_size, frame_rate.
    """

    def __init__(self, folder, **wanted):
        folder = Path(folder)
        self.codec, self.grammar = check_tokens(folder, wanted)
        self.folder, self.rows, self.shards = folder, [], []
        for index in sorted(folder.glob("tokens_*.jsonl")):
            rows = [{**row, "shard": len(self.shards)} for row in read_jsonl(index) if "skipped" not in row]
            shard = index.with_suffix(".u16")
            shape = sum(row["frames"] for row in rows), self.codec["codebooks"]
            if not shard.exists() or shard.stat().st_size != 2 * shape[0] * shape[1]:
                raise UserError(f"{shard} does not hold the {shape[0]} x {shape[1]} codes of its index: tokenize again")
            self.rows += rows
            self.shards.append(np.memmap(shard, np.uint16, "r", shape=shape) if rows else None)

    def clips(self, split):
        """Indices of the clips of "train", "val" or "all"; UserError where there is none."""
        if clips := [i for i, row in enumerate(self.rows) if split in (row["split"], "all")]:
            return clips
        raise UserError(f"{self.folder} has no {split} clips")

    def codes(self, i):
        """The codes of clip i, (frames, Q) int64. Raises UserError for codes that the codec does not have."""
        row = self.rows[i]
        codes = self.shards[row["shard"]][row["offset"]:row["offset"] + row["frames"]].astype(np.int64)
        if codes.max() >= self.codec["codebook_size"]:
            raise UserError(f"clip {row['id']} of {self.folder} has a code {codes.max()}, beyond the codebook's "
                            f"{self.codec['codebook_size']}")
        return torch.from_numpy(codes)


class SentenceDataset:
    """Read-only view of a token data set of one codebook, for the LLM TTS: sentences, each of characters and codes.

    All of it stays on the disk, mapped, so that 31 million sentences can be opened. codec: codec.json. grammar: JSGF or
    None. speakers: their names. Raises UserError where the folder holds no such data set, a damaged one, or one that is
    not what the config asks for: codec, sample_rate, frame_rate, codebook_size.
    """

    def __init__(self, folder, **wanted):
        self.folder = folder = Path(folder)
        self.codec, self.grammar = check_tokens(folder, wanted)
        if (books := self.codec["codebooks"]) != 1:
            raise UserError(f"the tokens at {folder} have {books} codebooks, but the LLM TTS reads one: tokenize with "
                            "--codebooks 1, or with --codec neucodec")
        self.shards, self.embeddings = [], None  # of each shard codes (frames,), characters and index (N, 4)
        paths = sorted({path.with_suffix("") for path in folder.glob("tokens_*.*") if path.suffix in (".u16", ".idx")})
        if not all(path.exists() for path in [folder / "speakers.json", *(p.with_suffix(".idx") for p in paths)]):
            raise UserError(f"{folder} holds no characters: tokenize again, what has been encoded stays")
        for path in paths:
            index = map_file(path.with_suffix(".idx"), np.int64, 4)
            shard = [map_file(path.with_suffix(".u16"), np.uint16), map_file(path.with_suffix(".u8"), np.uint8)]
            if [len(x) for x in shard] != [*index[-1, :2]] if len(index) else any(map(len, shard)):
                raise UserError(f"{path}.u16 and .u8 do not hold what their index says: make the data set again")
            self.shards.append((*shard, index))
        self.first = np.cumsum([0, *(len(index) for *_, index in self.shards)])
        self.speakers = read_json(folder / "speakers.json")
        if len(self) != self.codec["clips"]:
            raise UserError(f"{folder} holds {len(self):,} of its {self.codec['clips']:,} clips: make it again")

    def __len__(self):
        return int(self.first[-1])

    def clips(self, split):
        """Indices (N,) int64 of the clips of "train", "val" or "all" that have codes and a text; UserError for none."""
        found = [np.zeros(0, np.int64)]
        for first, (*_, index) in zip(self.first, self.shards):
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
                yield self.shards[shard[at[0]]][2], at, indices[at] - self.first[shard[at[0]]]

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
        row, index = i - self.first[shard], self.shards[shard][2]
        return self.shards[shard][column][index[row - 1, column] if row else 0:index[row, column]]

    def codes(self, i):
        """The codes of clip i, (n,) uint16. Raises UserError for codes that the codec does not have."""
        codes, size = self.span(i, 0), self.codec["codebook_size"]
        if size < 65536 and size <= codes.max(initial=0):
            raise UserError(f"clip {i} of {self.folder} has a code {codes.max()}, beyond the codebook's {size}")
        return codes

    def characters(self, i):
        """The characters of clip i, (m,) uint8."""
        return self.span(i, 1)

    def text(self, i):
        """The text of clip i as the model sees it: normalised, in lower case."""
        return characters_text(self.characters(i))

    def recording(self, i):
        """The path of the recording that clip i is of. Raises UserError where the data set does not say."""
        shard = int(np.searchsorted(self.first, i, "right")) - 1
        path = self.folder / f"tokens_{shard:05d}.jsonl"
        if not path.exists():
            raise UserError(f"{self.folder} does not say which recordings its tokens are of")
        rows = [row for row in read_jsonl(path) if "skipped" not in row]
        return Path(read_json(self.folder / "plan.json")["root"]) / rows[i - self.first[shard]]["source"]

    def load_embeddings(self, name, width):
        """Open the speaker embeddings that `embed` has stored. Raises UserError where there are none, or of another
        width than wanted."""
        try:
            found = read_json(self.folder / f"speaker_{name}.json")["width"]
        except (OSError, ValueError):
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


def open_tokens(kind, folder, c, kept=None):
    """The TokenDataset or SentenceDataset (`kind`) at `folder`, which has to be of the codec and geometry of the config
    `c`, and where a codec of our own is kept in the folder `kept`, made with that very one."""
    wanted = {key: getattr(c, key) for key in ("codec", "sample_rate", "frame_rate", "codebook_size")}
    data = kind(folder, **wanted, **({"codebooks": c.codebooks} if kind is TokenDataset else {}))
    check_codec(folder, kept or folder)
    return data


def check_codec(folder, kept):
    """Raises UserError where a codec of our own is kept in the folder `kept` that did not make the tokens at
    `folder`."""
    mine, theirs = (Path(place) / "codec.safetensors" for place in (kept, folder))
    if theirs.exists() and mine.exists() and mine.read_bytes() != theirs.read_bytes():
        raise UserError(f"the codec that made the tokens at {folder} was fitted anew: it is not that of {kept}; "
                        "data.py tokenize --codec takes the folder of one to use again")


def keep_codec(folder, kept):
    """Copy what tells the codec of the tokens at `folder` into a run: they mean nothing without it."""
    kept.mkdir(exist_ok=True)
    for path in Path(folder).glob("codec.*"):
        shutil.copy(path, kept)
