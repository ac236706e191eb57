"""Mistakes of type and device are told in one line; devices of a spec follow the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import whatwhere as ww
from encoding_cases import REQUIRED

T, D, H = 6, 8, 4


def make(name: str = "rope", **options: Any) -> ww.Encoding:
    given = {"head_dim": D, "num_heads": H, "train_length": 128, **REQUIRED.get(name, {})}
    return ww.make(name, **{**given, **options})


def attend(**given: Any) -> torch.Tensor:
    q, k, v = torch.randn(2, H, T, D), torch.randn(2, 2, T, D), torch.randn(2, 2, T, D)
    return ww.attention(**{"q": q, "k": k, "v": v, "spec": make()(), **given})


def spec(**fields: Any) -> ww.ScoreSpec:
    return ww.ScoreSpec(**{"feature": "identity", "scale": 1.0, **fields})


row = torch.arange(T)
keys = torch.randn(2, H, T, D)
turns = torch.ones(1, D, dtype=torch.float64)

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "fraction of text": (lambda: make(fraction="0.5"), "fraction='0.5'"),
    "fraction of text, alibi": (lambda: make("alibi", fraction="1"), "fraction='1'"),
    "fraction of bool": (lambda: make("pope", fraction=True), "fraction=True"),
    "base of text": (lambda: make(base="1e4"), "base='1e4'"),
    "scale of text": (lambda: make(scale="1"), "scale='1'"),
    "factor of text": (lambda: make("yarn", factor="2"), "factor='2'"),
    "beta of text": (lambda: make("yarn", beta_fast="32"), "beta_fast='32'"),
    "beta without end": (lambda: make("yarn", beta_fast=float("inf")), "beta_fast=inf"),
    "axes of one number": (lambda: make("pope", axes=8), "axes=8"),
    "axes of floats": (lambda: make("rope", axes=(4.0, 4.0)), "axes=(4.0, 4.0)"),
    "one axis and fraction": (lambda: make("pope", axes=4, fraction=0.5), "axes=4"),
    "head_dim 0, pope": (lambda: make("pope", head_dim=0), "head_dim=0"),
    "head_dim of text, pope-id": (lambda: make("pope-id", head_dim="8"), "head_dim='8'"),
    "temperature_length of text": (
        lambda: make(temperature_length="9"),
        "temperature_length='9'",
    ),
    "temperature_length of bool": (
        lambda: make(temperature_length=True),
        "temperature_length=True",
    ),
    "embedding_dim of float": (lambda: make("sinusoidal", embedding_dim=8.0), "embedding_dim=8.0"),
    "max_length of float": (lambda: make("learned", max_length=8.5), "max_length=8.5"),
    "name of nothing": (lambda: ww.make(None, head_dim=D, num_heads=H), "None"),  # type: ignore[arg-type]
    "name of a list": (lambda: ww.make(["rope"], head_dim=D, num_heads=H), "['rope']"),  # type: ignore[arg-type]
    **{
        f"train_length {length!r}, {name}": (
            lambda name=name, length=length: make(name, train_length=length),
            f"train_length={length!r}",
        )
        for name in ("rope-id", "rope-high", "pope-id", "yarn", "learned")
        for length in ("128", 128.5, True)
    },
    "no train_length at all": (
        lambda: ww.RoPEID(D, H, train_length=None),  # type: ignore[arg-type]
        "train_length=None",
    ),
    # specs
    "turning of float": (
        lambda: spec(feature="polar", inv_freq=turns, turning=1.0),
        "turning=1.0",
    ),
    "frequencies of a list": (lambda: spec(feature="rotate", inv_freq=[[1.0]]), "inv_freq"),
    "slopes of a list": (lambda: spec(slopes=[1.0]), "slopes"),
    "spec scale of text": (lambda: spec(scale="1"), "scale='1'"),
    "spec temperature of float": (lambda: spec(temperature_length=8.5), "temperature_length=8.5"),
    # calls
    "an encoding as spec": (lambda: attend(spec=make("pope")), "PoPE"),
    "an encoding as spec, scores": (lambda: ww.scores(keys, keys, make()), "encoding()"),  # type: ignore[arg-type]
    "an encoding as spec, keys": (lambda: ww.encode_keys(keys, make(), row), "encoding()"),  # type: ignore[arg-type]
    "keys of integers": (lambda: ww.encode_keys(keys.long(), make()(), row), "int64"),
    "q of an array": (lambda: attend(q=np.zeros((2, H, T, D))), "q is a ndarray"),
    "no query heads": (lambda: attend(q=torch.randn(2, 0, T, D)), "0 heads"),
    "eight bits": (
        lambda: attend(**{x: keys.to(torch.float8_e4m3fn) for x in ("q", "k", "v")}),
        "float8",
    ),
    "positions of a list": (lambda: attend(query_positions=[*range(T)]), "query_positions"),
    "positions to encode of a list": (
        lambda: ww.encode_queries(keys, make()(), [*range(T)]),  # type: ignore[arg-type]
        "positions",
    ),
    "positions elsewhere": (
        lambda: attend(key_positions=row.to("meta")),
        "key_positions is on meta",
    ),
    "key_mask of a list": (lambda: attend(key_mask=[[True] * T] * 2), "key_mask"),
    "key_mask elsewhere": (
        lambda: attend(key_mask=torch.ones(2, T, dtype=torch.bool, device="meta")),
        "key_mask is on meta",
    ),
    "segments of a list": (lambda: attend(segments=[[0] * T] * 2), "segments"),
    "segments of bools": (lambda: attend(segments=torch.ones(2, T).bool()), "torch.bool"),
    "segments of complex": (lambda: attend(segments=torch.ones(2, T) + 0j), "complex64"),
    "segments elsewhere": (
        lambda: attend(segments=row.expand(2, T).to("meta")),
        "segments is on meta",
    ),
    "window of float": (lambda: attend(causal=True, window=2.5), "window=2.5"),
    "window of bool": (lambda: attend(causal=True, window=True), "window=True"),
    "window of text": (lambda: attend(causal=True, window="3"), "window='3'"),
    "causal of a tensor": (lambda: attend(causal=torch.ones(T, T)), "causal"),
    "causal of text": (lambda: attend(causal="no"), "causal"),
    "backend of a list": (lambda: attend(backend=["sdpa"]), "['sdpa']"),
    "grid of floats": (lambda: ww.grid(3.0, 2), "3.0"),  # type: ignore[arg-type]
    "grid of a tuple": (lambda: ww.grid((3, 2)), "(3, 2)"),  # type: ignore[arg-type]
    "table of a name": (lambda: ww.table_bytes("rope", 8), "'rope'"),  # type: ignore[arg-type]
    "table of half a position": (lambda: ww.table_bytes(make(), 8.5), "length=8.5"),  # type: ignore[arg-type]
    "embedding of a list": (lambda: make("learned").embed([0, 1]), "list"),  # type: ignore[arg-type]
    "embedding of complex": (lambda: make("sinusoidal").embed(row + 0j), "complex64"),
}


@pytest.mark.parametrize("label", BAD)
def test_a_mistake_of_type_or_device_is_told_in_one_line(label: str) -> None:
    act, words = BAD[label]
    with pytest.raises(ValueError) as caught:
        act()
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize("name", ww.ENCODINGS)
def test_numpy_numbers_are_numbers(name: str) -> None:
    encoding = make(name, head_dim=np.int64(D), num_heads=np.int32(H), train_length=np.int64(128))
    assert type(encoding.head_dim) is type(encoding.num_heads) is int
    plain = make(name)
    assert encoding.frequencies == plain.frequencies
    assert [p.shape for p in encoding.parameters()] == [p.shape for p in plain.parameters()]
    assert make(name, scale=np.float32(0.5))().scale == make(name, scale=0.5)().scale


@pytest.mark.parametrize("axes", [[4, 4], (np.int64(4), np.int64(4))])
def test_axes_come_as_any_sequence(axes: Any) -> None:
    assert make("pope", axes=axes).frequencies == make("pope", axes=(4, 4)).frequencies


@pytest.mark.parametrize("name", ww.ENCODINGS)
def test_a_spec_follows_the_call_to_its_device(name: str) -> None:
    q = torch.empty(1, H, T, D, device="meta")
    encoding = make(name)
    for backend in ("reference", "sdpa"):
        assert ww.attention(q, q, q, encoding(), causal=True, backend=backend).is_meta
    there = encoding("meta")
    for tensor in (there.inv_freq, there.phase, there.slopes):
        assert tensor is None or tensor.is_meta


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", ["learned", "sinusoidal"])
def test_embeddings_take_every_integer(name: str, dtype: torch.dtype) -> None:
    encoding = make(name)
    wide, narrow = encoding.embed(row), encoding.embed(row.to(dtype))
    assert wide is not None and narrow is not None
    torch.testing.assert_close(narrow, wide, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_second_derivatives_name_the_backend_that_has_them(backend: str) -> None:
    q = torch.randn(1, H, 32, D, dtype=torch.float64, requires_grad=True)

    def penalty(backend: str) -> torch.Tensor:
        out = ww.attention(q, q, q, make("pope")(), causal=True, backend=backend)
        return torch.autograd.grad(out.pow(2).sum(), q, create_graph=True)[0].pow(2).sum()

    with pytest.raises(RuntimeError, match=r"second derivatives.*backend='reference'"):
        penalty(backend).backward()
    penalty("reference").backward()
    assert q.grad is not None and q.grad.isfinite().all()
