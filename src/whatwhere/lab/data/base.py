"""What every task gives: batches that are a pure function of (seed, step, batch size)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

IGNORED = -100
"""Label of positions that count neither in the loss nor in the accuracy."""

Split = Literal["validation", "test"]
Device = str | torch.device


@dataclass(frozen=True)
class Batch:
    """Sequences and what is to be predicted of them.

    Attributes:
        input_ids: `(B, T)` int64 tokens.
        labels: `(B, T)` int64, aligned with `input_ids` (models shift them inside, as in
            `transformers`), -100 where nothing is to be predicted.
        segment_ids: `(B, T)` int64 or `None`. Positions of different segments do not see one
            another; documents count from 1, padding is 0.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor | None = None


class Task(ABC):
    """Training and evaluation data of one experiment.

    Attributes:
        vocab_size: Number of token ids.
        length: Length of a training sequence, in tokens.
        splits: The evaluation splits there are.
        accuracy: Whether the accuracy on labelled targets is a result of this task.
    """

    vocab_size: int
    length: int
    splits: tuple[Split, ...]
    accuracy: ClassVar[bool] = False

    @abstractmethod
    def train_batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        device: Device = "cpu",
        rows: range | None = None,
    ) -> Batch:
        """Return the training batch of a step, or some rows of it.

        A pure function of its arguments and the data: nothing is remembered from call to call,
        so that a resumed run, another encoding or another machine sees the same batches.

        Args:
            seed: Of the order.
            step: From 0.
            batch_size: Sequences in the whole batch, over all processes.
            device: Where the tensors go.
            rows: Of the whole batch, those to return, without the work of the others: a process
                asks for its own, so that their number changes nothing. `None` is all.

        Raises:
            ValueError: An argument out of its range.
        """

    @abstractmethod
    def evaluation_batches(
        self, split: Split, batch_size: int, limit: int | None = None, device: Device = "cpu"
    ) -> Iterator[Batch]:
        """Yield a split in a fixed order, the last batch possibly smaller.

        Args:
            split: One of `splits`.
            batch_size: Sequences in a batch.
            limit: At most this many sequences in all (not batches); `None` for all.
            device: Where the tensors go.

        Raises:
            ValueError: Unknown split, or a batch size or limit below 1.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return a record of the data: sources, sizes, tokenizer, SHA-256 of the tokens."""

    def check_train(
        self, seed: int, step: int, batch_size: int, rows: range | None = None
    ) -> range:
        """Return the rows that are asked for.

        Raises:
            ValueError: An argument that `train_batch` cannot take.
        """
        for name, value in (("seed", seed), ("step", step)):
            if not 0 <= value < 2**63:
                raise ValueError(f"{name} must be in 0 .. 2^63 - 1, got {value}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if rows is None:
            return range(batch_size)
        if rows.step != 1 or not 0 <= rows.start < rows.stop <= batch_size:
            raise ValueError(
                f"rows must be consecutive and among the {batch_size} of the batch, got {rows}"
            )
        return rows

    def check_evaluation(self, split: str, batch_size: int, limit: int | None) -> None:
        """Raise a `ValueError` on arguments that `evaluation_batches` cannot take."""
        if split not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)}, got {split!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 or None, got {limit}")
