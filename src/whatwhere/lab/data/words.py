"""Tokens of a text word by word, each word encoded once: faster than the whole text at once.

A byte-level BPE first splits a text into words by a regular expression and never merges across
them, and most words of a text come again and again. `tokenizers` keeps the tokens of words, too,
but spends most of its time on where in the text each came from.

The tokens are exactly those of the whole text. Whatever could make them differ is left to
`tokenizers`: other kinds of tokenizers, parts of a text that name a special token, and parts with
characters on which two versions of Unicode, or two regular-expression engines, may disagree.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whatwhere.lab.data.extras import need

PART = 4096
"""Characters of a part, about."""

MOST_WORDS = 2**18
"""Words that are kept; then all are forgotten."""

# A word begins at a space between two letters, whatever comes before, in all expressions below.
_BOUNDARY = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")

# Of GPT-2 (its endings, words, numbers, signs and blanks); of GPT-4 and Llama 3, and of Qwen 2.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_4, QWEN_2 = (
    f"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_LETTERS}|{numbers}|{_REST}"
    for numbers in (r"\p{N}{1,3}", r"\p{N}")
)

# Scripts without blanks between words (from here on) have few words that come again.
_LAST = 0x2E80


class Words:
    """Encodes texts for one tokenizer.

    Args:
        backend: A `tokenizers.Tokenizer`.
        pattern: How it splits words, from `word_pattern`.
    """

    def __init__(self, backend: Any, pattern: str) -> None:
        regex = need("regex", "models")
        self._backend = backend
        self._split = regex.compile(pattern).findall
        self._known: dict[str, list[int]] = {}
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        literal = "|".join(re.escape(token) for token in added)
        self._leave = re.compile(f"[^{_plain_characters()}]" + (f"|{literal}" if added else ""))

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text, without special tokens around it."""
        return np.concatenate([self._encode(part) for part in cut(text)])

    def _encode(self, part: str) -> NDArray[np.uint32]:
        if self._leave.search(part):
            (found,) = self._backend.encode_batch_fast([part], add_special_tokens=False)
            return np.array(found.ids, dtype=np.uint32)
        words = self._split(part)
        known = self._known
        new = [word for word in dict.fromkeys(words) if word not in known]
        if new:
            if len(known) + len(new) > MOST_WORDS:
                known.clear()
                new = list(dict.fromkeys(words))
            made = self._backend.encode_batch_fast(new, add_special_tokens=False)
            known.update(zip(new, (found.ids for found in made), strict=True))
        ids = chain.from_iterable(map(known.__getitem__, words))
        return np.fromiter(ids, dtype=np.uint32)


def word_pattern(state: str) -> str | None:
    """The expression that a tokenizer splits words by; `None` if words may depend on one another.

    Args:
        state: The tokenizer as JSON, from `tokenizers.Tokenizer.to_str`.
    """
    content: dict[str, Any] = json.loads(state)
    model = content["model"]
    if content["normalizer"] or model["type"] != "BPE" or model.get("dropout"):
        return None
    # A token that is found in texts before they are split must not reach from part to part.
    added = [token["content"] for token in content["added_tokens"]]
    if any(re.search(r"\s|^[A-Za-z]|[A-Za-z]$", token) for token in added):
        return None
    match content["pre_tokenizer"]:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return GPT_2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"} as split,
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        } if pattern in (GPT_4, QWEN_2) and not split.get("invert", False):
            return str(pattern)
        case _:
            return None


def cut(text: str) -> Iterator[str]:
    """Yield parts of a text, in order, whose tokens together are those of the text."""
    start = 0
    while len(text) - start > 2 * PART:
        found = _BOUNDARY.search(text, start + PART)
        if not found:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


@cache
def _plain_characters() -> str:
    # Ranges for a class of a regular expression: what was a letter, number, sign or blank in
    # Unicode 3.2 and is so now. Of controls only blanks; no long s, which some engines take for s.
    def is_plain(code: int) -> bool:
        character = chr(code)
        kind = unicodedata.category(character)
        if kind[0] == "C" or character == "ſ":
            return character in "\t\n\r\v\f"
        return unicodedata.ucd_3_2_0.category(character)[0] == kind[0]

    plain = [is_plain(code) for code in range(_LAST)]
    starts = [i for i in range(_LAST) if plain[i] and not (i and plain[i - 1])]
    ends = [i for i in range(_LAST) if plain[i] and not (i + 1 < _LAST and plain[i + 1])]
    return "".join(
        f"\\U{first:08x}-\\U{last:08x}" for first, last in zip(starts, ends, strict=True)
    )
