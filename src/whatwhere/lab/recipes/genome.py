"""The human genome as 6-mers (PoPE paper, arXiv 2509.10534)."""

from __future__ import annotations

from whatwhere.lab.data.prepared import TokensData
from whatwhere.lab.recipes.schema import (
    ModelSettings,
    Recipe,
    TrainingSettings,
)
from whatwhere.lab.recipes.shared import (
    LONG,
    POPE,
    SMALL,
    figures,
    ours,
    rope_and_pope,
    small_training,
)

SHAPE = ModelSettings(hidden_size=1024, num_hidden_layers=16, num_attention_heads=16, dropout=0.1)


def paper() -> Recipe:
    """The genome column: GRCh38, windows of 1,000 tokens, 100,000 steps."""
    return Recipe(
        name="genome",
        description=(
            "GRCh38 as 6-mers at the PoPE paper's shape: 16 layers x 1024, length 1000, 100,000 "
            "steps. Needs a GPU. Test loss in the paper: RoPE 4.217, PoPE 4.152"
        ),
        data=TokensData(dataset="genome", length=1000),
        model=SHAPE,
        training=TrainingSettings(
            steps=100_000,
            batch_size=64,
            learning_rate=2.5e-4,
            min_learning_rate=2.5e-5,
            warmup_steps=4000,
            weight_decay=0.01,
            beta2=0.999,
            **LONG,
        ),
        encodings=rope_and_pope("uniform"),
        ours=ours(SHAPE, "uniform"),
        paper=figures(f"{POPE}, human genome", "test_loss", rope=4.217, pope=4.152),
    )


def quick() -> Recipe:
    """A small model on a sample of a megabase; its losses are not the paper's."""
    return Recipe(
        name="genome",
        description=(
            "A sample of the genome with a small model (4 layers x 128, length 250, 300 steps): "
            "minutes on a CPU, no figures of a paper"
        ),
        data=TokensData(dataset="genome", length=250),
        model=SMALL,
        training=small_training(300, 8, validation_sequences=64),
        encodings=rope_and_pope("uniform"),
        ours=ours(SMALL, "uniform"),
    )


PRESETS = {"quick": quick, "paper": paper}
