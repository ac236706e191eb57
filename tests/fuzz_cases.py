"""Random attention calls: what hypothesis draws (`Case`), and the tensors made from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import whatwhere as ww
from encoding_cases import REQUIRED, TRAIN_LENGTH
from fuzz_layouts import LAYOUTS, NAN
from whatwhere.encodings import options

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LEARNED = ("q", "k", "v", "phase", "slopes")


@dataclass(frozen=True)
class Case:
    """A call, in plain values: what is printed is what an ``@example`` needs.

    Attributes:
        seed: Of all numbers.
        name: In `whatwhere.ENCODINGS`.
        given: Options of the encoding, as pairs.
        form: ``"raw"``, ``"unturned"`` or ``"encoded"`` queries and keys.
        slopes: Whether slopes are added to whatever the encoding is.
        softcap: Of the scores.
        dtype: Of queries, keys and values.
        learned: Dtype of phase and slopes.
        batch: ``B``.
        shared: ``G``.
        groups: ``H / G``.
        length: ``T``.
        total: ``S``.
        dim: Channels that the encoding was made for; 2 to 1 where it rotates pairs.
        extra: Channels beyond those.
        width: ``V``.
        size: Of the numbers in queries and keys.
        layouts: Of q, k, v in memory (`LAYOUTS`).
        causal: As for `whatwhere.attention`.
        window: Likewise.
        hidden: Kind of key mask (`hide`).
        poison: Whether keys that are masked, or come after every query, are NaN.
        documents: Kind of segments (`document`).
        given_at: Which positions are given: ``""``, ``"q"``, ``"k"`` or ``"qk"``.
        places: Kind of positions (`place`).
        by_batch: Whether each sequence has positions of its own.
        index: Dtype of positions and segments.
        wanted: Of which tensors gradients are wanted.
        flow: Layout of the gradient that comes in.
    """

    seed: int = 0
    name: str = "pope"
    given: tuple[tuple[str, Any], ...] = ()
    form: str = "raw"
    slopes: bool = False
    softcap: float | None = None
    dtype: str = "float64"
    learned: str = "float32"
    batch: int = 1
    shared: int = 1
    groups: int = 1
    length: int = 3
    total: int = 3
    dim: int = 4
    extra: int = 0
    width: int = 3
    size: float = 1.0
    layouts: tuple[str, str, str] = ("plain", "plain", "plain")
    causal: bool = False
    window: int | None = None
    hidden: str = ""
    poison: bool = False
    documents: str = ""
    given_at: str = ""
    places: str = "run"
    by_batch: bool = False
    index: str = "int64"
    wanted: tuple[str, ...] = ()
    flow: str = "plain"


def place(kind: str, rng: np.random.Generator, size: tuple[int, ...], total: int) -> np.ndarray:
    """Positions ``(rows, length)`` or ``(rows, length, A)`` among those of ``total`` keys."""
    rows, length = size[:2]
    start = int(rng.integers(0, 9))
    if kind == "run" and len(size) == 2:
        return np.tile(np.arange(total - length, total) + start, (rows, 1))
    if kind == "shuffled" and len(size) == 2:
        span = np.arange(max(total, length)) + start
        return np.stack([rng.permutation(span)[:length] for _ in range(rows)] or [span[:length]])
    if kind == "gaps":
        return np.sort(rng.integers(0, 4 * total + 1, size), axis=1)
    if kind == "negative":
        return rng.integers(-total, total + 1, size)
    if kind == "huge":
        return 2**24 - rng.integers(0, 2 * total + 2, size)
    return rng.integers(0, total // 2 + 2, size)


def hide(kind: str, rng: np.random.Generator, batch: int, total: int) -> np.ndarray:
    """A key mask."""
    seen = rng.random((batch, total)) < (0.9 if kind == "few" else 0.5)
    if kind == "none":
        seen[:] = False
    elif kind == "one":
        seen[:] = np.arange(total) == int(rng.integers(0, max(total, 1)))
    elif kind == "padding":
        seen[:] = np.arange(total) >= rng.integers(0, total + 1, (batch, 1))
    if kind != "padding":
        seen[:1] &= kind != "blind"
    return seen


def document(kind: str, rng: np.random.Generator, batch: int, total: int) -> np.ndarray:
    """Segments."""
    if kind == "sorted":
        return np.cumsum(rng.random((batch, total)) < 0.3, axis=1)
    if kind == "negative":
        return rng.integers(-100, 0, (batch, total)) // 40
    return rng.integers(0, 3, (batch, total))


@dataclass(frozen=True)
class Made:
    """Tensors of a case.

    Attributes:
        held: q, k, v as they lie in memory.
        show: From there to ``(B, heads, length, channels)``.
        shapes: What they are shown as.
        spec: The score.
        call: Keyword arguments of `whatwhere.attention`.
        flow: The gradient that comes in.
    """

    held: tuple[Tensor, Tensor, Tensor]
    show: tuple[Callable[..., Tensor], ...]
    shapes: tuple[tuple[int, ...], ...]
    spec: ww.ScoreSpec
    call: dict[str, Any]
    flow: Tensor

    def shown(self) -> tuple[Tensor, ...]:
        return tuple(
            see(x, shape) for see, x, shape in zip(self.show, self.held, self.shapes, strict=True)
        )


def pairs_only(name: str) -> bool:
    """Whether an encoding wants an even number of channels."""
    try:
        ww.make(name, head_dim=3, num_heads=1, train_length=TRAIN_LENGTH, **REQUIRED.get(name, {}))
    except ValueError:
        return True
    return False


EVEN = {name for name in ww.ENCODINGS if pairs_only(name)}


def spec_of(case: Case, rng: np.random.Generator) -> ww.ScoreSpec:
    heads = case.shared * case.groups
    encoding = ww.make(
        case.name,
        head_dim=case.dim,
        num_heads=heads,
        train_length=TRAIN_LENGTH,
        **{**REQUIRED.get(case.name, {}), **dict(case.given)},
    )
    with torch.no_grad():
        spec = encoding()
    changes: dict[str, Any] = {"softcap": case.softcap}
    if spec.phase is not None:
        phase = -rng.random(tuple(spec.phase.shape)) * 2 * math.pi
        changes["phase"] = torch.from_numpy(phase).to(DTYPES[case.learned])
    slopes = spec.slopes
    if case.slopes and spec.num_axes == 1:
        slopes = torch.from_numpy(rng.random(heads) - 0.2)
    if slopes is not None:
        changes["slopes"] = slopes.to(DTYPES[case.learned])
    return replace(spec, **changes)


def make(case: Case) -> Made:
    """The tensors of a case; ValueError where options contradict one another."""
    rng = np.random.default_rng(case.seed)
    spec, dtype = spec_of(case, rng), DTYPES[case.dtype]
    heads, dim = case.shared * case.groups, case.dim + case.extra
    shapes = (
        (case.batch, heads, case.length, dim),
        (case.batch, case.shared, case.total, dim),
        (case.batch, case.shared, case.total, case.width),
    )
    numbers = [torch.from_numpy(rng.standard_normal(shape)) for shape in shapes]
    numbers = [x * n for x, n in zip(numbers, (case.size, case.size, 1.0), strict=True)]
    call: dict[str, Any] = {"causal": case.causal}
    index, rows = getattr(torch, case.index), case.batch if case.by_batch else 1
    for key, name, size in (("q", "query", case.length), ("k", "key", case.total)):
        if key in case.given_at:
            sizes = (rows, size) if spec.num_axes == 1 else (rows, size, spec.num_axes)
            at = torch.from_numpy(place(case.places, rng, sizes, case.total)).to(index)
            call[f"{name}_positions"] = at if case.by_batch else at[0]
    if case.hidden:
        call["key_mask"] = torch.from_numpy(hide(case.hidden, rng, case.batch, case.total))
    if case.documents:
        found = document(case.documents, rng, case.batch, case.total)
        call["segments"] = torch.from_numpy(found).to(index)
    if case.window is not None:
        call["window"] = case.window
    if case.form != "raw":
        spec, numbers[:2] = _another_form(case.form, numbers[:2], spec, call)
        shapes = (*(tuple(x.shape) for x in numbers[:2]), shapes[2])  # type: ignore[assignment]
    if case.poison:
        never = _never_seen(case, call)[:, None, :, None]
        for i in (1, 2):
            if not case.layouts[i].startswith("one"):
                numbers[i] = numbers[i].masked_fill(never, NAN)
    laid = [LAYOUTS[kind] for kind in case.layouts]
    held = [lay(x.to(dtype)) for (lay, _), x in zip(laid, numbers, strict=True)]
    flow = torch.from_numpy(rng.standard_normal((case.batch, heads, case.length, case.width)))
    lay, see = LAYOUTS[case.flow]
    flow = see(lay(flow.to(dtype)), tuple(flow.shape))
    return Made(tuple(held), tuple(see for _, see in laid), shapes, spec, call, flow)  # type: ignore[arg-type]


def _never_seen(case: Case, call: dict[str, Any]) -> Tensor:
    """Keys that are masked, or lie in a cache beyond what is written: ``(B, S)``."""
    never = torch.zeros(case.batch, case.total, dtype=torch.bool)
    if "key_mask" in call:
        never |= ~call["key_mask"]
    if case.causal and case.length:
        default = torch.arange(case.total)
        at_q = call.get("query_positions", default[case.total - case.length :])
        never |= call.get("key_positions", default) > at_q.amax(-1, keepdim=True)
    return never


def _another_form(
    form: str, numbers: list[Tensor], spec: ww.ScoreSpec, call: dict[str, Any]
) -> tuple[ww.ScoreSpec, list[Tensor]]:
    if form == "unturned":
        return spec.unturned(), [ww.unturned(x, spec) for x in numbers]
    q, k = numbers
    total = k.shape[2]
    # What is left when several axes are encoded has none of its own.
    take = call.get if spec.num_axes == 1 else call.pop
    at_q = take("query_positions", torch.arange(total - q.shape[2], total))
    at_k = take("key_positions", torch.arange(total))
    return spec.encoded(), [ww.encode_queries(q, spec, at_q), ww.encode_keys(k, spec, at_k)]


# What hypothesis draws

POOLS: dict[str, tuple[Any, ...]] = {
    "fraction": (0.25, 0.5, 0.75),
    "rest": ("magnitude", "raw"),
    "delta": (None, "uniform", "zero"),
    "magnitude": ("relu", "none", "softplus"),
    "temperature": (True, False),
    "temperature_length": (1, 5, 40),
    "base": (10.0, 500_000.0),
    "scale": (0.3, 1.0),
    "factor": (1.0, 8.0),
}
HIDDEN = ["", "", "", "half", "few", "none", "one", "padding", "blind"]
DOCUMENTS = ["", "", "", "sorted", "unsorted", "negative"]
PLACES = ["run", "shuffled", "gaps", "duplicates", "negative", "huge"]
SOFTCAPS = (None, None, None, None, 0.2, 2, 50.0)
NAMES = [*ww.ENCODINGS, "pope", "pope", "pope-id", "rope"]


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[str, ...],
    most: int = 80,
    heads: int = 15,
    softcaps: tuple[float | None, ...] = SOFTCAPS,
) -> Case:
    """Any call.

    Args:
        draw: Given by hypothesis.
        dtypes: To choose from.
        most: Longest length.
        heads: Most heads of a batch.
        softcaps: To choose from.
    """
    few, many = st.integers(1, 9), st.integers(10, most)
    length, total = draw(st.sampled_from([(few, few), (few, many), (many, many), (few, few)]))
    length, total = draw(length), draw(total)
    empty = draw(st.sampled_from([""] * 20 + ["batch", "length", "total"]))
    length, total = length * (empty != "length"), total * (empty != "total")
    name = draw(st.sampled_from(NAMES))
    dim = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 17, 33])) * (1 + (name in EVEN))
    causal = draw(st.booleans())
    valid = [key for key in options(name) if key in POOLS]
    chosen = draw(st.sets(st.sampled_from(valid), max_size=3)) if valid else set()
    given = {key: draw(st.sampled_from(POOLS[key])) for key in sorted(chosen)}
    if "temperature_length" in valid and draw(st.integers(0, 2)) == 0:
        given["temperature_length"] = draw(st.sampled_from(POOLS["temperature_length"]))
    if "axes" in options(name) and not causal and dim >= 4 and draw(st.integers(0, 3)) == 0:
        given = {key: x for key, x in given.items() if key in ("rest", "delta", "magnitude")}
        first = draw(st.integers(1, dim // 4)) * 2
        given["axes"] = (first, draw(st.integers(1, (dim - first) // 2)) * 2)
    shared = draw(st.integers(1, min(3, heads)))
    groups = draw(st.sampled_from([n for n in (1, 1, 2, 3, 5) if n * shared <= heads]))
    batch = draw(st.integers(1, 3 if heads > 4 else 2))
    if given.get("fraction", 1) * min(dim, 2 * shared * groups) < 2:
        given.pop("fraction", None)
    given_at = "qk" if "axes" in given else draw(st.sampled_from(["", "", "qk", "q", "k"]))
    if length > total and "q" not in given_at:
        given_at += "q"
    wanted: tuple[str, ...] = ()
    if draw(st.booleans()):
        wanted = LEARNED
        if draw(st.integers(0, 3)) == 0:
            wanted = tuple(draw(st.lists(st.sampled_from(LEARNED), min_size=1, unique=True)))
    layout = st.sampled_from(["plain", *LAYOUTS])
    dtype = draw(st.sampled_from(dtypes))
    return Case(
        seed=draw(st.integers(0, 2**31)),
        name=name,
        given=tuple(given.items()),
        form=draw(st.sampled_from(["raw", "raw", "raw", "unturned", "encoded"])),
        slopes=draw(st.integers(0, 5)) == 0,
        softcap=draw(st.sampled_from(softcaps)),
        dtype=dtype,
        learned=draw(st.sampled_from(["float32", "float64", "bfloat16", dtype])),
        batch=batch * (empty != "batch"),
        shared=shared,
        groups=groups,
        length=length,
        total=total,
        dim=dim,
        extra=draw(st.sampled_from([0, 0, 0, 1, 3])),
        width=draw(st.integers(1, 20)),
        size=draw(st.sampled_from([1.0, 1.0, 3.0, 0.1])),
        layouts=draw(st.tuples(layout, layout, layout)),
        causal=causal,
        window=draw(st.none() | st.sampled_from([1, 2, 3, 7, 20, 2**40])) if causal else None,
        hidden=draw(st.sampled_from(HIDDEN)),
        poison=draw(st.booleans()),
        documents=draw(st.sampled_from(DOCUMENTS)) if length <= total else "",
        given_at=given_at,
        places=draw(st.sampled_from(PLACES)),
        by_batch=draw(st.booleans()),
        index=draw(st.sampled_from(["int64", "int64", "int32"])),
        wanted=wanted,
        flow=draw(layout),
    )
