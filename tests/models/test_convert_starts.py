"""A PoPE model that starts from a RoPE model's weights, in every family."""

import copy

import pytest
import torch

import whatwhere as ww
import whatwhere.models as wm
from convert_cases import NAMED, stock
from whatwhere.models.conversion import forward, starts
from whatwhere.models.conversion.structure import find_parts
from whatwhere.models.initialise import SHARPNESS

TEXT = torch.randint(3, 50, (3, 24), generator=torch.Generator().manual_seed(4))
NORMED = ("qwen3", "gemma3_text", "olmo2")


def raw_states(model):
    """Queries and keys of a model before rotation, by the recorder that starts use."""
    parts = find_parts(model.base_model)
    found = starts._record(model, parts, TEXT)
    return [found[module] for module in parts.attentions]


@pytest.mark.parametrize("family", NAMED)
def test_recording_finds_what_is_rotated_and_leaves_nothing_behind(family):
    """Recorded states are those of the model whose rotation is left out."""
    model = stock(family)
    before, kind = copy.deepcopy(model.state_dict()), model.config._attn_implementation
    with torch.no_grad():
        expected = model(TEXT).logits
    states = raw_states(model)
    heads = model.config.num_attention_heads
    assert all(q.shape == (3, heads, 24, 8) and q.dtype == torch.float32 for q, _ in states)
    with torch.no_grad():
        assert torch.equal(model(TEXT).logits, expected)
    assert model.config._attn_implementation == kind and not model.training
    assert all(torch.equal(model.state_dict()[name], w) for name, w in before.items())
    module = find_parts(model.base_model).attentions[0]
    if hasattr(module, "q_proj") and not hasattr(module, "q_norm"):
        inputs = []
        hook = module.q_proj.register_forward_hook(lambda m, args, out: inputs.append(out))
        with torch.no_grad():
            model(TEXT)
        hook.remove()
        made = inputs[0].view(3, 24, heads, 8).transpose(1, 2)
        assert torch.allclose(states[0][0], made, atol=1e-5)


STARTS = ["order", "signs", "centres", "scores", "distilled", "distilled-zero"]


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("family", NAMED)
def test_projections_make_the_recombined_states(family, name, monkeypatch):
    """Of the converted model's first layer, whose input is the same: ``A q`` and ``B k``."""
    model = stock(family)
    before = raw_states(model)[0]
    given = {} if name == "order" else {"calibration": TEXT}
    if family in NORMED and name not in ("order", "signs", "distilled"):
        with pytest.raises(ValueError, match="QK-Norm"):
            wm.convert(model, "pope", start=name, **given)
        return
    parts = find_parts(model.base_model)
    start = starts.make_starts(model, parts, name, given.get("calibration"))[0]
    wm.convert(model, "pope", start=name, **given)
    attention = parts.attentions[0]
    found = []

    def catch(q, k, v, *args, **kwargs):
        found.append((q, k))
        return ww.attention(q, k, v, *args, **kwargs)

    # Queries and keys as they come to be scored, caught on their way into whatwhere.attention.
    monkeypatch.setattr(forward, "attention", catch)
    with torch.no_grad():
        model(TEXT, use_cache=False)
    for after, states, maps in zip(found[0], before, (start.queries, start.keys), strict=True):
        expected = torch.einsum("hcd,nhtd->nhtc", maps, states)
        assert torch.allclose(after, expected, atol=1e-4 * expected.abs().max())
    assert torch.equal(attention.position_encoding.delta, start.delta)
    scale = attention.scaling / (1.0 if name in ("order", "distilled-zero") else SHARPNESS**2)
    if name in ("order", "distilled-zero"):
        assert not attention.position_encoding.delta.any()
    assert attention.position_encoding.scale == pytest.approx(scale)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "smollm3", "qwen3"])
def test_a_start_survives_saving(family, tmp_path):
    name = "signs" if family == "qwen3" else "scores"
    model = wm.convert(stock(family), "pope", start=name, calibration=TEXT)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TEXT).logits, model(TEXT).logits)
    if family == "gpt_neox":
        assert model.config.layer_encodings[0][1]["fraction"] == 0.25
        assert model.config.layer_encodings[0][1]["rest"] == "raw"


def test_scores_are_nearer_to_those_of_rope_than_the_weights_alone():
    """Correlation of attention logits with the RoPE model's, first layer, centred by query."""
    model = stock("llama")
    q, k = raw_states(model)[0]
    rope = wm.convert(copy.deepcopy(model), "rope").model.layers[0].self_attn.position_encoding

    exact = ww.scores(q, k.repeat_interleave(2, 1), rope())
    seen = torch.tril(torch.ones(24, 24, dtype=torch.bool))[1:]

    def agreement(start):
        pope = wm.convert(copy.deepcopy(model), "pope", start=start, calibration=TEXT)
        a, b = q, k
        if start != "weights":
            made = starts.make_starts(model, find_parts(model.base_model), start, TEXT)[0]
            a = torch.einsum("hcd,nhtd->nhtc", made.queries, q)
            b = torch.einsum("hcd,nhtd->nhtc", made.keys, k)
        encoding = pope.model.layers[0].self_attn.position_encoding
        with torch.no_grad():
            found = ww.scores(a, b.repeat_interleave(2, 1), encoding())
        pairs = []
        for scores in (found, exact):
            part = scores[..., 1:, :].masked_fill(~seen, 0.0)
            mean = part.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
            pairs.append((part - mean).masked_fill(~seen, 0.0).flatten())
        return torch.nn.functional.cosine_similarity(*pairs, dim=0)

    assert agreement("scores") > agreement("weights") + 0.2


def test_a_pass_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = stock("llama").train()
    kind = model.config._attn_implementation

    def fails(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(starts, "attention", fails)
    with pytest.raises(MemoryError):
        wm.convert(model, "pope", start="scores", calibration=TEXT)
    assert type(model).__name__ == "LlamaForCausalLM" and model.training
    assert model.config._attn_implementation == kind
    assert not any(m._forward_pre_hooks for m in model.modules())


WRONG = {
    "no such start": ({"start": "best"}, "start='best'"),
    "no text": ({"start": "scores"}, "needs calibration"),
    "text of no rank": ({"start": "centres", "calibration": TEXT[0]}, r"shape \(24,\)"),
    "tokens of another": (
        {"start": "centres", "calibration": TEXT + 1000},
        "vocabulary of 50",
    ),
    "a base of its own": ({"start": "order", "base": 5.0}, "no option base"),
    "no delta": ({"start": "order", "delta": None}, "no option base, scale, delta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes(case):
    options, message = WRONG[case]
    model = stock("llama")
    before = model.state_dict()
    with pytest.raises(ValueError, match=message):
        wm.convert(model, "pope", **options)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(model.state_dict()[name], w) for name, w in before.items())
    with pytest.raises(ValueError, match="for encoding 'pope'"):
        wm.convert(model, "rope-id", start="order")
    scaled = stock("llama", rope_parameters={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="rope_type='linear'"):
        wm.convert(scaled, "pope", start="scores", calibration=TEXT)
