"""Starting weights of a PoPE model from those of a trained RoPE model of the same shape.

RoPE's score of one head is ``sum_p Re[conj(z_q) z_k exp(i (s - t) theta_p)]`` over pairs, with
``z = x_p + i x_(p + R)`` (arXiv 2104.09864). PoPE's (arXiv 2509.10534) is a sum over channels, two
for each pair: ``sum_c softplus(q_c) softplus(k_c) cos((s - t) theta_c + delta_c)``. The phase of
``conj(z_q) z_k`` depends on the tokens and delta does not, so that no choice of weights makes the
two equal. But queries and keys of a trained head lie in clusters away from the origin
(arXiv 2603.18017), where that phase varies less and one sign is enough.

Every start here recombines the channels of each head linearly, ``q' = A q`` and ``k' = B k``, and
sets delta and the scale. ``A`` and ``B`` go into the projections (and their biases, where there
are any); no bias is added. ``docs/from_rope.md`` says which start does how well.

Where queries and keys are normalised by head (QK-Norm), ``A`` and ``B`` cannot go into the
projections, since the norm lies between: only `from_signs`, which permutes channels and changes
signs, passes through it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from whatwhere.encodings.pope import DELTA_BOUND
from whatwhere.models.score_fit import ScoreFit

SHARPNESS = 4.0
"""Factor of queries and keys, taken back by the scale: ``softplus(4 x) / 4`` is nearly relu."""

_LEAST_GAIN = 1e-3
"""No channel starts without gain: it would have no gradient either."""


@dataclass(frozen=True, eq=False)
class PolarStart:
    """How the queries and keys of one RoPE layer become those of a PoPE layer.

    Attributes:
        queries: ``(H, D, D)``; new channel ``c`` of head ``h`` is ``queries[h, c] @ q``.
        keys: ``(G, D, D)``, the same for keys.
        delta: ``(H, C)`` radians in ``[-2 pi, 0]``, for the ``C`` channels that turn.
        scale: Factor of every score.
    """

    queries: Tensor
    keys: Tensor
    delta: Tensor
    scale: float


def recombined(maps: Tensor, rows: Tensor) -> Tensor:
    """The weight (or bias) of a projection whose heads' channels were recombined.

    Args:
        maps: ``(heads, D, D)``, `PolarStart.queries` or `PolarStart.keys`.
        rows: ``(heads * D, hidden)`` or ``(heads * D,)``; computed in float32 at least.

    Raises:
        ValueError: If the rows are not as many as the maps have channels.
    """
    heads, width, _ = maps.shape
    if rows.shape[0] != heads * width:
        raise ValueError(
            f"rows has shape {tuple(rows.shape)}: expected {heads} heads x {width} channels = "
            f"{heads * width} rows"
        )
    exact = torch.promote_types(torch.promote_types(rows.dtype, maps.dtype), torch.float32)
    by_head = rows.reshape(heads, width, -1).to(exact)
    return (maps.to(rows.device, exact) @ by_head).reshape(rows.shape).to(rows.dtype)


def from_order(
    num_heads: int, num_key_heads: int, head_dim: int, turning: int, scale: float
) -> PolarStart:
    """Channels in the order of frequencies, and nothing else: a baseline that needs no text.

    RoPE's pair ``(p, p + R)`` goes to PoPE's channels ``(2p, 2p + 1)``, whose frequencies are the
    pair's own and the next lower one; delta is 0. A start without even this leaves every channel
    above the first at a frequency other than its own.

    Args:
        num_heads: ``H``.
        num_key_heads: ``G``.
        head_dim: ``D``.
        turning: Channels that turn, ``2 R``; the rest pass through as they are.
        scale: RoPE's factor of scores.

    Raises:
        ValueError: If ``turning`` is odd or out of range.
    """
    if not 0 < turning <= head_dim or turning % 2:
        raise ValueError(
            f"turning={turning}: expected an even number of at least 2 and at most "
            f"head_dim={head_dim}, two channels for each pair"
        )
    channels = torch.arange(head_dim)
    channels[:turning] = channels[:turning].view(2, -1).T.flatten()
    order = torch.eye(head_dim)[channels]
    return PolarStart(
        order.repeat(num_heads, 1, 1),
        order.repeat(num_key_heads, 1, 1),
        torch.zeros(num_heads, turning),
        scale,
    )


def from_signs(queries: Tensor, keys: Tensor, turning: int, scale: float) -> PolarStart:
    """Channels in the order of frequencies, with signs and delta from the clusters' centres.

    Permutations and signs alone, under one gain: what QK-Norm allows. Each channel gets the sign
    that makes its mean positive. Where the centres of keys and queries are nearer to a right
    angle than to a line (weighted by their lengths, over all heads), a pair's two query channels
    change places: channel ``2p`` then stands for ``q_(p + R) k_p`` and ``2p + 1`` for
    ``q_p k_(p + R)``, with delta a quarter turn to either side.

    Every head has the same permutation, so that norms whose weights are shared by heads follow:
    their weights become ``queries[0].abs() @ weight`` and ``keys[0].abs() @ weight``.

    Args:
        queries: ``(N, H, T, D)`` queries of a trained RoPE layer on some text, as they come to be
            rotated: after QK-Norm, if there is one.
        keys: ``(N, G, T, D)``, its keys.
        turning: Channels that turn, ``2 R``; the rest pass through as they are.
        scale: RoPE's factor of scores.

    Raises:
        ValueError: If shapes do not fit one another.
    """
    start = _checked(queries, keys, turning, scale)
    pairs, group = turning // 2, queries.shape[1] // keys.shape[1]
    centre_q, centre_k = _centres(queries, pairs), _centres(keys, pairs)
    product = centre_q.conj() * centre_k.repeat_interleave(group, 0)
    swapped = product.imag.abs().sum(0) > product.real.abs().sum(0)  # (R,)
    sign_q, sign_k = _signs(centre_q), _signs(centre_k)
    sign_q = torch.where(swapped, sign_q.flip(1), sign_q)
    eye = torch.eye(turning, device=queries.device)
    straight = torch.stack((eye[:pairs], eye[pairs:]))
    crossed = torch.where(swapped[:, None], straight.flip(0), straight)
    # The imaginary part of conj(z_q) z_k, q_p k_(p + R) - q_(p + R) k_p, goes with -sin.
    quarter = torch.tensor([-0.5, 0.5], device=queries.device)[:, None] * math.pi
    opposed = sign_q * sign_k.repeat_interleave(group, 0) < 0
    phase = torch.where(swapped, quarter, 0.0) + torch.where(opposed, math.pi, 0.0)
    return PolarStart(
        _with_rest(_interleaved(crossed * sign_q[..., None]), start),
        _with_rest(_interleaved(straight * sign_k[..., None]), start),
        bounded(_interleaved(phase[..., None])[..., 0]),
        scale / SHARPNESS**2,
    )


def from_centres(queries: Tensor, keys: Tensor, turning: int, scale: float) -> PolarStart:
    """Pairs turned to the centres of their clusters, closed form, from means alone.

    With ``alpha`` the phase of a pair's mean, queries of both channels become the component along
    their own centre, ``Re[z_q exp(-i alpha_q)]``, and keys the two coordinates of
    ``z_k exp(-i alpha_k)`` along directions 45 degrees to either side, with
    ``delta = alpha_k - alpha_q -+ pi / 4``. For queries of one phase and keys within 45 degrees
    of theirs that is RoPE's score, but for the sharpness of softplus and for the lower frequency
    of every second channel.

    Args:
        queries: As for `from_signs`, as are all.
        keys: See there.
        turning: See there.
        scale: See there.

    Raises:
        ValueError: As `from_signs`.
    """
    start = _checked(queries, keys, turning, scale)
    pairs, group = turning // 2, queries.shape[1] // keys.shape[1]
    alpha_q, alpha_k = _centres(queries, pairs).angle(), _centres(keys, pairs).angle()
    tilt = torch.tensor([-0.25, 0.25], device=queries.device)[:, None] * math.pi
    along_keys = alpha_k[:, None] + tilt
    along_queries = alpha_q[:, None].expand(-1, 2, -1)
    delta = along_keys.repeat_interleave(group, 0) - along_queries
    return PolarStart(
        _with_rest(_interleaved(_directions(along_queries)), start),
        _with_rest(_interleaved(_directions(along_keys)), start),
        bounded(_interleaved(delta[..., None])[..., 0]),
        scale / SHARPNESS**2,
    )


def from_scores(
    queries: Tensor,
    keys: Tensor,
    inv_freq: Tensor,
    frequencies: Tensor,
    scale: float,
    *,
    sweeps: int = 6,
    directions: int = 12,
    rows: int = 64,
) -> PolarStart:
    """The channels that fit RoPE's scores on some text best, without gradients.

    Channel ``c`` of the new head looks along one direction of pair ``c // 2`` for queries and
    along one for keys, and has a complex amplitude ``a_c`` (its size becomes the gains, its phase
    delta): ``score = sum_c Re[a_c exp(i (s - t) theta_c)] m(q_c) m(k_c)``. Directions are chosen
    one channel after another from ``directions`` equally spaced ones, that which with its best
    amplitude leaves the least squared error; after each sweep all amplitudes of a head are solved
    for together. Errors of a query's scores are weighted, half by RoPE's attention and half
    evenly over the keys it sees, and taken from their weighted mean, which a softmax does not
    see. Where query heads share keys, they share the keys' directions and choose the rest alone.

    Args:
        queries: ``(N, H, T, D)`` queries of a trained RoPE layer before rotation, of ``N`` windows
            of text.
        keys: ``(N, G, T, D)``, its keys.
        inv_freq: ``(R,)`` RoPE's frequencies, radians per position, fastest first.
        frequencies: ``(2 R,)`` PoPE's, in the same order. Channels from ``2 R`` on pass through.
        scale: RoPE's factor of scores.
        sweeps: Times each channel is chosen anew.
        directions: Candidates for a direction.
        rows: Queries of each window that are looked at, evenly spaced.

    Raises:
        ValueError: If shapes do not fit one another or a number is below 1.
    """
    start = _checked(queries, keys, 2 * inv_freq.numel(), scale)
    if frequencies.shape != (2 * inv_freq.numel(),):
        raise ValueError(
            f"frequencies has shape {tuple(frequencies.shape)}: expected two for each of the "
            f"{inv_freq.numel()} pairs"
        )
    for name, value in (("sweeps", sweeps), ("directions", directions), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    fit = ScoreFit(
        queries,
        keys,
        inv_freq,
        frequencies,
        scale,
        directions=directions,
        rows=rows,
        sharpness=SHARPNESS,
    )
    for _ in range(sweeps):
        for channel in range(frequencies.numel()):
            fit.choose(channel)
        fit.solve()
    return _from_fit(fit, start, scale)


def _from_fit(fit: ScoreFit, start: PolarStart, scale: float) -> PolarStart:
    group, size = fit.group, fit.amplitude.norm(dim=-1)
    # Keys have the mean (geometric) of what their queries' heads would give them, half of each.
    shared = size.clamp_min(_LEAST_GAIN).log().view(-1, group, size.shape[1]).mean(1)
    key_gain = (shared / 2).exp()
    query_gain = size.clamp_min(_LEAST_GAIN) / key_gain.repeat_interleave(group, 0)

    def maps(angles: Tensor, choice: Tensor, gain: Tensor) -> Tensor:
        of_channel = angles.repeat_interleave(2, 1).gather(2, choice[..., None])[..., 0]
        rows = _interleaved(_directions(of_channel.view(len(angles), -1, 2).mT))
        return _with_rest(rows * gain[..., None], start)

    # a cos(x) + b sin(x) = |a + i b| cos(x - atan2(b, a))
    delta = -torch.atan2(fit.amplitude[..., 1], fit.amplitude[..., 0])
    return PolarStart(
        maps(fit.query_angles, fit.query_choice, query_gain),
        maps(fit.key_angles, fit.key_choice, key_gain),
        bounded(delta),
        scale / SHARPNESS**2,
    )


def _checked(queries: Tensor, keys: Tensor, turning: int, scale: float) -> PolarStart:
    # `from_order` for these shapes: what the other starts are made of.
    for name, value in (("queries", queries), ("keys", keys)):
        if value.ndim != 4 or 0 in value.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: expected (N, heads, T, D), none of them 0"
            )
    n, heads, length, width = queries.shape
    groups = keys.shape[1]
    if keys.shape != (n, groups, length, width) or heads % groups:
        raise ValueError(
            f"keys has shape {tuple(keys.shape)}: expected that of queries, "
            f"{tuple(queries.shape)}, but for heads, of which it may have a divisor of {heads}"
        )
    return from_order(heads, groups, width, turning, scale)


def _interleaved(rows: Tensor) -> Tensor:
    # (heads, 2, R, X) to (heads, 2 R, X): channels 2p and 2p + 1 from the two of pair p.
    return rows.transpose(1, 2).flatten(1, 2)


def _with_rest(rows: Tensor, start: PolarStart) -> Tensor:
    # (heads, C, C) to (heads, D, D); channels that do not turn pass through, under the same gain.
    heads, turning, _ = rows.shape
    width = start.queries.shape[-1]
    maps = torch.eye(width, device=rows.device, dtype=rows.dtype).repeat(heads, 1, 1)
    maps[:, :turning, :turning] = rows
    return maps * SHARPNESS


def _centres(states: Tensor, pairs: int) -> Tensor:
    # (N, heads, T, D) to the complex mean of each pair, (heads, R), in float64.
    mean = states.double().mean((0, 2))
    return torch.complex(mean[:, :pairs], mean[:, pairs : 2 * pairs])


def _signs(centre: Tensor) -> Tensor:
    # (heads, R) complex to (heads, 2, R) of -1 and 1.
    parts = torch.stack((centre.real, centre.imag), 1)
    return torch.where(parts < 0, -1.0, 1.0).float()


def _directions(angles: Tensor) -> Tensor:
    # (heads, 2, R) to rows (heads, 2, R, 2 R) that read a pair's component at an angle.
    return torch.cat((torch.diag_embed(angles.cos()), torch.diag_embed(angles.sin())), -1).float()


def bounded(phase: Tensor) -> Tensor:
    """The same angles in ``(-2 pi, 0]``, delta's bounds; what is 0 stays 0."""
    return -torch.remainder(-phase.double(), DELTA_BOUND).float()
