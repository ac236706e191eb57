"""Several axes in one figure: where they stand, what they share, and their one colour bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from whatwhere.figures.palette import title as title_of
from whatwhere.figures.style import DPI, GREY, shorten

Frames = pd.DataFrame | Mapping[str, pd.DataFrame]
"""Measurements of one model; of several by their labels, or apart by a column `model`."""

WIDE, NARROW = 10.0, 4.0
"""Inches."""
SEQUENTIAL, DIVERGING = "cividis", "RdBu_r"
"""Colour maps that people with any form of colour blindness read in the right order."""
MOST_CELLS = 3000
"""Cells of a heat map that are drawn as shapes; more become an image within the SVG."""


@dataclass(frozen=True)
class Panels:
    """A figure with rows and columns of axes.

    Attributes:
        figure: The figure.
        axes: Its axes, row by row; those that nothing is drawn into are switched off.
        columns: How many stand side by side.
        narrow: Whether it is for a telephone.
    """

    figure: Figure
    axes: list[Any]
    columns: int
    narrow: bool

    def left(self, index: int) -> bool:
        """Whether axes stand in the first column."""
        return index % self.columns == 0

    def right(self, index: int) -> bool:
        """Whether axes are the last ones of their row."""
        return (index + 1) % self.columns == 0 or index == len(self.axes) - 1

    def bottom(self, index: int) -> bool:
        """Whether no axes stand below."""
        return index + self.columns >= len(self.axes)

    def colour_bar(self, mappable: Any, label: str, percent: bool = False) -> None:
        """Draw the one colour bar of the figure: at the right, below on a narrow figure."""
        more: dict[str, Any] = (
            {"location": "bottom", "aspect": 30, "shrink": 0.9}
            if self.narrow
            else {"location": "right", "aspect": 24, "shrink": 0.9, "pad": 0.02}
        )
        bar = self.figure.colorbar(mappable, ax=self.axes, label=label, **more)
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)
        axis = bar.ax.xaxis if self.narrow else bar.ax.yaxis
        if percent:
            axis.set_major_formatter(lambda value, _: f"{100 * value:g}")
        elif self.narrow:
            axis.set_major_locator(MaxNLocator(5))


def panels(title: str, count: int, columns: int, narrow: bool, height: float) -> Panels:
    """A figure of so many axes, which share their limits with none.

    Args:
        title: Above all.
        count: Of axes.
        columns: Axes side by side.
        narrow: 4 inches wide in place of 10.
        height: Inches of each row, labels included.
    """
    rows = -(-count // columns)
    lines = wrap(title, 44 if narrow else 96) or [""]
    size = (NARROW if narrow else WIDE, rows * height + 0.27 + 0.18 * len(lines))
    engine = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.02, hspace=0.03)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout=engine)
    FigureCanvasAgg(figure)
    figure.suptitle(
        "\n".join(lines), x=0.012, ha="left", weight="bold", fontsize=11 if narrow else 12
    )
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    return Panels(figure, axes, columns, narrow)


def by_model(frames: Frames) -> dict[str, pd.DataFrame]:
    """Measurements of each model by its label; those of one alone have the label ``""``.

    Models without a row are left out.

    Raises:
        ValueError: If no model has one.
    """
    if isinstance(frames, pd.DataFrame):
        split = "model" in frames
        found = {str(k): v for k, v in frames.groupby("model", sort=False)} if split else {}
        known = found if split else {"": frames}
    else:
        known = dict(frames)
    drawn = {label: frame for label, frame in known.items() if len(frame)}
    if not drawn:
        raise ValueError("nothing to draw: no measurement")
    return drawn


def heading(label: str, *more: str, most: int = 34) -> str:
    """What stands above axes: a model's name as papers write it, and more."""
    parts = [part for part in (title_of(label) if label else "", *more) if part]
    return shorten(", ".join(parts), most)


def head_line(axes: Any, text: str, narrow: bool) -> None:
    """Name axes."""
    axes.set_title(text, fontsize=9 if narrow else 10, loc="left", color="#1f2328", pad=5)


def shared_norm(
    values: Sequence[pd.Series[float]], low: float | None = None, high: float | None = None
) -> Normalize:
    """One scale for all values, so that models can be compared; limits may be given.

    Raises:
        ValueError: If no value is finite.
    """
    together = np.concatenate([np.asarray(part, dtype=float) for part in values])
    finite = together[np.isfinite(together)]
    if not finite.size:
        raise ValueError("nothing to draw: no finite value")
    lowest = float(finite.min()) if low is None else low
    highest = float(finite.max()) if high is None else high
    return Normalize(lowest, highest if highest > lowest else lowest + 1.0)


def heat(
    axes: Any, x: Any, y: Any, values: Any, norm: Normalize, colours: str, many: bool = False
) -> Any:
    """Draw cells between edges; `values` is `(len(y) - 1, len(x) - 1)`, NaN stays empty."""
    # Without an edge of its own colour a renderer leaves hairlines of background between cells.
    edges = {} if many else {"edgecolors": "face", "linewidth": 1.0}
    return axes.pcolormesh(
        np.asarray(x, dtype=float),
        np.asarray(y, dtype=float),
        np.ma.masked_invalid(np.asarray(values, dtype=float)),
        norm=norm,
        cmap=colours,
        rasterized=many,
        shading="flat",
        **edges,
    )


def bare(axes: Any) -> None:
    """Axes of a heat map: neither a grid nor a frame around it."""
    axes.grid(visible=False)
    axes.tick_params(length=2, width=0.6, color="#8a929c")
    for spine in axes.spines.values():
        spine.set_visible(False)


def integer_axis(axis: Any, most: int) -> None:
    """Ticks at integers, at most so many."""
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 4, 5, 10], integer=True, min_n_ticks=1))


def edges(values: Any) -> Any:
    """Edges of cells around increasing values, halfway between neighbours; one alone is 1 wide."""
    centres = np.asarray(values, dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    first, last = 2 * centres[0] - middle[0], 2 * centres[-1] - middle[-1]
    return np.concatenate([[first], middle, [last]])


def nothing_here(axes: Any, words: str) -> None:
    """Say in empty axes why they are empty."""
    axes.text(
        0.5,
        0.5,
        words,
        transform=axes.transAxes,
        ha="center",
        va="center",
        color=GREY,
        fontsize=9,
    )
    axes.set_xticks([])
    axes.set_yticks([])
