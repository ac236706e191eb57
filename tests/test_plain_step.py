"""One query that sees every key on a CPU: the short way computes what the long one does."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import whatwhere as ww
from encoding_cases import make_spec
from whatwhere.attention import api

# Scores for which there is a short way, and some for which there is none.
SHORT = ("pope", "pope/no-delta", "pope/relu", "nope", "learned")
LONG = ("pope/quarter-raw", "pope-id", "rope", "alibi", "pope/temperature", "pope-id/temperature")


def arguments(groups: int, total: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(total)
    shapes = ((2, 4, 1, 16), (2, 4 // groups, total, 16), (2, 4 // groups, total, 16))
    return [torch.randn(shape, generator=made, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("total", [1, 2, 63, 1000])
@pytest.mark.parametrize("case", SHORT)
def test_within_twice_the_error_of_the_reference(case: str, total: int, groups: int) -> None:
    q, k, v = arguments(groups, total)
    spec = make_spec(case)
    with torch.no_grad():
        found = api._plain_step(q, k, v, spec)
        assert found is not None
        wide = [x.double() for x in (q, k, v)]
        exact = ww.attention(*wide, spec, causal=True, backend="reference")
        other = ww.attention(q, k, v, spec, causal=True, backend="reference")
        assert torch.equal(ww.attention(q, k, v, spec, causal=True), found)
    budget = 2 * (other - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * v.abs().max()
    assert (found - exact).abs().max() <= budget


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(default: torch.dtype) -> None:
    q, k, v = arguments(2, 9)
    spec, before = make_spec("pope"), torch.get_default_dtype()
    with torch.no_grad():
        expected = api._plain_step(q, k, v, spec)
        torch.set_default_dtype(default)
        try:
            found = api._plain_step(q, k, v, spec)
        finally:
            torch.set_default_dtype(before)
    assert expected is not None and found is not None
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", LONG)
def test_other_scores_go_the_long_way(case: str) -> None:
    q, k, v = arguments(1, 9)
    with torch.no_grad():
        assert api._plain_step(q, k, v, make_spec(case)) is None


def test_what_else_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, half precision, capped scores, features wider than what is held, autocast."""
    q, k, v = arguments(1, 9)
    pope, nope = make_spec("pope"), make_spec("nope")
    assert pope.phase is not None and not pope.phase.requires_grad
    learned = replace(pope, phase=pope.phase.clone().requires_grad_())
    assert api._plain_step(q, k, v, learned) is None
    assert api._plain_step(q, k, v, replace(nope, softcap=2.0)) is None
    half = [x.bfloat16() for x in (q, k, v)]
    assert api._plain_step(*half, pope) is None
    with torch.autocast("cpu"):
        assert api._plain_step(q, k, v, nope) is None
    several = torch.randn(2, 4, 2, 16)
    assert api._plain_step(several, k, v, nope) is None
    monkeypatch.setattr(sys.modules["whatwhere.attention.cpu.decode"], "_WHOLE", 100)
    with torch.no_grad():
        assert api._plain_step(q, k, v, pope) is None


def test_any_argument_beyond_causality_is_heeded() -> None:
    q, k, v = arguments(1, 9)
    spec = make_spec("pope")
    extras: dict[str, Any] = {
        "key_mask": torch.arange(9).expand(2, -1) > 3,
        "segments": torch.arange(9).expand(2, -1) // 5,
        "window": 3,
        "query_positions": torch.tensor([4]),
        "key_positions": torch.arange(9) * 2,
    }
    with torch.no_grad():
        plain = ww.attention(q, k, v, spec, causal=True)
        for name, value in extras.items():
            given = {name: value}
            if name == "key_positions":
                given["query_positions"] = torch.tensor([16])
            found = ww.attention(q, k, v, spec, causal=True, **given)
            expected = ww.attention(q, k, v, spec, causal=True, backend="reference", **given)
            assert torch.allclose(found, expected, atol=1e-5), name
            assert not torch.allclose(found, plain, atol=1e-3), name


def test_mistakes_are_named_as_ever() -> None:
    q, k, v = arguments(1, 9)
    with pytest.raises(ValueError, match="head_dim must agree"):
        ww.attention(q[..., :8], k, v, make_spec("nope"), causal=True)
    with pytest.raises(ValueError, match="spec turns 32 channels"):
        ww.attention(q, k, v, make_spec("pope", head_dim=32), causal=True)
    with pytest.raises(ValueError, match="for 8 heads"):
        ww.attention(q, k, v, make_spec("pope", num_heads=8), causal=True)
    with pytest.raises(ValueError, match="causal is a int"):
        ww.attention(q, k, v, make_spec("nope"), causal=1)  # type: ignore[arg-type]
