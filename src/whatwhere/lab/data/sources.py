"""Finding and reading text: files, folders, patterns, or Python's own standard library."""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EMBEDDED_MAX_BYTES = 8 * 2**20
"""At most this much of the standard library is read, unless `max_bytes` says otherwise."""

# Left out of the embedded text: third-party packages, tests, parts that distributions ship apart
# (so that machines differ less), and long tables (charmaps, the help texts of pydoc).
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests"),
    *("idlelib", "lib2to3", "turtledemo", "tkinter", "distutils", "ensurepip"),
    *("encodings", "pydoc_data"),
}


@dataclass(frozen=True)
class Document:
    """The UTF-8 text of a file or of a part of one.

    Attributes:
        name: Path as found, with `/` between folders.
        text: Valid UTF-8 without NUL bytes, not blank.
        digest: SHA-256 of `text`, in hexadecimal.
    """

    name: str
    text: bytes
    digest: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, no two with the same text, and what was left out."""

    source: str
    documents: tuple[Document, ...]
    skipped: dict[str, int] = field(default_factory=dict)


def read_corpus(paths: Sequence[str] = (), max_bytes: int | None = None) -> Corpus:
    """Read text from files, folders (all files below them) and glob patterns.

    Files come in the order of the paths, within a folder or pattern sorted by name. Of files with
    equal text the first is kept. Hidden files and folders are passed over. A file that is named
    must be UTF-8 text; in folders and patterns, files that are not, and blank ones, are skipped
    and counted. A byte order mark at the start is dropped.

    Args:
        paths: Where the text is; empty means the Python files of the standard library of the
            running interpreter, without its tests.
        max_bytes: Read this many bytes at most; the file that reaches the limit is cut. `None`
            is no limit for paths and `EMBEDDED_MAX_BYTES` for the standard library.

    Raises:
        ValueError: A path that does not exist or gives no text, or a named file that is empty,
            binary or unreadable.
    """
    if not paths:
        return _read_embedded(max_bytes or EMBEDDED_MAX_BYTES)
    reader = _Reader(max_bytes)
    for path in paths:
        files, named = find_files(path)
        before = reader.readable
        for file in files:
            reader.add(file, file.as_posix(), named=named)
        if reader.readable == before:
            left_out = ", ".join(f"{count} {why}" for why, count in reader.skipped.items())
            detail = f" ({left_out})" if left_out else ""
            raise ValueError(f"paths: {path!r} holds no UTF-8 text file{detail}")
    return Corpus(", ".join(paths), tuple(reader.documents.values()), dict(reader.skipped))


def as_paths(value: Any) -> Any:
    """Make a lone path a tuple of one, for settings that hold paths.

    Raises:
        ValueError: A path is blank, which would mean the folder ".".
    """
    values = (value,) if isinstance(value, str | Path) else value
    if not isinstance(values, Sequence):
        return values
    if any(isinstance(path, str) and not path.strip() for path in values):
        raise ValueError(f"paths must not be blank, got {value!r}")
    return tuple(str(path) if isinstance(path, Path) else path for path in values)


def evenly_spaced(last: int, count: int) -> NDArray[np.int64]:
    """Return `count` integers from 0 to `last`."""
    return np.arange(count) * last // max(1, count - 1)


def split_by_file(
    documents: Sequence[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """Split whole documents into (train, validation), at least one each.

    A document's own text decides: it is validation if its SHA-256, read as a number in [0, 1), is
    below `fraction`. So a file keeps its split when others come or go, or when the folder moves.
    `fraction` is a share of files, not of bytes. If it picks none, the lowest number is taken; if
    it picks all, the highest is left for training.

    Raises:
        ValueError: Fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError(
            f"split='file' needs two or more different files, got {len(documents)}; "
            "use split='position'"
        )
    held_out = validation_chosen([document.digest for document in documents], fraction)
    train: list[Document] = []
    validation: list[Document] = []
    for document, chosen in zip(documents, held_out, strict=True):
        (validation if chosen else train).append(document)
    return train, validation


def validation_chosen(digests: Sequence[str], fraction: float) -> list[bool]:
    """Whether each document is validation, from its SHA-256; at least one is, and one is not.

    See `split_by_file`.
    """
    numbers = [digest_number(digest) for digest in digests]
    bound = min(max(fraction, min(numbers)), max(numbers))
    # With `fraction` outside the numbers, the bound is one of them: the lowest goes to
    # validation, the highest to training.
    lowest = min(numbers)
    return [number < bound or number == lowest for number in numbers]


def digest_number(digest: str) -> float:
    """A hexadecimal digest read as a number in [0, 1)."""
    return int(digest[:13], 16) / 16**13


def split_by_position(
    documents: Sequence[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """Split each document into a head for training and its last `fraction` for validation.

    The cut never falls inside a character; a part with nothing in it is left out.
    """
    train, validation = [], []
    for document in documents:
        cut = len(document.text) - round(len(document.text) * fraction)
        while cut < len(document.text) and document.text[cut] & 0xC0 == 0x80:
            cut += 1
        if cut > 0:
            train.append(_document(f"{document.name} (head)", document.text[:cut]))
        if cut < len(document.text):
            validation.append(_document(f"{document.name} (tail)", document.text[cut:]))
    return train, validation


class _Reader:
    """Collects documents, drops doubles, counts what it leaves out and stops at a limit."""

    def __init__(self, max_bytes: int | None) -> None:
        self.documents: dict[str, Document] = {}
        self.skipped: Counter[str] = Counter()
        self.readable = 0
        self._left = max_bytes

    def add(self, file: Path, name: str, *, named: bool) -> None:
        """Read a file; one that is `named` by the user must be text."""
        try:
            with file.open("rb") as handle:
                data = handle.read(-1 if self._left is None else self._left)
            cut = len(data) == self._left
            text = _decodable(data, cut=cut)
        except OSError as error:
            text, problem = b"", f"unreadable ({error.strerror})"
        except ValueError as error:
            text, problem = b"", str(error)
        else:
            problem = "" if text.strip() else "beyond max_bytes" if cut else "empty"
        if problem == "beyond max_bytes":
            self.readable += 1
            self.skipped[problem] += 1
            self._left = 0
            return
        if problem:
            if named:
                raise ValueError(f"paths: file {name!r} is {problem}; UTF-8 text is needed")
            self.skipped[problem.split(" (")[0]] += 1
            return
        self.readable += 1
        if self._left is not None:
            self._left = 0 if cut else self._left - len(data)
        document = _document(name, text)
        # A text that the limit cut short no longer has the digest of the file it may repeat.
        repeats = cut and any(known.text.startswith(text) for known in self.documents.values())
        if repeats or document.digest in self.documents:
            self.skipped["duplicate"] += 1
            return
        self.documents[document.digest] = document


def _decodable(data: bytes, *, cut: bool) -> bytes:
    # The text of a file; where the limit cut it short, without the last, partial character.
    if b"\0" in data:
        raise ValueError("binary (it holds NUL bytes)")
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data, final=not cut)
    except UnicodeDecodeError as error:
        raise ValueError(f"binary (byte {error.start} is not UTF-8)") from None
    pending = len(decoder.getstate()[0])
    return data[: len(data) - pending].removeprefix(codecs.BOM_UTF8)


def _document(name: str, text: bytes) -> Document:
    return Document(name, text, hashlib.sha256(text).hexdigest())


def find_files(path: str) -> tuple[list[Path], bool]:
    """The files of a path (file, folder or pattern) in order, and whether it names one file.

    Raises:
        ValueError: There is no such file, folder or match.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return list(_walk(place, lambda name: not name.startswith("."))), False
    if place.is_file():
        return [place], True
    if place.exists():
        raise ValueError(f"paths: {path!r} is neither a file nor a folder")
    if not glob.has_magic(path):
        # A run keeps relative paths as they were given, so the folder they are taken from matters.
        below = "" if place.is_absolute() else f" in {str(Path.cwd())!r}"
        raise ValueError(f"paths: {path!r} does not exist{below}")
    # Path.glob has no absolute patterns, and its `**` finds folders alone before Python 3.13.
    matches = glob.glob(str(place), recursive=True)  # noqa: PTH207
    files = [match for match in map(Path, matches) if match.is_file()]
    if not files:
        raise ValueError(f"paths: pattern {path!r} matches no file")
    return sorted(set(files), key=Path.as_posix), False


def _walk(folder: Path, keep: Callable[[str], bool]) -> Iterator[Path]:
    # Files below a folder, sorted by path; `keep` judges names of files and of folders.
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = filter(keep, folders)
        found += [Path(parent, name) for name in files if keep(name)]
    return iter(
        sorted(
            (file for file in found if file.is_file()),
            key=lambda file: file.relative_to(folder).as_posix(),
        )
    )


def _read_embedded(max_bytes: int) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))

    def keep(name: str) -> bool:
        if name.endswith(".py"):
            return not name.startswith(("_sysconfigdata", "sitecustomize"))
        return "." not in name and name not in _SKIPPED_FOLDERS

    reader = _Reader(max_bytes)
    for file in _walk(root, keep):
        if file.suffix == ".py":
            reader.add(file, file.relative_to(root).as_posix(), named=False)
    if len(reader.documents) < 2:
        raise ValueError(
            f"paths: this Python keeps no source of its standard library in {str(root)!r}; "
            "name a text file or folder of your own"
        )
    source = f"standard library of Python {platform.python_version()}"
    return Corpus(source, tuple(reader.documents.values()), dict(reader.skipped))
