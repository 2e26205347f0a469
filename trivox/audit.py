"""Which transcripts of a data set are wrong, as a trained model tells, and a recogniser.

A model predicts a recording better when it reads the right text. A clip that is predicted no better with its text than
without it has another's, perhaps; the recogniser hears those where the text helps least.
"""

import csv
import io

import jiwer
import numpy as np
import torch
from tqdm import tqdm

from model import delayed_batch, packed_batch, sentence
from trivox.check import link, write_listening_page
from trivox.common import UserError, autocast
from trivox.cross_entropy import linear_cross_entropy
from trivox.datasets import MelDataset, SentenceDataset, TokenDataset, open_tokens
from trivox.files import padded, write_whole
from trivox.recognisers import compared_words, load_recognisers
from trivox.recordings import read_recording

TIMES = 0.6, 0.8, 0.95  # of the flow: where the text helps most
BATCH = 16
WRONG = 0.5  # the share of words heard otherwise from which on a clip is to be dropped
SHOWN = 100
FIELDS = "id", "drop", "gain", "wer", "text", "heard", "source"


def audit(speaker, data_dir, out, recogniser, share):
    """Write out/audit.csv, the clips of a data set from the likeliest to be wrong on, and out/index.html, the first of
    them with players.

    speaker: of trivox/speak.py. recogniser: names as of `load_recognisers`. share: of the clips, those whose text helps
    least, which the recogniser hears. A clip is marked in the column `drop` where its text does not help (gain ≤ 0) or
    more than half of its words are heard otherwise; `data.py --drop` leaves the marked ones out. Raises UserError for a
    model that reads no text.
    """
    kind = {"flow": MelDataset, "codec": TokenDataset, "llm": SentenceDataset}[speaker.system]
    if speaker.system == "codec" and not speaker.c.cross_every:
        raise UserError("this codec LM was trained without text, so that it cannot tell whether one is right")
    data = (MelDataset(data_dir, speaker.mel, speaker.language) if kind is MelDataset else
            open_tokens(kind, data_dir, speaker.c, speaker.language))
    clips = {i: clip_of(data, i) for i in data.clips("all")}
    judges = load_recognisers(recogniser, [clip["text"] for clip in clips.values()], data.grammar, speaker.device,
                              language=speaker.language)
    what, hear = judges[0] if judges else ("no recogniser", None)
    gains = {"flow": flow_gains, "codec": codec_gains, "llm": llm_gains}[speaker.system](speaker, data)
    rows = sorted((clips[i] | {"gain": gain} for i, gain in gains.items()), key=lambda row: row["gain"])
    suspects = rows[:round(share * len(rows))] if hear else []
    print(f"{what} hears the {len(suspects):,} clips, of {len(rows):,}, that their texts help least", flush=True)
    for at in range(0, len(suspects), 64):
        some = suspects[at:at + 64]
        for row, heard in zip(some, hear([read_recording(row["source"], 16000)[0] for row in some], 16000)):
            asked, got = (compared_words(text, speaker.language) for text in (row["text"], heard))
            row |= {"heard": heard, "wer": jiwer.wer(asked, got) if asked else float(bool(got))}
    for row in rows:
        row["drop"] = "x" if row["gain"] <= 0 or row.get("wer", 0) > WRONG else ""
    rows.sort(key=lambda row: (-min(1, row.get("wer", 0)) if row.get("wer", 0) > WRONG else 0, row["gain"]))
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, FIELDS)
    writer.writeheader()
    writer.writerows(row | {key: round(row[key], 4) for key in ("gain", "wer") if key in row} for row in rows)
    write_whole(out / "audit.csv", content.getvalue())
    shown = [{"id": row["id"], "speaker": "", "text": row["text"], "why": why(row), "url": link(row["source"], out),
              "read": speaker.sayable(row["text"]) and speaker.became(row["text"])} for row in rows[:SHOWN]]
    marked = sum(bool(row["drop"]) for row in rows)
    facts = {"clips": f"{len(rows):,}", "to be dropped": f"{marked:,}, marked in audit.csv", "heard by": what,
             "gain": "how much better the recording is predicted with the text than without it"}
    write_listening_page(out / "index.html", f"Audit of {data_dir}", facts, "Likeliest to be wrong", shown)
    print(f"{out / 'audit.csv'}: {marked:,} of {len(rows):,} clips are marked; listen to {out / 'index.html'}, change "
          f"the marks as you like, and data.py … --drop {out / 'audit.csv'} leaves the marked ones out")


def why(row):
    """Reasons, for people."""
    heard = f"{row['wer']:.0%} of its words are heard otherwise: {row['heard'] or 'nothing'}" if row.get("wer") else ""
    return [*filter(None, [heard]), f"with its text predicted {100 * row['gain']:.1f}% better"]


def clip_of(data, i):
    """A clip's id, text and source, the path of its recording."""
    row = data.row(i) if isinstance(data, SentenceDataset) else data.rows[i]
    return {"id": row["id"], "text": row["text"], "source": str(data.recording(i))}


def gains_of(clips, losses, what):
    """{clip: by what share its loss is lower with its text than without}. losses: a function from some clips and
    whether with their text to (clips,) losses."""
    found = {}
    for at in tqdm(range(0, len(clips), BATCH), what, leave=False, disable=None):
        some = clips[at:at + BATCH]
        own, without = losses(some, True), losses(some, False)
        found |= dict(zip(some, (1 - own / without).tolist()))
    return found


def each_loss(x, weight, targets):
    """The cross-entropy of each clip, (B,): x (B, T, D), targets (B, T, Q), weight as of `linear_cross_entropy`."""
    return torch.stack([linear_cross_entropy(own, weight, of)[0] for own, of in zip(x, targets)]).cpu().numpy()


@torch.no_grad()
def flow_gains(speaker, data):
    """By the velocity's squared error at TIMES, with the same noise."""
    model, c = speaker.model.eval(), speaker.c
    clips = sorted((i for i in data.clips("all") if data.rows[i]["text"]), key=lambda i: int(data.frames[i]))

    def losses(some, own):
        frames = [int(data.frames[i]) for i in some]
        longest = -(-max(frames) // (16 * c.patch)) * 16 * c.patch
        mel = padded([data.numbers(i) for i in some], longest).float().to(speaker.device)
        x = (mel - model.mel_mean) / model.mel_std
        noise = torch.stack([torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(i)) for i in some]).to(x)
        text, length = (y.to(speaker.device) for y in speaker.features(
            [data.rows[i]["text"] if own else "" for i in some], multiple=16))
        frames = torch.tensor(frames, device=x.device)
        real = torch.arange(longest, device=x.device) < frames[:, None]
        total = 0
        for t in TIMES:
            with autocast(speaker.device, speaker.dtype):
                velocity, _ = model((1 - t) * x + t * noise, torch.full((len(some),), t).to(x), frames, text, length)
            total = total + ((velocity.float() - (noise - x)).square().mean(-1) * real).sum(1) / frames
        return total.cpu().numpy()

    return gains_of(clips, losses, "predicting log-mels")


@torch.no_grad()
def codec_gains(speaker, data):
    """By the cross-entropy of the codes."""
    model, c = speaker.model.eval(), speaker.c
    clips = sorted((i for i in data.clips("all") if data.rows[i]["text"]), key=lambda i: int(data.frames[i]))

    def losses(some, own):
        codes = [data.codes(i)[:c.context - c.codebooks] for i in some]
        tokens = delayed_batch(c, codes, multiple=16).to(speaker.device)
        seconds = torch.tensor([len(x) / c.frame_rate for x in codes], device=speaker.device)
        text, length = (y.to(speaker.device) for y in speaker.features(
            [data.rows[i]["text"] if own else "" for i in some], multiple=16))
        with autocast(speaker.device, speaker.dtype):
            x, _ = model(tokens[:, :-1], text, length, seconds)
            targets = tokens[:, 1:].masked_fill(tokens[:, 1:] >= c.codebook_size, -100)
            return each_loss(x, model.heads.weight, targets)

    return gains_of(clips, losses, "predicting codes")


@torch.no_grad()
def llm_gains(speaker, data):
    """By the cross-entropy of the codes, beside that with the text of a clip that is about as long: this model is never
    without one."""
    model, c = speaker.model.eval(), speaker.c
    clips = data.clips("all")
    lengths = sum(data.lengths(clips)) + 3
    clips = clips[np.argsort(lengths, kind="stable")][:int((lengths <= c.context).sum())].tolist()
    other = dict(zip(clips, [*clips[1:], *clips[:1]]))
    if c.speaker_width:
        data.load_embeddings(speaker.config["speaker_embedder"], c.speaker_width)

    def losses(some, own):
        rows = [[sentence(c, data.characters(i if own else other[i]), data.codes(i))] for i in some]
        steps = min(c.context, -(-(max(len(row[0]) for row in rows) - 1) // 16) * 16)
        tokens, targets, _ = (x.to(speaker.device) for x in packed_batch(rows, steps))
        targets = targets.masked_fill((targets < c.first_code) | (targets == c.audio_bos), -100)
        voices = torch.stack([torch.from_numpy(data.embedding(i)) for i in some]).to(
            speaker.device) if c.speaker_width else None
        with autocast(speaker.device, speaker.dtype):
            return each_loss(model(tokens, None, voices), model.embedding.weight, targets[..., None])

    return gains_of(clips, losses, "predicting codes")
