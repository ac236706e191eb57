"""Axes that many figures have: lengths, per cent, decimals; the mark of the training length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullLocator,
)

from whatwhere.figures.style import GREY


def length_axis(axes: Any, lengths: Sequence[int], train_length: int | None) -> None:
    """Make x a log2 axis with a tick at each length, as far as their labels have room."""
    ends = [*lengths, train_length] if train_length else list(lengths)
    axes.set_xscale("log", base=2)
    low, high = np.log2(min(ends)), np.log2(max(ends))
    room = max(0.03 * (high - low), 0.06)
    axes.set_xlim(2 ** (low - room), 2 ** (high + room))
    shown = _with_room(axes, sorted(set(lengths)), train_length)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{length:,}" for length in shown]))
    axes.xaxis.set_minor_locator(NullLocator())


def percent_axis(axis: Any) -> None:
    """Ticks at 0, 20, ... 100."""
    axis.set_major_locator(FixedLocator(range(0, 101, 20)))


def decimal_axis(axis: Any) -> None:
    """Plain numbers at 1, 1.5, 2, 3, 5, 7 times the powers of ten of a log axis."""
    axis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def mark_training_length(axes: Any, length: int | None) -> None:
    """Draw a vertical line at the training length, named above the axes."""
    if length is None:
        return
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


def _with_room(axes: Any, lengths: Sequence[int], train_length: int | None) -> list[int]:
    # Both ends and the training length first, then whatever fits between, short to long.
    def spot(length: int) -> float:
        return float(axes.transData.transform((length, 0))[0])

    def width(length: int) -> float:
        return float((6.2 * len(f"{length:,}") + 6) * axes.figure.dpi / 72)

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
