"""RoPE-ID: rotations that stay in distribution at any length."""

from __future__ import annotations

import torch

from whatwhere.encodings.base import Encoding, check_whole, rotated_units
from whatwhere.encodings.frequencies import in_distribution
from whatwhere.spec import ScoreSpec


class RoPEID(Encoding):
    """RoPE-ID ("Frayed RoPE and Long Inputs", arXiv 2603.18017).

    Half of each head's channels do not rotate; the other half rotates by high frequencies only,
    log-spaced from ``2 pi / 32`` to ``4 pi / train_length``. Queries beyond ``train_length`` are
    multiplied by ``(0.1 ln(n / train_length) + 1)^2`` with ``n = t + 1``. The rotated channels
    come first, in pairs ``(c, c + R)``: the paper's quarters 1 and 3, up to a permutation.

    Args:
        head_dim: ``D``, even.
        num_heads: ``H``.
        train_length: Length of training sequences in tokens, more than 64.
        fraction: Share of the channels that rotate; 1 with ``temperature=False`` is the paper's
            HighFreq, ``rope-high`` in `ENCODINGS`.
        temperature: Whether queries beyond ``train_length`` are sharpened.
        temperature_length: Sharpen beyond this length in place of ``train_length``.
        scale: See `Encoding`.

    Raises:
        ValueError: If ``train_length`` is 64 or less, ``head_dim`` is odd, or the fraction
            rotates no channel.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        train_length: int,
        fraction: float = 0.5,
        temperature: bool = True,
        temperature_length: int | None = None,
        scale: float | None = None,
    ) -> None:
        train_length = check_whole("train_length", train_length)
        if temperature and temperature_length is None:
            temperature_length = train_length
        super().__init__(head_dim, num_heads, temperature_length=temperature_length, scale=scale)
        self.train_length = train_length
        pairs = rotated_units(head_dim, fraction, 2, "for no rotation use NoPE")
        self.frequencies = (in_distribution(pairs, train_length),)

    def forward(self, device: torch.device | str | None = None) -> ScoreSpec:
        """A ``rotate`` spec."""
        return ScoreSpec(
            feature="rotate",
            scale=self.scale,
            inv_freq=self.inv_freq(device),
            temperature_length=self.temperature_length,
        )
