"""Backend ``cpu``: attention by blocks of query rows, in plain PyTorch.

PyTorch's fused CPU kernel wants values as wide as the widened features and so computes a third of
its products on zeros. Here a block of rows of several heads is one batched product with the keys
up to the diagonal; only outputs and the log of the softmax's sum are kept for the backward pass.
The two passes are operators of their own, so that `torch.compile` calls them without a break.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.call import Backend, Call
from whatwhere.attention.features import encode_keys, encode_queries

# Rows of a block: few enough that little is computed beyond the diagonal, many enough for the
# matrix units. Scores held at a time: what stays in a core's cache.
_ROWS = 32
_SCORES = 2**19


def refuses(call: Call) -> str | None:
    """What the row blocks do not do yet."""
    if call.q.device.type != "cpu":
        return f"it runs on a CPU, the call is on {call.q.device.type}"
    if call.q.dtype not in (torch.float32, torch.float64):
        return f"it computes float32 and float64, not {call.q.dtype}"
    if call.key_mask is not None or call.key_segments is not None or call.window is not None:
        return "it knows no key mask, segments or window"
    if call.spec.slopes is not None:
        return "it knows no slopes"
    if call.causal and not call.in_order:
        return "it is causal in order of rows only, and positions were given"
    return None


def run(call: Call) -> Tensor:
    """Encode, fold grouped heads into rows, and go through the blocks."""
    queries = encode_queries(call.q, call.spec, call.query_positions)
    keys = encode_keys(call.k, call.spec, call.key_positions)
    batch, heads, length, _ = call.q.shape
    grouped = (batch * call.k.shape[1], call.groups, length)
    out: Tensor = rows_forward(
        queries.reshape(*grouped, queries.shape[-1]),
        keys.flatten(0, 1),
        call.v.flatten(0, 1),
        call.spec.scale,
        call.causal,
    )[0]
    return out.view(batch, heads, length, call.v.shape[-1])


@torch.library.custom_op("whatwhere::rows_forward", mutates_args=(), device_types="cpu")
def rows_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T) v`` and the log-sum-exp of its scores.

    Args:
        q: ``(N, g, T, F)`` query features, the ``g`` heads that share a key head together.
        k: ``(N, S, F)`` key features.
        v: ``(N, S, V)``.
        scale: Factor of the scores.
        causal: Whether row ``i`` sees keys up to ``i + S - T``.

    Returns:
        ``(N, g, T, V)`` and ``(N, g, T, 1)``.
    """
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(*q.shape[:3], 1)
    for heads, rows, seen, hidden in _blocks(q, k, causal):
        scores = _scores(q, k, heads, rows, seen, scale, hidden)
        top = scores.amax(dim=-1, keepdim=True)
        total = scores.sub_(top).exp_().sum(dim=-1, keepdim=True)
        block = torch.bmm(scores.flatten(1, 2), v[heads, :seen]).view(*total.shape[:3], -1)
        out[heads, :, rows] = block.div_(total)
        lse[heads, :, rows] = total.log_().add_(top)
    return out, lse


@torch.library.custom_op("whatwhere::rows_backward", mutates_args=(), device_types="cpu")
def rows_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the three inputs of `rows_forward`; scores are computed again."""
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros_like(k, memory_format=torch.contiguous_format)
    grad_v = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for heads, rows, seen, hidden in _blocks(q, k, causal):
        weights = _scores(q, k, heads, rows, seen, scale, hidden)
        weights = weights.sub_(lse[heads, :, rows]).exp_().flatten(1, 2)
        slope, queries = grad[heads, :, rows], q[heads, :, rows].flatten(1, 2)
        share = (slope * out[heads, :, rows]).sum(dim=-1, keepdim=True).flatten(1, 2)
        slope = slope.flatten(1, 2)
        grad_v[heads, :seen].baddbmm_(weights.mT, slope)
        change = torch.bmm(slope, v[heads, :seen].mT).sub_(share).mul_(weights).mul_(scale)
        grad_q[heads, :, rows] = torch.bmm(change, k[heads, :seen]).view_as(q[heads, :, rows])
        grad_k[heads, :seen].baddbmm_(change.mT, queries)
    return grad_q, grad_k, grad_v


def _blocks(
    q: Tensor, k: Tensor, causal: bool
) -> Iterator[tuple[slice, slice, int, Tensor | None]]:
    """Slices of heads and of rows, how many keys the block sees, and what its end may not see."""
    count, groups, length, _ = q.shape
    total = k.shape[1]
    at_once = max(1, _SCORES // max(groups * _ROWS * total, 1))
    hidden = None
    if causal:
        hidden = torch.full((_ROWS, _ROWS), float("-inf"), dtype=q.dtype).triu_(1)
    for n in range(0, count, at_once):
        heads = slice(n, min(n + at_once, count))
        for i in range(0, length, _ROWS):
            rows = slice(i, min(i + _ROWS, length))
            seen = total - length + rows.stop if causal else total
            yield heads, rows, seen, hidden


def _scores(
    q: Tensor,
    k: Tensor,
    heads: slice,
    rows: slice,
    seen: int,
    scale: float,
    hidden: Tensor | None,
) -> Tensor:
    """Scaled and masked scores of a block: ``(n, g, rows, seen)``."""
    queries = q[heads, :, rows]
    scores = torch.bmm(queries.flatten(1, 2), k[heads, :seen].mT).mul_(scale)
    scores = scores.view(*queries.shape[:3], seen)
    if hidden is not None:
        size = queries.shape[2]
        scores[..., seen - size :] += hidden[:size, :size]
    return scores


@rows_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(*q.shape[:3], 1)


@rows_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(
    ctx: Any, grad: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    grads = rows_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.causal)
    return *grads, None, None


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "backend 'cpu' has no second derivatives: call attention with backend='reference'"
    )


rows_forward.register_autograd(_differentiate, setup_context=_keep)
rows_backward.register_autograd(_differentiate_twice)

BACKEND = Backend(run=run, refuses=refuses)
