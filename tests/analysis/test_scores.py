"""Score statistics in blocks against the full matrix, for all that can hide or change a score."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from observed_cases import own, tokens
from torch import Tensor

from whatwhere.analysis import AttentionLayer, Seen, observed, scores

LENGTH, LENGTHS = 50, (9, 30, 50)
GENERATOR = torch.Generator().manual_seed(3)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def plain() -> Seen:
    q, k = random(2, 4, LENGTH, 6), random(2, 2, LENGTH, 6)
    layer = AttentionLayer(0, torch.nn.Identity(), False, heads=4, key_heads=2, head_dim=6)
    return Seen(layer, q, k, q, k, scale=0.7)


def kept() -> Tensor:
    """A mask under which every query sees itself and some earlier keys."""
    chosen = torch.rand(2, 1, LENGTH, LENGTH, generator=GENERATOR) < 0.6
    return (chosen | torch.eye(LENGTH, dtype=torch.bool)).tril()


def block_rule(rows: Tensor, columns: Tensor) -> Tensor:
    return (columns[None] <= rows[:, None]) & ((rows[:, None] - columns[None]) % 3 != 1)


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 8},
    "every key": {"causal": False},
    "mask": {"mask": kept()},
    "added mask": {"mask": torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(~kept(), -math.inf)},
    "lowest number": {
        "mask": torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(
            ~kept(), torch.finfo(torch.float32).min
        )
    },
    "rule": {"mask": block_rule},
    "softcap": {"softcap": 1.5},
    "slopes": {"slopes": torch.tensor([0.5, 0.1, 0.0, 2.0])},
    "sinks": {"sinks": torch.tensor([1.0, -3.0, 0.0, 9.0])},
    "bias": {"bias": random(1, 4, LENGTH, LENGTH)},
    "cap, window and sinks": {"softcap": 2.0, "window": 5, "sinks": torch.ones(4)},
}


def full(seen: Seen) -> tuple[Tensor, Tensor]:
    """Scores ``(B, H, T, T)`` with ``-inf`` for hidden keys, and weights; by the formula."""
    keys = seen.keys.repeat_interleave(2, dim=1)
    found = torch.einsum("bhtd,bhsd->bhts", seen.queries, keys) * seen.scale
    if seen.softcap is not None:
        found = seen.softcap * torch.tanh(found / seen.softcap)
    t = torch.arange(LENGTH)
    if seen.slopes is not None:
        found = found - seen.slopes.double()[:, None, None] * (t[:, None] - t)
    if seen.bias is not None:
        found = found + seen.bias
    visible = t <= t[:, None] if seen.causal else torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    if seen.window is not None:
        visible = visible & (t > t[:, None] - seen.window)
    if callable(seen.mask):
        visible = seen.mask(t, t)
    elif seen.mask is not None:
        visible = seen.mask if seen.mask.dtype == torch.bool else seen.mask == 0
    found = found.masked_fill(~visible, -math.inf)
    if seen.sinks is None:
        return found, found.softmax(-1)
    beside = seen.sinks.double()[:, None, None].expand(2, 4, LENGTH, 1)
    return found, torch.cat((found, beside), -1).softmax(-1)[..., :-1]


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_the_whole_matrix(name: str) -> None:
    seen = replace(plain(), **CASES[name])
    expected, weights = full(seen)
    for at_once in (1, 700, 2**20):
        found = torch.full_like(expected, -math.inf)
        mixed = torch.zeros_like(expected)
        for block in scores.blocks(seen, torch.float64, at_once):
            at = (block.text, block.heads, block.rows, block.columns)
            found[at] = block.scores
            counted = (block.scores != -math.inf).sum(-1)
            assert torch.equal(block.counts.expand_as(counted), counted)
            mixed[at] = block.weights()
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(mixed, weights, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_the_whole_matrix(name: str) -> None:
    seen = replace(plain(), **CASES[name])
    expected, weights = full(seen)
    found = scores.measure(seen, LENGTHS)
    visible = expected != -math.inf
    rows = {
        "sink_mass": weights[..., 0].where(visible[..., 0], math.nan),
        "largest_score": expected.amax(-1),
        "positive_share": (expected > 0).sum(-1) / visible.sum(-1).double(),
    }
    for measure, values in rows.items():
        for index, (i, j) in enumerate(zip((0, *LENGTHS), LENGTHS, strict=False)):
            mean = values[..., i:j].nanmean(-1)
            mine = found[measure][1, ..., index]
            torch.testing.assert_close(mine, mean, atol=1e-12, rtol=0, equal_nan=True)


def test_scores_before_the_encoding_are_of_what_is_there_then() -> None:
    after = replace(plain(), slopes=torch.ones(4), bias=random(1, 4, LENGTH, LENGTH), window=20)
    q, k = random(2, 4, LENGTH, 3), random(2, 2, LENGTH, 3)
    seen = replace(after, queries_before=q, keys_before=k)
    found = scores.measure(seen, LENGTHS)
    expected = scores.measure(replace(plain(), queries=q, keys=k, window=20), LENGTHS)
    wanted = scores.measure(after, LENGTHS)
    for name in scores.NAMES:
        torch.testing.assert_close(found[name][0], expected[name][1], equal_nan=True)
        torch.testing.assert_close(found[name][1], wanted[name][1], equal_nan=True)


def test_a_window_beyond_the_sink_says_so() -> None:
    found = scores.measure(replace(plain(), window=4), LENGTHS)
    assert bool(found["sink_mass"][:, ..., 0].isfinite().all())
    assert bool(found["sink_mass"][:, ..., 1:].isnan().all())


def test_single_precision_is_within_the_budget() -> None:
    seen = plain()
    exact, quick = (scores.measure(seen, LENGTHS, d) for d in (torch.float64, torch.float32))
    for name in ("sink_mass", "largest_score"):
        torch.testing.assert_close(quick[name], exact[name], atol=1e-6, rtol=1e-6)


def test_low_precision_models_are_measured_in_float64() -> None:
    model, ids = own("rope").bfloat16(), tokens(length=LENGTH)
    found: list[Seen] = []
    with torch.no_grad(), observed(model, found.append):
        model(ids)
    seen = found[0]
    assert seen.queries.dtype == torch.bfloat16
    wide = replace(seen, queries=seen.queries.double(), keys=seen.keys.double())
    _, weights = full(wide)
    mine = scores.measure(seen, (LENGTH,))["sink_mass"][1, ..., 0]
    torch.testing.assert_close(mine, weights[..., 0].mean(-1), atol=1e-12, rtol=0)
