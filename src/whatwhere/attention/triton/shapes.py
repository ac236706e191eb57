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
    score = problem.score
    plain = problem.in_order and score.key_mask is None and score.key_segments is None
    wide = problem.features + padded(problem.width)
    return shape(kernel, wide, problem.dtype.itemsize, _capability(problem.device), plain)


def shape(kernel: Kernel, wide: int, itemsize: int, capability: int, plain: bool) -> Shape:
    """The shape for features and values together this wide, in numbers of this many bytes.

    Args:
        kernel: Which kernel.
        wide: Width of features as tiles hold them, and of values.
        itemsize: Bytes of a number.
        capability: Of the device, e.g. 90.
        plain: Whether positions are in order and nothing but causality and windows hides keys;
            before Hopper, positions and masks take registers that larger tiles need.
    """
    if itemsize == 4:
        # Float32 products run on the plain units: small tiles, registers are all there is.
        if wide > 256:
            return Shape(16, 16, 8, 1)
        return Shape(16, 32, 4, 1) if kernel == "queries" else Shape(32, 32, 4, 1)
    if 90 <= capability < 120:
        table = _HOPPER if capability < 100 else _BLACKWELL
    else:
        # What is neither has 99 KB of shared memory, not the 163 KB of sm_80.
        table = _AMPERE if plain and capability == 80 else _SMALL
    for limit, shapes in table.items():
        if wide <= limit:
            return Shape(*shapes[kernel])
    return Shape(*_WIDEST[kernel])


# By the width of features and values together: queries, keys, warps, stages.
_HOPPER: dict[int, dict[Kernel, tuple[int, int, int, int]]] = {
    128: {"forward": (128, 64, 8, 2), "queries": (128, 64, 8, 2), "keys": (64, 128, 8, 2)},
    192: {"forward": (128, 128, 8, 2), "queries": (128, 64, 8, 2), "keys": (64, 128, 8, 2)},
    256: {"forward": (128, 64, 8, 2), "queries": (128, 64, 8, 2), "keys": (32, 128, 8, 2)},
    384: {"forward": (128, 64, 8, 2), "queries": (64, 64, 8, 2), "keys": (32, 64, 8, 2)},
    512: {"forward": (64, 64, 8, 2), "queries": (64, 32, 8, 2), "keys": (32, 32, 8, 1)},
    768: {"forward": (64, 32, 8, 2), "queries": (16, 32, 4, 1), "keys": (16, 32, 8, 1)},
}
_BLACKWELL: dict[int, dict[Kernel, tuple[int, int, int, int]]] = {
    128: {"forward": (128, 64, 8, 2), "queries": (128, 64, 8, 2), "keys": (64, 128, 8, 2)},
    192: {"forward": (128, 64, 8, 2), "queries": (128, 64, 8, 2), "keys": (64, 128, 8, 2)},
    256: {"forward": (128, 64, 8, 2), "queries": (128, 32, 8, 2), "keys": (32, 128, 8, 2)},
    384: {"forward": (128, 64, 8, 2), "queries": (64, 32, 8, 2), "keys": (32, 64, 8, 2)},
}
_AMPERE: dict[int, dict[Kernel, tuple[int, int, int, int]]] = {
    128: {"forward": (128, 64, 8, 2), "queries": (128, 32, 8, 2), "keys": (32, 64, 8, 2)},
    192: {"forward": (128, 64, 8, 2), "queries": (64, 32, 8, 2), "keys": (32, 32, 4, 2)},
    256: {"forward": (128, 32, 8, 2), "queries": (32, 64, 8, 2), "keys": (16, 32, 8, 2)},
    384: {"forward": (64, 32, 8, 2), "queries": (32, 64, 8, 2), "keys": (16, 32, 8, 2)},
}
_SMALL: dict[int, dict[Kernel, tuple[int, int, int, int]]] = {
    128: {"forward": (128, 32, 8, 2), "queries": (16, 32, 4, 1), "keys": (16, 64, 8, 2)},
    192: {"forward": (128, 32, 8, 2), "queries": (32, 64, 8, 2), "keys": (32, 32, 4, 2)},
    256: {"forward": (16, 32, 4, 2), "queries": (32, 64, 8, 2), "keys": (16, 32, 8, 2)},
    384: {"forward": (16, 32, 4, 2), "queries": (16, 32, 4, 1), "keys": (16, 32, 8, 2)},
}
# Heads of 256: the accumulators alone fill the registers, and something spills.
_WIDEST: dict[Kernel, tuple[int, int, int, int]] = {
    "forward": (16, 32, 4, 2),
    "queries": (16, 32, 4, 1),
    "keys": (16, 32, 8, 1),
}


def decode_shape(problem: Problem) -> Shape:
    """The shape of decoding: rows are the queries of all heads that share a key head."""
    rows = problem.groups * problem.length
    wide = problem.features + padded(problem.width)
    columns = 64 if wide <= 320 else 32 if wide <= 512 else 16
    if problem.dtype.itemsize == 4:
        columns = 32 if wide <= 512 else 16
    return Shape(16 if rows <= 16 else 32, columns, 8, 2)
