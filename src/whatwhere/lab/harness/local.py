"""The harness's own tasks over local documents: its prompts and metrics, our files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager

from whatwhere.lab.harness import layouts
from whatwhere.lab.harness.files import Item, digest

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass
class Prepared:
    """What the harness evaluates for one name that was asked for.

    Attributes:
        name: As asked for.
        item: A task or group of the harness, or a name that it knows.
        files: SHA-256 of each local file it reads, by name.
        notes: What keeps numbers from being compared, by task.
        no_examples: Tasks whose split for examples the local files do not have.
    """

    name: str
    item: Task | Group | str
    files: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    no_examples: tuple[str, ...] = ()


def prepare(manager: TaskManager, name: str, data: Path) -> Prepared | None:
    """A task, or a group of tasks, whose documents come from files below `data`.

    Args:
        manager: Knows the task.
        name: Of the task or group.
        data: Folder.

    Returns:
        `None` if there is no local layout for it.

    Raises:
        ValueError: If a file is missing, damaged or of another count.
    """
    members = _members(manager, name)
    found = {member: layouts.find(member) for member in members}
    if not all(found.values()):
        return None
    read = {member: layout.read(data) for member, layout in found.items() if layout}
    specs = [_override(manager, member, local) for member, local in read.items()]
    # A group's members may override what a task is registered with; a task by itself may not.
    tasks = manager.load({"group": f"{name} of local files", "task": specs})["tasks"]
    item: Task | Group = tasks[name] if name in tasks else _group(manager, name, tasks)
    files = {path for local in read.values() for path in local.files}
    notes = {member: local.note for member, local in read.items() if local.note}
    lacking = [member for member, local in read.items() if _lacks_examples(manager, member, local)]
    return Prepared(name, item, digest(files), notes, tuple(lacking))


def _members(manager: TaskManager, name: str) -> list[str]:
    config: dict[str, Any] = manager.task_index[name].cfg or {}
    listed = config.get("task")
    return [str(member) for member in listed] if isinstance(listed, list) else [name]


def _override(manager: TaskManager, name: str, local: layouts.Local) -> dict[str, Any]:
    stock: dict[str, Any] = manager.task_index[name].cfg or {}
    files = ", ".join(f"{path.parent.name}/{path.name}" for path in local.files)
    spec = {
        "task": name,
        "custom_dataset": _loader(local.splits),
        "dataset_path": f"local files: {files}",
        "dataset_name": None,
        "metadata": {**stock.get("metadata", {}), "note": local.note},
    }
    # Splits that the files do not have are none; the harness would look for them when it needs
    # examples.
    spec |= {key: None for key in SPLITS if stock.get(key) not in (None, *local.splits)}
    return spec


def _lacks_examples(manager: TaskManager, name: str, local: layouts.Local) -> bool:
    stock: dict[str, Any] = manager.task_index[name].cfg or {}
    split = stock.get("fewshot_split") or stock.get("training_split")
    return split is not None and split not in local.splits


def _loader(splits: dict[str, list[Item]]) -> Callable[..., DatasetDict]:
    def documents(**_: Any) -> DatasetDict:
        """Documents from local files, as the hub's dataset has them."""
        return DatasetDict({split: Dataset.from_list(items) for split, items in splits.items()})

    return documents


def _group(manager: TaskManager, name: str, tasks: dict[str, Task]) -> Group:
    group = Group.from_config(GroupConfig(**(manager.task_index[name].cfg or {})))
    for task in tasks.values():
        group.add(task)
    return group
