"""Law 7 at its edges, over every backend: huge, equal, vanishing, missing and far away.

Memory that no backend has written is NaN here, and so is all that a mask hides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor

import whatwhere as ww
from encoding_cases import BACKENDS, SCORES, make_spec, refusal
from error_bounds import bounds

pytestmark = pytest.mark.usefixtures("poisoned_memory")

D, H = 8, 2
NAN = float("nan")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_score = pytest.mark.parametrize("case", SCORES)


def backends(gradient: bool = False) -> pytest.MarkDecorator:
    dtype = torch.float32
    names = [b for b in BACKENDS if refusal("pope", b, "masked", gradient, dtype) is None]
    return pytest.mark.parametrize("backend", names)


def filled(q: float, k: float, length: int = 20, total: int = 20) -> list[Tensor]:
    """Queries and keys of one number each, random values."""
    sizes = ((2, H, length, D), (2, 1, total, D), (2, 1, total, D))
    x, y, v = (torch.randn(size) for size in sizes)
    return [torch.full_like(x, q), torch.full_like(y, k), v]


def both(
    inputs: list[Tensor], spec: ww.ScoreSpec, backend: str, gradient: bool, **call: Any
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(gradient) for x in inputs]
    out = ww.attention(*leaves, spec, backend=backend, **call)
    if not gradient:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def calls(case: str, kind: str, *turns: int) -> Iterator[tuple[str, torch.dtype, bool]]:
    """Backends and dtypes that are taken, and whether with gradients.

    What is interpreted, which knows no float64, is slow: float32 alone, and every second of the
    tests, whose numbers in their lists are `turns`. Any two parameters meet in all their values.
    """
    for backend in BACKENDS:
        slow = refusal("nope", backend, "full") is not None
        if slow and (SCORES.index(case) + sum(turns)) % 2:
            continue
        for dtype in (torch.float32,) if slow else DTYPES:
            if refusal(case, backend, kind, dtype=dtype) is None:
                yield backend, dtype, refusal(case, backend, kind, True, dtype) is None


HUGE = ((1e4, 1e4), (-1e4, -1e4), (1e4, -1e4))


@every_score
@pytest.mark.parametrize("q, k", HUGE)
def test_huge_inputs_give_finite_results(q: float, k: float, case: str) -> None:
    spec = make_spec(case, D, H)
    for turn, call in enumerate(({"causal": True}, {})):
        for backend, dtype, gradient in calls(case, "in_order", HUGE.index((q, k)), turn):
            inputs = [x.to(dtype) for x in filled(q, k)]
            # Gradients of 1e4 times 1e4 are beyond float16.
            found = both(inputs, spec, backend, gradient and dtype != torch.float16, **call)
            assert all(x.isfinite().all() for x in found), (backend, dtype, call)
            # A mean of values lies among them.
            assert found[0].abs().max() <= 1.01 * inputs[2].abs().max(), (backend, dtype, call)


@backends()
@every_score
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_keys_that_are_all_equal_weigh_by_position_alone(
    value: float, case: str, backend: str
) -> None:
    inputs, spec = filled(value, value), make_spec(case, D, H)
    with torch.no_grad():
        out = ww.attention(*inputs, spec, causal=True, backend=backend)
    wide = [x.double() for x in inputs]
    wanted = ww.attention(*wide, spec, causal=True, backend="reference")
    allowed = bounds(*wide, spec, {"causal": True}, torch.float32, None).out
    assert ((out.double() - wanted).abs() <= allowed).all()
    if value == 0 and case in ("rope", "nope"):  # scores of 0: the mean of what is seen
        count = torch.arange(1, 21)[:, None]
        mean = inputs[2].cumsum(2) / count
        torch.testing.assert_close(out, mean.expand(out.shape), rtol=1e-5, atol=1e-6)


@backends(gradient=True)
@pytest.mark.parametrize("value", [-30.0, -60.0, -70.0])
def test_vanishing_magnitudes_keep_their_digits(value: float, backend: str) -> None:
    """softplus(-70) is 4e-31: gradients for keys and queries there keep 4 digits and more."""
    spec = make_spec("pope", D, H)
    inputs = [torch.randn(2, n, t, D) for n, t in ((H, 20), (1, 33), (1, 33))]
    for vanishing, side in ((1, "keys"), (0, "queries")):
        given = [x + value * (i == vanishing) for i, x in enumerate(inputs)]
        found = both(given, spec, backend, True)
        exact = both([x.double() for x in given], spec, "reference", True)
        for at in (1, 2):
            largest = exact[at].abs().max()
            assert largest > 0
            error = (found[at].double() - exact[at]).abs().max() / largest
            assert error < 1e-4, (side, at)


@backends()
@pytest.mark.parametrize("value", [-60.0, -70.0])
def test_scores_of_vanishing_magnitudes_keep_their_digits(value: float, backend: str) -> None:
    """Queries of 1e-30, scaled up by as much: scores of 1 that have all their digits."""
    q, k, v = (torch.randn(1, n, t, D) for n, t in ((H, 4), (1, 9), (1, 9)))
    q = q + value
    spec = replace(make_spec("pope", D, H), scale=math.exp(-value))
    wide = [x.double() for x in (q, k, v)]
    wanted = ww.attention(*wide, spec, backend="reference")
    with torch.no_grad():
        out = ww.attention(q, k, v, spec, backend=backend)
    flat = v.double().mean(2, keepdim=True).expand(wanted.shape)
    assert (wanted - flat).abs().max() > 0.1
    allowed = bounds(*wide, spec, {}, torch.float32, None).out
    # A magnitude e^x is as good as its argument is: half an eps of 70 and no less.
    scores = ww.scores(*wide[:2], spec).abs().max()
    limit = 4 * abs(value) * torch.finfo(torch.float32).eps * scores * v.abs().max()
    assert ((out.double() - wanted).abs() <= allowed + limit).all()


@backends()
def test_a_channel_of_minus_infinity_is_a_magnitude_of_nothing(backend: str) -> None:
    gradient = refusal("pope", backend, "in_order", True, torch.float32) is None
    inputs, spec, found = [torch.randn(1, H, 6, D) for _ in range(3)], make_spec("pope", D, H), []
    for nothing in (float("-inf"), -1e3):
        for x in inputs[:2]:
            x[..., 3] = nothing
        found.append(both(inputs, spec, backend, gradient, causal=True))
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)


# Hardly anything, or nothing, to see


@every_score
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("at", [0, 43])
def test_one_visible_key_is_copied(at: int, length: int, case: str) -> None:
    """Whatever the scores, and NaN wherever else keys and values lie."""
    spec, total = make_spec(case, D, H), 44
    mask = (torch.arange(total) == at).expand(2, total)
    for backend, dtype, gradient in calls(case, "masked", at > 0, length > 1):
        inputs = [x.to(dtype) for x in filled(0.5, -0.5, length, total)]
        inputs[1:] = [x.masked_fill(~mask[:, None, :, None], NAN) for x in inputs[1:]]
        out, *gradients = both(inputs, spec, backend, gradient, key_mask=mask)
        torch.testing.assert_close(out, inputs[2][:, :, at : at + 1].expand(out.shape))
        if gradients:
            # The weight is 1 whatever q and k are; v gets all that comes in.
            assert all(x.isfinite().all() for x in gradients), (backend, dtype)
            wanted = H * length * mask[:, None, :, None].expand_as(gradients[2])
            torch.testing.assert_close(gradients[2], wanted.to(dtype))


@every_score
@pytest.mark.parametrize("kind", ["mask", "late keys", "window"])
@pytest.mark.parametrize("length", [1, 40])
def test_nothing_visible_gives_zeros(length: int, kind: str, case: str) -> None:
    """Zeros and zero gradients, though everything that is hidden is NaN."""
    spec, total = make_spec(case, D, H), 44
    here = torch.arange(length)
    call: dict[str, Any] = {
        "mask": {"key_mask": torch.zeros(2, total, dtype=torch.bool)},
        "late keys": {
            "causal": True, "query_positions": here, "key_positions": here[-1] + 1
            + torch.arange(total),
        },
        "window": {
            "causal": True, "window": 5, "query_positions": here + 200,
            "key_positions": torch.arange(total),
        },
    }[kind]  # fmt: skip
    for backend, dtype, gradient in calls(case, "masked", kind == "late keys", length > 1):
        inputs = [x.to(dtype) for x in filled(1.0, 1.0, length, total)]
        inputs[1:] = [torch.full_like(x, NAN) for x in inputs[1:]]
        for x in both(inputs, spec, backend, gradient, **call):
            assert (x == 0).all(), (backend, dtype)


@every_score
@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("poison", [NAN, float("inf")])
def test_slots_not_written_and_padding_are_not_read(poison: float, length: int, case: str) -> None:
    """A cache that is filled to the last query, padded on its left."""
    total, used, spec = 70, 38, make_spec(case, D, H)
    call = {
        "causal": True,
        "query_positions": torch.arange(used - length, used),
        "key_positions": torch.arange(total),
        "key_mask": torch.arange(total) >= torch.tensor([[3], [0]]),
    }
    dead = ~call["key_mask"] | (torch.arange(total) >= used)  # type: ignore[operator]
    for backend, dtype, gradient in calls(case, "positions", length == 3, math.isinf(poison)):
        sizes = ((2, H, length, D), (2, 1, total, D), (2, 1, total, D))
        inputs = [torch.randn(size).to(dtype) for size in sizes]
        dirty = [x.masked_fill(dead[:, None, :, None], poison) for x in inputs[1:]]
        # Few queries are decoded by another kernel, but only where nobody asks for gradients.
        for asked in {gradient, gradient and length > 1}:
            clean = both(inputs, spec, backend, asked, **call)
            found = both([inputs[0], *dirty], spec, backend, asked, **call)
            for a, b in zip(found, clean, strict=True):
                torch.testing.assert_close(a, b)


@every_score
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (0, 40, 50), (2, 0, 50), (2, 40, 0), (0, 0, 0), (1, 0, 1)]
)
def test_sizes_of_none_and_one(sizes: tuple[int, int, int], causal: bool, case: str) -> None:
    batch, length, total = sizes
    spec = make_spec(case, D, H)
    shapes = ((batch, H, length, D), (batch, 1, total, D), (batch, 1, total, 6))
    inputs = [torch.randn(shape) for shape in shapes]
    call: dict[str, Any] = {"causal": causal}
    if length > total:
        call["query_positions"] = torch.arange(length)
    for backend in ("auto", *BACKENDS):
        for gradient in (False, True):
            try:
                out, *gradients = both(inputs, spec, backend, gradient, **call)
            except ww.UnsupportedError as error:
                assert backend not in ("auto", "reference", "sdpa", "cpu"), error
                continue
            assert out.shape == (batch, H, length, 6)
            wanted = inputs[2].expand(out.shape) if sizes == (1, 1, 1) else torch.zeros_like(out)
            torch.testing.assert_close(out, wanted)
            for x in gradients[:2]:  # a single key has the weight 1, whatever it is
                assert x.abs().sum() <= 1e-6, backend


# Far away


@backends()
@pytest.mark.parametrize("far", [10**7, 2**24 - 9, 2**24])
@pytest.mark.parametrize("side", ["keys", "queries", "both"])
def test_phases_are_exact_far_away(side: str, far: int, backend: str) -> None:
    """To 1e-6 rad by 40 digits of mpmath, read off the weight of one key beside a fixed one.

    All magnitudes but one channel's are nothing. Two keys share a query; one is scored by the
    cosine of its phase, the other by that at distance 0, and values tell their weights.
    """
    dim, scale = 4, 2.0
    encoding = ww.PoPE(dim, 1, delta=None, scale=scale)
    spec = encoding()
    at_q = torch.tensor([far if side != "keys" else 5])
    at_k = torch.tensor([far - 77 if side == "both" else 5 if side == "queries" else far])
    at_k = torch.cat((at_k, at_q))
    call = {"query_positions": at_q, "key_positions": at_k}
    v = torch.tensor([1.0, -1.0])[None, None, :, None]
    for phase in (0.0, -math.pi / 2):  # cosine, then sine
        turned = replace(spec, phase=torch.full((1, dim), phase).double())
        for c in range(dim):
            one = torch.full((dim,), -1e4)
            one[c] = math.log(math.expm1(1.0))  # a magnitude of 1
            q, k = one.view(1, 1, 1, dim), one.expand(1, 1, 2, dim)
            with torch.no_grad():
                out = ww.attention(q, k, v, turned, backend=backend, **call)
            with mp.workdps(40):
                theta = mp.power(10000, -mpf(c) / dim)
                scores = [mp.cos((int(s) - int(at_q)) * theta + mpf(phase)) for s in at_k]
                wanted = float(mp.tanh(scale * (scores[0] - scores[1]) / 2))
            # A weight moves by at most scale / 2 times the phase; beside that, float32 itself.
            assert abs(out.item() - wanted) <= scale / 2 * 1e-6 + 4e-7, (c, phase)
