"""The processes of `test_scale`, and what they do: the stages of a file, one after the other."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import recipe
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from torch.utils import tensorboard  # noqa: F401 - or each fork imports it for itself

from whatwhere import cli
from whatwhere.lab import loop, runs
from whatwhere.lab.data import Task, make_task
from whatwhere.lab.process import is_main_process, main_process_first
from whatwhere.lab.runs import Run
from whatwhere.lab.train import train
from whatwhere.models import WhatWhereConfig, WhatWhereForCausalLM
from whatwhere.models.context_parallel import ContextShard


def rank() -> int:
    """Processes are forks of one that has none."""
    return int(os.environ.get("RANK", "0"))


def start(text: str, job: dict[str, Any]) -> tuple[Run, Task]:
    made = recipe(text, **job["changes"])
    task = make_task(made.data)
    run = runs.plan(made, "pope", 0, Path(job["folder"]))
    if is_main_process():
        runs.claim(run, task.describe())
    return run, task


def at_step(task: Task, step: int, act: Callable[[], None]) -> None:
    """Have a task act before it gives the batch of a step."""
    inner = task.train_batch

    def watched(seed: int, at: int, *args: Any, **kwargs: Any) -> Any:
        if at == step:
            act()
        return inner(seed, at, *args, **kwargs)

    task.train_batch = watched  # type: ignore[method-assign]


def train_job(text: str, job: dict[str, Any]) -> None:
    run, task = start(text, job)
    if "stop" in job:

        def stop() -> None:
            raise ZeroDivisionError

        at_step(task, job["stop"], stop)
    if job.get("kill") == rank():

        def die() -> None:
            (run.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

        at_step(task, 7, die)
    if job.get("begun"):
        assert not run.done.exists()
        assert list(run.checkpoints.iterdir())
    try:
        train(run, task)
    except ZeroDivisionError:
        assert "stop" in job


def local(tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)


def record_shards() -> None:
    """Have each training write how much of weights, gradients and moments this process has."""
    real = loop._Training._finish

    def finish(self: Any) -> None:
        weights = list(self.bare.parameters())
        moments = [self.optimizer.state[w]["exp_avg"] for w in weights]
        share = self.parallel.share(self._read(0))
        self._loss(share, share.count()).backward()
        found = {
            "whole": sum(w.numel() for w in weights),
            "weights": local(weights),
            "moments": local(moments),
            "gradients": local([w.grad for w in weights]),
            "deltas": [str(type(e.delta).__name__) for e in self.encodings],
        }
        (self.place.folder / f"shards-{rank()}.json").write_text(json.dumps(found))
        real(self)

    loop._Training._finish = finish  # type: ignore[method-assign]


# --- context parallelism ------------------------------------------------------------------------

CONTEXTS: list[dict[str, Any]] = [
    {"position_encoding": "rope"},
    {"position_encoding": "pope", "position_encoding_options": {"delta": "uniform"}},
    {"position_encoding": "rope-id"},
    {"position_encoding": "alibi"},
    {"position_encoding": "nope", "position_encoding_options": {"temperature_length": 7}},
    {"position_encoding": "learned"},
    {"position_encoding": "pope", "sliding_window": 9, "qk_norm": True},
]


def context_job(text: str, job: dict[str, Any]) -> None:
    """Loss and gradients of shared sequences against those of whole ones, in float64."""
    shard = ContextShard(dist.group.WORLD, 24)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (3, 24), generator=generator)
    segments = torch.randint(3, (3, 24), generator=generator).sort(dim=1).values
    for changes in CONTEXTS:
        for documents in (None, segments):
            compare_contexts(changes, shard, ids, documents)


def compare_contexts(
    changes: dict[str, Any], shard: ContextShard, ids: torch.Tensor, documents: Any
) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
    torch.manual_seed(0)
    model = WhatWhereForCausalLM(WhatWhereConfig(**shape, **heads, **changes)).double()
    whole = model(ids, labels=ids, segment_ids=documents)
    names = [name for name, _ in model.named_parameters()]
    expected = torch.autograd.grad(whole.loss, list(model.parameters()))
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    part = model(
        shard.take(ids),
        labels=shard.take(targets),
        shift_labels=shard.take(targets),
        num_items_in_batch=(targets != -100).sum(),
        segment_ids=documents,
        context=shard,
    )
    torch.testing.assert_close(
        part.logits, shard.take(whole.logits, dim=1), rtol=1e-9, atol=1e-9, msg=str(changes)
    )
    found = torch.autograd.grad(part.loss, list(model.parameters()))
    loss = part.loss.detach().clone()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, whole.loss.detach(), rtol=1e-6, atol=0)
    for name, one, other in zip(names, found, expected, strict=True):
        dist.all_reduce(one)
        torch.testing.assert_close(
            one, other, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{changes} {n}: {m}"
        )


def command_job(text: str, job: dict[str, Any]) -> None:
    sys.exit(cli.main(job["arguments"]))


KINDS = {"train": train_job, "context": context_job, "command": command_job}


def work(text: str, jobs: list[dict[str, Any]]) -> None:
    """What one process does in a stage."""
    torch.set_num_threads(1)
    record_shards()
    with main_process_first():
        pass
    for each in jobs:
        KINDS[each["kind"]](text, each)
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(name: str, count: int, text: str, jobs: list[dict[str, Any]], logs: Path) -> str:
    """Have `count` processes do jobs, as torchrun would; how it failed, or nothing.

    They are forks of this process, which has imported everything: that takes longer than the
    jobs.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
    )
    try:
        elastic_launch(config, record(work))(text, jobs)
    except ChildFailedError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for name, (count, jobs) in json.loads((place / "stages.json").read_text()).items():
        failure = launch(name, count, str(place / "text"), jobs, place / "logs" / name)
        (place / "logs" / name / "failure").write_text(failure)
