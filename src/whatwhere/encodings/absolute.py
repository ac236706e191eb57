"""Absolute encodings: vectors added to token embeddings, the score left as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whatwhere.encodings.base import Encoding, check_base, check_whole
from whatwhere.encodings.frequencies import geometric
from whatwhere.spec import ScoreSpec


class Absolute(Encoding):
    """Base of the encodings that add a vector to token embeddings.

    Args:
        head_dim: ``D``.
        num_heads: ``H``.
        embedding_dim: Width of token embeddings; ``None`` is ``head_dim * num_heads``.
        temperature_length: See `Encoding`.
        scale: See `Encoding`.
    """

    absolute = True

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        embedding_dim: int | None = None,
        temperature_length: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, temperature_length=temperature_length, scale=scale)
        width = self.head_dim * self.num_heads if embedding_dim is None else embedding_dim
        self.embedding_dim = check_whole("embedding_dim", width)

    def forward(self, device: torch.device | str | None = None) -> ScoreSpec:
        """An ``identity`` spec: positions are in the embeddings already."""
        return ScoreSpec(
            feature="identity", scale=self.scale, temperature_length=self.temperature_length
        )


class Sinusoidal(Absolute):
    """Sinusoidal positions ("Attention Is All You Need", arXiv 1706.03762, section 3.5).

    Channel ``2i`` is ``sin(p theta_i)``, channel ``2i + 1`` is ``cos(p theta_i)``, with
    ``theta_i = base^(-2i / embedding_dim)``. Angles are computed in float64, the vector is
    float32.

    Raises:
        ValueError: If ``embedding_dim`` is odd.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        embedding_dim: int | None = None,
        base: float = 10000.0,
        temperature_length: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(
            head_dim,
            num_heads,
            embedding_dim=embedding_dim,
            temperature_length=temperature_length,
            scale=scale,
        )
        if self.embedding_dim % 2:
            raise ValueError(f"embedding_dim={self.embedding_dim}: sinusoidal needs an even width")
        self.frequencies = (geometric(self.embedding_dim // 2, check_base(base)),)

    def embed(self, positions: Tensor) -> Tensor:
        """``(..., T)`` integer positions to ``(..., T, embedding_dim)`` float32."""
        _check_positions(positions)
        angles = positions.unsqueeze(-1).double() * self.inv_freq(positions.device)[0]
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).float()


class Learned(Absolute):
    """One learned vector for each position, from a normal distribution of deviation 0.02.

    Args:
        head_dim: ``D``.
        num_heads: ``H``.
        train_length: Positions the table has, unless ``max_length`` says otherwise.
        max_length: Positions the table has.
        embedding_dim: Width of token embeddings; ``None`` is ``head_dim * num_heads``.
        temperature_length: See `Encoding`.
        scale: See `Encoding`.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        train_length: int | None = None,
        max_length: int | None = None,
        embedding_dim: int | None = None,
        temperature_length: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(
            head_dim,
            num_heads,
            embedding_dim=embedding_dim,
            temperature_length=temperature_length,
            scale=scale,
        )
        length = train_length if max_length is None else max_length
        if length is None:
            raise ValueError("learned positions need max_length or train_length: both are None")
        name = "train_length" if max_length is None else "max_length"
        self.max_length = check_whole(name, length)
        self.train_length = train_length
        self.weight = nn.Parameter(torch.empty(self.max_length, self.embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table again."""
        nn.init.normal_(self.weight, std=0.02)

    def embed(self, positions: Tensor) -> Tensor:
        """``(..., T)`` integer positions to ``(..., T, embedding_dim)``, dtype of the table.

        Raises:
            ValueError: If a position lies outside the table (not checked while compiling).
        """
        _check_positions(positions)
        positions = positions.long()  # the lookup takes no narrower integers
        if not torch.compiler.is_compiling() and positions.numel() and not positions.is_meta:
            low, high = (int(p) for p in torch.aminmax(positions))
            if low < 0 or high >= self.max_length:
                raise ValueError(
                    f"positions reach from {low} to {high}, but the learned table holds "
                    f"0 to {self.max_length - 1}: an absolute learned encoding cannot go further"
                )
        return nn.functional.embedding(positions, self.weight)


def _check_positions(positions: Tensor) -> None:
    if not isinstance(positions, Tensor):
        raise ValueError(f"positions is a {type(positions).__name__}: expected an integer tensor")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"positions has dtype {positions.dtype}: expected integers")
