"""Where a model attends: its attention layers, whatever family it is of."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import nn
from transformers import PreTrainedConfig

from whatwhere.encodings import Encoding, Learned
from whatwhere.models.blocks import WhatWhereAttention
from whatwhere.models.conversion.forward import ENCODING

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What transformers' attention modules look their attention function up in."""


class NoAttentionError(ValueError):
    """A model without a layer that can be observed; the message says what was looked for."""


class NotFiniteError(ValueError):
    """A model computed NaN or infinity; the message names the first layer that did."""


@dataclass(eq=False)
class AttentionLayer:
    """One attention layer of a model.

    What the forward pass alone can tell is filled in by the first one that is observed.

    Attributes:
        index: Its place among the attention layers, from 0.
        module: The module.
        own: Whether it is of `WhatWhereForCausalLM`.
        heads: ``H``; 0 until observed, as the next two.
        key_heads: ``G``.
        head_dim: ``D``, before the encoding widens it.
        feature: How position enters the scores (see `whatwhere.ScoreSpec`); ``"unknown"`` for
            rotations that are not of the form that transformers' decoders share.
        frequencies: Radians per position of the rotary pairs or polar channels that turn, in the
            order of their channels.
        pairs: For ``rotate``, the two channels of each of them.
        window: Keys that a query sees at most, its own included, or ``None``.
    """

    index: int
    module: nn.Module = field(repr=False)
    own: bool
    heads: int = 0
    key_heads: int = 0
    head_dim: int = 0
    feature: Literal["identity", "rotate", "polar", "unknown"] = "identity"
    frequencies: tuple[float, ...] = field(default=(), repr=False)
    pairs: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    window: int | None = None

    @property
    def encoding(self) -> Encoding | None:
        """The encoding, where it is one of ours."""
        name = "encoding" if self.own else ENCODING
        found = getattr(self.module, name, None)
        return found if isinstance(found, Encoding) else None


def find_layers(model: nn.Module) -> list[AttentionLayer]:
    """The attention layers of a model, in order.

    They are those of `WhatWhereForCausalLM`, and modules of transformers that attend through its
    table of attention functions, converted or not. Of a model of several parts (images, sound)
    they are those of its text decoder.

    Raises:
        NoAttentionError: If there is none.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: expected a torch module")
    inside = decoder_of(model).modules()
    found = [m for m in inside if isinstance(m, WhatWhereAttention) or _attends(m)]
    if not found:
        raise NoAttentionError(
            f"model: no attention that can be observed in {type(model).__name__}; looked for "
            f"modules of whatwhere and for modules that attend through {INTERFACE} of transformers"
        )
    return [
        AttentionLayer(index, module, isinstance(module, WhatWhereAttention))
        for index, module in enumerate(found)
    ]


def text_config(model: nn.Module) -> Any:
    """The config of what reads a model's tokens; ``None`` if it has none of transformers."""
    config = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else config


def decoder_of(model: nn.Module) -> nn.Module:
    """What reads a model's tokens: the model, or its text decoder beside parts for images."""
    if text_config(model) is getattr(model, "config", None):
        return model
    return cast(nn.Module, cast(Any, model).get_decoder())


def code_of(module: nn.Module) -> Any:
    """The plain function that a module's forward is, without decorators."""
    return inspect.unwrap(type(module).forward)


def table_length(model: nn.Module) -> int | None:
    """The longest sequence that a model's tables of positions allow; ``None`` if any.

    Our learned encoding says so itself. Models of others with a table of position embeddings
    (GPT-2, OPT) are known by the name of that table.
    """
    tables: list[int] = [m.max_length for m in model.modules() if isinstance(m, Learned)]
    for name, module in decoder_of(model).named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            rows = module.num_embeddings
            tables.append(getattr(text_config(model), "max_position_embeddings", rows))
    return min(tables, default=None)


def first_broken(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer that holds NaN or infinity.

    Weights that are not loaded (offloaded ones of accelerate) are not looked at.
    """
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            looked_at = tensor.is_floating_point() and not tensor.is_meta
            if looked_at and not bool(tensor.isfinite().all()):
                return name
    return None


def train_length(model: nn.Module) -> int | None:
    """The length a model was trained at, as far as its config says."""
    config = text_config(model)
    scaled = getattr(config, "rope_parameters", None)
    given: Sequence[Any] = (
        getattr(config, "train_length", None),
        scaled.get("original_max_position_embeddings") if isinstance(scaled, dict) else None,
        getattr(config, "max_position_embeddings", None),
        getattr(config, "n_positions", None),
    )
    return next((int(n) for n in given if isinstance(n, int) and n > 0), None)


def _attends(module: nn.Module) -> bool:
    code = getattr(code_of(module), "__code__", None)
    return code is not None and INTERFACE in code.co_names
