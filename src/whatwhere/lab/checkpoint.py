"""The state of a training on disk, whatever the number of processes that write and read it.

Weights and the optimizer's state are written by `torch.distributed.checkpoint`: each process
writes what it holds, and reads what it needs, so that any number of processes, sharded or not,
goes on where any other number stopped. All files are safetensors: nothing in them is executed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from whatwhere.lab.process import is_main_process
from whatwhere.lab.storage import RunError

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    """Write weights, optimizer and random numbers; every process calls this.

    Args:
        folder: An empty folder that all processes see.
        model: The model itself, not what wraps it; its parameters may be sharded.
        optimizer: Its optimizer.
        rank: Of this process.
    """
    state = _weights(model) | _tensors(get_optimizer_state_dict(model, optimizer, options=_FLAT))
    writer = HuggingFaceStorageWriter(str(folder / "state"), save_distributed=True)
    try:
        with _alone_or_not() as alone:
            state_dict_saver.save(state, storage_writer=writer, no_dist=alone)
    except CheckpointException as error:
        # Raised in all processes, of which one speaks; it hides what went wrong in a text.
        if not is_main_process():
            raise SystemExit(1) from error
        raise next(iter(error.failures.values()))[0] from error
    save_file(_random_numbers(), folder / f"random-{rank:05d}.safetensors")


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, seed: list[int]
) -> None:
    """Read what `save` has written into a model and its optimizer; every process calls this.

    Args:
        folder: Where it lies.
        model: As for `save`.
        optimizer: As for `save`; it may be a new one.
        rank: Of this process.
        seed: Of random numbers, if another number of processes has saved: theirs are of no use
            then.

    Raises:
        RunError: If the folder holds no such state, or one of another model, or a file of it is
            damaged.
    """
    _check_files(folder)
    moments = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    state = _weights(model) | _tensors(moments)
    reader = HuggingFaceStorageReader(str(folder / "state"))
    try:
        with _alone_or_not() as alone:
            state_dict_loader.load(state, storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        raise refusal(folder, next(iter(error.failures.values()))[0]) from error
    set_optimizer_state_dict(model, optimizer, moments, options=_FLAT)
    saved = sorted(folder.glob("random-*.safetensors"))
    if len(saved) == _processes():
        _set_random_numbers(load_file(saved[rank]))
    else:
        set_seed(int(np.random.SeedSequence([*seed, rank]).generate_state(1)[0]))


def _check_files(folder: Path) -> None:
    # Before torch reads them, which reports each one that is damaged with a traceback.
    files = [*(folder / "state").glob("*.safetensors"), *folder.glob("random-*.safetensors")]
    if not any(file.parent != folder for file in files):
        raise refusal(folder, None)
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise refusal(folder, error, file.name) from error


def refusal(folder: Path, error: BaseException | None, file: str = "") -> BaseException:
    """What to raise where a checkpoint cannot be read: in all processes, of which one speaks."""
    if not is_main_process():
        return SystemExit(1)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = f" ({file}{': ' * bool(file)}{lines[0]})" if error else ""
    return RunError(
        f"{folder} holds no checkpoint that this version reads{reason}: remove it to start again"
    )


@contextmanager
def _alone_or_not() -> Iterator[bool]:
    # Whether there is one process, of which PyTorch would warn at each checkpoint.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield not torch.distributed.is_initialized()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    # Tied weights have one name here, unlike in a state_dict.
    named = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    persistent = model.state_dict().keys()
    buffers = {f"model.{n}": buffer for n, buffer in model.named_buffers() if n in persistent}
    return named | buffers


def _tensors(moments: dict[str, Any]) -> dict[str, Tensor]:
    # Learning rates and the like are no tensors; they follow from the settings.
    return {f"optimizer.{k}": v for k, v in moments.items() if isinstance(v, Tensor)}


def _random_numbers() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_numbers(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
