"""Ways in which the numbers of a tensor lie in memory, for the random calls of fuzz_cases.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NAN = float("nan")


def _among(x: Tensor, *places: slice) -> Tensor:
    """A larger tensor of NaN that holds ``x`` at ``places``."""
    sizes = [n if at.step is None and at.start is None else 2 * n + 3 for n, at in
             zip(x.shape, places, strict=True)]  # fmt: skip
    held = torch.full(sizes, NAN, dtype=x.dtype)
    held[tuple(_cut(places, x))] = x
    return held


def _cut(places: tuple[slice, ...], x: Tensor) -> list[slice]:
    return [
        at if at.start is None else slice(at.start, at.start + n * (at.step or 1), at.step or 1)
        for n, at in zip(x.shape, places, strict=True)
    ]


def _sliced(*places: slice) -> tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]:
    return (
        lambda x: _among(x, *places),
        lambda held, shape: held[tuple(_cut(places, torch.empty(shape, device="meta")))],
    )


ALL, ODD, INNER = slice(None), slice(1, None, 2), slice(2, None)
# The numbers as they lie in memory, and how to see them as (B, heads, length, channels).
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "plain": (lambda x: x.clone(), lambda held, shape: held.view_as(held)),
    "lengths first": (
        lambda x: x.transpose(1, 2).contiguous(),
        lambda held, shape: held.transpose(1, 2),
    ),
    "channels first": (lambda x: x.mT.contiguous(), lambda held, shape: held.mT),
    "reversed": (
        lambda x: x.permute(3, 2, 1, 0).contiguous(),
        lambda held, shape: held.permute(3, 2, 1, 0),
    ),
    "every other channel": _sliced(ALL, ALL, ALL, ODD),
    "every other row": _sliced(ALL, ALL, ODD, ALL),
    "from within": _sliced(ALL, INNER, INNER, INNER),
    "one batch": (lambda x: x[:1].clone(), lambda held, shape: held.expand(shape)),
    "one head": (lambda x: x[:, :1].clone(), lambda held, shape: held.expand(shape)),
    "one row": (lambda x: x[:, :, :1].clone(), lambda held, shape: held.expand(shape)),
}
