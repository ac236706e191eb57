"""The kernels compile for devices that are not here, as they did when they were recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "compile_check.py"


# What is tuned for, on each architecture; `make check-kernels` compiles the others, too.
CASES = ("pope-64", "pope-128", "rope-64")


@pytest.mark.slow
def test_kernels_compile_without_spills_as_recorded(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux")
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--brief", "--workers", "1", "--cases", *CASES],
        capture_output=True,
        text=True,
        env={**os.environ, **cache},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("backward_keys") >= 9
