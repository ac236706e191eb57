"""Tracing a model against a plain forward pass over the same text: time and peak memory as ratios.

    python benchmarks/diagnosis.py --threads 1 2

A model of the 124M shape reads 2,048 tokens; `whatwhere.analysis.trace` measures them at 512,
1,024 and 2,048 tokens. The plain pass gives hidden states, or with the head logits too, which the
trace never makes. The outputs of a traced pass are compared to the bit, and the statistics with
the full matrices in float64, before anything is timed. Peak memory is what a pass adds to a
process of its own that holds the model.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import whatwhere as ww
from interleaved import ratios, rounds, write
from whatwhere.analysis import Seen
from whatwhere.models import WhatWhereForCausalLM, preset

LENGTH, LENGTHS = 2048, (512, 1024, 2048)
MODELS = ("llama", "rope", "pope")


def make(name: str, layers: int = 12) -> Any:
    """A random model of the 124M shape: stock Llama, or ours with an encoding."""
    torch.manual_seed(0)
    if name == "llama":
        shape = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
        config = LlamaConfig(
            vocab_size=50257, num_hidden_layers=layers, max_position_embeddings=1024, **shape
        )
        return LlamaForCausalLM(config).eval()
    config = preset("124m", vocab_size=50257, position_encoding=name, num_hidden_layers=layers)
    return WhatWhereForCausalLM(config).eval()


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(50257, (1, length), generator=torch.Generator().manual_seed(0))


def sides(name: str) -> dict[str, Callable[[], Any]]:
    model, ids = make(name), tokens()

    @torch.no_grad()
    def hidden() -> None:
        model.base_model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def logits() -> None:
        model(input_ids=ids, use_cache=False)

    def trace() -> None:
        ww.analysis.trace(model, ids, LENGTHS)

    return {"forward": hidden, "with logits": logits, "trace": trace}


def check(name: str) -> float:
    """Largest error of a statistic against the full matrices, over two layers.

    Raises:
        SystemExit: If it is above 1e-6, or a traced pass changes the outputs.
    """
    model, ids, seen = make(name, layers=2), tokens(512), []
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with ww.analysis.observed(model, seen.append):
            traced = model(ids, use_cache=False).logits
    if not torch.equal(plain, traced):
        raise SystemExit(f"{name}: a traced pass changes the outputs; nothing was timed")
    found = ww.analysis.trace(model, ids)
    scores, clouds = found.scores(), found.geometry()
    error = max(_error(one, scores, clouds) for one in seen)
    if error > 1e-6:
        raise SystemExit(f"{name}: statistics are off by {error:.1e}; nothing was timed")
    return error


def _error(seen: Seen, scores: Any, clouds: Any) -> float:
    q, k = seen.queries[0].double(), seen.keys[0].double()
    hidden = torch.ones(512, 512, dtype=torch.bool).triu(1)
    whole = (q @ k.mT * seen.scale).masked_fill(hidden, -torch.inf)
    rows = scores[(scores["layer"] == seen.layer.index) & (scores["stage"] == "after")]
    sink = whole.softmax(-1)[..., 0].mean(-1)
    values = torch.linalg.svdvals(k).square()
    mine = clouds[
        (clouds["layer"] == seen.layer.index)
        & (clouds["side"] == "key")
        & (clouds["stage"] == "after")
    ]
    pairs = [
        (rows["sink_mass"], sink),
        (rows["largest_score"], whole.amax(-1).mean(-1)),
        (mine["singular_share"], values[:, 0] / values.sum(-1)),
    ]
    return max(float((torch.tensor(a.to_numpy()) - b).abs().max()) for a, b in pairs)


def peak(name: str, side: str) -> int:
    """KiB that a pass adds to a process that holds the model."""
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1]);"
        "import diagnosis as d, training_step as t; side = d.sides(sys.argv[2])[sys.argv[3]];"
        "before = t.resident(reset=True); side(); print(t.resident() - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(sys.path[0]), name, side],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


def held(name: str) -> int:
    """KiB of the model's weights."""
    return sum(p.nbytes for p in make(name).parameters()) // 1024


def main(threads: tuple[int, ...] = (1, 2), count: int = 5) -> None:
    """Measure and write results/diagnosis.csv."""
    errors = {name: check(name) for name in MODELS}
    rows = []
    for name in MODELS:
        weights = held(name)
        peaks = {side: weights + peak(name, side) for side in ("forward", "with logits", "trace")}
        for used in threads:
            torch.set_num_threads(used)
            taken = rounds(sides(name), count)
            for against in ("forward", "with logits"):
                median, least = ratios(taken, to=against)["trace"]
                rows.append(
                    {
                        "model": name,
                        "against": against,
                        "threads": used,
                        "time": f"{median:.2f}",
                        "least": f"{least:.2f}",
                        "peak memory": f"{peaks['trace'] / peaks[against]:.2f}",
                        "error": f"{errors[name]:.1e}",
                    }
                )
                print(*rows[-1].values(), sep="\t", flush=True)
    print(write("diagnosis", rows))


if __name__ == "__main__":
    tyro.cli(main)
