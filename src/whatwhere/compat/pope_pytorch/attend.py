"""`flash_attn_with_pope` and `compute_attn_similarity` over `whatwhere.attention`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from whatwhere.attention import attention, scores
from whatwhere.attention.call import check_tensors
from whatwhere.attention.features import compute_dtype
from whatwhere.compat.pope_pytorch.masks import Mask, read_mask
from whatwhere.compat.pope_pytorch.polar import Embedding, check_length, read, turned, widen
from whatwhere.spec import ScoreSpec

PosEmb = Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Scored:
    """Queries and keys, heads that share a key head side by side, and the score of a pair.

    Attributes:
        q: ``(B, H, T, ...)``, raw or features.
        k: ``(B, G, S, ...)``.
        spec: The score.
        positions: Of the keys, queries being the last; ``None`` for 0..S-1.
    """

    q: Tensor
    k: Tensor
    spec: ScoreSpec
    positions: Tensor | None = None

    @property
    def query_positions(self) -> Tensor | None:
        """Of the queries."""
        if self.positions is None:
            return None
        return self.positions[..., self.k.shape[2] - self.q.shape[2] :, :]


def flash_attn_with_pope(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_emb: PosEmb | None = None,
    pope_pos_emb_indices: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    fused: bool | None = None,
    head_dimension_at_first: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with PoPE's scores (arXiv 2509.10534), the signature of PoPE-pytorch 0.2.1.

    Args:
        q: ``(B, H, T, D)`` queries, at the last T of the S positions.
        k: ``(B, G, S, D)`` keys; query head ``i`` uses key head ``i mod G``.
        v: ``(B, G, S, V)`` values.
        pos_emb: ``(freqs, bias)`` as `PoPE` and `AxialPoPE` return it, for S positions, with
            phases for H or G heads; ``None`` for plain attention.
        pope_pos_emb_indices: Places in the sequence of S that have the positions of ``pos_emb``,
            one each; every pair with another place scores ``sum_c q_c k_c``.
        mask: ``(B, S)``, ``(T, S)``, ``(B, T, S)`` or ``(B, H, T, S)``: bool, True where a key
            may be attended to, or numbers added to scores.
        causal: Whether a query sees only keys up to its own place, whatever the positions.
        softmax_scale: Factor of the scores; ``None`` is ``D ** -0.5``.
        fused: ``True`` for our Triton kernels (CUDA), ``False`` for PyTorch's, ``None`` for what
            is fastest.
        head_dimension_at_first: ``False`` if heads come after the sequence, ``(B, T, H, D)``.
        dropout: Share of the attention weights to drop, in every mode of every module: pass 0
            when evaluating.

    Returns:
        ``(B, H, T, V)``, or ``(B, T, H, V)``, in the dtype of ``v``. A query that sees no key
        gets zeros.

    Raises:
        ValueError: If arguments do not fit one another.
        UnsupportedError: If ``fused=True`` and our kernels cannot compute the call.
    """
    if not head_dimension_at_first:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: expected at least 0 and below 1")
    if fused and not q.is_cuda:
        raise ValueError(f"fused=True needs CUDA tensors, q is on {q.device}: leave it out")
    backend = "triton" if fused else "sdpa" if fused is False and q.is_cuda else "auto"
    options = (mask, causal, softmax_scale, dropout, backend)
    out = _attend(q, k, v, pos_emb, pope_pos_emb_indices, *options)
    return out if head_dimension_at_first else out.transpose(1, 2)


def compute_attn_similarity(
    q: Tensor,
    k: Tensor,
    pope: PosEmb,
    pope_pos_emb_indices: Tensor | None = None,
    allow_tf32: bool = True,
    head_dimension_at_first: bool = True,
) -> Tensor:
    """PoPE's scores (arXiv 2509.10534) before scale, mask and softmax.

    Args:
        q: ``(B, H, T, D)``, as for `flash_attn_with_pope`.
        k: ``(B, G, S, D)``.
        pope: As ``pos_emb`` there.
        pope_pos_emb_indices: As there.
        allow_tf32: ``False`` keeps products out of TF32 whatever PyTorch is told.
        head_dimension_at_first: As there; of the arguments alone.

    Returns:
        ``(B, H, T, S)``, on a GPU in the dtype of ``q``, else in the widest of ``q``, ``k`` and
        ``freqs``.

    Raises:
        ValueError: If arguments do not fit one another.
    """
    if not head_dimension_at_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    both = torch.promote_types(q.dtype, k.dtype)
    work = compute_dtype(both)
    if q.is_cuda and not allow_tf32 and torch.get_float32_matmul_precision() != "highest":
        work = torch.float64
    wide_q, wide_k = q.to(work), k.to(work)
    check_tensors(wide_q, wide_k, wide_k)
    scored = _scored(wide_q, wide_k, pope, pope_pos_emb_indices, 1.0, False, True)
    found = scores(
        scored.q,
        scored.k,
        scored.spec,
        query_positions=scored.query_positions,
        key_positions=scored.positions,
    )
    dtype = q.dtype if q.is_cuda else torch.promote_types(both, pope[0].dtype)
    return _heads_back(found, k.shape[1]).to(dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_emb: PosEmb | None,
    indices: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    dropout: float,
    backend: str,
) -> Tensor:
    """`flash_attn_with_pope` for heads before the sequence."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, values = q.to(dtype), k.to(dtype), v.to(dtype)
    check_tensors(q, k, values)
    seen = read_mask(mask, q, k)
    plain = seen.dense is None and not dropout
    scale = _scale(softmax_scale, q.shape[-1])
    scored = _scored(q, k, pos_emb, indices, scale, causal, plain)
    values = values.repeat_interleave(scored.k.shape[1] // k.shape[1], dim=1)
    if plain:
        out = attention(
            scored.q,
            scored.k,
            values,
            scored.spec,
            causal=causal,
            query_positions=scored.query_positions,
            key_positions=scored.positions,
            key_mask=seen.keys,
            backend=backend,
        )
    else:
        out = _dense(scored, values, k.shape[1], seen, causal, dropout)
    return _heads_back(out, k.shape[1]).to(v.dtype)


def _scale(given: float | None, head_dim: int) -> float:
    if given is None:
        return float(head_dim**-0.5)
    if isinstance(given, Tensor) and given.requires_grad:
        raise ValueError("softmax_scale requires grad: expected a number; scale q to learn it")
    if not 0 < float(given) < float("inf"):
        raise ValueError(f"softmax_scale={given}: expected a positive, finite number")
    return float(given)


def _heads_side_by_side(x: Tensor, shared: int) -> Tensor:
    """Query heads ``(g G + h)``, as theirs are grouped, in the order ``(h H/G + g)`` of ours."""
    if x.shape[1] == shared or shared == 1:
        return x
    apart: Tensor = x.unflatten(1, (-1, shared))
    return apart.transpose(1, 2).flatten(1, 2)


def _heads_back(x: Tensor, shared: int) -> Tensor:
    if x.shape[1] == shared or shared == 1:
        return x
    apart: Tensor = x.unflatten(1, (shared, -1))
    return apart.transpose(1, 2).flatten(1, 2)


def _phases(bias: Tensor, heads: int, shared: int) -> Tensor:
    """``(H, R)`` in our order, from phases of the query heads, of the key heads, or of one."""
    rows = bias.shape[0]
    if rows == heads:
        return _heads_side_by_side(bias[None], shared)[0]
    if rows == shared:
        return bias.repeat_interleave(heads // shared, dim=0)
    if rows == 1:
        return bias.expand(heads, -1)
    raise ValueError(f"bias is for {rows} heads: expected {heads} as q, {shared} as k, or 1")


def _scored(
    q: Tensor,
    k: Tensor,
    pos_emb: PosEmb | None,
    indices: Tensor | None,
    scale: float,
    causal: bool,
    plain: bool,
) -> Scored:
    """Raw queries and keys where the backends know the score, else features.

    They count positions for causality, which here goes by place.
    """
    heads, shared = q.shape[1], k.shape[1]
    if pos_emb is None:
        if indices is not None:
            raise ValueError("pope_pos_emb_indices needs pos_emb, the positions at these places")
        return Scored(_heads_side_by_side(q, shared), k, ScoreSpec("identity", scale))
    found = read(pos_emb, q, k)
    if found.angles.shape[1] not in (1, heads) or found.angles.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"freqs has shape {tuple(found.freqs.shape)}: batch and heads differ from q, "
            f"{tuple(q.shape)}"
        )
    bias = _phases(found.bias, heads, shared)
    grouped = _heads_side_by_side(q, shared)
    if indices is not None:
        return _mixed(grouped, k, found, bias, indices, scale)
    check_length(found, k.shape[2])
    exact = found.exact
    known = exact is not None and (exact.in_order or (exact.positions is not None and not causal))
    if exact is not None and known and plain:
        positions = None if exact.in_order else exact.positions
        return Scored(grouped, k, found.spec(bias, scale), positions)
    cos, sin = found.tables(compute_dtype(q.dtype))
    wide_q, wide_k = _features(grouped, k, cos, sin, bias)
    return Scored(wide_q.to(q.dtype), wide_k.to(q.dtype), ScoreSpec("identity", scale))


def _features(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """``(B, H, T, D + R)`` and ``(B, G or H, S, D + R)``, phases taken from the queries.

    Angles that differ between heads leave no keys to share.
    """
    if cos.shape[1] > 1:
        cos, sin = (_heads_side_by_side(x, k.shape[1]) for x in (cos, sin))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    last = k.shape[2] - q.shape[2]
    of_queries = turned(cos[..., last:, :], sin[..., last:, :], -bias.to(cos.dtype)[:, None])
    return widen(q, *of_queries), widen(k, cos, sin)


def _mixed(
    q: Tensor, k: Tensor, found: Embedding, bias: Tensor, indices: Tensor, scale: float
) -> Scored:
    """Some places with positions, the others without.

    With ``p`` 1 at the former, else 0, and features ``f``, the score of a pair is ``p_t p_s f_t
    f_s + (1 - p_t p_s) q k``, which is an inner product: of ``(p f, (1 - p) q, p q)`` and ``(p f,
    k, (1 - p) k)``.
    """
    total, last = k.shape[2], k.shape[2] - q.shape[2]
    placed = torch.zeros(total, dtype=torch.bool, device=q.device)
    placed[indices] = True
    count = indices.sum() if indices.dtype == torch.bool else indices.numel()
    check_length(found, int(count), "places in pope_pos_emb_indices")
    tables = []
    for x in found.tables(compute_dtype(q.dtype)):
        full = x.new_zeros(*x.shape[:2], total, x.shape[3])
        full[:, :, indices] = x
        tables.append(full)
    rotated_q, rotated_k = _features(q, k, tables[0], tables[1], bias)
    if rotated_k.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    here = placed[:, None].to(rotated_q.dtype)
    there = 1 - here
    queries = torch.cat((rotated_q * here[last:], q * there[last:], q * here[last:]), dim=-1)
    keys = torch.cat((rotated_k * here, k.to(here.dtype), k * there), dim=-1)
    return Scored(queries.to(q.dtype), keys.to(q.dtype), ScoreSpec("identity", scale))


def _dense(
    scored: Scored, v: Tensor, shared: int, mask: Mask, causal: bool, dropout: float
) -> Tensor:
    """PyTorch's attention over features, for masks of pairs and dropout, which backends lack.

    Args:
        scored: Features.
        v: ``(B, G, S, V)``, as many heads as the keys of ``scored``.
        shared: Key heads of the call, by which masks of heads are put in our order.
        mask: The mask.
        causal: Whether places after a query's own are hidden from it.
        dropout: Share of the weights to drop.
    """
    q, groups = scored.q, scored.q.shape[1] // scored.k.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (scored.k, v))
    seen, added = mask.seen(q, scored.k, causal)
    some = None
    if seen is not None:
        seen = _heads_side_by_side(seen, shared) if seen.shape[1] > 1 else seen
        some = seen.any(dim=-1, keepdim=True)
        # Where nothing is seen any finite scores do: the row becomes zeros.
        seen = seen | ~some
        if added is not None:
            added = _heads_side_by_side(added, shared) if added.shape[1] > 1 else added
            seen = added.masked_fill(~some, 0.0).masked_fill(~seen, float("-inf")).to(q.dtype)
    missing = q.shape[-1] - v.shape[-1] if q.device.type == "cpu" else 0
    with torch.autocast(q.device.type, enabled=False):
        # Values as wide as features: PyTorch's fused CPU kernel takes no others.
        out = F.scaled_dot_product_attention(
            q,
            keys,
            F.pad(values, (0, max(missing, 0))),
            attn_mask=seen,
            dropout_p=dropout,
            scale=scored.spec.scale,
        )[..., : v.shape[-1]]
    return out if some is None else torch.where(some, out, 0.0)
