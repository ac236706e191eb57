"""Files of records with a text each: JSON lines, JSON lists and Parquet, read in parts."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from whatwhere.lab.data.extras import need

_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class RecordPart:
    """A part of a file: lines that start in a range of bytes, or row groups.

    Attributes:
        path: The file.
        start: First byte, or first row group.
        stop: Behind the last byte or row group; `None` is all of the file.
    """

    path: str
    start: int = 0
    stop: int | None = None

    @property
    def key(self) -> str:
        """Unique below the source."""
        return f"{self.path}:{self.start}"


def is_record_file(path: Path) -> bool:
    """Whether a file's name says that it holds records."""
    name = path.name.lower()
    return name.endswith((*_LINES, *(f"{ending}.gz" for ending in _LINES), ".parquet"))


def parts(path: Path, size: int) -> list[RecordPart]:
    """The parts of a file in order.

    Args:
        path: The file.
        size: Bytes of a part, about. A list, or a file that is compressed, is one part.

    Raises:
        ValueError: A Parquet file that is damaged or has no column `text`.
    """
    name = str(path)
    if name.lower().endswith(".parquet"):
        return [RecordPart(name, first, last) for first, last in _row_groups(path, size)]
    if name.lower().endswith(".gz") or _is_list(path):
        return [RecordPart(name)]
    end = path.stat().st_size
    edges = [*range(0, end, size), end]
    return [RecordPart(name, a, b) for a, b in pairwise(edges)]


def read(part: RecordPart, limit: int | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield the name and UTF-8 text of each record of a part.

    Args:
        part: From `parts`.
        limit: Stop after this many bytes of text; the one that reaches it is cut.

    Raises:
        ValueError: Damaged, or a record without a text; one line with the file and the line.
    """
    path = Path(part.path)
    if part.path.lower().endswith(".parquet"):
        found = _read_parquet(path, part)
    elif part.stop is None and not part.path.lower().endswith(".gz"):
        found = _read_list(path)
    else:
        found = _read_lines(path, part)
    return limited(found, limit)


def limited(found: Iterator[tuple[str, bytes]], limit: int | None) -> Iterator[tuple[str, bytes]]:
    """Yield texts until they have a number of bytes; the last is cut between two characters."""
    left = limit
    for name, text in found:
        if left is None or len(text) < left:
            yield name, text
            left = None if left is None else left - len(text)
        else:
            yield name, text[:left].decode(errors="ignore").encode()
            return


def text_of(record: Any, where: str) -> bytes:
    """The text of a record: its `"text"`, or the record itself if it is a string.

    Raises:
        ValueError: It has none; the line starts with `where`.
    """
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise ValueError(f'{where}: an object with a "text" of characters is expected')
    # NUL separates documents where tokens are bytes, and half a surrogate pair is no UTF-8.
    return text.replace("\0", "").encode("utf-8", "replace")


def parse_line(line: bytes | str, where: str) -> bytes:
    """The text of a line of JSON; errors as for `text_of`."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON, perhaps cut short ({_reason(error)})") from None
    return text_of(record, where)


def _read_lines(path: Path, part: RecordPart) -> Iterator[tuple[str, bytes]]:
    # Lines that start in [start, stop): the one that the range begins within is another part's.
    compressed = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path) if compressed else path.open("rb") as handle:
            place = part.start
            if place:
                handle.seek(place - 1)
                place += len(handle.readline()) - 1
            while part.stop is None or place < part.stop:
                line = handle.readline()
                if not line:
                    return
                if line.strip():
                    try:
                        yield f"{path}:{place}", parse_line(line, str(path))
                    except ValueError as error:
                        number = _line_number(path, place, compressed)
                        message = str(error).removeprefix(str(path))
                        raise ValueError(f"{path}, line {number}{message}") from None
                place += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({_reason(error)})") from None


def _line_number(path: Path, place: int, compressed: bool) -> int:
    with gzip.open(path) if compressed else path.open("rb") as handle:
        return 1 + handle.read(place).count(b"\n")


def _is_list(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(4096).lstrip().startswith(b"[")


def _read_list(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        found = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: no JSON, perhaps cut short ({_reason(error)})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({_reason(error)})") from None
    for number, record in enumerate(found):
        yield f"{path}[{number}]", text_of(record, f"{path}, element {number}")


def _row_groups(path: Path, size: int) -> Iterator[tuple[int, int]]:
    file = _open_parquet(path)
    if "text" not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise ValueError(f"{path}: a column 'text' is expected, there are {names}")
    first, together = 0, 0
    for i in range(file.num_row_groups):
        together += file.metadata.row_group(i).total_byte_size
        if together >= size or i == file.num_row_groups - 1:
            yield first, i + 1
            first, together = i + 1, 0


def _read_parquet(path: Path, part: RecordPart) -> Iterator[tuple[str, bytes]]:
    file = _open_parquet(path)
    row_groups = list(range(part.start, part.stop or file.num_row_groups))
    number = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
    arrow = need("pyarrow", "data")
    try:
        for batch in file.iter_batches(256, row_groups=row_groups, columns=["text"]):
            for text in batch.column(0).to_pylist():
                yield f"{path}[{number}]", text_of("" if text is None else text, str(path))
                number += 1
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{path} is damaged or cut short ({_reason(error)})") from None


def _open_parquet(path: Path) -> Any:
    parquet, arrow = need("pyarrow.parquet", "data"), need("pyarrow", "data")
    try:
        return parquet.ParquetFile(path)
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{path} is damaged or cut short ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
