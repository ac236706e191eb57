"""What several recipes share: shapes of models, and encodings that no paper has."""

from __future__ import annotations

from typing import Any

from whatwhere.lab.recipes.schema import (
    EncodingChoice,
    ModelSettings,
    PaperFigure,
    TrainingSettings,
)

POPE = "arXiv 2509.10534v3"
ROPE_ID = "arXiv 2603.18017"
PARTIAL_ROPE = "arXiv 2603.11611"

PERCENT = (1, 4, 10, 25, 50, 75)
"""Shares of a head that partial encodings rotate, in per cent, besides none and all of it."""


def _llama(width: int, layers: int, heads: int, inner: int = 8192) -> ModelSettings:
    return ModelSettings(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        intermediate_size=inner,
        mlp="swiglu",
        tie_word_embeddings=False,
    )


LLAMA_1B = _llama(2048, 16, 32)
LLAMA_3B = _llama(3072, 28, 24)
LLAMA_8B = _llama(4096, 32, 32, inner=14336)
PYTHIA_1B = ModelSettings(
    hidden_size=2048, num_hidden_layers=16, num_attention_heads=8, tie_word_embeddings=False
)
SMALL = ModelSettings(hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
"""What two CPU cores train in minutes."""

LONG: dict[str, Any] = {
    "compile": "default",
    "log_every": 50,
    "validate_every": 2000,
    "checkpoint_every": 2000,
}
"""How trainings of days are compiled, logged and saved."""


def small_training(steps: int, batch_size: int, **more: Any) -> TrainingSettings:
    """How the small models of the quick presets are trained, alike in all of them."""
    common: dict[str, Any] = {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_steps": 20}
    return TrainingSettings(steps=steps, batch_size=batch_size, **{**common, **more})


def head_dim(model: ModelSettings) -> int:
    """Channels of a head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def partial_rope(model: ModelSettings) -> dict[str, EncodingChoice]:
    """RoPE on a share of the channels (arXiv 2603.11611), at least one pair.

    One per cent of a head of 64 channels is less than a pair, which the paper does not speak of:
    one pair is then rotated, as at four per cent.
    """
    least = 2 / head_dim(model)
    return {
        f"partial-rope-{percent}": EncodingChoice(
            name="rope", options={"fraction": max(percent / 100, least)}
        )
        for percent in PERCENT
    }


def partial_pope(model: ModelSettings, delta: str = "zero") -> dict[str, EncodingChoice]:
    """PoPE on a share of the channels, at least one, the rest magnitudes that do not rotate."""
    least = 1 / head_dim(model)
    return {
        f"partial-pope-{percent}": EncodingChoice(
            name="pope", options={"fraction": max(percent / 100, least), "delta": delta}
        )
        for percent in PERCENT
    }


def ours(model: ModelSettings, delta: str = "zero") -> dict[str, EncodingChoice]:
    """Encodings that no paper has: PoPE-ID, partial PoPE, PoPE with QK-Norm.

    Args:
        model: Of which shares of heads are taken.
        delta: How PoPE's delta starts, as the paper has it for the task.
    """
    return {
        "pope-id": EncodingChoice(name="pope-id", options={"delta": delta}),
        **partial_pope(model, delta),
        "pope-qk-norm": EncodingChoice(name="pope", options={"delta": delta}, qk_norm=True),
    }


def rope_and_pope(delta: str = "zero") -> dict[str, EncodingChoice]:
    """The two encodings that the PoPE paper compares throughout."""
    return {
        "rope": EncodingChoice(name="rope"),
        "pope": EncodingChoice(name="pope", options={"delta": delta}),
    }


def figures(source: str, metric: str, **values: float) -> dict[str, dict[str, PaperFigure]]:
    """A paper's figures of one metric by label; `_` in a name stands for `-`."""
    return {
        label.replace("_", "-"): {metric: PaperFigure(value=value, source=source)}
        for label, value in values.items()
    }


def joined(*parts: dict[str, dict[str, PaperFigure]]) -> dict[str, dict[str, PaperFigure]]:
    """Figures of several metrics by label."""
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for label, found in part.items():
            merged.setdefault(label, {}).update(found)
    return merged
