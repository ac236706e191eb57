"""How every figure looks, and how it is written: settings of matplotlib, PNG, SVG."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context

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


def png(figure: Figure) -> bytes:
    """A figure as PNG, without a mark of the software."""
    content = io.BytesIO()
    with context(RC, after_reset=True):
        FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    return content.getvalue()


def svg(figure: Figure) -> str:
    """A figure as SVG whose text is drawn as paths: the same everywhere, and without a date."""
    content = io.BytesIO()
    fixed = {**RC, "svg.hashsalt": "whatwhere", "svg.fonttype": "path"}
    with context(fixed, after_reset=True):  # ticks are made only now
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue().decode()


def shorten(name: str, most: int) -> str:
    """A name of at most so many characters."""
    return name if len(name) <= most else name[: most - 1] + "…"
