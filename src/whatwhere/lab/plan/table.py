"""A plan as tables, lines and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from whatwhere.lab.plan.fitting import Fit
from whatwhere.lab.plan.grid import Grid, amount, gigabytes, hours
from whatwhere.lab.plan.planning import RecipePlan, RunPlan


def grids(plan: RecipePlan) -> list[Grid]:
    """Memory of a device, its parts for the encoding that needs most, work and time."""
    return [memory(plan), parts(plan), work(plan)]


def memory(plan: RecipePlan) -> Grid:
    """What each encoding needs of a device, and the largest micro-batch that fits."""
    again = plan.recipe.training.activation_checkpointing
    columns = (
        "encoding",
        "parameters",
        "of the encoding",
        "weights, gradients, AdamW",
        "kept a sequence",
        "the same, checkpointed",
        "tables of a layer",
        "micro-batch x accumulation",
        "in all",
        "without checkpointing" if again else "with checkpointing",
    )
    rows = tuple(
        (
            run.label,
            amount(run.parameters),
            amount(run.encoding_parameters),
            gigabytes(_state(run.fit)),
            gigabytes(sum(run.kept.sequence.values())),
            gigabytes(sum(run.kept_checkpointed.sequence.values())),
            f"{run.table_bytes / 1e6:.2f} MB",
            f"{run.fit.micro_batch} x {run.fit.accumulation}",
            _within(run.fit, plan),
            f"{run.other.micro_batch} x {run.other.accumulation}: {_within(run.other, plan)}",
        )
        for run in plan.runs
    )
    return Grid(f"memory of a GPU in GB, of {plan.machine.gigabytes:g}", columns, rows)


def parts(plan: RecipePlan) -> Grid:
    """Where the memory goes, for the encoding that needs most for a sequence."""
    run = max(plan.runs, key=lambda run: run.fit.total / run.fit.micro_batch)
    kept = run.kept_checkpointed if run.fit.layout.checkpointing else run.kept
    rows = [(part, gigabytes(size), "") for part, size in run.fit.bytes.items()]
    rows += [(part, "", gigabytes(size)) for part, size in kept.sequence.items()]
    rows += [(f"{part}, for any micro-batch", "", gigabytes(n)) for part, n in kept.fixed.items()]
    title = f"where it goes, {run.label}: GB of a GPU, and of what is kept by a sequence"
    return Grid(title, ("part", "GPU", "sequence"), tuple(rows))


def work(plan: RecipePlan) -> Grid:
    """Operations and time of each run."""
    columns = (
        "encoding",
        "backend",
        "FLOPs a step",
        "of it wider features",
        "FLOPs in all",
        "tokens",
        "tokens/s",
        "hours",
        "GPU-hours",
    )
    return Grid("work and time of a run", columns, tuple(_work(run) for run in plan.runs))


def _work(run: RunPlan) -> tuple[str, ...]:
    if run.not_trained is not None:
        return (run.label, run.not_trained, *["-"] * 7)
    rate = run.tokens_per_second
    return (
        run.label,
        run.backend,
        amount(run.step_flops),
        f"{100 * run.flops.encoding / run.flops.forward:.1f} %",
        amount(run.total_flops),
        amount(run.tokens),
        "does not fit" if rate is None else amount(rate),
        hours(run.seconds),
        "-" if run.gpu_hours is None else hours(3600 * run.gpu_hours),
    )


def summary(plan: RecipePlan) -> list[str]:
    """Of all runs, and what to do where one does not fit."""
    seeds = len(plan.recipe.seeds)
    lines = []
    if plan.trained:
        used = max(run.fit.gpus for run in plan.trained)
        cost = "not all fit"
        if plan.seconds is not None and plan.gpu_hours is not None:
            cost = (
                f"{hours(plan.seconds)} hours one after another on {used} GPU(s), "
                f"{hours(3600 * plan.gpu_hours)} GPU-hours"
            )
        lines.append(
            f"{len(plan.trained)} encoding(s) x {seeds} seed(s) = {plan.count} run(s): {cost}; "
            f"disk {gigabytes(plan.disk_bytes)} GB at the most"
        )
    else:
        lines.append("nothing to train")
    floored = [run.label for run in plan.trained if run.floored]
    if floored:
        lines.append(
            f"{', '.join(floored)}: too small to keep the GPUs busy; the time is that of "
            f"{1000 * plan.machine.floor:g} ms for every micro-batch"
        )
    for run in plan.runs:
        if run.advice is not None:
            lines.append(
                f"{run.label}: {_within(run.fit, plan)} GB for one sequence does not fit: "
                f"{run.advice}"
            )
    return lines


def overview(plans: Sequence[RecipePlan], refused: Sequence[tuple[str, str]] = ()) -> Grid:
    """One row for each recipe: its costliest run, the most memory of any, the cost of all.

    Args:
        plans: Of one machine.
        refused: Recipes without a plan, and why.
    """
    columns = (
        "recipe",
        "costliest run",
        "parameters",
        "batch x length",
        "steps",
        "GPUs",
        "micro-batch x accumulation",
        "GB of a GPU, at most",
        "FLOPs of the run",
        "its hours",
        "runs",
        "GPU-hours of all",
        "disk, GB",
    )
    rows = [_overview(plan) for plan in plans]
    rows += [(name, why, *["-"] * (len(columns) - 2)) for name, why in refused]
    return Grid("all recipes", columns, tuple(rows))


def _overview(plan: RecipePlan) -> tuple[str, ...]:
    shown = plan.trained or list(plan.runs)
    run = max(shown, key=lambda run: run.total_flops)
    most = max(shown, key=lambda run: (not run.fit.fits, run.fit.total))
    return (
        f"{plan.recipe.name} {_layout(run.fit)}".strip(),
        run.label if run.not_trained is None else f"{run.label}, {run.not_trained}",
        amount(run.parameters),
        f"{run.batch_size} x {run.length}",
        f"{run.steps:,}",
        str(run.fit.gpus),
        f"{run.fit.micro_batch} x {run.fit.accumulation}",
        _within(most.fit, plan) + (f" ({most.label} {most.advice})" if most.advice else ""),
        amount(run.total_flops),
        hours(run.seconds) + (" (floor)" if run.floored else ""),
        str(plan.count),
        "-" if plan.gpu_hours is None else hours(3600 * plan.gpu_hours),
        gigabytes(plan.disk_bytes),
    )


def to_json(plan: RecipePlan, assumptions: Sequence[str]) -> dict[str, Any]:
    """All of a plan, in bytes, operations and seconds."""
    recipe, machine = plan.recipe, plan.machine
    return {
        "recipe": recipe.name,
        "preset": recipe.preset,
        "vocab_size": plan.vocab_size,
        "precision": "bf16" if plan.width == 2 else "float32",
        "machine": {**asdict(machine), "memory": machine.gigabytes},
        "peak_flops": machine.peak(plan.width),
        "runs": [_run_json(run) for run in plan.runs],
        "seeds": list(recipe.seeds),
        "count": plan.count,
        "seconds": plan.seconds,
        "gpu_hours": plan.gpu_hours,
        "disk_bytes": plan.disk_bytes,
        "measured": False,
        "assumptions": list(assumptions),
    }


def _run_json(run: RunPlan) -> dict[str, Any]:
    return {
        **asdict(run),
        "fit": _fit_json(run.fit),
        "other": _fit_json(run.other),
        "step_flops": run.step_flops,
        "total_flops": run.total_flops,
        "tokens": run.tokens,
        "tokens_per_second": run.tokens_per_second,
        "gpu_hours": run.gpu_hours,
        "checkpoint_bytes": run.checkpoint_bytes,
    }


def _fit_json(fit: Fit) -> dict[str, Any]:
    return {**asdict(fit), "total": fit.total}


def _state(fit: Fit) -> int:
    parts = ("weights", "gradients", "optimizer", "gathered", "buckets")
    return sum(fit.bytes.get(part, 0) for part in (*parts, "gradients that accumulate"))


def _within(fit: Fit, plan: RecipePlan) -> str:
    return gigabytes(fit.total) + ("" if fit.fits else f" > {plan.machine.gigabytes:g}")


def _layout(fit: Fit) -> str:
    said: list[str] = [fit.layout.parallel] if fit.layout.parallel == "fsdp" else []
    said += ["checkpointed"] if fit.layout.checkpointing else []
    said += [f"context / {fit.layout.context_parallel}"] if fit.layout.context_parallel > 1 else []
    return f"({', '.join(said)})" if said else ""
