"""Backend ``widened``: features by one kernel, then the fastest kernel that takes their width.

PyTorch's own fused kernels take queries and keys wider than values in some widths (cuDNN 128/64
and 192/128). The pre-pass writes features once; they are not kept for the backward pass but made
again there, so that only q, k, v, the output and the log-sum-exp are. What the stock kernels do
not take (other widths, masks, documents, windows, slopes) goes to our own over the same features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whatwhere.attention.call import Backend, Call
from whatwhere.attention.features import encode_keys, encode_queries
from whatwhere.attention.triton import arguments, ops
from whatwhere.spec import ScoreSpec


def run(call: Call) -> Tensor:
    """Widen, attend, and keep a recipe for the features in place of them."""
    queries, keys, again = _features(call)
    narrow = replace(call, q=queries, k=keys, spec=call.spec.encoded())
    attend = _stock if takes(call) else _own
    if again is None or not call.needs_grad or torch.compiler.is_compiling() or _hooked():
        # A compiler, or checkpointing, decides by itself what to keep and what to make again.
        return attend(narrow)
    with torch.autograd.graph.saved_tensors_hooks(*_forgetful(queries, keys, again)):
        return attend(narrow)


def takes(call: Call) -> bool:
    """Whether a stock kernel computes the call over features, with no T x S matrix."""
    hidden = call.key_mask is not None or call.key_segments is not None or call.window is not None
    if hidden or call.spec.slopes is not None or not (call.in_order or not call.causal):
        return False
    length, total = call.q.shape[2], call.k.shape[2]
    if call.causal and length not in (1, total):
        return False
    wide, value = call.spec.feature_dim(call.q.shape[-1]), call.v.shape[-1]
    if call.q.device.type == "cpu":
        return True
    if wide % 8 or value % 8:
        return False
    # FlashAttention 2 and memory-efficient attention want one width or none above 128; cuDNN
    # takes both up to 128, and 192 with 128.
    return wide <= 128 or (wide, value) == (192, 128) or wide == value


def _stock(call: Call) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Plain bools, also where sizes are symbols.
    causal = True if call.causal and call.q.shape[2] > 1 else False  # noqa: SIM210
    grouped = True if call.groups > 1 else False  # noqa: SIM210
    values, width = call.v, call.v.shape[-1]

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(
            call.q,
            call.k,
            values,
            is_causal=causal,
            scale=call.spec.scale,
            enable_gqa=grouped,
        )[..., :width]

    if call.q.device.type == "cpu":
        values = F.pad(values, (0, max(call.q.shape[-1] - width, 0)))
        return attend()
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ]
    if values.stride(-1) != 1:
        values = values.contiguous()
    try:
        with sdpa_kernel(order, set_priority=True):
            return attend()
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        return _own(call)


def _hooked() -> bool:
    """Whether saved tensors are somebody else's business already; hooks do not nest."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _own(call: Call) -> Tensor:
    out: Tensor = ops.flash_forward(call.q, call.k, call.v, *arguments.of(call))[0]
    return out


def _features(call: Call) -> tuple[Tensor, Tensor, tuple[Callable[[], Tensor], ...] | None]:
    """Features of queries and keys, and how to make them again without gradients."""
    spec = call.spec
    if spec.num_turning == 0 or torch.compiler.is_compiling():
        queries = encode_queries(call.q, spec, call.query_positions)
        return queries, encode_keys(call.k, spec, call.key_positions), None
    made = []
    for x, positions, phase, gain, first in (
        (
            call.q,
            call.query_positions,
            spec.phase,
            spec.temperature_length or 0,
            call.k.shape[2] - call.q.shape[2],
        ),
        (call.k, call.key_positions, None, 0, 0),
    ):
        given = arguments.of_features(spec, phase, gain, None if call.in_order else positions)
        made.append((x, (*given, first)))
    features = [ops.widen(x, *given) for x, given in made]
    return features[0], features[1], tuple(_recipe(x, given) for x, given in made)


def _recipe(x: Tensor, given: tuple[Any, ...]) -> Callable[[], Tensor]:
    """Makes features again, of the very numbers they were made of."""
    x, given = x.detach(), _detached(given)
    kept = [value for value in (x, *given) if isinstance(value, Tensor)]
    versions = [value._version for value in kept]

    def make() -> Tensor:
        if [value._version for value in kept] != versions:
            raise RuntimeError(
                "queries, keys, positions or the phase were changed in place after attention, "
                "which needs them for its backward pass"
            )
        features: Tensor = ops.widen(x, *given)
        return features

    return make


def _detached(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in given)


def _forgetful(
    queries: Tensor, keys: Tensor, again: tuple[Callable[[], Tensor], ...]
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Hooks that save a recipe in place of whatever lies in the memory of the features."""
    recipes = {
        features.untyped_storage().data_ptr(): make
        for features, make in zip((queries, keys), again, strict=True)
    }

    def pack(x: Tensor) -> Any:
        make = recipes.get(x.untyped_storage().data_ptr())
        return x if make is None else (make, x.shape, x.stride(), x.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        make, shape, stride, offset = packed
        with torch.no_grad():
            features: Tensor = make()
        return features.as_strided(shape, stride, offset)

    return pack, unpack


def refuses(call: Call) -> str | None:
    """What neither the pre-pass nor any of the kernels does."""
    why = arguments.refuses(call.q, call.spec)
    if why is not None:
        return why
    wide = call.spec.feature_dim(call.q.shape[-1])
    if wide > arguments.WIDEST and not takes(call):
        return f"features would be {wide} wide, more than {arguments.WIDEST}"
    if call.v.shape[-1] > arguments.WIDEST:
        return f"it takes values up to {arguments.WIDEST} wide"
    return None


def reads_raw_keys(spec: ScoreSpec, device: torch.device) -> bool:
    """It does not: every step would widen the whole cache."""
    return False


BACKEND = Backend(run=run, refuses=refuses, reads_raw_keys=reads_raw_keys)
