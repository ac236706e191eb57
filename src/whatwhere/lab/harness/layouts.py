"""Benchmarks in local files: where each lies below the data folder, and its items as documents.

A reader gives what the harness's own task expects from the hub: the same field names under the
same names of splits. Counts are those of the published files; another count is refused.
"""

from __future__ import annotations

import bz2
import json
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whatwhere.lab.harness import cbt
from whatwhere.lab.harness.files import (
    Item,
    checked,
    counted,
    decode,
    json_lines,
    read_text,
)

HELLASWAG_NOTE = (
    "not number-comparable: in this text file the second half of a context does not begin with a "
    "capital letter, as the harness makes it do"
)
CBT_FORMAT_NOTE = "not the CBT: items in its format, made from other books"


@dataclass(frozen=True)
class Local:
    """The documents of one task from local files.

    Attributes:
        splits: Documents by the name of the split.
        files: Where they come from.
        note: What keeps its numbers from being compared, if anything.
    """

    splits: dict[str, list[Item]]
    files: tuple[Path, ...]
    note: str = ""


@dataclass(frozen=True)
class Layout:
    """How a task is read from the data folder.

    Attributes:
        files: What it wants there, for messages.
        read: The reader.
    """

    files: str
    read: Callable[[Path], Local]


class MissingDataError(ValueError):
    """The data folder does not hold what a task needs."""


def find(task: str) -> Layout | None:
    """The layout of a task of the harness by its name; `None` if only the hub has it."""
    if task.startswith("blimp_"):
        paradigm = task.removeprefix("blimp_")
        return Layout(
            f"blimp/BLiMP.zip or blimp/{paradigm}.jsonl", lambda data: _blimp(data, paradigm)
        )
    return LAYOUTS.get(task)


def wanted(task: str) -> str | None:
    """The files that a task or group wants in the data folder; `None` if only the hub has it."""
    layout = find(task)
    return layout.files if layout else GROUP_FILES.get(task)


def first(data: Path, names: Iterable[str]) -> Path:
    """The first of the files that is there.

    Raises:
        MissingDataError: If none is; all are named.
    """
    names = list(names)
    for name in names:
        if (data / name).is_file():
            return data / name
    raise MissingDataError(f"{data} holds no {' nor '.join(names)}")


def _lambada(data: Path) -> Local:
    path = first(data, ["lambada/lambada_test.jsonl"])
    items = counted(json_lines(read_text(path), path, ["text"]), 5153, path)
    for number, item in enumerate(items, 1):
        if " " not in item["text"].strip():
            raise ValueError(f"{path}, item {number}: one word has no context")
    return Local({"test": [{"text": item["text"]} for item in items]}, (path,))


def _piqa(data: Path) -> Local:
    files: list[Path] = []
    splits: dict[str, list[Item]] = {}
    for split, stem, count in (("validation", "valid", 1838), ("train", "train", 16113)):
        if split == "train" and not (data / "piqa" / "train.jsonl").is_file():
            continue
        path = first(data, [f"piqa/{stem}.jsonl"])
        labels = first(data, [f"piqa/{stem}-labels.lst"])
        items = json_lines(read_text(path), path, ["goal", "sol1", "sol2"])
        marks = _labels(labels)
        if len(marks) != len(items):
            raise ValueError(f"{labels}: {len(marks):,} labels for {len(items):,} items of {path}")
        fields = ("goal", "sol1", "sol2")
        splits[split] = [
            {**{field: item[field] for field in fields}, "label": mark}
            for item, mark in zip(counted(items, count, path), marks, strict=True)
        ]
        files += [path, labels]
    return Local(splits, tuple(files))


def _labels(path: Path) -> list[int]:
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip() not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: expected 0 or 1, got {line.strip()!r}")
        found.append(int(line))
    return found


def _arc_easy(data: Path) -> Local:
    files: list[Path] = []
    splits: dict[str, list[Item]] = {}
    for split, count in (("test", 2376), ("validation", 570), ("train", 2251)):
        name = f"arc/arc_easy_{split}.json"
        if split != "test" and not (data / name).is_file():
            continue
        path = first(data, [name])
        try:
            items = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
        if not isinstance(items, list):
            raise ValueError(f"{path}: expected a list of questions")
        read = [_arc_item(item, f"{path}, item {n}") for n, item in enumerate(items, 1)]
        splits[split] = counted(read, count, path)
        files.append(path)
    return Local(splits, tuple(files))


def _arc_item(item: Any, place: str) -> Item:
    checked(item, place, ["question", "answerKey"])
    choices = item.get("choices")
    texts, labels = (
        (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (None, None)
    )
    if not (isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels)):
        raise ValueError(f"{place}: choices need as many texts as labels")
    if item["answerKey"] not in labels:
        raise ValueError(f"{place}: the answer {item['answerKey']!r} is none of {labels}")
    return {key: item.get(key, "") for key in ("id", "question", "choices", "answerKey")}


def _hellaswag(data: Path) -> Local:
    names = ["hellaswag_val.jsonl", "hellaswag_val_full.txt", "hellaswag_val_full.txt.bz2"]
    path = first(data, [f"hellaswag/{name}" for name in names])
    if path.suffix == ".jsonl":
        items = json_lines(read_text(path), path, ["activity_label", "ctx_a"])
        docs = [_hellaswag_item(item, f"{path}, item {n}") for n, item in enumerate(items, 1)]
        return Local({"validation": counted(docs, 10042, path)}, (path,))
    content = path.read_bytes()
    if path.suffix == ".bz2":
        try:
            content = bz2.decompress(content)
        except (OSError, ValueError):
            raise ValueError(
                f"{path} is damaged or cut short: it cannot be decompressed"
            ) from None
    docs = _hellaswag_text(decode(content, path), path)
    return Local({"validation": counted(docs, 10042, path)}, (path,), HELLASWAG_NOTE)


def _hellaswag_item(item: Item, place: str) -> Item:
    endings, label = item.get("endings"), item.get("label")
    if not isinstance(endings, list) or len(endings) != 4:
        raise ValueError(f"{place}: expected four endings")
    if str(label) not in ("0", "1", "2", "3"):
        raise ValueError(f"{place}: expected a label from 0 to 3, got {label!r}")
    fields = ("activity_label", "ctx_a", "ctx_b")
    return {**{f: item.get(f) or "" for f in fields}, "endings": endings, "label": str(label)}


def _hellaswag_text(text: str, path: Path) -> list[Item]:
    """Six lines an item: `activity: context`, the answer's number, four endings."""
    lines = text.removesuffix("\n").split("\n")
    docs = []
    for start in range(0, len(lines), 6):
        group, place = lines[start : start + 6], f"{path}, line {start + 1}"
        if len(group) < 6:
            raise ValueError(f"{place}: the last item has {len(group)} of 6 lines")
        activity, colon, context = group[0].partition(": ")
        if not colon:
            raise ValueError(f"{place}: expected 'activity: context'")
        item = {"activity_label": activity, "ctx_a": context, "ctx_b": ""}
        docs.append(_hellaswag_item({**item, "label": group[1], "endings": group[2:]}, place))
    return docs


def _blimp(data: Path, paradigm: str) -> Local:
    name = f"{paradigm}.jsonl"
    unpacked = [data / "blimp" / name, data / "blimp" / "data" / name]
    path = next((file for file in unpacked if file.is_file()), data / "blimp" / "BLiMP.zip")
    place = f"{path}: {name}" if path.suffix == ".zip" else str(path)
    text = _member(path, name) if path.suffix == ".zip" else read_text(path)
    items = json_lines(text, place, ["sentence_good", "sentence_bad", "UID"])
    for number, item in enumerate(items, 1):
        if item["UID"] != paradigm:
            raise ValueError(f"{place}, item {number}: is of {item['UID']!r}, not {paradigm!r}")
    kept = ("sentence_good", "sentence_bad", "UID")
    docs = [{key: item[key] for key in kept} for item in counted(items, 1000, place)]
    return Local({"train": docs}, (path,))


def _member(archive: Path, name: str) -> str:
    if not archive.is_file():
        folder = archive.parent
        raise MissingDataError(
            f"{folder.parent} holds neither blimp/BLiMP.zip nor blimp/{name} nor blimp/data/{name}"
        )
    try:
        with zipfile.ZipFile(archive) as file:
            return decode(file.read(f"data/{name}"), f"{archive}: {name}")
    except KeyError:
        raise MissingDataError(f"{archive} holds no data/{name}") from None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{archive} is damaged or cut short: {error}") from None


def _cbt(data: Path, part: str) -> Local:
    name = f"cbtest_{part}_test_2500ex.txt"
    try:
        path = first(data, [f"cbt/{name}", f"cbt/data/{name}", f"cbt/CBTest/data/{name}"])
    except MissingDataError as error:
        hint = ""
        if (data / "cbt_format").is_dir():
            hint = "; its cbt_format/ is not the CBT: for those items run the task cbt_format"
        raise MissingDataError(f"{error}{hint}") from None
    return Local(
        {"test": counted(cbt.parse(read_text(path), path), cbt.TEST_ITEMS, path)}, (path,)
    )


def _cbt_format(data: Path) -> Local:
    folder = data / "cbt_format"
    files = sorted(folder.glob("*.jsonl")) or sorted(folder.glob("*.txt"))
    docs: list[Item] = []
    for path in files:
        text = read_text(path)
        if path.suffix == ".txt":
            docs += cbt.parse(text, path)
            continue
        items = json_lines(text, path, ["question", "answer"])
        docs += [cbt.check_item(item, f"{path}, item {n}") for n, item in enumerate(items, 1)]
    if not docs:
        raise MissingDataError(f"{data} holds no cbt_format/*.jsonl nor cbt_format/*.txt")
    return Local({"test": docs}, tuple(files), CBT_FORMAT_NOTE)


LAYOUTS: dict[str, Layout] = {
    "lambada_openai": Layout("lambada/lambada_test.jsonl", _lambada),
    "piqa": Layout("piqa/valid.jsonl and piqa/valid-labels.lst", _piqa),
    "arc_easy": Layout("arc/arc_easy_test.json", _arc_easy),
    "hellaswag": Layout(
        "hellaswag/hellaswag_val.jsonl or hellaswag/hellaswag_val_full.txt.bz2", _hellaswag
    ),
    "cbt_ne": Layout("cbt/cbtest_NE_test_2500ex.txt", lambda data: _cbt(data, "NE")),
    "cbt_cn": Layout("cbt/cbtest_CN_test_2500ex.txt", lambda data: _cbt(data, "CN")),
    "cbt_format": Layout("cbt_format/*.jsonl", _cbt_format),
}

GROUP_FILES = {
    "blimp": "blimp/BLiMP.zip",
    "cbt": "cbt/cbtest_NE_test_2500ex.txt and cbt/cbtest_CN_test_2500ex.txt",
}
