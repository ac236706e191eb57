"""The kernels as operators of PyTorch, so that `torch.compile` calls them without a break."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.triton.problem import Problem, Score, by_length

_ARGUMENTS = 16  # of a `Score`, which operators take one by one


@torch.library.custom_op("whatwhere::flash_forward", mutates_args=())
def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature: str,
    magnitude: str,
    magnitudes: int,
    inv_freq: Tensor | None,
    phase: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    temperature_length: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    causal: bool,
    window: int,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of ``(B, H, T, D)`` queries; the rest is a `Score`, field by field.

    Returns:
        ``(B, H, T, V)`` and the base-2 log-sum-exp ``(B, H, T)``, which the backward pass keeps.
    """
    from whatwhere.attention.triton import launch

    score = Score(
        feature, magnitude, magnitudes, inv_freq, phase, slopes, scale, temperature_length,
        query_positions, key_positions, key_mask, query_segments, key_segments, causal, window,
        tf32,
    )  # fmt: skip
    return launch.run_forward(Problem(q, k, v.shape[-1], k.shape[2], score), q, k, v)


@torch.library.custom_op("whatwhere::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature: str,
    magnitude: str,
    magnitudes: int,
    inv_freq: Tensor | None,
    phase: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    temperature_length: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    causal: bool,
    window: int,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, phase and slopes; empty for the last two where there are none."""
    from whatwhere.attention.triton import launch

    score = Score(
        feature, magnitude, magnitudes, inv_freq, phase, slopes, scale, temperature_length,
        query_positions, key_positions, key_mask, query_segments, key_segments, causal, window,
        tf32,
    )  # fmt: skip
    problem = Problem(q, k, v.shape[-1], k.shape[2], score)
    found = launch.run_backward(problem, grad, q, k, v, out, lse)
    return (
        found.q,
        found.k,
        found.v,
        q.new_empty(0) if found.phase is None else found.phase,
        q.new_empty(0) if found.slopes is None else found.slopes,
    )


@torch.library.custom_op("whatwhere::flash_decode", mutates_args=())
def flash_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature: str,
    magnitude: str,
    magnitudes: int,
    inv_freq: Tensor | None,
    phase: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    temperature_length: int,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_mask: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    causal: bool,
    window: int,
    tf32: bool,
    pages: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    """Few queries against many keys, without gradients.

    Args:
        q: ``(B, H, T, D)``.
        k: ``(B, G, S, D)``, or ``(pages, G, size, D)`` with ``pages``.
        v: Alike.
        pages: ``(B, n)`` int32, pages of each sequence in order.
        lengths: ``(B,)`` int32, with ``pages``.

    The others are the fields of a `Score`.
    """
    from whatwhere.attention.triton import launch

    score = Score(
        feature, magnitude, magnitudes, inv_freq, phase, slopes, scale, temperature_length,
        query_positions, key_positions, key_mask, query_segments, key_segments, causal, window,
        tf32,
    )  # fmt: skip
    if pages is None or lengths is None:
        problem = Problem(q, k, v.shape[-1], k.shape[2], score)
        return launch.run_decode(problem, q, k, v)
    size = k.shape[2]
    problem = Problem(q, k, v.shape[-1], pages.shape[1] * size, score)
    return launch.run_decode(problem, q, k, v, launch.Pages(pages, lengths, size))


@torch.library.custom_op("whatwhere::widen", mutates_args=())
def widen(
    x: Tensor,
    feature: str,
    magnitude: str,
    magnitudes: int,
    inv_freq: Tensor | None,
    phase: Tensor | None,
    temperature_length: int,
    positions: Tensor | None,
    first: int,
) -> Tensor:
    """Features of ``(B, heads, T, D)`` queries or keys, ``R`` wider for magnitudes that turn.

    Args:
        x: Queries or keys.
        feature: This and the next four as in `Score`; no phase and no temperature for keys.
        magnitude: See above.
        magnitudes: See above.
        inv_freq: See above.
        phase: See above.
        temperature_length: See above.
        positions: ``(B or 1, T, A)``, or ``None`` for ``first`` and what follows.
        first: Position of the first row.
    """
    from whatwhere.attention.triton import launch

    return launch.run_widen(
        x, *_prepass(x, feature, magnitude, magnitudes, inv_freq, phase, temperature_length,
                     positions, first)
    )  # fmt: skip


@torch.library.custom_op("whatwhere::narrow", mutates_args=())
def narrow(
    grad: Tensor,
    x: Tensor,
    feature: str,
    magnitude: str,
    magnitudes: int,
    inv_freq: Tensor | None,
    phase: Tensor | None,
    temperature_length: int,
    positions: Tensor | None,
    first: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of `widen` for its tensor and for the phase (empty where there is none)."""
    from whatwhere.attention.triton import launch

    dx, d_phase = launch.run_narrow(
        grad, x, *_prepass(x, feature, magnitude, magnitudes, inv_freq, phase, temperature_length,
                           positions, first)
    )  # fmt: skip
    return dx, x.new_empty(0) if d_phase is None else d_phase


def _prepass(
    x: Tensor,
    feature: str,
    magnitude: str,
    magnitudes: int,
    inv_freq: Tensor | None,
    phase: Tensor | None,
    temperature_length: int,
    positions: Tensor | None,
    first: int,
) -> tuple[Problem]:
    """The problem of which ``x`` is the queries: what turns them is all that is asked of it."""
    score = Score(
        feature, magnitude, magnitudes, inv_freq, phase, None, 1.0, temperature_length,
        positions, positions, None, None, None, False, 0, False,
    )  # fmt: skip
    return (Problem(x, x, x.shape[-1], first + x.shape[2], score),)


@widen.register_fake
def _(
    x: Tensor, feature: str, magnitude: str, magnitudes: int, inv_freq: Tensor, *given: Any
) -> Tensor:
    return by_length(x, x.shape[-1] + (inv_freq.shape[1] if feature == "polar" else 0))


@narrow.register_fake
def _(grad: Tensor, x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    phase = given[4]
    return by_length(x, x.shape[-1]), x.new_empty(0) if phase is None else torch.empty_like(phase)


@flash_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *score: Any) -> tuple[Tensor, Tensor]:
    return by_length(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@flash_backward.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *score: Any
) -> tuple[Tensor, ...]:
    phase, slopes = score[4], score[5]
    return (
        by_length(q, q.shape[-1]),
        by_length(k, k.shape[-1]),
        by_length(v, v.shape[-1]),
        q.new_empty(0) if phase is None else torch.empty_like(phase),
        q.new_empty(0) if slopes is None else torch.empty_like(slopes),
    )


@flash_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *score: Any) -> Tensor:
    return by_length(q, v.shape[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *score = inputs
    ctx.tensors = [i for i, x in enumerate(score) if isinstance(x, Tensor)]
    ctx.plain = [None if isinstance(x, Tensor) else x for x in score]
    ctx.save_for_backward(*output, q, k, v, *(score[i] for i in ctx.tensors))


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    out, lse, q, k, v, *tensors = ctx.saved_tensors
    score = list(ctx.plain)
    for i, x in zip(ctx.tensors, tensors, strict=True):
        score[i] = x
    dq, dk, dv, d_phase, d_slopes = flash_backward(grad, out, lse, q, k, v, *score)
    found: list[Any] = [None] * _ARGUMENTS
    found[4] = None if score[4] is None else d_phase
    found[5] = None if score[5] is None else d_slopes
    return dq, dk, dv, *found


def _keep_given(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *given = inputs
    ctx.tensors = [i for i, value in enumerate(given) if isinstance(value, Tensor)]
    ctx.plain = [None if isinstance(value, Tensor) else value for value in given]
    ctx.save_for_backward(x, *(given[i] for i in ctx.tensors))


def _narrow(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *tensors = ctx.saved_tensors
    given = list(ctx.plain)
    for i, value in zip(ctx.tensors, tensors, strict=True):
        given[i] = value
    dx, d_phase = narrow(grad, x, *given)
    found: list[Any] = [None] * len(given)
    found[4] = None if given[4] is None else d_phase
    return dx, *found


def _differentiate_twice(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "backends 'triton' and 'widened' have no second derivatives: call attention with "
        "backend='reference'"
    )


def _no_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("decoding has no gradients: call whatwhere.attention")


flash_forward.register_autograd(_differentiate, setup_context=_keep)
flash_backward.register_autograd(_differentiate_twice)
flash_decode.register_autograd(_no_gradient)
widen.register_autograd(_narrow, setup_context=_keep_given)
narrow.register_autograd(_differentiate_twice)
