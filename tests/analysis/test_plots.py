"""Figures of measurements: labels with units, one legend or colour bar, one scale, true values."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

import diagnosis_frames as made
from whatwhere.analysis import plots
from whatwhere.analysis.plots import panels
from whatwhere.analysis.plots.lines import MEASURES
from whatwhere.figures.style import svg

LAST = made.LENGTHS[-1]


def of_two(make: Callable[..., pd.DataFrame], *apart: Any) -> dict[str, pd.DataFrame]:
    """Measurements of two models that differ in the first argument."""
    return dict(zip(("rope", "a model with a name that is longer than fits"), map(make, apart)))  # noqa: B905


def last(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the longest length after the encoding."""
    return frame[(frame["length"] == LAST) & (frame["stage"] == "after")]


def separation(frames: Any, narrow: bool) -> Figure:
    return plots.by_head(
        frames, "silhouette", "silhouette", "Separation", signed=True, narrow=narrow
    )


Draw = Callable[[Any, bool], Figure]
# Name -> how it is drawn, measurements of two models, and words of its axes and colours.
HEAT: dict[str, tuple[Draw, Any, set[str]]] = {
    "frequency_usage": (
        lambda f, n: plots.frequency_usage(f, narrow=n),
        of_two(made.usage, "rotate", "polar"),
        {"frequency, rad/token", "wavelength, tokens", "layer", "norm of pair or magnitude, mean"},
    ),
    "relative": (
        lambda f, n: plots.frequency_usage(f, relative=True, narrow=n),
        of_two(made.usage, "rotate", "polar"),
        {"frequency, rad/token", "wavelength, tokens", "layer", "share of the layer's largest, %"},
    ),
    "learned_delta": (
        lambda f, n: plots.learned_delta(f, narrow=n),
        of_two(made.delta, 4, 6),
        {"frequency, rad/token", "wavelength, tokens", "layer", "mean |delta|, rad"},
    ),
    "learned_delta_by_head": (
        lambda f, n: plots.learned_delta(f, by_head=True, narrow=n),
        of_two(made.delta, 4, 6),
        {"frequency, rad/token", "layer, its heads side by side", "|delta|, rad"},
    ),
    "by_head": (
        separation,
        {k: last(v) for k, v in of_two(made.clusters, 0.3, 0.02).items()},
        {"layer", "head", "silhouette"},
    ),
    "what_where": (
        lambda f, n: plots.what_where(f, narrow=n),
        of_two(made.what_where, 0.4, 0.0),
        {"layer", "head", "content shift, %"},
    ),
    "in_distribution": (
        lambda f, n: plots.in_distribution(f, made.TRAIN, 2 * made.TRAIN, narrow=n),
        of_two(made.in_distribution, "rotate", "polar"),
        {"length, tokens", "wavelength, tokens", "unseen share of the circle, %"},
    ),
    "retrieval": (
        lambda f, n: plots.retrieval(f, made.TRAIN, narrow=n),
        of_two(made.retrieval, 0.4, 0.05),
        {"length of the prompt, tokens", "depth in the text, %", "answers right, %"},
    ),
}
LINES: dict[str, tuple[Draw, Any, set[str]]] = {
    "geometry": (
        lambda f, n: plots.geometry(*f, made.TRAIN, narrow=n),
        [of_two(made.geometry, 1, 0), of_two(made.clusters, 0.2, 0), of_two(made.scores, 0.2, 0)],
        {"length, tokens", *(measure.unit for measure in MEASURES)},
    ),
    "cost": (
        lambda f, n: plots.cost(f, made.TRAIN, narrow=n),
        of_two(made.cost, 64, 256),
        {"length, tokens", "operations over RoPE's, %"},
    ),
    "points": (
        lambda f, n: plots.points(f, narrow=n),
        made.points(),
        {"1st component", "2nd component"},
    ),
}
EVERY = HEAT | LINES


def texts(figure: Figure) -> list[Text]:
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_axes_have_labels_with_units_and_nothing_is_cut_off(name: str, narrow: bool) -> None:
    draw, frames, words = EVERY[name]
    figure = draw(frames, narrow)
    figure.draw_without_rendering()
    said = {text.get_text() for text in texts(figure)}
    assert words <= said
    assert figure.get_suptitle()
    assert figure.get_figwidth() == (4 if narrow else 10)
    whole = figure.bbox
    for text in texts(figure):
        box = text.get_window_extent()
        inside = (
            box.x0 >= -2 and box.y0 >= -2 and box.x1 <= whole.x1 + 2 and box.y1 <= whole.y1 + 2
        )
        ticks = [t for a in figure.axes for t in (*a.get_xticklabels(), *a.get_yticklabels())]
        # Ticks beyond the limits of an axis are there, and are not drawn.
        assert inside or text in ticks, text.get_text()


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", HEAT)
def test_heat_maps_have_one_scale_and_one_colour_bar(name: str, narrow: bool) -> None:
    draw, frames, _ = HEAT[name]
    figure = draw(frames, narrow)
    figure.draw_without_rendering()
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert len(bars) == 1
    meshes = [mesh for axes in figure.axes if axes not in bars for mesh in meshes_of(axes)]
    drawn_in = {id(mesh.axes) for mesh in meshes}
    assert len(drawn_in) >= len(frames)
    assert len({(mesh.norm.vmin, mesh.norm.vmax, mesh.get_cmap().name) for mesh in meshes}) == 1
    values = np.concatenate([np.ma.compressed(mesh.get_array()) for mesh in meshes])
    assert meshes[0].norm.vmin <= values.min() and values.max() <= meshes[0].norm.vmax


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", LINES)
def test_lines_and_points_have_one_legend(name: str, narrow: bool) -> None:
    draw, frames, _ = LINES[name]
    figure = draw(frames, narrow)
    assert len(figure.legends) == 1
    assert all(axes.get_legend() is None for axes in figure.axes)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(labels)) == len(labels) >= 3


@pytest.mark.parametrize("name", ["what_where", "cost"])
def test_the_same_numbers_give_the_same_file(name: str) -> None:
    draw, frames, _ = EVERY[name]
    first = svg(draw(frames, False))
    assert first.startswith("<?xml") and "<text" not in first
    assert svg(draw(frames, False)) == first


def meshes_of(axes: Any) -> list[QuadMesh]:
    return [found for found in axes.collections if isinstance(found, QuadMesh)]


def drawn(axes: Any) -> np.ndarray[Any, Any]:
    """Values of all cells in axes, sorted."""
    return np.sort(np.concatenate([m.get_array().ravel() for m in meshes_of(axes)]))


def test_cells_are_the_means_over_heads() -> None:
    usage = made.usage("polar", layers=3, heads=4)
    figure = plots.frequency_usage(usage)
    for axes, side in zip(figure.axes, ("query", "key"), strict=False):
        part = usage[usage["side"] == side]
        means = part.groupby(["layer", "frequency"])["norm"].mean().to_numpy()
        np.testing.assert_allclose(drawn(axes), np.sort(means))
    relative = plots.frequency_usage(usage, relative=True)
    highest = [max(mesh.get_array()) for mesh in meshes_of(relative.axes[0])]
    np.testing.assert_allclose(highest, 1.0)


def test_a_cell_lies_at_its_frequency_and_still_channels_below_all() -> None:
    usage = made.usage("rotate", layers=1)
    still = usage[usage["channel"] == 0].assign(frequency=0.0, norm=9.0)
    figure = plots.frequency_usage(pd.concat([usage, still]))
    (mesh,) = meshes_of(figure.axes[0])
    edges = mesh.get_coordinates()[:, 0, 1]
    values = mesh.get_array().ravel()
    assert values[0] == 9.0
    lowest = np.log10(usage["frequency"].min())
    assert edges[1] < lowest
    means = usage[usage["side"] == "query"].groupby("frequency")["norm"].mean()
    for frequency, norm in means.items():
        cell = np.searchsorted(edges, np.log10(float(frequency))) - 1  # type: ignore[arg-type]
        assert values[cell] == pytest.approx(norm)


def test_a_head_is_drawn_where_its_layer_and_head_are() -> None:
    frame = last(made.clusters(layers=5, heads=3))
    figure = separation(frame, narrow=False)
    (mesh,) = meshes_of(figure.axes[0])
    found = np.asarray(mesh.get_array()).reshape(3, 5)
    for row in frame.to_dict("records"):
        assert found[row["head"], row["layer"]] == row["silhouette"]
    assert mesh.norm.vmin == -mesh.norm.vmax
    with pytest.raises(ValueError, match="one row a head"):
        separation(made.clusters(), narrow=False)


def test_lines_are_medians_and_bands_quartiles() -> None:
    frame = made.geometry(layers=5, heads=3)
    figure = plots.geometry(frame, made.clusters(), made.scores(), made.TRAIN)
    part = frame[(frame["side"] == "key") & (frame["stage"] == "after")]
    by_length = part.groupby("length")["stable_rank"]
    axes = figure.axes[0]
    solid = next(
        line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 2
    )
    assert list(solid.get_xdata()) == list(made.LENGTHS)
    np.testing.assert_allclose(solid.get_ydata(), by_length.median())
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices[:, 1]
    for length in made.LENGTHS:
        assert by_length.quantile(0.25)[length] == pytest.approx(
            min(corners, key=lambda y: abs(y - by_length.quantile(0.25)[length]))
        )
    marked = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert marked == [made.TRAIN]


def test_cost_and_retrieval_are_in_per_cent() -> None:
    frame = made.cost()
    axes = plots.cost(frame).axes[0]
    formula, counted = axes.lines[:2]
    np.testing.assert_allclose(formula.get_ydata(), 100 * frame["overhead_formula"])
    np.testing.assert_allclose(counted.get_ydata(), 100 * frame["overhead_measured"])
    found = made.retrieval(0.3)
    axes = plots.retrieval(found, made.TRAIN).axes[0]
    cells = [text.get_text() for text in axes.texts]
    wanted = found.pivot(index="depth", columns="length", values="accuracy").to_numpy()
    assert cells == [f"{100 * value:.0f}" for value in wanted.ravel()]


def test_unseen_angles_are_drawn_once_for_layers_that_are_alike() -> None:
    same = made.in_distribution("rotate", layers=3)
    assert len(plots.in_distribution(same).axes) == 2  # with the colour bar
    other = made.in_distribution("polar", layers=1).assign(layer=3)
    figure = plots.in_distribution(pd.concat([same, other]))
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles[:2] == ["layers 0 to 2", "layer 3"]
    (mesh,) = meshes_of(figure.axes[0])
    first = same[same["layer"] == 0]
    np.testing.assert_allclose(np.sort(mesh.get_array().ravel()), np.sort(first["unseen"]))


def test_points_up_to_a_length_are_drawn() -> None:
    frame = made.points()
    figure = plots.points(frame)
    figure.draw_without_rendering()
    after = [axes for axes in figure.axes if axes.get_title("left").endswith("after")]
    for axes in after:
        length = int(axes.get_title("left").split()[0].replace(",", ""))
        rows = frame[(frame["stage"] == "after") & (frame["position"] < length)]
        for line, side in zip(axes.lines[::2], ("query", "key"), strict=False):
            np.testing.assert_allclose(line.get_xdata(), rows[rows["side"] == side]["x"])
    assert len({axes.get_xlim() for axes in after}) == 1
    with pytest.raises(ValueError, match="layer 7"):
        plots.points(frame, layer=7)


def test_a_frame_with_models_is_as_good_as_frames_by_model() -> None:
    parts = of_two(made.what_where, 0.4, 0.1)
    whole = pd.concat([frame.assign(model=label) for label, frame in parts.items()])
    assert svg(plots.what_where(whole)) == svg(plots.what_where(parts))
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.what_where(made.what_where().iloc[:0])


def lightness(colour: Any) -> float:
    """Relative luminance, which all forms of colour blindness leave about as it is."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_colours_can_be_told_apart_by_lightness_alone() -> None:
    steps = np.linspace(0, 1, 32)
    one = [lightness(colormaps[panels.SEQUENTIAL](x)) for x in steps]
    assert np.all(np.diff(one) > 0)
    two = np.array([lightness(colormaps[panels.DIVERGING](x)) for x in steps])
    assert np.all(np.diff(two[:16]) > 0) and np.all(np.diff(two[16:]) < 0)


def test_measuring_does_not_wait_for_matplotlib() -> None:
    code = "import sys, whatwhere.analysis; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
