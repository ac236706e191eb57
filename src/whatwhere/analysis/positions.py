"""What each layer of a model does with positions, read off its config alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from whatwhere.encodings import ALiBi, Encoding, Learned, NoPE, make
from whatwhere.encodings.base import check_whole
from whatwhere.encodings.frequencies import geometric
from whatwhere.models.configuration import WhatWhereConfig
from whatwhere.models.conversion.classes import ConvertedFields

Kind = Literal["rotate", "polar", "none", "alibi", "learned", "sinusoidal"]
Frequencies = tuple[float, ...]

# Types whose config has the length before their frequencies were changed under this name; the
# others leave max_position_embeddings at it.
_ORIGINAL = "original_max_position_embeddings"
_TABLES = ("gpt2", "gpt_bigcode", "gpt_neo", "opt")
_SLOPES = ("bloom", "mpt")
# Where some layers see a window, these rotate in those alone.
_ROTATE_IN_WINDOWS = ("cohere2", "exaone4")
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class LayerPositions:
    """What one layer does with positions.

    Attributes:
        layer: Its index.
        kind: ``"rotate"`` (pairs of channels), ``"polar"`` (single channels), ``"none"``,
            ``"alibi"``, or how positions come into the token embeddings.
        train_length: Tokens of a training sequence, ``L``; ``None`` if unknown.
        trained: Frequencies in training, radians per token; 0 for those that do not turn.
        frequencies: The same at a length ``n``, which some types make depend on it.
        window: Keys a query sees at most, itself included; ``None`` is all.
        still: Channels that no frequency is for, which pass through.
        uniform_delta: Whether polar phases were drawn at random.
        some_without: Whether some heads have no ALiBi slope.
        table: Positions that a learned table has.
    """

    layer: int
    kind: Kind
    train_length: int | None
    trained: Frequencies = ()
    frequencies: Callable[[int], Frequencies] = lambda n: ()
    window: int | None = None
    still: int = 0
    uniform_delta: bool = False
    some_without: bool = False
    table: int | None = None

    def reach(self, length: int) -> int:
        """Relative positions (0 included) that occur in a sequence of this length."""
        return length if self.window is None else min(length, self.window)

    @property
    def same_as(self) -> tuple[Any, ...]:
        """What layers have in common that meet the same angles."""
        return tuple(value for name, value in vars(self).items() if name != "layer")


def positions_of(subject: object, train_length: int | None = None) -> list[LayerPositions]:
    """What each layer of a model does with positions.

    ``L`` and the frequencies of training are the config's: for interpolated rotations (YaRN and
    transformers' ``linear``, ``dynamic``, ``yarn``, ``llama3``, ``longrope``) those before the
    interpolation, at ``original_max_position_embeddings``, or at ``max_position_embeddings``
    where the config has no such field. A config cannot tell whether a model was trained on after
    that; where it was, or the field is not the length of training, give ``train_length``.

    Args:
        subject: An `Encoding`, a config or a model: ours, converted, or of transformers.
        train_length: Length at which the model was trained with the frequencies that it has now,
            in place of what the config says.

    Raises:
        ValueError: If ``subject`` is none of these, says nothing of positions that is understood
            here, has several position axes, or a value is out of range.
    """
    if train_length is not None:
        train_length = check_whole("train_length", train_length)
    if isinstance(subject, Encoding):
        return [of_encoding(subject, 0, train_length)]
    config = subject if isinstance(subject, PreTrainedConfig) else getattr(subject, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"model is a {type(subject).__name__}: expected an encoding, or a config or a model "
            "of transformers"
        )
    config = config.get_text_config(decoder=True)
    if getattr(config, "is_heterogeneous", False):
        raise ValueError(
            f"model type {config.model_type!r} has layers of different shapes: expected heads of "
            "one size"
        )
    if isinstance(config, (WhatWhereConfig, ConvertedFields)):
        return _of_ours(cast(Any, config), train_length)
    return _of_theirs(copy.deepcopy(config), train_length)


def table_of(config: object) -> int | None:
    """Positions that the learned table of a model has; ``None`` if it has none."""
    if isinstance(config, WhatWhereConfig):
        entry = config.absolute_encoding
        if entry is None:
            return None
        with torch.device("meta"):
            made = config.make_encoding(*entry)
        return made.max_length if isinstance(made, Learned) else None
    if getattr(config, "model_type", None) in _TABLES:
        return int(cast(Any, config).max_position_embeddings)
    return None


def of_encoding(
    encoding: Encoding,
    layer: int,
    train_length: int | None,
    *,
    config_length: int | None = None,
    window: int | None = None,
) -> LayerPositions:
    """What a layer with this encoding does with positions.

    Args:
        encoding: The encoding.
        layer: Index of the layer.
        train_length: As for `positions_of`.
        config_length: The training length in the config.
        window: See `LayerPositions`.

    Raises:
        ValueError: If it has several position axes.
    """
    length = train_length or config_length or encoding.train_length
    if encoding.absolute:
        kind: Kind = "learned" if isinstance(encoding, Learned) else "sinusoidal"
        table = encoding.max_length if isinstance(encoding, Learned) else None
        return LayerPositions(layer, kind, length or table, window=window, table=table)
    if isinstance(encoding, ALiBi):
        some = 0.0 in encoding.slopes
        return LayerPositions(layer, "alibi", length, window=window, some_without=some)
    if isinstance(encoding, NoPE) or not encoding.frequencies:
        return LayerPositions(layer, "none", length, window=window)
    if len(encoding.frequencies) != 1:
        raise ValueError(
            f"encoding has {len(encoding.frequencies)} position axes: a length in tokens has one"
        )
    now = encoding.frequencies[0]
    before = encoding.original_frequencies
    polar = encoding("meta").feature == "polar"
    return LayerPositions(
        layer,
        "polar" if polar else "rotate",
        length,
        trained=now if before is None or train_length is not None else before[0],
        frequencies=_constant(now),
        window=window,
        still=encoding.head_dim - len(now) * (1 if polar else 2),
        uniform_delta=getattr(encoding, "delta_init", None) == "uniform",
    )


@cache
def _constant(frequencies: Frequencies) -> Callable[[int], Frequencies]:
    """One function for equal frequencies, so that layers can be told to be the same."""
    return lambda n: frequencies


def _of_ours(config: Any, train_length: int | None) -> list[LayerPositions]:
    found = []
    for layer, (name, given) in enumerate(config.layer_encodings):
        if isinstance(config, WhatWhereConfig):
            length, window = config.max_position_embeddings, config.sliding_window
        else:
            length, window = config.train_length, _window(config, layer)
        encoding = _without_weights(config, name, given, length)
        found.append(
            of_encoding(encoding, layer, train_length, config_length=length, window=window)
        )
    return found


def _without_weights(
    config: Any, name: str, given: dict[str, Any], length: int | None
) -> Encoding:
    """An encoding of a layer, on the meta device: no random number is drawn for it."""
    with torch.device("meta"):
        if isinstance(config, WhatWhereConfig):
            return config.make_encoding(name, given)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return make(name, head_dim=width, num_heads=heads, train_length=length, **given)


def _of_theirs(config: Any, train_length: int | None) -> list[LayerPositions]:
    """The layers of a model of transformers; what its attention does not see is left out."""
    layers, kinds = config.num_hidden_layers, getattr(config, "layer_types", None)
    plain = _without_rotation(config, train_length)
    made: dict[str | None, LayerPositions] = {}
    found = []
    for layer in range(layers):
        kind = kinds[layer] if kinds else None
        if kind is not None and kind not in _ATTENTION:
            continue
        window = _window(config, layer)
        if plain is not None:
            one = plain
        elif not _rotates(config, layer, kind):
            one = LayerPositions(layer, "none", _length(config, {}, train_length))
        else:
            if kind not in made:
                made[kind] = _rotation(config, kind, train_length)
            one = made[kind]
        found.append(LayerPositions(**{**vars(one), "layer": layer, "window": window}))
    return found


def _without_rotation(config: Any, train_length: int | None) -> LayerPositions | None:
    if config.model_type in _TABLES:
        table = config.max_position_embeddings
        return LayerPositions(0, "learned", train_length or table, table=table)
    if config.model_type in _SLOPES or getattr(config, "alibi", False):
        length = train_length or getattr(config, "max_seq_len", None)
        return LayerPositions(0, "alibi", length)
    return None


def _rotates(config: Any, layer: int, kind: str | None) -> bool:
    without = getattr(config, "no_rope_layers", None)
    if without:
        return bool(without[layer])
    if config.model_type in _ROTATE_IN_WINDOWS and config.sliding_window is not None:
        return kind == "sliding_attention"
    own = (getattr(config, "rope_parameters", None) or {}).get(kind, {})
    return own is not None


def _window(config: Any, layer: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] == "chunked_attention":
        return cast("int | None", config.attention_chunk_size)
    if kinds and kinds[layer] != "sliding_attention":
        return None
    if not kinds and not getattr(config, "use_sliding_window", True):
        return None
    return cast("int | None", getattr(config, "sliding_window", None))


def _rotation(config: Any, kind: str | None, train_length: int | None) -> LayerPositions:
    """Rotation of the layers of a kind, by transformers' own functions of the rope type."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = getattr(config, "rope_parameters", None)
    if not settings:
        turned = getattr(config, "rotary_dim", None)  # GPT-J and CodeGen
        if turned is None:
            raise ValueError(
                f"nothing is known of how model type {config.model_type!r} encodes positions: "
                "looked for rope_parameters in its config"
            )
        settings = {"rope_theta": 10000.0, "partial_rotary_factor": turned / width}
    nested = isinstance(settings.get(kind), dict)
    if not nested and any(isinstance(value, dict) for value in settings.values()):
        raise ValueError(
            f"rope_parameters of model type {config.model_type!r} has no entry for layers of type "
            f"{kind!r}"
        )
    own = settings[kind] if nested else settings
    rope_type = own.get("rope_type", "default")
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(
            f"rope_type={rope_type!r} of model type {config.model_type!r}: expected one of "
            f"default, {', '.join(ROPE_INIT_FUNCTIONS)}"
        )
    turned = int(width * (own.get("partial_rotary_factor") or 1.0))
    plain = geometric(turned // 2, float(own.get("rope_theta") or 10000.0))
    if rope_type == "proportional":  # spreads frequencies over the head, and turns the first
        still = (0.0,) * (width // 2 - turned // 2)
        plain = geometric(width // 2, float(own["rope_theta"]))[: turned // 2] + still
        turned = width
    length = _length(config, own, train_length)
    if rope_type == "default":
        now = _constant(plain)
    else:
        now = _scaled(config, rope_type, kind if nested else None, length)
    trained = plain if train_length is None else now(train_length)
    return LayerPositions(0, "rotate", length, trained, now, still=width - turned)


def _length(config: Any, own: dict[str, Any], train_length: int | None) -> int | None:
    """``L`` of a model of transformers."""
    if train_length is not None:
        return train_length
    return own.get(_ORIGINAL) or getattr(config, "max_position_embeddings", None)


def _scaled(
    config: Any, rope_type: str, kind: str | None, length: int | None
) -> Callable[[int], Frequencies]:
    """Frequencies at a length as transformers' rotary embedding would have them."""

    def at(n: int) -> Frequencies:
        more = {} if kind is None else {"layer_type": kind}
        found, _ = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=n, **more)
        return tuple(cast("list[float]", found.double().tolist()))

    if rope_type in ("dynamic", "longrope"):
        return at
    fixed = at(length or 1)
    return _constant(fixed)
