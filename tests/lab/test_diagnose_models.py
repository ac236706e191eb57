"""`whatwhere diagnose` on models of several parts, and after what went wrong before."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma4TextConfig

from whatwhere.cli import main
from whatwhere.lab.diagnose import drawings, record

_TEXT: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}
_EYES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawings, "drawings", lambda _: [])


def diagnose(model: Path, output: Path, *more: str) -> int:
    text = model.parent / "text.txt"
    if not text.exists():
        tiny_models.words(text, 400)
    given = ["diagnose", str(model), "--text", str(text), "--lengths", "16,32", "--texts", "1"]
    return main([*given, "--output", str(output), "--tokenizer", "bytes", *more])


def test_the_text_decoder_of_a_model_of_images_is_diagnosed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eyes = _EYES | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=_TEXT, vision_config=eyes, mm_tokens_per_image=4, image_token_index=255
    )
    model, output = tmp_path / "images", tmp_path / "out"
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    assert diagnose(model, output, "--heads", "2") == 2
    assert "heads 0 to 1" in capsys.readouterr().err
    assert diagnose(model, output) == 0
    part = output / "parts" / "images"
    assert set(pd.read_csv(part / "trace" / "clusters.csv")["layer"]) == {0, 1}
    assert list(pd.read_csv(part / "cost" / "cost.csv")["length"]) == [16, 32]


def test_what_a_config_does_not_tell_is_left_out_and_said(tmp_path: Path) -> None:
    config = Gemma4TextConfig(
        **_TEXT,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=4,
    )
    model, output = tmp_path / "shapes", tmp_path / "out"
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    assert diagnose(model, output, "--no-retrieval") == 0
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("layers of different shapes") == 2


def test_a_diagnosis_that_measured_nothing_keeps_no_folder(tmp_path: Path) -> None:
    folder, output = tmp_path / "model", tmp_path / "out"
    model = tiny_models.llama(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = math.nan
    model.save_pretrained(folder)
    assert diagnose(folder, output, "--no-retrieval") == 2
    tiny_models.llama(folder)
    assert diagnose(folder, output, "--no-retrieval") == 0


def test_no_label_leads_out_of_the_folder_of_parts(tmp_path: Path) -> None:
    for label in (".", "..", "../..", "/", "a/../../b"):
        place = record.place(tmp_path, label, "trace")
        assert place.parent.resolve().parent == (tmp_path / record.PARTS).resolve()


def test_a_damaged_part_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "model", tmp_path / "out"
    tiny_models.llama(folder)
    assert diagnose(folder, output, "--no-retrieval") == 0
    (record.place(output, "model", "loss") / record.PART).write_text("{}")
    assert diagnose(folder, output, "--no-retrieval") == 2
    assert "is no record of a part" in capsys.readouterr().err


def test_memory_that_runs_out_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("whatwhere.analysis.trace", full)
    tiny_models.llama(tmp_path / "model")
    assert diagnose(tmp_path / "model", tmp_path / "out") == 1
    assert "memory: model needs more than" in capsys.readouterr().err


def test_a_device_without_numbers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_models.llama(tmp_path / "model")
    assert diagnose(tmp_path / "model", tmp_path / "out", "--device", "meta") == 2
    assert "'meta' cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
