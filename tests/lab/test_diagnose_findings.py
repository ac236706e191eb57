"""What is said of measurements: words follow from numbers, and every finding has its numbers."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import diagnosis_frames as made
from whatwhere.lab.diagnose import chain as chain_of
from whatwhere.lab.diagnose.chain import chain, links
from whatwhere.lab.diagnose.findings import (
    CONTENT_MOVES,
    LOSS_RISES,
    cost,
    delta,
    findings,
    frequencies,
    headline,
    loss,
    prediction,
    retrieval,
    rises_from,
    what_where,
)
from whatwhere.lab.diagnose.measured import Measured
from whatwhere.lab.diagnose.words import Finding, change, number

DOUBLINGS = math.log2(made.LENGTHS[-1] / made.TRAIN)


def measured(
    rank: float = 1.0, meet: float = 0.17, sink: float = 0.15, rise: float = 0.3, **more: Any
) -> Measured:
    """A model whose numbers change by so much at each doubling beyond its training length."""
    frames = {
        "geometry": made.geometry(rank),
        "clusters": made.clusters(meet),
        "scores": made.scores(sink),
        "frequency_usage": made.usage("rotate"),
        "what_where": made.what_where(),
        "loss_by_length": made.loss(rise),
        "in_distribution": made.in_distribution("rotate"),
        "retrieval": made.retrieval(),
        "cost": made.cost(),
        "learned_delta": made.delta(),
    }
    frames |= more.pop("frames", {})
    known = Measured("rope", "nats per byte", made.TRAIN, frames, made.TRAIN, "a reason")
    return replace(known, **more)


GROWTH = st.floats(0, 2)
FALL = st.floats(0, 0.2)


@settings(max_examples=30, deadline=None)
@given(GROWTH, FALL, FALL)
def test_the_chain_is_seen_as_far_as_its_numbers_pass_the_thresholds(
    rank: float, meet: float, sink: float
) -> None:
    model = measured(rank, meet, sink)
    found, known = chain(model), links(model)
    assert known is not None
    first, last = known.rank.first, known.rank.last
    assert last - first == pytest.approx(rank * DOUBLINGS)
    assert known.grows == (last >= chain_of.RANK_GROWS * first)
    assert known.meet.first - known.meet.last == pytest.approx(meet * DOUBLINGS)
    assert known.falls == (known.meet.first - known.meet.last >= chain_of.CLUSTERS_MEET)
    assert known.fails == (known.sink.last <= (1 - chain_of.SINK_FAILS) * known.sink.first)
    assert found.kind == ("seen" if known.count else "not seen")
    assert ("seen whole" in found.text) == (known.count == 3)
    assert ("nothing of" in found.text) == (known.count == 0)
    for one in (known.rank, known.before, known.meet, known.sink):
        assert one.words in found.text
    assert f"{made.TRAIN}" in found.text and "1,024" in found.text
    assert ("Most:" in found.text) == (known.count > 0)


def test_what_grows_without_the_encoding_is_no_link() -> None:
    frame = made.geometry(1.0)
    after = frame[frame["stage"] == "after"]
    both = pd.concat([after, after.assign(stage="before")])
    model = measured(meet=0, sink=0, frames={"geometry": both})
    found = chain(model)
    assert found.kind == "not seen" and "no more than before the encoding" in found.text


def test_what_is_no_cluster_cannot_meet_and_what_is_no_sink_cannot_fail() -> None:
    flat = made.clusters(0.1).assign(silhouette=lambda f: f["silhouette"] - 0.5)
    weak = made.scores(0.15).assign(sink_mass=lambda f: f["sink_mass"] * 0.1)
    found = chain(measured(0, frames={"clusters": flat, "scores": weak}))
    assert found.kind == "not seen"
    assert "no clusters apart" in found.text and "is no sink" in found.text


def test_the_head_that_changes_most_is_named() -> None:
    frame = made.scores(0.1).query("stage == 'after'")
    place = (frame["layer"] == 2) & (frame["head"] == 1) & (frame["length"] == 1024)
    frame.loc[place, "sink_mass"] = 0.0
    moved = change(frame, "sink_mass", (128, 1024))
    first = frame[(frame["layer"] == 2) & (frame["head"] == 1) & (frame["length"] == 128)]
    assert moved.where == f"layer 2, head 1 ({number(first['sink_mass'].item())} → 0.00)"


@settings(max_examples=30, deadline=None)
@given(st.floats(-0.2, 1.0))
def test_the_loss_rises_where_it_passes_its_threshold(rise: float) -> None:
    model = measured(rise=rise)
    found = loss(model)
    losses = made.loss(rise).set_index("length")["loss"]
    above = losses / losses[made.TRAIN] - 1
    assert found.kind == ("seen" if above.iloc[-1] >= LOSS_RISES else "not seen")
    assert f"{losses[made.TRAIN]:.4f}" in found.text and f"{losses.iloc[-1]:.4f}" in found.text
    beyond = [n for n in made.LENGTHS if n > made.TRAIN and above[n] > LOSS_RISES]
    assert rises_from(model) == (beyond[0] if beyond else None)
    if beyond:
        assert f"from {beyond[0]:,} tokens on" in found.text
    assert ("rises" in headline(model)) == (found.kind == "seen")


@pytest.mark.parametrize(
    ("safe", "rise", "right"),
    [
        *[(128, 0.3, True), (200, 0.3, True), (256, 0.3, False), (None, 0.3, False)],
        *[(None, 0.0, True), (2048, 0.0, True), (128, 0.0, False)],
    ],
)
def test_a_prediction_is_held_against_the_loss(safe: int | None, rise: float, right: bool) -> None:
    found = prediction(measured(rise=rise, safe_length=safe))
    assert found.text.endswith(", as predicted." if right else ", not as predicted.")
    assert (f"up to {safe:,} tokens" if safe else "at any length") in found.text
    assert "Of 8 frequencies 3 complete" in found.text


def test_a_loss_that_is_not_finite_is_said() -> None:
    frame = made.loss(0.1)
    frame.loc[frame["length"] == 1024, "loss"] = math.nan
    model = measured(frames={"loss_by_length": frame})
    assert loss(model).kind == "seen" and "not finite" in loss(model).text
    assert "not finite" in headline(model)


def test_evenly_used_frequencies_count_whole() -> None:
    even = made.usage("polar").assign(norm=1.0)
    text = frequencies(measured(frames={"frequency_usage": even})).text
    assert "Of 16 frequencies RoPE uses as many as 16.0" in text
    one = even.assign(norm=(even["channel"] == 0).astype(float))
    text = frequencies(measured(frames={"frequency_usage": one})).text
    # The fastest alone is used, and it turns often within the training length.
    assert "as many as 1.0 used" in text and "0.0\u00a0% of the norm" in text


@pytest.mark.parametrize("shift", [0.0, CONTENT_MOVES / 2, 0.4, 1.0])
def test_content_moves_the_best_offset_or_does_not(shift: float) -> None:
    frame = made.what_where(shift)
    found = what_where(measured(frames={"what_where": frame}))
    moves = frame["content_shift"].max() >= CONTENT_MOVES
    assert found.kind == ("seen" if moves else "not seen")
    assert ("does not move" in found.text) != moves


def test_retrieval_is_said_where_it_means_something() -> None:
    falling = retrieval(measured()).text
    assert "90\u00a0% of answers are right at 128 tokens, 0.0\u00a0% at 1,024" in falling
    none = made.retrieval().assign(accuracy=0.0)
    assert "says nothing of length" in retrieval(measured(frames={"retrieval": none})).text


def test_cost_is_beside_its_formula() -> None:
    frame = made.cost(64)
    text = cost(measured(frames={"cost": frame})).text
    assert f"formula {100 * frame['overhead_formula'].iloc[-1]:.0f}\u00a0%" in text
    same = cost(measured(frames={"cost": made.cost(polar=False)})).text
    assert "as many operations as with RoPE" in same


def test_phases_are_said_where_they_are_furthest() -> None:
    (found,) = delta(measured())
    assert "at a wavelength of 6 tokens" in found.text
    assert delta(measured(frames={"learned_delta": made.delta().iloc[:0]})) == []


def every(model: Measured) -> list[Finding]:
    return [finding for part in findings(model).values() for finding in part]


def test_no_finding_without_its_numbers() -> None:
    for finding in every(measured()):
        assert finding.kind != "not measured"
        assert len(re.findall(r"\d+(?:\.\d+)?", finding.text)) >= 2


def test_what_was_not_measured_is_said_with_the_reason() -> None:
    empty = Measured("x", "nats per byte", None, {}, missing={"retrieval": "it was switched off"})
    found = every(empty)
    assert {finding.kind for finding in found} == {"not measured"}
    assert "Retrieval was not measured: it was switched off." in [one.text for one in found]


@pytest.mark.parametrize(
    ("train_length", "said"),
    [
        (4096, "no length beyond the training length of 4,096"),
        (None, "its training length is not known"),
        (32, "all beyond its training length"),
    ],
)
def test_lengths_that_say_nothing_of_failure_are_not_taken_for_some(
    train_length: int | None, said: str
) -> None:
    assert said in chain(measured(train_length=train_length)).text
