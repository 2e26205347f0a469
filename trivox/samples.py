"""The samples of a run, for its page: the same prompts, made again and again while it trains.

A prompt is a dict: request, what `Speaker.speak` is asked for; label, what the page says; reference, a Clip of the
recording that is heard beside it, or None.
"""

import json

from trivox.files import write_whole
from trivox.judges import word_error_rate
from trivox.metrics import mel_distances
from trivox.plots import save_clip


def write_references(speaker, prompts, folder):
    """The recordings that are heard beside the prompts. Raises UserError for a prompt that cannot be spoken."""
    for n, prompt in enumerate(prompts):
        request = {key: x for key, x in prompt["request"].items() if key != "text"}
        speaker.parts(prompt["request"].get("text"), speaker.settings(request))
        if prompt["reference"]:
            save_clip(folder / f"{n:03d}", prompt["reference"].wav, prompt["reference"].mel, speaker.mel)


def write_samples(speaker, prompts, judges, folder):
    """Make the prompts. judges: recognisers, of which the first is asked. Returns the word error rate of those prompts
    that have a text, or None."""
    clips, rows = speaker.speak([p["request"] for p in prompts]), [{"text": prompt["label"]} for prompt in prompts]
    for row, prompt in zip(rows, prompts):
        if (text := prompt["request"].get("text")) and (read := speaker.became(text)):
            row["read"] = read
    for n, clip in enumerate(clips):
        save_clip(folder / f"{n:03d}", clip.wav, clip.mel, speaker.mel)
    spoken = [n for n, prompt in enumerate(prompts) if judges and prompt["request"].get("text")]
    texts = [prompts[n]["request"]["text"] for n in spoken]
    heard = judges[0][1]([clips[n].wav for n in spoken], speaker.sample_rate) if spoken else []
    for n, text, one in zip(spoken, texts, heard):
        rows[n] |= {"heard": one, "wer": word_error_rate([text], [one], speaker.language)}
        if reference := prompts[n]["reference"]:
            rows[n]["mel_distance"] = mel_distances(clips[n].mel, reference.mel)[0]
    write_whole(folder / "clips.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return word_error_rate(texts, heard, speaker.language) if texts else None
