"""Which blocks of keys a block of queries sees, where that hangs on tensors: lists of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from whatwhere.attention.triton.problem import Problem


def lists(problem: Problem, rows: int, columns: int, by_keys: bool) -> tuple[Tensor, ...]:
    """For each block of queries, the blocks of keys it sees, those seen whole first.

    Decided from the bounds of positions and documents in each block: a block in which nothing
    can be seen is in no list and costs nothing; one that may be seen in part is looked at key
    by key.

    Args:
        problem: The call.
        rows: Queries of a block.
        columns: Keys of a block.
        by_keys: Whether to list blocks of queries for each block of keys instead.

    Returns:
        ``(B or 1, m, n)`` int32 indices, ``(B or 1, m)`` how many are whole, and how many in all.
    """
    score = problem.score
    some, whole = _in_range(problem, rows, columns)
    if score.causal:
        q_low, q_high = _bounds(_positions(problem, queries=True), rows)
        k_low, k_high = _bounds(_positions(problem, queries=False), columns)
        some = some & (k_low[:, None, :] <= q_high[:, :, None])
        whole = whole & (k_high[:, None, :] <= q_low[:, :, None])
        if score.window:
            some = some & (k_high[:, None, :] > q_low[:, :, None] - score.window)
            whole = whole & (k_low[:, None, :] > q_high[:, :, None] - score.window)
    if score.query_segments is not None and score.key_segments is not None:
        q_low, q_high = _bounds(score.query_segments.long(), rows)
        k_low, k_high = _bounds(score.key_segments.long(), columns)
        low = torch.maximum(q_low[:, :, None], k_low[:, None, :])
        some = some & (low <= torch.minimum(q_high[:, :, None], k_high[:, None, :]))
        one = (q_low == q_high)[:, :, None] & (k_low == k_high)[:, None, :]
        whole = whole & one & (q_low[:, :, None] == k_low[:, None, :])
    if score.key_mask is not None:
        low, high = _bounds(score.key_mask.long(), columns)
        some = some & (high > 0)[:, None, :]
        whole = whole & (low > 0)[:, None, :]
    if by_keys:
        some, whole = some.mT, whole.mT
    whole = whole & some
    rank = some.to(torch.int8) + whole.to(torch.int8)
    order = rank.argsort(dim=-1, descending=True, stable=True).to(torch.int32).contiguous()
    return order, _count(whole), _count(some)


def _count(blocks: Tensor) -> Tensor:
    return blocks.sum(dim=-1, dtype=torch.int32).contiguous()


def _in_range(problem: Problem, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    m, n = -(-problem.length // rows), -(-problem.total // columns)
    some = torch.ones(1, m, n, dtype=torch.bool, device=problem.device)
    whole = some.clone()
    whole[:, problem.length // rows :] = False
    whole[:, :, problem.total // columns :] = False
    return some, whole


def _positions(problem: Problem, queries: bool) -> Tensor:
    score = problem.score
    given = score.query_positions if queries else score.key_positions
    if given is not None:
        return given[..., 0]
    start = problem.total - problem.length if queries else 0
    return torch.arange(start, problem.total, device=problem.device)[None, :]


def _bounds(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each block of a row; the last block is filled up with its end."""
    missing = -x.shape[1] % size
    if missing:
        x = torch.cat((x, x[:, -1:].expand(-1, missing)), dim=1)
    parts = x.unflatten(1, (-1, size))
    return parts.amin(dim=-1), parts.amax(dim=-1)
