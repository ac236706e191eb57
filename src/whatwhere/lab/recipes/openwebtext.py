"""OpenWebText: perplexity, ablations, zero-shot tasks, reading PG-19 (PoPE paper, 2509.10534).

Models are trained once, by ``openwebtext-SIZE``; ``zero-shot-SIZE`` and ``pg19-SIZE`` evaluate or
fine-tune those, and train them first where they are missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from whatwhere.lab.data.prepared import TokensData
from whatwhere.lab.data.text import TextData
from whatwhere.lab.recipes.schema import (
    EncodingChoice,
    EvaluationSettings,
    FinetuneSettings,
    ModelSettings,
    PaperFigure,
    Recipe,
    TrainingSettings,
)
from whatwhere.lab.recipes.shared import (
    LONG,
    POPE,
    figures,
    ours,
    rope_and_pope,
    small_training,
)

SHAPES = {
    "124m": ModelSettings(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "253m": ModelSettings(hidden_size=1024, num_hidden_layers=16, num_attention_heads=16),
    "774m": ModelSettings(hidden_size=1280, num_hidden_layers=36, num_attention_heads=20),
}
SMALL_SHAPES = {
    "124m": ModelSettings(hidden_size=96, num_hidden_layers=3, num_attention_heads=3),
    "253m": ModelSettings(hidden_size=128, num_hidden_layers=4, num_attention_heads=4),
    "774m": ModelSettings(hidden_size=160, num_hidden_layers=5, num_attention_heads=5),
}

PERPLEXITY = {"124m": (21.55, 21.33), "253m": (18.88, 18.55), "774m": (15.85, 15.45)}
ZERO_SHOT = {"124m": (45.33, 46.19), "253m": (48.76, 48.78), "774m": (51.80, 52.46)}
ABLATIONS = {
    "124m": {"no-softplus": 21.57, "relu": 21.55, "no-delta": 21.42, "pope": 21.33},
    "253m": {"no-softplus": 18.93, "relu": 18.90, "no-delta": 18.57, "pope": 18.55},
}

SIX_TASKS = ("lambada_openai", "blimp", "cbt", "hellaswag", "piqa", "arc_easy")

VARIANTS = {
    "pope": EncodingChoice(name="pope"),
    "no-softplus": EncodingChoice(name="pope", options={"magnitude": "none"}),
    "relu": EncodingChoice(name="pope", options={"magnitude": "relu"}),
    "no-delta": EncodingChoice(name="pope", options={"delta": None}),
}

READ = EvaluationSettings(
    dataset="pg19",
    lengths=tuple(range(1024, 10_241, 1024)),
    tokens=2**20,
    examples=4000,
    yarn="finetune",
)


def training(size: str) -> Recipe:
    """One size of the OpenWebText columns: 100,000 steps of 64 x 1,024 GPT-2 tokens."""
    rope, pope = PERPLEXITY[size]
    return Recipe(
        name=f"openwebtext-{size}",
        description=(
            f"OpenWebText, {size.upper()} parameters, length 1024, 100,000 steps. Needs GPUs. "
            f"Validation perplexity in the paper: RoPE {rope}, PoPE {pope}"
        ),
        data=TokensData(dataset="openwebtext", tokenizer="gpt2", length=1024),
        model=SHAPES[size],
        training=TrainingSettings(
            steps=100_000,
            batch_size=64,
            learning_rate=6e-4,
            min_learning_rate=6e-5,
            warmup_steps=1000,
            weight_decay=0.01,
            beta2=0.95,
            **LONG,
        ),
        evaluation=EvaluationSettings(examples=4000),
        encodings=rope_and_pope(),
        ours=ours(SHAPES[size]),
        paper=figures(f"{POPE}, OpenWebText", "perplexity", rope=rope, pope=pope),
    )


def training_quick(size: str) -> Recipe:
    """A few hundred thousand parameters on bytes of any text; the sizes stand in their order."""
    shape = SMALL_SHAPES[size]
    return Recipe(
        name=f"openwebtext-{size}",
        description=(
            f"A stand-in for {size.upper()} ({shape.num_hidden_layers} layers x "
            f"{shape.hidden_size}) on bytes of --text, else of Python's own source: minutes on "
            "a CPU, no figures of a paper"
        ),
        data=TextData(tokenizer="bytes", length=128),
        model=shape,
        training=small_training(300, 16, beta2=0.95),
        evaluation=EvaluationSettings(examples=256),
        encodings=rope_and_pope(),
        ours=ours(shape),
    )


def ablation(size: str) -> Recipe:
    """PoPE without softplus, with ReLU in its place, without delta."""
    base = training(size)
    known = ABLATIONS[size]
    listed = ", ".join(f"{label} {value}" for label, value in known.items())
    return base.model_copy(
        update={
            "name": f"ablation-{size}",
            "description": (
                f"PoPE without softplus, with ReLU, without delta, at {size.upper()} on "
                f"OpenWebText. Needs GPUs. Perplexity in the paper: {listed}"
            ),
            "encodings": VARIANTS,
            "paper": {
                label: {"perplexity": PaperFigure(value=value, source=f"{POPE}, ablations")}
                for label, value in known.items()
            },
        }
    )


def ablation_quick(size: str) -> Recipe:
    """The same variants in a small model."""
    base = training_quick(size)
    return base.model_copy(
        update={
            "name": f"ablation-{size}",
            "description": f"PoPE's parts left out one by one. {base.description}",
            "encodings": VARIANTS,
        }
    )


def delta_start(base: Recipe) -> Recipe:
    """Delta that starts at 0 against delta drawn from [-2 pi, 0], in and beyond its length."""
    small = base.data.length < 1024 if isinstance(base.data, TextData) else False
    lengths = (128, 256, 512, 1280) if small else READ.lengths
    evaluation = READ.model_copy(update={"yarn": "evaluate"})
    if small:
        evaluation = EvaluationSettings(lengths=lengths, tokens=32_768, examples=256)
    return base.model_copy(
        update={
            "name": "ablation-delta-init",
            "description": (
                "PoPE's delta from 0 and from [-2 pi, 0]: the paper says that the first is needed "
                "beyond the training length and the second slightly better within, and gives no "
                f"figures. {base.description.split('. ')[0]}"
            ),
            "encodings": {
                "pope": EncodingChoice(name="pope"),
                "pope-uniform": EncodingChoice(name="pope", options={"delta": "uniform"}),
            },
            "evaluation": evaluation,
            "paper": {},
        }
    )


def zero_shot(size: str) -> Recipe:
    """The six tasks of the PoPE paper with the models of ``openwebtext-SIZE``."""
    rope, pope = ZERO_SHOT[size]
    return training(size).model_copy(
        update={
            "name": f"zero-shot-{size}",
            "trained_by": f"openwebtext-{size}",
            "description": (
                f"LAMBADA, BLiMP, CBT, HellaSwag, PIQA, ARC-Easy with the models of openwebtext-"
                f"{size}. Mean accuracy in the paper: RoPE {rope} %, PoPE {pope} %"
            ),
            "evaluation": EvaluationSettings(tasks=SIX_TASKS, examples=4000),
            "paper": figures(
                f"{POPE}, zero-shot",
                "zero_shot_accuracy",
                rope=round(rope / 100, 4),
                pope=round(pope / 100, 4),
            ),
        }
    )


def zero_shot_quick(size: str) -> Recipe:
    """The tasks but for CBT, ten documents of each, with the small stand-ins."""
    return training_quick(size).model_copy(
        update={
            "name": f"zero-shot-{size}",
            "trained_by": f"openwebtext-{size}",
            "description": (
                f"The tasks but for CBT (whose files are 150 MB), ten documents each, with the "
                f"stand-ins of openwebtext-{size}: that it runs, not what is known"
            ),
            "evaluation": EvaluationSettings(
                tasks=tuple(task for task in SIX_TASKS if task != "cbt"),
                # Documents are longer than the 128 bytes of these models.
                task_max_length=2048,
                task_limit=10,
                examples=256,
            ),
        }
    )


FINETUNED = {
    **rope_and_pope(),
    "yarn": EncodingChoice(name="yarn"),
    "pope-ft": EncodingChoice(name="pope", finetune_from="pope"),
}


def pg19(size: str) -> Recipe:
    """Perplexity on the test books of PG-19 at 1,024 to 10,240 tokens."""
    return training(size).model_copy(
        update={
            "name": f"pg19-{size}",
            "trained_by": f"openwebtext-{size}",
            "description": (
                f"PG-19's test books at 1,024 to 10,240 tokens with the models of openwebtext-"
                f"{size}, and with YaRN and PoPE fine-tuned at 4,096 for 500 steps. The paper has "
                "curves: RoPE rises sharply, YaRN past 4,096, PoPE and PoPE+ft stay flat"
            ),
            "encodings": FINETUNED,
            "evaluation": READ,
            "paper": {},
        }
    )


def pg19_quick(size: str) -> Recipe:
    """The same with the small stand-ins: trained at 128, fine-tuned at 512, read at 1,280."""
    return training_quick(size).model_copy(
        update={
            "name": f"pg19-{size}",
            "trained_by": f"openwebtext-{size}",
            "description": (
                f"Ten times the training length with the stand-ins of openwebtext-{size}, and "
                "with YaRN and PoPE fine-tuned at four times of it: minutes on a CPU"
            ),
            "encodings": FINETUNED,
            "evaluation": EvaluationSettings(
                lengths=(128, 256, 512, 1024, 1280),
                tokens=32_768,
                examples=256,
                yarn="finetune",
                finetune=FinetuneSettings(steps=50, warmup_steps=5, batch_size=8),
            ),
        }
    )


def _presets() -> dict[str, dict[str, Callable[[], Recipe]]]:
    found: dict[str, dict[str, Callable[[], Recipe]]] = {}
    for size in SHAPES:
        found[f"openwebtext-{size}"] = {
            "quick": partial(training_quick, size),
            "paper": partial(training, size),
        }
    for size in ABLATIONS:
        found[f"ablation-{size}"] = {
            "quick": partial(ablation_quick, size),
            "paper": partial(ablation, size),
        }
    found["ablation-delta-init"] = {
        "quick": lambda: delta_start(training_quick("124m")),
        "paper": lambda: delta_start(training("124m")),
    }
    for size in SHAPES:
        found[f"zero-shot-{size}"] = {
            "quick": partial(zero_shot_quick, size),
            "paper": partial(zero_shot, size),
        }
    for size in SHAPES:
        found[f"pg19-{size}"] = {
            "quick": partial(pg19_quick, size),
            "paper": partial(pg19, size),
        }
    return found


PRESETS = _presets()
