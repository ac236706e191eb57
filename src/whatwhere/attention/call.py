"""`Call`: one attention call, checked, with every default filled in; and what a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from whatwhere.attention.features import as_positions, check_channels, check_device, check_spec
from whatwhere.spec import ScoreSpec

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Call:
    """What a backend is given.

    Attributes:
        q: ``(B, H, T, D)``.
        k: ``(B, G, S, D)``.
        v: ``(B, G, S, V)``.
        spec: The score.
        causal: Whether a key is seen only where ``key_position <= query_position``.
        query_positions: ``(B or 1, T, A)`` int64.
        key_positions: ``(B or 1, S, A)`` int64.
        key_mask: ``(B, S)`` bool, True where a key may be attended to, or ``None``.
        query_segments: ``(B, T)`` or ``None``.
        key_segments: ``(B, S)`` or ``None``; only keys of the query's segment are seen.
        window: Keys seen by a query, itself included, or ``None``.
        in_order: Whether keys are at 0..S-1 and queries are the last T of them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    spec: ScoreSpec
    causal: bool
    query_positions: Tensor
    key_positions: Tensor
    key_mask: Tensor | None
    query_segments: Tensor | None
    key_segments: Tensor | None
    window: int | None
    in_order: bool

    @property
    def masked(self) -> bool:
        """Whether some key may be hidden from some query."""
        return self.causal or self.key_mask is not None or self.key_segments is not None

    @property
    def groups(self) -> int:
        """Query heads that share one key head."""
        return self.q.shape[1] // max(self.k.shape[1], 1)

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass through this call may follow."""
        tensors = (self.q, self.k, self.v, self.spec.phase, self.spec.slopes)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Pages(Protocol):
    """Decoding over a paged cache, arguments as `whatwhere.paged_attention` has checked them."""

    def refuses(
        self, q: Tensor, key_pages: Tensor, value_pages: Tensor, spec: ScoreSpec
    ) -> str | None:
        """Why it cannot, in a few words, or ``None`` if it can."""

    def run(
        self,
        q: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        spec: ScoreSpec,
        block_table: Tensor,
        lengths: Tensor,
        window: int | None,
    ) -> Tensor:
        """The pages read where they lie: ``(B, H, T, V)``."""


@dataclass(frozen=True)
class Backend:
    """A way to compute a `Call`.

    Attributes:
        run: Computes it, ``(B, H, T, V)`` in the dtype of ``q``; zeros for a query that sees no
            key.
        refuses: Why it cannot, in a few words, or ``None`` if it can.
        reads_raw_keys: Whether on a device it reads raw keys as fast as encoded ones, so that a
            cache may keep ``D`` numbers a token.
        pages: How it decodes over a paged cache, if it does.
    """

    run: Callable[[Call], Tensor]
    refuses: Callable[[Call], str | None]
    reads_raw_keys: Callable[[ScoreSpec, torch.device], bool] = lambda spec, device: False
    pages: Pages | None = None


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: ScoreSpec,
    causal: bool,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_mask: Tensor | None,
    segments: Tensor | None,
    window: int | None,
) -> Call:
    """Check an attention call and fill in its defaults.

    Raises:
        ValueError: If an argument does not fit the others; the message names it.
    """
    check_tensors(q, k, v)
    check_spec(q, spec, "q", heads=True)
    batch, length, total = q.shape[0], q.shape[2], k.shape[2]
    if not isinstance(causal, bool):
        raise ValueError(f"causal is a {type(causal).__name__}: expected True or False")
    if causal and spec.num_axes != 1:
        raise ValueError(f"causal=True needs positions of one axis, the spec has {spec.num_axes}")
    if window is not None:
        whole = isinstance(window, int) and not isinstance(window, bool)
        if not causal or not whole or window < 1:
            raise ValueError(
                f"window={window!r}, causal={causal}: a window is an integer of at least 1, and "
                "causal"
            )
    at_queries, at_keys = fill_positions(
        q, k, spec, query_positions, key_positions, ordered=causal
    )
    for name, given in (("key_mask", key_mask), ("segments", segments)):
        if given is not None:
            check_device(given, name, q)
    if key_mask is not None and (key_mask.shape != (batch, total) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask has shape {tuple(key_mask.shape)} and dtype {key_mask.dtype}: "
            f"expected (B, S) = {(batch, total)} and bool"
        )
    query_segments = None
    if segments is not None:
        if segments.shape != (batch, total) or segments.dtype not in _INTEGERS:
            raise ValueError(
                f"segments has shape {tuple(segments.shape)} and dtype {segments.dtype}: "
                f"expected (B, S) = {(batch, total)} and integers"
            )
        if length > total:
            raise ValueError(f"segments: {length} queries cannot be the last of {total} keys")
        query_segments = segments[:, total - length :]
    return Call(
        q=q,
        k=k,
        v=v,
        spec=spec,
        causal=causal,
        query_positions=at_queries,
        key_positions=at_keys,
        key_mask=key_mask,
        query_segments=query_segments,
        key_segments=segments,
        window=window,
        in_order=query_positions is None and key_positions is None,
    )


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check shapes, dtypes and devices of queries, keys and values.

    Raises:
        ValueError: If they do not fit one another.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_channels(tensor, name)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and q {tuple(q.shape)}: batch and head_dim must agree"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v has shape {tuple(v.shape)} and k {tuple(k.shape)}: batch, heads and length "
            "must agree"
        )
    if 0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads and k {k.shape[1]}: expected a multiple of the key heads"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q, k, v are {q.dtype} on {q.device}, {k.dtype} on {k.device}, "
            f"{v.dtype} on {v.device}: dtype and device must agree"
        )


def fill_positions(
    q: Tensor,
    k: Tensor,
    spec: ScoreSpec,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    ordered: bool,
) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys as ``(B or 1, length, A)`` int64, defaults filled in.

    Args:
        q: ``(B, H, T, D)``.
        k: ``(B, G, S, D)``.
        spec: The score.
        query_positions: Given ones; ``None`` is the last T of 0..S-1.
        key_positions: Given ones; ``None`` is 0..S-1.
        ordered: Whether positions matter beyond the score (causality).

    Raises:
        ValueError: If there is no default (several axes, more queries than keys), or a given
            one has another shape or dtype.
    """
    length, total = q.shape[2], k.shape[2]
    matters = ordered or spec.feature != "identity" or spec.slopes is not None
    if spec.num_axes != 1 and (query_positions is None or key_positions is None):
        raise ValueError(
            f"the spec has {spec.num_axes} position axes: query_positions and key_positions "
            "must be given (whatwhere.grid makes them)"
        )
    if query_positions is None:
        if length > total and (matters or spec.temperature_length is not None):
            raise ValueError(
                f"query_positions must be given: {length} queries cannot be the last of "
                f"{total} keys"
            )
        query_positions = torch.arange(total - length, total, device=q.device)
    if key_positions is None:
        key_positions = torch.arange(total, device=q.device)
    filled = []
    for name, given, x in (
        ("query_positions", query_positions, q),
        ("key_positions", key_positions, k),
    ):
        filled.append(as_positions(given, spec.num_axes, name, x))
    return filled[0], filled[1]
