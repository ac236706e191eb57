"""What a training step really holds, for comparison with the formulas."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from whatwhere.lab.data import Task
from whatwhere.lab.loop import parameter_groups
from whatwhere.lab.plan.memory import FLOAT, Step
from whatwhere.lab.plan.shape import Sizes
from whatwhere.lab.recipes.schema import EncodingChoice, ModelSettings
from whatwhere.lab.train import build_model


@dataclass(frozen=True)
class Measured:
    """Bytes of a training step.

    Attributes:
        state: Of parameters, gradients and the optimizer's tensors.
        kept: Of the storages that autograd saves in the forward pass, each counted once, without
            the parameters themselves.
    """

    state: int
    kept: int


class TrainingStep:
    """A model of random weights, AdamW, and a batch of random tokens of one step.

    Args:
        settings: The model.
        choice: Its encoding.
        sizes: Vocabulary and length.
        step: Precision and checkpointing; its backend is taken.
        sequences: Of the batch.
    """

    def __init__(
        self,
        settings: ModelSettings,
        choice: EncodingChoice,
        sizes: Sizes,
        step: Step,
        sequences: int,
    ) -> None:
        settings = settings.model_copy(update={"attention_backend": step.backend})
        if choice.qk_norm is not None:
            settings = settings.model_copy(update={"qk_norm": choice.qk_norm})
        self.step, self.device = step, torch.device(step.kind)
        self.model = build_model(settings, cast(Task, sizes), choice, seed=0).to(self.device)
        self.model.train()
        if step.checkpointing:
            with warnings.catch_warnings():
                # Its new name came after the oldest transformers that we support.
                warnings.simplefilter("ignore", FutureWarning)
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
        groups = parameter_groups(self.model, weight_decay=0.01)
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=fused)
        self.ids = torch.randint(sizes.vocab_size, (sequences, sizes.length), device=self.device)

    def loss(self) -> Tensor:
        """The forward pass."""
        bf16 = self.step.width < FLOAT
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            output = self.model(input_ids=self.ids, labels=self.ids, use_cache=False)
        loss: Tensor = output.loss
        return loss

    def run(self) -> None:
        """Forward, backward, clipping, AdamW; gradients stay, as with accumulation."""
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def measure(self) -> Measured:
        """Run one step, and count."""
        with _saved_storages(list(self.model.parameters())) as sizes:
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        states = (value for entry in self.optimizer.state.values() for value in entry.values())
        tensors = [value for value in states if isinstance(value, Tensor)]
        for parameter in self.model.parameters():
            tensors += [parameter, cast(Tensor, parameter.grad)]
        return Measured(state=sum(x.nbytes for x in tensors), kept=sum(sizes.values()))


@contextmanager
def _saved_storages(owned: list[Tensor]) -> Iterator[dict[int, int]]:
    # Sizes by address. Tensors are held, or an address would be given out again.
    known = {x.untyped_storage().data_ptr() for x in owned}
    sizes: dict[int, int] = {}
    held: list[Any] = []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield sizes
