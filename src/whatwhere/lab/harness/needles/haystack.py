"""The text that needles are hidden in: sentences of books, their tokens counted once."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

_SENTENCE = re.compile(r"(?<=[.!?;])\s+|(?<=[.!?;][\"'”’)])\s+")
_AT_ONCE = 2048


class Haystack:
    """Sentences of a text with the number of tokens of each.

    Tokens of sentences are counted apart from one another, each with the space before it: what
    they have in the text, for tokenizers that split at spaces first. Counts serve to choose how
    much text is taken; how many tokens a prompt has is counted on the whole prompt.

    Args:
        text: Of books.
        tokenizer: Of `transformers`.
        enough: Tokens after which no more is read.

    Attributes:
        sentences: In order.
        before: Tokens before each sentence; one more than there are sentences.
        text: All of them.
    """

    def __init__(self, text: str, tokenizer: Any, enough: int) -> None:
        flat = " ".join(text.split())
        found = [part for part in _SENTENCE.split(flat) if part]
        self.sentences: list[str] = []
        counts: list[int] = []
        total = 0
        for start in range(0, len(found), _AT_ONCE):
            group = found[start : start + _AT_ONCE]
            new = count_all([f" {sentence}" for sentence in group], tokenizer)
            self.sentences += group
            counts += new
            total += sum(new)
            if total >= enough:
                break
        self.before = [0, *accumulate(counts)]
        self.text = " ".join(self.sentences)

    @property
    def tokens(self) -> int:
        """Tokens of all sentences."""
        return self.before[-1]

    def last_start(self, tokens: int) -> int:
        """The last sentence that has so many tokens from its beginning on.

        Raises:
            ValueError: If the whole text has fewer.
        """
        if tokens > self.tokens:
            raise ValueError(f"text: it has {self.tokens:,} tokens, {tokens:,} are needed")
        return bisect_right(self.before, self.tokens - tokens) - 1

    def take(self, start: int, tokens: int) -> list[str]:
        """Whole sentences from `start` on with at most so many tokens, then words of the next."""
        end = bisect_right(self.before, self.before[start] + tokens) - 1
        taken = self.sentences[start:end]
        if end < len(self.sentences):
            room = tokens - (self.before[end] - self.before[start])
            words = self.sentences[end].split(" ")
            share = room / max(1, self.before[end + 1] - self.before[end])
            cut = int(share * len(words))
            if cut:
                taken.append(" ".join(words[:cut]))
        return taken

    def depths(self, start: int, count: int) -> list[float]:
        """Share of the tokens of `count` sentences before each of them, and 1 at the end."""
        end = min(start + count, len(self.sentences))
        first, total = self.before[start], self.before[end] - self.before[start]
        return [(self.before[i] - first) / max(1, total) for i in range(start, end + 1)]

    def words(self) -> list[str]:
        """Different words of four to ten small letters, sorted."""
        return sorted(set(re.findall(r"\b[a-z]{4,10}\b", self.text)))


def count_all(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Tokens of each text, without special ones."""
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return [len(ids) for ids in encoded["input_ids"]]


def count(text: str, tokenizer: Any) -> int:
    """Tokens of a prompt as the harness encodes it, special ones included."""
    return len(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])
