"""Where models attend that are more than one row of layers with keys of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from observed_cases import tokens, unconverted
from transformers import AutoModelForCausalLM, Gemma3Config, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from whatwhere.analysis import NotFiniteError, observed, trace
from whatwhere.analysis.capture import Seen
from whatwhere.analysis.layers import find_layers, table_length

_TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


def with_images() -> PreTrainedModel:
    """A Gemma 3 that sees images of four patches, whose tower has a table of positions."""
    eyes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=_TEXT | {"num_hidden_layers": 2},
        vision_config=eyes | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=2,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_towers_of_images_are_left_out() -> None:
    model = with_images()
    assert table_length(model) is None
    assert len(find_layers(model)) == 2
    found = trace(model, tokens())
    assert [layer.index for layer in found.layers] == [0, 1] and found.train_length == 128
    with pytest.raises(ValueError, match="vocabulary of 50"):
        trace(model, torch.tensor([3, 50]))


def sharing(family: str) -> PreTrainedModel:
    """A model whose two last layers attend to keys of the two before."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = CONFIG_MAPPING[family](
        **_TEXT,
        num_hidden_layers=4,
        layer_types=kinds,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=50,
        hidden_size_per_layer_input=4,
        activation_sparsity_pattern=[0.0] * 4,
        use_cache=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_keys_of_other_layers_are_known_before_their_rotation(family: str) -> None:
    model, checked = sharing(family), []

    def turn(seen: Seen) -> None:
        assert seen.layer.feature == "rotate"
        theta = torch.tensor(seen.layer.frequencies, dtype=torch.float64)
        first, second = (list(side) for side in zip(*seen.layer.pairs, strict=True))
        for before, after in (
            (seen.queries_before, seen.queries),
            (seen.keys_before, seen.keys),
        ):
            angles = torch.arange(before.shape[2])[:, None] * theta
            turned = before.double().clone()
            x, y = turned[..., first], turned[..., second]
            turned[..., first] = x * angles.cos() - y * angles.sin()
            turned[..., second] = y * angles.cos() + x * angles.sin()
            torch.testing.assert_close(turned, after.double(), atol=1e-4, rtol=1e-4)
            assert not torch.equal(before, after)
        checked.append(seen.layer.index)

    with torch.no_grad(), observed(model, turn):
        model(tokens(), use_cache=False)
    assert checked == [0, 1, 2, 3]


def test_weights_that_are_elsewhere_stay_there() -> None:
    from accelerate import cpu_offload

    model, ids = unconverted("llama"), tokens()
    expected = trace(model, ids).geometry()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert trace(model, ids).geometry().equals(expected)
    with pytest.raises(NotFiniteError), observed(model, lambda seen: None):
        model(inputs_embeds=torch.full((1, 8, 32), torch.nan))


@pytest.mark.parametrize("lengths", [(2.5,), ("8",), 8, []], ids=str)
def test_lengths_that_are_none_are_one_clear_line(lengths: Any) -> None:
    with pytest.raises(ValueError, match="lengths"):
        trace(unconverted("llama"), tokens(), lengths)


def test_keys_that_are_repeated_after_their_rotation_are_no_error() -> None:
    config = CONFIG_MAPPING["jetmoe"](
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=48,
        num_local_experts=2,
        num_experts_per_tok=2,
    )
    found = trace(AutoModelForCausalLM.from_config(config).eval(), tokens())
    assert found.layers[0].feature == "unknown"
    assert found.what_where()["content_shift"].isna().all()
