"""`table_bytes` against the tables that a call really makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import whatwhere as ww
from encoding_cases import CASES, make, make_spec


class Tables(TorchDispatchMode):
    """Counts what cos and sin give, and the float32 copies made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        self.single_bytes = 0
        self.made: set[int] = set()
        self.kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket
        if name in (torch.ops.aten.cos, torch.ops.aten.sin):
            self.numbers += out.numel()
            self.made.add(id(out))
            self.kept.append(out)
        elif name is torch.ops.aten._to_copy and id(args[0]) in self.made:
            assert out.dtype == torch.float32
            self.single_bytes += out.nbytes
        return out


def measured(encoding: ww.Encoding, length: int, axes: int = 1) -> int:
    """Bytes of the tables made to encode so many keys."""
    spec = encoding()
    at = torch.zeros(length, axes, dtype=torch.long) if axes > 1 else torch.arange(length)
    k = torch.randn(2, 3, length, encoding.head_dim)
    with torch.no_grad(), Tables() as tables:
        ww.encode_keys(k, spec, at)
    assert tables.single_bytes == 4 * tables.numbers
    return tables.single_bytes


@pytest.mark.parametrize("length", [0, 1, 100, 4096])
@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_that_a_call_allocates(case: str, length: int) -> None:
    encoding = make(case, 16, 4)
    assert ww.table_bytes(encoding, length) == measured(encoding, length)
    assert ww.table_bytes(make_spec(case, 16, 4), length) == measured(encoding, length)


EXPECTED: dict[str, tuple[Callable[[], ww.Encoding], int]] = {
    "rope": (lambda: ww.RoPE(80, 4), 80),
    "rope 10 %": (lambda: ww.RoPE(80, 4, fraction=0.1), 8),
    "rope half": (lambda: ww.RoPE(80, 4, fraction=0.5), 40),
    "rope axes": (lambda: ww.RoPE(80, 4, axes=(40, 40)), 80),
    "pope": (lambda: ww.PoPE(80, 4), 160),
    "pope 10 %": (lambda: ww.PoPE(80, 4, fraction=0.1), 16),
    "pope 10 % raw": (lambda: ww.PoPE(80, 4, fraction=0.1, rest="raw"), 16),
    "rope-id": (lambda: ww.RoPEID(80, 4, train_length=128), 40),
    "pope-id": (lambda: ww.PoPEID(80, 4, train_length=128), 80),
    "nope": (lambda: ww.NoPE(80, 4), 0),
    "alibi": (lambda: ww.ALiBi(80, 4), 0),
}


@pytest.mark.parametrize("label", EXPECTED)
def test_bytes_in_numbers(label: str) -> None:
    """A cos and a sin for each frequency that is not 0 and each position, in float32."""
    build, numbers = EXPECTED[label]
    encoding = build()
    axes = encoding().num_axes
    assert ww.table_bytes(encoding, 1000) == 4 * numbers * 1000 == measured(encoding, 1000, axes)


def test_ten_percent_is_exactly_a_tenth() -> None:
    full, tenth = ww.RoPE(80, 4), ww.RoPE(80, 4, fraction=0.1)
    assert ww.table_bytes(full, 4096) == 10 * ww.table_bytes(tenth, 4096)
    assert measured(full, 4096) == 10 * measured(tenth, 4096)


@pytest.mark.parametrize("case", CASES)
def test_attention_makes_no_more_than_one_table_for_each_side(case: str) -> None:
    encoding, length = make(case, 16, 4), 32
    q = k = v = torch.randn(1, 4, length, 16)
    for backend in ("reference", "sdpa"):
        with torch.no_grad(), Tables() as tables:
            ww.attention(q, k, v, encoding(), causal=True, backend=backend)
        learned = 0
        if (phase := encoding().phase) is not None:
            learned = 2 * phase.numel()  # cos and sin of delta itself
        assert tables.numbers * 4 <= 2 * ww.table_bytes(encoding, length) + 4 * learned


def test_tables_are_not_made_ahead_of_need() -> None:
    """A run asks for its length: no table for a longest length stays in the module."""
    for case in CASES:
        encoding = make(case, 16, 4)
        ww.attention(*torch.randn(3, 1, 4, 64, 16), encoding(), causal=True)
        buffers = sum(b.nbytes for b in encoding.buffers())
        spec = encoding()
        own = sum(x.nbytes for x in vars(spec).values() if isinstance(x, torch.Tensor) and x.ndim)
        assert buffers == 0
        assert own <= 8 * (16 + 4 * 16)


@pytest.mark.parametrize("length", [-1, -100])
def test_negative_length_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match="length"):
        ww.table_bytes(ww.RoPE(8, 1), length)
