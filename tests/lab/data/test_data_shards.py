"""Prepared folders: reading across shards, and every way in which one can be damaged."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from small_corpus import Numbers

from whatwhere.lab.data import shards
from whatwhere.lab.data.prepare import prepare
from whatwhere.lab.data.shards import PreparedFolder, Stream


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "out"
    prepare(Numbers(), folder, workers=1, shard_tokens=300)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=5), min_size=1, max_size=5),
    st.data(),
)
def test_reading_across_shards_is_reading_the_whole(sizes: list[list[int]], data: Any) -> None:
    total = sum(map(sum, sizes))
    whole = np.arange(total, dtype=np.uint16)
    ends = np.cumsum([sum(part) for part in sizes])
    parts = np.split(whole, ends[:-1])
    bounds = [np.cumsum([0, *part]) for part in sizes]
    stream = Stream(parts, bounds)
    assert len(stream) == total
    flat = [size for part in sizes for size in part]
    assert np.array_equal(stream.bounds, np.cumsum([0, *flat]))
    length = data.draw(st.integers(1, total))
    starts = data.draw(st.lists(st.integers(0, total - length), max_size=5))
    windows = stream.take(np.array(starts, dtype=np.int64), length)
    assert windows.shape == (len(starts), length)
    assert windows.dtype == np.int64
    for window, start in zip(windows, starts, strict=True):
        assert np.array_equal(window, whole[start : start + length])


def test_tokens_are_mapped_not_read(folder: Path) -> None:
    stream = PreparedFolder(folder).stream("train")
    assert all(isinstance(part, np.memmap) for part in (*stream._tokens, *stream._bounds))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        PreparedFolder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NAMES = ("train-00001.tokens.npy", "train-00001.bounds.npy", "validation-00000.tokens.npy")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_shard_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [1, 100, None])
def test_a_short_shard_is_refused_by_name(folder: Path, name: str, cut: int | None) -> None:
    file = folder / name
    size = file.stat().st_size
    os.truncate(file, 0 if cut is None else size - cut)
    message = refusal(folder)
    assert f"{name} is cut short" in message
    assert f"manifest has {size}" in message


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_shard_is_refused_by_name_when_it_is_first_opened(
    folder: Path, name: str
) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert f"{name} is damaged" in refusal(folder)


def test_a_damaged_header_is_refused_by_name(folder: Path) -> None:
    for damage in (b"\x00" * 10, b"\x93NUMPY\x01\x00\xff\xff"):
        content = (folder / NAMES[0]).read_bytes()
        (folder / NAMES[0]).write_bytes(damage + content[10:])
        assert f"{NAMES[0]} is damaged" in refusal(folder)


def test_checksums_are_compared_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    digest = shards.sha256_of

    def counted(file: Path) -> str:
        calls.append(file)
        return digest(file)

    monkeypatch.setattr(shards, "sha256_of", counted)
    PreparedFolder(folder)  # a copy, whose times are others
    assert len(calls) == shards.file_count(shards.read_manifest(folder))
    PreparedFolder(folder)
    assert len(calls) == shards.file_count(shards.read_manifest(folder))


def test_a_folder_that_cannot_be_written_to_is_still_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, content: Any) -> None:
        raise shards.RunError("cannot write")

    (folder / ".verified.json").unlink()
    monkeypatch.setattr(shards, "write_json", refused)
    assert len(PreparedFolder(folder).stream("train")) > 0


def edited(folder: Path, change: Any) -> None:
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["tokenizer"].update(vocab_size=100),
        lambda m: m["splits"]["train"].update(tokens=1),
        lambda m: m["splits"]["train"]["shards"].pop(),
        lambda m: m.update(licence="anything goes"),
        lambda m: m.update(checksum="0" * 64),
    ],
)
def test_an_edited_manifest_is_refused(folder: Path, change: Any) -> None:
    edited(folder, change)
    assert "manifest.json: it was changed after it was written" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("splits"), "splits: Field required"),
        (lambda m: m.update(layout="circles"), "layout: "),
        (
            lambda m: m["splits"]["train"]["shards"][0].update(file="../../secret.npy"),
            "splits.train.shards.0.file: ",
        ),
        (lambda m: m["tokenizer"].update(files={"../x": "0" * 64}), "tokenizer.files."),
        (lambda m: m.update(format=99), "has format 99, this version reads 1"),
    ],
)
def test_an_impossible_manifest_is_refused(folder: Path, change: Any, message: str) -> None:
    edited(folder, change)
    assert message in refusal(folder)


def test_no_manifest_or_no_json(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1, "na')
    assert "manifest.json is not JSON" in refusal(folder)
    (folder / "manifest.json").write_text("[]")
    assert "manifest.json" in refusal(folder)
    assert "holds no manifest.json" in refusal(tmp_path / "nowhere")


def test_manifest_says_what_it_is(original: Path) -> None:
    manifest = shards.read_manifest(original)
    assert manifest.source == "numbers"
    assert manifest.choices == {"count": 12}
    assert manifest.tokenizer.name == "numbers"
    assert "torch" in manifest.versions
    for split in manifest.splits.values():
        assert sum(shard.tokens for shard in split.shards) == split.tokens
        assert sum(shard.documents for shard in split.shards) == split.documents
