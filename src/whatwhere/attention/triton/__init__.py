"""Backend ``triton``: our own kernels, with the memory of RoPE's fused attention.

Queries and keys are loaded ``D`` wide and turned inside, so that nothing ``2 D`` wide is ever
stored; only q, k, v, the output and the log-sum-exp are kept for the backward pass. Few queries
without gradients (decoding) go to a kernel that splits the keys among programs.

Triton itself is imported when a kernel first runs.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.call import Backend, Call
from whatwhere.attention.triton import ops
from whatwhere.attention.triton.problem import interpreted
from whatwhere.spec import ScoreSpec

# Queries up to which splitting the keys pays; beyond, tiles of queries fill the device.
DECODE_QUERIES = 16
_WIDEST = 256


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def refuses(call: Call) -> str | None:
    """What the kernels do not do."""
    if not _installed():
        return "the package triton is not installed"
    if call.q.device.type == "cpu":
        if not interpreted():
            return "it runs on a CUDA device (on a CPU under TRITON_INTERPRET=1 alone, to test it)"
        if call.q.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
    elif call.q.device.type != "cuda":
        return f"it runs on a CUDA device, the call is on {call.q.device.type}"
    elif torch.cuda.get_device_capability(call.q.device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if call.q.dtype == torch.float64:
        return "it computes bfloat16, float16 and float32, not float64"
    if max(call.q.shape[-1], call.v.shape[-1]) > _WIDEST:
        return f"it takes head_dim and value widths up to {_WIDEST}"
    return None


def run(call: Call) -> Tensor:
    """Decode where that pays, else the tiled kernels."""
    arguments = score_arguments(call)
    if call.q.shape[2] <= DECODE_QUERIES and not call.needs_grad:
        out: Tensor = ops.flash_decode(call.q, call.k, call.v, *arguments, None, None, True)
        return out
    found: Tensor = ops.flash_forward(call.q, call.k, call.v, *arguments)[0]
    return found


def score_arguments(call: Call) -> tuple[Any, ...]:
    """The fields of a `Score`, in the order in which the operators take them."""
    spec = call.spec
    pairs = spec.feature == "rotate"
    # Pairs lie apart by the number of all of them, so that none is left out.
    turning = spec.num_frequencies if pairs else spec.num_turning
    inv_freq = None
    if spec.inv_freq is not None and turning:
        inv_freq = spec.inv_freq[:, :turning]
    in_order = call.in_order
    return (
        spec.feature,
        spec.magnitude,
        spec.num_frequencies if spec.feature == "polar" else 0,
        inv_freq,
        spec.phase if turning else None,
        spec.slopes,
        float(spec.scale),
        spec.temperature_length or 0,
        None if in_order else call.query_positions,
        None if in_order else call.key_positions,
        call.key_mask,
        call.query_segments,
        call.key_segments,
        call.causal,
        call.window or 0,
        call.q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32,
    )


def reads_raw_keys(spec: ScoreSpec, device: torch.device) -> bool:
    """On a GPU the decoding kernel turns keys as it reads them."""
    return device.type == "cuda" and spec.feature == "polar" and _installed()


BACKEND = Backend(run=run, refuses=refuses, reads_raw_keys=reads_raw_keys)
