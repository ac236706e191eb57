"""A decoding step on a CPU, as a ratio to RoPE through SDPA over a cache of the same size.

    python benchmarks/decode.py --threads 1 2

RoPE's cache holds turned keys, so only its query is turned. PoPE's holds D numbers a token: raw
keys, or their magnitudes as the models here keep them; with plain PyTorch and with the compiled
loop. Outputs are compared with the reference before anything is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import whatwhere as ww
from interleaved import ratios, rounds, write

# (B, H, G, S, T)
SHAPES = (
    (1, 8, 8, 1024, 1),
    (1, 8, 8, 8192, 1),
    (1, 8, 8, 32768, 1),
    (1, 8, 2, 8192, 1),
    (8, 8, 8, 2048, 1),
)
DIM = 64


def sides(shape: tuple[int, int, int, int, int]) -> dict[str, Callable[[], Tensor]]:
    batch, heads, shared, total, length = shape
    q = torch.randn(batch, heads, length, DIM)
    k, v = (torch.randn(batch, shared, total, DIM) for _ in range(2))
    rope, pope = ww.RoPE(DIM, heads)(), ww.PoPE(DIM, heads)()
    at = torch.arange(total - length, total)
    shown, bare = ww.unturned(k, pope), pope.unturned()
    features = ww.encode_keys(k, pope, torch.arange(total))

    def rotated() -> Tensor:
        turned = ww.encode_queries(q, rope, at)
        return F.scaled_dot_product_attention(turned, k, v, enable_gqa=heads != shared)

    def ours(keys: Tensor, spec: ww.ScoreSpec, setting: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            os.environ["WHATWHERE_COMPILE"] = setting
            query = q if spec is pope else ww.unturned(q, pope)
            return ww.attention(query, keys, v, spec, causal=True, backend="cpu")

        return run

    def encoded() -> Tensor:
        queries = ww.encode_queries(q, pope, at)
        return ww.attention(queries, features, v, pope.encoded(), causal=True, backend="cpu")

    made = {
        "rope sdpa": rotated,
        "pope 2D features": encoded,
        "pope raw, plain": ours(k, pope, "0"),
        "pope magnitudes, plain": ours(shown, bare, "0"),
        "pope raw, compiled": ours(k, pope, "1"),
        "pope magnitudes, compiled": ours(shown, bare, "1"),
    }
    wanted = ww.attention(q, k, v, pope, causal=True, backend="reference")
    for name, run in made.items():
        if name != "rope sdpa" and (run() - wanted).abs().max() > 1e-4 * wanted.abs().max():
            raise SystemExit(f"{name} is wrong on {shape}; nothing was timed")
    return made


@torch.no_grad()
def main(threads: tuple[int, ...] = (1, 2), count: int = 21) -> None:
    """Measure and write results/decode.csv."""
    rows = []
    for used in threads:
        torch.set_num_threads(used)
        for shape in SHAPES:
            found = ratios(rounds(sides(shape), count), to="rope sdpa")
            for name, (median, least) in found.items():
                rows.append(
                    {
                        "B x H x G x S x T": "x".join(map(str, shape)),
                        "threads": used,
                        "side": name,
                        "ratio": f"{median:.3f}",
                        "least": f"{least:.3f}",
                    }
                )
                print(*rows[-1].values(), sep="\t", flush=True)
    print(write("decode", rows))


if __name__ == "__main__":
    tyro.cli(main)
