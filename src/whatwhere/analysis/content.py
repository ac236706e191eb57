"""How content enters the phase of a score: use of frequencies, and entanglement of what and where.

A rotary pair of channels, or a polar channel, is a complex number ``z``: its length a magnitude,
its angle a phase. A score is ``Re sum_c z_q,c conj(z_k,c) exp(i (t - s) theta_c)``; RoPE's phases
come from content, PoPE's from ``delta`` alone (arXiv 2509.10534).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whatwhere.analysis.capture import Seen
from whatwhere.analysis.layers import AttentionLayer


@dataclass(frozen=True, eq=False)
class Content:
    """Of one layer, by text.

    Attributes:
        query_norm: ``(B, H, R)`` mean over tokens of the length of each pair or polar channel.
        key_norm: ``(B, G, R)``.
        content_shift: ``(B, H)``, see `measure`.
        offset_shift: ``(B, H)`` tokens.
    """

    query_norm: Tensor
    key_norm: Tensor
    content_shift: Tensor
    offset_shift: Tensor


def measure(seen: Seen, samples: int = 16) -> Content | None:
    """Use of frequencies, and how far content moves a score along positions.

    ``content_shift`` of a head: with ``phi_c`` the phase between a query and a key in frequency
    ``c`` and ``w_c`` the product of their magnitudes,
    ``1 - sum_c |mean(w_c e^{i phi_c})| / sum_c mean(w_c)`` over all pairs of a query's and a key's
    content in the text. A frequency's contribution peaks where ``(t - s) theta_c = phi_c``: if the
    content leaves that place alone the share is 0, as in PoPE by construction; if it puts the peak
    anywhere, 1.

    ``offset_shift`` of a head, in tokens: the offset ``t - s`` in ``[0, T)`` at which the score of
    a query's and a key's content is largest, and how far that of two pairs of contents lies apart
    on average (Gini's mean difference), over ``samples^2`` pairs. Channels that do not turn are
    the same at all offsets.

    Both make a number of what section 3 of arXiv 2509.10534 says in words; they are ours.

    Args:
        seen: What the layer computes its scores from.
        samples: Queries and keys, spread evenly over the text, for ``offset_shift``.

    Returns:
        The measures, or ``None`` if nothing in the layer turns in a known way.
    """
    layer = seen.layer
    if layer.feature not in ("rotate", "polar") or not layer.frequencies:
        return None
    batch, heads = seen.queries_before.shape[:2]
    groups, shared = layer.key_heads, heads // layer.key_heads
    count = len(layer.frequencies)
    new = seen.queries.new_empty
    query_norm = new(batch, heads, count, dtype=torch.float64)
    key_norm = new(batch, groups, count, dtype=torch.float64)
    shift, offset = new(2, batch, heads, dtype=torch.float64)
    turns = _turns(layer, seen.queries_before.shape[2], seen.queries.device)
    for text in range(batch):
        for group in range(groups):
            key = polar_form(seen.keys_before[text, group].double(), layer)
            key_norm[text, group] = key.abs().mean(0)
            for head in range(group * shared, (group + 1) * shared):
                query = polar_form(seen.queries_before[text, head].double(), layer)
                query_norm[text, head] = query.abs().mean(0)
                together = query.mean(0).abs() * key.mean(0).abs()
                alone = query_norm[text, head] * key_norm[text, group]
                shift[text, head] = 1 - together.sum() / alone.sum()
                phase = None if seen.phase is None else seen.phase[head].detach().double()
                offset[text, head] = _offset_shift(query, key, phase, turns, samples)
    return Content(query_norm.cpu(), key_norm.cpu(), shift.cpu(), offset.cpu())


def polar_form(x: Tensor, layer: AttentionLayer) -> Tensor:
    """Channels ``(..., D)`` before the encoding as ``(..., R)`` complex numbers.

    For polar features these are magnitudes, real (and not negative but for the ablation that
    leaves channels signed); they are returned as real numbers, whose phase no rounding can touch.
    """
    if layer.feature == "polar":
        return x[..., : len(layer.frequencies)]
    first, second = (
        torch.tensor(side, device=x.device) for side in zip(*layer.pairs, strict=True)
    )
    return torch.complex(x[..., first], x[..., second])


def _turns(layer: AttentionLayer, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin ``(R, T)`` of every frequency at every offset.

    In single precision: what is asked for is the place of a maximum, not its value.
    """
    theta = torch.tensor(layer.frequencies, dtype=torch.float64, device=device)
    angles = theta[:, None] * torch.arange(length, dtype=torch.float64, device=device)
    return angles.cos().float(), angles.sin().float()


def _offset_shift(
    query: Tensor, key: Tensor, phase: Tensor | None, turns: tuple[Tensor, Tensor], samples: int
) -> Tensor:
    """Mean distance between best offsets of two pairs of contents, in tokens."""
    length = query.shape[0]
    chosen = torch.linspace(0, length - 1, min(samples, length), device=query.device).long()
    products = (query[chosen, None] * key[chosen].conj()).flatten(0, 1)
    if phase is not None:
        products = products * torch.polar(torch.ones_like(phase), -phase)
    scores = products.real.float() @ turns[0]
    if products.is_complex():
        scores -= products.imag.float() @ turns[1]
    best = scores.argmax(-1).double().sort().values
    n = len(best)
    rank = torch.arange(n, device=best.device, dtype=torch.float64)
    return 2 * ((2 * rank - n + 1) * best).sum() / max(n * (n - 1), 1)
