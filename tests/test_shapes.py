"""Law 7: odd lengths, odd widths, nothing to see, memory laid out anyhow, extreme values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import closed_form as cf
import whatwhere as ww
from encoding_cases import SCORES, hot, make_spec, pairs, refusal, tensors

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def backends(kind: str, case: str = "pope", **options: Any) -> pytest.MarkDecorator:
    names = [b for b in ww.BACKENDS if refusal(case, b, kind, **options) is None]
    return pytest.mark.parametrize("backend", names)


def test_memory_is_poisoned_here() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert torch.empty(3, dtype=dtype).isnan().all()
        assert torch.ones(3, dtype=dtype).new_empty(3).isnan().all()


@backends("in_order")
@pytest.mark.parametrize("length", [1, 63, 111, 1000])
def test_odd_lengths(length: int, backend: str) -> None:
    for case in ("pope", "rope"):
        q, k, v = tensors((1, 2, length, 8), (1, 1, length, 8), (1, 1, length, 8))
        spec = make_spec(case, 8, 2)
        got = ww.attention(q, k, v, spec, causal=True, backend=backend)
        same(got, ww.attention(q, k, v, spec, causal=True, backend="reference"))


@backends("in_order")
@pytest.mark.parametrize("length, total", [(1, 1000), (37, 111), (64, 65), (31, 33)])
def test_fewer_queries_than_keys(length: int, total: int, backend: str) -> None:
    q, k, v = tensors((1, 2, length, 8), (1, 2, total, 8), (1, 2, total, 8))
    spec = make_spec("pope", 8, 2)
    for causal in (False, True):
        got = ww.attention(q, k, v, spec, causal=causal, backend=backend)
        same(got, ww.attention(q, k, v, spec, causal=causal, backend="reference"))


@backends("in_order", dtype=torch.float32)
@pytest.mark.parametrize("head_dim", [4, 16, 18, 64, 80, 96, 128, 256])
def test_head_dims(head_dim: int, backend: str) -> None:
    for case in ("pope", "rope", "pope/quarter-magnitude"):
        start = tensors((1, 2, 33, head_dim), (1, 1, 33, head_dim), (1, 1, 33, head_dim))
        q, k, v = (x.float() for x in start)
        spec = make_spec(case, head_dim, 2)
        got = ww.attention(q, k, v, spec, causal=True, backend=backend)
        exact = ww.attention(*start, spec, causal=True, backend="reference")
        assert (got - exact).abs().max() <= 1e-4 * exact.abs().max()


@pairs("in_order")
def test_one_channel_where_the_encoding_allows_it(case: str, backend: str) -> None:
    try:
        spec = make_spec(case, 1, 2)
    except ValueError as error:
        assert "head_dim" in str(error) or "fraction" in str(error)
        return
    q, k, v = tensors((1, 2, 5, 1), (1, 2, 5, 1), (1, 2, 5, 1))
    got = ww.attention(q, k, v, spec, causal=True, backend=backend)
    same(got, ww.attention(q, k, v, spec, causal=True, backend="reference"))


@pairs("in_order", cases=SCORES)
@pytest.mark.parametrize("width", [1, 5, 40])
def test_values_of_another_width(case: str, backend: str, width: int) -> None:
    q, k, v = tensors((2, 2, 6, 16), (2, 1, 6, 16), (2, 1, 6, width))
    spec = make_spec(case, 16, 2)
    out = ww.attention(q, k, v, spec, causal=True, backend=backend)
    assert out.shape == (2, 2, 6, width)
    # One column at a time gives the same: no column leaks into another.
    for column in (0, width - 1):
        alone = ww.attention(
            q, k, v[..., column : column + 1], spec, causal=True, backend="reference"
        )
        same(out[..., column : column + 1], alone)


def hidden_from_some(total: int) -> dict[str, dict[str, Any]]:
    """Calls in which the first two queries of the first sequence see no key."""
    at = torch.arange(total)
    mask = torch.ones(2, total, dtype=torch.bool)
    mask[0, :2] = False
    later = at + 5
    both = torch.stack([at, later + total])
    segments = torch.zeros(2, total, dtype=torch.long)
    return {
        "key_mask": {"causal": True, "key_mask": mask},
        "key_mask and window": {"causal": True, "key_mask": mask, "window": 2},
        "positions": {
            "causal": True,
            "query_positions": torch.stack([at - 2, later]),
            "key_positions": at,
        },
        "window": {
            "causal": True,
            "window": 1,
            "query_positions": both,
            "key_positions": torch.stack([at + (at < 2) * 1000, later + total]),
        },
        "segments": {
            "causal": True,
            "segments": segments,
            "query_positions": torch.stack([at - 2, later]),
            "key_positions": at,
        },
    }


@pairs("masked", "positions", "packed", "windowed")
@pytest.mark.parametrize("hidden", hidden_from_some(6))
def test_a_query_that_sees_nothing_gets_zeros(case: str, backend: str, hidden: str) -> None:
    q, k, v = tensors((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8))
    call = hidden_from_some(6)[hidden]
    out = ww.attention(q, k, v, make_spec(case, 8, 4), backend=backend, **call)
    assert out.isfinite().all()
    assert (out[0, :, :2] == 0).all()
    assert (out[0, :, 2:].abs().amax(-1) > 0).all()
    assert (out[1].abs().amax(-1) > 0).all()


@pairs("masked", "positions", "packed", "windowed", gradient=True)
@pytest.mark.parametrize("hidden", hidden_from_some(6))
def test_a_query_that_sees_nothing_gets_zero_gradient(
    case: str, backend: str, hidden: str
) -> None:
    q, k, v = (x.requires_grad_() for x in tensors((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8)))
    call = hidden_from_some(6)[hidden]
    out = ww.attention(q, k, v, make_spec(case, 8, 4), backend=backend, **call)
    # The gradient that comes in at the rows that see nothing must go nowhere.
    flow = torch.zeros_like(out)
    flow[0, :, :2] = 1e3
    for grad in torch.autograd.grad(out, (q, k, v), flow, retain_graph=True):
        assert (grad == 0).all()
    for grad in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert grad.isfinite().all()


def strided(x: Tensor) -> Tensor:
    """The same numbers in another order of memory, as a projection's transpose leaves them."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pairs("in_order", cases=SCORES)
def test_non_contiguous_inputs(case: str, backend: str) -> None:
    q, k, v = tensors((2, 4, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    spec = hot(make_spec(case, 8, 4))
    wanted = ww.attention(q, k, v, spec, causal=True, backend=backend)
    for change in (strided, lambda x: x.flip(-1).flip(-1), lambda x: x.mT.contiguous().mT):
        odd = [change(x) for x in (q, k, v)]
        same(ww.attention(*odd, spec, causal=True, backend=backend), wanted)
    apart = [torch.stack((x, x + 1), dim=-1)[..., 0] for x in (q, k, v)]
    assert not apart[0].is_contiguous()
    same(ww.attention(*apart, spec, causal=True, backend=backend), wanted)
    # One key and one value for the whole batch, expanded.
    k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    wanted = ww.attention(q, k.clone(), v.clone(), spec, causal=True, backend=backend)
    same(ww.attention(q, k, v, spec, causal=True, backend=backend), wanted)


@pairs("in_order", gradient=True)
def test_gradients_of_non_contiguous_inputs(case: str, backend: str) -> None:
    start = tensors((2, 4, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    spec, flow = make_spec(case, 8, 4), torch.randn(2, 4, 8, 7).double()
    found = []
    for change in (strided, torch.clone):
        leaves = [x.clone().requires_grad_() for x in start]
        out = ww.attention(*map(change, leaves), spec, causal=True, backend=backend)
        found.append(torch.autograd.grad(out, leaves, flow.mT))
    for got, wanted in zip(*found, strict=True):
        same(got, wanted)


@pairs("in_order")
def test_inputs_are_left_as_they_are(case: str, backend: str) -> None:
    start = tensors((2, 4, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    kept = [x.clone() for x in start]
    ww.attention(*start, make_spec(case, 8, 4), causal=True, backend=backend)
    for x, was in zip(start, kept, strict=True):
        assert torch.equal(x, was)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Any call with one axis: shapes, positions, masks, drawn together."""
    batch, groups, key_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3)), 2
    length, total = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    causal = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    call: dict[str, Any] = {"causal": causal}
    if draw(st.booleans()) or length > total:
        row = draw(st.booleans())
        for name, size in (("query_positions", length), ("key_positions", total)):
            at = torch.from_numpy(rng.integers(-3, 9, (batch, size)))
            call[name] = at[0] if row else at
    if draw(st.booleans()):
        call["key_mask"] = torch.from_numpy(rng.random((batch, total)) < 0.6)
    if length <= total and draw(st.booleans()):
        call["segments"] = torch.from_numpy(rng.integers(0, 3, (batch, total)))
    if causal and draw(st.booleans()):
        call["window"] = draw(st.integers(1, 9))
    shapes = [
        (batch, groups * key_heads, length, 4),
        (batch, key_heads, total, 4),
        (batch, key_heads, total, draw(st.integers(1, 6))),
    ]
    call["tensors"] = [torch.from_numpy(rng.standard_normal(shape)) for shape in shapes]
    return call


@pytest.mark.parametrize("case", ["pope", "rope/half", "alibi"])
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(call=calls())
def test_every_backend_equals_a_loop_over_what_is_seen(case: str, call: dict[str, Any]) -> None:
    q, k, v = call.pop("tensors")
    (batch, heads, length, _), total = q.shape, k.shape[2]
    spec = make_spec(case, 4, heads)
    at_q = call.get("query_positions", torch.arange(total - length, total))
    at_k = call.get("key_positions", torch.arange(total))
    scores = ww.scores(q, k, spec, query_positions=at_q, key_positions=at_k)
    shown = {key: x for key, x in call.items() if not key.endswith("positions")}
    visible = cf.seen(
        at_q.expand(batch, length).numpy(),
        at_k.expand(batch, total).numpy(),
        **{key: x.numpy() if isinstance(x, Tensor) else x for key, x in shown.items()},
    )
    wanted = torch.from_numpy(cf.attend(scores.numpy(), v.numpy(), visible))
    ran = []
    for backend in ww.BACKENDS:
        try:
            out = ww.attention(q, k, v, spec, backend=backend, **call)
        except ww.UnsupportedError:
            continue
        ran.append(backend)
        same(out, wanted)
    assert {"reference", "sdpa"} <= set(ran)
