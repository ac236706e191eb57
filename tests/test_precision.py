"""Angles are exact to 1e-6 rad at positions up to 2^24, whatever becomes of the model's dtype.

The truth is 40 digits of mpmath. Angles are read off scores of single channels, so that nothing
is assumed about how features are laid out.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import whatwhere as ww
from encoding_cases import CASES, TRAIN_LENGTH, cold, make, make_spec

DIGITS = 40
POSITIONS = [0, 1, 1023, 12_345, 2**17 + 1, 2**20 + 7, 2**24 - 1, 2**24]
LIMIT = 1e-6
TURNING = [case for case in CASES if make_spec(case).inv_freq is not None]


def channel_scores(spec: ww.ScoreSpec, d: int, at_q: Tensor, at_k: Tensor) -> Tensor:
    """``exp(i angle)`` of each frequency for a query at ``at_q`` and a key at ``at_k``: (R, T).

    The angle is that of the key less that of the query.
    """
    count = spec.num_frequencies
    call = {"query_positions": at_q, "key_positions": at_k}

    def run(q: Tensor, k: Tensor, spec: ww.ScoreSpec) -> Tensor:
        # One sequence of the batch for each frequency; T queries, T keys, only pairs of the two.
        rows = len(at_q)
        q, k = (x[:, None, None].expand(count, 1, rows, d) for x in (q, k))
        scores = ww.scores(q.contiguous(), k.contiguous(), spec, **call)
        return scores[:, 0].diagonal(dim1=-2, dim2=-1).double() / spec.scale

    if spec.feature == "rotate":
        unit = torch.eye(d)
        real = run(unit[:count], unit[:count], spec)
        # The second channel of a pair is a quarter turn ahead: the key's angle shows as -sin.
        imaginary = -run(unit[:count], unit[count : 2 * count], spec)
        return torch.complex(real, imaginary)
    # All magnitudes but one are nothing; the phase makes a cosine or a sine of it.
    own, size = (0.0, math.log(2)) if spec.magnitude == "softplus" else (1.0, 1.0)
    shown = torch.zeros(count, d)
    shown[:, :count] = -1e4
    shown[torch.arange(count), torch.arange(count)] = own
    parts = []
    for phase in (0.0, -math.pi / 2):
        # Every channel shows its phase here, so nothing is promised about which of them turn.
        fixed = replace(spec, turning=None, phase=torch.full((1, count), phase).double())
        parts.append(run(shown, shown, fixed) / size**2)
    return torch.complex(*parts)


def check(spec: ww.ScoreSpec, d: int, thetas: list[mpf], pairs: list[tuple[int, int]]) -> None:
    at_q, at_k = (torch.tensor(x) for x in zip(*pairs, strict=True))
    found = channel_scores(cold(spec), d, at_q, at_k)[: len(thetas)]
    with mp.workdps(DIGITS):
        exact = [[mp.expjpi((s - t) * theta / mp.pi) for t, s in pairs] for theta in thetas]
    wanted = torch.tensor([[complex(x) for x in row] for row in exact], dtype=torch.complex128)
    error = (found / wanted).angle().abs()
    assert error.max().item() < LIMIT
    assert (found.abs() - 1).abs().max().item() < LIMIT


def places() -> list[tuple[int, int]]:
    far = [(0, p) for p in POSITIONS] + [(p, 0) for p in POSITIONS]
    return [*far, (2**24, 2**24 - 5), (2**24 - 3, 2**24), (2**23 + 1, 77)]


@pytest.mark.parametrize("case", TURNING)
def test_angles_of_an_encoding_are_position_times_frequency(case: str) -> None:
    spec = make_spec(case, 16, 1)
    assert spec.inv_freq is not None
    assert spec.inv_freq.dtype == torch.float64
    check(spec, 16, [mpf(f) for f in spec.inv_freq[0].tolist() if f], places())


def geometric(count: int, base: int) -> list[mpf]:
    return [mp.power(base, -mpf(c) / count) for c in range(count)]


def in_distribution(count: int) -> list[mpf]:
    fast, slow = 2 * mp.pi / 32, 4 * mp.pi / TRAIN_LENGTH
    return [fast * mp.power(slow / fast, mpf(c) / (count - 1)) for c in range(count)]


def yarn(d: int, base: int, length: int, factor: int) -> list[mpf]:
    def corr(turns: int) -> mpf:
        return d * mp.log(length / (2 * mp.pi * turns)) / (2 * mp.log(base))

    low, high = int(mp.floor(corr(32))), int(mp.ceil(corr(1)))
    assert 0 <= low < high < d
    ramps = [min(max(mpf(i - low) / (high - low), mpf(0)), mpf(1)) for i in range(d // 2)]
    thetas = geometric(d // 2, base)
    return [theta * ((1 - r) + r / factor) for theta, r in zip(thetas, ramps, strict=True)]


PAPERS: dict[str, tuple[Callable[[], ww.Encoding], Callable[[], list[mpf]]]] = {
    "rope": (lambda: ww.RoPE(64, 1), lambda: geometric(32, 10000)),
    "rope 500k": (lambda: ww.RoPE(128, 1, base=500_000), lambda: geometric(64, 500_000)),
    "rope quarter": (lambda: ww.RoPE(64, 1, fraction=0.25), lambda: geometric(8, 10000)),
    "pope": (lambda: ww.PoPE(64, 1), lambda: geometric(64, 10000)),
    "pope quarter": (lambda: ww.PoPE(64, 1, fraction=0.25), lambda: geometric(16, 10000)),
    "rope-id": (lambda: make("rope-id", 64, 1), lambda: in_distribution(16)),
    "rope-high": (lambda: make("rope-high", 64, 1), lambda: in_distribution(32)),
    "pope-id": (lambda: make("pope-id", 64, 1), lambda: in_distribution(32)),
    "yarn": (
        lambda: ww.YaRN(64, 1, train_length=4096, factor=16),
        lambda: yarn(64, 10000, 4096, 16),
    ),
}


@pytest.mark.parametrize("label", PAPERS)
def test_angles_are_those_of_the_paper(label: str) -> None:
    build, thetas = PAPERS[label]
    encoding = build()
    with mp.workdps(DIGITS):
        exact = thetas()
        # The frequencies themselves: 1e-6 rad at 2^24 leaves them 6e-14.
        found = encoding().inv_freq
        assert found is not None
        for got, wanted in zip(found[0].tolist(), exact, strict=False):
            assert abs(mpf(got) - wanted) * 2**24 < LIMIT / 4
    with torch.no_grad():
        check(encoding(), encoding.head_dim, exact, places())


def test_band_of_in_distribution_frequencies() -> None:
    """The fastest turns once in 32 tokens, the slowest twice in the training length."""
    for name in ("rope-id", "rope-high", "pope-id"):
        inv_freq = ww.make(name, head_dim=32, num_heads=1, train_length=4096)().inv_freq
        assert inv_freq is not None
        moving = inv_freq[0][inv_freq[0] != 0]
        assert moving.max().item() == pytest.approx(2 * math.pi / 32, rel=1e-14)
        assert moving.min().item() == pytest.approx(4 * math.pi / 4096, rel=1e-14)
        steps = moving.log().diff()
        assert torch.allclose(steps, steps.mean())


@pytest.mark.parametrize("axes", [(8, 8), (4, 4, 8)])
def test_angles_of_axes(axes: tuple[int, ...]) -> None:
    spec = make_spec("pope", 16, 1, axes=axes)
    far = torch.tensor([[2**24 - 1 - 3 * a for a in range(len(axes))]])
    near = torch.zeros_like(far)
    found = channel_scores(spec, 16, near, far)[:, 0]
    with mp.workdps(DIGITS):
        exact = [
            mp.expjpi(int(far[0, a]) * theta / mp.pi)
            for a, count in enumerate(axes)
            for theta in geometric(count, 10000)
        ]
    wanted = torch.tensor([complex(x) for x in exact], dtype=torch.complex128)
    assert (found / wanted).angle().abs().max().item() < LIMIT


CASTS: dict[str, Callable[[ww.Encoding], ww.Encoding]] = {
    "bfloat16": lambda e: e.to(torch.bfloat16),
    "half": lambda e: e.half(),
    "float": lambda e: e.float(),
    "double and back": lambda e: e.double().float(),
    "in a model": lambda e: torch.nn.Sequential(e).to(torch.bfloat16)[0],
    "copied": copy.deepcopy,
    "pickled": lambda e: pickle.loads(pickle.dumps(e)),
    "from meta": lambda e: e.to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("case", TURNING)
def test_casting_a_model_leaves_frequencies_alone(case: str, cast: str) -> None:
    encoding = make(case)
    before = encoding().inv_freq
    assert before is not None
    before = before.clone()
    for fresh in (False, True):  # with what the encoding has cached, and without
        after = CASTS[cast](make(case) if fresh else encoding)().inv_freq
        assert after is not None
        assert after.dtype == torch.float64
        assert torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", TURNING)
def test_default_dtype_and_autocast_leave_angles_alone(case: str, dtype: torch.dtype) -> None:
    at = torch.tensor(POSITIONS)
    k = torch.randn(1, 1, len(POSITIONS), 16)
    encoding = make(case)
    with torch.no_grad():
        wanted = ww.encode_keys(k, encoding(), at)
        with torch.autocast("cpu", dtype):
            assert torch.equal(ww.encode_keys(k, encoding(), at), wanted)
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(ww.encode_keys(k, make(case)(), at), wanted)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", TURNING)
def test_a_first_call_in_inference_mode_leaves_training_possible(case: str) -> None:
    encoding = make(case)
    with torch.inference_mode():
        encoding()
    q = torch.randn(1, 4, 5, 16, requires_grad=True)
    ww.attention(q, q, q, encoding(), causal=True).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("case", TURNING)
def test_a_first_call_on_fake_tensors_leaves_real_ones_possible(case: str) -> None:
    """Memory estimators run a model on fake tensors first; nothing fake may stay behind."""
    encoding = make(case)
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoding()
    inv_freq = encoding().inv_freq
    assert inv_freq is not None
    assert not isinstance(inv_freq, FakeTensor)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("case", TURNING)
def test_every_integer_dtype_holds_its_positions(case: str, dtype: torch.dtype) -> None:
    spec = make_spec(case)
    k = torch.randn(1, 1, len(POSITIONS), 16)
    at = torch.tensor(POSITIONS)
    assert torch.equal(ww.encode_keys(k, spec, at.to(dtype)), ww.encode_keys(k, spec, at))
    small = torch.arange(len(POSITIONS))
    for narrow in (torch.uint8, torch.int8, torch.int16):
        got = ww.encode_keys(k, spec, small.to(narrow))
        assert torch.equal(got, ww.encode_keys(k, spec, small))


@pytest.mark.parametrize("base", [10.0, 10000.0])
def test_sinusoidal_is_exact_far_away(base: float) -> None:
    encoding = ww.make("sinusoidal", head_dim=32, num_heads=1, base=base).to(torch.bfloat16)
    got = encoding.embed(torch.tensor(POSITIONS))
    assert got is not None
    with mp.workdps(DIGITS):
        for row, p in zip(got.double().tolist(), POSITIONS, strict=True):
            for i in range(16):
                angle = p * mp.power(int(base), -mpf(2 * i) / 32)
                assert abs(row[2 * i] - mp.sin(angle)) < LIMIT
                assert abs(row[2 * i + 1] - mp.cos(angle)) < LIMIT


def test_temperature_is_exact_at_its_threshold_and_far_away() -> None:
    spec = ww.NoPE(1, 1, temperature_length=100)()
    at = torch.tensor([0, 98, 99, 100, 101, 999, 2**24 - 1])
    q, k = torch.ones(1, 1, len(at), 1).double(), torch.ones(1, 1, 1, 1).double()
    zero = torch.zeros(1, dtype=torch.long)
    got = ww.scores(q, k, spec, query_positions=at, key_positions=zero)[0, 0, :, 0].tolist()
    assert got[:3] == [1.0, 1.0, 1.0]
    with mp.workdps(DIGITS):
        for value, p in zip(got[3:], at.tolist()[3:], strict=True):
            wanted = (mp.log(mpf(p + 1) / 100) / 10 + 1) ** 2
            assert value == pytest.approx(float(wanted), rel=1e-14)


def test_alibi_is_exact_far_away() -> None:
    spec = ww.ALiBi(1, 8)()
    q, k = torch.zeros(1, 8, 2, 1), torch.zeros(1, 8, 2, 1)
    at_q, at_k = torch.tensor([2**24, 2**24 - 1]), torch.tensor([0, 2**24 - 1])
    got = ww.scores(q, k, spec, query_positions=at_q, key_positions=at_k)
    for h in range(8):
        for t, s in ((0, 0), (0, 1), (1, 0), (1, 1)):
            wanted = -(2.0 ** -(h + 1)) * float(at_q[t] - at_k[s])
            assert got[0, h, t, s].item() == wanted
