"""Which angles a model meets at a length that its training did not show, from its config alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from whatwhere.analysis.positions import LayerPositions, positions_of
from whatwhere.encodings.base import check_whole

LONGEST = 2**20
"""Tokens up to which a limit is looked for."""
# Frequencies of transformers are float32.
_ROUNDING = 1e-6

COLUMNS = (*("layer", "channel", "frequency", "turns", "complete", "length", "unseen"),)


@dataclass(frozen=True)
class SafeLength:
    """A predicted safe length.

    Attributes:
        length: Tokens up to which no harm is predicted; ``None`` is no limit.
        reason: Which part of the rule gave it, and its source.
    """

    length: int | None
    reason: str

    def __str__(self) -> str:
        shown = "no limit" if self.length is None else f"{self.length:,} tokens"
        return f"{shown}: {self.reason}"


def in_distribution(
    model: object, lengths: Sequence[int], train_length: int | None = None
) -> pd.DataFrame:
    """Which rotations complete a turn in training, and which meet angles unseen there.

    A channel (a pair for rotary scores, one channel for polar ones) of frequency ``theta`` turns a
    key that stands ``r`` tokens back by ``r theta``. Sequences of ``n`` tokens meet the arc
    ``[0, n theta)``; counted as in "Frayed RoPE and Long Inputs" (arXiv 2603.18017), whose slowest
    frequency ``4 pi / L`` makes two turns. With ``theta`` in training and ``theta'`` at length
    ``n`` (they differ where a rotation is interpolated, see `positions.positions_of`):

    - ``turns = L theta / 2 pi``, ``complete = turns >= 1``;
    - ``unseen = max(0, min(1, n theta' / 2 pi) - min(1, turns))``, a share of the circle.

    In a layer with a sliding window of ``w`` tokens ``min(n, w)`` and ``min(L, w)`` stand for
    ``n`` and ``L``.

    Args:
        model: An `Encoding`, a config or a model: ours, converted, or of transformers.
        lengths: ``n``, in tokens.
        train_length: Length at which the model was trained with the frequencies that it has now,
            in place of what the encoding or the config says.

    Returns:
        A row for each layer, channel that turns and length: ``layer``, ``channel``,
        ``frequency`` (radians per token, at that length), ``turns``, ``complete``, ``length``,
        ``unseen``. None for encodings without rotations.

    Raises:
        ValueError: If ``lengths`` are no positive integers, a learned table ends before one of
            them, or as for `positions.positions_of`.
    """
    wanted = check_lengths(lengths)
    rows: list[dict[str, Any]] = []
    for layer in positions_of(model, train_length):
        if layer.table is not None and max(wanted) > layer.table:
            raise ValueError(
                f"lengths: {max(wanted)} is beyond the learned table of {layer.table} positions"
            )
        if not layer.trained:
            continue
        seen = layer.reach(_known_length(layer))
        for n in wanted:
            now = layer.frequencies(n)
            for channel, (before, theta) in enumerate(zip(layer.trained, now, strict=True)):
                if theta == 0:
                    continue
                turns = seen * before / (2 * math.pi)
                met = layer.reach(n) * theta / (2 * math.pi)
                unseen = max(0.0, min(1.0, met) - min(1.0, turns))
                row = (layer.layer, channel, theta, turns, turns >= 1, n, unseen)
                rows.append(dict(zip(COLUMNS, row, strict=True)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def safe_length(model: object, train_length: int | None = None) -> SafeLength:
    """The length up to which a model is predicted to work, from its config alone.

    The least over its layers of a rule set down before it was compared with any loss:

    - **A layer that sees no further than in training** (a sliding window of at most ``L``): no
      limit.
    - **Rotated pairs** (RoPE). What two tokens are turns their angle, so that an unseen one moves
      the clusters of queries and keys (arXiv 2603.18017, section 4). If a pair does not complete
      a turn in training, the limit is the largest ``n`` at which none of those meets an unseen
      angle, ``n theta' <= L theta``: ``L`` for RoPE, ``s L`` for YaRN and linear interpolation
      by ``s``. If all do (the paper's criterion 2) and some channels do not turn (criterion 1):
      no limit. If all do and all channels turn (HighFreq), criterion 1 fails: ``L``.
    - **Polar channels** (PoPE, arXiv 2509.10534). Angles do not hang on what a token is, so that
      an unseen one can only weaken a channel. Channels that complete a turn in training showed
      all they do there. Of the others, those that never turn included, let
      ``K(r) = mean_c cos(r theta_c)``: what a key ``r`` tokens back scores by them, with
      ``delta = 0`` and equal magnitudes. While ``K >= 0`` a match adds to a score; the limit is
      the least ``r >= L`` with ``K(r) < min(0, min_{r < L} K(r))``, where it counts against a
      key as it never did in training. Over ever more channels the sum tends to
      ``Ci(2 pi r / L) - Ci(r / base)``, whose last term is 0 at ``r = 0.6165 base``; few channels
      reach 0 before (32 with base 10,000 and ``L = 256``: at 2,963). No limit if there is none
      up to `LONGEST`, or all channels complete a turn. A ``delta`` drawn uniformly: ``L``; the
      paper needs 0.
    - **No encoding**: ``L``. Nothing rotates, yet attention spreads over more keys than in
      training (arXiv 2404.12224).
    - **ALiBi**: no limit, as its paper found for perplexity (arXiv 2108.12409); with heads
      without a slope as without encoding.
    - **Sinusoidal**: ``L`` (arXiv 2108.12409, figure 1). **Learned**: the end of its table, and
      ``L`` if that is less: the other rows were never trained.

    Args:
        model: As for `in_distribution`.
        train_length: As for `in_distribution`.

    Raises:
        ValueError: If the training length is not known, or as for `positions.positions_of`.
    """
    layers = positions_of(model, train_length)
    if not layers:
        raise ValueError("model has no layer with attention")
    judged = {layer.same_as: layer for layer in reversed(layers)}
    found = [(_judge(layer), layer) for layer in judged.values()]
    least, where = min(found, key=lambda one: (_order(one[0].length), one[1].layer))
    if len(judged) == 1:
        return least
    return SafeLength(least.length, f"layer {where.layer}: {least.reason}")


def check_lengths(lengths: Sequence[int]) -> list[int]:
    """Lengths as integers.

    Raises:
        ValueError: If there is none, or one is no positive integer.
    """
    if isinstance(lengths, (str, bytes)) or not hasattr(lengths, "__iter__"):
        raise ValueError(f"lengths={lengths!r}: expected a sequence of positive integers")
    found = [check_whole("lengths", n) for n in lengths]
    if not found:
        raise ValueError("lengths is empty: expected at least one")
    return found


def _order(length: int | None) -> float:
    return math.inf if length is None else length


def _known_length(layer: LayerPositions) -> int:
    if layer.train_length is None:
        raise ValueError("the training length is not known from the config: give train_length")
    return layer.train_length


def _judge(layer: LayerPositions) -> SafeLength:
    in_scores = layer.kind not in ("learned", "sinusoidal")
    if in_scores and layer.window is not None and layer.window <= (layer.train_length or math.inf):
        return SafeLength(None, f"it sees {layer.window:,} tokens back, as in training")
    if layer.kind == "alibi" and not layer.some_without:
        return SafeLength(None, "ALiBi's slopes go on as in training (arXiv 2108.12409)")
    length = _known_length(layer)
    if layer.kind == "rotate":
        return _rotate(layer, length)
    if layer.kind == "polar":
        return _polar(layer, length)
    if layer.kind == "learned":
        return SafeLength(
            min(length, layer.table or length),
            "rows of a learned table beyond training are untrained or missing",
        )
    if layer.kind == "sinusoidal":
        return SafeLength(length, "sums of sines at unseen positions (arXiv 2108.12409)")
    who = "heads without a slope spread" if layer.kind == "alibi" else "attention spreads"
    return SafeLength(length, f"{who} over more keys than in training (arXiv 2404.12224)")


def _rotate(layer: LayerPositions, length: int) -> SafeLength:
    seen = layer.reach(length)
    turning = [c for c, theta in enumerate(layer.trained) if theta > 0]
    short = [c for c in turning if seen * layer.trained[c] < 2 * math.pi * (1 - _ROUNDING)]
    if short:
        limit = _last_seen(layer, short, seen, length)
        slowest = min(layer.trained[c] for c in short) * seen / (2 * math.pi)
        about = (
            f"{len(short)} of {len(turning)} rotated pairs complete no turn within "
            f"{seen:,} tokens (the slowest {slowest:.2g}), and meet unseen angles "
        )
        where = "beyond" if limit is not None else "at no length"
        return SafeLength(limit, f"{about}{where} (arXiv 2603.18017, criterion 2)")
    if layer.still or len(turning) < len(layer.trained):
        return SafeLength(
            None, "all rotations complete, some channels not rotated (arXiv 2603.18017)"
        )
    return SafeLength(
        length,
        "all channels rotate, so that clusters of queries and keys have no bound "
        "(arXiv 2603.18017, criterion 1)",
    )


def _last_seen(layer: LayerPositions, short: list[int], seen: int, length: int) -> int | None:
    """The largest length at which no pair that is short of a turn meets an unseen angle.

    ``n theta'(n) - L theta`` changes its sign once beyond ``L`` for every rope type: dynamic
    scaling makes it fall at first for slow pairs, and rise later.
    """

    def unseen(n: int) -> bool:
        now, reach = layer.frequencies(n), layer.reach(n)
        return any(reach * now[c] > seen * layer.trained[c] * (1 + _ROUNDING) for c in short)

    low, high = length, 2 * length
    while not unseen(high):
        if high >= 64 * LONGEST:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if unseen(middle) else (middle, high)
    return low


def _polar(layer: LayerPositions, length: int) -> SafeLength:
    if layer.uniform_delta:
        return SafeLength(
            length, "delta drawn uniformly does not extrapolate, only 0 does (arXiv 2509.10534)"
        )
    seen = layer.reach(length)
    theta = np.array(layer.trained)
    weak = theta[seen * theta < 2 * math.pi]
    if not weak.size:
        return SafeLength(None, "all channels complete a turn, and none hangs on content")
    limit = _kernel_limit(weak, seen, layer.window)
    about = f"the mean cosine of the {weak.size} channels without a whole turn in training"
    if limit is None:
        return SafeLength(None, f"{about} stays at least 0, or as in training")
    return SafeLength(
        max(limit, length),
        f"{about} is below 0 from a distance of {limit:,} tokens on (ours, on arXiv 2509.10534)",
    )


def _kernel_limit(theta: np.ndarray, seen: int, window: int | None) -> int | None:
    """The first distance whose ``K`` is below 0 and below all of training; ``None`` if none is.

    Args:
        theta: Radians per token, of channels.
        seen: Distances ``0..seen - 1`` occur in training.
        window: Distances below this occur at all.
    """
    floor, step = 0.0, 4096
    last = LONGEST if window is None else min(window, LONGEST)
    for start in range(0, last, step):
        r = np.arange(start, min(start + step, last))
        kernel = np.cos(r[:, None] * theta).mean(axis=1)
        floor = min(floor, *kernel[r < seen].tolist()) if start < seen else floor
        below = np.flatnonzero((r >= seen) & (kernel < floor - 1e-12))
        if below.size:
            return int(r[below[0]])
    return None
