"""Backend ``cpu`` beyond the laws: what it skips, what it keeps, what it does not read."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import whatwhere as ww
from encoding_cases import KINDS, SCORES, hot, make_spec, tensors

pytestmark = pytest.mark.usefixtures("poisoned_memory")

blocks, compiled, decode, rows, tables = (
    importlib.import_module(f"whatwhere.attention.cpu.{name}")
    for name in ("blocks", "compiled", "decode", "rows", "tables")
)
HIDING = ("windowed", "masked", "packed", "positions")


def results(q: Tensor, k: Tensor, v: Tensor, spec: ww.ScoreSpec, **call: Any) -> list[Tensor]:
    """The output and gradients for inputs and all that may be learned."""
    learned = {
        name: given.detach().to(q.dtype).requires_grad_()
        for name in ("phase", "slopes")
        if (given := getattr(spec, name)) is not None
    }
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = ww.attention(*leaves, replace(spec, **learned), **call)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, (*leaves, *learned.values()), weights)]


def same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for x, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SCORES)
def test_shapes_beyond_one_block(case: str, kind: str) -> None:
    """Several blocks of rows and keys, odd lengths, T != S, V != D, all widths of heads."""
    for (length, total), (heads, shared), dim, width in (
        ((70, 70), (2, 1), 16, 5),
        ((33, 1001), (1, 1), 64, 16),
        ((130, 200), (8, 1), 16, 32),
        ((65, 65), (2, 2), 256, 16),
    ):
        q, k, v = tensors(
            (2, heads, length, dim), (2, shared, total, dim), (2, shared, total, width)
        )
        call = KINDS[kind](2, total)
        if "query_positions" in call:
            call["query_positions"] = call["query_positions"][:, -length:]
        spec = hot(make_spec(case, dim, heads), 40)
        if kind == "windowed":
            call["window"] = 50
        same(*(results(q, k, v, spec, backend=b, **call) for b in ("cpu", "reference")))


@pytest.mark.parametrize("case", ["pope", "alibi"])
def test_all_masks_at_once_and_an_empty_batch(case: str) -> None:
    spec = hot(make_spec(case, 16, 4))
    for batch in (0, 3):
        q, k, v = tensors((batch, 4, 75, 16), (batch, 2, 90, 16), (batch, 2, 90, 16))
        call = KINDS["positions"](batch, 90) if batch else {"causal": True}
        if batch:
            call["query_positions"] = call["query_positions"][:, -75:]
        call |= {"key_mask": torch.rand(batch, 90) < 0.6, "window": 60}
        call["segments"] = torch.randint(0, 2, (batch, 90)).cumsum(-1) // 20
        if not batch:
            assert ww.attention(q, k, v, spec, backend="cpu", **call).shape == q.shape
            continue
        same(*(results(q, k, v, spec, backend=b, **call) for b in ("cpu", "reference")))
        with torch.no_grad():
            for length in (1, 7):
                short = call | {"query_positions": call["query_positions"][:, -length:]}
                got, wanted = (
                    ww.attention(q[:, :, -length:], k, v, spec, backend=b, **short)
                    for b in ("cpu", "reference")
                )
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def seen_by_blocks(monkeypatch: pytest.MonkeyPatch, **call: Any) -> int:
    """Scores that a forward pass computes."""
    counted = []
    whole = blocks.Plan.blocks

    def count(self: Any, batch: slice) -> Iterator[Any]:
        for block in whole(self, batch):
            counted.append(
                (block.rows.stop - block.rows.start) * (block.keys.stop - block.keys.start)
            )
            yield block

    monkeypatch.setattr(rows.Plan, "blocks", count)
    q, k, v = tensors((1, 1, 1024, 8), (1, 1, 1024, 8), (1, 1, 1024, 8), dtype=torch.float32)
    ww.attention(q, k, v, make_spec("pope", 8, 1), causal=True, backend="cpu", **call)
    monkeypatch.undo()
    return sum(counted)


def test_what_no_row_sees_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    size, at = 1024, torch.arange(1024)
    assert seen_by_blocks(monkeypatch) <= 0.55 * size**2
    assert seen_by_blocks(monkeypatch, window=64) <= size * (64 + 64)
    placed = {"query_positions": at + 5, "key_positions": at + 5}
    assert seen_by_blocks(monkeypatch, **placed) <= 0.6 * size**2
    assert seen_by_blocks(monkeypatch, window=64, **placed) <= size * (64 + 3 * 64)
    documents = (at // 128).expand(1, size)
    assert seen_by_blocks(monkeypatch, segments=documents) <= size * 128
    padded = (at >= 512)[None]
    assert seen_by_blocks(monkeypatch, key_mask=padded) <= 0.16 * size**2


@pytest.mark.parametrize("length", [1, 40])
def test_keys_before_every_window_may_be_nan(length: int) -> None:
    q, k, v = tensors((1, 2, length, 16), (1, 2, 90, 16), (1, 2, 90, 16))
    call: dict[str, Any] = {"causal": True, "window": 8, "backend": "cpu"}
    spec = make_spec("pope", 16, 2)
    clean = results(q, k, v, spec, **call)
    for x in (k, v):
        x[:, :, : 90 - length - 7] = float("nan")
    same(results(q, k, v, spec, **call), clean)


def test_nothing_wider_than_keys_is_kept_for_backward() -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    q, k, v = (torch.randn(2, 4, 64, 16, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ww.attention(q, k, v, ww.PoPE(16, 4)(), causal=True, backend="cpu")
    own = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    new = [x for x in kept if x.untyped_storage().data_ptr() not in own]
    assert all(x.numel() <= 4 * 16 for x in new), [tuple(x.shape) for x in new]


def test_the_same_call_gives_the_same_bits() -> None:
    q, k, v = (torch.randn(2, 8, 300, 32) for _ in range(3))
    spec = make_spec("pope", 32, 8)
    first = results(q, k, v, spec, causal=True, backend="cpu")
    for got, wanted in zip(results(q, k, v, spec, causal=True, backend="cpu"), first, strict=True):
        assert torch.equal(got, wanted)


def test_second_derivatives_are_refused_in_plain_words() -> None:
    q = torch.randn(1, 2, 20, 8, requires_grad=True)
    out = ww.attention(q, q, q, make_spec("pope", 8, 2), causal=True, backend="cpu")
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(grad.sum(), q)


# Decoding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [*SCORES, "pope/temperature", "pope/relu"])
def test_few_queries_against_a_cache(case: str, kind: str) -> None:
    spec = hot(make_spec(case, 16, 4), 40)
    for length, shared in product((1, 2, 5, 16), (1, 2, 4)):
        q, k, v = tensors((2, 4, length, 16), (2, shared, 150, 16), (2, shared, 150, 8))
        call = KINDS[kind](2, 150)
        if "query_positions" in call:
            call["query_positions"] = call["query_positions"][:, -length:]
        got, wanted = (
            ww.attention(q, k, v, spec, backend=b, **call) for b in ("cpu", "reference")
        )
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
        unturned = ww.attention(
            ww.unturned(q, spec), ww.unturned(k, spec), v, spec.unturned(), backend="cpu", **call
        )
        torch.testing.assert_close(unturned, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_decoding_in_half_precision_errs_less_than_the_reference(dtype: torch.dtype) -> None:
    spec = make_spec("pope", 32, 4)
    q, k, v = tensors((2, 4, 1, 32), (2, 2, 300, 32), (2, 2, 300, 32), dtype=dtype)
    exact = ww.attention(*(x.double() for x in (q, k, v)), spec, causal=True, backend="reference")
    errors = {
        b: (ww.attention(q, k, v, spec, causal=True, backend=b) - exact).square().mean().sqrt()
        for b in ("cpu", "reference")
    }
    assert errors["cpu"] <= 2 * errors["reference"] + torch.finfo(dtype).eps


def test_blocks_of_keys_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_HELD", 2**10)
    q, k, v = tensors((1, 4, 1, 16), (1, 2, 333, 16), (1, 2, 333, 16))
    for case in SCORES:
        spec = make_spec(case, 16, 4)
        for dtype in (torch.float64, torch.bfloat16):
            given = [x.to(dtype) for x in (q, k, v)]
            got, wanted = (
                ww.attention(*given, spec, causal=True, backend=b) for b in ("cpu", "reference")
            )
            limits = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
            torch.testing.assert_close(got, wanted, **limits)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 4])
def test_the_compiled_loop_agrees(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    monkeypatch.setenv("WHATWHERE_COMPILE", "1")
    loop = compiled.Loop()
    monkeypatch.setattr(decode, "LOOP", loop)
    spec = make_spec("pope", 32, 4)
    for total in (40, 41, 300, 1000):
        q, k, v = (torch.randn(2, n, t, 32) for n, t in ((4, 1), (4 // groups, total), (4, total)))
        v = v[:, : 4 // groups]
        for one in (spec, spec.unturned()):
            got, wanted = (
                ww.attention(q, k, v, one, causal=True, backend=b) for b in ("cpu", "reference")
            )
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert loop.run is not None
    assert not loop.broken


def test_a_loop_that_cannot_be_compiled_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setenv("WHATWHERE_COMPILE", "1")
    monkeypatch.setattr(compiled, "_compile", fail)
    monkeypatch.setattr(decode, "LOOP", compiled.Loop())
    q, k, v = (torch.randn(1, 2, n, 16) for n in (1, 30, 30))
    spec = make_spec("pope", 16, 2)
    wanted = ww.attention(q, k, v, spec, causal=True, backend="reference")
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler") as caught:
        for _ in range(2):
            torch.testing.assert_close(
                ww.attention(q, k, v, spec, causal=True, backend="cpu"), wanted
            )
    assert len(caught) == 1


def test_the_loop_waits_until_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WHATWHERE_COMPILE", raising=False)
    loop = compiled.Loop()
    q, k = torch.empty(1, 2, 1, 16), torch.empty(1, 2, 30, 16)
    spec = make_spec("pope", 16, 2)
    p = rows.Problem(
        *(q, k, k, spec.inv_freq, spec.phase, None, None, None, None, None),
        *("polar", "softplus", 16, 0.25, 0, True, 0, 0.0),
    )
    assert not loop.wanted(p, 30)
    assert loop.wanted(p, 2**28)
    monkeypatch.setenv("WHATWHERE_COMPILE", "0")
    assert not loop.wanted(p, 2**28)


# Tables


def test_kept_tables_are_exact_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_kept", type(tables._kept)())
    inv_freq = torch.tensor([[1.0, 0.3, 1e-4]], dtype=torch.float64)
    for length in (5, 300, 299, 70001):
        table = tables.in_order(inv_freq, length, torch.float32)
        angles = torch.arange(length).double()[:, None] * inv_freq
        assert torch.equal(table, torch.cat((angles.cos(), angles.sin()), -1).float())
    far = tables.in_order(inv_freq[:, :1], 2**24 + 3, torch.float32)[-3:]
    angles = torch.arange(2**24, 2**24 + 3).double()[:, None] * inv_freq[:, :1]
    assert torch.equal(far, torch.cat((angles.cos(), angles.sin()), -1).float())


def test_kept_tables_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_kept", type(tables._kept)())
    monkeypatch.setattr(tables, "LIMIT", 2**16)
    for n in range(50):
        inv_freq = torch.tensor([[1.0 + n, 0.5]], dtype=torch.float64)
        for length in (100, 1000, 3000, 10000):
            assert tables.in_order(inv_freq, length, torch.float32).shape == (length, 4)
            assert tables.kept_bytes() <= 2**16


def test_kept_tables_from_several_threads() -> None:
    inv_freq = torch.tensor([[0.77, 0.1]], dtype=torch.float64)
    wrong = []

    def use(start: int) -> None:
        for length in range(start, 5000, 97):
            table = tables.in_order(inv_freq, length, torch.float32)
            angle = (length - 1) * inv_freq[0]
            if not torch.equal(table[-1], torch.cat((angle.cos(), angle.sin())).float()):
                wrong.append(length)

    threads = [threading.Thread(target=use, args=(n,)) for n in (1, 30, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_positions_that_are_given_are_as_exact_as_those_in_order() -> None:
    """Looked up, shifted, far away or computed: one float64 angle, rounded once."""
    inv_freq = torch.tensor([[1.0, 1e-3]], dtype=torch.float64)
    for at in (
        torch.arange(7)[None],
        torch.arange(5, 12)[None],
        torch.randperm(7)[None] + 100,
        torch.randperm(14).view(2, 7) + 2**24,
        torch.arange(-3, 4)[None],
    ):
        angles = tables.Angles(inv_freq, at[..., None], 0, 7, torch.float32)
        cos, sin = angles.at(slice(0, 2), slice(None))
        exact = at.double()[:, None, :, None] * inv_freq
        assert torch.equal(cos, exact.cos().float())
        assert torch.equal(sin, exact.sin().float())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_65536_keys_without_a_matrix_of_scores_or_of_masks() -> None:
    """Above the inputs, in a process of its own; of T x S even bytes would be 512 MiB."""
    code = (
        "import torch, whatwhere as ww, pathlib\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "peak = lambda: int(status.read_text().split('VmHWM:')[1].split()[0])\n"
        "torch.set_num_threads(1)\n"
        "k, v = (torch.randn(1, 1, 65536, 64) for _ in range(2))\n"
        "q = torch.randn(1, 1, 8192, 64)\n"
        "spec = ww.PoPE(64, 1)()\n"
        "w = dict(causal=True, backend='cpu')\n"
        "ww.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], spec, **w)\n"
        "pathlib.Path('/proc/self/clear_refs').write_text('5')\n"
        "before = peak()\n"
        "with torch.no_grad():\n"
        "    out = ww.attention(q, k, v, spec, **w)\n"
        "assert out.isfinite().all()\n"
        "print(peak() - before)"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert int(done.stdout) * 1024 < 2**29
    assert math.isfinite(int(done.stdout))
