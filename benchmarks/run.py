"""Every benchmark in turn: ``make bench``. Each can be run by itself, with options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CPU = ("cpu_choice", "cpu_memory", "cpu_peers", "decode", "pope_pytorch_compat")
NAMES = (
    "import_time",
    "indirect_indexing_generation",
    "attention",
    *CPU,
    "training_step",
    "converted",
    "cache_bytes",
    "data",
    "diagnosis",
)


def main() -> int:
    folder = Path(__file__).parent
    failed = []
    for name in NAMES:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, folder / f"{name}.py"], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
