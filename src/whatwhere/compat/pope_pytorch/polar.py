"""What a position module returns, ``(freqs, bias)``, and queries and keys turned by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from whatwhere.attention.features import compute_dtype, magnitudes
from whatwhere.spec import ScoreSpec


@dataclass(frozen=True, eq=False)
class Exact:
    """What ``freqs`` were rounded from.

    Attributes:
        angles: ``(..., n, R)`` float64, radians.
        version: Of ``freqs`` when it was made: later changes in place outdate the rest.
        inv_freq: ``(A, R)`` float64, radians per position.
        positions: ``(n, A)`` or ``(B, n, A)`` int64; ``None`` if they are no such integers.
        in_order: Whether they count up by one: scores are then those of 0..n-1.
    """

    angles: Tensor
    version: int
    inv_freq: Tensor
    positions: Tensor | None
    in_order: bool


class _FreqsAndBias(NamedTuple):
    freqs: Tensor
    bias: Tensor


class PolarEmbedReturn(_FreqsAndBias):
    """``freqs``, angles in radians ``(..., n, R)``, and ``bias``, the key phases ``(H, R)``.

    A pair as in PoPE-pytorch. Beside it stands what the angles were rounded from, which the
    functions of this package use while the pair is handed on whole: an angle in float32 is off by
    0.06 rad at 10^6. Any other ``(freqs, bias)`` is taken at its word.
    """

    exact: Exact | None = None


def version(x: Tensor) -> int:
    """Counts changes in place; tensors made in inference mode do not count."""
    return -1 if x.is_inference() else int(x._version)


@dataclass(frozen=True, eq=False)
class Embedding:
    """A ``(freqs, bias)`` that was checked.

    Attributes:
        freqs: As given.
        bias: ``(H or 1, R)``.
        angles: ``(B or 1, H or 1, n, R)``, exact where possible.
        exact: Where they come from, if that is known and still true.
    """

    freqs: Tensor
    bias: Tensor
    angles: Tensor
    exact: Exact | None

    @property
    def length(self) -> int:
        """``n``, positions."""
        return self.freqs.shape[-2]

    @property
    def num_frequencies(self) -> int:
        """``R``, channels that turn."""
        return self.freqs.shape[-1]

    def tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles, each ``(B or 1, H or 1, n, R)``, rounded once."""
        angles = self.angles if self.exact is not None else self.angles.to(dtype)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def spec(self, bias: Tensor, scale: float) -> ScoreSpec:
        """The score, for an embedding that is exact and integer positions."""
        assert self.exact is not None
        return ScoreSpec("polar", scale, self.exact.inv_freq, phase=bias)


def read(pope: Sequence[Tensor], q: Tensor, k: Tensor) -> Embedding:
    """Check ``(freqs, bias)`` against queries and keys ``(B, H, T, D)``.

    Raises:
        ValueError: If it is no such pair or does not fit.
    """
    if not isinstance(pope, (tuple, list)) or len(pope) != 2:
        raise ValueError(
            f"pos_emb is a {type(pope).__name__}: expected the pair (freqs, bias) that PoPE or "
            "AxialPoPE returns"
        )
    freqs, bias = pope
    for name, x in (("freqs", freqs), ("bias", bias)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"{name} of pos_emb: expected a floating-point tensor, got {x!r}")
        if x.device != q.device:
            raise ValueError(f"{name} of pos_emb is on {x.device}: expected {q.device}, as q")
    if freqs.ndim not in (2, 3, 4) or bias.ndim != 2 or bias.shape[1] != freqs.shape[-1]:
        raise ValueError(
            f"freqs and bias have shapes {tuple(freqs.shape)} and {tuple(bias.shape)}: expected "
            "(n, R), (B, n, R) or (B, H, n, R), and (H, R)"
        )
    if freqs.shape[-1] > q.shape[-1]:
        raise ValueError(
            f"freqs turns {freqs.shape[-1]} channels, but q has head_dim={q.shape[-1]}"
        )
    if q.shape[-2] > k.shape[-2]:
        raise ValueError(
            f"q has {q.shape[-2]} positions and k {k.shape[-2]}: queries are the last of the keys"
        )
    exact = pope.exact if isinstance(pope, PolarEmbedReturn) else None
    if exact is not None and not torch.compiler.is_compiling() and version(freqs) != exact.version:
        exact = None
    angles = freqs if exact is None else exact.angles
    shape = ((1, 1), (freqs.shape[0], 1), freqs.shape[:2])[freqs.ndim - 2]
    return Embedding(freqs, bias, angles.reshape(*shape, *freqs.shape[-2:]), exact)


def check_length(found: Embedding, length: int, what: str = "keys") -> None:
    """Check that there is an angle for each key: one row would be broadcast to all in silence.

    Raises:
        ValueError: If there is not.
    """
    if found.length != length:
        raise ValueError(
            f"freqs of pos_emb is for {found.length} positions: expected {length}, one for each "
            f"of the {what}, of which queries are the last"
        )


def turned(cos: Tensor, sin: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of an angle plus ``by``: no phase is added to a large angle, which rounds."""
    cos_by, sin_by = by.cos(), by.sin()
    return cos * cos_by - sin * sin_by, sin * cos_by + cos * sin_by


def widen(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Features ``(m cos, m sin, rest)``: ``(..., D + R)``, ``m = softplus``, dtype of the tables.

    Args:
        x: ``(B, H, T, D)``.
        cos: Broadcastable to ``(B, H, T, R)``.
        sin: Likewise.
    """
    count, x = cos.shape[-1], x.to(cos.dtype)
    shown = magnitudes(x[..., :count], "softplus")
    return torch.cat((shown * cos, shown * sin, x[..., count:]), dim=-1)


def apply_pope_to_qk(
    pope: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    to_magnitude: Callable[[Tensor], Tensor] = F.softplus,
    return_complex: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys as vectors whose inner product is PoPE's score (arXiv 2509.10534).

    Channel ``c < R`` becomes ``m(x_c) (cos a_c, sin a_c)``, the two side by side, where ``a`` is
    the angle of the position, and for keys that plus ``bias``; the others follow as they are.

    Args:
        pope: ``(freqs, bias)`` for ``S`` positions.
        q: ``(B, H, T, D)``, the last T of the S positions.
        k: ``(B, H, S, D)``.
        to_magnitude: ``m``. It is called with float32, or float64 if that comes in.
        return_complex: Give complex numbers ``m e^(i a)`` instead, ``(..., D)`` wide: the score
            is the real part of ``q conj(k)``.

    Returns:
        ``(B, H, T, D + R)`` and ``(B, H, S, D + R)`` in the widest dtype of ``q``, ``k`` and
        ``freqs``.

    Raises:
        ValueError: If shapes do not fit.
    """
    found = read(pope, q, k)
    check_length(found, k.shape[-2])
    if found.bias.shape[0] not in (1, k.shape[1]) and k.shape[1] != 1:
        raise ValueError(
            f"bias is for {found.bias.shape[0]} heads, but k has {k.shape[1]}: repeat grouped keys"
        )
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), found.freqs.dtype)
    cos, sin = found.tables(compute_dtype(dtype))
    of_keys = turned(cos, sin, found.bias.to(cos.dtype)[:, None])
    last = k.shape[-2] - q.shape[-2]
    of_queries = (cos[..., last:, :], sin[..., last:, :])
    made = []
    for x, (c, s) in ((q, of_queries), (k, of_keys)):
        wide = x.to(c.dtype)
        shown, rest = wide[..., : c.shape[-1]], wide[..., c.shape[-1] :]
        shown = (
            magnitudes(shown, "softplus") if to_magnitude is F.softplus else to_magnitude(shown)
        )
        if return_complex:
            parts = (torch.complex(shown * c, shown * s), torch.complex(rest, 0 * rest))
            made.append(torch.cat(parts, dim=-1))
        else:
            pairs = torch.stack((shown * c, shown * s), dim=-1).flatten(-2)
            made.append(torch.cat((pairs, rest), dim=-1).to(dtype))
    return made[0], made[1]
