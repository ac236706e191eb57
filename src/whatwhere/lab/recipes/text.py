"""Which encodings survive beyond their training length, on real text."""

from __future__ import annotations

from whatwhere.lab.data.text import TextData
from whatwhere.lab.recipes.schema import (
    EncodingChoice,
    EvaluationSettings,
    ModelSettings,
    Recipe,
    TrainingSettings,
)
from whatwhere.lab.recipes.shared import (
    LONG,
    SMALL,
    ours,
    small_training,
)

ENCODINGS = {name: EncodingChoice(name=name) for name in ("rope", "yarn", "rope-id", "pope")}


def quick() -> Recipe:
    """Bytes of the embedded text and a model that two CPU cores train in minutes."""
    return Recipe(
        name="text",
        description=(
            "Loss against length on real text: small decoders, trained on short windows, read "
            "windows up to several times as long. Sized for a CPU"
        ),
        data=TextData(tokenizer="bytes", length=128),
        model=SMALL,
        training=small_training(1000, 32, warmup_steps=50, beta2=0.99),
        evaluation=EvaluationSettings(lengths=(128, 256, 512, 1280), tokens=65536, examples=512),
        encodings=ENCODINGS,
        ours=ours(SMALL),
    )


def paper() -> Recipe:
    """The 124M column of the PoPE paper (arXiv 2509.10534) on text of the user's own."""
    return Recipe(
        name="text",
        description=(
            "The PoPE paper's 124M setting (length 1024, GPT-2 tokens, 100,000 steps). Needs a "
            "GPU. The paper's own text is OpenWebText, so that its figures (perplexity 21.55 "
            "RoPE, 21.33 PoPE) are comparable on that alone"
        ),
        data=TextData(tokenizer="gpt2", length=1024),
        model=ModelSettings(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
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
        evaluation=EvaluationSettings(
            lengths=(1024, 2048, 4096, 6144, 8192, 10240), tokens=2**20, yarn="finetune"
        ),
        encodings=ENCODINGS,
        ours=ours(ModelSettings(hidden_size=768, num_attention_heads=12)),
    )


PRESETS = {"quick": quick, "paper": paper}
