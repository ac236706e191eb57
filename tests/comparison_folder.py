"""Folders as `whatwhere compare` leaves them, without training anything.

Losses follow a formula, so that a test knows what a report of them must say.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from whatwhere.lab import recipes
from whatwhere.lab.recipes.schema import EncodingChoice, Recipe
from whatwhere.lab.runs import COLUMNS

LENGTHS = (128, 256, 512, 1280)
TRAIN_LENGTH = 128

# Loss at 128, and what is added at each doubling of the length.
SLOPES = {
    "rope": (1.71, 0.46),
    "yarn": (1.71, 0.15),
    "rope-id": (1.75, 0.18),
    "pope": (1.70, 0.05),
    "pope-id": (1.72, 0.09),
    "rope-high": (1.80, 0.20),
    "nope": (2.00, 0.19),
    "alibi": (1.76, -0.01),
    "learned": (1.74, 0.3),
    "sinusoidal": (1.73, 0.8),
}

RECORD: dict[str, Any] = {
    "fingerprint": "0" * 64,
    "source": None,
    "versions": {"python": "3.11.2", "whatwhere": "0.1.0", "torch": "2.11.0"},
    "device": {"type": "cpu", "name": "a processor", "threads": 2},
    "git_commit": "0123456789abcdef",
    "started": "2026-05-01T10:00:00+00:00",
    "data": {"task": "text", "source": "standard library", "files": 12},
}


def loss(label: str, seed: int, length: int) -> float:
    """The loss of a run at a length."""
    start, slope = SLOPES[label]
    return (start + slope * math.log2(length / TRAIN_LENGTH)) * (1 + 0.01 * seed)


def text_recipe(labels: tuple[str, ...], seeds: tuple[int, ...] = (0,)) -> Recipe:
    """The quick text recipe with other encodings."""
    encodings = {label: EncodingChoice(name=label) for label in labels}
    return recipes.get("text").model_copy(update={"encodings": encodings, "seeds": seeds})


def write_settings(folder: Path, recipe: Recipe) -> None:
    """Write settings.yaml alone: no run has begun."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.yaml").write_text(recipes.to_yaml(recipe), encoding="utf-8")


def write_run(
    folder: Path, recipe: Recipe, label: str, seed: int, state: str = "finished", **record: Any
) -> None:
    """Write the files of one run.

    Args:
        folder: Of the comparison.
        recipe: Its recipe.
        label: Of the encoding.
        seed: Of the run.
        state: "stopped" (at step 400), "trained" or "finished".
        record: Other values of run.json.
    """
    place = folder / f"{label}-seed{seed}"
    place.mkdir(parents=True)
    training = recipe.training.model_dump(mode="json")
    source = f"rope-seed{seed}" if label == "yarn" else None
    content = {**RECORD, "config": {"training": training}, "source": source, **record}
    (place / "run.json").write_text(json.dumps(content))
    if label != "yarn":
        steps = 400 if state == "stopped" else recipe.training.steps
        rows = [_log_row(recipe, label, seed, step) for step in range(10, steps + 1, 10)]
        (place / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if state != "stopped":
            done = {"steps": steps, "seconds": 150.0 + seed, "spikes": 3, "grad_norm_max": 2.75}
            (place / "done.json").write_text(json.dumps({**done, "peak_memory_bytes": None}))
    if state == "finished":
        _write_results(place, recipe, label, seed)


def write_comparison(folder: Path, recipe: Recipe) -> Path:
    """Write a whole comparison, every run finished, results merged."""
    write_settings(folder, recipe)
    for label in recipe.encodings:
        for seed in recipe.seeds:
            write_run(folder, recipe, label, seed)
    return merge(folder)


def merge(folder: Path) -> Path:
    """Write results.csv from those of the runs."""
    tables = [pd.read_csv(path) for path in sorted(folder.glob("*/results.csv"))]
    pd.concat(tables).to_csv(folder / "results.csv", index=False)
    return folder


def _log_row(recipe: Recipe, label: str, seed: int, step: int) -> dict[str, Any]:
    start = loss(label, seed, TRAIN_LENGTH)
    noise = 0.05 * math.sin(12.9898 * step + seed)
    value = start + 4 * math.exp(-step / 80) + noise
    row: dict[str, Any] = {"step": step, "loss": value, "lr": 1e-3, "grad_norm": 1.5}
    row |= {"spike": step == 50, "tokens": step * 4096, "seconds": 0.15 * step}
    if step % 200 == 0:
        row["validation_loss"] = value + 0.03
        if recipe.data.task != "text":
            row["validation_accuracy"] = accuracy(label, seed) * step / recipe.training.steps
    return row


def accuracy(label: str, seed: int) -> float:
    """The accuracy of a run on indirect indexing."""
    return {"pope": 0.93, "rope": 0.12}.get(label, 0.2) + 0.01 * seed


def _write_results(place: Path, recipe: Recipe, label: str, seed: int) -> None:
    values: list[tuple[str, int, float]] = [("parameters", 128, 840_192.0)]
    if recipe.data.task == "text":
        lengths = LENGTHS[:1] if label == "learned" else LENGTHS
        values += [("validation_loss", 128, loss(label, seed, 128) + 0.01)]
        values += [("loss", length, loss(label, seed, length)) for length in lengths]
        values += [("table_bytes", length, 128.0 * length) for length in (128, 1280)]
        positions = [(n, loss(label, seed, 128 + n) + 2 / n) for n in range(1, lengths[-1])]
        table = pd.DataFrame(positions, columns=["position", "loss"])
        table.to_csv(place / "loss_by_position.csv", index=False)
    else:
        values += [("accuracy", 49, accuracy(label, seed)), ("test_loss", 49, 0.25)]
    rows = [(label, seed, metric, length, value) for metric, length, value in values]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(place / "results.csv", index=False)
