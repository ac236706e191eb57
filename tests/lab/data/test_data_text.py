"""The text task: batches, splits, windows, records and errors."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from pydantic import TypeAdapter, ValidationError

from whatwhere.lab.data import (
    IGNORED,
    IndirectIndexingData,
    IndirectIndexingTask,
    TextData,
    TextTask,
    make_task,
    read_tokens,
    spaced_windows,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve files of distinct, recognisable lines."""
    for i in range(12):
        lines = "".join(f"file {i} line {j}\n" for j in range(20 + 5 * i))
        (tmp_path / f"f{i:02}.txt").write_text(lines)
    return tmp_path


def task_of(folder: Path, **options: Any) -> TextTask:
    return TextTask(TextData(paths=(str(folder),), **{"length": 32, **options}))


def text_of(ids: torch.Tensor) -> str:
    return bytes(ids.tolist()).decode()


@pytest.mark.parametrize("split", ["file", "position"])
@pytest.mark.parametrize("documents", ["concatenate", "pack"])
def test_train_batch_is_pure(folder: Path, split: Any, documents: Any) -> None:
    options = {"split": split, "documents": documents}
    first = task_of(folder, **options).train_batch(3, 11, 8)
    task = task_of(folder, **options)
    for step in (12, 0):
        task.train_batch(3, step, 5)
    again = task.train_batch(3, 11, 8)
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.labels, again.labels)
    # A larger batch starts with the smaller one; other seeds and steps differ.
    assert torch.equal(task.train_batch(3, 11, 20).input_ids[:8], first.input_ids)
    for seed, step in ((3, 12), (4, 11), (11, 3)):
        assert not torch.equal(task.train_batch(seed, step, 8).input_ids, first.input_ids)


def test_train_batches_are_windows_of_the_training_text(folder: Path) -> None:
    task = task_of(folder)
    batch = task.train_batch(0, 0, 64)
    assert batch.input_ids.shape == (64, 32)
    assert batch.input_ids.dtype == torch.int64
    assert batch.segment_ids is None
    assert torch.equal(batch.input_ids, batch.labels)
    assert batch.input_ids.data_ptr() != batch.labels.data_ptr()
    stream = task.train_tokens.tobytes()
    assert all(bytes(row.tolist()) in stream for row in batch.input_ids)


def test_every_start_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcdefghijklmnopqrstuvwxyz")
    task = TextTask(
        TextData(
            paths=(str(tmp_path / "text"),), length=5, split="position", validation_fraction=0.3
        )
    )
    rows = task.train_batch(0, 0, 2000).input_ids
    assert {text_of(row) for row in rows[:, :1]} == set("abcdefghijklmno")
    assert {text_of(row)[-1] for row in rows} == set("efghijklmnopqr") | {"\0"}


@pytest.mark.parametrize("split", ["file", "position"])
def test_splits_share_no_text(folder: Path, split: Any) -> None:
    task = task_of(folder, split=split, validation_fraction=0.3)
    train = task.train_tokens.tobytes().decode().split("\n")
    validation = task.validation_tokens.tobytes().decode().split("\n")
    # Every line of the files is different; one line at most a file is cut in two.
    whole = [line for line in validation if line.count(" ") == 3 and line.startswith("file")]
    assert len(whole) > 50
    shared = set(whole) & set(train)
    assert not shared
    total = len(task.train_tokens) + len(task.validation_tokens)
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert total == size + (12 if split == "file" else 24)  # one separator a document


def test_lone_file_is_split_by_position_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("0123456789" * 100)
    data = TextData(paths=(str(tmp_path / "one.txt"),), length=16)
    with pytest.warns(UserWarning, match=r"split='file' with the one file .*split='position'"):
        task = TextTask(data)
    assert task.describe()["split"] == "position"
    assert (len(task.train_tokens), len(task.validation_tokens)) == (901, 101)


def test_packed_batches(folder: Path) -> None:
    task = task_of(folder, documents="pack", length=700, validation_fraction=0.4)
    batch = task.train_batch(0, 0, 16)
    assert batch.segment_ids is not None
    assert int(batch.segment_ids.max()) > 1
    for ids, labels, segments in zip(
        batch.input_ids, batch.labels, batch.segment_ids, strict=True
    ):
        for segment in range(1, int(segments.max()) + 1):
            inside = segments == segment
            # One document alone, from its start or from a cut.
            names = re.findall(r"file (\d+) line", text_of(ids[inside]))
            assert len(set(names)) == 1
            assert int((labels[inside] == IGNORED).sum()) == 1
        assert bool((labels[segments == 0] == IGNORED).all())


def test_packed_evaluation_sees_every_document_once(folder: Path) -> None:
    task = task_of(folder, documents="pack", length=64, validation_fraction=0.4)
    batches = list(task.evaluation_batches("validation", 4))
    seen = sum(int((b.segment_ids > 0).sum()) for b in batches if b.segment_ids is not None)
    assert seen == len(task.validation_tokens)
    assert sum(len(b.input_ids) for b in task.evaluation_batches("validation", 4, 6)) == 6


@given(st.integers(1, 9), st.one_of(st.none(), st.integers(1, 60)))
@settings(deadline=None)
def test_evaluation_windows_cover_the_split(batch_size: int, limit: int | None) -> None:
    task = CACHED_TASK
    batches = list(task.evaluation_batches("validation", batch_size, limit))
    fit = len(task.validation_tokens) // 32
    count = fit if limit is None else min(limit, fit)
    assert [len(batch.input_ids) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    rows = torch.cat([batch.input_ids for batch in batches])
    assert len(rows) == count
    assert torch.equal(rows, task.windows(32, count))


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 40))
def test_windows_are_spaced_evenly(size: int, length: int, count: int) -> None:
    tokens = np.arange(size, dtype=np.uint16)
    if size < length:
        with pytest.raises(ValueError, match=f"length={length} is more than the {size} tokens"):
            spaced_windows(tokens, length, count)
        return
    windows = spaced_windows(tokens, length, count)
    assert windows.shape == (count, length)
    assert windows.dtype == torch.int64
    assert (windows.diff(dim=1) == 1).all()
    starts = windows[:, 0]
    assert int(starts[0]) == 0
    if count > 1:
        assert int(windows[-1, -1]) == size - 1
        gaps = starts.diff()
        assert int(gaps.max() - gaps.min()) <= 1
        if count * length <= size:
            assert int(gaps.min()) >= length


def test_windows_refuse_nonsense(folder: Path) -> None:
    task = task_of(folder)
    with pytest.raises(ValueError, match=r"length=1000000 is more than the \d+ tokens"):
        task.windows(1_000_000, 2)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        task.windows(10, 0)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        task.windows(0, 1)


def test_description_is_a_record(folder: Path) -> None:
    task = task_of(folder)
    record = task.describe()
    assert json.loads(json.dumps(record)) == record
    assert record == task_of(folder).describe()
    assert record["files"] == 12
    assert record["train_tokens"] == len(task.train_tokens)
    (folder / "f00.txt").write_text("another text altogether\n" * 10)
    changed = task_of(folder).describe()
    names = ("train_sha256", "validation_sha256")
    assert [record[name] for name in names] != [changed[name] for name in names]


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 50)
    for length, split in ((64, "train"), (40, "validation")):
        data = TextData(paths=(str(tmp_path / "short.txt"),), length=length, split="position")
        with pytest.raises(ValueError, match=rf"gives \d+ {split} tokens, fewer than one window"):
            TextTask(data)


def test_missing_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"paths: .* does not exist"):
        make_task(TextData(paths=(str(tmp_path / "nowhere"),)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lenght": 3}, "lenght"),
        ({"length": 1}, "length"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"validation_fraction": 0.0}, "validation_fraction"),
        ({"split": "half"}, "'file' or 'position'"),
        ({"documents": "shuffle"}, "'concatenate' or 'pack'"),
        ({"paths": ("",)}, "paths must not be blank"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"tokenizer": ""}, "tokenizer"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TextData(**changes)


def test_settings_accept_one_path(tmp_path: Path) -> None:
    assert TextData.model_validate({"paths": "a.txt"}).paths == ("a.txt",)
    assert TextData.model_validate({"paths": tmp_path}).paths == (str(tmp_path),)
    assert TextData.model_validate({"paths": ["a", tmp_path]}).paths == ("a", str(tmp_path))


@pytest.mark.parametrize("data", [TextData(paths=("a",), length=7), IndirectIndexingData()])
def test_settings_round_trip(data: TextData | IndirectIndexingData) -> None:
    either: TypeAdapter[Any] = TypeAdapter(TextData | IndirectIndexingData)
    assert either.validate_json(data.model_dump_json()) == data


def test_make_task_goes_by_type(folder: Path) -> None:
    text = make_task(TextData(paths=(str(folder),), length=16))
    assert isinstance(text, TextTask)
    assert (text.vocab_size, text.length, text.accuracy) == (256, 16, False)
    assert isinstance(make_task(IndirectIndexingData()), IndirectIndexingTask)


def test_text_has_no_test_split(folder: Path) -> None:
    with pytest.raises(ValueError, match="split must be one of validation, got 'test'"):
        task_of(folder).evaluation_batches("test", 4)


def test_default_text_needs_nothing() -> None:
    task = make_task(TextData())
    batch = task.train_batch(0, 0, 4)
    assert batch.input_ids.shape == (4, 128)
    assert task.describe()["source"].startswith("standard library of Python")


def test_real_books(data_dir: Path) -> None:
    books = data_dir / "books"
    task = TextTask(TextData(paths=(str(books / "*.txt"),)))
    files = {file.name: file.read_bytes() for file in books.glob("*.txt")}
    record = task.describe()
    assert record["files"] == len(files)
    validation = task.validation_tokens.tobytes()
    names = [Path(name).name for name in record["validation_files"]]
    expected = b"".join(files[n].removeprefix(b"\xef\xbb\xbf") + b"\0" for n in sorted(names))
    assert validation == expected
    alone = read_tokens((str(books / "alice_pg11.txt"),)).tobytes()
    assert alone == files["alice_pg11.txt"].removeprefix(b"\xef\xbb\xbf") + b"\0"


def test_binary_sample_is_refused(data_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"BLiMP\.zip' is binary"):
        TextTask(TextData(paths=(str(data_dir / "blimp" / "BLiMP.zip"),)))


def test_bytes_import_no_transformers() -> None:
    code = (
        "import sys; from whatwhere.lab.data import TextData, make_task; make_task(TextData());"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


CACHED_TASK = TextTask(TextData(length=32, max_bytes=20_000, validation_fraction=0.2))
