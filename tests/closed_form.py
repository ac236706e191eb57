"""Scores written out from the papers, one query and one key at a time, in Python's float64.

Nothing here imports the package: these are the formulas of the papers (arXiv numbers below), in
loops, as slow and as plain as they come. A score is ``score(q, k, t, s, head)`` before the factor
``head_dim ** -0.5`` unless said otherwise; ``q`` and ``k`` are lists of ``d`` floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Vector = Sequence[float]
PairScore = Callable[[Vector, Vector, float, float, int], float]


def geometric(count: int, base: float = 10000.0) -> list[float]:
    """``base^(-c/count)``: count is d/2 for RoPE's ``base^(-2i/d)``, d for PoPE."""
    return [base ** (-c / count) for c in range(count)]


def in_distribution(count: int, length: int) -> list[float]:
    """RoPE-ID (2603.18017): log-spaced, one turn in 32 tokens to two turns in the length."""
    fast, slow = math.log(2 * math.pi / 32), math.log(4 * math.pi / length)
    return [math.exp(fast + (slow - fast) * c / (count - 1)) for c in range(count)]


def yarn(d: int, base: float, length: int, factor: float) -> list[float]:
    """YaRN (2309.00071) with beta_fast 32 and beta_slow 1, for lengths that need no clamping."""

    def corr(turns: float) -> float:
        return d * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = math.floor(corr(32)), math.ceil(corr(1))
    assert 0 <= low < high <= d - 1, "outside the range in which papers.md's formula is complete"
    thetas = []
    for i in range(d // 2):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        theta = base ** (-2 * i / d)
        thetas.append(theta * ((1 - ramp) + ramp / factor))
    return thetas


def softplus(x: float) -> float:
    """``ln(1 + e^x)`` without loss at either end."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


MAGNITUDES: dict[str, Callable[[float], float]] = {
    "softplus": softplus,
    "relu": lambda x: max(x, 0.0),
    "none": lambda x: x,
}


def inner(q: Vector, k: Vector, first: int = 0) -> float:
    """``q . k`` over the channels from ``first`` on."""
    return math.fsum(a * b for a, b in zip(q[first:], k[first:], strict=True))


def rope(thetas: Vector) -> PairScore:
    """``sum_c mu_q mu_k cos((s-t) theta_c + phi_k - phi_q)``, pairs (c, c + R), the rest raw."""
    pairs = len(thetas)

    def score(q: Vector, k: Vector, t: float, s: float, head: int) -> float:
        total = inner(q, k, 2 * pairs)
        for c, theta in enumerate(thetas):
            mu_q, phi_q = math.hypot(q[c], q[c + pairs]), math.atan2(q[c + pairs], q[c])
            mu_k, phi_k = math.hypot(k[c], k[c + pairs]), math.atan2(k[c + pairs], k[c])
            total += mu_q * mu_k * math.cos((s - t) * theta + phi_k - phi_q)
        return total

    return score


def pope(
    thetas: Vector,
    delta: Sequence[Vector] | None,
    magnitude: str = "softplus",
    rest: str = "magnitude",
) -> PairScore:
    """PoPE (2509.10534): ``sum_c mu(q_c) mu(k_c) cos((s-t) theta_c + delta_c)``.

    Channels beyond the frequencies: magnitudes that do not turn, or raw signed products.
    """
    mu = MAGNITUDES[magnitude]

    def score(q: Vector, k: Vector, t: float, s: float, head: int) -> float:
        total = 0.0
        for c, theta in enumerate(thetas):
            phase = 0.0 if delta is None else delta[head][c]
            total += mu(q[c]) * mu(k[c]) * math.cos((s - t) * theta + phase)
        if rest == "raw":
            return total + inner(q, k, len(thetas))
        still = range(len(thetas), len(q))
        return total + math.fsum(mu(q[c]) * mu(k[c]) for c in still)

    return score


def nope(q: Vector, k: Vector, t: float, s: float, head: int) -> float:
    """No encoding."""
    return inner(q, k)


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi (2108.12409): a geometric sequence from ``2^(-8/n)`` with that ratio.

    For n that is no power of two: the slopes of the power below, then every other one of the
    sequence for twice that power.
    """

    def sequence(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 1
    while power * 2 <= heads:
        power *= 2
    return (sequence(power) + sequence(2 * power)[::2])[:heads]


def temperature(t: float, length: int) -> float:
    """``(0.1 ln(n / L) + 1)^2`` with ``n = t + 1``, for ``n > L``, else 1."""
    n = t + 1
    return (0.1 * math.log(n / length) + 1) ** 2 if n > length else 1.0


def sinusoid(position: int, width: int, base: float = 10000.0) -> list[float]:
    """1706.03762, 3.5: ``PE(p, 2i) = sin(p / base^(2i/width))``, ``PE(p, 2i+1) = cos(same)``."""
    out = []
    for i in range(width // 2):
        angle = position / base ** (2 * i / width)
        out += [math.sin(angle), math.cos(angle)]
    return out


def all_scores(
    score: PairScore, q: np.ndarray, k: np.ndarray, at_q: Sequence[float], at_k: Sequence[float]
) -> np.ndarray:
    """``(B, H, T, D)`` and ``(B, G, S, D)`` to ``(B, H, T, S)``; heads share keys in blocks."""
    batch, heads, length, _ = q.shape
    groups = heads // k.shape[1]
    out = np.zeros((batch, heads, length, k.shape[2]))
    for b, h, t, s in np.ndindex(*out.shape):
        out[b, h, t, s] = score(
            q[b, h, t].tolist(), k[b, h // groups, s].tolist(), at_q[t], at_k[s], h
        )
    return out


def seen(
    at_q: np.ndarray,
    at_k: np.ndarray,
    causal: bool = False,
    window: int | None = None,
    key_mask: np.ndarray | None = None,
    segments: np.ndarray | None = None,
) -> np.ndarray:
    """Which query sees which key, ``(B, T, S)``; positions are ``(B, T)`` and ``(B, S)``."""
    (batch, length), total = at_q.shape, at_k.shape[1]
    out = np.ones((batch, length, total), dtype=bool)
    for b, t, s in np.ndindex(*out.shape):
        ahead = int(at_q[b, t]) - int(at_k[b, s])
        ok = not causal or ahead >= 0
        ok = ok and (window is None or ahead < window)
        ok = ok and (key_mask is None or bool(key_mask[b, s]))
        ok = ok and (segments is None or segments[b, total - length + t] == segments[b, s])
        out[b, t, s] = ok
    return out


def attend(scores: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Softmax over the visible keys; zeros for a query that sees none."""
    batch, heads, length, _ = scores.shape
    groups = heads // v.shape[1]
    out = np.zeros((batch, heads, length, v.shape[3]))
    for b, h, t in np.ndindex(batch, heads, length):
        shown = visible[b, t]
        if shown.any():
            logits = scores[b, h, t, shown]
            weights = np.exp(logits - logits.max())
            out[b, h, t] = (weights / weights.sum()) @ v[b, h // groups, shown]
    return out
