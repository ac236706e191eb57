"""A converted Llama beside the stock one: forward, backward and decoding as ratios.

    python benchmarks/converted.py --threads 1 2

One model, T = 1024, the same weights on every side; the stock side attends through PyTorch's SDPA.
Logits of the converted `rope` are compared with the stock model's, those of the others with the
reference backend, before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import tyro
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import whatwhere.models as wm
from interleaved import ratios, rounds, write

LENGTH = 1024
ENCODINGS = ("rope", "rope-id", "pope", "pope-id", "nope")
STAGES = ("forward", "forward and backward", "decode")


def make(encoding: str | None, backend: str = "auto") -> LlamaForCausalLM:
    """A Llama of the 124M shape's width, with four layers; `None` is the stock one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        num_hidden_layers=4,
        num_attention_heads=12,
        intermediate_size=2048,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config).eval()
    return model if encoding is None else wm.convert(model, encoding, backend=backend)


def check(ids: torch.Tensor) -> dict[str, float]:
    """Largest error of logits, relative to the largest."""
    errors = {}
    for encoding in ENCODINGS:
        other = make(None) if encoding == "rope" else make(encoding, "reference")
        with torch.no_grad():
            expected = other(ids, use_cache=False).logits
            found = make(encoding)(ids, use_cache=False).logits
        errors[encoding] = ((found - expected).abs().max() / expected.abs().max()).item()
        if errors[encoding] > 1e-4:
            raise SystemExit(f"{encoding}: logits are off by {errors[encoding]:.1e}")
    return errors


def side(stage: str, encoding: str | None, ids: torch.Tensor) -> Callable[[], Any]:
    """What is timed."""
    model = make(encoding)
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
    errors = check(ids)
    rows = []
    for used in threads:
        torch.set_num_threads(used)
        for stage in STAGES:
            sides = {"stock": side(stage, None, ids)}
            sides |= {name: side(stage, name, ids) for name in ENCODINGS}
            taken = rounds(sides, count * (10 if stage == "decode" else 1))
            for name, (median, least) in ratios(taken, to="stock").items():
                if name == "stock":
                    continue
                rows.append(
                    {
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
