"""`Problem`: what the operators of this backend are given, and the features they make of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.angles import temperature
from whatwhere.attention.cpu.tables import Angles
from whatwhere.attention.features import compute_dtype, magnitudes


@cache
def _bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    units = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    # The library that would use them may be told not to (ONEDNN_MAX_CPU_ISA).
    return units and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# The fields of a `Problem`, which operators take one by one.
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? inv_freq, Tensor? phase, Tensor? slopes, "
    "Tensor? query_positions, Tensor? key_positions, Tensor? key_mask, Tensor? segments, "
    "str feature, str magnitude, int frequencies, float scale, int sharpen, bool causal, "
    "int window, float softcap"
)


@dataclass(frozen=True, eq=False)
class Problem:
    """What operators take (`ARGUMENTS`), in that order, and what follows from it.

    Attributes:
        q: ``(B, H, T, D)`` raw.
        k: ``(B, G, S, D)`` raw.
        v: ``(B, G, S, V)``.
        inv_freq: ``(A, R')`` float64, of the channels that turn, or ``None``.
        phase: ``(H, R')`` or ``None``.
        slopes: ``(H,)`` or ``None``.
        query_positions: ``(B or 1, T, A)``; ``None`` for the last T of 0..S-1.
        key_positions: ``(B or 1, S, A)``; ``None`` together with the former, for 0..S-1.
        key_mask: ``(B, S)`` bool or ``None``.
        segments: ``(B, S)`` integers or ``None``; queries belong to the last T.
        feature: As in `ScoreSpec`.
        magnitude: As in `ScoreSpec`.
        frequencies: ``R``, pairs or channels that have an angle.
        scale: Factor of the scores.
        sharpen: Length beyond which queries are sharpened, 0 for never.
        causal: Whether a key is seen only at or before the query's position.
        window: Positions seen, 0 for all.
        softcap: Bound that scores approach, 0 for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    inv_freq: Tensor | None
    phase: Tensor | None
    slopes: Tensor | None
    query_positions: Tensor | None
    key_positions: Tensor | None
    key_mask: Tensor | None
    segments: Tensor | None
    feature: str
    magnitude: str
    frequencies: int
    scale: float
    sharpen: int
    causal: bool
    window: int
    softcap: float

    @cached_property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or float64 for float64 input."""
        return compute_dtype(self.q.dtype)

    @cached_property
    def product(self) -> torch.dtype:
        """Of the operands of every product but the scores.

        A score that is rounded to bfloat16 is off by its 8 bits, however large it is; the other
        operands and results are rounded by the reference as well.
        """
        return self.q.dtype if self.q.dtype == torch.bfloat16 and _bfloat16_units() else self.dtype

    @property
    def groups(self) -> int:
        """Query heads that share one key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def offset(self) -> int:
        """Position of the first query where none are given."""
        return self.k.shape[2] - self.q.shape[2]

    @property
    def turning(self) -> int:
        """``R'``."""
        return 0 if self.inv_freq is None else self.inv_freq.shape[1]

    @property
    def width(self) -> int:
        """``F``, numbers of a feature."""
        return self.q.shape[3] + (self.turning if self.feature == "polar" else 0)

    @cached_property
    def at_queries(self) -> Tensor:
        """``(B or 1, T)`` positions along the first axis."""
        if self.query_positions is None:
            return torch.arange(self.offset, self.k.shape[2])[None]
        return self.query_positions[..., 0]

    @cached_property
    def at_keys(self) -> Tensor:
        """``(B or 1, S)`` positions along the first axis."""
        if self.key_positions is None:
            return torch.arange(self.k.shape[2])[None]
        return self.key_positions[..., 0]

    @cached_property
    def query_angles(self) -> Angles | None:
        """Where queries stand."""
        return self._angles(self.query_positions, self.offset, self.q.shape[2])

    @cached_property
    def key_angles(self) -> Angles | None:
        """Where keys stand."""
        return self._angles(self.key_positions, 0, self.k.shape[2])

    def cap(self, scores: Tensor) -> Tensor:
        """``softcap * tanh(scores / softcap)`` in their place, where there is a cap."""
        if not self.softcap:
            return scores
        return scores.div_(self.softcap).tanh_().mul_(self.softcap)

    def _angles(self, positions: Tensor | None, start: int, length: int) -> Angles | None:
        if self.inv_freq is None or not self.turning:
            return None
        return Angles(self.inv_freq, positions, start, length, self.dtype)

    def turn_of_keys(self, batch: slice, rows: slice) -> Turn:
        """How the features of some keys are made: tables ``(b or 1, 1, s, R')``."""
        if self.key_angles is None:
            return Turn(self, None, None, None)
        return Turn(self, *self.key_angles.at(batch, rows), None)

    def turn_of_queries(self, batch: slice, heads: slice) -> Turn:
        """Likewise of some queries, the heads that share a key head on an axis of their own.

        Tables are ``(b or 1, g or 1, H/G or 1, T, R')``, times scale and temperature.
        """
        factor: Tensor | float = self.scale
        if self.sharpen:
            places = self.at_queries[slice(None) if self.at_queries.shape[0] == 1 else batch]
            gain = temperature(places, self.sharpen) * self.scale
            factor = gain.to(self.dtype)[:, None, None, :, None]
        if self.query_angles is None:
            return Turn(self, None, None, factor)
        cos, sin = (x.unsqueeze(2) for x in self.query_angles.at(batch, slice(None)))
        if self.phase is not None:
            by = self.phase[heads].to(self.dtype).unflatten(0, (-1, self.groups))[..., None, :]
            cos_by, sin_by = by.cos(), by.sin()
            cos, sin = (
                (cos * cos_by).addcmul_(sin, sin_by),
                (sin * cos_by).addcmul_(cos, sin_by, value=-1),
            )
        # Not in place: temperatures may be of each sequence where angles are shared by all.
        cos, sin = cos * factor, sin * factor
        return Turn(self, cos, sin, factor)


@dataclass(frozen=True, eq=False)
class Turn:
    """Makes features of raw channels, and takes gradients of features back to those.

    Attributes:
        problem: What kind of features.
        cos: Of the angles, times ``factor``; ``None`` where nothing turns.
        sin: Likewise.
        factor: Of the channels that do not turn, ``None`` for 1.
    """

    problem: Problem
    cos: Tensor | None
    sin: Tensor | None
    factor: Tensor | float | None

    def make(self, x: Tensor, out: Tensor) -> None:
        """Features ``(..., F)`` of raw channels ``(..., D)``, written to ``out``."""
        p, count = self.problem, self.problem.turning
        x = x.to(p.dtype)
        if p.feature == "polar":
            shown = magnitudes(x[..., : p.frequencies], p.magnitude)  # type: ignore[arg-type]
            if self.cos is not None and self.sin is not None:
                torch.mul(shown[..., :count], self.cos, out=out[..., :count])
                torch.mul(shown[..., :count], self.sin, out=out[..., count : 2 * count])
            self._plain(shown[..., count:], out[..., 2 * count : count + p.frequencies])
            self._plain(x[..., p.frequencies :], out[..., count + p.frequencies :])
        elif self.cos is not None and self.sin is not None:
            first, second = x[..., :count], x[..., p.frequencies : p.frequencies + count]
            turned = out[..., :count]
            torch.mul(first, self.cos, out=turned)
            turned.addcmul_(second, self.sin, value=-1)
            turned = out[..., count : 2 * count]
            torch.mul(second, self.cos, out=turned)
            turned.addcmul_(first, self.sin)
            self._plain(x[..., count : p.frequencies], out[..., 2 * count : p.frequencies + count])
            self._plain(x[..., p.frequencies + count :], out[..., p.frequencies + count :])
        else:
            self._plain(x, out)

    def back(self, x: Tensor, slope: Tensor) -> Tensor:
        """Gradient ``(..., D)`` for raw channels from that for their features ``(..., F)``."""
        p, count = self.problem, self.problem.turning
        out = slope.new_empty(x.shape)
        if p.feature == "polar":
            shown = out[..., : p.frequencies]
            if self.cos is not None and self.sin is not None:
                torch.mul(slope[..., :count], self.cos, out=shown[..., :count])
                shown[..., :count].addcmul_(slope[..., count : 2 * count], self.sin)
            self._plain(slope[..., 2 * count : count + p.frequencies], shown[..., count:])
            if p.magnitude == "softplus":
                shown.mul_(torch.sigmoid(x[..., : p.frequencies].to(p.dtype)))
            elif p.magnitude == "relu":
                shown.masked_fill_(x[..., : p.frequencies] <= 0, 0.0)
            self._plain(slope[..., count + p.frequencies :], out[..., p.frequencies :])
        elif self.cos is not None and self.sin is not None:
            first, second = slope[..., :count], slope[..., count : 2 * count]
            turned = out[..., :count]
            torch.mul(first, self.cos, out=turned)
            turned.addcmul_(second, self.sin)
            turned = out[..., p.frequencies : p.frequencies + count]
            torch.mul(second, self.cos, out=turned)
            turned.addcmul_(first, self.sin, value=-1)
            self._plain(
                slope[..., 2 * count : p.frequencies + count], out[..., count : p.frequencies]
            )
            self._plain(slope[..., p.frequencies + count :], out[..., p.frequencies + count :])
        else:
            self._plain(slope, out)
        return out

    def phase_gradient(self, made: Tensor, slope: Tensor) -> Tensor:
        """``sum_bt slope_cos made_sin - slope_sin made_cos``: ``(heads, R')``, of query features.

        Args:
            made: ``(b, g, H/G, T, F)``.
            slope: Gradient for them.
        """
        count = self.problem.turning
        change = slope[..., :count] * made[..., count : 2 * count]
        change.addcmul_(slope[..., count : 2 * count], made[..., :count], value=-1)
        return change.sum(dim=(0, 3)).flatten(0, 1)

    def _plain(self, x: Tensor, out: Tensor) -> None:
        if not out.shape[-1]:
            return
        if self.factor is None:
            out.copy_(x)
        else:
            torch.mul(x, self.factor, out=out)
