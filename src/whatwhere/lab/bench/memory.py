"""Peak memory of a side: what one call of it adds to inputs that are already there.

On a GPU the allocator counts. On a CPU the largest resident size of a process of its own does
(Linux): allocators keep what one side has freed, which the next would otherwise find for nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from whatwhere.lab.bench.cases import Case, Side, make_tensors

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def on_gpu(run: Callable[[], Any]) -> int:
    """Bytes that a call, once warm, adds at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def on_cpu(case: Case, side: Side) -> int | None:
    """Bytes that a call adds at its peak in a process of its own; ``None`` where none can tell."""
    if not _STATUS.exists() or not os.access(_RESET, os.W_OK):
        return None
    given = json.dumps({"case": asdict(case), "side": asdict(side)})
    # Every block of its own pages, so that what is freed is gone from the resident size.
    fixed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "whatwhere.lab.bench.memory", given],
        capture_output=True,
        text=True,
        env={**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        return int(done.stdout.split()[-1])
    except (IndexError, ValueError):
        return None


def _resident() -> int:
    line = next(row for row in _STATUS.read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _measure(given: str) -> int:
    from whatwhere.lab.bench.sides import build

    content = json.loads(given)
    case, side = Case(**content["case"]), Side(**content["side"])
    torch.set_num_threads(case.threads)
    # A small one first: what libraries take at their first call belongs to none.
    build(side, make_tensors(replace(case, length=min(case.length, 128), batch=1))).run()
    work = build(side, make_tensors(case))
    _RESET.write_text("5")
    before = _resident()
    for _ in range(3 if case.stage == "step" else 1):
        work.run()
    return _resident() - before


if __name__ == "__main__":
    print(_measure(sys.argv[1]))
