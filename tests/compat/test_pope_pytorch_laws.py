"""The functions of `whatwhere.compat.pope_pytorch` against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plain_pope import attend, case, geometric, off, results, scores, within
from whatwhere.compat.pope_pytorch import (
    AxialPoPE,
    PolarEmbedReturn,
    PoPE,
    apply_pope_to_qk,
    compute_attn_similarity,
    flash_attn_with_pope,
)

DTYPES = (torch.float64, torch.float32)
F64 = torch.float64


def module(bias: Tensor, dim: int) -> PoPE:
    """A module with this phase as its parameter, so that gradients reach ``bias``."""
    made = PoPE(dim, heads=bias.shape[0])
    made.bias = torch.nn.Parameter(bias.detach().clone())
    return made


def check(
    sizes: dict[str, int],
    options: dict[str, Any],
    angles: Tensor,
    embed: Any = None,
    bias_rows: Any = None,
    **plain: Any,
) -> None:
    """Outputs and gradients for q, k, v and bias, in both dtypes."""
    scale = options.get("softmax_scale", sizes.get("D", 16) ** -0.5)
    wanted = None
    for dtype in DTYPES:
        x = case(dtype, **sizes)
        rows = slice(None) if bias_rows is None else bias_rows
        bias = x["bias"][rows]
        of_each = bias[[h % len(bias) for h in range(x["q"].shape[1])]]
        placed = plain.get("placed")
        formula = attend(
            scores(x["q"], x["k"], angles, of_each, placed),
            x["v"],
            scale,
            **{name: value for name, value in plain.items() if name != "placed"},
        )
        rounded = results(formula, *x.values())
        wanted = rounded if wanted is None else wanted
        made = embed(bias) if embed else module(bias, angles.shape[-1])(x["k"].shape[2])
        # The leaf is in the case, so that gradients can be compared.
        pair = PolarEmbedReturn(made[0], bias)
        pair.exact = getattr(made, "exact", None)
        out = flash_attn_with_pope(x["q"], x["k"], x["v"], pair, **options)
        assert out.dtype == dtype
        largest = float(angles.abs().max())
        within(results(out, *x.values()), wanted, rounded, dtype, largest)


def at(*positions: float, dim: int = 16) -> Tensor:
    return torch.tensor(positions, dtype=F64)[:, None] * geometric(dim)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"T": 1, "S": 9},
        {"T": 3, "S": 9},
        {"G": 2},
        {"G": 1},
        {"V": 5},
        {"V": 40},
        {"R": 6},
        {"G": 2, "R": 6, "T": 3, "S": 8, "V": 5},
        {"H": 6, "G": 3, "T": 5, "S": 61},
    ],
    ids=str,
)
def test_attention_is_the_formula(sizes: dict[str, int], causal: bool) -> None:
    n = sizes.get("S", 7)
    check(sizes, {"causal": causal}, at(*range(n), dim=sizes.get("R", 16)), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_float_and_exact_embeddings_agree(causal: bool) -> None:
    """``tuple(pos_emb)`` forgets what the angles were rounded from."""
    angles = at(*range(9))
    check(
        {"S": 9, "T": 4},
        {"causal": causal},
        angles.float().double(),
        embed=lambda bias: (angles.float(), bias),
        causal=causal,
    )


@pytest.mark.parametrize("rows", [slice(0, 2), slice(0, 1)], ids=["of key heads", "one"])
def test_phases_of_key_heads(rows: slice) -> None:
    check({"G": 2}, {}, at(*range(7)), bias_rows=rows)


def test_scale() -> None:
    check({}, {"softmax_scale": 0.7}, at(*range(7)))
    x = case(F64)
    pair = module(x["bias"], 16)(7)
    one = flash_attn_with_pope(x["q"], x["k"], x["v"], pair, softmax_scale=torch.tensor(0.7))  # type: ignore[arg-type]
    two = flash_attn_with_pope(
        x["q"], x["k"], x["v"], pair, softmax_scale=float(torch.tensor(0.7))
    )
    assert torch.equal(one, two)


MASKS = {
    "keys": (2, 9),
    "pairs": (5, 9),
    "batch of pairs": (2, 5, 9),
    "one of a batch": (2, 1, 9),
    "heads": (2, 4, 5, 9),
    "heads alone": (1, 4, 1, 9),
    "keys, four axes": (2, 1, 1, 9),
}


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [4, 2])
def test_masks(shape: tuple[int, ...], kind: str, causal: bool, shared: int) -> None:
    mask = torch.rand(shape) < 0.6
    mask[(0,) * (len(shape) - 1)] = False  # a row of nothing
    wide = {2: mask[None, None], 3: mask[:, None], 4: mask}[mask.ndim]
    wide = mask[:, None, None] if shape == (2, 9) else wide
    given, plain = mask, {"seen": wide}
    if kind == "added":
        given = torch.randn(shape).masked_fill(~mask, float("-inf"))
        plain["added"] = torch.where(mask, given, 0.0).view(wide.shape).double()
    sizes = {"T": 5, "S": 9, "G": shared}
    check(sizes, {"mask": given, "causal": causal}, at(*range(9)), causal=causal, **plain)


def test_a_query_that_sees_nothing_gets_zeros_and_zero_gradients() -> None:
    for hidden in (torch.zeros(2, 7, dtype=torch.bool), torch.zeros(2, 7, 7, dtype=torch.bool)):
        for indices in (None, torch.arange(7)):
            x = case(torch.float32)
            out = flash_attn_with_pope(
                x["q"],
                x["k"],
                x["v"],
                module(x["bias"], 16)(7),
                mask=hidden,
                pope_pos_emb_indices=indices,
            )
            assert all(bool((r == 0).all()) for r in results(out, x["q"], x["k"], x["v"]))


def test_hidden_keys_may_hold_anything() -> None:
    x = case(torch.float32)
    seen = torch.ones(2, 7, dtype=torch.bool)
    seen[:, 4:] = False
    pair = module(x["bias"], 16)(7)
    clean = flash_attn_with_pope(x["q"], x["k"], x["v"], pair, mask=seen)
    k, v = (x[name].detach().clone() for name in "kv")
    k[:, :, 4:], v[:, :, 4:] = float("nan"), float("inf")
    assert torch.equal(flash_attn_with_pope(x["q"], k, v, pair, mask=seen), clean)


POSITIONS = {
    "gaps": [0, 5, 9, 1000, 77, 3, 12],
    "negative": [-7, 5, -100, 3, 2, 1, 0],
    "fractions": [0.5, 1.25, -3.5, 7.0, 100.0, 2.0, 2.0],
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal by place"])
@pytest.mark.parametrize("places", POSITIONS.values(), ids=POSITIONS.keys())
def test_positions_of_ones_own(places: list[float], causal: bool) -> None:
    given = torch.tensor(places)
    check(
        {"T": 5},
        {"causal": causal},
        at(*places),
        embed=lambda bias: module(bias, 16)(given),
        causal=causal,
    )


def test_positions_of_each_sequence_and_head() -> None:
    each = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [3, 9, 1, 100, 2, 0, 7]])
    angles = each.double()[:, None, :, None] * geometric(16)
    check({"T": 4}, {}, angles, embed=lambda bias: module(bias, 16)(each))
    heads = torch.randint(50, (2, 4, 7))
    angles = heads.double()[..., None] * geometric(16)
    mask = torch.rand(2, 4, 4, 7) < 0.6
    for shared in (4, 2):
        sizes = {"T": 4, "G": shared}
        check(sizes, {}, angles, embed=lambda bias: module(bias, 16)(heads))
        check(sizes, {"mask": mask}, angles, embed=lambda bias: module(bias, 16)(heads), seen=mask)


@pytest.mark.parametrize("offset", [3, 2.5, torch.tensor(4), torch.tensor([[1], [5]])], ids=str)
def test_offset(offset: Any) -> None:
    """A shift of all positions is none of the scores; one of each sequence is not either."""
    angles = (torch.arange(7)[None] + offset).double()[..., None] * geometric(16)
    pair = PoPE(16, heads=4)(7, offset=offset)
    expected = angles if isinstance(offset, Tensor) and offset.ndim else angles[0]
    torch.testing.assert_close(pair.freqs, expected.float(), rtol=1e-7, atol=0)
    check(
        {},
        {"causal": True},
        angles[:, None],
        embed=lambda bias: module(bias, 16)(7, offset=offset),
        causal=True,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_axial(causal: bool) -> None:
    """A grid of 2 x 3 x 2, the last of its sizes counted by the first channels."""
    made = AxialPoPE(16, heads=4, axial_dims=(8, 4, 4))
    places = [(x, y, t) for t in range(2) for y in range(3) for x in range(2)]
    angles = torch.tensor(
        [
            [p[a] * f for a, n in enumerate((8, 4, 4)) for f in geometric(n).tolist()]
            for p in places
        ],
        dtype=F64,
    )
    sizes = {"T": 12, "S": 12}
    check(sizes, {"causal": causal}, angles, embed=lambda bias: made((2, 3, 2)), causal=causal)
    own = AxialPoPE.get_grid_positions(2, 3, 2)
    assert own.tolist() == [list(map(float, p)) for p in places]
    check(sizes, {"causal": causal}, angles, embed=lambda bias: made(own), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"G": 2, "R": 6}, {"T": 3}], ids=str)
@pytest.mark.parametrize("as_bool", [False, True])
def test_places_without_positions(sizes: dict[str, int], causal: bool, as_bool: bool) -> None:
    """Registers among patches: the pairs of two patches alone score by position."""
    indices = torch.tensor([1, 2, 4, 5]) if as_bool else torch.tensor([4, 1, 2, 5])
    own = (0, 1, 2, 3) if as_bool else (2, 0, 1, 3)
    angles = torch.zeros(7, sizes.get("R", 16), dtype=F64)
    angles[torch.tensor([1, 2, 4, 5])] = at(0, 1, 2, 3, dim=sizes.get("R", 16))
    placed = torch.zeros(7, dtype=torch.bool)
    placed[indices] = True
    mask = torch.rand(2, 7) < 0.8
    check(
        sizes,
        {
            "pope_pos_emb_indices": placed if as_bool else indices,
            "causal": causal,
            "mask": mask,
        },
        angles,
        embed=lambda bias: module(bias, sizes.get("R", 16))(torch.tensor(own)),
        placed=placed,
        causal=causal,
        seen=mask[:, None, None],
    )


def test_heads_last_is_the_same() -> None:
    x = case(torch.float32, G=2, T=5, V=5)
    pair = module(x["bias"], 16)(7)
    for more in ({"causal": True}, {"mask": torch.rand(2, 5, 7) < 0.7}):
        out = flash_attn_with_pope(x["q"], x["k"], x["v"], pair, **more)
        turned = (x[name].transpose(1, 2) for name in "qkv")
        other = flash_attn_with_pope(*turned, pair, head_dimension_at_first=False, **more)
        assert torch.equal(other.transpose(1, 2), out)
    one = compute_attn_similarity(x["q"], x["k"], pair)
    two = compute_attn_similarity(
        x["q"].transpose(1, 2), x["k"].transpose(1, 2), pair, head_dimension_at_first=False
    )
    assert torch.equal(one, two)


def test_dropped_weights_are_nothing_or_made_up_for() -> None:
    """With one-hot values the output is the weights themselves."""
    x = case(F64)
    for more in ({}, {"pope_pos_emb_indices": torch.arange(7)}):
        with torch.no_grad():
            v = torch.eye(7, dtype=F64).expand(2, 4, 7, 7)
            pair = module(x["bias"], 16)(7)
            whole = flash_attn_with_pope(x["q"], x["k"], v, pair, causal=True, **more)
            kept = flash_attn_with_pope(x["q"], x["k"], v, pair, causal=True, dropout=0.5, **more)
        gone = kept == 0
        torch.testing.assert_close(kept[~gone], 2 * whole[~gone], rtol=1e-12, atol=0)
        share = gone[whole > 0].double().mean()
        # 224 weights: four standard deviations of a fair coin.
        assert abs(share - 0.5) < 4 * 0.5 / 224**0.5


def test_no_positions_is_plain_attention() -> None:
    x = case(F64, G=2)
    out = flash_attn_with_pope(x["q"], x["k"], x["v"], causal=True)
    k = x["k"][:, [0, 1, 0, 1]]
    wanted = attend(x["q"] @ k.mT, x["v"], 0.25, causal=True)
    assert off([out.detach()], [wanted.detach()])[0] < 1e-14


@pytest.mark.parametrize("sizes", [{}, {"G": 2, "R": 6, "T": 3}, {"D": 40, "R": 40}], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_similarity_is_the_formula(sizes: dict[str, int], mixed: bool) -> None:
    count = sizes.get("R", 16)
    placed, indices, n = None, None, 7
    if mixed:
        indices, n = torch.tensor([0, 2, 3, 6]), 4
        placed = torch.zeros(7, dtype=torch.bool)
        placed[indices] = True
    angles = torch.zeros(7, count, dtype=F64)
    angles[slice(None) if indices is None else indices] = at(*range(n), dim=count)
    wanted = None
    for dtype in DTYPES:
        x = case(dtype, **sizes)
        rounded = results(
            scores(x["q"], x["k"], angles, x["bias"], placed), x["q"], x["k"], x["bias"]
        )
        wanted = rounded if wanted is None else wanted
        made = module(x["bias"], count)(n)
        pair = PolarEmbedReturn(made.freqs, x["bias"])
        pair.exact = made.exact
        got = compute_attn_similarity(x["q"], x["k"], pair, pope_pos_emb_indices=indices)
        within(results(got, x["q"], x["k"], x["bias"]), wanted, rounded, dtype)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"R": 6, "T": 3}], ids=str)
def test_widened_products_are_the_scores(sizes: dict[str, int], complex_: bool) -> None:
    wanted = None
    count = sizes.get("R", 16)
    for dtype in DTYPES:
        x = case(dtype, **sizes)
        rounded = results(
            scores(x["q"], x["k"], at(*range(7), dim=count), x["bias"]), *list(x.values())[:2]
        )
        wanted = rounded if wanted is None else wanted
        pair = module(x["bias"], count)(7)
        q, k = apply_pope_to_qk(pair, x["q"], x["k"], return_complex=complex_)
        found = (q @ k.mH).real if complex_ else q @ k.mT
        within(results(found, x["q"], x["k"]), wanted, rounded, dtype)


def test_other_magnitudes() -> None:
    x = case(F64)
    pair = module(x["bias"], 16)(7)
    q, k = apply_pope_to_qk(pair, x["q"], x["k"], to_magnitude=torch.exp)
    angles = at(*range(7))
    turn = (angles[None, :] - angles[:, None] + x["bias"][:, None, None]).cos()
    wanted = (x["q"].exp()[:, :, :, None] * x["k"].exp()[:, :, None] * turn).sum(-1)
    assert off([(q @ k.mT).detach()], [wanted.detach()])[0] < 1e-14


def test_frequencies_can_be_learned() -> None:
    """Frequencies that require grad get one, as with theirs."""
    made = AxialPoPE(16, heads=4, axial_dims=(8, 8)).double()
    for one in made.inv_freqs:
        one.requires_grad_()
    x = case(F64, T=6, S=6)
    grid = AxialPoPE.get_grid_positions(2, 3).double()
    rows = [r.detach().clone().requires_grad_() for r in made.inv_freqs]
    angles = torch.cat([grid[:, a, None] * rows[a] for a in (0, 1)], dim=-1)
    wanted = results(attend(scores(x["q"], x["k"], angles, made.bias), x["v"], 0.25), *rows)
    out = flash_attn_with_pope(x["q"], x["k"], x["v"], made((2, 3)))
    assert max(off(results(out, *made.inv_freqs), wanted)) < 1e-12


def test_gradients_by_differences() -> None:
    x = case(F64, B=1, H=2, G=1, T=3, S=4, D=4, V=3, R=3)
    for more in ({}, {"mask": torch.ones(1, 3, 4).tril(1).bool()}):

        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, more: Any = more) -> Tensor:
            pair = (torch.arange(4.0).double()[:, None] * geometric(3), bias)
            return flash_attn_with_pope(q, k, v, pair, **more)

        assert torch.autograd.gradcheck(call, tuple(x.values()))


def test_compiles_whole() -> None:
    x = case(torch.float32)
    made = module(x["bias"], 16)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_with_pope(q, k, v, made(q.shape[2]), causal=True)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    inputs = (x["q"], x["k"], x["v"])
    one, two = results(call(*inputs), *inputs), results(compiled(*inputs), *inputs)
    assert max(off(two, one)) < 16 * torch.finfo(torch.float32).eps
