"""A cache changes how fast tokens come, never which."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

NEW = 10
FORMS = ["encoded", "raw"]
CONTAINERS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 4},
    "static-chunked": {"cache_implementation": "static", "prefill_chunk_size": 4},
}


def generate(model, ids, mask, **options):
    torch.manual_seed(11)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=mask, **settings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_cache_gives_the_tokens_of_no_cache(make, prompts, encoding, form, sampled):
    model = make(encoding, cache_form=form)
    plain = generate(model, *prompts, do_sample=sampled, use_cache=False)
    for name, options in CONTAINERS.items():
        cached = generate(model, *prompts, do_sample=sampled, **options)
        assert torch.equal(cached, plain), name
    assert len(plain[:, 9:].unique()) > 2, "always the same token proves nothing"


def test_padded_rows_generate_what_they_do_alone(make, prompts, encoding):
    model = make(encoding)
    ids, mask = prompts
    together = generate(model, ids, mask)
    for row in range(len(ids)):
        kept = mask[row].bool()
        alone = generate(model, ids[row : row + 1, kept], mask[row : row + 1, kept])
        assert torch.equal(together[row, 9:], alone[0, kept.sum() :])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["pope-uniform", "rope-id", "alibi", "learned"])
def test_beam_search(make, prompts, name, form):
    model = make(name, cache_form=form)
    plain = generate(model, *prompts, num_beams=3, use_cache=False)
    for options in ({}, CONTAINERS["static"]):
        assert torch.equal(generate(model, *prompts, num_beams=3, **options), plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["pope", "rope-id", "alibi", "learned"])
def test_cropped_caches_of_prompt_lookup(make, name, form):
    model = make(name, cache_form=form)
    ids = torch.tensor([[3, 4, 5, 6, 3, 4, 5, 6, 3, 4]])
    mask = torch.ones_like(ids)
    looked_up = generate(model, ids, mask, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, generate(model, ids, mask, use_cache=False))


def cached_logits(model, ids, mask, cache, pieces):
    """Logits of a forward pass in pieces, the mask given for all tokens so far."""
    out, start = [], 0
    for size in pieces:
        stop = start + size
        seen = None if mask is None else mask[:, :stop]
        step = model(
            ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True
        )
        out.append(step.logits)
        start = stop
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("window", [None, 5], ids=["whole", "window"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_in_pieces(make, encoding, form, window):
    """Prefill, chunks and single tokens, padding left and in between, in float64."""
    model = make(encoding, dtype=torch.float64, cache_form=form, sliding_window=window)
    ids = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    holes = torch.ones_like(ids)
    holes[1, :4] = holes[2, :2] = 0
    if window is None:  # a cache with a window keeps slots, padding among them
        holes[2, 6:9] = 0
    for mask in (None, torch.ones_like(ids), holes):
        whole = model(ids, attention_mask=mask).logits
        real = torch.ones_like(ids) if mask is None else mask
        for kind in (DynamicCache, StaticCache):
            extra = {} if kind is DynamicCache else {"max_cache_len": 20}
            cache = kind(config=model.config, **extra)
            parts = cached_logits(model, ids, mask, cache, [5, 1, 1, 4, 1, 3, 1])
            error = (parts - whole)[real.bool()].abs().max()
            assert error < 1e-9, (kind.__name__, mask is None)


def test_custom_positions_with_an_encoded_cache(make):
    """A rotation by gaps of two is the same with a cache and without."""
    model = make("rope", dtype=torch.float64)
    ids, at = torch.arange(8)[None], 2 * torch.arange(8)[None]
    whole = model(ids, position_ids=at).logits
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :5], position_ids=at[:, :5], past_key_values=cache).logits
    rest = model(ids[:, 5:], position_ids=at[:, 5:], past_key_values=cache).logits
    assert (torch.cat((first, rest), 1) - whole).abs().max() < 1e-9
    assert (model(ids).logits - whole).abs().max() > 1e-3, "gaps make no difference"


def test_cache_report_is_what_the_cache_holds(make, encoding):
    for form in FORMS:
        model = make(encoding, cache_form=form)
        cache = model(torch.zeros(1, 7, dtype=torch.long), use_cache=True).past_key_values
        for report, layer in zip(model.cache_report(), cache.layers, strict=True):
            assert report.form == form
            assert report.numbers_per_token * 7 == layer.keys.numel() + layer.values.numel()


def test_cache_report_says_why(make):
    pope, alibi, rope = (make(name).cache_report("cpu") for name in ("pope", "alibi", "rope"))
    assert "raw keys" in str(pope[0]) and "a backend on cpu" in str(pope[0])
    assert "pope" in str(pope[0])
    assert "no backend on cpu" in str(rope[0])
    assert "leaves keys as they are" in str(alibi[1])
    encoded = make("pope", cache_form="encoded").cache_report()[0]
    assert encoded.numbers_per_token > pope[0].numbers_per_token
    assert "config" in encoded.reason


def test_masks_of_static_caches_keep_their_length(make, prompts):
    """So that a compiled step is compiled once; `generate` hands on whatever this returns."""
    model, shapes = make(), set()
    model.model.register_forward_pre_hook(
        lambda module, args, given: shapes.add(tuple(given["attention_mask"].shape)),
        with_kwargs=True,
    )
    generate(model, *prompts, cache_implementation="static")
    assert len(shapes) == 1


def test_cache_only_when_asked_for(make):
    model, ids = make(), torch.zeros(1, 4, dtype=torch.long)
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 4


def test_learned_table_ends(make):
    model = make("learned", max_position_embeddings=12)
    ids = torch.zeros(1, 12, dtype=torch.long)
    assert model(ids).logits.shape == (1, 12, 50)
    with pytest.raises(ValueError, match="0 to 11"):
        model(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="0 to 11"):
        model.generate(ids, max_new_tokens=2, do_sample=False)


def test_bad_masks_and_caches(make):
    model, ids = make(), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\)"):
        model(ids, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="past_key_values is a tuple"):
        model(ids, past_key_values=((ids, ids),))
    with pytest.raises(ValueError, match="segment_ids with a cache"):
        model(ids, segment_ids=ids, use_cache=True)
    with pytest.raises(ValueError, match="position_ids has shape"):
        model(ids, position_ids=torch.arange(4))
    with pytest.raises(ValueError, match="expected integers"):
        model(ids, position_ids=torch.arange(5.0))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="5 columns: expected 10"):
        model(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1]] * 2), past_key_values=cache)


@pytest.mark.parametrize("name", ["pope-uniform", "rope-id", "alibi", "learned"])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_decoding_step(make, prompts, name, form):
    """One graph serves every step with a static cache, padding included."""
    model = make(name, cache_form=form)
    plain = generate(model, *prompts, use_cache=False)
    torch._dynamo.reset()
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    ids, mask = prompts
    cache = StaticCache(config=model.config, max_cache_len=9 + NEW)
    padded = torch.nn.functional.pad(mask, (0, NEW), value=1)
    step = torch.compile(model, backend=count, fullgraph=True, dynamic=False)
    with torch.no_grad():
        token = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens = [token]
        for position in range(9, 9 + NEW - 1):
            at = mask.sum(1, keepdim=True) + position - 9
            out = step(token, attention_mask=padded, position_ids=at, past_key_values=cache)
            token = out.logits.argmax(-1)
            tokens.append(token)
    assert torch.equal(torch.cat(tokens, 1), plain[:, 9:])
    assert graphs == 1
