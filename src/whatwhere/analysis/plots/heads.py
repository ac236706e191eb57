"""Heat maps over layers and heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.style import context

from whatwhere.analysis.plots.panels import (
    DIVERGING,
    MOST_CELLS,
    SEQUENTIAL,
    Frames,
    bare,
    by_model,
    head_line,
    heading,
    heat,
    integer_axis,
    panels,
    shared_norm,
)
from whatwhere.figures.style import RC


@context(RC, after_reset=True)
def by_head(
    frames: Frames,
    column: str,
    unit: str,
    title: str,
    *,
    limits: tuple[float | None, float | None] = (None, None),
    signed: bool = False,
    percent: bool = False,
    narrow: bool = False,
) -> Figure:
    """Draw one number a head: columns are layers, rows heads; one scale for all models.

    Args:
        frames: Columns layer, head and `column`; one row a head. Rows of one length, stage and
            side are for the caller to choose.
        column: What is drawn.
        unit: What the colours stand for, with its unit.
        title: Above all.
        limits: Of the scale; `None` is the least or the largest value of all models.
        signed: The sign matters: two colours, white at 0, limits as far on either side.
        percent: Show values of 0 to 1 as 0 to 100.
        narrow: For a telephone.

    Raises:
        ValueError: If no value is finite, or a model has two rows for one head.
    """
    known = by_model(frames)
    for label, frame in known.items():
        if frame.duplicated(["layer", "head"]).any():
            raise ValueError(
                f"frames: expected one row a head, got several{f' of {label}' if label else ''}: "
                "choose one length, stage and side"
            )
    low, high = limits
    if signed:
        largest = max(float(frame[column].abs().max()) for frame in known.values())
        high = high if high is not None else (largest or 1.0)
        low = -high
    norm = shared_norm([frame[column] for frame in known.values()], low, high)
    columns = 2 if narrow else 5
    columns = min(len(known), columns) if len(known) <= columns else min(columns, 4)
    place = panels(title, len(known), columns, narrow, _height(known, columns, narrow))
    many = sum(map(len, known.values())) > MOST_CELLS
    colours = DIVERGING if signed else SEQUENTIAL
    mesh: Any = None
    for index, (axes, (label, frame)) in enumerate(zip(place.axes, known.items(), strict=True)):
        mesh = _cells(axes, frame, column, norm, colours, many)
        head_line(axes, heading(label, most=22 if narrow else 34), narrow)
        bare(axes)
        integer_axis(axes.xaxis, 4 if narrow else 8)
        integer_axis(axes.yaxis, 5)
        if place.bottom(index):
            axes.set_xlabel("layer")
        if place.left(index):
            axes.set_ylabel("head")
    place.colour_bar(mesh, unit, percent)
    return place.figure


def _cells(
    axes: Any, frame: pd.DataFrame, column: str, norm: Normalize, colours: str, many: bool
) -> Any:
    grid = frame.pivot(index="head", columns="layer", values=column)
    heads = range(int(frame["head"].max()) + 1)
    layers = range(int(frame["layer"].min()), int(frame["layer"].max()) + 1)
    grid = grid.reindex(index=heads, columns=layers)
    x = np.arange(layers.start, layers.stop + 1) - 0.5
    y = np.arange(len(heads) + 1) - 0.5
    axes.set_ylim(len(heads) - 0.5, -0.5)
    return heat(axes, x, y, grid.to_numpy(float), norm, colours, many)


def what_where(frames: Frames, *, narrow: bool = False, title: str = "") -> Figure:
    """Draw how far content moves the offset at which each head scores best, 0 to 1.

    Args:
        frames: Columns layer, head, content_shift.
        narrow: For a telephone.
        title: In place of the default one.
    """
    return by_head(
        frames,
        "content_shift",
        "content shift, %",
        title or "What moves where: shift of the best offset by content",
        limits=(0.0, 1.0),
        percent=True,
        narrow=narrow,
    )


def _height(known: dict[str, pd.DataFrame], columns: int, narrow: bool) -> float:
    # Cells near to squares, within reason.
    heads = max(int(frame["head"].max()) + 1 for frame in known.values())
    layers = max(frame["layer"].nunique() for frame in known.values())
    width = (3.2 if narrow else 8.2) / columns
    return float(np.clip(width * heads / layers, 1.2, 3.0)) + 0.7
