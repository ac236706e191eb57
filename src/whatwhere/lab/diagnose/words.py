"""What sentences are made of: findings, numbers, a number at two lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from whatwhere.lab.diagnose.measured import Measured

Kind = Literal["seen", "not seen", "measured", "not measured"]


@dataclass(frozen=True)
class Finding:
    """One thing found, or not.

    Attributes:
        kind: Whether what is looked for is there, a plain measurement, or nothing was measured.
        text: A sentence or two, with the numbers.
    """

    kind: Kind
    text: str


@dataclass(frozen=True)
class Change:
    """A number at two lengths.

    Attributes:
        first: At the shorter one.
        last: At the longer one.
        where: The head where it changed most, in words with its numbers.
    """

    first: float
    last: float
    where: str

    @property
    def words(self) -> str:
        """As in ``1.80 → 4.90``."""
        return f"{number(self.first)} → {number(self.last)}"


def head_words(place: Any) -> str:
    """A pair of layer and head."""
    return f"layer {int(place[0])}, head {int(place[1])}"


def number(value: float) -> str:
    """Two decimals, fewer digits where they do not count."""
    size = abs(value)
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:,.0f}" if size >= 1000 else f"{value:.2f}" if size < 100 else f"{value:.1f}"
    return "0.00" if text == "-0.00" else text


def change(frame: pd.DataFrame, column: str, span: tuple[int, int], **rows: str) -> Change:
    """The median over heads at both lengths, and the head with the largest change.

    Args:
        frame: Columns layer, head, length and `column`.
        column: Which.
        span: Both lengths.
        rows: Columns and the value that rows must have there, as ``stage="after"``.
    """
    for name, value in rows.items():
        frame = frame[frame[name] == value]
    grid = frame.pivot_table(index=["layer", "head"], columns="length", values=column)
    first, last = grid[span[0]], grid[span[1]]
    moved = (last - first).abs()
    where = ""
    if len(moved) > 1 and moved.notna().any():
        place: Any = moved.idxmax()
        numbers = f"{number(first.loc[place])} → {number(last.loc[place])}"
        where = f"{head_words(place)} ({numbers})"
    return Change(float(first.median()), float(last.median()), where)


def no_span(found: Measured, what: str) -> Finding:
    """That nothing was measured for lack of two lengths, and why."""
    longest = found.lengths[-1] if found.lengths else 0
    if found.train_length and longest:
        why = f"no length beyond the training length of {found.train_length:,} was asked for"
    else:
        why = "one length alone was asked for, and the training length is not known"
    return Finding("not measured", f"{what} was not measured: {why}.")


def missing(found: Measured, name: str, what: str) -> Finding:
    """That a table was not measured, and why."""
    why = found.missing.get(name, "nothing turns in this model")
    return Finding("not measured", f"{what} was not measured: {why}.")
