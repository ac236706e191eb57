"""What the harness says of a run: scores of zero-shot tasks, of needles, of long documents."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from whatwhere.lab import storage
from whatwhere.lab.data import Task, TextTask, TokensTask
from whatwhere.lab.data.raw import DATA_VARIABLE
from whatwhere.lab.recipes.schema import EvaluationSettings
from whatwhere.lab.runs import Run

Score = tuple[str, int, float]
"""Metric, length in tokens, value."""

KEPT = ("acc", "acc_norm", "exact_match", "score")
"""Metrics of the harness that become results."""


def check_tasks(settings: EvaluationSettings) -> None:
    """Check that the harness is there and its data are where they should be, before training.

    Raises:
        ValueError: If not, in one line.
    """
    if not settings.tasks:
        return
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError(
            "evaluation.tasks: the harness is needed: pip install 'whatwhere[eval]'"
        ) from None
    data = task_data(settings)
    if data is not None and not data.is_dir():
        raise ValueError(f"evaluation.task_data: {data} is no folder")
    from whatwhere.lab.harness import running

    try:
        running.check_data(settings.tasks, data)
    except ValueError as error:
        line = str(error).replace("--data", f"--evaluation.task-data or ${DATA_VARIABLE}")
        raise ValueError(f"evaluation.tasks: {line}") from error


def task_data(settings: EvaluationSettings) -> Path | None:
    """The folder of the tasks' files: the one named, else `$WHATWHERE_DATA`, else the hub."""
    named = settings.task_data or os.environ.get(DATA_VARIABLE)
    return Path(named).expanduser() if named else None


def task_scores(run: Run, weights: Run, task: Task, model: Any) -> list[Score]:
    """Scores of a run in its recipe's tasks; those that its folder has finished are kept.

    YaRN that borrows the weights of a rope run is given the true length at each prompt length,
    as in the RoPE-ID paper (arXiv 2603.18017).

    Args:
        run: Whose `harness/` the harness writes to.
        weights: The run whose model it is.
        task: Its data, for the length and the tokenizer.
        model: Loaded from `weights`.

    Raises:
        ValueError: If the harness cannot measure a task, in one line.
    """
    settings = run.config.evaluation
    if not settings.tasks:
        return []
    place = run.folder / "harness"
    if run is weights or run.config.encoding.name != "yarn":
        return _scores(str(weights.folder), settings, place, settings.task_lengths, task.length)
    found: list[Score] = []
    for length in settings.task_lengths or (task.length,):
        factor = max(1.0, length / task.length)
        model.set_position_encoding("yarn", **run.config.encoding.options, factor=factor)
        with storage.new_folder(run.folder / "stretched") as folder:
            model.save_pretrained(folder)
            _save_tokenizer(task, folder)
        try:
            lengths = (length,) if settings.task_lengths else ()
            source = str(run.folder / "stretched")
            found += _scores(source, settings, place / str(length), lengths, task.length)
        finally:
            shutil.rmtree(run.folder / "stretched")
    return list(dict.fromkeys(found))


def _scores(
    model: str,
    settings: EvaluationSettings,
    output: Path,
    lengths: tuple[int, ...],
    train_length: int,
) -> list[Score]:
    from whatwhere.lab.harness import running
    from whatwhere.lab.harness.settings import Settings

    given = Settings(
        model=model,
        tasks=settings.tasks,
        data=task_data(settings),
        lengths=lengths,
        limit=settings.task_limit,
        # RULER's prompts are made for lengths beyond the training length.
        max_length=settings.task_max_length or max((*lengths, train_length)),
        bootstrap=0,
    )
    # Other settings have a folder of their own: what was measured with these is kept.
    identity = json.dumps(given.identity(), sort_keys=True)
    folder = output / hashlib.sha256(identity.encode()).hexdigest()[:8]
    given = replace(given, output=folder)

    def say(line: str) -> None:
        Console().print(f"{output.parent.name}  {line}", highlight=False, soft_wrap=True)

    try:
        rows = running.run(given, say)
    except ValueError as error:  # what could be known before training was
        raise storage.RunError(f"{output.parent}: {error}; its weights are kept") from error
    return scores_of(rows, max((*lengths, train_length)))


def scores_of(rows: pd.DataFrame, length: int) -> list[Score]:
    """Rows of harness.csv as scores.

    RULER's metrics are prompt lengths; other tasks are read at `length`. The mean over the PoPE
    paper's six tasks is `zero_shot_accuracy`.
    """
    from whatwhere.lab.harness.paper import TASKS

    found: list[Score] = []
    for row in rows[rows["group"] == ""].to_dict("records"):
        metric, value = str(row["metric"]), float(row["value"])
        if metric.isdecimal():
            found.append((f"{row['task']}_accuracy", int(metric), value))
        elif metric in KEPT:
            found.append((f"{row['task']}_{metric}", length, value))
    known = {name: value for name, _, value in found}
    six = [known.get(f"{task}_{metric}") for task, metric in TASKS.items()]
    present = [value for value in six if value is not None]
    if len(present) == len(six):
        found.append(("zero_shot_accuracy", length, sum(present) / len(present)))
    return found


def _save_tokenizer(task: Task, folder: Path) -> None:
    # A model of bytes is known by its vocabulary and needs none.
    if not isinstance(task, TextTask | TokensTask) or task.tokenizer_name == "bytes":
        return
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(task.tokenizer_name, trust_remote_code=False).save_pretrained(
        folder
    )
