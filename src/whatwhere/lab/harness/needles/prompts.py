"""Prompts of an exact length: text is taken until no further word fits."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from whatwhere.lab.harness.needles.haystack import Haystack, count
from whatwhere.lab.harness.needles.kinds import Riddle

MARGIN = 4
"""Tokens below the length that are not worth another try; a try can miss by a word."""
TRIES = 8
COMMON, LISTED = 3, 6
"""Words to find in a list, and how often each stands in it; others stand there once."""
OFTEN, SELDOM = 30, 3
"""The same for long lists, as in RULER: so often, others so often."""


class TooShortError(ValueError):
    """A length leaves no room for a kind's needles and question.

    Attributes:
        least: A length that would do, about.
    """

    def __init__(self, length: int, least: int) -> None:
        super().__init__(f"{length} tokens are too few: it takes about {least}")
        self.least = least


@dataclass(frozen=True)
class Prompt:
    """A prompt without its answer.

    Attributes:
        text: All but the beginning of the answer.
        prefix: Beginning of the answer.
        tokens: Of both, joined by a space, special tokens included.
        depths: Share of the text before each needle that is asked for.
    """

    text: str
    prefix: str
    tokens: int
    depths: tuple[float, ...]


@dataclass(frozen=True)
class Listing:
    """A prompt with a list of words, and those of them that stand there most often."""

    prompt: Prompt
    common: tuple[str, ...]


_LIST = Riddle(
    header="Words are listed here, some of them more often than others.",
    needles=(),
    asked=(),
    question=f"Question: Which {COMMON} words are listed most often?",
    prefix=f"Answer: The {COMMON} words listed most often are",
    outputs=(),
)


def hide(
    riddle: Riddle, haystack: Haystack, tokenizer: Any, room: int, depth: float, rng: random.Random
) -> Prompt:
    """Hide a riddle's needles in as much of the haystack as fits.

    Needle `j` of `n` goes to the sentence boundary nearest to depth `(j + depth) / n`, a riddle
    with one to `depth` itself.

    Args:
        riddle: The needles and the question.
        haystack: The text.
        tokenizer: Of `transformers`.
        room: Tokens that the prompt may have.
        depth: In [0, 1].
        rng: Draws where in the haystack the text begins.

    Raises:
        TooShortError: If less than a quarter of the room is left for the text.
        ValueError: If the haystack is too short.
    """

    def build(tokens: int) -> Prompt:
        sentences = haystack.take(start, tokens)
        places = haystack.depths(start, len(sentences))
        wanted = [(j + depth) / len(riddle.needles) for j in range(len(riddle.needles))]
        at = [_nearest(places, place) for place in wanted]
        text = " ".join(_interleave(sentences, riddle.needles, at))
        return _prompt(riddle, text, tokenizer, [places[at[index]] for index in riddle.asked])

    fixed = _prompt(riddle, " ".join(riddle.needles), tokenizer, []).tokens
    if room - fixed < room // 4:
        raise TooShortError(room, fixed * 4 // 3 + 1)
    start = rng.randrange(haystack.last_start(room - fixed + room // 16) + 1)
    return _fill(build, room, room - fixed)


def listing(words: Sequence[str], tokenizer: Any, room: int, long: bool, seed: str) -> Listing:
    """As many numbered words as fit, a few of them more often than the others: which ones?

    Args:
        words: To draw from.
        tokenizer: Of `transformers`.
        room: Tokens that the prompt may have.
        long: Whether words stand there as often as in RULER's long lists.
        seed: Of the draw.

    Raises:
        TooShortError: If not even twice as many other words fit as are asked for.
        ValueError: If there are too few words.
    """
    often, seldom = (OFTEN, SELDOM) if long else (LISTED, 1)
    order = random.Random(seed).sample(words, len(words))
    common, others = order[:COMMON], order[COMMON:]

    def build(size: int) -> Prompt:
        drawn = common * often + (others[: -(-size // seldom)] * seldom)[:size]
        random.Random(f"{seed} {size}").shuffle(drawn)
        text = " ".join(f"{number}. {word}" for number, word in enumerate(drawn, 1))
        return _prompt(_LIST, text, tokenizer, [])

    least, most = 2 * COMMON, len(others) * seldom
    if most < least:
        raise ValueError(f"text: it has {len(words):,} different words, too few for a list")
    shortest = build(least)
    if shortest.tokens > room:
        raise TooShortError(room, shortest.tokens)
    size, made = _largest(build, shortest, least, most, room)
    if size == most and room - made.tokens > room // 50:
        raise ValueError(f"text: it has {len(words):,} different words, too few for a list")
    return Listing(made, tuple(common))


def _prompt(riddle: Riddle, text: str, tokenizer: Any, depths: Sequence[float]) -> Prompt:
    whole = f"{riddle.header}\n\n{text}\n\n{riddle.question}"
    tokens = count(f"{whole} {riddle.prefix}", tokenizer)
    return Prompt(whole, riddle.prefix, tokens, tuple(round(depth, 4) for depth in depths))


def _fill(build: Callable[[int], Prompt], room: int, guess: int) -> Prompt:
    """The longest prompt found that fits, by correcting how much text is taken."""
    best: Prompt | None = None
    tokens, least_over = guess, guess + room
    for _ in range(TRIES):
        made = build(tokens)
        missing = room - made.tokens
        if missing >= 0 and (best is None or made.tokens > best.tokens):
            best = made
        if 0 <= missing <= max(MARGIN, room // 2048):
            break
        if missing < 0:
            least_over = min(least_over, tokens)
        # A step onto what was too much already would be made in vain.
        tokens = min(tokens + missing, least_over - 1)
    if best is None:
        raise AssertionError("text is taken by the word, so that less of it fits")
    return best


def _largest(
    build: Callable[[int], Prompt], made: Prompt, size: int, most: int, room: int
) -> tuple[int, Prompt]:
    """The largest list found that fits: by tokens an entry, then entry by entry."""
    slope = made.tokens / size
    for _ in range(TRIES):
        target = min(most, max(1, size + int((room - made.tokens) / slope)))
        if target == size:
            break
        new = build(target)
        slope = max(1.0, (new.tokens - made.tokens) / (target - size))
        size, made = target, new
    while made.tokens > room:
        size -= 1
        made = build(size)
    return size, made


def _nearest(places: Sequence[float], wanted: float) -> int:
    index = bisect_left(places, wanted)
    near = [i for i in (index - 1, index) if 0 <= i < len(places)]
    return min(near, key=lambda i: abs(places[i] - wanted))


def _interleave(sentences: Sequence[str], needles: Sequence[str], at: Sequence[int]) -> list[str]:
    parts: list[str] = []
    left = list(zip(at, needles, strict=True))
    for index in range(len(sentences) + 1):
        while left and left[0][0] == index:
            parts.append(left.pop(0)[1])
        if index < len(sentences):
            parts.append(sentences[index])
    return parts
