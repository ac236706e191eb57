"""Any call, on every backend, is within rounding of the reference in float64.

``WHATWHERE_FUZZ=20`` draws 20 times as many calls, other ones each time; without it the calls are
the same on every run.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

import whatwhere as ww
from encoding_cases import BACKENDS, refusal
from error_bounds import bounds, widest
from fuzz_cases import DTYPES, SOFTCAPS, Case, Made, cases, make
from fuzz_layouts import NAN

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TIMES = int(os.environ.get("WHATWHERE_FUZZ", "1"))
TAKEN = {
    backend: tuple(
        name
        for name, dtype in DTYPES.items()
        if refusal("nope", backend, "full", dtype=dtype) is None
    )
    for backend in BACKENDS
    if backend != "reference"
}
TAKEN = {backend: dtypes for backend, dtypes in TAKEN.items() if dtypes}
# Kernels in Triton's interpreter, which know no float64, take a hundred times as long.
SLOW = [backend for backend, dtypes in TAKEN.items() if "float64" not in dtypes]
FAST = [backend for backend in TAKEN if backend not in SLOW]


# Calls that once were wrong somewhere.
FOUND = (
    # A batch of none: nothing reached slopes, so that they could not be differentiated.
    Case(dtype="float32", slopes=True, batch=0, wanted=("slopes",)),
    Case(dtype="float32", batch=0, wanted=("phase",)),
    Case(dtype="float32", total=0, given_at="q", wanted=("phase",)),
    # Sequences at the same places share cos and sin, but their temperatures were not shared.
    Case(
        dtype="float32", given=(("temperature_length", 1),), batch=2, given_at="qk", by_batch=True
    ),
    # NaN in masked keys and in slots of a cache that are not written came through.
    Case(dtype="float32", total=40, hidden="half", poison=True),
    Case(dtype="float32", total=40, causal=True, given_at="q", places="duplicates", poison=True),
    # cos and sin of a phase kept in bfloat16, as a cast model keeps it, were bfloat16 too.
    Case(dtype="float32", learned="bfloat16", total=10, dim=8),
)


def once_wrong(test: Any) -> Any:
    """With an ``@example`` of each."""
    for case in FOUND:
        test = example(case=case)(test)
    return test


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        phases=[p for p in Phase if p is not Phase.explain],
        suppress_health_check=list(HealthCheck),
    )


def results(
    made: Made, wanted: tuple[str, ...], backend: str, double: bool = False
) -> dict[str, Tensor]:
    """The output and the gradients wanted, of tensors as they lie in memory."""
    leaves = dict(zip("qkv", made.held, strict=True))
    spec = widest(made.spec) if double else made.spec
    leaves |= {n: x for n in ("phase", "slopes") if (x := getattr(spec, n)) is not None}
    if double:
        leaves = {name: x.double() for name, x in leaves.items()}
    leaves = {n: x.detach().clone().requires_grad_(n in wanted) for n, x in leaves.items()}
    q, k, v = (
        see(leaves[name], shape)
        for name, see, shape in zip("qkv", made.show, made.shapes, strict=True)
    )
    learned = {name: leaves[name] for name in ("phase", "slopes") if name in leaves}
    spec = replace(spec, **learned)
    out = ww.attention(q, k, v, spec, backend=backend, **made.call)
    assert out.dtype == q.dtype
    assert out.shape == made.flow.shape
    found = {"out": out.detach()}
    names = [name for name in wanted if name in leaves]
    if names:
        flow = made.flow.to(out.dtype)
        gradients = torch.autograd.grad(
            out, [leaves[name] for name in names], flow, allow_unused=True
        )
        for name, x in zip(names, gradients, strict=True):
            found[name] = torch.zeros_like(leaves[name]) if x is None else x
            assert found[name].dtype == leaves[name].dtype
    return found


def check(case: Case, backend: str) -> None:
    if case.wanted and backend == "widened":
        # Its pre-pass differentiates features of keys by themselves, hidden ones too.
        case = replace(case, poison=False)
    try:
        made = make(case)
    except ValueError:  # options that contradict one another
        reject()
    why = refused(made, case.wanted, backend)
    if why is not None:
        with pytest.raises(ww.UnsupportedError) as caught:
            results(made, case.wanted, backend)
        assert str(caught.value) == why
        assert "\n" not in why
        return
    exact = results(made, case.wanted, "reference", double=True)
    found = results(made, case.wanted, backend)
    dtype = DTYPES[case.dtype]
    wide = [x.double().nan_to_num(0.0) for x in made.shown()]
    flow = made.flow.double() if len(exact) > 1 else None
    allowed = bounds(*wide, made.spec, made.call, dtype, flow)
    assert found.keys() == exact.keys()
    for name, right in exact.items():
        off = (found[name].double() - right).abs()
        limit: Any = getattr(allowed, name)
        if name != "out":
            # Views of one number many times add their gradients up; a result is rounded once.
            shape = dict(zip("qkv", made.shapes, strict=True)).get(name, right.shape)
            times = max(1, torch.Size(shape).numel() // max(right.numel(), 1))
            last = torch.finfo(found[name].dtype).eps * right.abs()
            limit = limit * times + last * (1 + times)
        assert (off <= limit).all(), (name, (off - limit).max().item(), off.max().item())


def refused(made: Made, wanted: tuple[str, ...], backend: str) -> str | None:
    """What `explain` says against it."""
    q, k, v = (
        x.requires_grad_(name in wanted) for name, x in zip("qkv", made.shown(), strict=True)
    )
    learned = {
        name: x.clone().requires_grad_(name in wanted)
        for name in ("phase", "slopes")
        if (x := getattr(made.spec, name)) is not None
    }
    spec = replace(made.spec, **learned)
    try:
        told = ww.explain(q, k, v, spec, backend=backend, **made.call)
    except ww.UnsupportedError as error:
        return str(error)
    assert told.backend == backend
    return None


def softcaps(backend: str) -> tuple[float | None, ...]:
    """Those it takes: calls that are refused would check nothing else."""
    q = torch.zeros(1, 1, 2, 2)
    spec = ww.ScoreSpec("identity", 1.0, softcap=1.0)
    return (None,) if backend in ww.explain(q, q, q, spec).refused else SOFTCAPS


@pytest.mark.parametrize("backend", FAST)
def test_any_call_is_within_rounding_of_float64(backend: str) -> None:
    count = {"flex": 70}.get(backend, 1500)

    @fuzz(count)
    @once_wrong
    @given(case=cases(TAKEN[backend], softcaps=softcaps(backend)))
    def run(case: Case) -> None:
        check(case, backend)

    run()


@pytest.mark.parametrize("backend", SLOW)
def test_any_small_call_is_within_rounding_of_float64(backend: str) -> None:
    @fuzz(60)
    @once_wrong
    @given(case=cases(TAKEN[backend], most=36, heads=2, softcaps=softcaps(backend)))
    def run(case: Case) -> None:
        check(case, backend)

    run()


@fuzz(150)
@given(case=cases(tuple(DTYPES)))
def test_auto_is_the_backend_that_explain_names(case: Case) -> None:
    try:
        made = make(case)
    except ValueError:
        reject()
    q, k, v = made.shown()
    told = ww.explain(q, k, v, made.spec, **made.call)
    assert "\n" not in told.reason
    out, named = (
        ww.attention(q, k, v, made.spec, backend=name, **made.call)
        for name in ("auto", told.backend)
    )
    assert torch.equal(out, named)
    for backend in BACKENDS:
        why = refused(made, (), backend)
        assert (why is not None) == (backend in told.refused)
        assert why is None or told.refused[backend] in why


@st.composite
def caches(draw: st.DrawFn, backend: str) -> dict[str, Any]:
    """A paged cache: pages in any order, lengths from nothing to full, odd sizes."""
    batch, page, count = draw(st.integers(0, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    return {
        "page": page,
        "count": count,
        "lengths": [draw(st.integers(0, page * count)) for _ in range(batch)],
        "beyond": draw(st.sampled_from([0, -1, 10**6])),
        "index": draw(st.sampled_from([torch.int32, torch.int64])),
        "case": Case(
            seed=draw(st.integers(0, 2**31)),
            name=draw(st.sampled_from(list(ww.ENCODINGS))),
            given=draw(st.sampled_from([(), (("temperature_length", 3),)])),
            slopes=draw(st.booleans()),
            softcap=draw(st.sampled_from(softcaps(backend))),
            batch=batch,
            shared=draw(st.integers(1, 2)),
            groups=draw(st.integers(1, 3)),
            length=draw(st.sampled_from([1, 1, 2, 5])),
            total=page * count,
            dim=2 * draw(st.integers(1, 9)),
            width=draw(st.integers(1, 9)),
            layouts=(draw(st.sampled_from(["plain", "lengths first"])), "plain", "plain"),
            window=draw(st.sampled_from([None, 1, 5])),
            given_at="q",
            causal=True,
        ),
    }


def check_pages(cache: dict[str, Any], backend: str, dtype: str) -> None:
    case = replace(cache["case"], dtype=dtype)
    try:
        made = make(case)
    except ValueError:
        reject()
    q, k, v = made.shown()
    batch, page, count = case.batch, cache["page"], cache["count"]
    generator = torch.Generator().manual_seed(case.seed)
    lengths = torch.tensor(cache["lengths"], dtype=torch.int64)
    there = torch.arange(case.total) < lengths[:, None]
    # Pages are shuffled among more of them; what is not written is NaN.
    at = torch.randperm(batch * count + 2, generator=generator)[: batch * count]
    pages = []
    for x in (k, v):
        held = torch.full((batch * count + 2, case.shared, page, x.shape[3]), NAN, dtype=x.dtype)
        shown = x.masked_fill(~there[:, None, :, None], NAN)
        held[at] = shown.unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1)
        pages.append(held)
    used = torch.arange(count) * page < lengths[:, None]
    table = at.view(batch, count).masked_fill(~used, cache["beyond"]).to(cache["index"])
    try:
        found = ww.paged_attention(
            q, *pages, made.spec, block_table=table, lengths=lengths.to(cache["index"]),
            window=case.window, backend=backend,
        )  # fmt: skip
    except ww.UnsupportedError as error:
        assert "empty" in str(error)
        assert batch == 0
        return
    call = {
        "causal": True,
        "query_positions": lengths[:, None] - case.length + torch.arange(case.length),
        "key_positions": torch.arange(case.total),
        "key_mask": there,
        "window": case.window,
    }
    wide = [x.double() for x in (q, k, v)]
    exact = ww.attention(*wide, widest(made.spec), backend="reference", **call)
    off = (found.double() - exact).abs()
    assert (off <= bounds(*wide, made.spec, call, DTYPES[dtype], None).out).all()


@pytest.mark.parametrize("backend", ["auto", *TAKEN])
def test_pages_are_the_cache_they_hold(backend: str) -> None:
    dtypes = TAKEN.get(backend, tuple(DTYPES))

    @fuzz({"flex": 30}.get(backend, 20 if backend in SLOW else 150))
    @given(cache=caches(backend), dtype=st.sampled_from(dtypes))
    def run(cache: dict[str, Any], dtype: str) -> None:
        check_pages(cache, backend, dtype)

    run()
