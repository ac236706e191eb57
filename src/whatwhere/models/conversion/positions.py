"""Where the tokens of a converted decoder's forward pass stand, for each of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from whatwhere.models.conversion.forward import Rotations, Step
from whatwhere.models.layout import Layout, lay_out


def refuse(kwargs: dict[str, Any], config: Any) -> None:
    """Refuse what transformers' decoders take and a converted one cannot do.

    Raises:
        ValueError: If it is asked for.
    """
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions=True: fused kernels keep no weights; whatwhere.scores gives the "
            "scores of one layer"
        )
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: documents are told apart by position_ids that start anew; leave it out"
            )


def choose_cache(
    decoder: Any,
    cache: Any,
    use_cache: bool | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
) -> Cache | None:
    """The cache of a forward pass: the one given, a new one, or none.

    transformers makes one unless told otherwise. Here packed documents, which it could not serve,
    are not asked to say so.

    Args:
        decoder: The decoder.
        cache: What it was given as ``past_key_values``.
        use_cache: What it was given.
        position_ids: What it was given.
        attention_mask: What it was given.

    Raises:
        ValueError: If ``cache`` is no cache, or holds tokens while checkpointing gradients.
    """
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}: expected a transformers Cache"
        )
    if getattr(decoder, "gradient_checkpointing", False) and decoder.training:
        past = 0 if cache is None else cache.get_seq_length()
        if not (isinstance(past, int) and past == 0):
            raise ValueError(
                "past_key_values holds tokens, which gradient checkpointing would add anew in "
                "the backward pass: call eval() or gradient_checkpointing_disable()"
            )
        return None
    wanted = decoder.config.use_cache if use_cache is None else use_cache
    if cache is not None or not wanted:
        return cache
    # What cannot be read while compiling is taken for packed: only training compiles it so.
    if (
        use_cache is None
        and isinstance(position_ids, Tensor)
        and position_ids.shape[-1] > 1
        and (torch.compiler.is_compiling() or _falls_back(position_ids, attention_mask))
    ):
        return None
    return DynamicCache(config=decoder.config)


def lay_out_layers(
    rotations: Rotations,
    batch: int,
    length: int,
    like: Tensor,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> tuple[tuple[Step, ...], Tensor]:
    """The `Step` of each layer, and positions ``(1 or B, T)`` for the decoder.

    Args:
        rotations: Of the decoder.
        batch: ``B``.
        length: ``T``.
        like: Of the dtype and on the device of hidden states.
        attention_mask: As for `lay_out`.
        position_ids: As for `lay_out`.
        past_key_values: As for `lay_out`.

    Raises:
        ValueError: If arguments do not fit one another.
    """
    ends = _ends(rotations, length, past_key_values)
    layouts: dict[int, Layout] = {}
    tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    steps = []
    for index, kind in zip(rotations.of_layer, rotations.first_of_kind, strict=True):
        if kind not in layouts:
            layouts[kind] = lay_out(
                batch,
                length,
                like.device,
                attention_mask=_as_far(attention_mask, ends, kind),
                position_ids=position_ids,
                past_key_values=past_key_values,
                layer=kind,
            )
            if past_key_values is not None and isinstance(position_ids, Tensor):
                _check_against_cache(
                    position_ids, layouts[kind], attention_mask, past_key_values.get_seq_length()
                )
        layout = layouts[kind]
        if (index, kind) not in tables:
            tables[index, kind] = rotations.tables(index, layout.positions, like)
        steps.append(Step(layout, *tables[index, kind], turned=bool(rotations.frequencies[index])))
    positions = steps[0].layout.positions
    return tuple(steps), positions if positions.ndim == 2 else positions[None]


def _ends(rotations: Rotations, length: int, cache: Cache | None) -> dict[int, int]:
    """How many slots each kind of layer will have gone through."""
    if cache is None:
        return {}
    return {kind: sum(cache.get_mask_sizes(length, kind)) for kind in set(rotations.first_of_kind)}


def _as_far(attention_mask: Any, ends: dict[int, int], kind: int) -> Any:
    """The mask without the slots that a static cache has for other layers alone."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2 or not ends:
        return attention_mask
    width = attention_mask.shape[1]
    longer = ends[kind] < width <= max(ends.values())
    return attention_mask[:, : ends[kind]] if longer else attention_mask


def _falls_back(position_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether positions start anew somewhere, padding aside."""
    starts = position_ids.diff(dim=-1) <= 0
    if isinstance(attention_mask, Tensor) and attention_mask.shape == position_ids.shape:
        starts = starts & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    return bool(starts.any())


def _check_against_cache(
    position_ids: Tensor, layout: Layout, attention_mask: Tensor | None, past: Any
) -> None:
    """A cache keeps keys at their slots, or at what the mask counts: other positions have none.

    Read from the device where that costs nothing much, and not while compiling.
    """
    length = position_ids.shape[-1]
    if torch.compiler.is_compiling() or (length == 1 and position_ids.device.type != "cpu"):
        return
    counted = layout.query_positions
    if counted is None:
        counted = torch.arange(length, device=position_ids.device) + past
    wrong = position_ids.to(counted.device) != counted
    if isinstance(attention_mask, Tensor) and attention_mask.shape[-1] >= length:
        wrong = wrong & (attention_mask[:, -length:] != 0)
    if bool(wrong.any()):
        rows = position_ids.reshape(-1, length)
        row, column = (int(i) for i in wrong.reshape(-1, length).nonzero()[0])
        raise ValueError(
            f"position_ids[{row}, {column}] is {int(rows[row % len(rows), column])}: expected "
            "positions that count the tokens of the cache and these, padding aside; packed "
            "documents and positions of your own need use_cache=False"
        )
