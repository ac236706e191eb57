"""Making the position encodings of a decoder's layers, and swapping them in a trained model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from whatwhere.encodings import Encoding, NoPE, options
from whatwhere.models.configuration import WhatWhereConfig

if TYPE_CHECKING:
    from whatwhere.models.modeling import WhatWhereModel


@contextmanager
def own_randomness(index: int) -> Iterator[None]:
    """Random numbers of their own for an encoding: outside, the generators stay as they were.

    Two models of one seed that differ in their encodings then start with the same other weights,
    however many numbers the encodings draw.

    Args:
        index: Tells apart encodings that are made at the same state of the generators.
    """
    cuda = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
        seed = int(torch.randint(2**62, (), device="cpu")) + index
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


def make_layer_encoding(config: WhatWhereConfig, layer: int) -> Encoding:
    """The encoding of one layer's scores.

    For an absolute one, which acts on token embeddings, that is the identity, with the same
    scale and length temperature.

    Raises:
        ValueError: As `WhatWhereConfig.make_encoding`.
    """
    name, given = config.layer_encodings[layer]
    with torch.device("meta"):
        absolute = config.make_encoding(name, given)
    if absolute.absolute:
        return NoPE(
            config.head_dim,
            config.num_attention_heads,
            temperature_length=absolute.temperature_length,
            scale=absolute.scale,
        )
    with own_randomness(layer):
        return config.make_encoding(name, given)


def make_absolute_encoding(config: WhatWhereConfig) -> Encoding | None:
    """The encoding added to token embeddings, or ``None``.

    Raises:
        ValueError: As `WhatWhereConfig.make_encoding`, or if there are several.
    """
    entry = config.absolute_encoding
    if entry is None:
        return None
    with own_randomness(config.num_hidden_layers):
        return config.make_encoding(*entry)


def swap_encodings(model: WhatWhereModel, name: str, given: dict[str, Any]) -> None:
    """Do what `WhatWhereModel.set_position_encoding` says."""
    config = copy.deepcopy(model.config)
    kept = [
        {key: value for key, value in before.items() if key in options(name)} | given
        for _, before in config.layer_encodings
    ]
    config.position_encoding = name
    config.position_encoding_options = kept[0] if all(k == kept[0] for k in kept) else kept
    absolute = make_absolute_encoding(config)
    made = [make_layer_encoding(config, layer) for layer in range(config.num_hidden_layers)]
    old = [model.absolute, *(block.self_attn.encoding for block in model.blocks)]
    for before, after in zip(old, [absolute, *made], strict=True):
        _check_parameters(before, after, name)
    for before, after in zip(old, [absolute, *made], strict=True):
        _take_over(before, after)
    model.absolute = absolute
    for block, encoding in zip(model.blocks, made, strict=True):
        block.self_attn.encoding = encoding
    model.config.position_encoding = config.position_encoding
    model.config.position_encoding_options = config.position_encoding_options


def _shapes(encoding: Encoding | None) -> dict[str, tuple[int, ...]]:
    if encoding is None:
        return {}
    return {name: tuple(p.shape) for name, p in encoding.named_parameters()}


def _check_parameters(before: Encoding | None, after: Encoding | None, name: str) -> None:
    has, needs = _shapes(before), _shapes(after)
    if has != needs:
        raise ValueError(
            f"position_encoding={name!r} has parameters {needs or 'none'}, but those of this "
            f"model's encoding are {has or 'none'}: they must be the same to be swapped in place"
        )


def _take_over(before: Encoding | None, after: Encoding | None) -> None:
    if before is None or after is None:
        return
    for path, parameter in before.named_parameters():
        owner, _, leaf = path.rpartition(".")
        target: nn.Module = after.get_submodule(owner)
        setattr(target, leaf, parameter)
    after.train(before.training)
