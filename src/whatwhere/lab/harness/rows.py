"""harness.csv: the results of an evaluation, a row for each task and metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from whatwhere.lab import storage
from whatwhere.lab.harness.record import TASK

NAME = "harness.csv"
COLUMNS = [
    *("task", "group", "metric", "filter", "value", "stderr", "items", "items_total"),
    *("num_fewshot", "limit", "version", "cut", "kind", "length", "note"),
]
"""Columns: `cut` counts the prompts of the whole evaluation that were longer than the model reads;
`kind` and `length` are those of needle tasks."""


def write(folder: Path) -> pd.DataFrame:
    """Write harness.csv from the results of all finished tasks of a folder."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob(f"*/{TASK}")):
        done = storage.read_json(path)
        for results in sorted(path.parent.rglob("results_*.json")):
            found += of_results(storage.read_json(results), done)
    # Counts stay whole numbers where some rows have none.
    frame = pd.DataFrame(found, columns=COLUMNS).convert_dtypes()
    storage.write_text(folder / NAME, frame.to_csv(index=False))
    return frame


def of_results(results: dict[str, Any], done: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one results file of the harness.

    Args:
        results: As the harness wrote it.
        done: Our record of the task.
    """
    parents = {
        child: group
        for group, children in results.get("group_subtasks", {}).items()
        for child in children
    }
    metrics = {**results["results"], **results.get("groups", {})}
    found = []
    for task, values in metrics.items():
        config = results.get("configs", {}).get(task, {})
        needles = (config.get("metadata") or {}).get("needles") or {}
        items, items_total = _counts(results, task)
        common = {
            "task": task,
            "group": parents.get(task, ""),
            "items": items,
            "items_total": items_total,
            "num_fewshot": results.get("n-shot", {}).get(task),
            "limit": results["config"]["limit"],
            "version": results.get("versions", {}).get(task),
            "cut": done["cut"],
            "kind": needles.get("kind", ""),
            "length": needles.get("length"),
            "note": done["notes"].get(task, ""),
        }
        for key, value in values.items():
            metric, comma, label = key.partition(",")
            # RULER writes -1 for lengths that were not measured.
            if not comma or metric.endswith("_stderr") or value == -1:
                continue
            error = values.get(f"{metric}_stderr,{label}")
            stderr = error if isinstance(error, (int, float)) else None
            found.append(
                {**common, "metric": metric, "filter": label, "value": value, "stderr": stderr}
            )
    return found


def _counts(results: dict[str, Any], task: str) -> tuple[int | None, int | None]:
    """Documents measured and there are; of a group those of its tasks."""
    counts = results.get("n-samples", {})
    members = results.get("group_subtasks", {}).get(task) or [task]
    known = [counts[member] for member in members if member in counts]
    if not known:
        return None, None
    return sum(c["effective"] for c in known), sum(c["original"] for c in known)
