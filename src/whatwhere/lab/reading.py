"""The text that the loss at each length is measured on."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from torch import Tensor

from whatwhere.lab.data import (
    Split,
    Task,
    TextTask,
    TokensData,
    TokensTask,
    read_tokens,
    spaced_windows,
)
from whatwhere.lab.data.catalogue import has_own, takes_tokenizer
from whatwhere.lab.data.prepared import open_tokens
from whatwhere.lab.recipes.schema import EvaluationSettings

READING = "reading.json"
"""Record of a run's text."""


class Reading(ABC):
    """Text to be cut into windows of any length."""

    @abstractmethod
    def windows(self, length: int, count: int) -> Tensor:
        """Return windows spaced evenly over the text, `(count, length)` int64.

        Raises:
            ValueError: If there is less text than one window.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return a record of the text."""


class _OfTask(Reading):
    # The split of a task that no model is trained on.

    def __init__(self, task: TextTask | TokensTask) -> None:
        self.task = task
        # Papers report on a test split; what is at hand while training is validation.
        self.split: Split = "test" if "test" in task.splits else "validation"

    def windows(self, length: int, count: int) -> Tensor:
        if isinstance(self.task, TextTask):
            return self.task.windows(length, count)
        return self.task.windows(length, count, self.split)

    def describe(self) -> dict[str, Any]:
        return {"split": self.split, **self.task.describe()}


class _OfFiles(Reading):
    # All text of some files.

    def __init__(self, paths: tuple[str, ...], tokenizer: str) -> None:
        self.paths, self.tokenizer = paths, tokenizer
        self.tokens = read_tokens(paths, tokenizer)

    def windows(self, length: int, count: int) -> Tensor:
        return spaced_windows(self.tokens, length, count)

    def describe(self) -> dict[str, Any]:
        return {
            "source": ", ".join(self.paths),
            "tokenizer": self.tokenizer,
            "tokens": len(self.tokens),
            "sha256": hashlib.sha256(np.ascontiguousarray(self.tokens).data).hexdigest(),
        }


def reading_of(settings: EvaluationSettings, task: Task) -> Reading | None:
    """The text to measure losses on: files or a data set of their own, or what the task keeps.

    Args:
        settings: Whose `paths` or `dataset` may name another text than that of the task.
        task: Its tokenizer is used.

    Returns:
        `None` for a task of one length, which has no text.

    Raises:
        ValueError: If there is no such text, or the task has none.
    """
    if not isinstance(task, TextTask | TokensTask):
        if settings.dataset or settings.paths:
            raise ValueError("evaluation.paths: this task is not one of texts")
        return None
    if not settings.dataset and not settings.paths:
        return _OfTask(task)
    if not settings.dataset:
        if isinstance(task, TokensTask) and not takes_tokenizer(task.data.dataset):
            raise ValueError(
                f"evaluation.paths: the task is {task.data.dataset}, which is no text: name "
                f"--evaluation.dataset {task.data.dataset}, too"
            )
        return _OfFiles(settings.paths, task.tokenizer_name)
    data = TokensData(
        dataset=settings.dataset,
        paths=settings.paths,
        # Sets that are no text have a tokenizer of their own.
        tokenizer=task.tokenizer_name if takes_tokenizer(settings.dataset) else None,
        layout="stream",
        # Nothing is trained on it, and training splits are large.
        only="test" if has_own(settings.dataset, "test") else None,
    )
    other = open_tokens(data)
    if other.vocab_size != task.vocab_size:
        raise ValueError(
            f"evaluation.dataset: {settings.dataset} has a vocabulary of {other.vocab_size}, the "
            f"task one of {task.vocab_size}"
        )
    return _OfTask(other)
