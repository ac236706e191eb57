"""`torch.compile` without a break, for every encoding and backend, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import whatwhere as ww
from encoding_cases import CASES, KINDS, make, pairs, refusal, tensors

B, H, G, T, D = 2, 4, 2, 9, 16


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def run_both(
    case: str, backend: str, compiler: str, gradient: bool, dtype: torch.dtype, **call: Any
) -> None:
    """The encoding and the attention in one graph, against the same uncompiled."""
    encoding = make(case, D, H).to(dtype)
    encoding.requires_grad_(gradient)
    trained = [p for p in encoding.parameters() if not encoding.absolute]

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ww.attention(q, k, v, encoding(), backend=backend, **call)

    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=False)
    start = tensors((B, H, T, D), (B, G, T, D), (B, G, T, D), dtype=dtype)
    found = []
    for function in (step, compiled):
        q, k, v = (x.clone().requires_grad_(gradient) for x in start)
        out = function(q, k, v)
        results = [out.detach()]
        if gradient:
            results += torch.autograd.grad(out.square().sum(), (q, k, v, *trained))
        found.append(results)
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {}
    for got, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


@pytest.mark.parametrize("case", CASES)
def test_every_encoding_compiles_whole(case: str) -> None:
    run_both(case, "auto", "aot_eager", True, torch.float64, causal=True)


@pairs("in_order", cases=("pope/quarter-raw", "rope", "alibi"))
def test_every_backend_compiles_whole(case: str, backend: str) -> None:
    gradient = refusal(case, backend, "in_order", gradient=True) is None
    run_both(case, backend, "aot_eager", gradient, torch.float64, causal=True)


@pairs("masked", "positions", cases=("pope", "alibi"))
def test_compiles_whole_with_masks(case: str, backend: str) -> None:
    gradient = refusal(case, backend, "masked", gradient=True) is None
    call = KINDS["positions"](B, T) | {"key_mask": torch.rand(B, T) < 0.7, "window": 4}
    run_both(case, backend, "aot_eager", gradient, torch.float64, **call)


@pytest.mark.slow
@pairs("in_order", gradient=True, dtype=torch.float32, cases=("pope",), but=("reference",))
def test_inductor_agrees(case: str, backend: str) -> None:
    run_both(case, backend, "inductor", True, torch.float32, causal=True)


@pytest.mark.parametrize("case", ["pope", "rope", "alibi"])
def test_one_graph_serves_a_growing_cache(case: str) -> None:
    """Decoding under dynamic shapes: lengths change, the answers do not, nor do graphs pile up."""
    encoding = make(case, D, H).requires_grad_(False)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ww.attention(q, k, v, encoding(), causal=True)

    compiled = torch.compile(step, fullgraph=True, backend=count, dynamic=True)
    q, k, v = tensors((1, H, 1, D), (1, G, 40, D), (1, G, 40, D))
    for total in range(20, 40):
        part = q, k[:, :, :total], v[:, :, :total]
        torch.testing.assert_close(compiled(*part), step(*part), rtol=1e-9, atol=1e-10)
    assert len(graphs) <= 3


def test_operators_of_our_own_are_registered_in_full() -> None:
    """Schema, fake and autograd of each; what `torch.compile` relies on."""
    spec = make("pope", 6, 6)()
    q, k, v = tensors((2, 6, 40, 6), (2, 2, 50, 6), (2, 2, 50, 4))
    phase, slopes = tensors((6, 6), (6,))
    for x in (q, k, v, phase, slopes):
        x.requires_grad_()
    at, mask = torch.randperm(50), torch.rand(2, 50) < 0.7
    placed = (at[None, :40, None], at[None, :, None], mask, None)
    for causal, given, bias, softcap in (
        (True, (None,) * 4, None, 0.0),
        (False, placed, slopes, 0.7),
    ):
        tensors_ = (q, k, v, spec.inv_freq, phase, bias, *given)
        rest = ("polar", "softplus", 6, 0.3, 0, causal, 0, softcap)
        found = torch.library.opcheck(torch.ops.whatwhere.rows_forward, (*tensors_, *rest))
        assert set(found.values()) == {"SUCCESS"}
        with torch.no_grad():
            plain = tuple(x if x is None else x.detach() for x in tensors_)
            found = torch.library.opcheck(torch.ops.whatwhere.decode, (*plain, *rest))
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["sinusoidal", "learned"])
def test_embedding_compiles_whole(name: str) -> None:
    encoding = make(name, D, H)
    compiled = torch.compile(encoding.embed, fullgraph=True, backend="aot_eager")
    at = torch.tensor([[0, 5, 99], [3, 3, 127]])
    torch.testing.assert_close(compiled(at), encoding.embed(at))


@pytest.mark.parametrize("case", ["rope", "pope"])
def test_compiled_angles_are_exact_far_away(case: str) -> None:
    """No float32 angle slips in through a compiler's constants."""
    encoding = make(case, D, H).requires_grad_(False)
    at = torch.arange(T) + 2**24 - T
    k = torch.randn(1, G, T, D)

    def encode(k: Tensor, at: Tensor) -> Tensor:
        return ww.encode_keys(k, encoding(), at)

    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
    wanted = encode(k.double(), at)
    assert (compiled(k, at).double() - wanted).abs().max() < 1e-6 * wanted.abs().max()
