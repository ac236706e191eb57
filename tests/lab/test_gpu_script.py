"""benchmarks/gpu.sh and its report, with a stand-in for Python: which stages run, and when."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from whatwhere.lab.bench.results import COLUMNS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STAGES = (
    *("versions", "widths", "tests", "kernels", "attention-64", "attention-128"),
    *("decode", "step", "calibrate", "odd"),
)

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="no GNU timeout")


@pytest.fixture
def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("gpu_report", BENCHMARKS / "gpu_report.py")
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def go(folder: Path, body: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a `python` that only does this."""
    stand_in = folder / "python"
    stand_in.write_text(f"#!/bin/sh\n{body}\n")
    stand_in.chmod(0o755)
    return subprocess.run(
        [str(BENCHMARKS / "gpu.sh"), str(folder / "out")],
        env={**os.environ, "PYTHON": str(stand_in), **more},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_stages_end_well_once(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    done = go(tmp_path, f'echo "$*" >> {ran}')
    assert done.returncode == 0, done.stdout + done.stderr
    first = ran.read_text().splitlines()
    assert {p.name for p in (tmp_path / "out" / "done").iterdir()} == set(STAGES)
    decode = next(line for line in first if "bench decode" in line)
    assert "--device cuda" in decode and "--lengths 32768" in decode and "bf16" in decode
    ran.unlink()
    done = go(tmp_path, f'echo "$*" >> {ran}')
    assert done.returncode == 0 and done.stdout.count("done before") == len(STAGES)
    again = ran.read_text().splitlines()
    assert [line for line in again if line.startswith("benchmarks/gpu_report.py")]
    assert not [line for line in again if "lab.bench" in line]


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    broken = 'case "$*" in *"bench decode"*) exit 3;; esac'
    done = go(tmp_path, broken)
    assert done.returncode == 1
    status = tmp_path / "out" / "logs" / "decode.status"
    assert status.read_text().strip() == "failed with code 3"
    ended = {p.name for p in (tmp_path / "out" / "done").iterdir()}
    assert ended == set(STAGES) - {"decode"}
    assert go(tmp_path, "exit 0").returncode == 0
    assert status.read_text().strip() == "ended well"


def test_it_ends_in_time_whatever_happens(tmp_path: Path) -> None:
    slow = 'case "$*" in *gpu_widths*) sleep 300;; esac'
    done = go(tmp_path, slow, TOTAL="46")
    assert done.returncode == 1
    logs = tmp_path / "out" / "logs"
    assert (logs / "widths.status").read_text().startswith("stopped after ")
    assert (logs / "odd.status").read_text().strip() == "not run: no time was left"


def test_a_report_of_nothing_says_so(tmp_path: Path, script: ModuleType) -> None:
    page = script.report(tmp_path, False)
    aims = page.partition("## Aims")[2].partition("##")[0]
    lines = [line for line in aims.splitlines() if line.startswith("|")][2:]
    # d = 64, 128; three lengths; time and peers of two passes, memory of one; decoding; a step.
    assert len(lines) == 2 * 3 * 5 + 2 * 2 + 1
    assert all("| not measured |" in line for line in lines)
    assert "met" not in aims.replace("not measured", "").replace("Best", "")


def row(**given: str) -> dict[str, str]:
    base = dict.fromkeys(COLUMNS, "")
    return base | {"encoding": "pope", "origin": "ours", "status": "ok", "length": "4096"} | given


def test_a_report_holds_measurements_against_their_aims(
    tmp_path: Path, script: ModuleType
) -> None:
    folder = tmp_path / "attention-64"
    folder.mkdir()
    with (folder / "bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        forward, both = {"pass": "forward"}, {"pass": "forward+backward"}
        writer.writerow(row(**forward, backend="sdpa", ratio="1.7"))
        writer.writerow(row(**forward, backend="widened", ratio="1.3"))
        writer.writerow(row(**forward, backend="triton", ratio="1.1", status="wrong"))
        writer.writerow(row(**forward, backend="PoPE-pytorch", ratio="7.8", origin="peer"))
        writer.writerow(row(**both, backend="triton", ratio="1.9", memory_ratio="1.04"))
    page = script.report(tmp_path, False)
    assert "| forward, d = 64, T = 4,096: time / RoPE | <= 1.35 | 1.30 (widened) | met |" in page
    assert "T = 4,096: times faster than PoPE-pytorch | >= 4 | 6.00 | met |" in page
    assert "forward+backward, d = 64, T = 4,096: time / RoPE | <= 1.6 | 1.90 (triton) | **" in page
    assert "peak memory of `triton` / RoPE | <= 1.05 | 1.04 | met |" in page
