"""Queries and keys as real vectors whose inner product is the score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whatwhere.attention.angles import rotation_table, temperature
from whatwhere.spec import Magnitude, ScoreSpec


def as_positions(positions: Tensor, num_axes: int, name: str) -> Tensor:
    """Positions as ``(B or 1, T, A)`` int64.

    Args:
        positions: ``(T,)`` or ``(B, T)`` integers, for more than one axis with a last axis of
            size ``A``; with one axis a last axis of size 1 is allowed for ``(B, T, 1)``.
        num_axes: ``A``.
        name: What the argument is called in messages.

    Raises:
        ValueError: If the dtype is not an integer one or the shape does not fit.
    """
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(
            f"{name} has dtype {positions.dtype}: expected integers "
            "(floating point cannot hold long positions exactly)"
        )
    if num_axes == 1 and positions.ndim in (1, 2):
        positions = positions.unsqueeze(-1)
    if positions.ndim == 2:
        positions = positions.unsqueeze(0)
    if positions.ndim != 3 or positions.shape[-1] != num_axes:
        tail = "" if num_axes == 1 else f", {num_axes}"
        raise ValueError(
            f"{name} has shape {tuple(positions.shape)} for {num_axes} position axis/axes: "
            f"expected (T{tail}) or (B, T{tail})"
        )
    return positions.long()


def magnitudes(x: Tensor, kind: Magnitude) -> Tensor:
    """Channels to magnitudes; ``none`` leaves them signed (the paper's ablation)."""
    if kind == "softplus":
        return F.softplus(x)
    return F.relu(x) if kind == "relu" else x


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where features are computed before they are rounded to ``dtype``: float32 or wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def encode_queries(q: Tensor, spec: ScoreSpec, positions: Tensor) -> Tensor:
    """Query features, with phase and length temperature.

    Args:
        q: ``(B, H, T, D)``.
        spec: The score.
        positions: Of the queries, as for `whatwhere.attention`.

    Returns:
        ``(B, H, T, spec.feature_dim(D))`` in the dtype of ``q``. With `encode_keys`, the inner
        product times ``spec.scale`` is the score before slopes.

    Raises:
        ValueError: If positions or shapes do not fit.
    """
    at = as_positions(positions, spec.num_axes, "positions")
    gain = None
    if spec.temperature_length is not None:
        gain = temperature(at[..., 0], spec.temperature_length)[:, None, :, None]
    return _encode(q, spec, at, phase=spec.phase, gain=gain)


def encode_keys(k: Tensor, spec: ScoreSpec, positions: Tensor) -> Tensor:
    """Key features: ``(B, G, S, D)`` to ``(B, G, S, spec.feature_dim(D))``, dtype of ``k``.

    They depend on nothing learned by the encoding, so that caches and grouped heads share them.

    Raises:
        ValueError: If positions or shapes do not fit.
    """
    at = as_positions(positions, spec.num_axes, "positions")
    return _encode(k, spec, at, phase=None, gain=None)


def _encode(
    x: Tensor, spec: ScoreSpec, positions: Tensor, phase: Tensor | None, gain: Tensor | None
) -> Tensor:
    if spec.inv_freq is None:
        return x if gain is None else (x.to(gain.dtype) * gain).to(x.dtype)
    dtype = compute_dtype(x.dtype)
    turning = spec.num_turning
    cos, sin = (
        table.unsqueeze(1)
        for table in rotation_table(spec.inv_freq[:, :turning], positions, dtype)
    )
    if phase is not None:
        turn = phase[:, None, :turning].to(dtype)
        cos, sin = _turn_back(cos, sin, turn.cos(), turn.sin())
    if gain is not None:
        gain = gain.to(dtype)
        cos, sin = cos * gain, sin * gain
    y = x.to(dtype)
    if spec.feature == "rotate":
        first, second, rest = y.split([turning, turning, x.shape[-1] - 2 * turning], dim=-1)
        parts = [first * cos - second * sin, second * cos + first * sin]
    else:
        shown = magnitudes(y[..., : spec.num_frequencies], spec.magnitude)
        parts = [shown[..., :turning] * cos, shown[..., :turning] * sin]
        rest = torch.cat((shown[..., turning:], y[..., spec.num_frequencies :]), dim=-1)
    if rest.shape[-1]:
        parts.append(rest if gain is None else rest * gain)
    return torch.cat(parts, dim=-1).to(x.dtype)


def _turn_back(cos: Tensor, sin: Tensor, cos_by: Tensor, sin_by: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of an angle less another, from the four: no angle is formed in low precision."""
    return cos * cos_by + sin * sin_by, sin * cos_by - cos * sin_by
