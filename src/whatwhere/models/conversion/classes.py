"""The classes of converted models: those of transformers, with an encoding in their config.

There is one for each class that is converted, made when it is first needed. All of them have the
model type ``"whatwhere-converted"``, which no transformers without us knows, so that a checkpoint
opened there is an error and never a model that has lost its encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from whatwhere.encodings import Encoding, make
from whatwhere.models.cache import LayerCache, report_layer
from whatwhere.models.checkpoints import Checkpoints, Shim
from whatwhere.models.conversion.forward import (
    ENCODING,
    IMPLEMENTATION,
    STEPS,
    Rotations,
    Unused,
    before_attention,
)
from whatwhere.models.conversion.positions import choose_cache, lay_out_layers, refuse
from whatwhere.models.conversion.structure import (
    Parts,
    computes_on,
    family_of,
    find_parts,
    registered,
)
from whatwhere.models.layer_encodings import own_randomness
from whatwhere.models.modeling import check_tokens

MODEL_TYPE = "whatwhere-converted"
_PREFIX = "WhatWhere"


@dataclass(kw_only=True, repr=False)
class ConvertedFields:
    """What the config of a converted model has besides its own fields.

    Attributes:
        base_model_type: The model type that it was.
        base_model: Name of the model that it was, if that had one.
        position_encoding: A name in `whatwhere.ENCODINGS` for all layers, or one for each.
        position_encoding_options: Options of the encoding, all that the model itself decides
            (``base``, say) included; or a dict for each layer.
        train_length: Length in tokens at which the model was trained, for encodings that
            depend on one.
        attention_backend: A name in `whatwhere.BACKENDS`, or ``"auto"``.
        cache_form: Whether a cache keeps ``"encoded"`` or ``"raw"`` keys; ``"auto"`` takes what
            decodes faster on the device.
    """

    model_type: ClassVar[str] = MODEL_TYPE

    base_model_type: str = ""
    base_model: str | None = None
    position_encoding: str | list[str] = "rope"
    position_encoding_options: dict[str, Any] | list[dict[str, Any]] | None = None
    train_length: int | None = None
    attention_backend: str = "auto"
    cache_form: str = "auto"

    @property
    def layer_encodings(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and options of each layer's position encoding.

        Raises:
            ValueError: If a list does not have one entry per layer.
        """
        layers = cast(Any, self).num_hidden_layers
        names, given = self.position_encoding, self.position_encoding_options or {}
        by_layer = [names] * layers if isinstance(names, str) else list(names)
        chosen = [given] * layers if isinstance(given, dict) else list(given)
        if len(by_layer) != layers or len(chosen) != layers:
            raise ValueError(
                f"position_encoding lists {len(by_layer)} names and {len(chosen)} options: "
                f"expected one for each of num_hidden_layers={layers}"
            )
        return [(name, dict(some)) for name, some in zip(by_layer, chosen, strict=True)]

    def validate(self) -> None:
        """transformers' checks, but for that of a rotation that is no longer there."""
        for check in getattr(type(self), "__class_validators__", ()):
            if check.__name__ != "validate_rope":
                check(self)


class ConvertedConfig(PreTrainedConfig):
    """Stands for the config of every converted model with `AutoConfig`: makes the right one."""

    model_type: ClassVar[str] = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of the class for its ``base_model_type``.

        Raises:
            ValueError: If there is no such model type.
        """
        head, _ = classes_for(config_dict.get("base_model_type", ""))
        return cast(Any, head).config_class.from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: see `Checkpoints`."""


def _no_frequencies(config: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
    """What the rotary embedding that is replaced at once is made with."""
    return torch.ones(1), 1.0


# Without us this rope_type is unknown, and so a stock class refuses the checkpoint as well.
ROPE_TYPE = "whatwhere"
ROPE_INIT_FUNCTIONS[ROPE_TYPE] = _no_frequencies


class Converted(Checkpoints):
    """What decoders and models of both kinds share; comes before transformers' class."""

    config: Any

    def shim(self) -> Shim:
        """What opens a checkpoint of this model for programs that do not import us."""
        base = self.config.base_model_type
        head, decoder = (made.__name__ for made in classes_for(base))
        module = __name__
        return Shim(
            ConvertedConfig.__name__,
            decoder,
            head,
            f"from {module} import ConvertedConfig, classes_for\n\n"
            f'{head}, {decoder} = classes_for("{base}")\n',
        )

    def _init_weights(self, module: nn.Module) -> None:
        # transformers asks the nearest of its models, for each module it has no weights of.
        if isinstance(module, Encoding):
            encodings = [m for m in cast(nn.Module, self).modules() if isinstance(m, Encoding)]
            with own_randomness(encodings.index(module)), torch.no_grad():
                module.reset_parameters()
        elif not isinstance(module, Unused):
            cast(Any, super())._init_weights(module)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        if attn_implementation not in (None, IMPLEMENTATION):
            raise ValueError(
                f"attn_implementation={attn_implementation!r}: a converted model attends with "
                f"{IMPLEMENTATION!r} alone, any other would leave out its position encoding; "
                "config.attention_backend chooses how"
            )
        return IMPLEMENTATION

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any
    ) -> None:
        """Refuses all but ``"whatwhere"``, which is set already.

        Raises:
            ValueError: If it is another one, which would leave out the encoding (continuous
                batching asks for a paged one).
        """
        asked = attn_implementation
        named = asked.get("") if isinstance(asked, dict) else asked
        self._check_and_adjust_attn_implementation(named)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


class ConvertedDecoder(Converted):
    """A decoder that works out positions and masks for `whatwhere.attention`."""

    rotations: Rotations

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        parts = find_parts(cast(Any, self))
        attach(parts, make_encodings(parts, config.layer_encodings, config.train_length))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' decoder.

        Args:
            input_ids: ``(B, T)`` token ids.
            attention_mask: ``(B, S)``, 1 for tokens and 0 for padding, left or right; S counts
                cached tokens.
            position_ids: ``(B, T)``; by default tokens are counted without padding. Without a
                cache they may be any increasing ones, and where they fall back a new document
                starts, that does not see the one before.
            past_key_values: Cache of transformers.
            inputs_embeds: ``(B, T, hidden_size)`` in place of ``input_ids``.
            use_cache: Whether to fill a cache; by default what the config says, except for
                packed documents, for which no cache can be made.
            **kwargs: As transformers' decoder, except ``output_attentions``, which is refused.

        Raises:
            ValueError: If arguments do not fit one another, or positions do not fit the cache.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        check_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        refuse(kwargs, self.config)
        past_key_values = choose_cache(
            self, past_key_values, use_cache, position_ids, attention_mask
        )
        # Of an offloaded model the embeddings lie nowhere until they are called.
        weight = cast(Any, self).get_input_embeddings().weight
        like = given.new_empty(0, dtype=weight.dtype) if inputs_embeds is None else inputs_embeds
        steps, positions = lay_out_layers(
            self.rotations,
            given.shape[0],
            given.shape[1],
            like,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )
        return cast(Any, super()).forward(
            input_ids=input_ids,
            # What transformers makes of a mask is for its own attention functions.
            attention_mask=None,
            position_ids=positions,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=past_key_values is not None,
            **{STEPS: steps},
            **kwargs,
        )


class ConvertedForCausalLM(Converted):
    """A causal language model of transformers with a position encoding of ours."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        parts = find_parts(cast(Any, self).base_model)
        attach(parts, make_encodings(parts, config.layer_encodings, config.train_length))

    def cache_report(self, device: torch.device | str | None = None) -> list[LayerCache]:
        """What each layer keeps in a cache: form of its keys, numbers per token, and why.

        Args:
            device: Where decoding takes place; by default where the model lies.
        """
        model = cast(Any, self)
        target = model.device if device is None else torch.device(device)
        parts = find_parts(model.base_model)
        reports = []
        for layer, module in enumerate(parts.attentions):
            spec = getattr(module, ENCODING)(model.device)
            name = self.config.layer_encodings[layer][0]
            sizes = (parts.key_heads, parts.head_dim)
            reports.append(report_layer(self.config.cache_form, layer, name, spec, target, *sizes))
        return reports

    @staticmethod
    def create_masks_for_generate(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any,
        **kwargs: Any,
    ) -> Tensor | None:
        """The 2-D mask for a static cache, as long as the cache: `generate` calls this."""
        if attention_mask is None:
            return None
        full = past_key_values.get_max_length() if past_key_values is not None else 0
        missing = max(0, (full or 0) - attention_mask.shape[1])
        return torch.nn.functional.pad(attention_mask, (0, missing))

    def _get_static_cache_init_shape(self) -> Any:
        # Allocating in advance assumes keys as wide as values, which polar features are not.
        parts = find_parts(cast(Any, self).base_model)
        usual = 2 * parts.key_heads * parts.head_dim
        wide = any(entry.numbers_per_token != usual for entry in self.cache_report())
        return None if wide else cast(Any, super())._get_static_cache_init_shape()


def make_encodings(
    parts: Parts, entries: list[tuple[str, dict[str, Any]]], train_length: int | None
) -> list[Encoding]:
    """The encodings of a converted decoder, one for each layer.

    Args:
        parts: Of the decoder.
        entries: Name and options of each layer's.
        train_length: For encodings that depend on one.

    Raises:
        ValueError: As `whatwhere.make`.
    """
    made = []
    for layer, (name, given) in enumerate(entries):
        with own_randomness(layer):
            made.append(
                make(
                    name,
                    head_dim=parts.head_dim,
                    num_heads=parts.heads,
                    train_length=train_length,
                    **{"scale": float(cast(Any, parts.attentions[layer]).scaling)} | given,
                )
            )
    return made


def attach(parts: Parts, encodings: list[Encoding]) -> None:
    """Give a decoder's attention modules their encodings, in place."""
    decoder = cast(Any, parts.decoder)
    if not isinstance(decoder, ConvertedDecoder):
        decoder.__class__ = registered(type(decoder.config), MODEL_MAPPING)
        # transformers notes what a class can return when a model is made, which this one was not;
        # by update(), since assigning takes a model in some versions and a name in others.
        _CAN_RECORD_REGISTRY.update({str(type(decoder)): decoder._can_record_outputs})
    decoder.rotary_emb = Unused()
    decoder.rotations = Rotations.of(parts, encodings)
    for module, encoding in zip(parts.attentions, encodings, strict=True):
        weight = next(module.parameters())
        dtype = weight.dtype if weight.is_floating_point() else None
        setattr(module, ENCODING, encoding.to(device=computes_on(module), dtype=dtype))
        module.register_forward_pre_hook(before_attention, with_kwargs=True)


@cache
def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config of converted models of a kind; registers the models with the Auto classes."""
    made = cast(type[PreTrainedConfig], _derive((ConvertedFields, base)))
    for auto, mixin, mapping in (
        (AutoModelForCausalLM, ConvertedForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModel, ConvertedDecoder, MODEL_MAPPING),
    ):
        derived = _derive((mixin, registered(base, mapping)), config_class=made)
        auto.register(made, derived, exist_ok=True)
    return made


def classes_for(base_model_type: str) -> tuple[type, type]:
    """The causal language model and the decoder of converted models of a kind.

    Raises:
        ValueError: If this transformers has no such model type.
    """
    if base_model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"base_model_type={base_model_type!r} of a converted model: this transformers has no "
            "such model type"
        )
    made = config_class(CONFIG_MAPPING[base_model_type])
    return registered(made, MODEL_FOR_CAUSAL_LM_MAPPING), registered(made, MODEL_MAPPING)


def _derive(bases: tuple[type, ...], **attributes: Any) -> type:
    name = _PREFIX + bases[-1].__name__
    about = f"{bases[-1].__name__} of transformers with a position encoding of whatwhere."
    made = type(name, bases, {"__module__": __name__, "__doc__": about, **attributes})
    globals()[name] = made  # where pickle looks for it
    return made


def __getattr__(name: str) -> Any:
    """A class that a pickle names before any model of its kind was made here."""
    kind = family_of(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
    if kind is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    classes_for(kind)
    return globals()[name]


AutoConfig.register(MODEL_TYPE, ConvertedConfig, exist_ok=True)
