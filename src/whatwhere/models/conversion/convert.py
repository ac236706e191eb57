"""`convert` and `convertible`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from whatwhere.attention import BACKENDS
from whatwhere.encodings import options
from whatwhere.encodings.base import check_whole
from whatwhere.models.configuration import CacheForm, WhatWhereConfig, is_absolute
from whatwhere.models.conversion.classes import (
    ROPE_TYPE,
    ConvertedFields,
    attach,
    config_class,
    make_encodings,
)
from whatwhere.models.conversion.forward import IMPLEMENTATION
from whatwhere.models.conversion.starts import Start, apply_starts, check_start, make_starts
from whatwhere.models.conversion.structure import (
    Convertibility,
    NotConvertibleError,
    Parts,
    check_kind,
    find_parts,
    registered,
)


def convert(
    model: PreTrainedModel,
    encoding: str,
    *,
    train_length: int | None = None,
    start: Start = "weights",
    calibration: Tensor | None = None,
    backend: str = "auto",
    cache_form: str = "auto",
    **given: Any,
) -> PreTrainedModel:
    """Give a causal language model of transformers another position encoding, in place.

    Its weights stay as they are unless ``start`` says otherwise; parameters of the encoding
    (PoPE's ``delta``) are added to its attention modules as ``position_encoding``. Attention is
    `whatwhere.attention` from then on. Layers that have no rotation in the model (some of
    SmolLM3) stay without.

    A rotation keeps the model's own pairs of channels, ``c`` and ``c + D/2``: partial rotations
    and RoPE-ID turn the first pairs, which were the fastest, and their scores are those of
    `whatwhere.attention` up to a fixed permutation of channels.

    Args:
        model: A ``...ForCausalLM``, on any device and of any dtype.
        encoding: A name in `whatwhere.ENCODINGS`, but for those added to token embeddings.
        train_length: Length in tokens the model was trained at, for encodings that depend on
            one; ``max_position_embeddings`` of its config by default.
        start: For ``"pope"`` on a trained model, how queries and keys are recombined within each
            head so that less is to be learned anew (`whatwhere.models.initialise`,
            ``docs/from_rope.md``): ``"scores"`` fits RoPE's scores on some text in closed
            form, ``"distilled"`` refines that by gradients, layer by layer and without labels,
            ``"distilled-zero"`` does with delta kept at 0; ``"centres"`` and ``"signs"`` use
            means of the text, ``"order"`` needs none; ``"weights"`` leaves them.
            With QK-Norm only ``"order"``, ``"signs"`` and ``"distilled"``, then of delta alone.
        calibration: ``(N, T)`` tokens of some text, for starts that need it; a few windows.
        backend: A name in `whatwhere.BACKENDS`, or ``"auto"``.
        cache_form: Whether caches keep ``"encoded"`` or ``"raw"`` keys; ``"auto"`` takes what
            decodes faster on the device.
        **given: Options of the encoding. ``base``, ``scale`` and, for ``"rope"`` and
            ``"yarn"``, ``fraction`` are the model's own unless given.

    Returns:
        The model itself, now of a class of its own that `transformers` saves and loads (after
        ``import whatwhere.models``).

    Raises:
        NotConvertibleError: If the model cannot be converted (a ``ValueError``; the message says
            what was looked for and not found).
        ValueError: If the encoding or an option of it is unknown or does not suit the model.
            Whenever anything is raised, the model is as it was.
    """
    parts = _examine(model)
    _check_choices(encoding, backend, cache_form)
    config = cast(Any, model.config)
    length = getattr(config, "max_position_embeddings", None)
    length = length if train_length is None else check_whole("train_length", train_length)
    # What encodings take of NumPy's numbers no config can write.
    given = {
        key: value.item() if hasattr(value, "item") else value for key, value in given.items()
    }
    given = check_start(parts, start, encoding, given, calibration)
    entries = [_resolve(parts, layer, encoding, given) for layer in range(len(parts.attentions))]
    if start == "weights":
        return give_encodings(model, parts, entries, length, backend, cache_form)
    starts = make_starts(model, parts, start, calibration)
    for (_, settled), made in zip(entries, starts, strict=True):
        settled |= {} if made is None else {"scale": made.scale}
    give_encodings(model, parts, entries, length, backend, cache_form)
    apply_starts(parts, starts)
    return model


def give_encodings(
    model: PreTrainedModel,
    parts: Parts,
    entries: list[tuple[str, dict[str, Any]]],
    length: int | None,
    backend: str,
    cache_form: str,
) -> PreTrainedModel:
    """Convert a model whose parts were found, each layer to an encoding of its own."""
    config = cast(Any, model.config)
    encodings = make_encodings(parts, entries, length)
    if any(len(made.frequencies) > 1 for made in encodings):
        names = ", ".join({name for name, _ in entries})
        raise ValueError(f"encoding {names} with several position axes: text has one")
    kind: Any = type(config)
    made = config_class(kind)
    _replace_config(model, _new_config(config, made, entries, length, backend, cache_form))
    model.__class__ = registered(made, MODEL_FOR_CAUSAL_LM_MAPPING)
    # Whoever notes this name (adapters of PEFT) would be given the model that it was.
    cast(Any, model).name_or_path = ""
    attach(parts, encodings)
    return model


def convertible(model: PreTrainedModel | PreTrainedConfig) -> Convertibility:
    """Whether `convert` can take a model, or one made from a config, and why not.

    Converts nothing; of a config a model without weights is made, to be looked at.
    """
    try:
        if isinstance(model, PreTrainedConfig):
            _check_not_ours(model)
            with torch.device("meta"):
                made = registered(type(model), MODEL_FOR_CAUSAL_LM_MAPPING)
                model = made(copy.deepcopy(model))
        parts = _examine(model)
    except NotConvertibleError as error:
        return Convertibility(False, str(error))
    rotated = "half its width apart" if not parts.partial else "half its rotated part apart"
    return Convertibility(
        True,
        f"{type(model).__name__}: {len(parts.attentions)} layers, {parts.heads} query and "
        f"{parts.key_heads} key heads of {parts.head_dim} channels, rotated in pairs {rotated}",
    )


def _examine(model: Any) -> Parts:
    if isinstance(model, PreTrainedModel):
        _check_not_ours(model.config)
    check_kind(model)
    return find_parts(model.base_model)


def _check_not_ours(config: Any) -> None:
    if isinstance(config, (ConvertedFields, WhatWhereConfig)):
        names = {name for name, _ in config.layer_encodings}
        raise NotConvertibleError(
            f"the model has position encoding {', '.join(sorted(names))} of whatwhere already: "
            "convert the model that it was made from"
        )


def _check_choices(encoding: str, backend: str, cache_form: str) -> None:
    options(encoding)
    if is_absolute(encoding):
        raise ValueError(
            f"encoding {encoding!r} is added to token embeddings, which a conversion leaves "
            "alone: expected one that acts on scores"
        )
    for name, value, valid in (
        ("backend", backend, ("auto", *BACKENDS)),
        ("cache_form", cache_form, get_args(CacheForm)),
    ):
        if value not in valid:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(valid)}")


def _resolve(
    parts: Parts, layer: int, name: str, given: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Name and options of one layer, what the model decides filled in."""
    if not parts.rotates(layer):
        return "nope", {}
    valid, own, settled = options(name), parts.rope_parameters(layer), dict(given)
    kind = own.get("rope_type", "default")
    if name in ("rope", "yarn") and kind != "default" and "base" not in given:
        raise ValueError(
            f"the frequencies of this model are scaled (rope_type={kind!r}), which encoding "
            f"{name!r} does not do: give base={own.get('rope_theta', 10000.0)} to do without"
        )
    share = float(own.get("partial_rotary_factor", 1.0)) if parts.partial else 1.0
    if "base" in valid:
        settled.setdefault("base", float(own.get("rope_theta", 10000.0)))
    if name in ("rope", "yarn") and parts.partial and not {"fraction", "axes"} & set(given):
        settled["fraction"] = share
    return name, settled


def _replace_config(model: Any, made: Any) -> None:
    """Give a model's modules another config: the one they have may be another model's as well."""
    before = model.config
    for module in model.modules():
        if getattr(module, "config", None) is before:
            module.config = made


def _new_config(
    config: Any,
    made: type[PreTrainedConfig],
    entries: list[tuple[str, dict[str, Any]]],
    length: int | None,
    backend: str,
    cache_form: str,
) -> Any:
    """The config of the converted model."""
    before, came_from = config.model_type, str(getattr(config, "_name_or_path", "") or "")
    config = copy.deepcopy(config)
    config.__class__ = made
    config.base_model_type = before
    # A folder on somebody's disk is nobody else's business.
    is_folder = Path(came_from).exists() or came_from.count("/") > 1 or came_from[:1] in "./~"
    config.base_model = (Path(came_from).name if is_folder else came_from) or None
    config._name_or_path = ""
    names, given = [name for name, _ in entries], [some for _, some in entries]
    same = all(entry == entries[0] for entry in entries)
    config.position_encoding = names[0] if same else names
    config.position_encoding_options = given[0] if same else given
    config.train_length = length
    config.attention_backend, config.cache_form = backend, cache_form
    config.rope_parameters = _marked(config.rope_parameters or {})
    config._attn_implementation_internal = IMPLEMENTATION
    return config


def _marked(rope_parameters: dict[str, Any]) -> dict[str, Any]:
    """The model's settings under a ``rope_type`` that only we know."""
    if any(isinstance(value, dict) for value in rope_parameters.values()):
        return {
            kind: _marked(value) if isinstance(value, dict) else value
            for kind, value in rope_parameters.items()
        }
    before = rope_parameters.get("rope_type", "default")
    return rope_parameters | {"rope_type": ROPE_TYPE, "base_rope_type": before}
