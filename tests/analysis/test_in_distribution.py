"""In-distribution report and safe length: closed forms, and transformers' own frequencies."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

import whatwhere as ww
import whatwhere.models as wm
from whatwhere.analysis.in_distribution import COLUMNS, in_distribution, safe_length
from whatwhere.analysis.positions import positions_of

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
LONG = {"long_factor": [4.0] * 16, "short_factor": [1.5] * 16}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {"factor": 8.0, "original_max_position_embeddings": 128, **LLAMA3},
    "longrope": {**LONG, "original_max_position_embeddings": 128},
}


def scaled(rope_type: str, **changes: Any) -> transformers.LlamaConfig:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **SCALED[rope_type]}
    return transformers.LlamaConfig(rope_parameters=rope, **SIZES | changes)


def at(table: pd.DataFrame, length: int, layer: int = 0) -> pd.DataFrame:
    return table[(table["length"] == length) & (table["layer"] == layer)]


def test_shares_are_arcs() -> None:
    """Against arcs counted on a fine circle: angles met at n and at no distance in training."""
    lengths, trained = [32, 64, 100, 1000], 64
    table = in_distribution(ww.RoPE(16, 1, base=100.0), lengths, trained)
    assert list(table.columns) == list(COLUMNS)
    cells = 20000
    for _, row in table.iterrows():
        met = [
            {int(i / 20 * row["frequency"] / (2 * math.pi) * cells) % cells for i in range(20 * n)}
            for n in (int(row["length"]), trained)
        ]
        step = row["frequency"] / 20 / (2 * math.pi)
        if step * cells > 1:  # finer than the cells, or arcs would have gaps
            continue
        expected = len(met[0] - met[1]) / cells
        assert row["unseen"] == pytest.approx(expected, abs=2 / cells)


def test_closed_form_of_rope() -> None:
    table = in_distribution(ww.RoPE(8, 1), [100, 200, 10**7], 100)
    turns = [100 * 10 ** (-c) / (2 * math.pi) for c in range(4)]
    for length in (100, 200, 10**7):
        part = at(table, length)
        assert part["turns"].tolist() == pytest.approx(turns)
        assert part["complete"].tolist() == [True, True, False, False]
        unseen = [0, 0, *(min(1.0, t * length / 100) - t for t in turns[2:])]
        assert part["unseen"].tolist() == pytest.approx(unseen)


@pytest.mark.parametrize("name", ["rope-id", "rope-high", "pope-id"])
def test_in_distribution_encodings_meet_nothing_new(name: str) -> None:
    """RoPE-ID's criterion 2, at two turns for the slowest and one in 32 tokens for the fastest."""
    encoding = ww.make(name, head_dim=32, num_heads=2, train_length=512)
    table = in_distribution(encoding, [512, 10**6])
    assert table["unseen"].eq(0).all() and table["complete"].all()
    assert table["turns"].min() == pytest.approx(2)
    assert table["turns"].max() == pytest.approx(512 / 32)


@pytest.mark.parametrize("name", ["nope", "alibi", "sinusoidal", "learned"])
def test_encodings_without_rotations_have_no_rows(name: str) -> None:
    encoding = ww.make(name, head_dim=8, num_heads=2, train_length=64)
    table = in_distribution(encoding, [64], 64)
    assert table.empty and list(table.columns) == list(COLUMNS)


@pytest.mark.parametrize("rope_type", SCALED)
@pytest.mark.parametrize("length", [128, 4096])
def test_frequencies_are_those_of_the_model(rope_type: str, length: int) -> None:
    """The rotation that transformers' own module makes at this length turns at these."""
    config = scaled(rope_type)
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    rotary(torch.zeros(1, 1), torch.arange(length)[None])
    found = at(in_distribution(config, [length]), length)["frequency"].tolist()
    assert found == pytest.approx(rotary.inv_freq.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("gpt_neox", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
        ("phi3", {}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("smollm3", {}),
        ("olmo2", {}),
    ],
)
def test_families_turn_as_their_modules_do(model_type: str, given: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model(model_type, **SIZES | given)
    rotary = AutoModelForCausalLM.from_config(config).base_model.rotary_emb
    for layer in positions_of(config):
        if layer.kind == "rotate":
            assert layer.frequencies(512) == pytest.approx(rotary.inv_freq.tolist(), rel=1e-5)
            assert layer.still == config.head_dim - 2 * len(rotary.inv_freq)
        else:
            assert model_type == "smollm3" and not config.no_rope_layers[layer.layer]


def gemma3(**changes: Any) -> PreTrainedConfig:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    own = {"layer_types": kinds, "rope_parameters": rope, "sliding_window": 64}
    return transformers.Gemma3TextConfig(**SIZES | own | changes)


def test_local_and_global_rotations_of_gemma3() -> None:
    config = gemma3()
    rotary = AutoModelForCausalLM.from_config(config).base_model.rotary_emb
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    table = in_distribution(config, [512, 4096, 8192])
    for layer, kind in enumerate(kinds):
        own = getattr(rotary, f"{kind}_inv_freq").tolist()
        assert at(table, 512, layer)["frequency"].tolist() == pytest.approx(own, rel=1e-5)
    # A window shorter than training shows no new distance; 8 times the length is interpolated.
    assert at(table, 8192, 0)["unseen"].eq(0).all()
    assert at(table, 4096, 2)["unseen"].max() < 1e-6 < at(table, 8192, 2)["unseen"].max()
    assert safe_length(config).length == 8 * 512
    only_windows = gemma3(layer_types=["sliding_attention"] * 3)
    assert safe_length(only_windows).length is None


@pytest.mark.parametrize(
    ("rope_type", "expected"),
    [("default", 512), ("linear", 2048), ("yarn", 512), ("llama3", 1024), ("longrope", None)],
)
def test_interpolation_lengthens_what_is_safe(rope_type: str, expected: int | None) -> None:
    """By the factor on the length before it; longrope by its least factor over slow pairs."""
    safe = safe_length(scaled(rope_type)).length
    assert safe == (4 * 128 if expected is None else expected)


def test_dynamic_scaling_has_the_limit_that_trying_every_length_finds() -> None:
    config = scaled("dynamic", max_position_embeddings=128)
    (layer, *_) = positions_of(config)
    short = [c for c, theta in enumerate(layer.trained) if 128 * theta < 2 * math.pi]
    expected = next(
        n
        for n in range(129, 10**5)
        if any(n * layer.frequencies(n)[c] > 128 * layer.trained[c] * (1 + 1e-6) for c in short)
    )
    assert safe_length(config).length == expected - 1


def test_a_given_training_length_takes_frequencies_as_they_are() -> None:
    config = scaled("yarn")
    assert safe_length(config, 2048).length == 2048
    assert at(in_distribution(config, [2048], 2048), 2048)["unseen"].eq(0).all()
    yarn = ww.YaRN(32, 2, train_length=256, factor=4.0)
    assert (safe_length(yarn).length, safe_length(yarn, 512).length) == (1024, 512)


def test_our_models_and_configs_say_the_same() -> None:
    config = wm.WhatWhereConfig(position_encoding=["rope", "pope", "nope", "rope-id"])
    with torch.device("meta"):
        model = wm.WhatWhereForCausalLM(config)
    one, other = (in_distribution(x, [128, 512]) for x in (config, model))
    pd.testing.assert_frame_equal(one, other)
    assert set(one["layer"]) == {0, 1, 3}
    assert safe_length(model).length == 128
    assert safe_length(model).reason.startswith("layer 0: ")


def test_nothing_is_drawn() -> None:
    before = torch.get_rng_state()
    safe_length(wm.WhatWhereConfig(position_encoding="pope", max_position_embeddings=128))
    assert torch.equal(before, torch.get_rng_state())


def test_converted_models_have_their_new_encoding() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    before = safe_length(model).length
    wm.convert(model, "rope-id")
    assert (before, safe_length(model).length) == (512, None)
    table = in_distribution(model, [512])
    assert len(table) == 3 * 8 and table["turns"].min() == pytest.approx(2)


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("rope", {}, 256),
        ("rope", {"fraction": 0.1}, 256),
        ("rope", {"fraction": 1 / 16}, None),  # one pair of frequency 1, the rest not rotated
        ("rope-high", {}, 256),
        ("rope-id", {}, None),
        ("yarn", {"factor": 3.0}, 768),
        ("pope-id", {}, None),
        ("pope-id", {"fraction": 1.0}, None),
        ("pope", {"delta": "uniform"}, 256),
        ("nope", {}, 256),
        ("alibi", {}, None),
        ("alibi", {"fraction": 0.5}, 256),
        ("sinusoidal", {}, 256),
        ("learned", {}, 256),
        ("learned", {"max_length": 1024}, 256),
    ],
)
def test_the_rule(name: str, more: dict[str, Any], expected: int | None) -> None:
    config = wm.WhatWhereConfig(
        position_encoding=name, position_encoding_options=more, max_position_embeddings=256
    )
    assert safe_length(config).length == expected


def test_limit_of_pope_is_where_the_mean_cosine_turns_negative() -> None:
    """By the definition, written out; below 0.6165 base, where the integral over channels is."""
    encoding = ww.PoPE(32, 2)
    weak = [t for t in encoding.frequencies[0] if 256 * t < 2 * math.pi]
    kernel = [sum(math.cos(r * t) for t in weak) for r in range(4000)]
    assert min(kernel[:256]) > 0
    expected = next(r for r in range(256, 4000) if kernel[r] < 0)
    assert safe_length(encoding, 256).length == expected
    for base in (1000.0, 100000.0):
        found = safe_length(ww.PoPE(1024, 1, base=base), 64).length
        assert found is not None and 0.4 * base < found < 0.62 * base


def test_windows_bound_what_is_met() -> None:
    given = {"max_position_embeddings": 256, "position_encoding": "rope"}
    for window, expected in ((64, None), (256, None), (300, 256)):
        config = wm.WhatWhereConfig(sliding_window=window, **given)
        assert safe_length(config).length == expected
    table = in_distribution(wm.WhatWhereConfig(sliding_window=300, **given), [300, 9999])
    assert at(table, 300)["unseen"].tolist() == at(table, 9999)["unseen"].tolist()


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (transformers.GPT2Config(), "learned"),
        (transformers.OPTConfig(), "learned"),
        (transformers.BloomConfig(), "alibi"),
        (transformers.MptConfig(), "alibi"),
        (transformers.FalconConfig(alibi=True), "alibi"),
        (transformers.FalconConfig(), "rotate"),
        (transformers.GPTJConfig(), "rotate"),
    ],
)
def test_older_families(config: PreTrainedConfig, kind: str) -> None:
    assert {layer.kind for layer in positions_of(config)} == {kind}


def unknown_rope() -> PreTrainedConfig:
    config = scaled("default")
    config.rope_parameters["rope_type"] = "spiral"
    return config


def rope_of_some_layers() -> PreTrainedConfig:
    config = gemma3()
    del config.rope_parameters["sliding_attention"]
    return config


@pytest.mark.parametrize(
    ("subject", "lengths", "train_length", "message"),
    [
        (ww.RoPE(8, 1), [64], None, "training length is not known"),
        (ww.RoPE(8, 1), [], 64, "lengths is empty"),
        (ww.RoPE(8, 1), [0], 64, "lengths=0: expected a positive integer"),
        (ww.RoPE(8, 1), [1.5], 64, "lengths=1.5"),
        (ww.RoPE(8, 1), 64, 64, "lengths=64: expected a sequence"),
        (ww.RoPE(8, 1), [64], 0, "train_length=0"),
        (ww.RoPE(8, 1, axes=(4, 4)), [64], 64, "2 position axes"),
        (ww.Learned(8, 1, train_length=64), [65], None, "beyond the learned table of 64"),
        (transformers.GPT2Config(), [1025], None, "beyond the learned table of 1024"),
        (transformers.BertConfig(), [64], None, "nothing is known .* 'bert'"),
        (unknown_rope(), [64], None, "rope_type='spiral' .*expected one of default, linear"),
        (rope_of_some_layers(), [64], None, "no entry for layers of type 'sliding_attention'"),
        (transformers.Gemma4TextConfig(), [64], None, "layers of different shapes"),
        (torch.nn.Linear(2, 2), [64], None, "model is a Linear: expected an encoding"),
        ("llama", [64], None, "model is a str"),
    ],
)
def test_bad_input_is_one_clear_line(
    subject: object, lengths: Any, train_length: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        in_distribution(subject, lengths, train_length)
    assert "\n" not in str(raised.value)


def test_configs_are_left_as_they_are() -> None:
    for config in (gemma3(), scaled("longrope")):
        before = config.to_dict()
        in_distribution(config, [64])
        safe_length(config)
        assert config.to_dict() == before
