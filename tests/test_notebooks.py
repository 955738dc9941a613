"""Every notebook of the book runs from top to bottom, against the package that it exports.

An exported cell is not executed: the names it defines come from the module in `stlm/`. So the asserts of a notebook test what users
import, `isinstance` works across notebooks, and the coverage counts.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch
from execnb.shell import CaptureShell
from IPython.core.interactiveshell import InteractiveShell
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[CaptureShell]:
    "An IPython of its own for one notebook; what the notebook changes around it is put back."
    main, environment = sys.modules["__main__"], dict(os.environ)
    monkeypatch.chdir(ROOT / "nbs")
    torch.set_num_threads(1)
    yield CaptureShell(mpl_format="png")
    InteractiveShell._instance = None
    sys.modules["__main__"] = main
    os.environ.clear()
    os.environ.update(environment)
    plt.close("all")
    matplotlib.rcdefaults()
    matplotlib.use("agg")


def directives(source: str) -> list[list[str]]:
    "The words of every `#|` line."
    return [line[2:].split() for line in source.splitlines() if line.startswith("#|")]


def left_out(slow: bool) -> set[str]:
    "Which of the flags in settings.ini keep a cell from running here."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    possible = {"slow": slow, "cuda": torch.cuda.is_available()}
    return {flag for flag in settings["DEFAULT"]["tst_flags"].split() if not possible[flag]}


def is_run(words: list[list[str]], flags: set[str]) -> bool:
    "Whether a cell with these directives is executed."
    first = {line[0] for line in words if line}
    return not first & ({"export", "exports", "exporti", "default_exp"} | flags) and ["eval:", "false"] not in words


def exported_names(cells: list[str]) -> dict[str, object]:
    "Everything that the notebook's module defines or imports."
    names = [line[1] for source in cells for line in directives(source) if line[:1] == ["default_exp"]]
    module = importlib.import_module(f"stlm.{names[0]}") if names else None
    return {name: value for name, value in vars(module).items() if not name.startswith("__")} if module else {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, shell: CaptureShell, request: pytest.FixtureRequest) -> None:
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    flags = left_out(request.config.getoption("--slow"))
    shell.user_ns.update(exported_names(cells))
    for number, source in enumerate(cells, start=1):
        if is_run(directives(source), flags):
            shell.run(source)
            if shell.exc:
                what = "".join(traceback.format_exception(shell.exc))
                pytest.fail(f"{path.relative_to(ROOT)}, code cell {number}:\n\n{source}\n\n{what}", pytrace=False)
