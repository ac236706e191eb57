"""docs/add_encoding.md and docs/add_backend.md are followed word for word, on a copied package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Page -> the registry's file, and the lines after which its import and its entry go.
PLACES = {
    "add_encoding": (
        "src/whatwhere/encodings/__init__.py",
        "from whatwhere.encodings.base import Encoding\n",
        '    "learned": Learned,\n',
    ),
    "add_backend": (
        "src/whatwhere/attention/api.py",
        "from whatwhere.attention.angles import rotation_table\n",
        '    "sdpa": sdpa.BACKEND,\n',
    ),
}


def blocks(page: str) -> dict[str, str]:
    """Fenced blocks of a page by their title."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', text, flags=re.M | re.S))


def parts(page: str) -> tuple[str, str, str, str, list[str]]:
    """The new file's path and text, the import, the registry's line, the command that checks."""
    steps = blocks(page)
    (file,) = (title for title in steps if title.startswith("src/"))
    (entry,) = steps.keys() & {"ENCODINGS", "BACKENDS"}
    return file, steps[file], steps["import"], steps[entry], steps["check"].split()


def insert_after(path: Path, line: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(line) == 1, f"{line!r} should stand once in {path.name}"
    path.write_text(text.replace(line, line + new), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", PLACES)
def test_what_is_added_as_the_page_says_obeys_the_laws(page: str, tmp_path: Path) -> None:
    file, text, imported, entry, command = parts(page)
    registry, after_import, after_entry = PLACES[page]
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    (tmp_path / file).write_text(text, encoding="utf-8")
    insert_after(tmp_path / registry, after_import, imported)
    insert_after(tmp_path / registry, after_entry, entry)

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


@pytest.mark.parametrize("page", PLACES)
def test_what_the_page_adds_is_well_formed(page: str) -> None:
    file, text, *_ = parts(page)
    compile(text, file, "exec")
