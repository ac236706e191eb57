"""The language-modelling task: any text, as bytes or through a tokenizer of `transformers`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from whatwhere.lab.data.base import Batch, Device, Split, Task
from whatwhere.lab.data.packing import Packing, pack
from whatwhere.lab.data.sources import (
    Corpus,
    Document,
    as_paths,
    evenly_spaced,
    read_corpus,
    split_by_file,
    split_by_position,
)
from whatwhere.lab.data.tokens import Tokens, load_stream, load_tokenizer


class TextData(BaseModel):
    """Settings of the text task; the default is Python source as bytes, found on every machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["text"] = "text"
    paths: tuple[str, ...] = Field(
        default=(),
        description="UTF-8 files, folders or glob patterns; none means the source of the running "
        "Python's own standard library",
    )
    tokenizer: str = Field(
        default="bytes",
        min_length=1,
        description="bytes, or a transformers tokenizer by name or folder",
    )
    length: int = Field(default=128, ge=2, description="training sequence length, in tokens")
    split: Literal["file", "position"] = Field(
        default="file",
        description="file: whole files are validation, chosen by their content; "
        "position: the last part of each file is",
    )
    validation_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="share of files, or of each file, kept for validation"
    )
    documents: Literal["concatenate", "pack"] = Field(
        default="concatenate",
        description="concatenate: windows of one long stream; pack: whole documents in each "
        "sequence, which do not see one another",
    )
    max_bytes: int | None = Field(default=None, ge=1, description="read this many bytes at most")

    @field_validator("paths", mode="before")
    @classmethod
    def _accept_one_path(cls, value: Any) -> Any:
        return as_paths(value)


class TextTask(Task):
    """Windows of text for next-token prediction.

    Training and validation text never overlap: they are different files (no two with the same
    content) or different parts of each file, cut before they are tokenised. One lone file with
    `split="file"` is split by position, with a warning. The text is read into memory; the tokens
    of tokenizers other than bytes are then memory-mapped from the cache.

    Args:
        data: Settings.
        cache_dir: Where token streams are kept, `~/.cache/whatwhere` by default; bytes need none.
        validation: Files, folders or patterns of validation text; all of `data` then is training
            text.

    Raises:
        ValueError: No text where `paths` say, a named file that is empty or binary, a tokenizer
            that cannot be loaded, a document that is both training and validation text, or less
            text than one window in a split.
    """

    splits = ("validation",)

    def __init__(
        self, data: TextData, cache_dir: Path | None = None, validation: Sequence[str] = ()
    ) -> None:
        self.data = data
        self.length = data.length
        self.tokenizer = load_tokenizer(data.tokenizer)
        self.vocab_size = self.tokenizer.vocab_size
        corpus = read_corpus(data.paths, data.max_bytes)
        self._split = data.split
        divided = (
            _held_apart(corpus, read_corpus(validation, data.max_bytes))
            if validation
            else self._divide(corpus)
        )
        self._about = {
            "source": corpus.source,
            "files": len(corpus.documents),
            "bytes": sum(len(document.text) for document in corpus.documents),
            "skipped_files": corpus.skipped,
            "validation_files": [document.name for document in divided[1]][:20],
        }
        self._streams = {
            name: load_stream(documents, self.tokenizer, cache_dir)
            for name, documents in zip(("train", "validation"), divided, strict=True)
        }
        for name, stream in self._streams.items():
            if len(stream.tokens) < self.length:
                raise ValueError(
                    f"paths: {corpus.source} gives {len(stream.tokens)} {name} tokens, fewer than "
                    f"one window of length={self.length}; give more text, a shorter length or "
                    "another validation_fraction"
                )

    def _divide(self, corpus: Corpus) -> tuple[list[Document], list[Document]]:
        if self._split == "file" and len(corpus.documents) == 1:
            name = corpus.documents[0].name
            warnings.warn(
                f"split='file' with the one file {name!r}: its last part is validation instead "
                "(split='position')",
                stacklevel=3,
            )
            self._split = "position"
        divide = split_by_file if self._split == "file" else split_by_position
        return divide(corpus.documents, self.data.validation_fraction)

    @property
    def train_tokens(self) -> Tokens:
        """The training stream, `(N,)` unsigned integers, possibly memory-mapped."""
        return self._streams["train"].tokens

    @property
    def validation_tokens(self) -> Tokens:
        """The validation stream, `(N,)` unsigned integers, possibly memory-mapped."""
        return self._streams["validation"].tokens

    @property
    def tokenizer_name(self) -> str:
        """`"bytes"`, or name or folder of a tokenizer of `transformers`."""
        return self.tokenizer.name

    def train_batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        device: Device = "cpu",
        rows: range | None = None,
    ) -> Batch:
        """Return random windows (or packed rows), drawn with replacement.

        Row `i` starts at `r_i mod count`, where `r_i` is the `i`-th raw 64-bit output of numpy's
        Philox generator with key (seed, step) and `count` the number of possible starts. Raw
        outputs, unlike numpy's distributions, stay the same from version to version.
        """
        rows = self.check_train(seed, step, batch_size, rows)
        if self.data.documents == "pack":
            chosen = drawn(seed, step, batch_size, len(self._packings["train"]))
            return self._packed("train", chosen[rows.start : rows.stop], device)
        count = len(self.train_tokens) - self.length + 1
        starts = drawn(seed, step, batch_size, count)[rows.start : rows.stop]
        return _plain(_take(self.train_tokens, starts, self.length), device)

    def evaluation_batches(
        self, split: Split, batch_size: int, limit: int | None = None, device: Device = "cpu"
    ) -> Iterator[Batch]:
        """Yield the whole split in windows end to end (or packed rows), each once.

        With a limit the windows are spaced evenly over the split. A remainder shorter than a
        window is left out. See `Task.evaluation_batches`.
        """
        self.check_evaluation(split, batch_size, limit)
        if self.data.documents == "pack":
            rows = len(self._packings[split])
            count = rows if limit is None else min(limit, rows)
            chosen = evenly_spaced(rows - 1, count)
            groups = np.split(chosen, range(batch_size, count, batch_size))
            return (self._packed(split, group, device) for group in groups)
        fit = len(self.validation_tokens) // self.length
        windows = self.windows(self.length, fit if limit is None else min(limit, fit))
        return (Batch(part, part.clone()) for part in windows.to(device).split(batch_size))

    def windows(
        self, length: int, count: int, split: Literal["train", "validation"] = "validation"
    ) -> Tensor:
        """Return `count` windows of a split, `(count, length)` int64; see `spaced_windows`."""
        return spaced_windows(self._streams[split].tokens, length, count)

    def describe(self) -> dict[str, Any]:
        """Return where the text came from, sizes, tokenizer and SHA-256 of both streams."""
        sizes = {f"{name}_tokens": len(s.tokens) for name, s in self._streams.items()}
        return {
            "task": "text",
            **self._about,
            "split": self._split,
            "validation_fraction": self.data.validation_fraction,
            "documents": self.data.documents,
            "length": self.length,
            "tokenizer": self.tokenizer.name,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "vocab_size": self.vocab_size,
            **sizes,
            **self._digests,
        }

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {
            f"{name}_sha256": hashlib.sha256(np.ascontiguousarray(stream.tokens).data).hexdigest()
            for name, stream in self._streams.items()
        }

    @cached_property
    def _packings(self) -> dict[str, Packing]:
        return {name: pack(s.bounds, self.length) for name, s in self._streams.items()}

    def _packed(self, split: str, rows: NDArray[np.int64], device: Device) -> Batch:
        arrays = self._packings[split].gather(
            self._streams[split].tokens, rows, self.tokenizer.padding
        )
        return Batch(*(torch.from_numpy(array).to(device) for array in arrays))


def read_tokens(
    paths: Sequence[str] = (),
    tokenizer: str = "bytes",
    max_bytes: int | None = None,
    cache_dir: Path | None = None,
) -> Tokens:
    """Return all text of some paths as one stream of tokens, unsplit, for evaluation alone.

    Args:
        paths: As `TextData.paths`.
        tokenizer: As `TextData.tokenizer`.
        max_bytes: As `TextData.max_bytes`.
        cache_dir: As for `TextTask`.

    Raises:
        ValueError: As for `TextTask`.
    """
    loaded = load_tokenizer(tokenizer)
    return load_stream(read_corpus(paths, max_bytes).documents, loaded, cache_dir).tokens


def spaced_windows(tokens: Tokens, length: int, count: int) -> Tensor:
    """Return windows spaced evenly from the start to the end of a stream.

    Window `i` starts at `floor(i (N - length) / (count - 1))` of `N` tokens, so windows do not
    overlap as long as `count * length <= N`.

    Args:
        tokens: `(N,)` integers.
        length: Tokens in a window.
        count: Number of windows; one alone starts at 0.

    Returns:
        `(count, length)` int64.

    Raises:
        ValueError: `length` or `count` below 1, or fewer tokens than one window.
    """
    check_windows(length, count)
    if len(tokens) < length:
        raise ValueError(
            f"length={length} is more than the {len(tokens)} tokens of text there are; "
            "give more text or a shorter length"
        )
    starts = evenly_spaced(len(tokens) - length, count)
    return torch.from_numpy(_take(tokens, starts, length))


def check_windows(length: int, count: int) -> None:
    """Raise a `ValueError` on a length or a count of windows below 1."""
    for name, value in (("length", length), ("count", count)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def drawn(seed: int, step: int, count: int, bound: int) -> NDArray[np.int64]:
    """Return `count` integers in `0 .. bound - 1`, a pure function of the arguments.

    The `i`-th is the `i`-th raw 64-bit output of numpy's Philox generator with key (seed, step),
    modulo `bound`.
    """
    generator = np.random.Philox(key=np.array([seed, step], dtype=np.uint64))
    raw = generator.random_raw(count)
    return (raw % np.uint64(bound)).astype(np.int64)


def _held_apart(train: Corpus, validation: Corpus) -> tuple[list[Document], list[Document]]:
    known = {document.digest for document in train.documents}
    for document in validation.documents:
        if document.digest in known:
            raise ValueError(f"validation: {document.name!r} is training text, too")
    return list(train.documents), list(validation.documents)


def _take(tokens: Tokens, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length)
    return windows[starts].astype(np.int64)


def _plain(tokens: NDArray[np.int64], device: Device) -> Batch:
    input_ids = torch.from_numpy(tokens).to(device)
    return Batch(input_ids, input_ids.clone())
