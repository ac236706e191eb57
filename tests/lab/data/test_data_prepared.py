"""The task of prepared data: laws of both layouts, transposition, rows, errors."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from pydantic import TypeAdapter, ValidationError
from small_corpus import Numbers, expected

from whatwhere.lab.data import (
    IGNORED,
    IndirectIndexingData,
    IndirectIndexingTask,
    Task,
    TextData,
    TextTask,
    TokensData,
    TokensTask,
    make_task,
)
from whatwhere.lab.data.pieces import TrainingRows, evaluation_rows, whole_windows
from whatwhere.lab.data.prepare import prepare
from whatwhere.lab.data.prepared import transposed
from whatwhere.lab.data.shards import PreparedFolder

PITCHES = (100, 187)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> PreparedFolder:
    place = tmp_path_factory.mktemp("prepared") / "out"
    return prepare(Numbers(30, pitches=PITCHES), place, workers=1, shard_tokens=700)


@pytest.fixture(scope="module")
def tasks(folder: PreparedFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    text = tmp_path_factory.mktemp("text")
    for i in range(8):
        (text / f"{i}.txt").write_text(f"file {i} " * (i + 20))
    return {
        "stream": of(folder, "stream"),
        "pieces": of(folder, "pieces"),
        "transposed": of(folder, "pieces", transpose=3),
        "text": TextTask(TextData(paths=(str(text),), length=16)),
        "packed": TextTask(TextData(paths=(str(text),), length=100, documents="pack")),
        "indirect": IndirectIndexingTask(IndirectIndexingData(train_examples=50)),
    }


KINDS = ("stream", "pieces", "transposed", "text", "packed", "indirect")


def of(folder: PreparedFolder, layout: Any, **options: Any) -> TokensTask:
    return TokensTask(TokensData(layout=layout, **{"length": 16, **options}), folder)


def test_a_batch_is_pure(tasks: dict[str, Task], folder: PreparedFolder) -> None:
    for kind in ("stream", "pieces", "transposed"):
        task = tasks[kind]
        first = task.train_batch(3, 11, 8)
        task.train_batch(4, 200, 5)
        again = of(folder, task.data.layout, transpose=task.data.transpose)  # type: ignore[attr-defined]
        for other in (task, again):
            same = other.train_batch(3, 11, 8)
            assert torch.equal(first.input_ids, same.input_ids)
            assert torch.equal(first.labels, same.labels)
        for seed, step in ((3, 12), (4, 11)):
            assert not torch.equal(task.train_batch(seed, step, 8).input_ids, first.input_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_rows_of_the_whole_batch(tasks: dict[str, Task], kind: str) -> None:
    task = tasks[kind]
    for step in (0, 7, 30):
        whole = task.train_batch(5, step, 12)
        for first, last in ((0, 12), (0, 4), (4, 8), (8, 12), (11, 12)):
            part = task.train_batch(5, step, 12, rows=range(first, last))
            assert torch.equal(part.input_ids, whole.input_ids[first:last])
            assert torch.equal(part.labels, whole.labels[first:last])
            if whole.segment_ids is not None and part.segment_ids is not None:
                assert torch.equal(part.segment_ids, whole.segment_ids[first:last])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [range(0), range(3, 3), range(13), range(0, 4, 2), range(-1, 3)])
def test_other_rows_are_refused(tasks: dict[str, Task], kind: str, rows: range) -> None:
    with pytest.raises(ValueError, match="rows must be consecutive and among the 12"):
        tasks[kind].train_batch(0, 0, 12, rows=rows)


def test_stream_batches_are_those_of_the_text_task(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.txt").write_text(f"the text of file {i}\n" * (i + 5))
    old = TextTask(TextData(paths=(str(folder),), length=24))
    new = make_task(TokensData(paths=(str(folder),), length=24), tmp_path / "cache")
    for step in range(5):
        a, b = (task.train_batch(1, step, 16) for task in (old, new))
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)
    for one, two in zip(
        old.evaluation_batches("validation", 3),
        new.evaluation_batches("validation", 3),
        strict=True,
    ):
        assert torch.equal(one.input_ids, two.input_ids)
    assert torch.equal(old.windows(40, 4), new.windows(40, 4))  # type: ignore[attr-defined]


def sizes_to_bounds(sizes: list[int]) -> Any:
    return np.cumsum([0, *sizes])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(4, 13), st.integers(0, 5))
def test_an_epoch_of_pieces_is_every_token_once(sizes: list[int], length: int, epoch: int) -> None:
    bounds = sizes_to_bounds(sizes)
    pieces = TrainingRows(bounds, length)
    count = len(pieces)
    found = pieces.rows(7, epoch * count, (epoch + 1) * count)
    assert len(found) == count
    seen = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(found.starts, found.sizes, strict=True)]
    )
    assert np.array_equal(np.sort(seen), np.arange(sum(sizes)))
    assert found.sizes.max() <= length
    document = np.searchsorted(bounds, found.starts, side="right")
    assert np.array_equal(
        document, np.searchsorted(bounds, found.starts + found.sizes - 1, side="right")
    )
    # A row with nothing to predict comes only of a document that has nothing to predict.
    alone = found.sizes < 2
    assert (np.diff(bounds)[document[alone] - 1] == 1).all()
    # Any split of the epochs laid end to end gives the same rows.
    parts = [pieces.rows(7, i, i + 1) for i in range(epoch * count, (epoch + 1) * count)]
    assert np.array_equal(np.concatenate([part.starts for part in parts]), found.starts)


def test_grids_and_orders_change_with_the_epoch() -> None:
    pieces = TrainingRows(sizes_to_bounds([1000, 30, 500]), 64)
    count = len(pieces)
    epochs = [pieces.rows(0, i * count, (i + 1) * count) for i in range(20)]
    firsts = {int(np.sort(e.starts)[1]) for e in epochs}  # the end of the first document's first
    assert len(firsts) > 10
    assert min(firsts) >= 1000 % 64
    assert max(firsts) <= 64
    assert len({tuple(e.starts) for e in epochs}) == 20


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(2, 13))
def test_evaluation_rows_are_every_token_once_in_order(sizes: list[int], length: int) -> None:
    bounds = sizes_to_bounds(sizes)
    rows = evaluation_rows(bounds, length)
    seen = np.concatenate(
        [np.arange(a, a + n) for a, n in zip(rows.starts, rows.sizes, strict=True)]
    )
    assert np.array_equal(seen, np.arange(sum(sizes)))
    assert rows.sizes.max() <= length
    begins = set(bounds[:-1].tolist())
    assert begins <= set(rows.starts.tolist())


def test_piece_batches(folder: PreparedFolder, tasks: dict[str, Task]) -> None:
    task = tasks["pieces"]
    documents = expected(Numbers(30), "train")
    text = " ".join(" ".join(map(str, d)) + " |" for d in documents)
    batch = task.train_batch(0, 0, 64)
    assert batch.input_ids.shape == (64, 16)
    assert (batch.labels == IGNORED).any()
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        real = labels != IGNORED
        size = int(real.sum())
        assert bool(real[:size].all())
        assert torch.equal(ids[:size], labels[:size])
        assert not ids[size:].any()
        assert " ".join(map(str, ids[:size].tolist())) in text
    assert batch.input_ids.data_ptr() != batch.labels.data_ptr()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_piece_evaluation_is_every_token_once(tasks: dict[str, Task], split: Any) -> None:
    batches = list(tasks["pieces"].evaluation_batches(split, 7))
    seen = [row[row != IGNORED] for batch in batches for row in batch.labels]
    documents = expected(Numbers(30), split)
    assert np.array_equal(torch.cat(seen).numpy(), np.concatenate(documents))
    assert all(bool((b.labels[:, -1] != IGNORED).any()) for b in batches)
    some = list(tasks["pieces"].evaluation_batches(split, 4, limit=9))
    assert [len(batch.input_ids) for batch in some] == [4, 4, 1]


def test_windows(folder: PreparedFolder, tasks: dict[str, Task]) -> None:
    stream = folder.stream("test")
    for task in (of(folder, "stream"), of(folder, "pieces")):
        windows = task.windows(40, 3, "test")
        assert windows.shape == (3, 40)
        assert windows.dtype == torch.int64
        with pytest.raises(ValueError, match="length=100000 is more than the"):
            task.windows(100_000, 3)
        with pytest.raises(ValueError, match="count must be at least 1"):
            task.windows(10, 0)
        with pytest.raises(ValueError, match="split must be one of validation, test, got 'dev'"):
            task.windows(10, 1, "dev")  # type: ignore[arg-type]
    starts = whole_windows(stream.bounds, 40, 10**6)
    ends = np.searchsorted(stream.bounds, starts + 39, side="right")
    assert np.array_equal(np.searchsorted(stream.bounds, starts, side="right"), ends)
    assert (np.diff(starts) >= 40).all()


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 20), min_size=6, max_size=6), min_size=1, max_size=5),
    st.data(),
)
def test_transposition(rows: list[list[int]], data: Any) -> None:
    first, last = 5, 12
    tokens = np.array(rows)
    shifts = np.array([data.draw(st.integers(-10, 10)) for _ in rows])
    moved = transposed(tokens, shifts, (first, last))
    pitched = (tokens >= first) & (tokens <= last)
    assert np.array_equal(moved[~pitched], tokens[~pitched])
    assert ((moved[pitched] >= first) & (moved[pitched] <= last)).all()
    for row, there, where, shift in zip(tokens, moved, pitched, shifts, strict=True):
        if not where.any():
            continue
        by = set((there - row)[where].tolist())
        assert len(by) == 1
        # As far as it goes, and no further than asked.
        best = max(
            (s for s in range(abs(int(shift)) + 1)),
            key=lambda s: s if inside(row[where] + s * np.sign(shift), first, last) else -1,
        )
        assert by == {best * int(np.sign(shift))}


def inside(values: Any, first: int, last: int) -> bool:
    return bool((values >= first).all() and (values <= last).all())


def test_transposition_is_uniform_and_for_training_alone(
    folder: PreparedFolder, tasks: dict[str, Task]
) -> None:
    plain, moved = tasks["pieces"], tasks["transposed"]
    found: list[int] = []
    for step in range(40):
        a, b = (task.train_batch(0, step, 32).input_ids for task in (plain, moved))
        inner = (a >= PITCHES[0] + 3) & (a <= PITCHES[1] - 3)
        within = ((a >= PITCHES[0]) & (a <= PITCHES[1])) == inner
        free = within.all(1) & inner.any(1)
        found += [int((y - x)[m].unique()) for x, y, m in zip(a[free], b[free], inner[free])]  # noqa: B905
    counts = np.bincount(np.array(found) + 3, minlength=7)
    assert len(counts) == 7
    mean = len(found) / 7
    assert mean > 50
    assert (np.abs(counts - mean) < 5 * mean**0.5).all()
    for one, two in zip(
        plain.evaluation_batches("test", 8), moved.evaluation_batches("test", 8), strict=True
    ):
        assert torch.equal(one.input_ids, two.input_ids)


def test_settings_and_folder_must_agree(folder: PreparedFolder, tmp_path: Path) -> None:
    where = (str(folder.path),)
    assert isinstance(make_task(TokensData(paths=where, length=16)), TokensTask)
    for options, message in (
        ({"dataset": "jsb"}, "holds 'text', but 'jsb' is asked for"),
        ({"tokenizer": "gpt2"}, "holds tokens of 'numbers', but 'gpt2' is asked for"),
        ({"max_bytes": 10}, "max_bytes: .* is prepared"),
        ({"length": 10**6}, "fewer than one window of length=1000000"),
        ({"length": 3, "layout": "pieces"}, "length must be at least 4 with pieces"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task(TokensData(paths=where, **{"length": 16, **options}))
    plain = prepare(Numbers(), tmp_path / "plain", workers=1)
    with pytest.raises(ValueError, match="transpose=2: text has no pitches"):
        of(plain, "stream", transpose=2)
    (tmp_path / "half" / ".parts").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not prepared to its end"):
        make_task(TokensData(paths=(str(tmp_path / "half"),)))


def test_no_validation_is_an_error(tmp_path: Path) -> None:
    prepare(Numbers(2), tmp_path / "out", workers=1)
    lone = prepare(Lone(3), tmp_path / "lone", workers=1)
    with pytest.raises(ValueError, match="has no validation document"):
        of(lone, "stream")


class Lone(Numbers):
    """Training documents alone."""

    def documents(self, item: Any) -> Any:
        return (d for d in super().documents(item) if d.split == "train")


def test_raw_files_are_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"number {i} " * 50)
    data = TokensData(paths=(str(tmp_path / "*.txt"),), length=16)
    first = make_task(data, tmp_path / "cache").describe()
    (made,) = (tmp_path / "cache" / "prepared").iterdir()
    assert made.name.startswith("text-")
    before = made.stat().st_mtime_ns
    assert make_task(data, tmp_path / "cache").describe() == first
    assert made.stat().st_mtime_ns == before
    (tmp_path / "0.txt").write_text("changed " * 50)
    changed = make_task(data, tmp_path / "cache").describe()
    assert changed["train_sha256"] != first["train_sha256"] or (
        changed["validation_sha256"] != first["validation_sha256"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lenght": 3}, "lenght"),
        ({"length": 1}, "length"),
        ({"dataset": "openwebtxt"}, "did you mean 'openwebtext'"),
        ({"layout": "circles"}, "'auto', 'stream' or 'pieces'"),
        ({"transpose": -1}, "transpose"),
        ({"paths": ("",)}, "paths must not be blank"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"tokenizer": ""}, "tokenizer"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokensData(**changes)


def test_settings_round_trip() -> None:
    data = TokensData(dataset="jsb", paths="a.json", length=7)  # type: ignore[arg-type]
    assert data.paths == ("a.json",)
    either: TypeAdapter[Any] = TypeAdapter(TextData | TokensData | IndirectIndexingData)
    assert either.validate_json(data.model_dump_json()) == data


def test_a_recipe_of_tokens_is_yaml_and_back() -> None:
    from whatwhere.lab import recipes

    recipe = recipes.get("text").model_copy(update={"data": TokensData(dataset="jsb")})
    assert recipes.from_yaml(recipes.to_yaml(recipe)) == recipe
    wrong = recipes.to_yaml(recipe).replace("transpose:", "transposed:")
    with pytest.raises(ValueError, match=r"unknown key 'data\.transposed' .*'transpose'"):
        recipes.from_yaml(wrong)
