"""How generated answers to needle questions are scored, and where the prompts lie.

This file stands beside the tasks that use it, so that the harness runs them by themselves. The
metrics are those of RULER (arXiv 2404.06654): the share of the answers, or whether any of them,
that stands in the generated text, whatever the case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load(**metadata: Any) -> dict[str, Any]:
    """Documents of a task, from the JSON Lines file beside this one that its metadata names."""
    import datasets

    path = Path(__file__).parent / metadata["needles"]["file"]
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {"test": datasets.Dataset.from_list(items)}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Scores of one generated text."""
    text = results[0].lower()
    found = [answer.lower() in text for answer in doc["outputs"]]
    return {"string_match_all": sum(found) / len(found), "string_match_part": float(any(found))}
