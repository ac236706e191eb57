"""Exact angles: tables of cos and sin from integer positions and float64 frequencies."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation_table(
    inv_freq: Tensor, positions: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin of ``sum_a positions[..., a] * inv_freq[a, c]``.

    The product is taken in float64 and rounded once, after cos and sin: at position 2^24 the
    error of the angle is 2^24 * 2^-53 = 2e-9 rad per unit of frequency, where a product in
    float32 would be off by 1 rad.

    Args:
        inv_freq: ``(A, R)`` float64, radians per position.
        positions: ``(..., T, A)`` integers.
        dtype: Of the tables.

    Returns:
        cos and sin, each ``(..., T, R)``.
    """
    angles = positions.double() @ inv_freq.to(positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def temperature(positions: Tensor, length: int) -> Tensor:
    """``(0.1 ln(n / length) + 1)^2`` with ``n = position + 1`` where that exceeds ``length``.

    1 elsewhere (RoPE-ID, arXiv 2603.18017). ``(..., T)`` integers to ``(..., T)`` float64.
    """
    ratio = (positions.double() + 1) / length
    return (0.1 * ratio.clamp(min=1).log() + 1) ** 2
