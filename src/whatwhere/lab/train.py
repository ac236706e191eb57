"""Training one run: the model that its config asks for, through the loop of `lab.loop`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from whatwhere.lab.data import Task
from whatwhere.lab.loop import Interrupted, learning_rate, parameter_groups, train_model
from whatwhere.lab.recipes.schema import EncodingChoice, ModelSettings
from whatwhere.lab.runs import Run

__all__ = ["Interrupted", "build_model", "learning_rate", "parameter_groups", "train"]


def build_model(shape: ModelSettings, task: Task, choice: EncodingChoice, seed: int) -> Any:
    """A decoder for a task, with weights drawn from a seed.

    Weights that do not belong to the encoding are the same for every encoding, since encodings
    draw theirs from random numbers of their own (`whatwhere.models.layer_encodings`).

    Raises:
        ValueError: If the encoding or the shape is impossible.
    """
    from whatwhere.models import WhatWhereConfig, WhatWhereForCausalLM

    set_seed(seed)
    config = WhatWhereConfig(
        **shape.model_dump(),
        vocab_size=task.vocab_size,
        max_position_embeddings=task.length,
        position_encoding=choice.name,
        position_encoding_options=dict(choice.options),
    )
    return WhatWhereForCausalLM(config)


def train(run: Run, task: Task, initial: Path | None = None) -> None:
    """Train a run to its end, from its newest checkpoint if it has one.

    Writes `log.jsonl`, TensorBoard logs, checkpoints, and at the end `model/` and `done.json`.

    Args:
        run: The run; its folder must be claimed (`runs.claim`).
        task: Its data.
        initial: Folder of a model of ours to fine-tune, given the run's encoding; by default
            weights are drawn from the run's seed.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM, once a checkpoint is saved.
        DiskFullError: If there is no space left.
        ValueError: If the batch does not divide among the processes.
    """
    model = _starting_model(run, task, initial)
    train_model(model, task, run, run.config.training, run.config.seed)


def _starting_model(run: Run, task: Task, initial: Path | None) -> Any:
    config = run.config
    if initial is None:
        return build_model(config.model, task, config.encoding, config.seed)
    from whatwhere.models import WhatWhereForCausalLM

    model = WhatWhereForCausalLM.from_pretrained(initial, local_files_only=True)
    model.set_position_encoding(config.encoding.name, **config.encoding.options)
    return model
