"""Loss against length for any causal language model: a run of ours or a Hugging Face folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.table import Table
from torch import Tensor

from whatwhere.analysis.layers import table_length
from whatwhere.lab import runs, storage
from whatwhere.lab.data import (
    IndirectIndexingData,
    TextTask,
    TokensTask,
    make_task,
    read_tokens,
    spaced_windows,
)
from whatwhere.lab.evaluate import (
    LengthLoss,
    length_loss,
    load_model,
    write_positions,
)
from whatwhere.lab.pretrained import TOKENIZER_FILES


@dataclass(frozen=True)
class Subject:
    """A model to measure, and how to make tokens for it.

    Attributes:
        model: Folder of the weights.
        tokenizer: `"bytes"`, or a name or folder of `transformers`.
        train_length: Tokens it was trained at, if known.
        run: The run that it is of, if it is one of ours.
    """

    model: Path
    tokenizer: str
    train_length: int | None = None
    run: runs.Run | None = None

    @property
    def name(self) -> str:
        """Encoding of a run, else name of the folder."""
        return self.run.config.label if self.run else self.model.resolve().name

    @property
    def unit(self) -> str:
        """What its losses are in."""
        return "nats per byte" if self.tokenizer == "bytes" else "nats per token"


def find_subject(folder: Path, tokenizer: str | None = None) -> Subject:
    """The model of a run folder, of the `model/` within one, or of a Hugging Face folder.

    Args:
        folder: The folder.
        tokenizer: In place of that of a Hugging Face folder: `"bytes"`, or a name or folder.

    Raises:
        ValueError: If the folder holds none of these, or no tokenizer for a model that needs one.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    for place in (folder, folder.parent):
        if (place / "run.json").exists() and folder in (place, place / "model"):
            return _subject_of_run(place)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds neither a run (run.json) nor a model (config.json)")
    config = storage.read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} is no config of a model: it is no mapping")
    # A converted model keeps the length it was trained at apart from the one it is meant for.
    length = config.get("train_length") or config.get("max_position_embeddings")
    if tokenizer is not None:
        return Subject(folder, tokenizer, length)
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        return Subject(folder, str(folder), length)
    if config.get("vocab_size") == 256:
        return Subject(folder, "bytes", length)
    raise ValueError(
        f"{folder} holds no tokenizer and its vocabulary of {config.get('vocab_size')} is not "
        "one of bytes: save the model's tokenizer into it"
    )


def extrapolate(
    subject: Subject, texts: Sequence[str], lengths: Sequence[int], tokens: int = 2**17
) -> list[LengthLoss]:
    """Token-weighted loss at each length over many windows spread evenly over the text.

    Args:
        subject: The model.
        texts: Files, folders or patterns; none means the run's own validation text.
        lengths: Tokens in a window, each at least 2.
        tokens: Tokens measured at each length; at least one window is.

    Returns:
        Results in the order of increasing length.

    Raises:
        ValueError: If there is no text or less than one window of it, a length or `tokens` is
            too small, a length is beyond the model's table of positions, or tokens of the text
            lie outside its vocabulary.
    """
    wanted = sorted(set(lengths))
    if not wanted or wanted[0] < 2:
        raise ValueError(f"lengths: expected integers of at least 2, got {list(lengths)}")
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    windows = _windows(subject, texts, wanted, tokens)
    model = load_model(subject.model).eval()
    limit = table_length(model)
    if limit is not None and wanted[-1] > limit:
        raise ValueError(
            f"lengths: {wanted[-1]} is beyond the model's table of positions, which ends at "
            f"{limit}"
        )
    highest = max(int(part.max()) for part in windows.values())
    if highest >= model.config.vocab_size:
        raise ValueError(
            f"text: token {highest} is outside the model's vocabulary of "
            f"{model.config.vocab_size}: is this its tokenizer?"
        )
    precision = "bf16" if subject.run and subject.run.config.training.precision == "bf16" else "no"
    return [length_loss(model, part, precision) for part in windows.values()]


def write(found: Sequence[LengthLoss], folder: Path, subject: Subject) -> list[Path]:
    """Write `loss_by_length.csv`, `loss_by_position.csv` of the longest length, and their figures.

    Returns:
        The files.

    Raises:
        DiskFullError: If there is no space left.
    """
    from whatwhere.lab.report import figures

    by_length, by_position = folder / "loss_by_length.csv", folder / "loss_by_position.csv"
    rows = [
        {"length": f.length, "windows": f.windows, "tokens": _predicted(f), "loss": f.loss}
        for f in found
    ]
    storage.write_rows(by_length, rows, ["length", "windows", "tokens", "loss"])
    write_positions(by_position, found[-1])
    written = [by_length, by_position]
    if all(math.isfinite(f.loss) for f in found):
        results = pd.DataFrame(rows).rename(columns={"loss": "value"})
        results = results.assign(encoding=subject.name, seed=0, metric="loss")
        written += figures.loss_by_length(
            results, folder / "loss_by_length", subject.train_length, subject.unit
        )
        positions = pd.read_csv(by_position).assign(encoding=subject.name, seed=0)
        written += figures.loss_by_position(
            positions, folder / "loss_by_position", subject.train_length, subject.unit
        )
    return written


def table(found: Sequence[LengthLoss], subject: Subject) -> Table:
    """Loss and perplexity at each length, as a table to print."""
    shown = Table(title=f"loss by length, {subject.unit}", title_justify="left")
    counted = f"{subject.unit.split()[-1]}s"
    for name in ("length", "windows", counted, "loss", "perplexity"):
        shown.add_column(name, justify="right")
    for f in found:
        mark = " (training)" if f.length == subject.train_length else ""
        cells = (str(f.windows), str(_predicted(f)), f"{f.loss:.4f}", _perplexity(f.loss))
        shown.add_row(f"{f.length}{mark}", *cells)
    return shown


def _subject_of_run(folder: Path) -> Subject:
    run, record = runs.load_run(folder), runs.load_record(folder)
    source = runs.source_folder(folder, record)
    if source is not None and record.get("how") == "borrow" and run.config.encoding.name != "yarn":
        run = runs.load_run(source)  # trained by another recipe
    if not run.trained:
        raise ValueError(f"{folder} holds no trained model: no done.json is in it")
    data = run.config.data
    if isinstance(data, IndirectIndexingData):
        raise ValueError(f"{folder} was trained on {data.task}: only texts have lengths")
    tokenizer = data.tokenizer or str(record["data"]["tokenizer"])
    return Subject(run.model, tokenizer, data.length, run)


def _windows(
    subject: Subject, texts: Sequence[str], lengths: Sequence[int], tokens: int
) -> dict[int, Tensor]:
    if texts:
        stream = read_tokens(tuple(texts), subject.tokenizer)
        size = min(tokens, len(stream))
        return {n: spaced_windows(stream, n, max(1, size // n)) for n in lengths}
    if subject.run is None:
        raise ValueError("text: this model is not of a run, so name a text with --text")
    task = make_task(subject.run.config.data)
    assert isinstance(task, TextTask | TokensTask)
    return {n: task.windows(n, max(1, _at_most(task, tokens) // n)) for n in lengths}


def _at_most(task: TextTask | TokensTask, tokens: int) -> int:
    # Windows of a short text would overlap.
    return min(tokens, len(task.validation_tokens)) if isinstance(task, TextTask) else tokens


def _predicted(found: LengthLoss) -> int:
    return found.windows * (found.length - 1)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.3f}" if loss < 700 else "inf"
