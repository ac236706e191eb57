"""What the results of a comparison say: means, changes with length, and one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from whatwhere.figures.palette import title
from whatwhere.lab.recipes.schema import PaperFigure

MOST_NAMED = 4

PERCENT = "\u00a0%"
"""The sign, kept on the line of its number."""

MAIN = ("accuracy", "zero_shot_accuracy", "loss", "test_loss", "validation_loss")
"""What a comparison may be about, the first that it has."""


def statistics(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean, sample standard deviation (n - 1) and count over seeds of one metric.

    Args:
        results: Rows as in results.csv.
        metric: Which of them.

    Returns:
        Columns mean, std (NaN for one seed), count; indexed by (encoding, length). A seed that
        diverged makes its mean infinite or NaN.
    """
    chosen = results[results["metric"] == metric]
    return _over_seeds(chosen, "value")


def changes(results: pd.DataFrame, train_length: int) -> pd.DataFrame:
    """Loss at each length relative to that at the training length, as for `statistics`.

    The value is `loss(n) / loss(train_length) - 1`, taken seed by seed, then averaged.
    """
    chosen = results[results["metric"] == "loss"]
    base = chosen[chosen["length"] == train_length].set_index(["encoding", "seed"])["value"]
    base = base[~base.index.duplicated()]
    pairs = pd.MultiIndex.from_frame(chosen[["encoding", "seed"]])
    with np.errstate(invalid="ignore"):  # of runs that diverged
        relative = chosen["value"].to_numpy() / base.reindex(pairs).to_numpy() - 1
    known = chosen.assign(change=relative).dropna(subset="change")
    return _over_seeds(known, "change")


def main_metric(results: pd.DataFrame) -> str:
    """What a comparison is about: its accuracy, its loss by length, or that on a whole split."""
    found = set(results["metric"])
    return next((name for name in MAIN if name in found), "validation_loss")


def best_first(results: pd.DataFrame, labels: Sequence[str]) -> list[str]:
    """Labels by accuracy, or by the loss (at their longest length), the best first.

    Those measured at longer lengths come before others, those that diverged after them, and
    those without results last.
    """
    metric = main_metric(results)
    found = statistics(results, metric)
    sign = -1 if metric.endswith("accuracy") else 1
    means: dict[str, tuple[int, float]] = {}
    # In increasing order of length.
    for label, length, mean in found.reset_index()[["encoding", "length", "mean"]].to_numpy():
        means[label] = length, sign * mean if math.isfinite(mean) else math.inf

    def rank(label: str) -> tuple[bool, int, float]:
        length, mean = means.get(label, (0, math.inf))
        return label not in means, -length, mean

    return sorted(labels, key=rank)


def finding(
    results: pd.DataFrame,
    train_length: int,
    unit: str,
    paper: Mapping[str, Mapping[str, PaperFigure]] | None = None,
) -> str | None:
    """The result in one sentence, `None` if there is none yet.

    Args:
        results: Rows as in results.csv.
        train_length: Length of training sequences.
        unit: Of the loss, as in `"nats per byte"`.
        paper: The paper's figures, label -> metric -> figure.
    """
    accuracy = statistics(results, "accuracy")
    if len(accuracy):
        return _accuracy_finding(accuracy, paper or {})
    if main_metric(results) != "loss":
        return _split_finding(results, unit, paper or {})
    loss = _finite(statistics(results, "loss"))
    if loss.empty:
        return None
    longest = int(loss.index.get_level_values("length").max())
    found = _finite(changes(results, train_length)) if longest > train_length else loss.iloc[:0]
    found = found[found.index.get_level_values("length") == longest]
    if len(found):
        return _change_finding(found["mean"].droplevel("length"), train_length, longest, unit)
    return _loss_finding(loss["mean"].xs(longest, level="length"), longest, unit)


def percent(change: float) -> str:
    """A relative change in per cent, without its sign: one decimal below 10 %."""
    size = 100 * abs(change)
    return f"{size:.1f}{PERCENT}" if size < 9.95 else f"{size:,.0f}{PERCENT}"


def _change_finding(means: pd.Series[float], train_length: int, longest: int, unit: str) -> str:
    ranked = means.sort_values(kind="stable")
    parts: list[str] = []
    said = ""
    for label, change in _named(ranked):
        side = "above" if change >= 0 else "below"
        part = f"{_possessive(label)} {percent(change)}"
        if not parts:
            own = f"{side} its own at {train_length:,}"
            part = f"{_possessive(label)} loss is {percent(change)} {own}"
        elif side != said:
            part += f" {side}"
        parts.append(part)
        said = side
    times = f"{longest / train_length:.3g} times the training length"
    return f"At {longest:,} {unit.split()[-1]}s, {times}, {_joined(parts, ranked)}."


def _loss_finding(means: pd.Series[float], longest: int, unit: str) -> str:
    ranked = means.sort_values(kind="stable")
    parts: list[str] = []
    for label, value in _named(ranked):
        best = f"{_possessive(label)} loss is {value:.3f} {unit}"
        parts.append(f"{_possessive(label)} {value:.3f}" if parts else best)
    return f"At {longest:,} {unit.split()[-1]}s {_joined(parts, ranked)}."


def _split_finding(
    results: pd.DataFrame, unit: str, paper: Mapping[str, Mapping[str, PaperFigure]]
) -> str | None:
    metric = main_metric(results)
    table = _finite(statistics(results, metric))
    if table.empty:
        return None
    share = metric.endswith("accuracy")
    ranked = table["mean"].groupby(level="encoding", sort=False).last()
    ranked = ranked.sort_values(ascending=not share, kind="stable")
    name = metric.replace("_", " ")
    parts: list[str] = []
    for label, value in _named(ranked):
        figure = paper.get(label, {}).get(metric)
        own, known = (
            f"{100 * number:.1f}{PERCENT}" if share else f"{number:.4f}"
            for number in (value, figure.value if figure else math.nan)
        )
        beside = f" (the paper: {known})" if figure else ""
        after = "" if share else f" {unit}"
        first = f"{_possessive(label)} {name} is {own}{after}{beside}"
        parts.append(f"{_possessive(label)} {own}{beside}" if parts else first)
    return f"{_joined(parts, ranked)}."


def _accuracy_finding(
    accuracy: pd.DataFrame, paper: Mapping[str, Mapping[str, PaperFigure]]
) -> str:
    ranked = accuracy["mean"].droplevel("length").sort_values(ascending=False, kind="stable")
    parts: list[str] = []
    for label, value in _named(ranked):
        figure = paper.get(label, {}).get("accuracy")
        share = f"{100 * value:.1f}{PERCENT}"
        known = f"{100 * figure.value:.1f}{PERCENT}" if figure else ""
        if parts:
            parts.append(f"{title(label)} {share}" + (f" ({known})" if known else ""))
        else:
            beside = f" (the paper: {known})" if known else ""
            parts.append(f"{title(label)} answers {share} correctly{beside}")
    return f"{_joined(parts, ranked)}."


def _named(ranked: pd.Series[float]) -> list[tuple[str, float]]:
    # The best and the worst of many.
    pairs = [(str(label), float(value)) for label, value in ranked.items()]
    return pairs if len(pairs) <= MOST_NAMED else [*pairs[: MOST_NAMED - 1], pairs[-1]]


def _joined(parts: Sequence[str], ranked: pd.Series[float]) -> str:
    first, *others = parts
    if not others:
        return first
    left_out = len(ranked) > len(parts)
    last = f" … {others.pop()}" if left_out else ""
    return f"{first}; {', '.join(others)}{last}"


def _possessive(label: str) -> str:
    name = title(label)
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def _finite(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["mean"].map(math.isfinite)] if len(table) else table


def _over_seeds(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    # Not pandas' own mean: that leaves out NaN, and a run that diverged must show.
    grouped = rows.groupby(["encoding", "length"], sort=False)[column]
    return pd.DataFrame(
        {
            "mean": grouped.agg(lambda values: values.mean(skipna=False)),
            "std": grouped.std(),
            "count": grouped.size(),
        }
    ).sort_index(level="length", sort_remaining=False)
