"""Needles in a text as items of `whatwhere.analysis.retrieval`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from whatwhere.analysis.in_distribution import check_lengths
from whatwhere.analysis.retrieval import Item
from whatwhere.encodings.base import check_whole
from whatwhere.lab.harness.needles.haystack import Haystack, count_all
from whatwhere.lab.harness.needles.kinds import Riddle, unseen
from whatwhere.lab.harness.needles.prompts import hide

KINDS = ("single", "multikey")
"""Kinds of `whatwhere.lab.harness.needles` that have one answer, at one depth."""
_VARIETY = 4


def needle_items(
    text: str,
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    items: int = 8,
    kind: str = "single",
    seed: int = 0,
) -> list[Item]:
    """A number hidden in a text under a made-up name, and the question which it is.

    Prompts are those of ``whatwhere needles``, so long that prompt and answer fit into the length;
    the answer's tokens are those that the whole has beyond what it shares with the prompt. No
    answer is in the text, and one of seven digits is hardly guessed.

    Args:
        text: Of books.
        tokenizer: Of `transformers`.
        lengths: Tokens of prompt and answer at most.
        depths: Where the number is hidden, from 0 to 1; of several (``"multikey"``) each has its
            share of the text, and the one that is asked for lies at this depth of its own.
        items: Of each length and depth.
        kind: ``"single"``, or ``"multikey"`` (one of four).
        seed: Of all that is drawn; an item depends on it, its length, depth and number alone.

    Raises:
        ValueError: If a length is too short for question and answer, the text too short for a
            length, or an argument is out of range.
    """
    wanted = check_lengths(lengths)
    check_whole("items", items)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    if not list(depths) or any(not 0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths={depths!r}: expected numbers from 0 to 1")
    haystack = Haystack(text, tokenizer, _VARIETY * max(wanted))
    made = []
    for length in wanted:
        for depth in depths:
            for index in range(items):
                draw = random.Random(f"{seed} {kind} {length} {depth} {index}")
                riddle = unseen(kind, draw, haystack.text)
                made.append(_item(riddle, haystack, tokenizer, length, depth, draw))
    return made


def _item(
    riddle: Riddle,
    haystack: Haystack,
    tokenizer: Any,
    length: int,
    depth: float,
    draw: random.Random,
) -> Item:
    said = f" {riddle.outputs[0]}"
    # A tokenizer may cut the answer otherwise where it stands than by itself.
    room = length - count_all([said], tokenizer)[0] - 1
    prompt = hide(riddle, haystack, tokenizer, room, depth, draw)
    before = f"{prompt.text} {prompt.prefix}"
    asked, whole = (_ids(tokenizer, part) for part in (before, before + said))
    shared = 0
    while shared < len(asked) and asked[shared] == whole[shared]:
        shared += 1
    return Item(tuple(whole[:shared]), tuple(whole[shared:]), length, depth)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    # What ends a text (some tokenizers add it) is no part of an answer.
    return ids[:-1] if ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else ids
