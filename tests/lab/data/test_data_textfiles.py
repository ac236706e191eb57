"""Texts in files: what is a document, which split it is in, and what is refused."""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from whatwhere.lab.data import TextData, TextTask, records, textfiles
from whatwhere.lab.data.textfiles import TextFiles, spread


def documents(corpus: TextFiles) -> list[tuple[str, bytes]]:
    """Split and text of each document, without the byte that separates them."""
    found = [d for item in corpus.items() for d in corpus.documents(item)]
    assert all(d.tokens[-1] == 0 for d in found)
    return [(d.split, d.tokens[:-1].tobytes()) for d in found]


def corpus(*paths: Path, **options: Any) -> TextFiles:
    return TextFiles([str(path) for path in paths], **options)


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))


def test_files_are_the_documents_and_split_as_in_the_text_task(tmp_path: Path) -> None:
    texts = {f"f{i:02}": f"file {i}, line one\nline two of {i}\n" for i in range(30)}
    folder = write(tmp_path / "text", **texts)
    found = documents(corpus(folder))
    assert [text.decode() for _, text in found] == list(texts.values())
    task = TextTask(TextData(paths=(str(folder),), length=8))
    held_out = b"".join(text + b"\0" for split, text in found if split == "validation")
    assert held_out == task.validation_tokens.tobytes()
    assert {split for split, _ in found} == {"train", "validation"}


def test_one_file_is_split_by_position(tmp_path: Path) -> None:
    text = "äöü" * 1001
    (split_a, head), (split_b, tail) = documents(corpus(write(tmp_path / "t", a=text) / "a.txt"))
    assert (split_a, split_b) == ("train", "validation")
    assert (head + tail).decode() == text
    tail.decode()
    assert abs(len(tail) - len(text.encode()) * 0.1) <= 2


def test_long_files_are_cut_at_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "DOCUMENT_BYTES", 1000)
    text = "".join(f"line number {i} ü\n" for i in range(500))
    folder = write(tmp_path / "t", a=text, b="another\n")
    (tmp_path / "t" / "mark.txt").write_bytes(b"\xef\xbb\xbf" + b"with a mark\n" * 200)
    found = documents(corpus(folder))
    assert b"".join(t for _, t in found).decode() == text + "another\n" + "with a mark\n" * 200
    assert all(text.endswith(b"\n") for _, text in found)
    assert max(len(text) for _, text in found) < 1100
    long = [(split, t) for split, t in found if t.startswith(b"line")]
    assert len(long) > 5
    assert len({split for split, _ in long}) == 1  # of one file, which is one split


def test_lines_too_long_are_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfiles, "DOCUMENT_BYTES", 100)
    text = "漢" * 1000
    found = documents(corpus(write(tmp_path / "t", a=text, b="b")))
    assert b"".join(t for _, t in found if t != b"b").decode() == text
    for _, part in found:
        part.decode()


def test_unusable_files_of_a_folder_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", a="one text", b="another", c="one text", empty="", blank=" \n")
    (folder / "binary.bin").write_bytes(b"\x00\x01")
    (folder / "latin.txt").write_bytes(b"caf\xe9 noir")
    (folder / "end.txt").write_bytes("é".encode()[:1])
    (folder / ".hidden").write_text("not seen")
    made = corpus(folder)
    assert sorted(text for _, text in documents(made)) == [b"another", b"one text"]
    assert made.take_left_out() == {
        "files binary": 3,
        "files empty": 2,
        "files repeated": 1,
    }
    for name, reason in (("latin.txt", "byte 3 is not UTF-8"), ("empty.txt", "is empty")):
        with pytest.raises(ValueError, match=reason) as caught:
            list(corpus(folder / name).items())
        assert name in str(caught.value)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "*.txt"):
        with pytest.raises(ValueError, match=r"paths: .*(does not exist|no UTF-8|no file)"):
            list(corpus(path).items())


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz"])
def test_lines_of_json(tmp_path: Path, ending: str) -> None:
    texts = ["first", "zweiter: ü", "", "  ", "line\nbreak", "half a pair \ud83d"]
    content = (lines(*texts[:2]) + "\n" + lines(*texts[2:])).encode()
    file = tmp_path / f"a{ending}"
    file.write_bytes(gzip.compress(content, mtime=0) if ending.endswith("gz") else content)
    made = corpus(file)
    found = [text.decode() for _, text in documents(made)]
    assert found == ["first", "zweiter: ü", "line\nbreak", "half a pair ?"]
    assert made.take_left_out() == {"empty documents": 2}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("abü\n", max_size=30), min_size=1, max_size=30), st.integers(1, 200))
def test_parts_of_lines_are_all_lines_once(texts: list[str], size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "parts.jsonl")
        path.write_text(lines(*texts), encoding="utf-8")
        found = [text for part in records.parts(path, size) for _, text in records.read(part)]
    assert [text.decode() for text in found] == texts


def test_lists_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, "two"], indent=1))
    assert [text for _, text in documents(corpus(tmp_path))] == [b"one", b"two"]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"row {i} ü" for i in range(1000)] + [None]
    table = pa.table({"id": list(range(1001)), "text": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert len(records.parts(tmp_path / "a.parquet", 2000)) > 3
    assert [t.decode() for _, t in documents(corpus(tmp_path))] == texts[:-1]
    pq.write_table(table.drop_columns("text"), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: a column 'text' is expected, there are id"):
        list(corpus(tmp_path).items())


# Without the time of day, which would be in the test's name, and another one in each worker's.
CUT = gzip.compress(b'{"text": "one"}\n' * 99, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": "tw', r"a\.jsonl, line 2: no JSON, perhaps cut"),
        ("a.jsonl", b'{"text": "one"}\n\n{"txt": "two"}\n', r"a\.jsonl, line 3: an object with a"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: an object"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl, line 1: no JSON"),
        ("a.json", b'[{"text": "one"},\n{"text": "tw', r"a\.json, line 2: no JSON, perhaps cut"),
        ("a.json", b'[{"text": "one"}, {"id": 1}]', r"a\.json, element 1: an object"),
        ("a.jsonl.gz", CUT, r"a\.jsonl\.gz is damaged"),
        ("a.jsonl.gz", b"no gzip at all", r"a\.jsonl\.gz is damaged"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is damaged"),
    ],
)
def test_damaged_records_are_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    made = corpus(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        documents(made)
    assert "\n" not in str(caught.value)


def test_records_are_split_by_digest(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(2000)]
    (tmp_path / "a.jsonl").write_text(lines(*texts))
    first = documents(corpus(tmp_path))
    share = sum(split == "validation" for split, _ in first) / len(first)
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 2000) ** 0.5
    # A document keeps its split wherever it stands.
    (tmp_path / "a.jsonl").write_text(lines(*reversed(texts)))
    assert sorted(documents(corpus(tmp_path))) == sorted(first)


def test_own_splits(tmp_path: Path) -> None:
    for place, name in (("train", "1"), ("validation", "2"), ("test", "3"), ("x", "test-0001")):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{name}.txt").write_text(f"{place} {name}")
    found = dict(reversed(pair) for pair in documents(corpus(tmp_path, own_splits=True)))
    assert found == {
        b"train 1": "train",
        b"validation 2": "validation",
        b"test 3": "test",
        b"x test-0001": "test",
    }


def test_max_bytes_of_files_is_sequential(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", a="a" * 100, b="ü" * 50, c="c" * 100)
    for limit in (100, 131, 200, 250):
        text = b"".join(text for _, text in documents(corpus(folder, max_bytes=limit)))
        whole = b"a" * 100 + "ü".encode() * 50 + b"c" * 100
        assert text == whole[: limit - (limit == 131)]
    assert documents(corpus(folder, max_bytes=10**6)) == documents(corpus(folder))


def test_max_bytes_of_records_is_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "ITEM_BYTES", 1000)
    monkeypatch.setattr(textfiles, "LEAST_SHARE", 200)
    texts = [f"document number {i:04}" for i in range(500)]
    (tmp_path / "a.jsonl").write_text(lines(*texts))
    found = [text.decode() for _, text in documents(corpus(tmp_path, max_bytes=1000))]
    assert 900 <= sum(map(len, found)) <= 1000
    numbers = [int(text.split()[-1]) for text in found if text in texts]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 350


def test_max_bytes_leaves_own_splits_whole(tmp_path: Path) -> None:
    (tmp_path / "test-1.txt").write_text("t" * 500)
    (tmp_path / "train-1.txt").write_text("x" * 500)
    (tmp_path / "valid-1.jsonl").write_text(lines("v" * 500))
    (tmp_path / "train-2.jsonl").write_text(lines("y" * 500))
    for limit, train in ((100, 100), (600, 600), (2000, 1000)):
        found = documents(corpus(tmp_path, own_splits=True, max_bytes=limit))
        sizes = {s: sum(len(t) for split, t in found if split == s) for s, _ in found}
        assert sizes == {"train": train, "validation": 500, "test": 500}


def test_spread_chooses_evenly() -> None:
    assert spread(list(range(10)), 5 * textfiles.LEAST_SHARE) == (
        [0, 2, 4, 6, 8],
        textfiles.LEAST_SHARE,
    )
    assert spread([1, 2], 10) == ([1], 10)
    assert spread([1, 2], 0) == spread([], 10) == ([], 0)


def test_fingerprint_follows_content_and_options_alone(tmp_path: Path) -> None:
    here, there = (write(tmp_path / n, a="one", b="two") for n in ("here", "there"))
    first = corpus(here).fingerprint()
    assert corpus(there).fingerprint() == first == corpus(here).fingerprint()
    others = [corpus(here, max_bytes=4).fingerprint(), corpus(here / "a.txt").fingerprint()]
    (there / "b.txt").write_text("changed")
    others.append(corpus(there).fingerprint())
    assert len({first, *others}) == 4


def test_real_books_are_documents_whole(data_dir: Path) -> None:
    books = sorted((data_dir / "books").glob("*.txt"))
    found = documents(corpus(data_dir / "books" / "*.txt"))
    assert [t for _, t in found] == [b.read_bytes().removeprefix(b"\xef\xbb\xbf") for b in books]
