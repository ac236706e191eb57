"""Sides that need nothing but PyTorch and this package, and which of all take part in a case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import whatwhere as ww
from whatwhere.attention.angles import rotation_table
from whatwhere.lab.bench import peers, step
from whatwhere.lab.bench.cases import Case, RefusedError, Side, Tensors, Work

BASE = "rope"
"""The encoding of the baseline."""

# The kernels of PyTorch that can be forced, by device. The one with a T x S matrix is none.
STOCK = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
    "cuda": {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
}


def competing(
    case: Case, encodings: Sequence[str], backends: Sequence[str], against_peers: bool
) -> list[Side]:
    """Sides of a case, the stock kernels first; some may refuse it.

    Args:
        case: The case.
        encodings: Names in `whatwhere.ENCODINGS`; the baseline's is added.
        backends: Names in `whatwhere.BACKENDS`, or none for all but `reference`; a step is
            measured with `auto` unless some are named.
        against_peers: Whether other people's code takes part.
    """
    wanted = list(dict.fromkeys([BASE, *encodings]))
    if case.stage == "step":
        return [Side(e, b, "ours") for e in wanted for b in backends or ("auto",)]
    found = [Side(BASE, name, "stock") for name in STOCK[case.device]]
    ours = list(backends) or [name for name in ww.BACKENDS if name != "reference"]
    found += [Side(e, b, "ours") for e in wanted for b in ours]
    if against_peers:
        found += [Side("pope", name, "peer") for name in peers.PEERS]
    return found


def build(side: Side, tensors: Tensors) -> Work:
    """Make a side ready for a case.

    Raises:
        RefusedError: If it cannot take the case.
    """
    case = tensors.case
    if case.stage == "step":
        return step.build(side, case)
    if side.origin == "peer":
        return peers.build(side, tensors)
    if case.stage == "decode":
        return _stock_decode(side, tensors) if side.origin == "stock" else _decode(side, tensors)
    return _stock(side, tensors) if side.origin == "stock" else _ours(side, tensors)


def sequence_work(
    tensors: Tensors, call: Callable[[Tensor, Tensor, Tensor], Tensor], learned: Tensor | None
) -> Work:
    """Work of a pass over a sequence.

    Args:
        tensors: Inputs of the case.
        call: Attention of queries, keys and values.
        learned: A parameter like ``delta`` whose gradient belongs to the backward pass.
    """
    inputs = (tensors.q, tensors.k, tensors.v)
    names = ("q", "k", "v", "delta") if learned is not None else ("q", "k", "v")
    leaves = inputs if learned is None else (*inputs, learned)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*inputs)

    def both() -> tuple[Tensor, ...]:
        out = call(*inputs)
        return (out, *torch.autograd.grad(out, leaves, tensors.slope))

    def results() -> dict[str, Tensor]:
        if tensors.case.stage == "forward":
            return {"out": forward()}
        out, *grads = both()
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}

    return Work(forward if tensors.case.stage == "forward" else both, results)


def _ours(side: Side, tensors: Tensors) -> Work:
    case, encoding = tensors.case, tensors.encoding(side.encoding)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec = encoding(q.device)
        return ww.attention(q, k, v, spec, causal=case.causal, backend=side.backend)

    spec = encoding(tensors.q.device)
    chosen = _explain(side, tensors.q, tensors.k, tensors.v, spec, case)
    work = sequence_work(tensors, call, getattr(encoding, "delta", None))
    work.feature_dim = spec.feature_dim(case.head_dim)
    work.chosen = chosen
    work.square = side.backend == "reference"
    return work


def _explain(side: Side, q: Tensor, k: Tensor, v: Tensor, spec: ww.ScoreSpec, case: Case) -> bool:
    """Whether ``"auto"`` takes this backend; refused if it cannot compute the call."""
    call = partial(ww.explain, q, k, v, spec, causal=case.causal)
    try:
        with torch.set_grad_enabled(case.stage == "forward+backward"):
            return call().backend == call(backend=side.backend).backend
    except ww.UnsupportedError as error:
        why = str(error).partition("cannot compute this call: ")[2] or str(error)
        raise RefusedError(why.partition(" (can: ")[0]) from None


def _stock(side: Side, tensors: Tensors) -> Work:
    """RoPE as models write it: tables made before, rotation (compiled on a GPU), one kernel."""
    case = tensors.case
    cos, sin = _tables(tensors, case.length)
    rotate = _compiled(case.device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = rotate(q, cos, sin), rotate(k, cos, sin)
        return _sdpa(side, queries, keys, v, case.causal, case)

    work = sequence_work(tensors, call, None)
    work.feature_dim = case.head_dim
    return work


def _stock_decode(side: Side, tensors: Tensors) -> Work:
    case = tensors.case
    cos, sin = _tables(tensors, case.length)
    keys, values = tensors.cache(BASE)
    last = cos[-1:], sin[-1:]

    def run() -> Tensor:
        with torch.no_grad():
            return _sdpa(side, rotate(tensors.q, *last), keys, values, False, case)

    return Work(
        run,
        lambda: {"out": run()},
        feature_dim=case.head_dim,
        cache_numbers=2 * case.head_dim,
    )


def _decode(side: Side, tensors: Tensors) -> Work:
    """One query against a cache in the form that the backend reads fastest.

    Where that is raw, of polar keys their magnitudes, as the models here keep them.
    """
    case, device = tensors.case, tensors.q.device
    with torch.no_grad():
        spec = tensors.encoding(side.encoding)(device)
    backend = ww.BACKENDS.get(side.backend)
    raw = backend.reads_raw_keys(spec, device) if backend else False
    raw = raw or (side.backend == "auto" and ww.cache_form(spec, device) == "raw")
    at = torch.arange(case.length, device=device)
    keys, values = tensors.cache(None if raw else side.encoding)
    keys = ww.unturned(keys, spec) if raw else keys
    asked = spec.unturned() if raw else spec.encoded()

    def query() -> Tensor:
        if raw:
            return ww.unturned(tensors.q, spec)
        return ww.encode_queries(tensors.q, spec, at[-1:])

    chosen = _explain(side, query(), keys, values, asked, case)

    def run() -> Tensor:
        with torch.no_grad():
            q = query()
            return ww.attention(q, keys, values, asked, causal=True, backend=side.backend)

    return Work(
        run,
        lambda: {"out": run()},
        feature_dim=spec.feature_dim(case.head_dim),
        cache_numbers=keys.shape[-1] + values.shape[-1],
        chosen=chosen,
        square=side.backend == "reference",
    )


def _tables(tensors: Tensors, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin for both halves of the channels: ``(length, D)`` float32."""
    device = tensors.q.device
    inv_freq = tensors.encoding(BASE)(device).inv_freq
    assert inv_freq is not None
    at = torch.arange(length, device=device)[:, None]
    cos, sin = rotation_table(inv_freq, at, torch.float32)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels ``c`` and ``c + D/2`` turned: ``x`` is ``(B, H, T, D)``."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _compiled(device: str) -> Callable[..., Tensor]:
    # Eager, it would cost a GPU several passes over memory, which no one who cares accepts.
    return torch.compile(rotate, dynamic=False) if device == "cuda" else rotate


def _sdpa(side: Side, q: Tensor, k: Tensor, v: Tensor, causal: bool, case: Case) -> Tensor:
    forced: AbstractContextManager[Any] = sdpa_kernel(STOCK[case.device][side.backend])
    with forced:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=case.heads != case.kv_heads
        )
