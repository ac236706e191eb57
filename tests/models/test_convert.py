"""A converted model computes the scores of its encoding, and nothing else of it has changed."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AttentionInterface

import closed_form
import whatwhere.models as wm
from convert_cases import ENCODINGS, FAMILIES, HEAD_DIM, HEADS, LENGTH, NAMED, converted, stock

IDS = torch.randint(3, 50, (2, 13), generator=torch.Generator().manual_seed(0))


class NoRotation(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x, *args, **kwargs):
        return x.new_ones(1, 1, self.width), x.new_zeros(1, 1, self.width)


def formula(encoding, delta, base, own_pairs):
    """A score by the papers' formula, and which channels it takes in which order."""
    name, options = ENCODINGS[encoding]
    inside = closed_form.in_distribution
    half = HEAD_DIM // 2
    fraction = options.get("fraction", 0.5 if name in ("rope-id", "pope-id") else 1.0)
    if name in ("rope", "yarn") and "fraction" not in options:
        fraction = own_pairs / half  # as the model itself
    pairs, channels = round(fraction * half), round(fraction * HEAD_DIM)
    scores = {
        "pope": lambda: closed_form.pope(closed_form.geometric(channels, base), delta),
        "pope-id": lambda: closed_form.pope(inside(channels, LENGTH), delta),
        "rope": lambda: closed_form.rope(closed_form.geometric(pairs, base)),
        "rope-id": lambda: closed_form.rope(inside(pairs, LENGTH)),
        "rope-high": lambda: closed_form.rope(inside(half, LENGTH)),
        "yarn": lambda: closed_form.rope(closed_form.yarn(2 * pairs, base, LENGTH, 4.0)),
        "nope": lambda: closed_form.nope,
        "alibi": lambda: closed_form.nope,
    }
    order = list(range(HEAD_DIM))
    if name in ("rope", "rope-id", "yarn"):  # pairs stay as far apart as they were
        apart = max(own_pairs, pairs)
        turned = [*range(pairs), *range(apart, apart + pairs)]
        order = turned + [c for c in order if c not in turned]
    return scores[name](), order


def attend(encoding, module, delta, base, own_pairs):
    """Attention of one layer, written out."""
    name, options = ENCODINGS[encoding]
    sharpened = {"rope-id": LENGTH, "pope-id": LENGTH}.get(name)
    sharpened = options.get("temperature_length", sharpened)
    gain = (0.1 * math.log(4.0) + 1) ** 2 if name == "yarn" else 1.0
    if not getattr(module, "use_rope", True):
        score, order, sharpened, gain, name = closed_form.nope, list(range(HEAD_DIM)), None, 1, ""
    else:
        score, order = formula(encoding, delta, base, own_pairs)

    def run(layer, q, k, v, mask, scaling=None, sliding_window=None, softcap=None, **kwargs):
        q, k = (x.detach().numpy()[..., order] for x in (q, k))
        at = list(range(q.shape[2]))
        logits = closed_form.all_scores(score, q, k, at, at) * scaling * gain
        if sharpened:
            logits *= np.array([closed_form.temperature(t, sharpened) for t in at])[:, None]
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        ahead = np.subtract.outer(at, at)
        if name == "alibi":
            logits -= np.array(closed_form.alibi_slopes(HEADS))[:, None, None] * ahead
        hidden = (ahead < 0) | (ahead >= (sliding_window or 1000))
        weights = np.exp(np.where(hidden, -np.inf, logits))
        weights = torch.from_numpy(weights / weights.sum(-1, keepdims=True))
        out = weights @ v.repeat_interleave(HEADS // v.shape[1], dim=1)
        return out.transpose(1, 2), None

    return run


def oracle(family, encoding, model):
    """The stock model with its rotation taken out and attention written out."""
    plain = stock(family).double()
    parts = plain.base_model
    # A table of no width turns nothing where the rotation is partial; else one of 1 and 0.
    parts.rotary_emb = NoRotation(HEAD_DIM)
    own = {"gpt_neox": HEAD_DIM // 4 // 2}.get(family, HEAD_DIM // 2)
    layers = [m for m in parts.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]
    ours = [
        m
        for m in model.base_model.modules()
        if hasattr(m, "layer_idx") and hasattr(m, "is_causal")
    ]
    runs = {}
    for module, other in zip(layers, ours, strict=True):
        given = plain.config.rope_parameters
        kind = given.get(getattr(module, "layer_type", None) or "", given)
        delta = getattr(other.position_encoding, "delta", None)
        delta = None if delta is None else delta.detach().double().tolist()
        runs[module] = attend(encoding, module, delta, kind["rope_theta"], own)
    AttentionInterface.register(
        "written_out", lambda layer, *args, **kwargs: runs[layer](layer, *args, **kwargs)
    )
    plain.config._attn_implementation_internal = "written_out"
    return plain


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("family", NAMED)
def test_forward_is_the_formula(family, encoding):
    """All logits in float64 against attention in loops: 1e-9 is rounding through two layers."""
    model = converted(family, encoding).double()
    with torch.no_grad():
        found = model(IDS[:1]).logits
        expected = oracle(family, encoding, model)(IDS[:1], use_cache=False).logits
    scale = expected.abs().max()
    # Gemma multiplies embeddings by a number that is rounded to the dtype of its weights.
    assert (found - expected).abs().max() < 1e-9 * scale or family.startswith("gemma3")
    assert (found - expected).abs().max() < 1e-6 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_rope_is_the_model_as_it_was(family):
    model = stock(family)
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        exact = wide(IDS).logits
        rounding = (model(IDS).logits - exact).abs().max()
        wm.convert(model, "rope")
        assert (model(IDS).logits - exact).abs().max() <= 2 * rounding + 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_convertible_converts_nothing(family):
    model = stock(family)
    before = model(IDS).logits
    answer = wm.convertible(model)
    assert answer and f"{HEADS} query" in str(answer)
    assert wm.convertible(model.config)
    assert torch.equal(model(IDS).logits, before) and not hasattr(model, "cache_report")


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_returned(family):
    model = stock(family)
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states
        converted = wm.convert(model, "rope")
        found = converted(IDS, output_hidden_states=True).hidden_states
        of_decoder = converted.base_model(IDS, output_hidden_states=True).hidden_states
    assert len(found) == len(of_decoder) == len(expected) == 3
    for one, other, before in zip(found, of_decoder, expected, strict=True):
        assert torch.equal(one, other)
        assert (one - before).abs().max() < 1e-4 * before.abs().max()
    fresh = type(model)(model.config).eval()
    assert len(fresh(IDS, output_hidden_states=True).hidden_states) == 3


def test_other_weights_stay_and_only_delta_is_added():
    model = stock("qwen3")
    before = copy.deepcopy(model.state_dict())
    wm.convert(model, "pope")
    after = model.state_dict()
    added = set(after) - set(before)
    assert added == {f"model.layers.{i}.self_attn.position_encoding.delta" for i in range(2)}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(after[name].shape == (HEADS, HEAD_DIM) and not after[name].any() for name in added)


def test_a_config_that_several_models_share():
    model = stock("gemma3_text")
    config = model.config
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    before, expected = config.to_dict(), other(IDS).logits
    wm.convert(model, "pope")
    assert config.to_dict() == before and other.config is config
    assert torch.equal(other(IDS).logits, expected)
    configs = {id(m.config) for m in model.modules() if hasattr(m, "config")}
    assert configs == {id(model.config)} != {id(config)}


def test_options_that_the_model_decides():
    model = wm.convert(stock("gemma3_text"), "pope", base=500.0)
    assert model.config.position_encoding_options == {"base": 500.0}
    model = wm.convert(stock("gemma3_text"), "pope")
    bases = [given["base"] for _, given in model.config.layer_encodings]
    assert bases == [10_000.0, 1_000_000.0], "each kind of layer keeps its own"
    assert [
        m.position_encoding.scale for m in (layer.self_attn for layer in model.model.layers)
    ] == [pytest.approx(12**-0.5)] * 2
    model = wm.convert(stock("gpt_neox"), "rope")
    assert model.config.position_encoding_options == {"base": 10_000.0, "fraction": 0.25}
    model = wm.convert(stock("smollm3"), "pope")
    assert [name for name, _ in model.config.layer_encodings] == ["pope", "nope"]
    assert wm.convert(stock("llama"), "rope-id", train_length=100).config.train_length == 100


def test_dtype_and_device_of_what_is_added():
    model = wm.convert(stock("llama").to(torch.bfloat16), "pope")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_rotation_is_exact_in_bfloat16_far_out():
    """Tables are not rounded to bfloat16: far out the error stays that of rounded q and k."""
    model = stock("llama", max_position_embeddings=2**20)
    exact = wm.convert(copy.deepcopy(model).double(), "rope")
    half = wm.convert(copy.deepcopy(model).to(torch.bfloat16), "rope")
    near = torch.arange(13)[None].expand(2, -1)
    errors = []
    for start in (0, 2**20):
        with torch.no_grad():
            expected = exact(IDS, position_ids=near + start, use_cache=False).logits
            found = half(IDS, position_ids=near + start, use_cache=False).logits
        errors.append((found - expected).abs().max())
    assert errors[1] < 2 * errors[0]
