"""What a trained model is worth: loss at each length, loss by position, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import whatwhere as ww
from whatwhere.analysis.layers import table_length, text_config
from whatwhere.lab import runs, storage
from whatwhere.lab.data import Batch, IndirectIndexingTask, Task
from whatwhere.lab.data.base import IGNORED
from whatwhere.lab.pretrained import Source
from whatwhere.lab.reading import READING, Reading
from whatwhere.lab.runs import Run
from whatwhere.lab.task_scores import read_in_tasks, task_scores

# Bounds of one forward pass: tokens, and numbers in its logits (512 MiB in float32).
MAX_TOKENS = 16384
MAX_LOGITS = 2**27


@dataclass(frozen=True)
class LengthLoss:
    """Loss of a model on windows of one length.

    Attributes:
        length: Tokens in a window.
        windows: Number of windows.
        loss: Mean over all predicted tokens, in nats.
        by_position: `(length - 1,)` float64, mean loss of the token that has 1, 2, ... before it.
    """

    length: int
    windows: int
    loss: float
    by_position: Tensor


def best_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rows_for(length: int, vocab_size: int) -> int:
    """Sequences in a forward pass such that tokens and logits stay within bounds."""
    return max(1, min(MAX_TOKENS // length, MAX_LOGITS // (length * vocab_size)))


@torch.inference_mode()
def mean_loss(
    model: nn.Module, batches: Iterable[Batch], precision: str = "no"
) -> tuple[float, float]:
    """Loss in nats per labelled token, and accuracy of the likeliest token, over batches.

    Args:
        model: A causal language model; it is put into evaluation mode and back.
        batches: Data; moved to the model's device.
        precision: `"bf16"` for autocast, else the dtype of the weights.

    Raises:
        ValueError: If no token is labelled.
    """
    device = _device(model)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    for batch in batches:
        logits = _logits(model, batch.input_ids.to(device), precision, batch.segment_ids)
        sums += loss_sums(logits[:, :-1], batch.labels.to(device)[:, 1:])
    model.train(training)
    return means(sums)


def loss_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of losses in nats, correct guesses and number of labelled targets: ``(3,)`` float64."""
    labelled = targets != IGNORED
    chosen, targets = logits[labelled], targets[labelled]
    loss = F.cross_entropy(chosen.float(), targets, reduction="sum").double()
    correct = (chosen.argmax(-1) == targets).sum()
    return torch.stack((loss, correct.double(), loss.new_tensor(len(targets))))


def means(sums: Tensor) -> tuple[float, float]:
    """Loss and accuracy from what `loss_sums` gave, summed.

    Raises:
        ValueError: If no token is labelled.
    """
    loss, correct, count = sums.tolist()
    if not count:
        raise ValueError("no labelled token to evaluate on")
    return loss / count, correct / count


@torch.inference_mode()
def length_loss(model: nn.Module, windows: Tensor, precision: str = "no") -> LengthLoss:
    """Loss over windows of text, token-weighted, and by position within the window.

    Args:
        model: A causal language model in evaluation mode.
        windows: `(count, length)` int64 tokens, length at least 2.
        precision: As for `mean_loss`.
    """
    count, length = windows.shape
    device = _device(model)
    total = torch.zeros(length - 1, dtype=torch.float64, device=device)
    for part in windows.split(rows_for(length, text_config(model).vocab_size)):
        tokens = part.to(device)
        logits = _logits(model, tokens, precision)[:, :-1]
        for row, targets in zip(logits, tokens[:, 1:], strict=True):
            # Row by row, so that only one row of logits is ever copied to float32.
            total += F.cross_entropy(row.float(), targets, reduction="none").double()
    by_position = (total / count).cpu()
    return LengthLoss(length, count, by_position.mean().item(), by_position)


def load_model(folder: Path) -> Any:
    """A causal language model of ours or of `transformers`, from a folder on this disk.

    Raises:
        ValueError: If there is none, or its files are not what they should be.
    """
    return Source(str(folder)).load_model().to(best_device())


def evaluate(
    run: Run, task: Task, source: Run | None = None, reading: Reading | None = None
) -> list[str]:
    """Measure a trained run and write its `results.csv`.

    Args:
        run: The run.
        task: Its data.
        source: The run whose weights it borrows. For YaRN a rope run: YaRN's factor is then
            `length / training length` (at least 1) at each length, as in the RoPE-ID paper
            (arXiv 2603.18017).
        reading: The text that the loss at each length is measured on.

    Returns:
        Notes on what could not be measured.
    """
    weights = source or run
    model = load_model(weights.model).eval()
    options = dict(run.config.encoding.options)
    stretched = source is not None and run.config.encoding.name == "yarn"

    def prepare(length: int) -> None:
        if stretched:
            factor = max(1.0, length / task.length)
            model.set_position_encoding(run.config.encoding.name, **options, factor=factor)

    settings = run.config.evaluation
    notes: list[str] = []
    prepare(task.length)
    values = _split_losses(run, model, task)
    if reading is not None and settings.lengths:
        losses, notes = _length_losses(run, model, reading, prepare)
        values += [("loss", found.length, found.loss) for found in losses]
        if losses:
            write_positions(run.positions, max(losses, key=lambda found: found.length))
        storage.write_json(run.folder / READING, reading.describe())
    values += _costs(run, model, task)
    needed, limit = read_in_tasks(settings, task.length), table_length(model)
    if settings.tasks and limit is not None and needed > limit:
        notes.append(
            f"no scores of tasks, which read {needed} tokens: its table of positions ends at "
            f"{limit}"
        )
    else:
        values += task_scores(run, weights, task, model)
    storage.write_rows(run.results, run.rows(values), runs.COLUMNS)
    return notes


def _split_losses(run: Run, model: Any, task: Task) -> list[tuple[str, int, float]]:
    values = []
    for split in task.splits:
        batches = task.evaluation_batches(
            split, rows_for(task.length, task.vocab_size), run.config.evaluation.examples
        )
        loss, accuracy = mean_loss(model, batches, run.config.training.precision)
        values.append((f"{split}_loss", task.length, loss))
        # The last split of a task is the one its papers report on.
        last = split == task.splits[-1]
        if task.accuracy:
            values.append(("accuracy" if last else f"{split}_accuracy", task.length, accuracy))
        if last and not isinstance(task, IndirectIndexingTask):
            values.append(("perplexity", task.length, math.exp(min(loss, 700.0))))
    return values


def write_positions(path: Path, found: LengthLoss) -> None:
    """Write loss by position as CSV; `position` is the number of tokens before the predicted."""
    pairs = enumerate(found.by_position.tolist(), start=1)
    rows = [{"position": position, "loss": loss} for position, loss in pairs]
    storage.write_rows(path, rows, ["position", "loss"])


def _length_losses(
    run: Run, model: Any, reading: Reading, prepare: Callable[[int], None]
) -> tuple[list[LengthLoss], list[str]]:
    settings = run.config.evaluation
    limit = table_length(model)
    losses, notes = [], []
    for length in settings.lengths:
        if limit is not None and length > limit:
            notes.append(f"no loss at {length}: its table of positions ends at {limit}")
            continue
        prepare(length)
        windows = reading.windows(length, max(1, settings.tokens // length))
        losses.append(length_loss(model, windows, run.config.training.precision))
    return losses, notes


def _costs(run: Run, model: Any, task: Task) -> list[tuple[str, int, float]]:
    encoding = next(m for m in model.modules() if isinstance(m, ww.Encoding))
    lengths = sorted({task.length, max((task.length, *run.config.evaluation.lengths))})
    costs = [("table_bytes", n, float(ww.table_bytes(encoding, n))) for n in lengths]
    costs.append(("parameters", task.length, sum(p.numel() for p in model.parameters())))
    if run.trained:  # YaRN without fine-tuning trains nothing
        done = storage.read_json(run.done)
        for metric, key in (
            ("grad_norm_max", "grad_norm_max"),
            ("loss_spikes", "spikes"),
            ("train_seconds", "seconds"),
        ):
            costs.append((metric, task.length, done[key]))
    return costs


def _logits(
    model: nn.Module, input_ids: Tensor, precision: str, segments: Tensor | None = None
) -> Tensor:
    more: dict[str, Any] = {}
    if segments is not None:
        more["segment_ids"] = segments.to(input_ids.device)
    with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return cast(Tensor, model(input_ids=input_ids, use_cache=False, **more).logits)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
