"""Genomes as 6-mer tokens: the human reference genome, or any FASTA files.

"PoPE" (arXiv 2509.10534) says: human reference genome GRCh38, Nucleotide-Transformer 6-mers, a
vocabulary of 4107, length 1000. What it leaves open is decided so:

- Lower case, which marks repeats, is read as upper case, so repeats are kept. N and other codes
  for several bases (R, Y, ...) are dropped: documents are the stretches between them, tokenised
  from their left end. Stretches below 12 bases (two tokens) are left out.
- No token for beginning or end, one strand, no overlap.
- Split. Where chromosomes 21 and 22 are among others, 21 is validation and 22 test; of
  `genome` the chromosomes 1 to 22, X and Y are read then, and neither unplaced nor alternative
  sequences, which repeat the others. Other files of 20 or more chromosomes or records are split
  90 / 5 / 5 % by those, at random. Fewer are split by blocks of 60,000 bases (ten sequences of
  1000 tokens): of every 20 blocks that have bases, the 10th is validation and the 20th test; of
  fewer than 20 blocks in all, the middle and the last one. Blocks share no base, and tokens do
  not cross them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from whatwhere.lab.data import six_mers
from whatwhere.lab.data.compositions import split_by_piece
from whatwhere.lab.data.corpus import Corpus, CorpusSplit, Item, TokenDocument
from whatwhere.lab.data.extras import need
from whatwhere.lab.data.fasta import SUFFIXES, chromosome, read_fasta, record_name
from whatwhere.lab.data.found_files import content_digest, file_digest, find_files

BLOCK = 60_000
"""Bases of a block, the unit of the split of one or a few records."""
REGION = 20 * BLOCK
"""Bases of an item, at about which a long record is cut; a multiple of six."""
SHORTEST = 2 * six_mers.LENGTH
"""Bases of the shortest document."""
MANY = 20
"""Chromosomes or records from which on they are split whole."""
PERIOD = 20
"""Of so many blocks one is validation and one test."""
HELD_OUT: dict[str, CorpusSplit] = {"21": "validation", "22": "test"}
"""Human chromosomes that are not trained on."""

_FORMAT = 1  # to be raised when the tokens or the split of a file change
_HUMAN = {*map(str, range(1, 23)), "X", "Y"}


class _Record(NamedTuple):
    """What is known of a record once all are read."""

    file: str
    number: int  # in its file
    name: str
    title: str
    length: int
    counts: dict[str, int]
    blocks: tuple[int, ...]  # bases in each block

    @property
    def key(self) -> str:
        return f"{self.file}:{self.name}"


class _Stretch(NamedTuple):
    """A part of a record, from `start` to `stop`, and its split."""

    record: _Record
    start: int
    stop: int
    split: CorpusSplit


class GenomeCorpus(Corpus):
    """FASTA files, plain or gzip, as 6-mers.

    Args:
        paths: Files, and folders of which every FASTA file is read.
        name: `"genome"`, the human reference, or `"fasta"` for others.

    Raises:
        ValueError: A path without a FASTA file.
    """

    layout = "pieces"
    tokenizer_name = "Nucleotide Transformer 6-mers, 4107 tokens"
    vocab_size = six_mers.VOCAB_SIZE
    separator = None
    padding = six_mers.PADDING

    def __init__(self, paths: Sequence[Path], name: str = "genome") -> None:
        self.name = name
        human = name == "genome"
        self.licence = "no restriction on use (NCBI)" if human else "that of the files"
        self.homepage = (
            "https://www.ncbi.nlm.nih.gov/datasets/genome/GCF_000001405.40/"
            if human
            else "files of the user"
        )
        self.paths = tuple(paths)
        self._files = find_files(paths, SUFFIXES, "FASTA")
        self._reader = _Reader()

    def items(self) -> Iterator[Item]:
        """Yield stretches of about `REGION` bases, several of short records. Reads all files.

        See `Corpus.items`.
        """
        for group in _grouped(self._plan[1]):
            parts = [
                (*part.record[:3], part.start, part.stop, part.split)  # file, number, name
                for part in group
            ]
            yield Item(f"{group[0].record.key}:{group[0].start}", parts)

    def documents(self, item: Item) -> Iterator[TokenDocument]:
        """Yield the stretches without N, named `file:record:first-last` from 1 on.

        See `Corpus.documents`.
        """
        for file, number, record, start, stop, split in item.payload:
            codes = _codes(self._reader.sequence(self._files[file], number)[start:stop])
            for first, last in six_mers.runs(codes):
                if last - first < SHORTEST:
                    self.leave_out(f"stretch below {SHORTEST} bases")
                    continue
                tokens = six_mers.encode_run(codes[first:last])
                name = f"{file}:{record}:{start + first + 1}-{start + last}"
                yield TokenDocument(split, tokens, name)

    def describe(self) -> dict[str, Any]:
        """Return source, counts and choices."""
        split_by, stretches = self._plan
        counts: Counter[str] = Counter()
        for record in self._records:
            counts += Counter(record.counts)
        bases: Counter[str] = Counter()
        for stretch in stretches:
            bases[stretch.split] += stretch.stop - stretch.start
        return {
            "source": ", ".join(map(str, self.paths)),
            "records": len(self._records),
            "records_used": len({stretch.record.key for stretch in stretches}),
            "letters": dict(counts),
            "letters_by_split": dict(bases),
            "tokenizer": self.tokenizer_name,
            "choices": {
                "split by": split_by,
                "lower case": "as upper case: repeats are kept",
                "N and other codes for several bases": "dropped, documents end there",
                "shortest document": f"{SHORTEST} bases",
                "begin and end": "no token",
            },
        }

    def fingerprint(self) -> str:
        """Return a digest of files, names and options. See `Corpus.fingerprint`."""
        return content_digest(
            {
                "format": _FORMAT,
                "corpus": "genome",
                "human": self.name == "genome",
                "sizes": [BLOCK, REGION, SHORTEST, MANY, PERIOD],
                "files": [[name, file_digest(path)] for name, path in self._files.items()],
            }
        )

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer so that `AutoTokenizer.from_pretrained(folder)` gives it again."""
        transformers = need("transformers", "lab")
        names = {f"{token[1:-1]}_token": token for token in six_mers.SPECIAL}
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=six_mers.six_mer_tokenizer(), **names
        ).save_pretrained(folder)

    @cached_property
    def _records(self) -> list[_Record]:
        records: list[_Record] = []
        known: set[str] = set()
        for file, path in self._files.items():
            # No loop variable keeps a chromosome while the next one is read.
            for record in map(partial(_survey, path, file), count(), read_fasta(path)):
                if record.key in known:
                    raise ValueError(f"{path}: two records are called {record.name!r}")
                known.add(record.key)
                records.append(record)
        if not any(map(sum, (record.blocks for record in records))):
            raise ValueError(f"{', '.join(map(str, self.paths))}: holds no A, C, G or T")
        return records

    @cached_property
    def _plan(self) -> tuple[str, list[_Stretch]]:
        # How the records are split, and all their stretches in order.
        records = self._records
        found = {record.key: chromosome(record.title) for record in records}
        whole = {known[0] for known in found.values() if known and known[1]}
        groups = {key: known[0] if known else key for key, known in found.items()}
        if HELD_OUT.keys() < whole:
            if self.name == "genome":
                kept = {key for key, known in found.items() if known and known[1]}
                kept &= {key for key in groups if groups[key] in _HUMAN}
                records = [record for record in records if record.key in kept]
            splits = {key: HELD_OUT.get(group, "train") for key, group in groups.items()}
            return "chromosome: 21 validation, 22 test", _cut(records, splits)
        if len(set(groups.values())) >= MANY:
            splits = split_by_piece({key: {group} for key, group in groups.items()})
            return "chromosome or record: 90 / 5 / 5 % at random", _cut(records, splits)
        return f"blocks of {BLOCK} bases", _blocks(records)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": _Reader()}


class _Reader:
    """Gives records by number; holds the last one alone, and reads on from it."""

    def __init__(self) -> None:
        self._place: tuple[Path, int] | None = None
        self._records: Iterator[tuple[str, str]] = iter(())
        self._sequence = ""

    def sequence(self, path: Path, index: int) -> str:
        if self._place is None or self._place[0] != path or self._place[1] > index:
            self._records, self._place = read_fasta(path), (path, -1)
        while self._place[1] < index:
            self._sequence = ""  # let go of before the next one is read
            _, self._sequence = next(self._records)
            self._place = (path, self._place[1] + 1)
        return self._sequence


def _survey(path: Path, file: str, index: int, entry: tuple[str, str]) -> _Record:
    # Counts block by block, so that no second copy of a chromosome is made.
    title, sequence = entry
    name = record_name(title, index)
    counts = Counter({"bases": 0, "lower_case": 0, "N": 0, "ambiguous": 0})
    blocks = []
    for start in range(0, len(sequence), BLOCK):
        part = sequence[start : start + BLOCK]
        codes = _codes(part)
        if codes.size and codes.max() > len(six_mers.BASES):
            place = int(codes.argmax())
            raise ValueError(
                f"{path}: record {name!r}, position {start + place + 1}: {part[place]!r} is no "
                "nucleotide code of DNA"
            )
        bases = int((codes < len(six_mers.BASES)).sum())
        unknown = part.count("N") + part.count("n")
        blocks.append(bases)
        counts["bases"] += bases
        counts["N"] += unknown
        counts["ambiguous"] += len(part) - bases - unknown
        letters = np.frombuffer(part.encode("latin-1"), dtype=np.uint8)
        counts["lower_case"] += int((letters >= ord("a")).sum())
    return _Record(file, index, name, title, len(sequence), dict(counts), tuple(blocks))


def _codes(sequence: str) -> NDArray[np.uint8]:
    return six_mers.CODES[np.frombuffer(sequence.encode("latin-1"), dtype=np.uint8)]


def _cut(records: Sequence[_Record], splits: dict[str, CorpusSplit]) -> list[_Stretch]:
    # Whole records, the long ones in regions; what has no base is left out.
    per_region = REGION // BLOCK
    return [
        _Stretch(record, start, min(start + REGION, record.length), splits[record.key])
        for record in records
        for start in range(0, record.length, REGION)
        if any(record.blocks[start // BLOCK : start // BLOCK + per_region])
    ]


def _blocks(records: Sequence[_Record]) -> list[_Stretch]:
    used = [
        (record, start, min(start + BLOCK, record.length))
        for record in records
        for start, bases in zip(range(0, record.length, BLOCK), record.blocks, strict=True)
        if bases >= SHORTEST
    ]
    splits: list[CorpusSplit] = ["train"] * len(used)
    if len(used) >= PERIOD:
        splits[PERIOD // 2 - 1 :: PERIOD] = ["validation"] * ((len(used) + PERIOD // 2) // PERIOD)
        splits[PERIOD - 1 :: PERIOD] = ["test"] * (len(used) // PERIOD)
    elif len(used) > 1:
        splits[-1] = "test"
        splits[len(used) // 2] = "validation"  # of two blocks, the second: there is no test then
    return [_Stretch(*block, split) for block, split in zip(used, splits, strict=True)]


def _grouped(stretches: Sequence[_Stretch]) -> Iterator[list[_Stretch]]:
    # Consecutive stretches, as many as fit into a region.
    group: list[_Stretch] = []
    size = 0
    for stretch in stretches:
        length = stretch.stop - stretch.start
        if group and size + length > REGION:
            yield group
            group, size = [], 0
        group.append(stretch)
        size += length
    if group:
        yield group
