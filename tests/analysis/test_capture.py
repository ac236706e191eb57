"""Observing a model: what it computes stays the same, and what is seen is what it attends by."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from observed_cases import CONVERTIBLE, OTHERS, STOCK, own, tokens, unconverted
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.llama import modeling_llama

import whatwhere as ww
from convert_cases import converted
from whatwhere.analysis import NoAttentionError, NotFiniteError, attention_weights, observed, trace
from whatwhere.analysis.capture import Seen


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, use_cache=False).logits
    return found


def seen_by(model: nn.Module, ids: Tensor) -> list[Seen]:
    found: list[Seen] = []
    with observed(model, found.append):
        logits(model, ids)
    return found


@pytest.mark.parametrize("family", STOCK)
def test_weights_are_the_models_own(family: str) -> None:
    model, ids = unconverted(family), tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False, output_attentions=True).attentions
    found = attention_weights(model, ids)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.double(), atol=1e-5, rtol=0)
        assert float(mine.std()) > 1e-3  # not all alike, which anything would match


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((name, "sdpa") for name in ("llama", "mistral", "qwen3", "gpt_neox", "gemma3_text")),
        ("mistral", "flex_attention"),  # compiles: one family, with a window, will do
    ],
)
def test_kernels_that_keep_no_weights_are_seen_alike(family: str, attention: str) -> None:
    ids = tokens()
    expected = attention_weights(unconverted(family), ids)
    model = unconverted(family, attention)
    for mine, eager in zip(attention_weights(model, ids), expected, strict=True):
        torch.testing.assert_close(mine, eager, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "gpt_neox", "gpt2", "gpt_oss"])
def test_outputs_of_stock_models_stay_to_the_bit(family: str, dtype: torch.dtype) -> None:
    model, ids = unconverted(family).to(dtype), tokens()
    before = logits(model, ids)
    with observed(model, lambda seen: None):
        during = logits(model, ids)
    assert torch.equal(before, during) and torch.equal(before, logits(model, ids))


@pytest.mark.parametrize("encoding", ["pope", "rope", "rope-id", "yarn", "alibi", "nope"])
def test_outputs_of_converted_models_stay_to_the_bit(encoding: str) -> None:
    model, ids = converted("qwen3", encoding), tokens()
    before = logits(model, ids)
    with observed(model, lambda seen: None):
        during = logits(model, ids)
    assert torch.equal(before, during)


@pytest.mark.parametrize("encoding", list(ww.ENCODINGS))
def test_own_models_attend_by_what_is_seen(encoding: str) -> None:
    model, ids = own(encoding, sliding_window=16).double(), tokens()
    before = logits(model, ids)
    shown: list[tuple[Tensor, Tensor, ww.ScoreSpec]] = []
    for block in model.model.blocks:
        block.self_attn.observer = lambda _, q, k, spec, at: shown.append((q, k, spec))
    logits(model, ids)
    for block in model.model.blocks:
        block.self_attn.observer = None
    for (q, k, spec), weights in zip(shown, attention_weights(model, ids), strict=True):
        t = torch.arange(q.shape[2])
        hidden = (t > t[:, None]) | (t <= t[:, None] - 16)
        scores = ww.scores(q, k, spec).masked_fill(hidden, -math.inf)
        torch.testing.assert_close(weights, scores.softmax(-1), atol=1e-12, rtol=0)
    assert torch.equal(before, logits(model, ids))
    assert all(block.self_attn.observer is None for block in model.model.blocks)


@pytest.mark.parametrize("encoding", ["pope", "pope-id", "rope", "rope-id", "yarn", "alibi"])
@pytest.mark.parametrize("family", CONVERTIBLE)
def test_converted_layers_give_the_scores_of_their_encoding(family: str, encoding: str) -> None:
    model, ids = converted(family, encoding).double(), tokens()
    for seen in seen_by(model, ids):
        encoding_of_layer = seen.layer.encoding
        assert encoding_of_layer is not None
        spec = encoding_of_layer()
        spec = replace(spec, softcap=seen.softcap)
        # A converted model keeps its own pairs; those of a spec are channels c and c + R.
        first, second = zip(*seen.layer.pairs, strict=True) if seen.layer.pairs else ((), ())
        rest = [c for c in range(seen.layer.head_dim) if c not in (*first, *second)]
        order = [*first, *second, *rest]
        # `before` are magnitudes already where the score is polar.
        before = (seen.queries_before[..., order], seen.keys_before[..., order])
        expected = ww.scores(*before, spec.unturned())
        shared = seen.queries.shape[1] // seen.keys.shape[1]
        found = seen.queries @ seen.keys.repeat_interleave(shared, 1).mT * seen.scale
        if seen.softcap is not None:
            found = seen.softcap * torch.tanh(found / seen.softcap)
        if seen.slopes is not None:
            t = torch.arange(found.shape[-1])
            found = found - seen.slopes[:, None, None] * (t[:, None] - t)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("family", "count", "first"),
    [("llama", 4, (0, 4)), ("gpt_neox", 1, (0, 1)), ("cohere", 4, (0, 1)), ("glm", 2, (0, 1))],
)
def test_rotations_are_read_off_what_they_do(
    family: str, count: int, first: tuple[int, int]
) -> None:
    model = unconverted(family)
    seen = seen_by(model, tokens(length=100))[0]
    inv_freq = model.base_model.rotary_emb.inv_freq.double()
    assert len(seen.layer.frequencies) == count and seen.layer.pairs[0] == first
    found = torch.tensor(seen.layer.frequencies, dtype=torch.float64)
    torch.testing.assert_close(found, inv_freq, rtol=1e-5, atol=0)
    # The pairs are right if turning what was before gives what is after.
    angles = torch.arange(100)[:, None] * found
    turned = seen.queries_before.double().clone()
    for channel, (a, b) in enumerate(seen.layer.pairs):
        x, y = (seen.queries_before[..., side].double() for side in (a, b))
        cos, sin = angles[:, channel].cos(), angles[:, channel].sin()
        turned[..., a], turned[..., b] = x * cos - y * sin, y * cos + x * sin
    torch.testing.assert_close(turned, seen.queries.double(), atol=1e-4, rtol=1e-4)


def test_rotations_in_low_precision_keep_their_frequencies() -> None:
    model = unconverted("llama").to(torch.bfloat16)
    seen = seen_by(model, tokens(length=120))[0]
    # Those that the model has now: casting it rounds its frequencies, and this is to show it.
    expected = model.base_model.rotary_emb.inv_freq.double()
    assert not torch.equal(expected, unconverted("llama").base_model.rotary_emb.inv_freq.double())
    found = torch.tensor(seen.layer.frequencies, dtype=torch.float64)
    # cos and sin are rounded to 2^-9; the last step divides that by a lag of 64 positions.
    assert float((found - expected).abs().max()) < 2**-8 / 64


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_windows_of_stock_layers_are_known(attention: str) -> None:
    model = unconverted("mistral", attention)
    for seen in seen_by(model, tokens()):
        assert seen.window == seen.layer.window == model.config.sliding_window
    model = unconverted("gemma3_text", attention)
    kinds = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert [seen.window is not None for seen in seen_by(model, tokens())] == kinds
    assert any(kinds) and not all(kinds)


@pytest.mark.parametrize("family", ["deepseek_v3", "hunyuan_v1_dense"])
def test_unknown_rotations_are_said_to_be(family: str) -> None:
    seen = seen_by(unconverted(family), tokens())[0]
    assert seen.layer.feature == "unknown"


def test_layers_that_turn_nothing_are_seen_as_such() -> None:
    model = unconverted("smollm3")  # its first layer has no rotation in this test's config
    features = {seen.layer.feature for seen in seen_by(model, tokens())}
    assert features == {"identity", "rotate"}
    assert seen_by(unconverted("gpt2"), tokens())[0].layer.feature == "identity"


class _StopError(Exception):
    """Raised by an observer."""


def test_nothing_is_left_behind_whatever_happens() -> None:
    model, ids = unconverted("llama", "sdpa"), tokens()
    names: dict[str, Any] = vars(modeling_llama)
    before = (names["ALL_ATTENTION_FUNCTIONS"], names["apply_rotary_pos_emb"])
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    def stop(seen: Seen) -> None:
        raise _StopError

    with pytest.raises(_StopError), observed(model, stop):
        logits(model, ids)
    mine = own("pope")
    with pytest.raises(_StopError), observed(mine, stop):
        logits(mine, ids)
    assert all(block.self_attn.observer is None for block in mine.model.blocks)
    assert before == (names["ALL_ATTENTION_FUNCTIONS"], names["apply_rotary_pos_emb"])
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_other_models_of_the_family_are_not_observed() -> None:
    model, other, ids = unconverted("llama"), unconverted("llama"), tokens()
    found: list[Seen] = []
    with observed(model, found.append):
        logits(other, ids)
    assert not found


def test_threads_do_not_see_one_another() -> None:
    ids, models = tokens(length=128), [unconverted("llama", "sdpa") for _ in range(3)]
    names: dict[str, Any] = vars(modeling_llama)
    before = (names["ALL_ATTENTION_FUNCTIONS"], names["apply_rotary_pos_emb"])
    expected, over = trace(models[0], ids).clusters(), threading.Event()

    def run_on() -> None:
        while not over.is_set():
            logits(models[2], ids)

    with ThreadPoolExecutor() as pool:
        other = pool.submit(run_on)
        try:
            found = [pool.submit(trace, model, ids) for model in models[:2] * 4]
            tables = [one.result().clusters() for one in found]
        finally:
            over.set()
        other.result()
    assert all(table.equals(expected) for table in tables)
    assert before == (names["ALL_ATTENTION_FUNCTIONS"], names["apply_rotary_pos_emb"])


@pytest.mark.parametrize("place", ["self_attn.k_proj", "mlp.up_proj"])
def test_nan_is_named_by_layer_and_by_weight(place: str) -> None:
    model = unconverted("llama")
    layer = model.base_model.layers[0 if place.startswith("mlp") else 1]
    with torch.no_grad():
        layer.get_submodule(place).weight[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=rf"attention layer 1 .*{place}"):
        seen_by(model, tokens())


def test_models_without_attention_of_transformers_are_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(NoAttentionError, match="BloomForCausalLM"), observed(model, print):
        pass
    with pytest.raises(NoAttentionError, match="Linear"), observed(nn.Linear(2, 2), print):
        pass
    with pytest.raises(ValueError, match="model is a str"), observed("gpt2", print):  # type: ignore[arg-type]
        pass


def test_padded_batches_of_ours_are_refused() -> None:
    model, ids = own("rope"), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="padded"), observed(model, lambda seen: None):
        model(ids, attention_mask=mask)


def test_every_family_of_others_is_covered() -> None:
    assert set(OTHERS) < set(STOCK)
