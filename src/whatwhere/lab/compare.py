"""One comparison: train every encoding and seed of a recipe alike, evaluate, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

import whatwhere as ww
from whatwhere.lab import parallel, recipes, runs, storage
from whatwhere.lab.data import Task, make_task
from whatwhere.lab.evaluate import evaluate
from whatwhere.lab.planning import (
    Planned,
    choose,
    merged_settings,
    plan_all,
    trainer_of,
    with_sources,
)
from whatwhere.lab.process import is_main_process
from whatwhere.lab.reading import READING, Reading, reading_of
from whatwhere.lab.recipes.files import to_yaml
from whatwhere.lab.recipes.schema import EncodingChoice, Recipe
from whatwhere.lab.runs import Run
from whatwhere.lab.task_scores import check_tasks
from whatwhere.lab.train import build_model, train

__all__ = ["Comparison", "choose", "evaluate_again", "summary"]


class Comparison:
    """A recipe, its data and its folder, checked before anything is trained.

    Args:
        recipe: What to compare.
        folder: Where runs, results and report go.

    Raises:
        ValueError: If the text, an encoding, a shape or a length is impossible, or the folder
            belongs to another config. Nothing has been written then.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = with_sources(recipe), folder
        self.trainer = self._trainer()
        self.task: Task = self.trainer.task if self.trainer else make_task(self.recipe.data)
        self._check_models()
        self.reading: Reading | None = reading_of(self.recipe.evaluation, self.task)
        self._check_lengths()
        check_tasks(self.recipe.evaluation)
        self.settings = merged_settings(self.recipe, folder)
        self.description = self.task.describe()
        self._planned = plan_all(self.settings, self.recipe, folder)
        for planned in self._planned:
            parallel.check(planned.run.config.training, self.task.length)
            runs.check(planned.run, self.description, planned.source)

    def run(self) -> Path:
        """Do whatever is not done yet; return the report.

        Raises:
            Interrupted: On Ctrl-C or SIGTERM during training, once a checkpoint is saved.
            RunError: If another process works in the folder, or the disk is full.
            ValueError: If a run's folder belongs to another config.
        """
        from whatwhere.lab.report.page import build_report

        if self.trainer is not None:
            self.trainer.run()
        if not is_main_process():
            for planned in self._planned:
                self._train(planned)
            return self.folder
        with storage.lock(self.folder):
            storage.write_text(self.folder / "settings.yaml", to_yaml(self.settings))
            for planned in self._planned:
                self._one(planned)
            self._merge()
            with storage.disk_errors(self.folder):
                return build_report(self.folder)

    def show(self) -> None:
        """Print loss by length, or accuracy, of all runs in the folder."""
        from whatwhere.lab.report.page import unit_of

        table = pd.read_csv(self.folder / "results.csv", dtype={"encoding": str})
        Console().print(summary(table, unit_of(self.recipe)))

    def _trainer(self) -> Comparison | None:
        # The comparison that trains what this one only evaluates or fine-tunes.
        name = self.recipe.trained_by
        if name is None:
            return None
        known = name in recipes.names() and self.recipe.preset in recipes.presets(name)
        base = recipes.get(name, self.recipe.preset or "quick") if known else None
        place = self.folder.absolute().parent / name
        if place == self.folder.absolute():
            raise ValueError(
                f"output: {self.folder} is the folder of recipe {name!r}, which trains the models "
                "that this one reads: choose another name"
            )
        return Comparison(trainer_of(self.recipe, base), place)

    def _one(self, planned: Planned) -> None:
        run, say = planned.run, Console().print
        runs.claim(run, self.description, planned.source, planned.how)
        if run.evaluated and not self._read_another_text(run):
            say(f"{run.folder.name}  done before", highlight=False)
            return
        self._train(planned)
        for note in evaluate(run, self.task, planned.lender, self.reading):
            say(f"{run.folder.name}  {note}", highlight=False)
        self._merge()

    def _read_another_text(self, run: Run) -> bool:
        # Whether its losses by length are of a text that has changed since.
        known = run.folder / READING
        if self.reading is None or not known.exists():
            return False
        return _checksums(storage.read_json(known)) != _checksums(self.reading.describe())

    def _train(self, planned: Planned) -> None:
        run = planned.run
        if run.trained or planned.how == "borrow":
            return
        if planned.source is None:
            train(run, self.task)
        else:
            train(run, make_task(run.config.data), initial=planned.source.model)

    def _merge(self) -> None:
        known = [planned.run for planned in self._planned]
        runs.merge_results(self.folder, in_order(self.folder, known))

    def _check_models(self) -> None:
        backend = self.recipe.model.attention_backend
        if backend not in ("auto", *ww.BACKENDS):
            known = ", ".join(["auto", *ww.BACKENDS])
            raise ValueError(f"model.attention_backend: no {backend!r}, expected one of {known}")
        for label, choice in self.recipe.encodings.items():
            try:
                self._check_model(choice)
            except ValueError as error:
                raise ValueError(f"encoding {label!r}: {error}") from None
            except TypeError as error:  # a word where a number belongs
                raise ValueError(
                    f"encoding {label!r}: options {choice.options} have a wrong type: {error}"
                ) from None

    def _check_model(self, choice: EncodingChoice) -> None:
        import torch

        options = dict(choice.options)
        if choice.name == "yarn":
            options["factor"] = float(self.recipe.evaluation.finetune.factor)
        with torch.device("meta"):
            resolved = EncodingChoice(name=choice.name, options=options)
            build_model(self.recipe.model, self.task, resolved, seed=0)

    def _check_lengths(self) -> None:
        for length in self.recipe.evaluation.lengths:
            if self.reading is None:
                raise ValueError("evaluation.lengths: this task has one length")
            try:
                self.reading.windows(length, 1)
            except ValueError as error:
                raise ValueError(f"evaluation.lengths: {error}") from None


def _checksums(record: dict[str, Any]) -> dict[str, Any]:
    # Where a text lies does not count.
    return {key: value for key, value in record.items() if "sha256" in key or key == "split"}


def summary(results: pd.DataFrame, unit: str) -> Table:
    """Mean over seeds of the accuracy, or else of a loss at each length, as a table to print.

    Args:
        results: As in results.csv; of a recipe without lengths the validation loss is shown.
        unit: Of the losses.
    """
    from whatwhere.lab.report.findings import main_metric

    metric = main_metric(results)
    chosen = results[results["metric"] == metric]
    lengths = sorted(set(chosen["length"]))
    name = metric.replace("_", " ")
    title = name if metric.endswith("accuracy") else f"{name}, {unit}"
    table = Table(title=title, title_justify="left")
    table.add_column("encoding")
    for length in lengths:
        table.add_column(str(length), justify="right")
    for label, part in chosen.groupby("encoding", sort=False):
        values = {length: same["value"] for length, same in part.groupby("length")}
        # A run that diverged makes the mean NaN, which is not the same as no result.
        cells = [f"{values[n].mean(skipna=False):.4f}" if n in values else "" for n in lengths]
        table.add_row(str(label), *cells)
    return table


def evaluate_again(folder: Path) -> Run:
    """Measure a trained run again and write its results, and those of the comparison it is of.

    Raises:
        ValueError: If the folder holds no trained run, or its text is no longer the same.
        RunError: If another process works there, or the disk is full.
    """
    planned = planned_of(folder)
    run, source = planned.run, planned.source
    if not planned.weights.trained:
        raise ValueError(f"{folder} is not trained to its end: run its comparison first")
    # A fine-tuned run has longer sequences than its comparison evaluates at.
    task = make_task((source or run).config.data)
    runs.check(run, task.describe(), source)
    with storage.lock(folder.parent):
        reading = reading_of(run.config.evaluation, task)
        for note in evaluate(run, task, planned.lender, reading):
            Console().print(f"{folder.name}  {note}", highlight=False)
        if (folder.parent / "results.csv").exists():
            others = [
                runs.load_run(path.parent) for path in sorted(folder.parent.glob("*/run.json"))
            ]
            runs.merge_results(folder.parent, in_order(folder.parent, others))
    return run


def in_order(folder: Path, known: Sequence[Run]) -> list[Run]:
    """Runs of a comparison in the order of its settings."""
    path = folder / "settings.yaml"
    labels = list(recipes.from_yaml(path).encodings) if path.exists() else []

    def place(run: Run) -> tuple[int, int]:
        label = run.config.label
        return (labels.index(label) if label in labels else len(labels), run.config.seed)

    return sorted(known, key=place)


def planned_of(folder: Path) -> Planned:
    """The run that a folder holds, and the one its weights come from.

    Raises:
        ValueError: If it holds none.
    """
    run, record = runs.load_run(folder), runs.load_record(folder)
    source = runs.source_folder(folder, record)
    if source is None:
        return Planned(run)
    # Records from before it was written: YaRN alone had a source.
    borrowed = record.get("how", run.config.evaluation.yarn) in ("borrow", "evaluate")
    return Planned(run, "borrow" if borrowed else "finetune", runs.load_run(source))
