"""Lengths as the command line has them."""

from __future__ import annotations

from collections.abc import Sequence


def parse_lengths(given: Sequence[str]) -> list[int]:
    """Integers from `128,512 1024`.

    Raises:
        ValueError: If a part is none.
    """
    parts = [part for value in given for part in value.split(",") if part.strip()]
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise ValueError(f"lengths: expected integers as in 1024,2048, got {given}") from None
