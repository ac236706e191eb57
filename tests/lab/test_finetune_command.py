"""`whatwhere finetune` as a command: from a stock model to a tuned one, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from test_finetune import command, converted, interrupt, stop_at
from tiny_models import contents, llama, tokenizer, words
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

from whatwhere.cli import main

pytestmark = pytest.mark.usefixtures("no_bars")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("whatwhere: ") and "\n" not in printed
    return printed


def test_from_a_stock_model_to_a_fine_tuned_one_by_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    llama(tmp_path / "llama", vocab_size=10, eos_token_id=1)
    tokenizer(tmp_path / "llama")
    words(tmp_path / "text.txt")
    assert main(["convert", "llama", "--encoding", "pope", "--output", "pope"]) == 0
    stop_at(5, interrupt, monkeypatch)
    assert main(command("pope", "text.txt", "out")) == 130
    printed = capsys.readouterr()
    assert "8 steps of 4 x 64 tokens in 1 part" in printed.out
    assert "run the same command again to go on" in printed.err
    assert main(command("pope", "text.txt", "out")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "16 (training)" in printed and "64 (fine-tuning)" in printed
    assert "model: out/model" in printed
    assert main(["extrapolate", "out/model", "--text", "text.txt", "--lengths", "16,64"]) == 0


def other_weights(folder: Path) -> None:
    loaded = load_file(folder / "model.safetensors")
    loaded["model.norm.weight"] += 1
    save_file(loaded, folder / "model.safetensors", {"format": "pt"})


def another_encoding(folder: Path) -> None:
    shutil.rmtree(folder)
    converted(folder, "rope")


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (another_encoding, [], "another fine-tuning .*encoding: 'pope' -> 'rope'"),
        (other_weights, [], "another fine-tuning .*model.sha256"),
        (None, ["--steps", "9"], "another fine-tuning .*steps: 8 -> 9"),
        (None, ["--validation", "more.txt"], "another fine-tuning .*text.validation_sha256"),
        (None, ["--accumulate", "2"], "another fine-tuning .*accumulate: 1 -> 2"),
    ],
)
def test_an_output_of_another_fine_tuning_is_refused(
    change: Any,
    more: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    converted(tmp_path / "model")
    words(tmp_path / "text.txt")
    words(tmp_path / "more.txt", seed=1)
    stop_at(5, interrupt, monkeypatch)
    assert main(command("model", "text.txt", "out")) == 130
    if change:
        change(tmp_path / "model")
    before = contents(tmp_path)
    assert re.search(said, refused(command("model", "text.txt", "out", *more), capsys))
    assert contents(tmp_path) == before


def drop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.glob(name):
            path.unlink()

    return change


def name_another_encoding(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"position_encoding": "rope"}))


def name_no_encoding(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def want_more_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith("delta")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def have_a_table_of_positions(folder: Path) -> None:
    shutil.rmtree(folder)
    config = GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=1, vocab_size=256)
    GPT2LMHeadModel(config).save_pretrained(folder)


def have_few_tokens(folder: Path) -> None:
    llama(folder.with_name("few"), vocab_size=5)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder.with_name("few") / name, folder / name)
    shutil.rmtree(folder.with_name("few"))


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (None, ["nowhere", "text.txt", "out"], "nowhere is no folder"),
        (None, ["empty", "text.txt", "out"], "neither a run .* nor a model"),
        (None, ["model", "nowhere.txt", "out"], "nowhere.txt' does not exist"),
        (None, ["model", "binary", "out"], "binary"),
        (None, ["model", "short.txt", "out"], "tokens, fewer than one window of length=64"),
        (None, ["model", "text.txt", "full"], "full holds files but no finetune.json"),
        (None, ["model", "text.txt", "text.txt"], "text.txt is a file"),
        (None, ["model", "text.txt", "out", "--validation", "text.txt"], "is training text"),
        (None, ["model", "text.txt", "out", "--lengths", "8", "9999"], "9999 is more than the"),
        (None, ["model", "text.txt", "out", "--accumulate", "3"], "batch_size=4 is no multiple"),
        (drop("config.json"), ["model", "text.txt", "out"], "neither a run .* nor a model"),
        (drop("model.safetensors"), ["model", "text.txt", "out"], "no model that can be read"),
        (drop("tokenizer*"), ["model", "text.txt", "out"], "holds no tokenizer"),
        (
            name_another_encoding,
            ["model", "text.txt", "out"],
            "of another position encoding than 'rope'",
        ),
        (name_no_encoding, ["model", "text.txt", "out"], "encoding that its config does not name"),
        (
            want_more_weights,
            ["model", "text.txt", "out"],
            "has no .*delta, which position encoding 'pope'",
        ),
        (have_few_tokens, ["model", "text.txt", "out"], "outside the model's vocabulary of 5"),
        (have_a_table_of_positions, ["model", "text.txt", "out", "--length", "64"], "beyond .*16"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    change: Any,
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))
    converted(tmp_path / "model")
    words(tmp_path / "text.txt")
    (tmp_path / "short.txt").write_text("what and where " * 30)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for folder in ("empty", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    if change:
        change(tmp_path / "model")
    before = contents(tmp_path)
    assert re.search(said, refused(command(*arguments), capsys))
    assert contents(tmp_path) == before
