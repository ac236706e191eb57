"""`whatwhere finetune` on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from whatwhere.lab.errors import user_errors
from whatwhere.lab.finetune.settings import TuningSettings
from whatwhere.lab.process import is_main_process, main_process_first

if TYPE_CHECKING:
    import pandas as pd

    from whatwhere.lab.finetune.tuning import Tuning


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a causal language model on longer windows of a text.

    The defaults are the PoPE paper's: 500 steps at four times the training length. The same
    command again goes on with what was stopped.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """folder of a Hugging Face causal language model with its tokenizer, converted or not, or of
    a run of ours"""
    text: tuple[str, ...]
    """UTF-8 files, folders or patterns to train on"""
    output: Path
    """folder for model/, log.jsonl, loss_by_length.csv and figures"""
    settings: Annotated[TuningSettings, tyro.conf.arg(name="")] = field(
        default_factory=TuningSettings
    )
    validation: tuple[str, ...] = ()
    """validation text; none is the last part of each file of --text"""

    def run(self) -> None:
        """Fine-tune."""
        from whatwhere.lab.finetune.tuning import finetune, prepare

        with user_errors(), main_process_first():
            tuning = prepare(self.folder, self.text, self.output, self.settings, self.validation)
            model = None if tuning.trained else tuning.load_model()
        if is_main_process():
            for line in announcement(tuning):
                Console().print(line, highlight=False, soft_wrap=True)
        losses = finetune(tuning, model)
        if is_main_process():
            Console().print(table(losses, tuning))
            for path in sorted(tuning.folder.glob("*.png")):
                print(path)
            print(f"model: {tuning.model}")


def announcement(tuning: Tuning) -> list[str]:
    """What is going to be done, for people."""
    training, task = tuning.training, tuning.task
    parts = training.gradient_accumulation_steps
    return [
        f"{tuning.subject.name}: {tuning.encoding}; {training.steps} steps of "
        f"{training.batch_size} x {task.length} tokens in {parts} part{'s' * (parts > 1)}, "
        f"learning rate {training.learning_rate:g} after {training.warmup_steps} steps; "
        f"{len(task.train_tokens):,} tokens to train on, {len(task.validation_tokens):,} to "
        f"validate; folder: {tuning.folder}",
        *tuning.notes,
    ]


def table(losses: pd.DataFrame, tuning: Tuning) -> Table:
    """Loss at each length, before and after, to print."""
    shown = Table(title=f"loss by length, {tuning.subject.unit}", title_justify="left")
    for name in ("length", "windows", "before", "after"):
        shown.add_column(name, justify="right")
    marks = {tuning.subject.train_length: " (training)", tuning.task.length: " (fine-tuning)"}
    for length in sorted(set(losses["length"])):
        same = losses[losses["length"] == length].set_index("when")
        cells = (f"{same['loss'][when]:.4f}" for when in ("before", "after"))
        count = str(same["windows"].iloc[0])
        shown.add_row(f"{length}{marks.get(length, '')}", count, *cells)
    return shown
