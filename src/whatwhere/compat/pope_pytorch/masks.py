"""Masks in every form that PoPE-pytorch takes, told apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask that was read.

    Attributes:
        keys: ``(B, S)`` bool, if it depends on the key alone.
        dense: Else ``(B or 1, H or 1, T or 1, S)``, bool or added to scores.
    """

    keys: Tensor | None = None
    dense: Tensor | None = None

    def seen(self, q: Tensor, k: Tensor, causal: bool) -> tuple[Tensor | None, Tensor | None]:
        """Which keys a query sees, ``(B or 1, H or 1, T or 1, S)``, and what is added to scores.

        Causality is by place: queries are the last T of S.
        """
        seen, added = None, None
        if self.keys is not None:
            seen = self.keys[:, None, None]
        elif self.dense is not None and self.dense.dtype == torch.bool:
            seen = self.dense
        elif self.dense is not None:
            added, seen = self.dense, self.dense != float("-inf")
        if causal:
            length, total = q.shape[2], k.shape[2]
            before = torch.ones(length, total, dtype=torch.bool, device=q.device)
            before = before.tril(total - length)
            seen = before[None, None] if seen is None else seen & before
        return seen, added


def read_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> Mask:
    """Tell masks of keys from masks of pairs.

    Args:
        mask: ``(B, S)``, ``(T, S)``, ``(B, T, S)`` or ``(B, H, T, S)``, axes but the last of 1
            allowed; True where a key may be attended to, or numbers that are added to scores.
        q: ``(B, H, T, D)``.
        k: ``(B, G, S, D)``.

    Raises:
        ValueError: If the shape or dtype is none of these, or two axes could be two things.
    """
    if mask is None:
        return Mask()
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask is {kind}: expected bool, or floating point to be added to scores")
    batch, heads, length, _ = q.shape
    whole = (batch, heads, length, k.shape[2])
    if mask.ndim == 2 and mask.shape == (length, whole[3]):
        if length == batch > 1:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)} with B = T = {batch}: it could be (B, S) or "
                "(T, S); give it as mask[:, None, None] for keys or mask[None, None] for pairs"
            )
        wide = mask[None, None]
    elif mask.ndim == 2:
        wide = mask[:, None, None]
    elif mask.ndim == 3:
        wide = mask[:, None]
    else:
        wide = mask
    if wide.ndim != 4 or any(n not in (1, m) for n, m in zip(wide.shape, whole, strict=True)):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: expected (B, S), (T, S), (B, T, S) or "
            f"(B, H, T, S) with (B, H, T, S) = {whole}"
        )
    if wide.device != q.device:
        raise ValueError(f"mask is on {wide.device}: expected {q.device}, as q")
    wide = wide.expand(-1, -1, -1, whole[3])
    if wide.dtype == torch.bool and wide.shape[1] == wide.shape[2] == 1:
        return Mask(keys=wide[:, 0, 0].expand(batch, -1))
    return Mask(dense=wide)
