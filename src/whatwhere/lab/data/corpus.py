"""What every data set is: raw files, and how they become documents of tokens."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Layout = Literal["stream", "pieces"]
"""How training sequences are cut: windows of one long stream, or within one document each."""

CorpusSplit = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Item:
    """A unit of work and of resumption: what one worker turns into documents at once.

    Attributes:
        key: Unique and stable below the source, such as `"chr1.fasta:chr1:0"`.
        payload: What `Corpus.documents` needs to find it; picklable.
    """

    key: str
    payload: Any = None


@dataclass(frozen=True)
class TokenDocument:
    """The tokens of a document, the separator that ends it included if its data set has one.

    Attributes:
        split: `"train"`, `"validation"` or `"test"`.
        tokens: `(N,)` unsigned integers.
        name: For the record.
    """

    split: CorpusSplit
    tokens: NDArray[np.unsignedinteger]
    name: str


class Corpus(ABC):
    """A data set: where its raw files are, and how they become documents of tokens.

    Corpora are picklable, since each worker of a preparation gets one.

    Attributes:
        name: As in `whatwhere data prepare NAME`.
        licence: What its makers say of it.
        homepage: Where it comes from.
        layout: How training sequences are cut unless told otherwise.
        tokenizer_name: Of its tokenizer.
        vocab_size: Above every id.
        separator: Id that ends each document, or `None`.
        padding: Id to fill up sequences with.
        only: The one split that is prepared, `None` for all.
    """

    only: CorpusSplit | None = None
    name: str
    licence: str
    homepage: str
    layout: Layout
    tokenizer_name: str
    vocab_size: int
    separator: int | None
    padding: int

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Yield the parts of the source in a fixed order.

        Raises:
            ValueError: The source is missing or damaged; one line that names the file.
        """

    @abstractmethod
    def documents(self, item: Item) -> Iterator[TokenDocument]:
        """Yield the documents of a part in a fixed order, none of them without a token.

        Raises:
            ValueError: The part is damaged; one line that names the file.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return a record of the source, and of what was chosen where the papers leave it open."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hexadecimal digest that changes whenever a document's tokens or split could.

        Digests of the raw files (or the revision of a set on the hub), tokenizer and options.
        """

    @property
    def tokenizer_fingerprint(self) -> str:
        """A hexadecimal digest that changes whenever ids could mean something else."""
        parts = (self.tokenizer_name, self.vocab_size, self.separator, self.padding)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def leave_out(self, reason: str) -> None:
        """Count something that `documents` leaves out, such as an `"empty document"`."""
        self.__dict__.setdefault("_left_out", Counter())[reason] += 1

    def take_left_out(self) -> dict[str, int]:
        """Return what was left out since the last call, and forget it."""
        return dict(self.__dict__.pop("_left_out", {}))

    def save_tokenizer(self, folder: Path) -> None:  # noqa: B027 - some have no files
        """Write files from which `transformers` or `tokenizers` makes the tokenizer again."""

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Named ranges of ids, first and last: `"pitch"` is what transposition shifts."""
        return {}
