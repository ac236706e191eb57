"""Geometry of clouds of keys and queries, in one pass and without a matrix as long as the text.

The measures are those of "Frayed RoPE and Long Inputs" (arXiv 2603.18017): ``X`` is the ``(n, d)``
matrix of a head's keys, or of its queries. All follow from its Gram matrix ``X^T X`` (d x d) and
the sum of its rows, which add up over parts of a text, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from whatwhere.analysis.capture import Seen


@dataclass(frozen=True, eq=False)
class Moments:
    """Number, sum and Gram matrix of vectors; those of two parts of a cloud add up.

    Attributes:
        count: ``n``.
        total: ``(..., d)`` float64, the sum of the vectors.
        gram: ``(..., d, d)`` float64, ``X^T X``.
    """

    count: int
    total: Tensor
    gram: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of the rows of ``(..., n, d)``."""
        x = x.double()
        return cls(x.shape[-2], x.sum(-2), x.mT @ x)

    def __add__(self, other: Moments) -> Moments:
        """Of both parts together."""
        count = self.count + other.count
        return Moments(count, self.total + other.total, self.gram + other.gram)

    @property
    def centroid(self) -> Tensor:
        """``(..., d)``, the mean vector."""
        return self.total / self.count

    @property
    def squares(self) -> Tensor:
        """``||X||_F^2``, the sum of all squares."""
        return self.gram.diagonal(dim1=-2, dim2=-1).sum(-1)

    @property
    def singular_share(self) -> Tensor:
        """``sigma_1^2 / ||X||_F^2``: 1 for a line through the origin, ``1 / d`` at the least.

        ``sigma_1^2`` is the largest eigenvalue of ``X^T X``. Vectors that are all 0 give NaN.
        """
        largest = torch.linalg.eigvalsh(self.gram.cpu())[..., -1]
        share: Tensor = largest / self.squares.cpu()
        return share

    @property
    def stable_rank(self) -> Tensor:
        """``||X||_F^2 / sigma_1^2``, how many directions share the cloud's length, 1 to d."""
        return 1 / self.singular_share

    @property
    def rms_norm(self) -> Tensor:
        """``||X||_F / sqrt(n)``, the root mean square length of the vectors."""
        return (self.squares / self.count).sqrt()


def singular_share(x: Tensor) -> Tensor:
    """First-singular-value share ``sigma_1^2 / ||X||_F^2`` of ``(..., n, d)`` (2603.18017)."""
    return Moments.of(x).singular_share


def stable_rank(x: Tensor) -> Tensor:
    """Stable rank ``||X||_F^2 / sigma_1^2`` of ``(..., n, d)`` (arXiv 2603.18017)."""
    return Moments.of(x).stable_rank


def centroid_cosine(keys: Tensor | Moments, queries: Tensor | Moments) -> Tensor:
    """Cosine between the centroids of keys and queries (arXiv 2603.18017).

    Args:
        keys: ``(..., n, d)``, or their moments.
        queries: ``(..., m, d)``, or their moments.

    Returns:
        ``(...)`` float64; -1 where the clusters point apart.
    """
    means = [
        x.centroid if isinstance(x, Moments) else x.double().mean(-2) for x in (keys, queries)
    ]
    return F.cosine_similarity(means[0], means[1], dim=-1, eps=0.0)


def silhouette(
    keys: Tensor,
    queries: Tensor,
    key_moments: Moments | None = None,
    query_moments: Moments | None = None,
) -> Tensor:
    """Silhouette of the two clusters, keys and queries, with squared Euclidean distances.

    For a point with mean squared distance ``a`` to the others of its own cluster and ``b`` to the
    other cluster it is ``(b - a) / max(a, b)`` (Rousseeuw 1987), here the mean over all points:
    1 for clusters far apart, 0 where they lie in one another. A mean squared distance to a cluster
    of centroid ``m`` and mean square ``M`` is ``|x|^2 - 2 x.m + M``, so that no distance of two
    points is ever formed and time is linear in their number.

    Args:
        keys: ``(..., n, d)``.
        queries: ``(..., m, d)``.
        key_moments: Of the keys, where they are known.
        query_moments: Of the queries.

    Returns:
        ``(...)`` float64. NaN for clusters of one point.
    """
    clouds = [keys.double(), queries.double()]
    moments = [key_moments or Moments.of(keys), query_moments or Moments.of(queries)]
    total, count = torch.zeros((), dtype=torch.float64, device=keys.device), 0
    for own in (0, 1):
        x, squares = clouds[own], clouds[own].square().sum(-1)
        distances = [
            squares
            - 2 * (x @ m.centroid.unsqueeze(-1)).squeeze(-1)
            + (m.squares / m.count).unsqueeze(-1)
            for m in moments
        ]
        # A point's distance to itself, 0, is in the mean over its cluster, but not meant.
        near = distances[own] * (moments[own].count / (moments[own].count - 1))
        far = distances[1 - own]
        total = total + ((far - near) / torch.maximum(far, near)).sum(-1)
        count += x.shape[-2]
    return total / count


CLOUD = ("singular_share", "stable_rank", "centroid_norm", "rms_norm")
PAIR = ("centroid_cosine", "silhouette")

_AT_ONCE = 2**22
"""Numbers of a cloud that are in float64 at a time (32 MiB)."""


def measure(seen: Seen, lengths: Sequence[int]) -> dict[str, Tensor]:
    """Every measure of one layer, over the first ``n`` tokens for each ``n`` of ``lengths``.

    Args:
        seen: What the layer computes its scores from.
        lengths: Rising, the last at most ``T``.

    Returns:
        By name of `CLOUD` ``(stage, B, H + G, N)``, query heads first, and of `PAIR` ``(stage, B,
        H, N)``; stage 0 is before the encoding and 1 after it. On the CPU, float64.
    """
    stages = ((seen.queries_before, seen.keys_before), (seen.queries, seen.keys))
    found: list[dict[str, Tensor]] = []
    for queries, keys in stages:
        batch, heads, groups = queries.shape[0], queries.shape[1], keys.shape[1]
        out = {
            name: queries.new_empty(
                batch, heads + groups, len(lengths), dtype=torch.float64, device="cpu"
            )
            for name in CLOUD
        }
        out |= {name: out["rms_norm"].new_empty(batch, heads, len(lengths)) for name in PAIR}
        for text in range(batch):
            for group in range(groups):
                ours = slice(group * heads // groups, (group + 1) * heads // groups)
                _measure_group(
                    keys[text, group],
                    queries[text, ours],
                    lengths,
                    out,
                    text,
                    heads + group,
                    ours.start,
                )
        found.append(out)
    return {name: torch.stack([stage[name] for stage in found]) for name in (*CLOUD, *PAIR)}


def _measure_group(
    keys: Tensor,
    queries: Tensor,
    lengths: Sequence[int],
    out: dict[str, Tensor],
    text: int,
    key_row: int,
    first: int,
) -> None:
    """Fill in the rows of one key head ``(T, F)`` and its query heads ``(r, T, F)``."""
    wide = keys.double()
    key_moments = list(_growing(wide, lengths))
    _fill(out, (text, key_row), key_moments)
    together = max(1, _AT_ONCE // max(1, wide.numel()))
    for start in range(0, queries.shape[0], together):
        part = queries[start : start + together].double()
        rows = slice(first + start, first + start + part.shape[0])
        query_moments = list(_growing(part, lengths))
        _fill(out, (text, rows), query_moments)
        for index, (length, k, q) in enumerate(
            zip(lengths, key_moments, query_moments, strict=True)
        ):
            seen = (wide[:length].expand(part.shape[0], -1, -1), part[:, :length])
            out["centroid_cosine"][text, rows, index] = centroid_cosine(k, q).cpu()
            out["silhouette"][text, rows, index] = silhouette(*seen, k, q).cpu()


def _growing(x: Tensor, lengths: Sequence[int]) -> Iterator[Moments]:
    """Moments of the first ``n`` rows for each ``n``, every row used once."""
    known: Moments | None = None
    for start, stop in zip((0, *lengths), lengths, strict=False):
        part = Moments.of(x[..., start:stop, :])
        known = part if known is None else known + part
        yield known


def _fill(out: dict[str, Tensor], at: tuple[int, int | slice], moments: Sequence[Moments]) -> None:
    for index, m in enumerate(moments):
        share = m.singular_share
        values = (share, 1 / share, m.centroid.norm(dim=-1), m.rms_norm)
        for name, value in zip(CLOUD, values, strict=True):
            out[name][(*at, index)] = value.cpu()
