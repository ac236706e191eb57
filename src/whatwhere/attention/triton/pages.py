"""Decoding over a paged cache, read where it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from whatwhere.attention.triton import arguments, ops
from whatwhere.spec import ScoreSpec


def refuses(q: Tensor, key_pages: Tensor, value_pages: Tensor, spec: ScoreSpec) -> str | None:
    """What decoding over pages does not do."""
    why = arguments.refuses(q, spec)
    if why is not None:
        return why
    if max(q.shape[-1], value_pages.shape[-1]) > arguments.WIDEST:
        return f"it takes head_dim and value widths up to {arguments.WIDEST}"
    learned = (spec.phase, spec.slopes, q, key_pages, value_pages)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned):
        return "it has no gradients (call it under torch.no_grad)"
    return None


def run(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    spec: ScoreSpec,
    block_table: Tensor,
    lengths: Tensor,
    window: int | None,
) -> Tensor:
    """Attention over a paged cache; arguments as `whatwhere.paged_attention` has checked them."""
    length = q.shape[2]
    at = lengths.long()[:, None] - length + torch.arange(length, device=q.device)
    given = list(arguments.of_spec(spec))
    given += [at[..., None], None, None, None, None, True, window or 0, arguments.tf32(q)]
    out: Tensor = ops.flash_decode(
        q,
        key_pages,
        value_pages,
        *given,
        block_table.int().contiguous(),
        lengths.int().contiguous(),
    )
    return out
