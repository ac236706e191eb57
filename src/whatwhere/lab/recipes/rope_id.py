"""RoPE-ID and its baselines: RULER and LongBench beyond the training length (arXiv 2603.18017)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from whatwhere.lab.data.prepared import TokensData
from whatwhere.lab.data.text import TextData
from whatwhere.lab.harness.paper import LONGBENCH as LONGBENCH_TASKS
from whatwhere.lab.recipes.schema import (
    EncodingChoice,
    EvaluationSettings,
    ModelSettings,
    PaperFigure,
    Recipe,
    TrainingSettings,
)
from whatwhere.lab.recipes.shared import (
    LLAMA_1B,
    LLAMA_3B,
    ROPE_ID,
    ours,
    small_training,
)

SHAPES = {"1b": LLAMA_1B, "3b": LLAMA_3B}
SMALL_SHAPES = {
    "1b": ModelSettings(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        mlp="swiglu",
        tie_word_embeddings=False,
    ),
    "3b": ModelSettings(
        hidden_size=160,
        num_hidden_layers=5,
        num_attention_heads=5,
        num_key_value_heads=1,
        mlp="swiglu",
        tie_word_embeddings=False,
    ),
}

ENCODINGS = {
    "rope": EncodingChoice(name="rope"),
    "rope-high": EncodingChoice(name="rope-high"),
    "rope-half": EncodingChoice(name="rope", options={"fraction": 0.5}),
    "yarn": EncodingChoice(name="yarn"),
    "rope-id": EncodingChoice(name="rope-id"),
    "rope-id-no-temperature": EncodingChoice(name="rope-id", options={"temperature": False}),
}

# Mean accuracy in %, in the paper's order: RoPE, HighFreq, HalfRoPE, YaRN, RoPE-ID.
LABELS = ("rope", "rope-high", "rope-half", "yarn", "rope-id")
RULER = {
    "1b": {
        4096: (39.72, 16.04, 43.07, 40.24, 39.15),
        8192: (0.01, 7.60, 0.14, 35.55, 35.64),
        16384: (0.03, 2.37, 0.0, 30.25, 30.83),
    },
    "3b": {
        8192: (0.14, 14.31, 0.4, 45.09, 43.39),
        16384: (0.01, 5.14, 0.03, 40.14, 42.00),
    },
}
LONGBENCH = {
    "1b": (8.73, 11.04, 8.86, 14.09, 15.80),
    "3b": (10.42, 13.78, 10.62, 19.63, 17.94),
}


def paper(size: str) -> Recipe:
    """Llama-style models on 21B tokens of Dolma, read at up to four times their length."""
    return Recipe(
        name=f"rope-id-{size}",
        description=(
            f"{size.upper()} Llama-style models on 21B tokens of Dolma at 4,096, then RULER at "
            "4,096 to 16,384 and the mean of LongBench's 14 English tasks. Needs a cluster. The "
            "paper leaves batch, rate and schedule open: 128 x 4,096 tokens, 3e-4 to 3e-5, 40,000 "
            "steps are chosen here"
        ),
        data=TokensData(dataset="dolma", tokenizer="meta-llama/Meta-Llama-3-8B", length=4096),
        model=SHAPES[size],
        training=TrainingSettings(
            steps=40_000,
            batch_size=128,
            learning_rate=3e-4,
            min_learning_rate=3e-5,
            warmup_steps=2000,
            weight_decay=0.1,
            beta2=0.95,
            compile="default",
            parallel="fsdp",
            log_every=50,
            validate_every=2000,
            checkpoint_every=1000,
        ),
        evaluation=EvaluationSettings(
            lengths=(4096, 8192, 16384),
            tokens=2**20,
            examples=1000,
            tasks=("ruler", *LONGBENCH_TASKS),
            task_lengths=(4096, 8192, 16384),
        ),
        encodings=ENCODINGS,
        ours=ours(SHAPES[size]),
        paper={label: _figures(size, place) for place, label in enumerate(LABELS)},
    )


def quick(size: str) -> Recipe:
    """Small models on bytes of any text, by their loss: RULER has no prompts so short."""
    shape = SMALL_SHAPES[size]
    return Recipe(
        name=f"rope-id-{size}",
        description=(
            f"A stand-in for {size.upper()} ({shape.num_hidden_layers} layers x "
            f"{shape.hidden_size}) on bytes of --text, else of Python's own source, by its loss "
            "at up to four times its length: minutes on a CPU"
        ),
        data=TextData(tokenizer="bytes", length=256),
        model=shape,
        training=small_training(300, 8, beta2=0.95),
        evaluation=EvaluationSettings(lengths=(256, 512, 1024), tokens=32_768, examples=128),
        encodings=ENCODINGS,
        ours=ours(shape),
    )


def _figures(size: str, place: int) -> dict[str, PaperFigure]:
    found = {
        f"ruler_accuracy@{length}": PaperFigure(
            value=round(values[place] / 100, 6), source=f"{ROPE_ID}, RULER"
        )
        for length, values in RULER[size].items()
    }
    found["longbench_score@16384"] = PaperFigure(
        value=round(LONGBENCH[size][place] / 100, 6), source=f"{ROPE_ID}, LongBench"
    )
    return found


PRESETS: dict[str, dict[str, Callable[[], Recipe]]] = {
    f"rope-id-{size}": {"quick": partial(quick, size), "paper": partial(paper, size)}
    for size in SHAPES
}
