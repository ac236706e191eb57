"""FASTA files: records one at a time, and which of them are which chromosome."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from whatwhere.lab.data.extras import need

SUFFIXES = tuple(f".{kind}{packed}" for packed in ("", ".gz") for kind in ("fa", "fasta", "fna"))

_NAME = r"(\d{1,2}|[XYWZ])"
_WHOLE = re.compile(rf"(?:chr)?(?:{_NAME}|(MT?))", re.IGNORECASE)
_REFSEQ = re.compile(r"NC_0000(\d\d)\.\d+")  # 1 to 24 are the human chromosomes, X 23, Y 24
_BELONGS = re.compile(rf"(?:chr|CHR_HSCHR){_NAME}_", re.IGNORECASE)
_TITLE = re.compile(rf"\bchromosome {_NAME}\b")
_PIECE = re.compile(r"scaffold|patch|locus|loci|unlocalized|unplaced|contig", re.IGNORECASE)


def read_fasta(path: Path) -> Iterator[tuple[str, str]]:
    """Yield title and sequence of each record, one held at a time; gzip is known by its bytes.

    Raises:
        ValueError: The file is empty, no FASTA, or damaged gzip.
    """
    parser = need("Bio.SeqIO.FastaIO", "data").SimpleFastaParser
    with _open(path) as handle:
        records = _parse(path, handle, parser)
        while True:
            try:
                record = next(records, None)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                problem = "the gzip file is damaged or cut short"
                raise ValueError(f"{path}: {problem} ({error})") from error
            if record is None:
                return
            yield record
            del record  # a chromosome, not to be held while the next one is read


def record_name(title: str, index: int) -> str:
    """Return the first word of a title, or the record's number where there is none."""
    return (title.split(maxsplit=1) or [f"record-{index}"])[0]


def chromosome(title: str) -> tuple[str, bool] | None:
    """Return the chromosome a title speaks of, and whether the record is all of it.

    Knows the names of UCSC (chr21), Ensembl (21), RefSeq (NC_000021.9) and GenBank
    (CM000683.2 Homo sapiens chromosome 21, ...), and those of scaffolds and alternative loci
    that belong to a chromosome (chr21_GL383578v2_alt).
    """
    name, _, description = title.partition(" ")
    if match := _WHOLE.fullmatch(name):
        return (match[1] or match[2][0]).upper(), True
    if match := _REFSEQ.fullmatch(name):
        number = int(match[1])
        if 1 <= number <= 24:
            return {23: "X", 24: "Y"}.get(number, str(number)), True
    if match := _BELONGS.match(name):
        return match[1].upper(), False
    if match := _TITLE.search(description):
        return match[1].upper(), not _PIECE.search(description)
    return None


def _parse(path: Path, handle: IO[str], parser: Any) -> Iterator[tuple[str, str]]:
    beginning = handle.read(4096).lstrip()
    if not beginning.startswith(">"):
        problem = f"begins with {beginning[:20]!r}, not with '>'" if beginning else "is empty"
        raise ValueError(f"{path}: is no FASTA file: it {problem}")
    handle.seek(0)
    yield from parser(handle)


def _open(path: Path) -> IO[str]:
    with path.open("rb") as handle:
        packed = handle.read(2) == b"\x1f\x8b"
    # Latin-1 takes every byte, so that a wrong one is found, and named, as a character.
    if packed:
        return gzip.open(path, "rt", encoding="latin-1")
    return path.open(encoding="latin-1")
