"""PoPE on a CPU against PoPE-pytorch and x-transformers, forward and backward.

    python benchmarks/cpu_peers.py

PoPE-pytorch is compared as attention, x-transformers as a whole attention layer with the same
projections; both get the same delta, and outputs are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import tyro
from PoPE_pytorch import PoPE, flash_attn_with_pope
from torch import Tensor
from x_transformers import x_transformers as xt

import whatwhere as ww
from interleaved import ratios, rounds, write

BATCH, HEADS, DIM = 2, 8, 64


def sides(length: int) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    ours, theirs, polar = (
        ww.PoPE(DIM, HEADS),
        PoPE(DIM, heads=HEADS),
        xt.PolarEmbedding(DIM, HEADS),
    )
    layer = xt.Attention(dim=HEADS * DIM, heads=HEADS, dim_head=DIM, causal=True, flash=True)
    with torch.no_grad():
        torch.nn.init.uniform_(ours.delta, -6, 0)
        theirs.bias.copy_(ours.delta)
        polar.learned_bias.copy_(ours.delta[:, None])
    q, k, v = (torch.randn(BATCH, HEADS, length, DIM, requires_grad=True) for _ in range(3))
    x = torch.randn(BATCH, length, HEADS * DIM, requires_grad=True)

    def layer_of_ours() -> Tensor:
        split = (
            project(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            for project in (layer.to_q, layer.to_k, layer.to_v)
        )
        return layer.to_out(ww.attention(*split, ours(), causal=True).transpose(1, 2).flatten(2))

    def layer_of_theirs() -> Tensor:
        out = layer(x, polar_pos_emb=polar(torch.arange(length)))
        return out if isinstance(out, Tensor) else out[0]

    def peer() -> Tensor:
        return flash_attn_with_pope(q, k, v, pos_emb=theirs(length), causal=True, fused=False)

    return {
        "attention: whatwhere": (lambda: ww.attention(q, k, v, ours(), causal=True), [q, k, v]),
        "attention: PoPE-pytorch": (peer, [q, k, v]),
        "layer: whatwhere": (layer_of_ours, [x]),
        "layer: x-transformers": (layer_of_theirs, [x]),
    }


def main(threads: tuple[int, ...] = (1, 2), count: int = 5) -> None:
    """Measure and write results/cpu_peers.csv."""
    rows = []
    for used in threads:
        torch.set_num_threads(used)
        for length in (1024, 2048):
            made = sides(length)
            for what in ("attention", "layer"):
                pair = {name: side for name, side in made.items() if name.startswith(what)}
                first, second = (run().detach() for run, _ in pair.values())
                if (first - second).abs().max() > 1e-3 * first.abs().max():
                    raise SystemExit(f"{what}: the sides differ at {length}; nothing was timed")
                timed = {
                    name: (lambda run=run, x=x: torch.autograd.grad(run().sum(), x))
                    for name, (run, x) in pair.items()
                }
                found = ratios(rounds(timed, count), to=f"{what}: whatwhere")
                for name, (median, least) in found.items():
                    rows.append(
                        {
                            "length": length,
                            "threads": used,
                            "side": name,
                            "ratio": f"{median:.3f}",
                            "least": f"{least:.3f}",
                        }
                    )
                    print(*rows[-1].values(), sep="\t", flush=True)
    print(write("cpu_peers", rows))


if __name__ == "__main__":
    tyro.cli(main)
