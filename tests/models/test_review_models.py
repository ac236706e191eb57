"""Positions shared by a batch, caches that are given, empty batches, and mistakes of type."""

import pytest
import torch

from whatwhere.models import WhatWhereConfig, preset

IDS = torch.arange(24).reshape(2, 12) % 17


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["rope", "rope-id", "learned"])
@pytest.mark.parametrize("at", [torch.arange(12) % 5, torch.arange(12), torch.arange(12) * 2])
def test_positions_of_one_row_are_those_of_every_row(make, name, at, compiled):
    model = make(name, max_position_embeddings=128)
    run = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        each = model(IDS, position_ids=at.expand(2, -1).contiguous()).logits
        for shared in (at, at[None]):
            torch.testing.assert_close(run(IDS, position_ids=shared).logits, each)


def test_a_given_cache_is_used_whatever_use_cache_says(make):
    model = make("rope")
    with torch.no_grad():
        cache = model(IDS[:, :8], use_cache=True).past_key_values
        late = model(IDS[:, 8:], past_key_values=cache, use_cache=False).logits
        torch.testing.assert_close(late, model(IDS).logits[:, 8:])


def test_checkpointing_refuses_a_cache_that_holds_tokens(make):
    model = make("rope")
    cache = model(IDS, use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(IDS, past_key_values=cache)
    assert model(IDS, use_cache=True).past_key_values is None


@pytest.mark.parametrize("shape", [(0, 12), (2, 0)])
@pytest.mark.parametrize("name", ["rope", "pope", "alibi", "learned"])
def test_empty_batches(make, name, shape):
    ids = IDS[: shape[0], : shape[1]]
    assert make(name, num_key_value_heads=2)(ids).logits.shape[:2] == shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids has shape \(12,\)"),
        ({"input_ids": IDS.float()}, "input_ids .* torch.float32"),
        ({"input_ids": IDS.tolist()}, "input_ids is a list"),
        ({"inputs_embeds": torch.randn(12, 32)}, r"inputs_embeds has shape \(12, 32\)"),
        ({"inputs_embeds": torch.randn(2, 12, 3)}, r"inputs_embeds has shape \(2, 12, 3\)"),
        ({"input_ids": IDS, "attention_mask": [[1] * 12] * 2}, "attention_mask is a list"),
        ({"input_ids": IDS, "segment_ids": [[0] * 12] * 2}, "segment_ids is a list"),
        ({"input_ids": IDS, "position_ids": [*range(12)]}, "position_ids is a list"),
    ],
)
def test_bad_calls(make, call, message):
    with pytest.raises(ValueError, match=message) as error:
        make("rope")(**call)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": "0.1"}, "dropout='0.1'"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'"),
        ({"initializer_range": -1.0}, "initializer_range=-1.0"),
        ({"attention_backend": "flash"}, "attention_backend='flash'.*sdpa"),
        ({"qk_norm": "no"}, "qk_norm='no'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"position_encoding": None}, "unknown encoding None"),
        ({"position_encoding": [["rope"]] * 4}, r"unknown encoding \['rope'\]"),
        ({"position_encoding_options": "fraction"}, "position_encoding_options='fraction'"),
        ({"position_encoding_options": ["a"] * 4}, "position_encoding_options"),
        ({"position_encoding_options": {1: 2}}, "position_encoding_options has 1"),
        (
            {"position_encoding_options": {"head_dim": 4}},
            "position_encoding_options has 'head_dim'",
        ),
        ({"position_encoding_options": {"train_length": 4}}, "'train_length'"),
        ({"position_encoding_options": {"fraction": "0.5"}}, "fraction='0.5'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        WhatWhereConfig(num_hidden_layers=4, **settings)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        preset("jsb", num_hidden_layers=4, **settings)


def test_presets_start_delta_whatever_says_no_options():
    for given in (None, {}, [None] * 6):
        config = preset("jsb", position_encoding="pope", position_encoding_options=given)
        assert [options["delta"] for _, options in config.layer_encodings] == ["uniform"] * 6


def test_bad_preset_names():
    with pytest.raises(ValueError, match="unknown preset None"):
        preset(None)
