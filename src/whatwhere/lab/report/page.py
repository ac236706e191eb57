"""The report of a comparison: one HTML page that needs nothing but itself, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from whatwhere.figures.palette import Style, styles, title
from whatwhere.lab.data import IndirectIndexingData
from whatwhere.lab.recipes.schema import Recipe
from whatwhere.lab.report import figures
from whatwhere.lab.report.findings import best_first, finding, main_metric
from whatwhere.lab.report.metric_figure import draw_metric
from whatwhere.lab.report.pictures import Picture, counted, environment, picture
from whatwhere.lab.report.records import Comparison, RunRecord, read_comparison
from whatwhere.lab.report.tables import facts_table, loss_table, split_table, state
from whatwhere.lab.runs import RunConfig
from whatwhere.lab.storage import write_text


def build_report(folder: Path) -> Path:
    """Write `report.html` and the figures of a comparison, from whatever its folder holds.

    Runs that are missing, unfinished or not evaluated are named in the page. The same folder
    gives the same page.

    Args:
        folder: Of the comparison; must hold settings.yaml.

    Returns:
        The page.

    Raises:
        ValueError: If it is no such folder, or its settings cannot be read.
        DiskFullError: If there is no space left.
    """
    comparison = read_comparison(folder)
    path = folder / "report.html"
    write_text(path, _page(comparison, folder))
    return path


def unit_of(recipe: Recipe | RunConfig) -> str:
    """The unit of a recipe's losses: nats per byte, per token, or per target of a question."""
    if isinstance(recipe.data, IndirectIndexingData):
        return "nats per target"
    data = recipe.data
    # Text without a tokenizer of its own is read as bytes.
    own = data.task == "tokens" and data.dataset == "text" and data.tokenizer is None
    return "nats per byte" if own or data.tokenizer == "bytes" else "nats per token"


def _page(comparison: Comparison, folder: Path) -> str:
    recipe, unit = comparison.recipe, unit_of(comparison.recipe)
    labels = best_first(comparison.results, comparison.labels)
    styling = styles(comparison.labels)
    tables = [
        ("Loss by length", loss_table(comparison, labels, styling, unit)),
        ("Accuracy and loss", split_table(comparison, labels, styling, unit)),
    ]
    sentence = finding(comparison.results, _train_length(recipe), unit, recipe.paper)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            command="compare",
            name=recipe.name,
            recipe=recipe,
            finding=sentence or _no_finding(comparison),
            summary=_summary(comparison, unit),
            notices=_notices(comparison),
            pictures=_pictures(comparison, folder, styling, unit, sentence),
            tables=[(heading, table) for heading, table in tables if table],
            facts=facts_table(comparison, labels, styling),
            versions=_versions(comparison),
            data=_data(comparison),
            settings=comparison.settings,
            has_results=(folder / "results.csv").exists(),
        )
    )


def _train_length(recipe: Recipe) -> int:
    # Questions have no other lengths to compare with.
    return 0 if isinstance(recipe.data, IndirectIndexingData) else recipe.data.length


def _pictures(
    comparison: Comparison,
    folder: Path,
    styling: Mapping[str, Style],
    unit: str,
    sentence: str | None,
) -> list[Picture]:
    pictures: list[Picture] = []
    for name, caption, draw in _drawings(comparison, styling, unit):
        alt = f"{caption} {sentence}" if sentence and not pictures else caption
        drawn = picture(draw, folder, name, caption, alt)
        pictures += [drawn] if drawn else []
    return pictures


def _drawings(
    comparison: Comparison, styling: Mapping[str, Style], unit: str
) -> list[tuple[str, str, Callable[[bool], Figure]]]:
    # Name, caption and how to draw it; the main figure comes first.
    recipe, results = comparison.recipe, comparison.results
    logs, positions = comparison.logs(), comparison.positions()
    training = (
        "training_curves",
        "Training loss (line: smoothed; faint: as logged) and validation loss (markers), one line "
        "a run.",
        lambda narrow: figures.draw_training_curves(logs, unit, styling, narrow),
    )
    if isinstance(recipe.data, IndirectIndexingData):
        paper = {
            label: (found["accuracy"].value, found["accuracy"].spread)
            for label, found in recipe.paper.items()
            if "accuracy" in found
        }
        beside = "; hollow diamonds: the paper's figures" if paper else ""
        return [
            (
                "accuracy",
                f"Accuracy on held-out questions, mean and one standard deviation{beside}.",
                lambda narrow: figures.draw_accuracy(results, paper, styling, narrow),
            ),
            (
                "accuracy_curves",
                "Validation accuracy during training, one line a run.",
                lambda narrow: figures.draw_accuracy_curves(logs, styling, narrow),
            ),
            training,
        ]
    if not recipe.evaluation.lengths:
        return [_split_drawing(comparison, styling, unit), training]
    length = recipe.data.length
    names = unit.split()[-1] + "s"
    return [
        (
            "loss_by_length",
            "Loss on validation text in windows of each length, up to "
            f"{recipe.evaluation.tokens:,} {names} a length. Models were trained at {length:,} "
            f"{names} and not changed{_yarn_note(recipe)}. Length is on a log2 axis.",
            lambda narrow: figures.draw_loss_by_length(results, length, unit, styling, narrow),
        ),
        (
            "perplexity_by_length",
            f"Perplexity of a {names[:-1]}, the exponential of that loss, on log axes.",
            lambda narrow: figures.draw_loss_by_length(
                results, length, unit, styling, narrow, perplexity=True
            ),
        ),
        (
            "loss_by_position",
            "Loss by position within the longest windows evaluated, averaged over windows and "
            "over neighbouring positions.",
            lambda narrow: figures.draw_loss_by_position(positions, length, unit, styling, narrow),
        ),
        training,
    ]


def _split_drawing(
    comparison: Comparison, styling: Mapping[str, Style], unit: str
) -> tuple[str, str, Callable[[bool], Figure]]:
    # One number an encoding, on a whole split or over tasks.
    results, metric = comparison.results, main_metric(comparison.results)
    paper = {
        label: (found[metric].value, found[metric].spread)
        for label, found in comparison.recipe.paper.items()
        if metric in found
    }
    name = metric.replace("_", " ")
    beside = "; hollow diamonds: the paper's figures" if paper else ""
    return (
        metric,
        f"{name[0].upper()}{name[1:]} of each encoding, mean and one standard deviation{beside}.",
        lambda narrow: draw_metric(results, metric, unit, paper, styling, narrow),
    )


def _yarn_note(recipe: Recipe) -> str:
    if all(choice.name != "yarn" for choice in recipe.encodings.values()):
        return ""
    if recipe.evaluation.yarn == "finetune":
        steps, factor = recipe.evaluation.finetune.steps, recipe.evaluation.finetune.factor
        return f", but for YaRN: RoPE's, fine-tuned for {steps:,} steps with factor {factor:g}"
    return ", but for YaRN: RoPE's, with factor length / training length"


def _no_finding(comparison: Comparison) -> str:
    trained = sum(run.done is not None for run in comparison.runs)
    begun = sum(run.record is not None for run in comparison.runs)
    total = len(comparison.runs)
    return f"No results yet: of {total} runs {begun} have begun and {trained} are trained."


def _summary(comparison: Comparison, unit: str) -> list[str]:
    recipe = comparison.recipe
    training, shape = recipe.training, recipe.model
    train_length = _train_length(recipe)
    length = f" of {train_length:,} {unit.split()[-1]}s" if train_length else ""
    parts = [
        f"{counted(len(recipe.encodings), 'encoding')}, {counted(len(recipe.seeds), 'seed')}",
        f"{counted(shape.num_hidden_layers, 'layer')} × {shape.hidden_size:,}, "
        f"{counted(shape.num_attention_heads, 'head')}",
        f"{training.steps:,} steps × {training.batch_size:,} sequences{length}",
    ]
    source = _first(comparison, "data").get("source")
    return [*parts, *([str(source)] if source else []), *_distinct(comparison, _device_name)]


def _notices(comparison: Comparison) -> list[str]:
    recipe = comparison.recipe
    notices: list[str] = []
    open_runs = [
        run for run in comparison.runs if not run.evaluated and not _known(comparison, run)
    ]
    if open_runs:
        states: dict[str, list[str]] = {}
        for run in open_runs:
            states.setdefault(state(run, recipe), []).append(run.name)
        listed = "; ".join(f"{', '.join(names)} {how}" for how, names in states.items())
        notices.append(
            f"Partial: {len(open_runs)} of {counted(len(comparison.runs), 'run')} without "
            f"results: {listed}. The same command again goes on from there."
        )
    odd = comparison.results[~np.isfinite(comparison.results["value"].astype(float))]
    for row in odd.to_dict("records"):
        name = f"{title(row['encoding'])}, seed {row['seed']}: {row['metric']}"
        notices.append(f"{name} at {row['length']:,} is not finite.")
    for what, found in _versions(comparison):
        if len(found) > 1:
            notices.append(f"Runs differ in {what}: {', '.join(found)}.")
    return notices + comparison.problems


def _known(comparison: Comparison, run: RunRecord) -> bool:
    results = comparison.results
    return bool(((results["encoding"] == run.label) & (results["seed"] == run.seed)).any())


def _versions(comparison: Comparison) -> list[tuple[str, list[str]]]:
    # What results depend on besides the settings: each with all the values that runs have.
    names = dict.fromkeys(name for run in comparison.runs for name in _part(run, "versions"))
    rows = [
        ("device", _distinct(comparison, _device_name)),
        ("commit", _distinct(comparison, lambda run: (run.record or {}).get("git_commit"))),
        *((name, _distinct(comparison, _version_of(name))) for name in names),
    ]
    return [(name, found) for name, found in rows if found]


def _version_of(package: str) -> Callable[[RunRecord], str | None]:
    return lambda run: _part(run, "versions").get(package)


def _device_name(run: RunRecord) -> str | None:
    device = _part(run, "device")
    if not device:
        return None
    count, threads = device.get("count", 1), device.get("threads")
    name = f"{count} × {device.get('name')}" if count > 1 else str(device.get("name"))
    more = f", {counted(threads, 'thread')}" if threads else ""
    return f"{name} ({device.get('type')}{more})"


def _data(comparison: Comparison) -> list[tuple[str, str]]:
    found = _first(comparison, "data")
    return [
        (
            key.replace("_", " "),
            ", ".join(map(str, value)) if isinstance(value, list) else str(value),
        )
        for key, value in found.items()
    ]


def _first(comparison: Comparison, key: str) -> dict[str, Any]:
    return next((part for run in comparison.runs if (part := _part(run, key))), {})


def _part(run: RunRecord, key: str) -> dict[str, Any]:
    part = (run.record or {}).get(key)
    return part if isinstance(part, dict) else {}


def _distinct(comparison: Comparison, get: Callable[[RunRecord], Any]) -> list[str]:
    found = (get(run) for run in comparison.runs)
    return list(dict.fromkeys(str(value) for value in found if value is not None))
