"""`trace` as a whole: its tables, its promises about the model, and what it refuses."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pandas as pd
import pytest
import torch
from observed_cases import own, tokens, unconverted

from whatwhere.analysis import (
    NotFiniteError,
    Seen,
    Trace,
    attention_weights,
    centroid_cosine,
    observed,
    stable_rank,
    trace,
)

LENGTHS = (10, 25, 40)


def frames(found: Trace) -> dict[str, pd.DataFrame]:
    names = ("geometry", "clusters", "scores", "frequency_usage", "what_where", "points")
    return {name: getattr(found, name)() for name in names}


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_tables_have_a_row_for_everything(family: str) -> None:
    model = unconverted(family)
    found = trace(model, tokens(), LENGTHS, points=5)
    layers, heads, groups = 2, 4, found.layers[0].key_heads
    channels = len(found.layers[0].frequencies)
    expected = {
        "geometry": layers * (heads + groups) * 2 * 3,
        "clusters": layers * heads * 2 * 3,
        "scores": layers * heads * 2 * 3,
        "frequency_usage": layers * (heads + groups) * channels,
        "what_where": layers * heads,
        "points": layers * heads * 2 * (2 * 5 + 1),
    }
    for name, frame in frames(found).items():
        assert len(frame) == expected[name], name
        assert not frame.isna().any().any(), name
        assert not frame.duplicated(
            [c for c in frame.columns if frame[c].dtype != float or c == "frequency"]
        ).any()
    assert found.lengths == LENGTHS and (found.texts, found.tokens) == (2, 40)
    assert found.train_length == model.config.max_position_embeddings
    assert found.scores()["queries"].head(3).tolist() == [10, 15, 15]


def test_rows_say_of_what_they_are() -> None:
    model, ids = unconverted("llama"), tokens(batch=1)
    shown: list[Seen] = []
    found = trace(model, ids, LENGTHS)
    with torch.no_grad(), observed(model, shown.append):
        model(ids, use_cache=False)
    one = shown[1]
    clouds = {
        ("query", "before"): one.queries_before,
        ("query", "after"): one.queries,
        ("key", "before"): one.keys_before,
        ("key", "after"): one.keys,
    }
    table = found.geometry().set_index(["layer", "side", "stage", "head", "length"])
    for (side, stage), cloud in clouds.items():
        for head in range(cloud.shape[1]):
            for n in LENGTHS:
                rank = float(stable_rank(cloud[0, head, :n]))
                assert table["stable_rank"][1, side, stage, head, n] == pytest.approx(rank)
    pairs = found.clusters().set_index(["layer", "stage", "head", "length"])
    for stage in ("before", "after"):
        keys, queries = clouds["key", stage], clouds["query", stage]
        for head, n in product(range(4), LENGTHS):
            cosine = centroid_cosine(keys[0, head // 2, :n], queries[0, head, :n])
            assert pairs["centroid_cosine"][1, stage, head, n] == pytest.approx(float(cosine))
    scored = found.scores().set_index(["layer", "stage", "head", "length"])
    weights = attention_weights(model, ids)[1][0]
    for head in range(4):
        mean = float(weights[head, LENGTHS[0] : LENGTHS[1], 0].mean())
        assert scored["sink_mass"][1, "after", head, LENGTHS[1]] == pytest.approx(mean)


def test_points_are_put_to_the_first_length_that_holds_them() -> None:
    found = trace(own("rope"), tokens(), LENGTHS, points=40).points()
    real = found[found["side"] != "origin"]
    expected = real["position"].map(lambda p: next(n for n in LENGTHS if p < n))
    assert (real["length"] == expected).all()
    assert trace(own("rope"), tokens(), points=0).points().empty


@pytest.mark.parametrize("make", [lambda: own("pope"), lambda: unconverted("gemma3_text")])
def test_one_pass_serves_all_lengths(make: Any) -> None:
    model, ids = make().double(), tokens()
    whole = frames(trace(model, ids, LENGTHS))
    for n in LENGTHS:
        alone = frames(trace(model, ids[:, :n], [m for m in LENGTHS if m <= n]))
        for name in ("geometry", "clusters", "scores"):
            part = whole[name][whole[name]["length"] <= n].reset_index(drop=True)
            # Stock models take their softmax in float32.
            pd.testing.assert_frame_equal(part, alone[name], rtol=1e-5, atol=1e-6)


def test_batches_do_not_matter() -> None:
    model, ids = own("rope").double(), tokens(batch=3)
    one, all_ = (
        frames(trace(model, ids, LENGTHS)),
        frames(trace(model, ids, LENGTHS, batch_size=3)),
    )
    for name, frame in one.items():
        pd.testing.assert_frame_equal(frame, all_[name], rtol=1e-9, atol=1e-12)


def test_measures_are_means_over_texts() -> None:
    model, ids = own("pope").double(), tokens(batch=2)
    both = frames(trace(model, ids, LENGTHS))
    parts = [frames(trace(model, text, LENGTHS)) for text in ids]
    for name in ("geometry", "clusters", "scores", "frequency_usage", "what_where"):
        numbers = both[name].select_dtypes("float")
        expected = sum(part[name][numbers.columns] for part in parts) / 2
        pd.testing.assert_frame_equal(numbers, expected, rtol=1e-9, atol=1e-12)


def test_the_model_is_left_as_it_was() -> None:
    model, ids = own("pope"), tokens()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps: list[int] = []
    trace(model, ids, batch_size=1, progress=steps.append)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert steps == [1, 2, 3, 4]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_in_training_is_traced_without_dropout() -> None:
    model, ids = own("pope", dropout=0.5), tokens()
    expected = trace(model, ids).geometry()
    pd.testing.assert_frame_equal(trace(model.train(), ids).geometry(), expected)
    assert model.training


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        (torch.zeros(2, 5), None, "input_ids is a tensor of torch.float32"),
        ([[1, 2]], None, "input_ids is a list"),
        (torch.zeros(1, 1, dtype=torch.long), None, r"\(1, 1\): expected"),
        (torch.zeros(1, 2, 3, dtype=torch.long), None, r"\(1, 2, 3\): expected"),
        (tokens(), (1, 20), r"lengths=\[1, 20\]: expected 2 to 40"),
        (tokens(), (20, 41), r"lengths=\[20, 41\]: expected 2 to 40"),
        (tokens() + 30, None, "vocabulary of 50"),
        (tokens() - 30, None, "vocabulary of 50"),
    ],
)
def test_what_does_not_fit_is_refused(ids: Any, lengths: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(own("rope"), ids, lengths)


@pytest.mark.parametrize("make", [lambda: own("learned"), lambda: unconverted("gpt2")])
def test_lengths_beyond_a_table_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"129 tokens.*ends at 128"):
        trace(make(), tokens(length=129))


def test_nan_after_the_last_layer_is_named_too() -> None:
    model = unconverted("llama")
    with torch.no_grad():
        model.base_model.layers[-1].mlp.down_proj.weight[0, 0] = math.inf
    with pytest.raises(NotFiniteError, match=r"follows the last .*1\.mlp\.down_proj"):
        trace(model, tokens())


def test_one_text_needs_no_axis() -> None:
    ids = tokens(batch=1)
    one, two = trace(own("rope"), ids[0]), trace(own("rope"), ids)
    pd.testing.assert_frame_equal(one.scores(), two.scores())
