"""Several processes against one: losses, weights, shards, checkpoints, shared sequences.

Processes cost seconds to start, so that one launch does many jobs, whose results the tests read,
and all but those of the command line are forks of one (`scale_worker`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scale_worker import start
from tiny import recipe, text

from whatwhere.lab import checkpoint, loop, runs, storage
from whatwhere.lab.parallel import check
from whatwhere.lab.process import main_process_first
from whatwhere.lab.recipes import TrainingSettings, to_yaml
from whatwhere.lab.runs import Run
from whatwhere.lab.train import train

# What each job trains. Names are folders; of those with the same letter the data are the same.
PARTS = {"gradient_accumulation_steps": 2}
KILLED: dict[str, Any] = {
    "training": {"parallel": "fsdp", **PARTS},
    "model": {"dropout": 0.2},
}
TRAINED: dict[str, dict[str, Any]] = {
    "ddp": {"training": PARTS},
    "fsdp": {"training": {"parallel": "fsdp", "activation_checkpointing": True, **PARTS}},
    "context": {"training": {"context_parallel": 2, "activation_checkpointing": True}},
    "context-fsdp": {"training": {"context_parallel": 2, "parallel": "fsdp"}},
}
PACKED = ("packed-ddp", "packed-context-fsdp")


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    # Delta gets a rate of its own weight: it reaches its bounds within the few steps.
    training = {"batch_size": 8, "validation_sequences": 7, **changes.get("training", {})}
    model = {"num_attention_heads": 4, "num_key_value_heads": 2, **changes.get("model", {})}
    return {**changes, "training": training, "model": model}


def packed(place: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Short documents of many lengths, of which each process has another number of targets."""
    folder = place / "documents"
    folder.mkdir(exist_ok=True)
    for index in range(40):
        (folder / f"{index:02}.txt").write_text("abcdefghij"[: 2 + index % 8] * (1 + index % 5))
    return {**changes, "data": {"paths": [str(folder)], "documents": "pack", "length": 48}}


def job(folder: Path, changes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kind": "train", "folder": str(folder), "changes": changed(changes), **more}


def python(*command: str) -> subprocess.CompletedProcess:
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def succeeded(done: subprocess.CompletedProcess) -> None:
    # What the launcher says at the end hides what went wrong.
    assert done.returncode == 0, done.stderr[done.stderr.find("Traceback") :][:6000]


class Runs:
    """The folders that the launches have left."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __getitem__(self, name: str) -> Path:
        return self.place / name / "pope-seed0"

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self[name] / "model" / "model.safetensors")

    def rows(self, name: str) -> list[dict[str, Any]]:
        rows = storage.read_log(self[name] / "log.jsonl")
        return [{key: row[key] for key in row if key != "seconds"} for row in rows]

    def failure(self, stage: str) -> str:
        """How a stage failed, or nothing."""
        return (self.place / "logs" / stage / "failure").read_text()

    def errors(self, stage: str) -> str:
        """What the processes of a stage wrote to standard error."""
        logs = sorted((self.place / "logs" / stage).rglob("stderr.log"))
        return "\n".join(log.read_text() for log in logs)

    def shards(self, name: str, rank: int) -> dict[str, Any]:
        return storage.read_json(self[name] / f"shards-{rank}.json")


REFUSED = ["--encodings", "pope", "rope", "yarn", "--training.batch-size", "3", "--output"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All that is trained here by several processes; at the end of the first stage one dies."""
    place = tmp_path_factory.mktemp("scale")
    fsdp, ddp = TRAINED["fsdp"], TRAINED["ddp"]
    stopped = {"fsdp-2-to-4": fsdp, "ddp-2-to-4": ddp, "fsdp-2-to-1": fsdp, "ddp-2-to-1": ddp}
    two = [{"kind": "context"}]
    two += [job(place / name, TRAINED[name]) for name in TRAINED]
    two += [job(place / "whole", KILLED)]
    two += [job(place / name, packed(place, TRAINED[name[7:]])) for name in PACKED]
    two += [job(place / name, changes, stop=7) for name, changes in stopped.items()]
    two += [job(place / "killed", KILLED, kill=1)]

    four = [job(place / "fsdp-2-to-4", fsdp), job(place / "ddp-2-to-4", ddp)]
    four += [job(place / "fsdp-4-to-2", fsdp, stop=7), job(place / "ddp-4-to-2", ddp, stop=7)]
    four += [job(place / "two-by-two", TRAINED["context-fsdp"])]

    again = [job(place / "fsdp-4-to-2", fsdp), job(place / "ddp-4-to-2", ddp)]
    again += [job(place / "killed", KILLED, begun=True)]

    (place / "tiny.yaml").write_text(to_yaml(recipe(text(place))))
    refused = ["compare", str(place / "tiny.yaml"), *REFUSED, str(place / "refused")]
    wrong = [{"kind": "command", "arguments": refused}]

    stages = {"two": (2, two), "four": (4, four), "again": (2, again), "wrong": (2, wrong)}
    (place / "stages.json").write_text(json.dumps(stages))
    done = Runs(place)
    succeeded(python(str(Path(__file__).with_name("scale_worker.py")), str(place)))
    # Which of the two failed first is a matter of chance.
    assert done.failure("two") and (done["killed"] / "killed").exists(), done.failure("two")
    for name in ("four", "again"):
        assert not done.failure(name), done.failure(name)

    alone = {
        "one": {},
        "packed": packed(place, {}),
        "fsdp-2-to-1": fsdp,
        "ddp-2-to-1": ddp,
    }
    for name, changes in alone.items():
        train(*start(str(place / "text"), job(place / name, changes)))
    return done


SAME = [
    *TRAINED,
    "two-by-two",
    *(f"{kind}-{way}" for kind in ("fsdp", "ddp") for way in ("2-to-4", "4-to-2", "2-to-1")),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_any_number_of_processes_trains_what_one_does(name: str, done: Runs) -> None:
    # Validation, norms before clipping and counts too, without a gap where it was resumed.
    assert_same(done, name, "one")


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_so_they_do_where_targets_are_few_in_some(name: str, done: Runs) -> None:
    assert_same(done, name, "packed")


def assert_same(done: Runs, name: str, other: str) -> None:
    one, several = done.rows(other), done.rows(name)
    assert [set(row) for row in several] == [set(row) for row in one]
    for row, expected in zip(several, one, strict=True):
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=2e-4 if key == "grad_norm" else 2e-5), key
    expected_weights, found = done.weights(other), done.weights(name)
    assert found.keys() == expected_weights.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected_weights[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_delta_moves_as_in_one_process_and_stays_in_its_bounds(name: str, done: Runs) -> None:
    expected, found = done.weights("one"), done.weights(name)
    deltas = [key for key in expected if key.endswith("delta")]
    assert len(deltas) == 2
    for key in deltas:
        assert found[key].shape == (4, 4)
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)
        # It starts at its upper bound, beyond which half of all steps would take it.
        assert (found[key] <= 0).all() and (found[key] == 0).any() and (found[key] < -1e-3).any()


@pytest.mark.slow
def test_weights_gradients_and_moments_are_sharded(done: Runs) -> None:
    for name, count in (("fsdp", 2), ("context-fsdp", 2), ("fsdp-2-to-4", 4)):
        shards = [done.shards(name, rank) for rank in range(count)]
        for kind in ("weights", "gradients", "moments"):
            sizes = [shard[kind] for shard in shards]
            assert sum(sizes) == shards[0]["whole"]
            # Rows of a matrix are not cut: a few vectors lie in fewer processes.
            assert max(sizes) < 1.1 * shards[0]["whole"] / count, (name, kind)
        assert shards[0]["deltas"] == ["DTensor", "DTensor"]
    shards = [done.shards("ddp", rank) for rank in range(2)]
    assert all(s["weights"] == s["moments"] == s["whole"] for s in shards)


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bits_with_dropout(done: Runs) -> None:
    whole, killed = done.weights("whole"), done.weights("killed")
    assert whole.keys() == killed.keys()
    for key, value in whole.items():
        assert torch.equal(value, killed[key]), key
    assert done.rows("whole") == done.rows("killed")
    without = done.weights("fsdp")
    assert any(not torch.equal(value, without[key]) for key, value in whole.items())


@pytest.mark.slow
def test_nothing_is_left_of_checkpoints(done: Runs) -> None:
    assert not list(done.place.glob("*/pope-seed0/checkpoint"))


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.slow
def test_compare_runs_under_torchrun(tmp_path: Path) -> None:
    made = recipe(text(tmp_path), training={"parallel": "fsdp"})
    (tmp_path / "tiny.yaml").write_text(to_yaml(made))
    command = ["-m", "whatwhere.cli", "compare", str(tmp_path / "tiny.yaml")]
    command += ["--encodings", "pope", "rope", "yarn", "--output", str(tmp_path / "runs")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = python(*launcher, *command)
    succeeded(done)
    assert done.stdout.count("report: ") == 1
    assert done.stdout.count("pope-seed0  step 12/12") == 1
    assert (tmp_path / "runs" / "report.html").exists()
    assert all(
        (tmp_path / "runs" / f"{label}-seed0" / "results.csv").exists()
        for label in ("pope", "rope", "yarn")
    )


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_one_line(done: Runs) -> None:
    assert done.failure("wrong")
    said = done.errors("wrong").splitlines()
    lines = [line for line in said if line.startswith("whatwhere: ")]
    assert len(lines) == 1 and "batch_size=3" in lines[0]
    assert not (done.place / "refused").exists()


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 6}, "batch_size=6 does not divide among 4"),
        ({"batch_size": 4, "gradient_accumulation_steps": 2}, "batch_size=4"),
        ({"context_parallel": 3}, "context_parallel=3 does not divide 4"),
        ({"context_parallel": 4}, "sequences of 36 tokens do not divide into 8"),
        ({"parallel": "fsdp", "compile": "reduce-overhead"}, "CUDA graphs"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    check(TrainingSettings(batch_size=8), 36)
    with pytest.raises(ValueError, match=said) as caught:
        check(TrainingSettings(**{"batch_size": 8, **settings}), 36)
    assert "\n" not in str(caught.value)


def test_acceleration_that_is_set_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"training\.parallel"):
        check(TrainingSettings(), 32)


def test_alone_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with main_process_first():
        assert not torch.distributed.is_initialized()


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    run, task = start(text(tmp_path), job(tmp_path / "runs", {}))
    folder = Run(run.folder, run.config).checkpoints / "step-000000005"
    folder.mkdir(parents=True)
    storage.write_json(folder / "progress.json", {"step": 5})
    with pytest.raises(storage.RunError, match="no checkpoint that this version reads"):
        train(run, task)
    assert runs.load_record(run)


def test_the_first_process_says_which_checkpoint_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, task = start(text(tmp_path), job(tmp_path / "runs", {}))

    def said(found: list[str | None]) -> None:
        found[:] = ["step-000000005"]

    monkeypatch.setattr(loop, "broadcast_object_list", said)
    with pytest.raises(storage.RunError, match=r"process 0 does not see .*step-000000005"):
        train(run, task)


def linear(width: int) -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    model = torch.nn.Linear(50, width)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 50)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("pattern", ["state/*", "random-*", "progress.json"])
@pytest.mark.parametrize("kept", [0.5, 0.01])
def test_a_checkpoint_cut_short_is_one_line(tmp_path: Path, pattern: str, kept: float) -> None:
    checkpoint.save(tmp_path, *linear(50), 0)
    storage.write_json(tmp_path / "progress.json", {"step": 5})
    (damaged,) = tmp_path.glob(pattern)
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(storage.RunError, match=damaged.name) as caught:
        loop._progress_of(tmp_path)
        checkpoint.load(tmp_path, *linear(50), 0, [0, 5])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, *linear(50), 0)
    with pytest.raises(storage.RunError, match="no checkpoint that this version reads") as caught:
        checkpoint.load(tmp_path, *linear(40), 0, [0, 5])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
