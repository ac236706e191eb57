"""Vocabulary and sequence length of a recipe's data, without its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from whatwhere.lab.data import IndirectIndexingData, IndirectIndexingTask
from whatwhere.lab.data.hub import HUB
from whatwhere.lab.data.tokens import load_tokenizer

TOKENIZERS = {
    "bytes": 256,
    "gpt2": 50257,
    "openai-community/gpt2": 50257,
    "EleutherAI/gpt-neox-20b": 50277,
    "EleutherAI/pythia-1b": 50277,
    "llama-3": 128256,
    "meta-llama/Meta-Llama-3-8B": 128256,
    "meta-llama/Llama-3.2-1B": 128256,
    "meta-llama/Llama-3.2-3B": 128256,
}
"""Token ids of tokenizers, added ones included."""

DATASETS = {
    "jsb": 90,
    "maestro": 328,
    "midi": 328,
    "genome": 4107,
    "fasta": 4107,
    "text": 256,
    **{name: TOKENIZERS[found.tokenizer] for name, found in HUB.items()},
}
"""Token ids of data sets whose settings name no tokenizer."""


def vocabulary_of(data: Any) -> int:
    """Number of token ids of a recipe's data.

    Args:
        data: Settings of a task: `IndirectIndexingData`, or any with ``tokenizer``, ``dataset``
            or ``paths``, of which the first that tells is asked: a folder made by
            `whatwhere data prepare` (its manifest), the tokenizer, the data set.

    Raises:
        ValueError: If none is known.
    """
    if isinstance(data, IndirectIndexingData):
        return IndirectIndexingTask(data).vocab_size
    prepared = _prepared(tuple(getattr(data, "paths", ())))
    if prepared is not None:
        return prepared
    tokenizer, dataset = getattr(data, "tokenizer", None), getattr(data, "dataset", None)
    if tokenizer in TOKENIZERS:
        return TOKENIZERS[tokenizer]
    if tokenizer is not None and Path(tokenizer).is_dir():
        return load_tokenizer(tokenizer).vocab_size
    if tokenizer is None and dataset in DATASETS:
        return DATASETS[dataset]
    what = f"tokenizer {tokenizer!r}" if tokenizer is not None else f"data set {dataset!r}"
    raise ValueError(
        f"the vocabulary of {what} is not known here: give --vocab-size (known: "
        f"{', '.join([*TOKENIZERS, *DATASETS])}, or a tokenizer's folder)"
    )


def length_of(data: Any) -> int:
    """Tokens of a training sequence.

    Raises:
        ValueError: If the settings say nothing of it.
    """
    if isinstance(data, IndirectIndexingData):
        return IndirectIndexingTask(data).length
    length = getattr(data, "length", None)
    if not isinstance(length, int):
        raise ValueError(f"data of task {getattr(data, 'task', None)!r} have no length")
    return length


def _prepared(paths: tuple[str, ...]) -> int | None:
    manifest = Path(paths[0]) / "manifest.json" if len(paths) == 1 else None
    if manifest is None or not manifest.is_file():
        return None
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        return int(content["tokenizer"]["vocab_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest} says no tokenizer.vocab_size: {error!r}") from None
