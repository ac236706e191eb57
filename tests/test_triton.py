"""Backends `triton` and `widened` where the laws and budgets do not look.

Without a GPU this runs in Triton's interpreter, in float32 and float16 (bfloat16 is wrong there):
values are what a device would give but for the order of sums; races and limits of memory are not
seen. benchmarks/compile_check.py compiles the same kernels for real devices.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import whatwhere as ww
from encoding_cases import CASES, KINDS, SCORES, hot, make_spec
from triton_cases import DEVICE, EPS, both, check, learnable, needs_triton, outcome, qkv
from whatwhere.attention.call import prepare
from whatwhere.attention.triton import arguments, blocks, launch, ops, widened
from whatwhere.attention.triton.problem import Problem, Score

pytestmark = needs_triton

SHAPES = {
    "one token": ((1, 1, 1, 16), {}),
    "odd": ((2, 1, 63, 20), {"value": 33}),
    "few queries of many keys": ((1, 2, 19, 32), {"keys": 111}),
    "groups": ((1, 6, 40, 16), {"groups": 3}),
    "one key head": ((1, 5, 33, 24), {"groups": 5, "value": 8}),
    "wide": ((1, 1, 33, 112), {"value": 80}),
    "no batch": ((0, 2, 5, 16), {}),
}


@both
@pytest.mark.parametrize("case", ["pope", "pope/quarter-raw", "rope/half", "alibi"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, case: str, backend: str) -> None:
    sizes, more = SHAPES[shape]
    spec = hot(make_spec(case, sizes[3], sizes[1]), 9)
    check(qkv(*sizes, **more), spec, backend, causal=True)


@both
@pytest.mark.slow
@pytest.mark.parametrize("dim", [16, 48, 64, 128, 256])
def test_head_dims(dim: int, backend: str) -> None:
    spec = make_spec("pope", dim, 1)
    inputs = qkv(1, 1, 17, dim)
    call = prepare(*inputs, spec, True, None, None, None, None, None)
    if ww.BACKENDS[backend].refuses(call) is None:
        check(inputs, spec, backend, causal=True)
    else:
        assert backend == "widened"
        assert dim == 256


@pytest.mark.parametrize("case", SCORES)
@pytest.mark.parametrize("kind", ["packed", "windowed", "positions"])
def test_gradients_of_every_kind_of_mask(kind: str, case: str) -> None:
    inputs = qkv(1, 2, 70, 16, groups=2)
    call = {
        name: x.to(DEVICE) if isinstance(x, Tensor) else x
        for name, x in KINDS[kind](1, 70).items()
    }
    check(inputs, hot(make_spec(case, 16, 2), 30), "triton", **call)


@both
def test_all_masks_at_once(backend: str) -> None:
    total = 75
    call = {
        "causal": True,
        "window": 20,
        "key_mask": torch.rand(2, total, device=DEVICE) < 0.8,
        "segments": torch.randint(0, 3, (2, total), device=DEVICE).cumsum(-1) // 20,
        "query_positions": torch.arange(total, device=DEVICE) * 2,
        "key_positions": torch.arange(total, device=DEVICE) * 2,
    }
    check(qkv(2, 2, total, 16), hot(make_spec("pope", 16, 2), 30), backend, **call)


@both
def test_any_strides_and_gradients_that_are_expanded(backend: str) -> None:
    """Channels two apart, heads innermost, keys in reverse memory: no copies, no surprises."""
    spec = make_spec("pope/quarter-raw", 16, 2)
    plain = qkv(2, 2, 35, 16)
    apart = torch.zeros(2, 2, 35, 32, device=DEVICE)
    apart[..., ::2] = plain[0]
    inner = plain[1].permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    lengths = plain[2].transpose(1, 2).contiguous().transpose(1, 2)
    odd = [x.detach().requires_grad_() for x in (apart[..., ::2], inner, lengths)]
    even = [x.clone().requires_grad_() for x in plain]
    found = []
    for inputs in (odd, even):
        out = ww.attention(*inputs, spec, causal=True, backend=backend)
        found.append([out, *torch.autograd.grad(out.sum(), inputs)])
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)


# What nobody sees may be anything


@both
@pytest.mark.parametrize("case", ["pope", "rope/half", "nope"])
def test_masked_keys_may_hold_nan(case: str, backend: str) -> None:
    inputs, spec = qkv(2, 2, 40, 16), make_spec(case, 16, 2)
    seen = torch.rand(2, 40, device=DEVICE) < 0.6
    clean = outcome(inputs, spec, backend, causal=True, key_mask=seen)
    hidden = ~seen[:, None, :, None]
    poisoned = [inputs[0], *(x.masked_fill(hidden, math.nan) for x in inputs[1:])]
    found = outcome(poisoned, spec, backend, causal=True, key_mask=seen)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


def test_blocks_of_other_documents_are_not_read() -> None:
    """Poison in a document leaves others alone, where block boundaries allow to see it."""
    inputs, spec = qkv(1, 1, 192, 16), make_spec("pope", 16, 1)
    segments = (torch.arange(192, device=DEVICE) // 64)[None]
    clean = outcome(inputs, spec, "triton", causal=True, segments=segments)
    inputs[1][:, :, :64] = inputs[2][:, :, :64] = math.nan
    found = outcome(inputs, spec, "triton", causal=True, segments=segments)
    assert found[0][:, :, :64].isnan().all()
    for a, b in zip(found[:4], clean[:4], strict=True):
        assert torch.equal(a[:, :, 64:], b[:, :, 64:])


def test_blocks_before_a_window_are_not_read() -> None:
    inputs, spec = qkv(1, 1, 192, 16), make_spec("pope", 16, 1)
    call = {"causal": True, "window": 32}
    clean = outcome(inputs, spec, "triton", **call)
    inputs[1][:, :, :32] = inputs[2][:, :, :32] = math.nan
    found = outcome(inputs, spec, "triton", **call)
    assert torch.equal(found[0][:, :, 128:], clean[0][:, :, 128:])
    assert torch.equal(found[2][:, :, 128:], clean[2][:, :, 128:])


@pytest.mark.parametrize("kind", ["masked", "packed", "positions"])
@pytest.mark.parametrize("by_keys", [False, True])
def test_lists_of_blocks_hold_what_is_seen_and_no_more(kind: str, by_keys: bool) -> None:
    length, rows, columns = 100, 16, 8
    inputs, spec = qkv(3, 1, length, 16), make_spec("pope", 16, 1)
    given = KINDS[kind](3, length)
    filled = {"query_positions": None, "key_positions": None, "key_mask": None, "segments": None}
    call = prepare(*(x.cpu() for x in inputs), spec, **{**filled, "window": None, **given})
    problem = Problem(call.q, call.k, 16, length, Score(*arguments.of(call)))
    order, whole, count = blocks.lists(problem, rows, columns, by_keys)
    from whatwhere.attention.masks import visible

    seen = visible(call)
    assert seen is not None
    seen = seen[:, 0]
    size = (rows, columns)
    m, n = (-(-length // s) for s in size)
    wide = torch.zeros(seen.shape[0], m * rows, n * columns, dtype=torch.bool)
    wide[:, :length, :length] = seen
    tiles = wide.unflatten(1, (m, rows)).unflatten(3, (n, columns)).transpose(2, 3)
    some, every = tiles.any(-1).any(-1), tiles.all(-1).all(-1)
    if by_keys:
        some, every = some.mT, every.mT
    for b in range(seen.shape[0]):
        for i in range(some.shape[1]):
            at = min(b, order.shape[0] - 1)
            listed = set(order[at, i, : count[at, i]].tolist())
            full = set(order[at, i, : whole[at, i]].tolist())
            assert set(some[b, i].nonzero().flatten().tolist()) <= listed
            assert full <= set(every[b, i].nonzero().flatten().tolist())
    if kind == "packed":  # documents lie one after another: bounds are exact
        assert int(count.sum()) <= int(some.sum()) * 1.35


# Numbers


def problem_of(q: Tensor, spec: ww.ScoreSpec, **call: Any) -> Problem:
    given = {"query_positions": None, "key_positions": None, **call}
    made = prepare(q, q, q, spec, False, key_mask=None, segments=None, window=None, **given)
    return Problem(q, q, q.shape[-1], q.shape[2], Score(*arguments.of(made)))


@pytest.mark.parametrize("start", [0, 10**7, 2**24 - 40, 2**40])
def test_angles_are_exact_at_any_position(start: int) -> None:
    spec = make_spec("pope", 64, 1)
    assert spec.inv_freq is not None
    at = torch.arange(start, start + 40, device=DEVICE)
    q = torch.zeros(1, 1, 40, 64, device=DEVICE)
    problem = problem_of(q, spec, query_positions=at, key_positions=at)
    cos, sin = launch.angle_table(problem, at.view(1, -1, 1), 40)
    angles = at.double()[:, None] * spec.inv_freq.to(DEVICE)
    # Float64 itself knows an angle of 2^40 rad only to 2^-13.
    allowed = 2e-7 + start * 2**-51
    assert (cos[0].double() - angles.cos()).abs().max() <= allowed
    assert (sin[0].double() - angles.sin()).abs().max() <= allowed
    if start < 2**30:
        drawn = launch.angle_table(problem, None, 40, first=start)
        assert all(torch.equal(a, b) for a, b in zip(drawn, (cos, sin), strict=True))


def test_small_magnitudes_keep_their_digits() -> None:
    """PoPE-pytorch's ``log(1 + exp x)`` is 0 from -17 on in float32."""
    x = torch.linspace(-70, 70, 4096, device=DEVICE).view(1, 1, 64, 64)
    problem = problem_of(x, make_spec("pope", 64, 1))
    found = launch.as_magnitudes(problem, x).double()
    wanted = torch.nn.functional.softplus(x.double(), threshold=1000)
    assert wanted.min() < 1e-30
    # e^x is as good as x itself: an argument of 70 is off by 70 halves of eps.
    assert ((found - wanted).abs() <= 2 * (4 + x.double().abs()) * EPS * wanted).all()


@both
def test_half_precision_leaves_float32_inputs_alone(backend: str) -> None:
    inputs = [x.half() for x in qkv(1, 2, 40, 16)]
    out = ww.attention(*inputs, make_spec("pope", 16, 2), causal=True, backend=backend)
    assert out.dtype == torch.float16


# As operators


def operands() -> tuple[Any, ...]:
    inputs, spec = qkv(1, 2, 20, 16), make_spec("pope", 16, 2)
    assert spec.phase is not None
    spec = replace(spec, phase=spec.phase.requires_grad_())
    call = prepare(*inputs, spec, True, None, None, None, None, None)
    return (*(x.requires_grad_() for x in inputs), *arguments.of(call))


def test_operators_keep_the_rules_of_operators() -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.flash_forward, operands(), test_utils=tests)
    given = operands()
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in given)
    torch.library.opcheck(ops.flash_decode, (*plain, None, None), test_utils=tests)
    q, spec = given[0], given[3:]
    widen = (q, *spec[:5], 0, None, 0)
    torch.library.opcheck(ops.widen, widen, test_utils=tests)


@both
def test_compiled_whole_without_a_recompilation_for_each_length(backend: str) -> None:
    spec = make_spec("pope", 16, 2)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(
        lambda q, k, v: ww.attention(q, k, v, spec, causal=True, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend=aot_autograd(fw_compiler=count),
    )
    for length in (18, 25, 40):
        inputs = [x.requires_grad_() for x in qkv(1, 2, length, 16)]
        out = compiled(*inputs)
        found = torch.autograd.grad(out.sum(), inputs)
        wanted = torch.autograd.grad(
            ww.attention(*inputs, spec, causal=True, backend=backend).sum(), inputs
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(graphs) <= 2  # a forward and a backward


@both
def test_no_second_derivative_and_a_message_that_says_so(backend: str) -> None:
    inputs = [x.requires_grad_() for x in qkv(1, 1, 20, 16)]
    out = ww.attention(*inputs, make_spec("pope", 16, 1), backend=backend, window=9, causal=True)
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        torch.autograd.grad(first[0].sum(), inputs)


def test_features_are_not_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def keep(x: Any) -> Any:
        kept.append(x)
        return x

    # Hooks do not nest, so those of `widened` are watched from within.
    make = widened._forgetful

    def watched(*given: Any) -> Any:
        pack, unpack = make(*given)
        return lambda x: keep(pack(x)), unpack

    monkeypatch.setattr(widened, "_forgetful", watched)
    for backend in ("triton", "widened"):
        kept.clear()
        inputs, spec = qkv(1, 2, 64, 16), learnable(make_spec("pope", 16, 2))
        start = [x.requires_grad_() for x in inputs]
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with hooks if backend == "triton" else nullcontext():
            ww.attention(*start, spec, causal=True, backend=backend)
        tensors = [x for x in kept if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == 64]
        assert len(tensors) >= 2
        if backend == "triton":
            assert max(x.shape[-1] for x in tensors) == 16
        else:  # a recipe each for the features of queries and of keys
            assert sum(not isinstance(x, Tensor) for x in kept) == 2


def test_what_is_refused_says_what_would_do() -> None:
    inputs = [x.double() for x in qkv(1, 1, 4, 16)]
    for backend in ("triton", "widened"):
        with pytest.raises(ww.UnsupportedError, match=r"float64.*reference"):
            ww.attention(*inputs, make_spec("pope", 16, 1), backend=backend)
    wide = qkv(1, 1, 4, 272)
    with pytest.raises(ww.UnsupportedError, match="256"):
        ww.attention(*wide, make_spec("pope", 272, 1), backend="triton")


def test_cases_cover_every_encoding() -> None:
    assert set(ww.ENCODINGS) <= set(CASES)


# What others may do to tensors between the passes


def test_saved_tensors_may_come_back_in_another_layout() -> None:
    inputs, spec = qkv(1, 2, 40, 16), make_spec("pope", 16, 2)
    plain = outcome(inputs, spec, "triton", causal=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        found = outcome(inputs, spec, "triton", causal=True)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@both
def test_what_the_backward_pass_needs_must_not_be_changed_in_place(backend: str) -> None:
    q, k, v = qkv(1, 1, 20, 16)
    v.requires_grad_()
    out = ww.attention(q, k, v, make_spec("pope", 16, 1), causal=True, backend=backend)
    q.zero_()
    with pytest.raises(RuntimeError, match=r"in.?place"):
        out.sum().backward()


@both
def test_positions_may_lie_in_any_order_of_memory(backend: str) -> None:
    inputs, spec = qkv(2, 1, 20, 16), hot(make_spec("pope/temperature", 16, 1), 4)
    at = torch.arange(20, device=DEVICE).repeat(2, 1) * 3
    call = {"causal": True, "backend": backend, "key_positions": at}
    wanted = ww.attention(*inputs, spec, query_positions=at, **call)
    other = at.t().contiguous().t()
    assert torch.equal(ww.attention(*inputs, spec, query_positions=other, **call), wanted)


def test_a_window_of_the_greatest_integer_is_none() -> None:
    inputs, spec = qkv(1, 1, 40, 16), make_spec("pope", 16, 1)
    wide = outcome(inputs, spec, "triton", causal=True, window=2**31 - 1)
    none = outcome(inputs, spec, "triton", causal=True)
    for a, b in zip(wide, none, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_tf32_may_be_asked_for_in_pytorchs_new_way(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    q = qkv(1, 1, 4, 16)[0]
    try:
        assert not arguments.tf32(q)
        matmul.fp32_precision = "tf32"
        assert arguments.tf32(q)
        assert not arguments.tf32(q.half())
    finally:
        matmul.fp32_precision = before


def test_strides_beyond_32_bits_are_copied() -> None:
    x = torch.empty(1, device="meta").as_strided((1, 3, 5, 16), (0, 2**30, 16, 1))
    assert launch.within_reach(x).stride(1) == 16
    near = torch.empty(1, device="meta").as_strided((1, 3, 5, 16), (0, 2**29, 16, 1))
    assert launch.within_reach(near) is near
