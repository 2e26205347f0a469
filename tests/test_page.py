"""page.py in headless Chromium, from the disk. Skipped where there is no Chromium or no Playwright."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from conftest import refusal

import page
from audio import MelConfig

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'n' {{ 7 * 7 }}"


def make_run(folder, steps=(10, 20), prompts=("One.", HOSTILE, "A third, longer, sentence."), wers=(0.5, 0.25)):
    """The folder of a run, with clips that are sines of 0.5 s and more. Returns it."""
    rng = np.random.default_rng(len(prompts))
    for step in ("reference", *(f"step_{step:08d}" for step in steps)):
        clips = []
        for n, text in enumerate(prompts):
            samples = 11025 + int(rng.integers(11025))
            wav = 0.1 * np.sin(np.arange(samples) / (9 + n))
            mel = rng.normal(-5, 2, (samples // 256, 80))
            page.save_clip(folder / "samples" / step / f"{n:03d}", wav, mel, MelConfig())
            clips.append({"text": text, "heard": text.lower(), "wer": 0.125, "mel_distance": 0.5})
        if step != "reference":
            (folder / "samples" / step / "clips.jsonl").write_text("".join(json.dumps(c) + "\n" for c in clips))
    rows = [{"step": s, "loss": 3 / s, "lr": 1e-3, "steps_per_second": 2.0} for s in range(1, max(steps) + 1)]
    rows += [{"step": s, "val_loss": 4 / s, "wer": wer} for s, wer in zip(steps, wers)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump({"lr": 0.002, "steps": 20, "eval_prompts": HOSTILE}))
    page.write_page(folder, parameters="1,234", defaults={"lr": 0.001, "steps": 20, "eval_prompts": "heldout"})
    return folder


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: see requirements-extra.txt")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here: apt install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(folder) opens its index.html. At the end there must have been no error and no request out of the folder."""
    contexts, troubles = [], []

    def open_page(folder, width=1400, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        home = folder.resolve().as_uri()
        tab.on("console", lambda message: message.type == "error" and troubles.append(message.text))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("requestfailed", lambda r: "ERR_ABORTED" in (r.failure or "") or troubles.append(r.url))
        tab.on("request", lambda r: r.url.startswith((home, "data:")) or troubles.append(f"left the folder: {r.url}"))
        tab.goto(f"{home}/index.html")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


def durations(tab):
    """{src: seconds} of all players, each scrolled to so that it loads."""
    players = tab.locator("table.clips audio")
    for i in range(players.count()):
        players.nth(i).scroll_into_view_if_needed()
    tab.wait_for_function("[...document.querySelectorAll('table.clips audio')].every(a => a.readyState > 0)")
    return dict(players.evaluate_all("all => all.map(a => [a.getAttribute('src'), a.duration])"))


def test_every_player_plays_its_clip(visit, tmp_path):
    """Also where the folder was moved to a name full of what means something to HTML and to URLs."""
    folder = make_run(tmp_path / "run")
    folder = folder.rename(tmp_path / "a 'run' & \"more\" 100% #1?")
    found = durations(visit(folder))
    assert len(found) == 3 * 3
    for src, seconds in found.items():
        assert seconds == pytest.approx(soundfile.info(folder / src).duration, rel=0.01)


def test_one_plays_at_a_time(visit, tmp_path):
    tab = visit(make_run(tmp_path / "run"))
    first, second = tab.locator("table.clips audio").nth(0), tab.locator("table.clips audio").nth(1)
    for player in (first, second):
        player.evaluate("a => { a.loop = a.muted = true; return a.play() }")
    assert first.evaluate("a => a.paused") and not second.evaluate("a => a.paused")
    second.focus()  # by keyboard
    tab.keyboard.press("Space")
    tab.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.paused)")


def test_text_is_text(visit, tmp_path):
    folder = make_run(tmp_path / "run")
    folder = folder.rename(tmp_path / "x & <b>\"y\"</b>".replace("/", "_"))
    page.write_page(folder, parameters="1", defaults={"lr": 0.001})
    tab = visit(folder)
    assert tab.locator("h1").inner_text() == folder.name
    assert tab.locator("table.clips tbody th").nth(1).inner_text() == HOSTILE
    assert tab.locator("h1 b, main script").count() == 0
    changed = tab.locator("tr.changed")
    assert [row.split("\t")[0] for row in changed.all_inner_texts()] == ["lr"]


@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_the_screen(visit, tmp_path, width, scheme):
    """No horizontal scroll of the page, however many steps there are; text is far from its background."""
    tab = visit(make_run(tmp_path / "run", steps=(1, 2, 3, 4, 5, 6, 7, 8), wers=[0.1] * 8), width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    colour, background = tab.evaluate("""() => { const c = document.createElement('canvas').getContext('2d');
        return ['CanvasText', 'Canvas'].map(name => { const s = getComputedStyle(document.body);
            return name === 'Canvas' ? matchMedia('(prefers-color-scheme: dark)').matches : s.color }) }""")
    light = sum(map(float, colour.removeprefix("rgb(").rstrip(")").split(","))) > 384
    assert background == (scheme == "dark") == light


def test_players_load_on_demand(visit, tmp_path):
    """50 checkpoints of 16 prompts: what is far away is not loaded."""
    prompts = [f"Prompt {n}." for n in range(16)]
    tab = visit(make_run(tmp_path / "run", steps=range(1, 51), prompts=prompts, wers=[0.1] * 50))
    tab.wait_for_timeout(300)
    players = tab.locator("table.clips audio")
    loaded = players.evaluate_all("all => all.filter(a => a.readyState > 0).length")
    assert players.count() == 16 * 51 and 0 < loaded < 200
    assert tab.locator("img[loading=lazy]").count() == 16 * 51


def test_runs_side_by_side(visit, tmp_path):
    """Two runs of one name, copied into a folder of their own; the blind comparison counts what it was told."""
    for name, steps in (("a", (10, 20)), ("b", (10,))):
        make_run(tmp_path / name / "flow & co", steps)
    page.compare([tmp_path / name / "flow & co" for name in "ab"], tmp_path / "out")
    for name in "ab":
        shutil.rmtree(tmp_path / name)
    tab = visit(tmp_path / "out")
    assert len(durations(tab)) == 3 * (1 + 2 + 1)
    chosen = {}
    for turn in range(6):
        clips = [tab.locator("#blind audio").nth(i).get_attribute("src") for i in (0, 1)]
        assert {clip.split("/")[0] for clip in clips} == {"run0", "run1"}
        assert {Path(clip).parts[2] for clip in clips} == {"step_00000020", "step_00000010"}
        winner = turn % 3
        tab.locator("#blind button").nth(winner).click()
        if winner < 2:
            chosen[clips[winner][:4]] = chosen.get(clips[winner][:4], 0) + 1
    counts = [row.split("\t") for row in tab.locator("#blind-counts tr").all_inner_texts()]
    assert [(int(c), int(heard)) for _, c, heard in counts] == [(chosen.get(f"run{i}", 0), 6) for i in (0, 1)]
    assert len({name for name, *_ in counts}) == 2


@pytest.mark.parametrize("argv, words", [(["nowhere"], "not the folder of a run"), (["a", "b"], "--out")], ids=str)
def test_refusals(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(page.main, *argv) and not list(tmp_path.iterdir())
