"""What a plan takes for granted, said in words beside its numbers."""

from __future__ import annotations

from whatwhere.lab.plan.planning import RecipePlan


def assumptions(plan: RecipePlan) -> list[str]:
    """One sentence or two for each."""
    return [*general(plan), *particular(plan)]


def general(plan: RecipePlan) -> list[str]:
    """What holds for any recipe that is computed alike."""
    return [
        "computed from formulas (docs/plan.md), nothing was measured; which tensors are kept is "
        "checked on a CPU, and on a GPU follows from the operators that PyTorch takes there",
        *_rate(plan),
        *_memory(plan),
        *_spread(plan),
    ]


def particular(plan: RecipePlan) -> list[str]:
    """What is of this recipe."""
    return [
        f"a vocabulary of {plan.vocab_size:,}; every sequence as long as the longest",
        *_idle(plan),
        *_runs(plan),
    ]


def _rate(plan: RecipePlan) -> list[str]:
    machine, known = plan.machine, "given" if plan.machine.flops else "its maker's figure"
    precision = "bfloat16" if plan.width == 2 else "float32"
    return [
        f"{machine.device}: {machine.peak(plan.width) / 1e12:g} TFLOPS in {precision} ({known}) x "
        f"{100 * machine.mfu:g} % of it reached (MFU), assumed; no passes over a micro-batch "
        f"take less than {1000 * machine.floor:g} ms, assumed; validation, evaluation, data and "
        "checkpoints take no time",
        "FLOPs are those of matrix products: 6 a token for each number of a linear layer, and "
        "attention over the keys that are seen; what checkpointing computes again counts in the "
        "time alone",
    ]


def _memory(plan: RecipePlan) -> list[str]:
    machine, training = plan.machine, plan.recipe.training
    what = (
        "for CUDA, cuBLAS, NCCL and fragmentation"
        if machine.maker.kind == "cuda"
        else "for all else"
    )
    lines = [
        f"GB are 10^9 bytes; {machine.allowance:g} GB of a device are set aside {what}, a guess",
        "weights, gradients and AdamW's moments in float32"
        + (", autocast to bfloat16 in products" if plan.width == 2 else ""),
    ]
    if training.compile != "no":
        lines.append("kept as without torch.compile, which keeps less")
    if plan.recipe.model.attention_backend == "auto" and machine.maker.kind == "cuda":
        lines.append(
            "attention by the backend that auto takes: what was measured on the device, else "
            "PyTorch's kernels (sdpa, or flex for documents, windows and slopes)"
        )
    return lines


def _spread(plan: RecipePlan) -> list[str]:
    training, lines = plan.recipe.training, []
    used = {run.fit.gpus for run in plan.trained}
    if max(used, default=1) > 1 and training.parallel == "ddp":
        lines.append("ddp: a whole model on each GPU, gradients a second time in its buckets")
    if max(used, default=1) > 1 and training.parallel == "fsdp":
        lines.append(
            "fsdp: weights, gradients and moments divided by the GPUs; gathered are two layers "
            "in the precision of products, embedding and head in float32; gradients that "
            "accumulate over several micro-batches are whole"
        )
    if training.context_parallel > 1:
        lines.append(
            f"context parallel: {training.context_parallel} GPUs share the queries of a sequence "
            "and each gathers all of its keys and values"
        )
    return lines


def _idle(plan: RecipePlan) -> list[str]:
    for run in plan.trained:
        if run.fit.gpus < plan.machine.gpus:
            return [
                f"a batch of {run.batch_size} divides among {run.fit.gpus} of "
                f"{plan.machine.gpus} GPUs; the others are idle, or train other runs"
            ]
    return []


def _runs(plan: RecipePlan) -> list[str]:
    recipe, lines = plan.recipe, []
    names = {choice.name for choice in recipe.encodings.values()}
    if "yarn" in names and "rope" not in names:
        lines.append("yarn is made from a rope run, which compare trains as well")
    if any(run.steps != recipe.training.steps for run in plan.trained):
        lines.append("fine-tuned runs: evaluation.finetune's steps, batch and length")
    parts = recipe.training.gradient_accumulation_steps
    asked = sorted({run.fit.accumulation for run in plan.trained if run.fit.fits})
    if asked and asked != [parts]:
        lines.append(
            f"the recipe accumulates over {parts} part(s): give "
            f"--training.gradient-accumulation-steps {max(asked)}"
        )
    return lines
