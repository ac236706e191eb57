"""Interleaved timing: every side once a round, order reversed every other round.

A machine that slows down for a while slows all sides alike, so the ratio of two sides within a
round says more than two medians taken one after the other.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def rounds(sides: Mapping[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for r in range(-1, count):
        for name in sides if r % 2 else reversed(list(sides)):
            start = time.perf_counter()
            sides[name]()
            if r >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], to: str) -> dict[str, tuple[float, float]]:
    """Median and smallest ratio to one side, round by round."""
    return {
        name: (
            statistics.median(a / b for a, b in zip(taken, seconds[to], strict=True)),
            min(a / b for a, b in zip(taken, seconds[to], strict=True)),
        )
        for name, taken in seconds.items()
    }


def machine() -> dict[str, str]:
    """What a ratio was measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "device": f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, "
        f"{os.cpu_count()} cores",
        "torch": torch.__version__,
    }


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows with the machine's columns to ``results/<name>.csv``, replacing it whole."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    where = machine()
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *where])
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
    temporary.replace(path)
    return path
