"""How much of a batch a device takes at once, and what would help where it takes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from whatwhere.lab.plan.memory import FLOAT, Step, kept, state_bytes, working
from whatwhere.lab.plan.shape import Shape

Parallel = Literal["ddp", "fsdp"]

_MOST = 1024
"""GPUs up to which more of them are proposed."""


@dataclass(frozen=True)
class Layout:
    """How a batch and a model are spread.

    Attributes:
        gpus: Devices there are.
        parallel: A whole model on each, or shards.
        context_parallel: Devices that share the positions of a sequence.
        checkpointing: Whether layers are computed again in the backward pass.
    """

    gpus: int
    parallel: Parallel
    context_parallel: int = 1
    checkpointing: bool = False

    def replicas(self, batch_size: int) -> int:
        """Parts that a batch is divided into: as many as the devices allow and the batch has."""
        most = self.gpus // self.context_parallel
        return max(n for n in range(1, most + 1) if batch_size % n == 0)

    def used(self, batch_size: int) -> int:
        """Devices that work; a batch that does not divide leaves others idle."""
        return self.replicas(batch_size) * self.context_parallel


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch that fits, or a single sequence that does not.

    Attributes:
        layout: How.
        gpus: Devices that work.
        micro_batch: Sequences of a forward pass on a device.
        accumulation: Passes of a step.
        bytes: Of a device, by part.
        fits: Whether they are within its memory.
    """

    layout: Layout
    gpus: int
    micro_batch: int
    accumulation: int
    bytes: dict[str, int]
    fits: bool

    @property
    def total(self) -> int:
        """Bytes of a device."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Load:
    """What is to be fitted.

    Attributes:
        shape: The model.
        step: How a step is computed, for a whole sequence and without checkpointing.
        batch_size: Sequences of a step, over all devices.
        memory: Bytes of a device.
        allowance: Bytes of it that are set aside.
    """

    shape: Shape
    step: Step
    batch_size: int
    memory: int
    allowance: int

    def fit(self, layout: Layout) -> Fit:
        """The largest micro-batch for a layout."""
        rows = self.batch_size // layout.replicas(self.batch_size)
        sizes = [n for n in range(rows, 0, -1) if rows % n == 0]
        for sequences in sizes:
            fit = self._fit(layout, rows, sequences)
            if fit.fits:
                break
        return fit

    def _fit(self, layout: Layout, rows: int, sequences: int) -> Fit:
        passes = rows // sequences
        parts = device_bytes(
            self.shape,
            self.step_of(layout),
            layout,
            used=layout.used(self.batch_size),
            sequences=sequences,
            accumulates=passes > 1,
        )
        parts["set aside"] = self.allowance
        return Fit(
            layout=layout,
            gpus=layout.used(self.batch_size),
            micro_batch=sequences,
            accumulation=passes,
            bytes=parts,
            fits=sum(parts.values()) <= self.memory,
        )

    def step_of(self, layout: Layout) -> Step:
        """The step as a device of a layout computes it."""
        length, shared = self.step.length, layout.context_parallel
        return replace(
            self.step,
            length=length // shared,
            keys=length if shared == 1 else length + length // (2 * shared),
            checkpointing=layout.checkpointing,
            casts=layout.parallel == "ddp" or layout.used(self.batch_size) == 1,
        )

    def advice(self, layout: Layout) -> str:
        """What makes a single sequence fit where a layout does not: the least of what is tried."""
        for other, text in _alternatives(layout):
            if self.step.length % (2 * other.context_parallel) and other.context_parallel > 1:
                continue
            found = self.fit(other)
            if found.fits:
                return f"fits with {text} ({found.total / 1e9:.1f} GB)"
        return (
            "fits with nothing that was tried (checkpointing, fsdp, context parallel, up to "
            f"{_MOST} GPUs)"
        )


def device_bytes(
    shape: Shape, step: Step, layout: Layout, *, used: int, sequences: int, accumulates: bool
) -> dict[str, int]:
    """Bytes of one device while it trains on a micro-batch, by part.

    ``ddp`` adds its buckets, a second copy of the gradients. ``fsdp`` divides weights, gradients
    and moments by the number of devices, and holds gathered: two layers (one of them ahead), one
    layer's gradients and their float32 copy on the way, and in float32 all that belongs to no
    layer (embedding, head) with its gradients. Gradients that accumulate over several passes are
    whole until the last.

    Args:
        shape: The model.
        step: How a device computes it.
        layout: How it is spread.
        used: Devices that work.
        sequences: Of a micro-batch.
        accumulates: Whether a step has several.
    """
    sharded = layout.parallel == "fsdp" and used > 1
    parts = {part: ceil(n / used) if sharded else n for part, n in state_bytes(shape).items()}
    if sharded:
        rest = shape.parameters - shape.num_hidden_layers * shape.block
        parts["gathered"] = (3 * step.width + FLOAT) * shape.block + 2 * FLOAT * rest
        if accumulates:
            parts["gradients that accumulate"] = FLOAT * shape.parameters
    elif used > 1:
        parts["buckets"] = FLOAT * shape.parameters
    parts["kept for backward"] = kept(shape, step).total(sequences)
    parts["working"] = working(shape, step, sequences)
    if layout.context_parallel > 1:
        # Raw keys and values of all positions, as they arrive and in order.
        numbers = 2 * shape.num_key_value_heads * shape.head_dim
        whole = step.length * layout.context_parallel
        parts["keys of the others"] = 2 * step.width * numbers * whole * sequences
    return parts


def _alternatives(layout: Layout) -> Iterator[tuple[Layout, str]]:
    again = "--training.activation-checkpointing"
    checkpointed = replace(layout, checkpointing=True)
    sharded = replace(layout, parallel="fsdp")
    both = replace(sharded, checkpointing=True)
    if not layout.checkpointing:
        yield checkpointed, again
    if layout.parallel == "ddp" and layout.gpus > 1:
        yield sharded, "--parallel fsdp"
        if not layout.checkpointing:
            yield both, f"--parallel fsdp {again}"
    gpus = layout.gpus
    while gpus <= _MOST:
        for ring in (1, 2, 4, 8):
            if gpus % ring == 0 and (gpus, ring) != (layout.gpus, layout.context_parallel):
                parts = [f"--gpus {gpus}"] if gpus > layout.gpus else []
                parts += ["--parallel fsdp", again]
                parts += [f"--training.context-parallel {ring}"] if ring > 1 else []
                yield replace(both, gpus=gpus, context_parallel=ring), " ".join(parts)
        gpus *= 2
