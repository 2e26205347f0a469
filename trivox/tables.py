"""What evaluate.py found, told: tables, how to read them, and which of two runs is better."""

import math

from trivox.common import UserError
from trivox.judges import first_of, paired

# A row: label, how a figure is written, what stands beside it
SPEECH = [
    ("word error rate", "{wer:.1%}{wer_range}", ""),
    ("the same by the second judge", "{wer_2:.1%}{wer_2_range}", ""),
    ("words other, missing, added", "{substitutions}, {deletions}, {insertions} of {words}", ""),
    ("character error rate", "{cer:.1%}{cer_range}", ""),
    ("wholly right", "{exact:.0f} of {prompts}", ""),
    ("more than half wrong", "{mostly_wrong} of {prompts}", ""),
    ("quality, predicted (DNSMOS)", "{mos:.2f}{mos_range}", ""),
    ("likeness of voice (GE2E)", "{similarity:.3f}{similarity_range}", ""),
    ("duration error", "{duration_error:.1%}", ""),
]
FLOW_ROWS = [
    *SPEECH,
    ("mel-cepstral distortion", "{mcd:.2f} dB", ""),
    ("log-mel distance", "{mel_distance:.3f}", ""),
]
CODEC_ROWS = [
    ("parameters", "{parameters:,}", ""),
    ("checkpoint", "{checkpoint}", ""),
    ("steps a second", "{steps_per_second:.2f}", ""),
    ("validation loss", "{val_loss:.4f}", "{unigram:.4f} training unigrams"),
    ("perplexity", "{perplexity:.2f}", ""),
    ("below the unigrams", "{below_unigram:.1%}", ""),
    ("accuracy", "{accuracy:.1%}", ""),
    *SPEECH,
    ("Fréchet distance", "{frechet:.2f}", "{frechet_halves:.2f} halves of the recordings, {frechet_noise:.0f} noise"),
    ("kernel distance (KAD)", "{kad:.2f}", "{kad_halves:.2f} halves of the recordings, {kad_noise:.0f} noise"),
    ("coherence", "{coherence:.3f}", "{coherence_real:.3f} recordings, {coherence_shuffled:.3f} shuffled"),
]
LLM_ROWS = [
    ("parameters", "{parameters:,}", ""),
    ("checkpoint", "{checkpoint}", ""),
    ("steps a second", "{steps_per_second:.2f}", ""),
    ("perplexity of characters", "{text_perplexity:.2f}", ""),
    ("perplexity of codes", "{audio_perplexity:.2f}", "{unigram_perplexity:.0f} training unigrams"),
    *SPEECH,
    ("speaker named, trained voices", "{speaker_accuracy:.1%} of {speaker_clips}",
     "{speaker_ceiling_accuracy:.1%} of the recordings through the codec, {voices} voices"),
    ("speaker named, untrained voices", "{speaker_accuracy_new:.1%} of {speaker_clips_new}",
     "{speaker_ceiling_accuracy_new:.1%} of the recordings through the codec, {voices_new} voices"),
]


ROWS = {"flow": FLOW_ROWS, "codec": CODEC_ROWS, "llm": LLM_ROWS}
ENDINGS = "_ceiling", "_recordings"  # of figures of the recordings: after vocoder or codec, and as they are


def figures(summary, ending=""):
    """The figures of a summary whose names have an ending, without it; beside each that may have an interval its range,
    a text, which is empty where there is none."""
    own = {key.removesuffix(ending): value for key, value in summary.items() if key.endswith(ending)}
    for key, form in (("wer", ".1%"), ("wer_2", ".1%"), ("cer", ".1%"), ("mos", ".2f"), ("similarity", ".3f")):
        low_high = own.get(f"{key}_interval")
        own[f"{key}_range"] = f" ({low_high[0]:{form}} to {low_high[1]:{form}})" if low_high else ""
    return {"prompts": summary.get("prompts")} | own


def cells(system, names, summaries):
    """The table of some runs of one system, a list of rows, the first of which are the names of its columns: those of
    the runs, and of what stands beside, as the first run has it. Rows and columns without a figure are left out."""
    def written(form, values):
        try:
            return form.format(**values)
        except (KeyError, TypeError):  # not measured
            return ""

    first, through = summaries[0], summaries[0].get("vocoder", "the codec")
    runs, beside = [figures(summary) for summary in summaries], [figures(first, end) for end in ENDINGS]
    found = [["", *names, f"recordings through {through}", "recordings", "beside it"]]
    for label, form, other in ROWS[system] + (book_rows(first) if "books" in first else []):
        row = [label, *(written(form, values) for values in (*runs, *beside)), written(other, runs[0])]
        found += [row] * any(row[1:])
    return [*zip(*[column for n, column in enumerate(zip(*found)) if n <= len(names) or any(column[1:])])]


def table(system, names, summaries):
    """`cells` as lines of text."""
    rows = cells(system, names, summaries)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def book_rows(summary):
    """Rows for the codebooks of a codec LM."""
    return [row for q in range(len(summary["books"])) for row in (
        (f"book {q}: loss", f"{{books[{q}][loss]:.4f}}", f"{{books[{q}][unigram]:.4f}} training unigrams"),
        (f"book {q}: below, right", f"{{books[{q}][below_unigram]:.1%}}, {{books[{q}][accuracy]:.1%}}", ""))]


def describe(system, names, summaries):
    """The table of some runs of one system, and how to read it."""
    first = summaries[0]
    lines = table(system, names, summaries)
    if "embedding" in first:
        lines.append(f"Fréchet and kernel distance of {first['embedding']}; {first['clips']} held-out clips")
        if "coherence_ranked" in first:
            lines.append(f"{first['coherence_ranked']:.0%} of the recordings have more coherence than 8 shuffles each")
    if "testset" in first:
        lines.append(f"the test list {first['testset']}; its papers are judged by larger recognisers, so beside their "
                     "figures stand those of the recordings here")
    if "judge" in first:
        second = f"; the second {first['judge_2']}" if "judge_2" in first else ""
        lines.append(f"judge of words: {first['judge']}{second}")
        if "mos" in first and (few := first_of(first["prompts"])):
            lines.append(f"predicted quality{few}")
        lines.append(f"by chance: {first['wer_other_sentence']:.0%} for another sentence, {first['wer_noise']:.0%} for "
                     "noise")
    return lines


def describe_paired(names, a, b):
    """Lines that tell whether the second of two runs is better, by the rows of each."""
    try:
        count, found = paired(a, b)
    except ValueError as e:
        raise UserError(f"{e}, so they cannot be compared") from None
    lines = []
    for one in found:
        form = ".1%" if one["name"].endswith(("rate", "error")) else ".3f"
        low, high = one["interval"] or (-math.inf, math.inf)
        told = "told apart" if not low <= 0 <= high else "not told apart"
        enough = f"; {one['sentences']:,} sentences would tell a difference of this size" if one["sentences"] else ""
        name = one["name"] + (f" ({one['pairs']} of them)" if one["pairs"] < count else "")
        lines.append(f"{name}: {one['a']:{form}} for {names[0]}, {one['b']:{form}} for {names[1]}; difference "
                     f"{one['difference']:+{form}} ({low:+{form}} to {high:+{form}}), {told}{enough}")
    return [f"{names[1]} beside {names[0]} on the {count} sentences that both spoke:", *lines]
