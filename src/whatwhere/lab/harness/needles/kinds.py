"""What is hidden and what is asked, by kind.

Every kind draws the facts of an item first; the text around them comes later.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

HEADER = "Numbers are hidden in this text. Keep them in mind."
VARIABLES_HEADER = "Variables are set in this text. Keep their values in mind."
KEYS, HOPS, CHOICES = 4, 4, 10
"""Needles of the kinds with several, assignments of a chain after the first, options offered."""


@dataclass(frozen=True)
class Riddle:
    """An item without the text around it.

    Attributes:
        header: Before the text.
        needles: Sentences to hide, in this order.
        asked: Indices of the needles that hold the answer.
        question: After the text.
        prefix: Beginning of the answer, which the model continues.
        outputs: The answers.
        options: Answers to choose among, `outputs[0]` one of them; none for several answers.
        drawn: Names and numbers that the text around must not have.
    """

    header: str
    needles: tuple[str, ...]
    asked: tuple[int, ...]
    question: str
    prefix: str
    outputs: tuple[str, ...]
    options: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()


def single(rng: random.Random) -> Riddle:
    """One number, asked for by its name."""
    return _one_of(rng, 1)


def multikey(rng: random.Random) -> Riddle:
    """One number among several, asked for by its name."""
    return _one_of(rng, KEYS)


def multivalue(rng: random.Random) -> Riddle:
    """Several numbers of one name."""
    (name,), values = names(rng, 1), numbers(rng, KEYS)
    needles = tuple(_fact(name, value) for value in values)
    question = f"Question: Which {KEYS} numbers does {name} have?"
    prefix = f"Answer: The numbers of {name} are"
    return Riddle(
        HEADER,
        needles,
        tuple(range(KEYS)),
        question,
        prefix,
        outputs=tuple(values),
        drawn=(name, *values),
    )


def multiquery(rng: random.Random) -> Riddle:
    """The numbers of several names."""
    keys, values = names(rng, KEYS), numbers(rng, KEYS)
    needles = [_fact(key, value) for key, value in zip(keys, values, strict=True)]
    order = rng.sample(range(KEYS), KEYS)
    listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
    return Riddle(
        HEADER,
        tuple(needles[index] for index in order),
        tuple(range(KEYS)),
        f"Question: Which numbers do {listed} have?",
        f"Answer: The numbers of {listed} are",
        outputs=tuple(values),
        drawn=(*keys, *values),
    )


def tracking(rng: random.Random) -> Riddle:
    """A chain of variables, each set to the one before: all that have the first one's value."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    chain: list[str] = []
    while len(chain) <= HOPS:
        drawn = "".join(rng.choices(letters, k=5))
        if drawn not in chain:
            chain.append(drawn)
    value = str(rng.randrange(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in chain[:-1])]
    needles = tuple(f"VAR {n} = {source}." for n, source in zip(chain, sources, strict=True))
    question = f"Question: Which {len(chain)} variables have the value {value}?"
    prefix = f"Answer: The variables with the value {value} are"
    return Riddle(
        VARIABLES_HEADER,
        needles,
        tuple(range(len(chain))),
        question,
        prefix,
        outputs=tuple(chain),
        drawn=(value, *chain),
    )


HIDDEN: dict[str, Callable[[random.Random], Riddle]] = {
    "single": single,
    "multikey": multikey,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "tracking": tracking,
}
"""Kinds that hide sentences in a text."""

KINDS = (*HIDDEN, "counting")
"""All kinds; `counting` has a list of words in place of a text."""


def unseen(kind: str, draw: random.Random, text: str) -> Riddle:
    """A riddle of a kind none of whose names and numbers the text has."""
    while True:
        riddle = HIDDEN[kind](draw)
        if not any(word in text for word in riddle.drawn):
            return riddle


def names(rng: random.Random, count: int) -> list[str]:
    """Different made-up names that no book has, such as Vokamer."""
    found: list[str] = []
    while len(found) < count:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        name = ("".join(syllables) + rng.choice("klmnrx")).capitalize()
        if name not in found:
            found.append(name)
    return found


def numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _one_of(rng: random.Random, count: int) -> Riddle:
    keys, values = names(rng, count), numbers(rng, CHOICES)
    asked = rng.randrange(count)
    needles = tuple(_fact(key, value) for key, value in zip(keys, values, strict=False))
    options = rng.sample(values, CHOICES)
    question = f"Question: Which number does {keys[asked]} have?"
    prefix = f"Answer: The number of {keys[asked]} is"
    return Riddle(
        HEADER,
        needles,
        (asked,),
        question,
        prefix,
        outputs=(values[asked],),
        options=tuple(options),
        drawn=(*keys, *values),
    )


def _fact(name: str, value: str) -> str:
    return f"The number of {name} is {value}."
