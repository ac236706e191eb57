"""The Children's Book Test (arXiv 1511.02301): 20 sentences, a question with a gap, 10 options.

The answer is the option that makes the gapped sentence likeliest from the gap to its end:
`log p(option + rest of the question | sentences + question up to the gap)`. The text is taken as
the files have it, with spaces around every token; the PoPE paper does not say whether it joined it
again.
"""

from __future__ import annotations

from typing import Any

from whatwhere.lab.harness.files import Item, checked

GAP = "XXXXX"
SENTENCES = 20
OPTIONS = 10
TEST_ITEMS = 2500


def doc_to_text(doc: dict[str, Any]) -> str:
    """Everything before the gap, without the space that precedes it."""
    return _passage(doc).partition(GAP)[0].rstrip()


def doc_to_choice(doc: dict[str, Any]) -> list[str]:
    """What follows `doc_to_text` for each option, to the end of the question."""
    before, _, after = _passage(doc).partition(GAP)
    space = before[len(before.rstrip()) :]
    return [space + option + after.replace(GAP, option) for option in doc["options"]]


def doc_to_target(doc: dict[str, Any]) -> int:
    """Index of the answer among the options."""
    return int(doc["options"].index(doc["answer"]))


def parse(text: str, name: object) -> list[Item]:
    r"""Items of a file in the test's own layout.

    Twenty lines `number sentence`, then `21 question\tanswer\t\toption|option|...`, then a blank
    line.

    Args:
        text: Of the file.
        name: Of the file, for errors.

    Returns:
        Items with `sentences`, `question`, `answer` and `options`.

    Raises:
        ValueError: If a line is out of order, or an item is not of that form.
    """
    items: list[Item] = []
    sentences: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        place = f"{name}, line {number}"
        if not line.strip():
            if sentences:
                raise ValueError(f"{place}: the item ends after {len(sentences)} sentences")
            continue
        index, _, content = line.partition(" ")
        if index != str(len(sentences) + 1):
            raise ValueError(
                f"{place}: expected sentence {len(sentences) + 1}, got {index[:20]!r}"
            )
        if len(sentences) < SENTENCES:
            sentences.append(content.strip())
            continue
        items.append(_question(content, sentences, place))
        sentences = []
    if sentences:
        raise ValueError(f"{name}: the last item ends after {len(sentences)} sentences")
    return items


def check_item(item: Item, place: str) -> Item:
    """The item, if it is one of the test's form.

    Raises:
        ValueError: If sentences, options, gap or answer are not as they should be.
    """
    checked(item, place, ("question", "answer"))
    sentences, options = item.get("sentences"), item.get("options")
    for name, values, count in (
        ("sentences", sentences, SENTENCES),
        ("options", options, OPTIONS),
    ):
        if not isinstance(values, list) or len(values) != count or not all(values):
            found = len(values) if isinstance(values, list) else "none"
            raise ValueError(f"{place}: expected {count} {name}, got {found}")
    if len(set(options or ())) != OPTIONS:
        raise ValueError(f"{place}: an option stands there twice")
    if item["answer"] not in (options or ()):
        raise ValueError(f"{place}: the answer {item['answer']!r} is none of the options")
    if GAP not in item["question"]:
        raise ValueError(f"{place}: the question has no gap ({GAP})")
    return {key: item[key] for key in ("sentences", "question", "answer", "options")}


def _question(content: str, sentences: list[str], place: str) -> Item:
    parts = content.split("\t")
    if len(parts) != 4:
        raise ValueError(f"{place}: expected question, answer, nothing and options between tabs")
    question, answer, _, options = (part.strip() for part in parts)
    item = {
        "sentences": sentences,
        "question": question,
        "answer": answer,
        "options": options.split("|"),
    }
    return check_item(item, place)


def _passage(doc: dict[str, Any]) -> str:
    return " ".join([*doc["sentences"], doc["question"]])
