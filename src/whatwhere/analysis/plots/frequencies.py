"""Heat maps over frequencies: how much each is used, and what phase it has learned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from whatwhere.analysis.plots.panels import (
    MOST_CELLS,
    SEQUENTIAL,
    Frames,
    Panels,
    bare,
    by_model,
    edges,
    head_line,
    heading,
    heat,
    integer_axis,
    panels,
    shared_norm,
)
from whatwhere.figures.style import GREY, RC

SIDES = {"query": "queries", "key": "keys"}
STILL = 0.45
"""Decades below the lowest frequency at which channels that never turn are drawn."""


@context(RC, after_reset=True)
def frequency_usage(
    usage: Frames, *, relative: bool = False, narrow: bool = False, title: str = ""
) -> Figure:
    """Draw how large each frequency's pair or magnitude is, per layer, for queries and keys.

    As figure 3 of the PoPE paper (arXiv 2509.10534): rows are frequencies, columns layers. All
    panels have one scale of frequencies, logarithmic, and one of colours. Channels of frequency 0
    are one row below the others, their mean.

    Args:
        usage: Columns layer, head, side, channel, frequency (rad/token), norm; the mean over
            heads is drawn.
        relative: Divide by the largest value of each layer and side of a model: where in the
            spectrum it lies, whatever its size.
        narrow: For a telephone.
        title: In place of the default one.

    Raises:
        ValueError: If no model has a frequency.
    """
    means = {label: _mean(frame, "norm", ["side"]) for label, frame in by_model(usage).items()}
    if relative:
        for label, mean in means.items():
            highest = mean.groupby(["layer", "side"])["value"].transform("max")
            means[label] = mean.assign(value=mean["value"] / highest)
    keys = [(label, side) for side in SIDES for label in means]
    if narrow:
        keys = [(label, side) for label in means for side in SIDES]
    columns = 2 if narrow or len(means) == 1 else len(means)
    chosen = {
        heading(label, SIDES[side], most=18 if narrow else 40): part[part["side"] == side]
        for label, side in keys
        for part in [means[label]]
    }
    name = title or "Use of frequencies" + (", share of each layer's largest" * relative)
    unit = "share of the layer's largest, %" if relative else "norm of pair or magnitude, mean"
    return _spectrum(name, chosen, columns, narrow, unit, "layer", percent=relative)


@context(RC, after_reset=True)
def learned_delta(
    delta: Frames, *, by_head: bool = False, narrow: bool = False, title: str = ""
) -> Figure:
    """Draw the size of PoPE's learned phases, per layer and frequency.

    Args:
        delta: Columns layer, head, channel, frequency (rad/token), delta (rad).
        by_head: Draw every head of every layer beside one another, not the mean over heads.
        narrow: For a telephone.
        title: In place of the default one.

    Raises:
        ValueError: If no model has one.
    """
    sizes = {k: v.assign(delta=v["delta"].abs()) for k, v in by_model(delta).items()}
    means = {
        label: _mean(frame, "delta", ["head"] if by_head else []) for label, frame in sizes.items()
    }
    if by_head:
        means = {label: _side_by_side(mean) for label, mean in means.items()}
    columns = 1 if narrow or by_head else min(len(means), 3)
    named = {heading(label): mean for label, mean in means.items()}
    name = title or f"Learned phases delta {'of each head' if by_head else ', mean over heads'}"
    unit = "|delta|, rad" if by_head else "mean |delta|, rad"
    below = "layer, its heads side by side" if by_head else "layer"
    return _spectrum(name.replace(" ,", ","), named, columns, narrow, unit, below)


def _mean(frame: pd.DataFrame, column: str, by: list[str]) -> pd.DataFrame:
    # The mean of a column over heads, by layer and frequency (and more), named `value`.
    grouped = frame.groupby(["layer", *by, "frequency"], sort=True)[column]
    return grouped.mean().rename("value").reset_index()


def _side_by_side(mean: pd.DataFrame) -> pd.DataFrame:
    # Heads of a layer as columns of width 1 / heads around the layer's number.
    count = int(mean["head"].max()) + 1
    place = mean["layer"] + (mean["head"] + 0.5) / count - 0.5
    return mean.assign(layer=place, width=1 / count)


def _spectrum(
    title: str,
    parts: dict[str, pd.DataFrame],
    columns: int,
    narrow: bool,
    unit: str,
    below: str,
    percent: bool = False,
) -> Figure:
    norm = shared_norm([part["value"] for part in parts.values()], low=0.0)
    many = sum(map(len, parts.values())) > MOST_CELLS
    rows = -(-len(parts) // columns)
    height = 2.3 if narrow else (3.3 if rows == 1 else 2.6)
    place = panels(title, len(parts), columns, narrow, height)
    limits = _limits(list(parts.values()))
    mesh: Any = None
    for index, (axes, (name, part)) in enumerate(zip(place.axes, parts.items(), strict=True)):
        for at, column in part.groupby("layer"):
            centres = _height(column["frequency"], limits)
            half = column["width"].iloc[0] / 2 if "width" in column else 0.5
            order = np.argsort(centres)
            values = column["value"].to_numpy()[order][:, None]
            x = [float(at) - half, float(at) + half]  # type: ignore[arg-type]
            y = _cells(centres[order], limits)
            mesh = heat(axes, x, y, values, norm, SEQUENTIAL, many)
        head_line(axes, name, narrow)
        bare(axes)
        integer_axis(axes.xaxis, 4 if narrow else 8)
        _frequency_axis(place, index, limits)
        if place.bottom(index):
            axes.set_xlabel(below)
    place.colour_bar(mesh, unit, percent)
    return place.figure


def _limits(parts: list[pd.DataFrame]) -> tuple[float, float, bool]:
    # Lowest and highest frequency above 0 as decimal logarithms; whether there is one of 0.
    every = np.concatenate([part["frequency"].to_numpy(float) for part in parts])
    turning = every[every > 0]
    if not turning.size:
        turning = np.array([1.0])
    return math.log10(turning.min()), math.log10(turning.max()), bool((every == 0).any())


def _height(frequencies: Any, limits: tuple[float, float, bool]) -> Any:
    found = np.asarray(frequencies, dtype=float)
    with np.errstate(divide="ignore"):
        return np.where(found > 0, np.log10(found), limits[0] - STILL)


def _cells(centres: Any, limits: tuple[float, float, bool]) -> Any:
    # Edges around log frequencies; the row of those that never turn stays apart.
    still = centres < limits[0] - STILL / 2
    turning = centres[~still]
    if not still.any():
        return edges(turning) if len(turning) > 1 else turning[0] + np.array([-0.05, 0.05])
    row = centres[still][0] + np.array([-0.12, 0.12])
    if not turning.size:
        return row
    around = edges(turning) if len(turning) > 1 else turning[0] + np.array([-0.05, 0.05])
    return np.concatenate([row[:1], [min(row[1], around[0])], around[1:]])


def _frequency_axis(place: Panels, index: int, limits: tuple[float, float, bool]) -> None:
    axes, (low, high, still) = place.axes[index], limits
    bottom = low - STILL - 0.12 if still else low
    room = 0.04 * (high - bottom) + 0.02
    axes.set_ylim(bottom - room * (not still), high + room)
    turn = math.log10(math.tau)
    chosen = _round_numbers(low, high)
    ticks, names = [math.log10(value) for value in chosen], [f"{value:g}" for value in chosen]
    waves = _round_numbers(turn - high, turn - low)
    wave_ticks = [turn - math.log10(wave) for wave in waves]
    wave_names = [_short(wave) for wave in waves]
    if still:
        ticks, names = [low - STILL, *ticks], ["0", *names]
        wave_ticks, wave_names = [low - STILL, *wave_ticks], ["∞", *wave_names]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FixedFormatter(names if place.left(index) else [""] * 99))
    if place.left(index):
        axes.set_ylabel("frequency, rad/token")
    if place.right(index):
        other = axes.secondary_yaxis("right")
        other.yaxis.set_major_locator(FixedLocator(wave_ticks))
        other.yaxis.set_major_formatter(FixedFormatter(wave_names))
        other.yaxis.set_minor_locator(NullLocator())
        other.tick_params(length=2, width=0.6, color=GREY)
        other.spines["right"].set_visible(False)
        other.set_ylabel("wavelength, tokens")


def _round_numbers(low: float, high: float) -> list[float]:
    """Powers of ten between two decimal logarithms; where they are few, what lies between, too."""
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        every = [step * 10.0**power for power in powers for step in steps]
        found = [value for value in every if low - 0.02 <= math.log10(value) <= high + 0.02]
        if len(found) > 2:
            break
    return found


def _short(number: float) -> str:
    return f"{number:,.4g}" if number < 10_000 else f"{number / 1000:,.0f}k"
