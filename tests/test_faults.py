"""One test for each fault found in other implementations of PoPE, over every backend of ours.

The truth is the paper's formula in float64 (`truth`), which shares no code with the package. The
faults were in PoPE-pytorch 0.2.1 and x-transformers 2.31.10.
"""

from __future__ import annotations

import importlib
import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import whatwhere as ww
from encoding_cases import BACKENDS, make_spec, refusal
from error_bounds import bounds

pytestmark = pytest.mark.usefixtures("poisoned_memory")

D, H = 8, 2


def backends(gradient: bool = False, dtype: torch.dtype = torch.float32) -> pytest.MarkDecorator:
    """Every backend that takes such calls."""
    names = [b for b in BACKENDS if refusal("pope", b, "masked", gradient, dtype) is None]
    return pytest.mark.parametrize("backend", names)


def qkv(
    heads: int = H,
    shared: int = H,
    length: int = 9,
    total: int = 9,
    width: int = D,
    batch: int = 2,
) -> list[Tensor]:
    shapes = ((batch, heads, length, D), (batch, shared, total, D), (batch, shared, total, width))
    return [torch.randn(shape) for shape in shapes]


def truth(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, seen: Tensor | None = None) -> Tensor:
    """The paper's formula, queries at the end of the keys: ``(B, H, T, V)``."""
    groups, dim = q.shape[1] // k.shape[1], q.shape[3]
    # Query heads i H/G to (i + 1) H/G - 1 share key head i.
    k, v = (torch.stack([x[:, h // groups] for h in range(q.shape[1])], 1) for x in (k, v))
    theta = 10000.0 ** (-torch.arange(dim).double() / dim)
    s = torch.arange(k.shape[2]).double()
    t = s[k.shape[2] - q.shape[2] :]
    angle = (s[None, :, None] - t[:, None, None]) * theta + delta[:, None, None]
    of_q, of_k = (torch.logaddexp(x, torch.zeros_like(x)) for x in (q, k))
    scores = torch.einsum("bhtc,bhsc,htsc->bhts", of_q, of_k, angle.cos()) / math.sqrt(dim)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def below(length: int, total: int) -> Tensor:
    return torch.arange(total) <= torch.arange(total - length, total)[:, None]


def check(
    backend: str, inputs: list[Tensor], seen: Tensor | None = None, grad: bool = True, **call: Any
) -> None:
    """Output and, where asked, every gradient, within rounding of the truth."""
    heads = inputs[0].shape[1]
    delta = torch.rand(heads, D) * -2 * math.pi
    spec = replace(make_spec("pope", D, heads), phase=delta)
    flow = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3]).to(inputs[0].dtype)
    wide = [x.double() for x in inputs]
    allowed = bounds(*wide, spec, call, inputs[0].dtype, flow.double())
    exact = [x.clone().requires_grad_(grad) for x in (*wide, delta.double())]
    found = [x.clone().requires_grad_(grad) for x in (*inputs, delta)]
    wanted = truth(*exact, seen)
    out = ww.attention(*found[:3], replace(spec, phase=found[3]), backend=backend, **call)
    assert out.shape == wanted.shape
    assert out.dtype == inputs[0].dtype
    assert ((out.double() - wanted).abs() <= allowed.out).all()
    if grad:
        rights = torch.autograd.grad(wanted, exact, flow.double())
        gots = torch.autograd.grad(out, found, flow)
        limits = (allowed.q, allowed.k, allowed.v, allowed.phase)
        for got, right, limit in zip(gots, rights, limits, strict=True):
            assert (got.double() - right).abs().max() <= limit
            assert right.abs().max() > 10 * limit  # so that the test can fail


@backends(gradient=True)
@pytest.mark.parametrize("total", [5, 31, 33, 63, 65, 97])
def test_padding_of_keys_is_no_key(total: int, backend: str) -> None:
    """A padded channel is softplus(0) = ln 2, which must not get into gradients."""
    check(backend, qkv(length=5, total=total))


@backends(gradient=True)
@pytest.mark.parametrize("length, total", [(1, 7), (3, 8), (20, 33), (31, 65)])
def test_fewer_queries_than_keys_are_the_last(length: int, total: int, backend: str) -> None:
    check(backend, qkv(length=length, total=total), below(length, total), causal=True)


@backends()
@pytest.mark.parametrize("length, total", [(1, 7), (3, 8), (20, 33)])
def test_fewer_queries_than_keys_are_the_last_in_decoding(
    length: int, total: int, backend: str
) -> None:
    with torch.no_grad():
        inputs = qkv(length=length, total=total)
        check(backend, inputs, below(length, total), grad=False, causal=True)


@backends(dtype=torch.bfloat16)
def test_bfloat16_needs_no_fused_kernel(backend: str) -> None:
    inputs = [x.bfloat16() for x in qkv(length=33, total=33)]
    check(backend, inputs, below(33, 33), grad=False, causal=True)


@backends()
def test_delta_may_start_uniform(backend: str) -> None:
    encoding = ww.PoPE(D, H, delta="uniform")
    assert encoding.delta is not None
    assert encoding.delta.unique().numel() == D * H
    inputs = qkv()
    with torch.no_grad():
        out = ww.attention(*inputs, encoding(), backend=backend)
        wanted = truth(*(x.double() for x in (*inputs, encoding.delta)))
    allowed = bounds(*(x.double() for x in inputs), encoding(), {}, torch.float32, None)
    assert ((out.double() - wanted).abs() <= allowed.out).all()


@backends(gradient=True)
@pytest.mark.parametrize("heads, shared", [(4, 2), (6, 2), (6, 3), (3, 1)])
def test_grouped_heads_lie_next_to_one_another(heads: int, shared: int, backend: str) -> None:
    check(backend, qkv(heads, shared, 9, 17), below(9, 17), causal=True)


@backends()
def test_grouped_heads_of_one_query_lie_next_to_one_another(backend: str) -> None:
    with torch.no_grad():
        check(backend, qkv(6, 2, 1, 17), grad=False, causal=True)


@backends(gradient=True)
@pytest.mark.parametrize("causal", [False, True])
def test_a_key_mask_is_of_keys_also_where_there_are_as_many_sequences_as_tokens(
    causal: bool, backend: str
) -> None:
    """A (B, S) mask with B = T looks like one of queries and keys; with causality it stays."""
    size = 5
    mask = torch.rand(size, size) < 0.6
    mask[:, 0], mask[0, 1] = True, False
    seen = mask[:, None, None, :] & (below(size, size) | (not causal))
    inputs = qkv(length=size, total=size, batch=size)
    check(backend, inputs, seen, causal=causal, key_mask=mask)


@backends(gradient=True)
@pytest.mark.parametrize("width", [1, 5, 13])
def test_values_have_a_width_of_their_own(width: int, backend: str) -> None:
    check(backend, qkv(length=9, total=9, width=width), below(9, 9), causal=True)


@backends()
def test_casting_a_model_keeps_its_frequencies(backend: str) -> None:
    """At position 100 000 a frequency of 8 bits is hundreds of radians off."""
    encoding = ww.PoPE(D, H)
    before = encoding().inv_freq
    cast = torch.nn.Sequential(encoding).bfloat16()[0]().inv_freq
    assert before is not None
    assert cast is not None
    assert torch.equal(before, cast)
    inputs, at = qkv(length=9, total=9), torch.arange(9) + 100_000
    call: dict[str, Any] = {"query_positions": at, "key_positions": at, "causal": True}
    with torch.no_grad():
        out = ww.attention(*inputs, encoding(), backend=backend, **call)
        wanted = truth(*(x.double() for x in (*inputs, torch.zeros(H, D))), below(9, 9))
    allowed = bounds(*(x.double() for x in inputs), encoding(), call, torch.float32, None)
    assert ((out.double() - wanted).abs() <= allowed.out).all()


@backends()
@pytest.mark.parametrize("value", [-10.0, -20.0, -40.0, -69.0])
def test_small_magnitudes_are_not_lost(value: float, backend: str) -> None:
    """``log(1 + exp x)`` is 0 at -20 in float32: keys scaled up by a scale show what is left."""
    q, k, v = qkv(length=4, total=6)
    q = q + value
    size = math.log1p(math.exp(value))
    assert size > 1e-30
    spec = replace(make_spec("pope", D, H), scale=1.0 / size)
    with torch.no_grad():
        out = ww.attention(q, k, v, spec, backend=backend)
    wide = [x.double() for x in (q, k, v)]
    wanted = ww.attention(*wide, spec, backend="reference")
    allowed = bounds(*wide, spec, {}, torch.float32, None).out
    # An argument of -69 is itself known to half of its eps: 69 times that of what it gives.
    steep = (1 + abs(value)) * torch.finfo(torch.float32).eps * 4 * D
    assert ((out.double() - wanted).abs() <= allowed + steep * v.abs().max()).all()
    flat = v.double().mean(2, keepdim=True).expand(wanted.shape)
    assert (wanted - flat).abs().max() > 0.05  # with magnitudes of 0 all weights would be equal


@backends(gradient=True)
@pytest.mark.parametrize("start", [0.0, -2 * math.pi, 0.5, -9.0])
def test_deltas_gradient_lives_at_and_beyond_its_bound(start: float, backend: str) -> None:
    encoding = ww.PoPE(D, H)
    assert encoding.delta is not None
    with torch.no_grad():
        encoding.delta.fill_(start)
    inputs = qkv()
    out = ww.attention(*inputs, encoding(), causal=True, backend=backend)
    flow = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, encoding.delta, flow)
    wide = [x.double() for x in inputs]
    delta = torch.full((H, D), min(max(start, -2 * math.pi), 0.0)).double().requires_grad_()
    (wanted,) = torch.autograd.grad(truth(*wide, delta, below(9, 9)), delta, flow.double())
    limit = bounds(*wide, encoding(), {"causal": True}, torch.float32, flow.double()).phase
    # float32(2 pi) is 2 pi to half an eps of 8.
    limit += 8 * torch.finfo(torch.float32).eps * wanted.abs().max().item() * D
    assert (found.double() - wanted).abs().max() <= limit
    assert wanted.abs().max() > 10 * limit


@backends(gradient=True)
def test_float32_stays_float32(backend: str) -> None:
    """TF32 keeps 11 bits of an operand; the bounds of `check` hold for 24."""
    assert not torch.backends.cuda.matmul.allow_tf32
    check(backend, qkv(length=33, total=40), below(33, 40), causal=True)


@backends(gradient=True)
def test_gradients_are_the_same_bits_every_time(backend: str) -> None:
    inputs, found = qkv(4, 2, 45, 70), []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        spec = make_spec("pope", D, 4)
        assert spec.phase is not None
        leaves.append(spec.phase.mul(0).sub(1).requires_grad_())
        out = ww.attention(*leaves[:3], replace(spec, phase=leaves[3]), backend=backend)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@backends()
def test_scores_are_divided_by_the_root_of_the_head_dim(backend: str) -> None:
    """Not by that of the 2 D numbers of a feature: one query, two keys, worked out by hand."""
    q = torch.zeros(1, 1, 1, D)
    k = torch.tensor([2.0, -1.0])[None, None, :, None].expand(1, 1, 2, D)
    v = torch.tensor([1.0, 0.0])[None, None, :, None]
    spec = ww.PoPE(D, 1, delta=None)()
    assert spec.scale == D**-0.5
    at = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        out = ww.attention(
            q, k, v, spec, query_positions=at, key_positions=at.expand(2), backend=backend
        )
    apart = math.log1p(math.exp(2.0)) - math.log1p(math.exp(-1.0))
    wanted = 1 / (1 + math.exp(-math.log(2) * apart * math.sqrt(D)))
    assert out.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_is_compiled_once_for_all_lengths(backend: str) -> None:
    """As part of a compiled model: one program for the first length, one for all others.

    FlexAttention takes a third for more keys than fit one of its blocks.
    """
    if refusal("pope", backend, "in_order", dtype=torch.float32) is not None:
        pytest.skip("does not run here")
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    spec = make_spec("pope", D, H)
    step = torch.compile(
        lambda q, k, v: ww.attention(q, k, v, spec, causal=True, backend=backend),
        fullgraph=True,
        backend=count,
    )
    with torch.no_grad():
        for total in (17, 18, 40, 65, 129, 200, 300, 301):
            inputs = qkv(length=1, total=total)
            torch.testing.assert_close(
                step(*inputs), ww.attention(*inputs, spec, causal=True, backend="reference")
            )
    assert len(graphs) <= 2 + (backend == "flex")


def test_the_compiled_loop_of_the_cpu_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, decode = (
        importlib.import_module(f"whatwhere.attention.cpu.{name}")
        for name in ("compiled", "decode")
    )
    torch.compiler.reset()
    graphs, make = [], torch.compile

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setenv("WHATWHERE_COMPILE", "1")
    monkeypatch.setattr(torch, "compile", lambda f, **given: make(f, backend=count, **given))
    loop = compiled.Loop()
    monkeypatch.setattr(decode, "LOOP", loop)
    spec = make_spec("pope", D, H)
    with torch.no_grad():
        for total in (17, 18, 40, 65, 129, 200):
            inputs = qkv(length=1, total=total)
            out = ww.attention(*inputs, spec, causal=True, backend="cpu")
            wanted = ww.attention(*inputs, spec, causal=True, backend="reference")
            torch.testing.assert_close(out, wanted)
    assert loop.run is not None
    assert not loop.broken
    assert len(graphs) == 1


def test_kernels_for_decoding_are_one_program_for_all_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if refusal("pope", "triton", "in_order", dtype=torch.float32) is not None:
        pytest.skip("does not run here")
    from whatwhere.attention.triton import decode

    programs: dict[str, set[Any]] = {}

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(decode, name)
            signature = inspect.signature(self.kernel.fn).parameters.values()
            self.fixed = {p.name for p in signature if "constexpr" in str(p.annotation)}

        def __getitem__(self, counts: tuple[int, ...]) -> Any:
            def run(*arguments: Any, **given: Any) -> None:
                fixed = {n: x for n, x in given.items() if n in self.fixed or n.startswith("num")}
                programs.setdefault(self.name, set()).add(tuple(sorted(fixed.items())))
                self.kernel[counts](*arguments, **given)

            return run

    for name in ("decode_kernel", "merge_kernel"):
        monkeypatch.setattr(decode, name, Counted(name))
    spec = make_spec("pope", D, H)
    with torch.no_grad():
        for total in (1, 17, 40, 65, 129, 200, 513):
            ww.attention(*qkv(length=1, total=total), spec, causal=True, backend="triton")
    assert len(programs["decode_kernel"]) == 1
    # Parts are merged by powers of two of them.
    assert len(programs["merge_kernel"]) <= 3
