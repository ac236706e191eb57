"""Peak memory of attention on a CPU above its inputs, each side in a process of its own (Linux).

python benchmarks/cpu_memory.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import whatwhere as ww
from interleaved import write
from training_step import resident

# (B, H, T, D); the last is forward alone.
SHAPES = ((4, 8, 1024, 64), (4, 8, 2048, 64), (4, 8, 4096, 64), (1, 2, 65536, 64))
SIDES = ("rope, rotated by halves, sdpa", "rope sdpa", "rope cpu", "pope cpu")


def by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE as transformers writes it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(side: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads, length, dim = q.shape[1:]
    if side == SIDES[0]:
        theta = 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
        angles = (torch.arange(length).double()[:, None] * theta).repeat(1, 2)
        cos, sin = angles.cos().float(), angles.sin().float()
        turned = (by_halves(x, cos, sin) for x in (q, k))
        return F.scaled_dot_product_attention(*turned, v, is_causal=True)
    name, backend = side.split()
    spec = ww.make(name, head_dim=dim, num_heads=heads).requires_grad_(False)()
    return ww.attention(q, k, v, spec, causal=True, backend=backend)


def peak(side: str, shape: tuple[int, ...], backward: bool) -> int:
    """KiB above the inputs, in this process."""
    batch, heads, length, dim = shape
    q, k, v = (torch.randn(shape).requires_grad_(backward) for _ in range(3))
    small = [x[:1, :, :64].detach().requires_grad_(backward) for x in (q, k, v)]
    out = attend(side, *small)
    if backward:
        out.sum().backward()
    grad = torch.ones(batch, heads, length, dim) if backward else None
    before = resident(reset=True)
    out = attend(side, q, k, v)
    if backward:
        out.backward(grad)
    return resident() - before


def main() -> None:
    """Measure and write results/cpu_memory.csv."""
    rows = []
    for shape in SHAPES:
        for backward in (False, True) if shape[2] < 65536 else (False,):
            found = {}
            for side in SIDES:
                code = (
                    "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1]);"
                    "import cpu_memory as m;"
                    f"print(m.peak({side!r}, {shape}, {backward}))"
                )
                run = subprocess.run(
                    [sys.executable, "-c", code, str(Path(__file__).parent)],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found[side] = int(run.stdout)
            for side, kib in found.items():
                rows.append(
                    {
                        "shape": "x".join(map(str, shape)),
                        "pass": "forward+backward" if backward else "forward",
                        "side": side,
                        "MiB above inputs": round(kib / 1024, 1),
                        "ratio": f"{kib / found['rope sdpa']:.3f}",
                    }
                )
                print(*rows[-1].values(), sep="\t", flush=True)
    print(write("cpu_memory", rows))


if __name__ == "__main__":
    tyro.cli(main)
