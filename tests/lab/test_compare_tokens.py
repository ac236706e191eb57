"""Comparisons on prepared data: from a raw file to results, with nothing done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny import recipe

from whatwhere.lab.compare import Comparison, evaluate_again
from whatwhere.lab.data import TextTask, make_task
from whatwhere.lab.extrapolate import extrapolate, find_subject
from whatwhere.lab.reading import reading_of
from whatwhere.lab.recipes import Recipe
from whatwhere.lab.recipes.schema import EvaluationSettings


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WHATWHERE_DATA", raising=False)


def chorales(path: Path, **changes: Any) -> Recipe:
    data = {"task": "tokens", "dataset": "jsb", "paths": [str(path)], "length": 64}
    made = recipe("unused", evaluation={"lengths": [], "examples": 24}, **changes)
    return Recipe.model_validate(made.model_dump() | {"data": data})


def text_folder(place: Path, words: str) -> Path:
    place.mkdir()
    for number in range(8):
        (place / f"{number}.txt").write_text(f"{words} {number} " * 400)
    return place


def test_chorales_from_the_raw_file_to_the_report(tmp_path: Path, data_dir: Path) -> None:
    made = chorales(
        data_dir / "jsb" / "jsb-chorales-16th.json",
        training={"steps": 24, "batch_size": 8, "log_every": 1},
        encodings={"rope": {"name": "rope"}, "pope": {"name": "pope"}},
    )
    out = tmp_path / "runs"
    Comparison(made, out).run()
    found = pd.read_csv(out / "results.csv")
    assert {"validation_loss", "test_loss", "perplexity"} <= set(found["metric"])
    for label in ("rope", "pope"):
        log = [json.loads(row) for row in (out / f"{label}-seed0" / "log.jsonl").open()]
        losses = [row["loss"] for row in log]
        assert sum(losses[-6:]) / 6 < sum(losses[:6]) / 6 - 0.3
        data = json.loads((out / f"{label}-seed0" / "run.json").read_text())["data"]
        assert any("sha256" in key for key in data)
    before = (out / "results.csv").read_bytes()
    evaluate_again(out / "pope-seed0")
    assert (out / "results.csv").read_bytes() == before


def test_losses_at_lengths_are_measured_on_another_text(tmp_path: Path) -> None:
    own = text_folder(tmp_path / "own", "what is here")
    other = text_folder(tmp_path / "other", "where it stands")
    data = {"task": "tokens", "dataset": "text", "paths": [str(own)], "length": 32}
    evaluation = {"lengths": [32, 128], "tokens": 512, "examples": 8, "paths": [str(other)]}
    made = recipe("unused", training={"steps": 4})
    made = Recipe.model_validate(made.model_dump() | {"data": data, "evaluation": evaluation})
    out = tmp_path / "runs"
    Comparison(made, out).run()
    found = pd.read_csv(out / "results.csv")
    losses = found[found["metric"] == "loss"].set_index("length")["value"]
    assert list(losses.index) == [32, 128]
    described = json.loads((out / "pope-seed0" / "reading.json").read_text())
    assert described["source"] == str(other) and described["tokenizer"] == "bytes"
    subject = find_subject(out / "pope-seed0")
    measured = extrapolate(subject, [str(other)], [32, 128], 512)
    assert [one.loss for one in measured] == pytest.approx(losses.tolist(), abs=1e-6)
    assert extrapolate(subject, [], [64])[0].length == 64  # its own validation text


def test_another_text_by_the_name_of_its_set(tmp_path: Path) -> None:
    own = text_folder(tmp_path / "own", "what is here")
    other = text_folder(tmp_path / "other", "where it stands")
    task = make_task(recipe(str(own)).data)
    assert isinstance(task, TextTask)
    settings = EvaluationSettings(dataset="text", paths=(str(other),), lengths=(32,))
    reading = reading_of(settings, task)
    assert reading is not None
    assert "where" in bytes(reading.windows(64, 1)[0].tolist()).decode()
    assert reading.describe()["split"] == "validation"


def test_a_vocabulary_that_is_not_the_tasks_is_refused(tmp_path: Path, data_dir: Path) -> None:
    task = make_task(recipe(str(text_folder(tmp_path / "own", "words"))).data)
    chorale = str(data_dir / "jsb" / "jsb-chorales-16th.json")
    settings = EvaluationSettings(dataset="jsb", paths=(chorale,), lengths=(32,))
    with pytest.raises(ValueError, match=r"evaluation\.dataset: jsb .*90, the task one of 256"):
        reading_of(settings, task)
