"""Music as tokens: JSB chorales and MAESTRO (PoPE paper, arXiv 2509.10534)."""

from __future__ import annotations

from whatwhere.lab.data.prepared import TokensData
from whatwhere.lab.recipes.schema import ModelSettings, Recipe, TrainingSettings
from whatwhere.lab.recipes.shared import (
    LONG,
    POPE,
    SMALL,
    figures,
    ours,
    rope_and_pope,
    small_training,
)

JSB_SHAPE = ModelSettings(hidden_size=256, num_hidden_layers=6, num_attention_heads=8, dropout=0.2)
MAESTRO_SHAPE = ModelSettings(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=8, dropout=0.1
)


def jsb() -> Recipe:
    """The JSB column: 229 / 76 / 77 chorales, whole, 3,000 steps."""
    return Recipe(
        name="jsb",
        description=(
            "Bach's chorales, four voices in 16th notes, at the PoPE paper's shape: 6 layers x "
            "256, length 2048, 3,000 steps. Test loss in the paper: RoPE 0.5081, PoPE 0.4889"
        ),
        data=TokensData(dataset="jsb", length=2048),
        model=JSB_SHAPE,
        training=TrainingSettings(
            steps=3000,
            batch_size=4,
            learning_rate=6e-4,
            min_learning_rate=6e-5,
            warmup_steps=10,
            weight_decay=0.01,
            beta2=0.99,
            validate_every=250,
            checkpoint_every=250,
        ),
        encodings=rope_and_pope("uniform"),
        ours=ours(JSB_SHAPE, "uniform"),
        seeds=(0, 1, 2),
        paper=figures(f"{POPE}, JSB", "test_loss", rope=0.5081, pope=0.4889),
    )


def jsb_quick() -> Recipe:
    """A model that a CPU trains in two minutes; no paper has figures for it."""
    return Recipe(
        name="jsb",
        description=(
            "Bach's chorales with a small model (4 layers x 128, length 512, 400 steps): minutes "
            "on a CPU, no figures of a paper"
        ),
        data=TokensData(dataset="jsb", length=512),
        model=SMALL,
        training=small_training(400, 4, validation_sequences=64),
        encodings=rope_and_pope("uniform"),
        ours=ours(SMALL, "uniform"),
    )


def maestro() -> Recipe:
    """The MAESTRO column: piano performances as REMI tokens, 60,000 steps."""
    return Recipe(
        name="maestro",
        description=(
            "MAESTRO v3 piano performances as 328 REMI tokens at the PoPE paper's shape: 6 layers "
            "x 384, length 2048, 60,000 steps. Test loss in the paper: RoPE 1.501, PoPE 1.486"
        ),
        data=TokensData(dataset="maestro", length=2048, transpose=3),
        model=MAESTRO_SHAPE,
        training=TrainingSettings(
            steps=60_000,
            batch_size=16,
            learning_rate=6e-4,
            min_learning_rate=6e-5,
            warmup_steps=500,
            weight_decay=0.01,
            beta2=0.99,
            **LONG,
        ),
        encodings=rope_and_pope("uniform"),
        ours=ours(MAESTRO_SHAPE, "uniform"),
        paper=figures(f"{POPE}, MAESTRO", "test_loss", rope=1.501, pope=1.486),
    )


def maestro_quick() -> Recipe:
    """A model that a CPU trains in minutes, on whatever MIDI files there are."""
    return Recipe(
        name="maestro",
        description=(
            "Piano performances with a small model (4 layers x 128, length 512, 400 steps): "
            "minutes on a CPU, no figures of a paper"
        ),
        data=TokensData(dataset="maestro", length=512, transpose=3),
        model=SMALL,
        training=small_training(400, 4, validation_sequences=64),
        encodings=rope_and_pope("uniform"),
        ours=ours(SMALL, "uniform"),
    )


JSB = {"quick": jsb_quick, "paper": jsb}
MAESTRO = {"quick": maestro_quick, "paper": maestro}
