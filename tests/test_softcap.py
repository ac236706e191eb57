"""Softcap, ``cap * tanh(score / cap)`` before slopes and masks, on every backend that takes it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import closed_form as cf
import whatwhere as ww
from encoding_cases import CASES, KINDS, hot, make, make_spec, tensors
from whatwhere.attention import choices

pytestmark = pytest.mark.usefixtures("poisoned_memory")

B, H, G, D, V = 2, 4, 2, 16, 5
# Against scores of about 1 in size: most are at the cap, most are bent, and hardly any is.
CAPS = (0.2, 1.5, 50.0)
TAKING, REFUSING = ("flex", "cpu"), ("sdpa", "triton", "widened")


def capped(case: str, cap: float, dim: int = D, heads: int = H) -> ww.ScoreSpec:
    return replace(hot(make_spec(case, dim, heads), 40), softcap=cap)


def results(
    spec: ww.ScoreSpec, given: tuple[Tensor, ...], gradient: bool, **call: Any
) -> list[Tensor]:
    """The output and, if wanted, gradients for inputs and all that may be learned."""
    learned = {
        name: x.detach().double().requires_grad_(gradient)
        for name in ("phase", "slopes")
        if (x := getattr(spec, name)) is not None
    }
    leaves = [x.detach().clone().requires_grad_(gradient) for x in given]
    out = ww.attention(*leaves, replace(spec, **learned), **call)
    if not gradient:
        return [out]
    flow = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, (*leaves, *learned.values()), flow)]


def same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for x, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-9, atol=1e-10)


# What it means

FORMULAS: dict[str, Callable[[np.ndarray | None], cf.PairScore]] = {
    "nope": lambda delta: cf.nope,
    "alibi": lambda delta: cf.nope,
    "rope": lambda delta: cf.rope(cf.geometric(D // 2)),
    "pope": lambda delta: cf.pope(cf.geometric(D), delta),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("case", FORMULAS)
def test_scores_and_attention_by_the_formula(case: str, cap: float) -> None:
    spec = capped(case, cap)
    delta = None if spec.phase is None else spec.phase.double().numpy()
    raw = FORMULAS[case](delta)
    slopes = cf.alibi_slopes(H) if case == "alibi" else [0.0] * H

    def score(q: cf.Vector, k: cf.Vector, t: float, s: float, head: int) -> float:
        scaled = raw(q, k, t, s, head) / math.sqrt(D)
        return cap * math.tanh(scaled / cap) - slopes[head] * (t - s)

    q, k, v = tensors((B, H, 4, D), (B, G, 6, D), (B, G, 6, V))
    at_q, at_k = [9, 0, 3, 5], [4, 5, 0, 2, 12, 3]
    wanted = cf.all_scores(score, q.numpy(), k.numpy(), at_q, at_k)
    places = {"query_positions": torch.tensor(at_q), "key_positions": torch.tensor(at_k)}
    got = ww.scores(q, k, spec, **places)
    same([got], [torch.from_numpy(wanted)])
    visible = cf.seen(np.array([at_q] * B), np.array([at_k] * B), causal=True)
    right = torch.from_numpy(cf.attend(wanted, v.numpy(), visible))
    for backend in ("reference", *TAKING):
        out = ww.attention(q, k, v, spec, causal=True, backend=backend, **places)
        same([out], [right])


@pytest.mark.parametrize("case", ["pope", "pope/quarter-raw", "rope", "alibi"])
def test_gradcheck_of_the_reference(case: str) -> None:
    q, k, v = (x.requires_grad_() for x in tensors((1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 2)))
    spec = capped(case, 0.8, 4, 2)
    learned = {
        name: x.detach().double().requires_grad_()
        for name in ("phase", "slopes")
        if (x := getattr(spec, name)) is not None
    }
    call: dict[str, Any] = {
        "causal": True,
        "query_positions": torch.tensor([0, 6, 9]),
        "key_positions": torch.tensor([9, 2, 7, 1]),
        "backend": "reference",
    }

    def run(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        inner = replace(spec, **dict(zip(learned, given, strict=True)))
        return ww.attention(q, k, v, inner, **call)

    assert torch.autograd.gradcheck(run, (q, k, v, *learned.values()))


@pytest.mark.parametrize("backend", ["reference", *TAKING])
def test_a_cap_beyond_every_score_is_none(backend: str) -> None:
    """``tanh`` bends a score x by a third of x (x / cap)^2."""
    q, k, v = tensors((B, H, 7, D), (B, G, 7, D), (B, G, 7, V))
    spec = make_spec("pope", D, H)
    plain = ww.attention(q, k, v, spec, causal=True, backend=backend)
    far = replace(spec, softcap=1e6)
    got = ww.attention(q, k, v, far, causal=True, backend=backend)
    torch.testing.assert_close(got, plain, rtol=1e-8, atol=1e-9)


# Backends against the reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", TAKING)
@pytest.mark.parametrize("case", CASES)
def test_every_score_and_mask(case: str, backend: str, kind: str) -> None:
    q, k, v = tensors((B, H, 9, D), (B, G, 9, D), (B, G, 9, V))
    call = KINDS[kind](B, 9)
    gradient = backend != "flex"
    for cap in CAPS:
        spec = capped(case, cap)
        same(*(results(spec, (q, k, v), gradient, backend=b, **call)
               for b in (backend, "reference")))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["pope", "pope/quarter-raw", "rope/half", "alibi"])
def test_several_blocks_of_rows(case: str, kind: str) -> None:
    given = tensors((B, H, 70, D), (B, G, 150, D), (B, G, 150, V))
    call = KINDS[kind](B, 150)
    if "query_positions" in call:
        call["query_positions"] = call["query_positions"][:, -70:]
    spec = capped(case, 1.5)
    same(*(results(spec, given, True, backend=b, **call) for b in ("cpu", "reference")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["pope", "pope/temperature", "rope", "alibi", "nope"])
def test_few_queries_against_a_cache(case: str, kind: str) -> None:
    spec = capped(case, 1.5)
    for length in (1, 5):
        q, k, v = tensors((B, H, length, D), (B, G, 150, D), (B, G, 150, V))
        call = KINDS[kind](B, 150)
        if "query_positions" in call:
            call["query_positions"] = call["query_positions"][:, -length:]
        wanted = results(spec, (q, k, v), False, backend="reference", **call)
        same(results(spec, (q, k, v), False, backend="cpu", **call), wanted)
        shown = ww.unturned(q, spec), ww.unturned(k, spec), v
        same(results(spec.unturned(), shown, False, backend="cpu", **call), wanted)


@pytest.mark.slow
def test_the_compiled_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, decode = (
        importlib.import_module(f"whatwhere.attention.cpu.{name}")
        for name in ("compiled", "decode")
    )
    monkeypatch.setenv("WHATWHERE_COMPILE", "1")
    loop = compiled.Loop()
    monkeypatch.setattr(decode, "LOOP", loop)
    q, k, v = tensors((B, H, 1, D), (B, G, 300, D), (B, G, 300, V), dtype=torch.float32)
    for cap in CAPS:
        spec = capped("pope", cap)
        got, wanted = (
            ww.attention(q, k, v, spec, causal=True, backend=b) for b in ("cpu", "reference")
        )
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert loop.run is not None
    assert not loop.broken


@pytest.mark.parametrize("backend", ["auto", "reference", *TAKING])
def test_compiles_whole_and_anew_for_another_cap(backend: str) -> None:
    torch.compiler.reset()
    encoding = make("pope", D, H).double()
    gradient = backend != "flex"
    encoding.requires_grad_(gradient)

    def step(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
        spec = replace(encoding(), softcap=cap)
        return ww.attention(q, k, v, spec, causal=True, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    start = tensors((B, H, 9, D), (B, G, 9, D), (B, G, 9, V))
    for cap in CAPS:
        found = []
        for function in (step, compiled):
            leaves = [x.clone().requires_grad_(gradient) for x in start]
            out = function(*leaves, cap)
            found.append([out.detach()])
            if gradient:
                trained = (*leaves, *encoding.parameters())
                found[-1] += torch.autograd.grad(out.square().sum(), trained)
        same(*found)


def test_one_graph_serves_a_growing_cache() -> None:
    torch.compiler.reset()
    spec = capped("pope", 1.5)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ww.attention(q, k, v, spec, causal=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    q, k, v = tensors((1, H, 1, D), (1, G, 40, D), (1, G, 40, D))
    for total in range(20, 25):
        part = q, k[:, :, :total], v[:, :, :total]
        same([compiled(*part)], [step(*part)])


# Who takes it


@pytest.mark.parametrize("backend", REFUSING)
def test_the_others_say_that_they_have_none(backend: str) -> None:
    q, k, v = tensors((1, H, 3, D), (1, G, 3, D), (1, G, 3, V), dtype=torch.float32)
    spec = capped("pope", 50.0)
    assert ww.explain(q, k, v, replace(spec, softcap=None), backend=backend).backend == backend
    with pytest.raises(ww.UnsupportedError, match="softcap"):
        ww.attention(q, k, v, spec, backend=backend)
    assert "softcap" in ww.explain(q, k, v, spec).refused[backend]


def test_pages() -> None:
    """No kernel reads them in place under a cap, and a copy of them takes what takes a cap."""
    q, k, v = tensors((1, H, 1, D), (3, G, 4, D), (3, G, 4, V), dtype=torch.float32)
    spec = capped("pope", 1.5)
    call: dict[str, Any] = {"block_table": torch.tensor([[2, 0]]), "lengths": torch.tensor([7])}
    for backend in REFUSING:
        with torch.no_grad(), pytest.raises(ww.UnsupportedError, match="softcap"):
            ww.paged_attention(q, k, v, spec, backend=backend, **call)
    side_by_side = (torch.cat((x[2], x[0]), dim=1)[None, :, :7] for x in (k, v))
    wanted = ww.attention(q, *side_by_side, spec, causal=True, backend="reference")
    torch.testing.assert_close(ww.paged_attention(q, k, v, spec, **call), wanted)


@pytest.mark.parametrize("case", CASES)
def test_auto_on_a_cpu_and_where_nothing_is_fused(case: str) -> None:
    spec = capped(case, 50.0)
    for length, wide, causal in ((1, 64, True), (3, 64, False), (40, 5, True), (200, 64, True)):
        q, k, v = tensors((1, H, length, D), (1, G, 200, D), (1, G, 200, wide))
        told = ww.explain(q, k, v, spec, causal=causal)
        assert told.backend == "cpu"
        assert "cap" in told.reason
        assert told.cache_form == ww.cache_form(replace(spec, softcap=None))
    q, k, v = (x.to("meta") for x in (q, k, v))
    assert ww.explain(q, k, v, replace(spec, softcap=None)).backend == "sdpa"
    assert ww.explain(q, k, v, spec).backend == "reference"


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes alone; no device is there. Our kernels are measured as the fastest of all."""
    monkeypatch.setattr(choices, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(choices, "measured_on", lambda device, backend, stage: True)
    monkeypatch.setattr(choices, "best", lambda *call, **measured: "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plain = replace(make_spec("pope", D, H), phase=None)
    spec = replace(plain, softcap=50.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for length, dtype, wanted in (
            (1, torch.bfloat16, "flex"),
            (40, torch.float32, "flex"),
            (40, torch.float64, "reference"),
        ):
            q, k, v = (
                torch.empty(B, n, t, D, dtype=dtype, device="cuda")
                for n, t in ((H, length), (G, 40), (G, 40))
            )
            told = ww.explain(q, k, v, spec, causal=True)
            assert told.backend == wanted
            assert told.cache_form == "encoded"
            if wanted == "flex":
                assert "softcap" in told.reason
                assert ww.explain(q, k, v, plain, causal=True).backend == "triton"
    if importlib.util.find_spec("triton") is not None:
        assert ww.cache_form(plain, "cuda") == "raw"
    assert ww.cache_form(spec, "cuda") == "encoded"
