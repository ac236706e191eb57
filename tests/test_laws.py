"""Laws 2 to 5, for every encoding and every backend; new ones are picked up by themselves.

In float64, where an error is a fault and not rounding; test_budgets.py holds the other dtypes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import whatwhere as ww
from encoding_cases import CASES, KINDS, cold, hot, make, make_spec, pairs, tensors

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_case = pytest.mark.parametrize("case", CASES)

B, H, G, T, D = 2, 4, 2, 9, 16


def same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def example() -> tuple[Tensor, ...]:
    return tensors((B, H, T, D), (B, G, T, D), (B, G, T, D))


def spec_of(case: str) -> ww.ScoreSpec:
    """With a length temperature that is at work within the example, where the case has one."""
    return hot(make_spec(case, D, H))


# Law 2: positions count by their differences


@pairs("positions")
@pytest.mark.parametrize("shift", [1, 1000, 2**20])
def test_shifting_all_positions_changes_nothing(case: str, backend: str, shift: int) -> None:
    q, k, v = example()
    spec = cold(spec_of(case))
    call = KINDS["positions"](B, T)
    plain = ww.attention(q, k, v, spec, backend=backend, **call)
    # A shift of its own for each sequence.
    by = torch.tensor([[shift], [3 * shift]])
    call |= {name: call[name] + by for name in ("query_positions", "key_positions")}
    shifted = ww.attention(q, k, v, spec, backend=backend, **call)
    torch.testing.assert_close(shifted, plain, rtol=1e-7, atol=1e-8)


@every_case
def test_scores_depend_on_differences_of_positions(case: str) -> None:
    q, k, _ = example()
    spec = cold(spec_of(case))
    at = torch.arange(T)
    plain = ww.scores(q, k, spec, query_positions=at, key_positions=at)
    for shift in (-T, 12345):
        moved = ww.scores(q, k, spec, query_positions=at + shift, key_positions=at + shift)
        torch.testing.assert_close(moved, plain, rtol=1e-7, atol=1e-8)


# Law 3: however a sequence is cut, padded or packed


def check_chunks(case: str, backend: str, sizes: list[int], **call: Any) -> None:
    q, k, v = example()
    call |= {"spec": spec_of(case), "causal": True, "backend": backend}
    whole = ww.attention(q, k, v, **call)
    end = 0
    for size in sizes:
        start, end = end, end + size
        part = ww.attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], **call)
        same(part, whole[:, :, start:end])


@pairs("in_order")
@pytest.mark.parametrize("sizes", [[1] * T, [3, 1, 5]])
def test_chunks_and_single_tokens_equal_the_whole(
    case: str, backend: str, sizes: list[int]
) -> None:
    check_chunks(case, backend, sizes)


@pairs("windowed")
def test_chunks_equal_the_whole_in_a_window(case: str, backend: str) -> None:
    check_chunks(case, backend, [3, 1, 5], window=3)


@pairs("in_order", "positions")
def test_default_positions_are_the_last_of_the_keys(case: str, backend: str) -> None:
    q, k, v = example()
    call: dict[str, Any] = {"spec": spec_of(case), "causal": True, "backend": backend}
    at = torch.arange(T)
    whole = ww.attention(q, k, v, **call)
    same(whole, ww.attention(q, k, v, query_positions=at, key_positions=at, **call))
    for last in (1, 4):
        given = ww.attention(q[:, :, -last:], k, v, query_positions=at[-last:], **call)
        same(given, whole[:, :, -last:])


@pairs("positions")
def test_order_of_rows_is_nothing_to_causality(case: str, backend: str) -> None:
    """Queries and keys shuffled, each their own way, with their positions."""
    q, k, v = example()
    call: dict[str, Any] = {"spec": spec_of(case), "causal": True, "backend": backend}
    at = torch.arange(T)
    whole = ww.attention(q, k, v, query_positions=at, key_positions=at, **call)
    by_query, by_key = torch.randperm(T), torch.randperm(T)
    shuffled = ww.attention(
        q[:, :, by_query],
        k[:, :, by_key],
        v[:, :, by_key],
        query_positions=by_query,
        key_positions=by_key,
        **call,
    )
    same(shuffled, whole[:, :, by_query])


@pairs("positions")
@pytest.mark.parametrize("length", [1, T])
def test_positions_of_one_side_alone(case: str, backend: str, length: int) -> None:
    """The other side keeps its default, and causality goes by what was given."""
    q, k, v = example()
    q = q[:, :, -length:]
    call: dict[str, Any] = {"spec": spec_of(case), "causal": True, "backend": backend}
    default = {"query_positions": torch.arange(T - length, T), "key_positions": torch.arange(T)}
    odd = {"query_positions": torch.randperm(T)[:length], "key_positions": torch.randperm(T)}
    for side, at in odd.items():
        wanted = ww.attention(q, k, v, **{**call, **default, side: at, "backend": "reference"})
        same(ww.attention(q, k, v, **call, **{side: at}), wanted)


@pairs("in_order")
def test_a_cache_of_encoded_keys_equals_the_whole(case: str, backend: str) -> None:
    q, k, v = example()
    spec = spec_of(case)
    call: dict[str, Any] = {"causal": True, "backend": backend}
    whole = ww.attention(q, k, v, spec, **call)
    width, at = spec.feature_dim(D), torch.arange(T)
    keys = torch.cat(
        [ww.encode_keys(k[:, :, i : i + 1], spec, at[i : i + 1]) for i in range(T)], dim=2
    )
    assert keys.shape == (B, G, T, width)
    queries = ww.encode_queries(q[:, :, -3:], spec, at[-3:])
    assert queries.shape == (B, H, 3, width)
    same(ww.attention(queries, keys, v, spec.encoded(), **call), whole[:, :, -3:])


@pairs("packed", "positions")
@pytest.mark.parametrize("restart", [True, False])
def test_packed_documents_equal_separate_ones(case: str, backend: str, restart: bool) -> None:
    q, k, v = example()
    # Positions that run on are the same as positions that restart only if they are relative.
    spec = spec_of(case) if restart else cold(spec_of(case))
    lengths = [3, 1, 5]
    assert sum(lengths) == T
    ids = torch.repeat_interleave(torch.tensor([5, 2, 9]), torch.tensor(lengths))
    at = torch.cat([torch.arange(n) for n in lengths]) if restart else torch.arange(T)
    call: dict[str, Any] = {"spec": spec, "causal": True, "backend": backend}
    together = ww.attention(
        q, k, v, query_positions=at, key_positions=at, segments=ids.expand(B, T), **call
    )
    end = 0
    for n in lengths:
        start, end = end, end + n
        alone = ww.attention(*(x[:, :, start:end] for x in (q, k, v)), **call)
        same(together[:, :, start:end], alone)


@pairs("packed")
def test_packed_documents_with_a_cache(case: str, backend: str) -> None:
    """Fewer queries than keys: queries belong to the last of the segments."""
    q, k, v = example()
    call = KINDS["packed"](B, T) | {"spec": spec_of(case), "backend": backend}
    whole = ww.attention(q, k, v, **call)
    same(ww.attention(q[:, :, -6:], k, v, **call), whole[:, :, -6:])


@pairs("masked", "positions")
def test_left_padded_equals_unpadded(case: str, backend: str) -> None:
    q, k, v = example()
    pads = [3, 0]
    row = torch.arange(T)
    at = torch.stack([(row - pad).clamp(min=0) for pad in pads])
    mask = torch.stack([row >= pad for pad in pads])
    call: dict[str, Any] = {"spec": spec_of(case), "causal": True, "backend": backend}
    padded = ww.attention(q, k, v, query_positions=at, key_positions=at, key_mask=mask, **call)
    assert padded.isfinite().all()
    for b, pad in enumerate(pads):
        alone = ww.attention(*(x[b : b + 1, :, pad:] for x in (q, k, v)), **call)
        same(padded[b : b + 1, :, pad:], alone)


# Law 4: grouped heads


@pairs("in_order")
@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_heads_equal_the_same_heads_repeated(case: str, backend: str, groups: int) -> None:
    q, k, v = tensors((B, H, T, D), (B, H // groups, T, D), (B, H // groups, T, D))
    call: dict[str, Any] = {"spec": spec_of(case), "causal": True, "backend": backend}
    # Contiguous: query heads 0..groups-1 read key head 0.
    index = torch.arange(H) // groups
    same(ww.attention(q, k, v, **call), ww.attention(q, k[:, index], v[:, index], **call))


# Law 5: gradients


def leaves(spec: ww.ScoreSpec) -> tuple[ww.ScoreSpec, dict[str, Tensor]]:
    """A float64 spec whose learned or learnable tensors are leaves, and those."""
    changed = {
        name: tensor.detach().double().requires_grad_()
        for name in ("phase", "slopes")
        if (tensor := getattr(spec, name)) is not None
    }
    return replace(spec, **changed), changed


@every_case
def test_gradcheck_of_the_reference(case: str) -> None:
    q, k, v = tensors((1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 2))
    # relu has a kink at 0: keep away from it.
    q, k, v = ((x + 0.3 * x.sign() + 0.05).requires_grad_() for x in (q, k, v))
    spec, learned = leaves(hot(make_spec(case, 4, 2)))
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


@every_case
def test_gradient_reaches_the_parameters_of_the_encoding(case: str) -> None:
    encoding = make(case, D, H)
    q, k, v = example()
    out = ww.attention(q, k, v, encoding(), causal=True)
    trained = [p for p in encoding.parameters() if not encoding.absolute]
    if trained:
        out.square().sum().backward()
    for parameter in trained:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


def check_gradients(case: str, backend: str, kind: str) -> None:
    start = tensors((B, H, T, D), (B, G, T, D), (B, G, T, 5))
    weights = torch.randn(B, H, T, 5, dtype=torch.float64)
    call = KINDS[kind](B, T)
    spec, learned = leaves(spec_of(case))

    def run(name: str) -> list[Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in start)
        out = ww.attention(q, k, v, spec, backend=name, **call)
        return [out, *torch.autograd.grad(out, (q, k, v, *learned.values()), weights)]

    for got, wanted in zip(run(backend), run("reference"), strict=True):
        same(got, wanted)


def gradients_of(kind: str) -> Any:
    @pairs(kind, gradient=True, but=("reference",))
    def test(case: str, backend: str) -> None:
        check_gradients(case, backend, kind)

    return test


test_gradients_in_order = gradients_of("in_order")
test_gradients_in_full = gradients_of("full")
test_gradients_by_position = gradients_of("positions")
test_gradients_masked = gradients_of("masked")
test_gradients_packed = gradients_of("packed")
test_gradients_in_a_window = gradients_of("windowed")
