"""What needles are asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whatwhere.lab.harness.needles.kinds import KINDS

LENGTHS = tuple(2**power for power in range(8, 18))
"""256 to 131,072."""


@dataclass(frozen=True)
class NeedleSettings:
    """Needle tasks to make.

    Attributes:
        text: Files, folders or patterns of books.
        tokenizer: `bytes`, a run or model with its tokenizer, or a tokenizer's folder or hub name.
        output: Folder, new.
        lengths: Of prompt and answer together, in tokens.
        kinds: Some of `KINDS`.
        items: Prompts of each kind and length, their depths spread evenly.
        seed: Of all that is drawn.
        name: Beginning of the names of all tasks.
    """

    text: tuple[str, ...]
    tokenizer: str
    output: Path
    lengths: tuple[int, ...] = LENGTHS
    kinds: tuple[str, ...] = KINDS
    items: int = 50
    seed: int = 0
    name: str = "needles"

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: With the option, what came and what was expected.
        """
        if not self.text:
            raise ValueError("text: name files or folders of books")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {kind!r}")
        if not self.kinds or not self.lengths:
            raise ValueError("kinds and lengths: name at least one of each")
        if min(self.lengths) < 32:
            raise ValueError(f"lengths: expected at least 32, got {min(self.lengths)}")
        if self.items < 1:
            raise ValueError(f"items: expected at least 1, got {self.items}")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", self.name):
            raise ValueError(f"name: expected letters, digits, _ . -, got {self.name!r}")

    def identity(self, tokenizer: str, text: list[str]) -> dict[str, Any]:
        """What the prompts depend on.

        Args:
            tokenizer: Its digest.
            text: Digests of the documents.
        """
        return {
            "tokenizer": tokenizer,
            "text": text,
            "lengths": sorted(set(self.lengths)),
            "kinds": list(self.kinds),
            "items": self.items,
            "seed": self.seed,
            "name": self.name,
        }
