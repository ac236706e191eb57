"""The task of a prepared data set: any data set by name, or a folder that was prepared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from whatwhere.lab.data import counter
from whatwhere.lab.data.base import IGNORED, Batch, Device, Split, Task
from whatwhere.lab.data.catalogue import check_name, make_corpus
from whatwhere.lab.data.corpus import CorpusSplit
from whatwhere.lab.data.pieces import Rows, TrainingRows, evaluation_rows, whole_windows
from whatwhere.lab.data.prepare import PARTS, prepare
from whatwhere.lab.data.shards import PreparedFolder, Stream, is_prepared
from whatwhere.lab.data.sources import as_paths, evenly_spaced
from whatwhere.lab.data.text import check_windows, drawn
from whatwhere.lab.data.tokens import default_cache_dir

Ints = NDArray[np.int64]

_TRANSPOSITION = 6  # a stream of random numbers, beside those of `pieces`


class TokensData(BaseModel):
    """Settings of the task of a data set by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["tokens"] = "tokens"
    dataset: str = Field(
        default="text", description="name of a data set, as `whatwhere data list` shows them"
    )
    paths: tuple[str, ...] = Field(
        default=(),
        description="its raw files or folders, or one folder made by `whatwhere data prepare`; "
        "none looks below $WHATWHERE_DATA and in the cache, then fetches it",
    )
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="of text: bytes, or a transformers tokenizer by name or folder; None is the "
        "data set's own",
    )
    length: int = Field(default=1024, ge=2, description="training sequence length, in tokens")
    layout: Literal["auto", "stream", "pieces"] = Field(
        default="auto",
        description="stream: windows of all documents end to end; pieces: each sequence within "
        "one document; auto is the data set's own",
    )
    transpose: int = Field(
        default=0,
        ge=0,
        description="semitones that training sequences of music are shifted by at most",
    )
    max_bytes: int | None = Field(
        default=None, ge=1, description="read this many bytes of text at most"
    )

    only: CorpusSplit | None = Field(
        default=None,
        description="prepare and read this split alone, of sets with splits of their own",
    )

    @field_validator("paths", mode="before")
    @classmethod
    def _accept_one_path(cls, value: Any) -> Any:
        return as_paths(value)

    @field_validator("dataset")
    @classmethod
    def _check_dataset(cls, value: str) -> str:
        check_name(value)
        return value


class TokensTask(Task):
    """Sequences of a prepared data set for next-token prediction; its tokens stay on disk.

    `stream` draws windows of the training documents laid end to end, with replacement, as
    `TextTask` does, and evaluates windows spread evenly. `pieces` goes once through all rows of
    `pieces.TrainingRows` in an epoch, filled up on the right, and evaluates each document in rows
    cut from its start. The first token of a row is not predicted.

    Transposition shifts the pitches of each training row by as many semitones, uniform in
    `-transpose .. transpose` and drawn from (seed, step, row), brought towards 0 until no pitch
    leaves its range. Other tokens stay.

    Args:
        data: Settings.
        folder: The data.

    Raises:
        ValueError: The folder holds another data set or tokens of another tokenizer, has no
            validation documents or too few tokens, or has no pitches to transpose.
    """

    def __init__(self, data: TokensData, folder: PreparedFolder) -> None:
        manifest = folder.manifest
        _check_same(data, folder)
        self.data, self.folder, self.length = data, folder, data.length
        self.tokenizer_name = manifest.tokenizer.name
        self.vocab_size = manifest.tokenizer.vocab_size
        self.layout = manifest.layout if data.layout == "auto" else data.layout
        self.splits: tuple[Split, ...] = tuple(
            split
            for split in get_args(Split)
            if split in manifest.splits and data.only in (None, split)
        )
        needed = (data.only,) if data.only else ("train", "validation")
        for name in needed:
            if name not in manifest.splits:
                raise ValueError(
                    f"{folder.path} has no {name} document: prepare it from more documents"
                )
        self._streams: dict[str, Stream] = {
            split: folder.stream(split) for split in manifest.splits if data.only in (None, split)
        }
        self._check_sizes()
        self._pitches = manifest.ranges.get("pitch")
        if data.transpose and self._pitches is None:
            raise ValueError(f"transpose={data.transpose}: {manifest.name} has no pitches")

    def train_batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        device: Device = "cpu",
        rows: range | None = None,
    ) -> Batch:
        """Return the batch of a step; see `Task.train_batch`.

        Raises:
            ValueError: With `only` another split, too.
        """
        if "train" not in self._streams:
            raise ValueError(f"only={self.data.only!r}: there is nothing to train on")
        rows = self.check_train(seed, step, batch_size, rows)
        stream = self._streams["train"]
        if self.layout == "stream":
            starts = drawn(seed, step, batch_size, len(stream) - self.length + 1)
            tokens = stream.take(starts[rows.start : rows.stop], self.length)
            real = np.ones(tokens.shape, dtype=bool)
        else:
            first = step * batch_size
            found = self._training_rows.rows(seed, first + rows.start, first + rows.stop)
            tokens, real = self._filled(stream, found, self.length)
        if self.data.transpose:
            key = counter.key(seed, _TRANSPOSITION, step)
            bits = counter.keys(key, torch.arange(rows.start, rows.stop))
            shifts = counter.below(bits, 2 * self.data.transpose + 1) - self.data.transpose
            assert self._pitches is not None
            tokens = transposed(tokens, shifts.numpy(), self._pitches)
        return _batch(tokens, real, device)

    def evaluation_batches(
        self, split: Split, batch_size: int, limit: int | None = None, device: Device = "cpu"
    ) -> Iterator[Batch]:
        """Yield a split: windows of its stream, or every document cut from its start.

        Windows, as many as fit, are spaced evenly without overlap: fewer tokens than a window are
        left out between them. With a limit rows of pieces are, too. Batches of pieces are as wide
        as their longest row. See `Task.evaluation_batches`.
        """
        self.check_evaluation(split, batch_size, limit)
        stream = self._streams[split]
        if self.layout == "stream":
            fit = len(stream) // self.length
            count = fit if limit is None else min(limit, fit)
            starts = evenly_spaced(len(stream) - self.length, count)
            rows = Rows(starts, np.full(count, self.length))
        else:
            rows = evaluation_rows(stream.bounds, self.length)
            if limit is not None and limit < len(rows):
                rows = rows[evenly_spaced(len(rows) - 1, limit)]
        groups = (rows[first : first + batch_size] for first in range(0, len(rows), batch_size))
        return (
            _batch(*self._filled(stream, group, int(group.sizes.max())), device)
            for group in groups
        )

    def windows(self, length: int, count: int, split: Split = "validation") -> Tensor:
        """Return windows of a split, spaced evenly: `(count, length)` int64.

        Of a stream, as `text.spaced_windows` does. Of pieces, at most `count` windows that lie
        within one document and do not overlap.

        Raises:
            ValueError: No such split, a length or count below 1, or too few tokens.
        """
        self.check_evaluation(split, 1, None)
        check_windows(length, count)
        stream = self._streams[split]
        if self.layout == "pieces":
            starts = whole_windows(stream.bounds, length, count)
        elif len(stream) < length:
            raise ValueError(
                f"length={length} is more than the {len(stream)} {split} tokens there are"
            )
        else:
            starts = evenly_spaced(len(stream) - length, count)
        return torch.from_numpy(stream.take(starts, length))

    def describe(self) -> dict[str, Any]:
        """Return what the data is, its sizes, its tokenizer and the SHA-256 of each split."""
        manifest = self.folder.manifest
        record: dict[str, Any] = {
            "task": "tokens",
            "dataset": manifest.name,
            "source": manifest.source,
            "licence": manifest.licence,
            "length": self.length,
            "layout": self.layout,
            "transpose": self.data.transpose,
            "tokenizer": manifest.tokenizer.name,
            "tokenizer_fingerprint": manifest.tokenizer.fingerprint,
            "vocab_size": self.vocab_size,
            "choices": manifest.choices,
            "left_out": manifest.left_out,
        }
        for name, split in manifest.splits.items():
            digests = "".join(shard.sha256 + shard.bounds_sha256 for shard in split.shards)
            record[f"{name}_documents"] = split.documents
            record[f"{name}_tokens"] = split.tokens
            record[f"{name}_sha256"] = hashlib.sha256(digests.encode()).hexdigest()
        return record

    @cached_property
    def _training_rows(self) -> TrainingRows:
        return TrainingRows(self._streams["train"].bounds, self.length)

    def _filled(self, stream: Stream, rows: Rows, width: int) -> tuple[Ints, NDArray[np.bool_]]:
        # Tokens of rows, padding behind them; and where they are tokens.
        tokens = np.full((len(rows), width), self.folder.manifest.tokenizer.padding, np.int64)
        for row, start, size in zip(tokens, rows.starts.tolist(), rows.sizes, strict=True):
            stream.read(start, row[:size])
        return tokens, np.arange(width) < rows.sizes[:, None]

    def _check_sizes(self) -> None:
        if self.layout == "pieces":
            if self.length < 4:
                raise ValueError(f"length must be at least 4 with pieces, got {self.length}")
            return
        for name, stream in self._streams.items():
            if len(stream) < self.length:
                raise ValueError(
                    f"{self.folder.path} has {len(stream)} {name} tokens, fewer than one window "
                    f"of length={self.length}; prepare more data or choose a shorter length"
                )


def open_tokens(data: TokensData, cache_dir: Path | None = None) -> TokensTask:
    """Return the task of settings; raw data is prepared first, into the cache.

    Args:
        data: Settings.
        cache_dir: `default_cache_dir()` by default. Prepared data is kept there by what its tokens
            depend on, so that it is never out of date.

    Raises:
        ValueError: As for `make_corpus`, `PreparedFolder` and `TokensTask`.
        RunError: As for `prepare`; another process that prepares the same data is waited for.
    """
    place = Path(data.paths[0]).expanduser() if len(data.paths) == 1 else None
    if place and is_prepared(place):
        if data.max_bytes is not None:
            raise ValueError(f"max_bytes: {place} is prepared, it is read as it is")
        return TokensTask(data, PreparedFolder(place))
    if place and (place / PARTS).is_dir():
        raise ValueError(f"{place} is not prepared to its end: run `whatwhere data prepare` again")
    cache = cache_dir or default_cache_dir()
    corpus = make_corpus(
        data.dataset,
        data.paths,
        tokenizer=data.tokenizer,
        max_bytes=data.max_bytes,
        only=data.only,
        cache_dir=cache,
    )
    folder = cache / "prepared" / f"{data.dataset}-{corpus.fingerprint()[:12]}"
    return TokensTask(data, prepare(corpus, folder, title=f"preparing {data.dataset}", wait=True))


def transposed(tokens: Ints, shifts: Ints, pitches: tuple[int, int]) -> Ints:
    """Shift the pitches of rows.

    Args:
        tokens: `(B, T)` ids.
        shifts: `(B,)` semitones.
        pitches: First and last id of the pitches, which follow one another in semitones.

    Returns:
        `(B, T)`: a row whose pitches would leave their range is shifted by less, as far as they
        go.
    """
    first, last = pitches
    pitched = (tokens >= first) & (tokens <= last)
    lowest = np.where(pitched, tokens, last).min(axis=1)
    highest = np.where(pitched, tokens, first).max(axis=1)
    allowed = np.clip(shifts, first - lowest, last - highest)
    return np.where(pitched, tokens + allowed[:, None], tokens)


def _check_same(data: TokensData, folder: PreparedFolder) -> None:
    manifest = folder.manifest
    if manifest.name != data.dataset:
        raise ValueError(
            f"dataset: {folder.path} holds {manifest.name!r}, but {data.dataset!r} is asked for"
        )
    if data.tokenizer not in (None, manifest.tokenizer.name):
        raise ValueError(
            f"tokenizer: {folder.path} holds tokens of {manifest.tokenizer.name!r}, but "
            f"{data.tokenizer!r} is asked for"
        )


def _batch(tokens: Ints, real: NDArray[np.bool_], device: Device) -> Batch:
    labels = np.where(real, tokens, IGNORED)
    return Batch(torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device))
