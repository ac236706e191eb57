"""Measurements as tidy tables, one row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from whatwhere.analysis.layers import AttentionLayer
from whatwhere.analysis.scatter import Scatter

STAGES = ("before", "after")
USAGE = ("layer", "head", "side", "channel", "frequency", "norm")
SHIFTS = ("layer", "head", "content_shift", "offset_shift")
POINTS = (
    *("layer", "head", "stage", "length", "side", "position"),
    *("x", "y", "x_share", "y_share"),
)


def table(axes: Mapping[str, Sequence[object]], values: dict[str, Tensor]) -> pd.DataFrame:
    """One row for each place in arrays.

    Args:
        axes: Name and labels of each axis, in order.
        values: Arrays with these axes.
    """
    index = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
    columns = {name: array.flatten().numpy() for name, array in values.items()}
    return pd.DataFrame(columns, index=index).reset_index()


def joined(parts: Sequence[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """Tables one below the other, or one without rows."""
    if not parts:
        return pd.DataFrame({name: [] for name in columns})
    return pd.concat(parts, ignore_index=True)[list(columns)]


def clouds(
    layers: Sequence[AttentionLayer], lengths: Sequence[int], values: Sequence[dict[str, Tensor]]
) -> pd.DataFrame:
    """Of arrays ``(stage, H + G, N)`` for each layer."""
    parts = []
    for layer, arrays in zip(layers, values, strict=True):
        heads = layer.heads
        for side, rows in (("query", slice(0, heads)), ("key", slice(heads, None))):
            count = heads if side == "query" else layer.key_heads
            axes = {"stage": STAGES, "head": range(count), "length": lengths}
            part = table(axes, {name: array[:, rows] for name, array in arrays.items()})
            parts.append(part.assign(layer=layer.index, side=side))
    columns = ("layer", "head", "side", "stage", "length", *values[0])
    return joined(parts, columns)


def pairs(
    layers: Sequence[AttentionLayer], lengths: Sequence[int], values: Sequence[dict[str, Tensor]]
) -> pd.DataFrame:
    """Of arrays ``(stage, H, N)`` for each layer."""
    parts = [
        table({"stage": STAGES, "head": range(layer.heads), "length": lengths}, arrays).assign(
            layer=layer.index
        )
        for layer, arrays in zip(layers, values, strict=True)
    ]
    return joined(parts, ("layer", "head", "stage", "length", *values[0]))


def scores(
    layers: Sequence[AttentionLayer], lengths: Sequence[int], values: Sequence[dict[str, Tensor]]
) -> pd.DataFrame:
    """Of arrays ``(stage, H, N)`` for each layer, with the number of queries in each bin."""
    found = pairs(layers, lengths, values)
    queries = dict(zip(lengths, np.diff([0, *lengths]), strict=True))
    found.insert(4, "queries", found["length"].map(queries))
    return found


def usage(layer: AttentionLayer, query: Tensor, key: Tensor) -> pd.DataFrame:
    """Of norms ``(H, R)`` and ``(G, R)``."""
    parts = []
    for side, norms in (("query", query), ("key", key)):
        axes = {"head": range(norms.shape[0]), "channel": range(norms.shape[1])}
        part = table(axes, {"norm": norms})
        frequency = part["channel"].map(dict(enumerate(layer.frequencies)))
        parts.append(part.assign(layer=layer.index, side=side, frequency=frequency))
    return joined(parts, USAGE)


def shifts(layer: AttentionLayer, content: Tensor, offset: Tensor) -> pd.DataFrame:
    """Of one number by head each."""
    values = {"content_shift": content, "offset_shift": offset}
    return table({"head": range(layer.heads)}, values).assign(layer=layer.index)[list(SHIFTS)]


def points(layer: AttentionLayer, lengths: Sequence[int], found: Scatter) -> pd.DataFrame:
    """Of points ``(stage, H, side, P, 2)``, and the origin of each plane."""
    positions = found.positions.tolist()
    axes: dict[str, Sequence[object]] = {"stage": STAGES, "head": range(layer.heads)}
    whole = {**axes, "side": ("query", "key"), "position": positions}
    part = table(whole, {"x": found.points[..., 0], "y": found.points[..., 1]})
    origin = table(axes, {"x": found.origins[..., 0], "y": found.origins[..., 1]})
    shares = table(axes, {"x_share": found.shares[..., 0], "y_share": found.shares[..., 1]})
    rows = pd.concat([part, origin.assign(side="origin", position=-1)], ignore_index=True)
    rows = rows.merge(shares, on=["stage", "head"])
    bins = np.searchsorted(np.asarray(lengths), rows["position"] + 1)
    last = len(lengths) - 1
    rows["length"] = np.asarray(lengths)[np.minimum(bins, last)]
    return rows.assign(layer=layer.index)[list(POINTS)]
