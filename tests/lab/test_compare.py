from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import indirect, recipe, text

import whatwhere as ww
from whatwhere.lab import compare, runs, storage
from whatwhere.lab.compare import Comparison, choose, evaluate_again
from whatwhere.lab.data import TextTask, make_task
from whatwhere.lab.evaluate import length_loss, load_model
from whatwhere.lab.recipes import Recipe, from_yaml, get
from whatwhere.lab.train import Interrupted


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have tests of their own, and take a second each."""

    def build_report(folder: Path) -> Path:
        storage.write_text(folder / "report.html", "")
        return folder / "report.html"

    monkeypatch.setattr("whatwhere.lab.report.page.build_report", build_report)


def several(path: str, *labels: str, **changes: Any) -> Recipe:
    return choose(recipe(path, **changes), labels)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """When each file of the runs was written, and how long it is."""
    files = (path for path in folder.glob("*-seed*/**/*") if path.is_file())
    return {str(f): (f.stat().st_mtime_ns, f.stat().st_size) for f in files}


def table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results.csv")


def value(folder: Path, label: str, metric: str, length: int, seed: int = 0) -> float:
    rows = table(folder).query(
        "encoding == @label and metric == @metric and length == @length and seed == @seed"
    )
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_a_comparison_gives_tidy_rows_for_every_encoding_seed_and_length(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = several(text(tmp_path), "rope", "pope").model_copy(update={"seeds": (0, 1)})
    report = Comparison(made, out).run()
    assert report == out / "report.html" and report.exists()
    found = table(out)
    assert list(found.columns) == ["encoding", "seed", "metric", "length", "value"]
    losses = found[found["metric"] == "loss"]
    assert sorted(zip(losses["encoding"], losses["seed"], losses["length"], strict=True)) == [
        (label, seed, length)
        for label in ("pope", "rope")
        for seed in (0, 1)
        for length in (32, 64)
    ]
    assert (losses["value"] > 0).all()
    for metric in ("validation_loss", "grad_norm_max", "loss_spikes", "train_seconds"):
        assert len(found[found["metric"] == metric]) == 4, metric
    assert not found.duplicated(["encoding", "seed", "metric", "length"]).any()
    assert from_yaml(out / "settings.yaml") == made
    own = pd.read_csv(out / "pope-seed1" / "results.csv")
    merged = found[(found["encoding"] == "pope") & (found["seed"] == 1)].reset_index(drop=True)
    pd.testing.assert_frame_equal(own, merged)
    positions = pd.read_csv(out / "pope-seed1" / "loss_by_position.csv")
    assert positions["loss"].mean() == pytest.approx(value(out, "pope", "loss", 64, seed=1))


def test_costs_are_those_of_the_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Comparison(several(text(tmp_path), "pope"), out).run()
    model = load_model(out / "pope-seed0" / "model")
    assert value(out, "pope", "parameters", 32) == sum(p.numel() for p in model.parameters())
    encoding = next(m for m in model.modules() if isinstance(m, ww.Encoding))
    for length in (32, 64):
        assert value(out, "pope", "table_bytes", length) == ww.table_bytes(encoding, length)


def test_what_is_done_is_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = text(tmp_path), tmp_path / "out"
    Comparison(several(path, "rope", "yarn", "pope"), out).run()
    before, results = state(out), (out / "results.csv").read_bytes()
    Comparison(several(path, "rope", "yarn", "pope"), out).run()
    assert state(out) == before
    assert (out / "results.csv").read_bytes() == results
    assert capsys.readouterr().out.count("done before") == 3


def test_later_commands_add_encodings_and_seeds(tmp_path: Path) -> None:
    path, out = text(tmp_path), tmp_path / "out"
    Comparison(several(path, "rope"), out).run()
    before = state(out)
    more = several(path, "nope").model_copy(update={"seeds": (1,)})
    Comparison(more, out).run()
    assert state(out).items() >= before.items()
    assert set(zip(table(out)["encoding"], table(out)["seed"], strict=True)) == {
        ("rope", 0),
        ("nope", 1),
    }
    settings = from_yaml(out / "settings.yaml")
    assert list(settings.encodings) == ["rope", "nope"] and settings.seeds == (0, 1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training": {"steps": 7}}, "training.steps: 12 -> 7"),
        ({"model": {"qk_norm": True}}, "model.qk_norm: False -> True"),
        ({"data": {"length": 16}}, "data.length: 32 -> 16"),
        (
            {"encodings": {"pope": {"name": "pope", "options": {"delta": "uniform"}}}},
            "encodings.pope.options.delta",
        ),
    ],
)
def test_a_changed_config_is_refused_before_anything_is_written(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    path, out = text(tmp_path), tmp_path / "out"
    Comparison(recipe(path), out).run()
    before, settings = state(out), (out / "settings.yaml").read_bytes()
    with pytest.raises(ValueError, match="another config") as caught:
        Comparison(recipe(path, **changes), out)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert state(out) == before and (out / "settings.yaml").read_bytes() == settings


def test_so_is_another_text_even_for_another_encoding(tmp_path: Path) -> None:
    path, out = text(tmp_path), tmp_path / "out"
    Comparison(several(path, "rope"), out).run()
    with (tmp_path / "text" / "one.txt").open("a") as file:
        file.write(" more")
    with pytest.raises(ValueError, match=r"rope-seed0 was written by another config.*sha256"):
        Comparison(several(path, "nope"), out)
    assert not (out / "nope-seed0").exists()


def test_the_same_text_in_another_place_is_the_same(tmp_path: Path) -> None:
    path, out = text(tmp_path), tmp_path / "out"
    Comparison(recipe(path), out).run()
    before = state(out)
    moved = (tmp_path / "text").rename(tmp_path / "moved")
    Comparison(recipe(str(moved)), out).run()
    assert state(out) == before


def test_another_evaluation_measures_all_runs_again_and_trains_none(tmp_path: Path) -> None:
    path, out = text(tmp_path), tmp_path / "out"
    Comparison(several(path, "rope", "pope"), out).run()
    weights = {p: p.stat().st_mtime_ns for p in out.glob("*/model/*")}
    old = value(out, "rope", "loss", 32)
    Comparison(several(path, "pope", evaluation={"lengths": [32, 96]}), out).run()
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/model/*")} == weights
    lengths = table(out).query("metric == 'loss'").groupby("encoding")["length"].apply(list)
    assert lengths["rope"] == lengths["pope"] == [32, 96]
    assert value(out, "rope", "loss", 32) == old


def test_yarn_is_the_rope_run_with_the_factor_of_each_length(tmp_path: Path) -> None:
    path, out = text(tmp_path), tmp_path / "out"
    made = several(path, "yarn", "rope", evaluation={"lengths": [16, 32, 64, 96]})
    Comparison(made, out).run()
    assert not (out / "yarn-seed0" / "model").exists()
    assert runs.load_record(out / "yarn-seed0")["source"] == "rope-seed0"
    model = load_model(out / "rope-seed0" / "model").eval()
    task = make_task(made.data)
    assert isinstance(task, TextTask)
    for length in (16, 32, 64, 96):
        model.set_position_encoding("yarn", factor=max(1.0, length / 32))
        expected = length_loss(model, task.windows(length, 512 // length)).loss
        assert value(out, "yarn", "loss", length) == pytest.approx(expected, rel=1e-6)
    for length in (16, 32):  # within the training length YaRN is RoPE
        assert value(out, "yarn", "loss", length) == value(out, "rope", "loss", length)
    assert value(out, "yarn", "loss", 96) != value(out, "rope", "loss", 96)
    assert list(table(out)["encoding"].unique()) == ["yarn", "rope"]


def test_yarn_alone_trains_the_rope_run_it_needs(tmp_path: Path) -> None:
    path, out = text(tmp_path), tmp_path / "out"
    Comparison(several(path, "yarn"), out).run()
    assert (out / "rope-seed0" / "model").exists()
    assert set(table(out)["encoding"]) == {"rope", "yarn"}


def test_yarn_is_made_from_the_rope_run_of_its_own_options(tmp_path: Path) -> None:
    path, out = text(tmp_path), tmp_path / "out"
    encodings = {
        "yarn": {"name": "yarn", "options": {"base": 500.0, "beta_fast": 16.0}},
        "rope": {"name": "rope"},
        "rope-500": {"name": "rope", "options": {"base": 500.0}},
    }
    Comparison(recipe(path, encodings=encodings), out).run()
    assert runs.load_record(out / "yarn-seed0")["source"] == "rope-500-seed0"
    assert value(out, "yarn", "loss", 32) == value(out, "rope-500", "loss", 32)
    del encodings["rope-500"]
    with pytest.raises(ValueError, match=r"'yarn' is made from a rope run with options.*500"):
        Comparison(recipe(path, encodings=encodings), tmp_path / "other")


def test_yarn_can_be_fine_tuned_as_the_paper_does(tmp_path: Path) -> None:
    path, out = text(tmp_path), tmp_path / "out"
    finetune = {
        "factor": 2,
        "steps": 4,
        "warmup_steps": 2,
        "learning_rate": 1e-3,
        "batch_size": 2,
    }
    made = several(path, "rope", "yarn", evaluation={"yarn": "finetune", "finetune": finetune})
    Comparison(made, out).run()
    config = runs.load_run(out / "yarn-seed0").config
    assert (config.data.length, config.training.steps, config.training.batch_size) == (64, 4, 2)
    rates = {row["lr"] for row in storage.read_log(out / "yarn-seed0" / "log.jsonl")}
    assert rates == {1e-3}
    tuned, before = (load_model(out / f"{n}-seed0" / "model") for n in ("yarn", "rope"))
    assert tuned.config.position_encoding == "yarn"
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(tuned.parameters(), before.parameters(), strict=True)
    ]
    assert 0 < max(moved) <= 4 * 1e-3 * 1.2  # Adam moves a weight by about the rate a step
    task = make_task(made.data)
    assert isinstance(task, TextTask)
    for length in (32, 64):
        expected = length_loss(tuned.eval(), task.windows(length, 512 // length)).loss
        assert value(out, "yarn", "loss", length) == pytest.approx(expected, rel=1e-6)
    assert value(out, "yarn", "grad_norm_max", 32) > 0
    evaluate_again(out / "yarn-seed0")
    assert value(out, "yarn", "loss", 64) == pytest.approx(expected, rel=1e-6)


def test_lengths_beyond_a_learned_table_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    Comparison(several(text(tmp_path), "learned", "rope"), out).run()
    lengths = table(out).query("metric == 'loss'").groupby("encoding")["length"].apply(list)
    assert lengths["learned"] == [32] and lengths["rope"] == [32, 64]
    assert "learned-seed0  no loss at 64: its table of positions ends at 32" in (
        capsys.readouterr().out
    )


def test_indirect_indexing_gives_accuracy_on_the_test_split(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = indirect()
    Comparison(made, out).run()
    length = make_task(made.data).length
    assert 0 <= value(out, "pope", "accuracy", length) <= 1
    assert 0 <= value(out, "pope", "validation_accuracy", length) <= 1
    assert value(out, "pope", "test_loss", length) > 0
    assert not (out / "pope-seed0" / "loss_by_position.csv").exists()
    assert compare.summary(table(out), "nats").title == "accuracy"


def test_the_printed_table_tells_a_loss_that_is_not_finite_from_none() -> None:
    rows = [
        ("rope", 0, "loss", 32, math.nan),
        ("rope", 1, "loss", 32, 2.0),
        ("rope", 0, "loss", 64, 1.5),
        ("learned", 0, "loss", 32, 3.0),
    ]
    results = pd.DataFrame(rows, columns=runs.COLUMNS)
    shown = compare.summary(results, "nats per byte")
    assert shown.title == "loss, nats per byte"
    assert [list(column.cells) for column in shown.columns] == [
        ["rope", "learned"],
        ["nan", "3.0000"],
        ["1.5000", ""],
    ]
    whole = pd.DataFrame([("rope", 0, "validation_loss", 32, 2.5)], columns=runs.COLUMNS)
    shown = compare.summary(whole, "nats per byte")
    assert shown.title == "validation loss, nats per byte"
    assert list(shown.columns[1].cells) == ["2.5000"]


def test_an_interrupted_comparison_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "out"
    made = several(path, "rope", "pope", model={"dropout": 0.2})
    Comparison(made, whole).run()
    real = TextTask.train_batch
    calls = 0

    def interrupted(self: TextTask, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == made.training.steps + 4:  # in the fourth step of the second run
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TextTask, "train_batch", interrupted)
        with pytest.raises(Interrupted, match="pope-seed0 at step 4 of 12"):
            Comparison(made, out).run()
    assert set(table(out)["encoding"]) == {"rope"}  # what was done is there already
    Comparison(made, out).run()
    columns = ["encoding", "seed", "metric", "length", "value"]
    for folder in (whole, out):
        assert len(table(folder)[columns].query("metric == 'loss'")) == 4
    timeless = [table(f).query("metric != 'train_seconds'").reset_index() for f in (whole, out)]
    pd.testing.assert_frame_equal(*timeless, check_exact=True)


def test_a_run_is_measured_again_into_both_tables(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Comparison(several(text(tmp_path), "rope", "yarn", "pope"), out).run()
    before = table(out)
    for label in ("rope", "yarn"):
        (out / f"{label}-seed0" / "results.csv").unlink()
        evaluate_again(out / f"{label}-seed0")
    after = table(out)
    keys = ["encoding", "seed", "metric", "length"]
    pd.testing.assert_frame_equal(
        before.sort_values(keys, ignore_index=True), after.sort_values(keys, ignore_index=True)
    )
    with pytest.raises(ValueError, match="no run folder"):
        evaluate_again(out)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["rop"], "unknown 'rop'.*did you mean 'rope'.*alibi"),
        (["rope", "rope"], "'rope' comes twice"),
    ],
)
def test_encodings_are_chosen_by_label_or_name(labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(get("text"), labels)
    chosen = choose(get("indirect-indexing", "paper"), ["alibi-half", "pope-id", "pope"])
    assert list(chosen.encodings) == ["alibi-half", "pope-id", "pope"]
    assert chosen.encodings["pope"].options == {"delta": "uniform"}
    assert chosen.encodings["pope-id"].options == {}
    assert choose(get("text"), []) == get("text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"head_dim": 3}, "encodings": {"rope": {"name": "rope"}}},
            "'rope': .*head_dim=3",
        ),
        ({"encodings": {"x": {"name": "pop"}}}, "'x': .*unknown encoding 'pop'.*'pope'"),
        (
            {"encodings": {"x": {"name": "pope", "options": {"bass": 1}}}},
            "'x': unknown option 'bass'.*base",
        ),
        (
            {"encodings": {"x": {"name": "rope", "options": {"fraction": 0.01}}}},
            "'x': .*fraction",
        ),
        ({"encodings": {"x": {"name": "rope-id"}}}, "'x': train_length=32"),
        ({"encodings": {"yarn": {"name": "yarn", "options": {"factor": 2}}}}, "'yarn': .*factor"),
        ({"model": {"hidden_size": 15}}, "hidden_size=15"),
        ({"model": {"num_key_value_heads": 3}}, "num_key_value_heads"),
        ({"model": {"attention_backend": "magic"}}, "model.attention_backend: .*'magic'.*sdpa"),
        ({"evaluation": {"lengths": [10**6]}}, "evaluation.lengths: .*1000000"),
        ({"data": {"length": 10**6}}, "length=1000000"),
        ({"data": {"paths": ["nowhere"]}}, "nowhere"),
        (
            {"encodings": {"x": {"name": "pope", "options": {"fraction": "half"}}}},
            "'x': .*'half'",
        ),
    ],
)
def test_what_is_impossible_is_said_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = text(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        Comparison(recipe(path, **changes), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    comparison = Comparison(recipe(text(tmp_path)), tmp_path / "out")
    with (
        storage.lock(tmp_path / "out"),
        pytest.raises(storage.RunError, match="another process"),
    ):
        comparison.run()


def test_seeds_give_other_weights_and_repeat(tmp_path: Path) -> None:
    path = text(tmp_path)
    found = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        made = recipe(path).model_copy(update={"seeds": (seed,)})
        Comparison(made, tmp_path / folder).run()
        model = load_model(tmp_path / folder / f"pope-seed{seed}" / "model")
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
