"""Attention by blocks of query rows: two operators that take raw queries and keys.

Features, up to ``2 D`` wide, are made for a few heads at a time and forgotten; the backward pass
makes them again, and the weights too, so that nothing but queries, keys and values is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.cpu.blocks import Block, Plan, distances, unseen
from whatwhere.attention.cpu.problem import ARGUMENTS, Problem, Turn

# Scores held at a time: what stays in a core's cache.
_SCORES = 2**19

# Numbers of features that are held at a time at the most, for however many threads.
_MOST = 2**24


def block_rows(total: int, groups: int) -> int:
    """Rows of a block, a row for each head that shares a key head.

    Few, so that little is computed beyond the diagonal; not too few, for matrix units.
    """
    return max(8, (32 if total < 512 else 64) // groups)


def held_features(total: int) -> int:
    """Numbers of features that are held at a time: scratch that is used again from a cache."""
    return 2**19 if total < 512 else 2**20


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some heads of some sequences, their features made.

    Attributes:
        batch: Of the sequences.
        heads: Of the key heads.
        queries: Of the query heads.
        q: ``(n, T, H/G, F)``, ``n`` sequences times key heads.
        k: ``(n, S, F)``.
        v: ``(n, S, V)``.
        turn: How ``q`` was made.
    """

    batch: slice
    heads: slice
    queries: slice
    q: Tensor
    k: Tensor
    v: Tensor
    turn: Turn


def chunks(p: Problem, plan: Plan, dead: Tensor | None) -> Iterator[Chunk]:
    """All heads of all sequences, as many at a time as fit a cache."""
    batch, length, total, shared = p.q.shape[0], p.q.shape[2], p.k.shape[2], p.k.shape[1]
    scores = plan.size * p.groups * plan.widest()
    features = (length * p.groups + total) * p.width
    fit = min(_SCORES // max(scores, 1), held_features(total) // max(features, 1))
    # A head for each thread if scratch stays small: threads that share a product wait for another.
    fit = max(1, fit, min(torch.get_num_threads(), _MOST // max(features, 1)))
    several = max(1, fit // shared)
    # Sequences that see different keys go one by one: together they would look at the keys of all.
    several = several if plan.plain or several * plan.widest() <= 1024 else 1
    for g in range(0, shared, fit):
        heads = slice(g, min(g + fit, shared))
        for b in range(0, batch, several):
            yield _chunk(p, slice(b, min(b + several, batch)), heads, dead)


def _chunk(p: Problem, batch: slice, heads: slice, dead: Tensor | None) -> Chunk:
    queries = slice(heads.start * p.groups, heads.stop * p.groups)
    k, v = p.k[batch, heads], p.v[batch, heads]
    sizes, count = k.shape[:2], k.shape[0] * k.shape[1]
    made = torch.empty(*sizes, k.shape[2], p.width, dtype=p.dtype)
    p.turn_of_keys(batch, slice(None)).make(k, made)
    values = v.to(p.product).contiguous()
    if dead is not None:
        hidden = dead[slice(None) if dead.shape[0] == 1 else batch, None, :, None]
        made.masked_fill_(hidden, 0.0)
        values = values.masked_fill(hidden, 0.0)
    turn = p.turn_of_queries(batch, queries)
    rows = torch.empty(count, p.q.shape[2], p.groups, p.width, dtype=p.dtype)
    turn.make(_by_group(p, p.q[batch, queries]), _as_given(rows, sizes))
    return Chunk(batch, heads, queries, rows, made.flatten(0, 1), values.flatten(0, 1), turn)


def _by_group(p: Problem, x: Tensor) -> Tensor:
    """``(b, h, T, F)`` with its heads as ``(b, g, H/G, T, F)``."""
    apart: Tensor = x.unflatten(1, (-1, p.groups))
    return apart


def _as_given(rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """``(n, T, H/G, F)`` seen as ``(b, g, H/G, T, F)``."""
    apart: Tensor = rows.unflatten(0, sizes)
    return apart.transpose(2, 3)


def _scores(p: Problem, chunk: Chunk, block: Block) -> Tensor:
    """A block's scores, slopes and mask not yet counted: ``(n, rows H/G, keys)``."""
    queries = chunk.q[:, block.rows].flatten(1, 2)
    return p.cap(torch.bmm(queries, chunk.k[:, block.keys].mT))


def _weights(p: Problem, chunk: Chunk, block: Block, scores: Tensor) -> Tensor:
    """Softmax of a block's scores, in their place."""
    sequences = chunk.batch.stop - chunk.batch.start
    rows = block.rows.stop - block.rows.start
    apart = scores.view(sequences, -1, rows, p.groups, scores.shape[-1])
    if p.slopes is not None:
        slopes = p.slopes[chunk.queries].to(p.dtype).view(1, -1, 1, p.groups, 1)
        apart.addcmul_(_ahead(p, chunk, block), slopes, value=-1)
    for part, hidden in block.edges:
        apart[..., part].masked_fill_(hidden[:, None, :, None], float("-inf"))
    torch.softmax(scores, dim=-1, out=scores)
    if block.blind is not None:
        apart.masked_fill_(block.blind[:, None, :, None, None], 0.0)
    return scores


def _ahead(p: Problem, chunk: Chunk, block: Block) -> Tensor:
    """``t - s``: ``(b or 1, 1, rows, 1, keys)``."""
    return distances(p, chunk.batch, block.rows, block.keys).to(p.dtype)[:, None, :, None]


def attend(*given: Any) -> Tensor:
    """Attention for a `Problem`: ``(B, H, T, V)``."""
    p = Problem(*given)
    q, k, v = p.q, p.k, p.v
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    if not out.numel():
        return out
    plan = Plan(p, block_rows(k.shape[2], p.groups))
    for chunk in chunks(p, plan, unseen(p)):
        result = _as_given(
            torch.empty(*chunk.q.shape[:3], v.shape[-1], dtype=p.dtype),
            (chunk.batch.stop - chunk.batch.start, chunk.heads.stop - chunk.heads.start),
        )
        for block in plan.blocks(chunk.batch):
            target = result[:, :, :, block.rows]
            if block.keys.start == block.keys.stop:
                target.zero_()
                continue
            weights = _weights(p, chunk, block, _scores(p, chunk, block))
            found = torch.bmm(weights.to(p.product), chunk.v[:, block.keys])
            rows = block.rows.stop - block.rows.start
            target.copy_(found.view(*target.shape[:2], rows, p.groups, -1).transpose(2, 3))
        out[chunk.batch, chunk.queries] = result.flatten(1, 2)
    return out


def attend_backward(grad: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for queries, keys, values, phase and slopes.

    The last two are empty where there is nothing to give.

    Args:
        grad: Of the output.
        *given: The fields of a `Problem`, and whether slopes are learned.
    """
    *fields, learned = given
    p = Problem(*fields)
    found = Gradients(p, learned)
    if not grad.numel():
        found.zero()
        return found.all()
    plan, dead = Plan(p, block_rows(p.k.shape[2], p.groups)), unseen(p)
    for chunk in chunks(p, plan, dead):
        found.add(chunk, plan, grad)
    if dead is not None:
        for x in (found.k, found.v):
            x.masked_fill_(dead[:, None, :, None], 0.0)
    return found.all()


class Gradients:
    """Gradients of a `Problem`, filled chunk by chunk in a fixed order."""

    def __init__(self, p: Problem, learned: bool) -> None:
        self.problem, self.learned = p, learned
        self.q, self.k, self.v = (x.new_empty(x.shape) for x in (p.q, p.k, p.v))
        self.phase = p.q.new_zeros(0 if p.phase is None else p.phase.shape, dtype=p.dtype)
        known = p.slopes is not None and learned
        self.slopes = p.q.new_zeros(p.q.shape[1] if known else 0, dtype=p.dtype)

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order of the operator."""
        p = self.problem
        phase, slopes = (
            x if like is None else x.to(like.dtype)
            for x, like in ((self.phase, p.phase), (self.slopes, p.slopes))
        )
        return self.q, self.k, self.v, phase, slopes

    def zero(self) -> None:
        """Where there is nothing to attend to."""
        for x in (self.q, self.k, self.v):
            x.zero_()

    def add(self, chunk: Chunk, plan: Plan, grad: Tensor) -> None:
        """The part of some heads of some sequences."""
        p = self.problem
        sizes = (chunk.batch.stop - chunk.batch.start, chunk.heads.stop - chunk.heads.start)
        slope = torch.empty(*chunk.q.shape[:3], grad.shape[-1], dtype=p.product)
        _as_given(slope, sizes).copy_(_by_group(p, grad[chunk.batch, chunk.queries]))
        of_q = torch.empty_like(chunk.q)
        of_k, of_v = torch.zeros_like(chunk.k), torch.zeros_like(chunk.v, dtype=p.dtype)
        keys, queries = chunk.k.to(p.product), chunk.q.to(p.product)
        for block in plan.blocks(chunk.batch):
            if block.keys.start == block.keys.stop:
                of_q[:, block.rows].zero_()
                continue
            scores = _scores(p, chunk, block)
            tanh = scores / p.softcap if p.softcap else None
            weights = _weights(p, chunk, block, scores)
            given = slope[:, block.rows].flatten(1, 2)
            _accumulate(of_v[:, block.keys], weights.to(p.product), given)
            change = torch.bmm(given, chunk.v[:, block.keys].mT).to(p.dtype)
            torch.ops.aten._softmax_backward_data.out(
                change, weights, -1, p.dtype, grad_input=change
            )
            if self.slopes.numel():
                self._add_slopes(chunk, block, change)
            if tanh is not None:
                torch.ops.aten.tanh_backward.grad_input(change, tanh, grad_input=change)
            change = change.to(p.product)
            rows = torch.bmm(change, keys[:, block.keys])
            of_q[:, block.rows] = rows.view_as(of_q[:, block.rows])
            _accumulate(of_k[:, block.keys], change, queries[:, block.rows].flatten(1, 2))
        back = _as_given(of_q, sizes)
        if p.phase is not None:
            made = chunk.turn.phase_gradient(_as_given(chunk.q, sizes), back)
            self.phase[chunk.queries] += made
        raw = chunk.turn.back(_by_group(p, p.q[chunk.batch, chunk.queries]), back)
        self.q[chunk.batch, chunk.queries] = raw.flatten(1, 2)
        turn = p.turn_of_keys(chunk.batch, slice(None))
        self.k[chunk.batch, chunk.heads] = turn.back(
            p.k[chunk.batch, chunk.heads], of_k.unflatten(0, sizes)
        )
        self.v[chunk.batch, chunk.heads] = of_v.unflatten(0, sizes)

    def _add_slopes(self, chunk: Chunk, block: Block, change: Tensor) -> None:
        p = self.problem
        rows = block.rows.stop - block.rows.start
        sequences = chunk.batch.stop - chunk.batch.start
        apart = change.view(sequences, -1, rows, p.groups, change.shape[-1])
        fall = (apart * _ahead(p, chunk, block)).sum(dim=(0, 2, 4))
        self.slopes[chunk.queries] -= fall.flatten()


def _accumulate(total: Tensor, by_row: Tensor, rows: Tensor) -> None:
    """``total += by_row^T rows``, the sum in the dtype of ``total``."""
    if rows.dtype == total.dtype:
        total.baddbmm_(by_row.mT, rows)
    else:
        total += torch.bmm(by_row.mT, rows)


_operator = partial(torch.library.custom_op, mutates_args=(), device_types="cpu")
rows_forward = _operator("whatwhere::rows_forward", schema=f"({ARGUMENTS}) -> Tensor")(attend)
rows_backward = _operator(
    "whatwhere::rows_backward",
    schema=f"(Tensor grad, {ARGUMENTS}, bool learned) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)(attend_backward)


@rows_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


@rows_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    phase, slopes, learned = rest[1], rest[2], rest[-1]
    return (
        *(q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
        q.new_empty(0) if phase is None else phase.new_empty(phase.shape),
        slopes.new_empty(slopes.shape) if slopes is not None and learned else q.new_empty(0),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.rest = inputs[10:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    found = rows_backward(grad, *ctx.saved_tensors, *ctx.rest, bool(wanted[5]))
    q, k, v, phase, slopes = found
    given = (q, k, v, None, phase if wanted[4] else None, slopes if wanted[5] else None)
    return *given, *(None,) * 12


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "backend 'cpu' has no second derivatives: call attention with backend='reference'"
    )


rows_forward.register_autograd(_differentiate, setup_context=_keep)
rows_backward.register_autograd(_differentiate_twice)


class EagerRows(torch.autograd.Function):
    """The same outside of `torch.compile`: an operator's first call would import the compiler."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        """As `attend`."""
        return attend(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """As the operator."""
        _keep(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """As the operator."""
        wanted = ctx.needs_input_grad
        found = EagerRowsBackward.apply(grad, *ctx.saved_tensors, *ctx.rest, bool(wanted[5]))
        q, k, v, phase, slopes = found
        given = (q, k, v, None, phase if wanted[4] else None, slopes if wanted[5] else None)
        return *given, *(None,) * 12


class EagerRowsBackward(torch.autograd.Function):
    """The backward pass, which has none of its own."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """As `attend_backward`."""
        return attend_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        """Refuses."""
        _differentiate_twice(ctx, *grads)
