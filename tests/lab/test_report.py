"""The report page: what it says of whole, partial and broken folders, and that it stands alone."""

from __future__ import annotations

import json
import math
import shutil
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
import pytest

from comparison_folder import (
    LENGTHS,
    RECORD,
    accuracy,
    loss,
    merge,
    text_recipe,
    write_comparison,
    write_run,
    write_settings,
)
from whatwhere.lab import recipes
from whatwhere.lab.report import page as report
from whatwhere.lab.report.page import build_report

LABELS = ("rope", "yarn", "rope-id", "pope")


class Page(HTMLParser):
    """Elements, visible text and tables of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += f" {data}" if "small" in self._open else data

    def row(self, name: str, table: int = 0) -> list[str]:
        """Cells of the row of a table that begins with a name."""
        (found,) = [row for row in self.tables[table] if row[0].startswith(name)]
        return [cell.strip() for cell in found[1:]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four encodings and three seeds, and its report."""
    folder = tmp_path_factory.mktemp("report") / "text"
    return build_report(write_comparison(folder, text_recipe(LABELS, (0, 1, 2))))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures out, for tests of words."""
    monkeypatch.setattr(report, "_drawings", lambda *_: [])


def test_page_needs_nothing_but_itself(whole: Path) -> None:
    page = Page(whole)
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "iframe", "object"} & set(tags)
    images = [attrs for tag, attrs in page.elements if tag in ("img", "source")]
    assert len(images) == 8
    for attrs in images:
        address = attrs.get("src") or attrs["srcset"]
        assert address and address.startswith("data:image/svg+xml;base64,")
    assert all(attrs["alt"] for tag, attrs in page.elements if tag == "img")
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert links and all((whole.parent / str(link)).is_file() for link in links)
    assert "http://" not in whole.read_text() and "https://" not in whole.read_text()
    policy = next(a["content"] for t, a in page.elements if "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_figures_lie_beside_the_page_and_nothing_unfinished_does(whole: Path) -> None:
    names = {path.name for path in whole.parent.iterdir() if path.is_file()}
    stems = ("loss_by_length", "perplexity_by_length", "loss_by_position", "training_curves")
    figures = {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert names == figures | {"report.html", "results.csv", "settings.yaml"}


def test_same_folder_gives_the_same_page(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(whole.parent, copy)
    before = {path.name: path.read_bytes() for path in copy.glob("*.*")}
    build_report(copy)
    assert {path.name: path.read_bytes() for path in copy.glob("*.*")} == before


def test_finding_is_the_mean_change_with_length(whole: Path) -> None:
    change = {
        label: 100 * mean(loss(label, s, 1280) / loss(label, s, 128) - 1 for s in range(3))
        for label in LABELS
    }
    expected = (
        f"At 1,280 bytes, 10 times the training length, PoPE's loss is {change['pope']:.1f} % "
        f"above its own at 128; YaRN's {change['yarn']:.0f} %, RoPE-ID's "
        f"{change['rope-id']:.0f} %, RoPE's {change['rope']:.0f} %."
    )
    assert expected in Page(whole).text.replace("\u00a0", " ")


def test_table_holds_mean_spread_and_change_of_each_encoding(whole: Path) -> None:
    page = Page(whole)
    assert [row[0] for row in page.tables[0][2:]] == ["PoPE", "YaRN", "RoPE-ID", "RoPE"]
    assert page.tables[0][1] == ["128", "256", "512", "1,280", "256", "512", "1,280"]
    cells = page.row("RoPE-ID")
    for cell, length in zip(cells, LENGTHS, strict=False):
        values = [loss("rope-id", seed, length) for seed in range(3)]
        assert cell == f"{mean(values):.3f} ± {stdev(values):.3f}"
    assert cells[-1].replace("\u00a0", " ").startswith("+34 %")
    assert "Mean ± sample standard deviation over 3 seeds." in page.text


def test_training_facts_come_from_the_runs(whole: Path) -> None:
    page = Page(whole)
    steps, time, validation, parameters, norm, spikes, table = page.row("PoPE seed 1", 1)
    assert (steps, time) == ("1,000", "2 min 31 s 151 ms a step")
    assert validation == f"{loss('pope', 1, 128) + 0.01:.3f}"
    assert (parameters, norm, spikes, table) == ("840,192", "2.75", "3", "160.0 KiB")
    assert "weights of rope-seed2" in page.text  # YaRN's third run


def test_page_holds_settings_versions_device_commit_and_the_command(whole: Path) -> None:
    text = whole.read_text()
    assert (whole.parent / "settings.yaml").read_text().splitlines()[-1] in text
    for expected in ("whatwhere compare settings.yaml", "2.11.0", "a processor (cpu, 2 threads)"):
        assert expected in text
    assert RECORD["git_commit"] in text and 'class="notices"' not in text


def test_one_seed_has_no_spread(tmp_path: Path, no_figures: None) -> None:
    page = Page(build_report(write_comparison(tmp_path / "text", text_recipe(("rope", "nope")))))
    assert "±" not in page.text and "One seed: no spread can be given." in page.text


def test_partial_results_are_shown_and_what_is_missing_named(tmp_path: Path) -> None:
    recipe = text_recipe(("rope", "pope", "nope", "alibi", "learned"))
    folder = tmp_path / "text"
    write_settings(folder, recipe)
    write_run(folder, recipe, "rope", 0)
    write_run(folder, recipe, "pope", 0, "trained")
    write_run(folder, recipe, "nope", 0, "stopped")
    with (folder / "nope-seed0" / "log.jsonl").open("a") as log:
        log.write('{"step": 410, "lo')  # killed while it wrote
    (folder / "alibi-seed0").mkdir()
    page = Page(build_report(merge(folder)))
    assert "Partial: 4 of 5 runs without results" in page.text
    assert "pope-seed0 not evaluated" in page.text
    assert "nope-seed0 stopped at step 400 of 1,000" in page.text
    assert "alibi-seed0, learned-seed0 not begun" in page.text
    assert page.row("RoPE")[0] == f"{loss('rope', 0, 128):.3f}"
    assert page.row("PoPE") == ["–"] * 7
    assert page.row("NoPE seed 0", 1)[:2] == ["400", "1 min 0 s 150 ms a step"]
    images = [attrs["alt"] for tag, attrs in page.elements if tag == "img"]
    assert len(images) == 4


@pytest.mark.parametrize("state", [None, "stopped", "trained"])
def test_no_results_yet_still_makes_a_page(tmp_path: Path, state: str | None) -> None:
    folder, recipe = tmp_path / "text", text_recipe(("rope", "pope"))
    write_settings(folder, recipe)
    if state:
        write_run(folder, recipe, "rope", 0, state)
    page = Page(build_report(folder))
    begun, trained = int(state is not None), int(state == "trained")
    assert f"No results yet: of 2 runs {begun} have begun and {trained} are trained." in page.text
    assert (folder / "training_curves.svg").exists() == bool(state)
    assert all((folder / a["href"]).exists() for t, a in page.elements if t == "a")


def test_encodings_without_some_lengths_say_so(tmp_path: Path, no_figures: None) -> None:
    folder = write_comparison(tmp_path / "text", text_recipe(("rope", "learned")))
    page = Page(build_report(folder))
    assert "No loss of learned at 256, 512, 1,280: its table of positions ends before" in page.text
    assert page.row("learned")[1:] == ["–"] * 6


def test_what_users_and_files_say_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    recipe = text_recipe(("rope",))
    data = recipe.data.model_copy(update={"paths": (evil,)})
    recipe = recipe.model_copy(update={"description": evil, "data": data})
    folder = tmp_path / "text"
    write_settings(folder, recipe)
    about: dict[str, Any] = {"source": evil, "files": [evil], evil: 1}
    device = {"type": evil, "name": evil}
    write_run(folder, recipe, "rope", 0, data=about, device=device, versions={evil: evil})
    page = Page(build_report(merge(folder)))
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [a for _, a in page.elements if "onerror" in a or a.get("src") == "x"]
    assert page.text.count("<script>alert(1)</script>") >= 6


def test_accuracy_is_shown_beside_the_papers(tmp_path: Path) -> None:
    recipe = recipes.get("indirect-indexing", "paper")
    two = {label: recipe.encodings[label] for label in ("rope", "pope", "sinusoidal")}
    recipe = recipe.model_copy(update={"encodings": two})
    folder = tmp_path / "indirect-indexing"
    write_settings(folder, recipe)
    for seed in recipe.seeds:
        write_run(folder, recipe, "pope", seed)
        write_run(folder, recipe, "rope", seed)
    page = Page(build_report(merge(folder)))
    text = page.text.replace("\u00a0", " ")
    assert "PoPE answers 94.0 % correctly (the paper: 94.8 %); RoPE 13.0 % (11.2 %)." in text
    ours = [100 * accuracy("pope", seed) for seed in recipe.seeds]
    assert page.row("PoPE")[:2] == [
        f"{mean(ours):.2f} ± {stdev(ours):.2f}",
        "94.82 ± 2.91",
    ]
    assert page.row("sinusoidal")[:2] == ["–", "1.90 ± 0.04"]
    assert "delta=uniform" in text and "arXiv 2509.10534v3" in text
    assert "nats per target" in text
    assert (folder / "accuracy.png").exists() and (folder / "accuracy_curves.svg").exists()


def test_papers_loss_on_text_has_a_column(tmp_path: Path, no_figures: None) -> None:
    figure = recipes.PaperFigure(value=1.234, spread=0.01, source="a paper <1>")
    recipe = text_recipe(("rope", "pope")).model_copy(update={"paper": {"pope": {"loss": figure}}})
    page = Page(build_report(write_comparison(tmp_path / "text", recipe)))
    assert page.row("PoPE")[-1] == "1.234 ± 0.010" and page.row("RoPE")[-1] == "–"
    assert "The paper: a paper <1>." in page.text


def test_a_diverged_run_is_named_and_left_out_of_the_finding(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "text", text_recipe(("rope", "pope", "nope")))
    table = pd.read_csv(folder / "rope-seed0" / "results.csv")
    table.loc[table["metric"] == "loss", "value"] = [math.inf, math.nan, math.nan, math.inf]
    table.to_csv(folder / "rope-seed0" / "results.csv", index=False)
    page = Page(build_report(folder))
    assert page.row("RoPE")[:4] == ["not finite"] * 4
    assert "RoPE, seed 0: loss at 1,280 is not finite." in page.text
    assert "; NoPE's" in page.text and "RoPE's" not in page.text.split("1 seed")[0]


def test_runs_that_differ_in_versions_are_pointed_out(tmp_path: Path, no_figures: None) -> None:
    folder = write_comparison(tmp_path / "text", text_recipe(("rope", "pope")))
    path = folder / "pope-seed0" / "run.json"
    record = json.loads(path.read_text())
    record["versions"]["torch"], record["git_commit"] = "2.12.0", None
    path.write_text(json.dumps(record))
    page = Page(build_report(folder))
    assert "Runs differ in torch: 2.11.0, 2.12.0." in page.text
    assert "Runs differ in python" not in page.text and "differ in commit" not in page.text


def test_results_alone_are_enough(whole: Path, tmp_path: Path, no_figures: None) -> None:
    for name in ("settings.yaml", "results.csv"):
        shutil.copy(whole.parent / name, tmp_path)
    page = Page(build_report(tmp_path))
    assert page.tables[0] == Page(whole).tables[0]
    assert "without results" not in page.text


def test_results_that_a_run_has_lost_are_not_shown(tmp_path: Path, no_figures: None) -> None:
    # `compare` removes a run's own results when evaluation settings change.
    folder = write_comparison(tmp_path / "text", text_recipe(("rope", "pope")))
    (folder / "pope-seed0" / "results.csv").unlink()
    page = Page(build_report(folder))
    assert page.row("PoPE") == ["–"] * 7 and "pope-seed0 not evaluated" in page.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.csv", "encoding,seed\nrope,0\n"),
        ("results.csv", "encoding,seed,metric,length,value\nrope,0,loss,128,much\n"),
        ("results.csv", ""),
        ("run.json", "{"),
        ("done.json", "[]"),
        ("loss_by_position.csv", "position,loss\nfirst,1\n"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, no_figures: None, name: str, content: str
) -> None:
    folder = write_comparison(tmp_path / "text", text_recipe(("rope", "pope")))
    (folder / "rope-seed0" / name).write_text(content)
    page = Page(build_report(folder))
    assert f"rope-seed0/{name} could not be read" in page.text
    assert page.row("PoPE")[0] == f"{loss('pope', 0, 128):.3f}"


def test_labels_that_look_like_missing_values_are_labels(tmp_path: Path) -> None:
    recipe = text_recipe(("rope",))
    odd = {"nan": recipe.encodings["rope"], "null": recipe.encodings["rope"]}
    folder = tmp_path / "text"
    write_settings(folder, recipe.model_copy(update={"encodings": odd}))
    rows = [f"{label},0,loss,{n},1.5" for label in odd for n in LENGTHS]
    (folder / "results.csv").write_text("\n".join(["encoding,seed,metric,length,value", *rows]))
    page = Page(build_report(folder))
    assert page.row("nan")[0] == page.row("null")[0] == "1.500"


def test_a_folder_that_is_no_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no comparison.*settings\.yaml"):
        build_report(tmp_path)
    (tmp_path / "settings.yaml").write_text("name: text\nnonsense: 1\n")
    with pytest.raises(ValueError, match="nonsense"):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_templates_are_part_of_the_package() -> None:
    folder = resources.files("whatwhere.lab.report") / "templates"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"report.html.j2", "table.html.j2", "report.css"}
