"""A prepared data set on disk: token shards, document bounds and a manifest; its reader.

    manifest.json                 what it is, counts and checksums of every file
    train-00000.tokens.npy        uint8, uint16 or uint32, one axis, memory-mapped when read
    train-00000.bounds.npy        int64: document i is tokens[bounds[i] : bounds[i + 1]]
    tokenizer/                    files of the tokenizer, where it has some

A shard holds whole documents. Opening a folder checks that every file is there and has its size
and shape; the checksums are compared when a folder is opened for the first time in its place, and
by `verify`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from whatwhere.lab.data.corpus import CorpusSplit, Layout
from whatwhere.lab.storage import RunError, read_json, write_json

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
_VERIFIED = ".verified.json"
_READ_AT_ONCE = 2**22

Ints = NDArray[np.int64]
Count = Annotated[int, Field(ge=0)]
# Names of files inside the folder: no separators, so that a manifest points nowhere else.
FileName = Annotated[str, Field(pattern=r"^[a-z]+-\d{5}\.(tokens|bounds)\.npy$")]
# Of the tokenizer's files: no part of the path begins with a dot.
BelowName = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardRecord(_Record):
    """Two files: tokens, and the bounds of their documents."""

    file: FileName
    bounds: FileName
    documents: Count
    tokens: Count
    bytes: Count
    sha256: Digest
    bounds_bytes: Count
    bounds_sha256: Digest


class SplitRecord(_Record):
    """A split: its shards in order."""

    documents: Count
    tokens: Count
    shards: tuple[ShardRecord, ...]


class TokenizerRecord(_Record):
    """What the ids mean."""

    name: str
    fingerprint: str
    vocab_size: Annotated[int, Field(ge=1)]
    separator: int | None
    padding: int
    files: dict[BelowName, Digest] = {}


class Manifest(_Record):
    """All that is known of a prepared data set.

    `fingerprint` is the corpus's: equal fingerprints give equal tokens. `checksum` is the SHA-256
    of the manifest without it, so that one that was edited is seen.
    """

    format: Literal[1]
    name: str
    source: str
    licence: str
    homepage: str
    fingerprint: str
    tokenizer: TokenizerRecord
    ranges: dict[str, tuple[int, int]]
    layout: Layout
    choices: dict[str, Any]
    left_out: dict[str, int]
    splits: dict[CorpusSplit, SplitRecord]
    versions: dict[str, str]
    created: str
    git_commit: str | None
    checksum: str = ""

    def signed(self) -> Manifest:
        """The same with its checksum."""
        return self.model_copy(update={"checksum": self._digest()})

    def check(self) -> None:
        """Raise a `ValueError` if the manifest contradicts itself."""
        if self.checksum != self._digest():
            raise ValueError("it was changed after it was written (its checksum does not fit)")

    def _digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"checksum"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Stream:
    """A split read as one long stream of tokens, which stay on disk.

    Args:
        tokens: Tokens of each shard, memory-mapped.
        bounds: Bounds of each shard's documents.
    """

    def __init__(self, tokens: Sequence[NDArray[Any]], bounds: Sequence[Ints]) -> None:
        self._tokens, self._bounds = tuple(tokens), tuple(bounds)
        self._ends = np.cumsum([len(part) for part in tokens], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @cached_property
    def bounds(self) -> Ints:
        """`(documents + 1,)`: document `i` is `bounds[i] .. bounds[i + 1] - 1` of the stream."""
        starts = [0, *self._ends[:-1].tolist()]
        shifted = [part[1:] + start for part, start in zip(self._bounds, starts, strict=False)]
        return np.concatenate([np.zeros(1, dtype=np.int64), *shifted])

    def take(self, starts: Ints, length: int) -> Ints:
        """Return windows of the stream, `(len(starts), length)` int64.

        Args:
            starts: First token of each, in `0 .. len(self) - length` (not checked).
            length: Tokens in each.
        """
        windows = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(windows, starts.tolist(), strict=True):
            self.read(start, row)
        return windows

    def read(self, start: int, into: Ints) -> None:
        """Fill an array with the tokens from `start` on."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < len(into):
            tokens = self._tokens[shard]
            inside = start + done - (int(self._ends[shard]) - len(tokens))
            part = tokens[inside : inside + len(into) - done]
            into[done : done + len(part)] = part
            done += len(part)
            shard += 1

    def blocks(self) -> Iterator[NDArray[Any]]:
        """Yield all tokens in order, some millions at a time."""
        for tokens in self._tokens:
            for first in range(0, len(tokens), _READ_AT_ONCE):
                yield tokens[first : first + _READ_AT_ONCE]


class PreparedFolder:
    """A prepared data set, opened and checked.

    Args:
        path: Its folder.

    Raises:
        ValueError: There is no manifest, or it was edited, or a shard is missing, cut short or
            damaged; one line that names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._streams = {name: self._open(name) for name in self.manifest.splits}
        if not self._verified_here():
            for file, problem in check_files(path, self.manifest):
                if problem:
                    raise ValueError(_refusal(file, problem))
            mark_verified(path, self.manifest)

    def stream(self, split: CorpusSplit) -> Stream:
        """The tokens of a split, empty if there is no such split."""
        return self._streams.get(split) or Stream((), ())

    def _open(self, split: CorpusSplit) -> Stream:
        dtype = token_dtype(self.manifest.tokenizer.vocab_size)
        tokens, bounds = [], []
        for shard in self.manifest.splits[split].shards:
            tokens.append(self._map(shard.file, shard.bytes, shard.tokens, dtype))
            bounds.append(
                self._map(shard.bounds, shard.bounds_bytes, shard.documents + 1, np.dtype("<i8"))
            )
            if bounds[-1][0] != 0 or bounds[-1][-1] != shard.tokens:
                raise ValueError(_refusal(self.path / shard.bounds, "damaged"))
        return Stream(tokens, bounds)

    def _map(self, name: str, size: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        file = self.path / name
        problem = _wrong_size(file, size)
        if problem:
            raise ValueError(_refusal(file, problem))
        try:
            # A map of no elements does not exist.
            array = np.load(file, mmap_mode="r" if count else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(_refusal(file, f"damaged ({error})")) from error
        if array.shape != (count,) or array.dtype != dtype:
            raise ValueError(
                _refusal(
                    file,
                    f"damaged: {array.shape} {array.dtype} where ({count},) {dtype} is expected",
                )
            )
        mapped: NDArray[Any] = array
        return mapped

    def _verified_here(self) -> bool:
        try:
            found = read_json(self.path / _VERIFIED)
            return bool(found == _marks(self.path, self.manifest))
        except (OSError, ValueError):
            return False  # Never compared here, or a file is missing, which is then said.


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned dtype that holds ids below `vocab_size`."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def is_prepared(path: Path) -> bool:
    """Whether a folder was made by `prepare`, to its end."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        ValueError: There is none, or it is damaged or was edited; one line.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{path} holds no {MANIFEST}: it is no folder of `whatwhere data prepare`"
        )
    again = "prepare the data again"
    content = read_json(file)
    if isinstance(content, dict) and content.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {content.get('format')!r}, this version reads {FORMAT}: {again}"
        )
    try:
        manifest = Manifest.model_validate(content)
        manifest.check()
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{file}: {where}: {problem['msg']}: {again}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}: {again}") from None
    return manifest


def check_files(path: Path, manifest: Manifest) -> Iterator[tuple[Path, str]]:
    """Compare every file of a folder with its checksum.

    Yields:
        A file, and what is wrong with it: `""` if nothing is.
    """
    for name, size, digest in _listed(manifest):
        file = path / name
        problem = _wrong_size(file, size)
        if not problem and sha256_of(file) != digest:
            problem = "damaged (its SHA-256 is not that of the manifest)"
        yield file, problem


def file_count(manifest: Manifest) -> int:
    """How many files `check_files` compares."""
    return sum(1 for _ in _listed(manifest))


def mark_verified(path: Path, manifest: Manifest) -> None:
    """Note that the checksums of a folder were compared, so that opening it again is quick."""
    try:
        write_json(path / _VERIFIED, _marks(path, manifest))
    except (RunError, OSError):
        return  # A folder that cannot be written to is compared each time it is opened.


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _marks(path: Path, manifest: Manifest) -> dict[str, Any]:
    # Times and numbers, too: a copy has others, and is compared again.
    marks: dict[str, Any] = {"manifest": manifest.checksum}
    for name, _, _ in _listed(manifest):
        status = (path / name).stat()
        marks[name] = [status.st_size, status.st_mtime_ns, status.st_ino]
    return marks


def _listed(manifest: Manifest) -> Iterator[tuple[str, int | None, str]]:
    for split in manifest.splits.values():
        for shard in split.shards:
            yield shard.file, shard.bytes, shard.sha256
            yield shard.bounds, shard.bounds_bytes, shard.bounds_sha256
    for name, digest in manifest.tokenizer.files.items():
        yield f"{TOKENIZER}/{name}", None, digest


def _wrong_size(file: Path, size: int | None) -> str:
    if not file.is_file():
        return "missing"
    found = file.stat().st_size
    if size is None or found == size:
        return ""
    kind = "cut short" if found < size else "damaged"
    return f"{kind} ({found} bytes where the manifest has {size})"


def _refusal(file: Path, problem: str) -> str:
    return f"{file} is {problem}: copy it again from where it was prepared, or prepare it again"
