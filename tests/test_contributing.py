"""CONTRIBUTING.md says how to add an encoding; this follows it, on a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks() -> dict[str, str]:
    """Fenced blocks of CONTRIBUTING.md by their title."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', text, flags=re.M | re.S))


def insert_after(path: Path, line: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(line) == 1, f"{line!r} should stand once in {path.name}"
    path.write_text(text.replace(line, line + new), encoding="utf-8")


@pytest.mark.slow
def test_an_encoding_added_as_contributing_says_obeys_the_laws(tmp_path: Path) -> None:
    steps = blocks()
    (file,) = (title for title in steps if title.startswith("src/"))
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    (tmp_path / file).write_text(steps[file], encoding="utf-8")
    registry = tmp_path / "src/whatwhere/encodings/__init__.py"
    insert_after(registry, "from whatwhere.encodings.base import Encoding\n", steps["import"])
    insert_after(registry, '    "learned": Learned,\n', steps["ENCODINGS"])

    command = steps["check"].split()
    assert command[:3] == ["python", "-m", "pytest"]
    done = subprocess.run(
        [sys.executable, *command[1:], "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 20, done.stdout[-500:]


def test_the_encoding_of_contributing_is_well_formed() -> None:
    steps = blocks()
    (file,) = (title for title in steps if title.startswith("src/"))
    compile(steps[file], file, "exec")
    assert set(steps) >= {"import", "ENCODINGS", "check"}
