"""Which keys a block of query rows has to look at, and which of them are hidden from which row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from whatwhere.attention.cpu.problem import Problem

# Keys that are looked at together when blocks are sorted into seen, hidden and partly seen.
_KEYS = 64
# Beyond every position, a double precisely (padding goes through one), and far from overflow.
_FAR = 2**62


@dataclass(frozen=True, eq=False)
class Block:
    """Some query rows and the keys that any of them sees.

    Attributes:
        rows: Of the queries.
        keys: From the first to the last key that any row sees.
        edges: Parts of the keys, counted from the first, with ``(b or 1, rows, keys)`` True
            where a key is hidden. Elsewhere every row sees every key.
        blind: ``(b, rows)``, rows that see no key; ``None`` if there is none.
    """

    rows: slice
    keys: slice
    edges: list[tuple[slice, Tensor]]
    blind: Tensor | None = None


class Plan:
    """Blocks of rows for the sequences of a batch.

    Args:
        problem: The call.
        size: Rows of a block.
    """

    def __init__(self, problem: Problem, size: int) -> None:
        self.problem, self.size = problem, size
        p = problem
        self.plain = p.key_mask is None and p.segments is None
        self.plain = self.plain and (p.query_positions is None or not p.causal)

    def widest(self) -> int:
        """Keys of a block at most, as far as that is known in advance."""
        p, total = self.problem, self.problem.k.shape[2]
        if p.window and p.query_positions is None:
            return min(total, p.window + self.size)
        return total

    def blocks(self, batch: slice) -> Iterator[Block]:
        """Every row once; the keys that some of these sequences see."""
        length = self.problem.q.shape[2]
        for n, i in enumerate(range(0, length, self.size)):
            rows = slice(i, min(i + self.size, length))
            if self.plain:
                yield self._in_order(rows)
            else:
                yield self._sorted(batch, n, rows)

    @cached_property
    def _above(self) -> Tensor:
        return torch.ones(self.size, self.size, dtype=torch.bool).triu_(1)[None]

    def _in_order(self, rows: slice) -> Block:
        p = self.problem
        if not p.causal:
            return Block(rows, slice(0, p.k.shape[2]), [])
        count = rows.stop - rows.start
        start, end = p.offset + rows.start, p.offset + rows.stop
        first = max(0, start - p.window + 1) if p.window else 0
        edges = []
        if count > 1:
            edges.append((slice(start - first, end - first), self._above[:, :count, :count]))
        if p.window and end - p.window > first:
            # Row a sees key start + a - window + 1 first.
            cut = first - (start - p.window + 1)
            left = self._above.mT[:, :count, cut : count - 1]
            edges.append((slice(0, end - p.window - first), left))
        return Block(rows, slice(first, end), edges)

    def _sorted(self, batch: slice, n: int, rows: slice) -> Block:
        some, whole = self._summary
        some, whole = some[batch, n].any(dim=0), whole[batch, n].all(dim=0)
        found = some.nonzero()[:, 0].tolist()
        p, total = self.problem, self.problem.k.shape[2]
        if not found:
            return Block(rows, slice(0, 0), [])
        first, last = found[0], found[-1] + 1
        keys = slice(first * _KEYS, min(last * _KEYS, total))
        # Runs of key blocks that are not wholly seen.
        partly = F.pad((~whole[first:last]).int(), (1, 1)).diff().nonzero()[:, 0].tolist()
        edges = []
        blind: Tensor | None = None
        if not bool(whole[first:last].any()):
            blind = torch.ones(batch.stop - batch.start, rows.stop - rows.start, dtype=torch.bool)
        for start, stop in zip(partly[::2], partly[1::2], strict=True):
            part = slice(start * _KEYS, min(stop * _KEYS, keys.stop - keys.start))
            at = slice(keys.start + part.start, keys.start + part.stop)
            hidden = ~visible(p, batch, rows, at)
            edges.append((part, hidden))
            if blind is not None:
                blind = blind & hidden.all(dim=-1)
        if blind is not None and not bool(blind.any()):
            blind = None
        return Block(rows, keys, edges, blind)

    @cached_property
    def _summary(self) -> tuple[Tensor, Tensor]:
        """``(B, row blocks, key blocks)``: whether anything may be seen, whether all is."""
        p = self.problem
        batch, total = p.q.shape[0], p.k.shape[2]
        there = p.key_mask
        if there is None:
            there = torch.ones(1, total, dtype=torch.bool)
        alive = _pool(there, _KEYS, False, largest=True)
        some, whole = alive[:, None], _pool(there, _KEYS, True, largest=False)[:, None]
        if p.causal:
            least_q, most_q = _range(p.at_queries, None, self.size)
            least, most = _range(p.at_keys, there, _KEYS)
            some = some & (least[:, None] <= most_q[..., None])
            whole = whole & (most[:, None] <= least_q[..., None])
            if p.window:
                some = some & (most[:, None] > least_q[..., None] - p.window)
                whole = whole & (least[:, None] > most_q[..., None] - p.window)
        if p.segments is not None:
            of_queries = p.segments[:, p.offset :].long()
            least_q, most_q = _range(of_queries, None, self.size)
            least, most = _range(p.segments.long(), there, _KEYS)
            some = some & (least[:, None] <= most_q[..., None])
            some = some & (most[:, None] >= least_q[..., None])
            one = (least == most)[:, None] & (least_q == most_q)[..., None]
            whole = whole & one & (least[:, None] == least_q[..., None])
        rows = -(-p.q.shape[2] // self.size)
        return some.expand(batch, rows, -1), whole.expand(batch, rows, -1)


def visible(p: Problem, batch: slice, rows: slice, keys: slice) -> Tensor:
    """``(b or 1, rows, keys)`` bool, True where a query sees a key."""
    seen: Tensor | None = None
    if p.causal:
        ahead = distances(p, batch, rows, keys)
        seen = ahead >= 0
        if p.window:
            seen &= ahead < p.window
    if p.segments is not None:
        of_queries = p.segments[batch, p.offset :][:, rows, None]
        same = of_queries == p.segments[batch, None, keys]
        seen = same if seen is None else seen & same
    if p.key_mask is not None:
        there = p.key_mask[batch, None, keys]
        seen = there if seen is None else seen & there
    if seen is None:
        seen = torch.ones(1, 1, 1, dtype=torch.bool)
    return seen.expand(-1, rows.stop - rows.start, keys.stop - keys.start)


def distances(p: Problem, batch: slice, rows: slice, keys: slice) -> Tensor:
    """``t - s``: ``(b or 1, rows, keys)`` int64."""
    queries = p.at_queries[slice(None) if p.at_queries.shape[0] == 1 else batch]
    others = p.at_keys[slice(None) if p.at_keys.shape[0] == 1 else batch]
    return queries[:, rows, None] - others[:, None, keys]


def unseen(p: Problem) -> Tensor | None:
    """``(B or 1, S)``, keys that no query sees for a reason of their own; ``None`` if all may be.

    What lies there may be anything, NaN included, and must not come into the result.
    """
    dead = None if p.key_mask is None else ~p.key_mask
    reasons = []
    if p.causal and (p.query_positions is not None or p.window) and p.q.shape[2]:
        least, most = p.at_queries.aminmax(dim=1, keepdim=True)
        reasons.append(p.at_keys > most)
        if p.window:
            reasons.append(p.at_keys <= least - p.window)
    if p.segments is not None and p.offset:
        asked = [torch.isin(row, row[p.offset :], invert=True) for row in p.segments]
        reasons.append(torch.stack(asked))
    for reason in reasons:
        dead = reason if dead is None else dead | reason
    return dead if dead is not None and bool(dead.any()) else None


def _pool(x: Tensor, size: int, filler: bool | int, *, largest: bool) -> Tensor:
    """Largest or least of every ``size`` along the last axis."""
    missing = -x.shape[-1] % size
    parts = F.pad(x, (0, missing), value=filler).unflatten(-1, (-1, size))
    pooled: Tensor = parts.amax(dim=-1) if largest else parts.amin(dim=-1)
    return pooled


def _range(x: Tensor, there: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Least and largest of every ``size`` of those that are there."""
    low = high = x
    if there is not None:
        low, high = torch.where(there, x, _FAR), torch.where(there, x, -_FAR)
    least = _pool(low, size, _FAR, largest=False)
    return least, _pool(high, size, -_FAR, largest=True)
