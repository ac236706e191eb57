"""`whatwhere plan` on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from whatwhere.lab import recipes, storage
from whatwhere.lab.errors import user_errors
from whatwhere.lab.recipes import Recipe

if TYPE_CHECKING:
    from whatwhere.lab.plan.planning import Machine, RecipePlan

EVERYTHING = "all"
"""Given in place of a recipe's name."""


@dataclass(frozen=True)
class Plan:
    """Say what a recipe will cost: memory of a GPU, operations, time, disk.

    Computed from the model's shape, nothing is trained or measured; what is assumed is printed
    below the tables. The options below stand for the recipe that is named, as for `compare`.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """name of a recipe (see `whatwhere recipes`), a YAML file, or all: one row for each recipe"""
    settings: Annotated[Recipe, tyro.conf.arg(name="")]
    preset: str | None = None
    """quick (a CPU, the default) or paper (as a paper has it)"""
    encodings: tuple[str, ...] = ()
    """labels of the recipe's encodings, or any names in whatwhere.ENCODINGS"""
    gpus: int = 1
    """GPUs that train one run together"""
    memory: float | None = None
    """GB (10^9 bytes) of each; what the device is sold with by default"""
    device: Literal["a100", "a100-40gb", "h100", "h200", "b200", "l40s", "rtx-4090", "cpu"] = (
        "h100"
    )
    """whose memory and peak to assume"""
    flops: float | None = None
    """peak TFLOPS of each in the training's precision, in place of the maker's figure"""
    mfu: float = 0.4
    """share of the peak that training reaches"""
    allowance: float = 2.0
    """GB of each set aside for CUDA's context, NCCL and fragmentation"""
    floor: float = 0.02
    """seconds that the passes over a micro-batch take at the least"""
    parallel: Literal["ddp", "fsdp"] | None = None
    """short for --training.parallel"""
    vocab_size: int | None = None
    """token ids, where the tokenizer or data set is not known here"""
    json: Path | None = None
    """write everything to this file, in bytes, operations and seconds"""
    output: Path | None = None
    """write the tables to this file, as Markdown"""

    def run(self) -> None:
        """Plan."""
        from whatwhere.lab.plan.planning import Machine

        with user_errors():
            machine = Machine(
                self.device,
                self.gpus,
                self.memory,
                self.flops,
                self.mfu,
                self.allowance,
                self.floor,
            )
            if self.recipe == EVERYTHING:
                self._all(machine)
            else:
                self._one(machine)

    def _one(self, machine: Machine) -> None:
        from whatwhere.lab.compare import choose
        from whatwhere.lab.plan import table
        from whatwhere.lab.plan.assumptions import assumptions

        plan = self._plan(choose(self.settings, self.encodings), machine)
        said, grids = assumptions(plan), table.grids(plan)
        console = Console()
        for grid in grids:
            console.print(grid.rich(console.width))
        lines = table.summary(plan)
        for line in (*lines, "", "assumed:", *(f"- {line}" for line in said)):
            console.print(line, highlight=False, soft_wrap=True)
        if self.json is not None:
            storage.write_json(self.json, table.to_json(plan, said))
        if self.output is not None:
            blocks = [_title(plan), *(grid.markdown() for grid in grids), "\n".join(lines)]
            storage.write_text(self.output, _page(blocks, said))

    def _all(self, machine: Machine) -> None:
        from whatwhere.lab.plan import table
        from whatwhere.lab.plan.assumptions import assumptions, general, particular

        preset = self.preset or "quick"
        if self.encodings or self.settings != everything():
            raise ValueError("all: options of one recipe (--encodings, --training...) do not fit")
        found = [name for name in recipes.names() if preset in recipes.presets(name)]
        if not found:
            raise ValueError(f"all: no recipe has a preset {preset!r}")
        plans, refused = [], []
        for name in found:
            try:
                plans.append(self._plan(recipes.get(name, preset), machine))
            except ValueError as error:
                refused.append((name, str(error)))
        grid = table.overview(plans, refused)
        said = list(dict.fromkeys(line for plan in plans for line in general(plan)))
        said += [f"{plan.recipe.name}: {line}" for plan in plans for line in particular(plan)]
        console = Console()
        console.print(grid.rich(console.width))
        for line in ("assumed:", *(f"- {line}" for line in said)):
            console.print(line, highlight=False, soft_wrap=True)
        if self.json is not None:
            content = [table.to_json(plan, assumptions(plan)) for plan in plans]
            storage.write_json(self.json, {"recipes": content, "refused": dict(refused)})
        if self.output is not None:
            blocks = [*self._heading(machine, preset), grid.markdown()]
            storage.write_text(self.output, _page(blocks, said))

    def _heading(self, machine: Machine, preset: str) -> list[str]:
        size = f"{machine.gigabytes:g}"
        command = f"whatwhere plan all --preset {preset} --device {machine.device}"
        command += f" --gpus {machine.gpus} --memory {size}"
        command += f" --parallel {self.parallel}" if self.parallel is not None else ""
        return [
            f"# All recipes, preset {preset}: {machine.gpus} x {machine.device}, {size} GB",
            f"Made by `{command}`; [plan.md](plan.md) says how to read it.",
        ]

    def _plan(self, recipe: Recipe, machine: Machine) -> RecipePlan:
        from whatwhere.lab.plan.planning import plan

        if self.parallel is not None:
            training = recipe.training.model_copy(update={"parallel": self.parallel})
            recipe = recipe.model_copy(update={"training": training})
        return plan(recipe, machine, vocab_size=self.vocab_size)


def everything() -> Recipe:
    """What stands for the settings where all recipes are asked for."""
    return recipes.get("text")


def _title(plan: RecipePlan) -> str:
    machine, preset = plan.machine, plan.recipe.preset
    name = plan.recipe.name + (f", preset {preset}" if preset else "")
    return f"# {name}: {machine.gpus} x {machine.device}, {machine.gigabytes:g} GB"


def _page(blocks: list[str], said: list[str]) -> str:
    listed = "\n".join(["Assumed:", "", *(f"- {line}" for line in said)])
    return "\n\n".join([*blocks, listed]) + "\n"
