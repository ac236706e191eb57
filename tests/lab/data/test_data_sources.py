"""Finding, reading and splitting text."""

import hashlib
import sys
import sysconfig
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from whatwhere.lab.data.sources import (
    EMBEDDED_MAX_BYTES,
    Document,
    read_corpus,
    split_by_file,
    split_by_position,
)


def write(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def document(text: str, name: str = "x") -> Document:
    data = text.encode()
    return Document(name, data, hashlib.sha256(data).hexdigest())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, b="second", a="first", sub__c="third ü", sub__deep__d="fourth")
    return tmp_path


def texts(*paths: str, max_bytes: int | None = None) -> list[str]:
    return [doc.text.decode() for doc in read_corpus(paths, max_bytes).documents]


def test_folder_is_read_whole_and_in_order(folder: Path) -> None:
    assert texts(str(folder)) == ["first", "second", "third ü", "fourth"]


def test_files_come_in_the_order_given(folder: Path) -> None:
    assert texts(str(folder / "b"), str(folder / "a")) == ["second", "first"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("?", ["first", "second"]),
        ("**/c", ["third ü"]),
        ("**/*", ["first", "second", "third ü", "fourth"]),
        ("sub/*", ["third ü"]),
    ],
)
def test_patterns(folder: Path, pattern: str, expected: list[str]) -> None:
    assert texts(str(folder / pattern)) == expected


def test_a_name_with_brackets_is_a_file_first(tmp_path: Path) -> None:
    (tmp_path / "notes [1].txt").write_text("bracketed")
    assert texts(str(tmp_path / "notes [1].txt")) == ["bracketed"]


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert texts("~/a", "~/sub/*") == ["first", "third ü"]


def test_same_text_is_read_once(folder: Path) -> None:
    write(folder, z="first")
    corpus = read_corpus((str(folder), str(folder / "a")))
    assert [doc.text for doc in corpus.documents].count(b"first") == 1
    assert corpus.skipped == {"duplicate": 2}


def test_folders_skip_and_count_what_is_not_text(folder: Path) -> None:
    write(
        folder,
        nul=b"ab\0cd",
        latin="é".encode("latin-1"),
        empty="",
        blank=" \n",
        sub__cut="é".encode()[:1],
    )
    (folder / ".git").mkdir()
    write(folder / ".git", config="hidden")
    write(folder, **{".hidden": "hidden"})
    corpus = read_corpus((str(folder),))
    assert len(corpus.documents) == 4
    assert corpus.skipped == {"binary": 3, "empty": 2}


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    write(tmp_path, windows=b"\xef\xbb\xbfplain")
    assert texts(str(tmp_path / "windows")) == ["plain"]


def message(*paths: str) -> str:
    with pytest.raises(ValueError) as caught:
        read_corpus(paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors_are_one_clear_line(folder: Path) -> None:
    write(folder, nul=b"ab\0cd", latin="abé".encode("latin-1"), empty="", only__empty="")
    (folder / "none").mkdir()
    assert message(str(folder / "nowhere")) == f"paths: '{folder}/nowhere' does not exist"
    assert message(f"{folder}/*.md") == f"paths: pattern '{folder}/*.md' matches no file"
    assert "holds no UTF-8 text file" in message(str(folder / "none"))
    assert "holds no UTF-8 text file (1 empty)" in message(str(folder / "only"))
    assert f"file '{folder}/empty' is empty" in message(str(folder / "empty"))
    assert f"file '{folder}/nul' is binary (it holds NUL bytes)" in message(str(folder / "nul"))
    assert "is binary (byte 2 is not UTF-8)" in message(str(folder / "latin"))
    assert "is neither a file nor a folder" in message("/dev/null")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert message("nowhere") == f"paths: 'nowhere' does not exist in '{folder}'"
    # One bad path is an error even where another is good.
    assert "does not exist" in message(str(folder / "a"), str(folder / "nowhere"))


def test_a_second_path_with_known_text_is_no_error(folder: Path) -> None:
    assert texts(str(folder / "a"), str(folder / "a")) == ["first"]


@settings(deadline=None)
@given(st.integers(1, 60))
def test_limit_cuts_between_characters(limit: int) -> None:
    parts = ["aéb", "漢字漢字", "plain text", "🙂🙂"]
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), **{f"f{i}": part for i, part in enumerate(parts)})
        read = texts(name, max_bytes=limit)
    assert len("".join(read).encode()) <= limit
    whole = "".join(parts)
    assert whole.startswith("".join(read))
    assert len("".join(read).encode()) >= min(limit, len(whole.encode())) - 3
    assert read[:-1] == parts[: len(read) - 1]


def test_limit_hides_no_duplicate(tmp_path: Path) -> None:
    """A second copy that the limit cuts short must not end up in the other split."""
    write(tmp_path, a="the same text", b="the same text", c="other")
    corpus = read_corpus((str(tmp_path),), max_bytes=20)
    assert [doc.text for doc in corpus.documents] == [b"the same text"]
    assert corpus.skipped == {"duplicate": 1, "beyond max_bytes": 1}


def test_limit_does_not_turn_a_named_file_into_an_error(folder: Path) -> None:
    assert texts(str(folder / "a"), str(folder / "b"), max_bytes=5) == ["first"]
    assert texts(str(folder / "a"), str(folder / "sub"), max_bytes=5) == ["first"]


def test_embedded_text_is_this_pythons_source() -> None:
    corpus = read_corpus()
    names = [doc.name for doc in corpus.documents]
    version = ".".join(map(str, sys.version_info[:3]))
    assert corpus.source == f"standard library of Python {version}"
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any({"test", "tests", "site-packages"} & set(Path(name).parts) for name in names)
    size = sum(len(doc.text) for doc in corpus.documents)
    assert 4_000_000 < size <= EMBEDDED_MAX_BYTES
    by_name = {doc.name: doc.text for doc in corpus.documents}
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    assert by_name["argparse.py"] == source
    assert read_corpus() == corpus


def test_embedded_text_can_be_limited() -> None:
    assert 90_000 < sum(len(d.text) for d in read_corpus(max_bytes=100_000).documents) <= 100_000


def test_missing_standard_library_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "name a text file or folder of your own" in message()


DOCUMENTS = st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=30, unique=True).map(
    lambda texts: [document(text, str(i)) for i, text in enumerate(texts)]
)
FRACTIONS = st.floats(0.001, 0.999)


@settings(deadline=None)
@given(DOCUMENTS, FRACTIONS)
def test_split_by_file_divides_all_files(documents: list[Document], fraction: float) -> None:
    train, validation = split_by_file(documents, fraction)
    assert train and validation
    assert sorted(train + validation, key=lambda d: int(d.name)) == documents
    assert split_by_file(documents[::-1], fraction) == (train[::-1], validation[::-1])


@settings(deadline=None)
@given(DOCUMENTS, FRACTIONS, st.text(min_size=1))
def test_a_new_file_moves_no_other(documents: list[Document], fraction: float, extra: str) -> None:
    before = split_by_file(documents, fraction)
    numbers = sorted(int(doc.digest, 16) / 16**64 for doc in documents)
    if extra.encode() in [doc.text for doc in documents]:
        return
    after = split_by_file([*documents, document(extra, "extra")], fraction)
    if numbers[0] < fraction <= numbers[-1]:  # otherwise one file had to be picked for a split
        for old, new in zip(before, after, strict=True):
            assert old == [doc for doc in new if doc.name != "extra"]


def test_split_by_file_picks_about_the_fraction() -> None:
    documents = [document(str(i)) for i in range(2000)]
    _, validation = split_by_file(documents, 0.1)
    assert 150 < len(validation) < 250


def test_split_by_file_needs_two_files() -> None:
    with pytest.raises(ValueError, match="two or more different files, got 1; use split='posit"):
        split_by_file([document("alone")], 0.1)


@settings(deadline=None)
@given(DOCUMENTS, FRACTIONS)
def test_split_by_position_divides_all_text(documents: list[Document], fraction: float) -> None:
    train, validation = split_by_position(documents, fraction)
    heads = {doc.name.removesuffix(" (head)"): doc.text for doc in train}
    tails = {doc.name.removesuffix(" (tail)"): doc.text for doc in validation}
    for doc in documents:
        head, tail = heads.get(doc.name, b""), tails.get(doc.name, b"")
        assert head + tail == doc.text
        head.decode(), tail.decode()  # no character is cut
        assert abs(len(tail) - fraction * len(doc.text)) <= 3.5
    for part in train + validation:
        assert part.text
        assert part.digest == hashlib.sha256(part.text).hexdigest()
