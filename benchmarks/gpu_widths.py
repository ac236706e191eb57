"""Which of PyTorch's attention kernels take which widths, each of them forced.

    python benchmarks/gpu_widths.py widths.csv

Queries and keys are as wide as features, values as a head: 128/64 is PoPE with heads of 64
channels, 192/128 PoPE on half of 128 channels, 256/128 on all of them. Needs torch alone.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
WIDTHS = ((64, 64), (128, 64), (128, 128), (96, 64), (192, 128), (256, 128), (256, 256))
SIZES = (2, 4, 1024)  # B, H, T
TOLERANCE = 3e-2


def attend(parts: list[Tensor], scale: float) -> Tensor:
    return F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale)


def worst(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def tried(kernel: str, width: int, values: int, device: str) -> list[dict[str, str]]:
    """A row for the forward pass and one for both passes."""
    torch.manual_seed(0)
    batch, heads, length = SIZES
    shapes = [(batch, length, heads, w) for w in (width, width, values)]
    made = [torch.randn(s, device=device).bfloat16().transpose(1, 2) for s in shapes]
    slope = torch.randn(batch, heads, length, values, device=device).bfloat16()
    exact = [x.double().requires_grad_() for x in made]
    truth = attend(exact, width**-0.5)
    grads = torch.autograd.grad(truth, exact, slope.double())
    rows = []
    for stage in ("forward", "forward+backward"):
        parts = [x.detach().requires_grad_(stage != "forward") for x in made]
        row = {"kernel": kernel, "qk": str(width), "v": str(values), "pass": stage}
        try:
            with warnings.catch_warnings(record=True) as said, sdpa_kernel(KERNELS[kernel]):
                warnings.simplefilter("always")
                out = attend(parts, width**-0.5)
                errors = [worst(out, truth)]
                if stage != "forward":
                    found = torch.autograd.grad(out, parts, slope)
                    errors += [worst(f, e) for f, e in zip(found, grads, strict=True)]
            row |= {"takes": "yes" if max(errors) <= TOLERANCE else "wrong", "why": ""}
            row["error"] = f"{max(errors):.1e}"
        except Exception as error:  # whatever it raises is the answer
            reasons = [str(w.message).split("(Triggered")[0].strip() for w in said]
            why = " ".join(" ".join([*reasons, str(error)]).split())
            row |= {"takes": "no", "error": "", "why": why[:300]}
        rows.append(row)
    return rows


def main() -> int:
    """Try all, print and write; the status is 1 if nothing takes even equal widths."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    names = KERNELS if given.device == "cuda" else ("flash",)
    rows = [row for name in names for w, v in WIDTHS for row in tried(name, w, v, given.device)]
    for row in rows:
        print(f"{row['kernel']:10} {row['qk']:>3}/{row['v']:<3} {row['pass']:17} {row['takes']}")
    temporary = given.output.with_suffix(".partial")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["kernel", "qk", "v", "pass", "takes", "error", "why"])
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(given.output)
    return int(not any(row["takes"] == "yes" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
