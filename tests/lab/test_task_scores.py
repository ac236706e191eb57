"""Scores of the harness's tasks as results of a comparison."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from tiny import recipe, text

from whatwhere.lab.compare import Comparison
from whatwhere.lab.harness.paper import TASKS
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
        ("ruler", "", "4096", 0.4),
        ("ruler", "", "8192", 0.2),
        ("longbench", "", "score", 0.1),
    )
    assert scores_of(table, 16384) == [
        ("piqa_acc", 16384, 0.5),
        ("piqa_acc_norm", 16384, 0.6),
        ("ruler_accuracy", 4096, 0.4),
        ("ruler_accuracy", 8192, 0.2),
        ("longbench_score", 16384, 0.1),
    ]


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


@pytest.mark.slow
def test_a_comparison_is_scored_and_resumed(tmp_path: Path, data_dir: Path) -> None:
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
