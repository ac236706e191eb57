"""Numbers against length, a line a model: geometry of queries and keys, scores, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.style import context
from matplotlib.ticker import MaxNLocator

from whatwhere.analysis.plots.panels import Frames, Panels, by_model, head_line, panels
from whatwhere.figures.axes import length_axis
from whatwhere.figures.palette import Style, styles
from whatwhere.figures.style import GREY, RC, shorten

TrainLength = int | Mapping[str, int | None] | None
"""Tokens that all models were trained at, or each by its label."""

PLAIN = Style("", "#0072b2", "o")
"""Of a model that is alone and has no label."""


@dataclass(frozen=True)
class Measure:
    """One of the small figures.

    Attributes:
        frame: `"geometry"`, `"clusters"` or `"scores"`.
        column: Of that frame.
        title: Above the axes.
        unit: Of the axis.
        side: Rows of queries or of keys alone.
        percent: Whether values of 0 to 1 are shown as 0 to 100.
    """

    frame: str
    column: str
    title: str
    unit: str
    side: str = ""
    percent: bool = False


MEASURES = (
    Measure("geometry", "stable_rank", "Stable rank of keys", "stable rank", "key"),
    Measure("geometry", "stable_rank", "Stable rank of queries", "stable rank", "query"),
    Measure("clusters", "silhouette", "Separation of keys and queries", "silhouette"),
    Measure("geometry", "singular_share", "First singular share, keys", "share, %", "key", True),
    Measure(
        "geometry", "singular_share", "First singular share, queries", "share, %", "query", True
    ),
    Measure("clusters", "centroid_cosine", "Key and query centroids", "cosine"),
    Measure("scores", "sink_mass", "Attention on the first token", "share, %", percent=True),
    Measure("scores", "largest_score", "Largest score of a query", "score, scaled"),
    Measure("scores", "positive_share", "Positive scores", "share, %", percent=True),
)


@context(RC, after_reset=True)
def geometry(
    geometry: Frames,
    clusters: Frames,
    scores: Frames,
    train_length: TrainLength = None,
    *,
    narrow: bool = False,
    title: str = "",
) -> Figure:
    """Draw the measurements of the RoPE-ID paper (arXiv 2603.18017) against length.

    A line is the median over layers and heads, its band the quartiles; dashed is before the
    encoding, solid after it.

    Args:
        geometry: Columns layer, head, side, stage, length, stable_rank, singular_share.
        clusters: Columns layer, head, stage, length, silhouette, centroid_cosine.
        scores: Columns layer, head, stage, length, sink_mass, largest_score, positive_share.
        train_length: Marked by a vertical line.
        narrow: For a telephone.
        title: In place of the default one.
    """
    frames = {"geometry": geometry, "clusters": clusters, "scores": scores}
    known = {name: by_model(frame) for name, frame in frames.items()}
    labels = list(dict.fromkeys(label for frame in known.values() for label in frame))
    styling = _styling(labels)
    place = panels(
        title or "Geometry of queries and keys against length",
        len(MEASURES),
        1 if narrow else 3,
        narrow,
        1.75 if narrow else 2.15,
    )
    trained = _train_lengths(train_length, labels)
    for index, (axes, measure) in enumerate(zip(place.axes, MEASURES, strict=True)):
        _draw_measure(axes, measure, known[measure.frame], styling)
        _finish(place, index, known[measure.frame], trained)
        head_line(axes, measure.title, narrow)
        axes.set_ylabel(measure.unit)
    # Where nothing is turned both stages are one.
    kinds = [("before the encoding", "--"), ("after it", "-")]
    _legend(place, styling, trained, kinds, _lengths(known["geometry"]))
    return place.figure


@context(RC, after_reset=True)
def cost(
    frames: Frames,
    train_length: TrainLength = None,
    *,
    narrow: bool = False,
    title: str = "",
) -> Figure:
    """Draw how many more operations a forward pass takes than with RoPE, against length.

    Args:
        frames: Columns length, overhead_formula and overhead_measured, relative to RoPE.
        train_length: Marked by a vertical line.
        narrow: For a telephone.
        title: In place of the default one.
    """
    known = by_model(frames)
    styling = _styling(list(known))
    name = title or ("Cost over RoPE" if narrow else "Operations of a forward pass, over RoPE's")
    place = panels(name, 1, 1, narrow, 3.0 if narrow else 3.9)
    axes = place.axes[0]
    for label, frame in known.items():
        style, rows = styling[label], frame.sort_values("length")
        x = rows["length"].to_numpy(float)
        axes.plot(x, 100 * rows["overhead_formula"], "-", color=style.colour, zorder=3)
        axes.plot(
            x,
            100 * rows["overhead_measured"],
            style.marker,
            color=style.colour,
            markersize=7,
            zorder=4,
        )
    trained = _train_lengths(train_length, list(known))
    _finish(place, 0, known, trained)
    axes.set_ylabel("operations over RoPE's, %")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.5), max(high, 1.0))
    _legend(place, styling, trained, [("formula", "-"), ("counted", "")], _lengths(known))
    return place.figure


def _draw_measure(
    axes: Any, measure: Measure, known: dict[str, pd.DataFrame], styling: Mapping[str, Style]
) -> None:
    factor = 100.0 if measure.percent else 1.0
    for label, frame in known.items():
        style = styling[label]
        rows = frame[frame["side"] == measure.side] if measure.side else frame
        stages = [stage for stage in ("before", "after") if stage in set(rows.get("stage", ()))]
        for stage in stages or [""]:
            part = rows[rows["stage"] == stage] if stage else rows
            spread = factor * part.groupby("length")[measure.column].quantile(
                np.array([0.25, 0.5, 0.75])
            )
            table = spread.unstack()
            x = table.index.to_numpy(float)
            if stage == "before":
                axes.plot(x, table[0.5], "--", color=style.colour, linewidth=1.4, zorder=3)
                continue
            axes.fill_between(
                x, table[0.25], table[0.75], color=style.colour, alpha=0.15, linewidth=0
            )
            axes.plot(
                x, table[0.5], "-", color=style.colour, marker=style.marker, markersize=6, zorder=4
            )


def _finish(
    place: Panels, index: int, known: dict[str, pd.DataFrame], trained: Mapping[str, int | None]
) -> None:
    axes = place.axes[index]
    lengths = _lengths(known)
    marks = _marks(trained, lengths)
    # The layout is made later: room for ticks is that of axes as they stand now, a little less.
    length_axis(axes, lengths, marks[0] if marks else None)
    for length in marks:
        axes.axvline(length, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if place.bottom(index):
        axes.set_xlabel("length, tokens")


def _legend(
    place: Panels,
    styling: Mapping[str, Style],
    trained: Mapping[str, int | None],
    kinds: list[tuple[str, str]],
    lengths: Sequence[int],
) -> None:
    handles = []
    marks = _marks(trained, lengths)
    for label, style in styling.items():
        if label:
            name = shorten(style.title, 24)
            handles.append(
                Line2D([], [], color=style.colour, marker=style.marker, markersize=6, label=name)
            )
    for name, dashes in kinds:
        more: dict[str, Any] = (
            {"linestyle": dashes} if dashes else {"marker": "o", "linestyle": ""}
        )
        colour = GREY if len(styling) > 1 else next(iter(styling.values())).colour
        handles.append(
            Line2D([], [], color=colour, linewidth=1.6, markersize=6, label=name, **more)
        )
    if marks:
        name = "trained at " + " and ".join(f"{n:,}" for n in marks)
        handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label=name))
    place.figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=2 if place.narrow else min(len(handles), 6),
        fontsize=9,
        handlelength=2.2,
        columnspacing=1.6,
    )


def _styling(labels: list[str]) -> dict[str, Style]:
    return {"": PLAIN} if labels == [""] else styles(labels)


def _train_lengths(given: TrainLength, labels: list[str]) -> dict[str, int | None]:
    if isinstance(given, Mapping):
        return {label: given.get(label) for label in labels}
    return dict.fromkeys(labels, given)


def _lengths(known: Mapping[str, pd.DataFrame]) -> list[int]:
    return sorted({int(n) for frame in known.values() for n in frame["length"]})


def _marks(trained: Mapping[str, int | None], lengths: Sequence[int]) -> list[int]:
    # Training lengths that are drawn: one beyond all lengths only where there is no other.
    marks = sorted({n for n in trained.values() if n})
    return [n for n in marks if n <= lengths[-1]] or marks[:1]
