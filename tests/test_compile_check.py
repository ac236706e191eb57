"""The kernels compile for devices that are not here, as they did when they were recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# Each architecture and each case that is tuned for, once. `make check-kernels`, which has to pass
# as well before a change lands, compiles all pairs of them and the other cases.
PAIRS = (("pope-64", 90), ("pope-128", 80), ("rope-64", 100))

# A process of its own, since kernels here are made for the interpreter.
PROGRAM = """
import sys
import compile_check as check

record = check.recorded_rows()
for case in check.CASES:
    for name, capability in {pairs}:
        for row in check.check_case(case, capability) if case.name == name else ():
            wrong = [*check.faults(row, case), *check.differences(row, record)]
            print(*row.values(), *wrong, sep="\t", file=sys.stderr if wrong else sys.stdout)
"""


@pytest.mark.slow
def test_kernels_compile_without_spills_as_recorded(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux")
    paths = os.pathsep.join([str(BENCHMARKS), *sys.path])
    given = {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(pairs=PAIRS)],
        capture_output=True,
        text=True,
        env={**os.environ, **given},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert done.stdout.count("backward_keys") == len(PAIRS)
