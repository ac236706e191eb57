"""Initial weights, checkpoints, and swapping encodings."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import whatwhere as ww
from whatwhere.models import WhatWhereConfig, WhatWhereForCausalLM, WhatWhereModel

IDS = torch.arange(12)[None]


def deltas(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("delta")}


def test_round_trip(make, encoding, tmp_path):
    model = make(encoding)
    with torch.no_grad():
        for index, (name, p) in enumerate(model.named_parameters()):
            if "encoding" in name or "absolute" in name:
                p.copy_(-0.1 - torch.rand_like(p) - 0.01 * index)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    torch.manual_seed(123)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is WhatWhereForCausalLM and not loaded.training
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, p), (other, q) in zip(
        model.named_parameters(), loaded.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(p, q), name
    assert torch.equal(model(IDS).logits, loaded(IDS).logits)
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {
        "architectures": ["WhatWhereForCausalLM"],
        "dtype": loaded.config.to_dict()["dtype"],
        "_name_or_path": "",
    }
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is WhatWhereModel
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    assert type(AutoConfig.from_pretrained(tmp_path)) is WhatWhereConfig


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(make, tmp_path, tied):
    model = make(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    loaded = WhatWhereForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    loaded.resize_token_embeddings(60)
    assert loaded(IDS).logits.shape == (1, 12, 60) and loaded.config.vocab_size == 60
    assert torch.equal(loaded.get_input_embeddings().weight[:50], model.model.embed_tokens.weight)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("how", ["class", "auto", "checkpoint-without-them", "meta"])
def test_fresh_deltas(make, how, tmp_path):
    """However a model comes about, an encoding's parameters start as the encoding says."""
    for start in ("zero", "uniform"):
        config = make("pope", position_encoding_options={"delta": start}).config
        if how == "class":
            model = WhatWhereForCausalLM(config)
        elif how == "auto":
            model = AutoModelForCausalLM.from_config(config)
        elif how == "meta":
            with torch.device("meta"):
                model = WhatWhereForCausalLM(config)
            model.to_empty(device="cpu")
            model.init_weights()
        else:
            rope = make("rope")
            rope.save_pretrained(tmp_path)
            model = WhatWhereForCausalLM.from_pretrained(tmp_path, config=config)
            kept = dict(rope.named_parameters())
            for name, p in model.named_parameters():
                assert name.endswith("delta") or torch.equal(p, kept[name]), name
        assert len(deltas(model)) == 2
        flat = torch.cat([p.flatten() for p in deltas(model).values()])
        if start == "zero":
            assert (flat == 0).all()
        else:
            assert -2 * math.pi <= flat.min() < -5 and -1.2 < flat.max() <= 0
            first, second = deltas(model).values()
            assert not torch.equal(first, second)


def test_one_seed_one_start(make, encoding):
    """Models that differ in their encodings alone start with the same other weights."""
    other = dict(make(encoding).named_parameters())
    for name, p in make("rope").named_parameters():
        assert torch.equal(p, other[name]), name


def test_the_seed_matters(make):
    a, b = make(seed=0), make(seed=1)
    assert not torch.equal(a.model.embed_tokens.weight, b.model.embed_tokens.weight)
    uniform = [make("pope-uniform", seed=seed) for seed in (0, 1)]
    assert not torch.equal(*(next(iter(deltas(m).values())) for m in uniform))


def test_residual_projections_start_smaller(make):
    model = make(hidden_size=128, num_hidden_layers=8, initializer_range=0.02)
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert math.isclose(p.detach().std(), 0.02 / 4, rel_tol=0.05), name
        elif name.endswith("proj.weight") or "embed" in name:
            assert math.isclose(p.detach().std(), 0.02, rel_tol=0.05), name
        elif "norm" in name:
            assert (p == 1).all()


def test_wrong_delta_shape(make, tmp_path):
    model = make("pope")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.encoding.delta"
    weights[name] = torch.zeros(4, 3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoding.delta has shape \(4, 3\).*\(4, 8\)") as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"encoding.delta has shape \(4, 3\).*\(4, 8\)"):
        model.load_state_dict(weights, strict=False)
    lenient = WhatWhereForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert (deltas(lenient)[name] == 0).all()


def test_dtype_on_loading(make, tmp_path):
    make("pope").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options"),
    [("yarn", {"factor": 4.0}), ("rope-id", {}), ("nope", {}), ("alibi", {}), ("sinusoidal", {})],
)
def test_swapping_equals_making_anew(make, tmp_path, name, options):
    model = make("rope")
    model.set_position_encoding(name, **options)
    anew = make("rope", position_encoding=name, position_encoding_options=options)
    assert torch.equal(model(IDS).logits, anew(IDS).logits)
    assert not torch.equal(model(IDS).logits, make("rope")(IDS).logits)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.position_encoding == name
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    model.set_position_encoding("rope")
    assert torch.equal(model(IDS).logits, make("rope")(IDS).logits)


def test_swapping_keeps_options_and_parameters(make):
    rope = make("rope", position_encoding_options={"base": 500.0})
    rope.set_position_encoding("yarn", factor=2.0)
    assert rope.config.position_encoding_options == {"base": 500.0, "factor": 2.0}
    pope = make("pope-uniform")
    before = dict(deltas(pope))
    pope.set_position_encoding("pope", temperature_length=4)
    assert all(p is before[name] for name, p in deltas(pope).items())
    spec = pope.model.layers[0].self_attn.encoding()
    assert spec.temperature_length == 4 and pope.config.position_encoding_options["delta"]
    assert not any(module.training for module in pope.modules())


def test_swapping_that_would_lose_parameters(make):
    for start, name, options in (
        ("pope", "rope", {}),
        ("rope", "pope", {}),
        ("pope", "pope-id", {}),
        ("learned", "rope", {}),
        ("learned", "learned", {"max_length": 99}),
    ):
        model = make(start)
        config, before = model.config.to_dict(), model(IDS).logits
        with pytest.raises(ValueError, match="must be the same to be swapped"):
            model.set_position_encoding(name, **options)
        assert model.config.to_dict() == config and torch.equal(model(IDS).logits, before)
    with pytest.raises(ValueError, match="factr"):
        make("rope").set_position_encoding("yarn", factr=2.0)
    with pytest.raises(ValueError, match="unknown encoding 'yarnn'"):
        make("rope").set_position_encoding("yarnn")


def test_config_is_plain_json(make, encoding, tmp_path):
    config = make(encoding).config
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "whatwhere"
    again = WhatWhereConfig.from_pretrained(tmp_path)
    assert again.layer_encodings == config.layer_encodings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected a positive integer"),
        ({"hidden_size": 32.0}, "hidden_size=32.0: expected a positive integer"),
        ({"mlp": "relu"}, "mlp='relu': expected one of"),
        ({"cache_form": "wide"}, "cache_form='wide': expected one of"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"position_encoding": "ropee"}, "unknown encoding 'ropee'"),
        ({"position_encoding_options": {"bas": 2.0}}, "unknown option 'bas' for encoding 'rope'"),
        ({"position_encoding": ["rope"]}, "position_encoding lists 1 entries"),
        ({"position_encoding": ["learned", "sinusoidal"] * 2}, "2 different absolute encodings"),
        ({"position_encoding": "learned", "position_encoding_options": {"embedding_dim": 8}}, "8"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"position_encoding_options": {"axes": [4, 4]}}, "2 position axes"),
        ({"hiden_size": 64}, "unknown setting 'hiden_size': did you mean 'hidden_size'"),
        ({"dropout_rate": 0.1}, "did you mean 'dropout'"),
    ],
)
def test_bad_configs(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        WhatWhereConfig(**settings)
    assert "\n" not in str(error.value)


def test_defaults_that_follow_from_others():
    plain = WhatWhereConfig(hidden_size=96, num_attention_heads=6)
    assert (plain.head_dim, plain.num_key_value_heads, plain.intermediate_size) == (16, 6, 384)
    assert WhatWhereConfig(hidden_size=96, mlp="swiglu").intermediate_size == 256
    apart = WhatWhereConfig(hidden_size=96, num_attention_heads=5, head_dim=10)
    assert WhatWhereForCausalLM(apart)(IDS).logits.shape == (1, 12, 256)


def test_each_layer_its_own_encoding():
    config = WhatWhereConfig(
        num_hidden_layers=2,
        position_encoding=["pope", "alibi"],
        position_encoding_options=[{"delta": None}, {"fraction": 0.5}],
    )
    first, second = (layer.self_attn.encoding for layer in WhatWhereModel(config).layers)
    assert isinstance(first, ww.PoPE) and first.delta is None
    assert isinstance(second, ww.ALiBi) and second.slopes[2:] == (0.0, 0.0)
