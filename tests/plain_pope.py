"""PoPE's attention straight from its formula, pair by pair; shares no code with the package.

In float64 it is the oracle, with autograd for gradients. The same in float32, angles still taken
in float64, says how far rounding alone takes a result: nothing here is a guessed tolerance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BOUND = 2 * math.pi


def geometric(count: int, base: float = 10000.0) -> Tensor:
    """``base^(-c / count)``, by Python's floats."""
    return torch.tensor([base ** (-c / count) for c in range(count)], dtype=torch.float64)


def softplus(x: Tensor) -> Tensor:
    """``ln(1 + e^x)``."""
    return torch.logaddexp(x, torch.zeros_like(x))


def scores(
    q: Tensor, k: Tensor, angles: Tensor, bias: Tensor, placed: Tensor | None = None
) -> Tensor:
    """``sum_c softplus(q_c) softplus(k_c) cos(a_s - a_t + bias_c)``, raw products for the rest.

    Args:
        q: ``(B, H, T, D)``, the last T of S.
        k: ``(B, G, S, D)``; query head ``i`` uses key head ``i mod G``.
        angles: ``(S, R)`` or ``(B, 1, S, R)`` or ``(B, H, S, R)`` float64.
        bias: ``(H, R)``.
        placed: ``(S,)`` bool: pairs that are not both placed score ``q k``.
    """
    heads, count = q.shape[1], angles.shape[-1]
    k = k[:, [h % k.shape[1] for h in range(heads)]]
    last = k.shape[2] - q.shape[2]
    apart = angles[..., None, :, :] - angles[..., last:, None, :]
    turn = (apart + bias.double()[:, None, None, :]).cos().to(q.dtype)
    size = softplus(q[..., :count])[:, :, :, None] * softplus(k[..., :count])[:, :, None]
    found = (size * turn).sum(-1) + q[..., count:] @ k[..., count:].mT
    if placed is None:
        return found
    both = placed[last:, None] & placed[None]
    return torch.where(both, found, q @ k.mT)


def attend(
    scored: Tensor,
    v: Tensor,
    scale: float,
    seen: Tensor | None = None,
    added: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax over the keys seen; zeros where there is none."""
    v = v[:, [h % v.shape[1] for h in range(scored.shape[1])]]
    length, total = scored.shape[-2:]
    shown = torch.ones(length, total, dtype=torch.bool)
    if causal:
        shown = shown.tril(total - length)
    if seen is not None:
        shown = shown & seen
    logits = scored * scale if added is None else scored * scale + added.to(scored.dtype)
    some = shown.any(-1, keepdim=True)
    logits = torch.where(shown, logits, float("-inf"))
    weights = torch.where(some, logits, 0.0).softmax(-1)
    return torch.where(shown & some, weights, 0.0) @ v


def results(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """An output and the gradients of one fixed functional of it, in float64."""
    flow = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape)
    wanted = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad(out, wanted, flow.to(out.dtype)) if wanted else ()
    return [x.detach().double() for x in (out, *found)]


def off(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Largest error of each, relative to the largest that is wanted."""
    return [
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))
        for a, b in zip(got, wanted, strict=True)
    ]


def within(
    got: list[Tensor],
    wanted: list[Tensor],
    rounded: list[Tensor],
    dtype: torch.dtype,
    largest: float = 0.0,
) -> None:
    """Errors are at most twice those of the same formula in ``dtype``, and a few roundings.

    Those of float64 angles, of which the ``largest`` is given, are absolute.
    """
    few = 16 * (torch.finfo(dtype).eps + torch.finfo(torch.float64).eps * largest)
    for error, allowed in zip(off(got, wanted), off(rounded, wanted), strict=True):
        assert error <= 2 * allowed + few, (error, allowed)


def case(dtype: torch.dtype, seed: int = 0, **sizes: int) -> dict[str, Any]:
    """q, k, v and a phase, the numbers of one seed in any dtype."""
    n = {"B": 2, "H": 4, "G": 4, "T": 7, "S": 7, "D": 16, "V": 16, "R": 16} | sizes
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=draw, dtype=torch.float64).float()
        return x.to(dtype).requires_grad_()

    bias = -BOUND * torch.rand(n["H"], n["R"], generator=draw, dtype=torch.float64)
    return {
        "q": normal(n["B"], n["H"], n["T"], n["D"]),
        "k": normal(n["B"], n["G"], n["S"], n["D"]),
        "v": normal(n["B"], n["G"], n["S"], n["V"]),
        "bias": bias.float().to(dtype).requires_grad_(),
    }
