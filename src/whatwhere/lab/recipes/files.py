"""Recipes as YAML, and validation errors as one line."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from whatwhere.lab.data.indirect_indexing import IndirectIndexingData
from whatwhere.lab.data.prepared import TokensData
from whatwhere.lab.data.text import TextData
from whatwhere.lab.recipes.schema import (
    EncodingChoice,
    EvaluationSettings,
    FinetuneSettings,
    ModelSettings,
    PaperFigure,
    Recipe,
    TrainingSettings,
)

# What YAML folds to a blank where it stands for itself, as in a file's name; escaped, it is kept.
_LINE_BREAKS = "\x85\u2028\u2029"


_DATA: dict[str, type[BaseModel]] = {
    "text": TextData,
    "tokens": TokensData,
    "indirect-indexing": IndirectIndexingData,
}


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML that `from_yaml` reads back as an equal recipe."""
    dumped = recipe.model_dump(mode="json")
    written: str = yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True, width=99)
    if not set(written).isdisjoint(_LINE_BREAKS):
        written = yaml.safe_dump(dumped, sort_keys=False, allow_unicode=False, width=99)
    return written


def from_yaml(source: Path | str) -> Recipe:
    """Read a recipe from a file, or from YAML given as text.

    Raises:
        ValueError: If it is no YAML, lacks a key, holds an unknown one or a value of the wrong
            type; one line that names the key.
        OSError: If the file cannot be read.
    """
    where = f"{source}: " if isinstance(source, Path) else ""
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}not UTF-8 text: {error.reason} at {error.start}") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}a recipe is a mapping with keys {_listed(Recipe)}")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{where}{describe_error(error)}") from None


def describe_error(error: ValidationError) -> str:
    """The first problem of a validation error in one line that names the key.

    Unknown keys come first, with near matches and the valid keys.
    """
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    line = _describe(problems[0])
    more = len(problems) - 1
    return line + (f" (and {more} more)" if more else "")


def _describe(problem: ErrorDetails) -> str:
    # A discriminated union puts the tag of the chosen class into the path: data.text.length.
    places = [place for place in problem["loc"] if place != "[key]"]
    if places[:1] == ["data"] and len(places) > 1:
        del places[1]
    key = ".".join(str(place) for place in places)
    if problem["type"] == "extra_forbidden":
        tag = problem["loc"][1] if problem["loc"][0] == "data" else None
        owner = _owner([str(place) for place in places[:-1]], tag)
        close = get_close_matches(str(places[-1]), owner.model_fields, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"unknown key {key!r}{hint}: expected some of {_listed(owner)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    message = message[0].lower() + message[1:]
    got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    return f"{key}: {message}{got}" if key else f"{message}{got}"


def _owner(places: list[str], tag: Any) -> type[BaseModel]:
    # The settings class that a path of keys leads to.
    match places:
        case []:
            return Recipe
        case ["data"]:
            return _DATA[tag]
        case ["model"]:
            return ModelSettings
        case ["training"]:
            return TrainingSettings
        case ["evaluation"]:
            return EvaluationSettings
        case ["evaluation", "finetune"]:
            return FinetuneSettings
        case ["encodings", _]:
            return EncodingChoice
        case _:
            return PaperFigure


def _listed(owner: type[BaseModel]) -> str:
    return ", ".join(owner.model_fields)
