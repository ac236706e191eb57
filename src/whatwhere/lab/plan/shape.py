"""`Shape`: of a recipe's model, what memory and operations follow from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

import whatwhere as ww
from whatwhere.lab.data import Task
from whatwhere.lab.recipes.schema import EncodingChoice, ModelSettings
from whatwhere.lab.train import build_model
from whatwhere.spec import ScoreSpec


@dataclass(frozen=True)
class Sizes:
    """Of a task, all that a model's shape follows from."""

    vocab_size: int
    length: int


@dataclass(frozen=True)
class Shape:
    """A decoder with its position encoding; names of sizes are those of `WhatWhereConfig`.

    Attributes:
        spec: The score of every layer, on the CPU.
        learned_positions: Whether a learned vector is added to token embeddings.
        packed: Whether several documents share a sequence.
        parameters: Numbers that are trained, those of the encoding included.
        encoding_parameters: Those of the encoding (delta, a learned table).
        tensors: Tensors that hold them.
        linear: Numbers in the matrices of linear layers, the output matrix included (twice
            itself if it is the embedding, which autocast casts).
        block: Numbers of one layer.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    gated: bool
    dropout: float
    qk_norm: bool
    sliding_window: int | None
    attention_backend: str
    spec: ScoreSpec
    learned_positions: bool
    packed: bool
    parameters: int
    encoding_parameters: int
    tensors: int
    linear: int
    block: int

    @property
    def feature_dim(self) -> int:
        """``F``, width of the vectors whose inner product is the score."""
        return self.spec.feature_dim(self.head_dim)

    def table_bytes(self, length: int) -> int:
        """Bytes of one pair of cos and sin tables, as `whatwhere.table_bytes`."""
        return ww.table_bytes(self.spec, length)


def shape_of(
    model: ModelSettings, choice: EncodingChoice, sizes: Sizes, *, packed: bool = False
) -> Shape:
    """Make the model on PyTorch's ``meta`` device, which allocates nothing, and measure it.

    Args:
        model: The recipe's model.
        choice: One of its encodings.
        sizes: Vocabulary and length.
        packed: See `Shape`.

    Raises:
        ValueError: If shape and encoding are impossible.
    """
    from whatwhere.models.layer_encodings import make_layer_encoding

    if choice.qk_norm is not None:
        model = model.model_copy(update={"qk_norm": choice.qk_norm})
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made = build_model(model, cast(Task, sizes), choice, seed=0)
    config = made.config
    encodings = [m for m in made.modules() if isinstance(m, ww.Encoding)]
    linears = [m for m in made.modules() if isinstance(m, torch.nn.Linear)]
    parameters = list(made.parameters())
    return Shape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        gated=config.mlp == "swiglu",
        dropout=config.dropout,
        qk_norm=config.qk_norm,
        sliding_window=config.sliding_window,
        attention_backend=config.attention_backend,
        spec=make_layer_encoding(config, 0)("cpu"),
        learned_positions=made.model.absolute is not None
        and any(True for _ in made.model.absolute.parameters()),
        packed=packed,
        parameters=sum(p.numel() for p in parameters),
        encoding_parameters=sum(p.numel() for e in encodings for p in e.parameters()),
        tensors=len(parameters),
        linear=sum(m.weight.numel() for m in linears),
        block=sum(p.numel() for p in made.model.layers[0].parameters()),
    )
