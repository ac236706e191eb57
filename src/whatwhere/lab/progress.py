"""Where a run is: counts, the losses since the last row of its log, and loss spikes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

SPIKE_WINDOW = 50
"""Losses that a loss is held against."""


@dataclass
class Progress:
    """Counts of a run; saved with each checkpoint, so that a resumed run counts on.

    A loss is a spike if it is not finite, or exceeds the median of the last 50 by more than six
    robust deviations (1.4826 times the median absolute deviation) and by more than a tenth of
    that median. Consecutive ones count once. No paper fixes this: the first bound keeps out the
    noise of small batches, the second that of a loss gone flat.

    Attributes:
        step: Optimizer steps taken.
        tokens: Tokens trained on.
        seconds: Time in training steps, validation and checkpoints left out.
        spikes: Loss spikes.
        grad_norm_max: Largest gradient norm before clipping.
        losses: Losses since the last row of the log, nats per token.
        grad_norms: Gradient norms since then.
        spike: Whether a spike began since then.
        spiking: Whether the last loss was one.
        recent: The last losses that were finite.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    spikes: int = 0
    grad_norm_max: float = 0.0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    spike: bool = False
    spiking: bool = False
    recent: list[float] = field(default_factory=list)

    def add(self, loss: float, grad_norm: float) -> None:
        """Count the loss and the gradient norm of a step."""
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        self.grad_norm_max = max(self.grad_norm_max, grad_norm)
        spiking = self._is_spike(loss)
        if spiking and not self.spiking:
            self.spikes += 1
            self.spike = True
        self.spiking = spiking
        if math.isfinite(loss):
            self.recent = [*self.recent, loss][-SPIKE_WINDOW:]

    def row(self, learning_rate: float) -> dict[str, Any]:
        """A row of the log for the steps since the last row, which are then forgotten.

        `loss` is their mean, `grad_norm` their largest, `spike` whether one began among them.
        """
        row = {
            "step": self.step,
            "loss": sum(self.losses) / len(self.losses),
            "lr": learning_rate,
            "grad_norm": max(self.grad_norms),
            "spike": self.spike,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
        }
        self.losses, self.grad_norms, self.spike = [], [], False
        return row

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def _is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if len(self.recent) < SPIKE_WINDOW:
            return False
        middle = median(self.recent)
        deviation = 1.4826 * median(abs(value - middle) for value in self.recent)
        return loss - middle > max(6 * deviation, 0.1 * abs(middle))
