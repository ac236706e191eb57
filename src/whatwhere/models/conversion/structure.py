"""What of a transformers model a conversion needs, looked for by what it does, not by its name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

FAMILIES = (
    *("arcee", "exaone4", "gemma", "gemma2", "gemma3_text", "gpt_neox", "granite", "llama"),
    *("ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi3", "qwen2"),
    *("qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"),
)
"""Model types that tests convert. What else looks the same may hide a difference in its layers."""

# Masks that whatwhere.attention computes, by transformers' names of layer types.
_LAYER_TYPES = ("full_attention", "sliding_attention")

# Where transformers' attention modules put new keys and values.
CACHE_NAMES = ("past_key_values", "layer_past")


class NotConvertibleError(ValueError):
    """A model that cannot be converted; the message says what was looked for and not found."""


@dataclass(frozen=True)
class Convertibility:
    """Whether a model can be converted; true in a condition if so.

    Attributes:
        possible: Whether it can.
        reason: What was found, or what was looked for and not found.
    """

    possible: bool
    reason: str

    def __bool__(self) -> bool:
        return self.possible

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Parts:
    """Where the parts of a causal language model are.

    Attributes:
        decoder: The model without its head, which makes ``position_embeddings`` for all layers.
        attentions: The attention module of each layer, in order.
        heads: ``H``.
        key_heads: ``G``.
        head_dim: ``D``.
        partial: Whether the model's rotation turns as many channels as its table is wide and
            passes the rest; if not, its table is ``D`` wide.
    """

    decoder: PreTrainedModel
    attentions: list[nn.Module]
    heads: int
    key_heads: int
    head_dim: int
    partial: bool

    def rotates(self, layer: int) -> bool:
        """Whether a layer turns its queries and keys (some layers of SmolLM3 do not)."""
        return bool(getattr(self.attentions[layer], "use_rope", True))

    def layer_type(self, layer: int) -> str:
        """transformers' name for what a layer sees."""
        types = getattr(self.decoder.config, "layer_types", None)
        return types[layer] if types else "full_attention"

    def rope_parameters(self, layer: int) -> dict[str, Any]:
        """The model's own settings of a layer's rotation."""
        given = getattr(self.decoder.config, "rope_parameters", None) or {}
        kind = self.layer_type(layer)
        return dict(given[kind] if isinstance(given.get(kind), dict) else given)


def find_parts(decoder: Any) -> Parts:
    """Find the parts of a decoder.

    Raises:
        NotConvertibleError: If one is missing, or the decoder computes something that
            `whatwhere.attention` does not.
    """
    name, config = type(decoder).__name__, decoder.config
    if not isinstance(getattr(decoder, "rotary_emb", None), nn.Module):
        raise NotConvertibleError(
            f"{name} has no rotary embedding to replace: looked for a module rotary_emb in it"
        )
    attentions = [module for module in decoder.modules() if _attends(module)]
    layers = config.num_hidden_layers
    if len(attentions) != layers:
        raise NotConvertibleError(
            f"{name} has {len(attentions)} attention modules in {layers} layers: looked for one "
            "in each that rotates queries and keys with apply_rotary_pos_emb and calls "
            "ALL_ATTENTION_FUNCTIONS of transformers"
        )
    for index, module in enumerate(attentions):
        _check_attention(module, index, name)
    _check_config(config, name)
    partial = _probe_rotation(attentions[0], name)
    kind = getattr(config, "base_model_type", config.model_type)
    if kind not in FAMILIES:
        raise NotConvertibleError(
            f"{name} has all that was looked for, but conversion was never tested on model type "
            f"{kind!r}: expected one of {', '.join(FAMILIES)}"
        )
    heads = config.num_attention_heads
    return Parts(
        decoder=decoder,
        attentions=attentions,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=_head_dim(attentions[0], config),
        partial=partial,
    )


def check_kind(model: Any) -> None:
    """Check that a model is a causal language model as transformers itself would make it.

    Raises:
        NotConvertibleError: If it is not.
    """
    if not isinstance(model, PreTrainedModel):
        raise NotConvertibleError(
            f"model is a {type(model).__name__}: expected a causal language model of transformers"
        )
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise NotConvertibleError(f"{name} is an encoder-decoder: expected a decoder alone")
    if getattr(config, "text_config", None) is not None:
        raise NotConvertibleError(
            f"{name} has more than text in it: expected a language model alone"
        )
    if not isinstance(model, GenerationMixin) or model.get_output_embeddings() is None:
        raise NotConvertibleError(f"{name} is no causal language model: expected a ...ForCausalLM")
    known = registered(type(config), MODEL_FOR_CAUSAL_LM_MAPPING)
    if type(model) is not known:
        raise NotConvertibleError(
            f"{name} is not what transformers makes of its config, {known.__name__}: its "
            "checkpoints would come back as that"
        )


def registered(config: type[PreTrainedConfig], mapping: Any) -> type[PreTrainedModel]:
    """The class that one of transformers' Auto mappings has for a config.

    Raises:
        NotConvertibleError: If there is none.
    """
    if config not in mapping:
        raise NotConvertibleError(
            f"{config.__name__} (model type {config.model_type!r}) has no causal language model "
            "in transformers"
        )
    found = mapping[config]
    return cast(type[PreTrainedModel], found[0] if isinstance(found, tuple) else found)


def family_of(name: str) -> str | None:
    """The model type in `FAMILIES` that has a config or a model of this name, if any has."""
    tables = (CONFIG_MAPPING_NAMES, MODEL_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return next((kind for kind in FAMILIES if name in [table[kind] for table in tables]), None)


def computes_on(module: nn.Module) -> torch.device:
    """Where a module's weights lie; if accelerate has offloaded them, where they are used."""
    weight = next(module.parameters())
    hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
    used = [getattr(hook, "execution_device", None) for hook in hooks]
    known = [device for device in used if device is not None]
    return torch.device(known[0]) if weight.is_meta and known else weight.device


def _attends(module: nn.Module) -> bool:
    """Whether a module rotates and attends the way all of transformers' recent decoders do."""
    if not hasattr(module, "layer_idx") or not hasattr(module, "is_causal"):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    used = set(code.co_names) if code else set()
    return {"ALL_ATTENTION_FUNCTIONS", "apply_rotary_pos_emb", "update"} <= used


def _check_attention(module: nn.Module, index: int, name: str) -> None:
    known = cast(Any, module)
    if known.layer_idx != index:
        raise NotConvertibleError(
            f"{name} numbers the attention of layer {index} as {known.layer_idx}: expected the "
            "same, caches go by it"
        )
    if not known.is_causal:
        raise NotConvertibleError(f"{name} attends to later tokens in layer {index}")
    if any("sink" in part for part, _ in module.named_parameters()):
        raise NotConvertibleError(
            f"{name} has learned sinks in its softmax, which whatwhere.attention has not"
        )
    forward = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    kinds = {parameter.kind for parameter in forward.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds or not set(CACHE_NAMES) & set(forward):
        raise NotConvertibleError(
            f"the attention of {name} takes {', '.join(forward)}: looked for one of "
            f"{', '.join(CACHE_NAMES)} and for **kwargs"
        )


def _check_config(config: PreTrainedConfig, name: str) -> None:
    for field in ("kv_lora_rank", "qk_rope_head_dim"):
        if getattr(config, field, None):
            raise NotConvertibleError(
                f"{name} keeps compressed keys ({field}): only keys of whole heads are supported"
            )
    other = set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES)
    if other:
        raise NotConvertibleError(
            f"{name} has layers of type {', '.join(sorted(other))}: expected "
            f"{' or '.join(_LAYER_TYPES)}"
        )
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        raise NotConvertibleError(
            f"{name} has attention_dropout={dropout}: whatwhere.attention drops no weights; load "
            "the model with attention_dropout=0.0"
        )


def _head_dim(module: nn.Module, config: PreTrainedConfig) -> int:
    for owner, field in ((module, "head_dim"), (module, "head_size"), (config, "head_dim")):
        width = getattr(owner, field, None)
        if width:
            return int(width)
    return int(config.hidden_size // config.num_attention_heads)


def _probe_rotation(module: nn.Module, name: str) -> bool:
    """Try the model's rotation on numbers: whether it is partial.

    Raises:
        NotConvertibleError: If it does not turn channel ``c`` with ``c + half the width``.
    """
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    if not _turns_halves(rotate, 8):
        raise NotConvertibleError(
            f"the rotation of {name} does not pair channel c with c + D/2, as Llama's does "
            "(looked at what its apply_rotary_pos_emb does to numbers)"
        )
    return _turns_halves(rotate, 4)


def _turns_halves(rotate: Callable[..., tuple[Tensor, Tensor]], width: int) -> bool:
    """Whether a table of this width turns pairs ``(c, c + width/2)`` of 8 channels."""
    made = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 3, 8, generator=made, device="cpu")
    angle = torch.randn(1, 3, width // 2, generator=made, device="cpu")
    cos, sin = angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)
    try:
        found = rotate(q, k, cos, sin)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    expected = []
    for x in (q, k):
        first, second = x[..., : width // 2], x[..., width // 2 : width]
        c, s = angle.cos(), angle.sin()
        turned = (first * c - second * s, second * c + first * s)
        expected.append(torch.cat((*turned, x[..., width:]), dim=-1))
    return all(
        isinstance(one, Tensor) and one.shape == other.shape and torch.allclose(one, other)
        for one, other in zip(found, expected, strict=True)
    )
