"""Starts of a PoPE layer from a RoPE layer: where they are exact, and how far off elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whatwhere as ww
from whatwhere.models import initialise, score_fit
from whatwhere.models.initialise import (
    SHARPNESS,
    PolarStart,
    from_centres,
    from_order,
    from_scores,
    from_signs,
    recombined,
)
from whatwhere.models.score_distil import Trained, distilled

N, H, G, T, D = 3, 4, 2, 24, 16
SCALE = D**-0.5
ROPE, POPE = ww.RoPE(D, H), ww.PoPE(D, H)
PAIR_FREQ, FREQ = ROPE.inv_freq()[0], POPE.inv_freq()[0]


def clusters(seed: int, spread: float = 0.5, groups: int = G) -> tuple[Tensor, Tensor]:
    """Queries and keys of every head around centres of their own, which do not depend on seed."""
    centres = torch.randn(2, 1, H, 1, D, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, N, H, T, D, generator=generator)
    q, k = 2 * centres + spread * noise
    return q, k[:, :: H // groups].contiguous()


def started(q: Tensor, k: Tensor, make: str) -> PolarStart:
    if make == "scores":
        return from_scores(q, k, PAIR_FREQ, FREQ, SCALE, sweeps=2, rows=T)
    if make == "order":
        return from_order(q.shape[1], k.shape[1], D, D, SCALE)
    return {"signs": from_signs, "centres": from_centres}[make](q, k, D, SCALE)


def new_scores(start: PolarStart, q: Tensor, k: Tensor, inv_freq: Tensor = FREQ) -> Tensor:
    spec = ww.ScoreSpec("polar", start.scale, inv_freq[None], phase=start.delta)
    q = torch.einsum("hcd,nhtd->nhtc", start.queries.to(q), q)
    return ww.scores(q, torch.einsum("hcd,nhtd->nhtc", start.keys.to(k), k), spec)


def old_scores(q: Tensor, k: Tensor) -> Tensor:
    return ww.scores(q, k, ww.ScoreSpec("rotate", SCALE, PAIR_FREQ[None]))


def divergence(start: PolarStart, q: Tensor, k: Tensor) -> float:
    """Mean KL of the new attention from the old, causal."""
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    old, new = (
        s.masked_fill(hidden, -1e9).log_softmax(-1)
        for s in (old_scores(q, k), new_scores(start, q, k))
    )
    return (old.exp() * (old - new)).sum(-1).mean().item()


MAKERS = ["order", "signs", "centres", "scores"]


@pytest.mark.parametrize("make", MAKERS)
def test_a_start_fits_the_encoding_it_is_for(make: str) -> None:
    start = started(*clusters(0), make)
    encoding = ww.PoPE(D, H, scale=start.scale)
    assert encoding.delta is not None and start.delta.shape == encoding.delta.shape
    assert ((start.delta >= -2 * math.pi) & (start.delta <= 0)).all()
    assert start.queries.shape == (H, D, D) and start.keys.shape == (G, D, D)
    assert start.queries.isfinite().all() and start.keys.isfinite().all()


@pytest.mark.parametrize("make", ["order", "signs"])
def test_permutations_and_signs_keep_all_there_is(make: str) -> None:
    start = started(*clusters(0), make)
    gain = 1.0 if make == "order" else SHARPNESS
    for maps in (start.queries / gain, start.keys / gain):
        assert torch.equal(maps @ maps.mT, torch.eye(D).expand_as(maps))
        assert set(maps.unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_order_gives_each_channel_the_nearest_frequency_above_it() -> None:
    rows = from_order(1, 1, D, D, SCALE).queries[0].argmax(-1)
    pairs = torch.cat((PAIR_FREQ, PAIR_FREQ))[rows]
    assert torch.allclose(pairs[::2], FREQ[::2], rtol=1e-12)
    assert (pairs[1::2] > FREQ[1::2]).all() and (pairs[3::2] < FREQ[1:-2:2]).all()


def one_sided(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries of one phase in each pair, keys within 45 degrees of their own mean; float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    size_q, size_k = 0.5 + random(N, H, T, D // 2), 0.5 + random(N, G, T, D // 2)
    turn_q, turn_k = 6 * random(1, H, 1, D // 2), 6 * random(1, G, 1, D // 2)
    # In opposite pairs, so that the mean phase is turn_k itself.
    spread = 0.7 * random(N, G, T // 2, D // 2)
    spread = torch.stack((spread, -spread), 3).flatten(2, 3)
    size_k = size_k[:, :, ::2].repeat_interleave(2, 2)
    q, k = torch.polar(size_q, turn_q + 0 * size_q), torch.polar(size_k, turn_k + spread)
    return torch.cat((q.real, q.imag), -1), torch.cat((k.real, k.imag), -1)


def softplus_budget(start: PolarStart, q: Tensor, k: Tensor) -> float:
    """Most that scores can be off for ``softplus`` in place of ``relu``.

    ``0 <= softplus(x) - relu(x) <= ln 2``, so a product of two is off by at most
    ``ln 2 (u + v) + ln(2)^2``.
    """
    u = torch.einsum("hcd,nhtd->nhtc", start.queries.double(), q).relu().amax((0, 2))
    v = torch.einsum("hcd,nhtd->nhtc", start.keys.double(), k).relu().amax((0, 2))
    v = v.repeat_interleave(len(u) // len(v), 0)
    return start.scale * (math.log(2) * (u + v) + math.log(2) ** 2).sum(-1).max().item()


@pytest.mark.parametrize("sharpness", [4.0, 64.0, 1024.0])
def test_centres_give_rope_s_scores_where_phases_are_the_head_s(
    sharpness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialise, "SHARPNESS", sharpness)
    q, k = one_sided()
    start = from_centres(q, k, D, SCALE)
    same = PAIR_FREQ.repeat_interleave(2)  # without PoPE's lower frequency of odd channels
    error = (new_scores(start, q, k, same) - old_scores(q, k)).abs().max().item()
    rounding = 1e-5
    assert error <= softplus_budget(start, q, k) + rounding


def test_scores_find_what_polar_channels_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialise, "SHARPNESS", 64.0)
    q, k = one_sided()
    same = PAIR_FREQ.repeat_interleave(2)
    start = from_scores(q, k, PAIR_FREQ, same, SCALE, sweeps=4, directions=16, rows=T)
    old, new = old_scores(q, k), new_scores(start, q, k, same)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    kl = [
        (p.exp() * (p - r)).sum(-1).mean().item()
        for p, r in [
            [s.masked_fill(hidden, -1e9).log_softmax(-1) for s in (old, other)]
            for other in (new, torch.zeros_like(old))
        ]
    ]
    assert kl[0] < 0.01 * kl[1]


def test_on_other_text_each_start_is_better_than_the_one_before() -> None:
    q, k = clusters(0)
    fresh = clusters(1)
    found = [divergence(started(q, k, make), *fresh) for make in MAKERS]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.25 * found[0]


def test_every_step_leaves_less_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the heads that share keys, since those choose together."""
    ridge = 1e-6  # steps minimise the error and this penalty; the test is of the error
    monkeypatch.setattr(score_fit, "_RIDGE", ridge)
    q, k = clusters(0)
    kwargs: dict[str, Any] = {"directions": 12, "rows": T, "sharpness": SHARPNESS}
    fit = score_fit.ScoreFit(q, k, PAIR_FREQ, FREQ, SCALE, **kwargs)

    def errors() -> Tensor:
        return (fit.weight * fit.left.square()).sum((1, 2, 3)).view(G, H // G).sum(1)

    assert torch.allclose(fit.error(), torch.ones(H))
    before = everything = errors()
    for _ in range(2):
        for channel in range(D):
            fit.choose(channel)
            assert (errors() <= before + 1e-3 * everything).all()
            before = errors()
        fit.solve()
        assert (errors() <= before + 1e-3 * everything).all()
        before = errors()
    assert (fit.error() < 0.25).all()


def test_fit_s_own_error_is_that_of_the_scores_it_returns() -> None:
    q, k = clusters(0)
    kwargs: dict[str, Any] = {"directions": 12, "rows": T, "sharpness": 1e3}
    fit = score_fit.ScoreFit(q, k, PAIR_FREQ, FREQ, SCALE, **kwargs)
    for channel in range(D):
        fit.choose(channel)
    start = initialise._from_fit(fit, from_order(H, G, D, D, SCALE), SCALE)
    # Sharp magnitudes, so that a gain inside softplus is one outside.
    sharp = PolarStart(
        start.queries / SHARPNESS * 1e3, start.keys / SHARPNESS * 1e3, start.delta, SCALE / 1e6
    )
    off = ((new_scores(sharp, q, k) - old_scores(q, k)) / SCALE).transpose(0, 1).flip(2)
    off = off - (fit.weight * off).sum(-1, keepdim=True)
    error = (fit.weight * off.square()).sum((1, 2, 3))
    error = error / (fit.weight * fit.target.square()).sum((1, 2, 3))
    assert torch.allclose(error, fit.error(), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("make", ["centres", "scores", "signs"])
def test_grouped_heads_are_the_same_heads_repeated(make: str) -> None:
    q, k = clusters(0, groups=1)
    q = q[:, :1]
    one = started(q, k, make)
    many = started(q.repeat(1, H, 1, 1), k, make)
    assert many.keys.shape == (1, D, D)
    assert torch.allclose(many.keys, one.keys, atol=1e-4)
    assert torch.allclose(many.queries, one.queries.repeat(H, 1, 1), atol=1e-4)
    assert torch.allclose(many.delta.cos(), one.delta.cos().repeat(H, 1), atol=1e-4)


@pytest.mark.parametrize("make", ["signs", "centres", "scores"])
def test_channels_that_did_not_rotate_give_what_they_gave(make: str) -> None:
    turning = D // 2
    q, k = clusters(0)
    inv_freq = ww.RoPE(D, H, fraction=0.5).inv_freq()[0]
    encoding = ww.PoPE(D, H, fraction=0.5, rest="raw")
    maker: Callable[..., PolarStart] = {"signs": from_signs, "centres": from_centres}.get(
        make, from_scores
    )
    frequencies = (inv_freq, encoding.inv_freq()[0]) if make == "scores" else (turning,)
    start = maker(q, k, *frequencies, SCALE)
    rest_q = torch.einsum("hcd,nhtd->nhtc", start.queries, q)[..., turning:]
    rest_k = torch.einsum("hcd,nhtd->nhtc", start.keys, k)[..., turning:]
    now = start.scale * torch.einsum("nhtc,nhsc->nhts", rest_q, rest_k.repeat_interleave(2, 1))
    before = SCALE * torch.einsum(
        "nhtc,nhsc->nhts", q[..., turning:], k[..., turning:].repeat_interleave(2, 1)
    )
    assert torch.allclose(now, before, rtol=1e-5, atol=1e-5)
    assert start.queries[:, :turning, turning:].count_nonzero() == 0


def refined(start: PolarStart, **kwargs: Any) -> PolarStart:
    kwargs = {"steps": 30, **kwargs}
    return distilled(start, *clusters(0), PAIR_FREQ, FREQ, SCALE, **kwargs)


@pytest.mark.parametrize("make", ["order", "signs", "centres"])
@pytest.mark.parametrize("train", ["all", "maps", "delta"])
def test_distilled_starts_are_better_on_other_text(make: str, train: Trained) -> None:
    start = started(*clusters(0), make)
    kept = [x.clone() for x in (start.queries, start.keys, start.delta)]
    better = refined(start, train=train)
    fresh = clusters(1)
    share = {"all": 0.6, "maps": 0.75, "delta": 0.98}[train]
    assert divergence(better, *fresh) < share * divergence(start, *fresh)
    assert ((better.delta >= -2 * math.pi) & (better.delta <= 0)).all()
    assert torch.equal(better.queries, start.queries) == (train == "delta")
    assert torch.equal(better.keys, start.keys) == (train == "delta")
    if train == "maps":
        assert torch.allclose(better.delta.cos(), start.delta.cos(), atol=1e-6)
    for before, now in zip(kept, (start.queries, start.keys, start.delta), strict=True):
        assert torch.equal(before, now)


def test_distilling_is_the_same_each_time_and_needs_no_gradients_around_it() -> None:
    start = started(*clusters(0), "centres")
    with torch.inference_mode():
        queries, keys = clusters(0)
    with torch.no_grad():
        one = distilled(start, queries, keys, PAIR_FREQ, FREQ, SCALE, steps=3)
    two = refined(start, steps=3)
    assert torch.equal(one.queries, two.queries) and torch.equal(one.delta, two.delta)
    assert not one.queries.requires_grad and not one.delta.requires_grad


def test_signs_pass_through_a_norm_by_head() -> None:
    q, k = clusters(0)
    start = from_signs(q, k, D, SCALE)
    hidden, rows = torch.randn(5, 20), torch.randn(H * D, 20)
    norm, moved = nn.RMSNorm(D), nn.RMSNorm(D)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    moved.weight.data = start.queries[0].abs() @ norm.weight.data
    before = norm((hidden @ rows.T).view(5, H, D))
    after = moved((hidden @ recombined(start.queries, rows).T).view(5, H, D))
    wanted = torch.einsum("hcd,nhd->nhc", start.queries, before)
    assert torch.allclose(after, wanted, rtol=1e-4, atol=1e-4)


def test_signs_make_opposed_and_crossed_clusters_positive() -> None:
    """Tight clusters at -90 and 180 degrees: no channel may be left where softplus is flat."""
    for turn in torch.arange(8) * math.pi / 2:
        q = torch.tensor([2.0, 0.1]).repeat(1, 1, T, 1)
        z = torch.polar(torch.tensor(2.0), turn)
        k = torch.tensor([z.real, z.imag]).repeat(1, 1, T, 1)
        start = from_signs(q, k, 2, 1.0)
        spec = ww.ScoreSpec("polar", start.scale, torch.zeros(1, 2).double(), phase=start.delta)
        new = ww.scores(q @ start.queries.mT, k @ start.keys.mT, spec)
        assert torch.allclose(new, q @ k.mT, atol=0.7)  # of 4; ln 2 / 4 a magnitude


def test_a_projection_s_bias_is_recombined_as_its_weight() -> None:
    maps = torch.randn(H, D, D)
    weight, bias, hidden = torch.randn(H * D, 9), torch.randn(H * D), torch.randn(6, 9)
    before = (hidden @ weight.T + bias).view(6, H, D)
    after = (hidden @ recombined(maps, weight).T + recombined(maps, bias)).view(6, H, D)
    assert torch.allclose(after, torch.einsum("hcd,nhd->nhc", maps, before), atol=1e-4)
    assert recombined(maps, weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: from_centres(q[0], k, D, SCALE), "queries has shape"),
        (lambda q, k: from_centres(q, k[:, :, 1:], D, SCALE), "keys has shape"),
        (lambda q, k: from_signs(q[:, :3], k, D, SCALE), "keys has shape"),
        (lambda q, k: from_centres(q, k, 7, SCALE), "turning=7"),
        (lambda q, k: from_order(H, G, D, D + 2, SCALE), "turning=18"),
        (lambda q, k: from_scores(q, k, PAIR_FREQ, PAIR_FREQ, SCALE), "frequencies has shape"),
        (lambda q, k: from_scores(q, k, PAIR_FREQ, FREQ, SCALE, sweeps=0), "sweeps=0"),
        (
            lambda q, k: distilled(
                from_order(H, G, D, D, SCALE), q, k, PAIR_FREQ, FREQ, SCALE, steps=0
            ),
            "steps=0",
        ),
        (lambda q, k: recombined(torch.eye(D).repeat(H, 1, 1), q[0, 0]), "rows has shape"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*clusters(0))
