"""Keys and queries of a head, projected onto their two main directions."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.style import context
from matplotlib.ticker import MaxNLocator

from whatwhere.analysis.plots.panels import head_line, panels
from whatwhere.figures.style import GREY, INK, RC

KINDS = {"query": ("queries", "#0072b2", "o"), "key": ("keys", "#d55e00", "^")}
STAGES = {"before": "before the encoding", "after": "after it"}
MOST_LENGTHS = 4
MOST_SHAPES = 1500
"""Points that are drawn as shapes; more become an image within the SVG."""


@context(RC, after_reset=True)
def points(
    frame: pd.DataFrame,
    layer: int | None = None,
    head: int | None = None,
    *,
    narrow: bool = False,
    title: str = "",
) -> Figure:
    """Draw keys and queries of one head at several lengths, before and after the encoding.

    A panel shows the tokens up to its length. Panels of one stage have the same axes and limits,
    so that a cloud that spreads is seen to.

    Args:
        frame: Columns layer, head, stage, length (the first that holds the position), side (query,
            key, or origin: where 0 lies), position, x, y: the joint principal components.
        layer: Which; the first one by default.
        head: Which head of queries; the first one by default.
        narrow: For a telephone.
        title: In place of the default one.

    Raises:
        ValueError: If there are no points of that head.
    """
    layer = int(frame["layer"].iloc[0]) if layer is None and len(frame) else layer
    rows = frame[frame["layer"] == layer]
    head = int(rows["head"].iloc[0]) if head is None and len(rows) else head
    rows = rows[rows["head"] == head]
    if rows.empty:
        raise ValueError(f"nothing to draw: no points of layer {layer}, head {head}")
    drawn = rows[rows["side"].isin(list(KINDS))]
    lengths = _few(sorted({int(n) for n in drawn["length"]}))
    stages = [stage for stage in STAGES if stage in set(rows["stage"])]
    keys = [(stage, n) for stage in stages for n in lengths]
    if narrow:
        keys = [(stage, n) for n in lengths for stage in stages]
    columns = len(stages) if narrow else len(lengths)
    name = title or f"Keys and queries of layer {layer}, head {head}"
    place = panels(name, len(keys), columns, narrow, 1.9 if narrow else 2.7)
    many = len(rows) > MOST_SHAPES
    for index, (axes, (stage, length)) in enumerate(zip(place.axes, keys, strict=True)):
        whole = rows[rows["stage"] == stage]
        origin = whole[whole["side"] == "origin"]
        _draw(axes, whole[whole["length"] <= length], origin, many)
        _limits(axes, whole)
        head_line(axes, f"{length:,} tokens, {STAGES[stage].split()[0]}", narrow)
        axes.grid(visible=False)
        if place.bottom(index):
            axes.set_xlabel("1st component")
        if place.left(index):
            axes.set_ylabel("2nd component")
    handles = _handles(rows)
    columns = 2 if narrow else len(handles)
    place.figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=9)
    return place.figure


def _handles(rows: pd.DataFrame) -> list[Line2D]:
    marks = [(label, colour, marker, 6) for label, colour, marker in KINDS.values()]
    if (rows["position"] == 0).any():
        marks.append(("first token", GREY, "*", 11))
    if (rows["side"] == "origin").any():
        marks.append(("origin", INK, "+", 9))
    # A cross has no face: its edge is what is seen.
    edge: dict[str, dict[str, Any]] = {"+": {"markeredgewidth": 1.6, "markeredgecolor": INK}}
    return [
        Line2D(
            [], [], color=colour, marker=marker, linestyle="", markersize=size, label=label,
            **edge.get(marker, {}),
        )
        for label, colour, marker, size in marks
    ]  # fmt: skip


def _few(lengths: list[int]) -> list[int]:
    # The shortest, the longest and two between.
    if len(lengths) <= MOST_LENGTHS:
        return lengths
    last = len(lengths) - 1
    return [lengths[round(k * last / (MOST_LENGTHS - 1))] for k in range(MOST_LENGTHS)]


def _draw(axes: Any, rows: pd.DataFrame, origin: pd.DataFrame, many: bool) -> None:
    for side, (_, colour, marker) in KINDS.items():
        part = rows[rows["side"] == side]
        axes.plot(
            part["x"], part["y"], marker, color=colour, markersize=3, markeredgewidth=0,
            alpha=0.45, rasterized=many,
        )  # fmt: skip
        first = part[part["position"] == 0]
        axes.plot(
            first["x"], first["y"], "*", color=colour, markersize=11, markeredgecolor=INK,
            markeredgewidth=0.7, zorder=5,
        )  # fmt: skip

    axes.plot(
        origin["x"],
        origin["y"],
        "+",
        color=INK,
        markersize=9,
        markeredgecolor=INK,
        markeredgewidth=1.6,
        zorder=6,
    )


def _limits(axes: Any, rows: pd.DataFrame) -> None:
    # A square, so that distances along both components count alike.
    axes.set_box_aspect(1)
    sides = {name: (float(rows[name].min()), float(rows[name].max())) for name in ("x", "y")}
    half = 0.54 * max(high - low for low, high in sides.values()) or 0.5
    for name, limit in (("x", axes.set_xlim), ("y", axes.set_ylim)):
        middle = sum(sides[name]) / 2
        limit(middle - half, middle + half)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
