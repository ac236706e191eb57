"""One comparison: train every encoding and seed of a recipe alike, evaluate, report."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

import whatwhere as ww
from whatwhere.lab import parallel, runs, storage
from whatwhere.lab.data import Task, TextData, TextTask, make_task
from whatwhere.lab.evaluate import evaluate
from whatwhere.lab.process import is_main_process
from whatwhere.lab.recipes.files import from_yaml, to_yaml
from whatwhere.lab.recipes.schema import EncodingChoice, Recipe
from whatwhere.lab.runs import Run
from whatwhere.lab.train import build_model, train

# Options of YaRN that the rope run it is made from knows nothing of.
_YARN_ONLY = ("beta_fast", "beta_slow")


def choose(recipe: Recipe, labels: Iterable[str]) -> Recipe:
    """The recipe with these encodings alone, in this order.

    Args:
        recipe: A recipe.
        labels: Labels of its encodings, or any names in `whatwhere.ENCODINGS`, which then have
            their default options. None at all keeps the recipe's.

    Raises:
        ValueError: If a label is neither, or comes twice.
    """
    chosen: dict[str, EncodingChoice] = {}
    for label in labels:
        if label in chosen:
            raise ValueError(f"encodings: {label!r} comes twice")
        if label in recipe.encodings:
            chosen[label] = recipe.encodings[label]
        elif label in ww.ENCODINGS:
            chosen[label] = EncodingChoice(name=label)
        else:
            known = list(dict.fromkeys([*recipe.encodings, *ww.ENCODINGS]))
            close = get_close_matches(label, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"encodings: unknown {label!r}{hint}: expected some of {', '.join(known)}"
            )
    return recipe.model_copy(update={"encodings": chosen}) if chosen else recipe


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
        self.recipe, self.folder = _with_rope_for_yarn(recipe), folder
        self.task: Task = make_task(self.recipe.data)
        self._check_models()
        self._check_lengths()
        self.settings = _merged_settings(self.recipe, folder)
        self.description = self.task.describe()
        self._planned = self._plan_all()
        for run, source in self._planned:
            parallel.check(run.config.training, self.task.length)
            runs.check(run, self.description, source)

    def run(self) -> Path:
        """Do whatever is not done yet; return the report.

        Raises:
            Interrupted: On Ctrl-C or SIGTERM during training, once a checkpoint is saved.
            RunError: If another process works in the folder, or the disk is full.
            ValueError: If a run's folder belongs to another config.
        """
        from whatwhere.lab.report.page import build_report

        if not is_main_process():
            for run, source in self._planned:
                self._train(run, source)
            return self.folder
        with storage.lock(self.folder):
            storage.write_text(self.folder / "settings.yaml", to_yaml(self.settings))
            for run, source in self._planned:
                self._one(run, source)
            self._merge()
            with storage.disk_errors(self.folder):
                return build_report(self.folder)

    def show(self) -> None:
        """Print loss by length, or accuracy, of all runs in the folder."""
        from whatwhere.lab.report.page import unit_of

        table = pd.read_csv(self.folder / "results.csv", dtype={"encoding": str})
        Console().print(summary(table, unit_of(self.recipe)))

    def _one(self, run: Run, source: Run | None) -> None:
        say = Console().print
        runs.claim(run, self.description, source)
        if run.evaluated:
            say(f"{run.folder.name}  done before", highlight=False)
            return
        self._train(run, source)
        for note in evaluate(run, self.task, self._borrowed(source)):
            say(f"{run.folder.name}  {note}", highlight=False)
        self._merge()

    def _train(self, run: Run, source: Run | None) -> None:
        if run.trained or self._borrowed(source):
            return
        if source is None:
            train(run, self.task)
        else:
            train(run, make_task(run.config.data), initial=source.model)

    def _borrowed(self, source: Run | None) -> Run | None:
        # The run whose weights are evaluated as they are, for YaRN without fine-tuning.
        return source if self.recipe.evaluation.yarn == "evaluate" else None

    def _merge(self) -> None:
        labels = list(self.settings.encodings)
        known = sorted(
            (run for run, _ in self._planned),
            key=lambda run: (labels.index(run.config.label), run.config.seed),
        )
        runs.merge_results(self.folder, known)

    def _plan_all(self) -> list[tuple[Run, Run | None]]:
        # What this command asks for, runs that others are made from first; then what earlier
        # commands have trained here, which is checked, and evaluated again if need be.
        def is_yarn(label: str) -> bool:
            return self.settings.encodings[label].name == "yarn"

        asked, found = [], []
        for seed in self.settings.seeds:
            for label in sorted(self.settings.encodings, key=is_yarn):
                pair = self._plan(label, seed)
                if label in self.recipe.encodings and seed in self.recipe.seeds:
                    asked.append(pair)
                elif pair[0].trained or pair[0].evaluated:
                    found.append(pair)
        return asked + found

    def _plan(self, label: str, seed: int) -> tuple[Run, Run | None]:
        # A run, and for YaRN the rope run that it is made from.
        run = runs.plan(self.settings, label, seed, self.folder)
        if self.settings.encodings[label].name != "yarn":
            return run, None
        source = runs.plan(self.settings, _rope_label(self.settings, label), seed, self.folder)
        if self.recipe.evaluation.yarn == "finetune":
            run = Run(run.folder, finetuned(run.config))
        return run, source

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
        if isinstance(self.task, TextTask):
            for length in self.recipe.evaluation.lengths:
                try:
                    self.task.windows(length, 1)
                except ValueError as error:
                    raise ValueError(f"evaluation.lengths: {error}") from None


def summary(results: pd.DataFrame, unit: str) -> Table:
    """Mean over seeds of the accuracy, or else of a loss at each length, as a table to print.

    Args:
        results: As in results.csv; of a recipe without lengths the validation loss is shown.
        unit: Of the losses.
    """
    found = set(results["metric"])
    metric = next((m for m in ("accuracy", "loss") if m in found), "validation_loss")
    chosen = results[results["metric"] == metric]
    lengths = sorted(set(chosen["length"]))
    title = "accuracy" if metric == "accuracy" else f"{metric.replace('_', ' ')}, {unit}"
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
    run = runs.load_run(folder)
    source_name = runs.load_record(folder)["source"]
    source = runs.load_run(folder.parent / source_name) if source_name else None
    borrowed = source if run.config.evaluation.yarn == "evaluate" else None
    if not (borrowed or run).trained:
        raise ValueError(f"{folder} is not trained to its end: run its comparison first")
    # A fine-tuned run has longer sequences than its comparison evaluates at.
    task = make_task((source or run).config.data)
    runs.check(run, task.describe(), source)
    with storage.lock(folder.parent):
        for note in evaluate(run, task, borrowed):
            Console().print(f"{folder.name}  {note}", highlight=False)
        if (folder.parent / "results.csv").exists():
            others = (
                runs.load_run(path.parent) for path in sorted(folder.parent.glob("*/run.json"))
            )
            runs.merge_results(folder.parent, others)
    return run


def finetuned(config: runs.RunConfig) -> runs.RunConfig:
    """The config of a YaRN run that is fine-tuned from a rope run (arXiv 2509.10534, appendix).

    Length and YaRN's factor grow together; the learning rate is constant after its warm-up.
    """
    settings = config.evaluation.finetune
    if not isinstance(config.data, TextData):
        raise ValueError("evaluation.yarn='finetune' needs a text task")
    training = config.training.model_copy(
        update={
            "steps": settings.steps,
            "warmup_steps": settings.warmup_steps,
            "learning_rate": settings.learning_rate,
            "min_learning_rate": settings.learning_rate,
            "batch_size": settings.batch_size,
        }
    )
    longer = {"length": config.data.length * settings.factor}
    options = {**config.encoding.options, "factor": float(settings.factor)}
    return config.model_copy(
        update={
            "training": training,
            "data": config.data.model_copy(update=longer),
            "encoding": config.encoding.model_copy(update={"options": options}),
        }
    )


def _with_rope_for_yarn(recipe: Recipe) -> Recipe:
    # YaRN is evaluated from a rope run: one is trained even where none is asked for.
    encodings = dict(recipe.encodings)
    for label, choice in recipe.encodings.items():
        if choice.name == "yarn" and "factor" in choice.options:
            raise ValueError(
                f"encoding {label!r}: its factor follows from the lengths (or is that of "
                "evaluation.finetune): leave it out"
            )
        if choice.name == "yarn" and _rope_label(recipe, label) not in encodings:
            encodings = {"rope": _rope_of(choice), **encodings}
    return recipe.model_copy(update={"encodings": encodings})


def _rope_of(yarn: EncodingChoice) -> EncodingChoice:
    options = {key: value for key, value in yarn.options.items() if key not in _YARN_ONLY}
    return EncodingChoice(name="rope", options=options)


def _rope_label(recipe: Recipe, yarn: str) -> str:
    wanted = _rope_of(recipe.encodings[yarn])
    same = [label for label, choice in recipe.encodings.items() if choice == wanted]
    if not same and "rope" in recipe.encodings:
        raise ValueError(
            f"encoding {yarn!r} is made from a rope run with options {wanted.options}, but "
            f"'rope' has {recipe.encodings['rope'].options}: add an encoding of that kind"
        )
    return same[0] if same else "rope"


def _merged_settings(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the encodings and seeds that earlier commands put into the folder."""
    path = folder / "settings.yaml"
    if not path.exists():
        return recipe
    earlier = from_yaml(path)
    # Paths do not count: whether the text is the same is checked run by run.
    apart = {"encodings", "seeds", "evaluation", "description", "paper"}
    changed = runs.differences(_plain(earlier, apart), _plain(recipe, apart))
    for label in recipe.encodings.keys() & earlier.encodings.keys():
        old, new = earlier.encodings[label], recipe.encodings[label]
        changed += runs.differences(old.model_dump(), new.model_dump(), f"encodings.{label}")
    if changed:
        listed = "; ".join(changed[:4]) + (" ..." if len(changed) > 4 else "")
        raise ValueError(
            f"{folder} was written by another config ({listed}): choose another --output, or "
            "remove that folder"
        )
    encodings = {**earlier.encodings, **recipe.encodings}
    seeds = tuple(dict.fromkeys([*earlier.seeds, *recipe.seeds]))
    return recipe.model_copy(update={"encodings": encodings, "seeds": seeds})


def _plain(recipe: Recipe, without: set[str]) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(to_yaml(recipe))
    content["data"].pop("paths", None)
    for key in runs.HOW_IT_IS_COMPUTED:
        content["training"].pop(key)
    return {key: value for key, value in content.items() if key not in without}
