"""Work on many things at once, in processes that end with the one that started them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, connection, get_context, parent_process
from types import ModuleType
from typing import Any, TypeVar

from whatwhere.lab.storage import RunError

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")

_THREADS = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
_held: list[Any] = []


def run_all(
    work: Callable[[Shared, Task], Result],
    shared: Shared,
    tasks: Sequence[Task],
    workers: int,
) -> Iterator[Result]:
    """Yield `work(shared, task)` of each task as they are done, in any order.

    Args:
        work: A function of a module.
        shared: Its first argument, sent once to each worker; of classes of modules, too.
        tasks: Its second arguments.
        workers: Processes; with one, or one task, the work is done here.

    Raises:
        RunError: A worker was killed.
    """
    with _one_thread_each():
        if min(workers, len(tasks)) < 2:
            yield from (work(shared, task) for task in tasks)
            return
        others = set(active_children())
        # Processes that are forked would inherit locks of threads that they do not have.
        pool = ProcessPoolExecutor(
            min(workers, len(tasks)), get_context("spawn"), _start, (shared,)
        )
        try:
            with _without_main():
                futures = [pool.submit(_call, work, task) for task in tasks]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise RunError(
                "a worker was killed, perhaps for want of memory: run the same command again, "
                "with fewer workers"
            ) from None
        except BaseException:
            # What they are at may take long, and is done again in any case.
            for process in set(active_children()) - others:
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Cores that this process may use, which a container or a scheduler may have made fewer."""
    if hasattr(os, "sched_getaffinity"):  # Not on macOS and Windows.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start(shared: Any) -> None:
    # Ctrl-C reaches the whole group; the first process stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _held.append(shared)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _call(work: Callable[[Any, Task], Result], task: Task) -> Result:
    return work(_held[0], task)


@contextmanager
def _without_main() -> Iterator[None]:
    # A new process runs the caller's script again, but for what it keeps behind a guard. There is
    # nothing in it that the work needs.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _one_thread_each() -> Iterator[None]:
    # Workers inherit it. As many threads as cores in each of as many processes gain nothing.
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(_THREADS)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
