"""The folder of an evaluation: whose it is, and which tasks in it are done."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from whatwhere.lab.environment import device, git_commit, versions
from whatwhere.lab.harness.settings import Settings
from whatwhere.lab.runs import differences
from whatwhere.lab.storage import read_json, write_json

NAME = "evaluation.json"
TASK = "task.json"


def check(folder: Path, settings: Settings, model: dict[str, Any]) -> bool:
    """Whether a folder is an evaluation's own already; `False` if it is free.

    A fingerprint of the model's identity, of all settings that numbers depend on and of the
    harness's version says whose a folder is. Its tasks are not part: more can be added.

    Args:
        folder: Of results.
        settings: Of the evaluation.
        model: Identity of the model.

    Raises:
        ValueError: If it holds the results of another model or config, or something else.
    """
    path = folder / NAME
    if not path.exists():
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise ValueError(
                f"output: {folder} holds files but no {NAME}: it was not written by this command; "
                "choose another --output"
            )
        return False
    identity = _identity(settings, model)
    found = read_json(path)
    if not isinstance(found, dict) or not {"fingerprint", "identity"} <= found.keys():
        raise ValueError(f"output: {path} is no record of an evaluation")
    if found["fingerprint"] == _fingerprint(identity):
        return True
    if any(folder.glob(f"*/{TASK}")):
        listed = "; ".join(differences(found["identity"], identity)[:4])
        raise ValueError(
            f"output: {folder} holds an evaluation of another model or config ({listed}): "
            "choose another --output, or remove that folder"
        )
    return False


def claim(folder: Path, settings: Settings, model: dict[str, Any]) -> None:
    """Make a folder an evaluation's own; arguments and errors as for `check`."""
    if check(folder, settings, model):
        return
    identity = _identity(settings, model)
    config = {key: _plain(value) for key, value in asdict(settings).items()}
    write_json(
        folder / NAME,
        {
            "fingerprint": _fingerprint(identity),
            "identity": identity,
            "config": config,
            "versions": versions() | _more_versions(),
            "device": device(),
            "git_commit": git_commit(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def done(folder: Path, task: str, files: dict[str, str]) -> bool:
    """Whether a task of the folder is finished, on the same files.

    Raises:
        ValueError: If it was finished on other files.
    """
    path = folder / task / TASK
    if not path.exists():
        return False
    known = read_json(path)["files"]
    if known != files:
        changed = ", ".join(sorted({name for name, _ in known.items() ^ files.items()}))
        raise ValueError(
            f"output: {folder / task} was measured on other data ({changed}): choose another "
            "--output, or remove that folder"
        )
    return True


def _identity(settings: Settings, model: dict[str, Any]) -> dict[str, Any]:
    version = importlib.metadata.version("lm_eval")
    return {"model": model, "settings": settings.identity(), "lm_eval": version}


def _fingerprint(identity: dict[str, Any]) -> str:
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _more_versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name) for name in ("lm_eval", "datasets", "tokenizers")
    }
