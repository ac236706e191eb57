"""The fit behind `whatwhere.models.initialise.from_scores`: polar channels to RoPE's scores.

Shapes: ``N`` windows of ``T`` keys, ``P`` queries of each; ``A`` candidate directions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from whatwhere.attention import scores
from whatwhere.spec import ScoreSpec

_ATTENTION_SHARE = 0.5
"""Of the weight of errors: the rest is even over keys, so that none may rise unseen."""

_RIDGE = 1e-3
"""Relative, and just enough that channels of almost equal features do not cancel each other."""


class ScoreFit:
    """Polar channels fitted to the scores of one RoPE layer; see `from_scores`.

    Args:
        queries: ``(N, H, T, D)`` before rotation.
        keys: ``(N, G, T, D)`` before rotation.
        inv_freq: ``(R,)`` RoPE's frequencies.
        frequencies: ``(2 R,)`` PoPE's.
        scale: RoPE's factor of scores.
        directions: ``A``.
        rows: ``P``, at most ``T``.
        sharpness: ``g`` of the magnitudes ``softplus(g x) / g``.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        inv_freq: Tensor,
        frequencies: Tensor,
        scale: float,
        *,
        directions: int,
        rows: int,
        sharpness: float,
    ) -> None:
        length, pairs = queries.shape[2], inv_freq.numel()
        count = min(rows, length)
        at = length - 1 - torch.arange(count, device=queries.device) * length // count
        distance = torch.arange(length, device=queries.device) - at[:, None]
        self.distance, self.frequencies = distance.double(), frequencies.double().to(at.device)
        self.sharpness, self.group = sharpness, queries.shape[1] // keys.shape[1]
        self.queries = _as_pairs(queries[:, :, at].float(), pairs)
        self.keys = _as_pairs(keys.float(), pairs)
        self._set_target(queries[:, :, at].float(), keys.float(), at, inv_freq, scale)
        even = torch.arange(directions, device=at.device) * (2 * math.pi / directions)
        self.query_angles = _mean_phase(self.queries)[..., None] + even
        self.key_angles = _mean_phase(self.keys)[..., None] + even
        heads, channels = self.queries.shape[0], frequencies.numel()
        self.query_choice = torch.zeros(heads, channels, dtype=torch.int64, device=at.device)
        self.key_choice = self.query_choice[:: self.group].clone()
        self.amplitude = torch.zeros(heads, channels, 2, device=at.device)

    def _set_target(
        self, q: Tensor, k: Tensor, at: Tensor, inv_freq: Tensor, scale: float
    ) -> None:
        # Scores are linear in what turns and what does not: the second is carried over as it is.
        turning = 2 * inv_freq.numel()
        spec = ScoreSpec("rotate", 1.0, inv_freq.double().to(q.device)[None])
        turned = scores(q[..., :turning], k[..., :turning], spec, query_positions=at)
        still = q[..., turning:] @ k[..., turning:].repeat_interleave(self.group, 1).mT
        hidden = self.distance > 0
        attention = ((turned + still) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        even = (~hidden).float() / (~hidden).sum(-1, keepdim=True)
        weight = _ATTENTION_SHARE * attention + (1 - _ATTENTION_SHARE) * even
        self.weight = weight.transpose(0, 1).contiguous()
        self.target = self._centred(turned.transpose(0, 1))
        self.left = self.target.clone()

    def _centred(self, values: Tensor) -> Tensor:
        return values - (self.weight * values).sum(-1, keepdim=True)

    def _turns(self, channel: int) -> tuple[Tensor, Tensor]:
        angle = self.distance * self.frequencies[channel]
        return angle.cos().float(), angle.sin().float()

    def _magnitudes(self, states: Tensor, angles: Tensor) -> Tensor:
        # (heads, N, X, 2) pairs and (heads, A) angles to (heads, N, X, A).
        axes = torch.stack((angles.cos(), angles.sin()), 1).float()
        return F.softplus(self.sharpness * (states @ axes[:, None])) / self.sharpness

    def _features(self, channel: int) -> Tensor:
        """What the channel's amplitude is multiplied by, ``(2, H, N, P, T)``, centred."""
        pair = channel // 2
        q_angle = self.query_angles[:, pair].gather(1, self.query_choice[:, channel, None])
        k_angle = self.key_angles[:, pair].gather(1, self.key_choice[:, channel, None])
        q = self._magnitudes(self.queries[:, :, :, pair], q_angle)
        k = self._magnitudes(self.keys[:, :, :, pair], k_angle).repeat_interleave(self.group, 0)
        product = q * k.mT
        return torch.stack([self._centred(product * turn) for turn in self._turns(channel)])

    def _remove(self, channel: int, sign: float) -> None:
        features = self._features(channel)
        for part in (0, 1):
            weight = self.amplitude[:, channel, part, None, None, None]
            self.left -= sign * weight * features[part]

    def choose(self, channel: int) -> None:
        """Give a channel the directions and amplitude that leave the least error."""
        if self.amplitude[:, channel].any():
            self._remove(channel, -1.0)
        pair = channel // 2
        q = self._magnitudes(self.queries[:, :, :, pair], self.query_angles[:, pair])
        k = self._magnitudes(self.keys[:, :, :, pair], self.key_angles[:, pair])
        best, amplitude = self._amplitudes(channel, q, k.repeat_interleave(self.group, 0))
        # Heads that share keys agree on the keys' direction, and take their own best of the rest.
        by_key = best.amax(1).view(-1, self.group, best.shape[2]).sum(1).argmax(-1)
        shared = by_key.repeat_interleave(self.group, 0)
        head = torch.arange(len(shared), device=shared.device)
        by_query = best[head, :, shared].argmax(-1)
        self.key_choice[:, channel], self.query_choice[:, channel] = by_key, by_query
        self.amplitude[:, channel] = amplitude[:, head, by_query, shared].T
        self._remove(channel, 1.0)

    def _amplitudes(self, channel: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        # For each pair of directions, (H, A, A): the error that the best amplitude takes away,
        # and that amplitude (2, H, A, A), from normal equations of two unknowns.
        cos, sin = self._turns(channel)
        error, weight = self.weight * self.left, self.weight

        def over_rows(left: Tensor, right: Tensor) -> Tensor:
            return (left.mT @ right).sum(1)

        seen = [over_rows(q, (error * turn) @ k) for turn in (cos, sin)]
        mean_cos, mean_sin = (weight * cos) @ k, (weight * sin) @ k
        q2, k2 = q.square(), k.square()
        cc = over_rows(q2, (weight * cos.square()) @ k2 - mean_cos.square())
        ss = over_rows(q2, (weight * sin.square()) @ k2 - mean_sin.square())
        cs = over_rows(q2, (weight * (cos * sin)) @ k2 - mean_cos * mean_sin)
        ridge = _RIDGE * (cc + ss) / 2 + torch.finfo(cc.dtype).tiny ** 0.5
        cc, ss = cc + ridge, ss + ridge
        determinant = cc * ss - cs.square()
        first = (ss * seen[0] - cs * seen[1]) / determinant
        second = (cc * seen[1] - cs * seen[0]) / determinant
        return first * seen[0] + second * seen[1], torch.stack((first, second))

    def solve(self) -> None:
        """Solve for the amplitudes of all channels of each head together."""
        channels = self.amplitude.shape[1]
        features = torch.stack([self._features(c) for c in range(channels)])
        for head in range(self.amplitude.shape[0]):
            columns = features[:, :, head].flatten(2).flatten(0, 1)
            weighted = columns * self.weight[head].flatten()
            gram = (weighted @ columns.mT).double()
            gram += torch.diag(_RIDGE * gram.diagonal() + torch.finfo(torch.float32).tiny)
            seen = (weighted @ self.target[head].flatten()).double()
            found = torch.linalg.solve(gram, seen).float()
            self.amplitude[head] = found.view(channels, 2)
            self.left[head] = self.target[head] - (found @ columns).view_as(self.left[head])

    def error(self) -> Tensor:
        """Weighted squared error over that of no scores at all, ``(H,)``."""
        axes = (1, 2, 3)
        return (self.weight * self.left.square()).sum(axes) / (
            self.weight * self.target.square()
        ).sum(axes)


def _as_pairs(states: Tensor, pairs: int) -> Tensor:
    # (N, heads, X, D) to (heads, N, X, R, 2).
    both = torch.stack((states[..., :pairs], states[..., pairs : 2 * pairs]), -1)
    return both.transpose(0, 1).contiguous()


def _mean_phase(states: Tensor) -> Tensor:
    mean = states.double().mean((1, 2))
    return torch.atan2(mean[..., 1], mean[..., 0]).float()
