"""Text in files of the user's own, or of a data set brought from elsewhere, as documents.

Plain text is a document a file. Files ending in `.jsonl`, `.ndjson` or `.json` (`.gz` may follow)
hold one object with a `"text"` a line, or a list of such; `.parquet` files have a column `text`.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from whatwhere.lab.data import records
from whatwhere.lab.data.corpus import CorpusSplit, Item
from whatwhere.lab.data.documents import VALIDATION_FRACTION, Text, TextDocuments
from whatwhere.lab.data.shards import sha256_of
from whatwhere.lab.data.sources import digest_number, find_files, validation_chosen

ITEM_BYTES = 2 * 2**20
"""Plain files are put together to items of about this size; longer ones are items of their own."""

MOST_ITEMS = 4096
"""Sources that would have more items than about this many get larger ones."""

DOCUMENT_BYTES = 16 * 2**20
"""A longer plain file is cut into documents of about this size, at ends of lines."""

LEAST_SHARE = 2**20
"""With `max_bytes`, at least this much is read of each part of the source that is used."""

_READ_AT_ONCE = 2**22
_SPLIT_NAMES: dict[str, CorpusSplit] = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "test": "test",
}
_HELD_OUT = ("validation", "test")


@dataclass(frozen=True)
class Piece:
    """Bytes of a plain file that are one document."""

    path: str
    start: int
    stop: int
    split: CorpusSplit | None
    mark: int = 0
    """Length of a byte order mark before them."""


@dataclass(frozen=True)
class Part:
    """A part of a file of records."""

    part: records.RecordPart
    split: CorpusSplit | None
    limit: int | None


@dataclass(frozen=True)
class _File:
    path: Path
    digest: str
    size: int
    mark: int = 0
    split: CorpusSplit | None = None


@dataclass(frozen=True)
class _Scan:
    plain: tuple[_File, ...]
    records: tuple[_File, ...]
    left_out: tuple[str, ...]


class TextFiles(TextDocuments):
    """Documents from files, folders and patterns.

    Files come in the order of the paths, within a folder or pattern sorted by name; hidden ones
    are passed over. A plain file that is named must be UTF-8 text; in folders and patterns, files
    that are not, and empty ones, are left out and counted, as are repetitions. Records must all be
    well formed.

    Two or more plain files are split by file, as `sources.split_by_file` does; one alone is split
    by position: its last tenth is validation. Records are split one by one, by their digests.

    Args:
        paths: Files, folders, patterns.
        name: Of the data set.
        tokenizer: See `TextDocuments`.
        validation_fraction: See `TextDocuments`.
        max_bytes: Read this much at most: plain files in order, the last one cut; of records an
            equal share of parts spread over the source.
        own_splits: Whether files named `train`, `validation` or `test`, or in such a folder, keep
            that split; of the folders those count that `paths` names, and those below.
            `max_bytes` does not count validation and test, which are read whole.
        only: One of these splits, to read nothing else.
        licence: Of the texts.
        homepage: Where they come from.

    Raises:
        ValueError: A path does not exist or gives no text, or the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        paths: Sequence[str],
        name: str = "text",
        tokenizer: str = "bytes",
        *,
        validation_fraction: float = VALIDATION_FRACTION,
        max_bytes: int | None = None,
        own_splits: bool = False,
        only: CorpusSplit | None = None,
        licence: str = "that of the files",
        homepage: str = "",
    ) -> None:
        super().__init__(tokenizer, validation_fraction)
        self.name, self.licence, self.homepage = name, licence, homepage
        self.paths, self.max_bytes = tuple(paths), max_bytes
        self.own_splits, self.only = own_splits, only
        if not self.paths:
            raise ValueError("paths: name files, folders or patterns")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")

    def items(self) -> Iterator[Item]:
        """Yield groups of plain files, then parts of files of records; see `Corpus.items`."""
        for reason in self._scanned.left_out:
            self.leave_out(reason)
        enough = max(ITEM_BYTES, self._size() // MOST_ITEMS)
        group: list[Piece] = []
        size = 0
        for piece in self._pieces():
            group.append(piece)
            size += piece.stop - piece.start
            if size >= enough:
                yield _grouped(group)
                group, size = [], 0
        if group:
            yield _grouped(group)
        yield from self._record_items()

    def texts(self, item: Item) -> Iterator[Text]:
        """Yield the texts of files or records; see `TextDocuments.texts`."""
        if isinstance(item.payload, Part):
            part = item.payload
            for name, text in records.read(part.part, part.limit):
                yield Text(name, text, part.split)
            return
        for piece in item.payload:
            with Path(piece.path).open("rb") as handle:
                handle.seek(piece.mark + piece.start)
                text = handle.read(piece.stop - piece.start)
            if len(text) != piece.stop - piece.start:
                raise ValueError(f"{piece.path} was changed while it was read")
            yield Text(piece.path, text, piece.split)

    def source_fingerprint(self) -> list[Any]:
        """See `TextDocuments.source_fingerprint`."""
        files = [
            [kind, file.digest, file.size, file.split]
            for kind in ("plain", "records")
            for file in getattr(self._scanned, kind)
        ]
        chosen = [self.only] if self.only else []
        return ["files", 1, files, self.max_bytes, DOCUMENT_BYTES, *chosen]

    def describe(self) -> dict[str, Any]:
        """See `Corpus.describe`."""
        found = self._scanned
        return {
            "source": ", ".join(self.paths),
            "files": len(found.plain) + len(found.records),
            "bytes": self._size(),
            "split": "by its own files, else by digest" if self.own_splits else self._split_rule(),
            "validation_fraction": self.validation_fraction,
            "max_bytes": self.max_bytes,
            "only": self.only,
        }

    def __getstate__(self) -> dict[str, Any]:
        # Workers need not know all files.
        return {key: v for key, v in super().__getstate__().items() if key != "_scanned"}

    def _size(self) -> int:
        return sum(file.size for file in (*self._scanned.plain, *self._scanned.records))

    def _split_rule(self) -> Literal["position", "digest"]:
        alone = len(self._scanned.plain) == 1 and not self._scanned.records
        return "position" if alone else "digest"

    @cached_property
    def _scanned(self) -> _Scan:
        plain: dict[str, _File] = {}
        others: dict[str, _File] = {}
        left_out: list[str] = []
        left = self.max_bytes
        for path in self.paths:
            files, named = find_files(path)
            before = len(plain) + len(others)
            root = _root(path)
            for file in files:
                split = _own_split(file, root) if self.own_splits else None
                if self.only not in (None, split):
                    left_out.append("files of other splits")
                    continue
                is_record = records.is_record_file(file)
                limit = None if split in _HELD_OUT else left
                try:
                    if limit == 0 and not is_record:
                        raise _UnusableError("beyond max_bytes")
                    found = _scan_records(file) if is_record else _scan_plain(file, limit)
                except _UnusableError as problem:
                    if named and str(problem) != "beyond max_bytes":
                        raise ValueError(
                            f"paths: file {str(file)!r} is {problem}; UTF-8 text is needed"
                        ) from None
                    left_out.append(f"files {str(problem).split(' (')[0]}")
                    continue
                known = others if is_record else plain
                if found.digest in known:
                    left_out.append("files repeated")
                    continue
                known[found.digest] = replace(found, split=split)
                if left is not None and limit is not None and not is_record:
                    cut = file.stat().st_size > found.mark + found.size
                    left = 0 if cut else left - found.size
            if len(plain) + len(others) == before and not left_out:
                raise ValueError(f"paths: {path!r} holds no UTF-8 text")
        if not plain and not others:
            what = f"{self.only} split" if self.only else "UTF-8 text"
            raise ValueError(f"paths: {', '.join(self.paths)} holds no {what}")
        return _Scan(tuple(plain.values()), tuple(others.values()), tuple(left_out))

    def _pieces(self) -> Iterator[Piece]:
        found = self._scanned
        if self._split_rule() == "position" and found.plain[0].split is None:
            (file,) = found.plain
            nominal = file.size - round(file.size * self.validation_fraction)
            cut = _character_start(file, nominal)
            yield from _cut(file, 0, cut, "train")
            yield from _cut(file, cut, file.size, "validation")
            return
        free = [file for file in found.plain if file.split is None]
        if len(free) > 1:
            chosen = validation_chosen([file.digest for file in free], self.validation_fraction)
        else:
            chosen = [digest_number(file.digest) < self.validation_fraction for file in free]
        split_of = dict(zip((file.digest for file in free), chosen, strict=True))
        for file in found.plain:
            held_out = split_of.get(file.digest, False)
            yield from _cut(
                file, 0, file.size, file.split or ("validation" if held_out else "train")
            )

    def _record_items(self) -> Iterator[Item]:
        size = max(ITEM_BYTES, self._size() // MOST_ITEMS)
        free: list[tuple[records.RecordPart, CorpusSplit | None]] = []
        held_out: list[tuple[records.RecordPart, CorpusSplit | None]] = []
        for file in self._scanned.records:
            found = [(part, file.split) for part in records.parts(file.path, size)]
            (held_out if file.split in _HELD_OUT else free).extend(found)
        limit = None
        if self.max_bytes is not None:
            read = sum(f.size for f in self._scanned.plain if f.split not in _HELD_OUT)
            free, limit = spread(free, self.max_bytes - read)
        for parts, bound in ((free, limit), (held_out, None)):
            for part, split in parts:
                yield Item(part.key, Part(part, split, bound))


def spread(parts: list[Any], max_bytes: int) -> tuple[list[Any], int]:
    """Choose parts spread evenly over a source, and how many bytes to read of each."""
    if not parts or max_bytes < 1:
        return [], 0
    count = max(1, min(len(parts), max_bytes // LEAST_SHARE))
    return [parts[i * len(parts) // count] for i in range(count)], max_bytes // count


class _UnusableError(Exception):
    """A file that is left out if it is not named."""


def _root(path: str) -> Path:
    # The folder that a path names, be it one, or a file or pattern in it.
    place = Path(path).expanduser()
    while not place.is_dir():
        place = place.parent
    return place


def _own_split(file: Path, root: Path) -> CorpusSplit | None:
    # By its own name, then the folders from the nearest on; never one above the root.
    stem = file.name.partition(".")[0].partition("-")[0]
    folders = (root.name, *file.relative_to(root).parts[:-1])
    for name in (stem, *reversed(folders)):
        if name.lower() in _SPLIT_NAMES:
            return _SPLIT_NAMES[name.lower()]
    return None


def _scan_records(file: Path) -> _File:
    try:
        size = file.stat().st_size
        digest = sha256_of(file)
    except OSError as error:
        raise ValueError(f"paths: {str(file)!r}: {error.strerror}") from None
    if not size:
        raise _UnusableError("empty")
    return _File(file, digest, size)


def _scan_plain(file: Path, limit: int | None) -> _File:
    try:
        digest, size, mark = _scan_text(file, limit)
    except OSError as error:
        raise _UnusableError(f"unreadable ({error.strerror})") from None
    return _File(file, digest, size, mark)


def _scan_text(file: Path, limit: int | None) -> tuple[str, int, int]:
    # Digest, size and length of the byte order mark of a text, read in pieces.
    decoder = codecs.getincrementaldecoder("utf-8")()
    digest, size, mark, blank = hashlib.sha256(), 0, 0, True
    held = b""
    with file.open("rb") as handle:
        while chunk := handle.read(_READ_AT_ONCE if limit is None else min(_READ_AT_ONCE, limit)):
            if limit is not None:
                limit -= len(chunk)
            if b"\0" in chunk:
                raise _UnusableError("binary (it holds NUL bytes)")
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                place = mark + size + error.start
                raise _UnusableError(f"binary (byte {place} is not UTF-8)") from None
            if not size and chunk.startswith(codecs.BOM_UTF8):
                mark = len(codecs.BOM_UTF8)
                chunk = chunk[mark:]
            blank = blank and not chunk.strip()
            # What ends inside a character is held back, in case the limit comes.
            held += chunk
            pending = len(decoder.getstate()[0])
            whole, held = held[: len(held) - pending], held[len(held) - pending :]
            digest.update(whole)
            size += len(whole)
            if limit == 0:
                break
    if held and limit is None:
        raise _UnusableError(f"binary (byte {mark + size} is not UTF-8)")
    if blank or not size:
        raise _UnusableError("beyond max_bytes" if limit == 0 else "empty")
    return digest.hexdigest(), size, mark


def _cut(file: _File, start: int, stop: int, split: CorpusSplit) -> Iterator[Piece]:
    # A document, or several where one would be too long for a worker's memory.
    while stop - start > DOCUMENT_BYTES:
        cut = _line_start(file, start + DOCUMENT_BYTES, stop)
        yield Piece(str(file.path), start, cut, split, file.mark)
        start = cut
    if stop > start:
        yield Piece(str(file.path), start, stop, split, file.mark)


def _line_start(file: _File, place: int, stop: int) -> int:
    # The first start of a line from a place on, or of a character where lines are too long.
    with file.path.open("rb") as handle:
        handle.seek(file.mark + place)
        found = handle.read(_READ_AT_ONCE).find(b"\n")
    return min(stop, place + found + 1) if found >= 0 else _character_start(file, place)


def _character_start(file: _File, place: int) -> int:
    with file.path.open("rb") as handle:
        handle.seek(file.mark + place)
        following = handle.read(4)
    while following and following[0] & 0xC0 == 0x80:
        following, place = following[1:], place + 1
    return place


def _grouped(pieces: list[Piece]) -> Item:
    first = pieces[0]
    return Item(f"{first.path}:{first.start}", tuple(pieces))
