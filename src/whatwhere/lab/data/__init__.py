"""Tasks: where the tokens of training and evaluation come from.

A task is chosen by a typed setting (`TextData`, `IndirectIndexingData`) and made by `make_task`.
"""

from __future__ import annotations

from pathlib import Path

from whatwhere.lab.data.base import IGNORED, Batch, Split, Task
from whatwhere.lab.data.indirect_indexing import (
    CharacterTokenizer,
    IndirectIndexingData,
    IndirectIndexingTask,
)
from whatwhere.lab.data.prepared import TokensData, TokensTask
from whatwhere.lab.data.text import TextData, TextTask, read_tokens, spaced_windows

__all__ = [
    "IGNORED",
    "Batch",
    "CharacterTokenizer",
    "IndirectIndexingData",
    "IndirectIndexingTask",
    "Split",
    "Task",
    "TextData",
    "TextTask",
    "TokensData",
    "TokensTask",
    "make_task",
    "read_tokens",
    "spaced_windows",
]


def make_task(data: TextData | IndirectIndexingData, cache_dir: Path | None = None) -> Task:
    """Return the task that settings ask for.

    Args:
        data: Settings; their type decides.
        cache_dir: Folder for token streams, the user's cache folder by default.

    Raises:
        ValueError: The text is missing or unusable, as `TextTask` says.
    """
    match data:
        case TextData():
            return TextTask(data, cache_dir)
        case IndirectIndexingData():
            return IndirectIndexingTask(data)
