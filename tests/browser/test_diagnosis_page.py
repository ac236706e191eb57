"""The page of a diagnosis in a real browser: nothing is fetched, cut off or out of place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report_page import VIEWPORTS, beyond_the_edge

import diagnosis_frames as made
from whatwhere.lab.diagnose.measured import Measured
from whatwhere.lab.diagnose.page import build
from whatwhere.lab.diagnose.settings import Settings


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two models, one with a very long name."""
    folder = tmp_path_factory.mktemp("diagnosis")
    frames = {
        "geometry": made.geometry(),
        "clusters": made.clusters(),
        "scores": made.scores(),
        "what_where": made.what_where(),
        "loss_by_length": made.loss(),
    }
    one = Measured("rope", "nats per byte", made.TRAIN, frames, made.TRAIN, "a reason")
    two = replace(one, label="x" * 80, notes=("y" * 200,))
    settings = Settings("/z" * 100, ("/t" * 100,), made.LENGTHS, folder)
    record = {
        "seed": 0,
        "config": {"model": settings.model, "lengths": list(made.LENGTHS)},
        "device": {"type": "cpu", "name": "x86_64", "threads": 1},
        "versions": {"torch": "2"},
        "git_commit": "a" * 40,
    }
    (folder / "record.json").write_text(json.dumps(record))
    return build([one, two], settings, folder)


@pytest.mark.parametrize("viewport", VIEWPORTS)
def test_page_opens_from_disk_and_fits(browser: Any, page: Path, viewport: str) -> None:
    width, height = VIEWPORTS[viewport]
    tab = browser.new_page(viewport={"width": width, "height": height})
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert beyond_the_edge(tab) == []
    finding = tab.locator("#finding")
    assert finding.is_visible() and finding.bounding_box()["y"] < height / 3
    images = tab.evaluate(
        "[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])"
    )
    assert len(images) == 5
    for complete, natural, shown in images:
        assert complete and natural > 200 and shown > 0.85 * min(width, 1024) - 60
    tab.close()
