"""YaRN: RoPE interpolated to a longer context."""

from __future__ import annotations

import math

import torch

from whatwhere.encodings import frequencies
from whatwhere.encodings.base import Encoding, check_base, check_number, check_whole, rotated_units
from whatwhere.spec import ScoreSpec


class YaRN(Encoding):
    """YaRN (arXiv 2309.00071): RoPE with slow frequencies interpolated by ``factor``.

    Both queries and keys are multiplied by ``0.1 ln(factor) + 1``, which is folded into the
    scale as its square. ``factor=1`` is RoPE.

    Args:
        head_dim: ``D``, even.
        num_heads: ``H``.
        train_length: Original length in tokens, ``L``.
        factor: ``s``, the new length over the original one, at least 1.
        base: Base of RoPE's frequencies.
        fraction: Share of the channels that rotate, as of `RoPE`.
        beta_fast: Turns within ``L`` above which a frequency is left alone.
        beta_slow: Turns within ``L`` below which it is interpolated wholly.
        temperature_length: See `Encoding`.
        scale: See `Encoding`; the attention factor multiplies it.

    Raises:
        ValueError: If ``head_dim`` is odd, the fraction rotates no channel, ``factor`` is below
            1, ``train_length`` below 1, or the betas are not positive and in order.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        train_length: int,
        factor: float,
        base: float = 10000.0,
        fraction: float = 1.0,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        temperature_length: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, temperature_length=temperature_length, scale=scale)
        base = check_base(base)
        factor = check_number("factor", factor)
        beta_fast = check_number("beta_fast", beta_fast)
        beta_slow = check_number("beta_slow", beta_slow)
        train_length = check_whole("train_length", train_length)
        if not 1 <= factor < float("inf"):
            raise ValueError(f"factor={factor}: expected at least 1, new length over original")
        if not 0 < beta_slow <= beta_fast < float("inf"):
            raise ValueError(
                f"beta_slow={beta_slow}, beta_fast={beta_fast}: expected 0 < slow <= fast"
            )
        pairs = rotated_units(head_dim, fraction, 2, "for no rotation use NoPE")
        self.factor = factor
        self.train_length = train_length
        self.original_frequencies = (frequencies.geometric(pairs, base),)
        self.scale *= (0.1 * math.log(factor) + 1) ** 2
        self.frequencies = (
            frequencies.yarn(pairs, base, train_length, factor, beta_fast, beta_slow),
        )

    def forward(self, device: torch.device | str | None = None) -> ScoreSpec:
        """A ``rotate`` spec."""
        return ScoreSpec(
            feature="rotate",
            scale=self.scale,
            inv_freq=self.inv_freq(device),
            temperature_length=self.temperature_length,
        )
