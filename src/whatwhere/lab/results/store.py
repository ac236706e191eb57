"""`results/results.csv`: every figure that was ever measured and committed, one a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from whatwhere.lab import recipes, runs, storage
from whatwhere.lab.planning import plain
from whatwhere.lab.recipes.schema import PaperFigure, Recipe

COLUMNS = [
    *("recipe", "preset", "encoding", "seed", "metric", "length", "value"),
    *("paper_value", "paper_source"),
    *("data", "device", "versions", "commit", "started", "wall_seconds"),
]
"""Columns: `value` in the unit of its metric (losses in nats per token, accuracies 0 to 1),
`length` in tokens, `data` the first digits of the SHA-256 of the training tokens, `wall_seconds`
that of the run's training steps."""

KEY = ["recipe", "preset", "encoding", "seed", "metric", "length"]
"""What a figure is known by: measured again, it takes the place of the old one."""

DEFAULT = Path("results") / "results.csv"


def load(path: Path) -> pd.DataFrame:
    """Read the file; empty if there is none.

    Raises:
        ValueError: If it has other columns, a value that is no number, or a figure twice.
    """
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    text = ["recipe", "preset", "encoding", "metric", "paper_source", "data", "device"]
    try:
        table = pd.read_csv(
            path,
            dtype=dict.fromkeys([*text, "versions", "commit", "started"], str),
            keep_default_na=False,
            na_values={"paper_value": [""], "wall_seconds": [""], "value": ["nan"]},
        )
    except ValueError as error:
        raise ValueError(f"{path}: no CSV of results: {error}") from None
    if list(table.columns) != COLUMNS:
        raise ValueError(f"{path}: columns {list(table.columns)}, expected {COLUMNS}")
    for name in ("value", "paper_value", "wall_seconds", "seed", "length"):
        try:
            table[name] = pd.to_numeric(table[name])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: column {name}: {error}") from None
    twice = table[table.duplicated(KEY)]
    if len(twice):
        row = twice.iloc[0]
        raise ValueError(f"{path}: twice: {', '.join(str(row[name]) for name in KEY)}")
    return table


def add(path: Path, folders: Sequence[Path]) -> tuple[int, int]:
    """Write the results of comparisons into the file.

    Args:
        path: The file; made if it is not there.
        folders: Of comparisons.

    Returns:
        How many figures are new, and how many took the place of older ones.

    Raises:
        ValueError: If a folder is no comparison, has no results, or its recipe is none that the
            package ships; the file is as it was then.
    """
    known = load(path)
    parts = [pd.DataFrame(rows_of(folder), columns=COLUMNS) for folder in folders]
    new = pd.concat(parts, ignore_index=True)
    keys = pd.MultiIndex.from_frame(new[KEY])
    if keys.has_duplicates:
        double = keys[keys.duplicated()][0]
        raise ValueError(f"two folders hold the same figure: {', '.join(map(str, double))}")
    replaced = pd.MultiIndex.from_frame(known[KEY]).isin(keys)
    kept = known[~replaced]
    merged = pd.concat([part for part in (kept, new) if len(part)], ignore_index=True)
    order = {name: place for place, name in enumerate(recipes.names())}
    merged = merged.sort_values(
        KEY,
        kind="stable",
        key=lambda column: column.map(order) if column.name == "recipe" else column,
    )
    storage.write_text(path, merged.to_csv(index=False))
    old = int(sum(replaced))
    return len(new) - old, old


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The results of a comparison's folder as rows of the file.

    Raises:
        ValueError: As for `add`.
    """
    settings = folder / "settings.yaml"
    if not settings.exists():
        raise ValueError(f"{folder} is no comparison: it holds no settings.yaml")
    recipe = recipes.from_yaml(settings)
    if recipe.name not in recipes.names() or recipe.preset not in recipes.presets(recipe.name):
        raise ValueError(
            f"{folder}: recipe {recipe.name!r}, preset {recipe.preset!r} is none of the "
            "package's: only those are kept, as anybody can run them again"
        )
    shipped = recipes.get(recipe.name, recipe.preset)
    apart = {"encodings", "ours", "seeds", "evaluation", "description", "paper", "preset"}
    changed = runs.differences(plain(shipped, apart), plain(recipe, apart))
    # Where files lie on a machine is its own matter; what they hold stands in column `data`.
    places = {"paths", "task_data"}
    changed += runs.differences(
        shipped.evaluation.model_dump(exclude=places),
        recipe.evaluation.model_dump(exclude=places),
        "evaluation",
    )
    for label in recipe.encodings.keys() & {**shipped.ours, **shipped.encodings}.keys():
        choice = {**shipped.ours, **shipped.encodings}[label]
        changed += runs.differences(
            choice.model_dump(), recipe.encodings[label].model_dump(), f"encodings.{label}"
        )
    if changed:
        raise ValueError(
            f"{folder} is not the package's recipe {recipe.name!r} ({'; '.join(changed[:4])}): "
            "only those are kept, as anybody can run them again"
        )
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*/results.csv")):
        found += _rows_of_run(path.parent, shipped)
    if not found:
        raise ValueError(f"{folder} holds no results yet")
    return found


def paper_figure(recipe: Recipe, label: str, metric: str, length: int) -> PaperFigure | None:
    """What a paper prints for a metric of an encoding, at one length if it says so."""
    known = recipe.paper.get(label, {})
    return known.get(f"{metric}@{length}") or known.get(metric)


def _rows_of_run(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    record = runs.load_record(folder)
    done = folder / "done.json"
    seconds = storage.read_json(done)["seconds"] if done.exists() else math.nan
    versions = " ".join(f"{name} {value}" for name, value in record["versions"].items())
    device = record["device"]
    detail = device.get("count") or f"{device.get('threads')} thread(s)"
    rows: list[dict[str, Any]] = []
    table = pd.read_csv(folder / "results.csv", dtype={"encoding": str})
    for row in table.to_dict("records"):
        figure = paper_figure(recipe, row["encoding"], row["metric"], row["length"])
        rows.append(
            {
                "recipe": recipe.name,
                "preset": recipe.preset,
                **{str(name): value for name, value in row.items()},
                "paper_value": figure.value if figure else math.nan,
                "paper_source": figure.source if figure else "",
                "data": _digest(record["data"]),
                "device": f"{device['type']} {device['name']}, {detail}",
                "versions": versions,
                "commit": record["git_commit"] or "",
                "started": record["started"],
                "wall_seconds": seconds,
            }
        )
    return rows


def _digest(data: dict[str, Any]) -> str:
    found = next((data[key] for key in data if "sha256" in key), "")
    return str(found)[:12]
