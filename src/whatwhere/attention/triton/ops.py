"""The kernels as operators of PyTorch, so that `torch.compile` calls them without a break."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.triton.problem import Problem, Score, by_length

# The fields of a `Score`, which operators take one by one.
_TURNS = "str feature, str magnitude, int magnitudes, Tensor? inv_freq, Tensor? phase"
_SCORE = (
    f"{_TURNS}, Tensor? slopes, float scale, int temperature_length, Tensor? query_positions, "
    "Tensor? key_positions, Tensor? key_mask, Tensor? query_segments, Tensor? key_segments, "
    "bool causal, int window, bool tf32"
)
_FIELDS = 16
_PHASE, _SLOPES = 4, 5  # where in a score


@torch.library.custom_op(
    "whatwhere::flash_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_SCORE}) -> (Tensor, Tensor)",
)
def flash_forward(q: Tensor, k: Tensor, v: Tensor, *score: Any) -> tuple[Tensor, Tensor]:
    """Attention of ``(B, H, T, D)`` queries; ``score`` is a `Score`, field by field.

    Returns:
        ``(B, H, T, V)`` and the base-2 log-sum-exp ``(B, H, T)``, which the backward pass keeps.
    """
    from whatwhere.attention.triton import launch

    return launch.run_forward(Problem(q, k, v.shape[-1], k.shape[2], Score(*score)), q, k, v)


@torch.library.custom_op(
    "whatwhere::flash_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, {_SCORE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def flash_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *score: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, phase and slopes; empty for the last two where there are none."""
    from whatwhere.attention.triton import launch

    problem = Problem(q, k, v.shape[-1], k.shape[2], Score(*score))
    found = launch.run_backward(problem, grad, q, k, v, out, lse)
    return (
        found.q,
        found.k,
        found.v,
        q.new_empty(0) if found.phase is None else found.phase,
        q.new_empty(0) if found.slopes is None else found.slopes,
    )


@torch.library.custom_op(
    "whatwhere::flash_decode",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_SCORE}, Tensor? pages, Tensor? lengths) -> Tensor",
)
def flash_decode(q: Tensor, k: Tensor, v: Tensor, *given: Any) -> Tensor:
    """Few queries against many keys, without gradients.

    Args:
        q: ``(B, H, T, D)``.
        k: ``(B, G, S, D)``, or ``(pages, G, size, D)`` with pages.
        v: Alike.
        *given: The fields of a `Score`; pages of each sequence in order, ``(B, n)`` int32, and
            their lengths, ``(B,)`` int32, or ``None`` twice.
    """
    from whatwhere.attention.triton import launch

    *score, pages, lengths = given
    if pages is None or lengths is None:
        problem = Problem(q, k, v.shape[-1], k.shape[2], Score(*score))
        return launch.run_decode(problem, q, k, v)
    size = k.shape[2]
    problem = Problem(q, k, v.shape[-1], pages.shape[1] * size, Score(*score))
    return launch.run_decode(problem, q, k, v, launch.Pages(pages, lengths, size))


_PREPASS = f"{_TURNS}, int temperature_length, Tensor? positions, int first"


@torch.library.custom_op(
    "whatwhere::widen", mutates_args=(), schema=f"(Tensor x, {_PREPASS}) -> Tensor"
)
def widen(x: Tensor, *given: Any) -> Tensor:
    """Features of ``(B, heads, T, D)`` queries or keys, ``R`` wider for magnitudes that turn.

    Args:
        x: Queries or keys.
        *given: The first five fields of a `Score` and its ``temperature_length`` (no phase and no
            temperature for keys); positions ``(B or 1, T, A)``, or ``None`` for the next one,
            the position of the first row, and what follows.
    """
    from whatwhere.attention.triton import launch

    return launch.run_widen(x, _prepass(x, *given))


@torch.library.custom_op(
    "whatwhere::narrow",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, {_PREPASS}) -> (Tensor, Tensor)",
)
def narrow(grad: Tensor, x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """Gradients of `widen` for its tensor and for the phase (empty where there is none)."""
    from whatwhere.attention.triton import launch

    dx, d_phase = launch.run_narrow(grad, x, _prepass(x, *given))
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
) -> Problem:
    """The problem of which ``x`` is the queries: what turns them is all that is asked of it."""
    score = Score(
        feature, magnitude, magnitudes, inv_freq, phase, None, 1.0, temperature_length,
        positions, positions, None, None, None, False, 0, False,
    )  # fmt: skip
    return Problem(x, x, x.shape[-1], first + x.shape[2], score)


@widen.register_fake
def _(
    x: Tensor, feature: str, magnitude: str, magnitudes: int, inv_freq: Tensor, *given: Any
) -> Tensor:
    return by_length(x, x.shape[-1] + (inv_freq.shape[1] if feature == "polar" else 0))


@narrow.register_fake
def _(grad: Tensor, x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    phase = given[_PHASE]
    return by_length(x, x.shape[-1]), x.new_empty(0) if phase is None else phase.new_empty(
        phase.shape
    )


@flash_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *score: Any) -> tuple[Tensor, Tensor]:
    return by_length(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@flash_backward.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *score: Any
) -> tuple[Tensor, ...]:
    phase, slopes = score[_PHASE], score[_SLOPES]
    return (
        by_length(q, q.shape[-1]),
        by_length(k, k.shape[-1]),
        by_length(v, v.shape[-1]),
        q.new_empty(0) if phase is None else phase.new_empty(phase.shape),
        q.new_empty(0) if slopes is None else slopes.new_empty(slopes.shape),
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
    found: list[Any] = [None] * _FIELDS
    found[_PHASE] = None if score[_PHASE] is None else d_phase
    found[_SLOPES] = None if score[_SLOPES] is None else d_slopes
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
    found[_PHASE] = None if given[_PHASE] is None else d_phase
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
