"""`whatwhere finetune`: its schedule, what it leaves, how it goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import recipe, text
from tiny_models import contents, llama, tokenizer, words
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
)

import whatwhere.models as wm
from whatwhere.cli import main
from whatwhere.lab import runs
from whatwhere.lab.data import TextData, TextTask, make_task
from whatwhere.lab.extrapolate import find_subject
from whatwhere.lab.finetune.figure import draw_loss_by_tokens
from whatwhere.lab.finetune.settings import MOST_TOKENS, TuningSettings
from whatwhere.lab.finetune.tuning import Tuning, _rope_types, _widen, finetune, prepare
from whatwhere.lab.loop import Interrupted, learning_rate, parameter_groups
from whatwhere.lab.train import train

pytestmark = pytest.mark.usefixtures("no_bars")

SHORT = {"steps": 8, "batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-2, "log_every": 2}
SHORT |= {"validate_every": 4, "validation_sequences": 4, "save_every": 3, "tokens": 512}
FLAGS = [part for key, value in SHORT.items() for part in (f"--{key.replace('_', '-')}", value)]


def converted(folder: Path, encoding: str = "pope", **changes: Any) -> Path:
    """Save a converted Llama of words with its tokenizer."""
    given: dict[str, Any] = {"vocab_size": 10, "eos_token_id": 1} | changes
    model = wm.convert(llama(folder, **given), encoding)
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    tokenizer(folder)
    return folder


def tune(folder: Path, output: Path, path: str, **changes: Any) -> tuple[Tuning, pd.DataFrame]:
    tuning = prepare(folder, [path], output, TuningSettings(**(SHORT | changes)))
    return tuning, finetune(tuning)


def command(folder: Any, path: Any, output: Any, *more: Any) -> list[str]:
    given = ["finetune", folder, "--text", path, "--output", output, *FLAGS, *more]
    return list(map(str, given))


def weights(tuning: Tuning) -> dict[str, torch.Tensor]:
    return load_file(tuning.model / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# --- the schedule -------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_paper() -> None:
    # arXiv 2509.10534: 500 steps on 4 x the length, warm-up 20, batch 64, 6e-5, no decay of the
    # rate; weight decay, clipping and beta2 of its models of text.
    settings = TuningSettings()
    assert (settings.steps, settings.factor, settings.batch_size) == (500, 4, 64)
    assert (settings.warmup_steps, settings.learning_rate) == (20, 6e-5)
    assert (settings.weight_decay, settings.grad_clip, settings.beta2) == (0.01, 1.0, 0.95)
    training = settings.training(4096, 50257)
    rates = [learning_rate(step, training) for step in range(500)]
    assert rates[:20] == pytest.approx([6e-5 * (step + 1) / 20 for step in range(20)])
    assert rates[20:] == pytest.approx([6e-5] * 480)


def test_the_default_length_is_four_times_that_of_training(tmp_path: Path) -> None:
    path = words(tmp_path / "text.txt")
    tuning = prepare(converted(tmp_path / "model"), [path], tmp_path / "out")
    assert (tuning.task.length, tuning.lengths) == (64, (16, 32, 64))
    assert len(tuning.task.validation_tokens) == pytest.approx(0.05 * 3000, rel=0.1)
    assert not (tmp_path / "out").exists()
    twice = TuningSettings(factor=2, lengths=(20,))
    assert prepare(tmp_path / "model", [path], tmp_path / "out", twice).task.length == 32


@given(st.integers(1, 96), st.integers(2, 3 * MOST_TOKENS), st.integers(2, 200_000))
def test_a_batch_is_cut_into_the_fewest_parts_that_fit(batch: int, length: int, size: int) -> None:
    parts = TuningSettings(batch_size=batch).training(length, size).gradient_accumulation_steps
    rows = batch // parts

    def fits(count: int) -> bool:
        return count == 1 or (count * length <= MOST_TOKENS and count * length * size <= 2**26)

    assert batch % parts == 0 and fits(rows)
    for fewer in range(1, parts):
        assert batch % fewer or not fits(batch // fewer)


def test_delta_has_a_rate_of_its_own_and_no_decay(tmp_path: Path) -> None:
    # Adam's first step is the rate times the sign of the gradient; steps above 0 are taken back.
    folder, path = converted(tmp_path / "model"), words(tmp_path / "text.txt")
    once = {"steps": 1, "warmup_steps": 0, "learning_rate": 1e-3, "weight_decay": 0.9}
    tuning, _ = tune(folder, tmp_path / "out", path, delta_lr=20.0, **once)
    found = weights(tuning)
    deltas = torch.cat([value.flatten() for name, value in found.items() if "delta" in name])
    assert (deltas < 0).any()
    moved = deltas[deltas != 0]
    torch.testing.assert_close(moved, torch.full_like(moved, -0.02), rtol=1e-2, atol=0)
    before = load_file(folder / "model.safetensors")
    norm = "model.norm.weight"
    assert (found[norm] - before[norm]).abs().max() == pytest.approx(1e-3, rel=1e-2)


def test_groups_hold_each_parameter_once(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted(tmp_path / "model"))
    groups = parameter_groups(model, 0.1, delta_rate=5.0)
    assert [group.get("rate", 1.0) for group in groups] == [1.0, 1.0, 5.0]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    deltas = {id(p) for name, p in model.named_parameters() if name.endswith("delta")}
    assert {id(p) for p in groups[2]["params"]} == deltas


# --- what it leaves -----------------------------------------------------------------------------


def loss_of(folder: Path, windows: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


def test_a_converted_model_is_fine_tuned_and_measured(tmp_path: Path) -> None:
    folder, path, out = converted(tmp_path / "model"), words(tmp_path / "text.txt"), tmp_path / "o"
    tuning, losses = tune(folder, out, path, steps=40, validate_every=20)
    assert list(losses["when"]) == ["before"] * 3 + ["after"] * 3
    assert list(losses["length"]) == [16, 32, 64] * 2
    for when, place in (("before", folder), ("after", out / "model")):
        for length in (16, 64):
            row = losses[(losses["when"] == when) & (losses["length"] == length)].iloc[0]
            windows = tuning.task.windows(length, row["windows"])
            assert row["loss"] == pytest.approx(loss_of(place, windows), rel=1e-4)
    by_when = losses.groupby("when")["loss"]
    assert by_when.max()["after"] < by_when.min()["before"]

    config = AutoModelForCausalLM.from_pretrained(out / "model").config
    assert config.position_encoding == "pope"
    assert (config.max_position_embeddings, config.train_length) == (64, 16)
    assert AutoTokenizer.from_pretrained(out / "model").model_max_length == 64
    assert find_subject(out / "model").train_length == 16
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in log] == [64 * 4 * step for step in range(2, 41, 2)]
    assert [row["step"] for row in log if "validation_loss" in row] == [20, 40]
    record = json.loads((out / "finetune.json").read_text())
    assert {"versions", "device", "git_commit", "data"} <= record.keys()
    assert record["identity"]["settings"]["steps"] == 40
    for name in ("loss.png", "loss.svg", "loss_by_length.png"):
        assert (out / name).stat().st_size > 1000
    assert not (out / "checkpoint").exists()


def test_a_stock_model_and_one_of_ours_can_be_fine_tuned(tmp_path: Path) -> None:
    path = words(tmp_path / "words.txt")
    llama(tmp_path / "bytes")
    tuning, losses = tune(tmp_path / "bytes", tmp_path / "stock", path, length=24)
    assert tuning.subject.tokenizer == "bytes" and tuning.lengths == (16, 24, 32, 64)
    assert set(losses["when"]) == {"before", "after"}
    config = AutoModelForCausalLM.from_pretrained(tuning.model).config
    assert (config.model_type, config.max_position_embeddings) == ("llama", 24)

    made = recipe(text(tmp_path), training={"steps": 1})
    run = runs.plan(made, "pope", 0, tmp_path)
    task = make_task(made.data)
    runs.claim(run, task.describe())
    train(run, task)
    tuning, _ = tune(run.folder, tmp_path / "ours", path, factor=2)
    assert tuning.task.length == 64 and tuning.encoding == "pope"
    # Its frequencies may follow from this length, which therefore stays.
    config = AutoModelForCausalLM.from_pretrained(tuning.model).config
    assert (config.model_type, config.max_position_embeddings) == ("whatwhere", 32)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 2.0}, 64),
        ({"rope_type": "dynamic", "factor": 2.0}, 16),
    ],
)
def test_a_config_grows_only_where_frequencies_do_not_follow(
    rope: dict[str, Any], expected: int
) -> None:
    config = LlamaConfig(
        max_position_embeddings=16, rope_parameters={"rope_theta": 10000.0, **rope}
    )
    assert _rope_types(config) == {rope["rope_type"]}
    _widen(config, 64)
    assert config.max_position_embeddings == expected


def test_sixteen_bit_weights_are_trained_in_float32_and_come_back_as_they_were(
    tmp_path: Path,
) -> None:
    folder, path = tmp_path / "model", words(tmp_path / "text.txt")
    converted(folder, dtype=torch.bfloat16)
    before = load_file(folder / "model.safetensors")
    # A tenth of what rounding to bfloat16 swallows, ten times over.
    tuning, _ = tune(folder, tmp_path / "out", path, steps=40, learning_rate=2e-4, warmup_steps=0)
    after = weights(tuning)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    norm = "model.norm.weight"
    assert before[norm][0] - 2e-4 == before[norm][0]
    assert not torch.equal(after[norm], before[norm])


@pytest.mark.parametrize(
    "change", [{"checkpointing": True}, {"accumulate": 4}, {"precision": "bf16"}]
)
def test_what_saves_memory_changes_no_more_than_rounding(
    change: dict[str, Any], tmp_path: Path
) -> None:
    folder, path = converted(tmp_path / "model"), words(tmp_path / "text.txt")
    # Adam makes much of the rounding of small gradients: a few small steps.
    few = {"steps": 3, "learning_rate": 1e-3}
    plain, _ = tune(folder, tmp_path / "plain", path, **few)
    AcceleratorState._reset_state()  # one process has one precision, unless told to forget it
    other, _ = tune(folder, tmp_path / "other", path, **few, **change)
    AcceleratorState._reset_state()
    bound = 3e-3 if "precision" in change else 1e-4
    start = load_file(folder / "model.safetensors")
    for name, value in weights(plain).items():
        assert (value - weights(other)[name]).abs().max() <= 2 * bound, name
        assert (value - start[name]).abs().max() > 2e-4 or "delta" in name
    assert "gradient_checkpointing" not in (other.model / "config.json").read_text()


def test_validation_text_of_its_own_is_never_trained_on(tmp_path: Path) -> None:
    first, second = words(tmp_path / "one.txt"), words(tmp_path / "two.txt", 500, seed=1)
    data = TextData(paths=(first,), length=16)
    task = TextTask(data, validation=[second])
    assert bytes(task.train_tokens[:-1].tobytes()) == Path(first).read_bytes()
    assert bytes(task.validation_tokens[:-1].tobytes()) == Path(second).read_bytes()
    with pytest.raises(ValueError, match=r"validation: .*one.txt.* is training text, too"):
        TextTask(data, validation=[str(tmp_path)])


def test_the_figure_counts_tokens() -> None:
    log = pd.DataFrame({"step": [10, 20], "tokens": [640, 1280], "loss": [3.0, 2.5]})
    log["validation_loss"] = [float("nan"), 2.4]
    figure = draw_loss_by_tokens(log, "pope", "nats per token")
    axes = figure.axes[0]
    lines = [line.get_xdata().tolist() for line in axes.get_lines()]
    assert [640, 1280] in lines and [1280] in lines
    assert axes.get_xlabel() == "tokens trained on"


# --- going on -----------------------------------------------------------------------------------


def stop_at(step: int, how: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Do something before the batch of a step, once; the steps that are taken."""
    seen: list[int] = []
    left = [how]
    stock = TextTask.train_batch

    def watched(self: TextTask, seed: int, number: int, *args: Any, **more: Any) -> Any:
        seen.append(number)
        if number == step and left:
            left.pop()()
        return stock(self, seed, number, *args, **more)

    monkeypatch.setattr(TextTask, "train_batch", watched)
    return seen


def crash() -> None:
    raise ZeroDivisionError


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("how", "again"), [(crash, 3), (interrupt, 6)])
def test_a_stopped_one_ends_with_the_weights_of_an_unbroken_one(
    how: Callable[[], None], again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = converted(tmp_path / "model"), words(tmp_path / "text.txt")
    more = {"accumulate": 2, "delta_lr": 3.0, "checkpointing": True}
    whole, losses = tune(folder, tmp_path / "whole", path, **more)
    seen = stop_at(5, how, monkeypatch)
    with pytest.raises((Interrupted, ZeroDivisionError)):
        tune(folder, tmp_path / "broken", path, **more)
    assert not (tmp_path / "broken" / "model").exists()
    before = (tmp_path / "broken" / "loss_by_length.csv").read_text()
    del seen[:]
    broken, found = tune(folder, tmp_path / "broken", path, **more)
    assert seen[0] == again and seen[-1] == SHORT["steps"] - 1
    assert_same(weights(broken), weights(whole))
    assert found.equals(losses) and broken.losses.read_text().startswith(before)
    rows = [
        pd.read_json(place.log, lines=True).drop(columns="seconds") for place in (whole, broken)
    ]
    assert rows[0].equals(rows[1])


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bits(tmp_path: Path) -> None:
    folder, path = converted(tmp_path / "model"), words(tmp_path / "text.txt")
    more = ["--steps", 100, "--save-every", 10]
    # What is not killed needs no process of its own, which takes longer to start than to train.
    assert main(command(folder, path, tmp_path / "whole", *more)) == 0
    killed = tmp_path / "killed"
    again = command(folder, path, killed, *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "whatwhere.cli", *again], stdout=subprocess.DEVNULL
    )
    while not list(killed.glob("checkpoint/step-*")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed / "done.json").exists()
    assert main(again) == 0
    ends = [load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "killed")]
    assert_same(*ends)


def test_a_finished_one_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, path = converted(tmp_path / "model"), words(tmp_path / "text.txt")
    _, losses = tune(folder, tmp_path / "out", path)
    before = contents(tmp_path)
    seen = stop_at(0, crash, monkeypatch)
    tuning, again = tune(folder, tmp_path / "out", path, save_every=2)
    assert not seen and again.equals(losses)
    assert contents(tmp_path) == before
    # Nor do the other processes begin without the first one.
    monkeypatch.setenv("RANK", "1")
    assert finetune(tuning).empty
