"""`attention`, `explain`, `grid` and the backends as a caller meets them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import whatwhere as ww
from encoding_cases import BACKENDS, CASES, KINDS, SCORES, make, make_spec, refusal, tensors

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Kinds of call that the backends of this package must take on a CPU, without and with gradients.
ALL = set(KINDS)
TAKES: dict[str, tuple[set[str], set[str]]] = {
    "reference": (ALL, ALL),
    "sdpa": (ALL, ALL),
    "flex": (ALL, set()),
    "cpu": (ALL, ALL),
    "triton": (ALL, ALL),
    "widened": (ALL, ALL),
}


def example(**given: Any) -> dict[str, Any]:
    q, k, v = tensors((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8), dtype=torch.float32)
    return {"q": q, "k": k, "v": v, "spec": make_spec("rope", 8, 4), **given}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_what_a_backend_takes_and_how_it_refuses(case: str, backend: str, kind: str) -> None:
    for gradient, wanted in enumerate(TAKES.get(backend, (set(), set()))):
        why = refusal(case, backend, kind, bool(gradient), torch.float32)
        if kind in wanted:
            assert why is None
        if why is not None:  # attention itself must refuse too, in one line, and never fall back
            q, k, v = tensors((1, 2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4), dtype=torch.float32)
            q.requires_grad_(bool(gradient))
            call = KINDS[kind](1, 4) | {"backend": backend}
            with pytest.raises(ww.UnsupportedError) as caught:
                ww.attention(q, k, v, make_spec(case, 4, 2), **call)
            message = str(caught.value)
            assert "\n" not in message
            assert repr(backend) in message
            assert "reference" in message


def test_flex_has_no_backward_on_a_cpu_and_says_so() -> None:
    call = example()
    call["k"].requires_grad_()
    with pytest.raises(ww.UnsupportedError, match="backward"):
        ww.attention(**call, backend="flex")
    with torch.no_grad():
        ww.attention(**call, backend="flex")
    # A learned phase is reason enough.
    call = example(spec=ww.PoPE(8, 4)())
    with pytest.raises(ww.UnsupportedError, match="backward"):
        ww.attention(**call, backend="flex")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("case", SCORES)
def test_auto_takes_every_call_and_does_what_explain_says(
    case: str, gradient: bool, kind: str
) -> None:
    call = example(spec=make_spec(case, 8, 4)) | KINDS[kind](2, 6)
    call["q"].requires_grad_(gradient)
    told = ww.explain(**call)
    assert told.backend in ww.BACKENDS
    out = ww.attention(**call)
    assert torch.equal(out, ww.attention(**call, backend=told.backend))
    wanted = ww.attention(**call, backend="reference")
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    # What it says of the others is what they do.
    assert told.backend not in told.refused
    turn = SCORES.index(case) + [*KINDS].index(kind) + gradient
    for name in ww.BACKENDS:
        if name in told.refused:
            with pytest.raises(ww.UnsupportedError):
                ww.attention(**call, backend=name)
        # What is interpreted is slow: it meets any two of the three parameters, not all three.
        elif name not in ("triton", "widened") or turn % 2:
            ww.attention(**call, backend=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_auto_takes_every_dtype(dtype: torch.dtype) -> None:
    for case in CASES:
        q, k, v = tensors((1, 4, 5, 8), (1, 1, 5, 8), (1, 1, 5, 3), dtype=dtype)
        out = ww.attention(q, k, v, make_spec(case, 8, 4), causal=True)
        assert out.dtype == dtype
        assert out.shape == (1, 4, 5, 3)


def test_explanation_is_text_that_names_all_it_knows() -> None:
    call = example()
    call["q"].requires_grad_()
    told = ww.explain(**call)
    text = str(told)
    assert told.backend in text
    assert told.reason in text
    for name, why in told.refused.items():
        assert name in text
        assert why in text
    assert "flex" in told.refused
    assert told.cache_form in text
    assert str(told.cache_numbers) in text


@pytest.mark.parametrize("case", CASES)
def test_cache_form_and_numbers(case: str) -> None:
    spec = make_spec(case, 8, 4)
    form = ww.cache_form(spec, torch.device("cpu"))
    assert form == ww.cache_form(spec, "cpu") == ww.cache_form(spec)
    told = ww.explain(**example(spec=spec))
    assert told.cache_form == form
    assert told.cache_numbers == 8 + (spec.feature_dim(8) if form == "encoded" else 8)


def test_explain_computes_nothing() -> None:
    """On the meta device nothing can be computed, and a 4 GiB matrix would not fit a test."""
    q = torch.empty(8, 32, 8192, 128, device="meta")
    told = ww.explain(q, q, q, make_spec("rope", 128, 32), causal=True)
    assert told.backend in ww.BACKENDS


def test_a_named_backend_is_named_in_the_explanation() -> None:
    for backend in ww.BACKENDS:
        assert ww.explain(**example(), backend=backend).backend == backend
    with pytest.raises(ValueError, match="tritn"):
        ww.explain(**example(), backend="tritn")


def test_scores_are_float32_at_least() -> None:
    for dtype, wanted in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        q, k = tensors((1, 4, 3, 8), (1, 2, 5, 8), dtype=dtype)
        got = ww.scores(q, k, make_spec("pope", 8, 4))
        assert got.dtype == wanted
        assert got.shape == (1, 4, 3, 5)


def test_grid_is_row_major() -> None:
    positions = ww.grid(2, 3, 4)
    assert positions.shape == (24, 3)
    assert positions.dtype == torch.int64
    wanted = [[f, y, x] for f in range(2) for y in range(3) for x in range(4)]
    assert positions.tolist() == wanted


def test_a_grid_of_one_axis_serves_encodings_of_one_axis() -> None:
    """Positions may carry a last axis of the size of the axes: (T, 1) is (T,)."""
    call = example(causal=True)
    at = ww.grid(6)
    wanted = ww.attention(**call)
    assert torch.equal(
        ww.attention(**call, query_positions=at[:, 0], key_positions=at[:, 0]), wanted
    )
    batched = at.expand(2, 6, 1)
    got = ww.attention(**call, query_positions=batched, key_positions=batched)
    torch.testing.assert_close(got, wanted)
    got = ww.attention(**call, query_positions=at, key_positions=at)
    torch.testing.assert_close(got, wanted)


def test_key_mask_where_batch_equals_length_is_by_key() -> None:
    """(B, S), never (T, S): another implementation takes one for the other where B == T."""
    q, k, v = tensors((5, 2, 5, 8), (5, 2, 5, 8), (5, 2, 5, 8))
    spec = make_spec("pope", 8, 2)
    mask = torch.rand(5, 5) < 0.5
    mask[:, 0] = True
    for backend in ("reference", "sdpa", "cpu"):
        out = ww.attention(q, k, v, spec, key_mask=mask, backend=backend)
        at = torch.arange(5)
        for b in range(5):
            kept = mask[b].nonzero()[:, 0]
            alone = ww.attention(
                q[b : b + 1],
                k[b : b + 1, :, kept],
                v[b : b + 1, :, kept],
                spec,
                query_positions=at,
                key_positions=kept,
                backend="reference",
            )
            torch.testing.assert_close(out[b : b + 1], alone)


def test_window_counts_positions_its_own_included() -> None:
    q = k = torch.zeros(1, 1, 6, 8)
    v = torch.eye(6)[None, None]
    out = ww.attention(q, k, v, make_spec("nope", 8, 1), causal=True, window=2)[0, 0]
    wanted = [[1.0 if s in (t, t - 1) else 0.0 for s in range(6)] for t in range(6)]
    assert ((out > 0).float() == torch.tensor(wanted)).all()
    # By position, not by row: a gap in positions shortens what is seen.
    at = torch.tensor([0, 1, 3, 4, 8, 9])
    out = ww.attention(
        q,
        k,
        v,
        make_spec("nope", 8, 1),
        causal=True,
        window=2,
        query_positions=at,
        key_positions=at,
    )[0, 0]
    ahead = at[:, None] - at[None]
    assert ((out > 0) == ((ahead >= 0) & (ahead < 2))).all()


def test_make_equals_the_class() -> None:
    made = ww.make("pope", head_dim=8, num_heads=2, fraction=0.5, delta=None)
    assert isinstance(made, ww.PoPE)
    direct = ww.PoPE(head_dim=8, num_heads=2, fraction=0.5, delta=None)
    assert torch.equal(made().inv_freq, direct().inv_freq)  # type: ignore[arg-type]
    high = ww.make("rope-high", head_dim=8, num_heads=2, train_length=128)
    assert isinstance(high, ww.RoPEID)
    assert high().num_frequencies == 4
    assert high().temperature_length is None


@pytest.mark.parametrize("name", ww.ENCODINGS)
def test_encodings_are_modules_that_print_and_survive_copies(name: str) -> None:
    encoding = make(name, 8, 2)
    assert isinstance(encoding, torch.nn.Module)
    assert "head_dim=8" in repr(encoding)
    other = make(name, 8, 2)
    other.load_state_dict(encoding.state_dict())
    q, k = tensors((1, 2, 3, 8), (1, 2, 3, 8))
    torch.testing.assert_close(ww.scores(q, k, other()), ww.scores(q, k, encoding()))
    assert encoding(device="cpu").scale == encoding().scale
    assert encoding("meta").inv_freq is None or encoding("meta").inv_freq.is_meta  # type: ignore[union-attr]
