"""Floating-point operations of matrix products, by formula.

A multiplication and an addition are two. Counted are the usual ``6 N`` a token for the ``N``
numbers of the linear layers (2 forward, 4 backward), the output matrix included, and attention:
``2 F`` for each score and ``2 V`` for each value that a query weighs, over the keys that it sees,
three times that with the backward pass. Elementwise work (norms, softmax, rotation) and what
kernels compute again are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from whatwhere.lab.plan.shape import Shape


@dataclass(frozen=True)
class Flops:
    """Of the forward pass of one sequence.

    Attributes:
        linear: Projections and MLPs of all layers.
        head: Logits.
        scores: Products of query and key features.
        values: Weighted sums of values.
        encoding: The part of ``scores`` that features wider than the head cost (PoPE: half).
    """

    linear: int
    head: int
    scores: int
    values: int
    encoding: int

    @property
    def layers(self) -> int:
        """All but the logits: what checkpointing computes again."""
        return self.linear + self.scores + self.values

    @property
    def forward(self) -> int:
        """All of it."""
        return self.layers + self.head

    @property
    def training(self) -> int:
        """With the backward pass: gradients for both factors of every product."""
        return 3 * self.forward


def seen_pairs(length: int, window: int | None = None, *, causal: bool = True) -> int:
    """Pairs of a query and a key that it sees: about half of ``T^2`` where order is causal.

    Args:
        length: ``T``.
        window: Positions that a query sees at most, its own included.
        causal: Whether keys after a query are hidden; else all ``T^2`` are seen.
    """
    if not causal:
        return length * length
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def forward_flops(shape: Shape, length: int, *, causal: bool = True) -> Flops:
    """Operations of the forward pass of one sequence.

    Args:
        shape: The model.
        length: ``T``.
        causal: Whether hidden keys cost nothing. Kernels skip them by blocks; dense products,
            and those papers that count them, do not.
    """
    head = shape.vocab_size * shape.hidden_size
    pairs = seen_pairs(length, shape.sliding_window if causal else None, causal=causal)
    rows = 2 * pairs * shape.num_attention_heads * shape.num_hidden_layers
    return Flops(
        linear=2 * length * (shape.linear - head),
        head=2 * length * head,
        scores=rows * shape.feature_dim,
        values=rows * shape.head_dim,
        encoding=rows * (shape.feature_dim - shape.head_dim),
    )
