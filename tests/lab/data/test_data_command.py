"""`whatwhere data` from end to end."""

import json
import os
from pathlib import Path

import pytest
from test_data_tokens import save_tokenizer

from whatwhere.cli import main
from whatwhere.lab.data import TokensData, make_task
from whatwhere.lab.data.catalogue import CORPORA


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"the cat sat on mat number {i}; " * 20)
    return folder


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("whatwhere: ")
    assert "\n" not in printed
    return printed


@pytest.fixture
def prepared(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    out = str(tmp_path / "out")
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    given = ["--from", str(texts), "--tokenizer", tokenizer, "--workers", "1"]
    assert main(["data", "prepare", "text", "--output", out, *given]) == 0
    printed = capsys.readouterr().out
    assert "text  1/1" in printed
    assert f"{out}: train 5 documents" in printed
    return out


def test_prepare_show_verify_and_train_on_it(
    prepared: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "show", prepared, "--documents", "2", "--tokens", "9"]) == 0
    printed = capsys.readouterr().out
    assert "train" in printed and "validation" in printed
    assert printed.count("'the cat sat on") == 2
    assert "train document 4, " in printed
    assert main(["data", "verify", prepared]) == 0
    assert "files are as they were made" in capsys.readouterr().out
    task = make_task(TokensData(paths=(prepared,), length=16))
    assert task.train_batch(0, 0, 4).input_ids.shape == (4, 16)
    # The tokenizer's files make it again.
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(Path(prepared) / "tokenizer")
    assert "the cat sat on" in loaded.decode(task.train_batch(0, 0, 4).input_ids[0])


def test_bytes_are_shown_as_text(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "bytes")
    given = ["--from", str(texts / "1.txt"), str(texts / "2.txt"), "--workers", "1"]
    assert main(["data", "prepare", "text", "--output", out, *given]) == 0
    capsys.readouterr()
    assert main(["data", "show", out, "--split", "validation", "--tokens", "11"]) == 0
    assert "'the cat sat' ..." in capsys.readouterr().out
    assert main(["data", "show", out, "--documents", "0"]) == 0


def test_verify_names_all_that_is_damaged(
    prepared: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(prepared)
    os.truncate(folder / "train-00000.tokens.npy", 99)
    (folder / "validation-00000.bounds.npy").unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    message = failed(["data", "verify", prepared], capsys, code=1)
    assert message.startswith("whatwhere: 3 of ")
    assert "train-00000.tokens.npy is cut short" in message
    assert "validation-00000.bounds.npy is missing" in message
    assert "tokenizer.json is damaged" in message
    assert "train-00000.tokens.npy is cut short" in failed(["data", "show", prepared], capsys)


def test_mistakes_are_one_line(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output", str(tmp_path / "out")]
    start = ["data", "prepare", "text", *out]
    assert "did you mean 'text'" in failed(["data", "prepare", "texts", *out], capsys)
    assert "does not exist" in failed([*start, "--from", str(tmp_path / "no")], capsys)
    message = failed([*start, "--from", str(texts), "--workers", "0"], capsys)
    assert "workers must be at least 1, got 0" in message
    message = failed([*start, "--from", str(texts), "--tokenizer", str(texts)], capsys)
    assert "could not be loaded" in message
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "a"}) + '\n{"te')
    message = failed([*start, "--from", str(tmp_path / "bad.jsonl"), "--workers", "1"], capsys)
    assert "bad.jsonl, line 2: no JSON, perhaps cut short" in message
    assert "holds other files" in failed(
        ["data", "prepare", "text", "--output", str(texts), "--from", str(texts)], capsys
    )
    assert "holds no manifest.json" in failed(["data", "show", str(texts)], capsys)
    assert "holds no manifest.json" in failed(["data", "verify", str(texts)], capsys)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in CORPORA)


@pytest.mark.parametrize("arguments", [["data"], ["data", "nothing"], ["data", "prepare"]])
def test_incomplete_commands_say_what_there_is(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", "prepare", "--help"])
    assert caught.value.code == 0
    assert "--max-bytes" in capsys.readouterr().out
