"""PoPE and PoPE-ID: magnitudes say what, phases say where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from whatwhere.encodings.base import (
    Encoding,
    check_base,
    check_whole,
    rotated_units,
    split_axes,
)
from whatwhere.encodings.frequencies import geometric, in_distribution
from whatwhere.spec import Magnitude, ScoreSpec

Delta = Literal["zero", "uniform"]
Rest = Literal["magnitude", "raw"]
DELTA_BOUND = 2 * math.pi


class Polar(Encoding):
    """What PoPE and PoPE-ID share: magnitudes, and the bounded phase ``delta``.

    ``delta`` is clamped to ``[-2 pi, 0]`` when used (PoPE, section 3). A plain clamp would give
    no gradient outside the bound, so that a step too far could never be taken back. Here the
    parameter itself is projected onto the bound each time the encoding is called (and by
    `project_`), and the gradient always passes.
    """

    delta: nn.Parameter | None

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        frequencies: tuple[tuple[float, ...], ...],
        *,
        rest: Rest,
        delta: Delta | None,
        magnitude: Magnitude,
        temperature_length: int | None,
        scale: float | None,
    ) -> None:
        super().__init__(head_dim, num_heads, temperature_length=temperature_length, scale=scale)
        if rest not in get_args(Rest):
            raise ValueError(f"rest={rest!r}: expected one of {get_args(Rest)}")
        if delta is not None and delta not in get_args(Delta):
            raise ValueError(f"delta={delta!r}: expected one of {get_args(Delta)} or None")
        if magnitude not in get_args(Magnitude):
            raise ValueError(f"magnitude={magnitude!r}: expected one of {get_args(Magnitude)}")
        self.turning = len(frequencies[0])
        still = head_dim - self.turning if rest == "magnitude" else 0
        self.frequencies = tuple(row + (0.0,) * still for row in frequencies)
        self.magnitude: Magnitude = magnitude
        self.delta_init = delta
        if delta is None:
            self.register_parameter("delta", None)
        else:
            self.delta = nn.Parameter(torch.empty(num_heads, self.turning))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set ``delta`` to 0, or uniformly in ``[-2 pi, 0]``, as ``delta=`` said."""
        if self.delta is not None and self.delta_init == "uniform":
            nn.init.uniform_(self.delta, -DELTA_BOUND, 0.0)
        elif self.delta is not None:
            nn.init.zeros_(self.delta)

    def project_(self) -> None:
        """Move ``delta`` back into ``[-2 pi, 0]``, in place."""
        if self.delta is not None:
            with torch.no_grad():
                self.delta.data.clamp_(-DELTA_BOUND, 0.0)

    def phase(self) -> Tensor | None:
        """``delta`` within its bounds, per turning channel: ``(H, turning)``, or ``None``."""
        if self.delta is None:
            return None
        if not torch.compiler.is_exporting():  # an exported graph must not change its weights
            self.project_()
        # Where the parameter is a copy (sharded training), the projection above is lost with it;
        # the value is bounded all the same, and the gradient passes.
        return self.delta + (self.delta.clamp(-DELTA_BOUND, 0.0) - self.delta).detach()

    def forward(self, device: torch.device | str | None = None) -> ScoreSpec:
        """A ``polar`` spec."""
        phase = self.phase()
        if phase is not None and device is not None:
            phase = phase.to(device)
        return ScoreSpec(
            feature="polar",
            scale=self.scale,
            inv_freq=self.inv_freq(device),
            magnitude=self.magnitude,
            phase=phase,
            temperature_length=self.temperature_length,
            turning=self.turning,
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = state_dict.get(prefix + "delta")
        if self.delta is not None and given is not None and given.shape != self.delta.shape:
            raise ValueError(
                f"{prefix}delta has shape {tuple(given.shape)} in the checkpoint: expected "
                f"{tuple(self.delta.shape)}, (num_heads, channels that turn)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class PoPE(Polar):
    """Polar coordinate position embedding (arXiv 2509.10534).

    ``score(t, s) = sum_c softplus(q_c) softplus(k_c) cos((s - t) theta_c + delta_c)`` with
    ``theta_c = base^(-c / D)``, ``c = 0..D-1``: one frequency per channel, and phases that depend
    on position alone, so that what a token is cannot shift where it matches best.

    Args:
        head_dim: ``D``.
        num_heads: ``H``.
        base: Base of the frequencies.
        fraction: Share of the channels that turn, the first ones; their frequencies spread over
            ``R = fraction * D`` (``theta_c = base^(-c / R)``).
        rest: The other channels: ``"magnitude"`` (they never turn: frequency 0) or ``"raw"``
            (signed, passed through).
        axes: Channels turned by each position axis (images, video), e.g. ``(32, 32)``. Not
            together with ``fraction``.
        delta: Start of the learned phase, one per head and channel: ``"zero"`` (needed for
            length extrapolation), ``"uniform"`` in ``[-2 pi, 0]`` (slightly better in
            distribution), or ``None`` for none (the paper's ablation).
        magnitude: ``"softplus"``, or the paper's ablations ``"relu"`` and ``"none"``.
        temperature_length: See `Encoding`.
        scale: See `Encoding`.

    Raises:
        ValueError: If an option is out of range, the fraction turns no channel, or axes do not
            fit.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        base: float = 10000.0,
        fraction: float = 1.0,
        rest: Rest = "magnitude",
        axes: Sequence[int] | None = None,
        delta: Delta | None = "zero",
        magnitude: Magnitude = "softplus",
        temperature_length: int | None = None,
        scale: float | None = None,
    ) -> None:
        base = check_base(base)
        turning = rotated_units(head_dim, fraction, 1, "for no rotation use NoPE")
        if axes is None:
            frequencies: tuple[tuple[float, ...], ...] = (geometric(turning, base),)
        else:
            if fraction != 1:
                raise ValueError(f"fraction={fraction} together with axes={axes!r}: give one")
            frequencies = split_axes(axes, head_dim, 1, base)
        super().__init__(
            head_dim,
            num_heads,
            frequencies,
            rest=rest,
            delta=delta,
            magnitude=magnitude,
            temperature_length=temperature_length,
            scale=scale,
        )


class PoPEID(Polar):
    """PoPE on half the channels with RoPE-ID's frequencies (ours; in no paper).

    The first ``fraction * D`` channels turn by frequencies log-spaced from ``2 pi / 32`` to
    ``4 pi / train_length`` (arXiv 2603.18017), the rest are magnitudes that never turn.

    Args:
        head_dim: ``D``.
        num_heads: ``H``.
        train_length: Length of training sequences in tokens, more than 64.
        fraction: Share of the channels that turn.
        rest: See `PoPE`.
        delta: See `PoPE`.
        magnitude: See `PoPE`.
        temperature: Whether queries beyond ``train_length`` are sharpened.
        temperature_length: Sharpen beyond this length in place of ``train_length``.
        scale: See `Encoding`.

    Raises:
        ValueError: If an option is out of range or ``train_length`` is 64 or less.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        train_length: int,
        fraction: float = 0.5,
        rest: Rest = "magnitude",
        delta: Delta | None = "zero",
        magnitude: Magnitude = "softplus",
        temperature: bool = False,
        temperature_length: int | None = None,
        scale: float | None = None,
    ) -> None:
        train_length = check_whole("train_length", train_length)
        if temperature and temperature_length is None:
            temperature_length = train_length
        turning = rotated_units(head_dim, fraction, 1, "for no rotation use NoPE")
        super().__init__(
            head_dim,
            num_heads,
            (in_distribution(turning, train_length),),
            rest=rest,
            delta=delta,
            magnitude=magnitude,
            temperature_length=temperature_length,
            scale=scale,
        )
        self.train_length = train_length
