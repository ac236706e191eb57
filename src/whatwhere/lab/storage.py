"""Writing files so that a kill or a full disk leaves what was there before."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

_REFUSED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    errno.ENAMETOOLONG,
}
"""What the system says where nothing can be written."""


class RunError(RuntimeError):
    """Something outside the program stopped a run: one line for the user."""


class DiskFullError(RunError):
    """There is no space left where a run writes; what was there before is untouched."""


@contextmanager
def lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder; a killed process lets go of it by itself.

    Args:
        folder: Made if it is not there.
        wait: Wait for another process that works in it.

    Raises:
        RunError: If another process works in it, or it cannot be written to.
    """
    held = FileLock(folder / ".lock")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise RunError(f"another process is working in {folder}") from None
    try:
        yield
    finally:
        held.release()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into one `DiskFullError`.

    A place that cannot be written to (a file where a folder belongs, no permission) is a
    `RunError`.

    `torch.save` raises a RuntimeError that does not say why, safetensors an error of its own, so
    the space that is left decides where the error does not.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _REFUSED:
            raise RunError(f"cannot write {error.filename or path}: {error.strerror}") from error
        if not _is_full(error, path):
            raise
        raise DiskFullError(
            f"no space left on the disk of {path}: nothing of it was replaced; make space and "
            "run the same command again"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it into place."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # With the number of the process, for others may write the same file.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` (which must not exist) if nothing fails."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        # Within, so that how full the disk is is seen before the unfinished folder goes.
        with disk_errors(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping as JSON; see `write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: If it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a `log.jsonl`; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Write rows as CSV; floats keep all their digits."""
    write_text(path, pd.DataFrame(rows, columns=columns).to_csv(index=False))


def _is_full(error: Exception, path: Path) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if "os error 28" in str(error) or os.strerror(errno.ENOSPC) in str(error):
        return True
    if "inline_container.cc" not in str(error):  # where torch.save writes
        return False
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free < 2**20
