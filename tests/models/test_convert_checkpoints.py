"""Checkpoints of converted models, and what is refused with a reason."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    modeling_utils,
)
from transformers.utils import PushToHubMixin

import whatwhere.models as wm
from convert_cases import ENCODINGS, FAMILIES, SHAPE, converted, stock

IDS = torch.arange(3, 15)[None]
LOST = "model.layers.1.self_attn.position_encoding.delta"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    model = converted(family)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) and not any(info[key] for key in info if "keys" in key)
    for (name, p), (other, q) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(p, q)
    expected = logits(model)
    # Experts are added up in another order by the implementation that is loaded.
    assert (logits(loaded) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert loaded.config.layer_encodings == model.config.layer_encodings
    with torch.no_grad():
        decoder = AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state
        expected = model.base_model(IDS).last_hidden_state
    assert (decoder - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_comes_back(encoding, tmp_path):
    model = converted("qwen3", encoding, backend="reference", cache_form="encoded")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.attention_backend == "reference" and loaded.config.cache_form == "encoded"
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (logits(half) - logits(model)).abs().max() < 0.2 * logits(model).abs().max()


def test_options_that_are_numbers_of_numpy_come_back(tmp_path):
    given = {"base": np.float32(500), "temperature_length": np.int64(9)}
    model = wm.convert(stock("llama"), "pope", train_length=np.int64(128), **given)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.train_length == 128
    assert torch.equal(logits(loaded), logits(model))


def run_python(code, *arguments):
    """The lines that a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
    )
    return done.stdout.strip().splitlines()


OPEN = """
import sys, torch
{before}
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for kind, folder, options in {cases}:
    try:
        model = eval(kind).from_pretrained(sys.argv[1] + "/" + folder, **options)
        total = model(torch.arange(3, 15)[None]).logits.sum().item()
        print(kind, folder, type(model).__name__, total)
    except Exception as error:
        print(kind, folder, type(error).__name__, " ".join(str(error).split()))
"""


@pytest.mark.slow
def test_programs_that_do_not_know_us(tmp_path):
    """Without us a checkpoint is an error, not a model without its encoding.

    With a shim it is the model, where whatwhere is installed and remote code is trusted.
    """
    model = converted("llama")
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "shim", shim=True)
    auto, direct, trust = "AutoModelForCausalLM", "LlamaForCausalLM", {"trust_remote_code": True}
    cases = [
        (auto, "plain", {}),
        (direct, "plain", {}),
        (direct, "shim", {}),
        (auto, "shim", trust),
    ]
    strangers = run_python(OPEN.format(before="", cases=cases), tmp_path)
    assert "plain ValueError" in strangers[0] and "`whatwhere-converted`" in strangers[0]
    assert strangers[1:3] == [
        f"{direct} {name} KeyError 'whatwhere'" for name in ("plain", "shim")
    ]
    expected = f"WhatWhereLlamaForCausalLM {logits(model).sum().item()}"
    assert strangers[3] == f"{auto} shim {expected}"
    cases = [(auto, "plain", {}), (auto, "shim", {})]
    friends = run_python(OPEN.format(before="import whatwhere.models", cases=cases), tmp_path)
    assert friends == [f"{auto} {name} {expected}" for name in ("plain", "shim")]


@pytest.mark.slow
def test_pickles_are_opened_by_another_process(tmp_path, family="gemma3_text"):
    """As those that start workers do; there nothing has made the classes yet."""
    model = converted(family)
    paths = [tmp_path / "model", tmp_path / "config"]
    for path, given in zip(paths, (model, model.config), strict=True):
        path.write_bytes(pickle.dumps(given))
    code = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))).__name__)"
    names = [run_python(code, path)[-1] for path in paths]
    assert names == [type(model).__name__, type(model.config).__name__]


def test_a_shim_stays_until_it_is_not_asked_for(tmp_path):
    model = converted("llama")
    model.save_pretrained(tmp_path / "a", shim=True)
    assert (tmp_path / "a" / "modeling_whatwhere.py").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "modeling_whatwhere.py").exists()
    loaded.save_pretrained(tmp_path / "c", shim=False)
    assert not (tmp_path / "c" / "modeling_whatwhere.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "c" / "config.json").read_text())


def test_a_shim_is_uploaded_with_the_config_that_names_it(tmp_path, monkeypatch):
    uploaded = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return SimpleNamespace(repo_id=name)

    def upload(self, folder, *args, **kwargs):
        uploaded.append((Path(folder) / "modeling_whatwhere.py").exists())

    monkeypatch.setattr(modeling_utils, "hf_api", Hub)
    monkeypatch.setattr(
        modeling_utils, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("theirs")
    )
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    model = converted("llama")
    model.save_pretrained(tmp_path / "a", push_to_hub=True)
    model.save_pretrained(tmp_path / "b", push_to_hub=True, shim=True)
    assert uploaded == [False, True]


def test_model_card(tmp_path):
    model = converted("llama", "pope")
    model.config.base_model = "someone/small"
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "base_model: someone/small" in card and "| position encoding | pope |" in card
    assert "256 tokens" in card and "(`llama`)" in card and "- pope" in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    wm.WhatWhereForCausalLM(wm.WhatWhereConfig()).save_pretrained(tmp_path / "ours")
    assert "| position encoding | rope |" in (tmp_path / "ours" / "README.md").read_text()


def test_weights_of_another_encoding(tmp_path):
    """Found by what is in the files, where transformers would go on with a line in its log."""
    model = converted("llama")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != LOST}, tmp_path / "model.safetensors")
    for load in (AutoModelForCausalLM, type(model)):
        with pytest.raises(ValueError, match=f"has no {LOST}, which position encoding 'pope'"):
            load.from_pretrained(tmp_path)
    save_file(weights | {LOST: weights[LOST][:, :3].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"delta has shape \(4, 3\) in the checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    changed = config | {"position_encoding": "nope", "position_encoding_options": {}}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="of another position encoding than 'nope'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"base_model_type": "unheard-of"}))
    with pytest.raises(ValueError, match="base_model_type='unheard-of'"):
        AutoConfig.from_pretrained(tmp_path)


def test_another_attention_is_refused_when_loading(tmp_path):
    converted("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")


REFUSED = {
    "encoder": (lambda: BertForMaskedLM(BertConfig()), "no causal language model"),
    "encoder-decoder": (lambda: T5ForConditionalGeneration(T5Config()), "encoder-decoder"),
    "learned positions": (lambda: GPT2LMHeadModel(GPT2Config()), "rotary_emb"),
    "no head": (lambda: LlamaModel(stock("llama").config), "ForCausalLM"),
    "no model": (lambda: torch.nn.Linear(2, 2), "model is a Linear"),
    "already": (lambda: converted("llama"), "position encoding pope of whatwhere already"),
    "ours": (lambda: wm.WhatWhereForCausalLM(wm.WhatWhereConfig()), "encoding rope of whatwhere"),
    "dropout": (lambda: stock("llama", attention_dropout=0.1), "attention_dropout=0.1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_converted(case):
    make, reason = REFUSED[case]
    model = make()
    kind = type(model)
    answer = wm.convertible(model)
    assert not answer and reason in answer.reason and "\n" not in answer.reason
    with pytest.raises(wm.NotConvertibleError, match=reason):
        wm.convert(model, "pope")
    assert type(model) is kind


# Families whose layers differ in ways that nothing but running them shows, or that lack a part.
OTHER_KINDS = {
    "bloom": "rotary_emb",
    "cohere": "pair channel c with c",
    "gpt_oss": "sinks",
    "phi": "never tested on model type 'phi'",
    "stablelm": "never tested on model type 'stablelm'",
    "bert": "no causal language model|rotary_emb",
    "vit": "no causal language model",
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_configs_that_cannot_be_converted(kind):
    sizes = {k: v for k, v in SHAPE.items() if v is not None and k != "head_dim"}
    answer = wm.convertible(AutoConfig.for_model(kind, **(sizes if kind != "vit" else {})))
    assert not answer
    assert re.search(OTHER_KINDS[kind], answer.reason), answer.reason


def test_a_subclass_is_refused():
    class Mine(LlamaForCausalLM):
        pass

    with pytest.raises(wm.NotConvertibleError, match="its checkpoints would come back as"):
        wm.convert(Mine(stock("llama").config), "pope")


WRONG = {
    "unknown encoding": (("popo", {}), "unknown encoding 'popo'.*did you mean 'pope'"),
    "unknown option": (("pope", {"thetas": 1}), "unknown option 'thetas'"),
    "needed option": (("yarn", {}), "needs factor"),
    "absolute": (("learned", {}), "added to token embeddings"),
    "axes": (("pope", {"axes": (4, 4)}), "several position axes"),
    "length": (("pope", {"train_length": -3}), "train_length=-3: expected a positive integer"),
    "length of text": (("pope", {"train_length": "128"}), "train_length='128'"),
    "too short": (("rope-id", {"train_length": 64}), "64"),
    "backend": (("pope", {"backend": "fast"}), "backend='fast'"),
    "form": (("pope", {"cache_form": "small"}), "cache_form='small'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_leave_the_model_as_it_was(case):
    (name, options), message = WRONG[case]
    model = stock("llama")
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        wm.convert(model, name, **options)
    assert type(model) is LlamaForCausalLM and model.config.to_dict() == config
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(logits(model), expected)


def test_scaled_frequencies_are_not_dropped_in_silence():
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    model = stock("llama", rope_parameters=scaled)
    for name, options in (("rope", {}), ("yarn", {"factor": 2.0})):
        with pytest.raises(ValueError, match=r"rope_type='linear'.*give base=5000.0"):
            wm.convert(model, name, **options)
    wm.convert(model, "pope")
    assert model.config.position_encoding_options["base"] == 5000.0
