"""Host side of the kernels: tables, block shapes, grids."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.triton import (
    backward_keys,
    backward_queries,
    blocks,
    decode,
    elementwise,
    forward,
)
from whatwhere.attention.triton.problem import KINDS, Problem, by_length, padded, strides
from whatwhere.attention.triton.shapes import Shape, decode_shape, shape_for


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Launch on the device of a tensor."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def tables(problem: Problem, queries: bool) -> dict[str, Any]:
    """cos and sin of the angles of queries or keys, float32, ``(B or 1, length, R)``."""
    name = "Q" if queries else "K"
    none = {f"{name}_COS": None, f"{name}_SIN": None, f"{name.lower()}_table_b": 0}
    if problem.turning == 0:
        return none
    length = problem.length if queries else problem.total
    at = problem.score.query_positions if queries else problem.score.key_positions
    first = problem.total - problem.length if queries else 0
    cos, sin = angle_table(problem, at, length, first)
    batch = 0 if cos.shape[0] == 1 else length * problem.turning
    return {f"{name}_COS": cos, f"{name}_SIN": sin, f"{name.lower()}_table_b": batch}


def within_reach(x: Tensor) -> Tensor:
    """The tensor, or a copy where heads or rows lie too far apart for 32 bits to count."""
    far = max(x.stride(1) * max(x.shape[1] - 1, 0), x.stride(2) * 256)
    if far < 2**31 or x.numel() == 0:
        return x
    return by_length(x, x.shape[-1]).copy_(x)


def angle_table(
    problem: Problem, at: Tensor | None, length: int, first: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin at given positions ``(B or 1, length, A)``, or at ``first`` and what follows."""
    turning = problem.turning
    batch = 1 if at is None else at.shape[0]
    cos = torch.empty(batch, length, turning, dtype=torch.float32, device=problem.device)
    sin = torch.empty_like(cos)
    wide = padded(turning)
    tall = max(16, 4096 // wide)
    count = batch * length
    elementwise.table_kernel[(-(-count // tall),)](
        None if at is None else at.contiguous(),
        problem.freq,
        cos,
        sin,
        count,
        first,
        turning,
        AXES=problem.axes,
        IN_ORDER=at is None,
        R2=wide,
        BN=tall,
    )
    return cos, sin


def as_magnitudes(problem: Problem, x: Tensor) -> Tensor:
    """The channels with magnitudes in place of what they are of; ``x`` itself for other kinds."""
    if problem.magnitude == 0:
        return x
    out = by_length(x, x.shape[-1])
    wide = padded(problem.dim)
    tall = max(16, 8192 // wide)
    batch, heads, length, dim = x.shape
    elementwise.magnitude_kernel[(-(-length // tall), batch * heads)](
        x,
        out,
        **strides("x", x, "bhtd"),
        H=heads,
        T=length,
        D=dim,
        magnitudes=problem.score.magnitudes,
        MAGNITUDE=problem.magnitude,
        D2=wide,
        BM=tall,
    )
    return out


def block_lists(problem: Problem, shape: Shape, by_keys: bool = False) -> dict[str, Any]:
    """Lists of blocks for a kernel, where which are seen hangs on tensors."""
    if not problem.listed:
        return {"LIST": None, "WHOLE": None, "COUNT": None, "list_b": 0, "LISTED": False}
    order, whole, count = blocks.lists(problem, shape.rows, shape.columns, by_keys)
    per_batch = 0 if order.shape[0] == 1 else order.shape[1]
    return {"LIST": order, "WHOLE": whole, "COUNT": count, "list_b": per_batch, "LISTED": True}


def run_forward(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, T, V)`` and base-2 log-sum-exp ``(B, H, T)`` float32."""
    out = by_length(q, problem.width)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    shape = shape_for("forward", problem)
    q, k, v = (within_reach(x) for x in (q, k, v))
    with on(q):
        keys = as_magnitudes(problem, k)
        forward.forward_kernel[(-(-problem.length // shape.rows), problem.batch * problem.heads)](
            q,
            keys,
            v,
            out,
            lse,
            **strides("q", q, "bhtd"),
            **strides("k", keys, "bhsd"),
            **strides("v", v, "bhsd"),
            **tables(problem, queries=True),
            **tables(problem, queries=False),
            **problem.learned(),
            **problem.visibility(),
            **block_lists(problem, shape),
            **problem.shape(),
            MAGNITUDE=problem.magnitude,
            PART=problem.partly,
            **shape.arguments(),
        )
    return out, lse


def run_widen(x: Tensor, problem: Problem) -> Tensor:
    """Features of the queries of a problem, ``(B, heads, T, 2 R + P)``."""
    out = by_length(x, 2 * problem.turning + problem.rest)
    if out.numel() == 0:
        return out
    tall, counts = _rows_at_a_time(problem)
    with on(x):
        elementwise.widen_kernel[counts](
            x, out, **strides("x", x, "bhtd"), **_prepass(problem), BM=tall
        )  # fmt: skip
    return out


def run_narrow(grad: Tensor, x: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Gradients of `run_widen`: of the channels, and of the phase where there is one."""
    dx = by_length(x, problem.dim)
    phase = problem.score.phase
    if dx.numel() == 0:
        return dx.zero_(), None if phase is None else torch.zeros_like(phase)
    tall, counts = _rows_at_a_time(problem)
    d_phase = None
    if phase is not None:
        d_phase = x.new_empty(
            problem.batch, problem.heads, counts[0], problem.turning, dtype=torch.float32
        )
    with on(x):
        elementwise.narrow_kernel[counts](
            x, grad, dx, d_phase, **strides("x", x, "bhtd"), **strides("g", grad, "bhtd"),
            **_prepass(problem), BM=tall,
        )  # fmt: skip
    if d_phase is not None and phase is not None:
        d_phase = d_phase.sum(dim=(0, 2)).to(phase)
    return dx, d_phase


def _rows_at_a_time(problem: Problem) -> tuple[int, tuple[int, int]]:
    tall = max(16, 4096 // max(padded(problem.turning), padded(problem.rest)))
    return tall, (-(-problem.length // tall), problem.batch * problem.heads)


def _prepass(problem: Problem) -> dict[str, Any]:
    cos, sin, per_batch = tables(problem, queries=True).values()
    given = {**problem.learned(), **problem.shape(), "MAGNITUDE": problem.magnitude}
    names = (
        "PHASE_COS", "PHASE_SIN", "GAIN", "gain_b", "H", "T", "R", "P", "magnitudes", "KIND",
        "MAGNITUDE", "R2", "P2", "PHASED", "GAINED",
    )  # fmt: skip
    return {"COS": cos, "SIN": sin, "table_b": per_batch, **{name: given[name] for name in names}}


@dataclass(frozen=True)
class Gradients:
    """What `run_backward` gives; ``phase`` and ``slopes`` where the score has them."""

    q: Tensor
    k: Tensor
    v: Tensor
    phase: Tensor | None
    slopes: Tensor | None


def run_backward(
    problem: Problem, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    """Gradients of `run_forward`: queries first, then keys and values; no atomics."""
    # As the forward pass left them, whatever hooks on saved tensors have done since.
    out, lse = out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()
    dq, dk = by_length(q, problem.dim), by_length(k, problem.dim)
    dv = by_length(v, problem.width)
    d_phase = d_slopes = None
    if out.numel() == 0:
        return _no_gradients(problem, dq, dk, dv)
    q, k, v, grad = (within_reach(x) for x in (q, k, v, grad))
    shape = shape_for("queries", problem)
    count = -(-problem.length // shape.rows)
    score = problem.score
    if problem.phase_tables[0] is not None:
        d_phase = q.new_empty(
            problem.batch, problem.heads, count, problem.turning, dtype=torch.float32
        )
    if score.slopes is not None:
        d_slopes = q.new_empty(problem.batch, problem.heads, count, dtype=torch.float32)
    with on(q):
        keys = as_magnitudes(problem, k)
        share = torch.empty_like(lse)
        shared = {
            **strides("v", v, "bhsd"),
            **strides("g", grad, "bhtd"),
            **strides("k", keys, "bhsd"),
            **tables(problem, queries=True),
            **tables(problem, queries=False),
            **problem.learned(),
            **problem.visibility(),
            **problem.shape(),
            "MAGNITUDE": problem.magnitude,
            "PART": problem.partly,
        }
        backward_queries.backward_queries_kernel[(count, problem.batch * problem.heads)](
            q, keys, v, out, lse, grad, share, dq, d_phase, d_slopes,
            **strides("q", q, "bhtd"), **block_lists(problem, shape), **shared,
            **shape.arguments(),
        )  # fmt: skip
        shape = shape_for("keys", problem)
        queries = as_magnitudes(problem, q)
        count = -(-problem.total // shape.columns)
        backward_keys.backward_keys_kernel[(count, problem.batch * k.shape[1])](
            queries, keys, v, k, lse, grad, share, dk, dv,
            **strides("q", queries, "bhtd"), **strides("r", k, "bhsd"),
            **block_lists(problem, shape, by_keys=True), **shared, **shape.arguments(),
        )  # fmt: skip
    if d_phase is not None and score.phase is not None:
        d_phase = d_phase.sum(dim=(0, 2)).to(score.phase)
    if d_slopes is not None and score.slopes is not None:
        d_slopes = d_slopes.sum(dim=(0, 2)).to(score.slopes)
    return Gradients(dq, dk, dv, d_phase, d_slopes)


def _no_gradients(problem: Problem, dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
    score = problem.score
    none = (None if x is None else torch.zeros_like(x) for x in (score.phase, score.slopes))
    return Gradients(dq.zero_(), dk.zero_(), dv.zero_(), *none)


@dataclass(frozen=True)
class Pages:
    """A paged cache.

    Attributes:
        table: ``(B, n)`` int32, the page that holds each run of ``size`` keys.
        lengths: ``(B,)`` int32, keys of each sequence.
        size: Keys a page.
    """

    table: Tensor
    lengths: Tensor
    size: int


def run_decode(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Pages | None = None,
) -> Tensor:
    """Output ``(B, H, T, V)`` of few queries against keys as they lie in a cache.

    Args:
        problem: The call; with pages, ``total`` is the greatest length there may be.
        q: ``(B, H, T, D)``.
        k: ``(B, G, S, D)``, or ``(pages, G, size, D)``.
        v: Alike.
        pages: Where keys lie, if not one after another.
    """
    out = by_length(q, problem.width)
    if out.numel() == 0:
        return out
    q = within_reach(q)
    if pages is None:
        k, v = within_reach(k), within_reach(v)
    heads = k.shape[1]
    rows = problem.groups * problem.length
    shape = decode_shape(problem)
    splits = shape.splits(problem)
    counts = (splits, problem.batch * heads, -(-rows // shape.rows))
    part = q.new_empty(counts[1], splits, rows, problem.width, dtype=torch.float32)
    part_lse = q.new_empty(counts[1], splits, rows, dtype=torch.float32)
    keys_in_order = problem.score.key_positions is None
    with on(q):
        low: tuple[Tensor | None, Tensor | None] = (None, None)
        if problem.turning and keys_in_order:
            low = angle_table(problem, None, shape.columns)
        seen = problem.visibility()
        decode.decode_kernel[counts](
            q,
            k,
            v,
            part,
            part_lse,
            **strides("q", q, "bhtd"),
            **strides("k", k, "bhsd"),
            **strides("v", v, "bhsd"),
            PAGES=None if pages is None else pages.table,
            pages_b=0 if pages is None else pages.table.stride(0),
            page=1 if pages is None else pages.size,
            LENGTHS=None if pages is None else pages.lengths,
            **tables(problem, queries=True),
            LO_COS=low[0],
            LO_SIN=low[1],
            FREQ=problem.freq,
            **problem.learned(),
            **{**seen, "IN_ORDER": seen["IN_ORDER"] or pages is not None},
            **problem.shape(),
            MAGNITUDE=problem.magnitude,
            PART_OF=problem.partly,
            AXES=problem.axes,
            KEYS_IN_ORDER=keys_in_order,
            PAGED=pages is not None,
            **shape.arguments(),
        )
        decode.merge_kernel[(rows, counts[1])](
            part,
            part_lse,
            out,
            problem.heads,
            problem.length,
            problem.width,
            splits,
            GROUPS=problem.groups,
            V2=padded(problem.width),
            SPLITS=max(2, 1 << (splits - 1).bit_length()),
        )
    return out


__all__ = ["KINDS", "Gradients", "Pages", "run_backward", "run_decode", "run_forward"]
