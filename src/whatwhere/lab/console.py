"""What a run says while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from whatwhere.lab.process import is_main_process


class Display(Protocol):
    """Shows how far a run is."""

    def update(self, step: int, row: dict[str, Any] | None) -> None:
        """Show a step, and the row of the log if one was written at it."""

    def close(self) -> None:
        """Stop showing."""


def display(title: str, steps: int, first: int = 0) -> Display:
    """A bar where standard output is a terminal, plain lines elsewhere."""
    console = Console(quiet=not is_main_process())
    if console.is_terminal:
        return Bar(console, title, steps, first)
    return Lines(console, title, steps)


class Bar:
    """A progress bar with loss and time left."""

    def __init__(self, console: Console, title: str, steps: int, first: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(title, total=steps, completed=first, loss="")
        self._progress.start()

    def update(self, step: int, row: dict[str, Any] | None) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step)
        if row:
            self._progress.update(self._task, loss=f"loss {row['loss']:.3f}")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


class Lines:
    """A line at every tenth of a run."""

    def __init__(self, console: Console, title: str, steps: int) -> None:
        self._console, self._title, self._steps = console, title, steps
        self._shown = -1

    def update(self, step: int, row: dict[str, Any] | None) -> None:
        """Print a line if a tenth of the run has passed since the last one."""
        tenth = 10 * step // self._steps
        if row is None or tenth == self._shown:
            return
        self._shown = tenth
        validation = row.get("validation_loss")
        more = f"  validation {validation:.3f}" if validation is not None else ""
        self._console.print(
            f"{self._title}  step {step}/{self._steps}  loss {row['loss']:.3f}{more}  "
            f"{row['seconds']:.0f} s",
            highlight=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Nothing is left to do."""


class Counter(Protocol):
    """Shows how many of a known number of things are done."""

    def advance(self, note: str) -> None:
        """Count one more, and show a few words beside the count."""


@contextmanager
def counting(title: str, total: int, done: int = 0) -> Iterator[Counter]:
    """A bar over things that are counted where standard output is a terminal, else plain lines.

    It speaks in every process: of several, the one that has the lock does the work.

    Args:
        title: What is being done.
        total: Number of things.
        done: How many were done before.
    """
    console = Console()
    if not console.is_terminal:
        yield _CountedLines(console, title, total, done)
        return
    bar = _CountedBar(console, title, total, done)
    with bar.progress:
        yield bar


class _CountedBar:
    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self.progress.add_task(title, total=total, completed=done, note="")

    def advance(self, note: str) -> None:
        self.progress.update(self._task, advance=1, note=note)


class _CountedLines:
    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self._console, self._title, self._total, self._done = console, title, total, done

    def advance(self, note: str) -> None:
        before, self._done = self._done, self._done + 1
        if 10 * self._done // self._total > 10 * before // self._total:
            self._console.print(
                f"{self._title}  {self._done}/{self._total}  {note}",
                highlight=False,
                soft_wrap=True,
            )
