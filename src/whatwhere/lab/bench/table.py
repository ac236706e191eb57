"""Rows as a table for a terminal; plain text where rich is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from whatwhere.lab.bench.results import Row

_COLUMNS = {
    "side": "side",
    "ratio": "time",
    "least": "least",
    "limit": "limit",
    "peer_ratio": "/peer",
    "memory_ratio": "memory",
    "cache_bytes_per_token": "cache",
    "error": "error",
    "ms": "ms",
    "graph_ratio": "graph",
    "bandwidth": "of copy",
}
LEGEND = """\
time, memory  ratio to RoPE (of attention: on PyTorch's fastest kernel), median over rounds
limit         the same if matrix products (decode: bytes of a cache of D wide keys) were all
/peer         time over that of the fastest peer
graph         time replayed as a CUDA graph, without launches
cache         bytes per token, keys and values; of copy: its reading against a copy's rate
error         largest of a row of output or gradient against float64"""
_ALWAYS = ("side", "ratio", "least", "error")


@dataclass(frozen=True)
class Shown:
    """What is shown of a case.

    Attributes:
        title: What was measured, where.
        names: Of the columns.
        lines: Cells of the sides that were timed.
        notes: Why the others were not.
    """

    title: str
    names: list[str]
    lines: list[list[str]]
    notes: list[str]


def tables(rows: Sequence[Row]) -> list[Shown]:
    """What is shown, by case."""
    found = []
    for title, group in groupby(rows, key=_title):
        every = list(group)
        lines = [_cells(r) for r in every if r["status"] == "ok"]
        kept = [c for c in _COLUMNS if c in _ALWAYS or any(line[c] for line in lines)]
        cells = [[line[c] for c in kept] for line in lines]
        notes = [
            f"{r['encoding']} {r['backend']}: {r['status']}"
            + (f", error {r['error']}" if r["error"] else "")
            for r in every
            if r["status"] != "ok"
        ]
        found.append(Shown(title, [_COLUMNS[c] for c in kept], cells, notes))
    return found


def show(rows: Sequence[Row]) -> None:
    """Print a table for each case."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(rows))
        return
    console = Console()
    for shown in tables(rows):
        table = Table(title=shown.title, title_justify="left")
        for i, name in enumerate(shown.names):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for line in shown.lines:
            table.add_row(*line)
        console.print(table)
        for note in shown.notes:
            console.print(f"  {note}", highlight=False, soft_wrap=True)
    console.print(LEGEND, highlight=False, soft_wrap=True)


def plain(rows: Sequence[Row]) -> str:
    """The same as text in columns."""
    parts = []
    for shown in tables(rows):
        lines = [shown.names, *shown.lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        parts.append(shown.title)
        for line in lines:
            parts.append("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
        parts += [*(f"  {note}" for note in shown.notes), ""]
    return "\n".join([*parts, LEGEND])


def _title(row: Row) -> str:
    if row["pass"] == "step":
        shape = f"{row['model']}, {row['batch']} x {row['length']} tokens"
    else:
        heads = row["heads"]
        if row["kv_heads"] != heads:
            heads += f"/{row['kv_heads']}"
        letter = "S" if row["pass"] == "decode" else "T"
        sizes = f"({row['batch']}, {heads}, {row['length']}, {row['head_dim']})"
        shape = f"(B, H, {letter}, D) = {sizes}"
        if row["pass"] != "decode":
            shape += ", causal" if row["causal"] == "True" else ", full"
    threads = f", {row['threads']} thread(s)" if row["threads"] not in ("", "0") else ""
    where = f"{row['device']}{threads}, {row['rounds']} rounds"
    return f"{row['pass']}: {shape}, {row['dtype']}; {where}"


def _cells(row: Row) -> dict[str, str]:
    cells = {name: row.get(name, "") for name in _COLUMNS}
    cells["side"] = f"{row['encoding']} {row['backend']}" + (
        " (auto)" if row["auto"] == "True" and row["backend"] != "auto" else ""
    )
    if row["ratio"] and row["backend"] == row["baseline"] and row["origin"] == "stock":
        cells["side"] += " = 1"
    for name in ("ratio", "least", "limit", "peer_ratio", "memory_ratio", "graph_ratio"):
        if cells[name]:
            cells[name] = f"{float(cells[name]):.2f}"
    if row["cache_gb_per_s"] and row["copy_gb_per_s"]:
        share = float(row["cache_gb_per_s"]) / float(row["copy_gb_per_s"])
        cells["bandwidth"] = f"{100 * share:.0f} %"
    return cells
