"""Where the tokens of one forward pass stand, worked out once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from whatwhere.models.context_parallel import ContextShard
from whatwhere.spec import ScoreSpec


@dataclass(frozen=True, eq=False)
class Layout:
    """Positions of the new tokens, and which keys they may see.

    Attributes:
        positions: ``(T,)`` or ``(B, T)``, the position of each new token within its sequence.
        query_positions: What ``whatwhere.attention`` is given; ``None`` for the newest T keys.
        key_positions: Likewise; ``None`` for 0..S-1.
        key_mask: ``(B, S)`` bool, ``None`` without padding.
        segments: ``(B, T)`` documents of a packed batch, or ``None``.
        fresh: Whether the new tokens are all there is, so that a cache adds nothing.
        context: Which positions of the sequence these are, if processes share it; segments and
            key positions then are those of the whole sequence.
    """

    positions: Tensor
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    key_mask: Tensor | None = None
    segments: Tensor | None = None
    fresh: bool = True
    context: ContextShard | None = None

    def to(self, device: torch.device) -> Layout:
        """On another device, for models whose layers lie on several."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return Layout(
            self.positions.to(device),
            query_positions=moved(self.query_positions),
            key_positions=moved(self.key_positions),
            key_mask=moved(self.key_mask),
            segments=moved(self.segments),
            fresh=self.fresh,
            context=self.context,
        )

    def at(self, spec: ScoreSpec) -> tuple[Tensor | None, Tensor | None]:
        """Positions of queries and keys for one layer's scores.

        Within a document a relative score is the same at row indices, whose tables are shared by
        the whole batch, as at positions that restart; only a length temperature tells them
        apart.
        """
        packed = self.segments is not None and self.query_positions is None
        if packed and spec.temperature_length is not None:
            return self.positions, self.positions
        return self.query_positions, self.key_positions


def lay_out_shared(
    context: ContextShard,
    batch: int,
    length: int,
    device: torch.device,
    segment_ids: Tensor | None = None,
    **given: object,
) -> Layout:
    """The `Layout` of one process's positions of sequences that several share.

    Args:
        context: Which positions these are.
        batch: ``B``.
        length: ``T / C``, tokens of this process.
        device: Where they lie.
        segment_ids: ``(B, T)`` documents of whole sequences.
        **given: What cannot be given together with ``context``.

    Raises:
        ValueError: If something of that is given, or a shape does not fit.
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} together with context: shared sequences take none")
    if length != context.length // context.group.size():
        raise ValueError(
            f"input_ids has {length} positions: expected {context.length // context.group.size()} "
            f"of the {context.length} that {context.group.size()} processes share"
        )
    index = torch.arange(context.length, device=device)
    if segment_ids is None:
        return Layout(context.take(index), context=context)
    _check(segment_ids, "segment_ids", ((batch, context.length),))
    segment_ids = segment_ids.to(device)
    positions = _within(segment_ids)
    return Layout(
        context.take(positions), key_positions=positions, segments=segment_ids, context=context
    )


def lay_out(
    batch: int,
    length: int,
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    layer: int = 0,
) -> Layout:
    """Work out the `Layout` of a forward pass.

    What the caller need not have said is left out of the attention call, so that a batch without
    padding takes the fast causal path. Finding that out reads a few booleans from the device,
    once a forward pass and only if a mask or position ids were given; a dense mask would cost
    far more. While compiling nothing is read, and the general path is taken.

    Args:
        batch: ``B``.
        length: ``T``, new tokens.
        device: Where they lie.
        attention_mask: ``(B, S)``, nonzero for tokens, 0 for padding; S counts cached tokens.
        position_ids: ``(T,)``, ``(1, T)`` or ``(B, T)``.
        segment_ids: ``(B, T)``, the document of each token.
        past_key_values: The cache, before this pass has added to it.
        layer: Whose keys; those of a sliding window are fewer than others.

    Raises:
        ValueError: If an argument has the wrong shape or dtype, or documents meet a cache.
    """
    if segment_ids is not None:
        _check(segment_ids, "segment_ids", ((batch, length),))
        segment_ids = segment_ids.to(device)
        if past_key_values is not None:
            raise ValueError("segment_ids with a cache: packed documents need use_cache=False")
    if position_ids is not None:
        _check(position_ids, "position_ids", ((batch, length), (1, length), (length,)))
        position_ids = position_ids.reshape(-1, length).to(device)
        position_ids = position_ids[0] if position_ids.shape[0] == 1 else position_ids
    past = 0 if past_key_values is None else past_key_values.get_seq_length(layer)
    if past_key_values is not None and not (isinstance(past, int) and past == 0):
        mask = _mask(attention_mask, batch, None, device)
        sizes = past_key_values.get_mask_sizes(length, layer)
        return _continued(length, device, mask, position_ids, sizes, past)
    if isinstance(attention_mask, Tensor) and past_key_values is not None:
        attention_mask = attention_mask[..., :length]  # a static cache's mask reaches to its end
    mask = _mask(attention_mask, batch, length, device)
    cached = past_key_values is not None
    return _alone(batch, length, device, mask, position_ids, segment_ids, cached)


def _alone(
    batch: int,
    length: int,
    device: torch.device,
    mask: Tensor | None,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    cached: bool,
) -> Layout:
    """Layout of tokens with nothing cached before them."""
    readable = not torch.compiler.is_compiling()
    if mask is not None and readable and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        mask = None  # padding on the right comes after every token: causality alone hides it
    if segment_ids is not None:
        positions = _within(segment_ids) if position_ids is None else position_ids
        return Layout(
            positions,
            query_positions=position_ids,
            key_positions=position_ids,
            key_mask=mask,
            segments=segment_ids,
        )
    if mask is not None:
        counted = _counted(mask)
        positions = counted if position_ids is None else position_ids
        ordered = counted if cached else positions
        return Layout(positions, query_positions=ordered, key_positions=ordered, key_mask=mask)
    if position_ids is None:
        return Layout(torch.arange(length, device=device))
    return Layout(position_ids) if cached else _given(position_ids, batch)


def _given(position_ids: Tensor, batch: int) -> Layout:
    """Layout of explicit positions without a mask: where they fall, a new document starts."""
    rows = position_ids.reshape(-1, position_ids.shape[-1])
    steps = rows.diff(dim=-1, prepend=rows[:, :1] - 1)
    restarts = steps <= 0
    if torch.compiler.is_compiling():
        restarted, skipped, shifted = True, True, True
    else:
        facts = (restarts.any(), (steps > 1).any(), (rows[:, 0] != 0).any())
        restarted, skipped, shifted = torch.stack(facts).tolist()
    segments = restarts.cumsum(dim=-1).expand(batch, -1) if restarted else None
    if not (skipped or (shifted and not restarted)):
        return Layout(position_ids, segments=segments)
    return Layout(
        position_ids,
        query_positions=position_ids,
        key_positions=position_ids,
        segments=segments,
    )


def _continued(
    length: int,
    device: torch.device,
    mask: Tensor | None,
    position_ids: Tensor | None,
    sizes: tuple[int, int],
    past: int | Tensor,
) -> Layout:
    """Layout of tokens that follow cached ones.

    Without padding tokens stand at their slots in the cache; with it at what the mask counts, so
    that causality and distances are those of the pass without a cache. ``sizes`` are the keys
    there will be, and the slot of the first.
    """
    total, offset = sizes
    at = past.to(device) if isinstance(past, Tensor) else past
    slots = torch.arange(length, device=device) + at
    if mask is not None and device.type == "cpu" and not torch.compiler.is_compiling():
        mask = None if bool(mask.all()) and mask.shape[1] >= offset + total else mask
    if mask is None:
        positions = slots if position_ids is None else position_ids
        if isinstance(past, int) and offset == 0 and total == past + length:
            return Layout(positions, fresh=False)
        keys = torch.arange(total, device=device) + offset
        return Layout(positions, query_positions=slots, key_positions=keys, fresh=False)
    end, width = offset + total, mask.shape[1]
    if width > end or (isinstance(past, int) and width < past + length):
        raise ValueError(
            f"attention_mask has {width} columns: expected {past + length}, the cached and the "
            f"{length} new tokens"
        )
    mask = torch.nn.functional.pad(mask, (0, end - width))
    counted = _counted(mask)
    queries = counted.index_select(1, slots)
    return Layout(
        queries if position_ids is None else position_ids,
        query_positions=queries,
        key_positions=counted[:, offset:],
        key_mask=mask[:, offset:],
        fresh=False,
    )


def _check(ids: Tensor, name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} is a {type(ids).__name__}: expected a tensor of integers")
    if tuple(ids.shape) not in shapes or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)} and dtype {ids.dtype}: expected integers of "
            f"shape {' or '.join(map(str, shapes))}"
        )


def _mask(
    attention_mask: Tensor | None, batch: int, width: int | None, device: torch.device
) -> Tensor | None:
    """The mask as ``(B, S)`` bool on the device."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask is a {type(attention_mask).__name__}: expected a tensor")
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or (width is not None and shape[1] != width):
        expected = f"({batch}, {'cached and new tokens' if width is None else width})"
        raise ValueError(
            f"attention_mask has shape {shape}: expected {expected}, 0 for padding, else 1"
        )
    return attention_mask.to(device) != 0


def _counted(mask: Tensor) -> Tensor:
    """Positions that count tokens and skip padding, which stands at 0, as in transformers."""
    return (mask.long().cumsum(dim=-1) - 1).masked_fill(~mask, 0)


def _within(segment_ids: Tensor) -> Tensor:
    """Position of each token within its document: ``(B, T)``."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    first = torch.ones_like(segment_ids[:, :1], dtype=torch.bool)
    starts = torch.cat((first, segment_ids[:, 1:] != segment_ids[:, :-1]), dim=1)
    return index - torch.where(starts, index, 0).cummax(dim=-1).values
