"""RoPE, partial RoPE and NoPE."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from whatwhere.encodings.base import Encoding, check_base, rotated_units, split_axes
from whatwhere.encodings.frequencies import geometric
from whatwhere.spec import ScoreSpec


class RoPE(Encoding):
    """Rotary position embedding (arXiv 2104.09864), on all channels or some.

    ``score(t, s) = sum_c |q_c| |k_c| cos((s - t) theta_c + phi_k - phi_q)`` over pairs
    ``(c, c + R)``, with ``theta_c = base^(-c / R)``. ``fraction`` rotates the first
    ``fraction * D`` channels and passes the rest through (partial RoPE, arXiv 2603.11611: the
    frequencies spread over the rotated part); 0.5 is HalfRoPE.

    Args:
        head_dim: ``D``, even.
        num_heads: ``H``.
        base: Base of the frequencies.
        fraction: Share of the channels that rotate, rounded to whole pairs.
        axes: Channels rotated by each position axis (images, video), e.g. ``(32, 32)``; the
            rest, if any, passes through. Not together with ``fraction``.
        temperature_length: See `Encoding`.
        scale: See `Encoding`.

    Raises:
        ValueError: If ``head_dim`` is odd, the fraction rotates no channel, or axes do not fit.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        base: float = 10000.0,
        fraction: float = 1.0,
        axes: Sequence[int] | None = None,
        temperature_length: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, temperature_length=temperature_length, scale=scale)
        base = check_base(base)
        pairs = rotated_units(head_dim, fraction, 2, "for no rotation use NoPE")
        if axes is None:
            self.frequencies = (geometric(pairs, base),)
        else:
            if fraction != 1:
                raise ValueError(f"fraction={fraction} together with axes={axes!r}: give one")
            self.frequencies = split_axes(axes, head_dim, 2, base)

    def forward(self, device: torch.device | str | None = None) -> ScoreSpec:
        """A ``rotate`` spec."""
        return ScoreSpec(
            feature="rotate",
            scale=self.scale,
            inv_freq=self.inv_freq(device),
            temperature_length=self.temperature_length,
        )


class NoPE(Encoding):
    """No position encoding: ``score(t, s) = q . k`` (order comes from the causal mask alone)."""

    def forward(self, device: torch.device | str | None = None) -> ScoreSpec:
        """An ``identity`` spec."""
        return ScoreSpec(
            feature="identity", scale=self.scale, temperature_length=self.temperature_length
        )
