"""Reading benchmark files, so that whatever is wrong with one is said by file and line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Item = dict[str, Any]


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        ValueError: If it is not UTF-8.
    """
    return decode(path.read_bytes(), path)


def decode(content: bytes, name: object) -> str:
    """UTF-8 text of a file, without a byte order mark.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start}") from None


def json_lines(text: str, name: object, fields: Sequence[str]) -> list[Item]:
    """Items of a JSON Lines file, one a line, each with text in `fields`.

    Args:
        text: Of the file.
        name: Of the file, for errors.
        fields: Keys that hold a string, not blank.

    Raises:
        ValueError: If a line is no such item; the line is named by its number.
    """
    items = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error})") from None
        items.append(checked(item, f"{name}, line {number}", fields))
    return items


def checked(item: Any, place: str, fields: Sequence[str]) -> Item:
    """The item, if it is a mapping with text in `fields`.

    Raises:
        ValueError: If it is not; `place` says where it stands.
    """
    if not isinstance(item, dict):
        raise ValueError(f"{place}: expected a mapping, got {type(item).__name__}")
    for field in fields:
        value = item.get(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{place}: {field!r} is no text")
    return item


def counted(items: list[Item], expected: int, name: object) -> list[Item]:
    """The items, if there are as many as the benchmark has.

    Raises:
        ValueError: If there are more or fewer.
    """
    if len(items) != expected:
        raise ValueError(
            f"{name}: {len(items):,} items where the benchmark has {expected:,}: the file is cut "
            "short, or another one"
        )
    return items


def digest(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its name."""
    found = {}
    for path in sorted(paths):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
