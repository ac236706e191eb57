"""One number an encoding, drawn: a loss on a whole split, or a score over tasks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.style import context

from whatwhere.figures.palette import Style, styles
from whatwhere.figures.style import RC, shorten
from whatwhere.lab.report.canvas import LONGEST_NAME, canvas
from whatwhere.lab.report.figures import PAPER


@context(RC, after_reset=True)
def draw_metric(
    results: pd.DataFrame,
    metric: str,
    unit: str,
    paper: Mapping[str, tuple[float, float | None]] | None = None,
    styling: Mapping[str, Style] | None = None,
    narrow: bool = False,
) -> Figure:
    """Draw one metric, one row an encoding, the best on top.

    Args:
        results: Rows as in results.csv.
        metric: Which; one that ends in `accuracy` is drawn in per cent, the highest on top,
            another in `unit`, the lowest on top.
        unit: As in `"nats per token"`.
        paper: Value and spread, if known, of each encoding.
        styling: Style of each encoding.
        narrow: For a telephone.

    Raises:
        ValueError: If no value is finite.
    """
    table = results[(results["metric"] == metric) & np.isfinite(results["value"].astype(float))]
    if table.empty:
        raise ValueError(f"nothing to draw: no finite {metric}")
    share = metric.endswith("accuracy")
    factor, digits = (100.0, 1) if share else (1.0, 4)
    found = factor * table.groupby("encoding", sort=False)["value"].agg(["mean", "std"])
    found = found.sort_values("mean", ascending=not share, kind="stable")
    styling = styling or styles(found.index)
    names = [
        f"{shorten(styling[str(label)].title, 14 if narrow else LONGEST_NAME)}  {mean:.{digits}f}"
        for label, mean in found["mean"].items()
    ]
    name = metric.replace("_", " ")
    place = canvas(
        name[0].upper() + name[1:],
        narrow,
        rows=len(found),
        left=0.25 + 0.085 * max(map(len, names)),
    )
    axes = place.axes
    known = {label: value for label, value in (paper or {}).items() if label in found.index}
    for row, (label, mean, deviation) in enumerate(found.itertuples()):
        style = styling[str(label)]
        seeds = factor * table.loc[table["encoding"] == label, "value"]
        if len(seeds) > 1:
            # Beside the bar, which would hide them.
            below = [row - 0.18] * len(seeds)
            axes.plot(seeds, below, ".", color=style.colour, alpha=0.8, zorder=3)
            axes.errorbar(mean, row, xerr=deviation, color=style.colour, capsize=3, zorder=3)
        axes.plot(mean, row, style.marker, color=style.colour, markersize=9, zorder=4)
        if label in known:
            value, spread = known[str(label)]
            if spread is not None:
                axes.errorbar(factor * value, row + 0.28, xerr=factor * spread, color="#444444")
            axes.plot(factor * value, row + 0.28, "D", **PAPER)
    axes.set_yticks(range(len(found)), names)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel(f"{name}, {'%' if share else unit}")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    many = table.groupby("encoding").size().max() > 1
    notes = ["mean ± one standard deviation, small dots: seeds"] if many else ["one seed"]
    place.note("; ".join(notes + (["hollow diamond: the paper"] if known else [])))
    return place.figure
