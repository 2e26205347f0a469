"""serve.py: twenty at once, hostile text, the page in a browser. Skipped where there is no Gradio."""

import shutil
import threading
import time

import numpy as np
import pytest
from conftest import refusal

import serve
from common import UserError

gradio = pytest.importorskip("gradio", reason="no Gradio: pip install -r requirements-extra.txt")


@pytest.fixture(scope="module")
def address():
    """A page whose model takes a tenth of a second and says how many clips were made at once."""
    busy, most = [], []

    def speak(text, pitch, seed):
        busy.append(text)
        most.append(len(busy))
        time.sleep(0.1)
        busy.remove(text)
        if not text.strip():
            raise UserError("there is nothing to say")
        return 0.1 * np.sin(np.arange(8000) * pitch / 1000)

    page = serve.build("a run", 16000, [("pitch", "slider", 440, 50, 900), ("seed", "number", 0, None, None)], speak)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield url, most
    page.close()


@pytest.fixture
def client(address):
    from gradio_client import Client

    return Client(address[0], verbose=False)


def test_speaks(client):
    path, took = client.predict("Hello.", 440, 0, api_name="/speak")
    assert path.endswith(".wav") and took.startswith("0.50 s of audio in 0.")


@pytest.mark.parametrize("text, words", [("x" * 100_000, "100,000 characters; 2,000"), (" ", "nothing to say")],
                         ids=["too long", "empty"])
def test_refusals(client, text, words):
    with pytest.raises(Exception, match=words):
        client.predict(text, 440, 0, api_name="/speak")


def test_twenty_at_once(address, client):
    """One at a time; all are answered, or told that the queue is full; and then it goes on."""
    answers = []

    def ask(n):
        try:
            answers.append(client.predict(f"Number {n}.", 100 + 9 * n, n, api_name="/speak")[1])
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
    assert "of audio" in client.predict("And on.", 440, 0, api_name="/speak")[1]


def test_in_a_browser(address):
    """Text is typed, spoken and played, and nothing is asked of any other host."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: see requirements-extra.txt")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here: apt install chromium")
    elsewhere = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.on("request", lambda r: r.url.startswith((address[0], "data:", "blob:")) or elsewhere.append(r.url))
        tab.goto(address[0])
        tab.locator("#text textarea").fill("Hello there.")
        tab.locator("#speak").click()
        tab.wait_for_function("document.querySelector('#took')?.innerText.includes('real-time')", timeout=30_000)
        tab.wait_for_function("document.querySelector('#audio')?.innerText.includes('0:00')", timeout=30_000)
        browser.close()
    assert not elsewhere


def test_refused_before_it_starts(tmp_path):
    assert "no checkpoint at" in refusal(serve.main, "--ckpt", tmp_path / "nothing")
