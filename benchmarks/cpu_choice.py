"""Where row blocks beat PyTorch's fused kernel on a CPU: ``cpu`` over ``sdpa``, by kind of call.

    python benchmarks/cpu_choice.py

`whatwhere.attention` chooses by this table. Both sides are compared with one another before they
are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import tyro
from torch import Tensor

import whatwhere as ww
from interleaved import ratios, rounds, write

# (B, H, T, S, D)
WHOLE = ((64, 8, 48, 48, 64), (4, 8, 256, 256, 64), (2, 8, 1024, 1024, 64))
STEPS = ((1, 8, 1, 256, 64), (8, 8, 1, 1024, 64), (1, 8, 1, 8192, 64))


def padded(batch: int, total: int) -> dict[str, Any]:
    """Left padding of up to a third, positions counted without it."""
    mask = torch.arange(total) >= torch.linspace(0, total / 3, batch).long()[:, None]
    at = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"key_mask": mask, "query_positions": at, "key_positions": at}


KINDS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "causal": lambda batch, total: {},
    "full": lambda batch, total: {"causal": False},
    "padded": padded,
    "packed": lambda batch, total: {
        "segments": (torch.arange(total) * 4 // total).expand(batch, -1).contiguous()
    },
    "window": lambda batch, total: {"window": total // 4},
}


def sides(
    spec: ww.ScoreSpec, shape: tuple[int, ...], dtype: torch.dtype, kind: str, backward: bool
) -> dict[str, Callable[[], list[Tensor]]]:
    batch, heads, length, total, dim = shape
    q, k, v = (
        torch.randn(batch, n, heads, dim).to(dtype).transpose(1, 2).requires_grad_(backward)
        for n in (length, total, total)
    )
    if length < total:
        k, v = k.contiguous(), v.contiguous()
    call = {"causal": True} | KINDS[kind](batch, total)
    if "query_positions" in call:
        call["query_positions"] = call["query_positions"][:, -length:]

    def side(backend: str) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                out = ww.attention(q, k, v, spec, backend=backend, **call)
                return [out, *torch.autograd.grad(out.sum(), (q, k, v))] if backward else [out]

        return run

    return {backend: side(backend) for backend in ("sdpa", "cpu")}


def check(made: dict[str, Callable[[], list[Tensor]]], dtype: torch.dtype) -> None:
    allowed = 1e-4 if dtype == torch.float32 else 3e-2
    for got, right in zip(*(side() for side in made.values()), strict=True):
        if not (got - right).abs().max() <= allowed * max(1.0, right.abs().max().item()):
            raise SystemExit("the two sides differ; nothing was timed")


def main(threads: tuple[int, ...] = (1, 2), count: int = 7) -> None:
    """Measure and write results/cpu_choice.csv."""
    rows = []
    cases = [
        (name, shape, torch.float32, kind, backward)
        for name in ("rope", "nope", "alibi", "pope")
        for shape in (*WHOLE, *STEPS)
        for kind in KINDS
        for backward in ((False, True) if shape in WHOLE else (False,))
        if shape in WHOLE or kind in ("causal", "padded")
    ]
    cases += [
        (name, shape, torch.bfloat16, "causal", backward)
        for name in ("rope", "pope")
        for shape in (*WHOLE, *STEPS)
        for backward in ((False, True) if shape in WHOLE else (False,))
    ]
    for used in threads:
        torch.set_num_threads(used)
        for name, shape, dtype, kind, backward in cases:
            encoding = ww.make(name, head_dim=shape[4], num_heads=shape[1]).requires_grad_(False)
            made = sides(encoding(), shape, dtype, kind, backward)
            check(made, dtype)
            median, least = ratios(rounds(made, count), to="sdpa")["cpu"]
            rows.append(
                {
                    "encoding": name,
                    "B x H x T x S x D": "x".join(map(str, shape)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "kind": kind,
                    "pass": "forward+backward" if backward else "forward",
                    "threads": used,
                    "cpu / sdpa": f"{median:.3f}",
                    "least": f"{least:.3f}",
                }
            )
            print(*rows[-1].values(), sep="\t", flush=True)
    print(write("cpu_choice", rows))


if __name__ == "__main__":
    tyro.cli(main)
