"""The settings of an experiment, typed: what a recipe holds and a command line may override."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from whatwhere.lab.data.catalogue import check_name
from whatwhere.lab.data.indirect_indexing import IndirectIndexingData
from whatwhere.lab.data.prepared import TokensData
from whatwhere.lab.data.text import TextData

LABEL = r"^[a-z0-9][a-z0-9.-]*$"
"""Names that become folders: no separators, no leading dot, so that they stay where they are."""

Label = Annotated[str, Field(pattern=LABEL, max_length=64)]
Option = bool | int | float | str | None


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EncodingChoice(Settings):
    """A position encoding by its name in `whatwhere.ENCODINGS`, and its options."""

    name: str
    options: dict[str, Option | list[Option]] = {}
    qk_norm: bool | None = None
    """Overrides `ModelSettings.qk_norm` where it is not None."""
    finetune_from: Label | None = None
    """Label of the encoding whose trained run this one is fine-tuned from at a longer length."""

    @field_validator("options")
    @classmethod
    def _read_floats(
        cls, options: dict[str, Option | list[Option]]
    ) -> dict[str, Option | list[Option]]:
        # YAML 1.1 reads 1e4 as a string: it wants a dot in a number with an exponent.
        return {key: _as_number(value) for key, value in options.items()}


class ModelSettings(Settings):
    """Shape of the decoder; names are those of `whatwhere.models.WhatWhereConfig`."""

    hidden_size: int = Field(default=128, ge=1, description="width of the residual stream")
    num_hidden_layers: int = Field(default=4, ge=1, description="layers")
    num_attention_heads: int = Field(default=4, ge=1, description="query heads")
    num_key_value_heads: int | None = Field(
        default=None, ge=1, description="key and value heads; None is as many as query heads"
    )
    head_dim: int | None = Field(
        default=None, ge=1, description="channels of a head; None is hidden size / query heads"
    )
    intermediate_size: int | None = Field(
        default=None,
        ge=1,
        description="width inside the MLP; None is 4 (gelu) or 8/3 (swiglu) times",
    )
    mlp: Literal["gelu", "swiglu"] = Field(default="gelu", description="kind of MLP")
    tie_word_embeddings: bool = Field(
        default=True, description="one matrix for input and output tokens"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout probability")
    qk_norm: bool = Field(default=False, description="RMS-normalise queries and keys of each head")
    rms_norm_eps: float = Field(default=1e-5, gt=0, description="epsilon of RMSNorm")
    initializer_range: float = Field(
        default=0.02, gt=0, description="deviation of initial weights"
    )
    sliding_window: int | None = Field(
        default=None, ge=1, description="tokens each query sees; None is all before it"
    )
    attention_backend: str = Field(
        default="auto", description="a name in whatwhere.BACKENDS, or auto"
    )


class TrainingSettings(Settings):
    """How a model is trained: AdamW, linear warm-up, cosine to a minimum rate."""

    steps: int = Field(default=1000, ge=1, description="optimizer steps")
    batch_size: int = Field(default=32, ge=1, description="sequences a step, over all devices")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="parts a step's batch is computed in, to save memory"
    )
    learning_rate: float = Field(default=2e-3, gt=0, description="highest learning rate")
    min_learning_rate: float = Field(
        default=2e-4, ge=0, description="learning rate of the last step"
    )
    warmup_steps: int = Field(default=50, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        description="decoupled weight decay of matrices (never of delta or norms)",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's beta1")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="AdamW's beta2")
    grad_clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    precision: Literal["auto", "no", "bf16"] = Field(
        default="auto", description="autocast: auto is bf16 on a GPU and no (float32) elsewhere"
    )
    compile: Literal["no", "default", "reduce-overhead"] = Field(
        default="no", description="torch.compile and its mode; reduce-overhead uses CUDA graphs"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="with several processes: ddp keeps a whole model on each, fsdp (FSDP2) shards "
        "weights, gradients and optimizer among them",
    )
    context_parallel: int = Field(
        default=1, ge=1, description="processes that share the positions of each sequence"
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="keep one activation a layer and compute the rest again: less memory",
    )
    deterministic: bool = Field(
        default=True, description="deterministic GPU kernels, which exact resumption needs"
    )
    log_every: int = Field(default=10, ge=1, description="steps between rows of log.jsonl")
    validate_every: int = Field(default=200, ge=1, description="steps between validation losses")
    validation_sequences: int = Field(
        default=256, ge=1, description="sequences of a validation loss"
    )
    checkpoint_every: int = Field(default=200, ge=1, description="steps between checkpoints")

    @model_validator(mode="after")
    def _check(self) -> TrainingSettings:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} exceeds "
                f"learning_rate={self.learning_rate}"
            )
        return self


class FinetuneSettings(Settings):
    """Fine-tuning of a RoPE run as YaRN at a longer length (arXiv 2509.10534: 500 steps)."""

    factor: int = Field(default=4, ge=1, description="new length over training length")
    steps: int = Field(default=500, ge=1, description="optimizer steps")
    warmup_steps: int = Field(default=20, ge=0, description="steps of linear warm-up")
    learning_rate: float = Field(default=6e-5, gt=0, description="constant learning rate")
    batch_size: int = Field(default=64, ge=1, description="sequences a step")


class EvaluationSettings(Settings):
    """What is measured once a model is trained."""

    lengths: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        default=(), description="lengths in tokens at which the loss on text is measured"
    )
    dataset: str | None = Field(
        default=None,
        description="data set whose test split these lengths are measured on; None is the text "
        "that the task keeps for validation, or that of evaluation.paths",
    )
    paths: tuple[str, ...] = Field(
        default=(), description="files of that data set, or any text to measure lengths on"
    )
    tokens: int = Field(
        default=65536, ge=1, description="tokens of text the loss at each length is measured on"
    )
    examples: int | None = Field(
        default=None, ge=1, description="sequences of a final validation or test loss; None is all"
    )
    yarn: Literal["evaluate", "finetune"] = Field(
        default="evaluate",
        description="yarn is the rope run: evaluated with factor = length / training length, "
        "or fine-tuned with one factor",
    )
    finetune: FinetuneSettings = FinetuneSettings()
    tasks: tuple[str, ...] = Field(
        default=(), description="tasks of the harness, as `whatwhere evaluate --tasks` takes them"
    )
    task_lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="prompt lengths of tasks that make their prompts (RULER)"
    )
    task_data: str | None = Field(
        default=None,
        description="folder of the tasks' files; None is $WHATWHERE_DATA, else the hub",
    )
    task_max_length: int | None = Field(
        default=None,
        ge=2,
        description="tokens that the model reads in tasks; None is the training length, or the "
        "longest of evaluation.task_lengths",
    )
    task_limit: int | None = Field(
        default=None, ge=1, description="documents of each task; None is all"
    )

    @field_validator("dataset")
    @classmethod
    def _check_dataset(cls, value: str | None) -> str | None:
        if value is not None:
            check_name(value)
        return value


class PaperFigure(Settings):
    """A result that a paper prints, in the unit of `results.csv`."""

    value: float
    spread: float | None = None
    source: str


Data = Annotated[TextData | TokensData | IndirectIndexingData, Field(discriminator="task")]


class Recipe(Settings):
    """An experiment: models that differ in their position encoding and in nothing else."""

    name: Annotated[Label, tyro.conf.Suppress]
    preset: Annotated[Label | None, tyro.conf.Suppress] = None
    trained_by: Annotated[Label | None, tyro.conf.Suppress] = None
    description: Annotated[str, tyro.conf.Suppress] = ""
    data: Data
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    encodings: Annotated[dict[Label, EncodingChoice], tyro.conf.Suppress]
    ours: Annotated[dict[Label, EncodingChoice], tyro.conf.Suppress] = {}
    """Encodings that no paper has for this task: trained where `--encodings` names them."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        default=(0,), description="one run of each encoding for each"
    )
    paper: Annotated[dict[Label, dict[str, PaperFigure]], tyro.conf.Suppress] = {}

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if not self.encodings or not self.seeds:
            raise ValueError("a recipe needs at least one encoding and one seed")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds repeat: {' '.join(map(str, self.seeds))}")
        known = {**self.ours, **self.encodings}
        for label, choice in known.items():
            source = choice.finetune_from
            if source is None:
                continue
            if source not in known:
                raise ValueError(
                    f"encoding {label!r}: finetune_from={source!r} is none of the recipe's "
                    f"encodings {', '.join(known)}"
                )
            if source == label or known[source].finetune_from or known[source].name == "yarn":
                raise ValueError(
                    f"encoding {label!r}: finetune_from={source!r} is not trained from the start"
                )
        lengths = self.evaluation.lengths
        if len(set(lengths)) < len(lengths):
            raise ValueError(f"evaluation.lengths repeat: {' '.join(map(str, lengths))}")
        if isinstance(self.data, IndirectIndexingData) and lengths:
            raise ValueError("evaluation.lengths: only a text task has other lengths")
        return self


def _as_number(value: Option | list[Option]) -> Option | list[Option]:
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value
