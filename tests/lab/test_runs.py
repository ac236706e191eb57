from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tiny import recipe

from whatwhere.lab import environment, runs, storage
from whatwhere.lab.recipes import EncodingChoice, ModelSettings, Recipe, TrainingSettings

DESCRIPTION = {
    "task": "text",
    "source": "somewhere",
    "train_sha256": "a",
    "validation_sha256": "b",
}

# A valid value other than that of the tiny recipe, for every field that weights depend on.
OTHER: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 8,
        "mlp": "swiglu",
        "tie_word_embeddings": False,
        "dropout": 0.5,
        "qk_norm": True,
        "rms_norm_eps": 1e-3,
        "initializer_range": 0.1,
        "sliding_window": 4,
        "attention_backend": "reference",
    },
    "training": {
        "steps": 13,
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.02,
        "min_learning_rate": 0.002,
        "warmup_steps": 3,
        "weight_decay": 0.5,
        "beta1": 0.8,
        "beta2": 0.5,
        "grad_clip": 2.0,
        "precision": "bf16",
        "compile": "default",
        "deterministic": False,
        "log_every": 4,
        "validate_every": 7,
        "validation_sequences": 9,
        "checkpoint_every": 6,
    },
}

# A valid value other than that of the tiny recipe, for the fields that only say how.
HOW: dict[str, dict[str, Any]] = {
    "model": {},
    "training": {"parallel": "fsdp", "context_parallel": 2, "activation_checkpointing": True},
}


def planned(
    folder: Path, made: Recipe | None = None, label: str = "pope", seed: int = 0
) -> runs.Run:
    return runs.plan(made or recipe("a.txt"), label, seed, folder)


@pytest.mark.parametrize(
    ("part", "settings"), [("model", ModelSettings), ("training", TrainingSettings)]
)
def test_every_field_is_in_the_table_of_other_values(part: str, settings: type[BaseModel]) -> None:
    assert OTHER[part].keys() | set(HOW[part]) == settings.model_fields.keys()


def test_how_a_run_is_computed_does_not_count(tmp_path: Path) -> None:
    made = recipe("a.txt", training=HOW["training"])
    marks = {
        runs.fingerprint(planned(tmp_path, one).config, DESCRIPTION)
        for one in (made, recipe("a.txt"))
    }
    assert len(marks) == 1 and made != recipe("a.txt")
    assert set(HOW["training"]) == set(runs.HOW_IT_IS_COMPUTED)


@pytest.mark.parametrize(
    ("part", "field"), [(part, field) for part, fields in OTHER.items() for field in fields]
)
def test_a_folder_of_another_config_is_refused_by_name_and_left_alone(
    part: str, field: str, tmp_path: Path
) -> None:
    runs.claim(planned(tmp_path), DESCRIPTION)
    before = planned(tmp_path).record.read_bytes()
    other = planned(tmp_path, recipe("a.txt", **{part: {field: OTHER[part][field]}}))
    for action in (runs.check, runs.claim):
        with pytest.raises(ValueError, match=f"{part}.{field}: .* -> ") as caught:
            action(other, DESCRIPTION)
        assert "--output" in str(caught.value) and "\n" not in str(caught.value)
    assert planned(tmp_path).record.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "description", "named"),
    [
        ({"data": {"length": 16}}, DESCRIPTION, "data.length"),
        ({"data": {"documents": "pack"}}, DESCRIPTION, "data.documents"),
        ({"encodings": {"pope": {"name": "rope"}}}, DESCRIPTION, "encoding.name"),
        (
            {"encodings": {"pope": {"name": "pope", "options": {"base": 500.0}}}},
            DESCRIPTION,
            "encoding.options.base",
        ),
        ({}, DESCRIPTION | {"train_sha256": "c"}, "data.train_sha256"),
    ],
)
def test_so_is_one_of_other_data_or_another_encoding(
    changes: dict[str, Any], description: dict[str, Any], named: str, tmp_path: Path
) -> None:
    runs.claim(planned(tmp_path), DESCRIPTION)
    with pytest.raises(ValueError, match=named):
        runs.claim(planned(tmp_path, recipe("a.txt", **changes)), description)


def test_where_the_text_lies_and_what_is_evaluated_do_not_count(tmp_path: Path) -> None:
    marks = {
        runs.fingerprint(planned(tmp_path, made).config, DESCRIPTION)
        for made in (
            recipe("a.txt"),
            recipe("elsewhere/a.txt"),
            recipe("a.txt", evaluation={"lengths": [8]}),
        )
    }
    assert len(marks) == 1
    seeds = {runs.fingerprint(planned(tmp_path, seed=s).config, DESCRIPTION) for s in range(3)}
    assert len(seeds | marks) == 3


def test_settings_that_came_later_cost_no_results(tmp_path: Path) -> None:
    run = planned(tmp_path)
    runs.claim(run, DESCRIPTION)
    record = json.loads(run.record.read_text())
    del record["config"]["evaluation"]["tasks"]
    run.record.write_text(json.dumps(record))
    run.results.write_text("results")
    runs.claim(run, DESCRIPTION)
    assert run.evaluated
    record["config"]["evaluation"]["nothing_known"] = 1
    run.record.write_text(json.dumps(record))
    runs.claim(run, DESCRIPTION)
    assert not run.evaluated


def test_another_evaluation_keeps_the_weights_and_drops_the_results(tmp_path: Path) -> None:
    run = planned(tmp_path)
    runs.claim(run, DESCRIPTION)
    for file in (run.done, run.results, run.positions):
        storage.write_text(file, "{}")
    runs.claim(run, DESCRIPTION)
    assert run.evaluated
    other = planned(tmp_path, recipe("a.txt", evaluation={"tokens": 99}))
    runs.claim(other, DESCRIPTION)
    assert run.trained and not run.evaluated and not run.positions.exists()
    assert runs.load_run(run.folder).config == other.config


def test_a_run_made_from_another_counts_the_other_in(tmp_path: Path) -> None:
    made = recipe("a.txt", encodings={"yarn": {"name": "yarn"}, "rope": {"name": "rope"}})
    run, source = planned(tmp_path, made, "yarn"), planned(tmp_path, made, "rope")
    runs.claim(run, DESCRIPTION, source)
    assert runs.load_record(run)["source"] == "rope-seed0"
    with pytest.raises(ValueError, match="starting weights"):
        runs.claim(run, DESCRIPTION, planned(tmp_path, made, "rope", seed=1))


def test_a_folder_of_something_else_is_refused_and_debris_of_a_kill_is_not(tmp_path: Path) -> None:
    run = planned(tmp_path)
    run.folder.mkdir()
    (run.folder / ".run.json.partial").write_text("{")
    runs.claim(run, DESCRIPTION)
    other = planned(tmp_path, seed=1)
    other.folder.mkdir()
    (other.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="it was not written by whatwhere"):
        runs.claim(other, DESCRIPTION)
    assert (other.folder / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": 1}', "{"])
def test_a_spoilt_record_is_named(content: str, tmp_path: Path) -> None:
    run = planned(tmp_path)
    storage.write_text(run.record, content)
    with pytest.raises(ValueError, match=r"run\.json"):
        runs.load_run(run.folder)


def test_the_record_says_what_ran_where_and_since_when(tmp_path: Path) -> None:
    run = planned(tmp_path)
    runs.claim(run, DESCRIPTION)
    record = runs.load_record(run)
    assert record["data"] == DESCRIPTION
    assert record["versions"]["torch"] and record["device"]["type"] in ("cpu", "cuda")
    assert record["started"].endswith("+00:00")
    assert runs.RunConfig.model_validate(record["config"]) == run.config
    assert record["config"]["training"]["precision"] != "auto"


def test_the_commit_is_that_of_the_package_or_none() -> None:
    commit = environment.git_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40


def test_results_merge_in_the_order_given_and_keep_every_digit(tmp_path: Path) -> None:
    made = recipe("a.txt", encodings={"nope": {"name": "nope"}, "pope": {"name": "pope"}})
    value = 0.1 + 0.2
    all_runs = [
        planned(tmp_path, made, label, seed) for label in ("nope", "pope") for seed in (1, 0)
    ]
    for run in all_runs[:3]:
        rows = run.rows([("loss", 32, value), ("loss", 64, float("inf"))])
        storage.write_rows(run.results, rows, runs.COLUMNS)
    merged = runs.merge_results(tmp_path, all_runs)
    assert list(merged.columns) == ["encoding", "seed", "metric", "length", "value"]
    assert list(merged["encoding"]) == ["nope"] * 4 + ["pope"] * 2
    assert list(merged["seed"]) == [1, 1, 0, 0, 1, 1]
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == "encoding,seed,metric,length,value"
    assert float(lines[1].split(",")[4]) == value


# --- storage ------------------------------------------------------------------------------------


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.csv"
    storage.write_text(path, "old")
    for method in ("write_text", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, no_space)
            with pytest.raises(storage.DiskFullError, match="no space left") as caught:
                storage.write_text(path, "new")
        assert "\n" not in str(caught.value)
        assert [file.name for file in tmp_path.iterdir()] == ["results.csv"]
        assert path.read_text() == "old"


def test_a_real_full_device_is_recognised(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(storage.DiskFullError), storage.disk_errors(tmp_path), full.open("w") as f:
        f.write("x")
        f.flush()


def test_other_errors_keep_their_type(tmp_path: Path) -> None:
    for error in (RuntimeError("no"), OSError(errno.EIO, "no"), KeyError("no")):
        with pytest.raises(type(error)) as caught, storage.disk_errors(tmp_path):
            raise error
        assert type(caught.value) is type(error)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST])
def test_a_place_that_cannot_be_written_is_one_line(number: int, tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    with pytest.raises(storage.RunError) as caught, storage.disk_errors(tmp_path):
        raise OSError(number, "refused", path)
    assert str(caught.value) == f"cannot write {path}: refused"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.new_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("half")
        assert not (tmp_path / "model").exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with storage.new_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("whole")
    assert (tmp_path / "model" / "a").read_text() == "whole"


def test_one_process_at_a_time_and_a_dead_one_lets_go(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from whatwhere.lab import storage\n"
        "with storage.lock(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(storage.RunError, match="another process"), storage.lock(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()
    with storage.lock(tmp_path):
        pass


def test_a_log_cut_short_by_a_kill_is_read_up_to_there(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert storage.read_log(log) == []
    whole = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan")}]
    log.write_text("".join(json.dumps(row) + "\n" for row in whole) + '{"step": 3, "lo')
    assert [row["step"] for row in storage.read_log(log)] == [1, 2]


@pytest.mark.parametrize("label", ["../up", "a/b", ".hidden", "", "A", "a b", "a\\b", "x" * 65])
def test_labels_cannot_leave_the_folder(label: str) -> None:
    with pytest.raises(ValueError, match="encodings"):
        recipe("a.txt", encodings={label: EncodingChoice(name="pope")})
    with pytest.raises(ValueError, match="name"):
        recipe("a.txt", name=label)
