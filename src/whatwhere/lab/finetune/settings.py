"""How a model is fine-tuned; the defaults are the PoPE paper's."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from whatwhere.lab.recipes.schema import FinetuneSettings, TrainingSettings

# Activations of one forward and backward pass are kept for so many tokens, and logits several
# times over: half of what an evaluation passes at once.
MOST_TOKENS = 8192


class TuningSettings(FinetuneSettings):
    """Fine-tuning on longer windows (arXiv 2509.10534, length extrapolation).

    Steps, warm-up, batch, rate and factor are those of the paper's PoPE+ft and YaRN; AdamW's
    settings those that its models of text were trained with. The paper names no beta1.
    """

    length: int | None = Field(
        default=None, ge=2, description="tokens in a window; None is factor x training length"
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="of matrices (never of delta or norms)"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's beta1")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's beta2")
    grad_clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    delta_lr: float = Field(
        default=1.0, gt=0, description="learning rate of PoPE's delta over that of all else"
    )
    precision: Literal["auto", "no", "bf16"] = Field(
        default="auto", description="autocast: auto is bf16 on a GPU and no (float32) elsewhere"
    )
    accumulate: int | None = Field(
        default=None,
        ge=1,
        description="parts a step's batch is computed in; None is as many as keep a part within "
        f"{MOST_TOKENS} tokens",
    )
    checkpointing: bool = Field(
        default=False,
        description="keep one activation a layer and compute the rest again: less memory",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of batches and dropout")
    validation_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="last part of each file, kept for validation"
    )
    validate_every: int = Field(default=100, ge=1, description="steps between validation losses")
    validation_sequences: int = Field(default=16, ge=1, description="windows of each of these")
    lengths: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        default=(),
        description="windows whose loss is measured before and after; none is 1, 2 and 4 times "
        "the training length, and the new one",
    )
    tokens: int = Field(default=2**16, ge=2, description="tokens that each is measured on")
    log_every: int = Field(default=10, ge=1, description="steps between rows of log.jsonl")
    save_every: int = Field(default=100, ge=1, description="steps between checkpoints")

    def training(self, length: int, vocab_size: int) -> TrainingSettings:
        """What the training loop takes.

        Args:
            length: Tokens in a window.
            vocab_size: Of the model, whose logits take memory, too.

        Raises:
            ValueError: If the batch does not divide into `accumulate` parts.
        """
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if torch.cuda.is_available() else "no"
        return TrainingSettings(
            steps=self.steps,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulate or self._parts(length, vocab_size),
            learning_rate=self.learning_rate,
            min_learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            beta1=self.beta1,
            beta2=self.beta2,
            grad_clip=self.grad_clip,
            precision=precision,
            log_every=self.log_every,
            validate_every=self.validate_every,
            validation_sequences=self.validation_sequences,
            checkpoint_every=self.save_every,
        )

    def _parts(self, length: int, vocab_size: int) -> int:
        # The fewest equal parts that are small enough; in the end one row each.
        from whatwhere.lab.evaluate import rows_for  # help does not wait for transformers

        rows = min(max(1, MOST_TOKENS // length), rows_for(2 * length, vocab_size))
        fits = (n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0)
        return next(n for n in fits if self.batch_size // n <= rows)
