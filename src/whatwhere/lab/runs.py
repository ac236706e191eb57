"""Run folders: what they hold, whose they are, and how they are written.

A run is one encoding and one seed. Its folder is written file by file, each under a temporary name
and then renamed, so that a kill or a full disk leaves what was there before. `run.json` carries a
fingerprint of everything the weights depend on; a folder of another config is refused.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout

from whatwhere.lab.recipes.schema import (
    Data,
    EncodingChoice,
    EvaluationSettings,
    ModelSettings,
    Recipe,
    Settings,
    TrainingSettings,
)

COLUMNS = ["encoding", "seed", "metric", "length", "value"]
"""Columns of every results.csv."""

PACKAGES = ("whatwhere", "torch", "transformers", "accelerate", "numpy")


class RunError(RuntimeError):
    """Something outside the program stopped a run: one line for the user."""


class DiskFullError(RunError):
    """There is no space left where a run writes; what was there before is untouched."""


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
class Run:
    """One encoding and one seed, and the folder that belongs to them."""

    folder: Path
    config: RunConfig

    @property
    def record(self) -> Path:
        """`run.json`: fingerprint, config, versions, device, data."""
        return self.folder / "run.json"

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
    def results(self) -> Path:
        """`results.csv` of this run alone; there once the run is evaluated."""
        return self.folder / "results.csv"

    @property
    def positions(self) -> Path:
        """`loss_by_position.csv`: loss within the longest evaluated window."""
        return self.folder / "loss_by_position.csv"

    @property
    def done(self) -> Path:
        """`done.json`: there once training has ended."""
        return self.folder / "done.json"

    @property
    def trained(self) -> bool:
        """Whether training has ended."""
        return self.done.exists()

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
    config = RunConfig(
        label=label,
        encoding=recipe.encodings[label],
        seed=seed,
        data=recipe.data,
        model=recipe.model,
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


def claim(run: Run, data: dict[str, Any], source: Run | None = None) -> None:
    """Make a run's folder its own, or check that it is.

    A folder whose evaluation settings alone differ keeps its weights and loses its results, which
    are then measured again.

    Args:
        run: The run.
        data: The task's description.
        source: The run whose weights this one starts from or is evaluated with.

    Raises:
        ValueError: If the folder was written by another config; the line names what differs.
        DiskFullError: If it cannot be written.
    """
    of_source = load_record(source)["fingerprint"] if source else ""
    mark = fingerprint(run.config, data, of_source)
    config = run.config.model_dump(mode="json")
    if run.record.exists():
        found = load_record(run)
        if found.get("fingerprint") != mark:
            raise ValueError(_mismatch(run, found, data))
        if found["config"]["evaluation"] == config["evaluation"]:
            return
        for file in (run.results, run.positions):
            file.unlink(missing_ok=True)
        write_text(run.record, _json({**found, "config": config}))
        return
    if run.folder.exists() and any(run.folder.iterdir()):
        raise ValueError(
            f"{run.folder} holds files but no run.json: it was not written by whatwhere; "
            "choose another --output"
        )
    record = {
        "fingerprint": mark,
        "config": config,
        "data": data,
        "source": source.folder.name if source else None,
        "versions": versions(),
        "device": device(),
        "git_commit": git_commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(run.record, _json(record))


def load_record(run: Run | Path) -> dict[str, Any]:
    """Read a run's `run.json`.

    Raises:
        ValueError: If there is none, or it is not a record of a run.
    """
    path = run.record if isinstance(run, Run) else run / "run.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is no run folder: it holds no run.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not {"fingerprint", "config"} <= content.keys():
        raise ValueError(f"{path} is no record of a run: it lacks fingerprint or config")
    return content


def load_run(folder: Path) -> Run:
    """The run that a folder holds.

    Raises:
        ValueError: If it holds none.
    """
    return Run(folder, RunConfig.model_validate(load_record(folder)["config"]))


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; a killed process lets go of it by itself.

    Raises:
        RunError: If another process works in it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another process is working in {folder}") from None
    try:
        yield
    finally:
        held.release()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into one `DiskFullError`.

    `torch.save` raises a RuntimeError that does not say why, safetensors an error of its own, so
    the space that is left decides where the error does not.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error, path):
            raise
        raise DiskFullError(
            f"no space left on the disk of {path}: nothing of it was replaced; make space and "
            "run the same command again"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it into place."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` (which must not exist) if nothing fails."""
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_rows(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Write rows as CSV; floats keep all their digits."""
    write_text(path, pd.DataFrame(rows, columns=columns).to_csv(index=False))


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


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def device() -> dict[str, Any]:
    """The device that training uses, by name."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return {"type": "cuda", "name": torch.cuda.get_device_name(), "count": count}
    name = platform.processor() or platform.machine()
    return {"type": "cpu", "name": name, "threads": torch.get_num_threads()}


def git_commit() -> str | None:
    """Commit of the package's own checkout, with `+changes` if it differs; else `None`."""
    package = Path(__file__).resolve().parents[1]

    def git(*command: str) -> str:
        # An installed package may lie within a checkout of something else: only files that git
        # tracks count.
        done = subprocess.run(
            ["git", "-C", str(package), *command], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _identity(config: RunConfig) -> dict[str, Any]:
    dumped = config.model_dump(mode="json", exclude={"evaluation", "label"})
    dumped["data"].pop("paths", None)
    return dumped


def _mismatch(run: Run, found: dict[str, Any], data: dict[str, Any]) -> str:
    known = found["config"]
    old = {key: value for key, value in known.items() if key not in ("evaluation", "label")}
    changed = differences(old, run.config.model_dump(mode="json", exclude={"evaluation", "label"}))
    if not [line for line in changed if not line.startswith("data.paths")]:
        changed += differences(found.get("data"), data, "data")
    listed = "; ".join(changed[:4]) + (" ..." if len(changed) > 4 else "")
    return (
        f"{run.folder} was written by another config ({listed or 'its starting weights'}): "
        "choose another --output, or remove that folder"
    )


def _is_full(error: Exception, path: Path) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if "os error 28" in str(error) or os.strerror(errno.ENOSPC) in str(error):
        return True
    if "PytorchStreamWriter" not in str(error) and "iostream" not in str(error):
        return False
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free < 2**20


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
