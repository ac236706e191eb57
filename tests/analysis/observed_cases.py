"""Models to observe: stock ones of many families, converted ones, our own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import whatwhere.models as wm
from convert_cases import stock

_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}

# What conversion refuses, and observation does not.
OTHERS: dict[str, dict[str, Any]] = {
    "phi": {"partial_rotary_factor": 0.5},
    "stablelm": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2},
    "glm": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_oss": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 8,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    },
    # Normalises queries and keys after it has turned them.
    "hunyuan_v1_dense": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
CONVERTIBLE = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "olmo2", "phi3")
STOCK = (*CONVERTIBLE, "smollm3", "starcoder2", *OTHERS)


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    """Random ids of the vocabulary of all models here."""
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def unconverted(family: str, attention: str = "eager") -> PreTrainedModel:
    """A model as transformers makes it."""
    if family not in OTHERS:
        model = stock(family)
        model.set_attn_implementation(attention)
        return model
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**(_SIZES | OTHERS[family]))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def own(encoding: str, **changes: Any) -> wm.WhatWhereForCausalLM:
    """One of ours, its deltas, if it has any, somewhere inside their bounds."""
    options = {"yarn": {"factor": 4.0}, "pope": {"delta": "uniform"}}.get(encoding, {})
    shape: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "position_encoding": encoding,
        "position_encoding_options": options,
    }
    torch.manual_seed(0)
    return wm.WhatWhereForCausalLM(wm.WhatWhereConfig(**(shape | changes))).eval()
