"""How much memory a diagnosis takes, by formula, before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from whatwhere.analysis.layers import decoder_of, text_config
from whatwhere.lab.evaluate import rows_for

GIB = 2**30
DOUBLE, FLOAT = 8, 4
BLOCK = 4 * DOUBLE * 2**20
"""Bytes of the scores that are looked at together, and what is made of them."""
HEADROOM = 0.95
"""Share of the free memory that may be used."""


@dataclass(frozen=True)
class Estimate:
    """Bytes.

    Attributes:
        weights: Of the model.
        activations: Of one forward pass while its widest layer is computed.
        statistics: Of what the trace computes of one head in float64.
        logits: Of a batch of the loss, and what is made of those of one window.
    """

    weights: int
    activations: int
    statistics: int
    logits: int

    @property
    def total(self) -> int:
        """The weights, and the more of what a pass with and one without logits takes."""
        return self.weights + self.activations + max(self.statistics, self.logits)

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "a forward pass": self.activations,
            "statistics": self.statistics,
            "logits": self.logits,
        }
        listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return f"about {self.total / GIB:.2f} GiB ({listed})"


def estimate(model: Any, lengths: Sequence[int], batch: int, dtype: str) -> Estimate:
    """Bytes that one window or more need.

    A layer keeps, for each token, the outputs of all its matrices (twice: before and after a
    rotation or an activation) and six vectors of the hidden size. Attention through PyTorch's
    fused kernels keeps no matrix of all pairs; ``eager`` keeps one for each head, with its softmax
    in float32; a sliding window needs a mask of all pairs. Short windows are read in batches,
    whose tokens and logits `whatwhere.lab.evaluate` bounds.

    Args:
        model: Without weights, on the ``meta`` device.
        lengths: Tokens of windows.
        batch: Windows of the longest length in a forward pass of the trace.
        dtype: Of the weights, ``"auto"`` for the config's.
    """
    config = text_config(model)
    width = _width(config, dtype)
    numbers = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    layers = max(1, getattr(config, "num_hidden_layers", 1))
    hidden = getattr(config, "hidden_size", 0)
    embedded = {id(p) for p in _embeddings(model)}
    inner = [p for p in decoder_of(model).parameters() if p.ndim == 2 and id(p) not in embedded]
    outputs = sum(max(p.shape) for p in inner) / layers
    length, words = max(lengths), getattr(config, "vocab_size", 0) or 1
    batched = max(rows_for(n, words) * n for n in lengths)
    tokens = max(batch * length, batched)
    activations = tokens * width * (2 * outputs + 6 * hidden)
    heads = getattr(config, "num_attention_heads", 1)
    if getattr(config, "_attn_implementation", None) == "eager":
        activations += batch * heads * length**2 * (width + FLOAT)
    if getattr(config, "sliding_window", None):
        activations += length**2
    head_dim = _head_dim(config) or max(1, hidden // max(1, heads))
    # Of a head's queries and keys, up to twice as wide after the encoding, six copies.
    statistics = 6 * DOUBLE * length * 2 * head_dim * 2 + BLOCK
    # Of the batch as they are; of one window their logarithms, and a copy if not in float32.
    copies = FLOAT if width == FLOAT else 2 * FLOAT
    logits = words * (batched * width + length * copies)
    return Estimate(numbers * width, int(activations), statistics, logits)


def free(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check(
    name: str, model: Any, lengths: Sequence[int], batch: int, dtype: str, at: torch.device
) -> Estimate:
    """Estimate what a model needs, and refuse what is not there.

    Raises:
        ValueError: With the estimate.
    """
    needed, there = estimate(model, lengths, batch, dtype), free(at)
    if needed.total > HEADROOM * there:
        raise ValueError(
            f"memory: {name} at {max(lengths):,} tokens needs {needed}, and {there / GIB:.2f} "
            f"GiB are free on {at}: choose shorter --lengths, a smaller --batch-size, "
            "--dtype bfloat16 or another --device"
        )
    return needed


def _width(config: Any, dtype: str) -> int:
    chosen = getattr(torch, dtype, None) if dtype != "auto" else getattr(config, "dtype", None)
    if isinstance(chosen, str):
        chosen = getattr(torch, chosen, None)
    return chosen.itemsize if isinstance(chosen, torch.dtype) else FLOAT


def _head_dim(config: Any) -> int:
    layers = [config]
    if getattr(config, "is_heterogeneous", False):  # each layer has its own, as in Gemma 4
        layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    return max(getattr(layer, "head_dim", None) or 0 for layer in layers)


def _embeddings(model: Any) -> list[Any]:
    found = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    head = model.get_output_embeddings()
    return found + ([head.weight] if head is not None else [])
