"""Keys and queries of a head in the plane that shows most of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whatwhere.analysis.capture import Seen


@dataclass(frozen=True, eq=False)
class Scatter:
    """Of one layer and the first text.

    Attributes:
        positions: ``(P,)`` of the points.
        points: ``(stage, H, side, P, 2)`` float64, queries first; stage 0 is before the encoding.
        origins: ``(stage, H, 2)``, where the origin lies in each plane.
        shares: ``(stage, H, 2)`` of the variance that each axis shows.
    """

    positions: Tensor
    points: Tensor
    origins: Tensor
    shares: Tensor


def measure(seen: Seen, count: int) -> Scatter:
    """Project keys and queries on the two principal axes of both together (arXiv 2603.18017).

    The axes are eigenvectors of the covariance of all keys and queries of the head in the text, so
    that panels of several lengths share them.

    Args:
        seen: What the layer computes its scores from.
        count: Points of each side, at evenly spaced positions.
    """
    length, heads = seen.queries.shape[2], seen.queries.shape[1]
    device = seen.queries.device
    positions = torch.linspace(0, length - 1, min(count, length), device=device).long()
    points, origins, shares = [], [], []
    for queries, keys in (
        (seen.queries_before[0], seen.keys_before[0]),
        (seen.queries[0], seen.keys[0]),
    ):
        for head in range(heads):
            pair = (queries[head].double(), keys[head * keys.shape[0] // heads].double())
            mean = (pair[0].mean(0) + pair[1].mean(0)) / 2
            squares = pair[0].mT @ pair[0] + pair[1].mT @ pair[1]
            covariance = squares / (2 * length) - torch.outer(mean, mean)
            values, vectors = (x.to(device) for x in torch.linalg.eigh(covariance.cpu()))
            axes = vectors[:, [-1, -2]]
            # Eigenvectors have no sign of their own: the queries' centroid is put on the right.
            signs = torch.where((pair[0].mean(0) - mean) @ axes < 0, -1.0, 1.0)
            axes = axes * signs
            points.append(torch.stack([(x[positions] - mean) @ axes for x in pair]))
            origins.append(-mean @ axes)
            shares.append(values[[-1, -2]] / values.sum())
    shape = (2, heads)
    return Scatter(
        positions.cpu(),
        torch.stack(points).unflatten(0, shape).cpu(),
        torch.stack(origins).unflatten(0, shape).cpu(),
        torch.stack(shares).unflatten(0, shape).cpu(),
    )
