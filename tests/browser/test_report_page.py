"""The report in a real browser: it opens from disk, and nothing is cut off or out of place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from comparison_folder import SLOPES, merge, text_recipe, write_comparison, write_run
from comparison_folder import write_settings as begin
from whatwhere.lab import recipes
from whatwhere.lab.report.page import build_report

VIEWPORTS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of every encoding, of a partial comparison with long names, of accuracies."""
    place = tmp_path_factory.mktemp("browser")
    every = write_comparison(place / "every", text_recipe(tuple(SLOPES), (0, 1)))
    long = text_recipe(("rope", "pope"))
    name = "x" * 64
    encodings = {**long.encodings, name: long.encodings["rope"]}
    long = long.model_copy(update={"encodings": encodings, "description": "y" * 300})
    begin(place / "long", long)
    write_run(place / "long", long, "rope", 0, data={"source": "/z" * 200, "sha256": "a" * 64})
    answers = recipes.get("indirect-indexing", "paper")
    begin(place / "answers", answers)
    for label in ("rope", "pope"):
        write_run(place / "answers", answers, label, 0)
    folders = {"every": every, "long": merge(place / "long"), "answers": merge(place / "answers")}
    return {name: build_report(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("viewport", VIEWPORTS)
@pytest.mark.parametrize("name", ["every", "long", "answers"])
def test_page_opens_from_disk_and_fits(
    browser: Any, pages: dict[str, Path], name: str, viewport: str
) -> None:
    width, height = VIEWPORTS[viewport]
    page = browser.new_page(viewport={"width": width, "height": height})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert [url for url in asked if url.startswith("file:")] == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert beyond_the_edge(page) == []
    finding = page.locator("#finding")
    assert finding.is_visible() and finding.bounding_box()["y"] < height / 3
    images = page.evaluate(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth, "
        "i.naturalHeight / i.naturalWidth - i.clientHeight / i.clientWidth])"
    )
    assert len(images) == {"every": 4, "long": 4, "answers": 3}[name]
    for complete, natural, shown, distortion in images:
        assert complete and natural > 200 and abs(distortion) < 0.01
        assert shown > 0.85 * min(width, 1024) - 60
    page.close()


def beyond_the_edge(page: Any) -> list[str]:
    """Elements that stick out of the page and are in nothing that scrolls."""
    found: list[str] = page.evaluate(
        """[...document.querySelectorAll('main *')].filter(e =>
             !e.closest('.scroll') && !e.closest('pre') &&
             e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
           ).map(e => e.outerHTML.slice(0, 80))"""
    )
    return found


def test_phone_gets_the_narrow_figures(browser: Any, pages: dict[str, Path]) -> None:
    shapes = {}
    for name, (width, height) in VIEWPORTS.items():
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(pages["every"].as_uri())
        image = page.locator("#loss_by_length img").bounding_box()
        shapes[name] = image["height"] / image["width"]
        page.close()
    assert shapes["phone"] > 0.9 and shapes["desktop"] < 0.6


def test_wide_tables_scroll_with_their_names_in_sight(
    browser: Any, pages: dict[str, Path]
) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(pages["every"].as_uri())
    box = page.locator(".scroll").last
    hidden = box.evaluate("e => e.scrollWidth - e.clientWidth")
    assert hidden > 50
    name = box.locator("tbody th").first
    before = name.bounding_box()["x"]
    box.evaluate("e => e.scrollLeft = 1e6")
    assert abs(name.bounding_box()["x"] - before) <= 1
    last = box.locator("tbody tr").first.locator("td").last.bounding_box()
    assert last["x"] + last["width"] <= 390
    page.close()


def test_numbers_of_a_column_end_at_one_line(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(pages["every"].as_uri())
    # Right edges of the first line of text in each cell of the first column of losses.
    edges = page.evaluate(
        """[...document.querySelector('table').tBodies[0].rows].map(row => {
             const range = document.createRange();
             range.selectNodeContents(row.cells[1].firstChild);
             return range.getBoundingClientRect().right;
           })"""
    )
    assert len(edges) == len(SLOPES) and max(edges) - min(edges) < 1.5
    page.close()
