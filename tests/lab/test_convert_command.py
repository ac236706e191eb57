"""`whatwhere convert`, from its arguments to the folder that it leaves."""

from __future__ import annotations

import errno
import json
import re
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import contents, llama, tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import whatwhere as ww
from whatwhere.cli import main
from whatwhere.lab.convert.options import parse_options
from whatwhere.models import WhatWhereConfig, WhatWhereForCausalLM
from whatwhere.models.checkpoints import SHIM

pytestmark = pytest.mark.usefixtures("no_bars")

IDS = torch.arange(40).reshape(2, 20)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line of a command that fails."""
    assert main(arguments) == code
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("whatwhere: ") and "\n" not in printed
    return printed


def convert(source: Path | str, output: Path | str, *more: str) -> list[str]:
    return ["convert", str(source), "--encoding", "pope", "--output", str(output), *more]


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


# --- what it writes -----------------------------------------------------------------------------


def test_a_rope_model_converted_to_rope_is_the_same_model(tmp_path: Path) -> None:
    model = llama(tmp_path / "llama")
    assert main([*convert(tmp_path / "llama", tmp_path / "out"), "--encoding", "rope"]) == 0
    with torch.no_grad():
        torch.testing.assert_close(
            logits(tmp_path / "out"), model(IDS).logits, rtol=1e-4, atol=1e-5
        )


def test_all_but_the_encoding_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "llama", tmp_path / "new" / "out"
    model = llama(source, vocab_size=10, eos_token_id=1)
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    model.save_pretrained(source)
    tokenizer(source)
    out.mkdir(parents=True)  # an empty folder is no obstacle
    assert main(convert(source, out, "--train-length", "12")) == 0
    printed = capsys.readouterr().out

    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    added = after.keys() - before.keys()
    assert before.keys() <= after.keys() and all(name.endswith("delta") for name in added)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert f"pope in 2 layers, {sum(after[name].numel() for name in added)} parameters" in printed
    # 2 layers of 2 key heads with 4 channels, magnitudes and values, float32
    assert "cache: 128 bytes per token" in printed
    config = AutoConfig.from_pretrained(out)
    assert (config.position_encoding, config.train_length) == ("pope", 12)
    said = "what stands where"
    assert (
        AutoTokenizer.from_pretrained(out)(said)["input_ids"]
        == AutoTokenizer.from_pretrained(source)(said)["input_ids"]
    )
    kept = json.loads((out / "generation_config.json").read_text())
    assert (kept["temperature"], kept["eos_token_id"]) == (0.3, 1)
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # nothing unfinished beside it


def test_a_model_without_a_tokenizer_is_converted_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(tmp_path / "llama")
    assert main(convert(tmp_path / "llama", tmp_path / "out")) == 0
    assert "tokenizer: there is none" in capsys.readouterr().out
    assert not any(path.name.startswith("tokenizer") for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)]
)
def test_weights_have_the_dtype_asked_for(
    given: str, expected: torch.dtype, tmp_path: Path
) -> None:
    llama(tmp_path / "llama", torch.bfloat16)
    assert main(convert(tmp_path / "llama", tmp_path / "out", "--dtype", given)) == 0
    found = {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert found == {expected}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == expected


def test_text_gives_pope_a_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --text queries and keys are recombined by the best start that the model takes."""
    model = llama(tmp_path / "llama", vocab_size=256)
    (tmp_path / "a.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    text = ["--text", str(tmp_path / "a.txt")]
    said = {"scores": "fit RoPE's scores", "order": "order of frequencies", "weights": "as they"}
    for start, more in (("scores", text), ("order", ["--start", "order"]), ("weights", [])):
        assert main(convert(tmp_path / "llama", tmp_path / start, *more)) == 0
        assert said[start] in capsys.readouterr().out
        weights = load_file(tmp_path / start / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(weights[name], model.state_dict()[name]) == (start == "weights")
        delta = weights["model.layers.0.self_attn.position_encoding.delta"]
        assert bool(delta.any()) == (start == "scores")


def test_a_start_without_its_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(tmp_path / "llama", vocab_size=256)
    assert main(convert(tmp_path / "llama", tmp_path / "out", "--start", "scores")) == 2
    assert "name files with --text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_shim_is_written_on_request(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    for index, more in enumerate(([], ["--shim"])):
        out = tmp_path / f"out{index}"
        assert main(convert(tmp_path / "llama", out, *more)) == 0
        assert (out / SHIM).exists() == bool(more)
        assert ("auto_map" in json.loads((out / "config.json").read_text())) == bool(more)


def test_options_reach_the_encoding_in_its_own_types(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    options = ["--set", "fraction=0.5", "delta=none", "temperature_length=8"]
    assert main(convert(tmp_path / "llama", tmp_path / "out", *options)) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = model.config.position_encoding_options
    assert (found["fraction"], found["delta"], found["temperature_length"]) == (0.5, None, 8)
    encoding = next(m for m in model.modules() if isinstance(m, ww.PoPE))
    assert encoding.temperature_length == 8 and not list(encoding.parameters())


@pytest.mark.parametrize(
    ("encoding", "given", "expected"),
    [
        ("pope", "base=1e4", 1e4),
        ("pope", "axes=[2, 2]", [2, 2]),
        ("pope", "axes=none", None),
        ("pope", "magnitude=none", "none"),
        ("pope", "delta=uniform", "uniform"),
        ("rope-id", "temperature=false", False),
        ("rope-high", "temperature=true", True),
        ("yarn", "factor=4", 4.0),
    ],
)
def test_an_option_is_read_by_the_signature(encoding: str, given: str, expected: Any) -> None:
    (found,) = parse_options(encoding, [given]).values()
    assert found == expected and type(found) is type(expected)


# --- whether it can -----------------------------------------------------------------------------


def test_check_answers_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()  # it needs no weights
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    before = contents(tmp_path)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "llama"), "--check"]) == 0
    assert "can be converted: LlamaForCausalLM" in capsys.readouterr().out
    assert "rotary" in refused(["convert", str(tmp_path / "gpt2"), "--check"], capsys, code=1)
    assert contents(tmp_path) == before


# --- what is refused ----------------------------------------------------------------------------

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def save_encoder(folder: Path) -> None:
    BertForMaskedLM(BertConfig(**SMALL, intermediate_size=8)).save_pretrained(folder)


def save_encoder_that_rotates(folder: Path) -> None:
    config = ModernBertConfig(**SMALL, intermediate_size=8, pad_token_id=0)
    ModernBertForMaskedLM(config).save_pretrained(folder)


def save_encoder_and_decoder(folder: Path) -> None:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def save_model_of_ours(folder: Path) -> None:
    WhatWhereForCausalLM(WhatWhereConfig(**SMALL)).save_pretrained(folder)


def save_run_of_ours(folder: Path) -> None:
    save_model_of_ours(folder / "model")
    (folder / "run.json").write_text("{}")


def save_converted(folder: Path) -> None:
    llama(folder.with_name("stock"))
    assert main(convert(folder.with_name("stock"), folder)) == 0


def save_classifier(folder: Path) -> None:
    # It has no head for tokens: transformers would draw one at random, and only warn.
    config = llama(folder.with_name("stock")).config
    LlamaForSequenceClassification(config).save_pretrained(folder)


def save_without_weights(folder: Path) -> None:
    llama(folder)
    (folder / "model.safetensors").unlink()


def save_with_a_weight_missing(folder: Path) -> None:
    llama(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def save_with_a_weight_of_another_shape(folder: Path) -> None:
    llama(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def save_damaged(folder: Path) -> None:
    llama(folder)
    (folder / "model.safetensors").write_bytes(b"not weights")


def save_with_a_damaged_config(folder: Path) -> None:
    llama(folder)
    (folder / "config.json").write_text("{")


def save_with_a_damaged_tokenizer(folder: Path) -> None:
    llama(folder, vocab_size=10)
    tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")


def save_with_code(folder: Path) -> None:
    llama(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise AssertionError('this was run')")


def save_nothing(folder: Path) -> None:
    folder.mkdir()


REFUSED = {
    save_encoder: "no rotary embedding",
    save_encoder_that_rotates: "no causal language model",
    save_encoder_and_decoder: "cannot be converted",
    save_model_of_ours: "`whatwhere train` and `compare` made it",
    save_run_of_ours: "`whatwhere train` and `compare` made it",
    save_converted: "position encoding pope of whatwhere already",
    save_classifier: "lacks weights that its config asks for: lm_head.weight",
    save_without_weights: "holds no model that can be read: .*model.safetensors",
    save_with_a_weight_missing: r"lacks weights .*: model.layers.1.mlp.up_proj.weight$",
    save_with_a_weight_of_another_shape: "holds no model that can be read",
    save_damaged: "holds no model that can be read",
    save_with_a_damaged_config: "holds no model that can be read",
    save_with_a_damaged_tokenizer: "holds no tokenizer that can be read",
    save_with_code: "needs code of its own, which is never run",
    save_nothing: "holds no model: there is no config.json",
}


@pytest.mark.parametrize("save", REFUSED, ids=lambda save: str(save.__name__))
def test_what_cannot_be_converted_is_one_line_and_writes_nothing(
    save: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "model")
    before = contents(tmp_path)
    capsys.readouterr()
    said = refused(convert(tmp_path / "model", tmp_path / "new" / "out"), capsys)
    assert re.search(REFUSED[save], said)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--encoding", "pop"], "did you mean 'pope'"),
        (["--encoding", "learned"], "added to token embeddings"),
        (["--encoding", "yarn"], "needs factor"),
        (["--encoding", "rope-id"], "train_length"),  # 16 is too short for its frequencies
        (["--set", "nonsense=1"], "no option 'nonsense': expected some of base, fraction"),
        (["--set", "fraction=half"], "fraction='half' has a wrong type: expected float"),
        (
            ["--set", "delta=middle"],
            "delta='middle' has a wrong type: expected Optional[Literal['zero', 'uniform']]",
        ),
        (["--set", "axes=[1,"], "no list"),
        (["--set", "fraction"], "expected key=value, got 'fraction'"),
        (["--set", "fraction=1", "fraction=0.5"], "fraction comes twice"),
        (["--set", "fraction=7"], "fraction"),
        (["--set", "axes=[2,2]"], "several position axes"),
        (["--train-length", "0"], "train_length=0: expected at least 1"),
        (["--output", "full"], "full holds files already"),
        (["--output", "file"], "file is a file"),
        (["--output", "model"], "model holds files already"),
        (["--revision", "main"], "is a folder"),
    ],
)
def test_a_wrong_argument_is_one_line_and_writes_nothing(
    more: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    llama(tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    (tmp_path / "file").write_text("kept")
    before = contents(tmp_path)
    capsys.readouterr()
    assert said in refused([*convert("model", "out"), *more], capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--output", "out"], "encoding: name one with --encoding"),
        (["--encoding", "pope"], "output: name a new folder"),
    ],
)
def test_what_is_missing_is_named(
    more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(["convert", "somewhere", *more], capsys)


@pytest.mark.parametrize("name", ["some/model", "model"])
def test_a_hub_that_cannot_be_reached_is_one_line(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("a test went to the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.chdir(tmp_path)
    said = refused(convert(name, tmp_path / "out"), capsys)
    assert f"no folder {name}" in said and "give a folder" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "../nowhere", "/nowhere/at/all", "file.txt", "a/b/c"])
def test_what_can_be_no_name_is_not_asked_for(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("text")
    assert "neither a folder nor the name" in refused(convert(name, tmp_path / "out"), capsys)


def test_a_full_disk_leaves_nothing_unfinished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama(tmp_path / "llama")
    before = contents(tmp_path)

    def full(self: Any, folder: Path, **more: Any) -> None:
        (folder / "half").write_text("written")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    capsys.readouterr()
    said = refused(convert(tmp_path / "llama", tmp_path / "out"), capsys, code=1)
    assert "no space left" in said
    assert contents(tmp_path) == before
