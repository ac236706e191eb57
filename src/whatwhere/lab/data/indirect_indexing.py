"""Indirect indexing: find a character in a string, step away from it, say what is there.

The task of "PoPE: Polar Coordinate Position Embedding" (arXiv 2509.10534): a source string of 20
to 40 letters drawn from A-Z a-z without replacement, one character of it, a shift in
[-15, +15] and the character at that offset: `NZTUIGWkXFrhCJDzscat,N,+4,I`.

What the paper leaves open is decided so: the spaces of its printed example are not tokens (it
lists letters, digits, `,`, `+` and `-` alone); the length of the string is uniform, then the
source character, then the shift among those that stay inside the string; a shift of 0 is written
`+0`; sequences are padded on the right to one fixed length, where a causal model's targets never
see the padding.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from whatwhere.lab.data import counter
from whatwhere.lab.data.base import IGNORED, Batch, Device, Split, Task

LETTERS = string.ascii_uppercase + string.ascii_lowercase
_STREAMS = {"train": 0, "validation": 1, "test": 2, "order": 3}
# Rows made at once on a CPU: larger temporaries leave the cache and are slower by far.
_CPU_CHUNK = 1024


class IndirectIndexingData(BaseModel):
    """Settings of the indirect-indexing task; the defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["indirect-indexing"] = "indirect-indexing"
    min_length: int = Field(default=20, ge=2, description="shortest source string, in letters")
    max_length: int = Field(default=40, ge=2, description="longest source string, in letters")
    max_shift: int = Field(default=15, ge=1, description="largest shift to either side")
    alphabet_size: int = Field(
        default=52, ge=2, le=len(LETTERS), description="letters in use: the first of A-Z a-z"
    )
    train_examples: int = Field(default=1_000_000, ge=1, description="training examples")
    validation_examples: int = Field(default=10_000, ge=1, description="validation examples")
    test_examples: int = Field(default=10_000, ge=1, description="test examples")
    data_seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of the examples themselves"
    )

    @model_validator(mode="after")
    def _check(self) -> IndirectIndexingData:
        if not self.min_length <= self.max_length <= self.alphabet_size:
            raise ValueError(
                "min_length <= max_length <= alphabet_size is needed (letters do not repeat), "
                f"got {self.min_length}, {self.max_length}, {self.alphabet_size}"
            )
        if self.max_shift >= self.max_length:
            raise ValueError(
                f"max_shift must be below max_length={self.max_length}, got {self.max_shift}"
            )
        return self


class CharacterTokenizer:
    """The 65 characters of the task as ids 1 to 65, and padding as id 0."""

    characters: ClassVar[str] = LETTERS + string.digits + ",+-"
    padding: ClassVar[int] = 0
    vocab_size: ClassVar[int] = 1 + len(characters)
    _ids: ClassVar[dict[str, int]] = {c: i for i, c in enumerate(characters, start=1)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            ValueError: A character outside the vocabulary.
        """
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            raise ValueError(f"text may hold letters, digits, ',', '+' and '-', got {unknown}")
        return [self._ids[c] for c in text]

    def decode(self, ids: Tensor | list[int]) -> str:
        """Return the text of a one-dimensional sequence of ids, without its padding."""
        values = ids.tolist() if isinstance(ids, Tensor) else ids
        return "".join(self.characters[i - 1] for i in values if i != self.padding)


class IndirectIndexingTask(Task):
    """Generates the examples as they are asked for; nothing is stored.

    Example `i` of a split is a pure function of (data_seed, split, i), whatever the batch size
    or device. Splits are different streams of random numbers; that two examples of the paper's
    sizes are equal has a probability below 1e-5, so no check is made.
    """

    splits = ("validation", "test")
    accuracy = True

    def __init__(self, data: IndirectIndexingData) -> None:
        self.data = data
        self.tokenizer = CharacterTokenizer()
        self.vocab_size = self.tokenizer.vocab_size
        self._suffix = 6 + len(str(data.max_shift))  # ,X,+12,Y
        self.length = data.max_length + self._suffix
        self._sizes = {
            "train": data.train_examples,
            "validation": data.validation_examples,
            "test": data.test_examples,
        }

    def train_batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        device: Device = "cpu",
        rows: range | None = None,
    ) -> Batch:
        """Return the batch of a step: each epoch goes once through all training examples.

        The order of an epoch is a permutation drawn from (seed, epoch); step `n` takes places
        `n * batch_size` and on of the epochs laid end to end.
        """
        rows = self.check_train(seed, step, batch_size, rows)
        size = self.data.train_examples
        places = range(step * batch_size + rows.start, step * batch_size + rows.stop)
        parts = []
        for epoch in range(places.start // size, (places.stop - 1) // size + 1):
            first = max(places.start, epoch * size) - epoch * size
            last = min(places.stop, (epoch + 1) * size) - epoch * size
            order = counter.permutation(size, seed, _STREAMS["order"], epoch)
            parts.append(order[first:last])
        return self.examples("train", torch.cat(parts).to(device))

    def evaluation_batches(
        self, split: Split, batch_size: int, limit: int | None = None, device: Device = "cpu"
    ) -> Iterator[Batch]:
        """Yield the examples of a split in order; see `Task.evaluation_batches`."""
        self.check_evaluation(split, batch_size, limit)
        count = self._sizes[split]
        indices = torch.arange(count if limit is None else min(limit, count), device=device)
        return (self.examples(split, part) for part in indices.split(batch_size))

    def examples(self, split: str, indices: Tensor) -> Batch:
        """Return examples of a split by number, made on the device of `indices`.

        Args:
            split: "train", "validation" or "test".
            indices: `(N,)` int64, each in `0 .. size of the split - 1` (not checked, as that
                would make the host wait for the device).

        Returns:
            `(N, length)` tokens padded on the right; the one label of a row is its target's.

        Raises:
            ValueError: Unknown split, or indices of another dtype or number of axes.
        """
        if split not in self._sizes:
            raise ValueError(f"split must be one of {', '.join(self._sizes)}, got {split!r}")
        if indices.dtype != torch.int64 or indices.ndim != 1:
            raise ValueError(
                f"indices must be (N,) int64, got {tuple(indices.shape)} {indices.dtype}"
            )
        stream = counter.key(self.data.data_seed, _STREAMS[split])
        chunk = _CPU_CHUNK if indices.device.type == "cpu" else max(1, len(indices))
        made = [self._generate(stream, part) for part in indices.split(chunk)]
        tokens, labels = (torch.cat(parts) for parts in zip(*made, strict=True))
        return Batch(tokens, labels)

    def examples_as_text(self, split: str, indices: Tensor) -> list[str]:
        """Return examples as the texts they encode, such as `NZTUIGWkXFrhCJDzscat,N,+4,I`.

        Arguments and errors are those of `examples`.
        """
        return [self.tokenizer.decode(row) for row in self.examples(split, indices).input_ids]

    def describe(self) -> dict[str, Any]:
        """Return settings, sizes and the SHA-256 of the validation tokens (one byte each)."""
        digest = hashlib.sha256()
        for batch in self.evaluation_batches("validation", 65536):
            digest.update(batch.input_ids.to(torch.uint8).numpy().tobytes())
        return {
            **self.data.model_dump(),
            "tokenizer": "characters",
            "vocab_size": self.vocab_size,
            "length": self.length,
            "validation_sha256": digest.hexdigest(),
        }

    def _generate(self, stream: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        letters, count, place, shift = self._draw(stream, indices)
        source = letters.gather(1, place)
        target = letters.gather(1, place + shift)
        suffix, target_place = self._write_suffix(source, shift, target)
        columns = torch.arange(self.data.max_length, device=indices.device)
        tokens = letters.new_zeros(len(indices), self.length)  # zero is the padding
        tokens[:, : self.data.max_length] = letters * (columns < count)
        tokens.scatter_(1, count + torch.arange(self._suffix, device=indices.device), suffix)
        labels = torch.full_like(tokens, IGNORED)
        labels.scatter_(1, count + target_place, target)
        return tokens, labels

    def _draw(self, stream: int, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Letters (N, max_length) as ids; string length, source place and shift, each (N, 1).
        data = self.data
        bits = counter.draws(counter.keys(stream, indices), data.alphabet_size + 3)
        # Sorting random keys shuffles the alphabet. Each key carries its letter in its lowest
        # six bits, so that even equal keys sort alike on every device.
        letter = torch.arange(data.alphabet_size, device=indices.device)
        shuffled = ((bits[:, 3:] & ~63) | letter).sort(dim=1).values & 63
        spread = data.max_length - data.min_length + 1
        count = data.min_length + counter.below(bits[:, 0:1], spread)
        place = counter.below(bits[:, 1:2], count)
        lowest = (-place).clamp(min=-data.max_shift)
        highest = (count - 1 - place).clamp(max=data.max_shift)
        shift = lowest + counter.below(bits[:, 2:3], highest - lowest + 1)
        return 1 + shuffled[:, : data.max_length], count, place, shift

    def _write_suffix(
        self, source: Tensor, shift: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Ids of ",X,+4,Y" and ",X,+12,Y" (N, suffix), and the target's place in them (N, 1).
        zero, comma, plus, minus = self.tokenizer.encode("0,+-")
        commas, padding = torch.full_like(source, comma), torch.zeros_like(source)
        sign = torch.where(shift < 0, minus, plus)
        size = shift.abs()
        ones = zero + size % 10
        short = [commas, source, commas, sign, ones, commas, target]
        if self.data.max_shift < 10:
            return torch.cat(short, dim=1), torch.full_like(source, 6)
        long = [*short[:4], zero + size // 10, *short[4:]]
        two_digits = size >= 10
        suffix = torch.where(two_digits, torch.cat(long, 1), torch.cat([*short, padding], 1))
        return suffix, 6 + two_digits.long()
