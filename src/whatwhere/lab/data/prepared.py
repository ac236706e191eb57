"""Stub."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from whatwhere.lab.data.base import Task


class TokensData(BaseModel):
    """Stub."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: Literal["tokens"] = "tokens"
    dataset: str = "text"
    paths: tuple[str, ...] = ()
    tokenizer: str | None = None
    length: int = 1024
    layout: Literal["auto", "stream", "pieces"] = "auto"
    transpose: int = 0
    max_bytes: int | None = None


class TokensTask(Task):
    """Stub."""
