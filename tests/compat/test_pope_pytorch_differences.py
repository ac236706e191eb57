"""Where PoPE-pytorch 0.2.1 is wrong, seen here, and ours is not; where it is right, the same.

Each test of a difference shows both sides: if a later release of theirs mends one, it fails and
the table in docs/compat.md loses a row.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plain_pope import attend, case, geometric, off, results, scores, within
from whatwhere.compat import pope_pytorch as ours

theirs = pytest.importorskip("PoPE_pytorch", reason="PoPE-pytorch is not installed")
F32 = torch.float32


def pair_of(module: Any, bias: Tensor) -> Any:
    """Either package's module with these phases."""
    with torch.no_grad():
        module.bias.copy_(bias)
    return module


def both(x: dict[str, Tensor], dim: int = 16) -> list[Any]:
    return [pair_of(m.PoPE(dim, heads=x["bias"].shape[0]), x["bias"]) for m in (theirs, ours)]


SAME: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "full": ({}, {}),
    "causal": ({}, {"causal": True}),
    "fewer queries": ({"T": 3}, {}),
    "one query, causal": ({"T": 1}, {"causal": True}),
    "grouped": ({"G": 2}, {"causal": True}),
    "partly turned": ({"R": 6}, {}),
    "narrow values": ({"V": 5}, {}),
    "scaled": ({}, {"softmax_scale": 0.6}),
    "keys": ({}, {"mask": torch.tensor([[True] * 6 + [False], [True, False] * 3 + [True]])}),
    "pairs": ({}, {"mask": torch.ones(7, 7, dtype=torch.bool).tril(2)}),
    "pairs of each": ({"G": 2}, {"mask": torch.ones(2, 7, 7, dtype=torch.bool).tril(1)}),
    "added": ({}, {"mask": torch.linspace(-1, 1, 49).view(1, 1, 7, 7)}),
    "registers": ({}, {"pope_pos_emb_indices": torch.tensor([0, 1, 3, 4, 6])}),
    "registers, causal": ({}, {"pope_pos_emb_indices": torch.arange(5), "causal": True}),
    "registers, masked": (
        {"G": 2},
        {
            "pope_pos_emb_indices": torch.arange(2, 7),
            "mask": torch.tensor([[True] * 6 + [False], [True, False] * 3 + [True]]),
        },
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_same_outputs_and_gradients(name: str) -> None:
    """Against theirs in float64: our error in float32 is at most twice theirs."""
    sizes, options = SAME[name]
    count = sizes.get("R", 16)
    length = 5 if "pope_pos_emb_indices" in options else 7
    found = []
    for package, dtype in ((theirs, torch.float64), (theirs, F32), (ours, F32)):
        x = case(dtype, **sizes)
        # Frequencies and phases of theirs are exact in the first of the three.
        made = package.PoPE(count, heads=4, inv_freqs=geometric(count).to(dtype)).to(dtype)
        pair_of(made, x["bias"])
        given = dict(options)
        if "mask" in given and given["mask"].is_floating_point():
            given["mask"] = given["mask"].to(dtype)
        out = package.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=made(length), **given)
        found.append(results(out, x["q"], x["k"], x["v"], made.bias))
    wanted, rounded, got = found
    within(got, wanted, rounded, F32)


@pytest.mark.parametrize("sizes", [{"D": 32, "R": 32}, {"D": 32, "R": 8, "G": 2}], ids=str)
def test_same_similarity_and_widened(sizes: dict[str, int]) -> None:
    wide = sizes["R"]
    found: dict[str, list[list[Tensor]]] = {"similarity": [], "widened": [], "complex": []}
    for package, dtype in ((theirs, torch.float64), (theirs, F32), (ours, F32)):
        x = case(dtype, **sizes)
        made = package.PoPE(wide, heads=4, inv_freqs=geometric(wide).to(dtype)).to(dtype)
        pair_of(made, x["bias"])
        q, k = x["q"], x["k"]
        found["similarity"].append(
            results(package.compute_attn_similarity(q, k, made(7)), q, k, made.bias)
        )
        k = k.repeat(1, 4 // k.shape[1], 1, 1)
        widened = made.apply_pope_to_qk(made(7), q, k)
        found["widened"].append([y.detach().double() for y in widened])
        turned = made.apply_pope_to_qk(made(7), q, k, return_complex=True)
        found["complex"].append([torch.view_as_real(y).detach().double() for y in turned])
    for wanted, rounded, got in found.values():
        within(got, wanted, rounded, F32)


def test_embeddings_of_theirs_are_taken() -> None:
    """A model built with their modules may call our functions."""
    x = case(F32)
    old, new = both(x)
    one, two = (
        ours.flash_attn_with_pope(x["q"], x["k"], x["v"], made(7), causal=True)
        for made in (old, new)
    )
    assert max(off([one.detach()], [two.detach()])) < 64 * torch.finfo(F32).eps


# Positions


@pytest.mark.parametrize("start", [10**6 + 3, 10**7 + 19])
def test_far_positions(start: int) -> None:
    """Scores depend on distances alone; theirs round an angle in float32, its phase with it."""
    at = torch.arange(start, start + 7)
    x = case(torch.float64)
    wanted = scores(x["q"], x["k"], at[:, None] * geometric(16), x["bias"])
    y = case(F32, D=16)
    rounded = scores(y["q"], y["k"], at[:, None] * geometric(16), y["bias"])
    old, new = both(y)
    near = theirs.attention.compute_attn_similarity_non_fused(y["q"], y["k"], old(at))
    assert off([near.detach().double()], [wanted.detach()])[0] > 1e-3
    for pair in (new(at), new(7, offset=start)):
        got = ours.compute_attn_similarity(y["q"], y["k"], pair)
        within([got.detach()], [wanted.detach()], [rounded.detach()], F32, float(start))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_in_low_precision_keeps_its_positions(dtype: torch.dtype) -> None:
    """``model.to(bfloat16)`` casts their frequencies, and positions are counted in bfloat16."""
    old, new = (m.PoPE(16, heads=4).to(dtype) for m in (theirs, ours))
    exact = (torch.arange(2100)[:, None] * geometric(16)).float()
    assert float((old(2100).freqs.float() - exact).abs().max()) > 0.5
    if dtype == torch.bfloat16:
        assert len(set(old(2100).freqs[:, 0].tolist())) < 2100  # positions that fall together
    torch.testing.assert_close(new(2100).freqs, exact, rtol=2**-23, atol=0)


def test_queries_and_keys_in_bfloat16() -> None:
    """Theirs, unfused, make float32 features of them and PyTorch refuses the mixture."""
    x = case(torch.bfloat16)
    old, new = both(x)
    old, new = old.float(), new.float()
    with pytest.raises(RuntimeError, match="same dtype"):
        theirs.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=old(7))
    out = ours.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=new(7))
    exact = {name: y.detach().double() for name, y in x.items()}
    wanted = attend(
        scores(exact["q"], exact["k"], torch.arange(7)[:, None] * geometric(16), exact["bias"]),
        exact["v"],
        0.25,
    )
    assert out.dtype == torch.bfloat16
    # Features, weights and output rounded: bfloat16 has 8 bits.
    assert off([out.detach().double()], [wanted])[0] < 8 * 2**-8


def test_one_row_of_angles_is_not_that_of_every_key() -> None:
    """A step with a cache that embeds its own position alone: theirs turn all keys alike."""
    x = case(F32, T=1)
    old, new = both(x)
    wrong = theirs.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=old(1))
    right = theirs.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=old(7))
    assert off([wrong.detach()], [right.detach()])[0] > 1e-2
    with pytest.raises(ValueError, match="1 positions"):
        ours.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=new(1))


# Masks


def test_causal_with_fewer_queries_than_keys() -> None:
    """Theirs, unfused, place the queries last and mask them as if they were first."""
    x = case(F32)
    old, new = both(x)
    whole = theirs.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=old(7), causal=True)
    call = (x["q"][:, :, -3:], x["k"], x["v"])
    wrong = theirs.flash_attn_with_pope(*call, pos_emb=old(7), causal=True, fused=False)
    assert off([wrong.detach()], [whole[:, :, -3:].detach()])[0] > 0.1
    got = ours.flash_attn_with_pope(*call, pos_emb=new(7), causal=True)
    assert off([got.detach()], [whole[:, :, -3:].detach()])[0] < 64 * torch.finfo(F32).eps


def test_causal_and_a_mask() -> None:
    """The example of their README, which runs on a GPU alone."""
    x = case(F32)
    old, new = both(x)
    mask = torch.ones(2, 7, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="attn_mask"):
        theirs.flash_attn_with_pope(
            x["q"], x["k"], x["v"], pos_emb=old(7), causal=True, mask=mask, fused=False
        )
    plain = ours.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=new(7), causal=True)
    masked = ours.flash_attn_with_pope(
        x["q"], x["k"], x["v"], pos_emb=new(7), causal=True, mask=mask
    )
    assert off([masked.detach()], [plain.detach()])[0] < 64 * torch.finfo(F32).eps


def test_a_mask_of_keys_with_as_many_sequences_as_queries() -> None:
    """``(B, S)`` with ``B = T`` is read as ``(T, S)``."""
    x = case(F32, B=7)
    old, new = both(x)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    wrong, right = (
        theirs.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=old(7), mask=m)
        for m in (mask, mask[:, None, None])
    )
    assert off([wrong.detach()], [right.detach()])[0] > 0.1
    got = ours.flash_attn_with_pope(
        x["q"], x["k"], x["v"], pos_emb=new(7), mask=mask[:, None, None]
    )
    assert off([got.detach()], [right.detach()])[0] < 64 * torch.finfo(F32).eps
    with pytest.raises(ValueError, match="B = T"):
        ours.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=new(7), mask=mask)


def test_registers_that_see_nothing() -> None:
    x = case(F32)
    old, new = both(x)
    given = {"mask": torch.zeros(2, 7, dtype=torch.bool), "pope_pos_emb_indices": torch.arange(5)}
    out = theirs.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=old(5), **given)
    assert bool(out.isnan().all())
    out = ours.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=new(5), **given)
    assert bool((out == 0).all())


# Phases


def test_phases_do_not_die() -> None:
    """Zero is a bound: of phases that start there, the first step ends those that it raises."""
    x = case(F32)
    for package, dead in ((theirs, True), (ours, False)):
        made = package.PoPE(16, heads=4)
        step = torch.optim.SGD(made.parameters(), lr=1.0)
        grads = []
        for _ in range(2):
            step.zero_grad()
            out = package.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=made(7))
            out.square().sum().backward()
            grads.append(made.bias.grad.clone())
            step.step()
        raised = grads[0] < 0
        assert 0.2 < float(raised.float().mean()) < 0.9
        assert bool((grads[1][raised] == 0).all()) == dead


@pytest.mark.parametrize("name", ["PoPE", "AxialPoPE"])
def test_uniform_phases(name: str) -> None:
    with pytest.raises(RuntimeError, match="in-place"):
        getattr(theirs, name)(16, heads=4, bias_uniform_init=True)
    assert float(getattr(ours, name)(16, heads=4, bias_uniform_init=True).bias.min()) < -1


# Arguments


def test_frequencies_as_a_list() -> None:
    with pytest.raises(TypeError):
        theirs.PoPE(4, heads=4, inv_freqs=[1.0, 0.5, 0.2, 0.1])
    assert ours.PoPE(4, heads=4, inv_freqs=[1.0, 0.5, 0.2, 0.1]).inv_freqs.shape == (4,)


def test_grouped_heads_after_the_sequence() -> None:
    """Theirs repeat the axis of the sequence for that of the heads."""
    x = case(F32, G=2)
    old, new = both(x)
    turned = [x[name].transpose(1, 2) for name in "qkv"]
    with pytest.raises(RuntimeError, match="must match"):
        theirs.flash_attn_with_pope(*turned, pos_emb=old(7), head_dimension_at_first=False)
    wanted = theirs.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=old(7))
    got = ours.flash_attn_with_pope(*turned, pos_emb=new(7), head_dimension_at_first=False)
    error = off([got.transpose(1, 2).detach()], [wanted.detach()])[0]
    assert error < 64 * torch.finfo(F32).eps


def test_registers_and_a_cache_or_positions_of_each() -> None:
    x = case(F32, T=3)
    old, new = both(x)
    given = {"pope_pos_emb_indices": torch.arange(5)}
    with pytest.raises(IndexError):
        theirs.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=old(5), **given)
    ours.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=new(5), **given)
    x = case(F32)
    each = torch.stack((torch.arange(5), torch.arange(5).flip(0))).float()
    with pytest.raises(RuntimeError, match="shape mismatch"):
        theirs.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=old(each), **given)
    ours.flash_attn_with_pope(x["q"], x["k"], x["v"], pos_emb=new(each), **given)


def test_dropout_among_registers() -> None:
    """Theirs drop only where values require grad, here and nowhere else."""
    x = {name: y.detach() for name, y in case(F32).items()}
    old, new = both(x)
    given = {"pope_pos_emb_indices": torch.arange(5)}
    for package, made, same in ((theirs, old, True), (ours, new, False)):
        call = (x["q"], x["k"], x["v"], made(5))
        with torch.no_grad():
            whole = package.flash_attn_with_pope(*call, **given)
            dropped = package.flash_attn_with_pope(*call, **given, dropout=0.5)
        assert torch.equal(whole, dropped) == same


def test_head_dims_of_the_similarity() -> None:
    x = case(F32, D=40, R=40)
    old, new = both(x, 40)
    with pytest.raises(AssertionError, match="common sizes"):
        theirs.compute_attn_similarity(x["q"], x["k"], old(7))
    assert ours.compute_attn_similarity(x["q"], x["k"], new(7)).shape == (2, 4, 7, 7)


def test_no_embedding() -> None:
    """The default of the argument, with which theirs cannot be called."""
    x = case(F32)
    with pytest.raises(TypeError):
        theirs.flash_attn_with_pope(x["q"], x["k"], x["v"])
    got = ours.flash_attn_with_pope(x["q"], x["k"], x["v"])
    wanted = F.scaled_dot_product_attention(x["q"], x["k"], x["v"])
    assert off([got.detach()], [wanted.detach()])[0] < 64 * torch.finfo(F32).eps


def test_softplus_in_float64() -> None:
    """PyTorch's default cuts it off at 20, off by 2e-9; ours at 40, where float64 ends."""
    x = torch.full((1, 1, 1, 1), 20.5, dtype=torch.float64)
    made = ours.PoPE(1, heads=1).double(), theirs.PoPE(1, heads=1).double()
    new, old = (m.apply_pope_to_qk(m(1), x, x)[0][..., 0].item() for m in made)
    exact = torch.logaddexp(x, torch.zeros_like(x)).item()
    assert abs(new - exact) < 1e-14 and abs(old - exact) > 1e-9


def test_order_of_the_axes_of_a_grid_is_kept() -> None:
    """Last first, whatever their README says of ``(t, x, y)``: weights were trained with it."""
    assert torch.equal(
        ours.AxialPoPE.get_grid_positions(2, 3, 4), theirs.AxialPoPE.get_grid_positions(2, 3, 4)
    )
    one, two = (m.AxialPoPE(16, heads=4, axial_dims=(8, 4, 4))((2, 3, 4)) for m in (theirs, ours))
    torch.testing.assert_close(one.freqs, two.freqs, rtol=1e-6, atol=0)


# Their kernel, in Triton's interpreter


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`flash_attn_with_pope` through their kernel, on a CPU."""
    import importlib
    import os

    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter, which is on where there is no GPU")
    module = importlib.import_module("PoPE_pytorch.triton_pope_flash_attn")
    monkeypatch.setattr(module, "_NO_AUTOTUNE", True)
    monkeypatch.setattr(module, "_filter_configs", lambda configs, *rest: configs)

    def call(*args: Any, **more: Any) -> Tensor:
        out: Tensor = theirs.flash_attn_with_pope(*args, **more, fused=True)
        return out

    return call


@pytest.mark.parametrize("length, wrong", [(64, False), (62, True)])
def test_gradients_of_their_kernel(kernel: Any, length: int, wrong: bool) -> None:
    """62 bands, full attention, as in BS-RoFormer: keys beyond the end leak into q and bias.

    The backward pass hides them only where there is a mask or causality. 64 is a whole number of
    blocks.
    """
    sizes = {"B": 1, "H": 2, "G": 2, "T": length, "S": length}
    x, y = case(torch.float64, **sizes), case(F32, **sizes)
    wanted = results(
        attend(
            scores(x["q"], x["k"], torch.arange(length)[:, None] * geometric(16), x["bias"]),
            x["v"],
            0.25,
        ),
        *x.values(),
    )
    old, new = both(y)
    call = (y["q"], y["k"], y["v"])
    inputs = (*call, old.bias)
    got = dict(
        zip("oqkvb", off(results(kernel(*call, old(length)), *inputs), wanted), strict=True)
    )
    assert all((got[name] > 1e-2) == wrong for name in "qb"), got
    assert all(got[name] < 1e-5 for name in "okv"), got
    mine = results(ours.flash_attn_with_pope(*call, new(length)), *call, new.bias)
    assert max(off(mine, wanted)) < 1e-5
