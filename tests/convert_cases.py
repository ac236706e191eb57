"""Tiny models of each family that is converted, their logits far apart, and the encodings."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import whatwhere.models as wm

HEADS, HEAD_DIM, LAYERS, LENGTH = 4, 8, 2, 256

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "intermediate_size": 48,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.3,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

# What the issue names, each with what sets it apart; then others that look the same.
NAMED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 12, "sliding_window": 6, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        "query_pre_attn_scalar": 12,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neox": {"head_dim": None, "num_key_value_heads": None},
    "olmo2": {},
    "phi3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
OTHERS: dict[str, dict[str, Any]] = {
    "arcee": {},
    "exaone4": {},
    "gemma": {},
    "granite": {},
    "ministral": {},
    "mixtral": MOE,
    "olmo": {},
    "olmo3": {},
    "olmoe": MOE,
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
    "seed_oss": {},
    "starcoder2": {},
}
FAMILIES = NAMED | OTHERS

ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "pope": ("pope", {"delta": "uniform"}),
    "pope-quarter": ("pope", {"fraction": 0.25, "temperature_length": 8}),
    "pope-id": ("pope-id", {"delta": "uniform", "temperature": True}),
    "rope": ("rope", {}),
    "rope-half": ("rope", {"fraction": 0.5}),
    "rope-id": ("rope-id", {}),
    "rope-high": ("rope-high", {}),
    "yarn": ("yarn", {"factor": 4.0}),
    "nope": ("nope", {}),
    "alibi": ("alibi", {}),
}


def stock(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model as transformers makes it, in evaluation mode."""
    sizes = {k: v for k, v in (SHAPE | FAMILIES[family] | changes).items() if v is not None}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**sizes)
    config.eos_token_id = None
    how = {"attn_implementation": "eager"}
    if family in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"):
        how["experts_implementation"] = "eager"  # the grouped one has no float64
    model = AutoModelForCausalLM.from_config(config, **how).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():  # norms that do nothing hide one that is left out
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.rand_like(weight))
    return model


def converted(
    family: str, encoding: str = "pope", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A converted model, its deltas somewhere inside their bounds."""
    name, options = ENCODINGS[encoding]
    forms = {key: changes.pop(key) for key in ("cache_form", "backend") if key in changes}
    model = wm.convert(stock(family, seed, **changes), name, **options, **forms)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("delta"):
                weight.uniform_(-2 * math.pi, 0)
    return model
