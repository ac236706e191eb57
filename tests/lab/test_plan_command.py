"""`whatwhere plan` on the command line, and the page that it writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from whatwhere import cli
from whatwhere.lab import recipes
from whatwhere.lab.plan.grid import Grid
from whatwhere.lab.plan.vocabulary import TOKENIZERS


def run(*arguments: str) -> int:
    return cli.main(["plan", *arguments])


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "plan.json", tmp_path / "plan.md"
    options = ("--gpus", "8", "--memory", "80", "--training.batch-size", "16")
    chosen = ("--encodings", "rope", "pope-id", "--parallel", "fsdp")
    code = run(
        "text", "--preset", "paper", *options, *chosen,
        "--json", str(files[0]), "--output", str(files[1]),
    )  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out
    content = json.loads(files[0].read_text())
    assert [entry["label"] for entry in content["runs"]] == ["rope", "pope-id"]
    assert content["measured"] is False and content["vocab_size"] == 50257
    assert all(entry["fit"]["layout"]["parallel"] == "fsdp" for entry in content["runs"])
    fit = content["runs"][0]["fit"]
    assert fit["micro_batch"] * fit["accumulation"] * fit["gpus"] == 16
    assert sum(fit["bytes"].values()) == fit["total"] <= 80e9
    for line in content["assumptions"]:
        assert f"- {line}" in printed and f"- {line}" in files[1].read_text()
    assert any("MFU" in line for line in content["assumptions"])


FEW = ("text", "jsb", "pg19-124m", "rope-id-1b")


@pytest.fixture
def few_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few recipes of unlike kinds in the place of all."""
    monkeypatch.setattr(recipes, "RECIPES", {name: recipes.RECIPES[name] for name in FEW})


def test_all_recipes_in_one_table(tmp_path: Path) -> None:
    page = tmp_path / "all.md"
    assert run("all", "--preset", "paper", "--gpus", "8", "--output", str(page)) == 0
    with_paper = [name for name in recipes.names() if "paper" in recipes.presets(name)]
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(with_paper)
    assert "not known here" not in page.read_text()


@pytest.mark.usefixtures("few_recipes")
def test_all_recipes_as_numbers(tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    assert run("all", "--json", str(file), "--device", "a100-40gb") == 0
    assert len(json.loads(file.read_text())["recipes"]) == len(FEW)


@pytest.mark.usefixtures("few_recipes")
def test_a_recipe_of_unknown_vocabulary_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(TOKENIZERS, "gpt2")
    page = tmp_path / "all.md"
    assert run("all", "--preset", "paper", "--output", str(page)) == 0
    assert "| text | the vocabulary of tokenizer 'gpt2' is not known here" in page.read_text()


def test_the_page_shows_measured_rows_alone() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "plan.md").read_text(encoding="utf-8")
    table = page.split("<!-- measured: benchmarks/plan.py -->")[1].split("<!-- end -->")[0]
    shown = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    with (root / "benchmarks" / "results" / "plan.csv").open(encoding="utf-8") as file:
        known = [row[: len(shown[0])] for row in csv.reader(file)]
    assert shown[0] == known[0] and len(shown) > 2
    assert all(row in known for row in shown[2:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("text", "--gpus", "0"), "gpus=0"),
        (("text", "--memory", "-1"), "memory=-1.0"),
        (("text", "--mfu", "2"), "mfu=2.0"),
        (("text", "--allowance", "90"), "less than the memory"),
        (("text", "--floor", "-1"), "floor=-1.0"),
        (("text", "--device", "cpu"), "has no memory of its own"),
        (("text", "--device", "cpu", "--memory", "8"), "has no flops of its own"),
        (("text", "--vocab-size", "0"), "vocab_size=0"),
        (("text", "--data.tokenizer", "some/name"), "--vocab-size"),
        (("text", "--encodings", "rop"), "did you mean 'rope'"),
        (("text", "--gpus", "8", "--training.context-parallel", "3"), "does not divide gpus=8"),
        (("text", "--model.num-attention-heads", "3"), "num_attention_heads=3"),
        (("text", "--model.attention-backend", "fast"), "attention_backend"),
        (("all", "--preset", "none"), "no recipe has a preset"),
        (("all", "--training.steps", "3"), "options of one recipe"),
        (("nothing",), "unknown recipe"),
        ((), "name a recipe"),
    ],
)
def test_impossible_input_is_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--output", str(tmp_path / "plan.md")) if arguments else ()
    assert run(*arguments, *out) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_table_too_wide_stands_upright() -> None:
    grid = Grid("wide", ("encoding", "a long head", "another"), (("rope", "1", "2"),))
    assert [str(column.header) for column in grid.rich(80).columns] == list(grid.columns)
    upright = grid.rich(20)
    assert [str(column.header) for column in upright.columns] == ["encoding", "rope"]
    assert [list(column.cells) for column in upright.columns] == [
        ["a long head", "another"],
        ["1", "2"],
    ]
