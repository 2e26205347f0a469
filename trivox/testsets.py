"""Test lists that papers report figures on: what is to be said, in whose voice, and the recordings of it.

None of them is here. The list and its audio lie in one folder, as they come:

    seedtts         Seed-TTS's (Anastassiou et al., 2024), of one language, as seed-tts-eval has it: meta.lst with its
                    prompt-wavs/ and wavs/
    librispeech_pc  LibriSpeech's test-clean, with F5-TTS's list of 1,127 sentences of LibriSpeech-PC in it, each beside
                    another utterance of its speaker: librispeech_pc_test_clean_cross_sentence.lst
    ljspeech        LJSpeech-1.1, with the list of 500 that Tacotron 2 and VITS are tested on in it:
                    ljs_audio_text_test_filelist.txt
"""

import re
from os.path import isfile  # which is False for any name that can be none
from pathlib import Path

from trivox.common import UserError
from trivox.files import read_text

LISTS = {"seedtts": "meta.lst", "librispeech_pc": "librispeech_pc_test_clean_cross_sentence.lst",
         "ljspeech": "ljs_audio_text_test_filelist.txt"}


def read_testset(name, folder):
    """The clips of a test list, dicts: id, text, speaker, recording (a path), and prompt, the path of the recording
    that shows the voice, or None. Raises UserError for a list that is not there, a line that is none of it, and a
    recording that is missing."""
    path, clips = Path(folder) / LISTS[name], []
    if not isfile(path):
        raise UserError(f"{path} is missing: --testset {name} takes the folder with that list and its recordings "
                        "(trivox/testsets.py says where they are from)")
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            clips.append(READERS[name](path.parent, line))
        except ValueError:
            raise UserError(f"{path}, line {number}: {line[:60]!r} is no line of such a list") from None
        for what in (clips[-1]["recording"], clips[-1]["prompt"]):
            if what and not isfile(what):
                raise UserError(f"{path}, line {number}: the recording {str(what)[:200]!r} is missing")
    if not clips:
        raise UserError(f"{path} has no line of text")
    return clips


def seedtts(folder, line):
    """id|text of the prompt|prompt|text[|recording]"""
    id, _, prompt, text, *recording = map(str.strip, line.split("|"))
    if len(recording) > 1:
        raise ValueError
    return {"id": id, "text": text, "speaker": prompt, "prompt": folder / prompt,
            "recording": folder / (recording[0] if recording else f"wavs/{id}.wav")}


def librispeech_pc(folder, line):
    """prompt, its seconds, its text, id, seconds, text, with tabs between"""
    prompt, _, _, id, _, text = line.split("\t")

    def utterance(id):
        speaker, chapter, _ = id.split("-")
        return folder / speaker / chapter / f"{id}.flac"

    return {"id": id, "text": text, "speaker": id.split("-")[0], "prompt": utterance(prompt),
            "recording": utterance(id)}


def ljspeech(folder, line):
    """DUMMY/id.wav|text"""
    file, text = line.split("|")
    id = re.fullmatch(r"(?:.*/)?(LJ\d+-\d+)(?:\.wav)?", file)
    if not id:
        raise ValueError
    return {"id": id[1], "text": text, "speaker": "", "prompt": None, "recording": folder / "wavs" / f"{id[1]}.wav"}


READERS = {"seedtts": seedtts, "librispeech_pc": librispeech_pc, "ljspeech": ljspeech}
