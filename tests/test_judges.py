"""judges.py beside hand counts, scipy, and experiments whose truth is known: word errors, intervals, two systems on the
same sentences, quality and voice."""

import numpy as np
import pytest
from scipy.stats import binomtest

from trivox import judges
from trivox.judges import (error_interval, interval, judge_speech, listen, load_quality, load_voice_encoder, paired,
                           word_error_rate, word_errors, words_summary)
from trivox.synthesisers import speak_espeak

# ------------------------------------------------------------------------------------------------------------
# Words

def test_word_errors():
    """By hand, of each sentence: words other, missing, added; and characters. Brackets are spoken, and numbers and
    spellings alike no errors."""
    texts = ["The baker, sold two.", "An old dog sleeps", "The [old] man (said) seven colours", "Stop!"]
    heard = ["the baker sold too", "a old dog", "the old man said 7 colors", "stop it now please"]
    rows = word_errors(texts, heard)
    assert [[row[key] for key in ("substitutions", "deletions", "insertions", "words")] for row in rows] == [
        [1, 0, 0, 4], [1, 1, 0, 4], [0, 0, 0, 6], [0, 0, 3, 1]]
    assert rows[1]["character_errors"] == len("n") + len(" sleeps") and rows[1]["characters"] == len(texts[1])
    assert word_error_rate(texts, heard) == 6 / 15
    found = words_summary(rows, "_x")
    assert found["wer_x"] == 6 / 15 and found["exact_x"] == 1 and found["mostly_wrong_x"] == 1
    assert found["wer_interval_x"][0] < 6 / 15 < found["wer_interval_x"][1]


def test_errors_of_chinese():
    """A character is a word, and blanks between words that are compared, which none could miss, are no characters."""
    row = word_errors(["老渔夫2023年来。"], ["老渔夫二零二三年走"], "zh")[0]
    assert (row["errors"], row["words"]) == (row["character_errors"], row["characters"]) == (1, 9)
    assert word_errors(["a b"], ["a"], "de")[0]["characters"] == 3


def test_nothing_said_or_heard():
    """Words of nothing are all added, and those of a text of which nothing was heard all missing."""
    rows = word_errors(["", "Two books.", "?!"], ["", "", "a word"])
    assert [row["errors"] for row in rows] == [0, 2, 2] and [row["words"] for row in rows] == [0, 2, 0]
    assert words_summary(rows)["wer"] == 2


# ------------------------------------------------------------------------------------------------------------
# Intervals

@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(judges, "RESAMPLES", 1000)


def sentences(n, rng):
    """How many words sentences have, and how often a system gets a word of each wrong, which is 10 % in the mean: most
    sentences are easy and some hard."""
    return rng.integers(5, 16, n), rng.beta(0.5, 4.5, n)


def spoken(words, wrong, rng):
    """Rows of what one system said of them."""
    errors = rng.binomial(words, np.minimum(wrong, 1))
    return [{"text": str(n), "errors": e, "words": w} for n, (e, w) in enumerate(zip(errors, words))]


def test_intervals_hold_the_truth(quickly):
    """Of 200 experiments with 64 sentences each about 95 %."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        words, wrong = sentences(64, rng)
        low, high = interval(rng.binomial(words, wrong), words)
        held += low <= 0.1 <= high
    assert 0.9 <= held / 200 <= 0.98


def test_intervals_of_extremes():
    """Without an error, that of scipy for so many sentences; where nothing varies a point; none of one sentence."""
    words = [9, 11] * 20
    wanted = binomtest(0, 40).proportion_ci(0.95, "exact").high / 10
    np.testing.assert_allclose(error_interval([0] * 40, words), [0, wanted], rtol=1e-9)
    assert interval([3.0] * 9) == [3, 3] and interval([1.0, 2, 3], [2, 4, 6]) == [0.5, 0.5]
    assert interval([1.0]) is error_interval([0], [5]) is None


# ------------------------------------------------------------------------------------------------------------
# Two systems

def test_a_system_beside_itself(quickly):
    """Drawn anew, it is told from itself in about 5 of 100 experiments; beside the very same rows there is nothing."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        words, wrong = sentences(64, rng)
        count, (found,) = paired(spoken(words, wrong, rng), rows := spoken(words, wrong, rng))
        held += found["interval"][0] <= 0 <= found["interval"][1]
    assert count == 64 and held >= 93
    _, (found,) = paired(rows, rows)
    assert found["difference"] == 0 and found["interval"] == [0, 0] and found["sentences"] is None


def test_how_many_sentences_it_takes(quickly):
    """A system that gets 3 % more of the words wrong is told from the other in about four of five experiments of the
    size that is named, and in few of a quarter of it."""
    rng = np.random.default_rng(3)

    def draw(n):
        words, wrong = sentences(n, rng)
        return paired(spoken(words, wrong + 0.03, rng), spoken(words, wrong, rng))[1][0]

    pilot = draw(3000)
    assert pilot["name"] == "word error rate" and pilot["difference"] == pytest.approx(-0.03, abs=0.006)
    assert pilot["difference"] == pytest.approx(pilot["b"] - pilot["a"])
    assert pilot["interval"][0] < pilot["difference"] < pilot["interval"][1] < 0
    enough, few = (np.mean([draw(n)["interval"][1] < 0 for _ in range(100)])
                   for n in (pilot["sentences"], pilot["sentences"] // 4))
    assert 0.7 <= enough <= 0.9 and few < 0.5


def test_sentences_in_common():
    """They alone are compared, whatever their order, by what both have of them all."""
    a = [{"text": text, "errors": e, "words": 4, "mos": 3.0} for text, e in zip("uvw", (1, 2, 4))]
    b = [{"text": text, "errors": e, "words": 4, "mos": None} for text, e in zip("wxv", (1, 4, 1))]
    count, (found,) = paired(a, b)
    assert count == 2 and (found["a"], found["b"], found["difference"]) == (6 / 8, 2 / 8, -0.5)
    with pytest.raises(ValueError, match="no sentence"):
        paired(a, b[1:2])


# ------------------------------------------------------------------------------------------------------------
# All of it, by judges that know a recording by its length

TEXTS = ["red green blue", "cat dog", "tree"]
HEARD = {100: "red green", 200: "cat dog", 300: "tree in leaf",
         101: "red green blue", 201: "cat fog", 301: "tree", 102: "red green blue", 202: "cat dog", 302: "tree"}
VOICES = {100: [1, 0], 200: [0, 1], 300: [0.6, 0.8], 101: [0.8, 0.6], 201: [0, 1], 301: [1, 0],
          102: [0.8, 0.6], 202: [0, 1], 302: [0.6, 0.8]}


def recordings(*lengths):
    return [np.full(n, n / 1000, np.float32) for n in lengths]


@pytest.fixture
def judge(monkeypatch):
    """A judge of words, and those of sound and voice; no recording was heard before."""
    monkeypatch.setattr(judges, "VERDICTS", {})
    monkeypatch.setattr(judges, "load_quality", lambda: lambda wav, rate: len(wav) / 100)
    monkeypatch.setattr(judges, "load_voice_encoder", lambda: lambda wav, rate: np.array(VOICES[len(wav)]))
    return "a judge", lambda wavs, rate: [HEARD[len(wav)] for wav in wavs]


def test_judge_speech(judge):
    """Figures of what was made, of the recordings after a codec and of the recordings; a row a sentence. A recording is
    compared with another one of its speaker."""
    deaf = "a deaf judge", lambda wavs, rate: [""] * len(wavs)
    summary, rows = judge_speech([judge, deaf], 100, TEXTS, recordings(100, 200, 300), recordings(101, 201, 301),
                                 recordings(102, 202, 302), ["a", "b", "a"])
    wanted = {"judge": "a judge", "wer": 3 / 6, "wer_ceiling": 1 / 6, "wer_recordings": 0, "deletions": 1,
              "insertions": 2, "exact": 1, "exact_ceiling": 2, "exact_recordings": 3, "mostly_wrong": 1,
              "wer_other_sentence": 8 / 6, "judge_2": "a deaf judge", "wer_2": 1, "wer_2_recordings": 1, "mos": 2,
              "mos_recordings": 2.02, "similarity": (0.8 + 1 + 1) / 3, "similarity_ceiling": (1 + 1 + 0.6) / 3,
              "similarity_recordings": 0.96}
    assert {key: summary[key] for key in wanted} == pytest.approx(wanted)
    assert summary["mos_interval"][0] < 2 < summary["mos_interval"][1]
    assert [row["heard"] for row in rows] == ["red green", "cat dog", "tree in leaf"]
    assert [row["seconds"] for row in rows] == [1, 2, 3] and [row["mos"] for row in rows] == [1, 2, 3]
    assert [row["errors_ceiling"] for row in rows] == [0, 1, 0]


def test_the_second_judge_hears_the_first_sentences(judge, monkeypatch):
    """And so does DNSMOS; a comparison takes those that both were judged by."""
    monkeypatch.setattr(judges, "SECOND", 2)
    sets = recordings(100, 200, 300), recordings(101, 201, 301)
    summary, rows = judge_speech([judge, judge], 100, TEXTS, *sets)
    assert (summary["wer"], summary["wer_2"], summary["wer_2_ceiling"]) == pytest.approx((3 / 6, 1 / 5, 1 / 5))
    assert summary["judge_2"] == "a judge on the first 2 sentences" and summary["mos"] == pytest.approx(1.5)
    count, found = paired(rows, judge_speech([judge, judge], 100, TEXTS, *sets[::-1])[1])
    assert count == 3 and {one["name"]: one["pairs"] for one in found} == {
        "word error rate": 3, "character error rate": 3, "predicted MOS": 2, "similarity of voice": 3}


def test_without_judges_and_recordings(judge, monkeypatch):
    """What there is no one to judge is not in the summary."""
    monkeypatch.setattr(judges, "load_quality", lambda: None)
    summary, rows = judge_speech([], 100, TEXTS, recordings(100, 200, 300))
    assert summary == {"prompts": 3} and [row.keys() for row in rows] == [{"text", "seconds"}] * 3


def test_a_recording_is_heard_once(judge):
    """By each Whisper, at each rate; what was made anew is heard anew. Other judges are told what can be said, and so
    are asked each time."""
    asked = []
    judge = "Whisper", lambda wavs, rate, hear=judge[1]: asked.append(len(wavs)) or hear(wavs, rate)
    two = recordings(100, 200)
    assert listen(judge, two, 1) == listen(judge, two[::-1], 1)[::-1] == ["red green", "cat dog"]
    assert listen(judge, [*two, two[0] + 0.1], 1) == ["red green", "cat dog", "red green"]
    assert listen(judge, two, 2) == listen(("Whisper, another", judge[1]), two, 2) == ["red green", "cat dog"]
    assert asked == [2, 0, 1, 2, 2]
    assert listen(("PocketSphinx", judge[1]), two, 1) == listen(("PocketSphinx", judge[1]), two, 1)
    assert asked[5:] == [2, 2]


def test_verdicts_are_kept(judge, monkeypatch, tmp_path, capsys):
    """Judged again in another process, the recordings are not heard again, what is made is, and the figures are the
    same; a damaged file, or one that cannot be written, costs only time."""
    asked, memory = [], tmp_path / "judged.json"
    judge = "Whisper", lambda wavs, rate, hear=judge[1]: asked.append(len(wavs)) or (
        hear(wavs, rate) if {len(wav) for wav in wavs} <= {*HEARD} else [""] * len(wavs))

    def judged(path=memory):
        monkeypatch.setattr(judges, "VERDICTS", {})
        asked.clear()
        return judge_speech([judge], 100, TEXTS, recordings(100, 200, 300), recordings(101, 201, 301),
                            recordings(102, 202, 302), memory=path)

    first = judged()
    assert asked == [3, 3, 3, 3] and judged() == first and asked == [3, 0, 0, 3]  # the last is noise
    memory.write_bytes(memory.read_bytes()[:-9])
    assert judged() == first and asked == [3, 3, 3, 3]
    memory.write_text('{"a": {"Whisper": {}}}')
    assert judged() == first and asked == [3, 3, 3, 3] and judged() == first and asked == [3, 0, 0, 3]
    assert judged(tmp_path / "nowhere" / "judged.json") == first and "judged anew next time" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Sound and voice

def test_quality(extra):
    """DNSMOS puts speech far above noise, and silence does not keep it waiting for ever."""
    extra("speechmos")
    quality = load_quality()
    wav = speak_espeak("Good morning, everybody.")
    noisy = wav + 0.3 * np.random.default_rng(0).standard_normal(len(wav))
    assert 5 > quality(wav, 22050) > quality(noisy, 22050) + 0.5 > quality(wav[:0], 22050) == 1


def test_voice_encoder(extra):
    """For GE2E two sentences of one voice are more alike than of two; the length is 1."""
    extra("resemblyzer")
    embed = load_voice_encoder()
    one, two, other = (embed(speak_espeak(text, voice), 22050) for text, voice in (
        ("The captain painted seven wooden boxes.", "en-us"), ("A driver will find nine golden keys.", "en-us"),
        ("A driver will find nine golden keys.", "en-us+f2")))
    assert one @ one == pytest.approx(1, abs=1e-4) and one @ two > max(one @ other, two @ other) + 0.03
    assert len(embed(one[:0], 22050)) == 256


def test_missing_packages():
    """As all tests but those two are run."""
    assert load_quality() is None and load_voice_encoder() is None
