"""pages.py and plots.py by page.py, in headless Chromium, from the disk. Skipped where there is no Chromium or no
Playwright."""

import json
import re
import shutil
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from conftest import refusal

import page
from trivox import pages, plots
from trivox.audio import MelConfig

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
            plots.save_clip(folder / "samples" / step / f"{n:03d}", wav, mel, MelConfig())
            clips.append({"text": text, "heard": text.lower(), "wer": 0.125, "mel_distance": 0.5})
        if step != "reference":
            (folder / "samples" / step / "clips.jsonl").write_text("".join(json.dumps(c) + "\n" for c in clips))
    rows = [{"step": s, "loss": 3 / s, "lr": 1e-3, "steps_per_second": 2.0} for s in range(1, max(steps) + 1)]
    rows += [{"step": s, "val_loss": 4 / s, "wer": wer} for s, wer in zip(steps, wers)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump({"lr": 0.002, "steps": 20, "eval_prompts": HOSTILE}))
    pages.write_page(folder, parameters="1,234", defaults={"lr": 0.001, "steps": 20, "eval_prompts": "heldout"})
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that has spoken eight times. Tests only read it."""
    return make_run(tmp_path_factory.mktemp("finished") / "run", range(6, 21, 2), wers=[0.5] * 7 + [0.25])


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: see requirements-serve.txt")
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
    players = tab.locator(".clips audio")
    for i in range(players.count()):
        players.nth(i).scroll_into_view_if_needed()
    tab.wait_for_function("[...document.querySelectorAll('.clips audio')].every(a => a.readyState > 0)")
    return dict(players.evaluate_all("all => all.map(a => [a.getAttribute('src'), a.duration])"))


def cells(tab, rows):
    """The texts of the cells of some rows of a table."""
    return tab.locator(rows).evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")


def test_every_player_plays_its_clip(visit, tmp_path):
    """Also where the folder was zipped, and unpacked under a name full of what means something to HTML and to URLs."""
    make_run(tmp_path / "run")
    shutil.make_archive(tmp_path / "zipped", "zip", tmp_path / "run")
    folder = tmp_path / "a 'run' & \"more\" 100% #1?"
    shutil.unpack_archive(tmp_path / "zipped.zip", folder)
    shutil.rmtree(tmp_path / "run")
    tab = visit(folder)
    found = durations(tab)
    assert len(found) == 3 * 3
    for src, seconds in found.items():
        assert seconds == pytest.approx(soundfile.info(folder / src).duration, rel=0.01)
    tab.wait_for_function("[...document.images].every(image => image.naturalWidth)")


def test_one_plays_at_a_time(visit, finished):
    tab = visit(finished)
    first, second = tab.locator(".clips audio").nth(0), tab.locator(".clips audio").nth(1)
    for player in (first, second):
        player.evaluate("a => { a.loop = a.muted = true; return a.play() }")
    assert first.evaluate("a => a.paused") and not second.evaluate("a => a.paused")
    second.focus()  # by keyboard
    tab.keyboard.press("Space")
    tab.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.paused)")


def test_text_is_text(visit, tmp_path):
    folder = make_run(tmp_path / "run")
    folder = folder.rename(tmp_path / "x & <b>\"y\"</b>".replace("/", "_"))
    pages.write_page(folder, parameters="1", defaults={"lr": 0.001})
    tab = visit(folder)
    assert tab.locator("h1").inner_text() == folder.name
    assert tab.locator(".clips tbody th").nth(1).inner_text() == HOSTILE
    assert tab.locator("h1 b, main script").count() == 0
    assert cells(tab, "tr:has(.changed)") == [["lr", "0.002 default 0.001"]]


def test_facts(visit, finished):
    """What is known of the run and of what made it stands there; the config can be cut down to what was changed."""
    tab = visit(finished)
    facts = dict(cells(tab, "[aria-label=facts] tr"))
    assert facts["steps"] == "20 of 20" and facts["parameters"] == "1,234" and facts["word error rate"] == "25.0 %"
    assert facts["validation loss"] == "0.2; best 0.2, at step 20" and facts["steps per second"] == "2"
    assert facts["transformers"] == version("transformers") and {"torch", "Python"} <= facts.keys()
    assert tab.locator(".clips thead small").all_inner_texts() == [
        f"WER {wer:.1f} % · mel distance 0.50" for wer in (50, 50, 50, 50, 50, 50, 50, 25)]
    assert tab.locator("[aria-label=config] tr:visible").count() == 3
    tab.locator("#few").press("Space")
    assert tab.locator("[aria-label=config] tr:visible").count() == 2  # lr and eval_prompts


def test_folders_that_are_no_step(tmp_path, capsys):
    """What else lies in samples/ is left out. A trainer, which gives facts, goes on where there can be no page."""
    for name in ("step_00000002", "step_00000002 copy"):
        (tmp_path / "samples" / name).mkdir(parents=True)
    (tmp_path / "samples/step_00000004.zip").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    (tmp_path / "config.yaml").write_text("system: flow\nsteps: 4\n")
    assert [*pages.read_run(tmp_path)["steps"]] == ["step_00000002"]
    (tmp_path / "samples/step_00000002/clips.jsonl").write_text("3\n4\n")
    assert "line 1 of" in refusal(lambda argv: pages.write_page(tmp_path))
    pages.write_page(tmp_path, parameters="3")
    assert "is not renewed: line 1 of" in capsys.readouterr().out


def test_what_a_model_reads_is_shown(tmp_path):
    """Below a text that is not read as it stands; of several runs, which of them reads what."""
    def write(name, *reads):
        folder = make_run(tmp_path / name, (2,), ("One.", "Nine."), (0.5,))
        path = folder / "samples/step_00000002/clips.jsonl"
        rows = [json.loads(line) | ({"read": read} if read else {}) for line, read in zip(path.open(), reads)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    one, two = write("one", "ðə <b>", None), write("two", "ðə <b>", "nˈaɪn")
    pages.write_page(one)
    html = (one / "index.html").read_text()
    assert html.count("reads: ") == 1 and "<small>reads: ðə &lt;b&gt;</small>" in html
    pages.compare([one, two], tmp_path / "both")
    html = (tmp_path / "both" / "index.html").read_text()
    assert "<small>one, two reads: ðə &lt;b&gt;</small>" in html and "<small>two reads: nˈaɪn</small>" in html


def test_what_was_not_finite_is_shown(tmp_path):
    """Steps that were left out; and a validation loss of NaN is not the best. A last line may have been cut."""
    lines = [{"step": 1, "val_loss": float("nan")}, {"step": 2, "val_loss": 0.5}, {"step": 2, "left_out_step": 2},
             {"step": 3, "left_out_step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    (tmp_path / "config.yaml").write_text("system: flow\nsteps: 4\n")
    facts = pages.read_run(tmp_path)["facts"]
    assert facts["validation loss"] == "0.5; best 0.5, at step 2"
    assert facts["steps left out, not finite"] == "2, the last 3"


CONTRAST = """() => {
    const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b };
    const page = document.body.appendChild(document.createElement('p'));
    page.style.background = 'Canvas';
    const behind = e => { const c = e ? getComputedStyle(e).backgroundColor : getComputedStyle(page).backgroundColor;
        return c === 'rgba(0, 0, 0, 0)' ? behind(e.parentElement) : c };
    return [...document.querySelectorAll('th, td, small, h1, h2, p')].map(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) }) }"""


@pytest.mark.parametrize("width", [380, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_the_screen(visit, finished, width, scheme):
    """No horizontal scroll of the page, however many steps there are, and the newest is in sight; text is as far from
    what is behind it as WCAG's level AA asks for."""
    tab = visit(finished, width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert min(tab.evaluate(CONTRAST)) >= 4.5
    newest, box = tab.locator(".clips thead th").last.bounding_box(), tab.locator(".clips").bounding_box()
    assert newest["x"] + newest["width"] <= box["x"] + box["width"]
    prompt = tab.locator(".clips tbody th").first.bounding_box()
    assert prompt["x"] >= box["x"] and prompt["x"] + prompt["width"] <= newest["x"]


def test_players_load_on_demand(visit, tmp_path):
    """50 checkpoints of 16 prompts: what is far away is not loaded."""
    folder = make_run(tmp_path / "run", steps=[1], prompts=[f"Prompt {n}." for n in range(16)], wers=[0.1])
    for step in range(2, 51):
        shutil.copytree(folder / "samples" / "step_00000001", folder / "samples" / f"step_{step:08d}")
    pages.write_page(folder)
    tab = visit(folder)
    tab.wait_for_timeout(300)
    players = tab.locator(".clips audio")
    loaded = players.evaluate_all("all => all.filter(a => a.readyState > 0).length")
    assert players.count() == 16 * 51 and 0 < loaded < 200
    assert tab.locator(".clips img[loading=lazy]").count() == 16 * 51


def compared(tmp_path, *prompts, steps=((10, 20), (10,))):
    """The folder of a page of two runs of one name; the runs themselves are gone."""
    for name, some, at in zip("ab", prompts, steps):
        folder = make_run(tmp_path / name / "flow & co", at, some)
        with (folder / "config.yaml").open("a") as file:  # as if they were of different systems
            file.write(f"only_{name}: 4\n")
        (folder / "coverage & 100% #1.png").write_bytes((folder / "curves.png").read_bytes())
    pages.compare([tmp_path / name / "flow & co" for name in "ab"], tmp_path / "out")
    for name in "ab":
        shutil.rmtree(tmp_path / name)
    return tmp_path / "out"


def test_runs_side_by_side(visit, tmp_path):
    """Also where they have not spoken all the same prompts, and one of them twice. The plots that were in their folders
    came with them."""
    tab = visit(compared(tmp_path, ["Both.", "Twice.", "Twice."], ["Mine.", "Both.", "Twice."]))
    assert len(durations(tab)) == 9 + 4
    assert tab.locator(".clips tbody th").all_inner_texts() == ["Both.", "Twice.", "Twice.", "Mine."]
    sources = tab.locator(".clips tbody tr").evaluate_all("""rows => rows.map(row =>
        [...row.cells].slice(2).map(cell => cell.querySelector('audio')?.getAttribute('src')))""")
    assert [[src and src[9:10] + src[-7:-4] for src in row] for row in sources] == [  # run and clip
        ["0000", "1001", "0000"],  # step 10 of both, step 20 of the first
        ["0001", "1002", "0001"], ["0002", None, "0002"], [None, "1000", None]]
    rows = [row.split() for row in tab.locator("table tr").all_inner_texts() if row.startswith("only_")]
    assert sorted(rows) == [["only_a", "4"], ["only_b", "4"]]
    plots = tab.locator("figure img")
    for i in range(plots.count()):
        plots.nth(i).scroll_into_view_if_needed()
    tab.wait_for_function("[...document.querySelectorAll('figure img')].every(image => image.naturalWidth)")
    assert [caption.partition(": ")[2] for caption in tab.locator("figcaption").all_inner_texts()] == [
        "coverage & 100% #1"] * 2


def test_blind_comparison(visit, tmp_path):
    """Each prompt that two runs have spoken is heard once before any comes again; choices are counted, also over a
    reload of the page."""
    tab = visit(compared(tmp_path, ["One.", "Mine.", HOSTILE], ["One.", HOSTILE, "Mine, too."]))
    chosen, heard = [0, 0], []
    for turn in range(6):
        heard.append(tab.locator("#blind-text").inner_text())
        clips = [Path(tab.locator("#blind audio").nth(i).get_attribute("src")) for i in (0, 1)]
        runs = [int(clip.parts[1]) for clip in clips]
        assert sorted(runs) == [0, 1]
        assert {(run, clip.parts[3]) for run, clip in zip(runs, clips)} == {(0, "step_00000020"), (1, "step_00000010")}
        tab.locator("#blind button").nth(turn % 3).press("Enter")
        if turn % 3 < 2:
            chosen[runs[turn % 3]] += 1
        if turn == 3:
            tab.reload()
    assert {tuple(sorted(heard[i:i + 2])) for i in (0, 2, 4)} == {tuple(sorted(["One.", HOSTILE]))}
    counts = [row.split("\t") for row in tab.locator("#blind-counts tr").all_inner_texts()]
    assert [list(map(int, row[1:])) for row in counts] == [[chosen[0], 6], [chosen[1], 6]]
    assert len({name for name, *_ in counts}) == 2


def test_nothing_to_compare_blindly(visit, tmp_path):
    tab = visit(compared(tmp_path, ["One."], ["Two."]))
    assert tab.locator("#blind").count() == 0 and "No prompt has been spoken by two" in tab.locator("main").inner_text()


# ------------------------------------------------------------------------------------------------------------
# Without a browser

def test_curves(tmp_path, monkeypatch):
    """Every number of the log is in its panel; losses and perplexities have logarithmic axes. The loss over the time of
    the flow is the last."""
    shown, subplots = [], plots.subplots
    monkeypatch.setattr(plots, "subplots", lambda *args: shown.append(subplots(*args)) or shown[-1])
    keys = ["loss", "text_perplexity", "audio_perplexity"]
    rows = [{"step": s, **{key: s * n + 1.0 for n, key in enumerate(keys, 1)}, "lr": 1 / s} for s in (10, 20, 30)]
    rows += [{"step": 30, **{f"val_{key}": 7.0 for key in keys}}, {"step": 30, "wer": 0.25}]
    rows += [{"step": s, "val_loss": 7.0, "val_loss_t0.25": s / 10, "val_loss_t0.75": 1.0} for s in (20, 30)]
    rows[-1] |= {"val_loss_t0.85": float("nan"), "val_loss_total": 9.0}  # a run may diverge; users log what they like
    plots.plot_curves(tmp_path / "curves.png", {"_a $x$": rows, "b": rows[:1], "of nothing": []})
    axes = [axis for axis in shown[0][1].flat if axis.axison]
    assert [axis.get_ylabel() for axis in axes] == [
        "loss", "perplexity of characters", "perplexity of codes", "learning rate", "word error rate, %",
        "validation loss over t"]
    assert [axis.get_yscale() for axis in axes] == ["log"] * 3 + ["linear"] * 3
    for n, axis in enumerate(axes[:3], 1):
        lines = [line.get_xydata().tolist() for line in axis.get_lines()]
        at = [[30, 7]] + [[20, 7], [30, 7]] * (n == 1)
        assert lines == [[[s, s * n + 1] for s in (10, 20, 30)], at, [[10, 10 * n + 1]], [], [], []]
    assert axes[4].get_lines()[0].get_xydata().tolist() == [[30, 25]]
    assert axes[5].get_lines()[0].get_xydata().tolist() == [[0.25, 3], [0.75, 1]]
    legend = [text.get_text() for text in shown[0][0].legends[0].get_texts()]
    assert legend == ["_a $x$", "b", "of nothing", "training", "validation, averaged weights"]


def test_what_was_killed(tmp_path):
    """A run that has no number yet has a page; a wav of which there is but the beginning is left out."""
    folder = make_run(tmp_path / "run")
    (folder / "samples" / "step_00000010" / "001.wav").write_bytes(b"RIFF")
    (folder / "samples" / "reference" / "000.wav").unlink()
    pages.write_page(folder)
    html = (folder / "index.html").read_text()
    assert "step_00000010/000.wav" in html and "step_00000010/001" not in html and "reference/000" not in html
    (folder / "metrics.jsonl").write_text("")
    shutil.rmtree(folder / "samples")
    pages.write_page(folder)
    assert "0 of 20" in (folder / "index.html").read_text()


def test_a_log_that_was_cut(tmp_path):
    """In its last line, by a kill; any other line that is none is named."""
    folder = make_run(tmp_path / "run", steps=[1], prompts=["One."])
    lines = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": {"a": 1}'
    for cut in range(30, len(lines)):
        (folder / "metrics.jsonl").write_text(lines[:cut])
        assert pages.logged(folder / "metrics.jsonl") == [{"step": 1, "loss": 2.0}][:1]
    (folder / "metrics.jsonl").write_text(lines + '\n{"step": 3}\n')
    assert "line 2 of " in refusal(lambda argv: pages.write_page(folder))


@pytest.mark.parametrize("losses", [["NaN", "NaN"], ["2.5", "Infinity"], ["0.0", "0.0"]], ids=str)
def test_what_diverged(tmp_path, losses):
    """It has a page all the same: a page must not end a run."""
    folder = make_run(tmp_path / "run", steps=[1], prompts=["One."])
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "loss": {loss}, "val_loss": {loss}}}\n'
                                                  for s, loss in enumerate(losses)))
    pages.write_page(folder)
    assert f"{float(losses[-1]):.4g}" in (folder / "index.html").read_text()


def test_folder_of_a_comparison(tmp_path, capsys):
    """Beside the first run, or where it was told to; what was there of another comparison goes, and nothing else."""
    runs = [make_run(tmp_path / name) for name in "abc"]
    page.main(list(map(str, runs)))
    assert capsys.readouterr().out == f"{tmp_path}/compare/index.html\n"
    page.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert sorted(path.name for path in (tmp_path / "compare" / "compared").iterdir()) == ["0", "1"]
    before = {path: path.read_bytes() for path in tmp_path.glob("[abc]/**/*") if path.is_file()}
    assert "something else" in refusal(page.main, tmp_path / "b", tmp_path / "c", "--out", tmp_path / "a")
    assert "named twice" in refusal(page.main, tmp_path / "a", tmp_path / "a" / ".." / "a")
    assert before == {path: path.read_bytes() for path in tmp_path.glob("[abc]/**/*") if path.is_file()}


@pytest.mark.parametrize("name, beside", [*product(
    ["compared/thesis.txt", "compared/0/samples/mine.wav", "index.html", "metrics.jsonl"], [True, False]),
    ("curves.png", False)])
def test_what_no_comparison_has_made_stays(tmp_path, name, beside):
    runs = [make_run(tmp_path / run, steps=[1], prompts=["One."]) for run in "ab"]
    if beside:  # an earlier comparison
        pages.compare(runs, tmp_path / "out")
    (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    said = refusal(lambda argv: pages.compare(runs, tmp_path / "out"))
    assert str(tmp_path / "out" / name) in said
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_what_is_copied(tmp_path):
    """What the page shows, and nothing else that lies there: not a link that leads nowhere."""
    runs = [make_run(tmp_path / run, steps=[1], prompts=["One."]) for run in "ab"]
    for name in "step_00000001/009.png", "step_00000001/notes.txt":
        (runs[0] / "samples" / name).symlink_to("/nowhere")
    pages.compare(runs, tmp_path / "out")
    copies = tmp_path / "out" / "compared" / "0"
    assert {str(path.relative_to(copies)) for path in copies.rglob("*") if path.is_file()} == {
        f"samples/{folder}/000.{ending}" for folder in ("step_00000001", "reference") for ending in ("wav", "png")}
    html = (tmp_path / "out" / "index.html").read_text()
    for src in re.findall(r'src="(compared/[^"]+)"', html):
        assert (tmp_path / "out" / src).exists()


@pytest.mark.parametrize("argv", [["nowhere"], ["nowhere", "neither"]], ids=str)
def test_refusals(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    assert "nowhere is not the folder of a run" in refusal(page.main, *argv) and not list(tmp_path.iterdir())
