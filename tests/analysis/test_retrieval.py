"""Retrieval: against greedy decoding, and models whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from torch import Tensor, nn

import whatwhere.models as wm
from whatwhere.analysis.retrieval import (
    COLUMNS,
    Item,
    copy_chance,
    copy_items,
    retrieval,
    without_copy,
)

TEXT = torch.randint(0, 40, (5000,), generator=torch.Generator().manual_seed(0))


class Copier(nn.Module):
    """Says what followed the last tokens the time before, if that is no further back than it sees.

    Where nothing was found it says 0.
    """

    def __init__(self, order: int = 6, sees: int = 10**9) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 1)
        self.order, self.sees = order, sees
        self.shapes: list[torch.Size] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor) -> Any:
        self.shapes.append(input_ids.shape)
        logits = torch.zeros(*input_ids.shape, 40)
        for row, ids in zip(logits, input_ids.tolist(), strict=True):
            for t in range(self.order - 1, len(ids)):
                row[t, self._next(ids[: t + 1])] = 5.0
        return SimpleNamespace(logits=logits)

    def _next(self, seen: Sequence[int]) -> int:
        tail = list(seen[-self.order :])
        for end in range(len(seen) - 1, max(self.order, len(seen) - self.sees) - 1, -1):
            if list(seen[end - self.order : end]) == tail:
                return seen[end]
        return 0


def tiny(**changes: Any) -> wm.WhatWhereForCausalLM:
    given = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
    return wm.WhatWhereForCausalLM(wm.WhatWhereConfig(**given | changes)).eval()


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_right_is_what_greedy_decoding_writes(kind: str) -> None:
    """Answers that the model itself decoded, some with one token changed."""
    if kind == "ours":
        model: Any = tiny()
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(
            vocab_size=40, num_attention_heads=2, initializer_range=0.3, **sizes
        )
        model = transformers.LlamaForCausalLM(config).eval()
    items, expected = [], []
    for i in range(24):
        prompt = TEXT[10 * i : 10 * i + 12 + i % 3]
        # Without a mask, generate() takes tokens that are the padding's for padding.
        given = {"attention_mask": torch.ones(1, len(prompt)), "pad_token_id": 0}
        written = model.generate(
            prompt[None], max_new_tokens=5, do_sample=False, eos_token_id=None, **given
        )[0, len(prompt) :].tolist()
        changed = i % 6
        if changed < 5:
            written[changed] = (written[changed] + 1) % 40
        items.append(Item(tuple(prompt.tolist()), tuple(written), i, 0.0))
        expected.append(changed == 5)
    table = retrieval(model, items).set_index("length")
    assert table["accuracy"].tolist() == expected
    assert (table.loc[expected, "token_accuracy"] == 1).all()
    wrong = [not one for one in expected]
    # What comes before the mistake is right; the last token's mistake spoils it alone.
    for i in table.index[wrong]:
        assert i % 6 / 5 <= table.loc[i, "token_accuracy"] < 1
    assert (table.loc[[i for i in range(24) if i % 6 == 4], "token_accuracy"] == 0.8).all()


def test_a_model_that_copies_finds_all() -> None:
    items = copy_items(TEXT, [64, 200], [0, 0.3, 1], items=5)
    table = retrieval(Copier(), items)
    assert list(table.columns) == list(COLUMNS) and len(table) == 6
    assert (table["items"] == 5).all() and (table[["accuracy", "token_accuracy"]] == 1).all(None)
    said = -math.log(math.exp(5) / (math.exp(5) + 39))
    assert table["loss"].tolist() == pytest.approx([said] * 6, rel=1e-6)
    lost = retrieval(Copier(), without_copy(items))
    assert (lost["accuracy"] == 0).all() and (lost["token_accuracy"] < 0.3).all()


def test_a_model_that_sees_a_hundred_tokens_finds_what_is_there() -> None:
    """By depth: the value stands ``(1 - depth) (length - 32) + 8 + 8`` tokens before the end."""
    depths = [0, 0.25, 0.5, 0.75, 1]
    for length in (64, 256, 512):
        table = retrieval(Copier(sees=100), copy_items(TEXT, [length], depths, items=3)).set_index(
            "depth"
        )
        for depth in depths:
            room = length - 32
            away = room - round(depth * room) + 8 + 8
            assert table.loc[depth, "accuracy"] == (away <= 100)


def test_items_are_as_long_and_as_deep_as_asked() -> None:
    lengths, depths, key, value = [40, 333], [0.0, 0.5, 0.9, 1.0], 7, 5
    text = TEXT.tolist()
    items = copy_items(text, lengths, depths, items=4, key=key, value=value)
    assert len(items) == 32
    for item in items:
        assert item.tokens == item.length and len(item.answer) == value
        asked, room = item.prompt[-key:], item.length - 2 * (key + value)
        at = round(item.depth * room)
        assert item.prompt[at : at + key + value] == (*asked, *item.answer)
        around = [*item.prompt[:at], *item.prompt[at + key + value : -key]]
        assert len(around) == room
        assert str(around)[1:-1] in str(text)
        starts = [i for i in range(len(item.prompt)) if item.prompt[i : i + key] == asked]
        assert starts == [at, len(item.prompt) - key]
        (other,) = without_copy([item], key, value)
        assert (other.answer, other.tokens) == (item.answer, item.tokens)
        assert other.prompt[-key:] == asked and asked not in [
            other.prompt[i : i + key] for i in range(len(other.prompt) - key)
        ]


def test_an_item_depends_on_its_own_place_alone() -> None:
    both = copy_items(TEXT, [64, 128], [0, 1], items=2)
    assert copy_items(TEXT, [128], [1], items=1) == [both[6]]
    assert copy_items(TEXT, [128], [1], items=1, seed=1) != [both[6]]
    assert len({item.prompt for item in both}) == 8


def test_natural_items_repeat_the_text() -> None:
    text = TEXT.tolist()
    for item in copy_items(TEXT, [64], [0.5], items=4, natural=True):
        asked = [*item.prompt[-8:], *item.answer]
        assert any(text[i : i + 16] == asked for i in range(len(text)))


def test_chance_is_what_the_best_guess_gets() -> None:
    text = [0] * 600 + [1] * 300 + [2] * 100
    torch.manual_seed(0)
    text = torch.tensor(text)[torch.randperm(1000)]
    token, whole = copy_chance(text, 3)
    assert (token, whole) == (0.6, pytest.approx(0.216))
    items = copy_items(text, [80], [0.5], items=400, key=16, value=3)
    guess = retrieval(Copier(order=10**6), items)  # finds nothing, and says 0
    # Three standard errors.
    assert guess["token_accuracy"][0] == pytest.approx(0.6, abs=3 * math.sqrt(0.24 / 1200))
    assert guess["accuracy"][0] == pytest.approx(0.216, abs=3 * math.sqrt(0.17 / 400))


def test_batches_hold_no_more_tokens_than_asked_and_change_nothing() -> None:
    items = copy_items(TEXT, [64, 100], [0, 1], items=5)
    model, done = Copier(), []
    tables = [
        retrieval(model, items, tokens_per_batch=size, progress=lambda *at: done.append(at))
        for size in (1, 250, 10**6)
    ]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    shapes = [tuple(shape) for shape in model.shapes]
    assert shapes[:20] == [(1, 99)] * 10 + [(1, 63)] * 10
    assert all(b * (n + 1) <= 250 for b, n in shapes[20:-2]) and shapes[-2:] == [
        (10, 99),
        (10, 63),
    ]
    assert done[:20] == [(i, 20) for i in range(1, 21)] and done[-1] == (20, 20)


def test_logits_of_answers_alone_are_computed() -> None:
    model = tiny()
    kept: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: kept.append(out.shape[1]))
    retrieval(model, copy_items(TEXT, [64], [0.5], items=2))
    assert kept == [8]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny(dropout=0.5).train()
    items = copy_items(TEXT, [64], [0.5], items=2)
    first, second = retrieval(model, items), retrieval(model, items)
    pd.testing.assert_frame_equal(first, second)  # no dropout
    assert model.training and all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="logits are NaN at 63 tokens"):
        retrieval(model, items)
    assert model.training


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lengths": []}, "lengths is empty"),
        ({"lengths": [31]}, "31 has no room.*are 32"),
        ({"lengths": [6000]}, "there are 5,000, the longest length is 6,000"),
        ({"depths": [1.5]}, "expected numbers from 0 to 1"),
        ({"depths": []}, "expected numbers from 0 to 1"),
        ({"items": 0}, "items=0"),
        ({"key": 0}, "key=0"),
        ({"tokens": TEXT.double()}, "dtype torch.float64: expected .* integers"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": torch.empty(0, dtype=torch.long)}, "tokens is empty"),
        ({"tokens": [7] * 100}, "no key of 8 tokens was found"),
    ],
)
def test_bad_items_are_one_clear_line(given: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"tokens": TEXT, "lengths": [64], "depths": [0.5]}
    with pytest.raises(ValueError, match=message) as raised:
        copy_items(**usual | given)
    assert "\n" not in str(raised.value)


def test_bad_questions_are_one_clear_line() -> None:
    items = copy_items(TEXT, [64], [0.5], items=1)
    for model, asked, message in (
        (tiny(), [], "items is empty"),
        (tiny(vocab_size=20), items, "do not fit a vocabulary of 20"),
        (tiny(position_encoding="learned", max_position_embeddings=62), items, "table of 62"),
    ):
        with pytest.raises(ValueError, match=message):
            retrieval(model, asked)
    retrieval(tiny(position_encoding="learned", max_position_embeddings=63), items)
    with pytest.raises(ValueError, match="depth=2"):
        Item((1,), (1,), 2, 2.0)
    with pytest.raises(ValueError, match="at least one token"):
        Item((1,), (), 1, 0.0)
    with pytest.raises(ValueError, match="has no copy"):
        without_copy([Item((1, 2, 3), (4,), 4, 0.0)], 1, 1)
