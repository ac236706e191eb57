"""`paged_attention`: decoding against a cache that lies in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from whatwhere.attention.api import BACKENDS, attention
from whatwhere.attention.call import check_tensors
from whatwhere.attention.choices import measured_on
from whatwhere.attention.features import check_device, check_spec
from whatwhere.spec import ScoreSpec, UnsupportedError


def paged_attention(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    spec: ScoreSpec,
    *,
    block_table: Tensor,
    lengths: Tensor,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of the last tokens of each sequence over a paged cache.

    Page ``block_table[b, i]`` holds keys ``i * size`` to ``(i + 1) * size - 1`` of sequence ``b``,
    of which the first ``lengths[b]`` count; the queries are at the last T of those. The same as
    `whatwhere.attention` over the pages laid side by side.

    Args:
        q: ``(B, H, T, D)`` queries, e.g. one token each, or up to 16 in speculative decoding.
        key_pages: ``(pages, G, size, D)``, keys as the spec takes them: raw, or with
            ``whatwhere.unturned`` magnitudes and ``spec.unturned()``, or encoded.
        value_pages: ``(pages, G, size, V)``.
        spec: What an encoding returns when it is called, of one position axis.
        block_table: ``(B, n)`` integers; entries beyond a sequence's length are not read.
        lengths: ``(B,)`` integers, keys of each sequence, those of the queries included.
        window: As for `whatwhere.attention`.
        backend: ``"triton"`` reads the pages where they lie, on a GPU; any other name in
            `whatwhere.BACKENDS` gets a copy of them side by side; ``"auto"`` takes the first where
            it was measured.

    Returns:
        ``(B, H, T, V)``. A query at a position below 0 (``lengths[b] < T``) gets zeros.

    Raises:
        ValueError: If arguments do not fit one another.
        UnsupportedError: If the backend named cannot compute this call, or gradients are wanted
            of ``"triton"``, which decodes without.
    """
    _check(q, key_pages, value_pages, spec, block_table, lengths, window)
    for name, entry in BACKENDS.items():
        if entry.pages is None or backend not in (name, "auto"):
            continue
        why = entry.pages.refuses(q, key_pages, value_pages, spec)
        if why is None and (
            backend == name or (q.is_cuda and measured_on(q.device, name, "decode"))
        ):
            return entry.pages.run(q, key_pages, value_pages, spec, block_table, lengths, window)
        if backend == name:
            raise UnsupportedError(f"backend {name!r} cannot read these pages: {why}")
    table = block_table.long().clamp(0, key_pages.shape[0] - 1)
    keys, values = (
        pages[table].transpose(1, 2).flatten(2, 3) for pages in (key_pages, value_pages)
    )
    length, total = q.shape[2], keys.shape[2]
    at_keys = torch.arange(total, device=q.device)
    at = lengths.long()[:, None]
    return attention(
        q,
        keys,
        values,
        spec,
        causal=True,
        query_positions=at - length + torch.arange(length, device=q.device),
        key_positions=at_keys,
        key_mask=at_keys < at,
        window=window,
        backend=backend,
    )


def _check(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    spec: ScoreSpec,
    block_table: Tensor,
    lengths: Tensor,
    window: int | None,
) -> None:
    check_spec(q, spec, "q", heads=True)
    check_spec(key_pages, spec, "key_pages", heads=False)
    if spec.num_axes != 1:
        raise ValueError(f"spec has {spec.num_axes} position axes: pages hold text, of one axis")
    # Pages stand for batches here: everything else has to fit as it does side by side.
    one = q.new_empty(()).expand(key_pages.shape[0], *q.shape[1:])
    check_tensors(one, key_pages, value_pages)
    batch = q.shape[0]
    for name, given, shape in (
        ("block_table", block_table, (batch, "n")),
        ("lengths", lengths, (batch,)),
    ):
        check_device(given, name, q)
        whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        if given.ndim != len(shape) or given.shape[0] != batch or not whole:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)} and dtype {given.dtype}: expected "
                f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''}) and integers"
            )
    if window is not None and (
        isinstance(window, bool) or not isinstance(window, int) or window < 1
    ):
        raise ValueError(f"window={window!r}: expected an integer of at least 1")
