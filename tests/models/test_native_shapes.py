"""The same weights in our decoder and in Llama's, Mistral's or Qwen3's shape."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import whatwhere.models as wm

IDS = torch.arange(3, 30)[None]
CASES = {
    "pope": ("llama", {"position_encoding_options": {"delta": "uniform"}}),
    "rope": ("llama", {}),
    "rope-quarter": ("llama", {"position_encoding_options": {"fraction": 0.25}}),
    "rope-id": ("qwen3", {"qk_norm": True}),
    "yarn": ("llama", {"position_encoding_options": {"factor": 2.0}}),
    "nope": ("mistral", {"sliding_window": 5}),
    "alibi": ("qwen3", {"sliding_window": 5, "qk_norm": True}),
    "pope-id": ("mistral", {"sliding_window": 5, "tie_word_embeddings": False}),
}


def ours(name, **changes):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 80,
        "position_encoding": name,
        "initializer_range": 0.3,
        "mlp": "swiglu",
    }
    model = wm.WhatWhereForCausalLM(wm.WhatWhereConfig(**(shape | changes))).eval()
    with torch.no_grad():  # norms of 1 and deltas of 0 would hide what is lost
        for parameter in model.parameters():
            parameter.sub_(0.2 * torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    kind, changes = CASES[case]
    model = ours("rope" if case == "rope-quarter" else case, **changes)
    moved = wm.to_transformers(model)
    assert moved.config.base_model_type == kind and not moved.training
    with torch.no_grad():
        expected, wide = model(IDS).logits, model.double()(IDS).logits
        budget = 2 * (expected - wide).abs().max() + 1e-6
        model.float()
        assert (moved(IDS).logits - wide).abs().max() <= budget
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(moved.generate(IDS, **settings), model.generate(IDS, **settings))
    back = wm.from_transformers(moved)
    assert back.config.to_dict() == model.config.to_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    moved.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, moved(IDS).logits)
    with torch.no_grad():
        moved.model.layers[0].mlp.up_proj.weight.zero_()
    assert model.model.layers[0].mlp.up_proj.weight.abs().max() > 0, "a copy, not a view"


def test_trained_there_is_trained_here():
    """A step of one is a step of the other."""
    model = ours("pope")
    moved = wm.to_transformers(model)
    for one in (model, moved):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.01)
        one(IDS, labels=IDS).loss.backward()
        optimizer.step()
    for name, weight in wm.from_transformers(moved).state_dict().items():
        assert torch.allclose(weight, model.state_dict()[name], atol=1e-5), name


def test_layers_of_several_encodings():
    changes = {"position_encoding_options": [{"fraction": 0.5}, {"delta": "uniform"}]}
    model = ours(["rope", "pope"], **changes)
    moved = wm.to_transformers(model)
    with torch.no_grad():
        assert torch.allclose(moved(IDS).logits, model(IDS).logits, atol=1e-4)
    assert wm.from_transformers(moved).config.to_dict() == model.config.to_dict()


def test_shapes_that_are_not_the_same():
    with pytest.raises(wm.NotConvertibleError, match="mlp='gelu'"):
        wm.to_transformers(ours("pope", mlp="gelu"))
    with pytest.raises(wm.NotConvertibleError, match="'learned' is added to token embeddings"):
        wm.to_transformers(ours("learned"))
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    biased = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, intermediate_size=32))
    with pytest.raises(wm.NotConvertibleError, match="expected a converted"):
        wm.from_transformers(biased)
    with pytest.raises(wm.NotConvertibleError, match="bias, which ours have not"):
        wm.from_transformers(wm.convert(biased, "pope"))
