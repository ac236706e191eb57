"""Block shapes: how many queries and keys a program holds, per kernel, width and device.

Starting points from the compiler's resource reports (registers, spills, shared memory) for
sm_80, sm_90 and sm_100; `benchmarks/compile_check.py` holds every one of them to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from whatwhere.attention.triton.problem import Problem, padded

Kernel = Literal["forward", "queries", "keys"]


@dataclass(frozen=True)
class Shape:
    """Queries and keys of a block, warps of a program, stages of its pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, Any]:
        """As a kernel takes them."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def splits(self, problem: Problem) -> int:
        """Programs that share the keys of one head in decoding.

        Enough to fill the device twice, none with less than a few blocks.
        """
        programs = problem.batch * (problem.heads // problem.groups)
        programs *= -(-problem.groups * problem.length // self.rows)
        blocks = -(-problem.total // self.columns)
        wanted = -(-2 * _processors(problem.device) // max(programs, 1))
        return max(1, min(wanted, -(-blocks // 4), 128))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def shape_for(kernel: Kernel, problem: Problem) -> Shape:
    """The shape for a call on its device."""
    wide = max(problem.features, padded(problem.width))
    return shape(kernel, wide, problem.dtype.itemsize, _capability(problem.device))


def shape(kernel: Kernel, features: int, itemsize: int, capability: int) -> Shape:
    """The shape for features this wide, in numbers of this many bytes, on an architecture."""
    if itemsize == 4:
        # Float32 products run on the plain units: small tiles, registers are all there is.
        return Shape(32, 32, 4, 1) if features <= 128 else Shape(16, 16, 4, 1)
    small = capability < 90 and capability != 80
    for limit, table in _SHAPES.items():
        if features <= limit:
            rows, columns, warps, stages = table[kernel]
            break
    else:
        rows, columns, warps, stages = _WIDEST[kernel]
    if small and rows * columns > 64 * 64:
        # 99 KB of shared memory (sm_86, sm_89).
        rows, columns, warps, stages = min(rows, 64), min(columns, 32), 4, min(stages, 2)
    return Shape(rows, columns, warps, stages)


_SHAPES: dict[int, dict[str, tuple[int, int, int, int]]] = {
    64: {"forward": (128, 64, 4, 3), "queries": (64, 64, 4, 2), "keys": (64, 64, 4, 2)},
    128: {"forward": (128, 128, 8, 2), "queries": (128, 64, 8, 2), "keys": (64, 128, 8, 2)},
    256: {"forward": (128, 64, 8, 2), "queries": (128, 64, 8, 2), "keys": (64, 64, 8, 2)},
}
_WIDEST = {"forward": (64, 32, 8, 2), "queries": (64, 32, 8, 2), "keys": (32, 32, 8, 1)}


def decode_shape(problem: Problem) -> Shape:
    """The shape of decoding: rows are the queries of all heads that share a key head."""
    rows = problem.groups * problem.length
    columns = 64 if problem.features <= 256 else 32
    if problem.dtype.itemsize == 4:
        columns = 32
    return Shape(16 if rows <= 16 else 32, columns, 4 if problem.features <= 128 else 8, 2)
