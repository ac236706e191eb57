from __future__ import annotations

import bz2
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")

from whatwhere.lab.harness.catalog import Catalog  # noqa: E402
from whatwhere.lab.harness.layouts import HELLASWAG_NOTE, find  # noqa: E402


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog()


def documents(catalog: Catalog, name: str, data: Path) -> tuple[Any, list[dict[str, Any]]]:
    task: Any = catalog.prepare(name, data).item
    return task, list(task.eval_docs)


def test_lambada_is_the_passage_and_its_last_word(catalog: Catalog, data_dir: Path) -> None:
    task, docs = documents(catalog, "lambada_openai", data_dir)
    lines = (data_dir / "lambada" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(docs) == 5153
    for doc, line in zip(docs[:50], lines[:50], strict=True):
        text = json.loads(line)["text"]
        assert task.doc_to_text(doc) + task.doc_to_target(doc) == text
        assert task.doc_to_target(doc) == " " + text.rpartition(" ")[2]
    assert task.VERSION == 1.0


def test_piqa_has_question_solutions_and_label(catalog: Catalog, data_dir: Path) -> None:
    task, docs = documents(catalog, "piqa", data_dir)
    lines = (data_dir / "piqa" / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    labels = (data_dir / "piqa" / "valid-labels.lst").read_text().split()
    assert len(docs) == 1838
    for doc, line, label in list(zip(docs, lines, labels, strict=True))[::9]:
        item = json.loads(line)
        assert task.doc_to_text(doc) == f"Question: {item['goal']}\nAnswer:"
        assert task.doc_to_choice(doc) == [item["sol1"], item["sol2"]]
        assert task.doc_to_target(doc) == int(label)


def test_arc_easy_has_the_answer_of_its_key(catalog: Catalog, data_dir: Path) -> None:
    task, docs = documents(catalog, "arc_easy", data_dir)
    items = json.loads((data_dir / "arc" / "arc_easy_test.json").read_text(encoding="utf-8"))
    assert len(docs) == 2376
    for doc, item in list(zip(docs, items, strict=True))[::9]:
        assert task.doc_to_text(doc) == f"Question: {item['question']}\nAnswer:"
        right = item["choices"]["label"].index(item["answerKey"])
        assert task.doc_to_target(doc) == right
        assert task.doc_to_choice(doc) == item["choices"]["text"]
    assert len(task.dataset["train"]) == 2251 and len(task.dataset["validation"]) == 570


def hellaswag_of_the_harness(docs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Documents as the stock task shows them to a model."""
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs

    return list(process_docs(Dataset.from_list(docs)))


def test_hellaswag_text_passes_the_harness_unchanged(data_dir: Path) -> None:
    layout = find("hellaswag")
    assert layout
    local = layout.read(data_dir)
    assert local.note == HELLASWAG_NOTE
    assert len(local.splits["validation"]) == 10042
    content = bz2.decompress((data_dir / "hellaswag" / "hellaswag_val_full.txt.bz2").read_bytes())
    lines = content.decode().split("\n")
    shown = hellaswag_of_the_harness(local.splits["validation"][:1000])
    for number, doc in enumerate(shown):
        context, label, *endings = lines[6 * number : 6 * number + 6]
        # The harness's cleaning was done when the file was made; again it may join double spaces.
        assert doc["query"] == context.strip().replace("  ", " ")
        assert doc["choices"] == [ending.strip().replace("  ", " ") for ending in endings]
        assert doc["gold"] == int(label)


def test_hellaswag_of_its_own_file_has_a_capital_letter(tmp_path: Path) -> None:
    item: dict[str, Any] = {"activity_label": "Sailing", "ctx_a": "A boat sails."}
    item |= {"ctx_b": "the boat", "endings": ["sinks.", "flies.", "sings.", "halts."], "label": 2}
    (tmp_path / "hellaswag").mkdir()
    path = tmp_path / "hellaswag" / "hellaswag_val.jsonl"
    path.write_text((json.dumps(item) + "\n") * 10042, encoding="utf-8")
    layout = find("hellaswag")
    assert layout
    local = layout.read(tmp_path)
    (doc,) = hellaswag_of_the_harness(local.splits["validation"][:1])
    assert doc["query"] == "Sailing: A boat sails. The boat"
    assert doc["gold"] == 2 and not local.note


def test_blimp_is_all_67_paradigms_in_equal_parts(catalog: Catalog, data_dir: Path) -> None:
    group: Any = catalog.prepare("blimp", data_dir).item
    tasks = {task.task_name: task for task in group.get_all_tasks()}
    with zipfile.ZipFile(data_dir / "blimp" / "BLiMP.zip") as archive:
        names = [n for n in archive.namelist() if n.startswith("data/") and n.endswith(".jsonl")]
        assert {f"blimp_{Path(name).stem}" for name in names} == set(tasks)
        for name in names[::33]:
            task = tasks[f"blimp_{Path(name).stem}"]
            pairs = [json.loads(line) for line in archive.read(name).decode().splitlines()]
            for doc, pair in zip(task.eval_docs, pairs, strict=True):
                good, bad = pair["sentence_good"], pair["sentence_bad"]
                assert task.doc_to_choice(doc) == [good, bad]
                assert task.doc_to_target(doc) == 0 and task.doc_to_text(doc) == ""
    assert len(tasks) == 67
    (metric,) = group.aggregate_metric_list
    assert (metric.metric, metric.weight_by_size) == ("acc", False)


@pytest.mark.parametrize("place", ["blimp", "blimp/data"])
def test_blimp_may_be_unpacked(place: str, catalog: Catalog, tmp_path: Path) -> None:
    pair = {"sentence_good": "It is.", "sentence_bad": "It are.", "UID": "wh_island"}
    path = tmp_path / place / "wh_island.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text((json.dumps(pair) + "\n") * 1000)
    task, docs = documents(catalog, "blimp_wh_island", tmp_path)
    assert len(docs) == 1000 and task.doc_to_choice(docs[0]) == ["It is.", "It are."]
    with pytest.raises(
        ValueError, match=r"holds neither blimp/BLiMP.zip nor blimp/adjunct_island"
    ):
        catalog.prepare("blimp", tmp_path)


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _less(data: bytes) -> bytes:
    return data[: data.rstrip().rindex(b"\n") + 1]


DAMAGE: list[tuple[str, str, Callable[[bytes], bytes], str]] = [
    ("lambada_openai", "lambada/lambada_test.jsonl", _cut, r"jsonl, line \d+: not JSON"),
    ("lambada_openai", "lambada/lambada_test.jsonl", _less, "5,152 items where .* 5,153"),
    ("lambada_openai", "lambada/lambada_test.jsonl", lambda d: b"\xff" + d, "not UTF-8"),
    ("piqa", "piqa/valid.jsonl", _less, "1,838 labels for 1,837 items"),
    ("piqa", "piqa/valid-labels.lst", _less, "1,837 labels for 1,838 items"),
    ("piqa", "piqa/valid-labels.lst", lambda d: b"2" + d[1:], "lst, line 1: expected 0 or 1"),
    ("arc_easy", "arc/arc_easy_test.json", _cut, r"json, line \d+: not JSON"),
    ("arc_easy", "arc/arc_easy_test.json", lambda d: b"[]", "0 items where"),
    ("hellaswag", "hellaswag/hellaswag_val_full.txt.bz2", _cut, "damaged or cut short"),
    ("blimp_causative", "blimp/BLiMP.zip", _cut, "damaged or cut short"),
    ("blimp_wh_island", "blimp/wh_island.jsonl", _less, "999 items where"),
]


@pytest.mark.parametrize(("task", "file", "damage", "said"), DAMAGE)
def test_damaged_files_are_refused_by_name(
    task: str,
    file: str,
    damage: Callable[[bytes], bytes],
    said: str,
    data_dir: Path,
    tmp_path: Path,
) -> None:
    layout = find(task)
    assert layout
    for path in (data_dir / file).parent.iterdir():
        copy = tmp_path / path.relative_to(data_dir)
        copy.parent.mkdir(exist_ok=True)
        content = path.read_bytes()
        copy.write_bytes(damage(content) if path == data_dir / file else content)
    with pytest.raises(ValueError, match=said):
        layout.read(tmp_path)


@pytest.mark.parametrize(
    "task", ["lambada_openai", "piqa", "arc_easy", "hellaswag", "blimp", "cbt", "cbt_format"]
)
def test_missing_files_are_named(task: str, catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path.name} holds n"):
        catalog.prepare(task, tmp_path)
