"""Names on the command line to tasks of the harness: its own, ours, and those of files."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from whatwhere.lab.harness import layouts, local
from whatwhere.lab.harness.files import digest
from whatwhere.lab.harness.local import Prepared

STOCK = Path(lm_eval.tasks.__file__).parent
OURS = Path(__file__).parent / "tasks"
# The folders that most evaluations need: the whole index takes the harness several seconds.
COMMON = tuple(STOCK / name for name in ("lambada", "blimp", "hellaswag", "piqa", "arc"))
RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
"""Lengths that the harness's RULER has metrics for."""
EXTRAS = {"ruler": "ruler", "niah": "ruler", "longbench": "longbench"}
"""Extra of lm_eval that a task needs, by the beginning of its name."""


class Catalog:
    """The tasks that can be named.

    Args:
        include: Folders of more tasks, before the harness's own.
        metadata: What tasks that generate their data are told: `tokenizer`, `max_seq_lengths`.
    """

    def __init__(self, include: Sequence[Path] = (), metadata: dict[str, Any] | None = None):
        self._include = [*include]
        self._metadata = metadata or {}
        self._manager = self._build(COMMON)
        self._complete = False

    def resolve(self, given: Sequence[str]) -> list[str]:
        """Names of tasks and groups: patterns, files and folders in their place.

        Args:
            given: Names, patterns as in `blimp_*`, YAML files, or folders of them.

        Raises:
            ValueError: If there is no such task, with the nearest names.
        """
        names: list[str] = []
        for entry in given:
            names += self._resolve(entry)
        if not names:
            raise ValueError("tasks: name at least one, as in lambada_openai,blimp")
        return list(dict.fromkeys(names))

    def prepare(self, name: str, data: Path | None) -> Prepared:
        """The task or group of a name, its documents loaded.

        Args:
            name: From `resolve`.
            data: Folder of local files; `None` is the hub, as is a task that has no local layout.

        Raises:
            ValueError: If its data or a package that it needs cannot be had.
        """
        self._need(name)
        if data is not None:
            prepared = local.prepare(self._manager, name, data)
            if prepared is not None:
                return prepared
        try:
            loaded = self._manager.load([name])
        except ImportError as error:
            raise ValueError(_missing_package(name, error)) from error
        except Exception as error:
            if not _no_data(error):
                raise
            raise ValueError(_missing_data(name, error)) from error
        item = loaded.get("groups", {}).get(name) or loaded["tasks"].get(name, name)
        return Prepared(name, item, self._own_files(name))

    @property
    def manager(self) -> TaskManager:
        """The harness's own catalogue."""
        return self._manager

    def _resolve(self, entry: str) -> list[str]:
        path = Path(entry)
        if path.suffix in (".yaml", ".yml") or path.is_dir():
            return self._of_files(path)
        if any(sign in entry for sign in "*?["):
            self._all()
            found = fnmatch.filter(self._manager.all_tasks, entry)
            if not found:
                raise ValueError(f"tasks: no task matches {entry!r}")
            return found
        self._need(entry)
        return [entry]

    def _of_files(self, path: Path) -> list[str]:
        if not path.exists():
            raise ValueError(f"tasks: {path} does not exist")
        folder = (path if path.is_dir() else path.parent).resolve()
        alone = TaskManager(include_defaults=False, include_path=[folder])
        names = [*alone.all_groups] or [*alone.all_subtasks]
        if path.is_file():
            wanted = path.resolve()
            index = alone.task_index.items()
            names = [name for name, e in index if e.yaml_path and e.yaml_path.resolve() == wanted]
        if not names:
            raise ValueError(f"tasks: {path} holds no task of the harness")
        if folder not in self._include:
            self._include.append(folder)
            self._manager = self._build((STOCK,) if self._complete else COMMON)
        return names

    def _need(self, name: str) -> None:
        if name not in self._manager.task_index:
            self._all()
        if name not in self._manager.task_index:
            near = get_close_matches(name, self._manager.all_tasks, n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(f"tasks: there is no task {name!r}{hint}")

    def _all(self) -> None:
        if not self._complete:
            self._manager = self._build((STOCK,))
            self._complete = True

    def _build(self, stock: Sequence[Path]) -> TaskManager:
        paths: list[str | Path] = [*stock, OURS, *self._include]
        return TaskManager(
            include_defaults=False, include_path=paths, metadata=self._metadata or None
        )

    def _own_files(self, name: str) -> dict[str, str]:
        path = self._manager.task_index[name].yaml_path
        if path is None or not any(path.is_relative_to(folder) for folder in self._include):
            return {}
        kinds = (".yaml", ".yml", ".py", ".json", ".jsonl")
        return digest(file for file in path.parent.iterdir() if file.suffix in kinds)


def _no_data(error: Exception) -> bool:
    """Whether the hub, or a file of it, could not be had: one of many errors of its clients."""
    if isinstance(error, (OSError, LookupError)):
        return True
    module = type(error).__module__.partition(".")[0]
    return module in ("datasets", "huggingface_hub", "httpx", "fsspec")


def _missing_data(name: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
    files = layouts.wanted(name)
    bring = (
        f"bring {files} and name the folder that holds it with --data"
        if files
        else "go online once to fetch it"
    )
    return f"{name}: its data cannot be had ({reason}); {bring}"


def _missing_package(name: str, error: ImportError) -> str:
    extra = next((value for key, value in EXTRAS.items() if name.startswith(key)), None)
    if extra:
        return f"{name}: needs packages that are not installed: pip install 'lm_eval[{extra}]'"
    return f"{name}: needs a package that is not installed ({error.name or error})"
