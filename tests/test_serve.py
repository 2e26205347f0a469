"""serve.py: twenty at once, hostile texts and uploads, the page in a browser. Skipped where there is no Gradio."""

import shutil
import threading
import time
from dataclasses import asdict

import numpy as np
import pytest
import soundfile
import torch
from conftest import refusal

import serve
from trivox import common
from trivox.audio import read_wav
from trivox.common import UserError

NAME = "</title><script>alert(1)</script> & \"a run\""
gradio = pytest.importorskip("gradio", reason="no Gradio: pip install -r requirements-extra.txt")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")  # of how it uses pandas


@pytest.fixture(scope="module")
def address():
    """A page whose model takes a tenth of a second and tells how many were made at once. It repeats recordings."""
    busy, most = [], []

    def speak(text, pitch, seed, recording):
        busy.append(text)
        most.append(len(busy))
        time.sleep(0.1)
        busy.remove(text)
        if not text.strip():
            raise UserError("there is nothing to say")
        if not recording:
            return 0.1 * np.sin(np.arange(8000) * pitch / 1000)
        voice = read_wav(serve.shorten(recording), 16000)
        if np.abs(voice).max() < 1e-4:
            raise UserError("it is silent")
        return voice

    page = serve.build(NAME, 16000, [("pitch", "slider", 440, 50, 900), serve.SEED,
                                        ("a voice", "audio", None, None, None)], speak)
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
    with paths["huge.wav"].open("wb") as f:
        f.truncate(21_000_000)
    return paths


def test_speaks(client):
    path, took = client.predict("Hello.", 440, 0, None, api_name="/speak")
    assert path.endswith(".wav") and took.startswith("0.50 s of audio in 0.")
    assert soundfile.info(path).duration == 0.5


@pytest.mark.parametrize("text, pitch, seed, words", [
    ("x" * 100_000, 440, 0, "100,000 characters; 2,000"), (" ", 440, 0, "nothing to say"),
    (None, 440, 0, "nothing to say"), ("Hi.", 1e9, 0, "900"), ("Hi.", 440, -1, "minimum"),
    ("Hi.", 440, 2**70, "maximum"), ("Hi.", "high", 0, "."),
], ids=["too long", "empty", "none", "pitch", "seed", "large seed", "no number"])
def test_refusals(client, text, pitch, seed, words):
    with pytest.raises(Exception, match=words):
        client.predict(text, pitch, seed, None, api_name="/speak")


@pytest.mark.parametrize("name, words", [
    ("text.wav", "not a recording"), ("empty.wav", "not a recording"), ("cut.flac", "no sample|not a recording"),
    ("silent.wav", "it is silent"), ("channels.wav", "99 channels"), ("fast.wav", "more than can be read"),
    ("huge.wav", "too large|maximum|413"),
], ids=str)
def test_uploads_that_are_refused(client, uploads, name, words):
    from gradio_client import handle_file

    with pytest.raises(Exception, match=words):
        client.predict("Hi.", 440, 0, handle_file(uploads[name]), api_name="/speak")


@pytest.mark.parametrize("name, seconds", [("good.wav", "1.00"), ("long.flac", f"{serve.MAX_VOICE}.00")], ids=str)
def test_uploads(client, uploads, name, seconds):
    """Of ten minutes in a small file half a minute is read; an empty seed is the one that stood there at first."""
    from gradio_client import handle_file

    _, took = client.predict("Hi.", 440, None, handle_file(uploads[name]), api_name="/speak")
    assert took.startswith(f"{seconds} s of audio")


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


def test_in_a_browser(address, uploads):
    """Text is typed, spoken and played; a text that is too long and an upload that is not audio are refused in words,
    and a voice is heard again. Nothing is asked of any other host."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: see requirements-extra.txt")
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
        for name, said in (("text.wav", "not a recording"), ("good.wav", "1.00 s of audio")):
            tab.locator("#recording input[type=file]").set_input_files(uploads[name])
            tab.locator("#recording input[type=file]").wait_for(state="detached")
            speak("Hello.", said)
            if name == "text.wav":
                tab.locator("#recording").get_by_label("Clear").click()
        browser.close()
    assert not elsewhere


# ------------------------------------------------------------------------------------------------------------
# The systems

class Codec:
    """Stands for a codec: each code is a second of a tone."""
    sample_rate = 8000

    def decode(self, codes):
        return np.concatenate([np.full(8000, code / 64, np.float32) for code in codes[:, 0]])


def llm_run(folder, **changes):
    """The folder of an untrained LLM TTS of 3 codes a second. Returns (it, its config)."""
    from model import LLM, LLMConfig
    from train_llm_tts import Config

    tiny = dict(codebook_size=32, context=128, width=64, layers=2, heads=2, kv_heads=1, ffn_width=128, frame_rate=3)
    config = asdict(Config(**tiny | changes, codec="mel_rvq", sample_rate=8000, eval_seconds=2,
                           speaker_embedder="stats"))
    torch.manual_seed(0)
    model = LLM(LLMConfig(**tiny | changes))
    common.save_checkpoint(folder, 1, {"model": model.state_dict(), "ema": model.state_dict()}, {}, config, True, 1)
    return folder, config


def test_llm(tmp_path, monkeypatch):
    """The same seed says the same, sentence for sentence; the controls are in the range that the model takes."""
    monkeypatch.setattr("trivox.codecs.load_codec", lambda folder, device: Codec())
    rate, controls, speak = serve.llm_speaker(*llm_run(tmp_path), torch.device("cpu"))
    assert rate == 8000 and [kind for _, kind, *_ in controls] == ["slider"] * 4 + ["number"]
    assert all(low <= value <= high for _, _, value, low, high in controls)
    options = [value for _, _, value, _, _ in controls[:-1]]
    one, two, other = (speak(text, *options, seed)
                       for text, seed in (("Hello.", 1), ("Hello. Again.", 1), ("Hello.", 2)))
    assert len(two) > len(one) > 8000 and np.array_equal(one, two[:len(one)])
    assert not np.array_equal(one, other[:len(one)])


def test_llm_with_voices(tmp_path, uploads):
    from trivox.voices import StatsEmbedder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trivox.codecs.load_codec", lambda folder, device: Codec())
        run = llm_run(tmp_path, speaker_width=StatsEmbedder.width)
        _, controls, speak = serve.llm_speaker(*run, torch.device("cpu"))
    assert controls[-1][1] == "audio"
    options = [value for _, _, value, _, _ in controls[:-1]]
    assert len(speak("Hello.", *options, uploads["good.wav"])) > 8000
    for name, words in (("text.wav", "not a recording"), ("silent.wav", "silent"), ("cut.flac", "sample|recording")):
        with pytest.raises(UserError, match=words):
            speak("Hello.", *options, uploads[name])
    with pytest.raises(UserError, match="the voice of a recording: upload one"):
        speak("Hello.", *options, None)


def test_refused_before_it_starts(tmp_path):
    assert "no checkpoint at" in refusal(serve.main, "--ckpt", tmp_path / "nothing")
