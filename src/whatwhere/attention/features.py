"""Queries and keys as real vectors whose inner product is the score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from whatwhere.attention.angles import rotation_table, temperature
from whatwhere.spec import Magnitude, ScoreSpec

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_positions(positions: Tensor, num_axes: int, name: str, x: Tensor) -> Tensor:
    """Positions as ``(B or 1, T, A)`` int64.

    Args:
        positions: ``(T,)`` or ``(B, T)`` integers, with a last axis of size ``A``, which one
            axis may leave out.
        num_axes: ``A``.
        name: What the argument is called in messages.
        x: What stands there, ``(B, heads, T, ...)``.

    Raises:
        ValueError: If the dtype is not an integer one, or the shape or device does not fit.
    """
    batch, length = x.shape[0], x.shape[2]
    check_device(positions, name, x)
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(
            f"{name} has dtype {positions.dtype}: expected integers "
            "(floating point cannot hold long positions exactly)"
        )
    at = positions
    column = at.ndim == 2 and at.shape[0] == length != 1  # (T, 1), as `grid(T)` makes it
    if num_axes == 1 and at.ndim in (1, 2) and not (column and at.shape[1] == 1):
        at = at.unsqueeze(-1)
    if at.ndim == 2:
        at = at.unsqueeze(0)
    if at.ndim != 3 or at.shape[1:] != (length, num_axes) or at.shape[0] not in (1, batch):
        tail = "" if num_axes == 1 else f", {num_axes}"
        raise ValueError(
            f"{name} has shape {tuple(positions.shape)} for {num_axes} position axis/axes: "
            f"expected ({length}{tail}) or ({batch}, {length}{tail})"
        )
    return at.long()


def check_device(given: Tensor, name: str, x: Tensor) -> None:
    """Check that an argument is a tensor, on the device of queries or keys.

    Raises:
        ValueError: If it is not; the message calls it ``name``.
    """
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} is a {type(given).__name__}: expected a tensor")
    if given.device != x.device:
        raise ValueError(f"{name} is on {given.device}: expected {x.device}, as queries and keys")


def check_spec(x: Tensor, spec: ScoreSpec, name: str, heads: bool) -> None:
    """Check that a spec fits queries ``(B, H, T, D)`` or keys ``(B, G, S, D)``.

    Args:
        x: Queries or keys.
        spec: The score.
        name: What ``x`` is called in messages.
        heads: Whether its heads are query heads, of which the spec may know the number.

    Raises:
        ValueError: If the spec was made for another number of heads or channels, or is none.
    """
    if not isinstance(spec, ScoreSpec):
        raise ValueError(
            f"spec is a {type(spec).__name__}: expected a ScoreSpec, which an encoding returns "
            "when it is called: encoding()"
        )
    check_channels(x, name)
    used = spec.num_frequencies * (2 if spec.feature == "rotate" else 1)
    if used > x.shape[3]:
        raise ValueError(
            f"spec turns {used} channels, but {name} has head_dim={x.shape[3]}: "
            "was the encoding made for another head_dim?"
        )
    for field, tensor in (("phase", spec.phase), ("slopes", spec.slopes)):
        if heads and tensor is not None and tensor.shape[0] != x.shape[1]:
            raise ValueError(
                f"spec.{field} is for {tensor.shape[0]} heads, but {name} has {x.shape[1]}: "
                "expected one row per query head"
            )


def check_channels(x: Tensor, name: str) -> None:
    """Check that queries, keys or values are ``(B, heads, length, channels)``, floating point.

    Raises:
        ValueError: If they are not; the message calls them ``name``.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}: expected a tensor")
    if x.ndim != 4 or x.dtype not in _DTYPES:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}: expected 4 axes "
            "(B, heads, length, channels), floating point of 16, 32 or 64 bits"
        )


def magnitudes(x: Tensor, kind: Magnitude) -> Tensor:
    """Channels to magnitudes; ``none`` leaves them signed (the paper's ablation)."""
    if kind == "softplus":
        # The default threshold of 20 is an error of 2e-9, too much for float64.
        return F.softplus(x, threshold=40)
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
        product times ``spec.scale`` is the score before softcap and slopes.

    Raises:
        ValueError: If positions or shapes do not fit.
    """
    check_spec(q, spec, "q", heads=True)
    at = as_positions(positions, spec.num_axes, "positions", q)
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
    check_spec(k, spec, "k", heads=False)
    at = as_positions(positions, spec.num_axes, "positions", k)
    return _encode(k, spec, at, phase=None, gain=None)


def unturned(x: Tensor, spec: ScoreSpec) -> Tensor:
    """What of queries or keys does not hang on position: magnitudes for ``polar``, else all.

    With both sides unturned the score is that of ``spec.unturned()``. A cache of such keys holds
    ``D`` numbers a token, and no step computes the magnitude of an old key again.

    Args:
        x: ``(B, heads, T, D)`` queries or keys.
        spec: The score.

    Returns:
        The same shape and dtype.
    """
    if spec.feature != "polar" or spec.magnitude == "none":
        return x
    shown = magnitudes(x[..., : spec.num_frequencies], spec.magnitude)
    rest = x[..., spec.num_frequencies :]
    return torch.cat((shown, rest), dim=-1) if rest.shape[-1] else shown


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
        turn = phase[:, None, :turning].to(device=cos.device, dtype=dtype)
        cos, sin = _turn_back(cos, sin, turn.cos(), turn.sin())
    if gain is not None:
        gain = gain.to(dtype)
        cos, sin = cos * gain, sin * gain
    y = x.to(dtype)
    if spec.feature == "rotate":
        pairs = spec.num_frequencies
        first, second = y[..., :turning], y[..., pairs : pairs + turning]
        parts = [first * cos - second * sin, second * cos + first * sin]
        still = (y[..., turning:pairs], y[..., pairs + turning :])
        rest = torch.cat(still, dim=-1) if turning < pairs else still[1]
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
