"""Small models, and data folders in the layouts of the benchmarks, for tests of evaluation."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "the a king queen said that she he went home again and saw old house by water"
WORDS = TEXT.split(" ")


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs of some words, 400 tokens; `<|end|>` begins and ends texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join([TEXT] * 9)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>")


def llama(folder: Path, length: int = 1024) -> Path:
    """Save a small Llama of random weights with its tokenizer."""
    tokens = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def bytes_model(folder: Path, length: int = 1024) -> Path:
    """Save a small decoder of ours that reads bytes, without a tokenizer."""
    import whatwhere.models as wm

    torch.manual_seed(0)
    config = wm.WhatWhereConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        position_encoding="pope",
        initializer_range=0.5,
    )
    wm.WhatWhereForCausalLM(config).save_pretrained(folder)
    return folder


def cbt_item(draw: random.Random) -> dict[str, Any]:
    """An item of the form of the Children's Book Test."""
    sentences = [" ".join(draw.choices(WORDS, k=4)) + " ." for _ in range(20)]
    options = [f"Name{number}" for number in draw.sample(range(1000), 10)]
    question = f"{' '.join(draw.choices(WORDS, k=3))} XXXXX {draw.choice(WORDS)} ."
    return {
        "sentences": sentences,
        "question": question,
        "answer": draw.choice(options),
        "options": options,
    }


def cbt_text(items: list[dict[str, Any]]) -> str:
    """Items as a file of the test has them."""
    parts = []
    for item in items:
        lines = [f"{number} {text}" for number, text in enumerate(item["sentences"], 1)]
        options = "|".join(item["options"])
        lines.append(f"21 {item['question']}\t{item['answer']}\t\t{options}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def linked(folder: Path, data: Path) -> Path:
    """A data folder that can be added to: the real files, and a CBT of 2 x 2,500 made-up items."""
    folder.mkdir()
    for name in ("lambada", "piqa", "arc", "hellaswag", "blimp", "cbt_format"):
        (folder / name).symlink_to(data / name, target_is_directory=True)
    draw = random.Random(0)
    (folder / "cbt").mkdir()
    for part in ("NE", "CN"):
        items = [cbt_item(draw) for _ in range(2500)]
        path = folder / "cbt" / f"cbtest_{part}_test_2500ex.txt"
        path.write_text(cbt_text(items), encoding="utf-8")
    return folder


def no_network(monkeypatch: Any) -> None:
    """Let any attempt to reach another machine fail the test."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"

    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"the network was tried: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@contextmanager
def folder_unchanged(folder: Path) -> Iterator[None]:
    """Check that the files of a folder stay as they are."""

    def state() -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path): path.read_bytes() for path in files}

    before = state()
    yield
    assert state() == before
