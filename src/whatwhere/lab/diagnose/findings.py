"""What the measurements of one model say, in words; no finding without its numbers.

Numbers are medians over layers and heads. A change is from the longest length within the training
length (or the shortest measured, where none is known) to the longest measured. It is called one if
it passes a threshold, here or in `chain`; these are ours, the papers give none.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from whatwhere.figures.palette import title
from whatwhere.lab.diagnose.chain import chain, links
from whatwhere.lab.diagnose.measured import Measured
from whatwhere.lab.diagnose.words import Finding, head_words, missing, no_span, number
from whatwhere.lab.report.findings import percent

LOSS_RISES = 0.05
"""Share by which the loss must rise."""
CONTENT_MOVES = 0.01
"""Content shift from which on content is said to move a score's place."""


def findings(found: Measured) -> dict[str, list[Finding]]:
    """What is found, by section of the page."""
    return {
        "chain": [chain(found)],
        "loss": [loss(found), prediction(found)],
        "frequencies": [frequencies(found), *delta(found)],
        "what_where": [what_where(found)],
        "retrieval": [retrieval(found)],
        "cost": [cost(found)],
    }


def loss(found: Measured) -> Finding:
    """Whether the loss rises beyond the training length."""
    table = found.table("loss_by_length")
    if table is None:
        return missing(found, "loss_by_length", "Loss by length")
    span = found.span()
    losses = table.set_index("length")["loss"]
    if span is None:
        last = int(losses.index.max())
        return Finding(
            "measured", f"Loss at {last:,} tokens is {losses[last]:.4f} {found.unit}. "
            + no_span(found, "How it changes beyond the training length").text,
        )  # fmt: skip
    base, longest = span
    first, last_loss = float(losses[base]), float(losses[longest])
    if not math.isfinite(last_loss):
        return Finding("seen", f"Loss at {longest:,} tokens is not finite; at {base:,} it is "
                       f"{first:.4f} {found.unit}.")  # fmt: skip
    rise = last_loss / first - 1
    numbers = f"{first:.4f} {found.unit} at {base:,} tokens, {last_loss:.4f} at {longest:,}"
    if rise < LOSS_RISES:
        side = "above" if rise >= 0 else "below"
        return Finding("not seen", f"Loss holds: {numbers} ({percent(rise)} {side}).")
    start = rises_from(found)
    return Finding(
        "seen",
        f"Loss rises by {percent(rise)}: {numbers}; it is more than {percent(LOSS_RISES)} above "
        f"from {start:,} tokens on.",
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
        return missing(found, "in_distribution", "A safe length")
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
        return missing(found, "frequency_usage", "Use of frequencies")
    means = usage.groupby(["layer", "side", "frequency"])["norm"].mean()
    breadths = means.groupby(["layer", "side"]).agg(_breadth)
    counts = means.groupby(["layer", "side"]).size()
    share = float((breadths / counts).median())
    spectrum = means.groupby("frequency").mean()
    text = (
        f"Of {int(counts.median())} frequencies {title(found.label)} uses as many as "
        f"{float(breadths.median()):.1f} used evenly would be ({percent(share)}; median over "
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


def delta(found: Measured) -> list[Finding]:
    """How far the learned phases moved, at fast and at slow frequencies, where there are some."""
    table = found.table("learned_delta")
    if table is None:
        return []
    sizes = table.assign(delta=table["delta"].abs()).groupby("frequency")["delta"].mean()
    if not sizes.any():
        return [Finding("measured", f"All {len(table):,} learned phases are 0.")]
    quarter = max(1, len(sizes) // 4)
    slow, fast = float(sizes.iloc[:quarter].mean()), float(sizes.iloc[-quarter:].mean())
    furthest, place = float(sizes.max()), float(sizes.idxmax())  # type: ignore[arg-type]
    text = (
        f"The learned phases are {number(fast)} rad away from 0 on average in the fastest quarter "
        f"of frequencies, {number(slow)} rad in the slowest; furthest, {number(furthest)} rad, "
        f"{_wave(place)}."
    )
    return [Finding("measured", text)]


def _wave(frequency: float) -> str:
    if frequency == 0:
        return "where nothing turns"
    return f"at a wavelength of {math.tau / frequency:,.0f} tokens"


def what_where(found: Measured) -> Finding:
    """Whether content moves the offset at which a head scores best."""
    table = found.table("what_where")
    table = None if table is None else table.dropna(subset="content_shift")
    if table is None or table.empty:
        return missing(found, "what_where", "Whether content moves the best offset")
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
        return missing(found, "retrieval", "Retrieval")
    means = table.groupby("length")["accuracy"].mean()
    if float(means.max()) == 0:
        tokens = table["token_accuracy"].mean()
        return Finding(
            "measured",
            f"No answer is right at any length ({percent(tokens)} of their tokens are): a task "
            "beyond this model, which says nothing of length.",
        )
    base, longest = int(means.index.min()), int(means.index.max())
    if found.train_length:
        base = max([int(n) for n in means.index if n <= found.train_length] or [base])
    first, last = float(means[base]), float(means[longest])
    depths = table[table["length"] == longest].groupby("depth")["accuracy"].mean()
    text = f"{percent(first)} of answers are right at {base:,} tokens"
    if longest > base:
        text += f", {percent(last)} at {longest:,}"
    if depths.max() > depths.min():
        text += f"; there least at depth {percent(float(depths.idxmin()))}"  # type: ignore[arg-type]
    return Finding("seen" if last < first else "not seen", text + ".")


def cost(found: Measured) -> Finding:
    """What the position encoding costs over RoPE."""
    table = found.table("cost")
    if table is None:
        return missing(found, "cost", "Cost")
    row = table.sort_values("length").iloc[-1]
    text = (
        f"At {int(row['length']):,} tokens: tables of positions {int(row['table_bytes']):,} "
        f"bytes, cache {number(float(row['cache_bytes_per_token']))} bytes a token"
    )
    counted = float(row["overhead_measured"])
    if abs(counted) < 0.0005:  # 0.0 % as it would be written
        text += ", as many operations as with RoPE"
    elif math.isfinite(counted):
        text += (
            f", {percent(counted)} more operations than with RoPE (formula "
            f"{percent(float(row['overhead_formula']))})"
        )
    return Finding("measured", text + ".")


def headline(found: Measured) -> str:
    """The main result in one sentence."""
    name, span, table = title(found.label), found.span(), found.table("loss_by_length")
    if span is None or table is None:
        return f"{name}: {loss(found).text}"
    losses = table.set_index("length")["loss"]
    rise = float(losses[span[1]] / losses[span[0]]) - 1
    where = f"from {span[0]:,} to {span[1]:,} tokens"
    if not math.isfinite(rise):
        said = f"loss is not finite at {span[1]:,} tokens"
    elif rise < LOSS_RISES:
        said = f"loss holds {where}"
    else:
        said = f"loss rises by {percent(rise)} {where}"
    known = links(found)
    if known is None:
        return f"{name}: {said}."
    seen = {0: "not seen", 3: "seen whole"}.get(known.count, f"seen in part ({known.count} of 3)")
    return f"{name}: {said}; the RoPE-ID paper's chain of failure is {seen}."
