"""Interleaved timing: every side once a round, the order reversed every other round.

A machine that slows down for a while slows all sides alike, so the ratio of two sides within a
round says more than two medians taken one after the other.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Sides = Mapping[str, Callable[[], Any]]

# Several times the L2 cache of any GPU there is, so that every side starts from memory.
FLUSH_BYTES = 256 * 2**20


def rounds(sides: Sides, count: int, device: str) -> dict[str, list[float]]:
    """Seconds of each side in each round; call each of them before, so that it is warm.

    Args:
        sides: What is timed, by name.
        count: Rounds.
        device: ``"cuda"`` times by events on the device, the L2 cache flushed before each call;
            ``"cpu"`` by the clock.
    """
    timed = _Events() if device == "cuda" else _Clock()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for r in range(count):
            for name in sides if r % 2 == 0 else reversed(list(sides)):
                timed.call(name, sides[name])
        return timed.seconds(sides)
    finally:
        if collecting:
            gc.enable()


def first_call(run: Callable[[], Any], device: str, warm: int = 2) -> float:
    """Seconds of the first call, in which kernels are compiled; then `warm` calls more."""
    start = time.perf_counter()
    run()
    synchronise(device)
    taken = time.perf_counter() - start
    for _ in range(warm):
        run()
    synchronise(device)
    return taken


def captured(run: Callable[[], Any]) -> Callable[[], None] | None:
    """A call as a CUDA graph, which takes no time to launch; ``None`` if it cannot be captured."""
    try:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:  # what cannot be captured says so in many ways
        torch.cuda.synchronize()
        return None
    return lambda: graph.replay()


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def ratios(seconds: Mapping[str, Sequence[float]], to: str) -> dict[str, tuple[float, float]]:
    """Median and least of the ratios to one side, round by round."""
    found = {}
    for name, taken in seconds.items():
        each = [a / b for a, b in zip(taken, seconds[to], strict=True)]
        found[name] = (statistics.median(each), min(each))
    return found


def fastest(seconds: Mapping[str, Sequence[float]], among: Sequence[str]) -> str | None:
    """The side of least median time among some, or ``None`` if none of them was timed."""
    timed = [name for name in among if name in seconds]
    return min(timed, key=lambda name: statistics.median(seconds[name])) if timed else None


def copy_bandwidth(size: int = 2**30, count: int = 20) -> float:
    """Bytes per second, read and written, of a copy within the memory of the GPU."""
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    first_call(lambda: target.copy_(source), "cuda")
    taken = rounds({"copy": lambda: target.copy_(source)}, count, "cuda")["copy"]
    return 2 * size / statistics.median(taken)


class _Clock:
    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def call(self, name: str, run: Callable[[], Any]) -> None:
        start = time.perf_counter()
        run()
        self._seconds.setdefault(name, []).append(time.perf_counter() - start)

    def seconds(self, sides: Sides) -> dict[str, list[float]]:
        return {name: self._seconds[name] for name in sides}


class _Events:
    def __init__(self) -> None:
        self._pairs: dict[str, list[tuple[Any, Any]]] = {}
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def call(self, name: str, run: Callable[[], Any]) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Without the wait a long queue of calls would hold all their results at once.
        torch.cuda.synchronize()
        self._flush.zero_()
        start.record()
        run()
        end.record()
        self._pairs.setdefault(name, []).append((start, end))

    def seconds(self, sides: Sides) -> dict[str, list[float]]:
        torch.cuda.synchronize()
        return {
            name: [start.elapsed_time(end) / 1e3 for start, end in self._pairs[name]]
            for name in sides
        }
