"""Packing documents into sequences of one length without breaking those that fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from whatwhere.lab.data.base import IGNORED

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Rows of `length` tokens, each made of whole pieces of a token stream.

    Attributes:
        length: Tokens in a row.
        starts: `(P,)` first token of each piece in the stream, sorted by row.
        sizes: `(P,)` tokens of each piece.
        rows: `(R + 1,)`: row `r` is made of the pieces `rows[r] .. rows[r + 1] - 1`.
    """

    length: int
    starts: Ints
    sizes: Ints
    rows: Ints

    def __len__(self) -> int:
        return len(self.rows) - 1

    def gather(
        self, stream: NDArray[np.unsignedinteger], chosen: Ints, padding: int
    ) -> tuple[Ints, Ints, Ints]:
        """Return tokens, labels and segment ids of rows, each `(len(chosen), length)` int64.

        Segments count from 1 in a row; padding has segment 0. Labels are -100 on padding and on
        the first token of a piece, which nothing before it in its own segment can predict.
        """
        counts = self.rows[chosen + 1] - self.rows[chosen]
        piece = _ranges(self.rows[chosen], counts)
        row_of_piece = np.repeat(np.arange(len(chosen)), counts)
        sizes = self.sizes[piece]
        source = _ranges(self.starts[piece], sizes)
        row = np.repeat(row_of_piece, sizes)
        column = np.arange(len(row)) - np.searchsorted(row, row)
        rank = np.arange(len(piece)) - np.searchsorted(row_of_piece, row_of_piece)
        shape = (len(chosen), self.length)
        tokens = np.full(shape, padding, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        segments = np.zeros(shape, dtype=np.int64)
        tokens[row, column] = labels[row, column] = stream[source]
        first = np.cumsum(sizes) - sizes
        labels[row[first], column[first]] = IGNORED
        segments[row, column] = 1 + np.repeat(rank, sizes)
        return tokens, labels, segments


def pack(bounds: Ints, length: int) -> Packing:
    """Pack the documents of a stream into rows.

    A document longer than `length` is cut: its full pieces fill rows of their own. What remains,
    and shorter documents, are placed longest first, each where it leaves least room (best-fit
    decreasing).

    Args:
        bounds: `(documents + 1,)`: document `i` is `bounds[i] .. bounds[i + 1] - 1`.
        length: Tokens in a row.
    """
    sizes = np.diff(bounds)
    full, rest = sizes // length, sizes % length
    starts = _ranges(np.zeros_like(full), full) * length + np.repeat(bounds[:-1], full)
    rows = np.arange(len(starts))
    left = np.flatnonzero(rest)
    left = left[np.argsort(-rest[left], kind="stable")]
    placed = _best_fit(rest[left].tolist(), length)
    starts = np.concatenate([starts, (bounds[:-1] + full * length)[left]])
    sizes = np.concatenate([np.full(len(rows), length), rest[left]])
    rows = np.concatenate([rows, len(rows) + np.array(placed, dtype=np.int64)])
    order = np.argsort(rows, kind="stable")
    limits = np.searchsorted(rows[order], np.arange(rows.max(initial=-1) + 2))
    return Packing(length, starts[order], sizes[order], limits.astype(np.int64))


def _best_fit(sizes: list[int], length: int) -> list[int]:
    # The row of each piece.
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    placed = []
    count = 0
    for size in sizes:
        i = bisect_left(room, (size, -1))
        if i < len(room):
            left, row = room.pop(i)
        else:
            left, row, count = length, count, count + 1
        insort(room, (left - size, row))
        placed.append(row)
    return placed


def _ranges(starts: Ints, counts: Ints) -> Ints:
    # starts[0], starts[0] + 1, ... (counts[0] of them), then starts[1], ...
    before = np.cumsum(counts) - counts
    ranges: Ints = np.arange(counts.sum()) + np.repeat(starts - before, counts)
    return ranges
