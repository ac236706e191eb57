"""What `whatwhere plan` predicts of a training step, beside what the step really allocates.

    python benchmarks/plan.py

The quick preset of a recipe of each kind, each of its encodings, on random tokens of its batch's
shape: bytes of weights, gradients and AdamW; bytes that autograd saves for the backward pass; and
the most that is allocated at any time of the step, which on a CPU PyTorch's profiler adds up and
on a GPU its allocator knows. Writes results/plan.csv and the table of docs/plan.md.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from interleaved import write
from whatwhere.lab import recipes
from whatwhere.lab.plan.backend import backend_of
from whatwhere.lab.plan.measure import TrainingStep
from whatwhere.lab.plan.memory import Step, kept, state_bytes, working
from whatwhere.lab.plan.shape import Sizes, shape_of
from whatwhere.lab.plan.vocabulary import length_of, vocabulary_of
from whatwhere.lab.recipes import EncodingChoice, Recipe

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
# One of each kind; the other sizes, lengths and data sets differ in their numbers alone.
KINDS = (
    *("text", "books", "indirect-indexing", "jsb", "maestro", "genome", "openwebtext-124m"),
    *("ablation-124m", "rope-id-1b", "partial-rope-pythia-1b-2048", "partial-rope-llama-1b-2048"),
)
MARKS = ("<!-- measured: benchmarks/plan.py -->", "<!-- end -->")


@dataclass(frozen=True)
class Case:
    """One training step.

    Attributes:
        recipe: Its quick preset.
        label: Of an encoding.
        choice: The encoding.
        sizes: Vocabulary and length.
        step: How it is computed.
    """

    recipe: Recipe
    label: str
    choice: EncodingChoice
    sizes: Sizes
    step: Step


def cases(device: str, width: int, names: Sequence[str]) -> Iterator[Case]:
    """Every encoding of these recipes that is trained from nothing.

    By the backend that is taken, with and without checkpointing, and by PyTorch's own kernel,
    which a GPU takes where nothing was measured.
    """
    title = torch.cuda.get_device_name() if device == "cuda" else ""
    for name in names:
        recipe = recipes.get(name, "quick")
        sizes = Sizes(vocabulary_of(recipe.data), length_of(recipe.data))
        for label, choice in recipe.encodings.items():
            if choice.name == "yarn" or choice.finetune_from is not None:
                continue
            shape = shape_of(recipe.model, choice, sizes)
            backend = backend_of(shape, sizes.length, device, title)
            step = Step(sizes.length, sizes.length, device, width, backend)
            steps = [step, replace(step, checkpointing=True), replace(step, backend="sdpa")]
            for one in dict.fromkeys(steps):
                yield Case(recipe, label, choice, sizes, one)


def peak(step: Callable[[], None], device: str) -> int:
    """Bytes above those allocated before, at the highest of a step."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, size in changes:
        held += size
        most = max(most, held)
    return most


def measure(case: Case) -> dict[str, str]:
    """A row."""
    shape = shape_of(case.recipe.model, case.choice, case.sizes)
    sequences = case.recipe.training.batch_size
    training = TrainingStep(case.recipe.model, case.choice, case.sizes, case.step, sequences)
    found = training.measure()
    training.optimizer.zero_grad(set_to_none=False)
    highest = found.state + peak(training.run, case.step.kind)
    state = sum(state_bytes(shape).values())
    saved = kept(shape, case.step).total(sequences)
    whole = state + saved + working(shape, case.step, sequences)
    return {
        "recipe": case.recipe.name,
        "encoding": case.label,
        "batch": f"{sequences} x {case.sizes.length}",
        "precision": "bf16" if case.step.width == 2 else "float32",
        "backend": case.step.backend,
        "checkpointing": "yes" if case.step.checkpointing else "no",
        "weights, gradients, AdamW: predicted MB": mega(state),
        "allocated": mega(found.state),
        "kept: predicted MB": mega(saved),
        "saved": mega(found.kept),
        "kept ratio": f"{saved / found.kept:.3f}",
        "most: predicted MB": mega(whole),
        "at the most": mega(highest),
        "ratio": f"{whole / highest:.3f}",
    }


def mega(size: int) -> str:
    return f"{size / 1e6:.2f}"


def document(rows: list[dict[str, str]]) -> None:
    """Write the table of docs/plan.md again: rope and pope, or the first where neither is."""
    shown, seen = [], {row["recipe"]: row["encoding"] for row in reversed(rows)}
    for row in rows:
        own = {r["encoding"] for r in rows if r["recipe"] == row["recipe"]}
        wanted = own & {"rope", "pope"} or {seen[row["recipe"]]}
        if row["encoding"] in wanted:
            shown.append(row)
    lines = [" | ".join(shown[0]), " | ".join(["---"] * len(shown[0]))]
    lines += [" | ".join(row.values()) for row in shown]
    table = "\n".join(f"| {line} |" for line in lines)
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}", encoding="utf-8")


def main(device: str = "cpu", bf16: bool = False, names: tuple[str, ...] = KINDS) -> None:
    """Measure. Another device or precision than a CPU's float32 is printed alone."""
    rows = []
    for case in cases(device, 2 if bf16 else 4, names):
        rows.append(measure(case))
        print(*rows[-1].values(), sep="\t", flush=True)
    if device == "cpu" and not bf16:
        print(write("plan", rows))
        document(rows)


if __name__ == "__main__":
    tyro.cli(main)
