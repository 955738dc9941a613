"""The front page and the published pages: in step with their notebooks, without dead ends, at home on a phone."""

import re
from pathlib import Path

import nbformat
import pytest

from stlm.lab.reports import chapters, readme, render, render_site

ROOT = Path(__file__).resolve().parents[1]


def test_readme_is_rendered_from_the_index() -> None:
    assert (ROOT / "README.md").read_text("utf-8") == readme(ROOT / "nbs" / "index.ipynb"), "run make readme"


def test_readme_leads_to_every_notebook_and_to_nothing_that_is_not_there() -> None:
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", (ROOT / "README.md").read_text("utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []
    missing = {path.relative_to(ROOT).as_posix() for path in chapters(ROOT / "nbs")} - set(links) - {"nbs/index.ipynb"}
    assert not missing, "run make readme"


def test_every_notebook_becomes_a_page(tmp_path: Path) -> None:
    site = render_site(ROOT / "nbs", tmp_path / "site").parent
    assert len(list(site.rglob("*.html"))) == len(chapters(ROOT / "nbs"))
    for page in site.rglob("*.html"):
        links = {(page.parent / link).resolve() for link in re.findall(r'<a [^>]*href="(?![a-z]+:|#)([^"#]+)', page.read_text("utf-8"))}
        assert [link for link in links if link.is_relative_to(site) and not link.exists()] == [], page.name


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fetches_nothing_and_fits_a_phone(browser, tmp_path: Path, scheme: str) -> None:
    wide = "| " + " | ".join(f"column {i}" for i in range(20)) + " |\n" + "|---" * 20 + "|\n" + "| 123456 " * 20 + "|"
    formula = "$$" + "x_i + " * 60 + "1$$"
    prose = f"# A study\n\n> In one sentence.\n\n{'Words and words. ' * 50}\n\n## Numbers\n\n{wide}\n\n{formula}"
    picture = "<svg xmlns='http://www.w3.org/2000/svg' width='1500' height='200'><rect width='1500' height='200'/></svg>"
    outputs = [nbformat.v4.new_output("stream", text="x" * 500), nbformat.v4.new_output("display_data", data={"image/svg+xml": picture})]
    cells = [nbformat.v4.new_markdown_cell(prose), nbformat.v4.new_code_cell("y = 1  # " + "long " * 60, outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "study.ipynb")
    page = browser.new_page(viewport={"width": 360, "height": 700}, color_scheme=scheme)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(render(tmp_path / "study.ipynb", tmp_path / "page.html").as_uri())
    page.click("summary")
    assert [url for url in requests if not url.startswith("data:")] == [(tmp_path / "page.html").as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(23, 23, 23)")
