"""Frequencies as plain Python floats, in radians per position, fastest first.

They are numbers, not tensors, so that no cast, device move or meta-device construction of a
model can touch them; `Encoding` turns them into float64 tensors when it is called.
"""

from __future__ import annotations

import math


def geometric(count: int, base: float) -> tuple[float, ...]:
    """``theta_c = base^(-c / count)`` for ``c = 0..count-1``.

    RoPE uses ``count = d / 2`` (``base^(-2i / d)``), PoPE ``count = d`` (arXiv 2509.10534).
    """
    return tuple(base ** (-c / count) for c in range(count))


def in_distribution(count: int, train_length: int) -> tuple[float, ...]:
    """Log-spaced from one turn per 32 tokens down to two turns within the training length.

    RoPE-ID (arXiv 2603.18017): ``theta_max = 2 pi / 32``, ``theta_min = 4 pi / train_length``.
    A single frequency is ``theta_max``.

    Raises:
        ValueError: If ``train_length`` is at most 64, where no band lies between the two.
    """
    if train_length <= 64:
        raise ValueError(
            f"train_length={train_length}: in-distribution frequencies need more than 64, since "
            "the slowest makes two turns within it and the fastest one turn per 32 tokens"
        )
    fastest, slowest = 2 * math.pi / 32, 4 * math.pi / train_length
    ratio = slowest / fastest
    return tuple(fastest * ratio ** (c / max(count - 1, 1)) for c in range(count))


def yarn(
    count: int,
    base: float,
    train_length: int,
    factor: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> tuple[float, ...]:
    """RoPE's frequencies, the slow ones interpolated by ``factor`` (arXiv 2309.00071).

    With ``d = 2 count`` and ``corr(r) = d ln(L / (2 pi r)) / (2 ln base)``, the ramp rises from
    0 at ``floor(corr(beta_fast))`` to 1 at ``ceil(corr(beta_slow))``, and
    ``theta'_i = theta_i ((1 - ramp_i) + ramp_i / factor)``.
    """
    dim = 2 * count

    def corrected(turns: float) -> float:
        return dim * math.log(train_length / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(corrected(beta_fast)), 0)
    high = min(math.ceil(corrected(beta_slow)), dim - 1)
    # A ramp of no width is a step; the authors' code widens it by the same thousandth.
    width = high - low if high != low else 0.001
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(count)]
    return tuple(
        theta * ((1 - r) + r / factor)
        for theta, r in zip(geometric(count, base), ramp, strict=True)
    )
