"""What was measured of one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

FRAMES = (
    *("geometry", "clusters", "scores", "frequency_usage", "what_where", "points"),
    *("learned_delta", "loss_by_length", "in_distribution", "cost", "retrieval"),
)
"""Names of the tables, each a CSV."""


@dataclass(frozen=True)
class Measured:
    """The tables of one model, and what is known of it besides.

    Attributes:
        label: Short name.
        unit: Of its losses, as in ``"nats per byte"``.
        train_length: Tokens it was trained at, if known.
        frames: By the names in `FRAMES`; a table that is missing or empty was not measured.
        safe_length: Predicted from the config alone; ``None`` is no limit.
        safe_reason: Why, empty if it was not predicted.
        missing: Why a table of that name was not measured.
        notes: What else is to be said of how it was measured.
        heads: Layers and heads whose keys and queries are drawn.
        rule: By which they were chosen.
    """

    label: str
    unit: str
    train_length: int | None
    frames: Mapping[str, pd.DataFrame]
    safe_length: int | None = None
    safe_reason: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    rule: str = ""

    def table(self, name: str) -> pd.DataFrame | None:
        """A table, ``None`` if it has no row."""
        found = self.frames.get(name)
        return None if found is None or found.empty else found

    @property
    def lengths(self) -> list[int]:
        """At which it was measured, rising."""
        for name in ("geometry", "scores", "loss_by_length"):
            found = self.table(name)
            if found is not None:
                return sorted({int(length) for length in found["length"]})
        return []

    def span(self) -> tuple[int, int] | None:
        """The length that others are held against, and the longest; ``None`` if there is none.

        The first is the longest one within the training length; where that is not known, or
        all lengths are beyond it, the shortest.
        """
        lengths = self.lengths
        if not lengths or (self.train_length and lengths[-1] <= self.train_length):
            return None
        within = [n for n in lengths if self.train_length and n <= self.train_length]
        base = within[-1] if within else lengths[0]
        return (base, lengths[-1]) if base < lengths[-1] else None


def plain(value: Any) -> Any:
    """A number as JSON takes it."""
    return value.item() if hasattr(value, "item") else value
