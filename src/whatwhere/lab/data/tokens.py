"""Text to tokens: bytes, or any tokenizer of `transformers` with a cache on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whatwhere.lab.data.sources import Document
from whatwhere.lab.data.words import Words, word_pattern

Tokens = NDArray[np.unsignedinteger]

_CACHE_FORMAT = 1  # to be raised when the meaning of cached files changes
_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class TokenStream:
    """The tokens of documents one after the other.

    Attributes:
        tokens: `(N,)` unsigned integers, possibly memory-mapped.
        bounds: `(documents + 1,)` int64: document `i`, with the separator that ends it, is
            `tokens[bounds[i] : bounds[i + 1]]`.
    """

    tokens: Tokens
    bounds: NDArray[np.int64]


class TextTokenizer(ABC):
    """Turns text into token ids.

    Attributes:
        name: `"bytes"`, or the name or folder of a `transformers` tokenizer.
        fingerprint: Changes whenever the tokens of some text could.
        vocab_size: Above every id.
        separator: Id that ends each document, or `None`.
        padding: Id to fill up sequences with.
        cacheable: Whether the tokens are worth keeping on disk.
    """

    name: str
    fingerprint: str
    vocab_size: int
    separator: int | None
    padding: int
    cacheable: bool = True

    @abstractmethod
    def encode(self, documents: Sequence[Document]) -> Iterator[Tokens]:
        """Yield the ids of each document, without the separator."""

    def save(self, folder: Path) -> None:  # noqa: B027 - bytes have no files
        """Write files from which `transformers` makes the tokenizer again, if there are any."""


class ByteTokenizer(TextTokenizer):
    """One token a byte. Byte 0, which no text file holds, separates documents and pads."""

    name = "bytes"
    fingerprint = "bytes"
    vocab_size = 256
    separator = 0
    padding = 0
    cacheable = False

    def encode(self, documents: Sequence[Document]) -> Iterator[Tokens]:
        """Yield the bytes of each document."""
        return (np.frombuffer(document.text, dtype=np.uint8) for document in documents)


class PretrainedTokenizer(TextTokenizer):
    """A tokenizer of `transformers`; its end-of-sequence token, if any, separates documents."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._tokenizer = _load_pretrained(name)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self.vocab_size = max(len(self._tokenizer), 1 + max(vocabulary.values(), default=0))
        self.separator = self._tokenizer.eos_token_id
        padding = (self._tokenizer.pad_token_id, self.separator, 0)
        self.padding = next(token for token in padding if token is not None)
        self._backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend:  # What its file may ask for would cut texts, or fill them up.
            self._backend.no_truncation()
            self._backend.no_padding()
        backend = self._backend
        state = backend.to_str() if backend else json.dumps(sorted(vocabulary.items()))
        pattern = word_pattern(state) if backend else None
        self._words = Words(backend, pattern) if pattern else None
        kind = type(self._tokenizer).__name__
        self.fingerprint = hashlib.sha256(f"{kind} {state}".encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self._tokenizer.save_pretrained(folder)

    def encode(self, documents: Sequence[Document]) -> Iterator[Tokens]:
        """Yield the ids of each document, without special tokens."""
        for first in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            texts = [d.text.decode() for d in documents[first : first + _DOCUMENTS_AT_ONCE]]
            if self._words:
                yield from map(self._words.encode, texts)
            else:
                yield from self._encode_fast(texts) if self._backend else self._encode_slow(texts)

    def _encode_fast(self, texts: list[str]) -> Iterator[Tokens]:
        # As transformers' own call does it, which also finds out where each token was.
        for found in self._backend.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(found.ids, dtype=np.uint32)

    def _encode_slow(self, texts: list[str]) -> Iterator[Tokens]:
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # it warns of texts beyond the model's length, which get cut here
        )
        yield from (np.asarray(ids, dtype=np.uint32) for ids in encoded["input_ids"])


def load_tokenizer(name: str) -> TextTokenizer:
    """Return the tokenizer `"bytes"`, or one of `transformers` by name or folder.

    Raises:
        ValueError: The tokenizer cannot be loaded.
    """
    return ByteTokenizer() if name == "bytes" else PretrainedTokenizer(name)


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/whatwhere`, or `~/.cache/whatwhere`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "whatwhere"


def load_stream(
    documents: Sequence[Document], tokenizer: TextTokenizer, cache_dir: Path | None = None
) -> TokenStream:
    """Return the tokens of documents, from the cache where they are there already.

    The cache is keyed by the content of documents and tokenizer, so it is never out of date.
    One that cannot be written costs a warning, not the run.

    Args:
        documents: In the order wanted.
        tokenizer: From `load_tokenizer`.
        cache_dir: Folder for the cache, `default_cache_dir()` if `None`; not used for bytes.
    """
    if not tokenizer.cacheable:
        return _encode(documents, tokenizer)
    content = [
        _CACHE_FORMAT,
        tokenizer.fingerprint,
        tokenizer.separator,
        [document.digest for document in documents],
    ]
    name = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    folder = (cache_dir or default_cache_dir()) / "tokens"
    files = folder / f"{name}.tokens.npy", folder / f"{name}.bounds.npy"
    stream = _read_cached(*files, documents=len(documents))
    if stream is None:
        stream = _encode(documents, tokenizer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _save(files[0], stream.tokens)
            _save(files[1], stream.bounds)
        except OSError as error:
            warnings.warn(
                f"tokens could not be cached in {str(folder)!r} ({error.strerror}); "
                "they are kept in memory for this run",
                stacklevel=2,
            )
    return stream


def _encode(documents: Sequence[Document], tokenizer: TextTokenizer) -> TokenStream:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    ending = [] if tokenizer.separator is None else [tokenizer.separator]
    separator = np.array(ending, dtype=dtype)
    parts: list[Tokens] = []
    ends = [0]
    for ids in tokenizer.encode(documents):
        parts += [ids.astype(dtype, copy=False), separator]
        ends.append(ends[-1] + len(ids) + len(separator))
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
    return TokenStream(tokens, np.array(ends, dtype=np.int64))


def _read_cached(tokens_file: Path, bounds_file: Path, documents: int) -> TokenStream | None:
    try:
        tokens = np.load(tokens_file, mmap_mode="r", allow_pickle=False)
        bounds = np.load(bounds_file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None  # missing or damaged: made anew
    if len(bounds) != documents + 1 or bounds[-1] != len(tokens):
        return None
    return TokenStream(tokens, bounds)


def _save(file: Path, array: NDArray[Any]) -> None:
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.save(stream, array)
        os.replace(temporary, file)  # noqa: PTH105 - as the name says, it replaces
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load_pretrained(name: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError(
            f"tokenizer {name!r} needs transformers: pip install 'whatwhere[lab]', "
            "or use tokenizer 'bytes'"
        ) from None
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        try:
            # What was fetched before needs no network, nor the long wait for one that is missing.
            return AutoTokenizer.from_pretrained(
                name, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise plain Exception, too
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :.")
        raise ValueError(
            f"tokenizer {name!r} could not be loaded ({reason}); give 'bytes', a local folder "
            "made by save_pretrained, or go online once to fetch it"
        ) from error
