"""The model that is evaluated: where it lies, its tokenizer, and what it is known by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whatwhere.lab import extrapolate
from whatwhere.lab.harness.byte_tokenizer import byte_tokenizer
from whatwhere.lab.harness.settings import Settings

HASHED = (".safetensors", ".bin", ".json", ".model", ".txt", ".py", ".jinja")
"""Files of a model's folder that numbers depend on."""


@dataclass(frozen=True)
class Subject:
    """A model for the harness.

    Attributes:
        given: As named by the user.
        path: Folder, or name on the hub, for `from_pretrained`.
        tokenizer: `"bytes"`, or a folder or name.
        label: Short name for tables.
        folder: Where results go by default.
    """

    given: str
    path: str
    tokenizer: str
    label: str
    folder: Path


def find(given: str) -> Subject:
    """The model of a run folder or of a Hugging Face folder, or else one on the hub.

    Raises:
        ValueError: If a folder holds no model, or a name can only be a folder that is not there.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        found = extrapolate.find_subject(path)
        own = found.run.folder / "harness" if found.run else Path("runs") / "harness" / found.name
        label = found.run.folder.name if found.run else found.name
        return Subject(given, str(found.model), found.tokenizer, label, own)
    parts = given.split("/")
    if len(parts) > 2 or not all(part.strip(".~") for part in parts) or path.exists():
        raise ValueError(f"model: {given} is no folder, and no name on the hub")
    return Subject(given, given, given, given, Path("runs") / "harness" / given.replace("/", "__"))


def identity(subject: Subject, settings: Settings) -> dict[str, Any]:
    """What a model is known by: SHA-256 of its folder's files, or its commit on the hub.

    Raises:
        ValueError: If a name is not on the hub, or the hub cannot be reached.
    """
    folder = Path(subject.path)
    if not folder.is_dir():
        return {"name": subject.path, "commit": hub_commit(subject.path, settings.revision)}
    found = {"sha256": folder_digest(folder), "tokenizer": subject.tokenizer}
    if subject.tokenizer not in ("bytes", subject.path):
        found["tokenizer"] = tokenizer_digest(load_tokenizer(subject, settings))
    return found if subject.tokenizer != subject.path else {"sha256": found["sha256"]}


def load_tokenizer(subject: Subject, settings: Settings) -> Any:
    """The tokenizer, for bytes as for others.

    Raises:
        ValueError: If it cannot be loaded, or has no token to begin a text with.
    """
    if subject.tokenizer == "bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    own = subject.tokenizer == subject.path
    with loading(f"tokenizer of {subject.given}"):
        tokenizer = AutoTokenizer.from_pretrained(
            subject.tokenizer,
            revision=settings.revision if own else "main",
            trust_remote_code=settings.trust_remote_code,
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"model: the tokenizer of {subject.given} has neither bos_token nor eos_token, and "
            "the harness begins texts with one of them"
        )
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer: its backend, or its vocabulary if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(state.encode()).hexdigest()


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what `from_pretrained` raises for a missing or damaged model into one line."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # transformers, safetensors and tokenizers raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
        raise ValueError(f"model: {what} cannot be loaded ({reason})") from error


def folder_digest(folder: Path) -> str:
    """SHA-256 of the files of a model's folder that numbers depend on."""
    found = hashlib.sha256()
    for path in _files(folder):
        found.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.iterdir()) if p.suffix in HASHED and p.is_file())


def hub_commit(name: str, revision: str) -> str:
    """Commit of a model on the hub.

    Raises:
        ValueError: If it is not there, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    with loading(name):
        config = AutoConfig.from_pretrained(name, revision=revision)
    return str(getattr(config, "_commit_hash", None) or revision)
