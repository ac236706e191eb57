"""Law 6: errors are budgeted, not guessed.

The reference, in each dtype, keeps within what rounding its operands once can cost, computed from
the operands. Every other backend may err twice as much as the reference does in the same dtype,
plus rounding: of the result once, and of float32 accumulators. Errors are taken against float64 on
the same, rounded, inputs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import whatwhere as ww
from encoding_cases import CASES, KINDS, SCORES, hot, make_spec, pairs, refusal

pytestmark = pytest.mark.usefixtures("poisoned_memory")

B, H, G, T, D, V = 2, 4, 2, 63, 32, 32
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SINGLE = torch.finfo(torch.float32).eps
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def inputs(dtype: torch.dtype, batch: int = B, heads: int = H, shared: int = G) -> list[Tensor]:
    shapes = ((batch, heads, T, D), (batch, shared, T, D), (batch, shared, T, V))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def spec_of(case: str, heads: int = H) -> ww.ScoreSpec:
    return hot(make_spec(case, D, heads), 40)


def results(
    start: list[Tensor], spec: ww.ScoreSpec, backend: str, weights: Tensor | None, **call: Any
) -> dict[str, Tensor]:
    """The output and, with weights, the gradients of their sum, in float64."""
    q, k, v = (x.detach().clone().requires_grad_(weights is not None) for x in start)
    wanted = {"q": q, "k": k, "v": v}
    if weights is not None:
        learned = {
            name: given.detach().clone().requires_grad_()
            for name in ("phase", "slopes")
            if (given := getattr(spec, name)) is not None
        }
        spec = replace(spec, **learned)
        wanted |= learned
    out = ww.attention(q, k, v, spec, backend=backend, **call)
    assert out.dtype == start[0].dtype
    if weights is None:
        return {"out": out.double()}
    gradients = torch.autograd.grad(out, tuple(wanted.values()), weights.to(out.dtype))
    found = {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}
    return {name: x.double() for name, x in found.items()}


def in_float64(spec: ww.ScoreSpec) -> ww.ScoreSpec:
    return replace(
        spec,
        phase=None if spec.phase is None else spec.phase.double(),
        slopes=None if spec.slopes is None else spec.slopes.double(),
    )


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def worst(x: Tensor) -> float:
    return x.abs().max().item()


def interpreted(backend: str) -> bool:
    """Whether it is a kernel that takes a while for each sequence and head."""
    return backend in ("triton", "widened") and not torch.cuda.is_available()


def check_budget(case: str, backend: str, kind: str, dtype: torch.dtype) -> None:
    batch, heads, shared = (1, 2, 1) if interpreted(backend) else (B, H, G)
    start, spec = inputs(dtype, batch, heads, shared), spec_of(case, heads)
    call, weights = KINDS[kind](batch, T), None
    if refusal(case, backend, kind, gradient=True, dtype=dtype) is None:
        # Weights that every dtype holds, so that all are asked the same question.
        weights = torch.randn(batch, heads, T, V).to(torch.bfloat16).to(torch.float16).double()
    exact = results([x.double() for x in start], in_float64(spec), "reference", weights, **call)
    reference = results(start, spec, "reference", weights, **call)
    found = results(start, spec, backend, weights, **call)
    # A sum of T terms in float32 is off by about sqrt(T) halves of its eps.
    rounding = torch.finfo(dtype).eps + math.sqrt(T) / 2 * SINGLE
    for name, wanted in exact.items():
        for norm in (rms, worst) if name == "out" else (rms,):
            allowed = 2 * norm(reference[name] - wanted) + rounding * norm(wanted)
            if name != "out":
                # Of the few keys of a window, gradients nearly cancel; what is rounded does not.
                allowed += SINGLE * max(norm(x) for x in exact.values())
            assert norm(found[name] - wanted) <= allowed, (name, norm.__name__)


def budget(kind: str, dtype: torch.dtype) -> Any:
    def left_out(case: str, backend: str) -> bool:
        """Of what is interpreted, every pair of case, kind, dtype and backend, not every triple.

        Each kind of score is tested in full. Beyond those, cases are other numbers in the same
        code; they take turns on the two backends.
        """
        if not interpreted(backend) or case in SCORES:
            return False
        turn = [*CASES].index(case) + [*KINDS].index(kind) + (dtype == torch.float16)
        return turn % 2 == (backend == "triton")

    @pairs(kind, dtype=dtype, but=("reference",), left_out=left_out)
    def test(case: str, backend: str) -> None:
        check_budget(case, backend, kind, dtype)

    return test


test_error_in_order_bf16 = budget("in_order", torch.bfloat16)
test_error_in_order_fp16 = budget("in_order", torch.float16)
test_error_in_order_fp32 = budget("in_order", torch.float32)
test_error_in_full_bf16 = budget("full", torch.bfloat16)
test_error_in_full_fp32 = budget("full", torch.float32)
test_error_masked_bf16 = budget("masked", torch.bfloat16)
test_error_masked_fp16 = budget("masked", torch.float16)
test_error_masked_fp32 = budget("masked", torch.float32)
test_error_by_position_bf16 = budget("positions", torch.bfloat16)
test_error_by_position_fp32 = budget("positions", torch.float32)
test_error_packed_fp32 = budget("packed", torch.float32)
test_error_windowed_fp32 = budget("windowed", torch.float32)


@every_dtype
@every_case
@pytest.mark.parametrize("kind", ["in_order", "positions"])
def test_the_reference_errs_by_rounding_its_operands_once(
    kind: str, case: str, dtype: torch.dtype
) -> None:
    start, spec, call = inputs(dtype), spec_of(case), KINDS[kind](B, T)
    exact = results([x.double() for x in start], in_float64(spec), "reference", None, **call)
    found = results(start, spec, "reference", None, **call)
    # A score is off by its features' rounding, twice half an eps of each product, and by float32
    # sums of at most 2 D products, and slopes by float32 too; a weight by e^(2 score error) - 1;
    # the output by one rounding of the weights and one of itself.
    q, k = (x.double() for x in start[:2])
    at_q = call.get("query_positions", torch.arange(T))
    at_k = call.get("key_positions", torch.arange(T))
    features_q = ww.encode_queries(q, in_float64(spec), at_q).abs()
    features_k = ww.encode_keys(k, in_float64(spec), at_k).abs().repeat_interleave(H // G, 1)
    eps = torch.finfo(dtype).eps
    products = (features_q @ features_k.mT).max().item() * spec.scale
    off = products * (1.01 * eps + 2 * D * SINGLE) + 2 * T * SINGLE
    allowed = (math.expm1(2 * off) + 2.1 * eps) * worst(start[2])
    assert worst(found["out"] - exact["out"]) <= allowed


@every_dtype
@every_case
def test_features_are_exact_ones_rounded_once(case: str, dtype: torch.dtype) -> None:
    """However far the positions: nothing but the last rounding sees the dtype of the model."""
    q, k, _ = inputs(dtype)
    spec = spec_of(case)
    at = torch.arange(T) + 2**24 - T
    eps = torch.finfo(dtype).eps
    for encode, x in ((ww.encode_queries, q), (ww.encode_keys, k)):
        wanted = encode(x.double(), in_float64(spec), at)
        found = encode(x, spec, at)
        assert found.dtype == dtype
        # Half an eps of the last rounding; a few float32 roundings of each channel of a pair.
        allowed = 0.51 * eps * wanted.abs() + 12 * SINGLE * wanted.abs().max()
        tiny = torch.finfo(dtype).smallest_normal * eps
        assert ((found.double() - wanted).abs() <= allowed + tiny).all()


def able(kind: str, case: str, dtype: torch.dtype) -> Any:
    names = [b for b in ww.BACKENDS if refusal(case, b, kind, dtype=dtype) is None]
    return pytest.mark.parametrize("backend", names)


@able("positions", "alibi", torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_slopes_keep_their_precision_far_away(backend: str, dtype: torch.dtype) -> None:
    """ALiBi at distances that 8 or 11 bits do not hold: neighbours must not get one weight."""
    spec = replace(make_spec("alibi", 8, 1), slopes=torch.tensor([0.5]))
    q = torch.zeros(1, 1, 1, 8, dtype=dtype)
    k = torch.zeros(1, 1, 2, 8, dtype=dtype)
    v = torch.tensor([[1.0], [0.0]], dtype=dtype).expand(1, 1, 2, 1)
    at = {"query_positions": torch.tensor([3001]), "key_positions": torch.tensor([1, 2])}
    wanted = 1 / (1 + math.exp(0.5))
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
            out = ww.attention(q, k, v, spec, causal=True, backend=backend, **at)
        assert abs(out.item() - wanted) <= torch.finfo(dtype).eps * wanted, f"{autocast=}"


# Autocast: linear layers give bf16, norms float32; the contract of attention is the same inside.


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@pairs("in_order")
def test_autocast_keeps_the_dtype_of_queries(case: str, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if refusal(case, backend, "in_order", dtype=dtype) is None:
            with torch.no_grad(), autocast():
                out = ww.attention(*inputs(dtype), spec_of(case), causal=True, backend=backend)
            assert out.dtype == dtype


@pairs("masked", dtype=torch.bfloat16)
def test_autocast_keeps_the_budget(case: str, backend: str) -> None:
    start, spec, call = inputs(torch.bfloat16), spec_of(case), KINDS["masked"](B, T)
    exact = results([x.double() for x in start], in_float64(spec), "reference", None, **call)
    plain = results(start, spec, "reference", None, **call)
    with torch.no_grad(), autocast():
        found = ww.attention(*start, spec, backend=backend, **call)
    allowed = 2 * rms(plain["out"] - exact["out"]) + 2**-7 * rms(exact["out"])
    assert rms(found.double() - exact["out"]) <= allowed


@every_case
def test_autocast_leaves_scores_and_features_alone(case: str) -> None:
    spec, at = spec_of(case), torch.arange(T) + 2**24 - T
    for dtype in (torch.float32, torch.bfloat16):
        q, k, _ = inputs(dtype)
        with autocast():
            encoded = ww.encode_queries(q, spec, at), ww.encode_keys(k, spec, at)
            scored = ww.scores(q, k, spec, query_positions=at, key_positions=at)
        assert torch.equal(encoded[0], ww.encode_queries(q, spec, at))
        assert torch.equal(encoded[1], ww.encode_keys(k, spec, at))
        assert scored.dtype == torch.float32
        wanted = ww.scores(q, k, spec, query_positions=at, key_positions=at)
        assert torch.equal(scored, wanted)
