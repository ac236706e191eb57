"""One fine-tuning: checked before anything is written, trained, measured before and after."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from whatwhere.analysis.layers import table_length
from whatwhere.lab import parallel, runs, storage
from whatwhere.lab.data import TextData, TextTask
from whatwhere.lab.environment import surroundings
from whatwhere.lab.evaluate import best_device, length_loss
from whatwhere.lab.extrapolate import Subject, find_subject
from whatwhere.lab.finetune.settings import TuningSettings
from whatwhere.lab.loop import train_model
from whatwhere.lab.pretrained import Source
from whatwhere.lab.process import is_main_process
from whatwhere.lab.recipes.schema import TrainingSettings
from whatwhere.lab.runs import RunFolder

RECORD = "finetune.json"
COLUMNS = ["when", "length", "windows", "tokens", "loss"]
"""Columns of loss_by_length.csv; `when` is before or after."""

_UNSCALED = {"default", "linear", "llama3", "whatwhere"}
"""Types of rotation whose frequencies do not follow from max_position_embeddings."""

_OF_NO_CONSEQUENCE = {"save_every", "accumulate", "precision"}
"""Settings that weights do not depend on, or that count as they are resolved."""


@dataclass(frozen=True)
class Tuning(RunFolder):
    """A fine-tuning that can begin, and its folder.

    Attributes:
        subject: The model to start from.
        task: The text.
        settings: How it is fine-tuned.
        training: The same for the training loop.
        lengths: Windows whose loss is measured before and after.
        notes: What is left out, and why.
        identity: All that the weights depend on.
        encoding: Name of the model's position encoding, else its model type.
    """

    subject: Subject
    task: TextTask
    settings: TuningSettings
    training: TrainingSettings
    lengths: tuple[int, ...]
    notes: tuple[str, ...]
    identity: dict[str, Any]
    encoding: str

    @property
    def record(self) -> Path:
        """`finetune.json`: what the weights depend on, versions, device, data."""
        return self.folder / RECORD

    @property
    def losses(self) -> Path:
        """`loss_by_length.csv`: loss at each length, before and after."""
        return self.folder / "loss_by_length.csv"

    def load_model(self) -> Any:
        """The model to start from, on the CPU.

        Raises:
            ValueError: If its weights cannot be read.
        """
        return Source(str(self.subject.model)).load_model()

    def measured(self) -> pd.DataFrame:
        """What `losses` holds so far."""
        return pd.read_csv(self.losses) if self.losses.exists() else pd.DataFrame(columns=COLUMNS)


def prepare(
    folder: Path,
    text: Sequence[str],
    output: Path,
    settings: TuningSettings | None = None,
    validation: Sequence[str] = (),
) -> Tuning:
    """Check that a fine-tuning can begin, or go on; nothing is written.

    Args:
        folder: A causal language model of `transformers`, converted or not, or a run of ours.
        text: UTF-8 files, folders or patterns.
        output: Folder for the fine-tuned model (`model/`), log, figures and losses.
        settings: The paper's by default.
        validation: Validation text, by default the last part of each file of `text`.

    Raises:
        ValueError: If the model, its tokenizer, the text or a length is unusable, or `output`
            is of another fine-tuning or of something else.
    """
    settings = settings or TuningSettings()
    _check_place(output)
    subject = find_subject(folder)
    length = _length(subject, settings)
    if not text:
        raise ValueError("text: name a text to fine-tune on with --text")
    data = TextData(
        paths=tuple(text),
        tokenizer=subject.tokenizer,
        length=length,
        split="position",
        validation_fraction=settings.validation_fraction,
    )
    task = TextTask(data, validation=validation)
    source = Source(str(subject.model))
    config = source.load_config()
    _check_vocabulary(task, config.vocab_size)
    with torch.device("meta"):
        empty = _empty(config)
        limit = table_length(empty)
    if settings.checkpointing and not empty.supports_gradient_checkpointing:
        raise ValueError(f"checkpointing: {type(empty).__name__} does not support it")
    if limit is not None and length > limit:
        raise ValueError(f"length={length} is beyond the model's table of positions ({limit})")
    lengths, notes = _lengths(subject.train_length, length, task, settings, limit)
    training = settings.training(length, config.vocab_size)
    parallel.check(training, length)
    names = getattr(config, "position_encoding", None) or config.model_type
    encoding = names if isinstance(names, str) else "+".join(dict.fromkeys(names))
    made = Tuning(
        folder=output,
        subject=subject,
        task=task,
        settings=settings,
        training=training,
        lengths=lengths,
        notes=notes,
        identity=_identity(encoding, subject.model, task, settings, training),
        encoding=encoding,
    )
    _check_record(made)
    return made


def finetune(tuning: Tuning, model: Any = None) -> pd.DataFrame:
    """Do whatever of a fine-tuning is not done yet.

    Writes `finetune.json`, `log.jsonl`, checkpoints, `model/` (weights in the dtype they came
    in, tokenizer, config), `loss_by_length.csv` and the figures.

    Args:
        tuning: From `prepare`.
        model: What `tuning.load_model` gave, if it was called before.

    Returns:
        Loss by length, before and after; see `COLUMNS`.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM, once a checkpoint is saved.
        RunError: If another process works in the folder, or the disk is full.
        ValueError: If the weights cannot be read.
    """
    # Read before anything is written, as weights may be missing.
    if model is None and not tuning.trained:
        model = tuning.load_model()
    if not is_main_process():
        if not tuning.trained:
            _train(tuning, model)
        return pd.DataFrame(columns=COLUMNS)
    with storage.lock(tuning.folder):
        _check_record(tuning)
        if not tuning.trained:
            if not tuning.record.exists():
                record = {"identity": tuning.identity, "data": tuning.task.describe()}
                storage.write_json(tuning.record, record | surroundings())
            if tuning.measured().empty:
                _measure(tuning, model, "before")
            _train(tuning, model)
        del model
        if "after" not in set(tuning.measured()["when"]):
            _measure(tuning, Source(str(tuning.model)).load_model(), "after")
        if not (tuning.folder / "loss_by_length.png").exists():
            _draw(tuning)
    return tuning.measured()


def _train(tuning: Tuning, model: Any) -> None:
    dtype = model.dtype
    name = tuning.subject.tokenizer
    tokenizer = None if name == "bytes" else Source(name).load_tokenizer()

    def save(trained: Any, folder: Path, weights: dict[str, Tensor]) -> None:
        trained.to(dtype)  # as the config of a checkpoint names the dtype of the model
        _widen(trained.config, tuning.task.length)
        trained.save_pretrained(folder, state_dict=_cast(weights, dtype))
        if tokenizer is not None:
            limit = max(tuning.task.length, tokenizer.model_max_length or 0)
            tokenizer.model_max_length = limit
            tokenizer.save_pretrained(folder)

    # Steps of 6e-5 vanish in the rounding of 16-bit weights: they are kept in float32 meanwhile.
    model.float()
    if tuning.settings.checkpointing:
        with warnings.catch_warnings():
            # Its new name came after the oldest transformers that we support.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable()
    train_model(
        model,
        tuning.task,
        tuning,
        tuning.training,
        tuning.settings.seed,
        delta_rate=tuning.settings.delta_lr,
        save=save,
    )


def _cast(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in weights.items()
    }


def _widen(config: Any, length: int) -> None:
    # A config of ours has its training length here, and frequencies may follow from it.
    if config.model_type == "whatwhere" or not _rope_types(config) <= _UNSCALED:
        return
    if getattr(config, "max_position_embeddings", None) is not None:
        config.max_position_embeddings = max(length, config.max_position_embeddings)


def _rope_types(config: Any) -> set[str]:
    given = getattr(config, "rope_parameters", None) or {}
    each = [part for part in given.values() if isinstance(part, dict)] or [given]
    return {part.get("rope_type", "default") for part in each}


def _measure(tuning: Tuning, model: Any, when: str) -> None:
    known, task = tuning.measured(), tuning.task
    rows = [{str(key): value for key, value in row.items()} for row in known.to_dict("records")]
    model.to(best_device()).eval()
    for length in tuning.lengths:
        budget = min(tuning.settings.tokens, len(task.validation_tokens))
        windows = task.windows(length, max(1, budget // length))
        with Console().status(f"loss at {length} {when} fine-tuning"):
            found = length_loss(model, windows, tuning.training.precision)
        predicted = found.windows * (length - 1)
        values = (when, length, found.windows, predicted, found.loss)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    storage.write_rows(tuning.losses, rows, COLUMNS)


def _draw(tuning: Tuning) -> None:
    from whatwhere.lab.finetune import figure

    log = pd.DataFrame(storage.read_log(tuning.log))
    place, unit = tuning.folder, tuning.subject.unit
    figure.loss_by_tokens(log, place / "loss", tuning.encoding, unit)
    figure.before_and_after(
        tuning.measured(), place / "loss_by_length", tuning.subject.train_length, unit
    )


def _length(subject: Subject, settings: TuningSettings) -> int:
    if settings.length is not None:
        return settings.length
    if subject.train_length is None:
        raise ValueError("length: the model's config names no training length: give --length")
    return settings.factor * subject.train_length


def _check_vocabulary(task: TextTask, size: int) -> None:
    highest = max(int(task.train_tokens.max()), int(task.validation_tokens.max()))
    if highest >= size:
        raise ValueError(
            f"text: token {highest} is outside the model's vocabulary of {size}: is this its "
            "tokenizer?"
        )


def _empty(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def _lengths(
    train_length: int | None,
    length: int,
    task: TextTask,
    settings: TuningSettings,
    limit: int | None,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The lengths at which the loss is measured, and what was left out of the default ones."""
    there = len(task.validation_tokens)
    if settings.lengths:
        for wanted in settings.lengths:
            if wanted > there or (limit is not None and wanted > limit):
                raise ValueError(
                    f"lengths: {wanted} is more than the {there} tokens of validation text"
                    if wanted > there
                    else f"lengths: {wanted} is beyond the table of positions ({limit})"
                )
        return tuple(sorted(set(settings.lengths))), ()
    multiples = {train_length * n for n in (1, 2, 4)} if train_length else set()
    wanted_all = sorted({length, *multiples})
    kept = [n for n in wanted_all if n <= there and (limit is None or n <= limit)]
    left = [n for n in wanted_all if n not in kept]
    return tuple(kept), tuple(f"no loss at {n}: too little validation text" for n in left)


def _identity(
    encoding: str,
    model: Path,
    task: TextTask,
    settings: TuningSettings,
    training: TrainingSettings,
) -> dict[str, Any]:
    about = task.describe()
    parts = training.gradient_accumulation_steps
    resolved = {"precision": training.precision, "accumulate": parts, "length": task.length}
    return {
        "model": {"encoding": encoding, "sha256": _digest(model)},
        "text": {key: value for key, value in about.items() if "sha256" in key},
        "settings": settings.model_dump(mode="json", exclude=_OF_NO_CONSEQUENCE) | resolved,
    }


def _digest(folder: Path) -> str:
    """SHA-256 of config and weights, in the order of their names."""
    whole = hashlib.sha256()
    files = [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]
    for path in sorted(files):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _check_place(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file: expected a folder")
    strange = not (output / RECORD).exists()
    if strange and any(not file.name.startswith(".") for file in output.glob("*")):
        raise ValueError(f"output: {output} holds files but no {RECORD}: choose another one")


def _check_record(tuning: Tuning) -> None:
    if not tuning.record.exists():
        return
    found = storage.read_json(tuning.record)
    if not isinstance(found, dict) or "identity" not in found:
        raise ValueError(f"output: {tuning.record} is no record of a fine-tuning")
    changed = runs.differences(found["identity"], tuning.identity)
    if changed:
        listed = "; ".join(changed[:4]) + (" ..." if len(changed) > 4 else "")
        raise ValueError(
            f"output: {tuning.folder} is of another fine-tuning ({listed}): choose another one, "
            "or remove that folder"
        )
