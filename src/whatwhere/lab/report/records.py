"""What the folder of a comparison holds, read as far as it is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from whatwhere.lab import storage
from whatwhere.lab.recipes.files import from_yaml
from whatwhere.lab.recipes.schema import Recipe
from whatwhere.lab.runs import COLUMNS


@dataclass(frozen=True)
class RunRecord:
    """One encoding and one seed, as far as it has come.

    Attributes:
        label: Its encoding.
        seed: Its seed.
        name: Of its folder.
        record: `run.json`, `None` before the run has begun.
        done: `done.json`, `None` before training has ended.
        log: Rows of `log.jsonl`; columns step, loss and whatever else was logged.
        positions: `loss_by_position.csv`; columns position, loss; empty if there is none.
        evaluated: Whether it has results of its own.
    """

    label: str
    seed: int
    name: str
    record: dict[str, Any] | None
    done: dict[str, Any] | None
    log: pd.DataFrame
    positions: pd.DataFrame
    evaluated: bool

    @property
    def source(self) -> str | None:
        """The run whose weights this one starts from or is evaluated with."""
        return (self.record or {}).get("source")

    @property
    def borrows(self) -> bool:
        """Whether it trains nothing of its own: YaRN, evaluated with the weights of RoPE."""
        return self.source is not None and self.done is None and self.log.empty

    @property
    def steps(self) -> int:
        """Steps it has taken, as far as they are recorded."""
        logged = 0 if self.log.empty else self.log["step"].iloc[-1]
        return int((self.done or {}).get("steps", logged))

    def planned_steps(self, otherwise: int) -> int:
        """Steps it is to take; a fine-tuned run has fewer than its recipe says."""
        config = (self.record or {}).get("config", {})
        return int(config.get("training", {}).get("steps", otherwise))


@dataclass(frozen=True)
class Comparison:
    """A folder that `whatwhere compare` writes.

    Attributes:
        recipe: Its settings, all encodings and seeds that were ever asked for included.
        settings: The same as YAML.
        runs: One for each encoding and seed of the recipe, begun or not.
        results: Rows of results.csv, with length -1 where there is none.
        problems: Files that could not be read, one line each.
    """

    recipe: Recipe
    settings: str
    runs: list[RunRecord]
    results: pd.DataFrame
    problems: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Labels of the recipe, then any others that have results."""
        return list(dict.fromkeys([*self.recipe.encodings, *self.results["encoding"]]))

    def logs(self) -> pd.DataFrame:
        """The logs of all runs in one table, with columns encoding and seed."""
        return _joined(self.runs, [run.log for run in self.runs])

    def positions(self) -> pd.DataFrame:
        """The losses by position of all runs in one table, with columns encoding and seed."""
        return _joined(self.runs, [run.positions for run in self.runs])


def read_comparison(folder: Path) -> Comparison:
    """Read the folder of a comparison, however far its runs have come.

    Raises:
        ValueError: If it is none, or its settings are of another version.
    """
    path = folder / "settings.yaml"
    if not path.exists():
        raise ValueError(f"{folder} is no comparison: it holds no settings.yaml")
    recipe = from_yaml(path)
    problems: list[str] = []
    runs = [
        _read_run(folder, label, seed, problems)
        for label in recipe.encodings
        for seed in recipe.seeds
    ]
    results = _read_results(folder, runs, problems)
    return Comparison(recipe, path.read_text(encoding="utf-8"), runs, results, problems)


def _read_run(folder: Path, label: str, seed: int, problems: list[str]) -> RunRecord:
    name = f"{label}-seed{seed}"
    place = folder / name
    log = pd.DataFrame(storage.read_log(place / "log.jsonl"))
    if not {"step", "loss"} <= set(log.columns):
        log = pd.DataFrame(columns=["step", "loss"])
    return RunRecord(
        label=label,
        seed=seed,
        name=name,
        record=_read_mapping(place / "run.json", problems),
        done=_read_mapping(place / "done.json", problems),
        log=log,
        positions=_read_table(place / "loss_by_position.csv", ["position", "loss"], problems),
        evaluated=(place / "results.csv").exists(),
    )


def _read_results(folder: Path, runs: list[RunRecord], problems: list[str]) -> pd.DataFrame:
    # A run's own results count; the merged ones stand in for runs whose folders are gone, not
    # for runs that are there and have lost theirs to other evaluation settings.
    tables = [
        _read_table(folder / run.name / "results.csv", COLUMNS, problems)
        for run in runs
        if run.evaluated
    ]
    begun = {(run.label, run.seed) for run in runs if run.record is not None or run.evaluated}
    merged = _read_table(folder / "results.csv", COLUMNS, problems)
    gone = [pair not in begun for pair in zip(merged["encoding"], merged["seed"], strict=True)]
    tables = [table for table in (*tables, merged[gone]) if len(table)]
    if not tables:
        return merged.iloc[:0]
    return pd.concat(tables, ignore_index=True)


def _read_table(path: Path, columns: list[str], problems: list[str]) -> pd.DataFrame:
    empty = pd.DataFrame(columns=columns)
    if not path.exists():
        return empty
    missing = {name: ["", "nan", "NaN"] for name in columns if name != "encoding"}
    try:
        # An encoding may well be labelled "na" or "null".
        table = pd.read_csv(
            path, dtype={"encoding": str}, keep_default_na=False, na_values=missing
        )[columns]
        for name in set(columns) & {"seed", "length", "position"}:
            table[name] = table[name].fillna(-1).astype(int)
        for name in set(columns) & {"value", "loss"}:
            table[name] = table[name].astype(float)
    except (ValueError, KeyError) as error:
        problems.append(f"{path.parent.name}/{path.name} could not be read: {error}")
        return empty
    return table


def _read_mapping(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = storage.read_json(path)
    except ValueError:
        content = None
    if isinstance(content, dict):
        return content
    problems.append(f"{path.parent.name}/{path.name} could not be read: it is no JSON mapping")
    return None


def _joined(runs: list[RunRecord], tables: list[pd.DataFrame]) -> pd.DataFrame:
    parts = [
        table.assign(encoding=run.label, seed=run.seed)
        for run, table in zip(runs, tables, strict=True)
        if len(table)
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
