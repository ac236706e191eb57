"""Training any causal language model: a short loop over `accelerate`.

The batch is a pure function of (seed, step) and so is the learning rate; what is left to save for
an exact resumption is weights, optimizer, random numbers and a few counts.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import whatwhere as ww
from whatwhere.lab import checkpoint, storage
from whatwhere.lab.console import display
from whatwhere.lab.data import Batch, Task
from whatwhere.lab.evaluate import loss_sums, means, rows_for
from whatwhere.lab.parallel import Parallel, Share, take_rows
from whatwhere.lab.process import deterministic, stop_signal
from whatwhere.lab.progress import Progress
from whatwhere.lab.recipes.schema import TrainingSettings
from whatwhere.lab.runs import RunFolder

Save = Callable[[Any, Path, dict[str, Tensor]], None]


class Interrupted(storage.RunError):
    """Ctrl-C or SIGTERM came; a checkpoint was saved."""


def parameter_groups(
    model: nn.Module, weight_decay: float, delta_rate: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters for AdamW: no decay for vectors (norms, biases) and for PoPE's delta.

    Args:
        model: Whose.
        weight_decay: Of the others.
        delta_rate: Learning rate of delta over that of all else; delta then is a third group.
    """
    named = list(model.named_parameters())
    deltas = {name for name, _ in named if name.endswith("delta")}
    spared = {name for name, p in named if p.ndim < 2} | deltas
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if n not in spared], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n in spared], "weight_decay": 0.0},
    ]
    if delta_rate != 1.0 and deltas:
        groups[1]["params"] = [p for n, p in named if n in spared - deltas]
        moved = [p for n, p in named if n in deltas]
        groups.append({"params": moved, "weight_decay": 0.0, "rate": delta_rate})
    return groups


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """The rate of a step, counted from 0: linear warm-up, then a cosine to the minimum.

    The first step has `1 / warmup_steps` of the highest rate (`transformers` has 0, which wastes
    it), the last step of warm-up has all of it, the last step of all has the minimum.
    """
    highest, lowest = settings.learning_rate, settings.min_learning_rate
    if step < settings.warmup_steps:
        return highest * (step + 1) / settings.warmup_steps
    first, last = max(0, settings.warmup_steps - 1), settings.steps - 1
    part = (step - first) / max(1, last - first)
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * part))


def save_model(model: Any, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write a model of `transformers` as it is."""
    model.save_pretrained(folder, state_dict=weights)


def train_model(
    model: Any,
    task: Task,
    place: RunFolder,
    settings: TrainingSettings,
    seed: int,
    *,
    delta_rate: float = 1.0,
    save: Save = save_model,
) -> None:
    """Train a model to its end, from the newest checkpoint of its folder if there is one.

    Writes `log.jsonl`, TensorBoard logs, checkpoints, and at the end `model/` and `done.json`.

    Args:
        model: A causal language model of `transformers`, with the weights to start from.
        task: Its data.
        place: Where everything goes.
        settings: How.
        seed: Of batches and dropout.
        delta_rate: Learning rate of PoPE's delta over that of all else.
        save: Writes model and weights into a new folder at the end.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM, once a checkpoint is saved.
        DiskFullError: If there is no space left.
        ValueError: If the batch does not divide among the processes.
    """
    with (
        stop_signal() as stopped,
        deterministic(settings.deterministic),
        storage.disk_errors(place.folder),  # for TensorBoard's files, which it writes by itself
    ):
        _Training(model, task, place, settings, seed, delta_rate, save).go(stopped)


class _Training:
    # One run in this process: model and optimizer, and where they are.

    def __init__(
        self,
        model: Any,
        task: Task,
        place: RunFolder,
        settings: TrainingSettings,
        seed: int,
        delta_rate: float,
        save: Save,
    ) -> None:
        self.place, self.task, self.settings, self.seed = place, task, settings, seed
        self.save_model = save
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.parallel = Parallel(settings, task.length, place.folder)
        self.accelerator = self.parallel.accelerator
        model.train()
        self.model = self.parallel.prepare(model)
        self.bare = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
        self.encodings = [m for m in self.bare.modules() if isinstance(m, ww.Encoding)]
        # After the model is sharded, of whose parts it keeps the moments.
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.bare, settings.weight_decay, delta_rate),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            fused=self.accelerator.device.type == "cuda",
        )
        self.forward = self.parallel.compiled(self.model)
        self.progress = Progress()
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.started = 0.0
        # Of dropout, unlike in every process; those of the first are those of a single one.
        set_seed(seed, device_specific=True)

    def go(self, stopped: Callable[[], bool]) -> None:
        self._resume()
        settings, progress, title = self.settings, self.progress, self.place.folder.name
        shown = display(title, settings.steps, progress.step)
        try:
            self.started = time.perf_counter()
            while progress.step < settings.steps:
                self._step()
                due = self._due(settings.log_every, settings.validate_every)
                shown.update(progress.step, self._log() if due else None)
                stop, more = stopped(), progress.step < settings.steps
                if more and (stop or self._due(settings.checkpoint_every)):
                    self._save()
                if stop and more:
                    raise Interrupted(
                        f"stopped {title} at step {progress.step} of {settings.steps}, which is "
                        "saved: run the same command again to go on"
                    )
        finally:
            shown.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self._finish()
        self.accelerator.free_memory()
        if stopped():
            raise Interrupted(
                f"stopped after the training of {title}: run the same command again to go on"
            )

    def _due(self, *periods: int) -> bool:
        step = self.progress.step
        return step == self.settings.steps or any(step % period == 0 for period in periods)

    def _step(self) -> None:
        step, settings, parallel = self.progress.step, self.settings, self.parallel
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, settings) * group.get("rate", 1.0)
        batch = self._read(step)
        shares = [parallel.share(part) for part in self._parts(batch)]
        targets = parallel.sum(torch.stack([share.count() for share in shares]).sum())
        total = torch.zeros((), device=self.accelerator.device)
        for index, share in enumerate(shares):
            with parallel.synchronising(self.model, last=index == len(shares) - 1):
                # Sums over all targets of the whole batch, so that shares of unlike numbers of
                # targets add up to its mean, however many parts and processes.
                loss = self._loss(share, targets)
                # Gradients are the mean over processes, of which each has a share of the sum.
                (loss * self.accelerator.num_processes).backward()
            total += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.bare.parameters(), settings.grad_clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for encoding in self.encodings:
            encoding.project_()
        self.pending.append((total, norm))
        self.progress.step += 1
        self.progress.tokens += batch.input_ids.numel() * parallel.replicas

    def _read(self, step: int) -> Batch:
        # This process's rows of a batch.
        size, device = self.settings.batch_size, self.accelerator.device
        rows = self.parallel.rows(size)
        return self.task.train_batch(self.seed, step, size, device=device, rows=rows)

    def _parts(self, batch: Batch) -> list[Batch]:
        size = len(batch.input_ids) // self.settings.gradient_accumulation_steps
        starts = range(0, len(batch.input_ids), size)
        return [take_rows(batch, slice(start, start + size)) for start in starts]

    def _loss(self, share: Share, targets: Tensor) -> Tensor:
        if self.settings.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        shifted = {"labels": share.targets, "shift_labels": share.targets}
        output = self.forward(**share.inputs, **shifted, num_items_in_batch=targets)
        loss: Tensor = output.loss
        return loss

    def _settle(self) -> None:
        # Losses stay on the device until they are needed, so that no step waits for them.
        if self.pending:
            losses = torch.stack([loss.float() for loss, _ in self.pending])
            norms = torch.stack([norm.float() for _, norm in self.pending])
            losses = self.parallel.sum(losses)
            for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True):
                self.progress.add(loss, norm)
            self.pending = []
        now = time.perf_counter()
        self.progress.seconds += now - self.started
        self.started = now

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        parallel, task = self.parallel, self.task
        size = rows_for(task.length, task.vocab_size) * parallel.replicas
        sums = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        self.model.eval()
        for batch in task.evaluation_batches(
            "validation", size, self.settings.validation_sequences
        ):
            share = parallel.share_whole(batch)
            sums += loss_sums(self.model(**share.inputs).logits, share.targets)
        self.model.train()
        parallel.reshard(self.model)
        return means(parallel.sum(sums))

    def _log(self) -> dict[str, Any]:
        self._settle()
        row = self.progress.row(learning_rate(self.progress.step - 1, self.settings))
        if self._due(self.settings.validate_every):
            loss, accuracy = self._validate()
            row["validation_loss"] = loss
            if self.task.accuracy:
                row["validation_accuracy"] = accuracy
        if self.accelerator.is_main_process:
            with (
                storage.disk_errors(self.place.log),
                self.place.log.open("a", encoding="utf-8") as log,
            ):
                log.write(json.dumps(row) + "\n")
        values = {key: value for key, value in row.items() if key != "step"}
        self.accelerator.log(values, step=self.progress.step)
        self.started = time.perf_counter()
        return row

    def _save(self) -> None:
        self._settle()
        accelerator, main = self.accelerator, self.accelerator.is_main_process
        folder = self.place.checkpoints / f"step-{self.progress.step:09d}"
        temporary = folder.with_name(f".{folder.name}.partial")
        try:
            with storage.disk_errors(folder):
                if main:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
                accelerator.wait_for_everyone()
                checkpoint.save(temporary, self.bare, self.optimizer, accelerator.process_index)
                accelerator.wait_for_everyone()
                if main:
                    storage.write_json(temporary / "progress.json", self.progress.to_dict())
                    temporary.replace(folder)
        finally:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
        if main:
            for old in self.place.checkpoints.iterdir():
                if old != folder:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()
        self.started = time.perf_counter()

    def _resume(self) -> None:
        self.accelerator.wait_for_everyone()  # the main process may still be at the last run
        newest = self._newest_checkpoint()
        if newest is not None:
            rank = self.accelerator.process_index
            progress = _progress_of(newest)
            seed = [self.seed, progress.step]
            checkpoint.load(newest, self.bare, self.optimizer, rank, seed)
            self.progress = progress
        step = self.progress.step
        if self.accelerator.is_main_process:
            kept = [row for row in storage.read_log(self.place.log) if row["step"] <= step]
            storage.write_text(self.place.log, "".join(json.dumps(row) + "\n" for row in kept))
        purge = {"tensorboard": {"purge_step": step}}
        self.accelerator.init_trackers("tensorboard", init_kwargs=purge)

    def _newest_checkpoint(self) -> Path | None:
        # That of the main process: others may see a folder of their own, or an older state of it.
        found = sorted(self.place.checkpoints.glob("step-*"))
        chosen = [found[-1].name if found else None]
        broadcast_object_list(chosen)
        if chosen[0] is None:
            return None
        folder = self.place.checkpoints / chosen[0]
        if not folder.is_dir():
            raise storage.RunError(
                f"process {self.accelerator.process_index} does not see {folder}: choose a "
                "folder that all processes share"
            )
        return folder

    def _finish(self) -> None:
        model, weights = self.parallel.whole(self.model)
        if self.accelerator.is_main_process:
            self._write(model, weights)
        self.accelerator.wait_for_everyone()

    def _write(self, model: Any, weights: dict[str, Tensor]) -> None:
        progress = self.progress
        shutil.rmtree(self.place.model, ignore_errors=True)  # of a kill between here and done.json
        with storage.new_folder(self.place.model) as folder:
            self.save_model(model, folder, weights)
        done = {
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 3),
            "spikes": progress.spikes,
            "grad_norm_max": progress.grad_norm_max,
            "peak_memory_bytes": _peak_memory(self.accelerator.device),
        }
        storage.write_json(self.place.done, done)
        shutil.rmtree(self.place.checkpoints, ignore_errors=True)


def _progress_of(folder: Path) -> Progress:
    try:
        return Progress(**storage.read_json(folder / "progress.json"))
    except (OSError, ValueError, TypeError) as error:
        raise checkpoint.refusal(folder, error, "progress.json") from error


def _peak_memory(device: torch.device) -> int | None:
    # Of this run alone. On a CPU only the peak of the whole process could be had.
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
