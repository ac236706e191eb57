"""Where things go in a figure: its canvas, axes of lengths and steps, labels at line ends."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

from whatwhere.lab.report.palette import Style
from whatwhere.lab.storage import disk_errors, write_text

DPI = 160
INK, GREY, FAINT = "#1f2328", "#5b6470", "#e4e7eb"

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a929c",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.markeredgecolor": "white",
    "legend.frameon": False,
}
"""Settings of matplotlib that every figure is drawn with; all others are its defaults."""

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


def shorten(name: str, most: int) -> str:
    """A name of at most so many characters."""
    return name if len(name) <= most else name[: most - 1] + "…"


def band(axes: Any, x: Any, y: Any, deviation: Any, style: Style) -> None:
    """Shade one standard deviation on each side; where there is one seed there is none."""
    width = np.nan_to_num(deviation)
    if width.any():
        axes.fill_between(x, y - width, y + width, color=style.colour, alpha=0.18, linewidth=0)
    if len(x) == 1 and width.any():
        axes.errorbar(x, y, yerr=width, color=style.colour, capsize=3)


def length_axis(place: Canvas, lengths: Sequence[int], train_length: int | None) -> None:
    """Make x a log2 axis with a tick at each length, as far as their labels have room."""
    ends = [*lengths, train_length] if train_length else list(lengths)
    axes = place.axes
    axes.set_xscale("log", base=2)
    low, high = np.log2(min(ends)), np.log2(max(ends))
    room = max(0.03 * (high - low), 0.06)
    axes.set_xlim(2 ** (low - room), 2 ** (high + room))
    shown = _with_room(place, sorted(set(lengths)), train_length)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{length:,}" for length in shown]))
    axes.xaxis.set_minor_locator(NullLocator())


def step_axis(place: Canvas, last: int) -> None:
    """Make x an axis of optimizer steps."""
    axes = place.axes
    axes.set_xlim(0, last * 1.015)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(
        MaxNLocator(4 if place.narrow else 8, steps=[1, 2, 2.5, 5, 10], integer=True)
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def percent_axis(axis: Any) -> None:
    """Ticks at 0, 20, ... 100."""
    axis.set_major_locator(FixedLocator(range(0, 101, 20)))


def decimal_axis(axis: Any) -> None:
    """Plain numbers at 1, 1.5, 2, 3, 5, 7 times the powers of ten of a log axis."""
    axis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def mark_training_length(place: Canvas, length: int | None) -> None:
    """Draw a vertical line at the training length, named above the axes."""
    if length is None:
        return
    axes = place.axes
    axes.axvline(length, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    share = axes.transAxes.inverted().transform(axes.transData.transform((length, 0)))[0]
    side = "left" if share < 0.2 else "right" if share > 0.8 else "center"
    axes.annotate(
        f"trained at {length:,}",
        (length, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=9,
        color=GREY,
    )


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
    png = path_stem.with_name(path_stem.name + ".png")
    vector = path_stem.with_name(path_stem.name + ".svg")
    content = io.BytesIO()
    with context(RC, after_reset=True):
        FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    temporary = png.with_name(f".{png.name}.partial")
    with disk_errors(png):
        png.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content.getvalue())
            temporary.replace(png)
        finally:
            temporary.unlink(missing_ok=True)
    write_text(vector, svg(figure))
    return [png, vector]


def svg(figure: Figure) -> str:
    """A figure as SVG whose text is drawn as paths: the same everywhere, and without a date."""
    content = io.BytesIO()
    fixed = {**RC, "svg.hashsalt": "whatwhere", "svg.fonttype": "path"}
    with context(fixed, after_reset=True):  # ticks are made only now
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue().decode()


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


def _with_room(place: Canvas, lengths: Sequence[int], train_length: int | None) -> list[int]:
    # Both ends and the training length first, then whatever fits between, short to long.
    axes = place.axes

    def spot(length: int) -> float:
        return float(axes.transData.transform((length, 0))[0])

    def width(length: int) -> float:
        return (6.2 * len(f"{length:,}") + 6) * place.figure.dpi / 72

    middle = [length for length in lengths if length == train_length]
    first = [lengths[-1], lengths[0], *middle]
    shown: list[int] = []
    for length in [*first, *lengths]:
        if all(
            abs(spot(length) - spot(other)) >= (width(length) + width(other)) / 2
            for other in shown
        ):
            shown.append(length)
    return sorted(shown)
