"""PoPE's delta: where it starts, its bounds, and a gradient that never dies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import whatwhere as ww

BOUND = 2 * math.pi
# float32(2 pi) lies 1.7e-7 beyond 2 pi.
SLACK = 2e-7
MAKERS: dict[str, Callable[..., Any]] = {
    "pope": lambda **options: ww.PoPE(8, 2, **options),
    "pope half": lambda **options: ww.PoPE(8, 2, fraction=0.5, **options),
    "pope half raw": lambda **options: ww.PoPE(8, 2, fraction=0.5, rest="raw", **options),
    "pope axes": lambda **options: ww.PoPE(8, 2, axes=(4, 2), **options),
    "pope-id": lambda **options: ww.PoPEID(8, 2, train_length=128, **options),
}
TURNING = {"pope": 8, "pope half": 4, "pope half raw": 4, "pope axes": 6, "pope-id": 4}
every_maker = pytest.mark.parametrize("label", MAKERS)


def attend(encoding: ww.Encoding, q: Tensor) -> Tensor:
    at: dict[str, Any] = {}
    spec = encoding()
    if spec.num_axes == 2:
        grid = ww.grid(1, q.shape[2])
        at = {"query_positions": grid, "key_positions": grid}
    return ww.attention(q, q.flip(2), q, spec, causal=spec.num_axes == 1, **at)


@every_maker
def test_starts_at_zero_for_each_head_and_channel(label: str) -> None:
    encoding = MAKERS[label]()
    assert encoding.delta.shape == (2, TURNING[label])
    assert encoding.delta.requires_grad
    assert (encoding.delta == 0).all()
    assert list(encoding.state_dict()) == ["delta"]


@every_maker
def test_none_has_no_parameter_and_scores_as_zero_does(label: str) -> None:
    without, zero = MAKERS[label](delta=None), MAKERS[label](delta="zero")
    assert list(without.parameters()) == []
    assert list(without.state_dict()) == []
    assert without().phase is None
    q = torch.randn(1, 2, 5, 8)
    torch.testing.assert_close(attend(without, q), attend(zero, q))


def test_uniform_start_fills_its_range() -> None:
    encoding = ww.PoPE(64, 256, delta="uniform")
    drawn = encoding.delta.detach().double()
    assert drawn.min() >= -BOUND
    assert drawn.max() <= 0
    # Kolmogorov-Smirnov distance of 16384 draws from uniform: above 0.0153 once in a thousand.
    ranks = torch.arange(1, drawn.numel() + 1).double() / drawn.numel()
    distance = ((drawn.flatten().sort().values + BOUND) / BOUND - ranks).abs().max()
    assert distance < 0.0153
    before = encoding.delta.detach().clone()
    encoding.reset_parameters()
    assert not torch.equal(encoding.delta, before)
    torch.manual_seed(3)
    encoding.reset_parameters()
    again = ww.PoPE(64, 256, delta="uniform")
    torch.manual_seed(3)
    again.reset_parameters()
    assert torch.equal(encoding.delta, again.delta)


@every_maker
def test_reset_brings_zero_back(label: str) -> None:
    encoding = MAKERS[label]()
    with torch.no_grad():
        encoding.delta.fill_(-1.0)
    encoding.reset_parameters()
    assert (encoding.delta == 0).all()


@every_maker
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_stays_within_its_bounds(label: str, context: Callable[[], Any]) -> None:
    encoding = MAKERS[label]()
    with torch.no_grad():
        encoding.delta.copy_(
            torch.linspace(-20, 20, encoding.delta.numel()).view_as(encoding.delta)
        )
    wanted = encoding.delta.detach().clamp(-BOUND, 0)
    with context():
        phase = encoding().phase
    assert phase is not None
    torch.testing.assert_close(phase[:, : TURNING[label]].detach(), wanted)
    assert (phase[:, TURNING[label] :] == 0).all()


@every_maker
def test_projection_is_in_place(label: str) -> None:
    encoding = MAKERS[label]()
    parameter, place = encoding.delta, encoding.delta.data_ptr()
    with torch.no_grad():
        parameter.fill_(3.0)
    encoding.project_()
    assert encoding.delta is parameter
    assert parameter.data_ptr() == place
    assert parameter.max() <= 0
    assert parameter.requires_grad
    with torch.no_grad():
        parameter.fill_(-9.0)
    encoding.project_()
    assert parameter.min() >= -BOUND - SLACK
    inside = torch.rand_like(parameter) * -BOUND
    with torch.no_grad():
        parameter.copy_(inside)
    encoding.project_()
    assert torch.equal(parameter, inside)


def test_projection_of_others_does_nothing() -> None:
    encoding = ww.Learned(4, 2, train_length=5)
    before = encoding.weight.detach().clone()
    encoding.project_()
    assert torch.equal(encoding.weight, before)


@pytest.mark.parametrize("bound, outward", [(0.0, 1.0), (-BOUND, -1.0)])
@every_maker
def test_comes_back_from_either_bound_at_once(label: str, bound: float, outward: float) -> None:
    """The optimiser steps out, the gradient reverses: one step back is one step back."""
    encoding = MAKERS[label]()
    with torch.no_grad():
        encoding.delta.fill_(bound)
    optimizer = torch.optim.SGD(encoding.parameters(), lr=1.0)

    def step(direction: float, size: float) -> None:
        optimizer.zero_grad()
        phase = encoding().phase
        assert phase is not None
        (-direction * size * phase[:, : TURNING[label]]).sum().backward()
        assert encoding.delta.grad is not None
        torch.testing.assert_close(
            encoding.delta.grad, torch.full_like(encoding.delta, -direction * size)
        )
        optimizer.step()

    for _ in range(3):
        step(outward, 5.0)
    step(-outward, 0.25)
    phase = encoding().phase
    assert phase is not None
    wanted = torch.full_like(encoding.delta, bound - outward * 0.25)
    torch.testing.assert_close(phase[:, : TURNING[label]].detach(), wanted)


@every_maker
@pytest.mark.parametrize("value", [0.0, -BOUND, 1.0, -8.0])
def test_gradient_at_and_beyond_a_bound_is_that_of_the_bounded_phase(
    label: str, value: float
) -> None:
    q = torch.randn(1, 2, 6, 8)
    found = []
    for start in (value, min(max(value, -BOUND), 0.0) + (1e-4 if value < -1 else -1e-4)):
        encoding = MAKERS[label]()
        with torch.no_grad():
            encoding.delta.fill_(start)
        attend(encoding, q).square().sum().backward()
        assert encoding.delta.grad is not None
        found.append(encoding.delta.grad)
    assert found[0].abs().max() > 1e-4
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    encoding = ww.PoPE(8, 2, delta="uniform")
    start = torch.randn(1, 2, 6, 8)
    found = []
    for recompute in (False, True):
        encoding.zero_grad()
        q = start.clone().requires_grad_()
        if recompute:
            out = checkpoint(lambda q: attend(encoding, q), q, use_reentrant=reentrant)
        else:
            out = attend(encoding, q)
        out.square().sum().backward()
        assert encoding.delta.grad is not None
        found.append((q.grad, encoding.delta.grad.clone()))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("value", [0.5, -1.0, -7.0])
def test_compiled_calls_bound_and_train_delta_too(value: float) -> None:
    encoding = ww.PoPE(8, 2)
    compiled = torch.compile(
        lambda q: attend(encoding, q), fullgraph=True, backend="aot_eager", dynamic=False
    )
    q = torch.randn(1, 2, 6, 8)
    found = []
    for run in (lambda q: attend(encoding, q), compiled):
        with torch.no_grad():
            encoding.delta.fill_(value)
        encoding.zero_grad()
        out = run(q)
        out.square().sum().backward()
        assert encoding.delta.grad is not None
        assert encoding.delta.grad.abs().max() > 0
        encoding.project_()
        assert encoding.delta.min() >= -BOUND - SLACK
        assert encoding.delta.max() <= 0
        found.append((out.detach(), encoding.delta.grad.clone()))
    torch.testing.assert_close(found[1], found[0])


def test_compiled_once_follows_an_optimiser_out_and_back() -> None:
    encoding = ww.PoPE(8, 2)
    phase = torch.compile(lambda: encoding().phase, fullgraph=True, backend="aot_eager")
    for value, wanted in ((-1.0, -1.0), (4.0, 0.0), (-0.5, -0.5), (-30.0, -BOUND)):
        with torch.no_grad():
            encoding.delta.fill_(value)
        torch.testing.assert_close(phase().detach(), torch.full((2, 8), wanted))


def test_a_functional_copy_is_bounded_too() -> None:
    """As sharded training and `torch.func` do it: the parameter used is not the one stored."""
    encoding = ww.PoPE(8, 2)
    given = torch.full((2, 8), 2.0, requires_grad=True)
    spec = torch.func.functional_call(encoding, {"delta": given.clone()}, ())
    assert (spec.phase == 0).all()
    spec.phase.sum().backward()
    assert given.grad is not None
    assert (given.grad == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_model_keeps_delta_bounded_and_trained(dtype: torch.dtype) -> None:
    encoding = ww.PoPE(8, 2).to(dtype)
    with torch.no_grad():
        encoding.delta.fill_(-100.0)
    spec = encoding()
    assert spec.phase is not None
    assert spec.phase.min().item() >= -BOUND * (1 + torch.finfo(dtype).eps)
    attend(encoding, torch.randn(1, 2, 5, 8).to(dtype)).sum().backward()
    assert encoding.delta.grad is not None
    assert encoding.delta.grad.dtype == dtype
    assert encoding.delta.grad.isfinite().all()


def test_a_checkpoint_round_trips_and_one_out_of_bounds_is_bounded() -> None:
    encoding, other = ww.PoPE(8, 2, delta="uniform"), ww.PoPE(8, 2)
    other.load_state_dict(encoding.state_dict())
    assert torch.equal(other.delta, encoding.delta)
    other.load_state_dict({"delta": torch.full((2, 8), 7.0)})
    phase = other().phase
    assert phase is not None
    assert (phase == 0).all()


def test_calling_twice_before_backward_is_allowed() -> None:
    """Layers may share an encoding; projection must not disturb a graph that exists."""
    encoding = ww.PoPE(8, 2)
    with torch.no_grad():
        encoding.delta.fill_(0.5)
    q = torch.randn(1, 2, 5, 8)
    (attend(encoding, q) + attend(encoding, q)).sum().backward()
    assert encoding.delta.grad is not None


def test_delta_is_a_plain_parameter_of_the_model_around_it() -> None:
    model = nn.ModuleList([ww.PoPE(8, 2), ww.RoPE(8, 2), ww.PoPEID(8, 2, train_length=100)])
    assert [name for name, _ in model.named_parameters()] == ["0.delta", "2.delta"]
    assert list(model.buffers()) == []
