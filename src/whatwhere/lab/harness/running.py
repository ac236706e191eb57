"""An evaluation: every task through the harness, one folder each, resumed where it stopped."""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from lm_eval import evaluator
from lm_eval.api.task import Task
from lm_eval.loggers import EvaluationTracker

from whatwhere.lab import storage
from whatwhere.lab.harness import record, rows, subject
from whatwhere.lab.harness.catalog import RULER_LENGTHS, Catalog
from whatwhere.lab.harness.local import Prepared
from whatwhere.lab.harness.model import CountingLM, TooLongError, load
from whatwhere.lab.harness.settings import Settings

GENERATED = ("ruler", "niah")
"""Beginnings of the names of tasks that make their prompts with the model's tokenizer."""


def run(settings: Settings, say: Callable[[str], None]) -> pd.DataFrame:
    """Evaluate a model on tasks; those that the folder has finished are not repeated.

    Args:
        settings: What to evaluate.
        say: Shows a line.

    Returns:
        The rows of `harness.csv`, which is written to the folder.

    Raises:
        ValueError: If model, tasks, data or folder are not as they should be; nothing was changed
            then.
        RunError: If results cannot be written.
    """
    settings.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evaluate runs in one process: start it without torchrun or accelerate")
    found = subject.find(settings.model)
    folder = settings.output or found.folder
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        catalog = Catalog(settings.include, _metadata(settings, found, Path(scratch)))
        names = catalog.resolve(settings.tasks)
        prepared = _prepare(catalog, names, settings, say)
        identity = subject.identity(found, settings)
        record.check(folder, settings, identity)
        left = _left(prepared, folder, say)
        # Whatever can be wrong with the model is found before anything is written.
        lm = _loaded(left, found, settings) if left else None
        with storage.lock(folder):
            record.claim(folder, settings, identity)
            if lm is not None:
                _evaluate(left, lm, catalog, found, settings, folder, say)
            return rows.write(folder)


def check_data(tasks: Sequence[str], data: Path | None) -> None:
    """Check that tasks and their data are there, before there is a model to evaluate.

    Tasks that make their prompts with the model's tokenizer (RULER) are not looked into.

    Args:
        tasks: Names, patterns, files or folders.
        data: Folder of local files; `None` is the hub.

    Raises:
        ValueError: If a task or its data cannot be had, in one line.
    """
    read = [name for name in tasks if not name.startswith(GENERATED)]
    if not read:
        return
    with _quiet():
        catalog = Catalog()
        for name in catalog.resolve(read):
            catalog.prepare(name, data)


def _prepare(
    catalog: Catalog, names: Sequence[str], settings: Settings, say: Callable[[str], None]
) -> list[Prepared]:
    say(f"reading the data of {', '.join(names)}")
    found = [catalog.prepare(name, settings.data) for name in names]
    for prepared in found:
        if settings.num_fewshot and prepared.no_examples:
            raise ValueError(
                f"num-fewshot: {prepared.no_examples[0]} takes its examples from a split that "
                f"{settings.data} does not hold"
            )
        for name, note in prepared.notes.items():
            say(f"{name}: {note}")
    return found


def _left(
    prepared: Sequence[Prepared], folder: Path, say: Callable[[str], None]
) -> list[Prepared]:
    left = [one for one in prepared if not record.done(folder, one.name, one.files)]
    for one in prepared:
        if one not in left:
            say(f"{one.name}: done before")
    return left


def _loaded(left: Sequence[Prepared], found: subject.Subject, settings: Settings) -> CountingLM:
    lm = load(found, settings)
    for one in left:
        _check_length(one, lm)
    return lm


def _evaluate(
    left: Sequence[Prepared],
    lm: CountingLM,
    catalog: Catalog,
    found: subject.Subject,
    settings: Settings,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    for count, one in enumerate(left, 1):
        say(f"{one.name} ({count} of {len(left)})")
        started = time.monotonic()
        _one(one, lm, catalog, found, settings, folder)
        say(f"{one.name}: done in {time.monotonic() - started:.0f} s")


def _one(
    prepared: Prepared,
    lm: CountingLM,
    catalog: Catalog,
    found: subject.Subject,
    settings: Settings,
    folder: Path,
) -> None:
    started = time.monotonic()
    lm.take_cut()
    with storage.new_folder(folder / prepared.name) as partial:
        tracker = EvaluationTracker(output_path=str(partial))
        seeds = settings.seeds
        try:
            results: Any = evaluator.simple_evaluate(
                model=lm,
                model_args={"pretrained": found.given, "dtype": settings.dtype},
                tasks=[prepared.item],
                num_fewshot=settings.num_fewshot,
                batch_size=settings.batch_size,
                device=str(lm.device),
                limit=settings.limit,
                bootstrap_iters=settings.bootstrap,
                log_samples=settings.log_samples,
                evaluation_tracker=tracker,
                task_manager=catalog.manager,
                random_seed=seeds[0],
                numpy_random_seed=seeds[1],
                torch_random_seed=seeds[2],
                fewshot_random_seed=seeds[3],
            )
        except TooLongError as error:
            raise ValueError(f"{prepared.name}: {error}") from error
        samples = results.pop("samples", None)
        tracker.save_results_aggregated(results=results, samples=samples)
        for name in samples or ():
            tracker.save_results_samples(name, samples[name])
        if not list(partial.rglob("results_*.json")):  # the tracker hides why it could not write
            raise storage.RunError(f"the results of {prepared.name} could not be written")
        content = {
            "task": prepared.name,
            "files": prepared.files,
            "notes": prepared.notes,
            "cut": lm.take_cut(),
            "seconds": round(time.monotonic() - started, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        storage.write_json(partial / record.TASK, content)


def _metadata(settings: Settings, found: subject.Subject, scratch: Path) -> dict[str, Any]:
    """What RULER's tasks are told.

    They load the tokenizer by name, with code of its own allowed: a saved copy has none.
    """
    if not any(name.startswith(GENERATED) for name in settings.tasks):
        if settings.lengths:
            raise ValueError("lengths: only RULER takes lengths; see whatwhere needles for others")
        return {}
    lengths = settings.lengths or (4096,)
    wrong = [length for length in lengths if length not in RULER_LENGTHS]
    if wrong:
        offered = ", ".join(map(str, RULER_LENGTHS))
        raise ValueError(
            f"lengths: the harness's RULER has {offered}, not {wrong[0]}; whatwhere needles makes "
            "prompts of any length"
        )
    subject.load_tokenizer(found, settings).save_pretrained(scratch)
    return {"tokenizer": str(scratch), "max_seq_lengths": list(lengths)}


def _tasks(prepared: Prepared) -> dict[str, Task]:
    item: Any = prepared.item
    if isinstance(item, Task):
        return {prepared.name: item}
    return {task.task_name: task for task in item.get_all_tasks()}


def _check_length(prepared: Prepared, lm: CountingLM) -> None:
    """Prompts made for a length must not be cut to a shorter one without a word."""
    for name, task in _tasks(prepared).items():
        docs: Any = task.eval_docs
        if "max_length" not in getattr(docs, "features", {}):
            continue
        longest = max(docs["max_length"])
        if longest > lm.max_length:
            raise ValueError(
                f"{name}: its prompts have {longest} tokens, but the model reads {lm.max_length}; "
                f"give --max-length {longest}, which an encoding without a table of positions "
                "allows"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the harness says besides its bars of requests.

    Those are warnings of each cut prompt (what was cut is counted and stands in the table), bars
    of conversions, and git's complaint of a working directory that is no repository.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    bars = datasets.is_progress_bar_enabled()
    commit = evaluator.get_git_commit_hash
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    evaluator.get_git_commit_hash = _commit_here
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = commit
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _commit_here() -> str | None:
    """What the harness records as `git_hash`: of the working directory, if it has one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
