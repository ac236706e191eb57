"""Seven encodings read books several times as long as what they were trained on.

What the PoPE paper's figure on PG-19 (arXiv 2509.10534) and the RoPE-ID paper's criteria (arXiv
2603.18017) ask, at a size that a CPU trains: no paper has these figures.
"""

from __future__ import annotations

from whatwhere.lab.data.text import TextData
from whatwhere.lab.recipes.schema import (
    EncodingChoice,
    EvaluationSettings,
    Recipe,
)
from whatwhere.lab.recipes.shared import (
    SMALL,
    ours,
    small_training,
)

ENCODINGS = {
    "rope": EncodingChoice(name="rope"),
    "yarn": EncodingChoice(name="yarn"),
    "rope-id": EncodingChoice(name="rope-id"),
    "pope": EncodingChoice(name="pope"),
    "pope-id": EncodingChoice(name="pope-id"),
    # 3.2 of a head's 32 channels, rounded to two pairs of frequencies 1 and 0.01.
    "partial-rope-10": EncodingChoice(name="rope", options={"fraction": 0.1}),
    "nope": EncodingChoice(name="nope"),
}


def quick() -> Recipe:
    """Bytes, trained at 256, read at 256 to 2,560; about five minutes a run on one core."""
    return Recipe(
        name="books",
        description=(
            "Loss on books against length, trained at 256 bytes and read up to ten times as long: "
            "seven encodings, three seeds. Give books with --text. Sized for a CPU; in no paper"
        ),
        data=TextData(tokenizer="bytes", length=256),
        model=SMALL,
        training=small_training(600, 16, warmup_steps=30, beta2=0.99),
        evaluation=EvaluationSettings(
            lengths=(256, 512, 1024, 1536, 2048, 2560), tokens=65536, examples=256
        ),
        encodings=ENCODINGS,
        ours={key: value for key, value in ours(SMALL).items() if key not in ENCODINGS},
        seeds=(0, 1, 2),
    )


PRESETS = {"quick": quick}
