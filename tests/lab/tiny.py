"""A recipe small enough to train in a test, on text that is made here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from whatwhere.lab.recipes import Recipe


def text(folder: Path, size: int = 20_000) -> str:
    """Write a folder of two files of words, of about `size` bytes each; return its path."""
    draw = random.Random(0)
    words = [
        "a",
        "position",
        "encoding",
        "says",
        "what",
        "score",
        "a",
        "query",
        "gives",
        "a",
        "key",
        "and",
        "where",
        "it",
        "stands",
    ]
    place = folder / "text"
    place.mkdir(exist_ok=True)
    for name in ("one.txt", "two.txt"):
        (place / name).write_text(" ".join(draw.choices(words, k=size // 5)), encoding="utf-8")
    return str(place)


def recipe(path: str, **changes: Any) -> Recipe:
    """A text recipe of 12 steps of a model of width 16; `training={"steps": 3}` changes a part."""
    content: dict[str, Any] = {
        "name": "tiny",
        "data": {"task": "text", "paths": [path], "length": 32, "validation_fraction": 0.5},
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "training": {
            "steps": 12,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "min_learning_rate": 1e-3,
            "warmup_steps": 2,
            "log_every": 3,
            "validate_every": 6,
            "validation_sequences": 8,
            "checkpoint_every": 5,
        },
        "evaluation": {"lengths": [32, 64], "tokens": 512, "examples": 8},
        "encodings": {"pope": {"name": "pope"}},
    }
    for key, value in changes.items():
        part = content.get(key)
        content[key] = (
            {**part, **value} if isinstance(part, dict) and key != "encodings" else value
        )
    return Recipe.model_validate(content)


def indirect(**changes: Any) -> Recipe:
    """The same for indirect indexing."""
    data = {
        "task": "indirect-indexing",
        "min_length": 4,
        "max_length": 6,
        "max_shift": 3,
        "train_examples": 64,
        "validation_examples": 16,
        "test_examples": 16,
    }
    base = recipe("unused").model_dump()
    return Recipe.model_validate(
        base | {"name": "tiny-indirect", "data": data, "evaluation": {}} | changes
    )
