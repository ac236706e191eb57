"""What the tests of the Triton backends share: inputs, outcomes, the budget of errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import whatwhere as ww
from encoding_cases import refusal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        refusal("pope", "triton", "in_order", dtype=torch.float32) is not None and DEVICE == "cpu",
        reason="no GPU, and Triton is not interpreted",
    ),
]
both = pytest.mark.parametrize("backend", ["triton", "widened"])
EPS = torch.finfo(torch.float32).eps


def qkv(
    *shape: int, keys: int | None = None, groups: int = 1, value: int | None = None
) -> list[Tensor]:
    """``(B, H, T, D)`` queries and what belongs to them."""
    batch, heads, length, dim = shape
    total, kv = keys or length, heads // groups
    sizes = (shape, (batch, kv, total, dim), (batch, kv, total, value or dim))
    return [torch.randn(size, device=DEVICE) for size in sizes]


def learnable(spec: ww.ScoreSpec) -> ww.ScoreSpec:
    given = {"phase": spec.phase, "slopes": spec.slopes}
    return replace(
        spec,
        **{name: x.clone().requires_grad_() for name, x in given.items() if x is not None},
    )


def outcome(
    inputs: list[Tensor], spec: ww.ScoreSpec, backend: str, double: bool = False, **call: Any
) -> list[Tensor]:
    """Output and all gradients, under the same random slope."""
    start = [(x.detach().double() if double else x.detach()).requires_grad_() for x in inputs]
    spec = learnable(spec)
    if double:
        wide = {
            name: x.detach().double().requires_grad_()
            for name in ("phase", "slopes")
            if (x := getattr(spec, name)) is not None
        }
        spec = replace(spec, **wide)
    out = ww.attention(*start, spec, backend=backend, **call)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    wanted = [*start, *(x for x in (spec.phase, spec.slopes) if x is not None)]
    return [out.detach(), *torch.autograd.grad(out, wanted, slope)]


def check(inputs: list[Tensor], spec: ww.ScoreSpec, backend: str, **call: Any) -> None:
    """Within twice the reference's float32 error, plus rounding; all finite."""
    exact = outcome(inputs, spec, "reference", double=True, **call)
    plain = outcome(inputs, spec, "reference", **call)
    found = outcome(inputs, spec, backend, **call)
    rounding = EPS * (1 + math.sqrt(inputs[1].shape[2]) / 2)
    # Where a gradient cancels to 0, as with one key alone, what is rounded is not.
    floor = 4 * EPS * max(x.norm() for x in exact)
    for got, near, right in zip(found, plain, exact, strict=True):
        allowed = 2 * (near - right).norm() + rounding * right.norm() + floor
        assert (got - right).norm() <= allowed
