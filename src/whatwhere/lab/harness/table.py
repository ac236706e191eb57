"""Results on the terminal: the paper's six tasks beside its figures, needles by length, others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import pandas as pd
from rich.console import Group
from rich.table import Table
from rich.text import Text

from whatwhere.lab.harness.paper import MEANS, TASKS

NOT_GIVEN = "not given"
NEEDLE_METRICS = ("string_match_all", "acc")
"""What is shown of needles; harness.csv has string_match_part, too."""


def show(results: pd.DataFrame, label: str) -> Group:
    """Tables of results, and lines of what to know of them.

    Args:
        results: Rows of harness.csv.
        label: Of the model.
    """
    top = results[results["group"] == ""]
    of_paper = top[top["task"].isin(TASKS)]
    needles = results[results["kind"] != ""]
    others = top[~top["task"].isin(TASKS) & (top["kind"] == "")]
    parts: list[Table | Text] = []
    if len(of_paper):
        parts += [Text(f"zero-shot accuracy in %: {label}"), paper_table(of_paper)]
    for metric in NEEDLE_METRICS:
        rows = needles[needles["metric"] == metric]
        if len(rows):
            parts += [Text(f"needles, {metric} in %: {label}"), needle_table(rows)]
    others = others[~others["task"].isin(needles["group"])]
    if len(others):
        parts += [Text(f"tasks: {label}"), plain_table(others)]
    return Group(*parts, *(Text(line) for line in notes(results, of_paper)))


def paper_table(rows: pd.DataFrame) -> Table:
    """The paper's tasks: accuracy in %, and their mean beside the paper's."""
    table = Table()
    for column in ("task", "acc", "acc_norm", "items", "paper: RoPE, PoPE"):
        justify: Literal["left", "right"] = "left" if column == "task" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for task in TASKS:
        own = rows[rows["task"] == task]
        if not len(own):
            continue
        items = own["items"].iloc[0]
        table.add_row(
            task,
            _percent(own, "acc"),
            _percent(own, "acc_norm"),
            "" if pd.isna(items) else f"{int(items):,}",
            NOT_GIVEN,
        )
    if rows["task"].nunique() > 1:
        table.add_section()
        table.add_row(*_mean_row(rows))
    return table


def needle_table(rows: pd.DataFrame) -> Table:
    """A needle metric in %: kinds by lengths."""
    table = Table()
    table.add_column("kind")
    lengths = sorted(rows["length"].astype(int).unique())
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for kind, own in rows.groupby("kind", sort=False):
        at = dict(zip(own["length"].astype(int), own["value"], strict=True))
        cells = (f"{100 * at[length]:.1f}" if length in at else "–" for length in lengths)
        table.add_row(str(kind), *cells)
    return table


def plain_table(rows: pd.DataFrame) -> Table:
    """Any task: metric, value and standard error as the harness gives them."""
    table = Table()
    for column in ("task", "metric", "filter", "value", "± stderr", "items"):
        plain: Literal["left", "right"] = "left" if column in ("task", "metric") else "right"
        table.add_column(column, justify=plain)
    for row in rows.to_dict("records"):
        error = "" if pd.isna(row["stderr"]) else f"{row['stderr']:.4f}"
        items = "" if pd.isna(row["items"]) else f"{int(row['items']):,}"
        table.add_row(
            row["task"], row["metric"], row["filter"], f"{row['value']:.4f}", error, items
        )
    return table


def notes(results: pd.DataFrame, of_paper: pd.DataFrame) -> Iterable[str]:
    """What keeps numbers from being what they seem."""
    if len(of_paper):
        yield (
            "Of the paper's figures only the mean over the six tasks is known here, BLiMP and CBT "
            "as means over their sub-tasks; its metrics are the harness's, acc is assumed."
        )
    limit = results["limit"].dropna()
    if len(limit):
        yield f"Measured with --limit {limit.iloc[0]:g}: not the benchmarks' own numbers."
    for task, note in results[results["note"] != ""].groupby("task")["note"].first().items():
        yield f"{task}: {note}."
    # One evaluation of the harness has one count, whatever the number of its rows.
    cut = results[results["group"] == ""].groupby("task")["cut"].first()
    for task, count in cut[cut > 0].items():
        yield f"{task}: {int(count):,} prompts were longer than the model reads and were cut."


def _mean_row(rows: pd.DataFrame) -> tuple[str, ...]:
    values = {task: rows[(rows["task"] == task)] for task in TASKS}
    present = {task: own for task, own in values.items() if len(own)}
    plain = [_value(own, "acc") for own in present.values()]
    normed = [
        _value(own, "acc_norm") if (own["metric"] == "acc_norm").any() else _value(own, "acc")
        for own in present.values()
    ]
    cells = [f"{sum(found) / len(found):.2f}" for found in (plain, normed)]
    if len(present) < len(TASKS):
        return (f"mean of {len(present)}", *cells, "", "")
    rope, pope = MEANS["RoPE"], MEANS["PoPE"]
    paper = (f"{size} {rope[size]:.2f}, {pope[size]:.2f}" for size in rope)
    return ("mean of six", *cells, "", "\n".join(paper))


def _value(rows: pd.DataFrame, metric: str) -> float:
    return float(100 * rows.loc[rows["metric"] == metric, "value"].iloc[0])


def _percent(rows: pd.DataFrame, metric: str) -> str:
    own = rows[rows["metric"] == metric]
    if not len(own):
        return "–"
    error = own["stderr"].iloc[0]
    value = f"{100 * own['value'].iloc[0]:.2f}"
    return value if pd.isna(error) else f"{value} ± {100 * error:.2f}"
