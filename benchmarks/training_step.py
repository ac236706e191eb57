"""A training step of the quick text preset: time and peak memory as ratios to RoPE.

    python benchmarks/training_step.py --threads 1 2

Model, batch and optimiser are identical but for the encoding. Loss and gradients are compared
with the reference backend before anything is timed. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import tyro

from interleaved import ratios, rounds, write
from whatwhere.lab import recipes
from whatwhere.models import WhatWhereConfig, WhatWhereForCausalLM

ENCODINGS = ("rope", "pope", "pope-id", "rope-id", "nope")


def make(encoding: str, backend: str = "auto") -> tuple[WhatWhereForCausalLM, torch.Tensor]:
    """The quick preset's model and a batch of its shape."""
    recipe = recipes.get("text", "quick")
    torch.manual_seed(0)
    model = WhatWhereForCausalLM(
        WhatWhereConfig(
            vocab_size=256,
            hidden_size=recipe.model.hidden_size,
            num_hidden_layers=recipe.model.num_hidden_layers,
            num_attention_heads=recipe.model.num_attention_heads,
            max_position_embeddings=recipe.data.length,
            position_encoding=encoding,
            attention_backend=backend,
        )
    )
    return model, torch.randint(256, (recipe.training.batch_size, recipe.data.length))


def stepper(encoding: str) -> Callable[[], None]:
    model, batch = make(encoding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        model(batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def check(encoding: str) -> float:
    """Largest error of gradients against the reference backend, relative to the largest."""
    grads = []
    for backend in ("auto", "reference"):
        model, batch = make(encoding, backend)
        model(batch, labels=batch, use_cache=False).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    error = ((grads[0] - grads[1]).abs().max() / grads[1].abs().max()).item()
    if error > 1e-4:
        raise SystemExit(f"{encoding}: gradients are off by {error:.1e}; nothing was timed")
    return error


def resident(reset: bool = False) -> int:
    """Largest resident size of this process in KiB, since the last reset (Linux).

    getrusage would do, but its figure is inherited from the process that started this one.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(next(row for row in status.splitlines() if row.startswith("VmHWM")).split()[1])


def peak(encoding: str) -> int:
    """KiB that three steps add to a process that has imported everything."""
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1]);"
        "import training_step as t; before = t.resident(reset=True);"
        "step = t.stepper(sys.argv[2]);"
        "[step() for _ in range(3)]; print(t.resident() - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(sys.path[0]), encoding],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


def main(threads: tuple[int, ...] = (1, 2), count: int = 15) -> None:
    """Measure and write results/training_step.csv."""
    errors = {name: check(name) for name in ENCODINGS}
    peaks = {name: peak(name) for name in ENCODINGS}
    rows = []
    for used in threads:
        torch.set_num_threads(used)
        taken = rounds({name: stepper(name) for name in ENCODINGS}, count)
        for name, (median, least) in ratios(taken, to="rope").items():
            rows.append(
                {
                    "encoding": name,
                    "threads": used,
                    "step / rope": f"{median:.3f}",
                    "least": f"{least:.3f}",
                    "peak memory / rope": f"{peaks[name] / peaks['rope']:.3f}",
                    "error": f"{errors[name]:.1e}",
                }
            )
            print(*rows[-1].values(), sep="\t", flush=True)
    print(write("training_step", rows))


if __name__ == "__main__":
    tyro.cli(main)
