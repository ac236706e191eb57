"""Retrieval by depth and length: whether a model finds what stands far back in its prompt."""

from __future__ import annotations

import inspect
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from whatwhere.analysis.in_distribution import check_lengths
from whatwhere.analysis.positions import table_of
from whatwhere.encodings.base import check_whole

COLUMNS = ("length", "depth", "items", "accuracy", "token_accuracy", "loss")
TRIES = 100
"""Draws of a key until one is found that the text around does not have."""


@dataclass(frozen=True)
class Item:
    """A prompt that hides what its answer asks for.

    Attributes:
        prompt: Token ids.
        answer: Token ids of the one right continuation.
        length: The length that it stands for, of prompt and answer.
        depth: Where the answer is hidden, 0 at the beginning and 1 at the end.

    Raises:
        ValueError: If prompt or answer is empty, or the depth outside [0, 1].
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    length: int
    depth: float

    def __post_init__(self) -> None:
        if not self.prompt or not self.answer:
            raise ValueError("an item needs at least one token of prompt and of answer")
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth}: expected 0 to 1")

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Answered:
    """What a model made of an item.

    Attributes:
        hits: For each place of the answer, whether the likeliest token is the answer's.
        loss: Of the answer, nats per token.
    """

    hits: list[bool]
    loss: float


@torch.no_grad()
def retrieval(
    model: nn.Module,
    items: Sequence[Item],
    *,
    tokens_per_batch: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Share of items that a causal language model answers rightly, by length and depth.

    An item is right if greedy decoding from its prompt writes all tokens of the answer. That takes
    one forward pass over prompt and answer: greedy decoding is right exactly if at each place of
    the answer the likeliest token after *the answer so far* is the answer's, since up to the
    first mistake what was decoded is the answer so far. Tokens after a first mistake count in
    ``token_accuracy`` as if it had not been made.

    Items of the same number of tokens share a batch; nothing is padded. Logits are computed for
    the places of answers alone where the model's ``forward`` takes ``logits_to_keep``.

    Args:
        model: Any causal language model that takes ``input_ids`` and returns ``logits``.
        items: What to ask; `copy_items` makes some.
        tokens_per_batch: Tokens of a forward pass, at least one item.
        progress: Called with the items done and all of them.

    Returns:
        A row for each length and depth: ``length``, ``depth``, ``items``, ``accuracy``,
        ``token_accuracy`` (both in [0, 1]), ``loss`` of the answer (nats per token).

    Raises:
        ValueError: If there are no items, a token is outside the vocabulary, an item is longer
            than the model's learned table, or the model's logits are NaN.
    """
    check_whole("tokens_per_batch", tokens_per_batch)
    _check_items(model, items)
    was_training = model.training
    model.eval()
    right: dict[tuple[int, float], list[Answered]] = defaultdict(list)
    done = 0
    try:
        for batch in _batches(items, tokens_per_batch):
            for item, answered in zip(batch, _answer(model, batch), strict=True):
                right[item.length, item.depth].append(answered)
            done += len(batch)
            if progress is not None:
                progress(done, len(items))
    finally:
        model.train(was_training)
    rows = []
    for (length, depth), found in sorted(right.items()):
        whole = sum(all(one.hits) for one in found) / len(found)
        single = sum(sum(one.hits) / len(one.hits) for one in found) / len(found)
        loss = sum(one.loss for one in found) / len(found)
        rows.append((length, depth, len(found), whole, single, loss))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def copy_items(
    tokens: Sequence[int] | Tensor,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    items: int = 16,
    key: int = 8,
    value: int = 8,
    natural: bool = False,
    seed: int = 0,
) -> list[Item]:
    """Items that ask to copy: a key and a value in a text, the key again, and then the value.

    For models too small to answer questions: no instruction has to be understood, and any
    tokenizer will do. Key and value are drawn token by token from the text's own
    distribution, or, with ``natural``, a run of the text itself is repeated. Neither is said
    again anywhere else in the prompt, which is a window of the text around them. What a model
    gets right without the copy is `copy_chance` for drawn values; for natural ones, a model's
    own guess, it has to be measured with `without_copy`.

    Args:
        tokens: ``(N,)`` ids of a text, more than the longest length.
        lengths: Tokens of prompt and answer.
        depths: Where the copy stands, from 0 (at the beginning) to 1 (right before the key is
            said again).
        items: Of each length and depth.
        key: Tokens of the key.
        value: Tokens of the value.
        natural: Whether key and value are a run of the text.
        seed: Of all that is drawn; an item depends on it, its length, depth and number alone.

    Raises:
        ValueError: If a length has no room for a key twice and a value twice, the text is too
            short, a depth lies outside [0, 1], or the text repeats itself so much that no key
            occurs once.
    """
    text = _as_list(tokens)
    wanted = check_lengths(lengths)
    for name, count in (("items", items), ("key", key), ("value", value)):
        check_whole(name, count)
    if not list(depths) or any(not 0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths={depths!r}: expected numbers from 0 to 1")
    least = 2 * (key + value)
    if min(wanted) < least:
        raise ValueError(
            f"lengths: {min(wanted)} has no room, a key and a value twice are {least}"
        )
    if len(text) < max(wanted):
        raise ValueError(f"tokens: there are {len(text):,}, the longest length is {max(wanted):,}")
    return [
        _copy(
            random.Random(f"{seed} {length} {depth} {i}"), text, length, depth, key, value, natural
        )
        for length in wanted
        for depth in depths
        for i in range(items)
    ]


def without_copy(items: Sequence[Item], key: int = 8, value: int = 8) -> list[Item]:
    """The same items of `copy_items`, the copy replaced by the text that follows it.

    What a model still gets right it has guessed: the control to its accuracy.

    Args:
        items: Made by `copy_items`.
        key: As there.
        value: As there.

    Raises:
        ValueError: If an item has no copy of that key and value.
    """
    made = []
    for item in items:
        size = key + value
        text, again = item.prompt[:-key], item.prompt[-key:]
        start = _find(text, (*again, *item.answer))
        if start is None:
            raise ValueError("items: one has no copy, were they made with this key and value?")
        rest = text[:start] + text[start + size :]
        filled = (rest * (1 + size // max(1, len(rest))))[:size]
        made.append(Item((*filled, *rest, *again), item.answer, item.length, item.depth))
    return made


def copy_chance(tokens: Sequence[int] | Tensor, value: int = 8) -> tuple[float, float]:
    """What guessing gets of `copy_items` with drawn values: of tokens, and of whole answers.

    The best guess is the text's most frequent token each time, with its share ``p``: ``p`` and
    ``p^value``.

    Args:
        tokens: As for `copy_items`.
        value: Tokens of the value.

    Raises:
        ValueError: If there are no tokens, or ``value`` is no positive integer.
    """
    text = _as_list(tokens)
    share = Counter(text).most_common(1)[0][1] / len(text)
    return share, share ** check_whole("value", value)


def _copy(
    draw: random.Random,
    text: list[int],
    length: int,
    depth: float,
    key: int,
    value: int,
    natural: bool,
) -> Item:
    size = key + value
    room = length - size - key - value
    for _ in range(TRIES):
        start = draw.randrange(len(text) - length + 1)
        around = text[start : start + room]
        if natural:
            at = draw.randrange(len(text) - size + 1)
            drawn = text[at : at + size]
        else:
            drawn = draw.choices(text, k=size)
        place = round(depth * room)
        prompt = (*around[:place], *drawn, *around[place:], *drawn[:key])
        # Found once before it is said again, and not across the ends of what was put together.
        if _occurrences(prompt, tuple(drawn[:key])) == 2:
            return Item(prompt, tuple(drawn[key:]), length, depth)
    raise ValueError(f"tokens: no key of {key} tokens was found that the text has only once")


def _find(text: tuple[int, ...], part: tuple[int, ...]) -> int | None:
    size = len(part)
    return next((i for i in range(len(text) - size + 1) if text[i : i + size] == part), None)


def _occurrences(text: tuple[int, ...], part: tuple[int, ...]) -> int:
    size = len(part)
    return sum(
        text[i] == part[0] and text[i : i + size] == part for i in range(len(text) - size + 1)
    )


def _as_list(tokens: Sequence[int] | Tensor) -> list[int]:
    if isinstance(tokens, Tensor):
        if tokens.ndim != 1 or tokens.is_floating_point():
            raise ValueError(
                f"tokens has shape {tuple(tokens.shape)} and dtype {tokens.dtype}: expected (N,) "
                "integers"
            )
        tokens = cast("list[int]", tokens.tolist())
    if not len(tokens):
        raise ValueError("tokens is empty")
    return [int(token) for token in tokens]


def _check_items(model: nn.Module, items: Sequence[Item]) -> None:
    if not items:
        raise ValueError("items is empty: expected at least one")
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    for item in items:
        least, most = min(item.prompt + item.answer), max(item.prompt + item.answer)
        if least < 0 or (size is not None and most >= size):
            raise ValueError(
                f"items: tokens {least} to {most} do not fit a vocabulary of {size}: another "
                "tokenizer's?"
            )
    table, longest = table_of(config), max(item.tokens for item in items)
    if table is not None and longest - 1 > table:
        raise ValueError(
            f"items: one has {longest} tokens, beyond the learned table of {table} positions"
        )


def _batches(items: Sequence[Item], tokens: int) -> Iterator[list[Item]]:
    """Items of the same numbers of tokens, the longest first: what does not fit fails at once."""
    groups: dict[tuple[int, int], list[Item]] = defaultdict(list)
    for item in items:
        groups[item.tokens, len(item.answer)].append(item)
    for (length, _), group in sorted(groups.items(), reverse=True):
        size = max(1, tokens // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _answer(model: nn.Module, batch: list[Item]) -> list[Answered]:
    count = len(batch[0].answer)
    embedding: Any = cast(Any, model).get_input_embeddings()
    device = embedding.weight.device
    ids = torch.tensor([item.prompt + item.answer[:-1] for item in batch], device=device)
    takes = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {"logits_to_keep": count} if "logits_to_keep" in takes else {}
    more |= {"use_cache": False} if "use_cache" in takes else {}
    logits = model(input_ids=ids, **more).logits[:, -count:]
    if logits.isnan().any():
        raise ValueError(f"the model's logits are NaN at {ids.shape[1]} tokens")
    answers = torch.tensor([item.answer for item in batch], device=logits.device)
    hits = (logits.argmax(dim=-1) == answers).tolist()
    said = logits.double().log_softmax(dim=-1).gather(-1, answers[..., None])[..., 0]
    losses = (-said.mean(dim=-1)).tolist()
    return [Answered(one, loss) for one, loss in zip(hits, losses, strict=True)]
