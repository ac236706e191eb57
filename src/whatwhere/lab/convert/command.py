"""`whatwhere convert` on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

import whatwhere as ww
from whatwhere.lab.errors import user_errors
from whatwhere.lab.pretrained import Source
from whatwhere.lab.storage import RunError


@dataclass(frozen=True)
class Convert:
    """Give a causal language model of transformers another position encoding.

    From RoPE to PoPE it reads text badly until it is fine-tuned (`whatwhere finetune`), less so
    with some --text to start from.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """folder of a Hugging Face model, or its name on the hub"""
    encoding: str | None = None
    """a name in whatwhere.ENCODINGS"""
    output: Path | None = None
    """new folder for the converted model and its tokenizer"""
    set: tuple[str, ...] = ()
    """options of the encoding, as fraction=0.5 delta=uniform"""
    start: Literal[
        "auto", "weights", "order", "signs", "centres", "scores", "distilled", "distilled-zero"
    ] = "auto"
    """what becomes of queries and keys for pope (docs/from_rope.md); auto: the best with --text"""
    text: tuple[str, ...] = ()
    """UTF-8 files, folders or patterns that starts look at"""
    train_length: int | None = None
    """tokens the model was trained at; max_position_embeddings of its config by default"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of the weights; auto is that of the checkpoint"""
    shim: bool = False
    """add a file for programs that do not import whatwhere (they need trust_remote_code)"""
    revision: str | None = None
    """branch, tag or commit on the hub"""
    check: bool = False
    """only say whether the model can be converted: exit code 0 if so, else 1"""

    def run(self) -> None:
        """Convert, or say whether that can be done."""
        if self.check:
            self._answer()
        else:
            self._convert()

    def _answer(self) -> None:
        from whatwhere.lab.convert.folder import check

        with user_errors():
            answer = check(self._source())
        if not answer:
            raise RunError(f"{self.model} cannot be converted: {answer.reason}")
        _say(f"can be converted: {answer.reason}")

    def _convert(self) -> None:
        from whatwhere.lab.convert.folder import check_output, convert_folder
        from whatwhere.lab.convert.options import parse_options

        with user_errors():
            if self.encoding is None:
                known = ", ".join(ww.ENCODINGS)
                raise ValueError(f"encoding: name one with --encoding: one of {known}")
            if self.output is None:
                raise ValueError("output: name a new folder with --output")
            given = parse_options(self.encoding, self.set)
            check_output(self.output)
            source = self._source()
            with Console().status(f"converting {self.model}"):
                report = convert_folder(
                    source,
                    self.encoding,
                    self.output,
                    train_length=self.train_length,
                    given=given,
                    dtype=self.dtype,
                    shim=self.shim,
                    start=self.start,
                    text=self.text,
                )
        for line in report.lines():
            _say(line)

    def _source(self) -> Source:
        source = Source(self.model, self.revision)
        if source.folder is None:
            _say(f"no folder {self.model} is here: asking the hub")
        return source


def _say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True)
