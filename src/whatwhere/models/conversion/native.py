"""Between `WhatWhereForCausalLM` and converted models of the same shape: the same weights, moved.

Our decoder with SwiGLU is Llama's; with QK-Norm it is Qwen3's, with a sliding window Mistral's.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from whatwhere.encodings import Encoding
from whatwhere.models.configuration import WhatWhereConfig
from whatwhere.models.conversion.classes import ConvertedForCausalLM
from whatwhere.models.conversion.convert import give_encodings
from whatwhere.models.conversion.forward import ENCODING
from whatwhere.models.conversion.structure import NotConvertibleError, find_parts, registered
from whatwhere.models.modeling import WhatWhereForCausalLM

_OURS, _THEIRS = ".self_attn.encoding.", f".self_attn.{ENCODING}."
Names = tuple[str, str]
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"),
)


def to_transformers(model: WhatWhereForCausalLM) -> PreTrainedModel:
    """A converted model of transformers with the weights of one of ours, and its logits.

    For what expects one of transformers' own shapes: Llama, with ``qk_norm`` Qwen3, with
    ``sliding_window`` Mistral (both: Qwen3). Channels of partial rotations are permuted within
    each head, which changes no score. Dropout, which those have none of, is left behind.

    Args:
        model: Ours; its weights are copied.

    Raises:
        NotConvertibleError: If its MLP is not gated or an encoding is added to its token
            embeddings, which no shape of transformers has.
    """
    config = model.config
    if config.mlp != "swiglu":
        raise NotConvertibleError(
            f"the model has mlp={config.mlp!r}: expected 'swiglu', which Llama has"
        )
    if config.absolute_encoding is not None:
        raise NotConvertibleError(
            f"position encoding {config.absolute_encoding[0]!r} is added to token embeddings, "
            "which Llama does not do"
        )
    window, layers = config.sliding_window, config.num_hidden_layers
    kind = "qwen3" if config.qk_norm else "llama" if window is None else "mistral"
    sizes = {name: getattr(config, name) for name in _SHARED}
    if kind == "mistral":
        sizes["sliding_window"] = window
    elif kind == "qwen3":
        types = ["full_attention" if window is None else "sliding_attention"] * layers
        sizes |= {
            "layer_types": types,
            "sliding_window": window,
            "use_sliding_window": window is not None,
        }
    shape = CONFIG_MAPPING[kind](**sizes)
    with torch.device("meta"):
        made = registered(type(shape), MODEL_FOR_CAUSAL_LM_MAPPING)(shape)
        parts = find_parts(made.base_model)
        converted = give_encodings(
            made,
            parts,
            config.layer_encodings,
            config.max_position_embeddings,
            config.attention_backend,
            config.cache_form,
        )
    encodings = [block.self_attn.encoding for block in model.model.blocks]
    return cast(PreTrainedModel, _fill(converted, model, encodings, (_OURS, _THEIRS), _to_halves))


def from_transformers(model: PreTrainedModel) -> WhatWhereForCausalLM:
    """One of our models with the weights of a converted one, and its logits.

    The reverse of `to_transformers`.

    Args:
        model: A converted Llama, Mistral or Qwen3 without biases; its weights are copied.

    Raises:
        NotConvertibleError: If it has another shape.
    """
    config = cast(Any, model.config)
    kind = getattr(config, "base_model_type", config.model_type)
    if not isinstance(model, ConvertedForCausalLM) or kind not in ("llama", "mistral", "qwen3"):
        raise NotConvertibleError(
            f"{type(model).__name__} ({kind}) has not the shape of ours: expected a converted "
            "Llama, Mistral or Qwen3"
        )
    parts = find_parts(cast(Any, model).base_model)
    windows = {getattr(config, "sliding_window", None) if kind == "mistral" else None}
    if kind == "qwen3":
        windows = {cast(Any, module).sliding_window for module in parts.attentions}
    biased = [name for name, _ in cast(Any, model).named_parameters() if name.endswith(".bias")]
    if biased or config.hidden_act != "silu" or len(windows) > 1:
        found = f"{biased[0]}" if biased else f"hidden_act={config.hidden_act!r}"
        found = found if len(windows) == 1 else "layers with and without a sliding window"
        raise NotConvertibleError(f"{type(model).__name__} has {found}, which ours have not")
    names, given = zip(*config.layer_encodings, strict=True)
    same = all(entry == config.layer_encodings[0] for entry in config.layer_encodings)
    sizes = {name: getattr(config, name) for name in _SHARED if name != "head_dim"}
    sizes["max_position_embeddings"] = config.train_length or config.max_position_embeddings
    with torch.device("meta"):
        made = WhatWhereForCausalLM(
            WhatWhereConfig(
                **sizes,
                head_dim=parts.head_dim,
                mlp="swiglu",
                qk_norm=kind == "qwen3",
                sliding_window=windows.pop(),
                position_encoding=names[0] if same else list(names),
                position_encoding_options=given[0] if same else list(given),
                attention_backend=config.attention_backend,
                cache_form=config.cache_form,
            )
        )
    encodings = [getattr(module, ENCODING) for module in parts.attentions]
    return cast(
        WhatWhereForCausalLM, _fill(made, model, encodings, (_THEIRS, _OURS), _from_halves)
    )


def _fill(made: Any, source: Any, encodings: list[Encoding], names: Names, order: Any) -> Any:
    """Copy weights into a model made without any."""
    made.load_state_dict(_moved(source, encodings, names, order), assign=True)
    made.tie_weights()
    for name, parameter in source.named_parameters():
        made.get_parameter(name.replace(*names)).requires_grad_(parameter.requires_grad)
    made.generation_config = copy.deepcopy(source.generation_config)
    return made.train(source.training)


def _moved(model: Any, encodings: list[Encoding], names: Names, order: Any) -> dict[str, Tensor]:
    """The weights under their new names, channels of rotated heads in their new order."""
    moved = {}
    for name, weight in model.state_dict().items():
        new = weight.clone()
        part = name.split(".")
        if len(part) > 4 and part[3] == "self_attn" and part[4][:2] in ("q_", "k_"):
            encoding = encodings[int(part[2])]
            spec = encoding()
            pairs = spec.num_frequencies if spec.feature == "rotate" else 0
            index = order(encoding.head_dim, pairs)
            heads = new.unflatten(0, (-1, encoding.head_dim))
            new = heads[:, index].flatten(0, 1)
        moved[name.replace(*names)] = new
    return moved


def _to_halves(head_dim: int, pairs: int) -> list[int]:
    """Which of our channels comes where a pair is ``c`` and ``c + D/2``, not ``c + R``."""
    half = head_dim // 2
    still = list(range(2 * pairs, head_dim))
    first, second = still[: half - pairs], still[half - pairs :]
    return [*range(pairs), *first, *range(pairs, 2 * pairs), *second]


def _from_halves(head_dim: int, pairs: int) -> list[int]:
    """The reverse of `_to_halves`."""
    order = _to_halves(head_dim, pairs)
    return [order.index(channel) for channel in range(head_dim)]
