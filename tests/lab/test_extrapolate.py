from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import recipe, text
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from whatwhere.lab import runs
from whatwhere.lab.compare import choose
from whatwhere.lab.data import make_task, read_tokens
from whatwhere.lab.extrapolate import extrapolate, find_subject, table, write
from whatwhere.lab.runs import Run
from whatwhere.lab.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs of three steps, by label."""
    folder = tmp_path_factory.mktemp("runs")
    made = choose(recipe(text(folder), training={"steps": 3}), ["pope", "learned"])
    task = make_task(made.data)
    found = {label: runs.plan(made, label, 0, folder) for label in made.encodings}
    for run in found.values():
        runs.claim(run, task.describe())
        train(run, task)
    return found


def words(folder: Path, vocab: list[str]) -> None:
    """Save a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<u>").save_pretrained(folder)


def llama(folder: Path, vocab_size: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("place", ["", "model"])
def test_a_run_is_measured_on_its_own_text_or_another(
    place: str, trained: dict[str, Run], tmp_path: Path
) -> None:
    run = trained["pope"]
    subject = find_subject(run.folder / place)
    assert subject.run == run and subject.train_length == 32
    own = extrapolate(subject, (), [64, 32], tokens=640)
    assert [(f.length, f.windows) for f in own] == [(32, 20), (64, 10)]
    other = tmp_path / "other.txt"
    other.write_text("entirely different" * 300)
    assert extrapolate(subject, [str(other)], [32], tokens=640)[0].loss != own[0].loss


def test_the_loss_is_that_of_the_model_on_the_text(
    trained: dict[str, Run], tmp_path: Path
) -> None:
    # Windows end to end over a text of exactly four of them: nothing is left out or counted twice.
    from whatwhere.models import WhatWhereForCausalLM

    path = tmp_path / "four.txt"
    path.write_text(("what and where, " * 20)[: 4 * 48 - 1])  # a mark ends each document
    run = trained["pope"]
    found = extrapolate(find_subject(run.folder), [str(path)], [48])[0]
    model = WhatWhereForCausalLM.from_pretrained(run.model).eval()
    rows = torch.tensor(read_tokens([str(path)]).astype(int)).reshape(4, 48)
    with torch.no_grad():
        assert found.loss == pytest.approx(model(rows, labels=rows).loss.item(), rel=1e-5)
    assert found.windows == 4


def test_any_local_causal_language_model_with_its_tokenizer(tmp_path: Path) -> None:
    folder, path = tmp_path / "llama", tmp_path / "text.txt"
    model = llama(folder)
    words(folder, ["<u>", "what", "and", "where"])
    path.write_text("what and where and " * 60)
    subject = find_subject(folder)
    assert subject.run is None and subject.train_length == 16
    found = extrapolate(subject, [str(path)], [8, 40], tokens=80)
    tokens = torch.tensor(read_tokens([str(path)], str(folder)).astype(int))
    assert len(tokens) >= 240
    windows = torch.stack(
        [tokens[i * (len(tokens) - 40) : i * (len(tokens) - 40) + 40] for i in (0, 1)]
    )
    with torch.no_grad():
        expected = model(windows, labels=windows).loss.item()
    assert found[1].loss == pytest.approx(expected, rel=1e-5)


def test_results_are_csv_with_one_row_a_length_and_a_position(
    trained: dict[str, Run], tmp_path: Path
) -> None:
    subject = find_subject(trained["pope"].folder)
    found = extrapolate(subject, (), [32, 64], tokens=640)
    for path in write(found, tmp_path / "out", subject):
        assert path.stat().st_size > 0
    assert (tmp_path / "out" / "loss_by_length.png").exists()
    by_length = pd.read_csv(tmp_path / "out" / "loss_by_length.csv")
    assert list(by_length.columns) == ["length", "windows", "tokens", "loss"]
    assert list(by_length["tokens"]) == [20 * 31, 10 * 63]
    assert list(by_length["loss"]) == [f.loss for f in found]
    by_position = pd.read_csv(tmp_path / "out" / "loss_by_position.csv")
    assert list(by_position["position"]) == list(range(1, 64))
    assert math.isclose(by_position["loss"].mean(), found[1].loss, rel_tol=1e-9)


def test_the_printed_table_counts_bytes_or_tokens(trained: dict[str, Run], tmp_path: Path) -> None:
    subject = find_subject(trained["pope"].folder)
    found = extrapolate(subject, (), [32], tokens=64)
    shown = table(found, subject)
    assert shown.title == "loss by length, nats per byte"
    assert [column.header for column in shown.columns][:3] == ["length", "windows", "bytes"]
    assert list(shown.columns[0].cells) == ["32 (training)"]
    llama(tmp_path)
    words(tmp_path, ["<u>", "a", "b"])
    assert table(found, find_subject(tmp_path)).title == "loss by length, nats per token"


def test_a_table_of_positions_ends_the_lengths(trained: dict[str, Run], tmp_path: Path) -> None:
    subject = find_subject(trained["learned"].folder)
    assert extrapolate(subject, (), [32], tokens=64)
    with pytest.raises(ValueError, match=r"64 is beyond the model's table.*32"):
        extrapolate(subject, (), [32, 64], tokens=64)
    folder, path = tmp_path / "gpt2", tmp_path / "text.txt"
    config = GPT2Config(n_positions=24, n_embd=8, n_layer=1, n_head=1, vocab_size=256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    path.write_text("what and where " * 60)
    with pytest.raises(ValueError, match=r"25 is beyond the model's table.*24"):
        extrapolate(find_subject(folder), [str(path)], [25])


def refused(match: str, folder: Path, texts: Any = (), lengths: Any = (8,)) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        extrapolate(find_subject(folder), texts, lengths)
    assert "\n" not in str(caught.value)


def test_each_mistake_is_one_line(trained: dict[str, Run], tmp_path: Path) -> None:
    run = trained["pope"].folder
    refused("no folder", tmp_path / "nowhere")
    refused("neither a run", tmp_path)
    refused("at least 2", run, lengths=[1, 8])
    refused("at least 2", run, lengths=[])
    with pytest.raises(ValueError, match="tokens: expected at least 1, got 0"):
        extrapolate(find_subject(run), (), [8], tokens=0)
    refused("length=100000 is more than", run, lengths=[100_000])
    refused("nowhere", run, [str(tmp_path / "nowhere")])
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    refused("binary", run, [str(tmp_path / "binary")])
    llama(tmp_path / "llama")
    refused("holds no tokenizer.*4", tmp_path / "llama")
    words(tmp_path / "llama", ["<u>", "a", "b", "c", "d", "e"])
    (tmp_path / "text.txt").write_text("a b c d e " * 20)
    refused("no.*--text|--text", tmp_path / "llama")
    refused("token 5 is outside.*4", tmp_path / "llama", [str(tmp_path / "text.txt")])


def test_so_is_a_model_that_cannot_be_read(trained: dict[str, Run], tmp_path: Path) -> None:
    folder, path = tmp_path / "model", tmp_path / "text.txt"
    path.write_text("what and where " * 60)
    shutil.copytree(trained["pope"].model, folder)
    weights = load_file(folder / "model.safetensors")
    delta = next(name for name in weights if name.endswith("delta"))
    changed = weights | {delta: weights[delta][:, :1].contiguous()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    refused(r"delta has shape \(2, 1\)", folder, [str(path)])
    (folder / "model.safetensors").write_bytes(b"not weights")
    refused("no model that can be read: ", folder, [str(path)])
    (folder / "model.safetensors").unlink()
    refused("no model that can be read: .*model.safetensors", folder, [str(path)])
    (folder / "config.json").write_text("[]")
    refused("no mapping", folder)
    (folder / "config.json").write_text("{")
    refused("config.json is not JSON", folder)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    made = recipe(text(tmp_path))
    run = runs.plan(made, "pope", 0, tmp_path)
    runs.claim(run, make_task(made.data).describe())
    refused("no trained model", run.folder)
