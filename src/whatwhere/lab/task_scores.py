"""What the harness says of a run: scores of zero-shot tasks, of needles, of long documents."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from whatwhere.lab import storage
from whatwhere.lab.data import Task, TextTask, TokensTask
from whatwhere.lab.data.raw import DATA_VARIABLE
from whatwhere.lab.harness.paper import LONGBENCH, TASKS
from whatwhere.lab.harness.rows import NAME
from whatwhere.lab.harness.settings import Settings
from whatwhere.lab.process import process_count
from whatwhere.lab.recipes.schema import EvaluationSettings
from whatwhere.lab.runs import Run

Score = tuple[str, int, float]
"""Metric, length in tokens, value."""

GENERATED = ("ruler", "niah")
"""Beginnings of the names of tasks that make their prompts."""

OF_LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
"""What torchrun tells its processes."""

KEPT = ("acc", "acc_norm", "exact_match", "score")
"""Metrics of the harness that become results."""


def check_tasks(settings: EvaluationSettings) -> None:
    """Check that the harness is there and its data are where they should be, before training.

    Raises:
        ValueError: If not, in one line.
    """
    if not settings.tasks:
        return
    _need("lm_eval", "the harness is needed: pip install 'whatwhere[eval]'")
    generated = [name for name in settings.tasks if name.startswith(GENERATED)]
    if generated:
        for package in ("wonderwords", "nltk"):
            _need(package, f"{generated[0]} needs {package}: pip install 'lm_eval[ruler]'")
    elif settings.task_lengths:
        raise ValueError("evaluation.task_lengths: only RULER makes its prompts")
    data = task_data(settings)
    if data is not None and not data.is_dir():
        raise ValueError(f"evaluation.task_data: {data} is no folder")
    from whatwhere.lab.harness import running
    from whatwhere.lab.harness.catalog import RULER_LENGTHS

    wrong = [length for length in settings.task_lengths if length not in RULER_LENGTHS]
    if wrong:
        offered = ", ".join(map(str, RULER_LENGTHS))
        raise ValueError(f"evaluation.task_lengths: RULER has {offered}, not {wrong[0]}")
    try:
        running.check_data(settings.tasks, data)
    except ValueError as error:
        line = str(error).replace("--data", f"--evaluation.task-data or ${DATA_VARIABLE}")
        raise ValueError(f"evaluation.tasks: {line}") from error


def task_data(settings: EvaluationSettings) -> Path | None:
    """The folder of the tasks' files: the one named, else `$WHATWHERE_DATA`, else the hub."""
    named = settings.task_data or os.environ.get(DATA_VARIABLE)
    return Path(named).expanduser() if named else None


def read_in_tasks(
    settings: EvaluationSettings, train_length: int, lengths: tuple[int, ...] | None = None
) -> int:
    """Tokens that a model reads at most, of prompts of these lengths (default: the recipe's)."""
    asked = settings.task_lengths if lengths is None else lengths
    return settings.task_max_length or max((*asked, train_length))


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
    for length in settings.task_lengths or (settings.task_max_length or task.length,):
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

    longest = read_in_tasks(settings, train_length, lengths)
    given = Settings(
        model=model,
        tasks=settings.tasks,
        data=task_data(settings),
        lengths=lengths,
        limit=settings.task_limit,
        # RULER's prompts are made for lengths beyond the training length.
        max_length=longest,
        bootstrap=0,
    )
    # Other settings have a folder of their own: what was measured with these is kept.
    identity = json.dumps(given.identity(), sort_keys=True)
    folder = output / hashlib.sha256(identity.encode()).hexdigest()[:8]
    given = replace(given, output=folder)

    def say(line: str) -> None:
        Console().print(f"{output.parent.name}  {line}", highlight=False, soft_wrap=True)

    try:
        rows = running.run(given, say) if process_count() == 1 else _apart(given, folder)
    except ValueError as error:  # what could not be known before training was
        raise storage.RunError(f"{output.parent}: {error}; its weights are kept") from error
    return scores_of(rows, longest)


def _apart(given: Settings, folder: Path) -> pd.DataFrame:
    # With several processes the harness would gather over all of them, but one evaluates: it
    # runs as a program of its own that knows nothing of the others.
    options = {
        "--tasks": ",".join(given.tasks),
        "--data": given.data,
        "--lengths": ",".join(map(str, given.lengths)),
        "--limit": given.limit,
        "--max-length": given.max_length,
        "--bootstrap": given.bootstrap,
        "--output": folder,
    }
    command = [sys.executable, "-m", "whatwhere.cli", "evaluate", given.model]
    for name, value in options.items():
        if value is not None and value != "":
            command += [name, str(value)]
    alone = {
        name: value
        for name, value in os.environ.items()
        if name not in OF_LAUNCHERS and not name.startswith(("TORCHELASTIC_", "ACCELERATE_"))
    }
    done = subprocess.run(command, env=alone, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(last.removeprefix("whatwhere: "))
    return pd.read_csv(folder / NAME, keep_default_na=False)


def scores_of(rows: pd.DataFrame, length: int) -> list[Score]:
    """Rows of harness.csv as scores.

    RULER's metrics are prompt lengths, each the mean over its tasks: the harness's own group
    aggregates 4,096 alone. Other tasks are read at `length`. Means over the PoPE paper's six
    tasks and over the 14 of LongBench are `zero_shot_accuracy` and `longbench_score`.
    """
    found: list[Score] = []
    prompts: dict[tuple[str, int], list[float]] = {}
    for row in rows.to_dict("records"):
        metric, value, task = str(row["metric"]), float(row["value"]), str(row["task"])
        group = str(row["group"] or "")
        if metric.isdecimal():
            name = group or task
            if group or not (rows["group"] == task).any():
                prompts.setdefault((name, int(metric)), []).append(value)
        elif metric in KEPT and not group:
            found.append((f"{task}_{metric}", length, value))
    found += [
        (f"{name}_accuracy", n, sum(values) / len(values)) for (name, n), values in prompts.items()
    ]
    known = {name: value for name, _, value in found}
    means = {
        "zero_shot_accuracy": [f"{task}_{metric}" for task, metric in TASKS.items()],
        "longbench_score": [f"{task}_score" for task in LONGBENCH],
    }
    for name, parts in means.items():
        if known.keys() >= set(parts):
            found.append((name, length, sum(known[part] for part in parts) / len(parts)))
    return found


def _need(package: str, line: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"evaluation.tasks: {line}")


def _save_tokenizer(task: Task, folder: Path) -> None:
    # A model of bytes is known by its vocabulary and needs none.
    if not isinstance(task, TextTask | TokensTask) or task.tokenizer_name == "bytes":
        return
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(task.tokenizer_name, trust_remote_code=False).save_pretrained(
        folder
    )
