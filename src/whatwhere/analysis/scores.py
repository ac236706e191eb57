"""Statistics of attention scores and weights, block by block: no T x T matrix is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whatwhere.analysis.capture import Seen

NAMES = ("sink_mass", "largest_score", "positive_share")

_AT_ONCE = 2**18
"""Scores that are there at a time: 2 MiB in float64, which stay in a core's cache."""


@dataclass(frozen=True, eq=False)
class Block:
    """Scores of some queries of some heads of one text.

    Attributes:
        text: Index of the text.
        heads: Which query heads.
        rows: Which queries.
        columns: Which keys; those that no row sees are left out on both sides.
        scores: ``(heads, rows, columns)`` as they enter the softmax, ``-inf`` for hidden keys.
        counts: ``(heads or 1, rows)`` keys that each query sees.
        sinks: ``(heads, 1)`` learned logits beside the scores, or ``None``.
    """

    text: int
    heads: slice
    rows: slice
    columns: slice
    scores: Tensor
    counts: Tensor
    sinks: Tensor | None

    def weights(self) -> Tensor:
        """Attention weights ``(heads, rows, columns)``, in place of the scores."""
        parts, total = self._parts()
        return parts.div_(total)

    def first_weights(self) -> Tensor:
        """The weights of the first column alone, ``(heads, rows)``; the scores are lost."""
        parts, total = self._parts()
        return parts[..., 0] / total[..., 0]

    def _parts(self) -> tuple[Tensor, Tensor]:
        top = self.scores.amax(-1, keepdim=True)
        if self.sinks is None:
            parts = self.scores.sub_(top).exp_()
            return parts, parts.sum(-1, keepdim=True)
        beside = self.sinks.unsqueeze(-1)
        top = torch.maximum(top, beside)
        parts = self.scores.sub_(top).exp_()
        return parts, parts.sum(-1, keepdim=True) + (beside - top).exp()


def blocks(
    seen: Seen, dtype: torch.dtype | None = None, at_once: int = _AT_ONCE
) -> Iterator[Block]:
    """The scores of a layer, some rows of some heads at a time.

    Args:
        seen: What the layer computes its scores from.
        dtype: In which; float64 on a CPU and float32 elsewhere by default.
        at_once: How many scores, about.
    """
    batch, heads, length = seen.queries.shape[:3]
    groups = seen.keys.shape[1]
    dtype = dtype or (torch.float64 if seen.queries.device.type == "cpu" else torch.float32)
    shared = heads // groups
    rows = max(16, min(256, at_once // length))
    together = max(1, min(shared, at_once // (rows * length)))
    for text in range(batch):
        for group in range(groups):
            keys = seen.keys[text, group].to(dtype)
            for head in range(group * shared, (group + 1) * shared, together):
                own = slice(head, min(head + together, (group + 1) * shared))
                queries = seen.queries[text, own].to(dtype) * seen.scale
                for start in range(0, length, rows):
                    at = slice(start, min(start + rows, length))
                    yield _block(seen, text, own, at, queries[:, at], keys)


def measure(
    seen: Seen, lengths: Sequence[int], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Sink mass, largest score and share of positive scores of one layer, by the query's position.

    For each query: the weight that its softmax gives the first token of the text (the sink of
    arXiv 2603.18017), its largest score, and the share of positive ones among the scores of keys
    that it sees; here their means over the queries at positions from the length before (0 at
    first) up to each length. Before the encoding a score is the scaled inner product of what is
    there then: of raw channels or magnitudes, without a turn, a slope or a bias.

    Args:
        seen: What the layer computes its scores from.
        lengths: Rising, the last at most ``T``.
        dtype: In which scores are computed; float64 on a CPU and float32 elsewhere by default.

    Returns:
        By name of `NAMES`, ``(stage, B, H, N)`` float64 on the CPU; stage 0 is before the encoding
        and 1 after it. The sink's mass is NaN where no query of a bin sees the first token (a
        sliding window).
    """
    after = _measure(seen, lengths, dtype)
    if seen.queries is seen.queries_before and seen.slopes is None and seen.bias is None:
        before = after  # nothing is encoded in this layer
    else:
        queries, keys = seen.queries_before, seen.keys_before
        plain = replace(seen, queries=queries, keys=keys, slopes=None, bias=None)
        before = _measure(plain, lengths, dtype)
    return {name: torch.stack((before[name], after[name])) for name in NAMES}


def _measure(seen: Seen, lengths: Sequence[int], dtype: torch.dtype | None) -> dict[str, Tensor]:
    batch, heads, length = seen.queries.shape[:3]
    shape = (batch, heads, length)
    by_row = {
        name: torch.full(shape, torch.nan, dtype=torch.float64, device=seen.queries.device)
        for name in NAMES
    }
    for block in blocks(seen, dtype):
        at = (block.text, block.heads, block.rows)
        by_row["largest_score"][at] = block.scores.amax(-1).double()
        positive = torch.count_nonzero(block.scores > 0, dim=-1)
        by_row["positive_share"][at] = positive / block.counts.double()
        if block.columns.start == 0:
            first = block.scores[..., 0] != -torch.inf
            sink = block.first_weights().double()
            by_row["sink_mass"][at] = sink.masked_fill(~first, torch.nan)
    bins = list(zip((0, *lengths), lengths, strict=False))
    return {
        name: torch.stack([rows[..., i:j].nanmean(-1) for i, j in bins], dim=-1).cpu()
        for name, rows in by_row.items()
    }


def _block(
    seen: Seen, text: int, heads: slice, rows: slice, queries: Tensor, keys: Tensor
) -> Block:
    columns = _columns(seen, rows, keys.shape[0])
    scores = queries @ keys[columns].mT
    if seen.softcap is not None:
        scores.div_(seen.softcap).tanh_().mul_(seen.softcap)
    t = torch.arange(rows.start, rows.stop, device=scores.device)
    s = torch.arange(columns.start, columns.stop, device=scores.device)
    if seen.slopes is not None:
        slopes = seen.slopes[heads].to(scores)[:, None, None]
        scores -= slopes * (t[:, None] - s).to(scores)
    if seen.bias is not None:
        scores += _cut(seen.bias, text, heads, rows, columns).to(scores)
    counts = _hide(seen, scores, text, heads, rows, columns, t, s)
    sinks = None if seen.sinks is None else seen.sinks[heads].to(scores).unsqueeze(-1)
    return Block(text, heads, rows, columns, scores, counts, sinks)


def _columns(seen: Seen, rows: slice, total: int) -> slice:
    if seen.mask is not None or not seen.causal:
        return slice(0, total)
    first = 0 if seen.window is None else max(0, rows.start - seen.window + 1)
    return slice(first, rows.stop)


def _cut(x: Tensor, text: int, heads: slice, rows: slice, columns: slice) -> Tensor:
    """The part of ``(B or 1, H or 1, T, S)`` that a block needs."""
    one = x[text if x.shape[0] > 1 else 0]
    part = one[heads if one.shape[0] > 1 else slice(None)]
    return part[:, rows, columns]


def _hide(
    seen: Seen,
    scores: Tensor,
    text: int,
    heads: slice,
    rows: slice,
    columns: slice,
    t: Tensor,
    s: Tensor,
) -> Tensor:
    """Make the scores of hidden keys ``-inf``, and count the others of each row."""
    if isinstance(seen.mask, Tensor):
        part = _cut(seen.mask, text, heads, rows, columns)
        if part.dtype == torch.bool:
            hidden = ~part
        else:  # added to scores; the lowest number of its dtype, or -inf, hides a key
            hidden = part <= torch.finfo(part.dtype).min / 2
            scores += part.to(scores).masked_fill(hidden, 0)
    elif seen.mask is not None:
        hidden = ~seen.mask(t, s)[None]
    elif not seen.causal:
        return torch.full((1, len(t)), len(s), device=scores.device)
    elif seen.window is None:
        own = scores[..., rows.start - columns.start :]
        own.masked_fill_((t[:, None] < s[rows.start - columns.start :]), -torch.inf)
        return (t + 1)[None]
    else:
        hidden = ((s > t[:, None]) | (s <= t[:, None] - seen.window))[None]
    scores.masked_fill_(hidden, -torch.inf)
    return (~hidden).sum(-1)
