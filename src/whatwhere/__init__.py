"""whatwhere: position encodings that keep what a token is apart from where it stands.

>>> import torch, whatwhere as ww
>>> encoding = ww.PoPE(head_dim=64, num_heads=8)
>>> q = k = v = torch.randn(2, 8, 16, 64)
>>> ww.attention(q, k, v, encoding(), causal=True).shape
torch.Size([2, 8, 16, 64])
"""

from importlib import import_module
from types import ModuleType

from whatwhere.attention import (
    BACKENDS,
    Explanation,
    attention,
    cache_form,
    encode_keys,
    encode_queries,
    explain,
    grid,
    paged_attention,
    scores,
    table_bytes,
    unturned,
)
from whatwhere.encodings import (
    ENCODINGS,
    ALiBi,
    Encoding,
    Learned,
    NoPE,
    PoPE,
    PoPEID,
    RoPE,
    RoPEID,
    Sinusoidal,
    YaRN,
    make,
)
from whatwhere.spec import ScoreSpec, UnsupportedError

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "ENCODINGS",
    "ALiBi",
    "Encoding",
    "Explanation",
    "Learned",
    "NoPE",
    "PoPE",
    "PoPEID",
    "RoPE",
    "RoPEID",
    "ScoreSpec",
    "Sinusoidal",
    "UnsupportedError",
    "YaRN",
    "attention",
    "cache_form",
    "encode_keys",
    "encode_queries",
    "explain",
    "grid",
    "make",
    "paged_attention",
    "scores",
    "table_bytes",
    "unturned",
]


def __getattr__(name: str) -> ModuleType:
    """`whatwhere.analysis`, `models` and `compat` when they are asked for: they need more."""
    if name in ("analysis", "compat", "models"):
        return import_module(f"whatwhere.{name}")
    raise AttributeError(f"module 'whatwhere' has no attribute {name!r}")
