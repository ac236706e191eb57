"""What rotation does to a rank-1 cloud (arXiv 2603.18017): the lemma, and how fast it is reached.

Let ``X = u v^T`` be ``(n, d)`` with row ``t`` turned to position ``t``: in pair ``c`` of the
``R = d/2`` the vector ``(v_c, v_{c+R}) = a_c (cos phi_c, sin phi_c)`` turns by ``t theta_c``.
Rotations keep the length of each row, so that the Frobenius norm stays ``|u| |v|``, which is
``sigma_1`` before. Hence ``sigma_1`` never grows, and since ``X`` has ``d`` columns it never falls
by more than ``sqrt(d)``: both for any ``u``, ``n`` and frequencies.

With rows of one length (``u`` constant; queries and keys of a layer after RMSNorm are close to
that) the turned rows are ``sqrt(n)`` times samples of a curve, and in complex numbers
``z_c(t) = a_c e^{i (phi_c + t theta_c)}`` each mean that its Gram matrix ``X^T X / n`` has off the
diagonal is one of a geometric sum,

    |1/n sum_t e^{i t w}| <= 1 / (n |sin(w / 2)|),   w in {2 theta_c, theta_b + theta_c,
    theta_b - theta_c}.

If none of these is a multiple of ``2 pi`` (frequencies distinct, and neither 0 nor pi, modulo a
turn and up to sign), all of them vanish as ``n`` grows and the Gram matrix tends to
``diag(a_c^2 / 2)``, each value twice: every pair's plane is filled evenly, and pairs do not
correlate. Hence

    sigma_1 before / sigma_1 after  ->  sqrt(2) |a| / max_c a_c,

which is ``sqrt(2)`` if all energy lies in one pair, and ``sqrt(d)`` if all pairs have as much:
between the two always, as ``max a_c^2`` lies between ``|a|^2 / R`` and ``|a|^2``. The error is at
most the largest row sum of the Gram matrix less its limit (Weyl's inequality), so that it falls as
``1/n``, with the reciprocal of the least gap ``|sin(w/2)|``: a slow pair (``theta n << 1``) is not
yet there, which is what a training length shorter than its turn means. Without the condition
the lower bound fails: a channel of frequency 0 keeps ``sigma_1``, and rows of unequal length can
gather where a rotation returns.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import whatwhere as ww
from whatwhere.spec import ScoreSpec

seeds = st.integers(0, 2**32 - 1)


def turned(rows: Tensor, frequencies: Tensor) -> Tensor:
    """``(n, d)`` rows at positions 0..n-1, by the rotation that attention uses."""
    spec = ScoreSpec("rotate", 1.0, frequencies[None])
    at = torch.arange(len(rows))
    return ww.encode_keys(rows[None, None], spec, at)[0, 0]


def top(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x, 2))


def gap(frequencies: Tensor) -> float:
    """The least ``|sin(w / 2)|`` over the geometric sums of the Gram matrix."""
    pairs = torch.combinations(frequencies, 2)
    sums = torch.cat((2 * frequencies, pairs.sum(1), pairs[:, 0] - pairs[:, 1]))
    return float((sums / 2).sin().abs().min())


def error_bound(n: int, amplitudes: Tensor, frequencies: Tensor) -> float:
    """Largest row sum of the Gram matrix over ``n`` less its limit, of any eigenvalue's error.

    An entry of channels of pairs b and c is ``a_b a_c / 2`` times at most two geometric means for
    b != c, and one for b = c.
    """
    one = 1 / (n * gap(frequencies))
    crossing = 2 * amplitudes[:, None] * amplitudes * one  # two channels, two means, one half
    own = amplitudes**2 * one  # two channels, one mean, one half
    return float((crossing.sum(1) - crossing.diagonal() + own).max())


@st.composite
def clouds(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """``v`` of ``d`` channels, and frequencies with all gaps well away from 0."""
    pairs = draw(st.integers(1, 4))
    made = torch.Generator().manual_seed(draw(seeds))
    frequencies = torch.rand(pairs, generator=made, dtype=torch.float64) * math.pi
    assume(gap(frequencies) > 0.02)
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
    size = torch.exp(spread * torch.randn(pairs, generator=made, dtype=torch.float64))
    phase = torch.rand(pairs, generator=made, dtype=torch.float64) * 2 * math.pi
    return torch.cat((size * phase.cos(), size * phase.sin())), frequencies


def amplitudes_of(v: Tensor) -> Tensor:
    return v.unflatten(0, (2, -1)).norm(dim=0)


@settings(max_examples=60, deadline=None)
@given(clouds(), st.integers(1, 200), seeds)
def test_rotation_keeps_the_frobenius_norm(
    cloud: tuple[Tensor, Tensor], n: int, seed: int
) -> None:
    """For any rows; and so ``sigma_1`` never grows, nor falls by more than ``sqrt(d)``."""
    v, frequencies = cloud
    u = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = u[:, None] * v
    after = turned(x, frequencies)
    assert after.norm().item() == pytest.approx(x.norm().item(), rel=1e-12)
    assert top(x) / math.sqrt(len(v)) * (1 - 1e-12) <= top(after) <= top(x) * (1 + 1e-12)


@settings(max_examples=80, deadline=None)
@given(clouds(), st.sampled_from([100, 1000, 10000]))
def test_the_factor_tends_to_its_limit_as_one_over_n(cloud: tuple[Tensor, Tensor], n: int) -> None:
    v, frequencies = cloud
    a = amplitudes_of(v)
    x = v.expand(n, -1)
    squared = top(turned(x, frequencies)) ** 2 / n
    assert squared == pytest.approx(
        float(a.max() ** 2 / 2), abs=error_bound(n, a, frequencies) + 1e-9 * float(a.max() ** 2)
    )


@settings(max_examples=60, deadline=None)
@given(clouds())
def test_the_factor_lies_between_sqrt_2_and_sqrt_d_in_the_limit(
    cloud: tuple[Tensor, Tensor],
) -> None:
    """At an ``n`` from the bound at which the factor is known to 1 %."""
    v, frequencies = cloud
    a, d = amplitudes_of(v), len(v)
    n = math.ceil(100 * error_bound(1, a, frequencies) / float(a.max() ** 2 / 2))
    assume(n <= 200_000)
    x = v.expand(n, -1)
    factor = top(x) / top(turned(x, frequencies))
    assert math.sqrt(2) * 0.99 <= factor <= math.sqrt(d) * 1.01


@pytest.mark.parametrize("pairs", [1, 4, 16])
def test_both_ends_are_reached(pairs: int) -> None:
    """All energy in one pair: sqrt(2). The same in all: sqrt(d)."""
    frequencies = torch.linspace(0.3, 2.5, pairs, dtype=torch.float64)
    n, d = 20_000, 2 * pairs
    for v, limit in (
        (torch.eye(d, dtype=torch.float64)[0], math.sqrt(2)),
        (torch.ones(d, dtype=torch.float64), math.sqrt(d)),
    ):
        x = v.expand(n, -1)
        assert top(x) / top(turned(x, frequencies)) == pytest.approx(limit, rel=1e-2)


def test_the_error_falls_as_one_over_n() -> None:
    """Over four octaves, the worst within a factor of two of each, so that no zero is hit."""
    frequencies = torch.tensor([0.9, 0.37], dtype=torch.float64)
    v = torch.tensor([1.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    limit = float(amplitudes_of(v).max() ** 2 / 2)

    def worst(n: int) -> float:
        sizes = range(n, 2 * n, max(1, n // 40))
        x = turned(v.expand(2 * n, -1), frequencies)
        return max(abs(top(x[:m]) ** 2 / m - limit) for m in sizes)

    errors = [worst(n) for n in (100, 400, 1600)]
    for before, after in pairwise(errors):
        assert 0.125 < after / before < 0.5


def test_without_the_condition_the_lemma_fails() -> None:
    n, v = 4096, torch.ones(4, dtype=torch.float64)
    x = v.expand(n, -1)
    still = torch.tensor([1.0, 0.0], dtype=torch.float64)
    # Half the energy does not turn, as of RoPE-ID: sigma_1 falls by sqrt(2), not by sqrt(d).
    assert top(x) / top(turned(x, still)) == pytest.approx(math.sqrt(2), rel=1e-2)
    assert top(x) / top(turned(x, 0 * still)) == pytest.approx(1)
    same = torch.tensor([0.7, 0.7], dtype=torch.float64)  # pairs that turn alike stay correlated
    assert top(x) / top(turned(x, same)) == pytest.approx(math.sqrt(2), rel=1e-2)
    # Rows only where the rotation has come back: nothing is turned.
    period = torch.tensor([math.pi / 4, math.pi / 2], dtype=torch.float64)
    u = (torch.arange(n) % 8 == 0).double()
    x = u[:, None] * v
    assert top(x) / top(turned(x, period)) == pytest.approx(1)


def test_a_slow_pair_is_not_there_before_its_turn() -> None:
    """RoPE's slowest pairs stay aligned within training, and spread beyond: the paper's cause."""
    frequencies = torch.tensor([10000 ** (-c / 16) for c in range(16)], dtype=torch.float64)
    v = torch.ones(32, dtype=torch.float64)
    factors = []
    for n in (256, 4096, 65536):
        x = v.expand(n, -1)
        factors.append(top(x) / top(turned(x, frequencies)))
    assert factors == sorted(factors) and factors[0] < 2 < 4 < factors[-1] < math.sqrt(32) * 1.01
