"""Every kept figure as a row of Markdown with an anchor, for pages that state it to link to."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from whatwhere.figures.palette import title
from whatwhere.lab import recipes

FIXED = ("date", "commit", "device", "torch")
"""Columns of benchmarks that say where a row is from, not what it is."""


def anchor(*parts: object) -> str:
    """The anchor of a row, from what it is known by.

    Examples:
        >>> anchor("books", "quick", "pope", "loss", 2560)
        'books-quick-pope-loss-2560'
        >>> anchor("attention", "4x8x1024x64", 1, "forward+backward", "pope cpu")
        'attention-4x8x1024x64-1-forward-backward-pope-cpu'
    """
    words = [re.sub(r"[^a-z0-9_.]+", "-", str(part).lower()).strip("-") for part in parts]
    return "-".join(words)


def block(words: Sequence[str], table: pd.DataFrame, folder: Path) -> str:
    """What stands in a page's block ``rows``, ``rows papers`` or ``rows FILE KEYS``.

    Args:
        words: What follows ``rows``.
        table: Rows of results.csv.
        folder: Where the page lies, from which ``FILE`` is looked for.

    Raises:
        ValueError: If it is none of these, or as for `of_file`.
    """
    match list(words):
        case []:
            return measured(table)
        case ["papers"]:
            return printed()
        case [file, keys] if keys.isdecimal():
            return of_file(folder / file, int(keys))
    raise ValueError("expected rows, rows papers, or rows FILE KEYS")


def measured(table: pd.DataFrame) -> str:
    """The rows of results.csv, seeds taken together: a heading and a table for each recipe.

    Args:
        table: Rows of results.csv.

    Returns:
        Markdown; the anchor of a row is `anchor` of recipe, preset, encoding, metric, length.
    """
    parts: list[str] = []
    for (name, preset), own in table.groupby(["recipe", "preset"], sort=False):
        parts += [f"### `{name}`, preset `{preset}`", ""]
        parts += _header("encoding", "metric", "length, tokens", "mean", "deviation", "seeds")
        for key, part in own.groupby(["encoding", "metric", "length"], sort=False):
            label, metric, length = map(str, key)
            values = part["value"].astype(float)
            first = _mark(anchor(name, preset, label, metric, length)) + title(label)
            shown = (number(values.mean()), number(values.std()) if len(values) > 1 else "")
            parts.append(_line(first, f"`{metric}`", f"{int(length):,}", *shown, len(values)))
        parts.append("")
    return "\n".join(parts)


def printed() -> str:
    """The figures that papers print, from the recipes, as rows with their sources.

    Returns:
        Markdown; the anchor of a row is `anchor` of ``paper``, recipe, encoding, metric and, if it
        has one, length.
    """
    parts = _header("recipe", "encoding", "metric", "length, tokens", "paper's value", "source")
    for name in recipes.names():
        if "paper" not in recipes.presets(name):
            continue
        for label, figures in recipes.get(name, "paper").paper.items():
            for key, figure in figures.items():
                metric, _, length = key.partition("@")
                mark = _mark(anchor("paper", name, label, metric, *([length] if length else [])))
                at = f"{int(length):,}" if length else ""
                spread = "" if figure.spread is None else f" ± {number(figure.spread)}"
                parts.append(
                    _line(
                        f"{mark}`{name}`",
                        title(label),
                        f"`{metric}`",
                        at,
                        number(figure.value) + spread,
                        figure.source,
                    )
                )
    return "\n".join([*parts, ""])


def of_file(path: Path, keys: int) -> str:
    """The rows of another CSV of measurements, seeds taken together.

    Args:
        path: The CSV.
        keys: How many of its first columns say what a row is; the rest are values.

    Returns:
        Markdown; the anchor of a row is `anchor` of the file's name without its ending and the
        key columns but for ``seed``.

    Raises:
        ValueError: If there is no such file, or the keys do not tell its rows apart.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}")
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    names = [name for name in table.columns[:keys] if name != "seed"]
    values = [name for name in table.columns[keys:] if name not in FIXED]
    if "seed" in table.columns[:keys]:
        table = table.groupby(names, sort=False, dropna=False)[values].mean().reset_index()
    if table.duplicated(names).any():
        raise ValueError(f"{path}: its first {keys} columns do not tell rows apart")
    parts = _header(*names, *values)
    for row in table.to_dict("records"):
        known = [row[name] for name in names]
        cells = [str(cell) for cell in known]
        cells[0] = _mark(anchor(path.stem, *known)) + cells[0]
        parts.append(_line(*cells, *(number(row[name]) for name in values)))
    return "\n".join([*parts, ""])


def number(value: object) -> str:
    """Six significant digits, integers whole; nothing for what is missing."""
    if not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, float) and math.isnan(value):
        return ""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.6g}"


def _header(*names: str) -> list[str]:
    return [_line(*names), _line(*["---"] * len(names))]


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _mark(name: str) -> str:
    return f'<a id="{name}"></a>'
