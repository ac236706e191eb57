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
from whatwhere.attention.triton import arguments, ops, widened
from whatwhere.spec import ScoreSpec

# Queries up to which splitting the keys pays; beyond, tiles of queries fill the device.
DECODE_QUERIES = 16


def refuses(call: Call) -> str | None:
    """What the kernels do not do."""
    why = arguments.refuses(call.q)
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
    """On a GPU the decoding kernel turns keys as it reads them."""
    return device.type == "cuda" and spec.feature == "polar" and arguments.installed()


def refuses_paged(q: Tensor, values: Tensor, spec: ScoreSpec) -> str | None:
    """What decoding over pages does not do."""
    why = arguments.refuses(q)
    if why is not None:
        return why
    if max(q.shape[-1], values.shape[-1]) > arguments.WIDEST:
        return f"it takes head_dim and value widths up to {arguments.WIDEST}"
    learned = (spec.phase, spec.slopes, q, values)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned):
        return "it has no gradients (call it under torch.no_grad)"
    return None


def run_paged(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    spec: ScoreSpec,
    block_table: Tensor,
    lengths: Tensor,
    window: int | None,
) -> Tensor:
    """Attention over a paged cache; arguments as `whatwhere.paged_attention` has checked them."""
    length = q.shape[2]
    at = lengths.long()[:, None] - length + torch.arange(length, device=q.device)
    given = list(arguments.of_spec(spec))
    given += [at[..., None], None, None, None, None, True, window or 0, arguments.tf32(q)]
    out: Tensor = ops.flash_decode(
        q, key_pages, value_pages, *given, block_table.int(), lengths.int()
    )
    return out


BACKEND = Backend(run=run, refuses=refuses, reads_raw_keys=reads_raw_keys)
WIDENED = widened.BACKEND
