"""`whatwhere bench` on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from rich.console import Console

from whatwhere.lab.bench.settings import Settings
from whatwhere.lab.errors import user_errors
from whatwhere.lab.storage import RunError


@dataclass(frozen=True)
class Bench(Settings):
    """Measure encodings and backends side by side, as ratios to RoPE on PyTorch's best kernel.

    Outputs and gradients are compared with float64 first: a side that is wrong is not timed, and
    the exit code is 1 if it is one of ours. Times are medians over interleaved rounds; absolute
    ones are given on a GPU alone.
    """

    what: Annotated[
        tyro.conf.Positional[Literal["attention", "decode", "step"]],
        tyro.conf.arg(metavar="[attention|decode|step]"),
    ] = "attention"
    """attention (passes over a sequence), decode (one query, a cache) or step (of training)"""

    def run(self) -> None:
        """Measure."""
        from whatwhere.lab.bench.calibrate import calibrate
        from whatwhere.lab.bench.run import run, wrong
        from whatwhere.lab.bench.table import show

        def say(line: str) -> None:
            Console().print(line, highlight=False, soft_wrap=True)

        with user_errors():
            self.check()
        if self.calibrate:
            with user_errors():
                path = calibrate(self, say)
            say(f"choices: {path}")
            return
        with user_errors():
            rows = run(self, say)
        show(rows)
        said = wrong(rows)
        if said:
            raise RunError(said)
