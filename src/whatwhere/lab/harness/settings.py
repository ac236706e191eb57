"""What an evaluation is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """An evaluation with the harness.

    Attributes:
        model: Folder of a run or of a Hugging Face model, or a name on the hub.
        tasks: Names, patterns, YAML files or folders of tasks.
        data: Folder of local files in place of the hub.
        include: Folders of more tasks.
        lengths: Prompt lengths for tasks that generate their prompts (RULER), in tokens.
        batch_size: Sequences in a forward pass, or `auto`.
        limit: Documents of each task, or a share of them below 1; `None` is all.
        num_fewshot: Examples in front of each document; `None` is the task's own number.
        max_length: Tokens that the model reads; `None` is what its config says.
        dtype: Of the weights, one of `DTYPES`.
        device: As in `cuda:0`; `None` is the GPU where there is one.
        seed: Of everything that draws; `None` is the harness's own seeds.
        bootstrap: Resamples for standard errors that have no closed form (perplexity).
        log_samples: Whether to write each document with the model's answer.
        revision: Of a model on the hub.
        trust_remote_code: Whether to run code that comes with a model.
        output: Folder of results; `None` is one below the run, or `runs/harness/MODEL`.
    """

    model: str
    tasks: tuple[str, ...]
    data: Path | None = None
    include: tuple[Path, ...] = ()
    lengths: tuple[int, ...] = ()
    batch_size: str = "1"
    limit: float | None = None
    num_fewshot: int | None = None
    max_length: int | None = None
    dtype: str = "auto"
    device: str | None = None
    seed: int | None = None
    bootstrap: int = 100_000
    log_samples: bool = False
    revision: str = "main"
    trust_remote_code: bool = False
    output: Path | None = None

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: With the option, what came and what was expected.
        """
        size = self.batch_size.partition(":")[0]
        if size != "auto" and not (size.isdecimal() and int(size) > 0):
            raise ValueError(
                f"batch-size: expected a positive integer or auto, got {self.batch_size}"
            )
        if self.limit is not None and not (
            0 < self.limit < 1 or self.limit == int(self.limit) > 0
        ):
            raise ValueError(f"limit: expected a count or a share below 1, got {self.limit}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        floors = {"num_fewshot": 0, "max_length": 2, "bootstrap": 0, "seed": 0}
        for name, least in floors.items():
            value = getattr(self, name)
            if value is not None and value < least:
                option = name.replace("_", "-")
                raise ValueError(f"{option}: expected at least {least}, got {value}")
        if self.data is not None and not self.data.is_dir():
            raise ValueError(f"data: {self.data} is no folder")
        for folder in self.include:
            if not folder.is_dir():
                raise ValueError(f"include-path: {folder} is no folder")

    @property
    def seeds(self) -> tuple[int, int, int, int]:
        """Seeds of Python, NumPy, PyTorch and examples; the harness's own by default."""
        if self.seed is None:
            return 0, 1234, 1234, 1234
        return self.seed, self.seed, self.seed, self.seed

    def identity(self) -> dict[str, Any]:
        """What numbers depend on besides model and data; batch size and device do not count."""
        names = ("limit", "num_fewshot", "max_length", "dtype", "bootstrap", "log_samples")
        values = asdict(self)
        lengths = {"lengths": list(self.lengths)} if self.lengths else {}
        return {name: values[name] for name in names} | {"seeds": list(self.seeds)} | lengths


def split_names(given: Sequence[str]) -> tuple[str, ...]:
    """Names from `a,b c`."""
    return tuple(part.strip() for value in given for part in value.split(",") if part.strip())
