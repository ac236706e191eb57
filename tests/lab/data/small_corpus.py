"""A corpus without a source, whose documents follow from their numbers; for workers, too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from whatwhere.lab.data.corpus import Corpus, CorpusSplit, Item, TokenDocument
from whatwhere.lab.data.prepare import PARTS


class Numbers(Corpus):
    """Documents of random length; every fifth is validation, every seventh test.

    Args:
        items: How many.
        pause: Seconds that an item takes.
        broken: Number of an item that cannot be read.
        ranges: Of ids.
    """

    name = "text"  # a name that settings know
    licence = "none"
    homepage = "nowhere"
    tokenizer_name = "numbers"
    separator = 0
    padding = 0

    def __init__(
        self,
        items: int = 12,
        pause: float = 0.0,
        broken: int | None = None,
        *,
        layout: Any = "stream",
        vocab_size: int = 300,
        longest: int = 60,
        pitches: tuple[int, int] | None = None,
    ) -> None:
        self.count, self.pause, self.broken = items, pause, broken
        self.layout, self.vocab_size, self.longest = layout, vocab_size, longest
        self.pitches = pitches
        self.read: list[str] = []

    def items(self) -> Iterator[Item]:
        return (Item(f"item {i}", i) for i in range(self.count))

    def documents(self, item: Item) -> Iterator[TokenDocument]:
        self.read.append(item.key)
        time.sleep(self.pause)
        if item.payload == self.broken:
            raise ValueError(f"{item.key} is damaged")
        for number in range(item.payload % 4 * 3 + 1):
            yield self.document(item.payload, number)
        self.leave_out("empty documents")

    def document(self, item: int, number: int) -> TokenDocument:
        draw = np.random.default_rng([item, number])
        size = draw.integers(1, self.longest)
        body = draw.integers(1, self.vocab_size, size, dtype=np.uint32)
        which = item + number
        split: CorpusSplit = (
            "validation" if which % 5 == 0 else "test" if which % 7 == 0 else "train"
        )
        return TokenDocument(split, np.append(body, np.uint32(0)), f"{item}.{number}")

    def describe(self) -> dict[str, Any]:
        return {"source": "numbers", "count": self.count}

    def fingerprint(self) -> str:
        return f"{self.count:064x}"

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        return {"pitch": self.pitches} if self.pitches else {}


def expected(corpus: Numbers, split: str) -> list[Any]:
    """The documents of a split in order."""
    found = (d for item in corpus.items() for d in Numbers.documents(corpus, item))
    return [document.tokens for document in found if document.split == split]


def records(folder: Path) -> int:
    """How many items of an unfinished preparation are done."""
    return len(list((folder / PARTS).glob("0*.json")))


def contents(folder: Path) -> dict[str, bytes]:
    """Every array of a folder."""
    return {file.name: file.read_bytes() for file in folder.glob("*.npy")}
