"""`Problem`: what the kernels are given, worked out once for a call."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.angles import temperature

KINDS = {"identity": 0, "rotate": 1, "polar": 2}
MAGNITUDES = {"none": 0, "softplus": 1, "relu": 2}


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def padded(width: int) -> int:
    """The tile width for this many channels: a power of two of at least 16, 0 for none."""
    return 0 if width == 0 else max(16, 1 << (width - 1).bit_length())


def by_length(x: Tensor, width: int) -> Tensor:
    """An empty ``(B, heads, T, width)``, lengths before heads in memory.

    So the projection that follows attention reads it without a copy.
    """
    batch, heads, length = x.shape[:3]
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Score:
    """The parts of a `ScoreSpec` that an operator takes, as tensors and plain values.

    Attributes:
        feature: As in `ScoreSpec`.
        magnitude: As in `ScoreSpec`.
        magnitudes: Leading channels that are magnitudes (``polar``).
        inv_freq: ``(A, R)`` float64 of the channels or pairs that turn, or ``None``.
        phase: ``(H, R)`` or ``None``.
        slopes: ``(H,)`` or ``None``.
        scale: Factor of scores.
        temperature_length: 0 for none.
        query_positions: ``(B or 1, T, A)``, or ``None`` in order.
        key_positions: ``(B or 1, S, A)``, or ``None`` in order.
        key_mask: ``(B, S)`` bool or ``None``.
        query_segments: ``(B, T)`` or ``None``.
        key_segments: ``(B, S)`` or ``None``.
        causal: Whether causal.
        window: 0 for none.
        tf32: Whether float32 products may be rounded to TF32.
    """

    feature: str
    magnitude: str
    magnitudes: int
    inv_freq: Tensor | None
    phase: Tensor | None
    slopes: Tensor | None
    scale: float
    temperature_length: int
    query_positions: Tensor | None
    key_positions: Tensor | None
    key_mask: Tensor | None
    query_segments: Tensor | None
    key_segments: Tensor | None
    causal: bool
    window: int
    tf32: bool


class Problem:
    """Sizes, flags and small tensors that the kernels of a call share.

    Args:
        q: ``(B, H, T, D)``.
        k: ``(B, G, S, D)``, or pages of them for paged decoding.
        width: Channels of a value.
        total: ``S``.
        score: What is asked.
    """

    def __init__(self, q: Tensor, k: Tensor, width: int, total: int, score: Score) -> None:
        self.score = score
        self.device, self.dtype = q.device, q.dtype
        self.batch, self.heads, self.length, self.dim = q.shape
        self.groups = self.heads // k.shape[1]
        self.total, self.width = total, width
        self.kind = KINDS[score.feature]
        self.turning = 0 if score.inv_freq is None else score.inv_freq.shape[1]
        if self.turning == 0 and score.feature == "rotate":
            self.kind = KINDS["identity"]
        turned = self.turning * (2 if self.kind == KINDS["rotate"] else 1)
        self.rest = self.dim - turned
        self.in_order = score.query_positions is None
        self.ordered = score.causal or score.slopes is not None
        self.magnitude = MAGNITUDES[score.magnitude] if self.kind == KINDS["polar"] else 0

    @property
    def listed(self) -> bool:
        """Whether which blocks are seen hangs on tensors."""
        hidden = self.score.key_mask is not None or self.score.key_segments is not None
        return hidden or (not self.in_order and self.score.causal)

    @property
    def partly(self) -> bool:
        """Whether some channels are not magnitudes."""
        return self.score.magnitudes < self.dim

    @property
    def features(self) -> int:
        """Width of features as tiles hold them."""
        return 2 * padded(self.turning) + padded(self.rest)

    @cached_property
    def freq(self) -> Tensor | None:
        """Turns per position, ``(A, R)`` float64."""
        if self.score.inv_freq is None:
            return None
        return (self.score.inv_freq.to(self.device) / (2 * math.pi)).contiguous()

    @property
    def axes(self) -> int:
        """Position axes."""
        return 1 if self.score.inv_freq is None else self.score.inv_freq.shape[0]

    @cached_property
    def phase_tables(self) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin of the phase, ``(H, R)`` float32, whatever dtype the phase is kept in."""
        if self.score.phase is None or self.kind != KINDS["polar"]:
            return None, None
        phase = self.score.phase.detach().to(self.device).double()
        return phase.cos().float().contiguous(), phase.sin().float().contiguous()

    @cached_property
    def slopes(self) -> Tensor | None:
        """``(H,)`` float32."""
        slopes = self.score.slopes
        return None if slopes is None else slopes.detach().to(self.device).float().contiguous()

    @cached_property
    def gain(self) -> Tensor | None:
        """``(B or 1, T)`` float32: the length temperature of each query."""
        if not self.score.temperature_length:
            return None
        at = self.score.query_positions
        if at is None:
            at = torch.arange(self.total - self.length, self.total, device=self.device)[None, :]
        else:
            at = at[..., 0]
        return temperature(at, self.score.temperature_length).float().contiguous()

    def visibility(self) -> dict[str, Any]:
        """Arguments that say which key a query sees."""
        score = self.score
        at_q = at_k = None
        if not self.in_order and (self.ordered or self.axes > 1 or self.turning):
            at_q, at_k = score.query_positions, score.key_positions
        segments = (score.query_segments, score.key_segments)
        q_segment, k_segment = (None if x is None else x.long().contiguous() for x in segments)
        mask = None if score.key_mask is None else score.key_mask.to(torch.uint8).contiguous()
        return {
            "Q_AT": None if at_q is None else at_q.contiguous(),
            "q_at_b": 0 if at_q is None or at_q.shape[0] == 1 else at_q.shape[1],
            "K_AT": None if at_k is None else at_k.contiguous(),
            "k_at_b": 0 if at_k is None or at_k.shape[0] == 1 else at_k.shape[1],
            "Q_SEGMENT": q_segment,
            "K_SEGMENT": k_segment,
            "K_MASK": mask,
            "ahead": self.total - self.length,
            # No window is wider than all keys, and the greatest integer would overflow.
            "window": min(score.window, self.total) if self.in_order else score.window,
            "IN_ORDER": self.in_order or not self.ordered,
            "CAUSAL": score.causal,
            "WINDOWED": score.window > 0,
            "SEGMENTED": q_segment is not None,
            "KEYS_MASKED": mask is not None,
        }

    def shape(self) -> dict[str, Any]:
        """Arguments that say how large things are, and what is done with channels."""
        turning, rest = padded(self.turning), padded(self.rest)
        return {
            "H": self.heads,
            "T": self.length,
            "S": self.total,
            "R": self.turning,
            "P": self.rest,
            "W": self.width,
            "magnitudes": self.score.magnitudes,
            "scale": self.score.scale,
            "zero": 0,
            "GROUPS": self.groups,
            "KIND": self.kind,
            "R2": turning,
            "P2": rest,
            "V2": padded(self.width),
            "PHASED": self.phase_tables[0] is not None,
            "GAINED": self.gain is not None,
            "SLOPED": self.slopes is not None,
            "PRECISION": "tf32" if self.score.tf32 else "ieee",
        }

    def learned(self) -> dict[str, Any]:
        """Arguments that hold the phase, the temperature and the slopes."""
        cos, sin = self.phase_tables
        gain = self.gain
        return {
            "PHASE_COS": cos,
            "PHASE_SIN": sin,
            "GAIN": gain,
            "gain_b": 0 if gain is None or gain.shape[0] == 1 else self.length,
            "SLOPES": self.slopes,
        }


def strides(prefix: str, x: Tensor, names: str) -> dict[str, int]:
    """``{"q_b": ..., "q_h": ...}`` for the axes of a tensor."""
    return {f"{prefix}_{name}": x.stride(i) for i, name in enumerate(names)}
