"""How this process behaves: whether it speaks, how it stops, which kernels it uses."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

LONGEST_WAIT = timedelta(days=1)
"""How long processes wait for one another: the first one prepares data and evaluates meanwhile.

A process that dies is no matter of waiting: its launcher ends the others at once.
"""


def is_main_process() -> bool:
    """Whether this process writes and speaks: the only one, or the first that `torchrun` made."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """Processes that `torchrun` or `accelerate launch` started, 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """Whether several processes train on the CPU, which accelerate wants to be told."""
    return process_count() > 1 and not torch.cuda.is_available()


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process do something before the others do it too, e.g. prepare data.

    If it fails there, it says why, and the others end without a word.
    """
    if process_count() == 1:
        yield
        return
    from accelerate import PartialState

    PartialState(cpu=on_cpu(), timeout=LONGEST_WAIT)
    if not is_main_process():
        if not _shared(False):
            raise SystemExit(1)
        yield
        return
    try:
        yield
    except BaseException:
        _shared(False)
        raise
    _shared(True)


def _shared(fine: bool) -> bool:
    # What the main process says, in all processes.
    said = [fine]
    torch.distributed.broadcast_object_list(said, src=0)
    return said[0]


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C or SIGTERM came; a second one acts at once.

    Several processes would stop at different steps and wait for one another: with `torchrun` a
    signal ends them at once, and the last checkpoint counts.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        for known, old in previous.items():
            signal.signal(known, old)

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Use deterministic kernels on a GPU; those of a CPU are as they are."""
    if not (wanted and torch.cuda.is_available()):
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # a check for bugs that costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]
