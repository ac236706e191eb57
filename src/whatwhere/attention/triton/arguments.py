"""From a `Call` to what the operators take, and where they run at all."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from whatwhere.attention.call import Call
from whatwhere.attention.triton.problem import interpreted
from whatwhere.spec import ScoreSpec

# Channels of a head that a tile can hold.
WIDEST = 256

# Programs along the second axis of a grid, of which there is one for each head of each sequence.
_PROGRAMS = 65535


INSTALLED = find_spec("triton") is not None


def refuses(q: Tensor, spec: ScoreSpec) -> str | None:
    """Why kernels cannot run on queries of this device and dtype, or ``None``."""
    if not INSTALLED:
        return "the package triton is not installed"
    if q.device.type == "cpu":
        if not interpreted():
            return "it runs on a CUDA device (on a CPU under TRITON_INTERPRET=1 alone, to test it)"
        if q.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
    elif q.device.type != "cuda":
        return f"it runs on a CUDA device, the call is on {q.device.type}"
    elif torch.version.hip is not None:
        return "it was made for NVIDIA's devices"
    elif torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if q.shape[0] * q.shape[1] > _PROGRAMS:
        return f"it takes {_PROGRAMS} heads of sequences at the most"
    if q.dtype == torch.float64:
        return "it computes bfloat16, float16 and float32, not float64"
    if spec.softcap is not None:
        return "its kernels have no softcap"
    return None


def of(call: Call) -> tuple[Any, ...]:
    """The fields of a `Score`, in the order in which the operators take them."""
    in_order = call.in_order
    return (
        *of_spec(call.spec),
        None if in_order else call.query_positions,
        None if in_order else call.key_positions,
        call.key_mask,
        call.query_segments,
        call.key_segments,
        call.causal,
        call.window or 0,
        tf32(call.q),
    )


def of_spec(spec: ScoreSpec) -> tuple[Any, ...]:
    """The first fields of a `Score`: those that say which score."""
    return (
        spec.feature,
        spec.magnitude,
        spec.num_frequencies if spec.feature == "polar" else 0,
        _inv_freq(spec),
        spec.phase if _turning(spec) else None,
        spec.slopes,
        float(spec.scale),
        spec.temperature_length or 0,
    )


def tf32(q: Tensor) -> bool:
    """Whether float32 products may be rounded to TF32: only if PyTorch was asked to."""
    return q.dtype == torch.float32 and _tf32_asked()


def _tf32_asked() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# What torch.compiler.assume_constant_result sets: Dynamo cannot read the setting, and a compiled
# call keeps what it was.
_tf32_asked._dynamo_marked_constant = True  # type: ignore[attr-defined]


def of_features(
    spec: ScoreSpec, phase: Tensor | None, temperature_length: int, positions: Tensor | None
) -> tuple[Any, ...]:
    """What the operator that widens takes after its tensor, but for the first position."""
    return (
        spec.feature,
        spec.magnitude,
        spec.num_frequencies if spec.feature == "polar" else 0,
        _inv_freq(spec),
        phase,
        temperature_length,
        positions,
    )


def _turning(spec: ScoreSpec) -> int:
    # Pairs lie apart by the number of all of them, so that none is left out.
    return spec.num_frequencies if spec.feature == "rotate" else spec.num_turning


def _inv_freq(spec: ScoreSpec) -> Tensor | None:
    turning = _turning(spec)
    return spec.inv_freq[:, :turning] if spec.inv_freq is not None and turning else None
