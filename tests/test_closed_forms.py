"""Law 1: scores equal the papers' formulas in float64, sharing no code with the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import closed_form as cf
import whatwhere as ww
from encoding_cases import TRAIN_LENGTH, make

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DIM, HEADS = 12, 4
AT_Q = [0, 1, 5, 127, 128, 1000]
AT_K = [0, 3, 127, 128, 997]

Formula = Callable[[list[list[float]] | None], cf.PairScore]


def with_slopes(score: cf.PairScore, slopes: list[float]) -> cf.PairScore:
    """A score that already holds its scale, less ``slope (t - s)``."""
    return lambda q, k, t, s, h: score(q, k, t, s, h) / math.sqrt(len(q)) - slopes[h] * (t - s)


def with_temperature(score: cf.PairScore, length: int) -> cf.PairScore:
    return lambda q, k, t, s, h: score(q, k, t, s, h) * cf.temperature(t, length)


def scaled(score: cf.PairScore, by: float) -> cf.PairScore:
    return lambda q, k, t, s, h: score(q, k, t, s, h) * by


# label: (name, options, delta -> score before d^-0.5)
FORMULAS: dict[str, tuple[str, dict[str, Any], Formula]] = {
    "rope": ("rope", {}, lambda delta: cf.rope(cf.geometric(6))),
    "rope base": ("rope", {"base": 500.0}, lambda delta: cf.rope(cf.geometric(6, 500.0))),
    "rope half": ("rope", {"fraction": 0.5}, lambda delta: cf.rope(cf.geometric(3))),
    "rope one pair": ("rope", {"fraction": 2 / 12}, lambda delta: cf.rope(cf.geometric(1))),
    "rope temperature": (
        "rope",
        {"temperature_length": 100},
        lambda delta: with_temperature(cf.rope(cf.geometric(6)), 100),
    ),
    "rope-id": (
        "rope-id",
        {},
        lambda delta: with_temperature(cf.rope(cf.in_distribution(3, TRAIN_LENGTH)), TRAIN_LENGTH),
    ),
    "rope-id cold": (
        "rope-id",
        {"temperature": False},
        lambda delta: cf.rope(cf.in_distribution(3, TRAIN_LENGTH)),
    ),
    "rope-high": ("rope-high", {}, lambda delta: cf.rope(cf.in_distribution(6, TRAIN_LENGTH))),
    "yarn": (
        "yarn",
        {"factor": 6.0, "train_length": 4096},
        lambda delta: scaled(
            cf.rope(cf.yarn(DIM, 10000.0, 4096, 6.0)), (0.1 * math.log(6.0) + 1) ** 2
        ),
    ),
    "yarn 1": ("yarn", {"factor": 1.0}, lambda delta: cf.rope(cf.geometric(6))),
    "pope": ("pope", {"delta": "uniform"}, lambda delta: cf.pope(cf.geometric(DIM), delta)),
    "pope zero": ("pope", {}, lambda delta: cf.pope(cf.geometric(DIM), None)),
    "pope none": ("pope", {"delta": None}, lambda delta: cf.pope(cf.geometric(DIM), None)),
    "pope relu": (
        "pope",
        {"delta": "uniform", "magnitude": "relu"},
        lambda delta: cf.pope(cf.geometric(DIM), delta, "relu"),
    ),
    "pope signed": (
        "pope",
        {"delta": "uniform", "magnitude": "none"},
        lambda delta: cf.pope(cf.geometric(DIM), delta, "none"),
    ),
    "pope quarter": (
        "pope",
        {"delta": "uniform", "fraction": 0.25},
        lambda delta: cf.pope(cf.geometric(3), delta),
    ),
    "pope quarter raw": (
        "pope",
        {"delta": "uniform", "fraction": 0.25, "rest": "raw"},
        lambda delta: cf.pope(cf.geometric(3), delta, rest="raw"),
    ),
    "pope quarter relu": (
        "pope",
        {"delta": "uniform", "fraction": 0.25, "magnitude": "relu"},
        lambda delta: cf.pope(cf.geometric(3), delta, "relu"),
    ),
    "pope temperature": (
        "pope",
        {"delta": "uniform", "fraction": 0.5, "temperature_length": 100},
        lambda delta: with_temperature(cf.pope(cf.geometric(6), delta), 100),
    ),
    "pope raw temperature": (
        "pope",
        {"fraction": 0.5, "rest": "raw", "temperature_length": 100},
        lambda delta: with_temperature(cf.pope(cf.geometric(6), delta, rest="raw"), 100),
    ),
    "pope-id": (
        "pope-id",
        {"delta": "uniform"},
        lambda delta: cf.pope(cf.in_distribution(6, TRAIN_LENGTH), delta),
    ),
    "pope-id raw hot": (
        "pope-id",
        {"delta": "uniform", "rest": "raw", "temperature": True},
        lambda delta: with_temperature(
            cf.pope(cf.in_distribution(6, TRAIN_LENGTH), delta, rest="raw"), TRAIN_LENGTH
        ),
    ),
    "nope": ("nope", {}, lambda delta: cf.nope),
    "nope temperature": (
        "nope",
        {"temperature_length": 100},
        lambda delta: with_temperature(cf.nope, 100),
    ),
    "alibi": (
        "alibi",
        {},
        lambda delta: with_slopes(cf.nope, cf.alibi_slopes(HEADS)),
    ),
    "alibi half": (
        "alibi",
        {"fraction": 0.5},
        lambda delta: with_slopes(cf.nope, [*cf.alibi_slopes(2), 0.0, 0.0]),
    ),
    "sinusoidal": ("sinusoidal", {}, lambda delta: cf.nope),
    "learned": ("learned", {}, lambda delta: cf.nope),
}
# Their formulas hold the factor d^-0.5, because slopes are not scaled.
SCALED = {"alibi", "alibi half"}


def close(got: torch.Tensor, wanted: np.ndarray) -> None:
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-10, atol=1e-10)


def scores_of(encoding: ww.Encoding, q: np.ndarray, k: np.ndarray) -> torch.Tensor:
    return ww.scores(
        torch.from_numpy(q),
        torch.from_numpy(k),
        encoding(),
        query_positions=torch.tensor(AT_Q),
        key_positions=torch.tensor(AT_K),
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("label", FORMULAS)
def test_scores_equal_the_formula_of_the_paper(label: str, groups: int) -> None:
    name, options, formula = FORMULAS[label]
    encoding = ww.make(
        name, head_dim=DIM, num_heads=HEADS, **{"train_length": TRAIN_LENGTH, **options}
    )
    delta = getattr(encoding, "delta", None)
    rows = None if delta is None else delta.detach().double().tolist()
    rng = np.random.default_rng(0)
    q = 2 * rng.standard_normal((2, HEADS, len(AT_Q), DIM))
    k = 2 * rng.standard_normal((2, HEADS // groups, len(AT_K), DIM))
    wanted = cf.all_scores(formula(rows), q, k, AT_Q, AT_K)
    close(scores_of(encoding, q, k), wanted if label in SCALED else wanted / math.sqrt(DIM))


def test_every_encoding_has_a_formula_here() -> None:
    missing = set(ww.ENCODINGS) - {name for name, _, _ in FORMULAS.values()}
    assert not missing, f"write the closed form of {sorted(missing)} from the paper"


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 16, 20])
def test_alibi_slopes_are_exact_in_float64(heads: int) -> None:
    encoding = ww.make("alibi", head_dim=2, num_heads=heads)
    wanted = with_slopes(cf.nope, cf.alibi_slopes(heads))
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, heads, 6, 2))
    close(scores_of(encoding, q, k[:, :, :5]), cf.all_scores(wanted, q, k[:, :, :5], AT_Q, AT_K))


@pytest.mark.parametrize("fraction, sloped", [(0.5, 3), (1 / 6, 1), (1.0, 6)])
def test_alibi_gives_slopes_to_the_first_heads_only(fraction: float, sloped: int) -> None:
    slopes = ww.make("alibi", head_dim=2, num_heads=6, fraction=fraction)().slopes
    assert slopes is not None
    wanted = cf.alibi_slopes(sloped) + [0.0] * (6 - sloped)
    np.testing.assert_allclose(slopes.double().numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["rope", "pope"])
def test_axes_turn_channels_of_their_own(name: str) -> None:
    """Two axes: the score is the sum of two encodings, each on its channels and its axis."""
    positions = ww.grid(2, 3)
    assert positions.tolist() == [[y, x] for y in range(2) for x in range(3)]
    axes = (8, 4)
    options = {"delta": "uniform"} if name == "pope" else {}
    encoding = ww.make(name, head_dim=14, num_heads=2, axes=axes, **options)
    q, k = torch.randn(2, 1, 2, 6, 14, dtype=torch.float64)
    got = ww.scores(q, k, encoding(), query_positions=positions, key_positions=positions)
    wanted = np.zeros((1, 2, 6, 6))
    delta = encoding.delta.detach().double() if name == "pope" else None
    # rope: pairs (c, c + 6) over all 12 rotated channels; its first 4 pairs follow axis 0.
    units = [n // (2 if name == "rope" else 1) for n in axes]
    start = 0
    for axis, count in enumerate(units):
        chosen = list(range(start, start + count))
        if name == "rope":
            chosen += [c + sum(units) for c in chosen]
            score = cf.rope(cf.geometric(count))
        else:
            assert delta is not None
            score = cf.pope(cf.geometric(count), delta[:, start : start + count].tolist())
        at = positions[:, axis].tolist()
        wanted += cf.all_scores(score, q[..., chosen].numpy(), k[..., chosen].numpy(), at, at)
        start += count
    rest = cf.nope if name == "rope" else cf.pope([], None)
    zeros = [0] * 6
    wanted += cf.all_scores(rest, q[..., 12:].numpy(), k[..., 12:].numpy(), zeros, zeros)
    close(got, wanted / math.sqrt(14))


def test_three_axes() -> None:
    encoding = ww.make("pope", head_dim=6, num_heads=1, axes=(2, 2, 2))
    positions = ww.grid(2, 2, 3)
    assert positions.shape == (12, 3)
    q, k = torch.randn(2, 1, 1, 12, 6, dtype=torch.float64)
    got = ww.scores(q, k, encoding(), query_positions=positions, key_positions=positions)
    wanted = np.zeros((1, 1, 12, 12))
    for axis in range(3):
        part = slice(2 * axis, 2 * axis + 2)
        at = positions[:, axis].tolist()
        score = cf.pope(cf.geometric(2), None)
        wanted += cf.all_scores(score, q[..., part].numpy(), k[..., part].numpy(), at, at)
    close(got, wanted / math.sqrt(6))


@pytest.mark.parametrize("width", [2, 12, 64])
def test_sinusoidal_embedding_is_that_of_the_paper(width: int) -> None:
    encoding = ww.make("sinusoidal", head_dim=4, num_heads=3, embedding_dim=width)
    positions = torch.tensor([[0, 1, 2], [77, 4096, 2**20]])
    got = encoding.embed(positions)
    assert got is not None
    assert got.shape == (2, 3, width)
    wanted = [[cf.sinusoid(p, width) for p in row] for row in positions.tolist()]
    np.testing.assert_allclose(got.double().numpy(), wanted, atol=1e-6)
    one_row = encoding.embed(positions[0])
    assert one_row is not None
    assert torch.equal(one_row, got[0])


def test_learned_embedding_is_a_row_of_its_table() -> None:
    encoding = ww.make("learned", head_dim=4, num_heads=3, train_length=9)
    (table,) = encoding.parameters()
    assert table.shape == (9, 12)
    positions = torch.tensor([[8, 0], [3, 3]])
    got = encoding.embed(positions)
    assert got is not None
    assert torch.equal(got, torch.stack([table[row] for row in positions]))


@pytest.mark.parametrize("name", ww.ENCODINGS)
def test_only_absolute_encodings_embed(name: str) -> None:
    encoding = make(name, head_dim=4, num_heads=3)
    added = encoding.embed(torch.arange(5))
    assert (added is not None) == encoding.absolute
    assert added is None or added.shape == (5, 12)


def test_which_encodings_are_absolute() -> None:
    assert {name for name in ww.ENCODINGS if make(name).absolute} >= {"sinusoidal", "learned"}
    relative = {"pope", "pope-id", "rope", "rope-high", "rope-id", "yarn", "nope", "alibi"}
    assert not any(make(name).absolute for name in relative)


def test_magnitudes_keep_their_precision_at_both_ends() -> None:
    """softplus in float64 to 12 digits: log(1 + e^x) loses everything below -37."""
    x = torch.tensor([-700.0, -100, -40, -20, -1, 0, 1, 19, 21, 25, 30, 45, 700]).double()
    encoding = ww.make("pope", head_dim=1, num_heads=1, delta=None)
    one = torch.zeros(1, 1, 1, 1).double()
    at = {"query_positions": torch.zeros(len(x)).long(), "key_positions": torch.zeros(1).long()}
    got = ww.scores(x[None, None, :, None], one, encoding(), **at)[0, 0, :, 0]
    wanted = [cf.softplus(a) * math.log(2) for a in x.tolist()]
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12, atol=0)
