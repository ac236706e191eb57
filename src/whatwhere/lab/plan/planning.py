"""`plan`: a recipe and a machine to memory, operations, time and disk of each run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from whatwhere.lab.data import TextData
from whatwhere.lab.plan.backend import backend_of
from whatwhere.lab.plan.devices import DEVICES, Device
from whatwhere.lab.plan.fitting import Fit, Layout, Load
from whatwhere.lab.plan.flops import Flops, forward_flops
from whatwhere.lab.plan.memory import FLOAT, Kept, Step, kept, state_bytes
from whatwhere.lab.plan.shape import Sizes, shape_of
from whatwhere.lab.plan.vocabulary import length_of, vocabulary_of
from whatwhere.lab.recipes.schema import EncodingChoice, Recipe

GB = 10**9


@dataclass(frozen=True)
class Machine:
    """Devices, and what is assumed of them.

    Attributes:
        device: A name in `DEVICES`.
        gpus: How many.
        memory: GB (10^9 bytes) of each; ``None`` is what it is sold with.
        flops: Peak TFLOPS of each in the training's precision; ``None`` is its maker's figure.
        mfu: Share of the peak that training reaches.
        allowance: GB of each set aside for what is not computed.
        floor: Seconds that the passes over a micro-batch take at the least.

    Raises:
        ValueError: If a figure is out of range, or missing for the device.
    """

    device: str = "h100"
    gpus: int = 1
    memory: float | None = None
    flops: float | None = None
    mfu: float = 0.4
    allowance: float = 2.0
    floor: float = 0.02

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r}: expected one of {', '.join(DEVICES)}")
        if self.gpus < 1:
            raise ValueError(f"gpus={self.gpus}: expected at least 1")
        if not 0 <= self.floor < float("inf"):
            raise ValueError(f"floor={self.floor}: expected seconds, at least 0")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu}: expected more than 0 and at most 1")
        for name, value, known in (
            ("memory", self.memory, self.maker.memory),
            ("flops", self.flops, self.maker.bf16),
        ):
            if value is None and known is None:
                raise ValueError(f"device {self.device!r} has no {name} of its own: give it")
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: expected a positive number")
        if not 0 <= self.allowance < self.gigabytes:
            raise ValueError(
                f"allowance={self.allowance}: expected at least 0 and less than the memory, "
                f"{self.gigabytes:g} GB"
            )

    @property
    def maker(self) -> Device:
        """What the maker says of the device."""
        return DEVICES[self.device]

    @property
    def gigabytes(self) -> float:
        """GB of a device."""
        return self.memory or self.maker.memory or 0.0

    def width(self, precision: str) -> int:
        """Bytes of a number in products, for a recipe's precision."""
        bf16 = precision == "bf16" or (precision == "auto" and self.maker.kind == "cuda")
        return 2 if bf16 else FLOAT

    def peak(self, width: int) -> float:
        """Operations a second of a device, at the most."""
        known = self.maker.bf16 if width == 2 else self.maker.fp32
        return (self.flops or known or 0.0) * 1e12


@dataclass(frozen=True)
class RunPlan:
    """One encoding, trained once.

    Attributes:
        label: Of the encoding.
        not_trained: Why there is nothing to train, or ``None``; then the rest is of the model.
        length: Tokens of a sequence.
        batch_size: Sequences of a step.
        steps: Of training.
        parameters: Numbers that are trained.
        encoding_parameters: Those of the encoding.
        backend: Of attention.
        table_bytes: cos and sin of one layer, float32.
        state: Bytes of weights, gradients and optimizer of a whole model.
        kept: What a sequence keeps for the backward pass, on one device.
        kept_checkpointed: Likewise with activation checkpointing.
        flops: Of the forward pass of a sequence.
        fit: What a device takes at once.
        other: Likewise with checkpointing if ``fit`` is without, or the other way round.
        advice: What would fit, where nothing does.
        seconds: Of the training at the assumed rate; ``None`` where nothing fits.
        floored: Whether that is the assumed floor of a pass, not the operations.
    """

    label: str
    not_trained: str | None
    length: int
    batch_size: int
    steps: int
    parameters: int
    encoding_parameters: int
    backend: str
    table_bytes: int
    state: dict[str, int]
    kept: Kept
    kept_checkpointed: Kept
    flops: Flops
    fit: Fit
    other: Fit
    advice: str | None
    seconds: float | None
    floored: bool

    @property
    def tokens_per_second(self) -> float | None:
        """Over all devices, at the assumed rate."""
        return None if self.seconds is None else self.tokens / self.seconds

    @property
    def step_flops(self) -> int:
        """Of a step, without what checkpointing computes again."""
        return self.batch_size * self.flops.training

    @property
    def total_flops(self) -> int:
        """Of the training."""
        return self.steps * self.step_flops

    @property
    def tokens(self) -> int:
        """Of the training."""
        return self.steps * self.batch_size * self.length

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all devices that work."""
        return None if self.seconds is None else self.seconds * self.fit.gpus / 3600

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint on disk: weights and the optimizer."""
        return self.state["weights"] + self.state["optimizer"]


@dataclass(frozen=True)
class RecipePlan:
    """All of a recipe.

    Attributes:
        recipe: The recipe.
        machine: Where it shall run.
        vocab_size: Token ids.
        width: Bytes of a number in matrix products.
        runs: One for each encoding.
    """

    recipe: Recipe
    machine: Machine
    vocab_size: int
    width: int
    runs: tuple[RunPlan, ...]

    @property
    def trained(self) -> list[RunPlan]:
        """Those with something to train."""
        return [run for run in self.runs if run.not_trained is None]

    @property
    def count(self) -> int:
        """Trainings, all seeds counted."""
        return len(self.trained) * len(self.recipe.seeds)

    @property
    def seconds(self) -> float | None:
        """Of all trainings one after another; ``None`` where one does not fit."""
        found = [run.seconds for run in self.trained if run.seconds is not None]
        whole = len(found) == len(self.trained)
        return sum(found) * len(self.recipe.seeds) if whole else None

    @property
    def gpu_hours(self) -> float | None:
        """Of all trainings; ``None`` where one does not fit."""
        found = [run.gpu_hours for run in self.trained if run.gpu_hours is not None]
        whole = len(found) == len(self.trained)
        return sum(found) * len(self.recipe.seeds) if whole else None

    @property
    def disk_bytes(self) -> int:
        """At the most: the weights of every run, and two checkpoints of the one at work."""
        weights = sum(run.state["weights"] for run in self.trained) * len(self.recipe.seeds)
        return weights + 2 * max((run.checkpoint_bytes for run in self.trained), default=0)


def plan(recipe: Recipe, machine: Machine, *, vocab_size: int | None = None) -> RecipePlan:
    """Work out what a recipe costs on a machine; nothing is trained, loaded or measured.

    Args:
        recipe: Its `training` says how a step is parallelised and whether it is checkpointed.
        machine: Where.
        vocab_size: Token ids; ``None`` is what is known of the recipe's tokenizer or data.

    Raises:
        ValueError: If an encoding or shape is impossible, the vocabulary is not known, or
            devices and settings do not go together.
    """
    ring = recipe.training.context_parallel
    if machine.gpus % ring:
        raise ValueError(f"training.context_parallel={ring} does not divide gpus={machine.gpus}")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size}: expected at least 1")
    known = vocabulary_of(recipe.data) if vocab_size is None else vocab_size
    width = machine.width(recipe.training.precision)
    runs = []
    for label, choice in recipe.encodings.items():
        try:
            runs.append(_run(recipe, machine, known, label, choice))
        except ValueError as error:
            raise ValueError(f"encoding {label!r}: {error}") from None
        except TypeError as error:  # a word where a number belongs
            raise ValueError(
                f"encoding {label!r}: options {choice.options} have a wrong type: {error}"
            ) from None
    return RecipePlan(recipe, machine, known, width, tuple(runs))


def _run(
    recipe: Recipe, machine: Machine, vocab_size: int, label: str, choice: EncodingChoice
) -> RunPlan:
    sizes = _training_sizes(recipe, choice)
    training = recipe.training
    if choice.name == "yarn" and "factor" not in choice.options:
        factor = float(recipe.evaluation.finetune.factor)
        choice = choice.model_copy(update={"options": {**choice.options, "factor": factor}})
    packed = isinstance(recipe.data, TextData) and recipe.data.documents == "pack"
    shape = shape_of(recipe.model, choice, Sizes(vocab_size, sizes.length), packed=packed)
    kind, title = machine.maker.kind, machine.maker.title
    backend = backend_of(shape, sizes.length, kind, title)
    step = Step(sizes.length, sizes.length, kind, machine.width(training.precision), backend)
    load = Load(
        shape,
        step,
        sizes.batch_size,
        memory=int(machine.gigabytes * GB),
        allowance=int(machine.allowance * GB),
    )
    layout = Layout(
        machine.gpus,
        training.parallel,
        training.context_parallel,
        training.activation_checkpointing,
    )
    if layout.context_parallel > 1 and sizes.length % (2 * layout.context_parallel):
        raise ValueError(
            f"training.context_parallel={layout.context_parallel}: sequences of {sizes.length} "
            f"tokens do not divide into {2 * layout.context_parallel} chunks"
        )
    fit = load.fit(layout)
    flops = forward_flops(shape, sizes.length)
    pace = _pace(flops, sizes, fit, machine, step.width) if fit.fits else None
    return RunPlan(
        label=label,
        not_trained=_not_trained(recipe, choice),
        length=sizes.length,
        batch_size=sizes.batch_size,
        steps=sizes.steps,
        parameters=shape.parameters,
        encoding_parameters=shape.encoding_parameters,
        backend=backend,
        table_bytes=shape.table_bytes(sizes.length),
        state=state_bytes(shape),
        kept=kept(shape, load.step_of(replace(layout, checkpointing=False))),
        kept_checkpointed=kept(shape, load.step_of(replace(layout, checkpointing=True))),
        flops=flops,
        fit=fit,
        other=load.fit(replace(layout, checkpointing=not layout.checkpointing)),
        advice=None if fit.fits else load.advice(layout),
        seconds=None if pace is None else sizes.steps * max(pace),
        floored=pace is not None and pace[1] > pace[0],
    )


@dataclass(frozen=True)
class _Training:
    length: int
    batch_size: int
    steps: int


def _training_sizes(recipe: Recipe, choice: EncodingChoice) -> _Training:
    length, training = length_of(recipe.data), recipe.training
    tuned = choice.name == "yarn" and recipe.evaluation.yarn == "finetune"
    if not tuned and choice.finetune_from is None:
        return _Training(length, training.batch_size, training.steps)
    settings = recipe.evaluation.finetune
    return _Training(length * settings.factor, settings.batch_size, settings.steps)


def _not_trained(recipe: Recipe, choice: EncodingChoice) -> str | None:
    if choice.name == "yarn" and recipe.evaluation.yarn == "evaluate":
        return "evaluated from the rope run"
    if recipe.trained_by is not None and choice.finetune_from is None and choice.name != "yarn":
        return f"trained by recipe {recipe.trained_by}"
    return None


def _pace(
    flops: Flops, sizes: _Training, fit: Fit, machine: Machine, width: int
) -> tuple[float, float]:
    # Seconds of a step: of its operations at the assumed rate, and of its passes at the least.
    again = flops.layers if fit.layout.checkpointing else 0
    work = sizes.batch_size * (flops.training + again)
    rate = fit.gpus * machine.peak(width) * machine.mfu
    return work / rate, fit.accumulation * machine.floor
