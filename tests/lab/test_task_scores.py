"""Scores of the harness's tasks as results of a comparison."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny import recipe, text

from whatwhere.lab.compare import Comparison
from whatwhere.lab.harness.paper import LONGBENCH, TASKS
from whatwhere.lab.recipes.schema import EvaluationSettings
from whatwhere.lab.task_scores import check_tasks, scores_of, task_data

pytest.importorskip("lm_eval")


def rows(*found: tuple[str, str, str, float]) -> pd.DataFrame:
    return pd.DataFrame(found, columns=["task", "group", "metric", "value"])


def test_rows_of_the_harness_become_scores() -> None:
    table = rows(
        ("piqa", "", "acc", 0.5),
        ("piqa", "", "acc_norm", 0.6),
        ("lambada_openai", "", "perplexity", 12.0),
        ("blimp_wh_island", "blimp", "acc", 0.7),
    )
    assert scores_of(table, 16384) == [("piqa_acc", 16384, 0.5), ("piqa_acc_norm", 16384, 0.6)]


def test_ruler_is_the_mean_over_its_tasks_at_each_length() -> None:
    # The harness's group aggregates 4,096 alone, whatever lengths were asked for.
    table = rows(
        ("ruler", "", "4096", 0.9),
        ("niah_single_1", "ruler", "4096", 0.4),
        ("ruler_vt", "ruler", "4096", 0.2),
        ("niah_single_1", "ruler", "8192", 0.1),
        ("ruler_vt", "ruler", "8192", 0.3),
    )
    assert scores_of(table, 8192) == [
        ("ruler_accuracy", 4096, pytest.approx(0.3)),
        ("ruler_accuracy", 8192, pytest.approx(0.2)),
    ]
    alone = rows(("niah_single_1", "", "8192", 0.1))
    assert scores_of(alone, 8192) == [("niah_single_1_accuracy", 8192, 0.1)]


def test_longbench_is_the_mean_over_the_english_tasks() -> None:
    assert len(LONGBENCH) == 14
    table = rows(*((task, "", "score", 0.1 * n) for n, task in enumerate(LONGBENCH)))
    assert scores_of(table, 16384)[-1] == ("longbench_score", 16384, pytest.approx(0.65))
    assert all(name != "longbench_score" for name, _, _ in scores_of(table[1:], 16384))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": ("piqa",), "task_lengths": (4096,)}, "only RULER makes its prompts"),
        ({"tasks": ("ruler",), "task_lengths": (512,)}, "RULER has 4096|needs wonderwords"),
    ],
)
def test_lengths_that_no_task_has_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_tasks(EvaluationSettings(**settings))


def test_the_mean_of_the_papers_six_tasks_needs_all_six() -> None:
    six = rows(*((task, "", metric, 0.1 * n) for n, (task, metric) in enumerate(TASKS.items())))
    found = scores_of(six, 128)
    assert found[-1] == ("zero_shot_accuracy", 128, pytest.approx(0.25))
    assert all(name != "zero_shot_accuracy" for name, _, _ in scores_of(six[1:], 128))


def test_what_is_missing_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WHATWHERE_DATA", raising=False)
    with pytest.raises(ValueError, match=r"evaluation\.task_data: .* is no folder"):
        check_tasks(EvaluationSettings(tasks=("piqa",), task_data=str(tmp_path / "no")))
    made = recipe(text(tmp_path), evaluation={"tasks": ["piqa"], "task_data": str(tmp_path)})
    with pytest.raises(ValueError, match=r"evaluation\.tasks: .* holds no piqa/valid.jsonl"):
        Comparison(made, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_folder_of_the_environment_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHATWHERE_DATA", str(tmp_path))
    assert task_data(EvaluationSettings()) == tmp_path
    assert task_data(EvaluationSettings(task_data="elsewhere")) == Path("elsewhere")


def test_a_table_of_positions_that_is_too_short_stops_nothing_else(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe(
        text(tmp_path),
        evaluation={
            "lengths": [],
            "tasks": ["piqa"],
            "task_data": str(data_dir),
            "task_limit": 1,
            "task_max_length": 512,
        },
        training={"steps": 1},
        encodings={"learned": {"name": "learned"}},
    )
    Comparison(made, tmp_path / "runs").run()
    assert "its table of positions ends at 32" in " ".join(capsys.readouterr().out.split())
    found = set(pd.read_csv(tmp_path / "runs" / "results.csv")["metric"])
    assert "validation_loss" in found and not any(name.startswith("piqa") for name in found)


@pytest.mark.slow
def test_a_comparison_is_scored_and_resumed(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "lengths": [],
        "tasks": ["piqa"],
        "task_data": str(data_dir),
        "task_limit": 2,
        "task_max_length": 512,
    }
    made = recipe(text(tmp_path), evaluation=settings, training={"steps": 2})
    out = tmp_path / "runs" / "tiny"
    Comparison(made, out).run()
    found = pd.read_csv(out / "results.csv").set_index("metric")["value"]
    assert found["piqa_acc"] in (0.0, 0.5, 1.0) and found["piqa_acc_norm"] in (0.0, 0.5, 1.0)
    assert "piqa acc" in (out / "report.html").read_text()
    done = sorted(out.glob("pope-seed0/harness/*/piqa/task.json"))
    assert len(done) == 1
    stamp = done[0].stat().st_mtime_ns
    (out / "pope-seed0" / "results.csv").unlink()
    Comparison(made, out).run()
    assert done[0].stat().st_mtime_ns == stamp
    # Other settings are measured in a place of their own.
    longer = recipe(text(tmp_path), evaluation=settings | {"task_limit": 1}, training={"steps": 2})
    Comparison(longer, out).run()
    assert len(list(out.glob("pope-seed0/harness/*/piqa/task.json"))) == 2
    # As the first of two processes does it: by a program of its own, with the same scores.
    monkeypatch.setattr("whatwhere.lab.task_scores.process_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    for folder in out.glob("pope-seed0/harness/*"):
        shutil.rmtree(folder)
    before = pd.read_csv(out / "results.csv").set_index("metric")["value"]
    (out / "pope-seed0" / "results.csv").unlink()
    Comparison(longer, out).run()
    after = pd.read_csv(out / "results.csv").set_index("metric")["value"]
    assert after["piqa_acc"] == before["piqa_acc"]
