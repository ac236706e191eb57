"""Causal language models of `transformers` from folders and the hub; what is wrong in one line.

Code that comes with a model is never run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_OFFLINE = ("connect", "offline", "resolve", "timed out", "internet")


@dataclass(frozen=True)
class Source:
    """Where a model is: a folder, or a name on the hub.

    Attributes:
        name: Either.
        revision: Branch, tag or commit on the hub.
    """

    name: str
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder, unless it is a name."""
        place = Path(self.name).expanduser()
        return place if place.is_dir() else None

    def check(self) -> None:
        """Check what can be seen without looking into it.

        Raises:
            ValueError: If it can be neither, or a folder has no config.
        """
        if self.folder is not None:
            if self.revision is not None:
                raise ValueError(f"revision: {self.name} is a folder, which has none")
            if not (self.folder / "config.json").exists():
                inside = self.folder / "model"
                hint = f"; did you mean {inside}?" if (inside / "config.json").exists() else ""
                raise ValueError(f"{self.name} holds no model: there is no config.json{hint}")
        elif Path(self.name).exists() or not _HUB_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is neither a folder nor the name of a model")

    def load_config(self) -> Any:
        """The config.

        Raises:
            ValueError: If there is none that can be read.
        """
        from transformers import AutoConfig

        import whatwhere.models  # noqa: F401  (registers our own model types)

        self.check()
        return self._load(AutoConfig.from_pretrained)

    def load_model(self, dtype: str = "auto") -> Any:
        """The model, on the CPU, in evaluation mode, with every one of its weights.

        Args:
            dtype: A name in `torch`, or ``"auto"`` for that of the checkpoint.

        Raises:
            ValueError: If there is none that can be read, or weights are missing, of a wrong
                shape, or those of an encoding that the config does not name.
        """
        from transformers import AutoModelForCausalLM

        import whatwhere.models  # noqa: F401

        self.check()
        model, info = self._load(
            AutoModelForCausalLM.from_pretrained, dtype=dtype, output_loading_info=True
        )
        self._refuse("lacks weights that its config asks for", info["missing_keys"])
        # transformers only warns of weights that it drops: old checkpoints hold buffers it no
        # longer wants. A delta that is dropped is an encoding that is lost.
        lost = [key for key in info["unexpected_keys"] if "position_encoding." in key]
        self._refuse("has weights of an encoding that its config does not name", lost)
        return model

    def load_tokenizer(self) -> Any | None:
        """The tokenizer, `None` if there is none.

        Raises:
            ValueError: If there is one that cannot be read.
        """
        from transformers import AutoTokenizer
        from transformers.utils import cached_file

        def look(place: str, **more: Any) -> bool:
            more.pop("trust_remote_code")
            quiet = {"_raise_exceptions_for_missing_entries": False}
            return any(cached_file(place, name, **quiet, **more) for name in TOKENIZER_FILES)

        # Asked for first: some tokenizers can be made without any file, and know no words then.
        there = self._load(look, "tokenizer")
        return self._load(AutoTokenizer.from_pretrained, "tokenizer") if there else None

    def _load(self, load: Any, what: str = "model", **more: Any) -> Any:
        place = str(self.folder or self.name)
        more |= {"revision": self.revision, "trust_remote_code": False}
        try:
            with quiet():
                if self.folder is not None:
                    return load(place, local_files_only=True, **more)
                try:
                    # What was fetched before needs no network, nor the long wait for its lack.
                    found = load(place, local_files_only=True, **more)
                except (OSError, ValueError):
                    found = None
                return found or load(place, local_files_only=False, **more)
        except (
            Exception
        ) as error:  # those of transformers, tokenizers and safetensors share no more
            raise ValueError(self._describe(error, what)) from error

    def _describe(self, error: Exception, what: str) -> str:
        text = str(error).strip() or type(error).__name__
        if "trust_remote_code" in text:
            return f"{self.name} needs code of its own, which is never run"
        if self.folder is not None:
            return f"{self.name} holds no {what} that can be read: {' '.join(text.split())}"
        first = text.splitlines()[0].rstrip(" .:")
        hint = "; go online once to fetch it, or give a folder"
        offline = any(word in first.lower() for word in _OFFLINE)
        return (
            f"there is no folder {self.name}, and no {what} of {self.name!r} could be read from "
            f"the hub ({first}){hint if offline else ''}"
        )

    def _refuse(self, what: str, keys: Any) -> None:
        if keys:
            named = sorted(keys)
            more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
            raise ValueError(f"{self.name} {what}: {named[0]}{more}")


@contextmanager
def quiet() -> Iterator[None]:
    """Of attempts to connect, and of weights in tables: errors here say it once."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
