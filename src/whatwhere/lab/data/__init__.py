"""Tasks: where the tokens of training and evaluation come from.

A task is chosen by a typed setting (`TextData`, `TokensData`, `IndirectIndexingData`) and made by
`make_task`.
"""

from __future__ import annotations

from pathlib import Path

from whatwhere.lab.data.base import IGNORED, Batch, Split, Task
from whatwhere.lab.data.indirect_indexing import (
    CharacterTokenizer,
    IndirectIndexingData,
    IndirectIndexingTask,
)
from whatwhere.lab.data.prepared import TokensData, TokensTask, open_tokens
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


def make_task(
    data: TextData | TokensData | IndirectIndexingData, cache_dir: Path | None = None
) -> Task:
    """Return the task that settings ask for.

    Args:
        data: Settings; their type decides.
        cache_dir: Folder for tokens, the user's cache folder by default.

    Raises:
        ValueError: The data is missing or unusable, as `TextTask` and `open_tokens` say.
        RunError: Preparing `TokensData` failed for a reason outside the program.
    """
    match data:
        case TextData():
            return TextTask(data, cache_dir)
        case TokensData():
            return open_tokens(data, cache_dir)
        case IndirectIndexingData():
            return IndirectIndexingTask(data)
