"""Which keys a query may see, as a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor

from whatwhere.attention.call import Call


def visible(call: Call) -> Tensor | None:
    """``(B or 1, 1, T, S)`` bool, True where a query sees a key; ``None`` if all see all."""
    seen: Tensor | None = None
    if call.causal:
        ahead = call.query_positions[:, :, None, 0] - call.key_positions[:, None, :, 0]
        seen = ahead >= 0
        if call.window is not None:
            seen = seen & (ahead < call.window)
    if call.query_segments is not None and call.key_segments is not None:
        same = call.query_segments[:, :, None] == call.key_segments[:, None, :]
        seen = same if seen is None else seen & same
    if call.key_mask is not None:
        allowed = call.key_mask[:, None, :].expand(-1, call.q.shape[2], -1)
        seen = allowed if seen is None else seen & allowed
    return None if seen is None else seen.unsqueeze(1)


def without_unseen(call: Call, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with 0 where no query sees them: what lies there may be NaN.

    Args:
        call: The call.
        seen: What `visible` gave for it.
    """
    hidden = ~seen.any(dim=2)[:, :, :, None]
    return call.k.masked_fill(hidden, 0.0), call.v.masked_fill(hidden, 0.0)


def unseen(call: Call) -> Tensor | None:
    """``(B or 1, S)``, keys hidden from every query by the mask, their document or their position.

    Without a ``T x S`` mask; ``None`` if there is no such reason. Needs at least one query.
    """
    reasons = [] if call.key_mask is None else [~call.key_mask]
    at_queries, at_keys = call.query_positions[..., 0], call.key_positions[..., 0]
    fewer = call.q.shape[2] < call.k.shape[2]
    if call.causal and not call.in_order:
        reasons.append(at_keys > at_queries.amax(dim=1, keepdim=True))
    if call.window is not None and (fewer or not call.in_order):
        reasons.append(at_keys <= at_queries.amin(dim=1, keepdim=True) - call.window)
    if call.query_segments is not None and call.key_segments is not None and fewer:
        asked = call.query_segments.sort(dim=1).values
        keys = call.key_segments.contiguous()
        nearest = torch.searchsorted(asked, keys).clamp(max=asked.shape[1] - 1)
        reasons.append(asked.gather(1, nearest) != keys)
    hidden: Tensor | None = None
    for reason in reasons:
        hidden = reason if hidden is None else hidden | reason
    return hidden


def slope_bias(call: Call, dtype: torch.dtype) -> Tensor:
    """``-slopes * (t - s)``: ``(B or 1, H, T, S)``; needs ``spec.slopes``."""
    assert call.spec.slopes is not None
    ahead = call.query_positions[:, :, None, 0] - call.key_positions[:, None, :, 0]
    slopes = call.spec.slopes.to(device=call.q.device, dtype=dtype)
    return -slopes[:, None, None] * ahead.unsqueeze(1).to(dtype)
