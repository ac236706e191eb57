"""The models of a diagnosis: where each lies, what it reads, and what it is known by."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from whatwhere.lab import extrapolate, runs
from whatwhere.lab.data import read_tokens
from whatwhere.lab.data.tokens import Tokens
from whatwhere.lab.diagnose.settings import Settings
from whatwhere.lab.harness import subject as harness
from whatwhere.lab.harness.byte_tokenizer import byte_tokenizer
from whatwhere.lab.pretrained import Source


@dataclass(frozen=True)
class Subject:
    """A model to diagnose.

    Attributes:
        given: As named by the user.
        path: Folder, or name on the hub.
        tokenizer: ``"bytes"``, or a folder or name.
        label: Short name, no other model of the diagnosis has it.
        train_length: Tokens it was trained at, as far as its run or its config says.
        folder_name: Of its run or model, for where two labels are the same.
        stretched: Options of YaRN where a run has it without weights of its own, else ``None``.
    """

    given: str
    path: str
    tokenizer: str
    label: str
    train_length: int | None
    folder_name: str
    stretched: dict[str, Any] | None = None

    @property
    def unit(self) -> str:
        """What its losses are in."""
        return "nats per byte" if self.tokenizer == "bytes" else "nats per token"

    def identity(self, tokens: Tokens) -> dict[str, Any]:
        """What it is known by: SHA-256 of its files or its commit, and that of its tokens."""
        folder = Path(self.path)
        weights = (
            {"sha256": harness.folder_digest(folder)}
            if folder.is_dir()
            else {"name": self.path, "commit": harness.hub_commit(self.path, "main")}
        )
        stretched = {"yarn": self.stretched} if self.stretched is not None else {}
        text = hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()
        return {**weights, **stretched, "tokens": text}

    def skeleton(self) -> Any:
        """The model without its weights, which takes no memory."""
        from transformers import AutoModelForCausalLM

        config = Source(self.path).load_config()
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (KeyError, ValueError, TypeError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{self.given} is no causal language model ({said})") from error
        return self._stretch(model)

    def load(self, dtype: str, device: torch.device) -> Any:
        """The model, in evaluation mode."""
        model = self._stretch(Source(self.path).load_model(dtype))
        return model.to(device).eval()

    def load_tokenizer(self) -> Any:
        """The tokenizer, as transformers has them, for bytes as for others.

        Raises:
            ValueError: If it cannot be loaded.
        """
        if self.tokenizer == "bytes":
            return byte_tokenizer()
        found = Source(self.tokenizer).load_tokenizer()
        if found is None:
            raise ValueError(f"tokenizer: {self.tokenizer} holds none")
        return found

    def _stretch(self, model: Any) -> Any:
        if self.stretched is not None:
            model.set_position_encoding("yarn", **self.stretched)
        return model


def find(settings: Settings) -> list[Subject]:
    """The models of a diagnosis, the first one that of `settings.model`.

    Raises:
        ValueError: If one is neither a folder with a model nor a name on the hub.
    """
    found = [_find(given, settings) for given in (settings.model, *settings.against)]
    labels = [one.label for one in found]
    return [
        replace(one, label=_unlike(one, found)) if labels.count(one.label) > 1 else one
        for one in found
    ]


def read(subject: Subject, settings: Settings) -> Tokens:
    """The text as tokens of a model.

    Raises:
        ValueError: If there is no text, less than the longest length of it, or no such tokenizer.
    """
    tokens = read_tokens(settings.text, subject.tokenizer)
    longest = settings.rising[-1]
    if len(tokens) < longest:
        raise ValueError(
            f"text: it has {len(tokens):,} tokens for {subject.given}, fewer than the longest "
            f"length of {longest:,}: give more text or shorter --lengths"
        )
    return tokens


def count(tokens: Tokens, settings: Settings) -> int:
    """Windows of the longest length that do not overlap, at most as many as are asked for."""
    return max(1, min(settings.texts, len(tokens) // settings.rising[-1]))


def _find(given: str, settings: Settings) -> Subject:
    path = Path(given).expanduser()
    if not path.is_dir():
        found = harness.find(given)
        tokenizer = settings.tokenizer or found.tokenizer
        return Subject(given, found.path, tokenizer, found.label, None, found.label)
    borrowed = _borrowed(path, settings.rising)
    if borrowed is not None:
        return borrowed
    known = extrapolate.find_subject(path, settings.tokenizer)
    tokenizer = settings.tokenizer or known.tokenizer
    name = known.run.folder.name if known.run else known.name
    return Subject(given, str(known.model), tokenizer, known.name, known.train_length, name)


def _borrowed(folder: Path, lengths: Sequence[int]) -> Subject | None:
    # A run of YaRN without fine-tuning: RoPE's weights, with the factor for the longest length.
    if not (folder / "run.json").exists():
        return None
    run, record = runs.load_run(folder), runs.load_record(folder)
    source = runs.source_folder(folder, record)
    if source is None or run.trained or run.config.encoding.name != "yarn":
        return None
    known = extrapolate.find_subject(source)
    factor = max(1.0, lengths[-1] / (known.train_length or lengths[-1]))
    options = {**run.config.encoding.options, "factor": factor}
    label, name = run.config.label, folder.resolve().name
    given, model = str(folder), str(known.model)
    return Subject(given, model, known.tokenizer, label, known.train_length, name, options)


def _unlike(one: Subject, every: Sequence[Subject]) -> str:
    # Two seeds of one encoding have folders of their own names; else what the user wrote.
    names = [other.folder_name for other in every]
    return one.folder_name if names.count(one.folder_name) == 1 else one.given
