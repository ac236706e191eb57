"""Causal language models of transformers small enough for a test, saved as a user has them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = ("<unk>", "<end>", "what", "where", "stands", "and", "a", "token", "score", "key")


def llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Save a random Llama of two layers, 16 wide, of bytes unless another vocabulary is given."""
    shape: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes))).to(dtype).eval()
    model.save_pretrained(folder)
    return model


def tokenizer(folder: Path) -> None:
    """Save a tokenizer of whole words with an end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="<end>", model_max_length=16
    )
    wrapped.save_pretrained(folder)


def words(path: Path, count: int = 3000, seed: int = 0) -> str:
    """Write a file of words in which most follow from the one before; return its path."""
    draw = random.Random(seed)
    text = [VOCABULARY[2]]
    for _ in range(count):
        known = VOCABULARY[2:]
        after = known[(known.index(text[-1]) + 1) % len(known)]
        text.append(after if draw.random() < 0.9 else draw.choice(known))
    path.write_text(" ".join(text), encoding="utf-8")
    return str(path)


def contents(folder: Path) -> dict[str, bytes | None]:
    """All that lies below a folder, to see that nothing of it changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
