"""Time relative to RoPE against length, a line for each backend; the limit of products dashed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.style import context

from whatwhere.figures.axes import length_axis
from whatwhere.figures.palette import KNOWN, SPARE, Style, title
from whatwhere.figures.style import GREY, RC
from whatwhere.lab.bench.results import Row
from whatwhere.lab.report.canvas import End, canvas, end_labels, save

# What a figure is of; lines differ in encoding and backend, points in length.
_SAME = (
    "pass", "batch", "heads", "kv_heads", "head_dim", "dtype", "causal", "threads", "model",
    "device", "torch", "triton", "whatwhere", "code", "against", "memory", "rounds", "seed",
)  # fmt: skip

_COLOURS = [(s.colour, s.marker) for s in KNOWN.values()] + list(SPARE)
_TITLES = {
    "forward": "Forward pass of attention",
    "forward+backward": "Forward and backward pass of attention",
    "decode": "One decoding step of attention",
    "step": "A training step",
}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write a figure, PNG and SVG, for each setting with at least two lengths.

    Where rows of several versions are there, the last ones measured are drawn.

    Args:
        rows: Of bench.csv.
        folder: Where the files go; their names say what they are of.

    Returns:
        The files.
    """
    written: dict[str, list[Path]] = {}

    def same(row: Row) -> tuple[str, ...]:
        # With a fixed number of tokens the batch follows from the length.
        tokens = int(row["batch"]) * int(row["length"])
        fixed = row["pass"] != "decode" and row["threads"] == "0"
        batch = f"{tokens // 1024}k" if fixed else row["batch"]
        return tuple(batch if name == "batch" else row[name] for name in _SAME)

    timed = [r for r in rows if r["status"] == "ok" and r["ratio"]]
    for _, group in groupby(sorted(timed, key=same), key=same):
        drawn = list(group)
        if len({r["length"] for r in drawn}) > 1:
            name = _name(drawn[0])
            written[name] = save(draw_one(drawn), folder / name)
    return [path for paths in written.values() for path in paths]


@context(RC, after_reset=True)
def draw_one(rows: Sequence[Row]) -> Figure:
    """Draw rows of one setting."""
    lines: dict[tuple[str, str], list[tuple[int, float, str]]] = {}
    for r in sorted(rows, key=lambda r: int(r["length"])):
        if r["backend"] != r["baseline"] or r["origin"] != "stock":
            side = (r["encoding"], r["backend"])
            lines.setdefault(side, []).append((int(r["length"]), float(r["ratio"]), r["limit"]))
    styles = {side: _style(side, i) for i, side in enumerate(lines)}
    ends = [
        End(points[-1][0], points[-1][1], styles[side], f"{points[-1][1]:.2f}")
        for side, points in lines.items()
    ]
    limits = _limits(lines)
    lengths = sorted({int(r["length"]) for r in rows})
    ends += [End(lengths[-1], y, Style(text, GREY, "", "--"), f"{y:.2f}") for y, text in limits]
    place = canvas(f"{_TITLES[rows[0]['pass']]}: time relative to RoPE", False, ends)
    place.note(_note(rows[0]))
    for side, points in lines.items():
        style = styles[side]
        x, y = [p[0] for p in points], [p[1] for p in points]
        place.axes.plot(
            x, y, style.dashes, color=style.colour, marker=style.marker, markersize=7, zorder=3
        )
    for y_limit, _ in limits:
        place.axes.axhline(y_limit, color=GREY, linewidth=1.4, linestyle="--", zorder=2)
    place.axes.axhline(1, color=GREY, linewidth=0.8, zorder=1)
    _axes(place.axes, rows, [p[1] for points in lines.values() for p in points])
    length_axis(place.axes, lengths, None)
    end_labels(place, ends)
    return place.figure


def _axes(axes: Any, rows: Sequence[Row], values: Sequence[float]) -> None:
    unit = "keys in the cache" if rows[0]["pass"] == "decode" else "length of a sequence, tokens"
    axes.set_xlabel(unit)
    axes.set_ylabel(
        "time / RoPE, PyTorch's best kernel" if rows[0]["pass"] != "step" else "time / RoPE"
    )
    if max(values, default=1) > 8 * min(values, default=1):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(bottom=0)


def _limits(lines: dict[tuple[str, str], list[tuple[int, float, str]]]) -> list[tuple[float, str]]:
    """A limit above 1 for each encoding that has one."""
    found: dict[float, str] = {}
    for (encoding, _), points in lines.items():
        value = float(points[0][2] or 1)
        if value > 1:
            found.setdefault(value, f"{title(encoding)}, products alone")
    return list(found.items())


def _style(side: tuple[str, str], index: int) -> Style:
    colour, marker = _COLOURS[index % len(_COLOURS)]
    return Style(f"{title(side[0])}, {side[1]}", colour, marker, "-")


def _note(row: Row) -> str:
    threads = f", {row['threads']} thread(s)" if row["threads"] != "0" else ""
    heads = (
        row["heads"] if row["heads"] == row["kv_heads"] else f"{row['heads']}/{row['kv_heads']}"
    )
    shape = f"{heads} heads of {row['head_dim']} channels, "
    if row["pass"] not in ("decode", "step"):
        shape += "causal, " if row["causal"] == "True" else "full, "
    if row["pass"] == "step":
        shape = f"{row['model']}, "
    batch = f"batch {row['batch']}, " if row["threads"] != "0" or row["pass"] == "decode" else ""
    return (
        f"median of {row['rounds']} interleaved rounds; {shape}{batch}{row['dtype']}; "
        f"{row['device']}{threads}, torch {row['torch']}"
    )


def _name(row: Row) -> str:
    parts = [row["pass"].replace("+", "-"), row["model"]]
    if row["pass"] != "step":
        parts += [f"d{row['head_dim']}", f"h{row['heads']}"]
        parts += [f"g{row['kv_heads']}"] if row["kv_heads"] != row["heads"] else []
        parts += ["full"] if row["causal"] != "True" else []
    parts += [f"b{row['batch']}"] if row["threads"] != "0" or row["pass"] == "decode" else []
    parts += [row["dtype"]] + ([f"{row['threads']}threads"] if row["threads"] != "0" else [])
    return "-".join(part for part in parts if part)
