"""Decoding by backend `triton`: few queries, caches in one piece and in pages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import whatwhere as ww
from encoding_cases import KINDS, hot, make_spec, pairs
from triton_cases import DEVICE, EPS, needs_triton, qkv

pytestmark = needs_triton


@pairs("in_order", "positions", dtype=torch.float32, but=("reference", "sdpa", "flex", "cpu"))
@pytest.mark.parametrize("kind", ["in_order", "masked", "positions"])
def test_one_query_of_a_long_cache(kind: str, case: str, backend: str) -> None:
    check_decode(case, backend, kind, length=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [3, 16])
@pytest.mark.parametrize("case", ["pope", "pope/quarter-raw", "rope/half", "alibi"])
def test_several_queries_of_a_long_cache(case: str, length: int, kind: str) -> None:
    check_decode(case, "triton", kind, length)


def check_decode(case: str, backend: str, kind: str, length: int) -> None:
    total = 150
    q, k, v = qkv(2, 4, length, 16, keys=total, groups=2, value=24)
    spec = hot(make_spec(case, 16, 4), 40)
    call = {
        name: x.to(DEVICE) if isinstance(x, Tensor) else x
        for name, x in KINDS[kind](2, total).items()
    }
    if "query_positions" in call:
        call["query_positions"] = call["query_positions"][:, -length:]
    with torch.no_grad():
        exact = ww.attention(q.double(), k.double(), v.double(), spec, backend="reference", **call)
        plain = ww.attention(q, k, v, spec, backend="reference", **call)
        found = ww.attention(q, k, v, spec, backend=backend, **call)
    allowed = 2 * (plain - exact).norm() + EPS * (1 + math.sqrt(total) / 2) * exact.norm()
    assert (found - exact).norm() <= allowed


def test_pages_of_magnitudes_are_pages_of_keys() -> None:
    spec = make_spec("pope", 16, 2)
    pages = [torch.randn(4, 2, 8, 16, device=DEVICE) for _ in range(2)]
    q = torch.randn(1, 2, 1, 16, device=DEVICE)
    call: dict[str, Any] = {
        "block_table": torch.tensor([[2, 0, 3]], device=DEVICE),
        "lengths": torch.tensor([21], device=DEVICE),
        "backend": "triton",
    }
    raw = ww.paged_attention(q, *pages, spec, **call)
    shown = (ww.unturned(q, spec), ww.unturned(pages[0], spec), pages[1])
    found = ww.paged_attention(*shown, spec.unturned(), **call)
    torch.testing.assert_close(found, raw, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_table": torch.zeros(2, 3)}, "block_table"),
        ({"block_table": torch.zeros(1, 3, dtype=torch.int32)}, "block_table"),
        ({"lengths": torch.ones(2, 1, dtype=torch.int32)}, "lengths"),
        ({"lengths": [1, 2]}, "lengths"),
        ({"window": 0}, "window"),
        ({"backend": "fastest"}, "backend"),
    ],
)
def test_pages_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    pages = torch.randn(4, 2, 8, 16)
    call: dict[str, Any] = {
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "lengths": torch.ones(2, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        q = torch.randn(2, 2, 1, 16)
        ww.paged_attention(q, pages, pages, make_spec("pope", 16, 2), **{**call, **change})


def test_pages_have_no_gradients_and_say_so() -> None:
    pages = torch.randn(4, 2, 8, 16, device=DEVICE)
    q = torch.randn(1, 2, 1, 16, device=DEVICE, requires_grad=True)
    with pytest.raises(ww.UnsupportedError, match="gradients"):
        ww.paged_attention(
            q, pages, pages, make_spec("pope", 16, 2), backend="triton",
            block_table=torch.zeros(1, 1, dtype=torch.int32, device=DEVICE),
            lengths=torch.ones(1, dtype=torch.int32, device=DEVICE),
        )  # fmt: skip


def test_tables_of_pages_may_have_any_strides_and_lengths_go_no_further_than_they() -> None:
    spec = make_spec("pope", 16, 2)
    pages = [torch.randn(9, 2, 8, 16, device=DEVICE) for _ in range(2)]
    q = torch.randn(2, 2, 1, 16, device=DEVICE)
    table = torch.randperm(9, device=DEVICE)[:6].view(2, 3).int()
    lengths = torch.tensor([5, 21], device=DEVICE).int()
    call: dict[str, Any] = {"backend": "triton"}
    wanted = ww.paged_attention(q, *pages, spec, block_table=table, lengths=lengths, **call)
    call |= {
        "block_table": table.t().contiguous().t(),
        "lengths": torch.stack((lengths, lengths + 7), dim=1)[:, 0],
    }
    assert torch.equal(ww.paged_attention(q, *pages, spec, **call), wanted)
    call["lengths"] = torch.tensor([5, 2000], device=DEVICE).int()
    laid = ww.paged_attention(q, *pages, spec, **{**call, "backend": "reference"})
    found = ww.paged_attention(q, *pages, spec, **call)
    torch.testing.assert_close(found, laid, rtol=2e-5, atol=2e-6)


def test_pages_before_the_window_may_be_gone() -> None:
    spec = make_spec("pope", 16, 2)
    pages = [torch.randn(4, 2, 8, 16, device=DEVICE) for _ in range(2)]
    q, lengths = torch.randn(1, 2, 1, 16, device=DEVICE), torch.tensor([30], device=DEVICE)
    table = torch.tensor([[3, 1, 0, 2]], device=DEVICE)
    call: dict[str, Any] = {"lengths": lengths, "window": 6, "backend": "triton"}
    wanted = ww.paged_attention(q, *pages, spec, block_table=table, **call)
    table[0, :3] = -(10**6)
    assert torch.equal(ww.paged_attention(q, *pages, spec, block_table=table, **call), wanted)
