"""Shapes of the papers, counted without allocating them."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from whatwhere.models import PRESETS, WhatWhereForCausalLM, preset


def count(model):
    return sum(p.numel() for p in model.parameters())


def parameters(name, **overrides):
    with torch.device("meta"):
        return count(WhatWhereForCausalLM(preset(name, **overrides)))


@pytest.mark.parametrize(("name", "nominal"), [("124m", 124e6), ("253m", 253e6), ("774m", 774e6)])
def test_nominal_sizes(name, nominal):
    assert abs(parameters(name) / nominal - 1) < 0.005


@pytest.mark.parametrize("name", ["llama-1b", "llama-3b"])
def test_llama_sizes(name):
    """As many parameters as transformers' own Llama of that shape."""
    config = preset(name)
    shared = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "tie_word_embeddings",
    ]
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**{key: getattr(config, key) for key in shared}))
    assert parameters(name) == count(llama)
    # Meta's counts for Llama 3.2, where embeddings are tied.
    nominal = {"llama-1b": 1.236e9, "llama-3b": 3.213e9}[name]
    assert abs(parameters(name, tie_word_embeddings=True) / nominal - 1) < 0.001


def test_pythia_size():
    config = preset("pythia-1b")
    with torch.device("meta"):
        neox = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=50304,
                hidden_size=2048,
                num_hidden_layers=16,
                num_attention_heads=8,
                intermediate_size=8192,
            )
        )
    weights = sum(p.numel() for p in neox.parameters() if p.ndim == 2)
    ours = parameters("pythia-1b") - (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert ours == weights and abs(weights / 1.01e9 - 1) < 0.005


# Width, heads, layers, length, dropout: the table of the PoPE paper.
TABLE = {
    "indirect-indexing": (512, 8, 8, 48, 0.0),
    "124m": (768, 12, 12, 1024, 0.0),
    "253m": (1024, 16, 16, 1024, 0.0),
    "774m": (1280, 20, 36, 1024, 0.0),
    "jsb": (256, 8, 6, 2048, 0.2),
    "maestro": (384, 8, 6, 2048, 0.1),
    "genome": (1024, 16, 16, 1000, 0.1),
}


@pytest.mark.parametrize("name", TABLE)
def test_paper_table(name):
    config = preset(name.upper(), position_encoding="pope")
    assert (
        config.hidden_size,
        config.num_attention_heads,
        config.num_hidden_layers,
        config.max_position_embeddings,
        config.dropout,
    ) == TABLE[name]
    start = "zero" if name.endswith("m") else "uniform"
    assert config.position_encoding_options == {"delta": start}
    assert config.intermediate_size == 4 * config.hidden_size


def test_overrides():
    config = preset("jsb", vocab_size=7, position_encoding="rope", dropout=0.0)
    assert (config.vocab_size, config.dropout, config.position_encoding_options) == (7, 0.0, {})
    own = preset("jsb", position_encoding="pope", position_encoding_options={"delta": None})
    assert own.position_encoding_options == {"delta": None}
    mixed = preset("jsb", position_encoding=["pope", "rope"] * 3)
    assert mixed.layer_encodings == [("pope", {"delta": "uniform"}), ("rope", {})] * 3
    assert preset("JSB").hidden_size == preset("jsb").hidden_size


def test_mistakes():
    with pytest.raises(ValueError, match="unknown preset '125m': expected one of indirect-ind"):
        preset("125m")
    with pytest.raises(ValueError, match="'dropuot' for preset 'jsb': did you mean 'dropout'"):
        preset("jsb", dropuot=0.1)
    with pytest.raises(ValueError, match="lists 2 entries"):
        preset("jsb", position_encoding=["pope", "rope"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_is(name):
    assert "paper" in PRESETS[name].about or "Llama" in PRESETS[name].about
    assert WhatWhereForCausalLM.config_class is type(preset(name))
