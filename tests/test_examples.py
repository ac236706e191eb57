"""The scripts in examples/ run from end to end, on a book."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_convert_and_finetune(data_dir: Path, tmp_path: Path) -> None:
    book = data_dir / "books" / "alice_pg11.txt"
    if not book.exists():
        pytest.skip(f"no book in {book.parent}")
    script = ROOT / "examples" / "convert_and_finetune.py"
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), str(book), "--quick", "--output", str(tmp_path / "out")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "It was the" in done.stdout
    losses = pd.read_csv(tmp_path / "out" / "finetuned" / "loss_by_length.csv")
    assert list(losses["length"]) == [128, 256, 512] * 2
    after = losses[losses["when"] == "after"]["loss"]
    assert (after < losses[losses["when"] == "before"]["loss"].to_numpy()).sum() >= 2
