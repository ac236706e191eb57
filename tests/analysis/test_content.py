"""What content does to phases: closed forms in plain loops, PoPE's zero, RoPE's extremes."""

from __future__ import annotations

import cmath
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observed_cases import own, tokens, unconverted
from torch import Tensor, nn

import whatwhere as ww
from convert_cases import converted
from whatwhere.analysis import AttentionLayer, Seen, content, learned_delta, observed, trace

EXACT = 1e-10


def rotating(q: Tensor, k: Tensor, frequencies: tuple[float, ...]) -> Seen:
    """A layer without scores of its own that turns channels ``c`` and ``c + R``."""
    count = len(frequencies)
    layer = AttentionLayer(0, nn.Identity(), False, q.shape[1], k.shape[1], q.shape[-1])
    layer.feature, layer.frequencies = "rotate", frequencies
    layer.pairs = tuple((c, c + count) for c in range(count))
    return Seen(layer, q, k, q, k, scale=1.0)


def spread(best: list[int]) -> float:
    """Mean distance of two of them."""
    apart = [abs(a - b) for i, a in enumerate(best) for b in best[:i]]
    return sum(apart) / len(apart)


@pytest.mark.parametrize("chosen", [tuple(range(12)), (0, 3, 7, 11)], ids=len)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_measures_are_their_formulas(chosen: tuple[int, ...], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    length, theta = 12, (0.9, 0.2, 0.01)
    q = torch.randn(1, 4, length, 7, generator=draw, dtype=torch.float64)
    k = torch.randn(1, 2, length, 7, generator=draw, dtype=torch.float64)
    found = content.measure(rotating(q, k, theta), samples=len(chosen))
    assert found is not None
    for head in range(4):
        group = head // 2
        z = {
            (t, s): [
                complex(q[0, head, t, c], q[0, head, t, c + 3])
                * complex(k[0, group, s, c], -k[0, group, s, c + 3])
                for c in range(3)
            ]
            for t, s in product(range(length), range(length))
        }
        together = sum(abs(sum(row[c] for row in z.values())) / len(z) for c in range(3))
        alone = sum(sum(abs(row[c]) for row in z.values()) / len(z) for c in range(3))
        assert abs(float(found.content_shift[0, head]) - (1 - together / alone)) < EXACT

        def score(row: list[complex], lag: int) -> float:
            return sum((row[c] * cmath.exp(1j * lag * theta[c])).real for c in range(3))

        asked = [z[pair] for pair in product(chosen, chosen)]
        best = [max(range(length), key=lambda lag: score(row, lag)) for row in asked]
        assert abs(float(found.offset_shift[0, head]) - spread(best)) < EXACT
        norm = q[0, head, :, [0, 3]].norm(dim=-1).mean()
        assert abs(float(found.query_norm[0, head, 0] - norm)) < EXACT
        norm = k[0, group, :, [1, 4]].norm(dim=-1).mean()
        assert abs(float(found.key_norm[0, group, 1] - norm)) < EXACT


def test_best_offsets_of_polar_scores_are_those_of_the_score() -> None:
    draw, length, theta = torch.Generator().manual_seed(0), 30, (0.8, 0.3, 0.1)
    mu = torch.rand(2, 1, 2, length, 3, generator=draw, dtype=torch.float64)
    delta = -2 * math.pi * torch.rand(2, 3, generator=draw, dtype=torch.float64)
    layer = AttentionLayer(0, nn.Identity(), False, 2, 2, 3)
    layer.feature, layer.frequencies = "polar", theta
    found = content.measure(Seen(layer, *mu, *mu, scale=1.0, phase=delta), samples=length)
    assert found is not None and bool((found.content_shift == 0).all())
    lags = torch.arange(length, dtype=torch.float64)
    for head in range(2):
        # cos((s - t) theta + delta), lag = t - s
        cosines = torch.cos(-lags * torch.tensor(theta)[:, None] + delta[head, :, None])
        weights = mu[0, 0, head, :, None] * mu[1, 0, head]
        best = (weights.flatten(0, 1) @ cosines).argmax(-1).tolist()
        assert spread(best) > 0
        assert abs(float(found.offset_shift[0, head]) - spread(best)) < 1e-9


def test_content_that_never_turns_shifts_nothing() -> None:
    magnitude = torch.rand(1, 1, 20, 3, dtype=torch.float64) + 0.1
    still = torch.cat((magnitude * math.cos(1.0), magnitude * math.sin(1.0)), dim=-1)
    found = content.measure(rotating(still, still, (1.0, 0.1, 0.01)))
    assert found is not None
    assert abs(float(found.content_shift)) < EXACT and float(found.offset_shift) == 0


def test_content_that_turns_anywhere_shifts_all() -> None:
    angle = 2 * math.pi * torch.arange(64, dtype=torch.float64) / 64
    q = torch.stack((angle.cos(), angle.sin()), -1)[None, None]
    found = content.measure(rotating(q, q, (0.1,)))
    assert found is not None and abs(float(found.content_shift) - 1) < EXACT


@pytest.mark.parametrize("encoding", ["pope", "pope-id"])
def test_polar_scores_shift_by_nothing_at_all(encoding: str) -> None:
    for model in (own(encoding), own(encoding).bfloat16(), converted("llama", encoding)):
        assert (trace(model, tokens()).what_where()["content_shift"] == 0).all()


@pytest.mark.parametrize("encoding", ["pope", "pope-id"])
def test_without_delta_the_best_offset_never_moves(encoding: str) -> None:
    model = own(encoding, position_encoding_options={"delta": "zero"})
    assert (trace(model, tokens()).what_where()["offset_shift"] == 0).all()


@pytest.mark.parametrize("encoding", ["rope", "rope-id", "yarn"])
def test_rotations_shift(encoding: str) -> None:
    for model in (own(encoding), converted("qwen3", encoding)):
        found = trace(model, tokens()).what_where()
        assert (found["content_shift"] > 0.05).all() and (found["offset_shift"] > 0).all()
    assert (trace(unconverted("gpt_neox"), tokens()).what_where()["content_shift"] > 0.05).all()


def test_signed_channels_bring_the_shift_back() -> None:
    # The ablation without softplus: a sign is a phase of pi, and comes from content.
    model = own("pope", position_encoding_options={"magnitude": "none"})
    assert (trace(model, tokens()).what_where()["content_shift"] > 0.05).all()


def test_where_nothing_turns_there_is_no_number() -> None:
    found = trace(own("nope"), tokens())
    assert found.what_where()["content_shift"].isna().all()
    assert len(found.what_where()) == 8 and found.frequency_usage().empty


def test_usage_is_of_magnitudes_and_of_pairs() -> None:
    model, ids = own("pope").double(), tokens()
    shown: list[Tensor] = []
    block = model.model.blocks[0].self_attn
    block.observer = lambda _, q, k, spec, at: shown.append(ww.unturned(k, spec))
    with torch.no_grad():
        model(ids)
    block.observer = None
    used = trace(model, ids).frequency_usage()
    keys = used[(used["layer"] == 0) & (used["side"] == "key") & (used["head"] == 1)]
    expected = shown[0][:, 1].mean((0, 1))
    torch.testing.assert_close(torch.tensor(keys["norm"].to_numpy()), expected)
    frequencies = 10000 ** (-torch.arange(8, dtype=torch.float64) / 8)
    torch.testing.assert_close(torch.tensor(keys["frequency"].to_numpy()), frequencies)


@pytest.mark.parametrize("make", ["own", "converted"])
def test_learned_delta_is_the_bounded_parameter(make: str) -> None:
    model = own("pope") if make == "own" else converted("llama", "pope")
    parameters = [p for name, p in model.named_parameters() if name.endswith("delta")]
    with torch.no_grad():
        parameters[1][2, 3] = 0.5  # out of bounds, as a step of an optimiser can leave it
    found = learned_delta(model)
    assert len(found) == sum(p.numel() for p in parameters)
    row = found[(found["layer"] == 1) & (found["head"] == 2) & (found["channel"] == 3)]
    assert float(row["delta"].iloc[0]) == 0
    assert float(row["frequency"].iloc[0]) == pytest.approx(10000 ** (-3 / 8))
    inside = found[(found["layer"] == 0) & (found["head"] == 1) & (found["channel"] == 4)]
    assert float(inside["delta"].iloc[0]) == pytest.approx(parameters[0][1, 4].item())
    assert learned_delta(own("rope")).empty


def test_a_channel_scores_best_where_delta_says() -> None:
    encoding = ww.PoPE(head_dim=4, num_heads=1).double()
    with torch.no_grad():
        encoding.delta.zero_()
        encoding.delta[0, 1] = -1.0
    channels = torch.full((1, 1, 100, 4), -50.0, dtype=torch.float64)
    channels[..., 1] = 5.0  # softplus leaves this one
    with torch.no_grad():
        last = ww.scores(channels, channels, encoding())[0, 0, -1]
    one_turn = last.flip(0)[:63]  # by the lag of the key
    assert int(one_turn.argmax()) == round((2 * math.pi - 1.0) / 0.1)


def test_a_frequency_at_which_all_heads_are_still_is_left_out() -> None:
    # PoPE-ID keeps half its channels at frequency 0: they are magnitudes, no use of a frequency.
    seen: list[Seen] = []
    model = own("pope-id")
    with torch.no_grad(), observed(model, seen.append):
        model(tokens())
    assert len(seen[0].layer.frequencies) == 4 and min(seen[0].layer.frequencies) > 0
