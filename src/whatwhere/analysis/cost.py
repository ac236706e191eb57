"""What a model's position encoding costs: tables, cache, operations of scores."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from whatwhere.analysis.in_distribution import check_lengths
from whatwhere.analysis.positions import positions_of, table_of
from whatwhere.attention import cache_form, table_bytes
from whatwhere.encodings import Encoding
from whatwhere.models.configuration import WhatWhereConfig
from whatwhere.models.conversion import convert
from whatwhere.models.conversion.classes import ConvertedFields
from whatwhere.models.conversion.structure import registered

COLUMNS = (
    *("encoding", "length", "table_bytes", "cache_bytes_per_token", "score_flops", "flops"),
    *("rope_flops", "head_flops", "overhead_formula", "overhead_measured"),
)

# Options that RoPE shares with other encodings.
_OF_ROPE = ("base", "scale", "temperature_length")


def _grouped(left: tuple[int, ...], right: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Operations of a product of each row with one expert's matrix."""
    return 2 * left[0] * right[-2] * right[-1]


# What experts of transformers are multiplied with, and PyTorch's counter does not know.
_EXPERTS = {torch.ops.aten._grouped_mm: _grouped}


@dataclass(frozen=True)
class Counted:
    """Of one forward pass of a sequence, on PyTorch's ``meta`` device.

    Attributes:
        flops: All that `FlopCounterMode` counted.
        head: The part of the output matrix.
        cache: Numbers that the cache holds after it.
    """

    flops: int
    head: int
    cache: int


def cost(
    model: object,
    lengths: Sequence[int],
    *,
    encoding: str | None = None,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """What a model's position encoding costs at some lengths, one sequence at a time.

    Operations are counted twice. **Measured**: PyTorch's `FlopCounterMode` over a forward pass of
    the model, made from its config on the ``meta`` device (nothing is computed or allocated, any
    length can be asked for), and of the same model with RoPE. A product and a sum are two;
    matrix products alone are counted, and all ``T^2`` pairs of them, as papers do: kernels that
    skip hidden keys halve scores with any encoding. **Formula**: per token and layer the RoPE
    model multiplies by its ``N`` weights, scores ``T`` keys in ``H D`` products and weighs ``T``
    values in as many; features ``F_l`` wide instead of ``D`` (``F = 2 D`` for PoPE) add

        sum_l T H (F_l - D) / (N + sum_l 2 T H D).

    With ``N = 12 d_model^2`` a layer (MLP of four times the width) and ``H D = d_model`` that is
    ``L / (12 d_model + 2 L)`` of arXiv 2509.10534. Both overheads are of the layers, the output
    matrix left out, as there.

    Args:
        model: A model or a config: ours, converted, or of transformers; of one with other parts
            (images, sound) its text decoder.
        lengths: ``T``, in tokens.
        encoding: Cost after `whatwhere.models.convert` to this encoding, for a model of
            transformers; ``None`` is the model as it is.
        device: Where decoding takes place, for which a cache chooses the form of its keys; by
            default where the model lies, or the CPU.

    Returns:
        A row for each length: ``encoding``, ``length``; ``table_bytes`` of cos and sin, once for
        each distinct rotation, and of a learned table; ``cache_bytes_per_token``, read off the
        tensors in the cache after ``T`` tokens, over ``T`` (windows keep fewer); ``score_flops``
        by formula; ``flops`` and ``rope_flops`` of the whole forward pass, ``head_flops`` of
        these the output matrix; ``overhead_formula`` and ``overhead_measured``. RoPE in a
        model of transformers that is not converted is what it is: overheads are 0, or ``nan``
        where it has another encoding.

    Raises:
        NotConvertibleError: If an ``encoding`` is asked for and the model cannot be converted.
        ValueError: If ``lengths`` are no positive integers or reach beyond a learned table,
            ``model`` is none, or ``encoding`` does not suit it.
        RuntimeError: If the model cannot run on the ``meta`` device.
    """
    wanted = check_lengths(lengths)
    config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"model is a {type(model).__name__}: expected a config or a model of transformers"
        )
    config = config.get_text_config(decoder=True)
    dtype = getattr(model, "dtype", None) or getattr(config, "dtype", None) or torch.float32
    where = torch.device(device or cast(Any, getattr(model, "device", None)) or "cpu")
    own, label = _on_meta(config, encoding, where)
    _check_table(own.config, wanted)
    rope = _with_rope(own)
    rows = []
    for length in wanted:
        counted = _count(own, length)
        plain = counted if rope is own or rope is None else _count(rope, length)
        scores, formula = _by_formula(own, length)
        measured = (counted.flops - plain.flops) / (plain.flops - plain.head)
        if rope is None:
            formula = measured = float("nan")
        row = (
            *(label, length, _tables(own, length, dtype.itemsize)),
            *(counted.cache * dtype.itemsize / length, scores, counted.flops),
            *(plain.flops if rope is not None else float("nan"), counted.head),
            *(formula, measured),
        )
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _on_meta(
    config: Any, encoding: str | None, device: torch.device
) -> tuple[PreTrainedModel, str]:
    """A model without weights, and the name of its encoding."""
    model = _made(copy.deepcopy(config))
    ours = isinstance(config, (WhatWhereConfig, ConvertedFields))
    if encoding is not None:
        model = convert(model, encoding)
        ours = True
    if not ours:
        kinds = sorted({layer.kind for layer in positions_of(config)})
        shown = {"rotate": "rope", "none": "nope"}
        return model, "+".join(shown.get(kind, kind) for kind in kinds)
    specs = [made("meta") for made in _encodings(model)]
    forms = {cache_form(spec, device) for spec in specs if spec.feature != "identity"}
    settings = cast(Any, model.config)
    if settings.cache_form == "auto":
        settings.cache_form = "raw" if "raw" in forms else "encoded"
    # Every pair is multiplied here, softcaps and windows or not: the same count for all.
    settings.attention_backend = "reference"
    names = dict.fromkeys(name for name, _ in settings.layer_encodings)
    return model, "+".join(names)


def _made(config: Any) -> PreTrainedModel:
    config._attn_implementation = None
    known: Any = registered(type(config), MODEL_FOR_CAUSAL_LM_MAPPING)
    ours = isinstance(config, (WhatWhereConfig, ConvertedFields))
    if not ours:
        _fix_rotation(getattr(config, "rope_parameters", None) or {})
    more = {} if ours else {"attn_implementation": "eager"}
    with torch.device("meta"):
        made = known._from_config(config, **more)
    # Grouped products of experts are there for bfloat16 alone; a count knows no dtype.
    return cast(PreTrainedModel, made.to(torch.bfloat16).eval())


def _fix_rotation(settings: dict[str, Any]) -> None:
    """Have frequencies that do not look at how long the input is, which meta tensors cannot say.

    A count knows no frequencies.
    """
    for own in [settings, *(value for value in settings.values() if isinstance(value, dict))]:
        if own.get("rope_type") in ("dynamic", "longrope"):
            own["rope_type"] = "default"


def _encodings(model: nn.Module) -> list[Encoding]:
    return [module for module in model.modules() if isinstance(module, Encoding)]


def _with_rope(model: PreTrainedModel) -> PreTrainedModel | None:
    """The same model with RoPE; the model itself if it has it, ``None`` if none is known."""
    config = copy.deepcopy(cast(Any, model.config))
    if not isinstance(config, (WhatWhereConfig, ConvertedFields)):
        kinds = {layer.kind for layer in positions_of(config)}
        return model if kinds <= {"rotate", "none"} else None
    before = config.layer_encodings
    names = {name for name, _ in before}
    if "rope" in names <= {"rope", "nope"} and not any("fraction" in given for _, given in before):
        return model
    converted = isinstance(config, ConvertedFields)
    config.position_encoding = [
        "nope" if converted and name == "nope" else "rope" for name, _ in before
    ]
    config.position_encoding_options = [
        {key: given[key] for key in _OF_ROPE if key in given} for _, given in before
    ]
    if config.position_encoding == ["nope"] * len(before):
        config.position_encoding = "rope"
    return _made(config)


def _count(model: PreTrainedModel, length: int) -> Counted:
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_EXPERTS) as counter:
        out = model(input_ids=ids, use_cache=True)
    head = model.get_output_embeddings()
    name = next(path for path, module in model.named_modules() if module is head)
    of_head = counter.get_flop_counts().get(f"{type(model).__name__}.{name}", {})
    held = _numbers(out.past_key_values)
    return Counted(counter.get_total_flops(), sum(of_head.values()), held)


def _numbers(cache: Any) -> int:
    """How many numbers the layers of a cache hold."""
    found = [vars(layer) for layer in cache.layers]
    return sum(
        value.numel()
        for layer in found
        for name, value in layer.items()
        if name in ("keys", "values") and isinstance(value, Tensor)
    )


def _by_formula(model: PreTrainedModel, length: int) -> tuple[int, float]:
    """Operations of all scores, and the overhead over RoPE's."""
    config = cast(Any, model.config)
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    encodings = [made for made in _encodings(model) if not made.absolute]
    plain = [width] * len(positions_of(config)) if not encodings else None
    features = plain or [int(made("meta").feature_dim(width)) for made in encodings]
    weights = _weights(model)
    more = length * heads * sum(feature - width for feature in features)
    usual = weights + 2 * length * heads * width * len(features)
    return 2 * length * length * heads * sum(features), more / usual


def _weights(model: PreTrainedModel) -> int:
    """Weights that multiply each token in the layers; of experts those that are chosen."""
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    config = cast(Any, model.config)
    chosen = int(getattr(config, "num_experts_per_tok", None) or 0)
    stacked = [p for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name]
    of_experts: int = sum(chosen * p.numel() // p.shape[0] for p in stacked)
    in_linear: int = sum(m.weight.numel() for m in linear)
    return in_linear + of_experts


def _tables(model: PreTrainedModel, length: int, itemsize: int) -> int:
    """Bytes of cos and sin of each distinct rotation, and of a learned table."""
    encodings = _encodings(model)
    if encodings:
        distinct = {(made.frequencies, made("meta").feature): made for made in encodings}
        turning = [made for made in distinct.values() if not made.absolute]
        learned = [p for made in encodings if made.absolute for p in made.parameters()]
        return sum(table_bytes(made, length) for made in turning) + itemsize * sum(
            p.numel() for p in learned
        )
    config = cast(Any, model.config)
    layers = positions_of(config)
    # transformers keeps the frequencies of a pair twice, in the dtype of the model.
    rows = {layer.trained for layer in layers if layer.kind == "rotate"}
    rotations = sum(2 * length * 2 * len(row) * itemsize for row in rows)
    tables = {layer.table for layer in layers if layer.table is not None}
    return rotations + sum(table * int(config.hidden_size) * itemsize for table in tables)


def _check_table(config: Any, lengths: list[int]) -> None:
    table = table_of(config)
    if table is not None and max(lengths) > table:
        raise ValueError(
            f"lengths: {max(lengths)} is beyond the learned table of {table} positions"
        )
