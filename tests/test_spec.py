"""`ScoreSpec`: what it refuses, and what its fields promise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import whatwhere as ww
from encoding_cases import CASES, make, make_spec, tensors
from whatwhere.encodings import options

FREQUENCIES = torch.tensor([[1.0, 0.1, 0.01]], dtype=torch.float64)
ROTATE: dict[str, Any] = {"feature": "rotate", "scale": 0.5, "inv_freq": FREQUENCIES}
POLAR: dict[str, Any] = {"feature": "polar", "scale": 0.5, "inv_freq": FREQUENCIES}
IDENTITY: dict[str, Any] = {"feature": "identity", "scale": 0.5}

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "feature": (IDENTITY | {"feature": "spiral"}, "feature"),
    "magnitude": (POLAR | {"magnitude": "exp"}, "magnitude"),
    "scale 0": (IDENTITY | {"scale": 0.0}, "scale"),
    "scale negative": (IDENTITY | {"scale": -1.0}, "scale"),
    "scale nan": (IDENTITY | {"scale": math.nan}, "scale"),
    "scale inf": (IDENTITY | {"scale": math.inf}, "scale"),
    "identity turns": (IDENTITY | {"inv_freq": FREQUENCIES}, "inv_freq"),
    "rotate without": (ROTATE | {"inv_freq": None}, "inv_freq"),
    "polar without": (POLAR | {"inv_freq": None}, "inv_freq"),
    "one axis of shape": (ROTATE | {"inv_freq": FREQUENCIES[0]}, "inv_freq"),
    "float32": (ROTATE | {"inv_freq": FREQUENCIES.float()}, "inv_freq"),
    "phase on rotate": (ROTATE | {"phase": torch.zeros(2, 3)}, "phase"),
    "phase width": (POLAR | {"phase": torch.zeros(2, 4)}, "phase"),
    "phase shape": (POLAR | {"phase": torch.zeros(3)}, "phase"),
    "slopes shape": (IDENTITY | {"slopes": torch.zeros(2, 1)}, "slopes"),
    "temperature 0": (ROTATE | {"temperature_length": 0}, "temperature_length"),
    "slopes of two axes": (
        ROTATE | {"inv_freq": FREQUENCIES.expand(2, 3), "slopes": torch.ones(2)},
        "slopes",
    ),
    "temperature of two axes": (
        ROTATE | {"inv_freq": FREQUENCIES.expand(2, 3), "temperature_length": 9},
        "temperature_length",
    ),
    "softcap 0": (IDENTITY | {"softcap": 0.0}, "softcap"),
    "softcap negative": (ROTATE | {"softcap": -50.0}, "softcap"),
    "softcap nan": (POLAR | {"softcap": math.nan}, "softcap"),
    "softcap inf": (IDENTITY | {"softcap": math.inf}, "softcap"),
    "softcap of text": (IDENTITY | {"softcap": "50"}, "softcap"),
    "softcap of a tensor": (IDENTITY | {"softcap": torch.tensor(50.0)}, "softcap"),
    "turning": (POLAR | {"turning": 4}, "turning"),
    "turning negative": (POLAR | {"turning": -1}, "turning"),
}


@pytest.mark.parametrize("label", BAD)
def test_contradictions_are_refused_in_one_line(label: str) -> None:
    fields, name = BAD[label]
    with pytest.raises(ValueError, match=name) as caught:
        ww.ScoreSpec(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [ROTATE, POLAR, IDENTITY])
def test_good_fields_are_taken_and_frozen(fields: dict[str, Any]) -> None:
    spec = ww.ScoreSpec(**fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.scale = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("case", CASES)
def test_feature_dim_is_the_width_of_features(case: str) -> None:
    spec = make_spec(case, 16, 4)
    q, k = tensors((2, 4, 3, 16), (2, 2, 3, 16))
    at = torch.arange(3)
    assert ww.encode_queries(q, spec, at).shape == (2, 4, 3, spec.feature_dim(16))
    assert ww.encode_keys(k, spec, at).shape == (2, 2, 3, spec.feature_dim(16))
    assert 16 <= spec.feature_dim(16) <= 32


@pytest.mark.parametrize("case", CASES)
def test_inner_product_of_features_times_scale_is_the_score(case: str) -> None:
    spec = make_spec(case, 16, 4)
    q, k = tensors((2, 4, 3, 16), (2, 4, 5, 16))
    at_q, at_k = torch.tensor([200, 7, 131]), torch.tensor([[5, 3, 9, 9, 0], [8, 1, 0, 500, 2]])
    features = ww.encode_queries(q, spec, at_q), ww.encode_keys(k, spec, at_k)
    got = features[0] @ features[1].mT * spec.scale
    if spec.slopes is not None:
        ahead = at_q[:, None] - at_k[:, None, :]
        got = got - spec.slopes[:, None, None] * ahead.unsqueeze(1)
    wanted = ww.scores(q, k, spec, query_positions=at_q, key_positions=at_k)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    encoded = ww.scores(*features, spec.encoded(), query_positions=at_q, key_positions=at_k)
    torch.testing.assert_close(encoded, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_key_features_hold_nothing_learned(case: str) -> None:
    """So that grouped heads and caches can share them: training moves queries only."""
    encoding = make(case, 16, 4)
    k = torch.randn(1, 1, 5, 16)
    before = ww.encode_keys(k, encoding(), torch.arange(5))
    with torch.no_grad():
        for parameter in encoding.parameters():
            parameter.sub_(0.1)
    after = ww.encode_keys(k, encoding(), torch.arange(5))
    assert torch.equal(before, after)
    assert not before.requires_grad


@pytest.mark.parametrize("feature", ["rotate", "polar"])
@pytest.mark.parametrize("turning", [0, 1, 3])
def test_turning_changes_the_cost_of_a_score_never_its_value(feature: str, turning: int) -> None:
    frequencies = FREQUENCIES.clone()
    frequencies[:, turning:] = 0
    plain = ww.ScoreSpec(feature=feature, scale=0.5, inv_freq=frequencies)  # type: ignore[arg-type]
    promised = dataclasses.replace(plain, turning=turning)
    q, k = tensors((2, 2, 4, 8), (2, 2, 4, 8))
    at = torch.tensor([5, 0, 17, 3])
    wanted = ww.scores(q, k, plain, query_positions=at, key_positions=at)
    got = ww.scores(q, k, promised, query_positions=at, key_positions=at)
    torch.testing.assert_close(got, wanted)
    width = promised.feature_dim(8)
    assert ww.encode_queries(q, promised, at).shape[-1] == width


def test_turning_keeps_the_phase_of_channels_that_do_not_turn() -> None:
    frequencies = FREQUENCIES.clone()
    frequencies[:, 1:] = 0
    phase = torch.tensor([[-0.1, -0.2, -0.3], [-1.0, -2.0, -3.0]])
    plain = ww.ScoreSpec(feature="polar", scale=0.5, inv_freq=frequencies, phase=phase)
    q, k = tensors((2, 2, 4, 3), (2, 2, 4, 3))
    wanted = ww.scores(q, k, plain)
    try:
        promised = dataclasses.replace(plain, turning=1)
    except ValueError as error:  # refusing the two together would do as well
        assert "phase" in str(error)
        return
    torch.testing.assert_close(ww.scores(q, k, promised), wanted)


@pytest.mark.parametrize("case", CASES)
def test_encoded_spec_leaves_scale_softcap_and_slopes(case: str) -> None:
    spec = dataclasses.replace(make_spec(case), softcap=30.0)
    encoded = spec.encoded()
    assert encoded.feature == "identity"
    assert encoded.scale == spec.scale
    assert encoded.softcap == spec.unturned().softcap == 30.0
    assert encoded.inv_freq is None
    assert encoded.phase is None
    assert encoded.temperature_length is None
    assert (encoded.slopes is None) == (spec.slopes is None)
    assert encoded.feature_dim(77) == 77


@pytest.mark.parametrize("case", CASES)
def test_scale_is_an_option_and_one_over_root_d_by_default(case: str) -> None:
    q, k = tensors((1, 4, 3, 16), (1, 4, 3, 16))
    spec, doubled = make_spec(case), make_spec(case, scale=0.5)
    if not case.startswith("yarn"):
        assert spec.scale == pytest.approx(16**-0.5)
    spec, doubled = (dataclasses.replace(s, phase=None, slopes=None) for s in (spec, doubled))
    assert doubled.scale == pytest.approx(2 * spec.scale)
    torch.testing.assert_close(ww.scores(q, k, doubled), 2 * ww.scores(q, k, spec))


@pytest.mark.parametrize("name", ww.ENCODINGS)
def test_temperature_and_scale_are_options_of_every_encoding(name: str) -> None:
    assert {"temperature_length", "scale"} <= set(options(name))
    assert make_spec(name, temperature_length=77).temperature_length == 77
