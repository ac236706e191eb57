"""Bytes that a cache of a converted model keeps for a token: RoPE, PoPE raw, PoPE widened.

    python benchmarks/cache_bytes.py

Read off the tensors of a filled cache, in a layer of Llama 3.2 1B's shape and one of Pythia 1B's,
bfloat16; no time is taken.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

import whatwhere.models as wm
from interleaved import write

TOKENS = 32
SHAPES = {
    "Llama 3.2 1B (32 query, 8 key heads of 64)": LlamaConfig(
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=64,
        num_hidden_layers=1,
        vocab_size=64,
    ),
    "Pythia 1B (8 heads of 256)": GPTNeoXConfig(
        hidden_size=2048,
        num_attention_heads=8,
        intermediate_size=64,
        num_hidden_layers=1,
        vocab_size=64,
    ),
}
KEYS = {
    "rope, stock model": None,
    "rope": ("rope", "auto"),
    "pope, raw": ("pope", "raw"),
    "pope, widened": ("pope", "encoded"),
    "pope-id, widened": ("pope-id", "encoded"),
}


def measure(config: LlamaConfig | GPTNeoXConfig, keys: tuple[str, str] | None) -> float:
    """Bytes per token and layer."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if keys is not None:
        model = wm.convert(model, keys[0], cache_form=keys[1])
    with torch.no_grad():
        cache = model(torch.arange(TOKENS)[None], use_cache=True).past_key_values
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) / TOKENS


def main() -> None:
    """Measure and write results/cache_bytes.csv."""
    rows = []
    for shape, config in SHAPES.items():
        usual = measure(config, None)
        for name, keys in KEYS.items():
            found = measure(config, keys)
            rows.append(
                {
                    "shape of a layer, bfloat16": shape,
                    "keys": name,
                    "bytes per token": f"{found:.0f}",
                    "ratio": f"{found / usual:.2f}",
                }
            )
            print(*rows[-1].values(), sep="\t")
    print(write("cache_bytes", rows))


if __name__ == "__main__":
    main()
