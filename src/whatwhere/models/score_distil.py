"""Refining a start by gradients, one layer at a time and without labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from whatwhere.attention import scores
from whatwhere.models.initialise import SHARPNESS, PolarStart, bounded
from whatwhere.spec import ScoreSpec

Trained = Literal["all", "maps", "delta"]


def distilled(
    start: PolarStart,
    queries: Tensor,
    keys: Tensor,
    inv_freq: Tensor,
    frequencies: Tensor,
    scale: float,
    *,
    train: Trained = "all",
    steps: int = 100,
    windows: int = 2,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> PolarStart:
    """A start whose attention is brought nearer to RoPE's on some text.

    Minimises the mean over queries of ``KL(RoPE's attention || PoPE's)``, causal, over the maps of
    a layer and its delta, with Adam and a rate that falls to 0. What goes in are the queries and
    keys that the RoPE model has: no gradient passes from layer to layer, and no token is
    predicted. The nearer to RoPE's attention, the nearer to it beyond the length of the text, too,
    where RoPE fails: see docs/from_rope.md.

    Args:
        start: Where to begin, `from_scores`'s for best results.
        queries: ``(N, H, T, D)`` queries of a trained RoPE layer before rotation, of ``N`` windows
            of text.
        keys: ``(N, G, T, D)``, its keys.
        inv_freq: ``(R,)`` RoPE's frequencies, radians per position.
        frequencies: ``(C,)`` PoPE's, one for each of the start's delta.
        scale: RoPE's factor of scores.
        train: ``"all"``; ``"delta"`` alone, which QK-Norm asks for; or ``"maps"`` alone, which
            with `from_order` keeps delta at 0, for a model that is to go beyond its length.
        steps: Steps of Adam.
        windows: Windows of a step, at most ``N``.
        learning_rate: Of the first step, for delta; that of maps is larger by their gain.
        seed: Of the order of windows.

    Returns:
        A new start; the one given is left as it is.

    Raises:
        ValueError: If shapes do not fit one another or a number is out of range.
    """
    for name, value in (("steps", steps), ("windows", windows), ("learning_rate", learning_rate)):
        if not value > 0:
            raise ValueError(f"{name}={value}: expected more than 0")
    if train not in get_args(Trained):
        raise ValueError(f"train={train!r}: expected one of {get_args(Trained)}")
    length, device = queries.shape[2], queries.device
    # Copied, since tensors made in inference mode cannot be part of a gradient.
    q, k = queries.detach().float().clone(), keys.detach().float().clone()
    old = ScoreSpec("rotate", scale, inv_freq.double().to(device)[None])
    maps, phase = _leaves(start, device)
    groups: list[dict[str, Any]] = [{"params": [phase], "lr": learning_rate}]
    groups.append({"params": list(maps), "lr": learning_rate * SHARPNESS})
    groups = {"all": groups, "delta": groups[:1], "maps": groups[1:]}[train]
    new = ScoreSpec("polar", start.scale, frequencies.double().to(device)[None], phase=phase)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    order = torch.Generator().manual_seed(seed)

    def attention(x: Tensor, y: Tensor, spec: ScoreSpec) -> Tensor:
        # A finite number: 0 * log 0 of hidden keys must be 0, also in the gradient.
        return scores(x, y, spec).masked_fill(hidden, -1e30).log_softmax(-1)

    with torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randperm(len(q), generator=order)[:windows].to(device)
            wanted = attention(q[chosen], k[chosen], old)
            got = attention(q[chosen] @ maps[0].mT, k[chosen] @ maps[1].mT, new)
            loss = (wanted.exp() * (wanted - got)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return replace(
        start,
        queries=maps[0].detach(),
        keys=maps[1].detach(),
        delta=bounded(phase.detach()),
    )


def _leaves(start: PolarStart, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    # Delta runs free meanwhile: it is an angle, and is brought within its bounds at the end.
    queries, keys, delta = (
        x.detach().float().to(device, copy=True).requires_grad_()
        for x in (start.queries, start.keys, start.delta)
    )
    return (queries, keys), delta
