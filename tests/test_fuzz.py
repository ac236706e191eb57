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
from fuzz_cases import DTYPES, LEARNED, NAN, Case, Made, cases, make

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
    Case(slopes=True, batch=0, wanted=("slopes",)),
    Case(name="pope", batch=0, wanted=("phase",)),
    Case(name="pope", total=0, given_at="q", wanted=("phase",)),
)


def once_wrong(test: Any) -> Any:
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
    wide = [x.double() for x in made.shown()]
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


@pytest.mark.parametrize("backend", FAST)
def test_any_call_is_within_rounding_of_float64(backend: str) -> None:
    count = {"flex": 120}.get(backend, 1500)

    @fuzz(count)
    @once_wrong
    @given(case=cases(TAKEN[backend]))
    def run(case: Case) -> None:
        check(case, backend)

    run()


@pytest.mark.parametrize("backend", SLOW)
def test_any_small_call_is_within_rounding_of_float64(backend: str) -> None:
    @fuzz(100)
    @once_wrong
    @given(case=cases(TAKEN[backend], most=40, heads=3))
    def run(case: Case) -> None:
        check(case, backend)

    run()
