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


def claim(folder: Path, settings: Settings, model: dict[str, Any]) -> None:
    """Make a folder an evaluation's own, or check that it is.

    A fingerprint of the model's identity, of all settings that numbers depend on and of the
    harness's version says whose a folder is. Its tasks are not part: more can be added.

    Args:
        folder: Of results.
        settings: Of the evaluation.
        model: Identity of the model.

    Raises:
        ValueError: If it holds the results of another model or config, or something else.
    """
    identity = {
        "model": model,
        "settings": settings.identity(),
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
    if (folder / NAME).exists():
        found = read_json(folder / NAME)
        if not isinstance(found, dict) or "identity" not in found:
            raise ValueError(f"output: {folder / NAME} is no record of an evaluation")
        if found.get("fingerprint") == fingerprint:
            return
        if any(folder.glob(f"*/{TASK}")):
            listed = "; ".join(differences(found["identity"], identity)[:4])
            raise ValueError(
                f"output: {folder} holds an evaluation of another model or config ({listed}): "
                "choose another --output, or remove that folder"
            )
    elif folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise ValueError(
            f"output: {folder} holds files but no {NAME}: it was not written by this command; "
            "choose another --output"
        )
    config = {key: _plain(value) for key, value in asdict(settings).items()}
    write_json(
        folder / NAME,
        {
            "fingerprint": fingerprint,
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


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _more_versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name) for name in ("lm_eval", "datasets", "tokenizers")
    }
