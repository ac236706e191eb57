"""`ScoreSpec`: which score a query at one position gives a key at another.

Shapes throughout the package use one legend:

- ``B`` batch, ``H`` query heads, ``G`` key/value heads (``H`` is a multiple of ``G``),
- ``T`` queries, ``S`` keys, ``D`` channels of a head, ``V`` channels of a value,
- ``A`` position axes (1 for text, 2 for images, 3 for video), ``R`` frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Feature = Literal["identity", "rotate", "polar"]
Magnitude = Literal["softplus", "relu", "none"]


class UnsupportedError(ValueError):
    """A backend was named explicitly and cannot compute the call; the message says why."""


@dataclass(frozen=True, eq=False)
class ScoreSpec:
    """The score that a query at position ``t`` gives a key at position ``s``.

    With ``angle_c(p) = sum_a p[a] * inv_freq[a, c]`` (radians), a query ``q`` and a key ``k``:

    - ``identity``: ``sum_c q_c k_c``;
    - ``rotate`` (RoPE): channels ``c`` and ``c + R`` form a pair that turns by ``angle_c``;
      ``sum_c |q_c| |k_c| cos(angle_c(s) - angle_c(t) + phi_k - phi_q)`` over the R pairs;
    - ``polar`` (PoPE, arXiv 2509.10534): ``sum_c m(q_c) m(k_c) cos(angle_c(s) - angle_c(t) +
      phase_c)`` over R channels, ``m`` being ``magnitude``;

    plus ``q_c k_c`` for the channels beyond those, which pass through; times ``scale``, times
    ``(0.1 ln(n / L) + 1)^2`` where ``n = t + 1`` exceeds ``L = temperature_length``; then, with a
    ``softcap``, ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118); minus
    ``slopes * (t - s)``.

    Attributes:
        feature: How channels become score features.
        scale: Factor of every score, usually ``head_dim ** -0.5``.
        inv_freq: ``(A, R)`` float64, radians per position; ``None`` for ``identity``. R is the
            number of pairs for ``rotate`` and of channels for ``polar``.
        magnitude: For ``polar``, the map from a channel to its magnitude.
        phase: ``(H, R)`` radians, one row per *query* head, or ``None``; with ``turning``, for
            the channels that turn alone. Taken from the query's angle, so that key features hold
            nothing learned.
        slopes: ``(H,)`` or ``None`` (ALiBi). 0 leaves a head without it. Positions have one axis.
        temperature_length: Length beyond which queries are sharpened, or ``None``.
        turning: How many of the R channels have a frequency other than 0, if those come first
            and the number is known; ``None`` says nothing. A promise of the encoding that lets
            backends skip the rotation of the rest: it changes the cost of a score, never its
            value.
        softcap: Bound that scores approach but never pass, 50 in Gemma 2, or ``None``. No
            encoding sets it: ``dataclasses.replace(spec, softcap=50.0)`` does. Slopes and masks
            come after it.

    Raises:
        ValueError: If the fields contradict one another.
    """

    feature: Feature
    scale: float
    inv_freq: Tensor | None = None
    magnitude: Magnitude = "softplus"
    phase: Tensor | None = None
    slopes: Tensor | None = None
    temperature_length: int | None = None
    turning: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.feature not in get_args(Feature):
            raise ValueError(f"feature={self.feature!r}: expected one of {get_args(Feature)}")
        if self.magnitude not in get_args(Magnitude):
            raise ValueError(
                f"magnitude={self.magnitude!r}: expected one of {get_args(Magnitude)}"
            )
        if not _positive(self.scale):
            raise ValueError(f"scale={self.scale!r}: expected a positive, finite number")
        if self.softcap is not None and not _positive(self.softcap):
            raise ValueError(
                f"softcap={self.softcap!r}: expected a positive, finite number or None"
            )
        self._check_frequencies()
        self._check_phase_and_slopes()
        if self.temperature_length is not None:
            if not isinstance(self.temperature_length, int) or self.temperature_length < 1:
                raise ValueError(
                    f"temperature_length={self.temperature_length!r}: expected an integer of at "
                    "least 1"
                )
            if self.num_axes != 1:
                raise ValueError(
                    "temperature_length needs positions of one axis, "
                    f"but inv_freq has {self.num_axes}"
                )

    def _check_frequencies(self) -> None:
        for name in ("inv_freq", "phase", "slopes"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(f"{name} is a {type(value).__name__}: expected a tensor or None")
        if self.feature == "identity":
            if self.inv_freq is not None:
                raise ValueError(
                    "inv_freq was given for feature='identity', which rotates nothing"
                )
            return
        if self.inv_freq is None:
            raise ValueError(f"feature={self.feature!r} needs inv_freq, an (A, R) float64 tensor")
        if self.inv_freq.ndim != 2 or self.inv_freq.dtype != torch.float64:
            raise ValueError(
                f"inv_freq has shape {tuple(self.inv_freq.shape)} and dtype "
                f"{self.inv_freq.dtype}: expected (A, R) and float64"
            )
        count = self.turning
        if count is not None and not (
            isinstance(count, int) and 0 <= count <= self.num_frequencies
        ):
            raise ValueError(
                f"turning={count!r}: expected 0 to {self.num_frequencies}, "
                "the number of frequencies"
            )

    def _check_phase_and_slopes(self) -> None:
        if self.phase is not None:
            if self.feature != "polar":
                raise ValueError(f"phase needs feature='polar', got {self.feature!r}")
            if self.phase.ndim != 2 or self.phase.shape[1] != self.num_turning:
                raise ValueError(
                    f"phase has shape {tuple(self.phase.shape)}: expected "
                    f"(H, {self.num_turning}), one column per frequency that turns"
                )
        if self.slopes is not None and self.slopes.ndim != 1:
            raise ValueError(f"slopes has shape {tuple(self.slopes.shape)}: expected (H,)")
        if self.slopes is not None and self.num_axes != 1:
            raise ValueError(
                f"slopes needs positions of one axis, but inv_freq has {self.num_axes}"
            )

    @property
    def num_axes(self) -> int:
        """``A``, the number of position axes (1 where nothing is rotated)."""
        return 1 if self.inv_freq is None else self.inv_freq.shape[0]

    @property
    def num_frequencies(self) -> int:
        """``R``, the number of pairs (``rotate``) or channels (``polar``) that have an angle."""
        return 0 if self.inv_freq is None else self.inv_freq.shape[1]

    @property
    def num_turning(self) -> int:
        """How many leading frequencies may differ from 0."""
        return self.num_frequencies if self.turning is None else self.turning

    def feature_dim(self, head_dim: int) -> int:
        """Width of the real vectors whose inner product is the score.

        ``polar`` needs two numbers (``m cos``, ``m sin``) for each channel that turns.
        """
        return head_dim + self.num_turning if self.feature == "polar" else head_dim

    def unturned(self) -> ScoreSpec:
        """The spec of queries and keys that have been through `whatwhere.unturned`."""
        return self if self.feature != "polar" else replace(self, magnitude="none")

    def encoded(self) -> ScoreSpec:
        """The spec of queries and keys that have been through `encode_queries`/`encode_keys`.

        What is left is an inner product, the scale, the softcap and the slopes.
        """
        return replace(
            self,
            feature="identity",
            inv_freq=None,
            magnitude="softplus",
            phase=None,
            temperature_length=None,
            turning=None,
        )


def _positive(x: object) -> bool:
    return isinstance(x, (int, float)) and 0 < x < float("inf")
