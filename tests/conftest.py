"""What all tests share: one thread a worker, one cache of prepared data, a browser where there is one."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before anything else is imported, so that workers and the processes they start agree. Results depend on none of it.
os.environ.setdefault("STLM_CACHE", str(ROOT / "artifacts" / "cache"))  # the text is extracted once for all workers, and kept
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many workers as cores: more threads would only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MPLBACKEND"] = "agg"

SHARED = ROOT.parent / "shared" / "data"
if SHARED.is_dir():  # real text beside the checkout is found as `make` finds it
    os.environ.setdefault("STLM_SHARED_DATA", str(SHARED))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the notebook cells marked #| slow as well")


@pytest.fixture
def browser() -> Iterator["playwright.sync_api.Browser"]:  # noqa: F821 - imported only where it is used
    "A headless Chromium, closed at the end of the test."
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed; .ci/run installs one")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
