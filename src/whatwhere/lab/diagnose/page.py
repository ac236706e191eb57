"""The page of a diagnosis: what was found in words, the figures, how to run it again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from whatwhere.figures.palette import Style, styles, title
from whatwhere.lab.diagnose import drawings, record
from whatwhere.lab.diagnose.findings import findings, headline
from whatwhere.lab.diagnose.measured import Measured
from whatwhere.lab.diagnose.settings import Settings
from whatwhere.lab.diagnose.words import Finding
from whatwhere.lab.report.pictures import Picture, counted, environment
from whatwhere.lab.report.tables import MISSING, Cell, Row, Table
from whatwhere.lab.storage import read_json, write_text

NAME = "report.html"
SECTIONS = {
    "chain": "Geometry: how it fails",
    "loss": "Loss and unseen angles",
    "frequencies": "Frequencies",
    "what_where": "What and where",
    "retrieval": "Retrieval",
    "cost": "Cost",
}
"""Sections of the page and their headings."""


@dataclass(frozen=True)
class Said:
    """A finding on the page.

    Attributes:
        model: Its name, where there are several.
        finding: The finding.
    """

    model: str
    finding: Finding


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    heading: str
    said: list[Said]
    pictures: list[Picture]


def build(models: Sequence[Measured], settings: Settings, folder: Path) -> Path:
    """Write figures, their tables and the page.

    Args:
        models: What was measured, the model that the diagnosis is of first.
        settings: Of the diagnosis.
        folder: Which holds record.json.

    Returns:
        The page.

    Raises:
        DiskFullError: If there is no space left.
    """
    pictures = drawings.write(models, folder)
    content = read_json(folder / record.NAME)
    page = environment("whatwhere.lab.diagnose").get_template("diagnosis.html.j2")
    path = folder / NAME
    text = page.render(
        command="diagnose",
        name=models[0].label,
        finding=headline(models[0]),
        summary=_summary(models, settings, content),
        notices=[note for one in models for note in one.notes],
        sections=_sections(models, pictures),
        overview=overview(models),
        again=shlex.join(["whatwhere", "diagnose", *_arguments(settings)]),
        settings=content["config"],
        versions=_versions(content),
    )
    write_text(path, text)
    return path


def overview(models: Sequence[Measured]) -> Table:
    """The main numbers of each model, at the training length and at the longest."""
    spans = [one.span() for one in models]
    lengths = sorted({span for span in spans if span})
    at = f"{lengths[0][0]:,} → {lengths[0][1]:,} tokens" if len(lengths) == 1 else "with length"
    groups = [
        ("", ["trained at", "predicted safe up to"]),
        (at, ["loss", "stable rank of keys", "silhouette", "attention on first token, %"]),
        ("", ["content shift, %"]),
    ]
    styling = styles(one.label for one in models)
    rows = [_row(one, styling, several=len(lengths) > 1) for one in models]
    notes = ["Medians over layers and heads, after the encoding."]
    return Table("model", groups, rows, notes)


def _row(one: Measured, styling: Mapping[str, Style], several: bool) -> Row:
    span = one.span()
    safe = ("no limit" if one.safe_length is None else f"{one.safe_length:,}") * bool(
        one.safe_reason
    )
    known = f"{one.train_length:,}" if one.train_length else MISSING
    cells = [Cell(known), Cell(safe or MISSING)]
    loss = one.table("loss_by_length")
    cells.append(_two(loss, "loss", span, 3))
    cells.append(_two(_rows(one, "geometry", side="key", stage="after"), "stable_rank", span))
    cells.append(_two(_rows(one, "clusters", stage="after"), "silhouette", span))
    scores = _rows(one, "scores", stage="after")
    percents = None if scores is None else scores.assign(sink_mass=100 * scores["sink_mass"])
    cells.append(_two(percents, "sink_mass", span, 0))
    shift = one.table("what_where")
    middle = math.nan if shift is None else float(shift["content_shift"].median())
    cells.append(Cell(f"{100 * middle:.0f}" if math.isfinite(middle) else MISSING))
    below = f"{span[0]:,} → {span[1]:,} tokens" if span and several else ""
    if span is None and one.lengths:
        below = f"at {one.lengths[-1]:,} tokens"
    style = styling[one.label]
    return Row(style.title, below, style.colour, cells)


def _rows(one: Measured, name: str, **wanted: str) -> pd.DataFrame | None:
    table = one.table(name)
    if table is None:
        return None
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def _two(
    table: pd.DataFrame | None, column: str, span: tuple[int, int] | None, digits: int = 2
) -> Cell:
    if table is None:
        return Cell(MISSING)
    medians = table.groupby("length")[column].median()
    lengths = span or (int(medians.index.max()),)
    return Cell(" → ".join(f"{float(medians[length]):.{digits}f}" for length in lengths))


def _sections(models: Sequence[Measured], pictures: Mapping[str, list[Picture]]) -> list[Section]:
    found = [(one, findings(one)) for one in models]
    sections = []
    for name, heading in SECTIONS.items():
        said = [
            Said(title(one.label) if len(models) > 1 else "", finding)
            for one, every in found
            for finding in every[name]
        ]
        sections.append(Section(name, heading, said, pictures.get(name, [])))
    return sections


def _summary(
    models: Sequence[Measured], settings: Settings, content: Mapping[str, Any]
) -> list[str]:
    lengths = settings.rising
    read = f"{lengths[0]:,} to {lengths[-1]:,} tokens" if len(lengths) > 1 else f"{lengths[0]:,}"
    device = content["device"]
    threads = f", {counted(device['threads'], 'thread')}" if "threads" in device else ""
    return [
        *([counted(len(models), "model")] if len(models) > 1 else []),
        f"{counted(len(lengths), 'length')}, {read}",
        f"{counted(settings.texts, 'text')} of {', '.join(settings.text)}",
        f"{device['name']} ({device['type']}{threads})",
    ]


def _arguments(settings: Settings) -> list[str]:
    # The options that make the same numbers again.
    given = [settings.model, "--text", *settings.text]
    given += ["--lengths", ",".join(map(str, settings.rising)), "--output", "again"]
    if settings.against:
        given += ["--against", *settings.against]
    defaults = {"tokenizer": None, "texts": 4, "dtype": "auto", "train_length": None}
    for name, default in (defaults | {"needles": 2, "seed": 0, "ask": "auto"}).items():
        value = getattr(settings, name)
        if value != default:
            given += [f"--{name.replace('_', '-')}", str(value)]
    for name in ("layers", "heads"):
        chosen = getattr(settings, name)
        given += [f"--{name}", ",".join(map(str, chosen))] if chosen else []
    return given + ([] if settings.retrieval else ["--no-retrieval"])


def _versions(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [("commit", content.get("git_commit")), ("seed", content["seed"])]
    found += list(content["versions"].items())
    return [(name, str(value)) for name, value in found if value is not None]
