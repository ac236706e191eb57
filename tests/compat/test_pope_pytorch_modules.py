"""`PoPE` and `AxialPoPE` of the compat package: state dicts, casts, phases, arguments."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from plain_pope import geometric
from whatwhere.compat import pope_pytorch as ours

BOUND = 2 * math.pi
Make = Callable[[Any], Any]
MAKE: dict[str, Make] = {
    "PoPE": lambda package: package.PoPE(16, heads=4),
    "AxialPoPE": lambda package: package.AxialPoPE(16, heads=4, axial_dims=(8, 4, 4)),
    "one axis": lambda package: package.AxialPoPE(16, heads=4, theta=500.0),
}
WHERE: dict[str, Any] = {"PoPE": 9, "AxialPoPE": (2, 3, 2), "one axis": (9,)}


@pytest.fixture
def theirs() -> Any:
    return pytest.importorskip("PoPE_pytorch", reason="PoPE-pytorch is not installed")


@pytest.fixture(params=MAKE)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_public_names_and_signatures_are_theirs(theirs: Any) -> None:
    names = {name for name, x in vars(theirs).items() if callable(x)}
    assert names <= set(ours.__all__)
    for name in names:
        mine, other = (inspect.signature(getattr(package, name)) for package in (ours, theirs))
        assert [(p.name, p.kind) for p in mine.parameters.values()] == [
            (p.name, p.kind) for p in other.parameters.values()
        ], name
        for p, q in zip(mine.parameters.values(), other.parameters.values(), strict=True):
            assert p.default == q.default or p.default is q.default, (name, p.name)
    for name in ("PoPE", "AxialPoPE"):
        mine, other = (getattr(package, name) for package in (ours, theirs))
        assert set(inspect.signature(mine.forward).parameters) == set(
            inspect.signature(other.forward).parameters
        )
        assert mine.apply_pope_to_qk is ours.apply_pope_to_qk


def test_state_dicts_load_both_ways(theirs: Any, kind: str) -> None:
    for source, target in ((theirs, ours), (ours, theirs)):
        one, two = MAKE[kind](source), MAKE[kind](target)
        with torch.no_grad():
            one.bias.uniform_(-9, 3)  # out of bounds, too: theirs let it drift there
        two.load_state_dict(one.state_dict(), strict=True)
        assert list(two.state_dict()) == list(one.state_dict())
        assert all(torch.equal(a, one.state_dict()[name]) for name, a in two.state_dict().items())
        assert [(n, p.requires_grad) for n, p in one.named_parameters()] == [
            (n, p.requires_grad) for n, p in two.named_parameters()
        ]
        a, b = one(WHERE[kind]), two(WHERE[kind])
        torch.testing.assert_close(a.freqs, b.freqs, rtol=1e-6, atol=0)
        torch.testing.assert_close(a.bias, b.bias, rtol=1e-6, atol=0)
        assert a.freqs.dtype == b.freqs.dtype and type(a).__name__ == type(b).__name__


def test_evaluating_changes_no_state_dict(kind: str) -> None:
    made = MAKE[kind](ours).eval()
    with torch.no_grad():
        made.bias.uniform_(-9, 3)
    before = copy.deepcopy(made.state_dict())
    made(WHERE[kind])
    with torch.no_grad():
        made.train()(WHERE[kind])
    assert all(torch.equal(before[name], x) for name, x in made.state_dict().items())


def exact_angles(kind: str) -> Tensor:
    """Of the last position of ``WHERE``."""
    if kind == "AxialPoPE":
        return torch.cat((1 * geometric(8), 2 * geometric(4), 1 * geometric(4)))
    return 8 * geometric(16, 500.0 if kind == "one axis" else 10000.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half().float(),
        lambda m: copy.deepcopy(m.bfloat16()),
        lambda m: pickle.loads(pickle.dumps(m.half())),
        lambda m: m.double(),
        lambda m: m.to("meta").to_empty(device="cpu"),
    ],
    ids=["bfloat16", "half and back", "copied", "pickled", "double", "from meta"],
)
def test_casts_do_not_touch_frequencies(kind: str, change: Make) -> None:
    made = change(MAKE[kind](ours))
    pair = made(WHERE[kind])
    torch.testing.assert_close(pair.exact.angles[-1], exact_angles(kind), rtol=1e-15, atol=0)
    wanted = torch.float64 if made.bias.dtype == torch.float64 else torch.float32
    assert pair.freqs.dtype == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_state_dict_of_low_precision_brings_its_phases_alone(
    theirs: Any, kind: str, dtype: torch.dtype
) -> None:
    old = MAKE[kind](theirs).to(dtype)
    with torch.no_grad():
        old.bias.uniform_(-6, 0)
    file = io.BytesIO()
    torch.save(old.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for assign in (False, True):
        made = MAKE[kind](ours)
        made.load_state_dict(state, strict=True, assign=assign)
        pair = made(WHERE[kind])
        torch.testing.assert_close(pair.exact.angles[-1], exact_angles(kind), rtol=1e-15, atol=0)
        assert torch.equal(pair.bias.float(), old.bias.float())


def test_other_frequencies_are_taken(theirs: Any) -> None:
    """Given, loaded, or written in place; as a list, too, which theirs announce."""
    own = [1.0, 0.3, 0.1, 0.01]
    made = ours.PoPE(4, heads=2, inv_freqs=own)
    wanted = 7 * torch.tensor(own, dtype=torch.float64)
    assert torch.equal(made(8).exact.angles[-1], wanted)
    assert torch.equal(made.bfloat16()(8).exact.angles[-1], wanted)
    rounded = torch.tensor(own)
    old = theirs.PoPE(4, heads=2, inv_freqs=rounded)
    for fresh in (ours.PoPE(4, heads=2), ours.PoPE(4, heads=2, inv_freqs=rounded.clone())):
        fresh(3)
        fresh.load_state_dict(old.state_dict())
        assert torch.equal(fresh(8).exact.angles[-1], 7 * rounded.double())
    fresh.inv_freqs.mul_(2)
    assert torch.equal(fresh(8).exact.angles[-1], 14 * rounded.double())
    fresh.inv_freqs = torch.ones(4)
    assert torch.equal(fresh(8).freqs[-1], torch.full((4,), 7.0))


def test_frequencies_of_a_functional_call_are_those_of_the_call() -> None:
    made = ours.PoPE(4, heads=2)
    given = {"bias": made.bias, "inv_freqs": torch.ones(4)}
    during = torch.func.functional_call(made, given, (8,))
    assert torch.equal(during.exact.angles[-1], torch.full((4,), 7.0, dtype=torch.float64))
    assert torch.equal(made(8).exact.angles[-1], 7 * geometric(4))


def test_angles_changed_in_place_count() -> None:
    q = torch.randn(1, 2, 5, 4)
    pair = ours.PoPE(4, heads=2)(5)
    before = ours.compute_attn_similarity(q, q, pair)
    pair.freqs.mul_(0.5)
    after = ours.compute_attn_similarity(q, q, pair)
    assert torch.equal(after, ours.compute_attn_similarity(q, q, tuple(pair)))
    assert not torch.equal(before, after)


def test_embeddings_are_pairs() -> None:
    pair = ours.PoPE(4, heads=2)(5)
    freqs, bias = pair
    assert isinstance(pair, tuple) and len(pair) == 2
    assert pair.freqs is freqs and pair.bias is bias and pair._fields == ("freqs", "bias")
    assert pair._replace(freqs=freqs[1:]).exact is None
    mapped = torch.utils._pytree.tree_map(lambda x: x, pair)
    assert torch.equal(mapped[0], freqs)


def test_bias_starts_and_stays_in_its_bounds() -> None:
    for make in (ours.PoPE, ours.AxialPoPE):
        assert bool((make(8, heads=3).bias == 0).all())
        drawn = make(64, heads=64, bias_uniform_init=True).bias.detach()
        assert -BOUND <= float(drawn.min()) < -6.2 and -0.1 < float(drawn.max()) <= 0
        # Mean of 4,096 draws: four standard deviations.
        assert abs(float(drawn.mean()) + math.pi) < 4 * BOUND / 12**0.5 / 64


def test_a_step_out_of_bounds_is_taken_back() -> None:
    made = ours.PoPE(4, heads=1)
    step = torch.optim.SGD(made.parameters(), lr=1.0)
    for flow, wanted in ((-1.0, 0.0), (-1.0, 0.0), (1.0, -1.0), (9.0, -BOUND), (-1.0, 1 - BOUND)):
        step.zero_grad()
        (made(2).bias * flow).sum().backward()
        assert torch.equal(made.bias.grad, torch.full((1, 4), flow))
        step.step()
        torch.testing.assert_close(made(2).bias.detach(), torch.full((1, 4), wanted))


def test_phases_beyond_the_bound_have_a_gradient_in_evaluation_too() -> None:
    """Models are fine-tuned in evaluation mode, where no parameter is moved behind one's back."""
    made = ours.PoPE(4, heads=1).eval()
    with torch.no_grad():
        made.bias.fill_(0.5)
    used = made(2).bias
    assert bool((used == 0).all()) and bool((made.bias == 0.5).all())
    used.sum().backward()
    assert torch.equal(made.bias.grad, torch.ones(1, 4))


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "dim": (lambda: ours.PoPE(0, heads=2), "dim"),
    "heads": (lambda: ours.PoPE(4, heads=-1), "heads"),
    "theta": (lambda: ours.PoPE(4, heads=2, theta=-3.0), "theta"),
    "inv_freqs": (lambda: ours.PoPE(4, heads=2, inv_freqs=torch.ones(3)), "inv_freqs"),
    "axes": (lambda: ours.AxialPoPE(8, heads=2, axial_dims=(4, 3)), "axial_dims"),
    "no axis": (lambda: ours.AxialPoPE(8, heads=2)(torch.arange(3)), "positions"),
    "columns": (lambda: ours.AxialPoPE(8, heads=2)((2, 3)), "axial_dims"),
    "empty grid": (lambda: ours.AxialPoPE(8, heads=2)(()), "dims"),
    "length": (lambda: ours.PoPE(4, heads=2)(-1), "pos_or_seq_len"),
    "text": (lambda: ours.PoPE(4, heads=2)("7"), "pos_or_seq_len"),  # type: ignore[arg-type]
    "scalar": (lambda: ours.PoPE(4, heads=2)(torch.tensor(3)), "pos_or_seq_len"),
    "bool": (lambda: ours.PoPE(4, heads=2)(torch.ones(3).bool()), "positions"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    make, word = MISTAKES[name]
    with pytest.raises(ValueError, match=word):
        make()


def attend(**given: Any) -> Tensor:
    q = torch.randn(2, 4, 5, 16)
    call = {"q": q, "k": q, "v": q, "pos_emb": ours.PoPE(16, heads=4)(5)} | given
    return ours.flash_attn_with_pope(**call)


X = torch.randn(2, 4, 3, 16)
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "more queries than keys": ({"k": X, "v": X}, "q has 5 positions and k 3"),
    "one angle for all": ({"pos_emb": ours.PoPE(16, heads=4)(1)}, "1 positions"),
    "too many angles": ({"pos_emb": ours.PoPE(16, heads=4)(6)}, "6 positions"),
    "wide": ({"pos_emb": ours.PoPE(32, heads=4)(5)}, "32 channels"),
    "heads": ({"pos_emb": ours.PoPE(16, heads=3)(5)}, "bias is for 3 heads"),
    "no pair": ({"pos_emb": torch.ones(2, 3)}, "pos_emb"),
    "another device": ({"pos_emb": ours.PoPE(16, heads=4).to("meta")(5)}, "freqs .* on meta"),
    "batch of angles": (
        {"pos_emb": ours.PoPE(16, heads=4)(torch.zeros(3, 5))},
        "batch and heads differ",
    ),
    "indices alone": ({"pos_emb": None, "pope_pos_emb_indices": torch.arange(3)}, "needs pos_emb"),
    "indices": ({"pope_pos_emb_indices": torch.arange(3)}, "pope_pos_emb_indices"),
    "mask of integers": ({"mask": torch.ones(2, 5).long()}, "mask is torch.int64"),
    "mask of another shape": ({"mask": torch.ones(3, 5).bool()}, "mask has shape"),
    "scale": ({"softmax_scale": 0.0}, "softmax_scale"),
    "learned scale": ({"softmax_scale": torch.ones((), requires_grad=True)}, "softmax_scale"),
    "dropout": ({"dropout": 1.0}, "dropout"),
    "fused on a CPU": ({"fused": True}, "fused"),
    "key heads": ({"k": torch.randn(2, 3, 5, 16), "v": torch.randn(2, 3, 5, 16)}, "heads"),
}


@pytest.mark.parametrize("name", CALLS)
def test_mistakes_in_a_call_are_named(name: str) -> None:
    given, word = CALLS[name]
    with pytest.raises(ValueError, match=word):
        attend(**given)


def test_a_mask_that_could_be_two_things_is_refused() -> None:
    q = torch.randn(5, 4, 5, 16)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    pair = ours.PoPE(16, heads=4)(5)
    with pytest.raises(ValueError, match=r"B = T = 5"):
        ours.flash_attn_with_pope(q, q, q, pair, mask=mask)
    by_pair = ours.flash_attn_with_pope(q, q, q, pair, mask=mask[None, None])
    causal = ours.flash_attn_with_pope(q, q, q, pair, causal=True)
    torch.testing.assert_close(by_pair, causal)
    ours.flash_attn_with_pope(q, q, q, pair, mask=mask[:, None, None])
