"""espeak.py: phonemes beside a pronouncing dictionary, punctuation, threads; what cannot be said is refused. (What it
speaks is heard in test_demo_speech.py.)"""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import refusal

from trivox.espeak import phonemes
from trivox.open_speech import sentences

# CMU's dictionary writes consonants so; r, which colours vowels in one and not in the other, is left out
CONSONANTS = {"tʃ": "CH", "dʒ": "JH", "θ": "TH", "ð": "DH", "ʃ": "SH", "ʒ": "ZH", "ŋ": "NG", "j": "Y", "h": "HH",
              "ɾ": "T", "ɡ": "G"} | {c: c.upper() for c in "pbtdkfvszmnlw"}


def test_consonants_are_those_of_the_dictionary():
    """Of the 1,000 commonest words, as PocketSphinx's dictionary (CMU's) has them: the two are by different people."""
    from pocketsphinx import Decoder

    dictionary = Decoder(loglevel="FATAL")
    words = re.findall(r"[a-z]+", " ".join(text for _, text in sentences()[:2000]).lower())
    words = [word for word in sorted({*words}, key=lambda word: (-words.count(word), word))[:1000]
             if dictionary.lookup_word(word)]
    agree = []
    for word in words:
        found = [CONSONANTS[c] for c in re.findall("|".join(CONSONANTS), phonemes(word, "en-us"))]
        wanted = [c for c in dictionary.lookup_word(word).split() if c in {*CONSONANTS.values()}]
        one, other = (["T" if c == "D" else c for c in some] for some in (found, wanted))  # the same between vowels
        agree.append(one == other)
    assert len(agree) > 900 and sum(agree) > 0.9 * len(agree)


@pytest.mark.parametrize("text, wanted", [
    ("", ""), ("book", "bˈʊk"), ("Hello, world!", "həlˈoʊ, wˈɜːld!"), ("Mr. Smith", "mˈɪstɚ smˈɪθ"),
    ('"Yes," he (Tom) said.', '"jˈɛs," hiː (tˈɑːm) sˈɛd.'), ("it's -- 'so' ... ", "ɪts -- 'sˈoʊ' ... "),
    ("I have read it; read the book.", "aɪ hæv ɹˈɛd ɪt; ɹˈiːd ðə bˈʊk."),
])
def test_punctuation_stays(text, wanted):
    """And words are read in their context, up to it."""
    assert phonemes(text, "en-us") == wanted


def test_other_languages():
    """Words are pronounced as in the language of the voice, and no mark of a change of languages is among them."""
    assert phonemes("Guten Morgen", "de") == "ɡˈuːtən mˈɔɾɡən"
    assert "(" not in phonemes("der Computer ist cool, the weather", "de")


def test_neither_order_nor_threads_matter():
    texts = [text for _, text in sentences()[:200]]
    alone = [phonemes(text, "en-us") for text in texts]
    phonemes.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(phonemes, text, voice) for text in reversed(texts) for voice in ("en-us", "de")]
        assert [job.result() for job in jobs[::2]][::-1] == alone


@pytest.mark.parametrize("text, voice, words", [
    ("a", "xx-nowhere", "no voice 'xx-nowhere'"), ("a", "", "no voice ''"), ("one \ua7f8 two", "de", "says nothing"),
    ("a, ٣, b", "de", "nothing"), ("He said 你好.", "en-us", "not '你好'"), ("Привет", "en-gb-x-rp", "reads English"),
], ids=ascii)
def test_refused(text, voice, words):
    """An unknown voice; words that a voice has no sound for, or would spell by the numbers of their letters."""
    assert words in refusal(lambda argv: phonemes(text, voice))
