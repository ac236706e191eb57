"""Bad input: one clear line that names the argument, as a `ValueError`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import whatwhere as ww
from whatwhere.encodings import options

H, D, T = 4, 8, 6


def make(name: str, **given: Any) -> ww.Encoding:
    return ww.make(name, **{"head_dim": D, "num_heads": H, "train_length": 128, **given})


def attend(spec: ww.ScoreSpec | None = None, **given: Any) -> torch.Tensor:
    """A good call, with arguments replaced."""
    call: dict[str, Any] = {
        "q": torch.randn(2, H, T, D),
        "k": torch.randn(2, 2, T, D),
        "v": torch.randn(2, 2, T, D),
        "spec": make("rope")() if spec is None else spec,
        **given,
    }
    return ww.attention(**call)


def load(encoding: nn.Module, **state: torch.Tensor) -> None:
    encoding.load_state_dict(state)


def two_axes() -> ww.ScoreSpec:
    return ww.PoPE(D, H, axes=(4, 4))()


row, batch_row = torch.arange(T), torch.arange(T).expand(2, T)

# What is done: the words its message must hold.
BAD: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    # making encodings
    "unknown encoding": (lambda: make("pop"), ("pop", *ww.ENCODINGS)),
    "unknown option": (lambda: make("pope", fracton=0.5), ("fracton", "fraction", "delta")),
    "an option of another": (lambda: make("rope", delta="zero"), ("delta", "rope", "fraction")),
    "no factor": (lambda: make("yarn"), ("factor", "yarn")),
    "no train_length": (
        lambda: ww.make("rope-id", head_dim=D, num_heads=H),
        ("train_length", "rope-id"),
    ),
    "head_dim 0": (lambda: make("nope", head_dim=0), ("head_dim=0",)),
    "head_dim float": (lambda: make("nope", head_dim=8.0), ("head_dim=8.0",)),
    "num_heads 0": (lambda: make("pope", num_heads=0), ("num_heads=0",)),
    "odd head_dim for rope": (lambda: make("rope", head_dim=7), ("head_dim=7", "even")),
    "odd head_dim for rope-id": (lambda: make("rope-id", head_dim=7), ("head_dim=7", "even")),
    "odd head_dim for rope-high": (lambda: make("rope-high", head_dim=7), ("head_dim=7",)),
    "odd head_dim for yarn": (lambda: make("yarn", head_dim=7, factor=2), ("head_dim=7", "even")),
    "fraction of nothing": (lambda: make("rope", fraction=0.1), ("fraction=0.1", "no channel")),
    "fraction of nothing, pope": (lambda: make("pope", fraction=0.01), ("fraction", "no channel")),
    "fraction of nothing, rope-id": (
        lambda: make("rope-id", head_dim=2, fraction=0.1),
        ("fraction", "no channel"),
    ),
    "fraction of nothing, pope-id": (
        lambda: make("pope-id", fraction=0.01),
        ("fraction", "no channel"),
    ),
    "fraction of no heads": (lambda: make("alibi", fraction=0.1), ("fraction", "no head")),
    "fraction 0": (lambda: make("rope", fraction=0.0), ("fraction=0",)),
    "fraction 2": (lambda: make("pope", fraction=2), ("fraction=2",)),
    "fraction -1": (lambda: make("alibi", fraction=-1), ("fraction=-1",)),
    "fraction nan": (lambda: make("rope", fraction=float("nan")), ("fraction=nan",)),
    "base 1": (lambda: make("rope", base=1.0), ("base=1",)),
    "base negative": (lambda: make("pope", base=-3.0), ("base=-3",)),
    "base inf": (lambda: make("sinusoidal", base=float("inf")), ("base=inf",)),
    "factor below 1": (lambda: make("yarn", factor=0.5), ("factor=0.5",)),
    "yarn length 0": (lambda: make("yarn", factor=2, train_length=0), ("train_length=0",)),
    "no band": (lambda: make("rope-id", train_length=64), ("train_length=64", "64")),
    "no band, pope-id": (lambda: make("pope-id", train_length=64), ("train_length=64",)),
    "no band, rope-high": (lambda: make("rope-high", train_length=1), ("train_length=1",)),
    "delta": (lambda: make("pope", delta="ones"), ("delta='ones'", "zero", "uniform")),
    "magnitude": (lambda: make("pope", magnitude="exp"), ("magnitude='exp'", "softplus")),
    "rest": (lambda: make("pope-id", rest="none"), ("rest='none'", "magnitude", "raw")),
    "axes too many": (lambda: make("pope", axes=(8, 8)), ("axes=(8, 8)", "head_dim=8")),
    "axes odd": (lambda: make("rope", axes=(3, 3)), ("axes=(3, 3)", "2")),
    "axes zero": (lambda: make("pope", axes=(0, 8)), ("axes=(0, 8)",)),
    "axes none": (lambda: make("pope", axes=()), ("axes",)),
    "axes and fraction": (lambda: make("rope", axes=(4, 4), fraction=0.5), ("axes", "fraction")),
    "axes and temperature": (
        lambda: make("rope", axes=(4, 4), temperature_length=9)(),
        ("temperature_length",),
    ),
    "temperature_length 0": (
        lambda: make("nope", temperature_length=0),
        ("temperature_length=0",),
    ),
    "scale": (lambda: make("nope", scale=-1.0)(), ("scale=-1",)),
    "odd sinusoid": (lambda: make("sinusoidal", embedding_dim=7), ("embedding_dim=7", "even")),
    "learned nothing": (lambda: ww.make("learned", head_dim=D, num_heads=H), ("max_length",)),
    "learned 0": (lambda: make("learned", max_length=0), ("max_length=0",)),
    # using them
    "beyond a learned table": (
        lambda: make("learned", max_length=10).embed(torch.tensor([0, 10])),
        ("10", "9"),
    ),
    "below a learned table": (
        lambda: make("learned", max_length=10).embed(torch.tensor([[-1, 3]])),
        ("-1", "9"),
    ),
    "float positions, learned": (lambda: make("learned").embed(torch.ones(3)), ("positions",)),
    "float positions, sinusoidal": (
        lambda: make("sinusoidal").embed(torch.ones(3)),
        ("positions", "float32"),
    ),
    "delta of other heads": (
        lambda: load(ww.PoPE(D, H), delta=torch.zeros(2 * H, D)),
        ("delta", "(8, 8)", "(4, 8)"),
    ),
    "delta of other channels": (
        lambda: load(ww.PoPEID(D, H, train_length=128), delta=torch.zeros(H, D)),
        ("delta", "(4, 8)", "(4, 4)"),
    ),
    "delta deep in a model": (
        lambda: nn.ModuleDict({"layer": ww.PoPE(D, H)}).load_state_dict(
            {"layer.delta": torch.zeros(H, D + 1)}
        ),
        ("layer.delta", "(4, 9)"),
    ),
    # attention
    "q of 3 axes": (lambda: attend(q=torch.randn(2, T, D)), ("q ", "(2, 6, 8)")),
    "q of integers": (lambda: attend(q=torch.ones(2, H, T, D).long()), ("q ", "int64")),
    "k of another batch": (lambda: attend(k=torch.randn(3, 2, T, D)), ("k ", "batch")),
    "k of another width": (lambda: attend(k=torch.randn(2, 2, T, D + 1)), ("k ", "head_dim")),
    "v of another length": (lambda: attend(v=torch.randn(2, 2, T + 1, D)), ("v ", "length")),
    "v of other heads": (lambda: attend(v=torch.randn(2, 4, T, D)), ("v ", "heads")),
    "heads": (
        lambda: attend(k=torch.randn(2, 3, T, D), v=torch.randn(2, 3, T, D)),
        ("4", "3", "heads"),
    ),
    "no key heads": (
        lambda: attend(k=torch.randn(2, 0, T, D), v=torch.randn(2, 0, T, D)),
        ("heads",),
    ),
    "dtypes": (lambda: attend(k=torch.randn(2, 2, T, D).double()), ("dtype", "float64")),
    "phase of other heads": (
        lambda: attend(ww.PoPE(D, 2 * H)()),
        ("8", "4", "heads"),
    ),
    "slopes of other heads": (lambda: attend(ww.ALiBi(D, 2)()), ("slopes", "2", "4")),
    "spec of a wider head": (lambda: attend(ww.RoPE(2 * D, H)()), ("head_dim=8", "16")),
    "polar spec of a wider head": (lambda: attend(ww.PoPE(2 * D, H)()), ("head_dim=8", "16")),
    "float query_positions": (
        lambda: attend(query_positions=row.float(), key_positions=row),
        ("query_positions", "float32"),
    ),
    "half key_positions": (
        lambda: attend(key_positions=row.bfloat16()),
        ("key_positions", "bfloat16"),
    ),
    "bool positions": (lambda: attend(key_positions=row > 3), ("key_positions", "bool")),
    "complex positions": (
        lambda: attend(query_positions=row.to(torch.complex64)),
        ("query_positions", "complex"),
    ),
    "too few positions": (lambda: attend(query_positions=row[1:]), ("query_positions", "(5,)")),
    "positions of another batch": (
        lambda: attend(key_positions=row.expand(3, T)),
        ("key_positions", "(3, 6)"),
    ),
    "positions of 4 axes": (
        lambda: attend(key_positions=row.view(1, 1, 1, T)),
        ("key_positions", "(1, 1, 1, 6)"),
    ),
    "one axis for two": (
        lambda: attend(two_axes(), query_positions=row, key_positions=row),
        ("query_positions", "(6,)"),
    ),
    "no positions for two axes": (lambda: attend(two_axes()), ("query_positions", "grid")),
    "causal of two axes": (lambda: attend(two_axes(), causal=True), ("causal", "axis")),
    "more queries than keys": (
        lambda: attend(q=torch.randn(2, H, T + 1, D), causal=True),
        ("query_positions", "7", "6"),
    ),
    "key_mask of floats": (lambda: attend(key_mask=torch.ones(2, T)), ("key_mask", "float32")),
    "key_mask of one row": (
        lambda: attend(key_mask=torch.ones(T, dtype=torch.bool)),
        ("key_mask", "(2, 6)"),
    ),
    "key_mask T x S": (
        lambda: attend(key_mask=torch.ones(T, T, dtype=torch.bool)),
        ("key_mask", "(2, 6)"),
    ),
    "segments of floats": (lambda: attend(segments=batch_row.float()), ("segments", "float32")),
    "segments of one row": (lambda: attend(segments=row), ("segments", "(2, 6)")),
    "more queries than segments": (
        lambda: attend(
            q=torch.randn(2, H, T + 1, D),
            query_positions=torch.arange(T + 1),
            segments=batch_row,
        ),
        ("segments", "7", "6"),
    ),
    "window 0": (lambda: attend(causal=True, window=0), ("window=0",)),
    "window not causal": (lambda: attend(window=3), ("window=3", "causal")),
    "unknown backend": (lambda: attend(backend="cudnn"), ("cudnn", "auto", *ww.BACKENDS)),
    # the rest
    "float positions to encode": (
        lambda: ww.encode_keys(torch.randn(1, 1, T, D), make("rope")(), row.double()),
        ("positions", "float64"),
    ),
    "wide spec to encode": (
        lambda: ww.encode_keys(torch.randn(1, 1, T, D), ww.RoPE(2 * D, H)(), row),
        ("head_dim",),
    ),
    "too few positions to encode": (
        lambda: ww.encode_queries(torch.randn(1, H, T, D), make("rope")(), row[1:]),
        ("positions",),
    ),
    "phase of other heads to encode": (
        lambda: ww.encode_queries(torch.randn(1, H, T, D), ww.PoPE(D, 3)(), row),
        ("heads",),
    ),
    "one position for all to encode": (
        lambda: ww.encode_queries(torch.randn(1, H, T, D), make("rope")(), row[:1]),
        ("positions",),
    ),
    "one head's phase for all to encode": (
        lambda: ww.encode_queries(torch.randn(1, H, T, D), ww.PoPE(D, 1)(), row),
        ("heads",),
    ),
    "positions of another batch to encode": (
        lambda: ww.encode_keys(torch.randn(1, H, T, D), make("rope")(), batch_row),
        ("positions",),
    ),
    "grid of nothing": (lambda: ww.grid(), ("sizes",)),
    "grid of zero": (lambda: ww.grid(3, 0), ("sizes", "0")),
    "table of less than nothing": (lambda: ww.table_bytes(make("rope"), -1), ("length=-1",)),
}


@pytest.mark.parametrize("label", BAD)
def test_message_is_one_line_that_names_the_argument(label: str) -> None:
    act, words = BAD[label]
    with pytest.raises(ValueError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", ww.ENCODINGS)
def test_unknown_option_lists_every_valid_one(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        ww.make(name, head_dim=D, num_heads=H, train_length=128, colour="red")
    for option in ("colour", name, *options(name)):
        assert option in str(caught.value)


@pytest.mark.parametrize(
    "wrong, right", [("rop", "rope"), ("popeid", "pope-id"), ("Yarn", "yarn")]
)
def test_unknown_name_suggests_a_near_one(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"mean '{right}'"):
        make(wrong)


def test_unsupported_is_a_value_error_that_says_what_can() -> None:
    assert issubclass(ww.UnsupportedError, ValueError)
    empty = torch.randn(0, H, T, D)
    with pytest.raises(ww.UnsupportedError, match="flex") as caught:
        attend(q=empty, k=empty, v=empty, backend="flex")
    assert "\n" not in str(caught.value)
    assert "reference" in str(caught.value)


def test_a_failed_load_changes_nothing() -> None:
    encoding = ww.PoPE(D, H, delta="uniform")
    before = encoding.delta.detach().clone()
    with pytest.raises(ValueError, match="delta"):
        load(encoding, delta=torch.zeros(1, 1))
    assert torch.equal(encoding.delta, before)
