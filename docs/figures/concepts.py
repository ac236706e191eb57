"""The figures of docs/concepts.md, each an SVG beside this file.

    python docs/figures/concepts.py                # all of them
    python docs/figures/concepts.py frequencies    # one

Curves are scores that `whatwhere.scores` computes, frequencies those that encodings hold: no
formula is written out again here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import whatwhere as ww
from whatwhere.figures.palette import KNOWN, SPARE

DASHES = (0, (2, 1))
HERE = Path(__file__).resolve().parent
TRAIN_LENGTH, HEAD_DIM = 4096, 64
# One seed for ids within the SVG: the same figure is the same file.
STYLE = {
    "svg.hashsalt": "whatwhere",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def what_and_where() -> Figure:
    """The score of one pair (RoPE) and one channel (PoPE) for three keys, against distance."""
    turn = torch.tensor([[2 * math.pi / 16]], dtype=torch.float64)
    offsets = torch.arange(-12, 13)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), sharex=True)
    for place, phase in enumerate((0.0, 0.25, 0.5)):
        key = torch.tensor([math.cos(phase * math.pi), math.sin(phase * math.pi)])
        values = _scores(torch.tensor([1.0, 0.0]), key, ww.ScoreSpec("rotate", 1.0, turn), offsets)
        _curve(left, offsets, values, place, f"key turned by {int(180 * phase)}°")
    for place, channel in enumerate((2.0, 1.0, -1.0)):
        query, key = torch.tensor([1.0]), torch.tensor([channel])
        values = _scores(query, key, ww.ScoreSpec("polar", 1.0, turn), offsets)
        _curve(right, offsets, values, place, f"key channel {channel:+.0f}")
    left.set_title("RoPE, one pair: content moves the peak")
    right.set_title("PoPE, one channel: content sets its height")
    for axes in (left, right):
        axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
        axes.set_xlabel("distance s − t from query to key (tokens)")
        axes.set_xticks(range(-12, 13, 4))
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.45 * (high - low))
        axes.legend(frameon=False, loc="upper left", fontsize=9)
    left.set_ylabel("score")
    return figure


def frequencies() -> Figure:
    """Tokens for one turn of every channel, per encoding, beside the training length."""
    figure, axes = plt.subplots(figsize=(9.5, 4.2))
    fastest, longest = 5.0, 4e5
    axes.axvspan(TRAIN_LENGTH, longest, color="#eeeeee", zorder=0)
    axes.axvline(TRAIN_LENGTH, color="#444444", linewidth=1)
    rows = _encodings()
    for row, (encoding, colour, marker) in enumerate(rows.values()):
        thetas = [theta for theta in encoding.frequencies[0] if theta > 0]
        still = HEAD_DIM - len(thetas) * (1 if isinstance(encoding, ww.PoPE | ww.PoPEID) else 2)
        periods = 2 * math.pi / np.array(thetas)
        axes.plot(periods, [row] * len(periods), marker, color=colour, markersize=5, alpha=0.75)
        if still:
            axes.text(longest * 1.15, row, f"{still} of {HEAD_DIM} never turn", va="center")
        else:
            axes.text(longest * 1.15, row, "all turn", va="center")
    axes.set_xscale("log")
    axes.set_xlim(fastest, longest)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -1.1)
    axes.text(TRAIN_LENGTH * 0.9, -0.6, f"training length {TRAIN_LENGTH:,}", ha="right")
    axes.text(TRAIN_LENGTH * 1.15, -0.6, "no whole turn in training")
    axes.set_xlabel("tokens for one turn, 2π/θ (log scale)")
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "right"]].set_visible(False)
    return figure


def angles() -> Figure:
    """Angles of each encoding's slowest channel in training, and those first met at four times."""
    shown = ("RoPE", "YaRN, factor 4", "RoPE-ID", "PoPE")
    rows = _encodings()
    figure, all_axes = plt.subplots(1, 4, figsize=(9.5, 3.1), subplot_kw={"projection": "polar"})
    for axes, name in zip(all_axes, shown, strict=True):
        encoding, colour, _ = rows[name]
        slowest = _slowest(encoding)
        # YaRN's weights were trained with RoPE's frequencies.
        trained = _slowest(rows["RoPE"][0]) if name.startswith("YaRN") else slowest
        seen = min(trained * TRAIN_LENGTH, 2 * math.pi)
        met = min(4 * slowest * TRAIN_LENGTH, 2 * math.pi)
        inner, outer = np.linspace(0, seen, 200), np.linspace(seen, met, 200)
        axes.plot(inner, np.ones(200), color=colour, linewidth=7, solid_capstyle="butt")
        if met - seen > 1e-9:
            axes.plot(outer, np.ones(200), color="#222222", linewidth=2.5, linestyle=DASHES)
        axes.set_ylim(0, 1.15)
        axes.set_yticks([])
        axes.set_xticks(np.arange(4) * math.pi / 2, ["0", "π/2", "π", "3π/2"], fontsize=8)
        axes.grid(False)
        axes.spines["polar"].set_color("#cccccc")
        axes.set_title(f"{name}\n{trained * TRAIN_LENGTH / (2 * math.pi):.2g} turns in training")
    handles = [
        plt.Line2D([], [], color="#777777", linewidth=7, label="angles met in training"),
        plt.Line2D(
            [],
            [],
            color="#222222",
            linewidth=2.5,
            linestyle=DASHES,
            label="new at 4 times the length",
        ),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False)
    figure.subplots_adjust(bottom=0.16, top=0.78, left=0.04, right=0.96, wspace=0.45)
    return figure


def layers() -> Figure:
    """Encoding, ScoreSpec, backend: what passes between them."""
    figure, axes = plt.subplots(figsize=(9.5, 2.6))
    axes.set(xlim=(0, 100), ylim=(0, 30))
    axes.axis("off")
    boxes = (
        (1, "Encoding", "a module that owns\nparameters (PoPE's δ)", KNOWN["pope"].colour),
        (38, "ScoreSpec", "feature, frequencies,\nphase, slopes, scale", "#444444"),
        (75, "Backend", "softmax attention with\nthese scores, fast", KNOWN["rope-id"].colour),
    )
    for x, head, text, colour in boxes:
        axes.add_patch(
            FancyBboxPatch(
                (x, 9), 24, 16, boxstyle="round,pad=0,rounding_size=1.5", fill=False,
                edgecolor=colour, linewidth=1.8,
            )
        )  # fmt: skip
        axes.text(x + 12, 20.5, head, ha="center", va="center", weight="bold", fontsize=11)
        axes.text(x + 12, 14, text, ha="center", va="center", fontsize=9)
    for x, text in ((26.5, "encoding()"), (63.5, "spec")):
        arrow = FancyArrowPatch((x, 17), (x + 10, 17), arrowstyle="-|>", mutation_scale=14)
        axes.add_patch(arrow)
        axes.text(x + 5, 18.5, text, ha="center", va="bottom", fontsize=9, family="monospace")
    axes.text(87, 4, "also takes q, k, v, positions, masks", ha="center", fontsize=9)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "what_and_where": what_and_where,
    "frequencies": frequencies,
    "angles": angles,
    "layers": layers,
}


def _encodings() -> dict[str, tuple[ww.Encoding, str, str]]:
    """Name -> encoding, colour, marker; heads of 64 channels trained at 4,096 tokens."""

    def made(name: str, **options: object) -> ww.Encoding:
        return ww.make(name, head_dim=HEAD_DIM, num_heads=1, train_length=TRAIN_LENGTH, **options)

    def row(name: str, **options: object) -> tuple[ww.Encoding, str, str]:
        return made(name, **options), KNOWN[name].colour, KNOWN[name].marker

    (colour, marker) = SPARE[1]
    return {
        "RoPE": row("rope"),
        "partial RoPE, 25 %": (made("rope", fraction=0.25), colour, marker),
        "YaRN, factor 4": row("yarn", factor=4.0),
        "RoPE-ID": row("rope-id"),
        "PoPE": row("pope"),
        "PoPE-ID": row("pope-id"),
    }


def _slowest(encoding: ww.Encoding) -> float:
    return min(theta for theta in encoding.frequencies[0] if theta > 0)


def _scores(
    query: torch.Tensor, key: torch.Tensor, spec: ww.ScoreSpec, offsets: torch.Tensor
) -> np.ndarray:
    at = torch.zeros(1, dtype=torch.int64)
    keys = key.expand(1, 1, len(offsets), len(key))
    made = ww.scores(
        query.view(1, 1, 1, -1).double(), keys.double(), spec, query_positions=at,
        key_positions=offsets,
    )  # fmt: skip
    return made[0, 0, 0].numpy()


def _curve(axes: Axes, offsets: torch.Tensor, values: np.ndarray, place: int, label: str) -> None:
    style = [KNOWN[name] for name in ("pope", "rope", "rope-id")][place]
    dashes = ("-", "--", ":")[place]
    axes.plot(offsets, values, dashes, color=style.colour, linewidth=2, label=label)
    best = int(np.argmax(values))
    axes.plot(offsets[best], values[best], style.marker, color=style.colour, markersize=8)


def main() -> None:
    """Write the figures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*FIGURES, []], default=[])
    parser.add_argument("--output", type=Path, default=HERE)
    given = parser.parse_args()
    for name in given.names or FIGURES:
        with plt.rc_context(STYLE):
            figure = FIGURES[name]()
            figure.savefig(
                given.output / f"{name}.svg", bbox_inches="tight", metadata={"Date": None}
            )
            plt.close(figure)


if __name__ == "__main__":
    main()
