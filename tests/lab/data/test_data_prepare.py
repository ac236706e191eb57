"""Preparation: the same bytes however it is done; nothing is lost or corrupted when it fails."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpus import Numbers, contents, expected, records

from whatwhere.lab import storage
from whatwhere.lab.data import prepare as module
from whatwhere.lab.data.corpus import Item
from whatwhere.lab.data.prepare import PARTS, ArrayFile, prepare
from whatwhere.lab.data.shards import PreparedFolder
from whatwhere.lab.storage import DiskFullError, RunError

HERE = Path(__file__).parent


def made(corpus: Numbers, folder: Path, **options: Any) -> dict[str, bytes]:
    prepare(corpus, folder, **{"workers": 1, **options})
    return contents(folder)


@pytest.mark.parametrize("shard_tokens", [1, 200, 10**9])
def test_documents_end_to_end_are_the_shards(tmp_path: Path, shard_tokens: int) -> None:
    corpus = Numbers()
    folder = prepare(corpus, tmp_path / "out", workers=1, shard_tokens=shard_tokens)
    for split in ("train", "validation", "test"):
        documents = expected(corpus, split)
        stream = folder.stream(split)
        blocks = list(stream.blocks())
        assert np.array_equal(np.concatenate(blocks), np.concatenate(documents))
        assert all(block.dtype == np.uint16 for block in blocks)
        assert len(stream) == sum(map(len, documents))
        assert np.array_equal(np.diff(stream.bounds), list(map(len, documents)))
        record = folder.manifest.splits[split]
        assert (record.documents, record.tokens) == (len(documents), len(stream))
    counts = [len(split.shards) for split in folder.manifest.splits.values()]
    assert (max(counts) == 1) == (shard_tokens == 10**9)
    assert folder.manifest.left_out == {"empty documents": corpus.count}
    assert not (tmp_path / "out" / PARTS).exists()


def test_the_smallest_dtype_is_used(tmp_path: Path) -> None:
    for vocab_size, dtype in ((256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")):
        place = tmp_path / str(vocab_size)
        folder = prepare(Numbers(vocab_size=vocab_size, items=2), place, workers=1)
        assert next(folder.stream("train").blocks()).dtype == np.dtype(dtype)


def test_two_workers_make_what_one_makes(tmp_path: Path) -> None:
    one = made(Numbers(), tmp_path / "one", shard_tokens=300)
    two = made(Numbers(), tmp_path / "two", shard_tokens=300, workers=2)
    assert one == two
    manifests = [PreparedFolder(tmp_path / name).manifest for name in ("one", "two")]
    apart = {"created", "checksum"}
    assert manifests[0].model_dump(exclude=apart) == manifests[1].model_dump(exclude=apart)


def test_killed_and_resumed_makes_the_same_bytes(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from pathlib import Path; from small_corpus import Numbers\n"
        "from whatwhere.lab.data.prepare import prepare\n"
        # Without a guard, as in a notebook: workers do not run the script again.
        "prepare(Numbers(pause=0.2), Path(sys.argv[1]), workers=2, shard_tokens=300)\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.DEVNULL)
    while records(out) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    finished = records(out)
    assert 3 <= finished < 12
    time.sleep(0.5)  # Workers end with the process that started them.
    finished = records(out)
    again = Numbers()
    resumed = made(again, out, shard_tokens=300)
    assert len(again.read) == 12 - finished
    assert resumed == made(Numbers(), tmp_path / "whole", shard_tokens=300)


@pytest.mark.parametrize("shards_before", [0, 1, 2])
def test_stopped_while_shards_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards_before: int
) -> None:
    join = module._join
    calls = []

    def stopped(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > shards_before:
            raise KeyboardInterrupt
        return join(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_join", stopped)
        with pytest.raises(KeyboardInterrupt):
            made(Numbers(), tmp_path / "out", shard_tokens=300)
    again = Numbers()
    resumed = made(again, tmp_path / "out", shard_tokens=300)
    assert again.read == []
    assert resumed == made(Numbers(), tmp_path / "whole", shard_tokens=300)


def test_prepared_before_is_opened_as_it_is(tmp_path: Path) -> None:
    made(Numbers(), tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    again = Numbers()
    prepare(again, tmp_path / "out", workers=1)
    assert again.read == []
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}


def test_another_source_is_refused(tmp_path: Path) -> None:
    made(Numbers(), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="prepared from another source") as caught:
        prepare(Numbers(items=3), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == before


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        prepare(Numbers(), tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        prepare(Numbers(), tmp_path / "thesis.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_item_is_one_line_and_leaves_no_manifest(tmp_path: Path, workers: int) -> None:
    with pytest.raises(ValueError, match=r"^item 5 is damaged$"):
        prepare(Numbers(broken=5), tmp_path / "out", workers=workers)
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {".lock", PARTS}
    finished = records(out)
    again = Numbers()
    again.broken = 5
    with pytest.raises(ValueError, match="item 5"):
        prepare(again, out, workers=1)
    assert len(again.read) == 1 if workers == 1 else len(again.read) <= 12 - finished
    # Once it is mended, which changes its fingerprint, the same folder will do.
    assert made(Numbers(items=13), out) == made(Numbers(items=13), tmp_path / "whole")
    assert not (out / PARTS).exists()


class Turned(Numbers):
    """The same items from the last to the first, with a fingerprint that does not say so."""

    def items(self) -> Any:
        return reversed(list(super().items()))


@pytest.mark.parametrize("joined", [False, True])
def test_a_part_of_another_item_is_not_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if joined:
            patch.setattr(module, "_manifest", fails)
        with pytest.raises((ValueError, KeyboardInterrupt)):
            prepare(Numbers(broken=None if joined else 5), out, workers=1, shard_tokens=300)
    turned = made(Turned(), out, shard_tokens=10**9)
    assert turned == made(Turned(), tmp_path / "whole", shard_tokens=10**9)


def fails(*arguments: Any) -> Any:
    raise KeyboardInterrupt


def test_without_a_training_document_nothing_is_joined(tmp_path: Path) -> None:
    class Held(Numbers):
        def document(self, item: int, number: int) -> Any:
            return dataclasses.replace(super().document(item, number), split="test")

    with pytest.raises(ValueError, match="gives no training document"):
        prepare(Held(), tmp_path / "out", workers=1)
    assert not list((tmp_path / "out").glob("*.npy"))
    made(Numbers(items=13), tmp_path / "out")


def test_a_worker_that_is_killed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="a worker was killed") as caught:
        prepare(Suicidal(), tmp_path / "out", workers=2)
    assert "\n" not in str(caught.value)
    assert made(Numbers(), tmp_path / "out") == made(Numbers(), tmp_path / "whole")


class Suicidal(Numbers):
    """A worker that reads item 7 dies."""

    def documents(self, item: Item) -> Any:
        if item.payload == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().documents(item)


def test_a_full_disk_is_one_line_and_costs_nothing_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ArrayFile.append
    calls = []

    def full(self: ArrayFile, values: Any) -> None:
        calls.append(values)
        if len(calls) > 20:
            self._file.write(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, values)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ArrayFile, "append", full)
        with pytest.raises(DiskFullError, match="no space left") as caught:
            prepare(Numbers(), out, workers=1)
    assert "\n" not in str(caught.value)
    assert not list(out.rglob("*.partial"))
    finished = records(out)
    assert finished > 0
    again = Numbers()
    assert made(again, out) == made(Numbers(), tmp_path / "whole")
    assert len(again.read) == 12 - finished


def test_two_preparations_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with storage.lock(out):
        with pytest.raises(RunError, match=r"another process is working in .*out"):
            prepare(Numbers(), out, workers=1)
        waiting = threading.Thread(target=prepare, args=(Numbers(), out, 1), kwargs={"wait": True})
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert not list(out.glob("*.npy"))
    waiting.join(20)
    assert contents(out) == made(Numbers(), tmp_path / "whole")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([300, 1], r"document 'bad' has the id 300; ids below 300"), ([], "has no token")],
)
def test_impossible_documents_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: list[int], message: str
) -> None:
    bad = Numbers().document(1, 1)
    wrong = type(bad)("train", np.array(tokens, dtype=np.uint32), "bad")
    monkeypatch.setattr(Numbers, "documents", lambda self, item: iter([wrong]))
    with pytest.raises(ValueError, match=message):
        prepare(Numbers(), tmp_path / "out", workers=1)


def test_repeated_or_no_items_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for items, message in (([], "holds nothing"), ([Item("a"), Item("a")], "'a' comes 2 times")):
        monkeypatch.setattr(Numbers, "items", lambda self, items=items: iter(items))
        with pytest.raises(ValueError, match=message):
            prepare(Numbers(), tmp_path / "out", workers=1)
        assert not (tmp_path / "out").exists()


def test_no_training_document_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = Numbers().document(0, 0)
    assert only.split == "validation"
    monkeypatch.setattr(Numbers, "documents", lambda self, item: iter([only]))
    with pytest.raises(ValueError, match="no training document"):
        prepare(Numbers(), tmp_path / "out", workers=1)


def test_array_file_is_numpys(tmp_path: Path) -> None:
    for count in (0, 1, 10**5):
        with ArrayFile(tmp_path / "a.npy", np.dtype("<u2")) as file:
            for part in np.array_split(np.arange(count) % 2**16, 3):
                file.append(part)
        found = np.load(tmp_path / "a.npy", allow_pickle=False)
        assert found.dtype == np.uint16
        assert np.array_equal(found, np.arange(count) % 2**16)
    with pytest.raises(KeyError), ArrayFile(tmp_path / "b.npy", np.dtype("<u2")) as file:
        raise KeyError
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]
