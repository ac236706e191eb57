"""How far rounding alone can take a result from float64, worked out from the operands of a call.

Nothing here is tuned. Features, weights, slopes and results are each rounded to the dtype of the
call once or twice; sums run in float32, or float64 for float64 input. What that does to a score, a
weight, an output and a gradient follows from the sizes of what is multiplied, pair by pair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import whatwhere as ww
from whatwhere.attention.angles import temperature
from whatwhere.attention.call import Call, prepare
from whatwhere.attention.masks import slope_bias, visible


def widest(spec: ww.ScoreSpec) -> ww.ScoreSpec:
    """The same spec, all that may be learned in float64."""
    wide = {
        name: x.detach().double()
        for name in ("phase", "slopes")
        if (x := getattr(spec, name)) is not None
    }
    return replace(spec, **wide)


def prepared(q: Tensor, k: Tensor, v: Tensor, spec: ww.ScoreSpec, call: dict[str, Any]) -> Call:
    names = ("query_positions", "key_positions", "key_mask", "segments", "window")
    given = [call.get(name) for name in names]
    return prepare(q, k, v, spec, call.get("causal", False), *given)


@dataclass(frozen=True)
class Bounds:
    """Largest errors: of the output element by element, of gradients for each tensor whole."""

    out: Tensor
    q: float = 0.0
    k: float = 0.0
    v: float = 0.0
    phase: float = 0.0
    slopes: float = 0.0


def bounds(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: ww.ScoreSpec,
    call: dict[str, Any],
    dtype: torch.dtype,
    flow: Tensor | None,
) -> Bounds:
    """For float64 operands, and with ``flow``, the gradient that comes in, also for gradients."""
    with torch.no_grad():
        return _bounds(prepared(q, k, v, widest(spec), call), dtype, flow)


def _bounds(call: Call, dtype: torch.dtype, flow: Tensor | None) -> Bounds:
    spec, groups = call.spec, call.groups
    length, total, width = call.q.shape[2], call.k.shape[2], call.v.shape[3]
    info = torch.finfo(dtype)
    once = info.eps  # two roundings, each of half of it
    tiny = info.smallest_normal * info.eps
    single = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    seen = visible(call)
    if seen is None:
        seen = torch.ones(1, 1, length, total, dtype=torch.bool)
    signed_q = ww.encode_queries(call.q, spec, call.query_positions)
    signed_k = ww.encode_keys(call.k, spec, call.key_positions).repeat_interleave(groups, 1)
    of_q, of_k = signed_q.abs(), signed_k.abs()
    values = call.v.repeat_interleave(groups, 1)
    scores = signed_q @ signed_k.mT * spec.scale
    # Of either side a magnitude and then its feature are rounded; in decoding a key turns twice.
    terms = 4 * of_q.shape[-1] + 16
    off = of_q @ of_k.mT * spec.scale * (2 * once + terms * single) + 4 * single
    steep, off_steep = torch.ones(()), 0.0
    if spec.softcap is not None:
        # tanh is nowhere steeper than 1, and its derivative, 1 - tanh^2, than 0.77.
        bent = torch.tanh(scores / spec.softcap)
        scores, steep = bent * spec.softcap, 1 - bent.square()
        off_steep = (off / spec.softcap).clamp(max=1.0) + 8 * single
        off = off.clamp(max=2 * spec.softcap) + 4 * single * scores.abs()
    ahead = (call.query_positions[..., None, 0] - call.key_positions[:, None, :, 0])[:, None]
    if spec.slopes is not None:
        scores = scores + slope_bias(call, torch.float64)
        off = off + ahead.abs() * spec.slopes.abs()[:, None, None] * 8 * single
    scores = scores.masked_fill(~seen, float("-inf"))
    # Relative to the largest score; an error of each is seen twice, in its weight and in the sum.
    weights = torch.softmax(scores, -1).nan_to_num(0.0) if total else scores
    off = torch.where(seen, off, 0.0)
    worst = off.amax(-1, keepdim=True) if total else off.new_zeros(*off.shape[:3], 1)
    sums = (total + 16) * single
    change = weights * (torch.expm1(2 * worst) + once + sums) + tiny
    change = torch.where(seen, change.clamp(max=1.0), 0.0)
    out = change @ values.abs() + (weights @ values.abs()) * (once + sums) + tiny
    if flow is None:
        return Bounds(out=out)
    pull, sizes = flow @ values.mT, flow.abs() @ values.abs().mT
    mean = (weights * pull).sum(-1, keepdim=True)
    off_pull = sizes * (once + width * single)
    off_mean = (change * sizes + weights * (off_pull + sizes * (2 * once + sums))).sum(-1, True)
    slope = weights * (pull - mean)
    off_slope = (change + weights) * (off_pull + off_mean) + change * (pull - mean).abs()
    off_slope = off_slope + slope.abs() * once + torch.where(seen, tiny, 0.0)
    many = length * groups + total + 16
    # Slopes come after the cap, queries and keys before it.
    steps = ((off_slope + slope.abs() * length * many * single) * ahead.abs()).sum((0, 2, 3))
    off_slope = off_slope * steep + (slope.abs() + off_slope) * off_steep
    slope = slope.abs() * steep
    least = tiny * many * (1 + _top(of_q) + _top(of_k)) * 4

    def through(change: Tensor, exact: Tensor, features: Tensor) -> Tensor:
        """Errors of a sum over features, then of turning back two of them."""
        rounded = exact @ features * (3 * once + many * single)
        return 2 * spec.scale * (change @ features + rounded)

    gain = 1.0
    if spec.temperature_length is not None:
        gain = _top(temperature(call.query_positions[..., 0], spec.temperature_length))
    to_q = through(off_slope, slope, of_k)
    to_k = through(off_slope.mT, slope.mT, of_q).unflatten(1, (-1, groups)).sum(2)
    to_v = change.mT @ flow.abs() + weights.mT @ flow.abs() * (2 * once + many * single)
    phase = to_q.new_zeros(0)
    if spec.phase is not None:
        turning = spec.num_turning
        added = slope @ of_k * spec.scale * (length * call.q.shape[0] * single + 2 * once)
        (a, b), (c, d) = (x[..., : 2 * turning].chunk(2, -1) for x in (to_q + added, of_q))
        phase = (a * d + b * c).sum((0, 2))
    return Bounds(
        out=out,
        q=_top(to_q) * gain + least,
        k=_top(to_k) + least,
        v=_top(to_v.unflatten(1, (-1, groups)).sum(2)) + least,
        phase=_top(phase) + least * many,
        slopes=_top(steps) + least * many,
    )


def _top(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
