"""A diagnosis: every part of every model, resumed where it stopped; then figures and the page."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from whatwhere.lab import storage
from whatwhere.lab.diagnose import memory, parts, record, subjects
from whatwhere.lab.diagnose.measured import Measured
from whatwhere.lab.diagnose.parts import PARTS, Work
from whatwhere.lab.diagnose.settings import Settings
from whatwhere.lab.diagnose.subjects import Subject
from whatwhere.lab.evaluate import best_device

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A model of which everything was checked that can be before it is loaded.

    Attributes:
        work: What its parts need.
        identity: What its numbers depend on.
        skeleton: The model without weights.
    """

    work: Work
    identity: dict[str, Any]
    skeleton: Any


def run(settings: Settings, say: Say) -> Path:
    """Diagnose models; parts that the folder has finished are not repeated.

    Args:
        settings: What to diagnose.
        say: Shows a line.

    Returns:
        The page.

    Raises:
        ValueError: If a model, the text, an option or the folder is not as it should be, or
            there is not enough memory: nothing was changed then. Also if a model computes NaN.
        RunError: If results cannot be written.
    """
    settings.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("diagnose runs in one process: start it without torchrun or accelerate")
    device = device_of(settings)
    folder = settings.output
    prepared = [_prepare(one, settings, device, say) for one in subjects.find(settings)]
    record.check(folder, settings, prepared[0].identity["model"])
    left = [(one, part) for one in prepared for part in _left(one, settings, folder, say)]
    for one in prepared:
        if any(other is one for other, _ in left):
            _check_memory(one, settings, say)
    with storage.lock(folder):
        record.claim(folder, settings, prepared[0].identity["model"])
        for one in prepared:
            for part in [name for other, name in left if other is one]:
                _measure(one, part, folder, say)
            one.work.release()
            gc.collect()
        return _write(prepared, settings, folder)


def device_of(settings: Settings) -> torch.device:
    """The device asked for, or the best one.

    Raises:
        ValueError: If there is no such device.
    """
    if settings.device is None:
        return best_device()
    try:
        device = torch.device(settings.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        said = str(error).splitlines()[0]
        raise ValueError(f"device: {settings.device!r} cannot be used ({said})") from error
    if device.type == "meta":
        raise ValueError("device: 'meta' cannot be used (it holds no numbers)")
    return device


def _prepare(subject: Subject, settings: Settings, device: torch.device, say: Say) -> Prepared:
    from whatwhere.analysis import layers

    say(f"{subject.given}: reading its config and the text")
    skeleton = subject.skeleton()
    attention = layers.find_layers(skeleton)
    limit, longest = layers.table_length(skeleton), settings.rising[-1]
    if limit is not None and longest > limit:
        raise ValueError(
            f"lengths: {longest:,} is beyond the table of positions of {subject.given}, which "
            f"ends at {limit:,}"
        )
    config = layers.text_config(skeleton)
    heads = getattr(config, "num_attention_heads", None)
    for name, chosen, there in (
        ("layers", settings.layers, len(attention)),
        ("heads", settings.heads, heads),
    ):
        if there is not None and max(chosen, default=0) >= there:
            raise ValueError(
                f"{name}: {subject.given} has {name} 0 to {there - 1}, got {max(chosen)}"
            )
    tokens = subjects.read(subject, settings)
    size = getattr(config, "vocab_size", None)
    if size is not None and int(tokens.max()) >= size:
        raise ValueError(
            f"text: token {int(tokens.max())} is outside the vocabulary of {subject.given}, "
            f"{size}: is {subject.tokenizer} its tokenizer?"
        )
    known = subject.train_length or layers.train_length(skeleton)
    train_length = settings.train_length or known
    work = Work(subject, settings, tokens, train_length, device)
    return Prepared(work, record.identity(settings, subject.identity(tokens)), skeleton)


def _check_memory(one: Prepared, settings: Settings, say: Say) -> None:
    given, batch = one.work.subject.given, settings.batch_size
    device = one.work.device
    needed = memory.check(given, one.skeleton, settings.rising, batch, settings.dtype, device)
    say(f"{given}: needs {needed}")


def _left(prepared: Prepared, settings: Settings, folder: Path, say: Say) -> list[str]:
    label = prepared.work.subject.label
    left = []
    for part in _wanted(settings):
        if record.done(record.place(folder, label, part), prepared.identity):
            say(f"{label}: {part} done before")
        else:
            left.append(part)
    return left


def _wanted(settings: Settings) -> list[str]:
    return [name for name in PARTS if settings.retrieval or name != "retrieval"]


def _measure(prepared: Prepared, part: str, folder: Path, say: Say) -> None:
    label, started = prepared.work.subject.label, time.monotonic()
    try:
        frames, notes = parts.PARTS[part](prepared.work)
    except torch.OutOfMemoryError as error:
        raise storage.RunError(
            f"memory: {label} needs more than {prepared.work.device} has ({part}): choose shorter "
            "--lengths, a smaller --batch-size, --dtype bfloat16 or another --device"
        ) from error
    seconds = time.monotonic() - started
    record.write(record.place(folder, label, part), prepared.identity, frames, notes, seconds)
    say(f"{label}: {part} done in {seconds:.0f} s")


def _write(prepared: Sequence[Prepared], settings: Settings, folder: Path) -> Path:
    from whatwhere.lab.diagnose.page import build

    return build([_read(one, settings, folder) for one in prepared], settings, folder)


def _read(prepared: Prepared, settings: Settings, folder: Path) -> Measured:
    subject = prepared.work.subject
    frames: dict[str, pd.DataFrame] = {}
    missing: dict[str, str] = {}
    notes: dict[str, Any] = {}
    for part in _wanted(settings):
        found, said = record.read(record.place(folder, subject.label, part))
        why = said.pop("missing", None)
        missing |= dict.fromkeys(found, why) if why else {}
        frames |= found
        notes |= said
    if not settings.retrieval:
        missing["retrieval"] = "--no-retrieval was given"
    return Measured(
        subject.label,
        subject.unit,
        prepared.work.train_length,
        frames,
        notes.get("safe_length"),
        notes.get("safe_reason", ""),
        missing,
        _notes(subject, settings, notes),
        tuple((int(layer), int(head)) for layer, head in notes["heads"]),
        notes["rule"],
    )


def _notes(subject: Subject, settings: Settings, notes: dict[str, Any]) -> tuple[str, ...]:
    said = []
    texts = notes["texts"]
    if texts < settings.texts:
        said.append(
            f"{subject.label}: {texts} of {settings.texts} texts were read, more would overlap."
        )
    if subject.stretched is not None:
        factor = subject.stretched["factor"]
        said.append(
            f"{subject.label}: RoPE's weights with YaRN's factor {factor:g} at all lengths."
        )
    for length, why in notes.get("left_out", []):
        said.append(f"{subject.label}: nothing asked for at {length:,} tokens ({why}).")
    if "unknown" in notes["features"]:
        said.append(
            f"{subject.label}: some layers rotate in a way that is not read; they have no "
            "frequencies."
        )
    return tuple(said)
