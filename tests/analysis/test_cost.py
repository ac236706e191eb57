"""Cost: the paper's figures, formula against PyTorch's counter, caches against what they hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import whatwhere as ww
import whatwhere.models as wm
from whatwhere.analysis.cost import COLUMNS, cost

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
FAMILIES = {
    **{name: {} for name in ("llama", "qwen3", "gpt_neox", "olmo2", "phi3", "gemma2")},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "mixtral": MOE,
}


def test_the_papers_figures() -> None:
    """774M: 5.9 % at 1024, 10.5 % at 2048, 17.4 % at 4096 (arXiv 2509.10534): of any depth."""
    config = wm.preset("774m", position_encoding="pope", num_hidden_layers=2)
    table = cost(config, [1024, 2048, 4096])
    assert list(table.columns) == list(COLUMNS)
    for column in ("overhead_formula", "overhead_measured"):
        assert [round(100 * x, 1) for x in table[column]] == [5.9, 10.5, 17.4]
    for length, formula in zip(table["length"], table["overhead_formula"], strict=True):
        assert formula == pytest.approx(length / (12 * 1280 + 2 * length), rel=1e-12)


@pytest.mark.parametrize("name", ww.ENCODINGS)
@pytest.mark.parametrize(
    "shape", [{}, {"num_key_value_heads": 2, "mlp": "swiglu", "head_dim": 24}]
)
def test_formula_is_what_is_counted(name: str, shape: dict[str, Any]) -> None:
    """Up to the tables of angles, an outer product of positions and frequencies in each layer."""
    options = {"factor": 2.0} if name == "yarn" else {}
    config = wm.WhatWhereConfig(position_encoding=name, position_encoding_options=options, **shape)
    (row,) = cost(config, [96]).to_dict("records")
    layers = row["rope_flops"] - row["head_flops"]
    of_tables = 2 * 96 * config.head_dim * config.num_hidden_layers
    # Queries and keys may each have one made for them.
    assert row["overhead_measured"] == pytest.approx(
        row["overhead_formula"], abs=2 * of_tables / layers
    )
    assert row["head_flops"] == 2 * 96 * config.hidden_size * config.vocab_size


def test_all_is_counted_by_hand() -> None:
    """Every product of a small PoPE model written down."""
    config = wm.WhatWhereConfig(position_encoding="pope", num_key_value_heads=2, mlp="swiglu")
    T, d, D, H, G = 64, config.hidden_size, config.head_dim, 4, 2
    block = d * H * D * 2 + 2 * d * G * D + 3 * d * config.intermediate_size
    attention = T * H * (2 * D + D)
    layers = config.num_hidden_layers
    expected = 2 * T * (layers * (block + attention) + d * config.vocab_size)
    (row,) = cost(config, [T]).to_dict("records")
    assert expected <= row["flops"] <= expected + 2 * 2 * T * D * layers
    assert row["score_flops"] == 2 * T * layers * T * H * 2 * D


@pytest.mark.parametrize("model_type", FAMILIES)
def test_models_of_transformers(model_type: str) -> None:
    """As they are, and as converted: PoPE's features are twice as wide where layers rotate."""
    config = transformers.AutoConfig.for_model(model_type, **SIZES | FAMILIES[model_type])
    (own,) = cost(config, [64]).to_dict("records")
    (pope,) = cost(config, [64], encoding="pope").to_dict("records")
    assert own["overhead_measured"] == own["overhead_formula"] == 0
    assert own["flops"] == own["rope_flops"]
    turning = 2 if model_type == "smollm3" else 3
    width = 2 * 64 * 64 * 4 * 16
    assert pope["score_flops"] - own["score_flops"] == turning * width
    assert pope["flops"] - own["flops"] == pytest.approx(turning * width, rel=0.05)
    # The router of experts is no linear layer, and tables are counted.
    assert pope["overhead_measured"] == pytest.approx(pope["overhead_formula"], rel=0.05)
    heads = 4 if model_type == "gpt_neox" else 2
    assert own["cache_bytes_per_token"] == 3 * 2 * heads * 16 * 4


@pytest.mark.parametrize("form", ["encoded", "raw"])
@pytest.mark.parametrize("name", ["rope", "pope", "pope-id", "nope"])
def test_cache_is_what_the_report_says(name: str, form: str) -> None:
    config = wm.WhatWhereConfig(position_encoding=name, cache_form=form, dtype="bfloat16")
    with torch.device("meta"):
        model = wm.WhatWhereForCausalLM(config).bfloat16()
    numbers = sum(layer.numbers_per_token for layer in model.cache_report())
    assert cost(model, [64])["cache_bytes_per_token"].tolist() == [2 * numbers]


def test_cache_has_the_form_that_decodes_faster_on_the_device() -> None:
    model = wm.WhatWhereForCausalLM(wm.WhatWhereConfig(position_encoding="pope"))
    numbers = sum(layer.numbers_per_token for layer in model.cache_report("cpu"))
    assert cost(model, [64])["cache_bytes_per_token"].tolist() == [4 * numbers]
    assert cost(model, [64], device="meta")["cache_bytes_per_token"][0] > 4 * numbers


def test_windows_keep_fewer_tokens() -> None:
    config = transformers.MistralConfig(**SIZES | {"sliding_window": 17})
    kept = cost(config, [8, 64])["cache_bytes_per_token"]
    # transformers keeps one less than a window: the next token takes its place.
    assert kept.tolist() == [3 * 2 * 2 * 16 * 4, 3 * 2 * 2 * 16 * 4 * 16 / 64]


def test_tables() -> None:
    rope, pope = (
        cost(wm.WhatWhereConfig(position_encoding=name), [100])["table_bytes"][0]
        for name in ("rope", "pope")
    )
    assert rope == ww.table_bytes(ww.RoPE(32, 4), 100) == pope / 2
    mixed = wm.WhatWhereConfig(position_encoding=["rope", "pope", "rope", "nope"])
    assert cost(mixed, [100])["table_bytes"][0] == rope + pope
    learned = wm.WhatWhereConfig(position_encoding="learned")
    assert cost(learned, [100])["table_bytes"][0] == 128 * 128 * 4
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    cos, sin = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(100)[None])
    assert cost(model, [100])["table_bytes"][0] == cos.nbytes + sin.nbytes


@pytest.mark.parametrize("rope_type", ["dynamic", "yarn", "longrope"])
def test_rope_types_that_look_at_the_length(rope_type: str) -> None:
    given = {
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 2.0},
        "longrope": {
            "long_factor": [2.0] * 8,
            "short_factor": [1.0] * 8,
            "original_max_position_embeddings": 64,
        },
    }[rope_type]
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **given}
    config = transformers.LlamaConfig(**SIZES, rope_parameters=rope)
    before = config.to_dict()
    plain = cost(transformers.LlamaConfig(**SIZES), [512])["flops"]
    assert cost(config, [512])["flops"].tolist() == plain.tolist()
    assert config.to_dict() == before


def test_converted_models_against_their_rope() -> None:
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    (asked,) = cost(model, [64], encoding="pope").to_dict("records")
    kind = type(model)
    wm.convert(model, "pope")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (done,) = cost(model, [64]).to_dict("records")
    assert kind is not type(model) and asked == done
    assert done["encoding"] == "pope" and done["overhead_formula"] > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_encodings_without_a_rope_twin_have_no_overhead_to_tell() -> None:
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=32)
    (row,) = cost(config, [64]).to_dict("records")
    assert row["encoding"] == "learned" and row["flops"] > 0
    assert math.isnan(row["overhead_measured"]) and math.isnan(row["rope_flops"])
    with pytest.raises(wm.NotConvertibleError, match="no rotary embedding"):
        cost(config, [64], encoding="pope")


@pytest.mark.parametrize(
    ("model", "lengths", "more", "message"),
    [
        (wm.WhatWhereConfig(), [], {}, "lengths is empty"),
        (wm.WhatWhereConfig(), [0], {}, "lengths=0"),
        (wm.WhatWhereConfig(position_encoding="learned"), [129], {}, "learned table of 128"),
        (transformers.GPT2Config(), [2048], {}, "learned table of 1024"),
        (ww.RoPE(8, 1), [64], {}, "model is a RoPE"),
        (transformers.LlamaConfig(**SIZES), [64], {"encoding": "popo"}, "did you mean 'pope'"),
        (wm.WhatWhereConfig(), [64], {"encoding": "pope"}, "of whatwhere already"),
    ],
)
def test_bad_input_is_one_clear_line(
    model: object, lengths: list[int], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        cost(model, lengths, **more)
    assert "\n" not in str(raised.value)
