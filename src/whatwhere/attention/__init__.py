"""Attention for any `ScoreSpec`, by several backends.

To add a backend: a file here with a `Backend`, and one line in `BACKENDS`. The law tests pick it
up by themselves. Backends never import one another.
"""

from whatwhere.attention.api import (
    BACKENDS,
    Explanation,
    attention,
    cache_form,
    explain,
    grid,
    scores,
    table_bytes,
)
from whatwhere.attention.features import encode_keys, encode_queries, unturned
from whatwhere.attention.paged import paged_attention

__all__ = [
    "BACKENDS",
    "Explanation",
    "attention",
    "cache_form",
    "encode_keys",
    "encode_queries",
    "explain",
    "grid",
    "paged_attention",
    "scores",
    "table_bytes",
    "unturned",
]
