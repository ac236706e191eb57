"""Backends ``triton`` and ``widened``: our own GPU kernels.

``triton`` loads queries and keys ``D`` wide and turns them inside, so that nothing ``2 D`` wide
is ever stored: the memory of RoPE's fused attention. Only q, k, v, the output and the
log-sum-exp are kept for the backward pass. Few queries without gradients (decoding) go to a
kernel that splits the keys among programs. ``widened`` is described in widened.py.

Triton itself is imported when a kernel first runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whatwhere.attention.call import Backend, Call
from whatwhere.attention.triton import arguments, ops, pages, widened
from whatwhere.spec import ScoreSpec

# Queries up to which splitting the keys pays; beyond, tiles of queries fill the device.
DECODE_QUERIES = 16


def refuses(call: Call) -> str | None:
    """What the kernels do not do."""
    why = arguments.refuses(call.q, call.spec)
    if why is None and max(call.q.shape[-1], call.v.shape[-1]) > arguments.WIDEST:
        return f"it takes head_dim and value widths up to {arguments.WIDEST}"
    return why


def run(call: Call) -> Tensor:
    """Decode where that pays, else the tiled kernels."""
    given = arguments.of(call)
    if call.q.shape[2] <= DECODE_QUERIES and not call.needs_grad:
        out: Tensor = ops.flash_decode(call.q, call.k, call.v, *given, None, None)
        return out
    found: Tensor = ops.flash_forward(call.q, call.k, call.v, *given)[0]
    return found


def reads_raw_keys(spec: ScoreSpec, device: torch.device) -> bool:
    """On a GPU the decoding kernel turns polar keys as it reads them."""
    polar = spec.feature == "polar" and spec.softcap is None
    return device.type == "cuda" and polar and arguments.INSTALLED


BACKEND = Backend(run=run, refuses=refuses, reads_raw_keys=reads_raw_keys, pages=pages)
WIDENED = widened.BACKEND
