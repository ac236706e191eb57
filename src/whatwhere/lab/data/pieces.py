"""Rows that lie within one document each, for pieces of music and the like."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from whatwhere.lab.data import counter
from whatwhere.lab.data.sources import evenly_spaced

Ints = NDArray[np.int64]

# Streams of random numbers, beside those of `indirect_indexing`.
ORDER, SHIFT = 4, 5


@dataclass(frozen=True)
class Rows:
    """Parts of a token stream: `sizes[i]` tokens from `starts[i]` on, `(R,)` each."""

    starts: Ints
    sizes: Ints

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, chosen: slice | Ints) -> Rows:
        return Rows(self.starts[chosen], self.sizes[chosen])


class TrainingRows:
    """The rows of each epoch, every token of every document in exactly one of them.

    A document of up to `length` tokens is a row. A longer one of `q * length + r` tokens
    (`r < length`) gives `q + 1`: a first row of `s` tokens, rows of `length`, and the rest. `s` is
    drawn for each document and epoch among the values that leave neither end with less than two
    tokens, so that the number of rows is the same in each epoch.

    Args:
        bounds: `(documents + 1,)`: document `i` is `bounds[i] .. bounds[i + 1] - 1`.
        length: Tokens in a row, at least 4.
    """

    def __init__(self, bounds: Ints, length: int) -> None:
        self.length = length
        self._begin, self._sizes = bounds[:-1], np.diff(bounds)
        counts = np.where(self._sizes <= length, 1, self._sizes // length + 1)
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, seed: int, first: int, last: int) -> Rows:
        """Rows number `first .. last - 1` of all epochs laid end to end.

        The order of an epoch is a permutation drawn from (seed, epoch).
        """
        size = len(self)
        starts, sizes = [], []
        for epoch in range(first // size, (last - 1) // size + 1):
            order = counter.permutation(size, seed, ORDER, epoch).numpy()
            chosen = order[max(first - epoch * size, 0) : last - epoch * size]
            found = self._cut(chosen, seed, epoch)
            starts.append(found.starts)
            sizes.append(found.sizes)
        return Rows(np.concatenate(starts), np.concatenate(sizes))

    def _cut(self, chosen: Ints, seed: int, epoch: int) -> Rows:
        document = np.searchsorted(self._ends, chosen, side="right")
        total = self._sizes[document]
        counts = np.where(total <= self.length, 1, total // self.length + 1)
        place = chosen - (self._ends[document] - counts)  # within the document, from 0
        first = self._first_size(document, total, seed, epoch)
        start = np.where(place == 0, 0, first + (place - 1) * self.length)
        stop = np.where(total <= self.length, total, first + place * self.length)
        stop = np.minimum(stop, total)
        return Rows(self._begin[document] + start, stop - start)

    def _first_size(self, document: Ints, total: Ints, seed: int, epoch: int) -> Ints:
        rest = total % self.length
        lowest = np.maximum(rest, 2)
        highest = np.minimum(self.length, self.length + rest - 2)
        stream = counter.key(seed, SHIFT, epoch)
        bits = counter.keys(stream, torch.from_numpy(document))
        drawn: Ints = counter.below(bits, torch.from_numpy(highest - lowest + 1)).numpy()
        return lowest + drawn


def evaluation_rows(bounds: Ints, length: int) -> Rows:
    """Rows of a fixed grid: each document cut from its start, every token in one row."""
    sizes = np.diff(bounds)
    counts = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), counts)
    place = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = place * length
    return Rows(bounds[:-1][document] + start, np.minimum(length, sizes[document] - start))


def whole_windows(bounds: Ints, length: int, count: int) -> Ints:
    """Starts of at most `count` windows of a length within one document, not overlapping.

    Each document is cut into windows from its start; those that are chosen are spaced evenly.

    Raises:
        ValueError: No document is that long.
    """
    rows = evaluation_rows(bounds, length)
    starts = rows.starts[rows.sizes == length]
    if not len(starts):
        longest = int(np.diff(bounds).max(initial=0))
        raise ValueError(
            f"length={length} is more than the {longest} tokens of the longest document"
        )
    chosen: Ints = starts[evenly_spaced(len(starts) - 1, min(count, len(starts)))]
    return chosen
