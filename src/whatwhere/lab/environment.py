"""What results depend on besides the config: versions, device, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("whatwhere", "torch", "transformers", "accelerate", "numpy")


def surroundings() -> dict[str, Any]:
    """What the record of a run says besides its config: versions, device, commit, time."""
    return {
        "versions": versions(),
        "device": device(),
        "git_commit": git_commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def device() -> dict[str, Any]:
    """The device that training uses, by name."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return {"type": "cuda", "name": torch.cuda.get_device_name(), "count": count}
    name = platform.processor() or platform.machine()
    return {"type": "cpu", "name": name, "threads": torch.get_num_threads()}


def git_commit() -> str | None:
    """Commit of the package's own checkout, with `+changes` if it differs; else `None`."""
    package = Path(__file__).resolve().parents[1]

    def git(*command: str) -> str:
        # An installed package may lie within a checkout of something else: only files that git
        # tracks count.
        done = subprocess.run(
            ["git", "-C", str(package), *command], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
