from __future__ import annotations

import random
from pathlib import Path

import pytest
from harness_cases import cbt_item, cbt_text

from whatwhere.lab.harness import cbt
from whatwhere.lab.harness.layouts import MissingDataError, find


@pytest.mark.parametrize(
    "question",
    ["then XXXXX went home .", "XXXXX went home .", "she saw XXXXX", "to `` XXXXX '' and XXXXX ."],
)
def test_text_and_choice_are_the_passage_with_the_option_in_the_gap(question: str) -> None:
    item = cbt_item(random.Random(1)) | {"question": question}
    before = " ".join(item["sentences"])
    choices = cbt.doc_to_choice(item)
    for option, choice in zip(item["options"], choices, strict=True):
        whole = f"{before} {question.replace('XXXXX', option)}"
        assert cbt.doc_to_text(item) + choice == whole
        assert choice.startswith(f" {option}")
    assert cbt.doc_to_text(item) == cbt.doc_to_text(item).rstrip()
    assert item["options"][cbt.doc_to_target(item)] == item["answer"]


def test_a_gap_without_a_space_before_it_gets_none() -> None:
    item = cbt_item(random.Random(1)) | {"question": "the ``XXXXX'' ."}
    assert cbt.doc_to_text(item).endswith("the ``")
    assert cbt.doc_to_choice(item)[0] == f"{item['options'][0]}'' ."


def test_a_file_of_the_test_reads_back() -> None:
    draw = random.Random(2)
    items = [cbt_item(draw) for _ in range(3)]
    assert cbt.parse(cbt_text(items), "file") == items


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.replace("\n3 ", "\n4 ", 1), "line 3: expected sentence 3, got '4'"),
        (lambda t: t[: t.rindex("\n21 ")], "ends after 20 sentences"),
        (lambda t: t.replace("\n7 ", "\n\n7 ", 1), "line 7: the item ends after 6 sentences"),
        (lambda t: t.replace("|", "/", 1), "line 21: expected 10 options, got 9"),
        (lambda t: t.replace("XXXXX", "gap", 1), "line 21: the question has no gap"),
        (lambda t: t.replace("\t\t", "\t", 1), "line 21: expected question, answer"),
    ],
)
def test_a_damaged_file_is_refused_by_line(change: object, said: str) -> None:
    draw = random.Random(3)
    text = cbt_text([cbt_item(draw), cbt_item(draw)])
    with pytest.raises(ValueError, match=said):
        cbt.parse(change(text), "cbt.txt")  # type: ignore[operator]


def test_an_answer_that_is_no_option_and_double_options_are_refused() -> None:
    item = cbt_item(random.Random(4))
    with pytest.raises(ValueError, match="none of the options"):
        cbt.check_item(item | {"answer": "Nobody"}, "here")
    with pytest.raises(ValueError, match="twice"):
        cbt.check_item(item | {"options": [*item["options"][:9], item["options"][0]]}, "here")


def test_items_in_its_format_are_not_the_test(data_dir: Path) -> None:
    """jsonl and txt of the sample data are the same items; neither is taken for the CBT."""
    layout = find("cbt_format")
    assert layout
    local = layout.read(data_dir)
    assert "not the CBT" in local.note
    texts = sorted((data_dir / "cbt_format").glob("*.txt"))
    parsed = [i for path in texts for i in cbt.parse(path.read_text(encoding="utf-8"), path)]
    assert local.splits["test"] == parsed
    official = find("cbt_ne")
    assert official
    with pytest.raises(MissingDataError, match="is not the CBT"):
        official.read(data_dir)
