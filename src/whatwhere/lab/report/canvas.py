"""Where things go in a figure: its canvas, axes of steps, labels at line ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from whatwhere.figures.palette import Style
from whatwhere.figures.style import DPI, GREY, png, shorten, svg
from whatwhere.lab.storage import disk_errors, write_text

LONGEST_NAME = 32
"""Characters of a name that are shown."""
MOST_POINTS = 400
SETTLED = 0.1
"""Part of a training run that does not count for the limits of its axis: it falls steeply."""


@dataclass(frozen=True)
class End:
    """Where a line ends, and what is written there.

    Attributes:
        x: Of the last point.
        y: Of the last point.
        style: Of the line.
        value: What is written after its name.
    """

    x: float
    y: float
    style: Style
    value: str = ""

    @property
    def name(self) -> str:
        """Its name, cut where it would be too long."""
        return shorten(self.style.title, LONGEST_NAME)

    def text(self, furthest: float) -> str:
        """Name and value, and where the line ends if that is before `furthest`."""
        where = f"at {self.x:,.0f}" if self.x < furthest else ""
        return "  ".join(part for part in (self.name, f"{self.value} {where}".strip()) if part)


@dataclass(frozen=True)
class Canvas:
    """A figure with one pair of axes.

    Attributes:
        figure: The figure.
        axes: Its axes.
        narrow: Whether it is for a telephone, with a legend below in place of labels.
        left: Where text above the axes begins, as a share of the width.
    """

    figure: Figure
    axes: Any
    narrow: bool
    left: float

    def note(self, text: str) -> None:
        """Write a line below the title; on a narrow canvas the page says it."""
        if text and not self.narrow:
            height = self.figure.get_figheight()
            self.figure.text(
                self.left, 1 - 0.46 / height, text, color=GREY, fontsize=9, va="center"
            )


def canvas(
    title: str, narrow: bool, ends: Sequence[End] = (), rows: int = 0, left: float = 0.75
) -> Canvas:
    """A figure of fixed size in which there is room for what goes around the axes.

    Args:
        title: Above the axes.
        narrow: 4 inches wide in place of 10.
        ends: Of lines that will be labelled: at their right on a wide canvas, below on a narrow.
        rows: Rows of a dot plot, which decide its height; 0 for other plots.
        left: Inches left of the axes.
    """
    width = 4.0 if narrow else 10.0
    longest = max(map(len, _texts(ends)), default=0)
    legend = 0.2 * -(-len(ends) // _legend_columns(longest)) + 0.1 if narrow and ends else 0.0
    inner = 0.42 * rows + 0.4 if rows else (2.6 if narrow else 3.9)
    top, bottom = (0.62, 0.55) if narrow else (0.85, 0.6)
    left -= 0.15 * narrow
    right = 0.35 + 0.097 * longest if ends and not narrow else 0.3
    height = top + inner + bottom + legend
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    place = (
        left / width,
        (bottom + legend) / height,
        (width - left - right) / width,
        inner / height,
    )
    axes = figure.add_axes(place)
    start = 0.05 / width
    figure.text(
        start, 1 - 0.2 / height, title, fontsize=11 if narrow else 12, weight="bold", va="center"
    )
    return Canvas(figure, axes, narrow, start)


def band(axes: Any, x: Any, y: Any, deviation: Any, style: Style) -> None:
    """Shade one standard deviation on each side; where there is one seed there is none."""
    width = np.nan_to_num(deviation)
    if width.any():
        axes.fill_between(x, y - width, y + width, color=style.colour, alpha=0.18, linewidth=0)
    if len(x) == 1 and width.any():
        axes.errorbar(x, y, yerr=width, color=style.colour, capsize=3)


def step_axis(place: Canvas, last: int) -> None:
    """Make x an axis of optimizer steps."""
    axes = place.axes
    axes.set_xlim(0, last * 1.015)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(
        MaxNLocator(4 if place.narrow else 8, steps=[1, 2, 2.5, 5, 10], integer=True)
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def end_labels(place: Canvas, ends: Sequence[End]) -> None:
    """Name lines: at their right ends, moved apart where they would overlap, or in a legend.

    A line that ends before the others do has its marker beside its name, and says where it ends.
    Call it last: it needs the limits of the axes.
    """
    ranked = sorted(ends, key=lambda end: -end.y)
    if place.narrow:
        _legend(place, ranked)
        return
    axes = place.axes
    furthest = max(end.x for end in ends)
    gap = 14 * place.figure.dpi / 72
    box, (low, high) = axes.get_window_extent(), axes.get_ylim()
    wanted = [axes.transData.transform((end.x, end.y))[1] for end in ranked]
    heights = spread(wanted, gap, box.y0 + gap / 2, box.y1 - gap / 2)
    for end, text, height in zip(ranked, _texts(ranked), heights, strict=True):
        share, style = (height - box.y0) / box.height, end.style
        line = {"arrowstyle": "-", "color": style.colour, "linewidth": 0.8, "relpos": (0, 0.5)}
        axes.annotate(
            text,
            (end.x, min(max(end.y, low), high)),
            xytext=(1.03, share),
            textcoords="axes fraction",
            va="center",
            color=style.ink,
            weight="bold",
            annotation_clip=False,
            arrowprops={**line, "shrinkA": 2, "shrinkB": 6} if end.x == furthest else None,
        )
        if end.x < furthest:
            marker = {"color": style.colour, "marker": style.marker, "clip_on": False}
            axes.plot([1.015], [share], transform=axes.transAxes, markersize=6, **marker)


def smoothed(losses: pd.Series[float]) -> pd.Series[float]:
    """The mean of neighbours, a twentieth of the run at a time."""
    window = max(1, len(losses) // 20)
    return losses.rolling(window, center=True, min_periods=1).mean()


def thinned(values: pd.Series[Any]) -> Any:
    """Means of neighbours, so that a long log does not make a page of megabytes."""
    together = math.ceil(len(values) / MOST_POINTS)
    return values.groupby(np.arange(len(values)) // together).mean().to_numpy()


def limit(place: Canvas, values: pd.Series[float]) -> None:
    """Make y end a little beyond these values."""
    low, high = float(values.min()), float(values.max())
    room = 0.06 * (high - low) or 0.1
    place.axes.set_ylim(low - room, high + room)


def points(place: Canvas, x: pd.Series[Any], y: pd.Series[Any], style: Style) -> None:
    """Draw markers alone."""
    place.axes.plot(
        x,
        y,
        style.marker,
        color=style.colour,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=4,
    )


def save(figure: Figure, path_stem: Path) -> list[Path]:
    """Write a figure as `path_stem`.png and .svg, under temporary names until they are whole.

    Raises:
        DiskFullError: If there is no space left.
    """
    image = path_stem.with_name(path_stem.name + ".png")
    vector = path_stem.with_name(path_stem.name + ".svg")
    content = png(figure)
    temporary = image.with_name(f".{image.name}.partial")
    with disk_errors(image):
        image.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(image)
        finally:
            temporary.unlink(missing_ok=True)
    write_text(vector, svg(figure))
    return [image, vector]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places nearest to the wanted ones (least squares) that are at least `gap` apart.

    Args:
        wanted: Places.
        gap: Least distance.
        low: Lowest place.
        high: Highest place; exceeded where there is no room for all.

    Returns:
        Places in the order of `wanted`.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    # With k gaps taken off the k-th place what remains need only not decrease: an isotonic
    # regression, by pooling neighbours that are in the wrong order.
    blocks: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, size = wanted[index] - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    flat = [mean for mean, size in blocks for _ in range(size)]
    top = max(low, high - (len(wanted) - 1) * gap)
    placed = [0.0] * len(wanted)
    for rank, (index, mean) in enumerate(zip(order, flat, strict=True)):
        placed[index] = min(max(mean, low), top) + rank * gap
    return placed


def _texts(ends: Sequence[End]) -> list[str]:
    furthest = max((end.x for end in ends), default=0)
    return [end.text(furthest) for end in ends]


def _legend(place: Canvas, ends: Sequence[End]) -> None:
    texts = _texts(ends)
    for end, text in zip(ends, texts, strict=True):
        style = end.style
        line = {"color": style.colour, "marker": style.marker, "linestyle": style.dashes}
        place.axes.plot([], [], label=text, markersize=6, **line)
    longest = max(map(len, texts))
    place.figure.legend(
        loc="lower left",
        bbox_to_anchor=(0.02, 0.0),
        ncols=_legend_columns(longest),
        fontsize=9.5,
        handlelength=1.8,
        columnspacing=1.6,
        labelspacing=0.45,
        borderaxespad=0.2,
    )


def _legend_columns(longest: int) -> int:
    return 2 if longest <= 16 else 1
