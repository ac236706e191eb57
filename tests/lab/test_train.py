from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import indirect, recipe, text
from torch.distributed.checkpoint.filesystem import FileSystem

import whatwhere as ww
from whatwhere.cli import main
from whatwhere.lab import runs, storage
from whatwhere.lab.compare import choose
from whatwhere.lab.data import Batch, Task, make_task
from whatwhere.lab.progress import SPIKE_WINDOW, Progress
from whatwhere.lab.recipes import EncodingChoice, ModelSettings, Recipe, TrainingSettings, to_yaml
from whatwhere.lab.runs import Run
from whatwhere.lab.train import (
    Interrupted,
    build_model,
    learning_rate,
    parameter_groups,
    train,
)

TRAINABLE = [name for name in ww.ENCODINGS if name != "yarn"]


def start(made: Recipe, folder: Path, label: str = "pope") -> tuple[Run, Task]:
    task = make_task(made.data)
    run = runs.plan(made, label, 0, folder)
    runs.claim(run, task.describe())
    return run, task


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.model / "model.safetensors")


def assert_same_weights(one: Run, other: Run) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def rows(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.log.read_text().splitlines()]


class Watched(Task):
    """A task that calls something before it gives the batch of a step."""

    def __init__(self, inner: Task, before: Callable[[int], None]) -> None:
        self.inner, self.before = inner, before
        self.vocab_size, self.length, self.splits = inner.vocab_size, inner.length, inner.splits

    def train_batch(self, seed: int, step: int, *args: Any, **kwargs: Any) -> Batch:
        self.before(step)
        return self.inner.train_batch(seed, step, *args, **kwargs)

    def evaluation_batches(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.evaluation_batches(*args, **kwargs)

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()


# --- schedule, groups, weights ------------------------------------------------------------------


@given(
    steps=st.integers(2, 300),
    warmup=st.integers(0, 300),
    highest=st.floats(1e-5, 1e-1),
    ratio=st.floats(0, 1),
)
def test_the_rate_rises_to_its_highest_and_falls_to_its_minimum(
    steps: int, warmup: int, highest: float, ratio: float
) -> None:
    lowest = highest * ratio
    settings = TrainingSettings(
        steps=steps, warmup_steps=warmup, learning_rate=highest, min_learning_rate=lowest
    )
    rates = [learning_rate(step, settings) for step in range(steps)]
    peak = min(max(0, warmup - 1), steps - 1)
    assert all(0 <= rate <= highest * (1 + 1e-12) for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    after = rates[peak:]
    assert all(a >= b - 1e-12 * highest for a, b in pairwise(after))
    if warmup < steps:
        assert rates[peak] == pytest.approx(highest)
        assert rates[-1] == pytest.approx(lowest if steps > peak + 1 else highest)


def test_half_way_down_the_cosine_is_the_mean_of_both_rates() -> None:
    settings = TrainingSettings(
        steps=101, warmup_steps=0, learning_rate=1.0, min_learning_rate=0.2
    )
    assert learning_rate(50, settings) == pytest.approx(0.6)


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_encoding_starts_from_the_same_other_weights(name: str, tmp_path: Path) -> None:
    # RoPE-ID and its kin need a training length above 64.
    task = make_task(recipe(text(tmp_path), data={"length": 96}).data)
    shape = ModelSettings(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    options = {"delta": "uniform"} if name == "pope" else {}
    bare = build_model(shape, task, EncodingChoice(name="nope"), seed=3).state_dict()
    made = build_model(shape, task, EncodingChoice(name=name, options=options), 3).state_dict()
    assert bare.keys() <= made.keys()
    for key, value in bare.items():
        assert torch.equal(value, made[key]), key
    other = build_model(shape, task, EncodingChoice(name="nope"), seed=4).state_dict()
    assert any(not torch.equal(value, other[key]) for key, value in bare.items())


@pytest.mark.parametrize("name", ["pope", "learned", "rope"])
def test_decay_spares_vectors_and_delta_and_nothing_else(name: str, tmp_path: Path) -> None:
    task = make_task(recipe(text(tmp_path)).data)
    shape = ModelSettings(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = build_model(shape, task, EncodingChoice(name=name), seed=0)
    decayed, spared = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    named = {id(parameter): key for key, parameter in model.named_parameters()}
    found = [id(p) for p in (*decayed["params"], *spared["params"])]
    assert sorted(found) == sorted(named)
    for parameter in decayed["params"]:
        assert parameter.ndim >= 2 and "delta" not in named[id(parameter)]
    for parameter in spared["params"]:
        assert parameter.ndim < 2 or "delta" in named[id(parameter)]
    assert any("delta" in named[id(p)] for p in spared["params"]) == (name == "pope")


# --- the loop against one without accelerate ----------------------------------------------------


@pytest.mark.parametrize("label", ["pope", "learned"])
def test_the_loop_takes_the_steps_of_a_plain_one(label: str, tmp_path: Path) -> None:
    made = choose(recipe(text(tmp_path)), [label])
    run, task = start(made, tmp_path / "runs", label)
    train(run, task)

    settings = made.training
    model = build_model(made.model, task, made.encodings[label], seed=0).train()
    spared = [p for n, p in model.named_parameters() if p.ndim < 2 or n.endswith("delta")]
    others = [p for p in model.parameters() if not any(p is q for q in spared)]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": spared, "weight_decay": 0.0}],
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    losses, norms = [], []
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        batch = task.train_batch(0, step, settings.batch_size)
        loss = model(batch.input_ids, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip).item())
        optimizer.step()
        for module in model.modules():
            if isinstance(module, ww.Encoding):
                module.project_()
        losses.append(loss.item())
    state = model.state_dict()
    for name, value in weights(run).items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6)
    logged = rows(run)
    assert [row["step"] for row in logged] == [3, 6, 9, 12]
    for row in logged:
        end = row["step"]
        assert row["loss"] == pytest.approx(sum(losses[end - 3 : end]) / 3, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(max(norms[end - 3 : end]), rel=1e-4)
        assert row["tokens"] == end * 4 * 32
        assert ("validation_loss" in row) == (end % 6 == 0)
    assert storage.read_json(run.done)["grad_norm_max"] == pytest.approx(max(norms), rel=1e-4)


def test_accumulating_gradients_changes_nothing_even_if_parts_hold_unlike_numbers_of_targets(
    tmp_path: Path,
) -> None:
    place = tmp_path / "documents"
    place.mkdir()
    for index in range(40):  # short documents of many lengths: rows with much padding and little
        (place / f"{index:02}.txt").write_text("abcdefghij"[: 2 + index % 8] * (1 + index % 5))
    ends = []
    for parts in (1, 2, 4):
        made = recipe(
            str(place),
            data={"documents": "pack", "length": 48},
            training={"gradient_accumulation_steps": parts, "learning_rate": 1e-3},
        )
        run, task = start(made, tmp_path / f"runs{parts}")
        batch = task.train_batch(0, 0, 4)
        assert len({int((row != -100).sum()) for row in batch.labels}) > 1
        train(run, task)
        ends.append((weights(run), rows(run)[-1]["loss"]))
    for found, loss in ends[1:]:
        assert loss == pytest.approx(ends[0][1], rel=1e-4)
        for name, value in found.items():
            torch.testing.assert_close(value, ends[0][0][name], rtol=1e-3, atol=2e-5)


def test_delta_stays_in_bounds_whatever_the_rate(tmp_path: Path) -> None:
    made = recipe(
        text(tmp_path),
        training={"learning_rate": 3.0, "min_learning_rate": 3.0},
        encodings={"pope": {"name": "pope", "options": {"delta": "uniform"}}},
    )
    run, task = start(made, tmp_path / "runs")
    train(run, task)
    deltas = [value for name, value in weights(run).items() if name.endswith("delta")]
    assert deltas
    for delta in deltas:
        assert (delta >= -2 * math.pi - 1e-6).all() and (delta <= 0).all()


def test_indirect_indexing_logs_accuracy(tmp_path: Path) -> None:
    run, task = start(indirect(), tmp_path / "runs")
    train(run, task)
    found = [row["validation_accuracy"] for row in rows(run) if "validation_loss" in row]
    assert found and all(0 <= value <= 1 for value in found)


# --- resumption ---------------------------------------------------------------------------------


def broken(made: Recipe, folder: Path, stop: Callable[[int], None]) -> tuple[Run, list[int]]:
    """A run stopped by `stop` in step 7 and trained to its end then, and the steps since."""
    run, task = start(made, folder)

    def at_seven(step: int) -> None:
        if step == 7:
            stop(step)

    with pytest.raises((Interrupted, ZeroDivisionError)):
        train(run, Watched(task, at_seven))
    assert not run.done.exists() and not run.model.exists()
    seen: list[int] = []
    train(run, Watched(task, seen.append))
    assert seen[-1] == made.training.steps - 1
    return run, seen


def crash(step: int) -> None:
    raise ZeroDivisionError


def interrupt(step: int) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate(step: int) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("stop", "first"), [(crash, 5), (interrupt, 8), (terminate, 8)]
)  # a crash goes back to the checkpoint, a signal saves one after the step it came in
def test_a_stopped_run_ends_with_the_weights_of_an_unbroken_one(
    stop: Callable[[int], None], first: int, tmp_path: Path
) -> None:
    made = recipe(
        text(tmp_path),
        model={"dropout": 0.3},
        training={"gradient_accumulation_steps": 2},
    )
    whole, task = start(made, tmp_path / "whole")
    train(whole, task)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run, seen = broken(made, tmp_path / "broken", stop)
    assert seen[0] == first
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert_same_weights(run, whole)

    def timeless(run: Run) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(run)]

    assert timeless(run) == timeless(whole)
    done = [storage.read_json(r.done) | {"seconds": 0} for r in (run, whole)]
    assert done[0] == done[1]


def test_dropout_makes_the_resumption_test_mean_something(tmp_path: Path) -> None:
    # Were random numbers not saved, the test above would see it: dropout changes the weights.
    ends = []
    for dropout in (0.0, 0.3):
        made = recipe(text(tmp_path), model={"dropout": dropout})
        run, task = start(made, tmp_path / f"runs{dropout}")
        train(run, task)
        ends.append(weights(run))
    assert any(not torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_only_the_newest_checkpoint_is_kept_and_none_after_the_end(tmp_path: Path) -> None:
    made = recipe(text(tmp_path), training={"checkpoint_every": 2})
    run, task = start(made, tmp_path / "runs")
    found: dict[int, list[str]] = {}

    def look(step: int) -> None:
        places = run.checkpoints.iterdir() if run.checkpoints.exists() else []
        found[step] = [place.name for place in places]

    train(run, Watched(task, look))
    assert found[1] == []
    assert found[2] == found[3] == ["step-000000002"]
    assert found[11] == ["step-000000010"]
    assert not run.checkpoints.exists()


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bits(tmp_path: Path) -> None:
    made = recipe(
        text(tmp_path),
        model={"dropout": 0.2},
        training={"steps": 100, "checkpoint_every": 10, "validate_every": 50},
    )
    config = tmp_path / "tiny.yaml"
    config.write_text(to_yaml(made))

    def command(folder: str) -> list[str]:
        options = ["--encoding", "pope", "--output", str(tmp_path / folder)]
        return ["train", str(config), *options]

    # What is not killed needs no process of its own, which takes longer to start than to train.
    assert main(command("whole")) == 0
    killed = runs.plan(made, "pope", 0, tmp_path / "killed")
    process = subprocess.Popen(
        [sys.executable, "-m", "whatwhere.cli", *command("killed")], stdout=subprocess.DEVNULL
    )
    while not list(killed.checkpoints.glob("step-*")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not killed.done.exists()
    assert main(command("killed")) == 0
    whole = runs.plan(made, "pope", 0, tmp_path / "whole")
    assert_same_weights(killed, whole)
    assert [row["step"] for row in rows(killed)] == [row["step"] for row in rows(whole)]
    assert (
        killed.results.read_text().splitlines()[:4] == whole.results.read_text().splitlines()[:4]
    )


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(text(tmp_path))
    run, task = start(made, tmp_path / "runs")
    whole, _ = start(made, tmp_path / "whole")
    train(whole, task)
    real = FileSystem.create_stream

    def full(*args: Any, **kwargs: Any) -> Any:
        if list(run.checkpoints.glob("step-*")):  # there is room for one
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", full)
        with pytest.raises(storage.DiskFullError, match="no space left") as caught:
            train(run, task)
    assert "\n" not in str(caught.value)
    assert [place.name for place in run.checkpoints.iterdir()] == ["step-000000005"]
    train(run, task)
    assert_same_weights(run, whole)


def test_so_does_one_that_tensorboard_meets_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, task = start(recipe(text(tmp_path)), tmp_path / "runs")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", full)
    with pytest.raises(storage.DiskFullError, match="no space left"):
        train(run, task)


# --- loss spikes --------------------------------------------------------------------------------


def feed(losses: list[float]) -> Progress:
    progress = Progress()
    for loss in losses:
        progress.add(loss, 1.0)
    return progress


def test_a_jump_counts_once_however_long_it_lasts() -> None:
    calm = [2.0 + 0.01 * (i % 5) for i in range(SPIKE_WINDOW)]
    assert feed(calm).spikes == 0
    assert feed([*calm, 3.0, 3.1, 3.0, *calm]).spikes == 1
    assert feed([*calm, 3.0, *calm, 3.0]).spikes == 2
    assert feed([*calm, 2.15]).spikes == 0  # beyond six deviations, but not beyond a tenth
    assert feed([*calm, float("nan"), *calm]).spikes == 1


def test_a_falling_and_a_noisy_loss_have_no_spikes() -> None:
    assert feed([5.0 * 0.99**i for i in range(300)]).spikes == 0
    noise = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 0.5 + 3
    assert feed(noise.tolist()).spikes == 0


def test_progress_survives_json_and_counts_on() -> None:
    losses = [2.0 + 0.1 * math.sin(i) for i in range(80)] + [9.0, 9.0] + [2.0] * 5 + [9.0]
    progress = feed(losses[:81])
    again = Progress(**json.loads(json.dumps(progress.to_dict())))
    for loss in losses[81:]:
        again.add(loss, 2.0)
    assert again.spikes == feed(losses).spikes == 2
