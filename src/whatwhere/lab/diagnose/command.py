"""`whatwhere diagnose` on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from whatwhere.lab.diagnose.settings import Settings
from whatwhere.lab.errors import user_errors
from whatwhere.lab.lengths import parse_lengths

Numbers = Annotated[tuple[str, ...], tyro.conf.arg(metavar="N,N,...")]


@dataclass(frozen=True)
class Diagnose:
    """Look into a model while it reads long texts: numbers, figures, and a page in words.

    Any causal language model: a run, a converted model, or one of transformers as it is. Nothing
    of it is changed. Parts that the output folder has finished are not repeated.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_MODEL")]
    """folder of a run or of a Hugging Face model, or a name on the hub"""
    text: tuple[str, ...]
    """UTF-8 files, folders or patterns"""
    lengths: Numbers
    """lengths in tokens: 512,1024,2048"""
    output: Path
    """folder of numbers, figures and report.html"""
    tokenizer: str | None = None
    """bytes, or a tokenizer's folder or hub name; the model's own by default"""
    against: tuple[str, ...] = ()
    """models to compare with, as the first one"""
    texts: int = 4
    """windows of the longest length, spread evenly over the text"""
    batch_size: int = 1
    """windows in a forward pass"""
    train_length: int | None = None
    """tokens that the models were trained at; their configs' by default"""
    layers: Numbers = ()
    """whose keys and queries are drawn as points; chosen by rule by default"""
    heads: Numbers = ()
    """the same"""
    retrieval: bool = True
    """hide facts in the text and ask for them"""
    needles: int = 2
    """of these for each length and depth"""
    ask: Literal["auto", "needle", "copy"] = "auto"
    """a question in words, or a key and a value to copy; auto: copies if the model reads bytes"""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16"""
    device: str | None = None
    """cpu, cuda or cuda:N; the GPU if there is one"""
    seed: int = 0
    """of what is drawn"""

    def run(self) -> None:
        """Diagnose."""

        def say(line: str) -> None:
            Console().print(line, highlight=False, soft_wrap=True)

        with user_errors():
            settings = self._settings()
            settings.check()
            from whatwhere.lab.diagnose.running import run

            page = run(settings, say)
        say(f"report: {page}")

    def _settings(self) -> Settings:
        return Settings(
            self.model,
            self.text,
            tuple(parse_lengths(self.lengths)),
            self.output,
            self.tokenizer,
            self.against,
            self.texts,
            self.batch_size,
            self.device,
            self.dtype,
            tuple(_numbers("layers", self.layers)),
            tuple(_numbers("heads", self.heads)),
            self.train_length,
            self.retrieval,
            self.needles,
            self.seed,
            self.ask,
        )


def _numbers(name: str, given: tuple[str, ...]) -> list[int]:
    try:
        return parse_lengths(given)
    except ValueError:
        raise ValueError(f"{name}: expected integers as in 0,3, got {given}") from None
