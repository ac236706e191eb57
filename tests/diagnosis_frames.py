"""Measurements made up for tests of figures, findings and the page: columns as the real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

LENGTHS = (64, 128, 256, 512, 1024)
TRAIN = 128


def frequencies(kind: str, count: int = 16) -> list[float]:
    """Radians per token: as many for `polar` as there are channels, half of them for `rotate`."""
    number = count if kind == "polar" else count // 2
    return [10000.0 ** (-c / number) for c in range(number)]


def usage(
    kind: str = "rotate", layers: int = 4, heads: int = 2, size: float = 1.0, seed: int = 0
) -> pd.DataFrame:
    """`trace.frequency_usage()`: large at low frequencies alone for `rotate`."""
    draw = np.random.default_rng(seed)
    rows = []
    for layer in range(layers):
        for head in range(heads):
            for side in ("query", "key"):
                for channel, frequency in enumerate(frequencies(kind)):
                    low = channel / len(frequencies(kind))
                    norm = size * ((low**3 if kind == "rotate" else 0.7) + 0.1 * draw.random())
                    rows.append((layer, head, side, channel, frequency, norm))
    return pd.DataFrame(rows, columns=["layer", "head", "side", "channel", "frequency", "norm"])


def delta(layers: int = 4, heads: int = 2) -> pd.DataFrame:
    """`learned_delta`: away from 0 at high frequencies."""
    rows = [
        (layer, head, channel, frequency, -frequency * (1 + 0.2 * head + 0.1 * layer))
        for layer in range(layers)
        for head in range(heads)
        for channel, frequency in enumerate(frequencies("polar"))
    ]
    return pd.DataFrame(rows, columns=["layer", "head", "channel", "frequency", "delta"])


def beyond(length: int, train: int = TRAIN) -> float:
    """0 within the training length, then 1 for every doubling."""
    return max(0.0, math.log2(length / train))


def geometry(
    growth: float = 1.0, layers: int = 4, heads: int = 2, lengths: Sequence[int] = LENGTHS
) -> pd.DataFrame:
    """`trace.geometry()`: the stable rank after the encoding grows by `growth` a doubling."""
    rows = []
    for layer in range(layers):
        for head in range(heads):
            for side in ("query", "key"):
                for stage in ("before", "after"):
                    for n in lengths:
                        more = growth * beyond(n) if stage == "after" else 0.0
                        rank = 1.8 + 0.1 * layer + 0.05 * head + more
                        rows.append((layer, head, side, stage, n, 1 / rank, rank, 3.0, 4.0))
    columns = ["layer", "head", "side", "stage", "length"]
    numbers = ["singular_share", "stable_rank", "centroid_norm", "rms_norm"]
    return pd.DataFrame(rows, columns=[*columns, *numbers])


def clusters(
    loss: float = 0.17, layers: int = 4, heads: int = 2, lengths: Sequence[int] = LENGTHS
) -> pd.DataFrame:
    """`trace.clusters()`: the silhouette after the encoding falls by `loss` a doubling."""
    rows = []
    for layer in range(layers):
        for head in range(heads):
            for stage in ("before", "after"):
                for n in lengths:
                    less = loss * beyond(n) if stage == "after" else 0.0
                    rows.append((layer, head, stage, n, -0.8 + less, 0.61 + 0.02 * head - less))
    columns = ["layer", "head", "stage", "length", "centroid_cosine", "silhouette"]
    return pd.DataFrame(rows, columns=columns)


def scores(
    loss: float = 0.15, layers: int = 4, heads: int = 2, lengths: Sequence[int] = LENGTHS
) -> pd.DataFrame:
    """`trace.scores()`: the mass of the sink falls by `loss` a doubling."""
    rows = []
    for layer in range(layers):
        for head in range(heads):
            for before, n in zip((0, *lengths), lengths, strict=False):
                mass = max(0.0, 0.54 + 0.02 * layer - loss * beyond(n))
                after = (n - before, mass, 2 + beyond(n), 0.1 * beyond(n))
                rows.append((layer, head, "before", n, n - before, 0.9, 1.0, 0.5))
                rows.append((layer, head, "after", n, *after))
    columns = ["layer", "head", "stage", "length", "queries", "sink_mass", "largest_score"]
    return pd.DataFrame(rows, columns=[*columns, "positive_share"])


def what_where(shift: float = 0.4, layers: int = 4, heads: int = 2) -> pd.DataFrame:
    """`trace.what_where()`."""
    rows = [
        (layer, head, min(1.0, shift * (1 + 0.1 * layer)), 5.0 * shift)
        for layer in range(layers)
        for head in range(heads)
    ]
    return pd.DataFrame(rows, columns=["layer", "head", "content_shift", "offset_shift"])


def points(
    layer: int = 1, head: int = 0, lengths: Sequence[int] = LENGTHS, count: int = 120
) -> pd.DataFrame:
    """`trace.points()` of one head: clouds that spread, and where the origin lies."""
    draw = np.random.default_rng(0)
    rows: list[tuple[object, ...]] = []
    for stage in ("before", "after"):
        for side, centre in (("query", 2.0), ("key", -2.0)):
            for position in np.linspace(0, lengths[-1] - 1, count).astype(int):
                length = next(n for n in lengths if n > position)
                spread = 0.4 + (0.5 * beyond(length) if stage == "after" else 0)
                x, y = draw.normal(size=2) * spread
                rows.append((layer, head, stage, length, side, position, centre + x, y, 0.6, 0.1))
        rows.append((layer, head, stage, lengths[0], "origin", -1, 0.5, 0.5, 0.6, 0.1))
    columns = ["layer", "head", "stage", "length", "side", "position", "x", "y"]
    return pd.DataFrame(rows, columns=[*columns, "x_share", "y_share"])


def in_distribution(
    kind: str = "rotate", layers: int = 4, lengths: Sequence[int] = LENGTHS, train: int = TRAIN
) -> pd.DataFrame:
    """`in_distribution(...)`, by its definition: the share of the circle met beyond training."""
    rows = []
    for layer in range(layers):
        for channel, frequency in enumerate(frequencies(kind)):
            turns = frequency * train / math.tau
            for n in lengths:
                met = min(1.0, frequency * n / math.tau)
                rows.append(
                    (
                        layer,
                        channel,
                        frequency,
                        turns,
                        turns >= 1,
                        n,
                        max(0.0, met - min(1, turns)),
                    )
                )
    columns = ["layer", "channel", "frequency", "turns", "complete", "length", "unseen"]
    return pd.DataFrame(rows, columns=columns)


def retrieval(
    fall: float = 0.3, lengths: Sequence[int] = LENGTHS, depths: Sequence[float] = (0, 0.5, 1)
) -> pd.DataFrame:
    """`retrieval(...)`: accuracy falls by `fall` a doubling beyond training."""
    rows = [
        (n, depth, 8, max(0.0, 0.9 - fall * beyond(n)), max(0.0, 0.95 - fall * beyond(n)))
        for n in lengths
        for depth in depths
    ]
    return pd.DataFrame(rows, columns=["length", "depth", "items", "accuracy", "token_accuracy"])


def cost(width: int = 64, polar: bool = True, lengths: Sequence[int] = LENGTHS) -> pd.DataFrame:
    """`cost(...)`: overhead `L / (12 width + 2 L)` of a polar encoding."""
    rows = []
    for n in lengths:
        more = n / (12 * width + 2 * n) if polar else 0.0
        rope = 1e6 * n
        rows.append((n, 0, 512, 1e5 * n, rope * (1 + more), rope, more, more * 1.01))
    columns = ["length", "table_bytes", "cache_bytes_per_token", "score_flops", "flops"]
    return pd.DataFrame(
        rows, columns=[*columns, "rope_flops", "overhead_formula", "overhead_measured"]
    )


def loss(rise: float = 0.2, lengths: Sequence[int] = LENGTHS) -> pd.DataFrame:
    """Loss by length as `whatwhere extrapolate` has it."""
    rows = [(n, 8, 8 * (n - 1), 1.5 + rise * beyond(n)) for n in lengths]
    return pd.DataFrame(rows, columns=["length", "windows", "tokens", "loss"])
