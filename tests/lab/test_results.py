"""The CSV of kept results, and the tables that are made from it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest

from whatwhere.cli import main
from whatwhere.lab import recipes, storage
from whatwhere.lab.recipes import PaperFigure
from whatwhere.lab.results import markdown, rows, store

ROOT = Path(__file__).resolve().parents[2]
NAME, PRESET = "openwebtext-124m", "quick"


def folder_of(
    place: Path, values: dict[str, list[float]], metric: str = "perplexity", name: str = NAME
) -> Path:
    """A comparison's folder with one metric: encoding -> value of each seed."""
    folder = place / name
    storage.write_text(folder / "settings.yaml", recipes.to_yaml(recipes.get(name, PRESET)))
    for label, numbers in values.items():
        for seed, value in enumerate(numbers):
            run = folder / f"{label}-seed{seed}"
            record = {
                "fingerprint": "f",
                "config": {},
                "data": {"train_sha256": "0123456789abcdef"},
                "versions": {"python": "3.11", "torch": "2.13.0"},
                "device": {"type": "cpu", "name": "x86_64", "threads": 1},
                "git_commit": "c0ffee",
                "started": "2026-11-21T00:00:00+00:00",
            }
            storage.write_json(run / "run.json", record)
            storage.write_json(run / "done.json", {"seconds": 12.5})
            rows = [(label, seed, metric, 128, value), (label, seed, "loss_spikes", 128, 1.0)]
            pd.DataFrame(rows, columns=["encoding", "seed", "metric", "length", "value"]).to_csv(
                run / "results.csv", index=False
            )
    return folder


def test_figures_are_kept_with_where_they_are_from(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert store.add(path, [folder_of(tmp_path, {"rope": [5.0, 6.0], "pope": [4.0]})]) == (6, 0)
    table = store.load(path)
    row = table[(table["encoding"] == "rope") & (table["seed"] == 1)].iloc[-1].to_dict()
    assert row["value"] == 6.0 and row["wall_seconds"] == 12.5 and row["data"] == "0123456789ab"
    assert row["device"] == "cpu x86_64, 1 thread(s)" and "torch 2.13.0" in row["versions"]
    assert row["commit"] == "c0ffee" and math.isnan(row["paper_value"])


def test_measured_again_a_figure_takes_the_old_ones_place(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    store.add(path, [folder_of(tmp_path / "a", {"rope": [5.0], "pope": [4.0]})])
    assert store.add(path, [folder_of(tmp_path / "b", {"rope": [4.5]})]) == (0, 2)
    table = store.load(path).set_index(["encoding", "metric"])["value"]
    assert table["rope", "perplexity"] == 4.5 and table["pope", "perplexity"] == 4.0
    before = path.read_bytes()
    store.add(path, [tmp_path / "b" / NAME])
    assert path.read_bytes() == before


def test_only_recipes_as_they_are_shipped_are_kept(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"rope": [5.0]})
    shipped = recipes.get(NAME, PRESET)
    shorter = shipped.training.model_copy(update={"steps": 5})
    changed = shipped.model_copy(update={"training": shorter})
    storage.write_text(folder / "settings.yaml", recipes.to_yaml(changed))
    path = tmp_path / "results.csv"
    with pytest.raises(ValueError, match=r"training\.steps: 300 -> 5"):
        store.add(path, [folder])
    assert not path.exists()
    fewer = shipped.evaluation.model_copy(update={"examples": 1})
    changed = shipped.model_copy(update={"evaluation": fewer})
    storage.write_text(folder / "settings.yaml", recipes.to_yaml(changed))
    with pytest.raises(ValueError, match=r"evaluation\.examples: 256 -> 1"):
        store.add(path, [folder])
    storage.write_text(
        folder / "settings.yaml",
        recipes.to_yaml(shipped.model_copy(update={"name": "mine", "preset": None})),
    )
    with pytest.raises(ValueError, match="'mine', preset None is none of the package's"):
        store.add(path, [folder])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("metric", "metrik", 1), "columns"),
        (lambda text: text + text.splitlines()[-1] + "\n", "twice"),
        (lambda text: text.replace(",5.0,", ",five,"), "column value"),
    ],
)
def test_a_file_edited_by_hand_is_refused(damage: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    store.add(path, [folder_of(tmp_path, {"rope": [5.0]})])
    assert callable(damage)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message):
        store.load(path)
    assert main(["results", "--file", str(path)]) == 2


def test_tables_hold_what_was_run_and_say_what_was_not(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    store.add(path, [folder_of(tmp_path, {"rope": [5.0, 6.0]})])
    table = store.load(path)
    text = markdown.of_recipe(table, NAME, PRESET, [("perplexity", None)])
    assert "| RoPE | 5.50 ± 0.71 |" in text and "| PoPE | not run here |" in text
    assert "seeds 0, 1; cpu x86_64, 1 thread(s), torch 2.13.0" in text
    printed = markdown.of_recipe(table, NAME, "paper", [("perplexity", None)])
    assert "| PoPE | not run here | 21.33 |" in printed and "Nothing of this was run" in printed
    everything = markdown.papers(table)
    assert "| `rope-id-3b` | YaRN | RULER, % at 16,384 | 40.14 | not run here |" in everything
    assert (
        "| `indirect-indexing` | PoPE | accuracy, % | 94.82 ± 2.91 | not run here |" in everything
    )


def test_figures_of_a_paper_are_the_packages_not_the_folders(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"rope": [5.0]})
    shipped = recipes.get(NAME, PRESET)
    made_up = {"rope": {"perplexity": PaperFigure(value=99.0, source="me")}}
    storage.write_text(
        folder / "settings.yaml", recipes.to_yaml(shipped.model_copy(update={"paper": made_up}))
    )
    assert all(math.isnan(row["paper_value"]) for row in store.rows_of(folder))


def test_perplexities_at_lengths_are_of_the_text_that_lengths_are_measured_on() -> None:
    rows = [
        ("rope", 0, "perplexity", 1024, 21.55),  # of the validation split
        ("rope", 0, "loss", 1024, math.log(30.0)),
        ("rope", 0, "loss", 2048, math.log(40.0)),
        ("pope", 0, "loss", 1024, math.log(29.0)),
    ]
    table = pd.DataFrame(rows, columns=["encoding", "seed", "metric", "length", "value"])
    table = table.assign(recipe="pg19-124m", preset="paper", device="d", versions="torch 2.13.0")
    text = markdown.of_recipe(
        table, "pg19-124m", "paper", [("perplexity", 1024), ("perplexity", 2048)]
    )
    assert "| RoPE | 30.00 | 40.00 |" in text and "| PoPE | 29.00 | not run here |" in text
    whole = markdown.of_recipe(table, "pg19-124m", "paper", [("perplexity", None)])
    assert "| RoPE | 21.55 |" in whole


def test_a_digest_of_digits_stays_a_digest(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    store.add(path, [folder_of(tmp_path, {"rope": [5.0]})])
    path.write_text(path.read_text().replace("0123456789ab", "012345678901"))
    assert set(store.load(path)["data"]) == {"012345678901"}
    path.write_text('a,b\n"1,2\n')
    with pytest.raises(ValueError, match=r"results\.csv: "):
        store.load(path)


def test_marked_tables_are_written_in_place(tmp_path: Path) -> None:
    path, page = tmp_path / "results.csv", tmp_path / "page.md"
    store.add(path, [folder_of(tmp_path, {"rope": [5.0]})])
    marker = f"<!-- results: {NAME} {PRESET} perplexity -->"
    page.write_text(f"before\n\n{marker}\nold\n<!-- end of results -->\n\nafter\n")
    assert main(["results", "--file", str(path), "--tables", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| RoPE | 5.00 |" in text
    assert not markdown.fill(page, store.load(path))
    for wrong, message in (
        (marker, "not closed"),
        (marker.replace(NAME, "nothing") + "\n<!-- end of results -->", "unknown recipe"),
        (f"<!-- results: {NAME} -->\n<!-- end of results -->", "RECIPE PRESET METRIC"),
    ):
        page.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            markdown.fill(page, store.load(path))
        assert page.read_text() == wrong


@pytest.mark.parametrize(
    "page",
    sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("docs/*.md"), ROOT / "README.md"]),
)
def test_committed_tables_are_those_of_the_committed_results(page: str) -> None:
    made = markdown.filled(ROOT / page, store.load(ROOT / store.DEFAULT))
    assert made == (ROOT / page).read_text(encoding="utf-8"), (
        f"{page}: run `whatwhere results --tables {page}`"
    )


def test_committed_results_belong_to_shipped_recipes() -> None:
    table = store.load(ROOT / store.DEFAULT)
    for name, preset in set(zip(table["recipe"], table["preset"], strict=True)):
        recipe = recipes.get(name, preset)
        own = table[(table["recipe"] == name) & (table["preset"] == preset)]
        known = {*recipe.encodings, *recipe.ours}
        assert set(own["encoding"]) <= known
        assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in own["commit"])


def test_every_row_has_an_anchor_and_seeds_are_taken_together(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    store.add(path, [folder_of(tmp_path, {"rope": [5.0, 6.0], "pope": [4.0]})])
    text = rows.measured(store.load(path))
    mark = f'<a id="{rows.anchor(NAME, PRESET, "rope", "perplexity", 128)}"></a>'
    assert f"| {mark}RoPE | `perplexity` | 128 | 5.5 | 0.707107 | 2 |" in text
    assert "PoPE | `perplexity` | 128 | 4 |  | 1 |" in text
    anchors = re.findall(r'<a id="([^"]+)"></a>', text + rows.printed())
    assert len(anchors) == len(set(anchors))
    printed = rows.anchor("paper", "rope-id-3b", "yarn", "ruler_accuracy", 16384)
    assert printed in anchors and "| 0.4014 | arXiv 2603.18017, RULER |" in rows.printed()


def test_rows_of_other_files(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    path.write_text("shape,seed,pass,ratio,date\n4x8,0,forward,1.5,d\n4x8,1,forward,1.7,d\n")
    page = tmp_path / "page.md"
    page.write_text("<!-- results: rows times.csv 3 -->\n<!-- end of results -->\n")
    table = store.load(tmp_path / "none.csv")
    assert markdown.fill(page, table) and not markdown.fill(page, table)
    assert '| <a id="times-4x8-forward"></a>4x8 | forward | 1.6 |' in page.read_text()
    for wrong, message in (
        ("rows times.csv 1", "do not tell rows apart"),
        ("rows nothing.csv 1", "no file"),
        ("rows times.csv", "expected rows"),
    ):
        page.write_text(f"<!-- results: {wrong} -->\n<!-- end of results -->\n")
        with pytest.raises(ValueError, match=message):
            markdown.fill(page, table)
