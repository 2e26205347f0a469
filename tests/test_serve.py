"""serve.py: twenty at once, hostile texts and uploads, the page in a browser. Skipped where there is no Gradio."""

import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import refusal
from helpers import muxed, tone

import serve
from model import LLM, LLMConfig
from train_llm_tts import Config
from trivox.common import UserError
from trivox.options import SEED, Option
from trivox.recordings import read_wav
from trivox.speak import LLMSpeaker
from trivox.voices import StatsEmbedder

NAME = "</title><script>alert(1)</script> & \"a run\""
gradio = pytest.importorskip("gradio", reason="no Gradio: pip install -r requirements-serve.txt")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # of how it uses pandas


@pytest.fixture(scope="module")
def address():
    """A page whose model takes a tenth of a second and tells how many were made at once. It repeats recordings."""
    busy, most = [], []

    def stream(text, pitch, seed, prompt_wav, seconds):
        busy.append(text)
        most.append(len(busy))
        time.sleep(0.1)
        busy.remove(text)
        if not text.strip():
            raise UserError("there is nothing to say")
        assert seconds is None
        if not prompt_wav:
            return iter([0.1 * np.sin(np.arange(8000) * pitch / 1000)])
        voice = read_wav(prompt_wav, 16000)
        if np.abs(voice).max() < 1e-4:
            raise UserError("it is silent")
        return iter([voice])

    def readings(text):
        speaker.note("<b>of this</b> nothing ends")
        return [("<i>it</i> becomes this", "ðɪs"), ("and that", "")]

    options = [Option("pitch", int, "Hz", 50, 900, 900, default=440), SEED, Option("prompt_wav", Path, "a voice"),
               Option("seconds", float, "of audio", 0.01, 3600, 30)]
    speaker = SimpleNamespace(sample_rate=16000, options=options, stream=stream, readings=readings)
    page = serve.build(NAME, speaker)
    _, url, _ = serve.launch(page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield url, most
    page.close()


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address[0], verbose=False)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """{name: path} of files that somebody might upload."""
    folder = tmp_path_factory.mktemp("uploads")
    names = ["text.wav", "empty.wav", "cut.flac", "silent.wav", "long.flac", "channels.wav", "fast.wav", "good.wav"]
    paths = {name: folder / name for name in [*names, "huge.wav"]}
    tone = 0.1 * np.sin(np.arange(16000) / 20)
    paths["text.wav"].write_text("This is no audio at all. " * 100)
    paths["empty.wav"].write_bytes(b"")
    soundfile.write(paths["cut.flac"], tone, 16000)
    paths["cut.flac"].write_bytes(paths["cut.flac"].read_bytes()[:30])
    soundfile.write(paths["silent.wav"], np.zeros(16000), 16000)
    soundfile.write(paths["long.flac"], np.zeros(600 * 16000) + 0.1, 16000)
    soundfile.write(paths["channels.wav"], np.zeros((100, 99)), 16000)
    soundfile.write(paths["fast.wav"], tone, 2**31 - 1)
    soundfile.write(paths["good.wav"], tone, 16000)
    soundfile.write(folder / "scaled.wav", 32767 * tone, 16000, subtype="FLOAT")
    paths["scaled.wav"] = folder / "scaled.wav"
    with paths["huge.wav"].open("wb") as f:
        f.truncate(21_000_000)
    return paths


def test_speaks(client):
    path, took, told = client.predict("Hello.", 440, 0, None, api_name="/speak")
    assert path.endswith(".wav") and took.startswith("0.50 s of audio in 0.")
    assert soundfile.info(path).duration == 0.5
    assert "&lt;i&gt;it&lt;/i&gt; becomes this<br><small>ðɪs</small>" in told and "<p>and that</p>" in told
    assert "<b>note:</b> &lt;b&gt;of this&lt;/b&gt; nothing ends" in told


@pytest.mark.parametrize("text, pitch, seed, words", [
    ("x" * 100_000, 440, 0, "100,000 characters; 2,000"), (" ", 440, 0, "nothing to say"),
    (None, 440, 0, "nothing to say"), ("Hi.", 1e9, 0, "900"), ("Hi.", 440, -1, "minimum"),
    ("Hi.", 440, 2**70, "maximum"), ("Hi.", "high", 0, "."),
], ids=["too long", "empty", "none", "pitch", "seed", "large seed", "no number"])
def test_refusals(client, text, pitch, seed, words):
    with pytest.raises(Exception, match=words):
        client.predict(text, pitch, seed, None, api_name="/speak")


@pytest.mark.parametrize("name, words", [
    ("text.wav", "cannot read the upload"), ("empty.wav", "cannot read the upload"),
    ("cut.flac", "the upload holds no sample|cannot read the upload"),
    ("silent.wav", "it is silent"), ("channels.wav", "the upload has 99 channels"),
    ("fast.wav", "at most 8 at 192,000|damage"), ("huge.wav", "too large|maximum|413"),
], ids=str)
def test_uploads_that_are_refused(client, uploads, name, words):
    from gradio_client import handle_file

    with pytest.raises(Exception, match=words):
        client.predict("Hi.", 440, 0, handle_file(uploads[name]), api_name="/speak")


@pytest.mark.parametrize("name, seconds", [("good.wav", "1.00"), ("long.flac", f"{serve.MAX_VOICE}.00"),
                                           ("scaled.wav", "1.00")], ids=str)
def test_uploads(client, uploads, name, seconds):
    """Of ten minutes in a small file half a minute is read; an empty seed is the one that stood there at first."""
    from gradio_client import handle_file

    _, took, told = client.predict("Hi.", 440, None, handle_file(uploads[name]), api_name="/speak")
    assert took.startswith(f"{seconds} s of audio")
    assert ("the upload holds floats on a scale of ±32,768" in told) == (name == "scaled.wav")


@pytest.mark.parametrize("ending, form, codec", [("m4a", "ipod", "aac"), ("webm", "webm", "libopus")])
def test_uploads_of_phones_and_browsers(client, tmp_path, ending, form, codec):
    """Of which libsndfile reads none: 46 s of either."""
    from gradio_client import handle_file

    av = pytest.importorskip("av", reason="no av: pip install --no-deps -r requirements-extra.txt")
    path = tmp_path / f"<b>{'é' * 20}.{ending}"
    path.write_bytes(muxed(av, tone(100.0), 48000, form, codec))
    _, took, _ = client.predict("Hi.", 440, None, handle_file(path), api_name="/speak")
    assert took.startswith(f"{serve.MAX_VOICE}.00 s of audio")
    path.write_bytes(path.read_bytes()[:-3000])  # what a broken connection leaves
    with pytest.raises(Exception, match="cannot read the upload: it is cut off"):
        client.predict("Hi.", 440, None, handle_file(path), api_name="/speak")


def test_what_a_text_became():
    """The page of an LLM TTS shows sentences as they are read, and each time what of them is not read or not heard."""
    _, answer, controls = llm_page(eval_seconds=1)
    values = [control.value for control in controls]
    for _ in range(2):
        told = answer("It's $5 ы. So?", *values)[2]
        assert "<p>It&#x27;s five dollars ы.<br><small>it&#x27;s five dollars \ufffd.</small></p><p>So?</p>" in told
        assert "note:</b> the model reads English letters, and not &#x27;ы&#x27;" in told
        assert "have no end after 1 s" in told


def test_twenty_at_once(address, client):
    """One at a time; all are answered, or told that the queue is full; and then it goes on."""
    answers = []

    def ask(n):
        try:
            answers.append(client.predict(f"Number {n}.", 100 + 9 * n, n, None, api_name="/speak")[1])
        except Exception as e:
            answers.append(str(e))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    made = [answer for answer in answers if "of audio" in answer]
    assert len(answers) == 20 and len(made) >= serve.QUEUE and max(address[1]) == 1
    assert all("Queue is full" in answer for answer in answers if answer not in made)
    assert "of audio" in client.predict("And on.", 440, 0, None, api_name="/speak")[1]


def test_in_a_browser(address, uploads, tmp_path):
    """Text is typed, spoken and played; a text that is too long and an upload that is not audio are refused in words,
    and a voice is heard again. Nothing is asked of any other host."""
    av = pytest.importorskip("av", reason="no av: pip install --no-deps -r requirements-extra.txt")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: see requirements-serve.txt")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here: apt install chromium")
    elsewhere = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(30_000)
        tab.on("request", lambda r: r.url.startswith((address[0], "data:", "blob:")) or elsewhere.append(r.url))
        tab.add_init_script("""HTMLMediaElement.prototype.play = (play => function () {
            this.addEventListener('ended', () => (window.played ??= []).push(this.duration));
            return play.call(this) })(HTMLMediaElement.prototype.play)""")
        tab.goto(address[0])
        tab.get_by_role("heading", name=f"trivox: {NAME}").wait_for()
        assert tab.title() == f"trivox: {NAME}"

        def speak(text, said):
            tab.locator("#text textarea").fill(text)
            tab.locator("#speak").click()
            tab.get_by_text(said).first.wait_for()

        speak("Hello there.", "0.50 s of audio")
        tab.wait_for_function("window.played?.[0] === 0.5")  # it has been heard to its end
        speak("x" * 100_000, "100,000 characters")
        tab.get_by_text("controls").click()
        uploads = uploads | {"voice.webm": tmp_path / "voice.webm"}
        uploads["voice.webm"].write_bytes(muxed(av, tone(5), 48000, "webm", "libopus"))
        for name, said in (("text.wav", "cannot read the upload"), ("good.wav", "1.00 s of audio"),
                           ("voice.webm", "2.30 s of audio")):
            tab.locator("#prompt_wav input[type=file]").set_input_files(uploads[name])
            tab.locator("#prompt_wav input[type=file]").wait_for(state="detached")
            speak("Hello.", said)
            if name != "voice.webm":
                tab.locator("#prompt_wav").get_by_label("Clear").click()
        browser.close()
    assert not elsewhere


# ------------------------------------------------------------------------------------------------------------
# The systems

class Codec:
    """Stands for a codec: each code is a second of a tone."""
    sample_rate, frame_rate, hop_length = 8000, 1, 8000

    def decode(self, codes):
        return np.concatenate([np.full(8000, code / 64, np.float32) for code in codes[:, 0]])


def llm_page(eval_seconds=2, **changes):
    """The page of an untrained LLM TTS of a code a second. Returns (its Speaker, what answers, the controls)."""
    tiny = dict(codebook_size=32, context=128, width=64, layers=2, heads=2, kv_heads=1, ffn_width=128, frame_rate=1,
                sample_rate=8000)
    config = asdict(Config(**tiny | changes, codec="mel_rvq", eval_seconds=eval_seconds, speaker_embedder="stats"))
    torch.manual_seed(0)
    speaker = LLMSpeaker(LLM(LLMConfig(**tiny | changes)), config, Codec())
    page = serve.build("a run", speaker)
    answer = next(function for function in page.fns.values() if function.api_name == "speak")
    return speaker, answer.fn, answer.inputs[1:]


def test_llm():
    """The same seed says the same, sentence for sentence; the controls are in the range that the model takes."""
    speaker, answer, controls = llm_page()
    kinds = ["Slider"] * 4 + ["Number"] * 2
    assert speaker.sample_rate == 8000 and [type(control).__name__ for control in controls] == kinds
    assert all(control.minimum <= control.value <= control.maximum for control in controls[:4])
    values = [control.value for control in controls[:-1]]
    one, two, other = (answer(text, *values, seed)[0][1] for text, seed in (("Hello.", 1), ("Hello. Again.", 1),
                                                                            ("Hello.", 2)))
    assert len(two) > len(one) >= 8000 and np.array_equal(one, two[:len(one)])
    assert not np.array_equal(one, other[:len(one)])


def test_llm_with_voices(uploads):
    speaker, answer, controls = llm_page(speaker_width=StatsEmbedder.width)
    at = [option.name for option in speaker.options].index("speaker")
    values = [control.value for control in controls]

    def speak(upload):
        return answer("Hello.", *(upload if n == at else value for n, value in enumerate(values)))[0][1]

    assert type(controls[at]).__name__ == "File" and len(speak(uploads["good.wav"])) >= 8000
    for name, words in (("text.wav", "cannot read"), ("silent.wav", "silent"), ("cut.flac", "sample|cannot read"),
                        (None, "the voice of a recording: upload one")):
        with pytest.raises(gradio.Error, match=words):
            speak(uploads[name] if name else None)


def test_controls_of_lists():
    """A config with a number for each codebook keeps them; they can be changed, and what is no number is refused."""
    option = Option("top_k", int, "of all", 0, usual=9, each_book=True, default=[3, 1])
    assert type(serve.control(option)).__name__ == "Textbox" and serve.control(option).value == "3 1"
    assert serve.asked(option, "4, 2", None) == [4, 2] and serve.asked(option, None, None) is None
    with pytest.raises(UserError, match="should be numbers"):
        serve.asked(option, "4 x", None)


def test_refused_before_it_starts(tmp_path):
    assert "no checkpoint at" in refusal(serve.main, "--ckpt", tmp_path / "nothing")
