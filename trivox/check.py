"""What a corpus holds, on one page that opens from the disk: before hours are spent on it."""

import os
import unicodedata
from collections import Counter
from urllib.parse import quote

import numpy as np
from tqdm import tqdm

from trivox.alphabet import UNKNOWN, Alphabet, folded
from trivox.common import UserError
from trivox.corpora import ending_of, read_corpus, tell_language
from trivox.files import write_whole
from trivox.normalise import normalise_text
from trivox.parallel import parallel
from trivox.plots import HERE, save, subplots
from trivox.recordings import rate_of, read_wav
from trivox.unusual import find_unusual, measure, value_of

MOST_UNUSUAL, MOST_SKIPPED, MOST_OTHERWISE = 20, 200, 100


def check_corpus(root, out, language="en", **listed):
    """Write out/index.html: durations, speaking rate, loudness, alphabet, what cannot be used, and the most unusual
    clips of the corpus at `root`, with players. language: of the texts. listed: more for `read_corpus`. Raises
    UserError as that does, and where no clip can be used."""
    clips, heldout = read_corpus(root, **listed)
    sizes = [0 if "skipped" in clip else (root / clip["source"]).stat().st_size for clip in clips]
    jobs = [(root, clip) for clip in clips]
    with parallel() as pool, tqdm(None, "listening", sum(sizes), unit="B", unit_scale=True, leave=False) as bar:
        for clip, size, heard in zip(clips, sizes, pool.map(_listen, jobs, chunksize=64)):
            clip |= heard
            bar.update(size)
    used, skipped = ([clip for clip in clips if ("skipped" in clip) == bad] for bad in (False, True))
    if not used:
        raise UserError(f"none of the {len(clips):,} clips of {root} can be used; of the first it is said: "
                        f"{skipped[0]['skipped']}")
    out.mkdir(parents=True, exist_ok=True)
    plot(out / "check.png", used)
    for clip in used:
        clip["read"] = normalise_text(clip["text"], True, language)
    tell_language(used, language)
    otherwise = [clip for clip in used if clip["read"] != " ".join(clip["text"].split())]
    facts = facts_of(used, skipped, heldout) | {"texts that are read otherwise": f"{len(otherwise):,}"}
    write_listening_page(out / "index.html", root.resolve().name, facts, "The most unusual clips",
                         unusual_clips(root, out, used), alphabet=alphabet(used, language), language=language,
                         skipped=skipped[:MOST_SKIPPED], left=max(0, len(skipped) - MOST_SKIPPED),
                         otherwise=otherwise[:MOST_OTHERWISE], others=max(0, len(otherwise) - MOST_OTHERWISE))
    for what, value in facts.items():
        print(f"{what}: {value}")
    print(f"{out / 'index.html'} shows it; the most unusual clips are to be heard there")


def _listen(job):
    """What is heard of a clip: its seconds, its sample rate and what `measure` says, or why it cannot be used."""
    root, clip = job
    if "skipped" in clip:
        return {}
    try:
        rate = rate_of(root / clip["source"]) or 16000  # where there is none, reading says why
        wav = read_wav(root / clip["source"], rate)
        if np.abs(wav).max() < 1e-4:
            raise UserError("it is silent")
        return {"seconds": len(wav) / rate, "rate": rate, **measure(wav, rate)}
    except UserError as e:
        return {"skipped": str(e)}


def facts_of(used, skipped, heldout):
    """{what: value}, texts, of the whole corpus."""
    seconds = np.array([clip["seconds"] for clip in used])
    speakers = Counter(clip["speaker"] for clip in used)
    speeds = [speed for clip in used if (speed := value_of(clip, "speed"))]
    few = [name for name, count in speakers.most_common() if count < 10]
    facts = {
        "clips": f"{len(used):,}, {seconds.sum() / 3600:.2f} h; {len(skipped):,} that cannot be used",
        "seconds a clip": f"{seconds.min():.2f} to {seconds.max():.2f}, median {np.median(seconds):.2f}; "
                          f"{(seconds > 11.88).sum():,} above 11.88, which the flow TTS leaves out",
        "loudness": "{:.0f} to {:.0f} dB of full scale, median {:.0f}".format(
            *np.quantile([clip["loudness"] for clip in used], (0, 1, 0.5))),
        "sample rates": ", ".join(f"{rate:,} Hz ({n:,})" for rate, n in Counter(c["rate"] for c in used).most_common()),
        "files": ", ".join(f"{end} ({n:,})" for end, n in Counter(ending_of(c["source"]) for c in used).most_common()),
        "speakers": f"{len(speakers):,}" + (f", {len(few):,} of them with fewer than 10 clips" if few else "")
        if {*speakers} - {""} else "none named",
        "held out": f"{len(heldout):,} by heldout.txt" if heldout is not None else "drawn by hash",
    }
    if speeds:
        facts["bytes of text a second"] = "{:.1f} to {:.1f}, median {:.1f}".format(*np.quantile(speeds, (0, 1, 0.5)))
    return facts


def alphabet(used, language):
    """The characters of the texts as they are spoken, [(character, its name, how often, whether Echolancer's alphabet
    has it, or its like)], the rarest first of those that it has not."""
    counts = Counter(c for clip in used for c in folded(clip["read"], "NFC", language == "und"))
    letters, rows = Alphabet(), []
    for c, n in counts.items():
        known = UNKNOWN not in letters.ids(normalise_text(f"x{c}x", language=language))
        rows += [(c, unicodedata.name(c, f"U+{ord(c):04X}").lower(), n, known)] * (c != " ")
    return sorted(rows, key=lambda row: (row[3], row[2] if not row[3] else -row[2], row[0]))


def plot(path, used):
    """Histograms of seconds, speaking rate and loudness."""
    fig, axes = subplots(1, 3, 12, 3)
    speeds = [speed for clip in used if (speed := value_of(clip, "speed"))]
    for axis, values, label in zip(axes[0], ([c["seconds"] for c in used], speeds, [c["loudness"] for c in used]),
                                   ("seconds", "bytes of text a second", "loudness, dB of full scale")):
        axis.hist(values, 60)
        axis.set(xlabel=label, ylabel="clips", yscale="log" if len(used) > 1000 else "linear")
    save(fig, path)


def unusual_clips(root, out, used):
    """The most unusual clips, as `write_listening_page` shows them."""
    shown = {}
    for kind, far, clip, why in sorted(find_unusual(used, 0), key=lambda found: -found[1]):
        if clip["id"] in shown:
            shown[clip["id"]]["why"] += [why] if far > 1 else []
        elif len(shown) < MOST_UNUSUAL:
            shown[clip["id"]] = {"id": clip["id"], "speaker": clip["speaker"], "text": clip["text"],
                                 "read": clip["read"] if clip["read"] != " ".join(clip["text"].split()) else "",
                                 "url": link(root / clip["source"], out), "why": [why]}
    return [*shown.values()]


def link(file, folder):
    """The address of a file for a page in a folder."""
    return quote(os.fsencode(os.path.relpath(os.path.abspath(file), os.path.abspath(folder))))


NOTHING = {"alphabet": [], "skipped": [], "left": 0, "language": "en", "otherwise": [], "others": 0}


def write_listening_page(path, name, facts, heading, clips, **more):
    """A page with facts, {what: value}, and under a heading clips with players: dicts of id, speaker, text, url, and
    reasons `why`. more: what else check.html shows."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    write_whole(path, environment.get_template("check.html").render(
        name=name, facts=facts, heading=heading, clips=clips, **NOTHING | more))
