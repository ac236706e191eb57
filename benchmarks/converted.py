"""A converted Llama beside the stock one: forward, backward and decoding as ratios.

    python benchmarks/converted.py --threads 1 2

Two shapes of four layers, T = 1024, the same weights on every side: the width of SmolLM2-135M,
whose three query heads share a key head, and that of GPT-2, where each has its own. The stock side
attends
through PyTorch's SDPA.
Logits of the converted `rope` are compared with the stock model's, those of the others with the
reference backend, before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import tyro
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import whatwhere.models as wm
from interleaved import ratios, rounds, write

LENGTH = 1024
ENCODINGS = ("rope", "rope-id", "pope", "pope-id", "nope")
SHAPES = {
    "grouped": {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "not grouped": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048},
}
STAGES = ("forward", "forward and backward", "decode")


def make(shape: str, encoding: str | None, backend: str = "auto") -> LlamaForCausalLM:
    """A Llama with an encoding; `None` is the stock one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, num_hidden_layers=4, max_position_embeddings=LENGTH, **SHAPES[shape]
    )
    model = LlamaForCausalLM(config).eval()
    return model if encoding is None else wm.convert(model, encoding, backend=backend)


def check(shape: str, ids: torch.Tensor) -> dict[str, float]:
    """Largest error of logits, relative to the largest."""
    errors = {}
    for encoding in ENCODINGS:
        other = make(shape, None)
        if encoding != "rope":
            other = make(shape, encoding, "reference")
        with torch.no_grad():
            expected = other(ids, use_cache=False).logits
            found = make(shape, encoding)(ids, use_cache=False).logits
        errors[encoding] = ((found - expected).abs().max() / expected.abs().max()).item()
        if errors[encoding] > 1e-4:
            raise SystemExit(f"{encoding}: logits are off by {errors[encoding]:.1e}")
    return errors


def side(shape: str, stage: str, encoding: str | None, ids: torch.Tensor) -> Callable[[], Any]:
    """What is timed."""
    model = make(shape, encoding)
    if stage == "decode":
        with torch.no_grad():
            cache = model(ids, past_key_values=DynamicCache(config=model.config)).past_key_values
        cache = copy.deepcopy(cache)

        def step() -> None:
            with torch.no_grad():
                model(ids[:, :1], past_key_values=cache)
            cache.crop(-1)

        return step

    def forward() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False)

    def both() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=False)

    return forward if stage == "forward" else both


def main(threads: tuple[int, ...] = (1, 2), count: int = 15, save: bool = True) -> None:
    """Measure and write results/converted.csv."""
    ids = torch.randint(8192, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = []
    for shape, used, stage in product(SHAPES, threads, STAGES):
        torch.set_num_threads(used)
        errors = check(shape, ids)
        sides = {name: side(shape, stage, name, ids) for name in ENCODINGS}
        sides["stock"] = side(shape, stage, None, ids)
        taken = rounds(sides, count * (10 if stage == "decode" else 1))
        for name, (median, least) in ratios(taken, to="stock").items():
            if name == "stock":
                continue
            rows.append(
                {
                    "heads": shape,
                    "stage": stage,
                    "encoding": name,
                    "threads": used,
                    "time / stock": f"{median:.3f}",
                    "least": f"{least:.3f}",
                    "error": f"{errors[name]:.1e}",
                }
            )
            print(*rows[-1].values(), sep="\t", flush=True)
    if save:
        print(write("converted", rows))


if __name__ == "__main__":
    tyro.cli(main)
