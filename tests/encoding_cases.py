"""Which encodings and backends the law tests run over, and how they make a call.

Every name in `whatwhere.ENCODINGS` is a case by itself; an option without a default goes into
`REQUIRED`. `VARIANTS` adds settings that change the kind of score. Every name in
`whatwhere.BACKENDS` is tested with the kinds of call that it does not refuse (`pairs`);
test_backends.py says which those must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import whatwhere as ww

TRAIN_LENGTH = 128

REQUIRED: dict[str, dict[str, Any]] = {"yarn": {"factor": 4.0}}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rope/half": ("rope", {"fraction": 0.5}),
    "pope/quarter-magnitude": ("pope", {"fraction": 0.25}),
    "pope/quarter-raw": ("pope", {"fraction": 0.25, "rest": "raw"}),
    "pope/no-delta": ("pope", {"delta": None}),
    "pope/relu": ("pope", {"magnitude": "relu"}),
    "pope/temperature": ("pope", {"temperature_length": TRAIN_LENGTH}),
    "pope-id/temperature": ("pope-id", {"temperature": True}),
    "alibi/half": ("alibi", {"fraction": 0.5, "temperature_length": TRAIN_LENGTH}),
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ww.ENCODINGS},
    **VARIANTS,
}
BACKENDS = tuple(ww.BACKENDS)

# One case of each kind of score, for what does not hang on the encoding itself.
SCORES = ("pope", "pope/quarter-raw", "rope", "rope/half", "alibi", "nope")


def make(case: str, head_dim: int = 16, num_heads: int = 4, **options: Any) -> ww.Encoding:
    """The encoding of a case, its phases somewhere inside their bounds."""
    name, given = CASES[case]
    encoding = ww.make(
        name,
        head_dim=head_dim,
        num_heads=num_heads,
        train_length=TRAIN_LENGTH,
        **{**REQUIRED.get(name, {}), **given, **options},
    )
    with torch.no_grad():
        for key, parameter in encoding.named_parameters():
            if key.endswith("delta"):
                parameter.uniform_(-2 * math.pi, 0)
    return encoding


def make_spec(case: str, head_dim: int = 16, num_heads: int = 4, **options: Any) -> ww.ScoreSpec:
    """The spec of a case, with nothing that needs a gradient."""
    with torch.no_grad():
        spec = make(case, head_dim, num_heads, **options)()
    return spec if spec.phase is None else replace(spec, phase=spec.phase.detach())


def cold(spec: ww.ScoreSpec) -> ww.ScoreSpec:
    """The same score without its length temperature: relative to position alone."""
    return replace(spec, temperature_length=None)


def hot(spec: ww.ScoreSpec, length: int = 5) -> ww.ScoreSpec:
    """The same score with its temperature, if it has one, at work from a small length on."""
    return spec if spec.temperature_length is None else replace(spec, temperature_length=length)


def tensors(
    *sizes: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> tuple[Tensor, ...]:
    """Normal tensors that every dtype holds exactly (eighths), so that only sums are rounded."""
    return tuple((torch.randn(size) * scale * 8).round().div(8).to(dtype) for size in sizes)


def in_order(batch: int, total: int) -> dict[str, Any]:
    return {"causal": True}


def full(batch: int, total: int) -> dict[str, Any]:
    return {}


def positions(batch: int, total: int) -> dict[str, Any]:
    """Unsorted, with gaps and duplicates, each sequence its own; keys at the same places."""
    at = torch.stack([torch.randperm(2 * total)[:total] for _ in range(batch)])
    if batch and total > 2:
        at[:, 1] = at[:, 2]
    return {"causal": True, "query_positions": at, "key_positions": at.clone()}


def masked(batch: int, total: int) -> dict[str, Any]:
    seen = torch.rand(batch, total) < 0.7
    seen[:1, 0] = False  # the first query of the first sequence sees nothing
    return {"causal": True, "key_mask": seen}


def packed(batch: int, total: int) -> dict[str, Any]:
    segments = torch.randint(0, 2, (batch, total)).cumsum(-1)
    return {"causal": True, "segments": segments}


def windowed(batch: int, total: int) -> dict[str, Any]:
    return {"causal": True, "window": 3}


KINDS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    function.__name__: function
    for function in (in_order, full, positions, masked, packed, windowed)
}


def refusal(
    case: str,
    backend: str,
    kind: str,
    gradient: bool = False,
    dtype: torch.dtype = torch.float64,
) -> str | None:
    """What a backend says when it is asked for a kind of call it cannot do."""
    q, k, v = tensors((1, 2, 4, 4), (1, 2, 4, 4), (1, 2, 4, 4), dtype=dtype)
    q.requires_grad_(gradient)
    try:
        ww.explain(q, k, v, make_spec(case, 4, 2), backend=backend, **KINDS[kind](1, 4))
    except ww.UnsupportedError as error:
        return str(error)
    return None


def pairs(
    *kinds: str,
    gradient: bool = False,
    dtype: torch.dtype = torch.float64,
    cases: Iterable[str] = tuple(CASES),
    but: tuple[str, ...] = (),
    left_out: Callable[[str, str], bool] = lambda case, backend: False,
) -> pytest.MarkDecorator:
    """Parametrise by cases (every one) and each backend that does these kinds of call for it."""
    found = [
        pytest.param(case, backend, id=f"{case}-{backend}")
        for case in cases
        for backend in BACKENDS
        if backend not in but
        and not left_out(case, backend)
        and all(refusal(case, backend, kind, gradient, dtype) is None for kind in kinds)
    ]
    return pytest.mark.parametrize("case, backend", found)
