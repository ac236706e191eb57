"""One compiled loop over raw keys: magnitude, weight and product without a trip to memory.

The weight of channel ``c`` of a key at ``s`` is ``A_c cos(s theta_c) + B_c sin(s theta_c)``, with
``A`` and ``B`` from the query, and its score the product of weights and magnitudes.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.cpu.problem import Problem
from whatwhere.attention.features import magnitudes
from whatwhere.spec import Magnitude

# Query heads times queries for one key head up to which a loop beats a matrix product.
_SHARING = 4

# Channels read before a program is made: what plain PyTorch takes for them is about what making
# it takes, so that nobody waits more than twice as long as without one.
_PAYS = 2**33

# A program for each kind of magnitude, dtype and layout; lengths are symbols in all of them.
_PROGRAMS = 32


def score(k: Tensor, queries: Tensor, cos: Tensor, sin: Tensor, kind: Magnitude) -> Tensor:
    """Scores ``(B, G, S, n)`` of raw keys.

    Args:
        k: ``(B, G, S, D)``.
        queries: ``(B, G, n, 2 D)`` features: ``A`` and ``B``.
        cos: ``(B or 1, 1, S, D)``.
        sin: Likewise.
        kind: Of magnitude.
    """
    shown = magnitudes(k.to(cos.dtype), kind).unsqueeze(3)
    a, b = queries.unsqueeze(2).chunk(2, dim=-1)
    weight = a * cos.unsqueeze(3) + b * sin.unsqueeze(3)
    return (weight * shown).sum(dim=-1)


class Loop:
    """Compiles `score` once it pays, and falls back for good if that fails."""

    def __init__(self) -> None:
        self.work = 0
        self.broken = False
        self.run: Callable[..., Tensor] | None = None
        self.lock = threading.Lock()

    def wanted(self, p: Problem, count: int) -> bool:
        """Whether this call should go through the loop; counts its work.

        ``WHATWHERE_COMPILE`` is ``0`` for never, ``1`` for from the first call on.
        """
        shared = p.groups * p.q.shape[2]
        fits = p.feature == "polar" and p.turning == p.q.shape[3] and p.dtype == torch.float32
        setting = os.environ.get("WHATWHERE_COMPILE", "")
        if not fits or shared > _SHARING or self.broken or setting == "0":
            return False
        self.work += p.q.shape[0] * p.k.shape[1] * count * p.q.shape[3]
        return setting == "1" or self.work >= _PAYS

    def scores(self, p: Problem, queries: Tensor, keys: slice) -> Tensor | None:
        """``(B, G, S, n)``, or ``None`` if it cannot be compiled."""
        turn = p.turn_of_keys(slice(0, p.q.shape[0]), keys)
        assert turn.cos is not None and turn.sin is not None
        arguments = (p.k[:, :, keys], queries, turn.cos, turn.sin, p.magnitude)
        try:
            with self.lock:
                if self.run is None:
                    self.run = _compile()
            return self.run(*arguments)
        except Exception as error:
            self.broken = True
            warnings.warn(
                "decoding on this CPU goes on without a compiled loop, which could not be made: "
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]} "
                "(WHATWHERE_COMPILE=0 keeps from trying)",
                stacklevel=2,
            )
            return None


def _compile() -> Callable[..., Tensor]:
    # Without fullgraph a limit on programs would be a silent way back to unfused operations.
    made = torch.compile(score, dynamic=True, fullgraph=True)

    def run(*arguments: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=_PROGRAMS), torch.no_grad():
            out: Tensor = made(*arguments)
            return out

    return run


LOOP = Loop()
