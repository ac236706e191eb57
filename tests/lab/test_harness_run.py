from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_cases import bytes_model, folder_unchanged, linked, llama, no_network
from transformers import AutoTokenizer, LlamaForCausalLM

from whatwhere.cli import main
from whatwhere.lab.harness import table
from whatwhere.lab.harness.paper import TASKS

pytest.importorskip("lm_eval", reason="needs the extra eval")

SIX = "lambada_openai,blimp,cbt,hellaswag,piqa,arc_easy"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("llama") / "tiny")


def rows(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """harness.csv by task and metric."""
    with (folder / "harness.csv").open(newline="", encoding="utf-8") as file:
        return {(row["task"], row["metric"]): row for row in csv.DictReader(file)}


def evaluate(model: Path, tasks: str, data: Path | None, output: Path, *more: str) -> int:
    given = ["evaluate", str(model), "--tasks", tasks, "--output", str(output), *more]
    given += ["--data", str(data)] if data else []
    return main([*given, "--bootstrap", "0", "--device", "cpu"])


def log_likelihood(model: Any, context: list[int], rest: list[int]) -> tuple[float, bool]:
    """Of `rest` after `context`, and whether it is what greedy decoding gives."""
    with torch.inference_mode():
        logits = model(torch.tensor([context + rest])).logits[0].double()
    told = logits[len(context) - 1 : -1].log_softmax(-1)
    target = torch.tensor(rest)
    return told[range(len(rest)), target].sum().item(), bool((told.argmax(-1) == target).all())


def test_numbers_equal_those_of_plain_torch(model: Path, data_dir: Path, tmp_path: Path) -> None:
    """Log-likelihoods written here give the harness's LAMBADA perplexity and BLiMP accuracy."""
    count = 40
    out = tmp_path / "out"
    tasks = "lambada_openai,blimp_wh_island"
    assert evaluate(model, tasks, data_dir, out, "--limit", str(count), "--batch-size", "7") == 0
    found = rows(out)
    net, tokens = (
        LlamaForCausalLM.from_pretrained(model).eval(),
        AutoTokenizer.from_pretrained(model),
    )
    losses, right = [], []
    lines = (data_dir / "lambada" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:count]:
        text = json.loads(line)["text"]
        whole, context = (tokens(t).input_ids for t in (text, text.rpartition(" ")[0]))
        value, greedy = log_likelihood(net, context, whole[len(context) :])
        losses.append(value)
        right.append(greedy)
    told = float(found["lambada_openai", "perplexity"]["value"])
    assert told == pytest.approx(math.exp(-sum(losses) / count), rel=1e-4)
    assert float(found["lambada_openai", "acc"]["value"]) == sum(right) / count
    wins = []
    lines = (data_dir / "blimp" / "wh_island.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:count]:
        pair = [json.loads(line)[f"sentence_{kind}"] for kind in ("good", "bad")]
        # The harness puts the task's delimiter, a space, before each sentence.
        start = [tokens.eos_token_id]
        good, bad = (log_likelihood(net, start, tokens(f" {s}").input_ids)[0] for s in pair)
        wins.append(good > bad)
    assert 0 < sum(wins) < count  # a model that always, or never, is right could hide a mistake
    assert float(found["blimp_wh_island", "acc"]["value"]) == sum(wins) / count


@pytest.mark.slow
def test_all_six_tasks_offline(
    model: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = linked(tmp_path / "data", data_dir), tmp_path / "out"
    assert evaluate(model, SIX, data, out, "--limit", "2", "--batch-size", "8") == 0
    found = rows(out)
    paradigms = [float(r["value"]) for r in found.values() if r["group"] == "blimp"]
    assert len(paradigms) == 67
    assert float(found["blimp", "acc"]["value"]) == pytest.approx(sum(paradigms) / 67)
    halves = [float(found[f"cbt_{part}", "acc"]["value"]) for part in ("ne", "cn")]
    assert float(found["cbt", "acc"]["value"]) == pytest.approx(sum(halves) / 2)
    printed = " ".join(capsys.readouterr().out.split())
    mean = sum(100 * float(found[task, metric]["value"]) for task, metric in TASKS.items()) / 6
    assert f"mean of six │ {mean:.2f}" in printed
    assert printed.count(table.NOT_GIVEN) == 6
    for figure in ("45.33, 46.19", "48.76, 48.78", "51.80, 52.46"):
        assert figure in printed
    assert "hellaswag: not number-comparable" in printed and "--limit 2" in printed
    for name in SIX.split(","):
        (path,) = (out / name).rglob("results_*.json")
        told = json.loads(path.read_text(encoding="utf-8"))
        assert {"results", "configs", "versions", "n-shot", "config", "date"} <= told.keys()
    record = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert record["versions"]["lm_eval"] == record["identity"]["lm_eval"]
    assert record["config"]["limit"] == 2 and record["device"]


def test_finished_tasks_are_not_repeated(
    model: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert evaluate(model, "piqa", data_dir, out, "--limit", "3", "--log-samples") == 0
    assert len(list(out.rglob("samples_piqa_*.jsonl"))) == 1
    with folder_unchanged(out / "piqa"):
        assert (
            evaluate(model, "piqa,cbt_format", data_dir, out, "--limit", "3", "--log-samples") == 0
        )
    assert "piqa: done before" in capsys.readouterr().out
    assert {task for task, _ in rows(out)} == {"piqa", "cbt_format"}
    moved = tmp_path / "copy"
    shutil.copytree(model, moved)
    with folder_unchanged(out):  # the same weights elsewhere are the same model
        assert evaluate(moved, "piqa", data_dir, out, "--limit", "3", "--log-samples") == 0


def test_a_folder_of_another_model_config_or_data_is_refused(
    model: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    shutil.copytree(data_dir / "piqa", data / "piqa")
    assert evaluate(model, "piqa", data, out, "--limit", "2") == 0
    other = llama(tmp_path / "other", length=512)
    labels = data / "piqa" / "valid-labels.lst"
    with folder_unchanged(out):
        assert evaluate(other, "piqa", data, out, "--limit", "2") == 2
        assert "another model or config (model.sha256" in capsys.readouterr().err
        assert evaluate(model, "piqa", data, out, "--limit", "3") == 2
        assert "settings.limit: 2.0 -> 3.0" in capsys.readouterr().err
        labels.write_text(labels.read_text().replace("1", "0", 1))
        assert evaluate(model, "piqa", data, out, "--limit", "2") == 2
        assert "other data (valid-labels.lst)" in capsys.readouterr().err
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "mine.txt").write_text("mine")
    assert evaluate(model, "piqa", data_dir, strange, "--limit", "2") == 2
    assert "holds files but no evaluation.json" in capsys.readouterr().err


def test_a_model_of_bytes_is_asked_in_bytes(data_dir: Path, tmp_path: Path) -> None:
    folder, out = bytes_model(tmp_path / "model"), tmp_path / "out"
    assert evaluate(folder, "lambada_openai", data_dir, out, "--limit", "5") == 0
    from whatwhere.lab.evaluate import load_model

    net, losses = load_model(folder).eval(), []
    lines = (data_dir / "lambada" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:5]:
        text = json.loads(line)["text"]
        context = list(text.rpartition(" ")[0].encode())
        losses.append(log_likelihood(net, context, list(text.encode())[len(context) :])[0])
    found = rows(out)["lambada_openai", "perplexity"]
    assert float(found["value"]) == pytest.approx(math.exp(-sum(losses) / 5), rel=1e-4)
    assert found["cut"] == "0"


def test_prompts_that_were_cut_are_counted(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = bytes_model(tmp_path / "model", length=100), tmp_path / "out"
    assert evaluate(folder, "lambada_openai", data_dir, out, "--limit", "5") == 0
    lines = (data_dir / "lambada" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
    long = sum(len(json.loads(line)["text"].encode()) > 101 for line in lines[:5])
    assert long and rows(out)["lambada_openai", "acc"]["cut"] == str(long)
    assert f"{long} prompts were longer" in " ".join(capsys.readouterr().out.split())
    assert evaluate(folder, "piqa", data_dir, tmp_path / "too", "--limit", "5") == 2
    assert "give a larger --max-length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "pica"], "no task 'pica'; near it:"),
        (["--tasks", "piqa"], "bring piqa/valid.jsonl and piqa/valid-labels.lst"),
        (["--tasks", "blimp"], "bring blimp/BLiMP.zip"),
        (["--tasks", "cbt"], "bring cbt/cbtest_NE_test_2500ex.txt"),
        (["--tasks", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--tasks", "piqa", "--data", "nowhere"], "nowhere is no folder"),
        (["--tasks", "piqa", "--limit", "0"], "limit: expected"),
        (["--tasks", "piqa", "--batch-size", "none"], "batch-size: expected"),
        (["--tasks", "piqa", "--dtype", "int8"], "dtype: expected one of auto"),
        (["--tasks", "piqa", "--lengths", "4096"], "lengths: only RULER"),
        (["--tasks", "niah_single_1", "--lengths", "512"], "the harness's RULER has 4096"),
        (["--limit", "3"], "limit: needs --tasks"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    more: list[str],
    said: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(model), *more]) == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed and "\n" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["./nowhere", "no/such/model", "nobody/nothing"])
def test_a_model_that_cannot_be_had_is_one_line(
    name: str,
    data_dir: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate(Path(name), "piqa", data_dir, tmp_path / "out") == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("whatwhere: model:") and "\n" not in printed
    assert list(tmp_path.iterdir()) == []


def test_without_the_harness_one_line_says_what_to_install(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(model), "--tasks", "piqa"]) == 2
    assert "pip install 'whatwhere[eval]'" in capsys.readouterr().err
