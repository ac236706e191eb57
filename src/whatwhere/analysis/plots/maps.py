"""What a model meets at each length: angles of its channels, and what is hidden at each depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.style import context
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

from whatwhere.analysis.plots.lines import TrainLength
from whatwhere.analysis.plots.panels import (
    MOST_CELLS,
    SEQUENTIAL,
    Frames,
    Panels,
    bare,
    by_model,
    edges,
    head_line,
    heading,
    heat,
    panels,
    shared_norm,
)
from whatwhere.figures.axes import length_axis
from whatwhere.figures.style import RC

MARKS: dict[str, dict[str, Any]] = {
    "trained": {"color": "#d55e00", "linewidth": 1.6, "linestyle": (0, (4, 2))},
    "safe": {"color": "#cc79a7", "linewidth": 1.6, "linestyle": "-"},
}
"""Lines over a heat map of blues and yellows: trained at, and safe up to."""


@context(RC, after_reset=True)
def in_distribution(
    frames: Frames,
    train_length: TrainLength = None,
    safe_length: TrainLength = None,
    *,
    narrow: bool = False,
    title: str = "",
) -> Figure:
    """Draw which channels meet angles at each length that they did not meet in training.

    Args:
        frames: Columns layer, channel, frequency (rad/token), length, unseen (0 to 1). Layers
            whose channels are the same are drawn once.
        train_length: Marked by a dashed line.
        safe_length: Predicted; marked by a solid line unless `None`.
        narrow: For a telephone.
        title: In place of the default one.

    Raises:
        ValueError: If no channel turns.
    """
    parts = {
        (label, layers): part
        for label, frame in by_model(frames).items()
        for layers, part in _alike(frame[frame["frequency"] > 0]).items()
    }
    if not parts:
        raise ValueError("nothing to draw: no channel turns")
    columns = 1 if narrow else len(parts) if len(parts) <= 5 else 4
    name = title or "Angles that training did not show"
    place = panels(name, len(parts), columns, narrow, 2.5 if narrow else 3.4)
    many = sum(map(len, parts.values())) > MOST_CELLS
    norm = shared_norm([part["unseen"] for part in parts.values()], 0.0, 1.0)
    waves = np.concatenate(
        [math.tau / part["frequency"].to_numpy(float) for part in parts.values()]
    )
    marks: set[str] = set()
    mesh: Any = None
    for index, (axes, ((label, layers), part)) in enumerate(
        zip(place.axes, parts.items(), strict=True)
    ):
        grid = part.pivot_table(index="frequency", columns="length", values="unseen")
        grid = grid.sort_index(ascending=False)
        x = 2 ** _log_edges(np.log2(grid.columns.to_numpy(float)))
        y = 10 ** _log_edges(np.log10(math.tau / grid.index.to_numpy(float)))
        mesh = heat(axes, x, y, grid.to_numpy(float), norm, SEQUENTIAL, many)
        marks |= _mark(axes, x, _of(train_length, label), _of(safe_length, label))
        _wavelength_axes(place, index, grid.columns.astype(int).tolist(), x, waves)
        several = sum(one == label for one, _ in parts) > 1
        head_line(axes, heading(label, layers if several else "", most=40), narrow)
    place.colour_bar(mesh, "unseen share of the circle, %", percent=True)
    names = {"trained": "trained at", "safe": "predicted safe up to"}
    handles = [Line2D([], [], label=names[kind], **MARKS[kind]) for kind in MARKS if kind in marks]
    if handles:
        place.figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=9)
    return place.figure


@context(RC, after_reset=True)
def retrieval(
    frames: Frames,
    train_length: TrainLength = None,
    *,
    column: str = "accuracy",
    narrow: bool = False,
    title: str = "",
) -> Figure:
    """Draw the share of answers that are right, by length and by depth of what they ask for.

    Args:
        frames: Columns length, depth (0 to 1), accuracy and token_accuracy (0 to 1).
        train_length: Marked by a dashed line between columns.
        column: ``"accuracy"`` of whole answers, or ``"token_accuracy"`` of their tokens.
        narrow: For a telephone.
        title: In place of the default one.
    """
    known = by_model(frames)
    columns = 1 if narrow else min(len(known), 3)
    name = title or "Retrieval by length and depth"
    place = panels(name, len(known), columns, narrow, 2.4 if narrow else 3.0)
    norm = shared_norm([frame[column] for frame in known.values()], 0.0, 1.0)
    marked = False
    mesh: Any = None
    for index, (axes, (label, frame)) in enumerate(zip(place.axes, known.items(), strict=True)):
        grid = frame.pivot_table(index="depth", columns="length", values=column, dropna=False)
        lengths, depths = grid.columns.astype(int).tolist(), grid.index.to_numpy(float)
        x, y = np.arange(len(lengths) + 1) - 0.5, np.arange(len(depths) + 1) - 0.5
        mesh = heat(axes, x, y, grid.to_numpy(float), norm, SEQUENTIAL)
        axes.set_ylim(len(depths) - 0.5, -0.5)
        _cell_numbers(axes, grid, place)
        trained = _of(train_length, label)
        if trained and lengths[0] <= trained < lengths[-1]:
            at = sum(length <= trained for length in lengths) - 0.5
            axes.axvline(at, **MARKS["trained"])
            marked = True
        axes.xaxis.set_major_locator(FixedLocator(range(len(lengths))))
        axes.xaxis.set_major_formatter(FixedFormatter([_short(n) for n in lengths]))
        shown = _thinned(len(depths), 6)
        axes.yaxis.set_major_locator(FixedLocator(shown))
        axes.yaxis.set_major_formatter(FixedFormatter([f"{100 * depths[i]:.0f}" for i in shown]))
        bare(axes)
        head_line(axes, heading(label), narrow)
        if place.bottom(index):
            axes.set_xlabel("length of the prompt, tokens")
        if place.left(index):
            axes.set_ylabel("depth in the text, %")
    unit = "answers right, %" if column == "accuracy" else "tokens of answers right, %"
    place.colour_bar(mesh, unit, percent=True)
    if marked:
        line = Line2D([], [], label="trained up to here", **MARKS["trained"])
        place.figure.legend(handles=[line], loc="outside lower left", fontsize=9)
    return place.figure


def _alike(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    # Layers grouped by their frequencies and what they meet: name -> rows of the first of each.
    groups: dict[tuple[Any, ...], list[int]] = {}
    for layer, rows in frame.groupby("layer"):
        columns = rows.sort_values(["length", "channel"])[["length", "frequency", "unseen"]]
        groups.setdefault(tuple(columns.round(12).itertuples(index=False, name=None)), []).append(
            int(layer)  # type: ignore[arg-type]
        )
    return {
        _layers(layers): frame[frame["layer"] == layers[0]].copy() for layers in groups.values()
    }


def _layers(layers: list[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return "layers " + ", ".join(map(str, layers))


def _of(given: TrainLength, label: str) -> int | None:
    return given.get(label) if isinstance(given, Mapping) else given


def _mark(axes: Any, x: Any, trained: int | None, safe: int | None) -> set[str]:
    drawn = set()
    for kind, length in (("safe", safe), ("trained", trained)):
        if length and x[0] <= length <= x[-1]:
            axes.axvline(length, **MARKS[kind])
            drawn.add(kind)
    return drawn


def _wavelength_axes(place: Panels, index: int, lengths: list[int], x: Any, waves: Any) -> None:
    axes = place.axes[index]
    length_axis(axes, lengths, None)
    axes.set_xlim(x[0], x[-1])
    axes.set_yscale("log")
    axes.set_ylim(waves.max() * 1.15, waves.min() / 1.15)
    axes.yaxis.set_major_locator(LogLocator(base=10))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(round(value))))
    bare(axes)
    if place.bottom(index):
        axes.set_xlabel("length, tokens")
    if place.left(index):
        axes.set_ylabel("wavelength, tokens")
    else:
        axes.tick_params(labelleft=False)


def _log_edges(logs: Any) -> Any:
    return edges(logs) if len(logs) > 1 else logs[0] + np.array([-0.25, 0.25])


def _cell_numbers(axes: Any, grid: pd.DataFrame, place: Panels) -> None:
    # Written out as long as they can be read.
    if len(grid.columns) > (8 if place.narrow or place.columns == 1 else 6) or len(grid) > 11:
        return
    for row, values in enumerate(grid.to_numpy(float)):
        for column, value in enumerate(values):
            if math.isfinite(value):
                colour = "#ffffff" if value < 0.5 else "#1f2328"
                axes.text(
                    column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour,
                    fontsize=8,
                )  # fmt: skip


def _thinned(count: int, most: int) -> list[int]:
    step = -(-count // most)
    return list(range(0, count, step))


def _short(number: int) -> str:
    if number >= 10_000 and number % 1000 == 0:
        return f"{number // 1000:,}k"
    return f"{number:,}"
