"""The tables of a report: results beside the paper's, and the facts of each training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from whatwhere.figures.palette import Style, title
from whatwhere.lab.recipes.schema import EncodingChoice, PaperFigure, Recipe
from whatwhere.lab.report.findings import changes, percent, statistics
from whatwhere.lab.report.records import Comparison, RunRecord

Paper = Mapping[str, Mapping[str, PaperFigure]]

METRICS = {
    "accuracy": "accuracy, %",
    "zero_shot_accuracy": "mean of six tasks, %",
    "validation_accuracy": "validation accuracy, %",
    "test_loss": "test loss",
    "validation_loss": "validation loss",
}
"""Metrics of whole evaluation splits, in the order in which they are shown."""

SCORES = ("_acc", "_acc_norm", "_accuracy", "_exact_match", "_score")
"""Ends of the names of metrics from 0 to 1 that the harness gives."""

PERCENT = ("accuracy", *SCORES)

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """A number, or words, and a smaller line below."""

    text: str
    below: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table: what it is of, and its cells."""

    name: str
    below: str
    colour: str | None
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """Rows below columns that come in named groups.

    Attributes:
        corner: Name of the first column.
        groups: Name of each group and of its columns.
        rows: The rows.
        notes: Sentences below the table.
    """

    corner: str
    groups: list[tuple[str, list[str]]]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def loss_table(
    comparison: Comparison, labels: Sequence[str], styling: Mapping[str, Style], unit: str
) -> Table | None:
    """Loss at each length and its change from the training length; `None` without results."""
    recipe = comparison.recipe
    losses = statistics(comparison.results, "loss")
    if losses.empty:
        return None
    train_length = getattr(recipe.data, "length", 0)
    lengths = sorted({int(length) for length in losses.index.get_level_values("length")})
    relative = changes(comparison.results, train_length)
    beyond = [length for length in lengths if length != train_length] if len(relative) else []
    lowest = {length: _best(losses, length, min) for length in lengths}
    paper = {label: found["loss"] for label, found in recipe.paper.items() if "loss" in found}
    rows = []
    for label in labels:
        cells = [_loss_cell(losses, label, length, lowest) for length in lengths]
        cells += [_change_cell(relative, label, length) for length in beyond]
        if paper:
            cells.append(_paper_cell(paper.get(label), 1, 3))
        rows.append(_row(label, styling, recipe, cells))
    groups = [(f"loss, {unit}", [f"{length:,}" for length in lengths])]
    if beyond:
        change = f"change from {train_length:,}"
        groups.append((change, [f"{length:,}" for length in beyond]))
    if paper:
        groups.append(("the paper", ["loss"]))
    notes = [*_spread_note(losses), *_paper_note(paper.values())]
    if len(labels) > 1:
        notes.insert(0, "Bold: lowest loss at that length.")
    notes += _missing_lengths(losses, recipe)
    return Table("encoding", groups, rows, notes)


def split_table(
    comparison: Comparison, labels: Sequence[str], styling: Mapping[str, Style], unit: str
) -> Table | None:
    """Accuracy and loss on whole splits beside the paper's.

    `None` without results, and where it would show a validation loss alone, which `facts_table`
    has as well.
    """
    recipe, found = comparison.recipe, set(comparison.results["metric"])
    in_paper = {metric for figures in recipe.paper.values() for metric in figures} - {"loss"}
    metrics = [name for name in METRICS if name in found or name in in_paper]
    metrics += sorted(in_paper - set(metrics))
    read = {metric.partition("@")[0] for metric in metrics}
    metrics += sorted(name for name in found - read if name.endswith(SCORES))
    if not found & {m.partition("@")[0] for m in metrics} or (
        metrics == ["validation_loss"] and not in_paper
    ):
        return None
    groups: list[tuple[str, list[str]]] = []
    columns: list[list[Cell]] = []
    notes: list[str] = []
    for metric in metrics:
        factor, digits = (100, 2) if metric.partition("@")[0].endswith(PERCENT) else (1, 4)
        table = _at_length(comparison.results, metric)
        better = max if factor == 100 else min
        columns.append(_metric_cells(table, labels, factor, digits, better))
        names = ["ours"] if metric in in_paper else [""]
        if metric in in_paper:
            paper = {label: figures.get(metric) for label, figures in recipe.paper.items()}
            columns.append([_paper_cell(paper.get(label), factor, digits) for label in labels])
            names.append("paper")
            notes += _paper_note(figure for figure in paper.values() if figure)
        groups.append((_metric_head(metric, factor), names))
        notes += _spread_note(table)
    rows = [
        _row(label, styling, recipe, [column[index] for column in columns])
        for index, label in enumerate(labels)
    ]
    if any("loss" in name for name, _ in groups):
        notes.append(f"Losses are in {unit}.")
    return Table("encoding", groups, rows, list(dict.fromkeys(notes)))


def facts_table(
    comparison: Comparison, labels: Sequence[str], styling: Mapping[str, Style]
) -> Table:
    """One row a run: how far it has come, what it cost and whether it was steady."""
    runs = sorted(comparison.runs, key=lambda run: (labels.index(run.label), run.seed))
    longest = max((comparison.results["length"]), default=0)
    rows = []
    for run in runs:
        values = _values(comparison.results, run)
        done = run.done or {}
        seconds = done.get("seconds", _last(run, "seconds"))
        cells = [
            Cell(_count(run.steps or None)),
            Cell(duration(seconds), _pace(seconds, run.steps)),
            Cell(_number(values.get("validation_loss", _last(run, "validation_loss")), 3)),
            Cell(_count(values.get("parameters"))),
            Cell(_number(done.get("grad_norm_max", _most(run, "grad_norm")), 2)),
            Cell(_count(done.get("spikes", _sum(run, "spike")))),
            Cell(memory(values.get("table_bytes"))),
        ]
        if any((other.done or {}).get("peak_memory_bytes") for other in runs):
            cells.append(Cell(memory(done.get("peak_memory_bytes"))))
        style = styling[run.label]
        below = f"seed {run.seed}, {state(run, comparison.recipe)}"
        rows.append(Row(style.title, below, style.colour, cells))
    at = f"position tables at {longest:,}" if longest > 0 else "position tables"
    names = [
        "steps",
        "time",
        "validation loss",
        "parameters",
        "largest gradient norm",
        "loss spikes",
        at,
    ]
    if rows and len(rows[0].cells) > len(names):
        names.append("peak memory")
    notes = [
        "A loss spike is a training loss far above the median of the 50 before it. Gradient "
        "norms are taken before clipping. Time is that of training steps alone.",
    ]
    return Table("run", [("", names)], rows, notes)


def state(run: RunRecord, recipe: Recipe) -> str:
    """How far a run has come, in a few words."""
    if run.evaluated:
        return f"weights of {run.source}" if run.borrows else "finished"
    if run.record is None:
        return "not begun"
    if run.done is not None or run.borrows:
        return "not evaluated"
    return f"stopped at step {run.steps:,} of {run.planned_steps(recipe.training.steps):,}"


def describe(choice: EncodingChoice) -> str:
    """An encoding's options, empty where they are its defaults."""
    return ", ".join(f"{key}={_plain(value)}" for key, value in choice.options.items())


def duration(seconds: float | None) -> str:
    """A time as `1 h 2 min`, `2 min 3 s` or `4.5 s`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def memory(size: float | None) -> str:
    """A number of bytes in the largest binary unit that it fills."""
    if size is None or not math.isfinite(size):
        return MISSING
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _row(label: str, styling: Mapping[str, Style], recipe: Recipe, cells: list[Cell]) -> Row:
    choice = recipe.encodings.get(label)
    style = styling[label]
    return Row(style.title, describe(choice) if choice else "", style.colour, cells)


def _loss_cell(losses: pd.DataFrame, label: str, length: int, lowest: Mapping[int, float]) -> Cell:
    if (label, length) not in losses.index:
        return Cell(MISSING)
    mean, deviation = _statistics(losses, label, length)
    below = _plus_minus(deviation, 3)
    return Cell(_number(mean, 3), below, best=mean == lowest[length] and len(losses) > 1)


def _change_cell(relative: pd.DataFrame, label: str, length: int) -> Cell:
    if (label, length) not in relative.index:
        return Cell(MISSING)
    change, deviation = _statistics(relative, label, length)
    if not math.isfinite(change):
        return Cell("not finite")
    sign = "−" if change < 0 else "+"
    return Cell(f"{sign}{percent(change)}", _plus_minus(100 * deviation, 1))


def _metric_cells(
    table: pd.DataFrame,
    labels: Sequence[str],
    factor: float,
    digits: int,
    better: Callable[[list[float]], float],
) -> list[Cell]:
    # A split is evaluated at one length, the training length.
    found = {
        label: _statistics(table, label, length)
        for label, length in zip(*map(table.index.get_level_values, (0, 1)), strict=True)
    }
    finite = [mean for mean, _ in found.values() if math.isfinite(mean)]
    best = better(finite) if len(finite) > 1 else None
    cells = []
    for label in labels:
        mean, deviation = found.get(label, (None, math.nan))
        if mean is None:
            cells.append(Cell(MISSING))
            continue
        below = _plus_minus(factor * deviation, digits)
        cells.append(Cell(_number(factor * mean, digits), below, best=mean == best))
    return cells


def _at_length(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    # A metric of a recipe may name a length: ruler_accuracy@8192.
    name, _, length = metric.partition("@")
    table = statistics(results, name)
    if not length:
        return table
    return table[table.index.get_level_values("length") == int(length)]


def _metric_head(metric: str, factor: float) -> str:
    if metric in METRICS:
        return METRICS[metric]
    name, _, length = metric.partition("@")
    words = name.replace("_", " ") + (f" at {int(length):,}" if length else "")
    return f"{words}, %" if factor == 100 else words


def _statistics(table: pd.DataFrame, label: str, length: int) -> tuple[float, float]:
    place = (label, length)
    return float(table["mean"].loc[place]), float(table["std"].loc[place])


def _paper_cell(figure: PaperFigure | None, factor: float, digits: int) -> Cell:
    if figure is None:
        return Cell(MISSING)
    spread = None if figure.spread is None else factor * figure.spread
    return Cell(_number(factor * figure.value, digits), _plus_minus(spread, digits))


def _missing_lengths(losses: pd.DataFrame, recipe: Recipe) -> list[str]:
    notes = []
    for label in dict.fromkeys(losses.index.get_level_values("encoding")):
        found = losses.xs(label, level="encoding").index
        missing = [f"{length:,}" for length in recipe.evaluation.lengths if length not in found]
        choice = recipe.encodings.get(label)
        why = ": its table of positions ends before" if choice and choice.name == "learned" else ""
        if missing:
            notes.append(f"No loss of {title(label)} at {', '.join(missing)}{why}.")
    return notes


def _best(table: pd.DataFrame, length: int, better: Callable[[list[float]], float]) -> float:
    means = table["mean"].xs(length, level="length")
    finite = [float(mean) for mean in means if math.isfinite(mean)]
    return better(finite) if finite else math.nan


def _spread_note(table: pd.DataFrame) -> list[str]:
    few, many = table["count"].min(), table["count"].max()
    if table.empty:
        return []
    if many == 1:
        return ["One seed: no spread can be given."]
    count = f"{many}" if few == many else f"{few} to {many}"
    return [f"Mean ± sample standard deviation over {count} seeds."]


def _paper_note(figures: Iterable[PaperFigure]) -> list[str]:
    sources = dict.fromkeys(figure.source for figure in figures)
    return [f"The paper: {'; '.join(sources)}."] if sources else []


def _values(results: pd.DataFrame, run: RunRecord) -> dict[str, float]:
    own = results[(results["encoding"] == run.label) & (results["seed"] == run.seed)]
    # The last row of a metric is that of the longest length.
    own = own.sort_values("length", kind="stable")
    return dict(zip(own["metric"], own["value"], strict=True))


def _last(run: RunRecord, column: str) -> float | None:
    if column not in run.log or run.log[column].isna().all():
        return None
    return float(run.log[column].dropna().iloc[-1])


def _most(run: RunRecord, column: str) -> float | None:
    return float(run.log[column].max()) if column in run.log and len(run.log) else None


def _sum(run: RunRecord, column: str) -> float | None:
    return float(run.log[column].sum()) if column in run.log and len(run.log) else None


def _pace(seconds: float | None, steps: int) -> str:
    return f"{1000 * seconds / steps:.0f} ms a step" if seconds and steps else ""


def _plus_minus(spread: float | None, digits: int) -> str:
    return "" if spread is None or not math.isfinite(spread) else f"± {spread:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return MISSING
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def _count(value: float | None) -> str:
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _plain(value: object) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
