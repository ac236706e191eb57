"""Generation by converted models: a cache changes how fast tokens come, never which."""

import copy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import DynamicCache, StaticCache

import whatwhere.models as wm
from convert_cases import ENCODINGS, NAMED, converted, stock

NEW = 9
FORMS = ["raw", "encoded"]
CONTAINERS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 4},
}
made = torch.Generator().manual_seed(3)
IDS = torch.randint(3, 50, (2, 11), generator=made)
LEFT = torch.ones_like(IDS)
LEFT[1, :4] = 0


def generate(model, ids=IDS, mask=LEFT, **options):
    torch.manual_seed(11)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", NAMED)
def test_cache_gives_the_tokens_of_no_cache(family, form):
    model = converted(family, cache_form=form)
    for sampled in (False, True):
        plain = generate(model, do_sample=sampled, use_cache=False)
        for name, options in CONTAINERS.items():
            cached = generate(model, do_sample=sampled, **options)
            assert torch.equal(cached, plain), (name, sampled)
    assert len(plain[:, 11:].unique()) > 2, "always the same token proves nothing"


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_encoding_with_a_cache(family, encoding):
    model = converted(family, encoding)
    plain = generate(model, use_cache=False)
    for name, options in CONTAINERS.items():
        assert torch.equal(generate(model, **options), plain), name


@pytest.mark.parametrize("family", NAMED)
def test_padded_rows_are_what_they_are_alone(family):
    model = converted(family)
    together = generate(model)
    for row in range(len(IDS)):
        kept = LEFT[row].bool()
        alone = generate(model, IDS[row : row + 1, kept], LEFT[row : row + 1, kept])
        assert torch.equal(together[row, 11:], alone[0, kept.sum() :])
    right = LEFT.flip(1)
    ids = IDS.flip(1)
    with torch.no_grad():
        padded = model(ids, attention_mask=right).logits[1, :7]
        short = model(ids[1:, :7]).logits[0]
    assert (padded - short).abs().max() < 1e-5 * short.abs().max()


@pytest.mark.parametrize("family", NAMED)
def test_beam_search(family):
    model = converted(family)
    plain = generate(model, num_beams=3, use_cache=False)
    for options in ({}, CONTAINERS["static"]):
        assert torch.equal(generate(model, num_beams=3, **options), plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", NAMED)
def test_assisted_and_prompt_lookup(family, form):
    """Both crop what was guessed wrong from the caches of the model and of its assistant."""
    model = converted(family, cache_form=form)
    assistant = converted("llama", "rope", seed=5)
    ids = torch.tensor([[3, 4, 5, 6, 3, 4, 5, 6, 3, 4]])
    mask = torch.ones_like(ids)
    plain = generate(model, ids, mask, use_cache=False)
    assert torch.equal(generate(model, ids, mask, prompt_lookup_num_tokens=3), plain)
    assert torch.equal(generate(model, ids, mask, assistant_model=assistant), plain)
    as_assistant = stock("llama")
    expected = generate(as_assistant, ids, mask, use_cache=False)
    assert torch.equal(generate(as_assistant, ids, mask, assistant_model=model), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("container", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_logits_in_pieces(family, container, form):
    model = converted(family, cache_form=form)
    length = IDS.shape[1]
    options = {"max_cache_len": length} if container is StaticCache else {}
    cache = container(config=model.config, **options)
    with torch.no_grad():
        whole = model(IDS, attention_mask=LEFT, use_cache=False).logits
        parts, start = [], 0
        for size in (3, 1, 1, length - 5):
            stop = start + size
            step = model(IDS[:, start:stop], attention_mask=LEFT[:, :stop], past_key_values=cache)
            assert step.past_key_values is cache
            parts.append(step.logits)
            start = stop
    seen = LEFT.bool()
    assert (torch.cat(parts, 1) - whole)[seen].abs().max() < 2e-5 * whole.abs().max()


def documents():
    return torch.cat((torch.arange(6), torch.arange(5)))[None].expand(2, -1)


@pytest.mark.parametrize("family", NAMED)
def test_packed_documents_are_what_they_are_alone(family):
    model = converted(family)
    with torch.no_grad():
        packed = model(IDS, position_ids=documents())
        apart = [model(part).logits for part in (IDS[:, :6], IDS[:, 6:])]
    assert packed.past_key_values is None, "no cache can be made of documents"
    expected = torch.cat(apart, dim=1)
    assert (packed.logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_packed_documents_and_a_cache_are_refused():
    model = converted("llama")
    for given in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(ValueError, match=r"position_ids\[0, 6\] is 0.*use_cache=False"):
            model(IDS, position_ids=documents(), **given)
    cache = model(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"position_ids\[0, 0\] is 3"):
        model(IDS[:, :1], position_ids=torch.tensor([[3]]), past_key_values=cache)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(IDS, cu_seq_lens_q=torch.tensor([0, 6, 11]), use_cache=False)


def test_positions_of_ones_own_without_a_cache():
    """Gaps count: a score depends on positions, whatever lies between."""
    model = converted("llama")
    gaps = torch.arange(11)[None] * 3
    with torch.no_grad():
        apart = model(IDS, position_ids=gaps, use_cache=False).logits
        near = model(IDS, use_cache=False).logits
        shifted = model(IDS, position_ids=gaps + 1000, use_cache=False).logits
    assert (apart - near).abs().max() > 0.1
    assert (apart - shifted).abs().max() < 1e-4 * apart.abs().max()


@pytest.mark.parametrize("first", ["convert", "offload"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_weights_that_accelerate_offloads(family, first):
    """They are on no device but while their module runs."""
    model = wm.convert(stock(family), "pope")
    expected = [model(IDS, attention_mask=LEFT).logits, generate(model)]
    if first == "convert":
        cpu_offload(model, execution_device="cpu")
    else:
        model = wm.convert(cpu_offload(stock(family), execution_device="cpu"), "pope")
    assert next(model.parameters()).is_meta
    assert torch.equal(model(IDS, attention_mask=LEFT).logits, expected[0])
    assert torch.equal(generate(model), expected[1])
    assert torch.equal(generate(model, **CONTAINERS["static"]), expected[1])


def test_what_cannot_be_is_said():
    model = converted("llama")
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa'.*attention_backend"):
        model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"not supported for continuous batching|attends with"):
        model.generate_batch([[3, 4, 5]])
    with pytest.raises(ValueError, match="output_attentions"):
        model(IDS, output_attentions=True)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 11, 11\)"):
        model(IDS, attention_mask=torch.ones(2, 1, 11, 11))
    for ids in (IDS[0], IDS.float()):
        with pytest.raises(ValueError, match=r"input_ids has shape .* of shape \(B, T\)"):
            model(ids)
    with pytest.raises(ValueError, match="input_ids is a list: expected a tensor"):
        model([[3, 4]])
    with pytest.raises(ValueError, match="past_key_values is a tuple"):
        model(IDS, past_key_values=((IDS, IDS),))
    with pytest.raises(RuntimeError, match="not a layer alone"):
        model.model.layers[0](torch.zeros(1, 2, 32), position_embeddings=None)


def test_caches_keep_what_the_report_says():
    for family in ("llama", "gpt_neox"):
        for form, share in (("raw", 1), ("encoded", 2)):
            model = converted(family, cache_form=form)
            cache = model(IDS, use_cache=True).past_key_values
            reports = model.cache_report()
            for layer, report in zip(cache.layers, reports, strict=True):
                stored = layer.keys.numel() + layer.values.numel()
                assert stored == IDS.numel() * report.numbers_per_token
                assert layer.keys.shape[-1] == share * layer.values.shape[-1]
                assert report.form == form
    assert [r.form for r in converted("llama").cache_report("cpu")] == ["raw", "raw"]


@pytest.mark.parametrize(
    ("family", "encoding"),
    [*((family, "pope") for family in NAMED), ("llama", "rope"), ("llama", "rope-id")],
)
def test_bfloat16(family, encoding):
    """Tables that turn keys are float32, caches hold bfloat16, steps are as exact as the whole."""
    model = converted(family, encoding)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(IDS).logits
        model = model.to(torch.bfloat16)
        whole = (model(IDS, use_cache=False).logits - exact).abs().max()
        cache = DynamicCache(config=model.config)
        steps = [model(ids, past_key_values=cache).logits for ids in IDS.split(1, dim=1)]
    kept = {x.dtype for layer in cache.layers for x in (layer.keys, layer.values)}
    assert kept == {torch.bfloat16}
    assert (torch.cat(steps, dim=1) - exact).abs().max() < 2 * whole
    assert whole < 0.1 * exact.abs().max()


def test_encodings_of_one_model_do_not_leak_into_another():
    one, other = converted("llama", "pope"), converted("llama", "nope")
    both = [generate(one), generate(other)]
    assert not torch.equal(*both)
    assert torch.equal(generate(one), both[0]) and type(one) is type(other)
    assert wm.convertible(stock("llama"))
