"""Data sets by name: where files are looked for, what is fetched, and what is said offline."""

import errno
import gzip
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from whatwhere.lab.data import TextData, TokensData, hub, make_task, open_tokens, raw, textfiles
from whatwhere.lab.data.catalogue import CORPORA, make_corpus, origin
from whatwhere.lab.data.hub import HUB, HubTexts
from whatwhere.lab.data.prepare import PARTS, prepare
from whatwhere.lab.data.textfiles import TextFiles
from whatwhere.lab.reading import reading_of
from whatwhere.lab.recipes.schema import EvaluationSettings
from whatwhere.lab.storage import DiskFullError, RunError


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No data folder, and an empty cache."""
    monkeypatch.delenv("WHATWHERE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "whatwhere" / "raw"


def texts(corpus: Any) -> list[str]:
    found = [d for item in corpus.items() for d in corpus.documents(item)]
    return [document.tokens[:-1].tobytes().decode() for document in found]


def line(call: Any, *arguments: Any, kind: Any = ValueError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- offline -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jsb", "maestro", "genome", *HUB])
def test_offline_is_one_line_that_says_what_to_bring(name: str, nowhere: Path) -> None:
    def open_it() -> None:
        options = {"tokenizer": "bytes"} if name in HUB else {}
        list(make_corpus(name, **options).items())

    message = line(open_it)
    _, source = origin(name)
    assert message.startswith(f"{name} is not on this machine")
    assert source in message
    assert f"put it into {nowhere / name}, or name it with --from" in message


@pytest.mark.parametrize("name", ["text", "midi", "fasta"])
def test_data_of_the_users_own_must_be_named(name: str, nowhere: Path) -> None:
    message = line(make_corpus, name)
    assert message.startswith(f"{name}: name ")
    assert "--from" in message
    assert str(nowhere / name) in message


def test_unknown_names_and_options_are_refused(tmp_path: Path) -> None:
    assert "did you mean 'openwebtext'" in line(make_corpus, "openwebtxt")
    assert all(name in line(make_corpus, "?") for name in CORPORA)
    assert "max_bytes: jsb takes none" in line(make_corpus, "jsb", max_bytes=3)
    assert "tokenizer: genome takes none" in line(make_corpus, "genome", tokenizer="gpt2")
    assert "max_bytes must be at least 1" in line(make_corpus, "text", [tmp_path], max_bytes=0)
    assert "does not exist" in line(make_corpus, "jsb", [tmp_path / "nowhere.json"])


def test_every_data_set_has_an_origin() -> None:
    assert set(CORPORA) == set(HUB) | set(raw.RAW)
    for name in CORPORA:
        assert all(origin(name))


# --- finding -------------------------------------------------------------------------------------


def test_places_in_order(tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = tmp_path / "data" / "jsb", nowhere / "jsb"
    name = "jsb-chorales-16th.json"
    cache.mkdir(parents=True)
    (cache / name).touch()
    assert raw.find("jsb", ()) == [cache / name]
    data.mkdir(parents=True)
    monkeypatch.setenv("WHATWHERE_DATA", str(tmp_path / "data"))
    assert raw.find("jsb", ()) == [cache / name]
    (data / name).touch()
    assert raw.find("jsb", ()) == [data / name]
    named = tmp_path / "my.json"
    named.touch()
    assert raw.find("jsb", [named]) == [named]


def test_the_folder_of_samples(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHATWHERE_DATA", str(data_dir))
    assert raw.find("jsb", ()) == [data_dir / "jsb" / "jsb-chorales-16th.json"]
    assert raw.find("genome", ()) == [data_dir / "genome"]
    assert raw.find("maestro", ()) == [data_dir / "midi"]
    found = texts(make_corpus("text"))
    assert len(found) == len(list((data_dir / "books").glob("*.txt")))


@pytest.mark.parametrize("name", list(HUB))
@pytest.mark.parametrize("place", ["from", "data", "cache"])
def test_sets_of_the_hub_from_files(
    name: str, place: str, tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"from": tmp_path / "mine", "data": tmp_path / "d" / name, "cache": nowhere / name}[
        place
    ]
    folder.mkdir(parents=True)
    rows = [f"web page {i}" for i in range(30)]
    (folder / "part.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    monkeypatch.setenv("WHATWHERE_DATA", str(tmp_path / "d"))
    paths = [folder] if place == "from" else []
    corpus = make_corpus(name, paths, tokenizer="bytes")
    assert isinstance(corpus, TextFiles)
    assert (corpus.name, corpus.licence) == (name, HUB[name].licence)
    assert texts(corpus) == rows


def test_books_as_pg19_keep_its_splits(data_dir: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    books = sorted((data_dir / "books").glob("*.txt"))[:4]
    found = [book.read_text(encoding="utf-8-sig") for book in books]
    for split, part in (("train", found[:2]), ("validation", found[2:3]), ("test", found[3:])):
        pq.write_table(pa.table({"text": part}), tmp_path / f"{split}-00000-of-00001.parquet")
    folder = prepare(
        make_corpus("pg19", [tmp_path], tokenizer="bytes"), tmp_path / "out", workers=1
    )
    sizes = {name: split.documents for name, split in folder.manifest.splits.items()}
    assert sizes == {"train": 2, "validation": 1, "test": 1}
    stream = folder.stream("test")
    assert next(stream.blocks()).tobytes() == found[3].encode() + b"\0"


@pytest.mark.parametrize(
    "form", ["{}", "{}/*/*.txt", "{}/train {}/test", "{}/*/1.txt {}/test/2.txt"]
)
def test_a_folder_above_the_one_that_is_named_is_no_split(tmp_path: Path, form: str) -> None:
    root = tmp_path / "test" / "validation" / "books"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        for name in ("1.txt", "2.txt"):
            (root / split / name).write_text(f"{split} {name}")
    corpus = make_corpus("pg19", form.replace("{}", str(root)).split(), tokenizer="bytes")
    found = [d for item in corpus.items() for d in corpus.documents(item)]
    assert {d.split for d in found} == {"train", "test"}
    assert all(d.tokens.tobytes().decode().startswith(d.split) for d in found)


def test_files_beside_no_split_are_not_those_of_a_folder_above(tmp_path: Path) -> None:
    folder = tmp_path / "test" / "books"
    folder.mkdir(parents=True)
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"book {i}")
    corpus = make_corpus("pg19", [folder], tokenizer="bytes")
    splits = {d.split for item in corpus.items() for d in corpus.documents(item)}
    assert splits == {"train", "validation"}


def books_of(folder: Path, *splits: str) -> Path:
    for split in splits:
        (folder / split).mkdir(parents=True)
        (folder / split / "book.txt").write_text(f"{split} " * 300)
    return folder


def test_one_split_alone(tmp_path: Path) -> None:
    alone = books_of(tmp_path / "alone", "test")
    data = TokensData(
        dataset="pg19", paths=(str(alone),), tokenizer="bytes", length=64, only="test"
    )
    task = open_tokens(data)
    assert task.splits == ("test",)
    text = bytes(task.windows(64, 1, "test")[0].tolist())
    assert text in b"test " * 300
    with pytest.raises(ValueError, match="nothing to train on"):
        task.train_batch(0, 0, 1)
    with pytest.raises(ValueError, match="no training document"):
        open_tokens(data.model_copy(update={"only": None}))
    whole = books_of(tmp_path / "whole", "train", "validation", "test")
    corpora = [
        make_corpus("pg19", [whole], tokenizer="bytes", only=only)  # type: ignore[arg-type]
        for only in (None, "train", "validation", "test")
    ]
    assert len({corpus.fingerprint() for corpus in corpora}) == 4
    folder = prepare(corpora[-1], tmp_path / "out", 1)
    assert set(folder.manifest.splits) == {"test"}
    assert "no validation split" in line(make_corpus, "fineweb", only="validation")
    assert "holds no test split" in line(
        open_tokens, data.model_copy(update={"paths": (str(books_of(tmp_path / "t", "train")),)})
    )


def test_a_reading_wants_the_test_books_alone(tmp_path: Path) -> None:
    settings = EvaluationSettings(
        dataset="pg19", paths=(str(books_of(tmp_path / "pg19", "test")),), lengths=(32,)
    )
    (tmp_path / "own.txt").write_text("words and words " * 300)
    task = make_task(TextData(paths=(str(tmp_path / "own.txt"),), length=32))
    reading = reading_of(settings, task)
    assert reading is not None and reading.describe()["split"] == "test"
    assert bytes(reading.windows(64, 1)[0].tolist()) in b"test " * 300


# --- fetching ------------------------------------------------------------------------------------


def test_fetched_once_and_whole(
    tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pooch

    monkeypatch.delenv("HF_HUB_OFFLINE")
    calls = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path, **options: Any) -> None:
        calls.append((url, known_hash))
        (path / fname).write_text("music")
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(KeyboardInterrupt):
        raw.find("jsb", ())
    assert {file.name for file in (nowhere / "jsb").iterdir()} <= {".lock"}
    (nowhere / "jsb" / ".DS_Store").touch()  # of a file browser
    for _ in range(2):
        (file,) = raw.find("jsb", ())
        assert file.read_text() == "music"
    assert calls == [(raw.RAW["jsb"].url, raw.RAW["jsb"].checksum)] * 2


def test_two_that_fetch_at_once_fetch_once(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pooch

    monkeypatch.delenv("HF_HUB_OFFLINE")
    begun, go_on, calls = threading.Event(), threading.Event(), []

    def retrieve(url: str, known_hash: str, fname: str, path: Path, **options: Any) -> None:
        calls.append(url)
        begun.set()
        assert go_on.wait(10)
        (path / fname).write_text("music")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(raw.find, "jsb", ())
        assert begun.wait(10)
        second = pool.submit(raw.find, "jsb", ())
        time.sleep(0.1)
        go_on.set()
        assert first.result(10) == second.result(10) == [nowhere / "jsb" / raw.RAW["jsb"].file]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("SHA256 hash of downloaded file\nis wrong"), ValueError, "SHA256 hash of"),
        (OSError("Name or service not known"), ValueError, "Name or service not known"),
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError, "no space left"),
    ],
)
def test_failed_downloads_are_one_line(
    error: Exception, kind: Any, message: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pooch

    def fails(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(pooch, "retrieve", fails)
    assert message in line(raw.find, "jsb", (), kind=kind)
    assert {file.name for file in (nowhere / "jsb").iterdir()} <= {".lock"}


def test_the_checksum_of_the_chorales_is_that_of_the_sample(data_dir: Path) -> None:
    import pooch

    file = data_dir / "jsb" / "jsb-chorales-16th.json"
    assert pooch.file_hash(str(file)) == raw.RAW["jsb"].checksum


# --- streams of the hub --------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Three Parquet files in place of each split of any set of the hub."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [[f"{i}: page {j} of the web" for j in range(40)] + [""] for i in range(3)]
    files = []
    for i, part in enumerate(parts):
        files.append(str(tmp_path / f"served-{i}.parquet"))
        pq.write_table(pa.table({"url": part, "text": part}), files[-1])
    load = datasets.load_dataset

    def local(path: str, *arguments: Any, **options: Any) -> Any:
        if path == "text":
            return load(path, *arguments, **options)
        assert options.pop("revision")
        return load("parquet", data_files=files, split="train", streaming=options["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return [[text for text in part if text] for part in parts]


def test_a_stream_is_every_document_in_order(served: list[list[str]], tmp_path: Path) -> None:
    corpus = make_corpus("openwebtext", tokenizer="bytes")
    assert isinstance(corpus, HubTexts)
    assert [item.key for item in corpus.items()] == ["train:0", "train:1", "train:2"]
    by_item = [
        [d.tokens[:-1].tobytes().decode() for d in corpus.documents(item)]
        for item in corpus.items()
    ]
    assert by_item == served
    folder = prepare(corpus, tmp_path / "out", workers=1)
    assert folder.manifest.left_out == {"empty documents": 3}
    assert folder.manifest.choices["revision"] == HUB["openwebtext"].revision


def test_splits_of_a_stream(served: list[list[str]]) -> None:
    corpus = make_corpus("pg19", tokenizer="bytes")
    splits = [d.split for item in corpus.items() for d in corpus.documents(item)]
    assert splits == ["train"] * 120 + ["validation"] * 120 + ["test"] * 120


def test_max_bytes_of_a_stream(served: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "LEAST_SHARE", 100)
    found = texts(make_corpus("fineweb", tokenizer="bytes", max_bytes=330))
    assert sum(map(len, found)) == 330
    assert {text[:2] for text in found} == {"0:", "1:", "2:"}
    # Splits of its own are whole.
    corpus = make_corpus("pg19", tokenizer="bytes", max_bytes=110)
    splits = [d.split for item in corpus.items() for d in corpus.documents(item)]
    assert splits.count("validation") == splits.count("test") == 120
    assert 0 < splits.count("train") < 120


def test_lists_of_addresses(
    served: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [["one", "two"], ["three"]]
    files = []
    for i, part in enumerate(rows):
        content = "".join(json.dumps({"text": t, "meta": [i, t]}) + "\n" for t in part).encode()
        files.append(tmp_path / f"{i}.json.gz")
        files[-1].write_bytes(gzip.compress(content))
    (tmp_path / "list").write_text("\n".join(map(str, files)) + "\n")
    import huggingface_hub

    asked = []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append((arguments, options["revision"]))
        return str(tmp_path / "list")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert texts(make_corpus("dolma", tokenizer="bytes")) == ["one", "two", "three"]
    assert asked == [(("allenai/dolma", "urls/v1_7.txt"), HUB["dolma"].revision)]
    files[1].write_bytes(gzip.compress(b'{"text": "thr'))
    message = line(texts, make_corpus("dolma", tokenizer="bytes"))
    assert "1.json.gz, line 1: no JSON, perhaps cut short" in message


@pytest.mark.parametrize("kind", [ConnectionError, ValueError])
def test_a_network_that_fails_is_one_line(
    kind: Any,
    served: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nowhere: Path,
) -> None:
    corpus = make_corpus("openwebtext", tokenizer="bytes")
    stream = HubTexts._stream
    broken = True

    class Rows:
        num_shards = 3

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def shard(self, num_shards: int, index: int) -> Any:
            part = self.inner.shard(num_shards=num_shards, index=index)
            if index == 1 and broken:
                raise kind("reset by peer\nand more")
            return part

    monkeypatch.setattr(HubTexts, "_stream", lambda self, split: Rows(stream(self, split)))
    message = line(prepare, corpus, tmp_path / "out", 1, kind=RunError)
    assert message == (
        "openwebtext: reading train:1 failed (reset by peer): run the same command again to go on"
    )
    assert (tmp_path / "out" / PARTS / "00000000.json").exists()
    broken = False
    assert prepare(corpus, tmp_path / "out", 1).manifest.splits["train"].documents > 100

    def unreachable(self: Any, split: str) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HubTexts, "_stream", unreachable)
    message = line(lambda: list(corpus.items()))
    assert "could not be fetched (no route to host)" in message
    assert str(nowhere / "openwebtext") in message


def test_one_split_of_a_stream(served: list[list[str]]) -> None:
    corpus = make_corpus("pg19", tokenizer="bytes", only="test")
    assert {item.key.partition(":")[0] for item in corpus.items()} == {"test"}
    assert corpus.fingerprint() != make_corpus("pg19", tokenizer="bytes").fingerprint()


def test_fingerprints_of_streams(served: list[list[str]]) -> None:
    made = {
        make_corpus(name, tokenizer="bytes", max_bytes=size).fingerprint()
        for name in HUB
        for size in (None, 100)
    }
    assert len(made) == 2 * len(HUB)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    message = line(lambda: list(make_corpus("text", [tmp_path / "a.parquet"]).items()))
    assert "pip install 'whatwhere[data]'" in message
    assert hub.__doc__
