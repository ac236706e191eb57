"""Shapes of the papers' models, by name.

Sources: PoPE, arXiv 2509.10534, for ``indirect-indexing``, ``124m``, ``253m``, ``774m``, ``jsb``,
``maestro``, ``genome``; RoPE-ID, arXiv 2603.18017, for ``llama-1b`` and ``llama-3b``; partial
RoPE, arXiv 2603.11611, for ``llama-1b``, ``llama-8b`` and ``pythia-1b``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

from whatwhere.encodings import options
from whatwhere.models.configuration import WhatWhereConfig


@dataclass(frozen=True)
class Preset:
    """One shape.

    Attributes:
        shape: Fields of `WhatWhereConfig`.
        about: What it is, and what the paper leaves open.
        delta: How PoPE's ``delta`` starts unless told otherwise.
    """

    shape: dict[str, Any]
    about: str
    delta: Literal["zero", "uniform"] = "zero"


def _decoder(width: int, heads: int, layers: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    return {**sizes, **more}


def _openwebtext(width: int, heads: int, layers: int) -> Preset:
    return Preset(
        _decoder(width, heads, layers, vocab_size=50257, max_position_embeddings=1024),
        "PoPE paper on OpenWebText, GPT-2 tokenizer, trained at 1024. That the embeddings are "
        "tied, the MLP is GELU of 4 times the width and there are no biases is read off the "
        "nominal size.",
    )


def _llama(
    width: int, heads: int, layers: int, head_dim: int, note: str, inner: int = 8192
) -> Preset:
    shape = _decoder(
        width,
        heads,
        layers,
        head_dim=head_dim,
        num_key_value_heads=8,
        intermediate_size=inner,
        mlp="swiglu",
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        vocab_size=128256,
        max_position_embeddings=4096,
    )
    return Preset(shape, f"Llama style, Llama 3 tokenizer, trained at 4096. {note}")


PRESETS: dict[str, Preset] = {
    "indirect-indexing": Preset(
        _decoder(512, 8, 8, vocab_size=66, max_position_embeddings=48),
        "PoPE paper, indirect indexing. 48 is the longest example (40 letters, source, shift and "
        "target with their separators), 66 the 52 letters, 10 digits, three signs and padding.",
        delta="uniform",
    ),
    "124m": _openwebtext(768, 12, 12),
    "253m": _openwebtext(1024, 16, 16),
    "774m": _openwebtext(1280, 20, 36),
    "jsb": Preset(
        _decoder(256, 8, 6, vocab_size=90, max_position_embeddings=2048, dropout=0.2),
        "PoPE paper, JSB chorales.",
        delta="uniform",
    ),
    "maestro": Preset(
        _decoder(384, 8, 6, vocab_size=328, max_position_embeddings=2048, dropout=0.1),
        "PoPE paper, MAESTRO as REMI tokens.",
        delta="uniform",
    ),
    "genome": Preset(
        _decoder(1024, 16, 16, vocab_size=4107, max_position_embeddings=1000, dropout=0.1),
        "PoPE paper, human genome as 6-mers.",
        delta="uniform",
    ),
    "llama-1b": _llama(
        2048,
        32,
        16,
        64,
        "Both Llama papers have this shape. The partial RoPE paper trains it at 1024 to 8192, "
        "RoPE-ID at 4096.",
    ),
    "llama-3b": _llama(
        3072,
        24,
        28,
        128,
        "RoPE-ID's larger model. The paper says 3B and Llama style; layers, widths and heads are "
        "those of Llama 3.2 3B, and that embeddings are untied follows llama-1b: it is left open.",
    ),
    "llama-8b": _llama(
        4096,
        32,
        32,
        128,
        "Partial RoPE paper's largest model, the shape of Llama 3 8B.",
        inner=14336,
    ),
    "pythia-1b": Preset(
        _decoder(
            2048,
            8,
            16,
            tie_word_embeddings=False,
            vocab_size=50304,
            max_position_embeddings=2048,
        ),
        "Partial RoPE paper. The shape of Pythia 1B (heads of 256 channels); its parallel "
        "residual branches, LayerNorm and biases are not in this decoder.",
    ),
}


def preset(name: str, **overrides: Any) -> WhatWhereConfig:
    """The config of a paper's model.

    The encoding is RoPE unless ``position_encoding`` says otherwise. Encodings with a learned
    ``delta`` start it as the paper does for that model (uniformly in ``[-2 pi, 0]`` for indirect
    indexing, music and genome, else at 0) unless the options say otherwise. RoPE's base is
    10,000 everywhere, as the PoPE paper has it; the others do not say.

    Args:
        name: A name in `PRESETS`, in any case. ``llama-3b`` is partly a guess, see its ``about``.
        **overrides: Fields of `WhatWhereConfig` that shall differ.

    Raises:
        ValueError: If the name or a field is unknown, or the values do not fit one another.
    """
    key = str(name).lower()
    if key not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    known = [f.name for f in fields(WhatWhereConfig)]
    for override in overrides:
        if override not in known:
            close = get_close_matches(override, known, n=1)
            hint = f": did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown setting {override!r} for preset {key!r}{hint}")
    chosen = {**PRESETS[key].shape, **overrides}
    encoding = chosen.get("position_encoding", "rope")
    given = chosen.get("position_encoding_options", {})
    chosen["position_encoding_options"] = _with_delta(encoding, given, PRESETS[key].delta)
    return WhatWhereConfig(**chosen)


def _with_delta(encoding: Any, given: Any, delta: str) -> Any:
    """Options with the paper's start of ``delta`` for the encodings that have one."""

    def fill(name: str, option: Any) -> Any:
        option = {} if option is None else option
        if not isinstance(option, dict):
            return option  # the config says what is wrong
        return {"delta": delta, **option} if "delta" in options(name) else dict(option)

    given = {} if given is None else given
    if not isinstance(encoding, (str, list, tuple)) or not isinstance(given, (dict, list, tuple)):
        return given  # the config says what is wrong
    if isinstance(encoding, str) and isinstance(given, dict):
        return fill(encoding, given)
    size = len(given if isinstance(encoding, str) else encoding)
    names = [encoding] * size if isinstance(encoding, str) else list(encoding)
    choices = [given] * size if isinstance(given, dict) else list(given)
    if len(names) != len(choices):
        return given  # the config says what is wrong
    return [fill(name, option) for name, option in zip(names, choices, strict=True)]
