"""The explorer and the live view in a real JupyterLab, driven by a real browser: a slider moves, a run is stopped and goes on."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from stlm.config import preset
from stlm.lab.explorer import TYPICAL_GPT2, TYPICAL_WORD, command, parameters_cell
from stlm.lab.plots import short
from stlm.model.accounting import account
from stlm.train.checkpoints import checkpoints
from stlm.train.records import Run

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.browser


@pytest.fixture(autouse=True)
def a_browser_in_ci() -> None:
    "Where everything must run, a missing browser is a failure: this comes before the skip of the `browser` fixture."
    if os.environ.get("CI") and not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.fail("CI is set and no Chromium is installed")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api?token=t", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    "The address of a JupyterLab with settings of its own, on copies of the notebooks."
    for notebook in (ROOT / "nbs" / "explore").glob("*.ipynb"):
        shutil.copy(notebook, tmp_path)
    own = {f"JUPYTER{name}_DIR": str(tmp_path / f".{name}") for name in ("_CONFIG", "_RUNTIME", "LAB_SETTINGS", "LAB_WORKSPACES")}
    quiet = tmp_path / ".LAB_SETTINGS" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    address = f"http://127.0.0.1:{(port := free_port())}"
    flags = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=t",
             "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={tmp_path}"]
    with open(tmp_path / "server.txt", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *flags], env=os.environ | own, cwd=tmp_path, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while not is_up(address):
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "server.txt").read_text()
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()  # ends its kernels, too
        server.wait(60)


def execute(page, name: str, **arguments: str) -> None:
    "Start a command of JupyterLab; what it does is waited for by what it shows."
    page.evaluate("([name, given]) => { window.jupyterapp.commands.execute(name, given) }", [name, arguments])


def run_all_cells(browser, address: str):
    "A page with a notebook whose cells have been started."
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(60_000)
    page.goto(address)
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    execute(page, "application:toggle-left-area")
    execute(page, "notebook:run-all-cells")
    return page


def control(page, name: str):
    "The widget with this label, of those that can be seen."
    return page.locator(f".stlm-explorer .widget-inline-hbox:has(> .widget-label:text-is('{name}')):visible")


def press(page, name: str, key: str) -> None:
    "Move a slider with the keyboard, once it is there to be moved: a hidden one takes no focus, and the key would go elsewhere."
    from playwright.sync_api import expect
    handle = control(page, name).locator(".noUi-handle")
    expect(handle).to_be_visible()
    before = handle.get_attribute("aria-valuenow")
    handle.focus()
    expect(handle).to_be_focused()
    handle.press(key)
    expect(handle).not_to_have_attribute("aria-valuenow", str(before))


def test_the_explorer_answers_in_a_real_jupyterlab(browser, lab: str) -> None:
    from playwright.sync_api import expect
    expect.set_options(timeout=30_000)
    page = run_all_cells(browser, f"{lab}/lab/tree/architecture.ipynb?token=t&reset")
    page.wait_for_selector(".stlm-explorer .card")

    def expect_numbers(**changes: object) -> None:
        figures = account(preset("stlm-50m", {name.replace("__", "."): value for name, value in changes.items()}).model)
        card, bars = page.locator(".stlm-explorer .card[data-figure=unique_parameters]"), page.locator(".stlm-explorer .bars")
        expect(card.locator(".detail")).to_have_text(f"{figures.unique_parameters:,} weights to keep")
        expect(bars).to_have_attribute("aria-label", re.compile(f"executed {figures.executed_parameters:,} parameters"))

    expect_numbers()
    press(page, "Layers", "ArrowRight")
    expect_numbers(model__n_layers=9)
    control(page, "Feed-forward").locator("select").select_option(label="one for all layers")
    expect_numbers(model__n_layers=9, model__sharing__ffn="all")
    expect(page.locator(".stlm-explorer .note")).to_contain_text("Sharing saves memory, not time.")

    changes = {"model.n_layers": 9, "model.sharing.ffn": "all"}
    page.get_by_role("button", name="Write parameters").click()
    cell, shell = page.locator(".stlm-explorer textarea").all()
    expect(cell).to_have_value(parameters_cell("stlm-50m", changes))
    expect(shell).to_have_value(command("stlm-50m", changes))
    take_pictures(page, "explorer")

    press(page, "Heads", "ArrowRight")  # no groups of 4 divide 17 heads: the key/value heads must change too, or the model is impossible
    sizes = {"model.d_model": 544, "model.n_heads": 17, "model.n_kv_heads": 17, "model.d_ff": 1632}
    expect(cell).to_have_value(parameters_cell("stlm-50m", {"model.n_layers": 9} | sizes | {"model.sharing.ffn": "all"}))
    for name in ("demo-bytes", "stlm-100m"):  # whatever the browser reports on its own would show up as a change
        control(page, "Preset").locator("select").select_option(name)
        expect(cell).to_have_value(parameters_cell(name, {}))
        expect(page.locator(".stlm-explorer .delta")).to_have_count(0)
    walk_to_switches(page, cell)
    walk_to_patches(page, cell)
    assert page.locator(".stlm-explorer .bad, .jp-OutputArea-output[data-mime-type*=stderr]").count() == 0


def walk_to_switches(page, cell) -> None:
    "Another optimizer and embeddings of n-grams for a flat model, and back."
    from playwright.sync_api import expect
    control(page, "Preset").locator("select").select_option(label="stlm-10m")
    page.get_by_role("button", name="Modern switches").click()
    expect(control(page, "n-gram rows")).to_be_hidden()
    press(page, "n-grams", "ArrowRight")
    expect(control(page, "n-gram rows")).to_be_visible()
    expect(cell).to_have_value(parameters_cell("stlm-10m", {"model.ngram": 2}))
    take_pictures(page, "explorer-switches")
    press(page, "n-grams", "ArrowLeft")
    control(page, "Optimizer").locator("select").select_option(label="schedule-free AdamW")
    expect(cell).to_have_value(parameters_cell("stlm-10m", {"train.optimizer": "schedulefree", "train.schedule": "constant"}))
    control(page, "Optimizer").locator("select").select_option(label="Muon for matrices")
    expect(cell).to_have_value(parameters_cell("stlm-10m", {"train.optimizer": "muon"}))
    control(page, "Preset").locator("select").select_option(label="stlm-10m-modern")
    expect(cell).to_have_value(parameters_cell("stlm-10m-modern", {}))
    expect(control(page, "QK-norm").locator("select")).to_have_value("on")


def walk_to_patches(page, cell) -> None:
    "From flat bytes to patches of bytes, with menus and keys; the numbers are those of `account`."
    from playwright.sync_api import expect

    def expect_figures(changes: dict[str, object], bytes_a_patch: float, marks: int = 0) -> None:
        length = bytes_a_patch + marks
        figures = account(preset("demo-bytes", changes).model, bytes_a_patch / length, symbols_per_patch=length)
        number = page.locator(".stlm-explorer .card[data-figure=forward_flops_per_byte] .number")
        expect(number).to_have_text(f"{short(figures.forward_flops_per_byte)}FLOP per byte")
        stored = page.locator(".stlm-explorer .card[data-figure=unique_parameters] .detail")
        expect(stored).to_have_text(f"{figures.unique_parameters:,} weights to keep")

    def choose(name: str, label: str) -> None:
        control(page, name).locator("select").select_option(label=label)

    choose("Preset", "demo-bytes")
    expect(control(page, "A patch ends")).to_be_hidden()
    choose("Family", "bytes, pooled")
    changes: dict[str, object] = {"model.patches.patcher": "space"}
    expect_figures(changes, TYPICAL_WORD)
    expect(cell).to_have_value(parameters_cell("demo-bytes", changes))
    expect(page.locator(".stlm-explorer .key")).to_contain_text("bytes and patches")

    expect(control(page, "Encoder layers")).to_be_hidden()  # until the group is unfolded, here with the keyboard
    page.get_by_role("button", name="Bytes and patches").press("Enter")
    press(page, "Encoder layers", "ArrowRight")
    expect_figures(changes | {"model.patches.encoder_layers": 2}, TYPICAL_WORD)
    take_pictures(page, "explorer-patches")

    press(page, "Encoder layers", "ArrowLeft")
    choose("A patch ends", "before a surprise (entropy)")
    expect_figures({"model.patches.patcher": "entropy"}, 6)  # the threshold is set for patches of six bytes
    choose("A patch ends", "at marked ends of GPT-2's symbols")
    marked = {"model.patches.patcher": "marks", "data.tokenizer": "bytes+gpt2"}
    expect_figures(marked, TYPICAL_GPT2, marks=1)
    choose("Family", "bytes, flat")
    expect(cell).to_have_value(parameters_cell("demo-bytes", {}))


def take_pictures(page, name: str, app: str = ".stlm-explorer") -> None:
    "What a user sees, in both themes, as artefacts."
    (ROOT / "artifacts").mkdir(exist_ok=True)
    page.locator(app).evaluate("app => app.scrollIntoView({block: 'start'})")
    for theme, ending in (("JupyterLab Dark", "-dark"), ("JupyterLab Light", "")):
        execute(page, "apputils:change-theme", theme=theme)
        page.wait_for_function(f"document.body.dataset.jpThemeName === '{theme}'")
        page.wait_for_selector("#jupyterlab-splash", state="detached")
        page.screenshot(path=ROOT / "artifacts" / f"{name}{ending}.png")


def test_a_run_is_watched_stopped_and_resumed_in_a_real_jupyterlab(browser, lab: str, tmp_path: Path) -> None:
    from playwright.sync_api import expect
    expect.set_options(timeout=120_000)
    notebook = tmp_path / "live.ipynb"
    shorter = notebook.read_text().replace("2_000_000", "150_000").replace("samples:100", "samples:30")
    notebook.write_text(shorter)  # long enough to be stopped, short enough to be finished
    page = run_all_cells(browser, f"{lab}/lab/tree/live.ipynb?token=t&reset")
    picture, words = page.locator(".stlm-live img"), page.locator(".stlm-live")

    expect(picture).to_be_visible()
    first = picture.get_attribute("src")
    expect(picture).not_to_have_attribute("src", first)  # renewed in place
    page.locator(".stlm-live button", has_text="Checkpoint").click()
    expect(words).to_contain_text("checkpoint taken by step")
    page.locator(".stlm-live button", has_text="Stop").click()
    expect(words).to_contain_text("stopped by request at step")
    run, = (Run(path.parent) for path in (tmp_path / "runs").rglob("config.yaml"))
    assert run.status == "stopped" and checkpoints(run.checkpoint_folder)
    take_pictures(page, "live", ".stlm-live")

    page.locator(".stlm-live button", has_text="Resume").click()
    expect(words).to_contain_text("finished:", timeout=300_000)
    assert run.status == "finished"
    expect(page.locator(".stlm-live button", has_text="Resume")).to_be_disabled()
    expect(words).to_contain_text("samples of step")
    said = page.locator(".jp-OutputArea-output[data-mime-type*=stderr]").all_inner_texts()
    assert all("reading documentation" in text for text in said), said  # once, where no cache has the text yet
