"""Needles as items of the retrieval measurement."""

from __future__ import annotations

import random
from typing import Any

import pytest
from harness_cases import tokenizer

from whatwhere.lab.diagnose.needles import needle_items
from whatwhere.lab.harness.byte_tokenizer import byte_tokenizer

WORDS = random.Random(0).choices(["tree", "house", "winter", "was", "the", "old", "ran"], k=9000)
TEXT = ". ".join(" ".join(WORDS[i : i + 9]).capitalize() for i in range(0, 9000, 9))


@pytest.mark.parametrize("kind", ["single", "multikey"])
@pytest.mark.parametrize("cut", ["bytes", "pairs"])
def test_prompts_and_answers_are_the_whole(kind: str, cut: str) -> None:
    tokens: Any = byte_tokenizer() if cut == "bytes" else tokenizer()
    lengths, depths = [1024, 2048], [0.0, 0.5, 1.0]
    items = needle_items(TEXT, tokens, lengths, depths, items=2, kind=kind)
    assert [(i.length, i.depth) for i in items[::2]] == [(n, d) for n in lengths for d in depths]
    for item in items:
        whole = tokens.decode(item.prompt + item.answer)
        assert 0.9 * item.length < item.tokens <= item.length
        said = tokens.decode(item.answer).strip()
        assert said.isdigit() and len(said) == 7
        name = whole.rpartition("The number of ")[2].split()[0]
        fact = f"The number of {name} is {said}."
        before = whole.index(fact) / len(whole)
        assert whole.count(said) == 2 and whole.endswith(said)
        if kind == "single":
            # The question and the header take their share of the text.
            assert abs(before - item.depth) < 0.25


def test_an_item_depends_on_its_own_place_alone() -> None:
    tokens = byte_tokenizer()
    both = needle_items(TEXT, tokens, [1024], [0.0, 1.0], items=2)
    assert needle_items(TEXT, tokens, [1024], [1.0], items=1) == [both[2]]
    assert needle_items(TEXT, tokens, [1024], [1.0], items=1, seed=1) != [both[2]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": [64]}, "tokens are too few"),
        ({"lengths": [10**6]}, "tokens, .* are needed"),
        ({"lengths": [0]}, "lengths=0"),
        ({"depths": [-1]}, "expected numbers from 0 to 1"),
        ({"kind": "tracking"}, "kind='tracking': expected one of single, multikey"),
        ({"items": 0}, "items=0"),
    ],
)
def test_bad_input_is_one_clear_line(given: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"lengths": [1024], "depths": [0.5]}
    with pytest.raises(ValueError, match=message):
        needle_items(TEXT, byte_tokenizer(), **usual | given)
