"""Figures of a fine-tuning: loss against tokens, and loss by length before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import EngFormatter

from whatwhere.figures.palette import Style, styles
from whatwhere.figures.style import RC
from whatwhere.lab.report.canvas import (
    SETTLED,
    End,
    canvas,
    end_labels,
    limit,
    points,
    save,
    smoothed,
    thinned,
)
from whatwhere.lab.report.figures import loss_by_length

WHEN = {
    "before": Style("before", "#8a929c", "o", "--"),
    "after": Style("fine-tuned", "#0072b2", "o"),
}


def loss_by_tokens(log: pd.DataFrame, path_stem: Path, encoding: str, unit: str) -> list[Path]:
    """Draw the loss of a training run against the tokens it has seen, as .png and .svg.

    Args:
        log: Rows of a log.jsonl.
        path_stem: Path of the files without their suffix.
        encoding: Name, for style and label.
        unit: Of the loss, as in `"nats per byte"`.

    Returns:
        The files; none if no loss is finite.
    """
    known = log[np.isfinite(log["loss"].astype(float))]
    return save(draw_loss_by_tokens(known, encoding, unit), path_stem) if len(known) else []


@context(RC, after_reset=True)
def draw_loss_by_tokens(log: pd.DataFrame, encoding: str, unit: str) -> Figure:
    """Draw what `loss_by_tokens` writes."""
    style = styles([encoding])[encoding]
    log = log.assign(smooth=smoothed(log["loss"]))
    last = log.iloc[-1]
    ends = [End(last["tokens"], last["smooth"], style, f"{last['smooth']:.2f}")]
    place = canvas("Loss during fine-tuning", narrow=False, ends=ends)
    x, raw, smooth = (thinned(log[column]) for column in ("tokens", "loss", "smooth"))
    place.axes.plot(x, raw, "-", color=style.colour, alpha=0.25, linewidth=0.7)
    place.axes.plot(x, smooth, style.dashes, color=style.colour, linewidth=1.5, zorder=3)
    settled = [log.loc[log["tokens"] >= SETTLED * last["tokens"], "smooth"]]
    if "validation_loss" in log:
        measured = log[np.isfinite(log["validation_loss"].astype(float))]
        points(place, measured["tokens"], measured["validation_loss"], style)
        settled.append(measured["validation_loss"])
    limit(place, pd.concat(settled))
    place.note("line: training loss, smoothed; faint: as logged; markers: validation loss")
    place.axes.set_ylabel(f"loss, {unit}")
    place.axes.set_xlim(0, 1.015 * last["tokens"])
    place.axes.set_xlabel(f"{unit.split()[-1]}s trained on")
    place.axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    end_labels(place, ends)
    return place.figure


def before_and_after(
    losses: pd.DataFrame, path_stem: Path, train_length: int | None, unit: str
) -> list[Path]:
    """Draw loss against length before and after, as .png and .svg.

    Args:
        losses: Rows of a loss_by_length.csv.
        path_stem: Path of the files without their suffix.
        train_length: Marked by a vertical line unless `None`.
        unit: Of the loss.

    Returns:
        The files; none if no loss is finite.
    """
    results = losses.rename(columns={"when": "encoding", "loss": "value"})
    results = results.assign(seed=0, metric="loss")
    if not np.isfinite(results["value"]).any():
        return []
    return loss_by_length(results, path_stem, train_length, unit, WHEN)
