"""Options of an encoding as a command line gives them: `fraction=0.5`, `delta=uniform`."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

import whatwhere as ww
from whatwhere.encodings import options


def parse_options(encoding: str, given: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` as the encoding's own signature types it.

    Args:
        encoding: A name in `whatwhere.ENCODINGS`.
        given: `key=value`; a value is a number, a word, `true`, `none`, or a list `[16, 16]`.

    Raises:
        ValueError: If the encoding or a key is unknown, comes twice, or a value has another type.
    """
    known = options(encoding)
    made_by: Any = ww.ENCODINGS[encoding]
    hints = typing.get_type_hints(getattr(made_by, "func", made_by).__init__)
    found: dict[str, Any] = {}
    for entry in given:
        key, equals, text = entry.partition("=")
        if not equals:
            raise ValueError(f"set: expected key=value, got {entry!r}")
        if key not in known:
            raise ValueError(
                f"set: encoding {encoding!r} has no option {key!r}: expected some of "
                f"{', '.join(known)}"
            )
        if key in found:
            raise ValueError(f"set: {key} comes twice")
        found[key] = _read(key, text, hints[key])
    return found


def _read(key: str, text: str, hint: Any) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(hint)
    # `none` is a word of some options (a magnitude) and the lack of a value in others.
    tried = [_plain(key, text), *([None] if text.lower() == "none" else [])]
    errors = []
    for value in tried:
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            errors.append(error)
    wanted = hint.__name__ if isinstance(hint, type) else str(hint)
    for module in ("typing.", "collections.abc."):
        wanted = wanted.replace(module, "")
    raise ValueError(f"set: {key}={text!r} has a wrong type: expected {wanted}") from errors[0]


def _plain(key: str, text: str) -> Any:
    if not text.startswith("["):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"set: {key}={text!r} is no list as in [16, 16]") from error
