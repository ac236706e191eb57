"""Corpora whose documents are texts: tokens, splits and what is left out, wherever they lie."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from whatwhere.lab.data.corpus import Corpus, CorpusSplit, Item, TokenDocument
from whatwhere.lab.data.sources import Document, digest_number
from whatwhere.lab.data.tokens import TextTokenizer, load_tokenizer

VALIDATION_FRACTION = 0.1
"""Share of documents kept for validation where a data set has no split of its own."""

_BYTES_AT_ONCE = 2**20


@dataclass(frozen=True)
class Text:
    """A document before it is tokens.

    Attributes:
        name: For the record.
        text: Valid UTF-8.
        split: Where it belongs; `None` lets its digest decide.
    """

    name: str
    text: bytes
    split: CorpusSplit | None = None


class TextDocuments(Corpus):
    """A data set of texts, each with the tokenizer's end-of-sequence token after it.

    Args:
        tokenizer: `"bytes"`, or a tokenizer of `transformers` by name or folder.
        validation_fraction: Share of documents that are validation where nothing else says so: a
            document is, if its SHA-256, read as a number in [0, 1), is below. So equal texts are
            never in two splits.

    Raises:
        ValueError: The tokenizer cannot be loaded.
    """

    layout = "stream"

    def __init__(self, tokenizer: str, validation_fraction: float = VALIDATION_FRACTION) -> None:
        self._loaded: TextTokenizer | None = load_tokenizer(tokenizer)
        self.tokenizer_name = tokenizer
        self.validation_fraction = validation_fraction
        self.vocab_size = self._loaded.vocab_size
        self.separator = self._loaded.separator
        self.padding = self._loaded.padding

    @abstractmethod
    def texts(self, item: Item) -> Iterator[Text]:
        """Yield the texts of an item in a fixed order; blank ones are left out by `documents`.

        Raises:
            ValueError: The item is damaged; one line that names the file.
        """

    @abstractmethod
    def source_fingerprint(self) -> list[Any]:
        """What the texts and their splits follow from, as JSON; the tokenizer left out."""

    def documents(self, item: Item) -> Iterator[TokenDocument]:
        """Yield the tokens of each text of an item; see `Corpus.documents`."""
        group: list[Text] = []
        size = 0
        for text in self.texts(item):
            if not text.text.strip():
                self.leave_out("empty documents")
                continue
            group.append(text)
            size += len(text.text)
            if size >= _BYTES_AT_ONCE:
                yield from self._encode(group)
                group, size = [], 0
        yield from self._encode(group)

    def fingerprint(self) -> str:
        """See `Corpus.fingerprint`."""
        parts = [self.source_fingerprint(), self.validation_fraction, self.tokenizer_fingerprint]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer's files and the tokens that separate and fill up."""
        parts = (self.tokenizer.fingerprint, self.separator, self.padding)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer; each worker loads its own."""
        if self._loaded is None:
            self._loaded = load_tokenizer(self.tokenizer_name)
        return self._loaded

    def save_tokenizer(self, folder: Path) -> None:
        """See `Corpus.save_tokenizer`; bytes need no files."""
        self.tokenizer.save(folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def _encode(self, group: list[Text]) -> Iterator[TokenDocument]:
        digests = [hashlib.sha256(text.text).hexdigest() for text in group]
        documents = [
            Document(text.name, text.text, digest)
            for text, digest in zip(group, digests, strict=True)
        ]
        dtype = np.min_scalar_type(self.vocab_size - 1)
        ending = np.array([] if self.separator is None else [self.separator], dtype=dtype)
        encoded = self.tokenizer.encode(documents)
        for text, digest, ids in zip(group, digests, encoded, strict=True):
            tokens = np.concatenate([ids.astype(dtype, copy=False), ending])
            if not len(tokens):  # A tokenizer may drop all of a text.
                self.leave_out("documents without a token")
                continue
            yield TokenDocument(text.split or self._split(digest), tokens, text.name)

    def _split(self, digest: str) -> CorpusSplit:
        return "validation" if digest_number(digest) < self.validation_fraction else "train"
