"""Backend ``flex``: PyTorch's FlexAttention over widened features, no dense mask.

Packed documents, windows, slopes and a softcap are functions of a score and its indices here;
blocks in which nothing is visible are skipped. Fused wherever it can be compiled; on a CPU, where
compiling takes longer than a small call, only for large ones.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.call import Backend, Call
from whatwhere.attention.features import compute_dtype, encode_keys, encode_queries
from whatwhere.attention.masks import unseen

# Below this many scores a CPU call is over before a compiler would have started.
_FUSE_ON_CPU = 2**26

# Every kind of mask, width and presence of slopes is a program of its own; PyTorch's limit of 8
# would send the ninth to the unfused path without a word.
_PROGRAMS = 64


def refuses(call: Call) -> str | None:
    """What FlexAttention does not do."""
    if call.needs_grad and call.q.device.type == "cpu":
        return "FlexAttention has no backward pass on a CPU"
    if call.q.dtype == torch.float64 and call.q.device.type != "cpu":
        return "FlexAttention has no float64 kernel on this device"
    if 0 in call.q.shape or 0 in call.k.shape:
        return "FlexAttention takes no empty tensors"
    return None


def run(call: Call) -> Tensor:
    """Encode, then FlexAttention with a block mask."""
    hidden = unseen(call)
    if hidden is not None:  # a weight of 0 does not hide a NaN
        k, v = (x.masked_fill(hidden[:, None, :, None], 0.0) for x in (call.k, call.v))
        call = replace(call, k=k, v=v)
    queries = encode_queries(call.q, call.spec, call.query_positions)
    keys = encode_keys(call.k, call.spec, call.key_positions)
    attend, make_mask = _operators(_fused(call), call.q.device.type)
    mask = None
    if call.masked:
        sizes = (call.q.shape[0], None, call.q.shape[2], call.k.shape[2])
        mask = make_mask(_mask_function(call), *sizes, device=call.q.device)
    with _quiet():
        out = attend(
            queries,
            keys,
            call.v,
            score_mod=_score_function(call),
            block_mask=mask,
            scale=call.spec.scale,
            enable_gqa=call.groups > 1,
        )
    return out if isinstance(out, Tensor) else out[0]


def _mask_function(call: Call) -> Callable[..., Tensor]:
    queries, keys = _batched(call.query_positions, call), _batched(call.key_positions, call)
    key_mask, window = call.key_mask, call.window
    query_segments, key_segments = call.query_segments, call.key_segments

    def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        ok = t >= 0
        if call.causal:
            ahead = queries[b, t] - keys[b, s]
            ok = ok & (ahead >= 0)
            if window is not None:
                ok = ok & (ahead < window)
        if query_segments is not None and key_segments is not None:
            ok = ok & (query_segments[b, t] == key_segments[b, s])
        if key_mask is not None:
            ok = ok & key_mask[b, s]
        return ok

    return seen


def _score_function(call: Call) -> Callable[..., Tensor] | None:
    cap = call.spec.softcap
    if call.spec.slopes is None:
        return None if cap is None else lambda score, *where: torch.tanh(score / cap) * cap
    slopes = call.spec.slopes.to(call.q.device, compute_dtype(call.q.dtype))
    queries, keys = _batched(call.query_positions, call), _batched(call.key_positions, call)

    def fall(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if cap is not None:
            score = torch.tanh(score / cap) * cap
        return score - slopes[h] * (queries[b, t] - keys[b, s])

    return fall


@contextmanager
def _unfused_on_purpose() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def _quiet() -> AbstractContextManager[None]:
    """FlexAttention warns of small CPU calls, which are unfused on purpose."""
    return nullcontext() if torch.compiler.is_compiling() else _unfused_on_purpose()


def _batched(positions: Tensor, call: Call) -> Tensor:
    return positions[..., 0].expand(call.q.shape[0], -1).contiguous()


def _fused(call: Call) -> bool:
    if torch.compiler.is_compiling() or call.q.device.type != "cpu":
        return True
    size = call.q.shape[0] * call.q.shape[1] * call.q.shape[2] * call.k.shape[2]
    return size >= _FUSE_ON_CPU and _has_compiler()


@cache
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++"))


def _operators(fused: bool, device: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not fused or torch.compiler.is_compiling():
        return flex_attention, create_block_mask
    return _compiled(device)


@cache
def _compiled(device: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # On a CPU, PyTorch 2.13 writes C++ that does not compile for lengths it holds as symbols.
    dynamic = False if device == "cpu" else None
    return _compile(flex_attention, dynamic), _compile(create_block_mask, dynamic)


def _compile(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=dynamic)

    def run_compiled(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_PROGRAMS):
            return compiled(*args, **kwargs)

    return run_compiled


BACKEND = Backend(run=run, refuses=refuses)
