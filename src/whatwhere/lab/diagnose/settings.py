"""What a diagnosis is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whatwhere.lab.harness.settings import DTYPES

ASK = ("auto", "needle", "copy")


@dataclass(frozen=True)
class Settings:
    """A diagnosis.

    Attributes:
        model: Folder of a run or of a Hugging Face model, or a name on the hub.
        text: UTF-8 files, folders or patterns.
        lengths: In tokens.
        output: Folder of numbers, figures and the page.
        tokenizer: ``bytes``, or a tokenizer's folder or hub name, in place of each model's own.
        against: Models to compare with, as `model`.
        texts: Windows of the longest length, spread evenly over the text.
        batch_size: Windows in a forward pass.
        device: As in ``cuda:0``; ``None`` is the GPU where there is one.
        dtype: Of the weights, one of `DTYPES`.
        layers: Whose keys and queries are drawn as points; none is chosen by rule.
        heads: The same.
        train_length: In place of what configs say.
        retrieval: Whether facts are hidden and asked for.
        needles: Facts for each length and depth.
        seed: Of what is drawn at random: the facts.
        ask: How, one of `ASK`: a question in words (``needle``), or a key and a value that are to
            be copied (``copy``); ``auto`` is copies for models that read bytes, else questions.
    """

    model: str
    text: tuple[str, ...]
    lengths: tuple[int, ...]
    output: Path
    tokenizer: str | None = None
    against: tuple[str, ...] = ()
    texts: int = 4
    batch_size: int = 1
    device: str | None = None
    dtype: str = "auto"
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    train_length: int | None = None
    retrieval: bool = True
    needles: int = 2
    seed: int = 0
    ask: str = "auto"

    @property
    def rising(self) -> tuple[int, ...]:
        """The lengths in order, each once."""
        return tuple(sorted(set(self.lengths)))

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            ValueError: With the option, what came and what was expected.
        """
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths: expected integers of at least 2, got {list(self.lengths)}")
        if not self.text:
            raise ValueError("text: name files or folders to read")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.ask not in ASK:
            raise ValueError(f"ask: expected one of {', '.join(ASK)}, got {self.ask!r}")
        floors = {"texts": 1, "batch_size": 1, "train_length": 1, "needles": 1, "seed": 0}
        for name, least in floors.items():
            value = getattr(self, name)
            if value is not None and value < least:
                option = name.replace("_", "-")
                raise ValueError(f"{option}: expected at least {least}, got {value}")
        for name in ("layers", "heads"):
            if min(getattr(self, name), default=0) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {list(getattr(self, name))}")
        if len({self.model, *self.against}) < 1 + len(self.against):
            raise ValueError("against: a model is named twice")

    def identity(self) -> dict[str, Any]:
        """What numbers depend on besides model and text; device and batch size do not count."""
        return {
            "lengths": list(self.rising),
            "texts": self.texts,
            "dtype": self.dtype,
            "layers": list(self.layers),
            "heads": list(self.heads),
            "train_length": self.train_length,
            "needles": self.needles,
            "seed": self.seed,
            "ask": self.ask,
        }
