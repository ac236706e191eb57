"""Packages that only some data sets need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def need(module: str, extra: str) -> Any:
    """Import a module that an extra of ours brings.

    Raises:
        ValueError: It is not there; one line that says how to get it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"this data set needs {error.name}: pip install 'whatwhere[{extra}]'"
        ) from None
