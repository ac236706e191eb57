"""Run folders: what they hold, whose they are and whether they may be reused.

A run is one encoding and one seed. Its `run.json` carries a fingerprint of everything the weights
depend on, and a folder that was written by another config is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import ValidationError

from whatwhere.lab.environment import surroundings
from whatwhere.lab.recipes.schema import (
    LABEL,
    Data,
    EncodingChoice,
    EvaluationSettings,
    ModelSettings,
    Recipe,
    Settings,
    TrainingSettings,
)
from whatwhere.lab.storage import read_json, write_json, write_text

HOW_IT_IS_COMPUTED = ("parallel", "context_parallel", "activation_checkpointing")
"""Training settings that change results by rounding alone: a run may go on with others."""

COLUMNS = ["encoding", "seed", "metric", "length", "value"]
"""Columns of every results.csv."""


class RunConfig(Settings):
    """Everything that one run depends on, resolved."""

    label: str
    encoding: EncodingChoice
    seed: int
    data: Data
    model: ModelSettings
    training: TrainingSettings
    evaluation: EvaluationSettings


@dataclass(frozen=True)
class RunFolder:
    """What a training loop leaves in its folder."""

    folder: Path

    @property
    def log(self) -> Path:
        """`log.jsonl`: one row a logged step."""
        return self.folder / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """`checkpoint/`: the newest state of an unfinished run."""
        return self.folder / "checkpoint"

    @property
    def model(self) -> Path:
        """`model/`: the final weights."""
        return self.folder / "model"

    @property
    def done(self) -> Path:
        """`done.json`: there once training has ended."""
        return self.folder / "done.json"

    @property
    def trained(self) -> bool:
        """Whether training has ended."""
        return self.done.exists()


@dataclass(frozen=True)
class Run(RunFolder):
    """One encoding and one seed, and the folder that belongs to them."""

    config: RunConfig

    @property
    def record(self) -> Path:
        """`run.json`: fingerprint, config, versions, device, data."""
        return self.folder / "run.json"

    @property
    def results(self) -> Path:
        """`results.csv` of this run alone; there once the run is evaluated."""
        return self.folder / "results.csv"

    @property
    def positions(self) -> Path:
        """`loss_by_position.csv`: loss within the longest evaluated window."""
        return self.folder / "loss_by_position.csv"

    @property
    def evaluated(self) -> bool:
        """Whether there are results."""
        return self.results.exists()

    def rows(self, values: Iterable[tuple[str, int, float]]) -> list[dict[str, Any]]:
        """(metric, length, value) of this run as rows of results.csv."""
        label, seed = self.config.label, self.config.seed
        return [
            dict(zip(COLUMNS, (label, seed, metric, length, value), strict=True))
            for metric, length, value in values
        ]


def plan(recipe: Recipe, label: str, seed: int, folder: Path) -> Run:
    """The run of one encoding and seed of a recipe, in its place below `folder`.

    `precision="auto"` is resolved here: bf16 and float32 weights are not the same run.
    """
    training = recipe.training
    if training.precision == "auto":
        precision = "bf16" if torch.cuda.is_available() else "no"
        training = training.model_copy(update={"precision": precision})
    choice, model = recipe.encodings[label], recipe.model
    if choice.qk_norm is not None:
        model = model.model_copy(update={"qk_norm": choice.qk_norm})
    config = RunConfig(
        label=label,
        encoding=choice,
        seed=seed,
        data=recipe.data,
        model=model,
        training=training,
        evaluation=recipe.evaluation,
    )
    return Run(folder / f"{label}-seed{seed}", config)


def fingerprint(config: RunConfig, data: dict[str, Any], source: str = "") -> str:
    """SHA-256 of all that the weights of a run depend on.

    Args:
        config: Of the run. Its evaluation settings, its label and the paths of its text do not
            count: what the weights depend on is the text itself.
        data: The task's description; its checksums stand for the text.
        source: Fingerprint of the run that this one starts from, if any.
    """
    parts = {**_identity(config), "source": source}
    parts["checksums"] = {key: value for key, value in data.items() if "sha256" in key}
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def check(run: Run, data: dict[str, Any], source: Run | None = None) -> dict[str, Any] | None:
    """The record that a run's folder holds, `None` if there is no such folder yet.

    Args:
        run: The run.
        data: The task's description.
        source: The run whose weights this one starts from or is evaluated with.

    Raises:
        ValueError: If the folder was written by another config; the line names what differs.
    """
    if not run.record.exists():
        # A kill can leave a hidden, unfinished file behind.
        if any(not file.name.startswith(".") for file in run.folder.glob("*")):
            raise ValueError(
                f"{run.folder} holds files but no run.json: it was not written by whatwhere; "
                "choose another --output"
            )
        return None
    found = load_record(run)
    if found["fingerprint"] != _mark(run, data, source):
        raise ValueError(_mismatch(run, found, data))
    return found


def claim(run: Run, data: dict[str, Any], source: Run | None = None, how: str = "train") -> None:
    """Make a run's folder its own, or check that it is; arguments and errors as for `check`.

    `how` it gets its weights is recorded: trained, fine-tuned from the source, or borrowed.

    A folder whose evaluation settings alone differ keeps its weights and loses its results, which
    are then measured again.
    """
    found = check(run, data, source)
    config = run.config.model_dump(mode="json")
    if found is None:
        record = {
            "fingerprint": _mark(run, data, source),
            "config": config,
            "data": data,
            "how": how,
            "source": source.folder.name if source else None,
            "source_comparison": _elsewhere(run, source),
            **surroundings(),
        }
        write_json(run.record, record)
    elif not _same_evaluation(found["config"]["evaluation"], run.config.evaluation):
        for file in (run.results, run.positions):
            file.unlink(missing_ok=True)
        write_json(run.record, {**found, "config": config})


def load_record(run: Run | Path) -> dict[str, Any]:
    """Read a run's `run.json`.

    Raises:
        ValueError: If there is none, or it is not a record of a run.
    """
    path = run.record if isinstance(run, Run) else run / "run.json"
    if not path.exists():
        raise ValueError(f"{path.parent} is no run folder: it holds no run.json")
    content = read_json(path)
    if not isinstance(content, dict) or not {"fingerprint", "config"} <= content.keys():
        raise ValueError(f"{path} is no record of a run: it lacks fingerprint or config")
    return content


def load_run(folder: Path) -> Run:
    """The run that a folder holds.

    Raises:
        ValueError: If it holds none.
    """
    return Run(folder, RunConfig.model_validate(load_record(folder)["config"]))


def source_folder(folder: Path, record: dict[str, Any]) -> Path | None:
    """The folder of the run that a record's weights come from.

    It lies beside the run, or in a comparison beside that of the run.

    Raises:
        ValueError: If the record names any other place.
    """
    source: str | None = record["source"]
    comparison: str | None = record.get("source_comparison")
    if source is None:
        return None
    for name in filter(None, (source, comparison)):
        if not re.fullmatch(LABEL, name):
            raise ValueError(f"{folder / 'run.json'}: source {name!r} is no name of a folder")
    place = folder.absolute().parent
    return place.parent / comparison / source if comparison else folder.parent / source


def merge_results(folder: Path, runs: Iterable[Run]) -> pd.DataFrame:
    """Write `results.csv` of a folder from those of its evaluated runs, in their order."""
    tables = [pd.read_csv(run.results, dtype={"encoding": str}) for run in runs if run.evaluated]
    merged = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
    write_text(folder / "results.csv", merged.to_csv(index=False))
    return merged


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """What differs between two nested mappings, as `a.b: old -> new`."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
    found = []
    for key in dict.fromkeys([*old, *new]):
        place = f"{prefix}.{key}" if prefix else str(key)
        found += differences(old.get(key), new.get(key), place)
    return found


def _elsewhere(run: Run, source: Run | None) -> str | None:
    # The comparison that a source belongs to, unless it is the run's own.
    if source is None or source.folder.parent == run.folder.parent:
        return None
    return source.folder.absolute().parent.name


def _mark(run: Run, data: dict[str, Any], source: Run | None) -> str:
    return fingerprint(run.config, data, fingerprint(source.config, data) if source else "")


def _same_evaluation(found: dict[str, Any], wanted: EvaluationSettings) -> bool:
    # Settings that came later, at their defaults, change nothing.
    try:
        return EvaluationSettings.model_validate(found) == wanted
    except ValidationError:
        return False


def _identity(config: RunConfig) -> dict[str, Any]:
    dumped = config.model_dump(mode="json", exclude={"evaluation", "label"})
    dumped["data"].pop("paths", None)
    for key in HOW_IT_IS_COMPUTED:
        dumped["training"].pop(key)
    # Settings that say nothing are left out: fingerprints outlive new ones.
    encoding = dumped["encoding"]
    dumped["encoding"] = {key: value for key, value in encoding.items() if value is not None}
    return dumped


def _mismatch(run: Run, found: dict[str, Any], data: dict[str, Any]) -> str:
    known = found["config"]
    old = {key: value for key, value in known.items() if key not in ("evaluation", "label")}
    changed = differences(old, run.config.model_dump(mode="json", exclude={"evaluation", "label"}))
    if all(line.startswith("data.paths") for line in changed):
        changed += differences(found.get("data"), data, "data")
    listed = "; ".join(changed[:4]) + (" ..." if len(changed) > 4 else "")
    return (
        f"{run.folder} was written by another config ({listed or 'its starting weights'}): "
        "choose another --output, or remove that folder"
    )
