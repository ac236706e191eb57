"""Attention on this device: every backend and encoding as a ratio to RoPE through SDPA.

    python benchmarks/attention.py --threads 1 2

Outputs and gradients are compared with float64 before anything is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import tyro
from torch import Tensor

import whatwhere as ww
from interleaved import ratios, rounds, write

# (B, H, T, D): the quick preset, indirect indexing, and the lengths of kernels.md.
SHAPES = (
    (32, 4, 128, 32),
    (64, 8, 48, 64),
    (4, 8, 1024, 64),
    (4, 8, 2048, 64),
    (2, 8, 4096, 64),
)
# Longer than that errors are not looked for: the oracle has a T x T matrix in float64.
CHECKED = 1024
SIDES = (
    ("rope", "sdpa"),
    ("rope", "cpu"),
    ("pope", "sdpa"),
    ("pope", "cpu"),
    ("pope-id", "cpu"),
)


def inputs(shape: tuple[int, int, int, int]) -> list[Tensor]:
    """Queries, keys and values as a model makes them: heads behind lengths in memory."""
    batch, heads, length, dim = shape
    made = (torch.randn(batch, length, heads, dim).transpose(1, 2) for _ in range(3))
    return [x.requires_grad_() for x in made]


def call(encoding: ww.Encoding, backend: str, tensors: list[Tensor]) -> Tensor:
    return ww.attention(*tensors, encoding(), causal=True, backend=backend)


def check(encoding: ww.Encoding, backend: str, shape: tuple[int, int, int, int]) -> float:
    """Largest error of outputs and gradients against float64, relative to the largest value."""
    torch.manual_seed(0)
    tensors = inputs((min(shape[0], 2), shape[1], min(shape[2], CHECKED), shape[3]))
    exact = [x.detach().double().requires_grad_() for x in tensors]
    worst = 0.0
    out, truth = call(encoding, backend, tensors), call(encoding, "reference", exact)
    slope = torch.randn_like(out)
    pairs = zip(
        (out, *torch.autograd.grad(out, tensors, slope)),
        (truth, *torch.autograd.grad(truth, exact, slope.double())),
        strict=True,
    )
    for got, right in pairs:
        worst = max(worst, ((got - right).abs().max() / right.abs().max()).item())
    if worst > 1e-4:
        raise SystemExit(f"{backend} is wrong on {shape}: error {worst:.1e}; nothing was timed")
    return worst


def timed(encoding: ww.Encoding, backend: str, tensors: list[Tensor], backward: bool) -> Any:
    def forward() -> None:
        with torch.no_grad():
            call(encoding, backend, tensors)

    def both() -> None:
        torch.autograd.grad(call(encoding, backend, tensors).sum(), tensors)

    return both if backward else forward


def main(threads: tuple[int, ...] = (1, 2), count: int = 9) -> None:
    """Measure and write results/attention.csv."""
    rows = []
    for used, shape, backward in itertools.product(threads, SHAPES, (False, True)):
        torch.set_num_threads(used)
        tensors = inputs(shape)
        sides: dict[str, Callable[[], None]] = {}
        errors = {}
        for name, backend in SIDES:
            encoding = ww.make(name, head_dim=shape[3], num_heads=shape[1], train_length=1024)
            errors[f"{name} {backend}"] = check(encoding, backend, shape)
            sides[f"{name} {backend}"] = timed(encoding, backend, tensors, backward)
        for name, (median, least) in ratios(rounds(sides, count), to="rope sdpa").items():
            rows.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "threads": used,
                    "pass": "forward+backward" if backward else "forward",
                    "side": name,
                    "ratio": f"{median:.3f}",
                    "least": f"{least:.3f}",
                    "error": f"{errors[name]:.1e}",
                }
            )
            print(*rows[-1].values(), sep="\t", flush=True)
    print(write("attention", rows))


if __name__ == "__main__":
    tyro.cli(main)
