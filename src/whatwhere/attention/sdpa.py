"""Backend ``sdpa``: widened features, then PyTorch's fused scaled dot product attention."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from whatwhere.attention.call import Backend, Call
from whatwhere.attention.features import encode_keys, encode_queries
from whatwhere.attention.masks import slope_bias, visible, without_unseen


def refuses(call: Call) -> str | None:
    """What PyTorch's kernels do not do to scores."""
    if call.spec.softcap is not None:
        return "PyTorch's scaled dot product attention has no softcap"
    return None


def run(call: Call) -> Tensor:
    """Encode, then one SDPA call; a dense mask only where causality in order does not say all."""
    dtype = call.q.dtype
    if call.spec.slopes is not None and dtype in (torch.float16, torch.bfloat16):
        # A distance of a few hundred times a slope is not exact in 8 or 11 bits.
        return _attend(call, torch.float32).to(dtype)
    return _attend(call, dtype)


def attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query of each head over all keys: the heads that share a key head as one's queries."""
    batch, shared = k.shape[:2]
    queries = q.reshape(batch, shared, -1, q.shape[-1])
    out = F.scaled_dot_product_attention(queries, k, v, scale=scale)
    return out.reshape(*q.shape[:3], v.shape[-1])


def _attend(call: Call, dtype: torch.dtype) -> Tensor:
    seen, causal = _seen(call)
    if seen is not None and not _all_seen(call):
        keys, values = without_unseen(call, seen)
        call = replace(call, k=keys, v=values)
    queries = encode_queries(call.q, call.spec, call.query_positions).to(dtype)
    keys = encode_keys(call.k, call.spec, call.key_positions).to(dtype)
    values = call.v.to(dtype)
    if call.groups > 1:
        keys, values = (x.repeat_interleave(call.groups, dim=1) for x in (keys, values))
    mask, some = _mask(call, seen, dtype)
    width = values.shape[-1]
    values = _pad_values(queries, values)
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=causal, scale=call.spec.scale
    )[..., :width]
    return out if some is None else torch.where(some, out, 0.0)


def _pad_values(queries: Tensor, values: Tensor) -> Tensor:
    """PyTorch's CPU flash kernel needs equal widths, else it takes the path with a T x S matrix.

    Zero columns cost two thirds of what the wider score costs anyway.
    """
    missing = queries.shape[-1] - values.shape[-1]
    return F.pad(values, (0, missing)) if missing > 0 and values.device.type == "cpu" else values


def _all_seen(call: Call) -> bool:
    """Whether every key is seen by some query, and every query sees some key, whatever they are.

    The last of queries in order sees every key.
    """
    only_causal = call.key_mask is None and call.key_segments is None and call.window is None
    return only_causal and call.in_order


def _seen(call: Call) -> tuple[Tensor | None, bool]:
    """A dense mask where causality in order does not say all, and whether it does."""
    length, total = call.q.shape[2], call.k.shape[2]
    if _all_seen(call) and call.spec.slopes is None and call.causal:
        if length == 1:
            return None, False
        if length == total:
            return None, True
    return visible(call), False


def _mask(
    call: Call, seen: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The mask for SDPA, and which queries see any key (``None``: all)."""
    some = None
    if seen is not None and not _all_seen(call):
        some = seen.any(dim=-1, keepdim=True)
        seen = seen | ~some
    if call.spec.slopes is None:
        return seen, some
    bias = slope_bias(call, dtype)
    return bias if seen is None else bias.masked_fill(~seen, float("-inf")), some


BACKEND = Backend(run=run, refuses=refuses)
