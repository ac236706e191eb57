"""`WhatWhereConfig`: the shape of a decoder and its position encodings."""

from __future__ import annotations

from dataclasses import field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, get_args

import torch
from transformers import PreTrainedConfig

from whatwhere.attention import BACKENDS
from whatwhere.encodings import ENCODINGS, Encoding, make, options

# What `make` is given from the config's sizes.
_OF_THE_SHAPE = frozenset({"name", "head_dim", "num_heads", "train_length"})

MLP = Literal["gelu", "swiglu"]
CacheForm = Literal["auto", "encoded", "raw"]

# What transformers itself hands to every config besides the fields.
_INHERITED = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "torch_dtype",
        "use_cache",
    }
)


class WhatWhereConfig(PreTrainedConfig):
    """The shape of a `WhatWhereForCausalLM`, everything that its weights depend on.

    Attributes:
        vocab_size: Number of tokens.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Query heads of a block.
        num_key_value_heads: Key and value heads, a divisor of the query heads; ``None`` is as
            many as those.
        head_dim: Channels of a head; ``None`` is ``hidden_size / num_attention_heads``.
        intermediate_size: Width inside the MLP; ``None`` is ``4 hidden_size`` for GELU and
            ``8/3 hidden_size``, to the nearest multiple of 32, for SwiGLU.
        mlp: ``"gelu"`` (exact GELU) or ``"swiglu"``.
        max_position_embeddings: Length of training sequences in tokens. Encodings that need a
            training length take this; nothing stops the model at it but a learned table.
        position_encoding: A name in `whatwhere.ENCODINGS` for all layers, or a list with one
            name per layer.
        position_encoding_options: Options of the encoding, or a list with one dict per layer.
        tie_word_embeddings: Whether the output matrix is the token embedding.
        dropout: Probability of dropping an element of the embeddings and of what each attention
            and MLP adds to the residual stream. Attention weights get none: the fused kernels
            are given no dropout.
        qk_norm: Whether queries and keys are RMS-normalised per head, before the encoding.
        rms_norm_eps: Epsilon of every RMSNorm.
        initializer_range: Standard deviation of initial weights; projections into the residual
            stream start with this over ``sqrt(2 num_hidden_layers)``.
        attention_backend: A name in `whatwhere.BACKENDS`, or ``"auto"``.
        cache_form: Whether a cache keeps ``"encoded"`` keys or ``"raw"`` ones; ``"auto"`` takes
            the faster on the device (`whatwhere.cache_form`).
        sliding_window: Positions a query sees at most, its own included; ``None`` is all. A cache
            then keeps no more slots than that, and padding between tokens counts among them.
        pad_token_id: See transformers.
        bos_token_id: See transformers.
        eos_token_id: See transformers.

    Raises:
        ValueError: If a value is out of range, the values do not fit one another, or an argument
            is close to a field's name without being one.
    """

    model_type: ClassVar[str] = "whatwhere"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    # None when given, numbers once __post_init__ has filled them in.
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    intermediate_size: int = None  # type: ignore[assignment]
    mlp: str = "gelu"
    max_position_embeddings: int = 128
    position_encoding: str | list[str] = "rope"
    position_encoding_options: dict[str, Any] | list[dict[str, Any]] = field(default_factory=dict)
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    qk_norm: bool = False
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    attention_backend: str = "auto"
    cache_form: str = "auto"
    sliding_window: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields, and check the whole."""
        _refuse_misspelt(kwargs, self)
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            wide = 4 * self.hidden_size
            narrow = max(32, 32 * round(self.hidden_size * 8 / 3 / 32))
            self.intermediate_size = narrow if self.mlp == "swiglu" else wide
        self._check_encodings()
        super().__post_init__(**kwargs)

    @property
    def layer_encodings(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and options of each layer's position encoding.

        Raises:
            ValueError: If a list does not have one entry per layer.
        """
        layers = self.num_hidden_layers
        names, given = self.position_encoding, self.position_encoding_options
        for what, value in (("position_encoding", names), ("position_encoding_options", given)):
            if isinstance(value, (list, tuple)) and len(value) != layers:
                raise ValueError(
                    f"{what} lists {len(value)} entries: expected one for each of "
                    f"num_hidden_layers={layers}"
                )
        for option in given if isinstance(given, (list, tuple)) else [given]:
            if option is not None and not isinstance(option, dict):
                raise ValueError(
                    f"position_encoding_options={given!r}: expected a dict, or a list with one "
                    "for each layer"
                )
        by_layer = list(names) if isinstance(names, (list, tuple)) else [names] * layers
        chosen = list(given) if isinstance(given, (list, tuple)) else [given] * layers
        return [(name, dict(option or {})) for name, option in zip(by_layer, chosen, strict=True)]

    @property
    def absolute_encoding(self) -> tuple[str, dict[str, Any]] | None:
        """Name and options of the encoding added to token embeddings, ``None`` without one.

        Raises:
            ValueError: If layers name different ones: embeddings are one for all layers.
        """
        found: list[tuple[str, dict[str, Any]]] = []
        for entry in self.layer_encodings:
            if is_absolute(entry[0]) and entry not in found:
                found.append(entry)
        if len(found) > 1:
            raise ValueError(
                f"position_encoding has {len(found)} different absolute encodings "
                f"({', '.join(name for name, _ in found)}): expected at most one, since it is "
                "added to the token embeddings once"
            )
        return found[0] if found else None

    def make_encoding(self, name: str, given: dict[str, Any]) -> Encoding:
        """A position encoding for this shape.

        Args:
            name: A name in `whatwhere.ENCODINGS`.
            given: Its options. An absolute encoding is as wide as the model unless told
                otherwise.

        Raises:
            ValueError: As `whatwhere.make`, or if the encoding does not suit a causal decoder.
        """
        for key in given:
            if key in _OF_THE_SHAPE or not isinstance(key, str):
                raise ValueError(
                    f"position_encoding_options has {key!r}: expected options of encoding "
                    f"{name!r}; head_dim, num_heads and train_length follow from the config's "
                    "sizes"
                )
        if is_absolute(name):
            given = {"embedding_dim": self.hidden_size, **given}
            if given["embedding_dim"] != self.hidden_size:
                raise ValueError(
                    f"embedding_dim={given['embedding_dim']} for encoding {name!r}: it is added "
                    f"to token embeddings of hidden_size={self.hidden_size}"
                )
        encoding = make(
            name,
            head_dim=self.head_dim,
            num_heads=self.num_attention_heads,
            train_length=self.max_position_embeddings,
            **given,
        )
        if len(encoding.frequencies) > 1:
            raise ValueError(
                f"encoding {name!r} has {len(encoding.frequencies)} position axes: a causal "
                "decoder has one"
            )
        return encoding

    def _check_sizes(self) -> None:
        whole = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
        optional = {"num_key_value_heads", "head_dim", "intermediate_size", "sliding_window"}
        for name in sorted(whole | {"max_position_embeddings"} | optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a positive integer")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}: give head_dim, or change one"
            )
        groups = self.num_key_value_heads
        if groups is not None and self.num_attention_heads % groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={groups}"
            )
        choices = {"mlp": get_args(MLP), "cache_form": get_args(CacheForm)}
        choices["attention_backend"] = ("auto", *BACKENDS)
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {valid}")
        for name in ("dropout", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"{name}={value!r}: expected a number of at least 0")
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout}: expected at least 0 and below 1")
        for name in ("qk_norm", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected True or False")

    def _check_encodings(self) -> None:
        seen: list[tuple[str, dict[str, Any]]] = []
        for entry in self.layer_encodings:
            if entry not in seen:
                seen.append(entry)
                with torch.device("meta"):
                    self.make_encoding(*entry)
        _ = self.absolute_encoding


def is_absolute(name: str) -> bool:
    """Whether the encoding of this name is added to token embeddings.

    Raises:
        ValueError: If there is no encoding of this name.
    """
    options(name)
    made_by = ENCODINGS[name]
    return bool(getattr(getattr(made_by, "func", made_by), "absolute", False))


def _refuse_misspelt(given: dict[str, Any], config: WhatWhereConfig) -> None:
    """Extra keys are kept, as in transformers, unless they look like a field misspelt."""
    names = [f.name for f in fields(config)]
    for key in given:
        close = get_close_matches(key, names, n=1, cutoff=0.7)
        if close and key not in _INHERITED and not key.startswith("_"):
            raise ValueError(f"unknown setting {key!r}: did you mean {close[0]!r}?")
