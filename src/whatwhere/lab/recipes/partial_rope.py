"""Partial RoPE: fractions x lengths x shapes x data (arXiv 2603.11611)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from whatwhere.lab.data.prepared import TokensData
from whatwhere.lab.data.text import TextData
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
    LLAMA_8B,
    PARTIAL_ROPE,
    PYTHIA_1B,
    SMALL,
    ours,
    partial_rope,
    small_training,
)

SHAPES = {"pythia-1b": PYTHIA_1B, "llama-1b": LLAMA_1B, "llama-8b": LLAMA_8B}
TOKENIZERS = {
    "pythia-1b": "EleutherAI/pythia-1b",
    "llama-1b": "meta-llama/Llama-3.2-1B",
    "llama-8b": "meta-llama/Meta-Llama-3-8B",
}
DATA = {"": "fineweb", "-edu": "fineweb-edu"}
LENGTHS = (1024, 2048, 4096, 8192)


def encodings(model: ModelSettings) -> dict[str, EncodingChoice]:
    """None to all of each head rotated, and the ends with QK-Norm.

    A little rotation, or QK-Norm, steadies what has no encoding, says the paper.
    """
    return {
        "nope": EncodingChoice(name="nope"),
        **partial_rope(model),
        "rope": EncodingChoice(name="rope"),
        "nope-qk-norm": EncodingChoice(name="nope", qk_norm=True),
        "rope-qk-norm": EncodingChoice(name="rope", qk_norm=True),
    }


# acc_norm in %, Llama 1B on FineWeb at 2,048.
PIQA = {"rope": 72.58, "partial-rope-10": 73.12, "partial-rope-4": 71.06, "nope": 70.67}


def paper(shape: str, edition: str, length: int) -> Recipe:
    """12,000 steps; loss, loss spikes, bytes of position tables, PIQA."""
    known = (shape, edition, length) == ("llama-1b", "", 2048)
    return Recipe(
        name=f"partial-rope-{shape}{edition}-{length}",
        description=(
            f"{shape} on {DATA[edition]} at length {length}: 0 to 100 % of each head rotated, "
            "with and without QK-Norm, 12,000 steps. Needs a cluster. The paper leaves the batch "
            "open: 2^19 tokens are chosen here"
            + (". Of heads of 64, 1 % is one pair, as 4 %" if shape == "llama-1b" else "")
            + (". PIQA acc_norm in the paper: 100 % 72.58, 10 % 73.12" if known else "")
        ),
        data=TokensData(dataset=DATA[edition], tokenizer=TOKENIZERS[shape], length=length),
        model=SHAPES[shape],
        training=TrainingSettings(
            steps=12_000,
            batch_size=2**19 // length,
            learning_rate=4e-4,
            min_learning_rate=4e-5,
            warmup_steps=600,
            weight_decay=0.1,
            beta2=0.95,
            compile="default",
            parallel="fsdp",
            log_every=10,
            validate_every=1000,
            checkpoint_every=500,
        ),
        evaluation=EvaluationSettings(
            lengths=(length,), tokens=2**20, examples=1000, tasks=("piqa",)
        ),
        encodings=encodings(SHAPES[shape]),
        ours=ours(SHAPES[shape]),
        paper={
            label: {
                "piqa_acc_norm": PaperFigure(
                    value=round(value / 100, 4), source=f"{PARTIAL_ROPE}, zero-shot"
                )
            }
            for label, value in PIQA.items()
        }
        if known
        else {},
    )


def quick(shape: str, edition: str, length: int) -> Recipe:
    """Small models on bytes; the lengths stand in their order: an eighth of the paper's."""
    short = length // 8
    model = SMALL
    if shape.startswith("llama"):
        model = SMALL.model_copy(
            update={"num_key_value_heads": 2, "mlp": "swiglu", "tie_word_embeddings": False}
        )
    return Recipe(
        name=f"partial-rope-{shape}{edition}-{length}",
        description=(
            f"A stand-in for {shape} (4 layers x 128) at length {short} on bytes of --text, else "
            "of Python's own source: minutes on a CPU, no figures of a paper. Of heads of 32, 1 % "
            "and 4 % are one pair"
        ),
        data=TextData(tokenizer="bytes", length=short),
        model=model,
        training=small_training(
            200, max(2, 2048 // short), warmup_steps=10, weight_decay=0.1, beta2=0.95
        ),
        evaluation=EvaluationSettings(lengths=(short,), tokens=32_768, examples=64),
        encodings=encodings(model),
        ours=ours(model),
    )


PRESETS: dict[str, dict[str, Callable[[], Recipe]]] = {
    f"partial-rope-{shape}{edition}-{length}": {
        "quick": partial(quick, shape, edition, length),
        "paper": partial(paper, shape, edition, length),
    }
    for shape in SHAPES
    for edition in DATA
    for length in LENGTHS
}
