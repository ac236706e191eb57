"""Files of a kind below the paths given, and digests of what they hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def find_files(paths: Sequence[Path], suffixes: Sequence[str], kind: str) -> dict[str, Path]:
    """Return files by name, in the order of the paths, within a folder sorted by name.

    A file is called by its name, one below a folder by its path from there with `/`. Hidden files
    and folders are passed over, and files of other suffixes unless named themselves.

    Args:
        paths: Existing files and folders.
        suffixes: Endings of file names in folders, in lower case.
        kind: What is looked for, for the message.

    Raises:
        ValueError: A path that does not exist, a folder without such a file, or two files that
            would be called the same.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            below = {file.relative_to(path).as_posix(): file for file in _walk(path, suffixes)}
            if not below:
                raise ValueError(
                    f"{path}: the folder holds no {kind} file ({', '.join(suffixes)})"
                )
        elif path.is_file():
            below = {path.name: path}
        else:
            raise ValueError(f"{path}: there is no such file or folder")
        twice = next((name for name in below if name in found), None)
        if twice is not None:
            raise ValueError(f"{below[twice]}: {twice!r} is the name of {found[twice]}, too")
        found |= below
    if not found:
        raise ValueError(f"paths: no {kind} file is named")
    return found


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, in hexadecimal, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _walk(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and name.lower().endswith(tuple(suffixes))
        ]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())
