"""ALiBi: scores that fall with distance."""

from __future__ import annotations

import math

import torch

from whatwhere.encodings.base import Encoding, check_number
from whatwhere.spec import ScoreSpec


def alibi_slopes(count: int) -> tuple[float, ...]:
    """Slopes of ``count`` heads: ``2^(-8 i / count)``, ``i = 1..count`` (arXiv 2108.12409).

    That is for powers of two; other counts take the slopes of the next lower power, then every
    other slope of the next higher one, as the paper's code does.
    """
    power = 2 ** math.floor(math.log2(count))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)]
    return tuple(slopes[:count])


class ALiBi(Encoding):
    """ALiBi (arXiv 2108.12409): ``score(t, s) = q . k - slope_h (t - s)``, nothing learned.

    Args:
        head_dim: ``D``.
        num_heads: ``H``.
        fraction: Share of the heads, the first ones, that get a slope; the others have none.
        temperature_length: See `Encoding`; slopes are not affected by it.
        scale: See `Encoding`; slopes are not affected by it.

    Raises:
        ValueError: If ``fraction`` is out of (0, 1] or gives no head a slope.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        fraction: float = 1.0,
        temperature_length: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, temperature_length=temperature_length, scale=scale)
        fraction = check_number("fraction", fraction)
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction}: expected more than 0 and at most 1")
        count = round(fraction * num_heads)
        if count == 0:
            raise ValueError(
                f"fraction={fraction} of num_heads={num_heads} gives no head a slope; "
                "for no encoding use NoPE"
            )
        self.slopes = alibi_slopes(count) + (0.0,) * (num_heads - count)

    def forward(self, device: torch.device | str | None = None) -> ScoreSpec:
        """An ``identity`` spec with slopes (float64)."""
        return ScoreSpec(
            feature="identity",
            scale=self.scale,
            slopes=torch.tensor(self.slopes, dtype=torch.float64, device=self._device(device)),
            temperature_length=self.temperature_length,
        )
