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


def slope_bias(call: Call, dtype: torch.dtype) -> Tensor:
    """``-slopes * (t - s)``: ``(B or 1, H, T, S)``; needs ``spec.slopes``."""
    assert call.spec.slopes is not None
    ahead = call.query_positions[:, :, None, 0] - call.key_positions[:, None, :, 0]
    slopes = call.spec.slopes.to(device=call.q.device, dtype=dtype)
    return -slopes[:, None, None] * ahead.unsqueeze(1).to(dtype)
