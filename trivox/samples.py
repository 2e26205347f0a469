"""The samples of a run, for its page: the same prompts, made again and again while it trains.

A prompt is a dict: request, what `Speaker.speak` is asked for; label, what the page says; reference, a Clip of the
recording that is heard beside it, or None.
"""

import json

from trivox.files import write_whole
from trivox.metrics import mel_distances, word_error_rate
from trivox.plots import save_clip


def write_references(speaker, prompts, folder):
    """The recordings that are heard beside the prompts. Raises UserError for a prompt that cannot be spoken."""
    for n, prompt in enumerate(prompts):
        request = {key: x for key, x in prompt["request"].items() if key != "text"}
        speaker.parts(prompt["request"].get("text"), speaker.settings(request))
        if prompt["reference"]:
            save_clip(folder / f"{n:03d}", prompt["reference"].wav, prompt["reference"].mel, speaker.mel)


def write_samples(speaker, prompts, hear, folder):
    """Make the prompts. hear: a recogniser, or None. Returns the word error rate of those with a text, or None."""
    texts, heard, rows = [], [], []
    for n, (clip, prompt) in enumerate(zip(speaker.speak([p["request"] for p in prompts]), prompts)):
        rows.append({"text": prompt["label"]})
        if hear and (text := prompt["request"].get("text")):
            texts, heard = [*texts, text], [*heard, hear(clip.wav, speaker.sample_rate)]
            rows[n] |= {"heard": heard[-1], "wer": word_error_rate(texts[-1:], heard[-1:])}
            if prompt["reference"]:
                rows[n]["mel_distance"] = mel_distances(clip.mel, prompt["reference"].mel)[0]
        save_clip(folder / f"{n:03d}", clip.wav, clip.mel, speaker.mel)
    write_whole(folder / "clips.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return word_error_rate(texts, heard) if texts else None
