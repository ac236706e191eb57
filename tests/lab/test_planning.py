"""Recipes whose models another recipe trains, and encodings fine-tuned from others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny import recipe, text

from whatwhere.lab import planning, runs
from whatwhere.lab.compare import Comparison, choose, evaluate_again
from whatwhere.lab.extrapolate import find_subject
from whatwhere.lab.recipes import Recipe


def reader(path: str, **changes: Any) -> Recipe:
    """A recipe that fine-tunes and reads what the recipe `trainer` trains."""
    content: dict[str, Any] = {
        "encodings": {
            "rope": {"name": "rope"},
            "pope": {"name": "pope"},
            "yarn": {"name": "yarn"},
            "pope-ft": {"name": "pope", "finetune_from": "pope"},
        },
        "evaluation": {
            "examples": None,
            "yarn": "finetune",
            "finetune": {"steps": 3, "warmup_steps": 1, "batch_size": 2, "factor": 2},
        },
    }
    made = recipe(path, **{**content, **changes})
    return made.model_copy(update={"name": "reader", "trained_by": "trainer"})


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in (".safetensors", ".csv", ".json", ".jsonl")
    }


def test_models_are_trained_once_and_evaluated_elsewhere(tmp_path: Path) -> None:
    made, out = reader(text(tmp_path)), tmp_path / "runs" / "reader"
    Comparison(made, out).run()
    trainer = tmp_path / "runs" / "trainer"
    assert {path.name for path in trainer.glob("*-seed0")} == {"rope-seed0", "pope-seed0"}
    assert {path.name for path in out.glob("*-seed0")} == {
        *("rope-seed0", "pope-seed0", "yarn-seed0", "pope-ft-seed0"),
    }
    borrowed = [name for name in ("rope", "pope") if (out / f"{name}-seed0" / "model").exists()]
    assert not borrowed and (out / "pope-ft-seed0" / "model").exists()
    found = pd.read_csv(out / "results.csv")
    assert set(found["encoding"]) == {"rope", "pope", "yarn", "pope-ft"}
    # What is only read has the very losses of the model that was trained.
    other = pd.read_csv(trainer / "results.csv")
    for label in ("rope", "pope"):
        here, there = (
            table[(table["encoding"] == label) & (table["metric"] == "validation_loss")]["value"]
            for table in (found, other)
        )
        assert here.tolist() == there.tolist()
    tuned = json.loads((out / "pope-ft-seed0" / "run.json").read_text())
    assert tuned["how"] == "finetune" and tuned["source_comparison"] == "trainer"
    assert tuned["config"]["data"]["length"] == 64 and tuned["config"]["training"]["steps"] == 3
    assert "factor" not in tuned["config"]["encoding"]["options"]
    yarn = json.loads((out / "yarn-seed0" / "run.json").read_text())
    assert yarn["config"]["encoding"]["options"]["factor"] == 2.0

    before = files(tmp_path / "runs")
    Comparison(made, out).run()
    assert files(tmp_path / "runs") == before
    # Measured again one by one, from what run.json says of their sources.
    for name in ("rope-seed0", "pope-ft-seed0"):
        evaluate_again(out / name)
    assert files(tmp_path / "runs") == before


def test_a_trainers_folder_of_another_config_is_refused_before_anything(tmp_path: Path) -> None:
    path, out = text(tmp_path), tmp_path / "runs" / "reader"
    Comparison(reader(path), out).run()
    before = files(tmp_path / "runs")
    changed = reader(path, training={"learning_rate": 0.02})
    with pytest.raises(ValueError, match=r"trainer .*training\.learning_rate"):
        Comparison(changed, out)
    assert files(tmp_path / "runs") == before


def test_choosing_a_fine_tuned_encoding_brings_its_source(tmp_path: Path) -> None:
    chosen = planning.choose(reader("a.txt"), ["pope-ft"])
    assert list(chosen.encodings) == ["pope", "pope-ft"]
    planned = planning.plan_all(chosen, chosen, tmp_path / "reader")
    assert [(one.run.folder.name, one.how) for one in planned] == [
        ("pope-seed0", "borrow"),
        ("pope-ft-seed0", "finetune"),
    ]
    assert planned[1].source == runs.plan(chosen, "pope", 0, tmp_path / "trainer")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nothere", "'x': finetune_from='nothere' is none of"),
        ("x", "'x': finetune_from='x' is not trained from the start"),
        ("yarn", "'x': finetune_from='yarn' is not trained from the start"),
        ("tuned", "'x': finetune_from='tuned' is not trained from the start"),
    ],
)
def test_a_source_must_be_trained_from_the_start(source: str, said: str) -> None:
    encodings = {
        "pope": {"name": "pope"},
        "yarn": {"name": "yarn"},
        "tuned": {"name": "pope", "finetune_from": "pope"},
        "x": {"name": "pope", "finetune_from": source},
    }
    with pytest.raises(ValueError, match=said):
        recipe("a.txt", encodings=encodings)


def test_the_folder_of_the_trainer_is_not_that_of_the_reader(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose another name"):
        Comparison(reader(text(tmp_path)), tmp_path / "trainer")
    assert not (tmp_path / "trainer").exists()


def test_folders_are_found_from_within_and_borrowed_weights_from_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = text(tmp_path), tmp_path / "runs" / "reader"
    out.mkdir(parents=True)
    monkeypatch.chdir(out)
    Comparison(choose(reader(path), ["pope"]), Path()).run()
    assert (tmp_path / "runs" / "trainer" / "pope-seed0" / "done.json").exists()
    assert not (out / "trainer").exists()
    subject = find_subject(out / "pope-seed0")
    assert subject.model.resolve() == tmp_path / "runs" / "trainer" / "pope-seed0" / "model"


def test_another_text_is_measured_again(tmp_path: Path) -> None:
    path, out = text(tmp_path), tmp_path / "runs"
    other = tmp_path / "other.txt"
    other.write_text("what is where " * 200)
    made = recipe(path, evaluation={"paths": [str(other)]}, training={"steps": 2})
    Comparison(made, out).run()
    first = pd.read_csv(out / "results.csv")
    other.write_text("nothing of that kind " * 200)
    Comparison(made, out).run()
    second = pd.read_csv(out / "results.csv")
    for table in (first, second):
        assert len(table[table["metric"] == "loss"]) == 2
    assert not first.equals(second)
    stamp = (out / "pope-seed0" / "results.csv").stat().st_mtime_ns
    Comparison(made, out).run()
    assert (out / "pope-seed0" / "results.csv").stat().st_mtime_ns == stamp


def test_a_record_cannot_lead_out_of_its_folders(tmp_path: Path) -> None:
    for record in (
        {"source": "../../etc", "source_comparison": None},
        {"source": "rope-seed0", "source_comparison": ".."},
    ):
        with pytest.raises(ValueError, match="is no name of a folder"):
            runs.source_folder(tmp_path, record)


def test_qk_norm_of_an_encoding_overrides_the_models(tmp_path: Path) -> None:
    made = recipe(
        "a.txt",
        encodings={
            "plain": {"name": "pope"},
            "normed": {"name": "pope", "qk_norm": True},
        },
    )
    configs = [runs.plan(made, label, 0, tmp_path).config for label in made.encodings]
    assert [config.model.qk_norm for config in configs] == [False, True]
    assert runs.fingerprint(configs[0], {}) != runs.fingerprint(configs[1], {})


def test_ours_are_trained_only_where_they_are_named() -> None:
    made = recipe("a.txt", ours={"new": {"name": "pope-id"}, "other": {"name": "nope"}})
    assert list(planning.choose(made, []).encodings) == ["pope"]
    assert list(planning.choose(made, ["new", "pope"]).encodings) == ["new", "pope"]
    assert list(planning.choose(made, ["ours"]).encodings) == ["new", "other"]
