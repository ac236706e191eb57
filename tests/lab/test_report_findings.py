"""Means, changes with length and the sentence that a report begins with."""

from __future__ import annotations

import math
from itertools import product
from statistics import mean, stdev

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whatwhere.lab.recipes import PaperFigure
from whatwhere.lab.report.findings import best_first, changes, finding, percent, statistics
from whatwhere.lab.report.tables import duration, memory

UNIT = "nats per token"
COLUMNS = ["encoding", "seed", "metric", "length", "value"]
LOSSES = st.floats(0.01, 20)


def table(values: dict[tuple[str, int, int], float], metric: str = "loss") -> pd.DataFrame:
    rows = [(label, seed, metric, n, value) for (label, seed, n), value in values.items()]
    return pd.DataFrame(rows, columns=COLUMNS)


@given(st.lists(st.tuples(LOSSES, LOSSES), min_size=2, max_size=5))
def test_change_is_taken_seed_by_seed(pairs: list[tuple[float, float]]) -> None:
    values = {
        ("rope", seed, length): value
        for seed, pair in enumerate(pairs)
        for length, value in zip((64, 640), pair, strict=True)
    }
    found = changes(table(values), 64)
    ratios = [late / early - 1 for early, late in pairs]
    assert found.loc[("rope", 640), "mean"] == pytest.approx(mean(ratios))
    assert found.loc[("rope", 640), "std"] == pytest.approx(stdev(ratios), abs=1e-12)
    assert found.loc[("rope", 64), "mean"] == 0
    plain = statistics(table(values), "loss").loc[("rope", 640)]
    assert plain["mean"] == pytest.approx(mean(late for _, late in pairs))
    assert plain["count"] == len(pairs)


def test_seeds_without_a_loss_at_the_training_length_do_not_count() -> None:
    values = {("rope", 0, 64): 1.0, ("rope", 0, 128): 2.0, ("rope", 1, 128): 9.0}
    found = changes(table(values), 64)
    assert found.loc[("rope", 128), "mean"] == 1 and found.loc[("rope", 128), "count"] == 1


def test_one_diverged_seed_makes_the_mean_not_finite() -> None:
    values = {("rope", 0, 64): 1.0, ("rope", 1, 64): math.nan}
    assert math.isnan(statistics(table(values), "loss").loc[("rope", 64), "mean"])


def test_best_first_ranks_reach_then_loss_then_divergence() -> None:
    values = {
        ("short", 0, 64): 0.1,
        ("worse", 0, 128): 2.0,
        ("better", 0, 128): 1.0,
        ("diverged", 0, 128): math.inf,
    }
    labels = ["unknown", "short", "diverged", "worse", "better"]
    ranked = ["better", "worse", "diverged", "short", "unknown"]
    assert best_first(table(values), labels) == ranked
    answers = table({("a", 0, 49): 0.2, ("b", 0, 49): 0.9}, "accuracy")
    assert best_first(answers, ["a", "b"]) == ["b", "a"]


def test_finding_says_when_the_side_changes() -> None:
    values = {("alibi", 0, 64): 2.0, ("alibi", 0, 640): 1.9, ("pope", 0, 64): 2.0}
    values |= {("pope", 0, 640): 2.5, ("rope", 0, 64): 1.0, ("rope", 0, 640): 4.0}
    expected = (
        "At 640 tokens, 10 times the training length, ALiBi's loss is 5.0 % below its own at 64; "
        "PoPE's 25 % above, RoPE's 300 %."
    )
    assert plain(finding(table(values), 64, UNIT)) == expected


def test_finding_names_the_best_and_the_worst_of_many() -> None:
    values = {(f"e{k}", 0, n): 1.0 + (n > 64) * k / 10 for k, n in product(range(1, 8), (64, 128))}
    found = plain(finding(table(values), 64, UNIT))
    assert found is not None and found.endswith("; e2's 20 %, e3's 30 % … e7's 70 %.")


def test_finding_without_longer_windows_or_without_the_training_length() -> None:
    values = {("pope", 0, 64): 1.25, ("rope", 0, 64): 1.5}
    expected = "At 64 tokens PoPE's loss is 1.250 nats per token; RoPE's 1.500."
    assert finding(table(values), 64, UNIT) == expected
    assert finding(table(values), 32, UNIT) == expected
    assert finding(table({("pope", 0, 64): math.inf}), 64, UNIT) is None
    assert finding(table({}), 64, UNIT) is None


def test_finding_of_accuracy_has_the_papers_beside_it_where_there_is_one() -> None:
    answers = table({("pope", 0, 49): 0.9, ("sinusoidal", 0, 49): 0.02}, "accuracy")
    paper = {"pope": {"accuracy": PaperFigure(value=0.9482, source="it")}}
    expected = "PoPE answers 90.0 % correctly (the paper: 94.8 %); sinusoidal 2.0 %."
    assert plain(finding(answers, 0, "nats per target", paper)) == expected
    alone = answers[answers["encoding"] == "pope"]
    assert plain(finding(alone, 0, "nats per target")) == "PoPE answers 90.0 % correctly."


def plain(sentence: str | None) -> str | None:
    return sentence and sentence.replace("\u00a0", " ")


@given(st.floats(-0.99, 50))
def test_percent_is_right_to_what_it_shows(change: float) -> None:
    shown = percent(change).removesuffix("\u00a0%")
    within = 0.05 if "." in shown else 0.5
    assert abs(float(shown.replace(",", "")) - 100 * abs(change)) <= within * 1.0001
    assert len(shown.replace(".", "").replace(",", "")) >= 2  # never fewer than two digits


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2 s"), (59.6, "59.6 s"), (60, "1 min 0 s"), (3599.7, "1 h 0 min"), (None, "–")],
)
def test_duration(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_memory_uses_binary_units() -> None:
    sizes = [0, 1023, 1024, 1536 * 1024, 5 * 2**30]
    assert [memory(size) for size in sizes] == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "5.0 GiB"]
