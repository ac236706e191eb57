"""What the measurements of one model say, in words; no finding without its numbers.

Numbers are medians over layers and heads. A change is from the longest length within the training
length (or the shortest measured, where none is known) to the longest measured. It is called one if
it passes a threshold below; these are ours, the papers give none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from whatwhere.analysis.plots.palette import title
from whatwhere.lab.diagnose.changes import Change, change, head_words, number
from whatwhere.lab.diagnose.measured import Measured
from whatwhere.lab.report.findings import percent

RANK_GROWS = 1.25
"""Factor by which the stable rank must grow, and by more than it does before the encoding."""
CLUSTERS_MEET = 0.1
"""By which the silhouette, from -1 to 1, must fall."""
SINK_FAILS = 0.25
"""Share of its attention that the first token must lose."""
SINK_THERE = 0.1
"""Attention on the first token from which on it is called a sink."""
LOSS_RISES = 0.05
"""Share by which the loss must rise."""
CONTENT_MOVES = 0.01
"""Content shift from which on content is said to move a score's place."""

Kind = Literal["seen", "not seen", "measured", "not measured"]


@dataclass(frozen=True)
class Finding:
    """One thing found, or not.

    Attributes:
        kind: Whether what is looked for is there, a plain measurement, or nothing was measured.
        text: A sentence or two, with the numbers.
    """

    kind: Kind
    text: str


def findings(found: Measured) -> dict[str, list[Finding]]:
    """What is found, by section of the page."""
    return {
        "chain": [chain(found)],
        "loss": [loss(found), prediction(found)],
        "frequencies": [frequencies(found), delta(found)],
        "what_where": [what_where(found)],
        "retrieval": [retrieval(found)],
        "cost": [cost(found)],
    }


def chain(found: Measured) -> Finding:
    """The chain of the RoPE-ID paper (arXiv 2603.18017): rank grows, clusters meet, sink fails."""
    tables = [found.table(name) for name in ("geometry", "clusters", "scores")]
    geometry, clusters, scores = tables
    if geometry is None or clusters is None or scores is None:
        return _missing(found, "geometry", "The geometry of queries and keys")
    span = found.span()
    if span is None:
        return _no_span(found, "The chain of failure at length")
    rank = change(geometry, "stable_rank", span, side="key", stage="after")
    before = change(geometry, "stable_rank", span, side="key", stage="before")
    meet = change(clusters, "silhouette", span, stage="after")
    sink = change(scores, "sink_mass", span)
    grows = grew(rank, before)
    falls = meet.first - meet.last >= CLUSTERS_MEET
    fails = sink.first >= SINK_THERE and sink.last <= (1 - SINK_FAILS) * sink.first
    parts = [
        f"the stable rank of keys {_verb(grows, 'grows', rank)} ({rank.words}; before the "
        f"encoding {before.words})",
        f"the clusters of keys and queries {'meet' if falls else 'do not meet'} (silhouette "
        f"{meet.words})",
        _sink_words(sink, fails),
    ]
    links = [grows, falls, fails]
    listed = f"{parts[0]}, {parts[1]}, and {parts[2]}"
    name, where = title(found.label), _where(found, span)
    if all(links):
        text = (
            f"{where} {listed}: the chain by which the RoPE-ID paper explains failure at length, "
            f"seen whole in {name}."
        )
    elif any(links):
        text = (
            f"{where} {listed}: of the three links of the RoPE-ID paper's chain {name} shows "
            f"{['none', 'one', 'two'][sum(links)]}."
        )
    else:
        text = f"{where} {listed}: nothing of the RoPE-ID paper's chain is seen in {name}."
    most = [
        f"{what} in {one.where}"
        for what, one, seen in (("rank", rank, grows), ("silhouette", meet, falls),
                                ("sink", sink, fails))
        if seen and one.where
    ]  # fmt: skip
    if most:
        text += f" Most: {'; '.join(most)}."
    return Finding("seen" if any(links) else "not seen", text)


def grew(rank: Change, before: Change) -> bool:
    """Whether the encoding makes a rank grow: by a quarter, and by more than it does without."""
    factor = rank.last / rank.first
    return factor >= RANK_GROWS and factor > before.last / before.first


def loss(found: Measured) -> Finding:
    """Whether the loss rises beyond the training length."""
    table = found.table("loss_by_length")
    if table is None:
        return _missing(found, "loss_by_length", "Loss by length")
    span = found.span()
    losses = table.set_index("length")["loss"]
    if span is None:
        last = int(losses.index.max())
        return Finding(
            "measured", f"Loss at {last:,} tokens is {losses[last]:.4f} {found.unit}. "
            + _no_span(found, "How it changes beyond the training length").text,
        )  # fmt: skip
    base, longest = span
    first, last_loss = float(losses[base]), float(losses[longest])
    if not math.isfinite(last_loss):
        return Finding("seen", f"Loss at {longest:,} tokens is not finite; at {base:,} it is "
                       f"{first:.4f} {found.unit}.")  # fmt: skip
    rise = last_loss / first - 1
    numbers = f"{first:.4f} {found.unit} at {base:,} tokens, {last_loss:.4f} at {longest:,}"
    side = "above" if rise >= 0 else "below"
    if rise < LOSS_RISES:
        return Finding("not seen", f"Loss holds: {numbers} ({percent(rise)} {side}).")
    start = rises_from(found)
    return Finding(
        "seen",
        f"Loss rises: {numbers} ({percent(rise)} {side}); it is more than "
        f"{percent(LOSS_RISES)} above from {start:,} tokens on.",
    )


def rises_from(found: Measured) -> int | None:
    """The first length beyond the base at which the loss is `LOSS_RISES` above it."""
    table, span = found.table("loss_by_length"), found.span()
    if table is None or span is None:
        return None
    losses = table.set_index("length")["loss"].sort_index()
    limit = (1 + LOSS_RISES) * losses[span[0]]
    above = [int(n) for n, value in losses.items() if int(n) > span[0] and not value <= limit]  # type: ignore[call-overload]
    return above[0] if above else None


def prediction(found: Measured) -> Finding:
    """The safe length that follows from the config alone, held against the loss."""
    table = found.table("in_distribution")
    if not found.safe_reason:
        return _missing(found, "in_distribution", "A safe length")
    limit = f"up to {found.safe_length:,} tokens" if found.safe_length else "at any length"
    text = f"Predicted from the config alone: safe {limit} ({found.safe_reason})."
    if table is not None:
        one = table[table["layer"] == table["layer"].min()]
        one = one[one["length"] == one["length"].min()]
        turning = one[one["frequency"] > 0]
        if len(turning):
            text += (
                f" Of {len(turning)} frequencies {int(turning['complete'].sum())} complete a turn "
                "within the training length."
            )
    if found.table("loss_by_length") is None or found.span() is None:
        return Finding("measured", text)
    measured, base = rises_from(found), found.span()
    assert base is not None
    longest = base[1]
    if measured is None:
        agrees = found.safe_length is None or found.safe_length >= longest
        said = f"measured: the loss does not rise by {percent(LOSS_RISES)} up to {longest:,}"
    else:
        # What was predicted must lie at the last length that was fine, or between that and the
        # first that was not.
        fine = max(n for n in found.lengths if n < measured)
        agrees = found.safe_length is not None and fine <= found.safe_length < measured
        said = f"measured: the loss is more than {percent(LOSS_RISES)} above from {measured:,} on"
    verdict = "as predicted" if agrees else "not as predicted"
    return Finding("measured", f"{text} {said[0].upper()}{said[1:]}, {verdict}.")


def frequencies(found: Measured) -> Finding:
    """How many frequencies are used, and how much of it lies in slow ones."""
    usage = found.table("frequency_usage")
    if usage is None:
        return _missing(found, "frequency_usage", "Use of frequencies")
    means = usage.groupby(["layer", "side", "frequency"])["norm"].mean()
    breadths = means.groupby(["layer", "side"]).agg(_breadth)
    counts = means.groupby(["layer", "side"]).size()
    share = float((breadths / counts).median())
    spectrum = means.groupby("frequency").mean()
    text = (
        f"Of {int(counts.median())} frequencies {title(found.label)} uses as many as "
        f"{number(float(breadths.median()))} used evenly would be ({percent(share)}; median over "
        "layers)"
    )
    if found.train_length:
        slow = spectrum.index.to_numpy(float) * found.train_length < math.tau
        part = float(spectrum[slow].sum() / spectrum.sum())
        text += (
            f"; {percent(part)} of the norm lies in the {percent(float(slow.mean()))} of "
            "frequencies that do not complete a turn within the training length"
        )
    return Finding("measured", text + ".")


def _breadth(norms: pd.Series[float]) -> float:
    # The exponential of the entropy: how many evenly used ones spread as widely.
    shares = norms.to_numpy(float) / norms.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def delta(found: Measured) -> Finding:
    """How far the learned phases moved, at fast and at slow frequencies."""
    table = found.table("learned_delta")
    if table is None:
        return Finding("not measured", f"{title(found.label)} has no learned phases delta.")
    sizes = table.assign(delta=table["delta"].abs()).groupby("frequency")["delta"].mean()
    quarter = max(1, len(sizes) // 4)
    slow, fast = float(sizes.iloc[:quarter].mean()), float(sizes.iloc[-quarter:].mean())
    return Finding(
        "measured",
        f"The learned phases are {number(fast)} rad away from 0 on average in the fastest quarter "
        f"of frequencies, {number(slow)} rad in the slowest.",
    )


def what_where(found: Measured) -> Finding:
    """Whether content moves the offset at which a head scores best."""
    table = found.table("what_where")
    table = None if table is None else table.dropna(subset="content_shift")
    if table is None or table.empty:
        return _missing(found, "what_where", "Whether content moves the best offset")
    shifts = table.set_index(["layer", "head"])["content_shift"]
    middle, most = float(shifts.median()), float(shifts.max())
    if most < CONTENT_MOVES:
        return Finding(
            "not seen",
            f"Content does not move the offset at which a head of {title(found.label)} scores "
            f"best: content shift {percent(middle)} (largest {percent(most)}).",
        )
    tokens = float(table["offset_shift"].median())
    beside = f"; the best offset moves by {number(tokens)} tokens" if math.isfinite(tokens) else ""
    return Finding(
        "seen",
        f"Content moves the offset at which a head of {title(found.label)} scores best: content "
        f"shift {percent(middle)} in the middle head, {percent(most)} in "
        f"{head_words(shifts.idxmax())}{beside}.",
    )


def retrieval(found: Measured) -> Finding:
    """Whether hidden facts are found beyond the training length."""
    table = found.table("retrieval")
    if table is None:
        return _missing(found, "retrieval", "Retrieval")
    means = table.groupby("length")["accuracy"].mean()
    if float(means.max()) == 0:
        tokens = table["token_accuracy"].mean()
        return Finding(
            "measured",
            f"{title(found.label)} finds no hidden fact at any length ({percent(tokens)} of the "
            "answers' tokens are right): a task beyond it, which says nothing of length.",
        )
    base, longest = int(means.index.min()), int(means.index.max())
    if found.train_length:
        base = max([int(n) for n in means.index if n <= found.train_length] or [base])
    first, last = float(means[base]), float(means[longest])
    depths = table[table["length"] == longest].groupby("depth")["accuracy"].mean()
    text = f"{percent(first)} of hidden facts are found at {base:,} tokens"
    if longest > base:
        text += f", {percent(last)} at {longest:,}"
    if depths.max() > depths.min():
        text += f"; there least at depth {percent(float(depths.idxmin()))}"  # type: ignore[arg-type]
    return Finding("seen" if last < first else "not seen", text + ".")


def cost(found: Measured) -> Finding:
    """What the position encoding costs over RoPE."""
    table = found.table("cost")
    if table is None:
        return _missing(found, "cost", "Cost")
    row = table.sort_values("length").iloc[-1]
    text = (
        f"At {int(row['length']):,} tokens: tables of positions {int(row['table_bytes']):,} "
        f"bytes, cache {number(float(row['cache_bytes_per_token']))} bytes a token"
    )
    counted = float(row["overhead_measured"])
    if math.isfinite(counted):
        text += (
            f", {percent(counted)} more operations than with RoPE (formula "
            f"{percent(float(row['overhead_formula']))})"
        )
    return Finding("measured", text + ".")


def headline(found: Measured) -> str:
    """The main result in one sentence."""
    name, said = title(found.label), loss(found)
    tail = {
        "seen": lambda: f"{name}: " + said.text.split(";")[0].rstrip(".") + ".",
        "not seen": lambda: f"{name}: " + said.text,
    }
    make: Callable[[], str] = tail.get(said.kind, lambda: f"{name}: {chain(found).text}")
    return make()


def _verb(seen: bool, verb: str, moved: Change) -> str:
    if seen:
        return verb
    return "stays" if 0.8 <= moved.last / moved.first <= RANK_GROWS else "changes"


def _sink_words(sink: Change, fails: bool) -> str:
    if sink.first < SINK_THERE:
        return f"the first token is no sink (attention on it {sink.words})"
    what = "loses its mass" if fails else "keeps its mass"
    return f"the sink {what} ({sink.words})"


def _where(found: Measured, span: tuple[int, int]) -> str:
    if found.train_length and span[0] <= found.train_length:
        at = f"Beyond its training length of {found.train_length:,}"
        more = f" (measured from {span[0]:,}" if span[0] != found.train_length else " (measured"
        return f"{at}{more} to {span[1]:,} tokens)"
    if found.train_length:
        return f"From {span[0]:,} to {span[1]:,} tokens, all beyond its training length,"
    return f"From {span[0]:,} to {span[1]:,} tokens (its training length is not known)"


def _no_span(found: Measured, what: str) -> Finding:
    longest = found.lengths[-1] if found.lengths else 0
    if found.train_length and longest:
        why = f"no length beyond the training length of {found.train_length:,} was asked for"
    else:
        why = "one length alone was asked for, and the training length is not known"
    return Finding("not measured", f"{what} was not measured: {why}.")


def _missing(found: Measured, name: str, what: str) -> Finding:
    why = found.missing.get(name, "there is nothing of it in this model")
    return Finding("not measured", f"{what} was not measured: {why}.")
