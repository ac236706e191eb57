"""A tokenizer of `transformers` whose ids are bytes, for the models that read bytes."""

from __future__ import annotations

from typing import Any

SEPARATOR = "<0x00>"
"""Byte 0, which ends each document in training: the harness takes it for context where none is."""


def byte_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` of 256 tokens: the id of a token is the byte that it stands for.

    Byte 0 ends documents and pads, as in `whatwhere.lab.data.tokens.ByteTokenizer`.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    # No character is in the vocabulary, so that each falls back to its bytes.
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        clean_up_tokenization_spaces=False,
    )
