"""The folder of a diagnosis: whose it is, and which parts in it are done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from whatwhere.lab import storage
from whatwhere.lab.diagnose.measured import plain
from whatwhere.lab.diagnose.settings import Settings
from whatwhere.lab.environment import surroundings
from whatwhere.lab.runs import differences

NAME = "record.json"
PART = "part.json"
PARTS = "parts"
"""Folder of what was measured, a folder a model and within it one for each part."""


def check(folder: Path, settings: Settings, model: dict[str, Any]) -> bool:
    """Whether a folder is a diagnosis' own already; `False` if it is free.

    The model, its text and all settings that numbers depend on say whose a folder is. Models
    that it is compared with are not part: more can be added.

    Args:
        folder: Of the diagnosis.
        settings: Of it.
        model: Identity of the model.

    Raises:
        ValueError: If it holds the diagnosis of another model or settings, or something else.
    """
    path = folder / NAME
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output: {folder} is a file")
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise ValueError(
                f"output: {folder} holds files but no {NAME}: it was not written by this command; "
                "choose another --output"
            )
        return False
    found = storage.read_json(path)
    if not isinstance(found, dict) or "identity" not in found:
        raise ValueError(f"output: {path} is no record of a diagnosis")
    wanted = identity(settings, model)
    if found["identity"] == wanted:
        return True
    if not (folder / PARTS).exists():  # stopped before anything was measured
        return False
    listed = "; ".join(differences(found["identity"], wanted)[:3])
    raise ValueError(
        f"output: {folder} holds a diagnosis of another model, text or settings ({listed}): "
        "choose another --output, or remove that folder"
    )


def claim(folder: Path, settings: Settings, model: dict[str, Any]) -> None:
    """Make a folder a diagnosis' own; arguments and errors as for `check`."""
    if check(folder, settings, model):
        return
    config = {key: _written(value) for key, value in asdict(settings).items()}
    content = {"identity": identity(settings, model), "seed": settings.seed, "config": config}
    storage.write_json(folder / NAME, content | surroundings())


def identity(settings: Settings, model: dict[str, Any]) -> dict[str, Any]:
    """What the numbers of one model depend on."""
    return {"model": model, "settings": settings.identity()}


def place(folder: Path, label: str, part: str) -> Path:
    """Folder of one part of one model."""
    name = label.replace("/", "__")
    return folder / PARTS / (name if name.strip(".") else f"__{name}") / part


def done(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a part is finished.

    Raises:
        ValueError: If it was measured on another model or with other settings.
    """
    path = folder / PART
    if not path.exists():
        return False
    found = storage.read_json(path)
    if not isinstance(found, dict) or "identity" not in found:
        raise ValueError(f"output: {path} is no record of a part: remove {folder}")
    found = found["identity"]
    if found != wanted:
        listed = "; ".join(differences(found, wanted)[:3])
        raise ValueError(
            f"output: {folder} was measured on another model, text or settings ({listed}): choose "
            "another --output, or remove that folder"
        )
    return True


def write(
    folder: Path,
    wanted: dict[str, Any],
    frames: Mapping[str, pd.DataFrame],
    notes: Mapping[str, Any],
    seconds: float,
) -> None:
    """Write a finished part: its tables, and what is to be said of them.

    Raises:
        DiskFullError: If there is no space left; nothing is there then.
    """
    with storage.disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with storage.new_folder(folder) as partial:
        for name, frame in frames.items():
            storage.write_text(partial / f"{name}.csv", frame.to_csv(index=False))
        content = {
            "identity": wanted,
            "notes": {key: plain(value) for key, value in notes.items()},
            "seconds": round(seconds, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        storage.write_json(partial / PART, content)


def read(folder: Path) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Tables and notes of a finished part."""
    frames = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    return frames, dict(storage.read_json(folder / PART)["notes"])


def _written(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_written(part) for part in value]
    return str(value) if isinstance(value, Path) else value
