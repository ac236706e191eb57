"""Which backend is fastest where: a small table that was measured, or predicted and says so.

Two files of one form: ``choices.json`` beside this module, and the user's own, which
``whatwhere bench --calibrate`` writes and which comes first. An entry says for which devices,
widths and lengths it holds, which backend it names, whether that was measured, and where it
comes from.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

SHIPPED = Path(__file__).with_name("choices.json")
VARIABLE = "WHATWHERE_CHOICES"

STAGES = ("forward", "forward+backward", "decode")

_WIDTHS = ("head_dim", "feature_dim", "value_dim", "min_length")
_KEYS: dict[str, type | tuple[type, ...]] = {
    "device": str,
    **dict.fromkeys(_WIDTHS, int),
    "max_length": (int, type(None)),
    "stage": str,
    "backend": str,
    "measured": bool,
    "source": str,
}

Entry = tuple[str, int, int, int, int, int | None, str, str, bool]
"""Of a checked entry what `best` reads, in the order of `_KEYS`."""


def best(
    device_name: str,
    head_dim: int,
    value_dim: int,
    length: int,
    stage: str,
    *,
    feature_dim: int | None = None,
    measured: bool = False,
) -> str | None:
    """The backend that the tables name for a call, or ``None`` if they say nothing of it.

    The user's entries come before those shipped, and among each the first that fits counts. Files
    are read at the first call, and again only after `save` or `forget`.

    Args:
        device_name: As `device_name` gives it; an entry fits if its ``device``
            is a part of it.
        head_dim: ``D``.
        value_dim: ``V``.
        length: Keys, ``S``.
        stage: One of `STAGES`: whether a backward pass may follow, or few queries decode.
        feature_dim: Width of the score's features, ``spec.feature_dim(D)``; ``None`` is
            ``2 D``, where every channel turns.
        measured: Whether only entries count that were measured. A prediction says nothing of
            whether a kernel is right on a device that it never ran on.

    Returns:
        A name, which need not be a backend that this version has or that takes the call.

    Raises:
        ValueError: If a file is not as `validate` wants it.
    """
    width = 2 * head_dim if feature_dim is None else feature_dim
    entries: tuple[Entry, ...] = _tables()
    for device, dim, features, values, least, most, at, backend, known in entries:
        if (dim, features, values, at) != (head_dim, width, value_dim, stage):
            continue
        if measured and not known:
            continue
        if least <= length and (most is None or length <= most) and _names(device, device_name):
            return backend
    return None


def measured_on(device: torch.device | str, backend: str, stage: str) -> bool:
    """Whether a backend was measured, and so checked, as the fastest of a stage on a device.

    Raises:
        ValueError: If a file is not as `validate` wants it.
    """
    name, wanted = device_name(device), (stage, backend, True)
    entries: tuple[Entry, ...] = _tables()
    return any(entry[6:] == wanted and _names(entry[0], name) for entry in entries)


def _names(part: str, name: str) -> bool:
    """Whether a device's name has this part, as whole words: an A100 is no A10."""
    return f" {part} " in f" {name} "


def device_name(device: torch.device | str) -> str:
    """What `best` is asked with for a device: a GPU's own name, else as in ``"x86_64 CPU"``."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.get_device_name(kind)
    return f"{platform.machine()} {kind.type.upper()}"


def user_file() -> Path:
    """Where the user's entries are: ``$WHATWHERE_CHOICES``, else in the folder of settings.

    That is ``$XDG_CONFIG_HOME/whatwhere/choices.json``, by default
    ``~/.config/whatwhere/choices.json``. The file need not exist.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    # As the XDG rules say, a relative folder does not count.
    given = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    try:
        folder = given if given.is_absolute() else Path.home() / ".config"
    except RuntimeError:  # a user without a home has no settings
        folder = Path(os.devnull)
    return folder / "whatwhere" / "choices.json"


def save(entries: Iterable[Mapping[str, Any]]) -> Path:
    """Replace the user's entries, under a temporary name until the file is whole.

    Args:
        entries: As `validate` wants them.

    Returns:
        The file.

    Raises:
        ValueError: If an entry is not valid; the file is as it was.
        OSError: If it cannot be written; likewise.
    """
    path = user_file()
    content = {"entries": [dict(entry) for entry in entries]}
    validate(content, "entries")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    forget()
    return path


def load(path: Path) -> list[dict[str, Any]]:
    """The entries of a file; none if there is no file.

    Raises:
        ValueError: If it is no JSON or not as `validate` wants it; the message names the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (NotADirectoryError, PermissionError) as error:
        if os.environ.get(VARIABLE):
            raise ValueError(f"{path} cannot be read: {error}") from None
        return []  # nobody named it
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return validate(content, str(path))


def validate(content: Any, where: str) -> list[dict[str, Any]]:
    """Check what a file of choices holds: a mapping whose ``entries`` is a list of entries.

    An entry has exactly the keys ``device`` (part of a device's name), ``head_dim``,
    ``feature_dim``, ``value_dim``, ``min_length``, ``max_length`` (``null``: no end; both
    inclusive), ``stage``, ``backend``, ``measured`` and ``source``.

    Args:
        content: What the JSON was read into.
        where: What messages call it.

    Returns:
        The entries.

    Raises:
        ValueError: If it is anything else; the message names the entry and the key.
    """
    entries = content.get("entries") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{where}: expected a mapping whose 'entries' is a list")
    for number, entry in enumerate(entries):
        at = f"{where}: entry {number}"
        if not isinstance(entry, dict) or set(entry) != set(_KEYS):
            raise ValueError(f"{at}: expected a mapping with keys {', '.join(_KEYS)}")
        for key, kind in _KEYS.items():
            value = entry[key]
            # True is an int in Python, and is meant as none here.
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{at}: {key} is {value!r}")
        if not entry["device"] or not entry["backend"]:
            raise ValueError(f"{at}: device and backend must not be empty")
        if entry["stage"] not in STAGES:
            raise ValueError(f"{at}: stage is {entry['stage']!r}, expected one of {STAGES}")
        if any(entry[key] < 1 for key in _WIDTHS):
            raise ValueError(f"{at}: {', '.join(_WIDTHS)} must be at least 1")
        if entry["max_length"] is not None and entry["max_length"] < entry["min_length"]:
            raise ValueError(f"{at}: max_length is below min_length")
    return entries


def forget() -> None:
    """Read the files again at the next call of `best`."""
    _read.clear()


_read: dict[str, tuple[Entry, ...]] = {}


def _tables() -> tuple[Entry, ...]:
    if "entries" not in _read:
        kept = tuple(_KEYS)[:9]
        entries: Any = [*load(user_file()), *load(SHIPPED)]
        _read["entries"] = tuple(tuple(entry[key] for key in kept) for entry in entries)
    return _read["entries"]


# What torch.compiler.assume_constant_result sets: a traced call keeps the entries as they were
# then, since no file is read in a graph. The function itself would load PyTorch's compiler here.
_tables._dynamo_marked_constant = True  # type: ignore[attr-defined]
device_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
