"""Tables in Markdown, made from `results/results.csv` and the recipes' paper figures alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

from whatwhere.figures.palette import title
from whatwhere.lab import recipes, storage
from whatwhere.lab.recipes.schema import Recipe
from whatwhere.lab.report.findings import statistics
from whatwhere.lab.report.page import unit_of
from whatwhere.lab.results import rows

NOT_RUN = "not run here"

_BLOCK = re.compile(
    r"(<!-- results: (?P<what>[^>]*?) -->\n)(?P<body>.*?)(<!-- end of results -->)", re.DOTALL
)

HEADS = {
    "accuracy": "accuracy, %",
    "test_loss": "test loss, {unit}",
    "validation_loss": "validation loss, {unit}",
    "perplexity": "perplexity",
    "loss": "loss, {unit}",
    "zero_shot_accuracy": "mean of six tasks, %",
    "ruler_accuracy": "RULER, %",
    "longbench_score": "LongBench, %",
    "piqa_acc_norm": "PIQA acc_norm, %",
    "loss_spikes": "loss spikes",
    "table_bytes": "position tables, bytes",
}


def fill(path: Path, table: pd.DataFrame) -> bool:
    """Write the tables of a Markdown file again; say whether it changed.

    Args:
        path: The file.
        table: Rows of results.csv.

    Raises:
        ValueError: As for `filled`.
    """
    text = path.read_text(encoding="utf-8")
    changed = filled(path, table)
    if changed != text:
        storage.write_text(path, changed)
    return changed != text


def filled(path: Path, table: pd.DataFrame) -> str:
    """The text of a Markdown file with its tables made anew.

    A table stands between ``<!-- results: RECIPE PRESET METRIC[@LENGTH] ... -->`` and
    ``<!-- end of results -->``; ``papers`` in place of a recipe makes the list of all figures
    that papers print, ``rows`` tables in which every row has an anchor (`rows.block`).

    Args:
        path: The file.
        table: Rows of results.csv.

    Raises:
        ValueError: If a marker names what is not there, or none is closed.
    """
    text = path.read_text(encoding="utf-8")
    if text.count("<!-- results:") != len(_BLOCK.findall(text)):
        raise ValueError(f"{path}: a results marker is not closed by <!-- end of results -->")

    def made(match: re.Match[str]) -> str:
        try:
            body = _block(match["what"].split(), table, path.parent)
        except ValueError as error:
            raise ValueError(f"{path}: {match[1].strip()}: {error}") from None
        return f"{match[1]}\n{body}\n{match[4]}"

    return _BLOCK.sub(made, text)


def _block(words: Sequence[str], table: pd.DataFrame, folder: Path) -> str:
    if words[:1] == ["rows"]:
        return rows.block(words[1:], table, folder)
    return papers(table) if words == ["papers"] else of_recipe(table, *_read(words))


def of_recipe(
    table: pd.DataFrame, name: str, preset: str, columns: Sequence[tuple[str, int | None]]
) -> str:
    """One row an encoding: mean and deviation over seeds, and the paper's figure beside it.

    Args:
        table: Rows of results.csv.
        name: Of the recipe.
        preset: Of the recipe.
        columns: Metric and length of each; a length of `None` is whatever there is.

    Raises:
        ValueError: If there is no such recipe or preset.
    """
    recipe = recipes.get(name, preset)
    own = table[(table["recipe"] == name) & (table["preset"] == preset)]
    read = _perplexities(own)
    labels = list(dict.fromkeys([*recipe.encodings, *own["encoding"]]))
    # One metric at many lengths is named once, above the table.
    metrics = {metric for metric, _ in columns}
    by_length = len(columns) > 1 and len(metrics) == 1
    head = _head(columns[0][0], None, recipe)
    comma = "," if "," in head else ""
    caption = f"{head[0].upper()}{head[1:]}{comma} by length:\n\n" if by_length else ""
    heads = ["encoding"]
    for metric, length in columns:
        heads.append(f"{length:,}" if by_length else _head(metric, length, recipe))
        if _has_paper(recipe, metric, length):
            heads.append("paper")
    lines = [_line(heads), _line(["---", *["--:"] * (len(heads) - 1)])]
    found = [statistics(read if n and m == "perplexity" else own, m) for m, n in columns]
    for label in labels:
        cells = [title(label)]
        for (metric, length), statistic in zip(columns, found, strict=True):
            cells.append(_ours(statistic, label, metric, length))
            if _has_paper(recipe, metric, length):
                cells.append(_paper(recipe, label, metric, length))
        lines.append(_line(cells))
    return caption + "\n".join(lines) + "\n\n" + _origin(own, recipe)


def papers(table: pd.DataFrame) -> str:
    """Every figure that a paper prints, beside ours at the same preset."""
    lines = [_line(["recipe", "encoding", "metric", "paper", "ours", "seeds"])]
    lines.append(_line(["---", "---", "---", "--:", "--:", "--:"]))
    for name in recipes.names():
        if "paper" not in recipes.presets(name):
            continue
        recipe = recipes.get(name, "paper")
        own = table[(table["recipe"] == name) & (table["preset"] == "paper")]
        for label, figures in recipe.paper.items():
            for key in figures:
                metric, length = split_metric(key)
                found = statistics(own, metric)
                ours = _ours(found, label, metric, length)
                seeds = _count(found, label, length)
                printed = _paper(recipe, label, metric, length)
                head = _head(metric, length, recipe)
                lines.append(_line([f"`{name}`", title(label), head, printed, ours, seeds]))
    return "\n".join(lines) + "\n"


def split_metric(key: str) -> tuple[str, int | None]:
    """`metric@length` as both; without a length it is `None`.

    Raises:
        ValueError: If the length is no number.
    """
    metric, at, length = key.partition("@")
    if at and not length.isdecimal():
        raise ValueError(f"{key!r}: expected METRIC or METRIC@LENGTH")
    return metric, int(length) if at else None


def _read(words: Sequence[str]) -> tuple[str, str, list[tuple[str, int | None]]]:
    if len(words) < 3:
        raise ValueError("expected RECIPE PRESET METRIC[@LENGTH] ...")
    return words[0], words[1], [split_metric(word) for word in words[2:]]


def _perplexities(own: pd.DataFrame) -> pd.DataFrame:
    # At a length: the exponential of the loss there, seed by seed, on the text that lengths are
    # measured on. The perplexity without a length is that of a whole split, maybe another text.
    losses = own[own["metric"] == "loss"]
    return losses.assign(metric="perplexity", value=np.exp(losses["value"].astype(float)))


def _head(metric: str, length: int | None, recipe: Recipe) -> str:
    head = HEADS.get(metric, metric.replace("_", " ")).format(unit=unit_of(recipe))
    return head if length is None else f"{head} at {length:,}"


def _has_paper(recipe: Recipe, metric: str, length: int | None) -> bool:
    return any(_key(metric, length) in figures for figures in recipe.paper.values())


def _key(metric: str, length: int | None) -> str:
    return metric if length is None else f"{metric}@{length}"


def _paper(recipe: Recipe, label: str, metric: str, length: int | None) -> str:
    figure = recipe.paper.get(label, {}).get(_key(metric, length))
    if figure is None:
        return ""
    return _number(metric, figure.value, figure.spread if figure.spread is not None else math.nan)


def _ours(found: pd.DataFrame, label: str, metric: str, length: int | None) -> str:
    row = _row(found, label, length)
    return NOT_RUN if row is None else _number(metric, row["mean"], row["std"])


def _count(found: pd.DataFrame, label: str, length: int | None) -> str:
    row = _row(found, label, length)
    return "" if row is None else str(int(row["count"]))


def _row(found: pd.DataFrame, label: str, length: int | None) -> pd.Series | None:
    if not len(found) or label not in found.index.get_level_values("encoding"):
        return None
    own = found.xs(label, level="encoding")
    if length is not None and length not in own.index:
        return None
    return cast(pd.Series, own.loc[length] if length is not None else own.iloc[0])


def _number(metric: str, value: float, deviation: float) -> str:
    share = metric.endswith(("accuracy", "score", "acc", "acc_norm"))
    factor = 100 if share else 1
    digits = 0 if metric in WHOLE else 2 if share or metric == "perplexity" else 4
    text = f"{factor * value:,.{digits}f}"
    return text + (f" ± {factor * deviation:.{digits}f}" if math.isfinite(deviation) else "")


WHOLE = ("loss_spikes", "table_bytes", "parameters")


def _origin(own: pd.DataFrame, recipe: Recipe) -> str:
    command = f"`whatwhere compare {recipe.name} --preset {recipe.preset}`"
    if own.empty:
        return f"Nothing of this was run here; {command} does it.\n"
    seeds = sorted(set(own["seed"]))
    many = f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}"
    told = many if len(seeds) > 1 else f"seed {seeds[0]}"
    devices = ", ".join(sorted(set(own["device"])))
    torch = sorted({word for row in own["versions"] for word in _torch(row)})
    return f"{command}: {told}; {devices}, torch {', '.join(torch)}.\n"


def _torch(versions: str) -> list[str]:
    words = versions.split()
    return [words[place + 1] for place, word in enumerate(words[:-1]) if word == "torch"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
