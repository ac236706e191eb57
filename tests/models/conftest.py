from collections.abc import Callable
from typing import Any

import pytest
import torch

import whatwhere as ww
from whatwhere.models import WhatWhereConfig, WhatWhereForCausalLM

NEEDED_OPTIONS: dict[str, dict[str, Any]] = {"yarn": {"factor": 2.0}}

# Every registered encoding, and the variants that take another path through the model.
ENCODINGS: dict[str, tuple[Any, Any]] = {
    name: (name, NEEDED_OPTIONS.get(name, {})) for name in ww.ENCODINGS
} | {
    "pope-uniform": ("pope", {"delta": "uniform"}),
    "pope-raw-rest": ("pope", {"fraction": 0.5, "rest": "raw", "temperature_length": 8}),
    "rope-partial": ("rope", {"fraction": 0.5}),
    "alibi-half": ("alibi", {"fraction": 0.5, "temperature_length": 8}),
    "mixed": (["rope", "nope"], {}),
    "mixed-absolute": (["learned", "pope"], {}),
}

Make = Callable[..., WhatWhereForCausalLM]


@pytest.fixture(params=list(ENCODINGS))
def encoding(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def make() -> Make:
    """Tiny models whose logits are far apart, so that equal tokens mean equal scores."""

    def make_model(
        encoding: str = "pope", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> WhatWhereForCausalLM:
        name, options = ENCODINGS[encoding]
        shape: dict[str, Any] = {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 80,
            "position_encoding": name,
            "position_encoding_options": options,
            "initializer_range": 0.3,
        }
        torch.manual_seed(seed)
        model = WhatWhereForCausalLM(WhatWhereConfig(**(shape | changes)))
        return model.to(dtype).eval()

    return make_model


@pytest.fixture
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of three prompts of 9, 6 and 1 tokens, padded on the left."""
    ids = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :8] = 0
    return ids * mask, mask
