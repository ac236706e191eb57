"""Experiments by name: one typed config for each table row of the papers.

Examples:
    >>> from whatwhere.lab import recipes
    >>> recipes.get("text", "quick").training.steps
    1000
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from whatwhere.lab.recipes import (
    books,
    genome,
    indirect_indexing,
    music,
    openwebtext,
    partial_rope,
    rope_id,
    text,
)
from whatwhere.lab.recipes.files import from_yaml, to_yaml
from whatwhere.lab.recipes.schema import (
    EncodingChoice,
    EvaluationSettings,
    FinetuneSettings,
    ModelSettings,
    PaperFigure,
    Recipe,
    TrainingSettings,
)

RECIPES: dict[str, dict[str, Callable[[], Recipe]]] = {
    "text": text.PRESETS,
    "books": books.PRESETS,
    "indirect-indexing": indirect_indexing.PRESETS,
    "jsb": music.JSB,
    "maestro": music.MAESTRO,
    "genome": genome.PRESETS,
    **openwebtext.PRESETS,
    **rope_id.PRESETS,
    **partial_rope.PRESETS,
}
"""Recipe name -> preset name -> function that makes it. A new recipe is a file and a line here."""


def names() -> tuple[str, ...]:
    """The names of the recipes that the package ships."""
    return tuple(RECIPES)


def presets(name: str) -> tuple[str, ...]:
    """The presets of a recipe.

    Raises:
        ValueError: If there is no recipe of this name.
    """
    return tuple(_find(name))


def get(name: str, preset: str = "quick") -> Recipe:
    """A recipe by name.

    Args:
        name: One of `names`.
        preset: One of `presets`: ``"quick"`` for a CPU, ``"paper"`` as a paper has it.

    Raises:
        ValueError: If there is no such recipe or preset.
    """
    made = _find(name)
    if preset not in made:
        raise ValueError(
            f"recipe {name!r} has no preset {preset!r}: expected one of {', '.join(made)}"
        )
    return made[preset]().model_copy(update={"preset": preset})


def _find(name: str) -> dict[str, Callable[[], Recipe]]:
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"unknown recipe {name!r}{hint}: expected a name that `whatwhere recipes` lists, or a "
            "file that ends in .yaml"
        )
    return RECIPES[name]


__all__ = [
    "RECIPES",
    "EncodingChoice",
    "EvaluationSettings",
    "FinetuneSettings",
    "ModelSettings",
    "PaperFigure",
    "Recipe",
    "TrainingSettings",
    "from_yaml",
    "get",
    "names",
    "presets",
    "to_yaml",
]
