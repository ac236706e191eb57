"""One number an encoding: its figure, its sentence and its table."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from whatwhere.figures.palette import styles, title
from whatwhere.lab import recipes, storage
from whatwhere.lab.compare import summary
from whatwhere.lab.report.figures import draw_loss_by_length
from whatwhere.lab.report.findings import best_first, finding, main_metric
from whatwhere.lab.report.metric_figure import draw_metric
from whatwhere.lab.report.page import build_report

COLUMNS = ["encoding", "seed", "metric", "length", "value"]

LOSSES = pd.DataFrame(
    [
        ("rope", 0, "test_loss", 2048, 0.52),
        ("rope", 1, "test_loss", 2048, 0.50),
        ("pope", 0, "test_loss", 2048, 0.48),
        ("pope", 1, "test_loss", 2048, 0.49),
        ("nope", 0, "test_loss", 2048, math.nan),
    ],
    columns=COLUMNS,
)


def test_the_best_is_on_top_and_the_paper_beside() -> None:
    paper = {"pope": (0.4889, None), "alibi": (0.6, 0.1)}
    figure = draw_metric(LOSSES, "test_loss", "nats per token", paper)
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["PoPE  0.4850", "RoPE  0.5100"]
    assert axes.get_xlabel() == "test loss, nats per token"
    drawn = {
        (float(x), float(y))
        for line in axes.lines
        for x, y in [(line.get_xdata()[0], line.get_ydata()[0])]
    }
    assert (0.4889, 0.28) in drawn  # the paper's, below ours
    assert any(abs(x - 0.485) < 1e-12 and y == 0 for x, y in drawn)
    low, high = axes.get_xlim()
    assert low < 0.48 and high > 0.52


def test_accuracies_are_in_per_cent_and_the_highest_is_on_top() -> None:
    table = LOSSES.assign(metric="zero_shot_accuracy")
    axes = draw_metric(table, "zero_shot_accuracy", "nats").axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["RoPE  51.0", "PoPE  48.5"]
    assert axes.get_xlabel() == "zero shot accuracy, %"
    with pytest.raises(ValueError, match="no finite accuracy"):
        draw_metric(table, "accuracy", "nats")


def test_perplexity_is_the_exponential_of_the_loss_on_a_log_axis() -> None:
    rows = [("rope", 0, "loss", n, loss) for n, loss in ((256, 1.5), (512, 2.0), (2560, 4.0))]
    table = pd.DataFrame(rows, columns=COLUMNS)
    axes = draw_loss_by_length(table, 256, "nats per byte", perplexity=True).axes[0]
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "perplexity of a byte"
    curve = next(line for line in axes.lines if len(line.get_xdata()) == 3)
    np.testing.assert_allclose(curve.get_ydata(), np.exp([1.5, 2.0, 4.0]), rtol=1e-12)


def test_a_sentence_says_what_was_found_beside_the_paper() -> None:
    recipe = recipes.get("jsb", "paper")
    assert main_metric(LOSSES) == "test_loss"
    assert best_first(LOSSES, ["nope", "rope", "pope"]) == ["pope", "rope", "nope"]
    assert finding(LOSSES, 2048, "nats per token", recipe.paper) == (
        "PoPE's test loss is 0.4850 nats per token (the paper: 0.4889); "
        "RoPE's 0.5100 (the paper: 0.5081)."
    )
    assert summary(LOSSES, "nats per token").title == "test loss, nats per token"


def test_the_page_of_a_recipe_without_lengths(tmp_path: Path) -> None:
    recipe = recipes.get("jsb", "paper")
    storage.write_text(tmp_path / "settings.yaml", recipes.to_yaml(recipe))
    LOSSES[LOSSES["encoding"] != "nope"].to_csv(tmp_path / "results.csv", index=False)
    page = build_report(tmp_path).read_text()
    assert "PoPE&#39;s test loss is 0.4850" in page and "test loss" in page
    assert "0.4889" in page and "0.5081" in page and "nats per token" in page
    assert (tmp_path / "test_loss.svg").exists()


def test_scores_of_tasks_and_lengths_stand_beside_the_papers(tmp_path: Path) -> None:
    recipe = recipes.get("rope-id-1b", "paper")
    storage.write_text(tmp_path / "settings.yaml", recipes.to_yaml(recipe))
    rows = [("rope-id", 0, "ruler_accuracy", 8192, 0.5), ("rope-id", 0, "piqa_acc", 4096, 0.25)]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(tmp_path / "results.csv", index=False)
    page = build_report(tmp_path).read_text()
    assert "ruler accuracy at 8,192, %" in page and "35.64" in page and "50.00" in page
    assert "piqa acc, %" in page and "25.00" in page


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("partial-rope-10", "partial RoPE 10 %"),
        ("partial-pope-1", "partial PoPE 1 %"),
        ("pope-qk-norm", "PoPE + QK-Norm"),
        ("partial-thing-1", "partial-thing-1"),
        ("pope-ft", "PoPE-ft"),
    ],
)
def test_labels_of_recipes_have_names(label: str, expected: str) -> None:
    assert title(label) == expected and styles([label])[label].title == expected
