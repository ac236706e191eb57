"""What and where apart: point at a character by content, step from it by position."""

from __future__ import annotations

from whatwhere.lab.data.indirect_indexing import IndirectIndexingData
from whatwhere.lab.recipes.schema import (
    EncodingChoice,
    ModelSettings,
    PaperFigure,
    Recipe,
    TrainingSettings,
)
from whatwhere.lab.recipes.shared import ours

SOURCE = "arXiv 2509.10534v3, indirect indexing"

ENCODINGS = {
    "rope": EncodingChoice(name="rope"),
    "pope": EncodingChoice(name="pope", options={"delta": "uniform"}),
    "rope-half": EncodingChoice(name="rope", options={"fraction": 0.5}),
    "alibi-half": EncodingChoice(name="alibi", options={"fraction": 0.5}),
    "learned": EncodingChoice(name="learned"),
    "sinusoidal": EncodingChoice(name="sinusoidal"),
}

SHAPE = ModelSettings(hidden_size=512, num_hidden_layers=8, num_attention_heads=8)
SMALL_SHAPE = ModelSettings(hidden_size=64, num_hidden_layers=3, num_attention_heads=4)

# Accuracy in per cent, mean and spread over three seeds, as the paper prints them.
ACCURACY = {
    "rope": (11.16, 2.45),
    "pope": (94.82, 2.91),
    "rope-half": (28.50, 6.10),
    "alibi-half": (27.35, 10.77),
    "learned": (10.08, 0.19),
    "sinusoidal": (1.90, 0.04),
}


def _ours(model: ModelSettings) -> dict[str, EncodingChoice]:
    # Sequences this short leave PoPE-ID no band of frequencies.
    return {key: value for key, value in ours(model, "uniform").items() if key != "pope-id"}


def quick() -> Recipe:
    """A small variant for a CPU; no paper has figures for it.

    One length of string, shifts of one letter at most, and a high learning rate. Repeating the
    source letter, the answer to a shift of 0, and guessing otherwise gives about 46 %; neither
    encoding gets far beyond with the seeds tried (LOG.md).
    """
    return Recipe(
        name="indirect-indexing",
        description=(
            "Find a letter in a string, step away from it, say what is there: a small variant "
            "for a CPU (strings of 8 of 26 letters, shifts of -1, 0, +1)"
        ),
        data=IndirectIndexingData(
            min_length=8, max_length=8, max_shift=1, alphabet_size=26, test_examples=2000
        ),
        model=SMALL_SHAPE,
        training=TrainingSettings(
            steps=12_000,
            batch_size=64,
            learning_rate=3e-3,
            min_learning_rate=3e-4,
            warmup_steps=200,
            weight_decay=0.01,
            beta2=0.99,
            log_every=100,
            validate_every=1000,
            validation_sequences=1000,
            checkpoint_every=2000,
        ),
        encodings={label: ENCODINGS[label] for label in ("rope", "pope")},
        ours=_ours(SMALL_SHAPE),
    )


def paper() -> Recipe:
    """The indirect-indexing column of the PoPE paper (arXiv 2509.10534), all six encodings."""
    return Recipe(
        name="indirect-indexing",
        description=(
            "The PoPE paper's indirect indexing: strings of 20 to 40 letters, 8 layers x 512, "
            "100,000 steps, three seeds. Needs a GPU; the paper: RoPE 11.16 %, PoPE 94.82 %"
        ),
        data=IndirectIndexingData(),
        model=SHAPE,
        training=TrainingSettings(
            steps=100_000,
            batch_size=64,
            learning_rate=2e-4,
            min_learning_rate=2e-5,
            warmup_steps=4000,
            weight_decay=0.01,
            beta2=0.99,
            compile="reduce-overhead",
            log_every=100,
            validate_every=2000,
            validation_sequences=2048,
            checkpoint_every=5000,
        ),
        encodings=ENCODINGS,
        ours=_ours(SHAPE),
        seeds=(0, 1, 2),
        paper={
            label: {
                "accuracy": PaperFigure(
                    value=round(mean / 100, 4), spread=round(spread / 100, 4), source=SOURCE
                )
            }
            for label, (mean, spread) in ACCURACY.items()
        },
    )


PRESETS = {"quick": quick, "paper": paper}
