"""The indirect-indexing task against a parser that shares no code with the generator."""

import re
import string
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from pydantic import ValidationError

from whatwhere.lab.data import CharacterTokenizer, IndirectIndexingData, IndirectIndexingTask
from whatwhere.lab.data.base import IGNORED

LETTERS = string.ascii_uppercase + string.ascii_lowercase
EXAMPLE = re.compile(r"([A-Za-z]+),([A-Za-z]),([+-])(0|[1-9][0-9]?),([A-Za-z])")

FIXED = [
    "EoJYHzwARCkNdfMvKTIxuW,o,+10,N",
    "tHUqvSBkiRgfwNdXxuhlreTsZnKpAPjF,R,+9,h",
    "NgDneKyErHiUzGjOTxoaFcs,a,-1,o",
]


def parse(text: str) -> tuple[str, str, int, str]:
    """Source string, source character, shift and target of an example."""
    match = EXAMPLE.fullmatch(text)
    assert match, text
    source, character, sign, size, target = match.groups()
    assert (sign, size) != ("-", "0")
    return source, character, int(sign + size), target


def settings_of_the_task() -> st.SearchStrategy[IndirectIndexingData]:
    def build(numbers: list[int], shift: int, seed: int) -> IndirectIndexingData:
        low, high, alphabet = sorted(numbers)
        return IndirectIndexingData(
            min_length=low,
            max_length=high,
            alphabet_size=alphabet,
            max_shift=min(shift, high - 1),
            data_seed=seed,
        )

    numbers = st.lists(st.integers(2, 52), min_size=3, max_size=3)
    return st.builds(build, numbers, st.integers(1, 51), st.integers(0, 2**63 - 1))


@settings(max_examples=60, deadline=None)
@given(settings_of_the_task(), st.sampled_from(["train", "validation", "test"]))
def test_every_example_is_well_formed(data: IndirectIndexingData, split: str) -> None:
    task = IndirectIndexingTask(data)
    batch = task.examples(split, torch.arange(50))
    assert batch.input_ids.shape == batch.labels.shape == (50, task.length)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    for tokens, labels in zip(batch.input_ids, batch.labels, strict=True):
        text = task.tokenizer.decode(tokens)
        source, character, shift, target = parse(text)
        assert data.min_length <= len(source) <= data.max_length
        assert len(set(source)) == len(source)
        assert set(source) <= set(LETTERS[: data.alphabet_size])
        assert abs(shift) <= data.max_shift
        place = source.index(character) + shift
        assert 0 <= place < len(source)
        assert source[place] == target
        # Padding on the right alone; one label, at the target's own place, the last character.
        assert tokens[: len(text)].tolist() == task.tokenizer.encode(text)
        assert tokens[len(text) :].tolist() == [0] * (task.length - len(text))
        labelled = (labels != IGNORED).nonzero().flatten().tolist()
        assert labelled == [len(text) - 1]
        assert task.tokenizer.decode(labels[labelled]) == target


def test_defaults_are_the_papers() -> None:
    task = IndirectIndexingTask(IndirectIndexingData())
    assert task.length == len("x" * 40 + ",N,+15,I")
    assert task.vocab_size == 1 + 52 + 10 + 3
    assert (task.data.train_examples, task.data.validation_examples, task.data.test_examples) == (
        1_000_000,
        10_000,
        10_000,
    )
    assert task.accuracy


def chi_square(values: list[Any], expected: dict[Any, float]) -> float:
    total = len(values)
    assert set(values) <= expected.keys()
    return sum(
        (values.count(key) - total * share) ** 2 / (total * share)
        for key, share in expected.items()
    )


def test_distributions_are_uniform() -> None:
    """Bounds are the 1 - 1e-4 quantiles of chi-square, generous for one fixed seed."""
    task = IndirectIndexingTask(IndirectIndexingData())
    parsed = [parse(text) for text in task.examples_as_text("train", torch.arange(20_000))]
    lengths = [len(source) for source, *_ in parsed]
    assert chi_square(lengths, dict.fromkeys(range(20, 41), 1 / 21)) < 52.4
    # The first and the last letter of a source are uniform, and so is the target.
    letters = dict.fromkeys(LETTERS, 1 / 52)
    for place in (0, 19):
        assert chi_square([source[place] for source, *_ in parsed], letters) < 97.6
    assert chi_square([target for *_, target in parsed], letters) < 97.6
    thirty = [example for example in parsed if len(example[0]) == 30]
    places = [source.index(character) for source, character, *_ in thirty]
    assert chi_square(places, dict.fromkeys(range(30), 1 / 30)) < 66.2
    # Given place and length, the shift is uniform over those that stay inside: its rank is.
    middle = [shift for (s, c, shift, _) in parsed if 15 <= s.index(c) < len(s) - 15]
    assert len(middle) > 1000
    assert chi_square(middle, dict.fromkeys(range(-15, 16), 1 / 31)) < 67.6
    start = [shift for (s, c, shift, _) in parsed if s.index(c) == 2]
    assert chi_square(start, dict.fromkeys(range(-2, 16), 1 / 18)) < 47.6


def test_letter_order_is_uniform() -> None:
    task = IndirectIndexingTask(
        IndirectIndexingData(alphabet_size=3, min_length=3, max_length=3, max_shift=1)
    )
    sources = [text[:3] for text in task.examples_as_text("train", torch.arange(60_000))]
    orders = dict.fromkeys(("ABC", "ACB", "BAC", "BCA", "CAB", "CBA"), 1 / 6)
    assert chi_square(sources, orders) < 25.7


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(0, 999_999), min_size=1, max_size=40),
    st.sampled_from(["train", "validation", "test"]),
)
def test_example_depends_on_its_number_alone(seed: int, numbers: list[int], split: str) -> None:
    data = IndirectIndexingData(data_seed=seed)
    together = IndirectIndexingTask(data).examples(split, torch.tensor(numbers))
    for row, number in enumerate(numbers):
        alone = IndirectIndexingTask(data).examples(split, torch.tensor([number]))
        assert torch.equal(alone.input_ids[0], together.input_ids[row])
        assert torch.equal(alone.labels[0], together.labels[row])


def test_examples_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    task = IndirectIndexingTask(IndirectIndexingData())
    whole = task.examples("train", torch.arange(500))
    monkeypatch.setattr("whatwhere.lab.data.indirect_indexing._CPU_CHUNK", 7)
    assert torch.equal(task.examples("train", torch.arange(500)).input_ids, whole.input_ids)


def test_splits_and_seeds_share_no_example() -> None:
    seen: set[tuple[int, ...]] = set()
    count = 0
    for seed in (0, 1):
        task = IndirectIndexingTask(IndirectIndexingData(data_seed=seed))
        for split in ("train", "validation", "test"):
            tokens = task.examples(split, torch.arange(5000)).input_ids
            seen.update(map(tuple, tokens.tolist()))
            count += 5000
    assert len(seen) == count


def test_examples_stay_what_they_were() -> None:
    """Results are compared across versions, so the examples of a seed are a promise."""
    task = IndirectIndexingTask(IndirectIndexingData())
    assert task.examples_as_text("train", torch.tensor([0, 1, 999_999])) == FIXED


@pytest.mark.gpu
def test_devices_agree() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    task = IndirectIndexingTask(IndirectIndexingData())
    indices = torch.arange(100_000)
    there = task.examples("train", indices.cuda())
    here = task.examples("train", indices)
    assert there.input_ids.is_cuda
    assert torch.equal(there.input_ids.cpu(), here.input_ids)
    assert torch.equal(there.labels.cpu(), here.labels)
    step = task.train_batch(3, 7, 64, device="cuda")
    assert torch.equal(step.input_ids.cpu(), task.train_batch(3, 7, 64).input_ids)


def small(**changes: int) -> IndirectIndexingTask:
    sizes = {"train_examples": 10, "validation_examples": 11, "test_examples": 3, **changes}
    return IndirectIndexingTask(IndirectIndexingData.model_validate(sizes))


@given(st.integers(0, 50), st.integers(1, 25))
@settings(max_examples=40, deadline=None)
def test_an_epoch_takes_each_training_example_once(seed: int, batch_size: int) -> None:
    task = small()
    every = sorted(map(tuple, task.examples("train", torch.arange(10)).input_ids.tolist()))
    steps = range(-(-30 // batch_size))
    rows = torch.cat([task.train_batch(seed, step, batch_size).input_ids for step in steps])
    for epoch in range(3):
        rows_of_epoch = rows[10 * epoch : 10 * (epoch + 1)]
        assert sorted(map(tuple, rows_of_epoch.tolist())) == every


def test_order_differs_between_seeds_and_epochs() -> None:
    task = small(train_examples=100)
    orders = [task.train_batch(seed, epoch, 100).input_ids for seed in (0, 1) for epoch in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert not torch.equal(first, second)


def test_train_batch_is_pure() -> None:
    first = small().train_batch(5, 2, 7)
    task = small()
    for step in (9, 0, 4):
        task.train_batch(1, step, 3)
    again = task.train_batch(5, 2, 7)
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.labels, again.labels)


@pytest.mark.parametrize(("limit", "count"), [(None, 11), (4, 4), (100, 11)])
def test_evaluation_covers_the_split_once(limit: int | None, count: int) -> None:
    task = small()
    batches = list(task.evaluation_batches("validation", 4, limit))
    assert all(len(batch.input_ids) == 4 for batch in batches[:-1])
    tokens = torch.cat([batch.input_ids for batch in batches])
    assert torch.equal(tokens, task.examples("validation", torch.arange(count)).input_ids)


@settings(deadline=None)
@given(st.text(alphabet=CharacterTokenizer.characters))
def test_tokenizer_round_trip(text: str) -> None:
    tokenizer = CharacterTokenizer()
    ids = tokenizer.encode(text)
    assert all(1 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(torch.tensor([*ids, 0, 0], dtype=torch.int64)) == text


def test_tokenizer_refuses_other_characters() -> None:
    with pytest.raises(ValueError, match=r"letters, digits.*got \[' ', '!'\]"):
        CharacterTokenizer().encode("A, !")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_length": 41}, "min_length <= max_length <= alphabet_size .* got 41, 40, 52"),
        ({"max_length": 53}, "got 20, 53, 52"),
        ({"max_shift": 40}, "max_shift must be below max_length=40, got 40"),
        ({"train_examples": 0}, "train_examples"),
        ({"data_seed": -1}, "data_seed"),
        ({"lenght": 3}, "lenght"),
    ],
)
def test_bad_settings(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        IndirectIndexingData.model_validate(changes)


def test_bad_arguments() -> None:
    task = small()
    with pytest.raises(ValueError, match=r"seed must be in .* got -1"):
        task.train_batch(-1, 0, 4)
    with pytest.raises(ValueError, match=r"step must be in .* got -2"):
        task.train_batch(0, -2, 4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        task.train_batch(0, 0, 0)
    with pytest.raises(ValueError, match="split must be one of validation, test, got 'train'"):
        task.evaluation_batches("train", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        task.evaluation_batches("test", 4, 0)
    with pytest.raises(ValueError, match="split must be one of train"):
        task.examples("dev", torch.arange(3))
    with pytest.raises(ValueError, match=r"indices must be \(N,\) int64"):
        task.examples("train", torch.arange(3, dtype=torch.int32))


def test_description_tells_data_apart() -> None:
    first, same, other = small(), small(), small(data_seed=1)
    assert first.describe() == same.describe()
    assert first.describe()["validation_sha256"] != other.describe()["validation_sha256"]
    assert first.describe()["train_examples"] == 10
