"""The figures of a diagnosis, each with the tables that hold its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from whatwhere.analysis import plots
from whatwhere.figures.palette import title
from whatwhere.lab.console import counting
from whatwhere.lab.diagnose.chain import SINK_THERE
from whatwhere.lab.diagnose.measured import Measured
from whatwhere.lab.report.figures import draw_loss_by_length
from whatwhere.lab.report.pictures import Picture, picture
from whatwhere.lab.storage import write_text

MEDIAN = "Lines: median over layers and heads; bands: quartiles; dashed: before the encoding."


@dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
        section: Of the page.
        name: Stem of its files.
        caption: What it shows.
        tables: By their stems; those of all models together, with a column `model`.
        draw: Draws it, narrow or wide.
    """

    section: str
    name: str
    caption: str
    tables: dict[str, pd.DataFrame]
    draw: Callable[[bool], Figure]


def write(models: Sequence[Measured], folder: Path) -> dict[str, list[Picture]]:
    """Write figures and their tables; return the figures by section of the page.

    Raises:
        DiskFullError: If there is no space left.
    """
    found: dict[str, list[Picture]] = {}
    wanted = drawings(models)
    with counting("figures", len(wanted)) as counter:
        for one in wanted:
            for name, table in one.tables.items():
                write_text(folder / f"{name}.csv", table.to_csv(index=False))
            made = picture(one.draw, folder, one.name, one.caption, tables=tuple(one.tables))
            found.setdefault(one.section, []).extend([made] if made else [])
            counter.advance(one.name)
    return found


def drawings(models: Sequence[Measured]) -> list[Drawing]:
    """All figures for which something was measured."""
    made = [
        *_geometry(models),
        *_by_head(models),
        *_points(models),
        *_loss(models),
        *_angles(models),
        *_frequencies(models),
        *_delta(models),
        *_others(models),
    ]
    return [one for one in made if all(len(table) for table in one.tables.values())]


def together(models: Sequence[Measured], name: str) -> pd.DataFrame:
    """A table of all models that have one, with a column `model` before the others."""
    known = [(m.label, m.table(name)) for m in models]
    parts = [table.assign(model=label) for label, table in known if table is not None]
    if not parts:
        return pd.DataFrame()
    whole = pd.concat(parts, ignore_index=True)
    return whole[["model", *(column for column in whole if column != "model")]]


def _trained(models: Sequence[Measured]) -> dict[str, int | None]:
    return {m.label: m.train_length for m in models}


def _geometry(models: Sequence[Measured]) -> list[Drawing]:
    tables = {name: together(models, name) for name in ("geometry", "clusters", "scores")}
    return [
        Drawing(
            "chain",
            "geometry",
            "Geometry of queries and keys, and attention, against length. " + MEDIAN + " Stable "
            "rank, singular share, silhouette and centroids are of the first tokens up to that "
            "length; attention and scores of the queries between that length and the one before. "
            "Measures of arXiv 2603.18017.",
            tables,
            lambda narrow: plots.geometry(
                tables["geometry"],
                tables["clusters"],
                tables["scores"],
                _trained(models),
                narrow=narrow,
            ),
        )
    ]


def _by_head(models: Sequence[Measured]) -> list[Drawing]:
    clusters = {m.label: _change(m) for m in models}
    parts = [frame.assign(model=label) for label, frame in clusters.items() if len(frame)]
    sinks = together(models, "scores")
    if sinks.empty:
        return []
    longest = int(sinks["length"].max())
    sinks = sinks[(sinks["length"] == longest) & (sinks["stage"] == "after")]
    made = [
        Drawing(
            "chain",
            "sink_by_head",
            f"Attention on the first token by queries up to {longest:,} tokens, for each head.",
            {"sink_by_head": sinks},
            lambda narrow: plots.by_head(
                sinks,
                "sink_mass",
                "attention on the first token, %",
                f"Attention on the first token at {longest:,} tokens",
                # Less than a tenth is no sink: its differences are nothing to colour.
                limits=(0.0, max(SINK_THERE, float(sinks["sink_mass"].max()))),
                percent=True,
                narrow=narrow,
            ),
        )
    ]
    if parts:
        changes = pd.concat(parts, ignore_index=True)
        made.insert(
            0,
            Drawing(
                "chain",
                "silhouette_by_head",
                "Change of the silhouette of keys against queries, after the encoding, from the "
                "training length to the longest: blue heads mix their keys and queries.",
                {"silhouette_by_head": changes},
                lambda narrow: plots.by_head(
                    changes,
                    "change",
                    "change of the silhouette",
                    "Where keys and queries meet",
                    signed=True,
                    narrow=narrow,
                ),
            ),
        )
    return made


def _change(found: Measured) -> pd.DataFrame:
    table, span = found.table("clusters"), found.span()
    if table is None or span is None:
        return pd.DataFrame()
    after = table[table["stage"] == "after"]
    grid = after.pivot_table(index=["layer", "head"], columns="length", values="silhouette")
    return (grid[span[1]] - grid[span[0]]).rename("change").reset_index()


def _points(models: Sequence[Measured]) -> list[Drawing]:
    made = []
    for index, one in enumerate(models):
        table = one.table("points")
        if table is None:
            continue
        for layer, head in one.heads:
            rows = table[(table["layer"] == layer) & (table["head"] == head)]
            name = f"points-{index}-{layer}-{head}"
            made.append(_cloud(one, name, rows, layer, head))
    return made


def _cloud(one: Measured, name: str, rows: pd.DataFrame, layer: int, head: int) -> Drawing:
    label = title(one.label)
    return Drawing(
        "chain",
        name,
        f"{label}: keys and queries of layer {layer}, head {head} ({one.rule}), of the first "
        "text up to each length, on their joint principal components.",
        {name: rows},
        lambda narrow: plots.points(
            rows,
            layer,
            head,
            narrow=narrow,
            title=f"{label}: keys and queries of layer {layer}, head {head}",
        ),
    )


def _loss(models: Sequence[Measured]) -> list[Drawing]:
    table = together(models, "loss_by_length")
    if table.empty:
        return []
    results = table.rename(columns={"model": "encoding", "loss": "value"})
    results = results.assign(metric="loss")
    trained = next((m.train_length for m in models if m.train_length), None)
    return [
        Drawing(
            "loss",
            "loss_by_length",
            "Loss in windows of each length, cut from the very texts that were traced; lengths "
            "are on a log2 axis.",
            {"loss_by_length": table},
            lambda narrow: draw_loss_by_length(results, trained, models[0].unit, None, narrow),
        )
    ]


def _angles(models: Sequence[Measured]) -> list[Drawing]:
    table = together(models, "in_distribution")
    return [
        Drawing(
            "loss",
            "in_distribution",
            "From the config alone: the share of the circle that each channel meets at a length "
            "and did not meet in training.",
            {"in_distribution": table},
            lambda narrow: plots.in_distribution(
                table,
                _trained(models),
                {m.label: m.safe_length for m in models},
                narrow=narrow,
            ),
        )
    ]


def _frequencies(models: Sequence[Measured]) -> list[Drawing]:
    usage = together(models, "frequency_usage")
    about = "mean over heads, tokens and texts, as in figure 3 of arXiv 2509.10534"
    return [
        Drawing(
            "frequencies",
            "frequency_usage",
            f"Norm of each rotary pair, or magnitude of each polar channel: {about}.",
            {"frequency_usage": usage},
            lambda narrow: plots.frequency_usage(usage, narrow=narrow),
        ),
        Drawing(
            "frequencies",
            "frequency_usage_relative",
            "The same relative to the largest of each layer: which part of the spectrum is used, "
            "whatever its size.",
            {"frequency_usage": usage},
            lambda narrow: plots.frequency_usage(usage, relative=True, narrow=narrow),
        ),
    ]


def _delta(models: Sequence[Measured]) -> list[Drawing]:
    table = together(models, "learned_delta")
    if table.empty or not table["delta"].any():  # of models just converted
        return []
    return [
        Drawing(
            "frequencies",
            "learned_delta",
            "Size of the learned phases delta, mean over heads.",
            {"learned_delta": table},
            lambda narrow: plots.learned_delta(table, narrow=narrow),
        ),
        Drawing(
            "frequencies",
            "learned_delta_by_head",
            "The same for each head, the heads of a layer side by side.",
            {"learned_delta": table},
            lambda narrow: plots.learned_delta(table, by_head=True, narrow=narrow),
        ),
    ]


def _others(models: Sequence[Measured]) -> list[Drawing]:
    shifts, found = together(models, "what_where"), together(models, "retrieval")
    if len(shifts):
        shifts = shifts.dropna(subset="content_shift")
    costs = together(models, "cost")
    if len(costs):
        # Where all is as with RoPE there is nothing to see.
        more = costs.groupby("model")["overhead_measured"].transform("max") > 0
        costs = costs[more]
    # Where no answer is right as a whole, their tokens may still tell lengths apart.
    right = "accuracy" if len(found) and found["accuracy"].max() > 0 else "token_accuracy"
    which = (
        "answers that are right in every token"
        if right == "accuracy"
        else ("the answers' tokens that are right")
    )
    return [
        Drawing(
            "what_where",
            "what_where",
            "How far content moves the place of a head's best score: 0 if the place hangs on "
            "position alone, 100 % if content puts it anywhere.",
            {"what_where": shifts},
            lambda narrow: plots.what_where(shifts, narrow=narrow),
        ),
        Drawing(
            "retrieval",
            "retrieval",
            f"Share of {which}, by the length of the prompt and the depth of what is asked for. "
            "Models that read bytes are given a key and a value to copy, others a question in "
            "words, unless --ask says otherwise.",
            {"retrieval": found},
            lambda narrow: plots.retrieval(found, _trained(models), column=right, narrow=narrow),
        ),
        Drawing(
            "cost",
            "cost",
            "Operations of a forward pass beyond those with RoPE, the output matrix left out: by "
            "formula, and as PyTorch's counter has them.",
            {"cost": costs},
            lambda narrow: plots.cost(costs, _trained(models), narrow=narrow),
        ),
    ]
