"""Backend ``reference``: the definition written out, any dtype, every feature; the oracle."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from whatwhere.attention.call import Backend, Call
from whatwhere.attention.features import compute_dtype, encode_keys, encode_queries
from whatwhere.attention.masks import slope_bias, visible, without_unseen


def scores(call: Call) -> Tensor:
    """Scaled scores before mask and softmax: ``(B, H, T, S)``, float32 or float64.

    Features are rounded to the dtype of ``q`` (as every fast kernel rounds its operands), the
    products are accumulated in float32, or in float64 for float64 input.
    """
    dtype = compute_dtype(call.q.dtype)
    queries = encode_queries(call.q, call.spec, call.query_positions).to(dtype)
    keys = encode_keys(call.k, call.spec, call.key_positions).to(dtype)
    out = queries @ keys.repeat_interleave(call.groups, dim=1).mT * call.spec.scale
    cap = call.spec.softcap
    if cap is not None:
        out = torch.tanh(out / cap) * cap
    return out if call.spec.slopes is None else out + slope_bias(call, dtype)


def run(call: Call) -> Tensor:
    """Softmax attention with a T x S matrix."""
    dtype, seen = compute_dtype(call.q.dtype), visible(call)
    if seen is not None:
        keys, values = without_unseen(call, seen)
        call = replace(call, k=keys, v=values)
    logits = scores(call)
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
        some = seen.any(dim=-1, keepdim=True)
        logits = logits.masked_fill(~some, 0.0)
    weights = torch.softmax(logits, dim=-1)
    if seen is not None:
        weights = weights.masked_fill(~seen, 0.0)
    values = call.v.to(dtype).repeat_interleave(call.groups, dim=1)
    return (weights.to(call.v.dtype).to(dtype) @ values).to(call.q.dtype)


BACKEND = Backend(run=run, refuses=lambda call: None)
