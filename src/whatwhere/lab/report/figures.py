"""The figures of a comparison: loss against length, by position, during training; accuracy.

Each has a function that writes PNG and SVG, and one that draws it, wide for a page or narrow for
a telephone. The same data give the same bytes of SVG. A mean over seeds is drawn with a band (or
a bar) of one standard deviation on each side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.style import context

from whatwhere.figures.axes import (
    decimal_axis,
    length_axis,
    mark_training_length,
    percent_axis,
)
from whatwhere.figures.palette import Style, styles
from whatwhere.figures.style import RC, shorten
from whatwhere.lab.report.canvas import (
    LONGEST_NAME,
    SETTLED,
    Canvas,
    End,
    band,
    canvas,
    end_labels,
    limit,
    points,
    save,
    smoothed,
    step_axis,
    thinned,
)

Styles = Mapping[str, Style]

PAPER: dict[str, Any] = {
    "color": "#444444",
    "markerfacecolor": "white",
    "markeredgecolor": "#444444",
    "markersize": 6,
    "zorder": 4,
}

BINS_PER_OCTAVE = 12
MOST_MARKERS = 25
LEAST_SPAN = 0.1
"""Least height of the axis of losses by length, as a share of the highest: flat looks flat."""


def loss_by_length(
    results: pd.DataFrame,
    path_stem: Path,
    train_length: int | None,
    unit: str,
    styling: Styles | None = None,
) -> list[Path]:
    """Draw loss against length, log2 in length, as `path_stem`.png and .svg.

    Args:
        results: Rows with columns encoding, seed, metric, length, value, as in results.csv; those
            of metric `loss` are drawn, one line an encoding, the mean over its seeds.
        path_stem: Path of the files without their suffix.
        train_length: Marked by a vertical line unless `None`.
        unit: Of the loss, as in `"nats per byte"`; its last word counts length.
        styling: Style of each encoding, if not that of `palette.styles`.

    Returns:
        The files.

    Raises:
        ValueError: If no loss is finite.
    """
    return save(draw_loss_by_length(results, train_length, unit, styling), path_stem)


def loss_by_position(
    positions: pd.DataFrame,
    path_stem: Path,
    train_length: int | None,
    unit: str,
    styling: Styles | None = None,
) -> list[Path]:
    """Draw loss by position within a window; as for `loss_by_length`.

    Args:
        positions: Rows with columns encoding, seed, position, loss.
        path_stem: Path of the files without their suffix.
        train_length: Marked by a vertical line unless `None`.
        unit: Of the loss, as in `"nats per byte"`.
        styling: Style of each encoding.

    Raises:
        ValueError: If no loss is finite.
    """
    return save(draw_loss_by_position(positions, train_length, unit, styling), path_stem)


def training_curves(
    logs: pd.DataFrame, path_stem: Path, unit: str, styling: Styles | None = None
) -> list[Path]:
    """Draw training losses, raw (faint) and smoothed, and validation losses (points).

    Args:
        logs: Rows with columns encoding, seed, step, loss and, where there is one,
            validation_loss.
        path_stem: Path of the files without their suffix.
        unit: Of the loss, as in `"nats per byte"`.
        styling: Style of each encoding.

    Raises:
        ValueError: If no loss is finite.
    """
    return save(draw_training_curves(logs, unit, styling), path_stem)


def accuracy(
    results: pd.DataFrame,
    path_stem: Path,
    paper: Mapping[str, tuple[float, float | None]] | None = None,
    styling: Styles | None = None,
) -> list[Path]:
    """Draw the accuracy of each encoding, with the paper's beside it.

    Args:
        results: Rows as in results.csv; those of metric `accuracy` (0 to 1) are drawn.
        path_stem: Path of the files without their suffix.
        paper: Value and spread, if known, of each encoding, 0 to 1.
        styling: Style of each encoding.

    Raises:
        ValueError: If there is no accuracy.
    """
    return save(draw_accuracy(results, paper, styling), path_stem)


@context(RC, after_reset=True)
def draw_loss_by_length(
    results: pd.DataFrame,
    train_length: int | None,
    unit: str,
    styling: Styles | None = None,
    narrow: bool = False,
    perplexity: bool = False,
) -> Figure:
    """Draw what `loss_by_length` writes; `perplexity` draws its exponential on a log axis."""
    table = _finite(results[results["metric"] == "loss"], "value")
    if perplexity:
        table = table.assign(value=np.exp(table["value"].astype(float)))
    means = _means(table, "length", "value")
    styling = styling or styles(means)
    ends = [
        End(mean.index[-1], mean["mean"].iloc[-1], styling[label], f"{mean['mean'].iloc[-1]:.2f}")
        for label, mean in means.items()
    ]
    place = canvas(f"{'Perplexity' if perplexity else 'Loss'} against length", narrow, ends)
    if perplexity:
        place.axes.set_yscale("log")
    for label, mean in means.items():
        style = styling[label]
        x, y = mean.index.to_numpy(float), mean["mean"].to_numpy()
        band(place.axes, x, y, mean["std"].to_numpy(), style)
        place.axes.plot(
            x, y, style.dashes, color=style.colour, marker=style.marker, markersize=7, zorder=3
        )
    _label_loss(place, unit, table)
    if perplexity:
        place.axes.set_ylabel(f"perplexity of a {unit.split()[-1]}")
        decimal_axis(place.axes.yaxis)
    else:
        low, high = place.axes.get_ylim()
        more = max(0.0, LEAST_SPAN * high - (high - low)) / 2
        place.axes.set_ylim(low - more, high + more)
    place.axes.set_xlabel(f"length of the window, {_plural(unit)}")
    length_axis(place.axes, sorted(set(table["length"])), train_length)
    mark_training_length(place.axes, train_length)
    end_labels(place, ends)
    return place.figure


@context(RC, after_reset=True)
def draw_loss_by_position(
    positions: pd.DataFrame,
    train_length: int | None,
    unit: str,
    styling: Styles | None = None,
    narrow: bool = False,
) -> Figure:
    """Draw what `loss_by_position` writes, averaged in bins of equal width on the log2 axis."""
    table = _finite(positions, "loss")
    # Counted from the end, so that the last bin is a whole one.
    octaves = np.log2(table["position"].max() / table["position"].to_numpy(float))
    octaves = -np.floor(octaves * BINS_PER_OCTAVE)
    grouped = table.assign(bin=octaves).groupby(["encoding", "seed", "bin"], sort=False)
    binned = grouped[["position", "loss"]].mean().reset_index()
    centres = binned.groupby("bin")["position"].mean()
    last = table.groupby("encoding")["position"].max()
    means = _means(binned, "bin", "loss")
    styling = styling or styles(means)
    ends = [
        End(last[label], mean["mean"].iloc[-1], styling[label]) for label, mean in means.items()
    ]
    place = canvas("Loss by position in the longest window", narrow, ends)
    for label, mean in means.items():
        style = styling[label]
        x, y = centres.loc[mean.index].to_numpy(), mean["mean"].to_numpy()
        band(place.axes, x, y, mean["std"].to_numpy(), style)
        place.axes.plot(x, y, style.dashes, color=style.colour, zorder=3)
    _label_loss(place, unit, table)
    # The first few positions have no context to speak of and would flatten all others.
    settled = binned.loc[binned["position"] >= min(8, table["position"].max()), "loss"]
    limit(place, settled)
    place.axes.set_xlabel(f"position, {_plural(unit)} from the start of the window")
    longest = int(table["position"].max()) + 1
    powers = [2**k for k in range(math.floor(math.log2(longest)) + 1)]
    length_axis(place.axes, [*powers, longest], train_length)
    mark_training_length(place.axes, train_length)
    end_labels(place, ends)
    return place.figure


@context(RC, after_reset=True)
def draw_training_curves(
    logs: pd.DataFrame, unit: str, styling: Styles | None = None, narrow: bool = False
) -> Figure:
    """Draw what `training_curves` writes."""
    table = _finite(logs, "loss").sort_values("step", kind="stable")
    runs = table.groupby(["encoding", "seed"], sort=False)
    table = table.assign(smooth=runs["loss"].transform(smoothed))
    styling = styling or styles(table["encoding"])
    ends = _run_ends(table, "smooth", styling)
    place = canvas("Loss during training", narrow, ends)
    settled, start = [], SETTLED * table["step"].max()
    for (label, _), run in table.groupby(["encoding", "seed"], sort=False):
        style = styling[str(label)]
        x, raw, smooth = (thinned(run[column]) for column in ("step", "loss", "smooth"))
        place.axes.plot(x, raw, "-", color=style.colour, alpha=0.18, linewidth=0.7)
        place.axes.plot(x, smooth, style.dashes, color=style.colour, linewidth=1.5, zorder=3)
        settled.append(run.loc[run["step"] >= start, "smooth"])
        if "validation_loss" in run:
            known = _known(run, "validation_loss")
            points(place, known["step"], known["validation_loss"], style)
            settled.append(known.loc[known["step"] >= start, "validation_loss"])
    place.axes.set_ylabel(f"loss, {unit}")
    place.note("line: training loss, smoothed; faint: as logged; markers: validation loss")
    limit(place, pd.concat(settled))
    step_axis(place, int(table["step"].max()))
    end_labels(place, ends)
    return place.figure


@context(RC, after_reset=True)
def draw_accuracy_curves(
    logs: pd.DataFrame, styling: Styles | None = None, narrow: bool = False
) -> Figure:
    """Draw the validation accuracy (0 to 1) of each run during training.

    Args:
        logs: Rows with columns encoding, seed, step, validation_accuracy.
        styling: Style of each encoding.
        narrow: For a telephone.

    Raises:
        ValueError: If there is no accuracy.
    """
    table = _finite(logs, "validation_accuracy").sort_values("step", kind="stable")
    styling = styling or styles(table["encoding"])
    ends = _run_ends(table.assign(y=100 * table["validation_accuracy"]), "y", styling)
    place = canvas("Accuracy during training", narrow, ends)
    for (label, _), run in table.groupby(["encoding", "seed"], sort=False):
        style, x, y = styling[str(label)], run["step"], 100 * run["validation_accuracy"]
        place.axes.plot(x, y, style.dashes, color=style.colour, linewidth=1.5, zorder=3)
        if len(run) <= MOST_MARKERS:
            points(place, x, y, style)
    place.axes.set_ylabel("validation accuracy, %")
    place.note("one line a run")
    percent_axis(place.axes.yaxis)
    place.axes.set_ylim(-3, 103)
    step_axis(place, int(table["step"].max()))
    end_labels(place, ends)
    return place.figure


@context(RC, after_reset=True)
def draw_accuracy(
    results: pd.DataFrame,
    paper: Mapping[str, tuple[float, float | None]] | None = None,
    styling: Styles | None = None,
    narrow: bool = False,
) -> Figure:
    """Draw what `accuracy` writes: one row an encoding, the best on top."""
    table = _finite(results[results["metric"] == "accuracy"], "value")
    found = table.groupby("encoding", sort=False)["value"].agg(["mean", "std"])
    found = found.sort_values("mean", ascending=False, kind="stable")
    paper = {label: value for label, value in (paper or {}).items() if label in found.index}
    styling = styling or styles(found.index)
    names = [
        f"{shorten(styling[str(label)].title, 14 if narrow else LONGEST_NAME)}  {100 * mean:.1f}"
        for label, mean in found["mean"].items()
    ]
    room = 0.25 + 0.085 * max(map(len, names))
    place = canvas("Accuracy", narrow, rows=len(found), left=room)
    axes = place.axes
    for row, (label, mean, deviation) in enumerate(found.itertuples()):
        style = styling[str(label)]
        seeds = 100 * table.loc[table["encoding"] == label, "value"]
        axes.plot([0, 100 * mean], [row, row], color=style.colour, linewidth=1.2, alpha=0.4)
        if len(seeds) > 1:
            axes.plot(seeds, [row] * len(seeds), ".", color=style.colour, alpha=0.45, zorder=3)
            _bar(axes, row, 100 * mean, 100 * deviation, style.colour)
        axes.plot(100 * mean, row, style.marker, color=style.colour, markersize=9, zorder=4)
        if label in paper:
            value, spread = paper[str(label)]
            if spread is not None:
                _bar(axes, row + 0.28, 100 * value, 100 * spread, "#444444")
            axes.plot(100 * value, row + 0.28, "D", **PAPER)
    axes.set_yticks(range(len(found)), names)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("accuracy, %")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    percent_axis(axes.xaxis)
    many = table.groupby("encoding").size().max() > 1
    notes = ["mean ± one standard deviation, small dots: seeds"] if many else []
    place.note("; ".join(notes + (["hollow diamond: the paper"] if paper else [])))
    return place.figure


def _finite(table: pd.DataFrame, column: str) -> pd.DataFrame:
    # A run that diverged has NaN or infinite losses, which no axis can show.
    kept = table[np.isfinite(table[column].astype(float))] if column in table else table.iloc[:0]
    if kept.empty:
        raise ValueError(f"nothing to draw: no finite {column}")
    return kept


def _known(table: pd.DataFrame, column: str) -> pd.DataFrame:
    return table[np.isfinite(table[column].astype(float))]


def _means(table: pd.DataFrame, by: str, column: str) -> dict[str, pd.DataFrame]:
    # Encoding -> mean and deviation over seeds, indexed by `by` in increasing order.
    grouped = table.groupby("encoding", sort=False)
    return {
        str(label): part.groupby(by)[column].agg(["mean", "std"]).sort_index()
        for label, part in grouped
    }


def _label_loss(place: Canvas, unit: str, table: pd.DataFrame) -> None:
    place.axes.set_ylabel(f"loss, {unit}")
    if "seed" not in table:  # of models that nobody here trained
        return
    seeds = table.groupby("encoding")["seed"].nunique()
    few, many = seeds.min(), seeds.max()
    if many == 1:
        place.note("one seed" if len(seeds) > 1 else "")
        return
    count = f"{many}" if few == many else f"{few} to {many}"
    place.note(f"mean over {count} seeds; band: one standard deviation")


def _bar(axes: Any, row: float, mean: float, deviation: float, colour: str) -> None:
    axes.errorbar(mean, row, xerr=deviation, color=colour, capsize=3, linewidth=1.4, zorder=3)


def _run_ends(table: pd.DataFrame, column: str, styling: Styles) -> list[End]:
    # Where the runs of each encoding end: the last step of any, the mean of their last values.
    last = table.groupby(["encoding", "seed"], sort=False)[["step", column]].last()
    ends = last.groupby("encoding", sort=False).agg({"step": "max", column: "mean"})
    return [End(step, y, styling[str(label)]) for label, step, y in ends.itertuples()]


def _plural(unit: str) -> str:
    return unit.split()[-1] + "s"
