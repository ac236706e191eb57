"""What gpu.sh found, as one page: aims met or missed, "not measured" for whatever did not run.

python benchmarks/gpu_report.py FOLDER [--dry-run]
python benchmarks/gpu_report.py --versions FILE
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

STAGES = (
    *("versions", "widths", "tests", "kernels", "attention-64", "attention-128"),
    *("decode", "step", "calibrate", "odd"),
)
MISSING = "not measured"
PACKAGES = ("torch", "triton", "transformers", "PoPE-pytorch", "x-transformers", "numpy")

Row = dict[str, str]
Line = tuple[str, str, str, str]


def versions() -> str:
    """Device, driver and versions, a line each."""
    import torch

    lines = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package}: not installed")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        lines += [
            f"device {device.name}, sm_{device.major}{device.minor}, "
            f"{device.multi_processor_count} multiprocessors, "
            f"{device.total_memory / 2**30:.0f} GiB",
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        ]
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20)
            lines.append("nvidia-smi " + " ".join(done.stdout.split("\n")[1:2]))
        except (OSError, subprocess.TimeoutExpired):
            lines.append("nvidia-smi: did not answer")
    else:
        lines.append(f"device: no GPU; {platform.machine()} CPU")
    return "\n".join(lines) + "\n"


def rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def value(row: Row | None, column: str) -> float | None:
    return float(row[column]) if row and row.get(column) else None


def least(found: Iterable[Row], column: str = "ratio") -> Row | None:
    """The row of ours that is fastest and right."""
    able = [r for r in found if r["origin"] == "ours" and r["status"] == "ok" and r[column]]
    return min(able, key=lambda r: float(r[column]), default=None)


def line(what: str, aim: str, got: float | None, met: Callable[[float], bool], by: str) -> Line:
    if got is None:
        return what, aim, MISSING, ""
    return what, aim, f"{got:.2f}{by}", "met" if met(got) else "**missed**"


def passes(folder: Path, lengths: tuple[int, ...]) -> list[Line]:
    """Attention against RoPE, its memory, and against PoPE-pytorch."""
    aims = {64: (1.35, 1.6), 128: (1.6, 1.8)}
    lines = []
    for dim, limits in aims.items():
        table = rows(folder / f"attention-{dim}" / "bench.csv")
        for length in lengths:
            for stage, limit, faster in zip(
                ("forward", "forward+backward"), limits, (4, 6), strict=True
            ):
                here = [
                    r
                    for r in table
                    if r["pass"] == stage
                    and r["length"] == str(length)
                    and r["encoding"] == "pope"
                ]
                best = least(here)
                name = f"{stage}, d = {dim}, T = {length:,}"
                by = f" ({best['backend']})" if best else ""
                got = value(best, "ratio")
                lines.append(
                    line(f"{name}: time / RoPE", f"<= {limit}", got, lambda x, m=limit: x <= m, by)
                )
                peer = next((r for r in here if r["backend"] == "PoPE-pytorch"), None)
                theirs = value(peer, "ratio")
                speed = theirs / got if theirs and got else None
                lines.append(
                    line(
                        f"{name}: times faster than PoPE-pytorch",
                        f">= {faster}",
                        speed,
                        lambda x, m=faster: x >= m,
                        "",
                    )
                )
                if stage == "forward+backward":
                    own = next((r for r in here if r["backend"] == "triton"), None)
                    memory = value(own, "memory_ratio")
                    lines.append(
                        line(
                            f"{name}: peak memory of `triton` / RoPE",
                            "<= 1.05",
                            memory,
                            lambda x: x <= 1.05,
                            "",
                        )
                    )
    return lines


def decoding(folder: Path, keys: int) -> list[Line]:
    table = rows(folder / "decode" / "bench.csv")
    shapes = sorted({(int(r["head_dim"]), int(r["batch"]), int(r["kv_heads"])) for r in table})
    lines = []
    for dim, batch, groups in shapes or [(64, 1, 32), (128, 1, 16)]:
        here = [
            r
            for r in table
            if (r["head_dim"], r["batch"], r["kv_heads"]) == (str(dim), str(batch), str(groups))
            and r["encoding"] == "pope"
            and r["length"] == str(keys)
        ]
        column = "graph_ratio" if any(r["graph_ratio"] for r in here) else "ratio"
        best = least(here, column)
        name = f"decode, {keys:,} keys, d = {dim}, batch {batch}, {groups} key heads"
        by = f" ({best['backend']})" if best else ""
        lines.append(
            line(f"{name}: time / RoPE", "<= 1.05", value(best, column), lambda x: x <= 1.05, by)
        )
        read, copied = value(best, "cache_gb_per_s"), value(best, "copy_gb_per_s")
        share = read / copied if read and copied else None
        lines.append(
            line(f"{name}: share of a copy's rate", ">= 0.8", share, lambda x: x >= 0.8, by)
        )
    return lines


def step(folder: Path) -> list[Line]:
    table = [r for r in rows(folder / "step" / "bench.csv") if r["encoding"] == "pope"]
    best = least(table)
    name = f"training step of {best['model']}, T = {best['length']}" if best else "training step"
    got = value(best, "ratio")
    return [line(f"{name}: PoPE / RoPE", "<= 1.06", got, lambda x: x <= 1.06, "")]


def markdown(head: tuple[str, ...], lines: Iterable[Iterable[str]]) -> str:
    made = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    made += ["| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |" for cells in lines]
    return "\n".join(made)


def measured(folder: Path, name: str) -> str:
    """All rows of a stage."""
    columns = (
        *("pass", "encoding", "backend", "batch", "heads", "kv_heads", "length", "head_dim"),
        *("causal", "ratio", "least", "limit", "peer_ratio", "memory_ratio", "error", "ms"),
        *("graph_ms", "graph_ratio"),
        *("cache_bytes_per_token", "cache_gb_per_s", "status"),
    )
    table = rows(folder / name / "bench.csv")
    if not table:
        return MISSING
    kept = tuple(c for c in columns if any(r[c] for r in table))
    return markdown(kept, ([r[c] for c in kept] for r in table))


def report(folder: Path, dry: bool) -> str:
    """The page."""
    lengths, keys = ((128, 256), 512) if dry else ((4096, 8192, 16384), 32768)
    status = {}
    for name in STAGES:
        path = folder / "logs" / f"{name}.status"
        status[name] = path.read_text().strip() if path.exists() else MISSING
    device = folder / "versions.txt"
    widths = rows(folder / "widths.csv")
    log = folder / "logs" / "tests.log"
    tests = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    aims = [*passes(folder, lengths), *decoding(folder, keys), *step(folder)]
    if dry:
        aims = [(what, aim, got, "") for what, aim, got, _ in aims]
    parts = [
        "# Measured on a GPU" if not dry else "# Dry run on a CPU: no figure here counts",
        "```text\n" + (device.read_text() if device.exists() else MISSING + "\n") + "```",
        "## Stages",
        markdown(("stage", "outcome"), status.items()),
        "## Aims",
        "Best backend of ours, `pope`, against RoPE on PyTorch's fastest kernel; decoding as a "
        "CUDA graph where it can be captured.",
        markdown(("what", "aim", "measured", ""), aims),
        "## Widths that PyTorch's kernels take",
        markdown(
            ("kernel", "q and k / v", "pass", "takes", "error", "why not"),
            (
                (r["kernel"], f"{r['qk']} / {r['v']}", r["pass"], r["takes"], r["error"], r["why"])
                for r in widths
            ),
        )
        if widths
        else MISSING,
        "## Tests",
        (tests[-1] if tests else MISSING),
    ]
    for name in ("attention-64", "attention-128", "decode", "step", "odd"):
        parts += [f"## All rows of {name}", measured(folder, name)]
    chosen = folder / "choices.json"
    parts += [
        "## Choices measured",
        "```json\n" + chosen.read_text() + "```" if chosen.exists() else MISSING,
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--versions", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    path = given.folder if given.versions else given.folder / "report.md"
    text = versions() if given.versions else report(given.folder, given.dry_run)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    if given.versions:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
