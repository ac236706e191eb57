"""A few queries against a cache of raw keys: nothing but `D` numbers of each key is read.

The features of keys exist for one block at a time, in a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.cpu.blocks import distances, visible
from whatwhere.attention.cpu.compiled import LOOP
from whatwhere.attention.cpu.problem import ARGUMENTS, Problem
from whatwhere.attention.cpu.tables import in_order
from whatwhere.attention.features import magnitudes
from whatwhere.spec import ScoreSpec

# Queries up to which this beats blocks of rows.
FEW = 16

# Features of keys that `attend_one` holds at once, 16 MiB.
_WHOLE = 2**22

# Features of keys held at a time: 4 MiB are few enough for the last cache of every core that was
# tried, and enough that starting an operation costs little.
_HELD = 2**20


def takes_one(q: Tensor, k: Tensor, v: Tensor, spec: ScoreSpec) -> bool:
    """Whether `attend_one` does: polar, all channels turning, float32, few keys, no gradient."""
    tensors = (q, k, v, spec.phase)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    turning = spec.feature == "polar" and spec.num_axes == 1
    whole = spec.num_turning == spec.num_frequencies == q.shape[-1]
    fits = 2 * k.numel() <= _WHOLE and q.dtype == torch.float32
    shaped = spec.phase is None or spec.phase.shape[0] == q.shape[1]
    return turning and whole and fits and shaped and not torch.compiler.is_compiling()


def attend_one(q: Tensor, k: Tensor, v: Tensor, spec: ScoreSpec) -> Tensor:
    """One query of each head over all keys in order: ``(B, H, 1, V)``.

    What `attend_few` does, in as few operations as can be: over a short cache starting them is
    what takes the time.
    """
    assert spec.inv_freq is not None
    (batch, shared, total, width), kind = k.shape, spec.magnitude
    table = in_order(spec.inv_freq, total, torch.float32)
    angle = spec.inv_freq[0] * (total - 1)
    if spec.phase is not None:
        angle = angle - spec.phase
    query = magnitudes(q[:, :, 0], kind) * spec.scale
    turned = torch.cat((query * angle.cos(), query * angle.sin()), dim=-1).to(q.dtype)
    shown = magnitudes(k, kind)
    made = k.new_empty(batch, shared, total, 2 * width)
    torch.mul(shown, table[:, :width], out=made[..., :width])
    torch.mul(shown, table[:, width:], out=made[..., width:])
    weights = torch.matmul(turned.view(batch, shared, -1, 2 * width), made.mT)
    out = torch.matmul(torch.softmax(weights, dim=-1), v)
    return out.view(*q.shape[:3], v.shape[-1])


def attend_few(*given: Any) -> Tensor:
    """Attention for a `Problem` of few queries: ``(B, H, T, V)``. Not differentiable."""
    p = Problem(*given)
    q, v = p.q, p.v
    if not q.numel() or not v.shape[-1]:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    keys, seen = _reach(p)
    if keys.start == keys.stop:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    weights = p.cap(_scores(p, keys))
    if p.slopes is not None:
        slopes = p.slopes.to(p.dtype).view(1, -1, p.groups, 1, 1)
        ahead = distances(p, slice(None), slice(None), keys).to(p.dtype)
        weights.addcmul_(ahead[:, None, None], slopes, value=-1)
    if seen is not None:
        weights.masked_fill_(~seen[:, None, None], float("-inf"))
    weights = torch.softmax(weights, dim=-1)
    if seen is not None:
        weights.masked_fill_(~seen.any(dim=-1)[:, None, None, :, None], 0.0)
    return _mix(p, weights, keys, seen).flatten(1, 2).to(q.dtype)


def _reach(p: Problem) -> tuple[slice, Tensor | None]:
    """The keys that any query sees, and ``(b or 1, T, keys)`` where some are hidden from some."""
    length, total = p.q.shape[2], p.k.shape[2]
    if p.key_mask is None and p.segments is None and (p.query_positions is None or not p.causal):
        if not p.causal:
            return slice(0, total), None
        first = max(0, p.offset - p.window + 1) if p.window else 0
        keys = slice(first, total)
        return keys, None if length == 1 else visible(p, slice(None), slice(0, length), keys)
    seen = visible(p, slice(None), slice(0, length), slice(0, total))
    found = seen.any(dim=0).any(dim=0).nonzero()
    if not found.numel():
        return slice(0, 0), None
    keys = slice(int(found[0, 0]), int(found[-1, 0]) + 1)
    seen = seen[..., keys]
    return keys, None if bool(seen.all()) else seen


def _scores(p: Problem, keys: slice) -> Tensor:
    """``(B, G, H/G, T, keys)``, softcap, slopes and mask not yet counted."""
    batch, shared, length = p.q.shape[0], p.k.shape[1], p.q.shape[2]
    queries = torch.empty(batch, shared, p.groups, length, p.width, dtype=p.dtype)
    turn = p.turn_of_queries(slice(0, batch), slice(None))
    turn.make(p.q.unflatten(1, (-1, p.groups)), queries)
    queries = queries.flatten(0, 1).flatten(1, 2)
    count = keys.stop - keys.start
    if p.feature == "identity" and p.k.dtype == p.dtype:
        scores = torch.bmm(queries, p.k[:, :, keys].flatten(0, 1).mT)
        return scores.view(batch, shared, p.groups, length, count)
    if LOOP.wanted(p, count):
        found = LOOP.scores(p, queries.unflatten(0, (batch, shared)), keys)
        if found is not None:
            by_query: Tensor = found.mT.unflatten(2, (p.groups, length))
            return by_query.contiguous()
    scores = torch.empty(*queries.shape[:2], count, dtype=p.dtype)
    size = max(16, _HELD // (batch * shared * p.width))
    scratch = torch.empty(batch, shared, min(size, count), p.width, dtype=p.dtype)
    for part in _parts(keys, size):
        made = scratch[:, :, : part.stop - part.start]
        p.turn_of_keys(slice(0, batch), part).make(p.k[:, :, part], made)
        # Keys first: the other way round PyTorch 2.13 uses one thread.
        found = torch.bmm(made.flatten(0, 1), queries.mT).mT
        scores[..., part.start - keys.start : part.stop - keys.start] = found
    return scores.view(batch, shared, p.groups, length, count)


def _mix(p: Problem, weights: Tensor, keys: slice, seen: Tensor | None) -> Tensor:
    """``(B, G, H/G, T, V)``."""
    sizes = weights.shape[:4]
    flat = weights.flatten(0, 1).flatten(1, 2)
    if p.v.dtype == p.dtype:
        out = torch.bmm(flat, p.v[:, :, keys].flatten(0, 1))
    else:
        out = flat.new_zeros(*flat.shape[:2], p.v.shape[-1])
        size = max(16, _HELD // (sizes[0] * sizes[1] * p.v.shape[-1]))
        for part in _parts(keys, size):
            values = p.v[:, :, part].to(p.dtype).flatten(0, 1)
            out.baddbmm_(flat[..., part.start - keys.start : part.stop - keys.start], values)
    if seen is not None and not bool(out.isfinite().all()):
        # A weight of 0 does not hide a NaN. Rare, so that values are copied only then.
        hidden = ~seen.any(dim=1)[:, None, :, None]
        values = p.v[:, :, keys].to(p.dtype).masked_fill(hidden, 0.0)
        out = torch.bmm(flat, values.flatten(0, 1))
    return out.view(*sizes, -1)


def _parts(keys: slice, size: int) -> Iterator[slice]:
    for start in range(keys.start, keys.stop, size):
        yield slice(start, min(start + size, keys.stop))


decode = torch.library.custom_op(
    "whatwhere::decode",
    mutates_args=(),
    device_types="cpu",
    schema=f"({ARGUMENTS}) -> Tensor",
)(attend_few)


@decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])
