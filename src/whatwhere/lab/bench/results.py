"""bench.csv: a row for each measurement, with all that it depends on; what is in it stays."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

import whatwhere
from whatwhere.lab import environment, storage
from whatwhere.lab.bench.cases import Case, Side, cache_bytes
from whatwhere.lab.bench.measure import OK, Outcome
from whatwhere.lab.bench.settings import Settings

NAME = "bench.csv"

Row = dict[str, str]

SETTING = (
    "pass", "encoding", "backend", "origin", "batch", "heads", "kv_heads", "length", "head_dim",
    "dtype", "causal", "threads", "model", "rounds", "against", "memory", "seed",
)  # fmt: skip
"""Columns that say what was measured."""
FIGURES = (
    "status", "ratio", "least", "limit", "peer_ratio", "error", "memory_ratio",
    "cache_bytes_per_token", "feature_dim", "baseline", "auto",
    "ms", "graph_ms", "graph_ratio", "first_call_s", "peak_mib", "cache_gb_per_s", "copy_gb_per_s",
)  # fmt: skip
"""Columns that say what came of it; the last seven on a GPU alone."""
WHERE = ("device", "torch", "triton", "whatwhere", "code")
"""Columns that it depends on."""
WHEN = ("commit", "date", "command")
COLUMNS = (*SETTING, *FIGURES, *WHERE, *WHEN)


def row(case: Case, outcome: Outcome, settings: Settings, copy: float | None) -> Row:
    """A row of bench.csv; absolute times, memory and rates on a GPU alone.

    Args:
        case: The case.
        outcome: What came of a side.
        settings: What was asked for.
        copy: Bytes per second of a copy on the GPU, for decoding.
    """
    found: dict[str, object] = {
        **asdict(case),
        **asdict(outcome.side),
        "pass": case.stage,
        "rounds": settings.count,
        "against": settings.against or "",
        "memory": settings.memory,
        "status": outcome.status,
        "ratio": _number(outcome.ratio, 4),
        "least": _number(outcome.least, 4),
        "limit": _number(outcome.limit, 3),
        "peer_ratio": _number(outcome.to_peer, 4),
        "error": "" if outcome.error is None else f"{outcome.error:.2e}",
        "memory_ratio": _number(outcome.memory_ratio, 3),
        "baseline": outcome.baseline,
        "auto": outcome.work is not None and outcome.work.chosen,
        "feature_dim": outcome.work.feature_dim if outcome.work else "",
    }
    kept = cache_bytes(case, outcome.work) if outcome.work else 0
    if kept:
        found["cache_bytes_per_token"] = kept
    if case.device == "cuda" and outcome.status == OK and outcome.milliseconds:
        found["ms"] = _number(outcome.milliseconds, 5)
        found["first_call_s"] = _number(outcome.first, 2)
        found["peak_mib"] = "" if outcome.memory is None else f"{outcome.memory / 2**20:.1f}"
        taken = outcome.milliseconds / 1e3
        if outcome.replayed:
            taken = statistics.median(outcome.replayed)
            found["graph_ms"] = _number(1e3 * taken, 5)
            found["graph_ratio"] = _number(outcome.graph_ratio, 4)
        if kept and copy:
            read = kept * case.length * case.batch
            found["cache_gb_per_s"] = f"{read / taken / 1e9:.1f}"
            found["copy_gb_per_s"] = f"{copy / 1e9:.1f}"
    found |= where(case.device) | when()
    return {name: str(found.get(name, "")) for name in COLUMNS}


def key(case: Case, side: Side, settings: Settings) -> tuple[str, ...]:
    """What a finished row is known by: its settings, and what it depends on."""
    made = row(case, Outcome(side), settings, None)
    return key_of(made)


def key_of(made: Row) -> tuple[str, ...]:
    """The same of a row."""
    return tuple(made[name] for name in (*SETTING, *WHERE))


@cache
def where(device: str) -> Row:
    """Device, versions and a digest of the package's own files."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "whatwhere": whatwhere.__version__,
        "code": _digest(),
    }


@cache
def when() -> Row:
    """Commit, date and command."""
    return {
        "commit": environment.git_commit() or "unknown",
        "date": datetime.now(UTC).date().isoformat(),
        "command": _command(),
    }


def read(folder: Path) -> list[Row]:
    """Rows of a folder; none if it does not exist or is empty.

    Raises:
        ValueError: If it holds something else.
    """
    path = folder / NAME
    if not folder.exists() or not any(p for p in folder.iterdir() if p.name != ".lock"):
        return []
    if not path.exists():
        raise ValueError(f"output: {folder} holds something else: it has no {NAME}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"output: {path} has other columns: name a new folder")
        return list(reader)


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Replace bench.csv."""
    storage.write_rows(folder / NAME, [dict(r) for r in rows], list(COLUMNS))


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Old rows and new ones, which replace those of the same key."""
    kept = {key_of(r): r for r in old}
    kept |= {key_of(r): r for r in new}
    return list(kept.values())


_SHOWING = ("__main__", "calibrate", "command", "figure", "results", "run", "table")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _command() -> str:
    """The command line, without folders that say nothing elsewhere."""
    program = Path(sys.argv[0])
    name = "python -m whatwhere.lab.bench" if program.stem == "__main__" else program.name
    given = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return f"{name} {shlex.join(given)}".strip()


@cache
def _digest() -> str:
    """Of what is measured and what measures; how rows are shown does not matter."""
    package = Path(whatwhere.__file__).parent
    files = [package / "spec.py", *Path(__file__).parent.glob("*.py")]
    for part in ("attention", "encodings", "models"):
        files += (package / part).rglob("*.py")
    found = hashlib.sha256()
    for path in sorted(p for p in files if p.stem not in _SHOWING):
        found.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
