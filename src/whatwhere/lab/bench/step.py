"""A training step of a decoder: forward, backward, clipping, AdamW; only the encoding differs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from whatwhere.lab.bench.cases import DTYPES, Case, RefusedError, Side, Work

QUICK: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
"""The decoder of the quick text recipe, under the name `quick`."""

_CHECKED = 2
"""Sequences in the batch that is checked."""


def models() -> tuple[str, ...]:
    """Names of shapes; without transformers the first alone."""
    try:
        from whatwhere.models.presets import PRESETS
    except ImportError:
        return ("quick",)
    return ("quick", *PRESETS)


def build(side: Side, case: Case) -> Work:
    """Make a model and a step of it.

    Raises:
        RefusedError: If transformers is missing.
    """
    try:
        model = _model(side, case, side.backend).to(case.device)
    except ImportError as error:
        raise RefusedError(f"a step needs transformers: {error}") from None
    batch = _batch(case, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=case.device == "cuda")

    def run() -> None:
        _loss(model, batch, case).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Work(run, error=lambda: _check(side, case))


def _model(side: Side, case: Case, backend: str) -> Any:
    from whatwhere import models as wm

    torch.manual_seed(case.seed)
    given: dict[str, Any] = {
        "position_encoding": side.encoding,
        "attention_backend": backend,
        "max_position_embeddings": case.length,
        "dropout": 0.0,
    }
    if side.encoding == "yarn":
        given["position_encoding_options"] = {"factor": 4.0}
    if case.model == "quick":
        return wm.WhatWhereForCausalLM(wm.WhatWhereConfig(**QUICK, **given))
    return wm.WhatWhereForCausalLM(wm.preset(case.model, **given))


def _batch(case: Case, model: Any) -> Tensor:
    draw = torch.Generator().manual_seed(case.seed)
    tokens = torch.randint(
        model.config.vocab_size, (case.batch, case.length), generator=draw, dtype=torch.int64
    )
    return tokens.to(case.device)


def _loss(model: Any, batch: Tensor, case: Case) -> Tensor:
    rounding: AbstractContextManager[Any] = nullcontext()
    if case.dtype != "fp32":
        rounding = torch.autocast(case.device, DTYPES[case.dtype])
    with rounding:
        loss: Tensor = model(batch, labels=batch, use_cache=False).loss
    return loss


def _check(side: Side, case: Case) -> tuple[float, bool]:
    """Error of all gradients by norm, and whether it is within twice that of the reference."""
    exact = _gradients(_model(side, case, "reference").double(), case, autocast=False)

    def off(backend: str) -> float:
        found = _gradients(_model(side, case, backend), case, autocast=True)
        return float((found - exact).norm() / exact.norm())

    error, allowed = off(side.backend), 2 * off("reference") + 1e-5
    return error, error <= allowed


def _gradients(model: Any, case: Case, autocast: bool) -> Tensor:
    model.to(case.device)
    batch = _batch(case, model)[:_CHECKED]
    loss = _loss(model, batch, case) if autocast else model(batch, labels=batch).loss
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten().double() for g in grads])
