"""Which backend of attention a training step would take, on a device that need not be here."""

from __future__ import annotations

import torch

import whatwhere as ww
from whatwhere.attention import choices
from whatwhere.lab.plan.shape import Shape


def backend_of(shape: Shape, length: int, kind: str, device_name: str) -> str:
    """The backend that `whatwhere.attention` takes in training.

    Args:
        shape: The model; a backend that it names is the answer.
        length: Tokens of a sequence.
        kind: ``"cpu"``, where `whatwhere.explain` is asked, or ``"cuda"``, where what was
            measured on the device decides, and PyTorch's kernels where nothing was.
        device_name: The GPU's own name, as PyTorch gives it.

    Raises:
        ValueError: If the backend that the model names does not exist.
    """
    named = shape.attention_backend
    if named not in ("auto", *ww.BACKENDS):
        known = ", ".join(["auto", *ww.BACKENDS])
        raise ValueError(f"model.attention_backend: no {named!r}, expected one of {known}")
    if named != "auto":
        return named
    if kind == "cpu":
        return _on_cpu(shape, length)
    measured = choices.best(
        device_name,
        shape.head_dim,
        shape.head_dim,
        length,
        "forward+backward",
        feature_dim=shape.feature_dim,
        measured=True,
    )
    if measured is not None and measured in ww.BACKENDS:
        return measured
    hidden = shape.packed or shape.sliding_window is not None
    return "flex" if hidden or shape.spec.slopes is not None else "sdpa"


def _on_cpu(shape: Shape, length: int) -> str:
    # One number seen as many: the choice reads sizes alone.
    number = torch.zeros((), requires_grad=True)
    q = number.expand(1, shape.num_attention_heads, length, shape.head_dim)
    k = number.expand(1, shape.num_key_value_heads, length, shape.head_dim)
    segments = torch.ones(1, length, dtype=torch.int64) if shape.packed else None
    found = ww.explain(
        q, k, k, shape.spec, causal=True, segments=segments, window=shape.sliding_window
    )
    return found.backend
