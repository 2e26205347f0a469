"""recognisers.py: what is heard of a closed set of sentences. (The grammar's is heard in test_demo_speech.py.)"""

import pytest
from conftest import refusal

from trivox.recognisers import load_recogniser
from trivox.synthesisers import speak_espeak as speak


def test_judge_of_a_closed_set():
    """It hears which of the sentences was spoken, even where one has a word that is in no dictionary."""
    sentences = ["The weather was fine.", "Nobody came to the station.", "She wrote to Xqzvk yesterday."]
    name, hear = load_recogniser("sentences", sentences)
    assert "one of 3 sentences" in name
    assert [hear(speak(s), 22050) for s in sentences] == sentences


@pytest.mark.parametrize("name, words", [("whisper", "base.en.pt"), ("grammar", "no grammar.jsgf")])
def test_no_judge(name, words):
    assert words in refusal(lambda argv: load_recogniser(name))
