"""Figures: what they draw, that nothing in them overlaps, and that their files are whole."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from comparison_folder import LENGTHS, SLOPES, loss, text_recipe, write_comparison
from whatwhere.figures.palette import KNOWN, SPARE, Style, styles
from whatwhere.figures.style import svg
from whatwhere.lab.report import figures
from whatwhere.lab.report.canvas import save, spread
from whatwhere.lab.report.records import Comparison, read_comparison
from whatwhere.lab.storage import DiskFullError

UNIT = "nats per byte"
LABELS = (*SLOPES, "a-label-of-sixty-four-characters-is-the-longest-one-that-there-is"[:64])


def results(labels: tuple[str, ...] = ("rope", "pope"), seeds: int = 2) -> pd.DataFrame:
    rows = [
        (label, seed, "loss", length, loss(label, seed, length))
        for label in labels
        for seed in range(seeds)
        for length in LENGTHS
    ]
    return pd.DataFrame(rows, columns=["encoding", "seed", "metric", "length", "value"])


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """All encodings, two seeds; learned ends at the training length."""
    folder = tmp_path_factory.mktemp("figures") / "text"
    write_comparison(folder, text_recipe(tuple(SLOPES), (0, 1)))
    return read_comparison(folder)


def drawings(found: Comparison) -> dict[str, Callable[[bool], Figure]]:
    long = found.results.replace({"encoding": {"nope": LABELS[-1]}})
    answers = long[long["metric"] == "validation_loss"].assign(metric="accuracy")
    answers["value"] /= 3
    # Wide numbers on both axes.
    logs = found.logs().assign(step=lambda logs: 100 * logs["step"])
    curves = logs.assign(validation_accuracy=logs["validation_loss"] / 3)
    return {
        "length": lambda narrow: figures.draw_loss_by_length(long, 128, UNIT, narrow=narrow),
        "position": lambda narrow: figures.draw_loss_by_position(
            found.positions(), 128, UNIT, narrow=narrow
        ),
        "training": lambda narrow: figures.draw_training_curves(logs, UNIT, narrow=narrow),
        "accuracy": lambda narrow: figures.draw_accuracy(
            answers, {"rope": (0.11, 0.02)}, narrow=narrow
        ),
        "accuracy curves": lambda narrow: figures.draw_accuracy_curves(curves, narrow=narrow),
    }


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", ["length", "position", "training", "accuracy", "accuracy curves"])
def test_text_is_within_the_figure_and_does_not_overlap(
    everything: Comparison, name: str, narrow: bool
) -> None:
    figure = drawings(everything)[name](narrow)
    boxes = text_boxes(figure)
    assert len(boxes) > 8
    width, height = figure.canvas.get_width_height()
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (first, a), (second, b) in combinations(boxes, 2):
        assert not a.overlaps(b), f"{first!r} overlaps {second!r}"


def text_boxes(figure: Figure) -> list[tuple[str, Any]]:
    axes = figure.axes[0]
    figure.canvas.draw()
    legends = [text for legend in figure.legends for text in legend.get_texts()]
    shown = [
        tick.label1
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if axis.get_view_interval()[0] <= tick.get_loc() <= axis.get_view_interval()[1]
        or axis.get_view_interval()[1] <= tick.get_loc() <= axis.get_view_interval()[0]
    ]
    texts = [*figure.texts, *axes.texts, *legends, *shown, axes.xaxis.label, axes.yaxis.label]
    # An annotation's own box includes its arrow.
    return [
        (text.get_text(), mpl.text.Text.get_window_extent(text, figure.canvas.get_renderer()))
        for text in texts
        if text.get_text()
    ]


def test_loss_by_length_draws_means_on_a_log2_axis_with_the_training_length_marked() -> None:
    axes = figures.draw_loss_by_length(results(seeds=3), 128, UNIT).axes[0]
    assert axes.get_xscale() == "log" and axes.xaxis.get_transform().base == 2
    assert axes.get_ylabel() == "loss, nats per byte" and "bytes" in axes.get_xlabel()
    lines = {line.get_color(): line for line in axes.get_lines()}
    for label in ("rope", "pope"):
        line = lines[KNOWN[label].colour]
        means = [np.mean([loss(label, seed, n) for seed in range(3)]) for n in LENGTHS]
        assert list(line.get_xdata()) == list(LENGTHS)
        np.testing.assert_allclose(line.get_ydata(), means)
        assert line.get_marker() == KNOWN[label].marker
    vertical = [line for line in axes.get_lines() if list(line.get_xdata()) == [128, 128]]
    assert len(vertical) == 1
    assert [t.get_text() for t in axes.get_xticklabels()] == ["128", "256", "512", "1,280"]


def test_band_is_one_standard_deviation_and_absent_for_one_seed() -> None:
    one = figures.draw_loss_by_length(results(("rope",), seeds=1), 128, UNIT).axes[0]
    assert not one.collections
    three = figures.draw_loss_by_length(results(("rope",), seeds=3), 128, UNIT).axes[0]
    (band,) = three.collections
    heights = band.get_paths()[0].vertices[:, 1]
    at_end = [loss("rope", seed, 1280) for seed in range(3)]
    assert heights.max() == pytest.approx(np.mean(at_end) + np.std(at_end, ddof=1))


def test_losses_that_hardly_change_look_flat() -> None:
    table = results(("pope",), seeds=1)
    table["value"] = 2 + 0.001 * table.index
    low, high = figures.draw_loss_by_length(table, 128, UNIT).axes[0].get_ylim()
    assert high - low == pytest.approx(0.2, rel=0.05) and (low + high) / 2 == pytest.approx(2.0015)


def test_without_a_training_length_nothing_is_marked() -> None:
    axes = figures.draw_loss_by_length(results(), None, "nats per token").axes[0]
    assert not [t for t in axes.texts if "trained" in t.get_text()]
    assert "tokens" in axes.get_xlabel()


def test_order_of_rows_changes_nothing_but_the_order_of_lines() -> None:
    table = results(seeds=3)
    shuffled = table.sample(frac=1, random_state=0)
    for one, two in zip(drawn_points(table), drawn_points(shuffled), strict=True):
        np.testing.assert_allclose(one, two)


def drawn_points(table: pd.DataFrame) -> list[Any]:
    axes = figures.draw_loss_by_length(table, 128, UNIT).axes[0]
    lines = sorted(axes.get_lines(), key=lambda line: str(line.get_color()))
    return [np.asarray(line.get_xydata()) for line in lines]


def test_a_diverged_seed_is_left_out_and_all_diverged_is_an_error() -> None:
    table = results(("rope", "pope"), seeds=1)
    table.loc[(table["encoding"] == "rope") & (table["length"] == 1280), "value"] = np.inf
    axes = figures.draw_loss_by_length(table, 128, UNIT).axes[0]
    assert np.isfinite(axes.get_ylim()).all()
    with pytest.raises(ValueError, match="no finite value"):
        figures.draw_loss_by_length(table.assign(value=np.nan), 128, UNIT)
    for draw in (figures.draw_accuracy, figures.draw_accuracy_curves):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw(table)


def test_training_curve_is_the_smoothed_log_of_each_run(everything: Comparison) -> None:
    axes = figures.draw_training_curves(everything.logs(), UNIT).axes[0]
    logs = everything.logs()
    own = logs[(logs["encoding"] == "pope") & (logs["seed"] == 0)]["loss"].to_numpy()
    smooth = [own[max(0, i - 2) : i + 3].mean() for i in range(20, 80)]
    lines = [line for line in axes.get_lines() if line.get_color() == KNOWN["pope"].colour]
    drawn = [np.asarray(line.get_ydata())[20:80] for line in lines if len(line.get_ydata()) == 100]
    assert any(np.allclose(line, own[20:80]) for line in drawn)
    shifted = [own[max(0, i - 3) : i + 2].mean() for i in range(20, 80)]
    assert any(np.allclose(line, smooth) or np.allclose(line, shifted) for line in drawn)


def test_position_bins_average_neighbours_and_keep_the_first_positions() -> None:
    table = pd.DataFrame({"position": range(1, 1025), "encoding": "rope", "seed": 0})
    table["loss"] = np.where(table["position"] % 2, 1.0, 3.0)
    axes = figures.draw_loss_by_position(table, None, UNIT).axes[0]
    (line,) = axes.get_lines()
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert list(x[:3]) == [1, 2, 3] and list(y[:3]) == [1, 3, 1]
    np.testing.assert_allclose(y[x > 200], 2, atol=0.1)
    assert all(a < b for a, b in pairwise(x))


def test_accuracy_shows_the_papers_value_beside_ours() -> None:
    table = pd.DataFrame(
        [("pope", seed, "accuracy", 49, 0.9 + 0.01 * seed) for seed in range(3)],
        columns=["encoding", "seed", "metric", "length", "value"],
    )
    axes = figures.draw_accuracy(table, {"pope": (0.9482, 0.0291), "rope": (0.11, None)}).axes[0]
    points = [tuple(line.get_xdata()) for line in axes.get_lines() if len(line.get_xdata()) == 1]
    assert any(x == pytest.approx((94.82,)) for x in points)
    assert any(x == pytest.approx((91.0,)) for x in points)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["PoPE  91.0"]


def test_files_are_a_png_and_an_svg_that_names_itself_whole(tmp_path: Path) -> None:
    png, vector = figures.loss_by_length(results(), tmp_path / "a" / "loss.v1", 128, UNIT)
    assert (png.name, vector.name) == ("loss.v1.png", "loss.v1.svg")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 20_000
    assert vector.read_text().rstrip().endswith("</svg>")
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [png.name, vector.name]
    logs = pd.DataFrame({"encoding": "rope", "seed": 0, "step": [10, 20], "loss": [3.0, 2.0]})
    assert all(path.exists() for path in figures.training_curves(logs, tmp_path / "t", UNIT))
    positions = pd.DataFrame({"encoding": "rope", "seed": 0, "position": [1, 2], "loss": [3, 2.5]})
    written = figures.loss_by_position(positions, tmp_path / "p", 2, UNIT)
    answers = results(seeds=1).assign(metric="accuracy", value=0.5)
    assert all(path.exists() for path in written + figures.accuracy(answers, tmp_path / "acc"))


def test_a_full_disk_leaves_the_old_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = figures.draw_loss_by_length(results(), 128, UNIT)
    old = [path.read_bytes() for path in save(figure, tmp_path / "loss")]

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFullError):
        figures.loss_by_length(results(("nope",)), tmp_path / "loss", 128, UNIT)
    assert [(tmp_path / f"loss.{kind}").read_bytes() for kind in ("png", "svg")] == old
    assert len(list(tmp_path.iterdir())) == 2


def test_svg_is_the_same_whenever_and_wherever_it_is_drawn() -> None:
    first = svg(figures.draw_loss_by_length(results(), 128, UNIT))
    with mpl.rc_context({"font.size": 22, "axes.grid": False, "lines.linewidth": 9}):
        again = svg(figures.draw_loss_by_length(results(), 128, UNIT))
        assert mpl.rcParams["font.size"] == 22
    assert first == again
    assert "<dc:date>" not in first and "<text" not in first


def test_pyplot_stays_out_of_it() -> None:
    code = "import whatwhere.lab.report, sys; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@given(
    st.lists(st.floats(0, 1000), min_size=1, max_size=12),
    st.floats(1, 60),
)
def test_spread_keeps_order_and_distance_and_moves_no_more_than_needed(
    wanted: list[float], gap: float
) -> None:
    placed = spread(wanted, gap, 0, 1000)
    ranked = sorted(range(len(wanted)), key=lambda index: wanted[index])
    for first, second in pairwise(ranked):
        assert placed[second] - placed[first] >= gap * (1 - 1e-9)
    assert min(placed) >= 0 and max(placed) <= max(1000, (len(wanted) - 1) * gap) + 1e-6
    # Least squares: no step of one block that keeps the distances comes nearer.
    cost = sum((a - b) ** 2 for a, b in zip(wanted, placed, strict=True))
    for step in (-0.01, 0.01):
        for first in range(len(ranked)):
            for last in range(first, len(ranked)):
                moved = list(placed)
                for index in ranked[first : last + 1]:
                    moved[index] += step
                legal = min(moved) >= 0 and max(moved) <= 1000
                apart = all(moved[b] - moved[a] >= gap for a, b in pairwise(ranked))
                if legal and apart:
                    assert (
                        sum((a - b) ** 2 for a, b in zip(wanted, moved, strict=True))
                        >= cost - 1e-6
                    )


def test_styles_are_fixed_distinct_and_legible() -> None:
    for label, style in KNOWN.items():
        assert styles([label, "other"])[label] is style
        assert styles(["other", label])[label] is style
    many = styles([*KNOWN, *(f"mine-{k}" for k in range(18))]).values()
    drawn = [(style.colour, style.marker, style.dashes) for style in many]
    assert len(set(drawn)) == len(drawn)
    for style in [*KNOWN.values(), *(Style("x", *spare) for spare in SPARE)]:
        assert contrast(style.ink) >= 4.5, style  # WCAG AA for text
        assert contrast(style.colour) >= 2.2, style


def contrast(colour: str) -> float:
    """Contrast of a colour with white, as WCAG 2 defines it."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05))
