"""Several processes at one training: what each computes, and how they share the model.

`accelerate` starts the processes, places them on devices and wraps the model for autocast and
DDP. FSDP2 is PyTorch's own `fully_shard`, since accelerate leaves its plugin out on CPUs, where
nothing of it could be tested.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from whatwhere.lab.data import IGNORED, Batch
from whatwhere.lab.process import LONGEST_WAIT, on_cpu, process_count
from whatwhere.lab.recipes.schema import TrainingSettings
from whatwhere.models.context_parallel import ContextShard, check_length


@dataclass(frozen=True)
class Share:
    """What one process computes of a batch.

    Attributes:
        inputs: Arguments of the model.
        targets: The token to be predicted at each position, `IGNORED` where none is. Unlike
            labels they are shifted: a share need not hold the next position.
    """

    inputs: dict[str, Any]
    targets: Tensor

    def count(self) -> Tensor:
        """Number of targets."""
        return (self.targets != IGNORED).sum()


def check(settings: TrainingSettings, length: int) -> None:
    """Check that the processes that were started can train by these settings.

    Args:
        settings: How.
        length: Tokens in a sequence.

    Raises:
        ValueError: If the batch does not divide among them, or settings do not go together.
    """
    processes, shared = process_count(), settings.context_parallel
    if processes % shared:
        raise ValueError(
            f"training.context_parallel={shared} does not divide {processes} "
            f"process{'es' * (processes > 1)}: start a multiple of it, e.g. with torchrun "
            f"--nproc-per-node {shared}"
        )
    replicas, parts = processes // shared, settings.gradient_accumulation_steps
    if settings.batch_size % (parts * replicas):
        raise ValueError(
            f"batch_size={settings.batch_size} does not divide among {replicas} "
            f"processes with gradient_accumulation_steps={parts}"
        )
    if shared > 1:
        check_length(length, shared)
    if processes > 1 and settings.parallel == "fsdp" and settings.compile == "reduce-overhead":
        raise ValueError(
            "training.compile='reduce-overhead' with training.parallel='fsdp': CUDA graphs want "
            "weights to stay where they are; choose 'default'"
        )
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise ValueError(
                f"accelerate was told to use {kind}: leave it to training.parallel and "
                "training.context_parallel, and launch without"
            )


class Parallel:
    """The processes of one training.

    Args:
        settings: How it trains.
        length: Tokens in a sequence.
        folder: Where TensorBoard's files go.

    Attributes:
        accelerator: Of accelerate.
        replicas: Groups of processes that read rows of their own.
        replica: Index of this process's.
        context: Which positions of each sequence this process has, `None` for all.
        sharded: Whether weights are sharded.

    Raises:
        ValueError: See `check`.
    """

    def __init__(self, settings: TrainingSettings, length: int, folder: Path) -> None:
        check(settings, length)
        self.settings = settings
        # It keeps the precision of a first training for all later ones.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=on_cpu(),
            mixed_precision=settings.precision,
            log_with="tensorboard",
            project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        )
        shared = settings.context_parallel
        self.replicas = self.accelerator.num_processes // shared
        self.replica = self.accelerator.process_index // shared
        self.context: ContextShard | None = None
        if shared > 1:
            mesh = _mesh(self.accelerator.device.type, self.replicas, shared)
            self.context = ContextShard(mesh["context"].get_group(), length)
        self.sharded = settings.parallel == "fsdp" and self.accelerator.num_processes > 1
        self._skeleton: nn.Module | None = None

    def prepare(self, model: Any) -> Any:
        """Place, wrap and shard a model.

        Raises:
            ValueError: If the model cannot share sequences among processes.
        """
        from whatwhere.models import WhatWhereForCausalLM

        if self.context is not None and not isinstance(model, WhatWhereForCausalLM):
            raise ValueError(
                f"context_parallel: {type(model).__name__} is no decoder of ours, and its layers "
                "attend to their own positions alone"
            )
        if self.settings.activation_checkpointing:
            with warnings.catch_warnings():
                # Its new name came after the oldest transformers that we support.
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable()
        if not self.sharded:
            return self.accelerator.prepare_model(model)
        self._skeleton = _without_weights(model)
        _shard(model, self.accelerator.device.type, self.settings.precision == "bf16")
        # Autocast alone: the model is where and what it should be.
        return self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def compiled(self, model: Any) -> Callable[..., Any]:
        """What computes training steps, compiled where the settings say so.

        Compiled beside the model, not in its place: checkpoints keep plain names, and validation
        on batches of another size compiles nothing.
        """
        mode, whole = self.settings.compile, cast(Callable[..., Any], model)
        if mode == "no":
            return whole
        if not self.sharded:
            return torch.compile(whole, mode=mode)
        # Weights are gathered and freed between the blocks, which no graph spans.
        for block in _blocks(model):
            block.forward = _compiled_in_training(block, mode)
        return whole

    def synchronising(self, model: Any, last: bool) -> AbstractContextManager[Any]:
        """Context of the backward pass of one part of a batch; gradients meet in the last."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        elif not last and isinstance(model, nn.parallel.DistributedDataParallel):
            return model.no_sync()
        return nullcontext()

    def reshard(self, model: Any) -> None:
        """Give up what a forward pass without a backward pass has left gathered."""
        if isinstance(model, FSDPModule):
            model.reshard()

    def rows(self, batch_size: int) -> range:
        """The rows of a batch that this process reads."""
        size = batch_size // self.replicas
        return range(self.replica * size, (self.replica + 1) * size)

    def share(self, batch: Batch) -> Share:
        """What this process computes of its own rows."""
        ids = batch.input_ids.to(self.accelerator.device)
        labels = batch.labels.to(self.accelerator.device)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if batch.segment_ids is not None:
            inputs["segment_ids"] = batch.segment_ids.to(self.accelerator.device)
        if self.context is None:
            return Share(inputs, targets)
        inputs |= {"input_ids": self.context.take(ids), "context": self.context}
        return Share(inputs, self.context.take(targets))

    def share_whole(self, batch: Batch) -> Share:
        """What this process computes of a batch that all have read, of any number of rows.

        Each process has as many rows, for all must gather weights as often: rows without targets
        fill up.
        """
        count = len(batch.input_ids)
        size = -(-count // self.replicas)
        mine = torch.arange(self.replica * size, (self.replica + 1) * size)
        part = take_rows(batch, mine.clamp(max=count - 1))
        if self.context is not None:
            part = _padded(part, self.context.length)
        labels = part.labels.masked_fill((mine >= count)[:, None].to(part.labels.device), IGNORED)
        return self.share(Batch(part.input_ids, labels, part.segment_ids))

    def sum(self, value: Tensor) -> Tensor:
        """A value added up over all processes."""
        total: Tensor = self.accelerator.reduce(value, "sum")
        return total

    def whole(self, model: Any) -> tuple[Any, dict[str, Tensor]]:
        """The plain model and its weights, gathered; of use in the main process alone.

        All processes call this. The model has no weights itself where they are sharded.
        """
        if self._skeleton is None:
            plain = self.accelerator.unwrap_model(model)
            return plain, plain.state_dict()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
        # Tied weights are one again, and so are written once.
        names = {id(weight): name for name, weight in self._skeleton.named_parameters()}
        tied = {
            name: names[id(weight)]
            for name, weight in self._skeleton.state_dict(keep_vars=True).items()
            if id(weight) in names
        }
        return self._skeleton, {n: gathered[tied.get(n, n)] for n in gathered}


def take_rows(batch: Batch, rows: slice | Tensor) -> Batch:
    """Some rows of a batch."""
    segments = None if batch.segment_ids is None else batch.segment_ids[rows]
    return Batch(batch.input_ids[rows], batch.labels[rows], segments)


def _padded(batch: Batch, length: int) -> Batch:
    # On the right, where causality hides what is added from the tokens.
    missing = (0, length - batch.input_ids.shape[1])
    segments = None if batch.segment_ids is None else F.pad(batch.segment_ids, missing)
    labels = F.pad(batch.labels, missing, value=IGNORED)
    return Batch(F.pad(batch.input_ids, missing), labels, segments)


@cache
def _mesh(device: str, replicas: int, shared: int) -> DeviceMesh:
    # Neighbours share sequences: keys and values travel more often than gradients. Made once, as
    # groups of processes are never given back.
    return init_device_mesh(device, (replicas, shared), mesh_dim_names=("replica", "context"))


def _blocks(model: Any) -> list[Any]:
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [
        module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names
    ]


def _shard(model: Any, device: str, bf16: bool) -> None:
    # Each block is gathered for its own forward and backward pass; what is outside the blocks,
    # embeddings and head, for the whole step.
    mesh = _whole_mesh(device)
    exact = MixedPrecisionPolicy()
    half = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in _blocks(model):
        if bf16:
            # Autocast rounds the weights of linear layers alone, so these travel rounded; norms
            # and delta act in float32, with several processes as with one.
            others = [
                module
                for module in block.modules()
                if not isinstance(module, nn.Linear)
                and next(module.parameters(recurse=False), None) is not None
            ]
            fully_shard(others, mesh=mesh, mp_policy=exact)
        fully_shard(block, mesh=mesh, mp_policy=half if bf16 else exact)
    fully_shard(model, mesh=mesh, mp_policy=exact)


@cache
def _whole_mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (process_count(),))


def _without_weights(model: nn.Module) -> nn.Module:
    # A copy whose parameters take no memory; tied ones stay tied.
    known: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().to("meta"), weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, known)


def _compiled_in_training(block: Any, mode: str) -> Callable[..., Any]:
    plain = block.forward
    compiled = torch.compile(plain, mode=mode)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training else plain)(*args, **kwargs)

    return forward
